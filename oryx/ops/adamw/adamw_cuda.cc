// AdamW on CUDA: hands the lists of tensors to the launchers of cuda/adamw.cu.
#include <torch/library.h>

#include <vector>

#include "oryx/ops/adamw/adamw_internal.h"
#include "oryx/ops/adamw/cuda/adamw_launch.h"
#include "oryx/ops/cuda/launch.h"

namespace oryx::ops {
namespace {

// The gradient as the launchers take it: contiguous, float32 or bfloat16.
at::Tensor usable(const at::Tensor& g) { return cuda::as_parameter(g); }

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
                       nullptr, p[i].numel(), cuda::kernel_dtype("adamw_step", d), 0});
    for (const at::Tensor& t : {p[i], m[i], v[i]}) t.unsafeGetTensorImpl()->bump_version();
  }
  const OryxAdamwConstants constants = adamw_constants<OryxAdamwConstants>(step, options, grad_scale);
  cuda::check("adamw_step", oryx_adamw(tensors.data(), static_cast<int64_t>(tensors.size()), &constants, cuda::stream_of(p[0])));
}

// weight[i]: empty where p[i] has no bfloat16 copy.
void adamw_update_cuda(at::TensorList p, at::TensorList g, at::TensorList m, at::TensorList v, at::TensorList weight, at::IntArrayRef decays,
                       at::Tensor& control, const at::Tensor& loss, double lr, double beta1, double beta2, double eps, double weight_decay, double clip,
                       const std::optional<at::Tensor>& squares, bool decided) {
  static_assert(sizeof(OryxAdamwControl) == kAdamwControl * sizeof(double));
  TORCH_CHECK(!p.empty(), "adamw_update: no parameters");
  const at::Device device = p[0].device();
  const c10::cuda::CUDAGuard guard(device);
  TORCH_CHECK(control.scalar_type() == at::kDouble && control.is_contiguous() && control.numel() == kAdamwControl && control.device() == device,
              "adamw_update: control must be float64 [", kAdamwControl, "] on the parameters' device");
  TORCH_CHECK(loss.scalar_type() == at::kFloat && loss.numel() == 1 && loss.device() == device,
              "adamw_update: loss must be one float32 on the parameters' device");
  std::vector<OryxAdamwTensor> tensors;
  std::vector<at::Tensor> kept;
  for (size_t i = 0; i < p.size(); ++i) {
    check_adamw(p[i], g[i], m[i], v[i]);
    TORCH_CHECK(p[i].scalar_type() == at::kFloat && p[i].device() == device, "adamw_update: p is ", p[i].scalar_type(), " on ", p[i].device(),
                ", expected float32 on ", device);
    void* copy = nullptr;
    if (weight[i].numel() > 0) {
      TORCH_CHECK(weight[i].scalar_type() == at::kBFloat16 && weight[i].sizes() == p[i].sizes() && weight[i].is_contiguous(),
                  "adamw_update: a weight must be contiguous bfloat16 of its parameter's shape");
      copy = weight[i].mutable_data_ptr();
      weight[i].unsafeGetTensorImpl()->bump_version();
    }
    kept.push_back(usable(g[i]));
    const at::Tensor& d = kept.back();
    tensors.push_back({p[i].mutable_data_ptr<float>(), m[i].mutable_data_ptr<float>(), v[i].mutable_data_ptr<float>(), d.const_data_ptr(), copy,
                       p[i].numel(), cuda::kernel_dtype("adamw_update", d), decays[i] != 0 ? 1 : 0});
    for (const at::Tensor& t : {p[i], m[i], v[i]}) t.unsafeGetTensorImpl()->bump_version();
  }
  const auto count = static_cast<int64_t>(tensors.size());
  auto* state = reinterpret_cast<OryxAdamwControl*>(control.mutable_data_ptr<double>());
  const cudaStream_t stream = cuda::stream_of(control);
  if (decided) return cuda::check("adamw_update", oryx_adamw_controlled(tensors.data(), count, state, stream));
  TORCH_CHECK(!squares || (squares->scalar_type() == at::kDouble && squares->numel() == 1 && squares->device() == device),
              "adamw_update: squares must be one float64 on the parameters' device");
  const at::Tensor workspace = at::empty({squares ? 0 : oryx_sum_of_squares_workspace(tensors.data(), count)}, control.options());
  const at::Tensor total = squares ? *squares : at::empty({}, control.options());
  const OryxAdamwRates rates{lr, beta1, beta2, eps, weight_decay, clip};
  if (!squares) cuda::check("adamw_update", oryx_sum_of_squares(tensors.data(), count, workspace.mutable_data_ptr<double>(), total.mutable_data_ptr<double>(), stream));
  cuda::check("adamw_update", oryx_adamw_control(total.const_data_ptr<double>(), loss.const_data_ptr<float>(), &rates, state, stream));
  cuda::check("adamw_update", oryx_adamw_controlled(tensors.data(), count, state, stream));
}

// Of float32 and bfloat16, left on the device.
at::Tensor squares_of(const char* op, at::TensorList gradients) {
  const c10::cuda::CUDAGuard guard(gradients[0].device());
  std::vector<OryxAdamwTensor> tensors;
  std::vector<at::Tensor> kept;
  for (const at::Tensor& g : gradients) {
    kept.push_back(usable(g));
    const at::Tensor& d = kept.back();
    tensors.push_back({nullptr, nullptr, nullptr, d.const_data_ptr(), nullptr, d.numel(), cuda::kernel_dtype(op, d), 0});
  }
  const auto count = static_cast<int64_t>(tensors.size());
  const auto options = gradients[0].options().dtype(at::kDouble);
  const at::Tensor workspace = at::empty({oryx_sum_of_squares_workspace(tensors.data(), count)}, options), total = at::empty({}, options);
  cuda::check(op, oryx_sum_of_squares(tensors.data(), count, workspace.mutable_data_ptr<double>(), total.mutable_data_ptr<double>(), cuda::stream_of(total)));
  return total;
}

at::Tensor sum_of_squares_cuda(at::TensorList gradients) {
  TORCH_CHECK(!gradients.empty(), "sum_of_squares: no gradients");
  return squares_of("sum_of_squares", gradients);
}

double global_norm_cuda(at::TensorList gradients) {
  double sum = 0;
  std::vector<at::Tensor> narrow;
  for (const at::Tensor& g : gradients) {
    if (g.scalar_type() == at::kDouble) {
      sum += at::sum(at::square(g)).item<double>();
    } else {
      narrow.push_back(g);
    }
  }
  if (!narrow.empty()) sum += squares_of("global_norm", narrow).item<double>();
  return std::sqrt(sum);
}

}  // namespace

TORCH_LIBRARY_IMPL(oryx, CUDA, m) {
  m.impl("adamw_step", adamw_cuda);
  m.impl("global_norm", global_norm_cuda);
  m.impl("adamw_update", adamw_update_cuda);
  m.impl("sum_of_squares", sum_of_squares_cuda);
}

}  // namespace oryx::ops
