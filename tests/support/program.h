// Runs the built program (build/<preset>/oryx) as a user does.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace oryx::test {

struct ProgramResult {
  int exit_code = -1;  // 128 + the signal when one ended it
  std::string out, err;
};

struct ProgramOptions {
  std::string input = {};                       // what stands on standard input
  std::string folder = {};                      // working folder; default: the tests' own
  std::string stdout_path = {};                 // standard output goes there ("/dev/full") and `out` stays empty
  std::map<std::string, std::string> env = {};  // added to the tests' own environment
};

ProgramResult run(const std::vector<std::string>& args, const ProgramOptions& options = {});

// The same, with SIGINT as Ctrl-C sends it, `delay` seconds after the program catches it and the shell's condition `when` holds ($! is the program, $out a file that its
// standard output goes to).
ProgramResult run_interrupted(const std::vector<std::string>& args, const std::string& when, double delay = 0);

// The same for any program, found in PATH when its name holds no slash.
ProgramResult run_command(const std::vector<std::string>& command, const ProgramOptions& options = {});

}  // namespace oryx::test
