// The device that a user names.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <string>

namespace oryx {

// "cpu", "cuda" (the first GPU) or "cuda:N". Throws Error for anything else, and where this build or machine lacks it.
at::Device parse_device(const std::string& text);

// Dense bfloat16 products of an H100 or H200 (SXM), FLOP/s: what MFU, the share of them that a model's own FLOPs make, is counted against.
constexpr double kPeakFlops = 989.4e12;

// x on `device`, without waiting for it: a tensor of the CPU goes through pinned memory, in the order of the current stream.
at::Tensor to_device(const at::Tensor& x, at::Device device);

}  // namespace oryx
