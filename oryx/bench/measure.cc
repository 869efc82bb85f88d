#include "oryx/bench/measure.h"

#include <ATen/Parallel.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <malloc.h>
#include <torch/headeronly/version.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <string>
#include <thread>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/interrupt.h"

namespace oryx {

namespace {

// The text behind "key:" in a file of such lines, "" when it is not there.
std::string line_value(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(':');
    if (!line.starts_with(key) || colon == std::string::npos) continue;
    const size_t begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

int64_t status_bytes(const std::string& key) {
  const std::string value = line_value("/proc/self/status", key);  // "12345 kB"
  if (value.empty()) fail("/proc/self/status has no {}: memory can be measured on Linux only", key);
  return std::strtoll(value.c_str(), nullptr, 10) * 1024;
}

double median_of(std::vector<double> x) {
  TORCH_CHECK(!x.empty(), "no times");
  std::sort(x.begin(), x.end());
  const size_t n = x.size();
  return n % 2 == 1 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

}  // namespace

double Times::median() const { return median_of(seconds); }

double Times::cpu_median() const { return median_of(cpu_seconds); }

double Times::min() const {
  TORCH_CHECK(!seconds.empty(), "no times");
  return *std::min_element(seconds.begin(), seconds.end());
}

Times time_repeated(int64_t warmup, int64_t repeat, const std::function<void()>& f) {
  Times times;
  for (int64_t i = 0; i < warmup + repeat; ++i) {
    check_interrupt();
    const auto start = std::chrono::steady_clock::now();
    const std::clock_t cpu_start = std::clock();
    f();
    if (i < warmup) continue;
    times.cpu_seconds.push_back(static_cast<double>(std::clock() - cpu_start) / CLOCKS_PER_SEC);
    times.seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return times;
}

Times time_repeated_on(at::Device device, int64_t warmup, int64_t repeat, const std::function<void()>& f) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  std::vector<c10::Event> ends;
  const auto mark = [&] {
    ends.emplace_back(device.type(), c10::EventFlag::BACKEND_DEFAULT);
    ends.back().record(guard.getStream(device));
  };
  Times times;
  for (int64_t i = 0; i < warmup; ++i) f();
  mark();
  for (int64_t i = 0; i < repeat; ++i) {
    check_interrupt();
    const std::clock_t cpu_start = std::clock();
    f();
    times.cpu_seconds.push_back(static_cast<double>(std::clock() - cpu_start) / CLOCKS_PER_SEC);
    mark();
  }
  guard.synchronizeDevice(device.index());
  for (size_t i = 1; i < ends.size(); ++i) times.seconds.push_back(1e-3 * ends[i - 1].elapsedTime(ends[i]));
  return times;
}

int64_t peak_device_memory(at::Device device) {
  const auto stats = c10::getDeviceAllocator(device.type())->getDeviceStats(device.index());
  return stats.allocated_bytes[0].peak;  // over all pools
}

void reset_peak_device_memory(at::Device device) { c10::getDeviceAllocator(device.type())->resetPeakStats(device.index()); }

int64_t resident_memory() { return status_bytes("VmRSS"); }

int64_t peak_memory() { return status_bytes("VmHWM"); }

bool reset_peak_memory() {
  malloc_trim(0);
  std::ofstream file("/proc/self/clear_refs");
  file << "5" << std::flush;  // proc(5): resets the peak of the resident set
  return file.good();
}

Json describe_machine() {
  double load[3] = {0, 0, 0};
  const int loads = getloadavg(load, 3);
  const auto memory = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE);
  return {{"processor", line_value("/proc/cpuinfo", "model name")},
          {"cores", std::thread::hardware_concurrency()},
          {"threads", at::get_num_threads()},
          {"memory_bytes", memory},
          {"load_average", loads > 0 ? Json(load[0]) : Json()},
          {"libtorch", TORCH_VERSION}};
}

}  // namespace oryx
