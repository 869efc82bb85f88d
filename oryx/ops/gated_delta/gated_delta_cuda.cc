// The gated delta rule on CUDA: hands tensors to the launchers of cuda/. gated_delta.cc says which inputs come here.
#include <torch/library.h>

#include "oryx/ops/gated_delta/delta_rule_cuda.h"
#include "oryx/ops/gated_delta/gated_delta_internal.h"

namespace oryx::ops {
namespace {

struct GatedDeltaRule {
  using Problem = gated_delta::Problem;
  using Arguments = OryxGatedDelta;
  using Gradients = OryxGatedDeltaGradients;
  static constexpr const char* kName = "gated_delta_rule";
  static constexpr auto check = gated_delta::check_shapes;
  static constexpr auto saved = oryx_gated_delta_saved, workspace = oryx_gated_delta_workspace, backward_workspace = oryx_gated_delta_backward_workspace;
  static constexpr auto forward = oryx_gated_delta_forward;
  static constexpr auto backward = oryx_gated_delta_backward;
};

}  // namespace

TORCH_LIBRARY_IMPL(oryx, CUDA, m) {
  m.impl("_gated_delta_rule", delta::forward_cuda<GatedDeltaRule>);
  m.impl("_gated_delta_rule_backward", delta::backward_cuda<GatedDeltaRule>);
}

}  // namespace oryx::ops
