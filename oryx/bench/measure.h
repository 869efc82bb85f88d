// What every benchmark of the program measures with: clocks, memory, and what the machine is.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "oryx/common/json.h"

namespace oryx {

struct Times {
  std::vector<double> seconds;      // one a repetition, in the order taken
  std::vector<double> cpu_seconds;  // of the processor, all threads together: moves less than `seconds` where others work too
  double median() const;
  double min() const;
  double cpu_median() const;
};

// `warmup` calls that are not counted, then `repeat` that are. Throws Interrupted between calls after Ctrl-C.
Times time_repeated(int64_t warmup, int64_t repeat, const std::function<void()>& f);

// The same on a GPU, between events of its stream: nothing waits between the calls, as nothing does in training.
Times time_repeated_on(at::Device device, int64_t warmup, int64_t repeat, const std::function<void()>& f);
// The most bytes of a GPU's memory that tensors have taken at once since the process or reset_peak_device_memory() began.
int64_t peak_device_memory(at::Device device);
void reset_peak_device_memory(at::Device device);

// Bytes of this process in memory now, and the most since reset_peak_memory() (or since it began).
int64_t resident_memory();
int64_t peak_memory();
// Hands freed memory back and starts the peak anew. False where the system cannot (it wants Linux's /proc/self/clear_refs): the peak
// then stays that of the whole run.
bool reset_peak_memory();

// Processor, cores, threads in use, memory, load average, versions: what a figure is worth nothing without.
Json describe_machine();

}  // namespace oryx
