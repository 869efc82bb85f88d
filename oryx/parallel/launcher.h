// Starts this program several times over on this host and watches the processes: as one they go on, stop at Ctrl-C, or end.
#pragma once

#include <cstdint>
#include <string>

namespace oryx {

// Runs `count` copies of this very command line, each with RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and returns when all have ended well.
// threads: of each, where OMP_NUM_THREADS is not set; 0: as they choose. The first Ctrl-C or SIGTERM goes on to all of them once, the second too. One that ends otherwise than well ends all others at
// once; throws Error with what it said, or by which signal it ended, and Interrupted with rank 0's word where they were interrupted.
void run_processes(int64_t count, int64_t threads);

// In a process that a launcher of ours started: it ends with its launcher, and says errors through it. False elsewhere.
bool begin_launched_process();
// The line goes to the launcher, which says it once for all. False where there is none: the caller says it itself.
bool report_to_launcher(int code, const std::string& text);

}  // namespace oryx
