// What the CPU's and CUDA's forms of cross-entropy share.
#pragma once

#include <ATen/core/Tensor.h>

namespace oryx::ops {

// Checks every target of a contiguous int64 tensor on the CPU and returns how many are kept. A target that is neither ignore_index
// nor in [0, classes) is an oryx::Error in the name of `op`.
int64_t count_kept(const char* op, const at::Tensor& targets, int64_t classes, int64_t ignore_index);

}  // namespace oryx::ops
