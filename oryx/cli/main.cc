#include <malloc.h>

#include <csignal>
#include <cstdlib>

#include "oryx/cli/command.h"
#include "oryx/common/interrupt.h"

namespace {

// The C library hands large blocks back to the system as soon as they are freed, and every operator's output is then faulted in anew,
// page by page. Here they are kept and used again, and large tensors ask for large pages; both unless the environment says otherwise.
void keep_freed_memory() {
#ifdef __GLIBC__
  if (std::getenv("MALLOC_MMAP_MAX_") == nullptr) mallopt(M_MMAP_MAX, 0);
  if (std::getenv("MALLOC_TRIM_THRESHOLD_") == nullptr) mallopt(M_TRIM_THRESHOLD, -1);
#endif
  setenv("THP_MEM_ALLOC_ENABLE", "1", /*overwrite=*/0);  // libtorch's own switch
}

}  // namespace

int main(int argc, char** argv) {
  // A closed pipe shall be an error of the write that meets it, not the end of a training run.
  std::signal(SIGPIPE, SIG_IGN);
  keep_freed_memory();
  const oryx::InterruptsEndAtOnce until_a_command_asks;  // those that leave something by halves catch interrupts themselves
  return oryx::cli::run_program({argv + 1, argv + argc});
}
