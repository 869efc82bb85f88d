// Runs the float32 kernels over sequences and heads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "oryx/ops/gated_delta/gated_delta_internal.h"
#include "oryx/ops/gated_delta/gated_delta_kernels.h"

namespace oryx::ops::gated_delta {

namespace {

at::Tensor dense_last(const at::Tensor& x) { return x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous(); }

TokenHeads view(const at::Tensor& x) { return {x.const_data_ptr<float>(), x.stride(0), x.stride(1), x.stride(2)}; }

const float* read(const at::Tensor& x) { return x.defined() ? x.const_data_ptr<float>() : nullptr; }

at::Tensor cache_aligned(int64_t floats, const at::Tensor& like) { return at::empty({floats}, like.options()); }

// The inputs as the kernels want them; `x` keeps the memory alive.
struct Prepared {
  Inputs x;
  KernelArgs a{};

  Prepared(const Problem& p, const Inputs& in)
      : x{dense_last(in.q),  dense_last(in.k),     dense_last(in.v),
          in.g.contiguous(), in.beta.contiguous(), in.state.defined() ? in.state.contiguous() : at::Tensor()} {
    a.T = p.T, a.K = p.K, a.V = p.V, a.Hq = p.Hq, a.Hk = p.Hk, a.Hv = p.Hv, a.Hs = p.Hs, a.groups = p.groups;
    a.scale = static_cast<float>(p.scale), a.l2_eps = static_cast<float>(p.l2_eps);
    a.q = view(x.q), a.k = view(x.k), a.v = view(x.v);
    a.g = read(x.g), a.beta = read(x.beta), a.initial_state = read(x.state);
    a.wanted = p.wanted.empty() ? nullptr : p.wanted.data();
  }
};

// f(sequence, head, scratch) for all sequences and state heads. Neighbouring tasks are different sequences of one head,
// so that threads share the work evenly however unequal the packed documents are.
template <typename F>
void for_each_head(const Problem& p, int64_t floats, const at::Tensor& like, F f) {
  at::parallel_for(0, p.Hs * p.N, 1, [&](int64_t begin, int64_t end) {
    const at::Tensor scratch = cache_aligned(floats, like);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i % p.N;
      f(KernelSequence{n, p.sequences[n].begin, p.sequences[n].end, p.first_chunk[n]}, i / p.N,
        scratch.mutable_data_ptr<float>());
    }
  });
}

// [B, T, heads, D] -> [B, T, n, D], summing over groups of consecutive heads.
at::Tensor sum_heads(const at::Tensor& x, int64_t n) {
  return x.size(2) == n ? x : x.unflatten(2, {n, x.size(2) / n}).sum(3);
}

}  // namespace

Outputs run_forward(const HeadKernels& kernels, const Problem& p, const Inputs& in, bool save) {
  Prepared prepared(p, in);
  KernelArgs& a = prepared.a;
  const auto options = in.g.options();
  const auto chunks = static_cast<int64_t>(p.chunks.size());
  Outputs out;
  out.o = at::empty({p.B, p.T, p.Ho, p.V}, options);
  out.final_state = at::empty({p.N, p.Hs, p.V, p.K}, options);
  a.o = out.o.mutable_data_ptr<float>(), a.final_state = out.final_state.mutable_data_ptr<float>();
  if (save) {
    out.chunk_states = at::empty({chunks, p.Hs, p.K, p.V}, options);
    out.residual = at::empty({p.B, p.T, p.Hs, p.V}, options);
    a.chunk_states = out.chunk_states.mutable_data_ptr<float>(), a.residual = out.residual.mutable_data_ptr<float>();
  }
  for_each_head(p, static_cast<int64_t>(kernels.scratch_floats(a, false)), in.g,
                [&](const KernelSequence& s, int64_t head, float* scratch) { kernels.forward(a, s, head, scratch); });
  return out;
}

Gradients run_backward(const HeadKernels& kernels, const Problem& p, const Inputs& in, const Outputs& saved, const at::Tensor& d_o,
                       const at::Tensor& d_final) {
  Prepared prepared(p, in);
  KernelArgs& a = prepared.a;
  // Backward only reads them.
  a.chunk_states = const_cast<float*>(read(saved.chunk_states)), a.residual = const_cast<float*>(read(saved.residual));
  const auto options = in.g.options();
  const auto empty = [&](int64_t heads, int64_t size) { return at::empty({p.B, p.T, heads, size}, options); };
  Gradients d{empty(p.Ho, p.K),
              empty(p.Hs, p.K),
              empty(p.Hs, p.V),
              at::empty_like(prepared.x.g),
              at::empty_like(prepared.x.beta),
              at::empty({p.N, p.Hs, p.V, p.K}, options)};
  const KernelGradients out{read(d_o),
                            read(d_final),
                            d.q.mutable_data_ptr<float>(),
                            d.k.mutable_data_ptr<float>(),
                            d.v.mutable_data_ptr<float>(),
                            d.g.mutable_data_ptr<float>(),
                            d.beta.mutable_data_ptr<float>(),
                            d.state.mutable_data_ptr<float>()};
  for_each_head(p, static_cast<int64_t>(kernels.scratch_floats(a, true)), in.g,
                [&](const KernelSequence& s, int64_t head, float* scratch) { kernels.backward(a, out, s, head, scratch); });
  d.q = sum_heads(d.q, p.Hq), d.k = sum_heads(d.k, p.Hk), d.v = sum_heads(d.v, p.Hv);
  return d;
}

namespace {
constexpr HeadKernels kHeadKernels{scratch_floats, forward_head, backward_head};
}  // namespace

Outputs kernel_forward(const Problem& p, const Inputs& x, bool save) { return run_forward(kHeadKernels, p, x, save); }

Gradients kernel_backward(const Problem& p, const Inputs& x, const Outputs& saved, const at::Tensor& d_o, const at::Tensor& d_final) {
  return run_backward(kHeadKernels, p, x, saved, d_o, d_final);
}

at::Tensor kernel_step(const Problem& p, const Inputs& x, at::Tensor& state) {
  const at::Tensor o = at::empty({p.N, p.Ho, p.V}, x.g.options());
  const StepArgs a{p.K,
                   p.V,
                   p.Hq,
                   p.Hk,
                   p.Hv,
                   p.Hs,
                   p.groups,
                   static_cast<float>(p.scale),
                   static_cast<float>(p.l2_eps),
                   read(x.q),
                   read(x.k),
                   read(x.v),
                   read(x.g),
                   read(x.beta),
                   state.mutable_data_ptr<float>(),
                   state.stride(0),
                   state.stride(1),
                   o.mutable_data_ptr<float>()};
  // A thread is worth waking for about 64 KiB of state.
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 14) / (p.K * p.V));
  at::parallel_for(0, p.N * p.Hs, grain, [&](int64_t begin, int64_t end) {
    const at::Tensor scratch = cache_aligned((p.groups + 1) * (p.K + 32), x.g);
    for (int64_t i = begin; i < end; ++i) step_head(a, i / p.Hs, i % p.Hs, scratch.mutable_data_ptr<float>());
  });
  return o;
}

}  // namespace oryx::ops::gated_delta
