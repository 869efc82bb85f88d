# All benchmarks (oryx/**/*_bench.cc) in one program, built on demand: cmake --build build/cpu --target oryx_bench
find_package(benchmark QUIET)
if(benchmark_FOUND AND ORYX_BENCHES)
  add_executable(oryx_bench EXCLUDE_FROM_ALL ${ORYX_BENCHES})
  target_link_libraries(oryx_bench PRIVATE oryx oryx_options benchmark::benchmark_main)
  target_precompile_headers(oryx_bench REUSE_FROM oryx)
endif()
