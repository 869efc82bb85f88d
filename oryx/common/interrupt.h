// Ctrl-C and SIGTERM as a normal way to stop: long work asks between steps, saves, and throws Interrupted.
#pragma once

namespace oryx {

// From now on SIGINT and SIGTERM only set a flag; a second one ends the process at once, as it would have without us.
void catch_interrupts();
bool interrupted();
// Throws Interrupted("interrupted") when the flag is set.
void check_interrupt();

// For work that cannot ask, a library's: while one lives, Ctrl-C and SIGTERM end the process at once, with the line and the exit code (130) of other interrupts. Such
// work must have written nothing by halves.
class InterruptsEndAtOnce {
 public:
  InterruptsEndAtOnce();
  ~InterruptsEndAtOnce();
  InterruptsEndAtOnce(const InterruptsEndAtOnce&) = delete;
  InterruptsEndAtOnce& operator=(const InterruptsEndAtOnce&) = delete;

 private:
  void (*on_int_)(int);
  void (*on_term_)(int);
};

}  // namespace oryx
