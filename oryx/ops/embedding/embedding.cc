#include "oryx/ops/embedding/embedding.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "oryx/ops/fixed_order.h"

namespace oryx::ops {
namespace {

struct Embedding : torch::autograd::Function<Embedding> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& weight, const at::Tensor& ids) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({ids});
    ctx->saved_data["rows"] = weight.size(0);
    return at::embedding(weight, ids);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const FixedOrder fixed;
    return {at::embedding_dense_backward(grads[0], ctx->get_saved_variables()[0], ctx->saved_data["rows"].toInt(), -1, false), at::Tensor()};
  }
};

}  // namespace

at::Tensor embedding(const at::Tensor& weight, const at::Tensor& ids) {
  const bool atomic = weight.is_cuda() && at::GradMode::is_enabled() && weight.requires_grad();
  return atomic ? Embedding::apply(weight, ids) : at::embedding(weight, ids);
}

}  // namespace oryx::ops
