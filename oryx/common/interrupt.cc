#include "oryx/common/interrupt.h"

#include <unistd.h>

#include <csignal>

#include "oryx/common/error.h"

namespace oryx {

namespace {
volatile std::sig_atomic_t flag = 0;

void on_signal(int number) {
  flag = 1;
  std::signal(number, SIG_DFL);
}

void end_at_once(int) {
  constexpr char line[] = "oryx: error: interrupted\n";
  (void)!::write(STDERR_FILENO, line, sizeof line - 1);
  ::_exit(130);
}
}  // namespace

void catch_interrupts() {
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
}

bool interrupted() { return flag != 0; }

void check_interrupt() {
  if (interrupted()) throw Interrupted("interrupted");
}

InterruptsEndAtOnce::InterruptsEndAtOnce() {
  check_interrupt();
  on_int_ = std::signal(SIGINT, end_at_once);
  on_term_ = std::signal(SIGTERM, end_at_once);
}

InterruptsEndAtOnce::~InterruptsEndAtOnce() {
  std::signal(SIGINT, on_int_);
  std::signal(SIGTERM, on_term_);
}

}  // namespace oryx
