// Processes that train together: what they say to one another, and sums over their tensors. Added to by deriving from it; who uses one knows no transport.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "oryx/parallel/ring.h"

namespace oryx {

// Every rank calls the same functions in the same order. All throw PeerLost where another rank has ended, as far as they notice: on GPUs the launcher does.
class ProcessGroup {
 public:
  // Of tensors on the CPU, which go around the ring.
  explicit ProcessGroup(std::unique_ptr<Ring> ring) : ring_(std::move(ring)) {}
  virtual ~ProcessGroup() = default;
  ProcessGroup(const ProcessGroup&) = delete;
  ProcessGroup& operator=(const ProcessGroup&) = delete;

  int64_t rank() const { return ring_->rank(); }
  int64_t size() const { return ring_->size(); }
  bool first() const { return rank() == 0; }
  virtual at::Device device() const { return at::kCPU; }  // of this rank

  // Between the hosts; for tensors of the device too, once what was asked of it is done.
  std::vector<std::string> gather(const std::string& own) { return ring_->gather(own); }
  bool any(bool own);
  // Throws Error on every rank, naming a rank that says another thing than rank 0.
  void require_same(const std::string& own, const std::string& what);

  // parts: contiguous, size() parts of equal length one behind the other, in place. The sums are in a fixed order: the same bits at each call.
  // float32 or float64: afterwards the own part holds the sum over the ranks, the others are undefined.
  virtual void reduce_scatter(const at::Tensor& parts);
  // Any type: the own part of each rank goes to all.
  virtual void all_gather(const at::Tensor& parts);
  // float32 or float64, few values: the sum, on every rank the same bits.
  virtual void all_reduce(const at::Tensor& values);
  // What was asked for is done before what the caller's current stream does next. On the CPU it is done already.
  virtual void finish() {}
  // How tensors travel, for people: "TCP", "NCCL 2.28.9".
  virtual std::string transport() const { return "TCP"; }

 protected:
  Ring& ring() { return *ring_; }

 private:
  std::unique_ptr<Ring> ring_;
};

// Of tensors on `device`. Returns when all processes have joined. Throws Error.
std::unique_ptr<ProcessGroup> join_group(const Place& place, at::Device device);

namespace detail {
using DeviceGroupFactory = std::unique_ptr<ProcessGroup> (*)(std::unique_ptr<Ring> ring, at::Device device);
bool register_device_group(DeviceGroupFactory factory);
}  // namespace detail

}  // namespace oryx
