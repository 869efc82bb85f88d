// Kimi Delta Attention on CUDA: hands tensors to the launchers of cuda/. kda.cc says which inputs come here.
#include <torch/library.h>

#include "oryx/ops/gated_delta/delta_rule_cuda.h"
#include "oryx/ops/kda/cuda/kda_cuda.h"
#include "oryx/ops/kda/kda_internal.h"

namespace oryx::ops {
namespace {

struct KimiDeltaAttention {
  using Problem = kimi::Problem;
  using Arguments = OryxKda;
  using Gradients = OryxKdaGradients;
  static constexpr const char* kName = "kda";
  static constexpr auto check = kimi::check_shapes;
  static constexpr auto saved = oryx_kda_saved, workspace = oryx_kda_workspace, backward_workspace = oryx_kda_backward_workspace;
  static constexpr auto forward = oryx_kda_forward;
  static constexpr auto backward = oryx_kda_backward;
};

}  // namespace

TORCH_LIBRARY_IMPL(oryx, CUDA, m) {
  m.impl("_kda", delta::forward_cuda<KimiDeltaAttention>);
  m.impl("_kda_backward", delta::backward_cuda<KimiDeltaAttention>);
}

}  // namespace oryx::ops
