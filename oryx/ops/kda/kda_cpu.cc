// Runs the float32 kernels over sequences and heads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "oryx/ops/kda/kda_internal.h"
#include "oryx/ops/kda/kda_kernels.h"

namespace oryx::ops::kimi {

namespace {
constexpr gated_delta::HeadKernels kHeadKernels{scratch_floats, forward_head, backward_head};
}  // namespace

Outputs kernel_forward(const Problem& p, const Inputs& x, bool save) { return gated_delta::run_forward(kHeadKernels, p, x, save); }

Gradients kernel_backward(const Problem& p, const Inputs& x, const Outputs& saved, const at::Tensor& d_o, const at::Tensor& d_final) {
  return gated_delta::run_backward(kHeadKernels, p, x, saved, d_o, d_final);
}

at::Tensor kernel_step(const Problem& p, const Inputs& x, at::Tensor& state) {
  const auto read = [](const at::Tensor& t) { return t.const_data_ptr<float>(); };
  const at::Tensor o = at::empty({p.N, p.Ho, p.V}, x.g.options());
  StepArgs a{};
  a.K = p.K, a.V = p.V, a.Hq = p.Hq, a.Hk = p.Hk, a.Hv = p.Hv, a.Hs = p.Hs, a.groups = p.groups;
  a.scale = static_cast<float>(p.scale), a.l2_eps = static_cast<float>(p.l2_eps);
  a.q = read(x.q), a.k = read(x.k), a.v = read(x.v), a.g = read(x.g), a.beta = read(x.beta);
  a.state = state.mutable_data_ptr<float>(), a.state_sequence = state.stride(0), a.state_head = state.stride(1);
  a.o = o.mutable_data_ptr<float>();
  // A thread is worth waking for about 64 KiB of state.
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 14) / (p.K * p.V));
  at::parallel_for(0, p.N * p.Hs, grain, [&](int64_t begin, int64_t end) {
    const at::Tensor scratch = at::empty({static_cast<int64_t>(step_scratch_floats(a))}, x.g.options());
    for (int64_t i = begin; i < end; ++i) step_head(a, i / p.Hs, i % p.Hs, scratch.mutable_data_ptr<float>());
  });
  return o;
}

}  // namespace oryx::ops::kimi
