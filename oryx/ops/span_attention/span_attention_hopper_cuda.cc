#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "oryx/ops/cuda/launch.h"
#include "oryx/ops/span_attention/cuda/span_attention_launch.h"
#include "oryx/ops/span_attention/span_attention_hopper.h"

namespace oryx::ops {
namespace {

int attribute(const at::Tensor& x, cudaDeviceAttr which) {
  int value = 0;
  cuda::check("span_attention", cudaDeviceGetAttribute(&value, which, x.device().index()));
  return value;
}

void strides_of(const at::Tensor& x, int64_t (&to)[3]) {
  // A dimension of one element may have any stride; the tensor map wants a multiple of 16 bytes.
  for (int i = 0; i < 3; ++i) to[i] = x.size(i) == 1 ? x.size(3) * 8 : x.stride(i);
}

const int32_t* ints_or_null(const std::optional<at::Tensor>& x) { return x ? x->const_data_ptr<int32_t>() : nullptr; }

OryxSpanAttention launch_arguments(const AttentionArguments& a) {
  OryxSpanAttention p{};
  p.q = a.q.const_data_ptr(), p.k = a.k.const_data_ptr(), p.v = a.v.const_data_ptr();
  strides_of(a.q, p.q_stride), strides_of(a.k, p.k_stride), strides_of(a.v, p.v_stride);
  p.spans = ints_or_null(a.spans), p.cu_q = ints_or_null(a.cu_seqlens), p.cu_k = ints_or_null(a.cu_seqlens_k);
  p.key_lengths = ints_or_null(a.key_lengths);
  p.B = static_cast<int>(a.q.size(0)), p.Tq = static_cast<int>(a.q.size(1)), p.Tk = static_cast<int>(a.k.size(1));
  p.Hq = static_cast<int>(a.q.size(2)), p.Hk = static_cast<int>(a.k.size(2)), p.D = static_cast<int>(a.q.size(3));
  p.n_spans = a.spans ? static_cast<int>(a.spans->size(0)) : 0;
  p.N = a.cu_seqlens ? static_cast<int>(a.cu_seqlens->size(0)) - 1 : p.B;
  // A window of all keys is none.
  p.window = a.window >= a.k.size(1) ? 0 : static_cast<int>(a.window);
  p.processors = attribute(a.q, cudaDevAttrMultiProcessorCount);
  p.scale = static_cast<float>(a.scale.value_or(1.0 / std::sqrt(static_cast<double>(p.D))));
  return p;
}

OryxFarKeys far_keys(const at::Tensor& k, const at::Tensor& v) {
  OryxFarKeys r{};
  if (!k.defined() || k.size(1) == 0) return r;
  r.k = k.const_data_ptr(), r.v = v.const_data_ptr(), r.keys = static_cast<int32_t>(k.size(1));
  strides_of(k, r.k_stride), strides_of(v, r.v_stride);
  return r;
}

at::Tensor bytes(const at::Tensor& like, size_t n) {
  return at::empty({static_cast<int64_t>(n)}, like.options().dtype(at::kByte));
}

}  // namespace

at::Tensor hopper_aligned(const at::Tensor& x) {
  bool fits = x.stride(3) == 1 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int i = 0; i < 3; ++i) fits = fits && (x.size(i) == 1 || (x.stride(i) % 8 == 0 && x.stride(i) > 0));
  return fits ? x : x.contiguous();
}

at::Tensor ints_on(const at::Tensor& x, at::Device device) {
  const at::Tensor ints = x.to(at::kInt).contiguous();
  return ints.is_cpu() && ints.numel() > 0 ? ints.pin_memory().to(device, /*non_blocking=*/true) : ints.to(device);
}

