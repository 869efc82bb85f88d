#include "oryx/ops/halves/halves.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace oryx::ops {

at::Tensor bfloat16_halves(at::TensorList parts) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("oryx::_bfloat16_halves", "").typed<at::Tensor(at::TensorList)>();
  return op.call(parts);
}

}  // namespace oryx::ops

TORCH_LIBRARY_FRAGMENT(oryx, m) { m.def("_bfloat16_halves(Tensor[] parts) -> Tensor"); }
