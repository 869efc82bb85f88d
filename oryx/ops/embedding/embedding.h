// Rows of a table, looked up, with gradients that are added in a fixed order on every device.
#pragma once

#include <ATen/core/Tensor.h>

namespace oryx::ops {

// weight [V, D], ids int32 or int64 of any shape, each in [0, V): weight[ids], [ids..., D]. libtorch adds the gradients of a small table from many ids (V x D below what fills a GPU)
// by atomic operations, whose order, and with it the last bits, differ from run to run; here it is told not to.
at::Tensor embedding(const at::Tensor& weight, const at::Tensor& ids);

}  // namespace oryx::ops