bool hopper_serves(const AttentionArguments& a) {
  const int64_t D = a.q.size(3);
  return a.q.scalar_type() == at::kBFloat16 && (D == 64 || D == 128) && a.v.size(3) == D && a.q.numel() > 0 && a.k.numel() > 0 &&
         a.scale.value_or(1.0) > 0 && (!a.cu_seqlens || a.cu_seqlens->size(0) > 1) &&
         attribute(a.q, cudaDevAttrComputeCapabilityMajor) == 9;
}

AttentionArguments hopper_arguments(const AttentionArguments& a) {
  AttentionArguments r = a;
  r.q = hopper_aligned(a.q), r.k = hopper_aligned(a.k), r.v = hopper_aligned(a.v);
  for (auto* x : {&r.spans, &r.cu_seqlens, &r.cu_seqlens_k, &r.key_lengths}) {
    if (*x) *x = ints_on(**x, a.q.device());
  }
  // No spans at all is not the absence of spans, which is how the kernels would read a null pointer.
  if (r.spans && r.spans->numel() == 0) r.spans = at::zeros({1, 3}, r.spans->options());
  return r;
}

HopperAttention hopper_forward(const AttentionArguments& a, bool want_lse, const HopperFarKeys* far) {
  OryxSpanAttention p = launch_arguments(a);
  if (far != nullptr) {
    p.first = far_keys(far->first_k, far->first_v), p.between = far_keys(far->between_k, far->between_v);
    p.positions = far->positions.const_data_ptr<int32_t>();
    if (p.between.keys > 0) p.seen = far->seen.const_data_ptr<int32_t>();
    // Beyond every position is without end.
    const auto tokens = [](int64_t n) { return static_cast<int32_t>(std::min<int64_t>(n, 1 << 30)); };
    p.far_window = tokens(far->window), p.reach = tokens(far->reach);
  }
  HopperAttention r;
  r.o = at::empty(a.q.sizes(), a.q.options());
  p.o = r.o.mutable_data_ptr();
  if (want_lse) {
    r.lse = at::empty({p.Hq, oryx_span_attention_slots(&p)}, a.q.options().dtype(at::kFloat));
    p.lse = r.lse.mutable_data_ptr<float>();
  }
  r.plan = bytes(a.q, oryx_span_attention_plan_bytes(&p));
  const at::Tensor scratch = bytes(a.q, oryx_span_attention_forward_bytes(&p));
  const cudaStream_t stream = cuda::stream_of(a.q);
  cuda::check("span_attention", oryx_span_attention_plan(&p, r.plan.mutable_data_ptr(), stream));
  cuda::check("span_attention", oryx_span_attention_forward(&p, r.plan.mutable_data_ptr(), scratch.mutable_data_ptr(), stream));
  return r;
}

std::array<at::Tensor, 3> hopper_backward(const AttentionArguments& a, const HopperAttention& forward, const at::Tensor& d_o_in) {
  OryxSpanAttention p = launch_arguments(a);
  const at::Tensor d_o = d_o_in.contiguous();
  // Keys of no sequence get no block of their own.
  const bool spare_keys = a.cu_seqlens_k || a.key_lengths;
  const auto like = [](const at::Tensor& x, bool zero) { return zero ? at::zeros(x.sizes(), x.options()) : at::empty(x.sizes(), x.options()); };
  std::array<at::Tensor, 3> d = {like(a.q, false), like(a.k, spare_keys), like(a.v, spare_keys)};
  p.o_in = forward.o.const_data_ptr(), p.d_o = d_o.const_data_ptr(), p.lse = forward.lse.mutable_data_ptr<float>();
  p.dq = d[0].mutable_data_ptr(), p.dk = d[1].mutable_data_ptr(), p.dv = d[2].mutable_data_ptr();
  const at::Tensor scratch = bytes(a.q, oryx_span_attention_backward_bytes(&p));
  cuda::check("span_attention", oryx_span_attention_backward(&p, forward.plan.mutable_data_ptr(), scratch.mutable_data_ptr(), cuda::stream_of(a.q)));
  return d;
}

}  // namespace oryx::ops
