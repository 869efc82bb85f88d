# Finds libtorch without TorchConfig.cmake: the one in a CUDA wheel demands a CUDA toolkit even for a CPU build.
#
# Looks in TORCH_DIR (cache or environment: a folder ".../site-packages/torch"), then in .deps/ as tools/setup.sh fills it.
# Defines the target LibTorch::torch (libtorch_cpu + libc10) and, with ORYX_CUDA, links libtorch_cuda + libc10_cuda too.
if(NOT TORCH_DIR)
  if(DEFINED ENV{TORCH_DIR} AND NOT "$ENV{TORCH_DIR}" STREQUAL "")
    set(TORCH_DIR "$ENV{TORCH_DIR}")
  else()
    file(GLOB _torch_candidates "${CMAKE_SOURCE_DIR}/.deps/venv/lib/python3*/site-packages/torch")
    list(LENGTH _torch_candidates _n)
    if(_n GREATER 0)
      list(GET _torch_candidates 0 TORCH_DIR)
    endif()
  endif()
endif()
if(NOT TORCH_DIR OR NOT EXISTS "${TORCH_DIR}/lib/libtorch_cpu.so")
  message(FATAL_ERROR "libtorch not found (TORCH_DIR='${TORCH_DIR}'). Run tools/setup.sh, or set TORCH_DIR to .../site-packages/torch")
endif()
set(TORCH_DIR "${TORCH_DIR}" CACHE PATH "the folder 'torch' of an installed torch wheel")

set(LibTorch_VERSION "")
foreach(_part MAJOR MINOR PATCH)
  file(STRINGS "${TORCH_DIR}/include/torch/headeronly/version.h" _line REGEX "define TORCH_VERSION_${_part} ")
  string(REGEX MATCH "[0-9]+" _number "${_line}")
  string(APPEND LibTorch_VERSION ".${_number}")
endforeach()
string(SUBSTRING "${LibTorch_VERSION}" 1 -1 LibTorch_VERSION)
message(STATUS "libtorch ${LibTorch_VERSION} in ${TORCH_DIR}")
if(NOT LibTorch_VERSION VERSION_GREATER_EQUAL 2.11)
  message(FATAL_ERROR "libtorch ${LibTorch_VERSION} is too old: 2.11 is wanted (TORCH_DIR=${TORCH_DIR})")
endif()

get_filename_component(_site "${TORCH_DIR}" DIRECTORY)
file(GLOB _nvidia_libs "${_site}/nvidia/*/lib")
set(LibTorch_LIBRARY_DIRS "${TORCH_DIR}/lib" ${_nvidia_libs})

add_library(LibTorch::torch INTERFACE IMPORTED)
target_include_directories(LibTorch::torch SYSTEM INTERFACE
  "${TORCH_DIR}/include" "${TORCH_DIR}/include/torch/csrc/api/include")
# fmt, whose headers libtorch ships: its compiled half is oryx/common/fmt.cc, in liboryx.
target_link_libraries(LibTorch::torch INTERFACE "${TORCH_DIR}/lib/libtorch_cpu.so" "${TORCH_DIR}/lib/libc10.so")
# at::parallel_for is an OpenMP region in the header: compiled without OpenMP it is silently serial. The runtime must be the one that libtorch
# loads, or two thread pools compete; the wheel ships its own.
# (clang, with which only the fuzzers are built, would bring another runtime: serial there.)
target_compile_options(LibTorch::torch INTERFACE $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CXX_COMPILER_ID:GNU>>:-fopenmp>)
if(EXISTS "${TORCH_DIR}/lib/libgomp.so.1")
  target_link_libraries(LibTorch::torch INTERFACE "${TORCH_DIR}/lib/libgomp.so.1")
else()
  target_link_options(LibTorch::torch INTERFACE -fopenmp)
endif()
foreach(_dir IN LISTS LibTorch_LIBRARY_DIRS)
  target_link_options(LibTorch::torch INTERFACE "-Wl,-rpath-link,${_dir}" "-Wl,-rpath,${_dir}")
endforeach()
if(ORYX_CUDA)
  # A wheel installed for CPU use lacks cuDNN, cuBLAS and the rest, which libtorch_cuda needs only where it runs.
  target_link_libraries(LibTorch::torch INTERFACE
    -Wl,--no-as-needed "${TORCH_DIR}/lib/libtorch_cuda.so" "${TORCH_DIR}/lib/libc10_cuda.so" -Wl,--as-needed)
  target_link_options(LibTorch::torch INTERFACE -Wl,--unresolved-symbols=ignore-in-shared-libs)
endif()
