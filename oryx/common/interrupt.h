// Ctrl-C and SIGTERM as a normal way to stop: long work asks between steps, saves, and throws Interrupted.
#pragma once

namespace oryx {

// From now on SIGINT and SIGTERM only set a flag; a second one ends the process at once, as it would have without us.
void catch_interrupts();
bool interrupted();
// Throws Interrupted("interrupted") when the flag is set.
void check_interrupt();

}  // namespace oryx
