#include "oryx/parallel/process_group.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "oryx/common/error.h"

namespace oryx {

namespace {

// Filled by a static initialiser of a build with CUDA, read-only afterwards.
detail::DeviceGroupFactory& device_group_factory() {
  static detail::DeviceGroupFactory f = nullptr;
  return f;
}

void check_parts(const at::Tensor& x, int64_t size, bool sums) {
  TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.numel() % size == 0, "process group: expected a contiguous tensor of the CPU in ", size, " equal parts");
  TORCH_CHECK(!sums || x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, "process group: sums of ", x.scalar_type(), ", expected float32 or float64");
}

}  // namespace

bool detail::register_device_group(DeviceGroupFactory f) {
  device_group_factory() = f;
  return true;
}

bool ProcessGroup::any(bool own) {
  std::vector<char> all(static_cast<size_t>(size()));
  all[static_cast<size_t>(rank())] = own ? 1 : 0;
  ring_->all_gather(all.data(), 1);
  return std::any_of(all.begin(), all.end(), [](char c) { return c != 0; });
}

void ProcessGroup::require_same(const std::string& own, const std::string& what) {
  const auto all = gather(own);
  for (size_t r = 1; r < all.size(); ++r) {
    if (all[r] == all[0]) continue;
    const bool brief = all[r].size() + all[0].size() < 100;
    fail("rank {} has other {} than rank 0{}; all processes must be started alike, on the same files", r, what, brief ? fmt::format(": '{}' and '{}'", all[r], all[0]) : "");
  }
}

void ProcessGroup::reduce_scatter(const at::Tensor& parts) {
  check_parts(parts, size(), true);
  const auto count = static_cast<size_t>(parts.numel() / size());
  if (parts.scalar_type() == at::kFloat) return ring_->reduce_scatter(parts.mutable_data_ptr<float>(), count);
  ring_->reduce_scatter(parts.mutable_data_ptr<double>(), count);
}

void ProcessGroup::all_gather(const at::Tensor& parts) {
  check_parts(parts, size(), false);
  ring_->all_gather(parts.mutable_data_ptr(), parts.nbytes() / static_cast<size_t>(size()));
}

void ProcessGroup::all_reduce(const at::Tensor& values) {
  check_parts(values, 1, true);
  at::Tensor all = at::empty({size(), values.numel()}, values.options());
  all[rank()].copy_(values.view({-1}));
  ProcessGroup::all_gather(all);  // of the host, whatever a group of devices makes of its own
  at::Tensor sum = all[0].clone();
  for (int64_t r = 1; r < size(); ++r) sum.add_(all[r]);
  at::Tensor(values).view({-1}).copy_(sum);
}

std::unique_ptr<ProcessGroup> join_group(const Place& place, at::Device device) {
  auto ring = std::make_unique<Ring>(place);
  if (device.is_cpu()) return std::make_unique<ProcessGroup>(std::move(ring));
  TORCH_CHECK(device_group_factory() != nullptr, "process group: this build has no CUDA");
  return device_group_factory()(std::move(ring), device);
}

}  // namespace oryx
