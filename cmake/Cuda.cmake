# CUDA kernels (oryx/**/*.cu) for Hopper, and the files that register them (oryx/**/*_cuda.cc). Nothing here without ORYX_CUDA.
if(NOT ORYX_CUDA)
  return()
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF)  # CMake 3.25 does not know 90a: -gencode below
set(CMAKE_CUDA_RUNTIME_LIBRARY None)  # the one that libtorch_cuda loads, found below
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(ORYX_NVCC nvcc HINTS /usr/local/cuda/bin "${TORCH_DIR}/../nvidia/cu13/bin")
  if(NOT ORYX_NVCC)
    message(FATAL_ERROR "nvcc not found on PATH, in /usr/local/cuda/bin or beside libtorch. `make PRESET=cuda` fetches it; or name it: -DCMAKE_CUDA_COMPILER=/path/to/nvcc (13.0)")
  endif()
  set(CMAKE_CUDA_COMPILER "${ORYX_NVCC}")
endif()
enable_language(CUDA)
if(CCACHE AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
endif()
set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")  # which CMake 3.25 does not know of nvcc 13
set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")

# Kernels include no torch header: a library of their own, whose flags are nvcc's.
file(GLOB_RECURSE ORYX_CUDA_KERNELS CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/oryx/*.cu")
add_library(oryx_cuda_kernels OBJECT ${ORYX_CUDA_KERNELS})
set_target_properties(oryx_cuda_kernels PROPERTIES CUDA_STANDARD 20)
target_include_directories(oryx_cuda_kernels PRIVATE "${CMAKE_SOURCE_DIR}")
target_compile_options(oryx_cuda_kernels PRIVATE -O3 -gencode=arch=compute_90a,code=sm_90a -Xcompiler=-fPIC)
if(ORYX_COMPUTE_SANITIZER)
  target_compile_definitions(oryx_cuda_kernels PRIVATE ORYX_COMPUTE_SANITIZER)
  target_compile_options(oryx_cuda_kernels PRIVATE -lineinfo)
endif()
target_link_libraries(oryx PRIVATE $<TARGET_OBJECTS:oryx_cuda_kernels>)

# c10/cuda includes the toolkit's headers; the flags of other files stay as they are in a build without CUDA.
set(ORYX_CUDA_GLUE ${ORYX_SOURCES})
list(FILTER ORYX_CUDA_GLUE INCLUDE REGEX "_cuda\\.cc$")
set_source_files_properties(${ORYX_CUDA_GLUE} PROPERTIES COMPILE_OPTIONS "-isystem;${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES}")

set(_cudart_names "")
foreach(_dir IN LISTS LibTorch_LIBRARY_DIRS)
  file(GLOB _found "${_dir}/libcudart.so.*")
  list(APPEND _cudart_names ${_found})
endforeach()
if(NOT _cudart_names)
  message(FATAL_ERROR "libcudart not found beside libtorch (${LibTorch_LIBRARY_DIRS}). Install nvidia-cuda-runtime of torch's CUDA version")
endif()
list(GET _cudart_names 0 _cudart)
target_link_libraries(oryx PUBLIC "${_cudart}")
