# One test program a room (oryx/<room>/**/*_test.cc) and one for what crosses rooms (tests/*_test.cc).
include(CTest)
if(NOT BUILD_TESTING)
  return()
endif()
find_package(GTest REQUIRED)
include(GoogleTest)

add_library(oryx_test_support STATIC tests/support/main.cc)
file(GLOB _support CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/tests/support/*.cc")
target_sources(oryx_test_support PRIVATE ${_support})
target_link_libraries(oryx_test_support PUBLIC oryx oryx_options GTest::gtest GTest::gmock PkgConfig::ZSTD)
target_include_directories(oryx_test_support PUBLIC "${CMAKE_SOURCE_DIR}")
# For that file alone: a definition for all would set the tests' objects of two checkouts apart.
set_property(SOURCE "${CMAKE_SOURCE_DIR}/tests/support/paths.cc" APPEND PROPERTY COMPILE_DEFINITIONS
  ORYX_SOURCE_DIR="${CMAKE_SOURCE_DIR}" ORYX_PROGRAM="${CMAKE_BINARY_DIR}/oryx")
set_source_files_properties("${CMAKE_SOURCE_DIR}/tests/support/paths.cc" PROPERTIES SKIP_PRECOMPILE_HEADERS ON)
target_precompile_headers(oryx_test_support REUSE_FROM oryx)
oryx_unity(oryx_test_support 8)

function(oryx_add_tests room)
  if(NOT ARGN)
    return()
  endif()
  set(_threads 1)
  if(room STREQUAL "ops")
    set(_threads 2)
  endif()
  add_executable(test_${room} ${ARGN})
  target_link_libraries(test_${room} PRIVATE oryx_test_support)
  target_precompile_headers(test_${room} REUSE_FROM oryx)
  oryx_unity(test_${room} 4)
  add_dependencies(test_${room} oryx_plugins)
  set_target_properties(test_${room} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/tests")
  gtest_discover_tests(test_${room} DISCOVERY_MODE PRE_TEST WORKING_DIRECTORY "${CMAKE_SOURCE_DIR}" PROPERTIES TIMEOUT 300
    # Tests run side by side: one thread each, or small products would spend their time waiting for one another (up to ninety times as long on two
    # busy cores). Operators have two, so that their parallel regions are tested.
    ENVIRONMENT "OMP_NUM_THREADS=${_threads};OMP_WAIT_POLICY=passive")
endfunction()

file(GLOB _rooms RELATIVE "${CMAKE_SOURCE_DIR}/oryx" "${CMAKE_SOURCE_DIR}/oryx/*")
foreach(_room IN LISTS _rooms)
  set(_tests ${ORYX_TESTS})
  list(FILTER _tests INCLUDE REGEX "/oryx/${_room}/")
  oryx_add_tests(${_room} ${_tests})
endforeach()
if(TARGET test_cli)  # the program's files are not in the library
  target_link_libraries(test_cli PRIVATE oryx_command)
endif()
file(GLOB _crossing CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/tests/*_test.cc")
oryx_add_tests(program ${_crossing})
if(TARGET test_program)
  add_dependencies(test_program oryx_program)
endif()
