// AdamW on CUDA: hands the lists of tensors to the launchers of cuda/adamw.cu.
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "oryx/ops/adamw/adamw_internal.h"
#include "oryx/ops/adamw/cuda/adamw_launch.h"
#include "oryx/ops/cuda/launch.h"

namespace oryx::ops {
namespace {

// The gradient as the launchers take it: contiguous, float32 or bfloat16.
at::Tensor usable(const at::Tensor& g) { return cuda::as_parameter(g); }

OryxAdamwConstants constants_of(int64_t step, const AdamwOptions& o, double grad_scale) {
  const double n = static_cast<double>(step);
  OryxAdamwConstants c{};
  c.grad_scale = static_cast<float>(grad_scale);
  c.keep = static_cast<float>(1 - o.lr * o.weight_decay);
  c.beta1 = static_cast<float>(o.beta1), c.one_less_beta1 = static_cast<float>(1 - o.beta1);
  c.beta2 = static_cast<float>(o.beta2), c.one_less_beta2 = static_cast<float>(1 - o.beta2);
  c.step_size = static_cast<float>(o.lr / (1 - std::pow(o.beta1, n)));
  c.inverse_root = static_cast<float>(1 / std::sqrt(1 - std::pow(o.beta2, n)));
  c.eps = static_cast<float>(o.eps);
  return c;
}

void adamw_cuda(at::TensorList p, at::TensorList g, at::TensorList m, at::TensorList v, int64_t step, double lr, double beta1, double beta2,
                double eps, double weight_decay, double grad_scale) {
  TORCH_CHECK(g.size() == p.size() && m.size() == p.size() && v.size() == p.size(), "adamw_step: lists of ", p.size(), ", ", g.size(), ", ",
              m.size(), " and ", v.size(), " tensors");
  TORCH_CHECK(step >= 1, "adamw_step: step is ", step, ", expected 1 or more");
  if (p.empty()) return;
  const c10::cuda::CUDAGuard guard(p[0].device());
  const AdamwOptions options{lr, beta1, beta2, eps, weight_decay};
  std::vector<OryxAdamwTensor> tensors;
  std::vector<at::Tensor> gradients;  // kept alive
  for (size_t i = 0; i < p.size(); ++i) {
    check_adamw(p[i], g[i], m[i], v[i]);
    TORCH_CHECK(p[i].device() == p[0].device() && m[i].device() == p[0].device() && v[i].device() == p[0].device(),
                "adamw_step: tensors on more than one device");
    if (p[i].scalar_type() == at::kDouble) {
      adamw_step_in_double(p[i], g[i], m[i], v[i], step, options, grad_scale);
      continue;
    }
    gradients.push_back(usable(g[i]));
    const at::Tensor& d = gradients.back();
    tensors.push_back({p[i].mutable_data_ptr<float>(), m[i].mutable_data_ptr<float>(), v[i].mutable_data_ptr<float>(), d.const_data_ptr(),
                       nullptr, p[i].numel(), cuda::kernel_dtype("adamw_step", d)});
    for (const at::Tensor& t : {p[i], m[i], v[i]}) t.unsafeGetTensorImpl()->bump_version();
  }
  const OryxAdamwConstants constants = constants_of(step, options, grad_scale);
  cuda::check("adamw_step", oryx_adamw(tensors.data(), static_cast<int64_t>(tensors.size()), &constants, cuda::stream_of(p[0])));
}

double global_norm_cuda(at::TensorList gradients) {
  if (gradients.empty()) return 0;
  const c10::cuda::CUDAGuard guard(gradients[0].device());
  std::vector<OryxAdamwTensor> tensors;
  std::vector<at::Tensor> kept;
  double rest = 0;
  for (const at::Tensor& g : gradients) {
    if (g.scalar_type() == at::kDouble) {
      rest += at::sum(at::square(g)).item<double>();
      continue;
    }
    kept.push_back(usable(g));
    const at::Tensor& d = kept.back();
    tensors.push_back({nullptr, nullptr, nullptr, d.const_data_ptr(), nullptr, d.numel(), cuda::kernel_dtype("global_norm", d)});
  }
  const auto count = static_cast<int64_t>(tensors.size());
  const auto options = gradients[0].options().dtype(at::kDouble);
  const at::Tensor workspace = at::empty({oryx_sum_of_squares_workspace(tensors.data(), count)}, options), total = at::zeros({}, options);
  cuda::check("global_norm", oryx_sum_of_squares(tensors.data(), count, workspace.mutable_data_ptr<double>(), total.mutable_data_ptr<double>(),
                                                 cuda::stream_of(total)));
  return std::sqrt(rest + total.item<double>());
}

}  // namespace

TORCH_LIBRARY_IMPL(oryx, CUDA, m) {
  m.impl("adamw_step", adamw_cuda);
  m.impl("global_norm", global_norm_cuda);
}

}  // namespace oryx::ops
