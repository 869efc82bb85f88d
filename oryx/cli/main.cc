#include <csignal>

#include "oryx/cli/command.h"

int main(int argc, char** argv) {
  // A closed pipe shall be an error of the write that meets it, not the end of a training run.
  std::signal(SIGPIPE, SIG_IGN);
  return oryx::cli::run_program({argv + 1, argv + argc});
}
