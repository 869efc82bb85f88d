// What the kernels of any CUDA program take, by name: a library that the driver loads into it.
//
//   g++ -std=c++20 -O2 -fPIC -shared tools/kernel_times.cc -I/usr/local/cuda/include -L DIR_OF_LIBCUPTI -lcupti -o libkernel_times.so
//   CUDA_INJECTION64_PATH=$PWD/libkernel_times.so KERNEL_TIMES_FROM=0.5 oryx bench step 130m --device cuda ...
//
// Prints to standard error when the program ends: for each kernel, copy and fill its calls, total and mean time, and the share of the time in which the GPU was
// busy; then how long it was busy and idle. Only what began behind KERNEL_TIMES_FROM of the time from the first kernel to the last counts (0 without it).
#include <cupti.h>
#include <cxxabi.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

struct Record {
  uint64_t begin, end;
  std::string name;
};
std::vector<Record> records;
std::mutex guard;

std::string readable(const char* name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string s = status == 0 && text != nullptr ? text : name;
  std::free(text);
  return s.substr(0, 150);
}

void CUPTIAPI give_buffer(uint8_t** buffer, size_t* size, size_t* most) {
  *size = 8 << 20;
  *most = 0;
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, *size));
}

void CUPTIAPI take_buffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid) {
  const std::lock_guard lock(guard);
  CUpti_Activity* a = nullptr;
  while (cuptiActivityGetNextRecord(buffer, valid, &a) == CUPTI_SUCCESS) {
    if (a->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
      const auto* k = reinterpret_cast<const CUpti_ActivityKernel9*>(a);
      records.push_back({k->start, k->end, k->name});
    } else if (a->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
      const auto* m = reinterpret_cast<const CUpti_ActivityMemcpy5*>(a);
      const char* kinds[] = {"?", "to device", "to host", "to array", "from array", "array to array", "array to device", "device to array", "in device"};
      records.push_back({m->start, m->end, std::string("[copy ") + kinds[m->copyKind < 9 ? m->copyKind : 0] + "]"});
    } else if (a->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
      const auto* m = reinterpret_cast<const CUpti_ActivityMemset4*>(a);
      records.push_back({m->start, m->end, "[fill]"});
    }
  }
  std::free(buffer);
}

struct Sum {
  uint64_t ns = 0;
  int calls = 0;
};

void report() {
  cuptiActivityFlushAll(1);
  const std::lock_guard lock(guard);
  if (records.empty()) return;
  std::sort(records.begin(), records.end(), [](const Record& a, const Record& b) { return a.begin < b.begin; });
  const char* from = std::getenv("KERNEL_TIMES_FROM");
  const uint64_t first = records.front().begin, last = records.back().end;
  const uint64_t start = first + static_cast<uint64_t>((from != nullptr ? std::atof(from) : 0.0) * static_cast<double>(last - first));
  std::map<std::string, Sum> by_name;
  uint64_t busy = 0, at = start;
  for (const Record& r : records) {
    if (r.begin < start) continue;
    Sum& s = by_name[r.name];
    s.ns += r.end - r.begin;
    ++s.calls;
    if (r.end > at) busy += r.end - std::max(at, r.begin);
    at = std::max(at, r.end);
  }
  std::vector<std::pair<std::string, Sum>> sorted(by_name.begin(), by_name.end());
  std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.second.ns > b.second.ns; });
  std::fprintf(stderr, "%10s %7s %10s %6s  kernel\n", "ms", "calls", "us each", "share");
  for (const auto& [name, s] : sorted) {
    std::fprintf(stderr, "%10.3f %7d %10.2f %5.1f%%  %s\n", 1e-6 * static_cast<double>(s.ns), s.calls, 1e-3 * static_cast<double>(s.ns) / s.calls,
                 100.0 * static_cast<double>(s.ns) / static_cast<double>(busy), readable(name.c_str()).c_str());
  }
  std::fprintf(stderr, "busy %.3f ms, idle %.3f ms\n", 1e-6 * static_cast<double>(busy), 1e-6 * static_cast<double>(last - start - busy));
}

}  // namespace

extern "C" int InitializeInjection() {
  cuptiActivityRegisterCallbacks(give_buffer, take_buffer);
  for (const auto kind : {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMSET}) cuptiActivityEnable(kind);
  std::atexit(report);
  return 1;
}
