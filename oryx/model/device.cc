#include "oryx/model/device.h"

#include <ATen/ATen.h>

#include <charconv>

#include "oryx/common/error.h"

namespace oryx {

at::Device parse_device(const std::string& text) {
  if (text == "cpu") return at::kCPU;
  int index = 0;
  bool known = text == "cuda";
  if (text.starts_with("cuda:")) {
    const char *begin = text.data() + 5, *end = text.data() + text.size();
    const auto parsed = std::from_chars(begin, end, index);
    known = begin != end && parsed.ec == std::errc() && parsed.ptr == end && index >= 0;
  }
  if (!known) fail("device is '{}', expected cpu, cuda or cuda:N", text);
  const auto count = static_cast<int>(at::hasCUDA() ? at::getNumGPUs() : 0);
  if (index >= count) {
    fail("device '{}': {}; use device cpu, or see docs/cuda.md", text,
         !at::hasCUDA() ? "this build or machine has no CUDA"
                        : count == 0 ? std::string("there is no GPU") : fmt::format("there are {} GPUs, counted from 0", count));
  }
  return {at::kCUDA, static_cast<at::DeviceIndex>(index)};
}

at::Tensor to_device(const at::Tensor& x, at::Device device) {
  if (x.device() == device) return x;
  if (!x.is_cpu() || !device.is_cuda() || x.numel() == 0) return x.to(device);
  return x.pin_memory().to(device, /*non_blocking=*/true);
}

}  // namespace oryx
