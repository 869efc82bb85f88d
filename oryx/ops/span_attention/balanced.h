// Tasks of unequal length on all threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace oryx::ops {

// Runs work(i, scratch) for i < n on all threads, each taking the next free one: put the longest first. Which thread
// runs what must not change the result.
template <typename Work>
void run_balanced(int64_t n, int64_t scratch_floats, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(n, at::get_num_threads());
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    constexpr size_t kLine = 64;
    const std::unique_ptr<float[]> memory(new float[static_cast<size_t>(scratch_floats) + kLine / sizeof(float)]);
    void* aligned = memory.get();
    size_t room = (static_cast<size_t>(scratch_floats) + kLine / sizeof(float)) * sizeof(float);
    std::align(kLine, static_cast<size_t>(scratch_floats) * sizeof(float), aligned, room);
    for (int64_t i = next++; i < n; i = next++) work(i, static_cast<float*>(aligned));
  });
}

}  // namespace oryx::ops
