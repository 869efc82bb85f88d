#include "oryx/common/interrupt.h"

#include <csignal>

#include "oryx/common/error.h"

namespace oryx {

namespace {
volatile std::sig_atomic_t flag = 0;

void on_signal(int number) {
  flag = 1;
  std::signal(number, SIG_DFL);
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

}  // namespace oryx
