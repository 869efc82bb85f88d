# oryx_unity(TARGET N): up to N files of one folder as one translation unit. Most of what a small file costs to compile are templates of the libraries'
# headers, instantiated once more for each unit: groups take more than half off a build from nothing, and a change of one file still rebuilds in seconds.
# -DORYX_UNITY=OFF compiles each file by itself (which also finds a missing include).
option(ORYX_UNITY "Compile files of one folder together" ON)

function(oryx_unity target size)
  if(NOT ORYX_UNITY)
    return()
  endif()
  set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP)
  get_target_property(_sources ${target} SOURCES)
  foreach(_source IN LISTS _sources)
    # Kernels and CUDA glue have compile options of their own, which keeps CMake from joining them.
    if(_source MATCHES "_kernels\\.cc$|_cuda\\.cc$")
      continue()
    endif()
    get_filename_component(_path "${_source}" ABSOLUTE)
    get_filename_component(_folder "${_path}" DIRECTORY)
    string(MAKE_C_IDENTIFIER "${_folder}" _key)
    math(EXPR _count_${_key} "0${_count_${_key}} + 1")
    math(EXPR _group "(${_count_${_key}} - 1) / ${size}")
    file(RELATIVE_PATH _name "${CMAKE_SOURCE_DIR}" "${_folder}")
    string(MAKE_C_IDENTIFIER "${_name}_${_group}" _name)
    set_source_files_properties("${_source}" PROPERTIES UNITY_GROUP "${_name}")
  endforeach()
endfunction()
