# The libFuzzer program of the readers of foreign bytes (preset `asan`, target `fuzz`, clang; docs/reliability.md).
if(NOT ORYX_SANITIZE OR NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
  return()
endif()
add_executable(fuzz_readers EXCLUDE_FROM_ALL tests/fuzz/fuzz.cc tests/support/readers.cc)
target_link_libraries(fuzz_readers PRIVATE oryx oryx_options)
target_link_options(fuzz_readers PRIVATE -fsanitize=fuzzer)
target_precompile_headers(fuzz_readers REUSE_FROM oryx)
add_custom_target(fuzz DEPENDS fuzz_readers oryx_plugins)
