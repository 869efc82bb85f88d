// span_attention on CUDA: which code serves which arguments.
//
//   plain causal without gradients (bfloat16, K = V = 64 or 128, every query, as many keys)     cuDNN, through libtorch
//   with gradients; spans, packing, lengths, windows (bfloat16, K = V = 64 or 128, on Hopper)   kernels of our own (cuda/)
//   the same of other widths or chips (bfloat16, K = V <= 256)                                  libtorch's flash attention over every query; rows outside
//                                                                                               spans are cleared afterwards
//   the rest (float32, float64, K != V)                                                         blocks of batched matrix products (span_attention_any), float32 by way of
//                                                                                               float64, whose products take Hopper no longer, so that large scores keep
//                                                                                               their digits
//
// Each adds in a fixed order: the same arguments give the same bits, gradients too. cuDNN's backward pass does not, which is why it is not called.
// The first three read no device data on the host: spans and bounds out of range are the caller's fault there (the kernels of our own clip them).
#include <ATen/ATen.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "oryx/common/log.h"
#include "oryx/ops/fixed_order.h"
#include "oryx/ops/span_attention/span_attention_hopper.h"
#include "oryx/ops/span_attention/span_attention_internal.h"
#include "oryx/ops/span_attention/span_attention_plan.h"

namespace oryx::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Arguments = AttentionArguments;

bool is_plain(const Arguments& a) {
  const int64_t D = a.q.size(3);
  return a.q.scalar_type() == at::kBFloat16 && !a.spans && !a.cu_seqlens && !a.key_lengths && (a.window == 0 || a.window >= a.k.size(1)) &&
         a.q.size(1) == a.k.size(1) && a.q.numel() > 0 && a.q.size(1) > 1 /* cuDNN refuses one query with one key */ && a.v.size(3) == D &&
         (D == 64 || D == 128);
}

bool is_flash(const Arguments& a) {
  const int64_t D = a.q.size(3);
  return a.q.scalar_type() == at::kBFloat16 && a.q.numel() > 0 && a.v.size(3) == D && D % 8 == 0 && D <= 256;
}

at::Tensor dense_rows(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

// ---- cuDNN. It takes [B, H, T, D] with any strides and returns its output with those of q.
at::Tensor plain(const Arguments& a) {
  const auto heads_first = [](const at::Tensor& x) { return dense_rows(x).transpose(1, 2); };
  return std::get<0>(at::_scaled_dot_product_cudnn_attention(heads_first(a.q), heads_first(a.k), heads_first(a.v), {}, false, 0.0, true, false, a.scale))
      .transpose(1, 2);
}

// ---- our own kernels
struct SpanAttentionHopper : torch::autograd::Function<SpanAttentionHopper> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& spans,
                            const OptionalTensor& cu_seqlens, const OptionalTensor& cu_seqlens_k, const OptionalTensor& key_lengths,
                            int64_t window, std::optional<double> scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Arguments a = hopper_arguments({q, k, v, spans, cu_seqlens, cu_seqlens_k, key_lengths, window, scale});
    const HopperAttention f = hopper_forward(a, true);
    const auto or_none = [](const OptionalTensor& t) { return t.value_or(at::Tensor()); };
    ctx->save_for_backward({a.q, a.k, a.v, f.o, f.lse, f.plan, or_none(a.spans), or_none(a.cu_seqlens), or_none(a.cu_seqlens_k), or_none(a.key_lengths)});
    ctx->saved_data["window"] = window;
    ctx->saved_data["scale"] = scale;
    return f.o;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list s = ctx->get_saved_variables();
    const auto optional = [&](size_t i) { return s[i].defined() ? OptionalTensor(s[i]) : OptionalTensor(); };
    const Arguments a{s[0], s[1], s[2], optional(6), optional(7), optional(8), optional(9), ctx->saved_data["window"].toInt(),
                      ctx->saved_data["scale"].toOptional<double>()};
    const auto d = hopper_backward(a, {s[3], s[4], s[5]}, grads[0]);
    const at::Tensor none;
    return {d[0], d[1], d[2], none, none, none, none, none, none};
  }
};

// ---- libtorch's flash attention over packed rows [tokens, H, D]; causal, aligned at the end of the keys.
struct Packed {
  at::Tensor q, k, v, cu_q, cu_k;
  OptionalTensor used_k;  // keys in use of each row (key_lengths)
  at::Tensor keep;        // [B, Tq, 1, 1] bool: queries in spans; undefined: all
  int64_t longest_q, longest_k;
  std::optional<int64_t> left, right;

  explicit Packed(const Arguments& a) {
    q = dense_rows(a.q).flatten(0, 1), k = dense_rows(a.k).flatten(0, 1), v = dense_rows(a.v).flatten(0, 1);
    const auto ints = a.q.options().dtype(at::kInt);
    longest_q = a.q.size(1), longest_k = a.k.size(1);
    if (a.cu_seqlens) {
      cu_q = a.cu_seqlens->to(ints), cu_k = a.cu_seqlens_k ? a.cu_seqlens_k->to(ints) : cu_q;
    } else {
      cu_q = at::arange(a.q.size(0) + 1, ints) * longest_q, cu_k = at::arange(a.q.size(0) + 1, ints) * longest_k;
      if (a.key_lengths) used_k = a.key_lengths->to(ints);
    }
    if (a.window > 0) left = a.window - 1, right = 0;
    if (a.spans) {
      const at::Tensor s = a.spans->to(a.q.device(), at::kLong);
      const at::Tensor row = at::arange(a.q.size(0), s.options()).view({-1, 1, 1}), at = at::arange(longest_q, s.options()).view({1, -1, 1});
      keep = ((s.select(1, 0) == row) & (s.select(1, 1) <= at) & (at < s.select(1, 2))).any(-1).view({a.q.size(0), longest_q, 1, 1});
    }
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> flash_forward(const Arguments& a, const Packed& p) {
  if (a.spans) log::warn_once("span_attention: on CUDA every query is computed, and those outside spans discarded");
  auto [o, lse, rng, unused, mask] = at::_flash_attention_forward(p.q, p.k, p.v, p.cu_q, p.cu_k, p.longest_q, p.longest_k, 0.0, true, false, a.scale,
                                                                  p.left, p.right, p.used_k);
  o = o.view(a.q.sizes());
  return {p.keep.defined() ? at::where(p.keep, o, at::zeros({}, o.options())) : o, lse, rng, unused};
}

struct FlashAttention : torch::autograd::Function<FlashAttention> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& spans,
                            const OptionalTensor& cu_seqlens, const OptionalTensor& cu_seqlens_k, int64_t window, std::optional<double> scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Arguments a{q, k, v, spans, cu_seqlens, cu_seqlens_k, {}, window, scale};
    const Packed p(a);
    const auto [o, lse, rng, unused] = flash_forward(a, p);
    ctx->save_for_backward({p.q, p.k, p.v, o, lse, rng, unused, p.cu_q, p.cu_k, p.keep});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["left"] = p.left;
    ctx->saved_data["batch"] = q.size(0);
    return o;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list s = ctx->get_saved_variables();
    const at::Tensor &keep = s[9], none;
    // Rows outside spans have o = 0 and d_o = 0 here: their score gradients vanish.
    const at::Tensor d_o = (keep.defined() ? at::where(keep, grads[0], at::zeros({}, grads[0].options())) : grads[0]).contiguous();
    const auto left = ctx->saved_data["left"].toOptional<int64_t>();
    const int64_t B = ctx->saved_data["batch"].toInt();
    const auto d = [&] {
      const FixedOrder fixed;
      return at::_flash_attention_backward(d_o.flatten(0, 1), s[0], s[1], s[2], s[3].flatten(0, 1), s[4], s[7], s[8], s[0].size(0) / B, s[1].size(0) / B, 0.0, true, s[5], s[6],
                                           ctx->saved_data["scale"].toOptional<double>(), left, left ? std::optional<int64_t>(0) : std::nullopt);
    }();
    const auto rows = [&](const at::Tensor& x) { return x.unflatten(0, {B, -1}); };
    // Keys behind the last sequence get no gradient, and are not written.
    const at::Tensor used = (at::arange(s[1].size(0), s[8].options()) < s[8].select(0, -1)).view({-1, 1, 1});
    const auto keys = [&](const at::Tensor& x) { return rows(at::where(used, x, at::zeros({}, x.options()))); };
    return {rows(std::get<0>(d)), keys(std::get<1>(d)), keys(std::get<2>(d)), none, none, none, none, none};
  }
};

void check(const Arguments& a) {
  check_attention_arguments(a.q, a.k, a.v, a.cu_seqlens, a.cu_seqlens_k, a.key_lengths, a.window, a.scale);
  check_attention_shapes(a.q, a.k, a.spans, a.cu_seqlens, a.cu_seqlens_k, a.key_lengths);
}

// f(q, k, v) in float64 where they are float32.
template <class F>
at::Tensor in_double(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, F f) {
  if (q.scalar_type() != at::kFloat) return f(q, k, v);
  log::warn_once("span_attention: float32 on CUDA by blocks of batched matrix products, slowly");
  return f(q.to(at::kDouble), k.to(at::kDouble), v.to(at::kDouble)).to(at::kFloat);
}

at::Tensor span_attention_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& spans,
                               const OptionalTensor& cu_seqlens, const OptionalTensor& cu_seqlens_k, const OptionalTensor& key_lengths,
                               int64_t window, std::optional<double> scale) {
  const c10::cuda::CUDAGuard device(q.device());
  const Arguments a{q, k, v, spans, cu_seqlens, cu_seqlens_k, key_lengths, window, scale};
  check(a);
  if (is_plain(a)) return plain(a);
  if (hopper_serves(a)) return hopper_forward(hopper_arguments(a), false).o;
  if (is_flash(a)) return std::get<0>(flash_forward(a, Packed(a)));
  return in_double(q, k, v, [&](const at::Tensor& a, const at::Tensor& b, const at::Tensor& c) {
    return span_attention_any(a, b, c, spans, cu_seqlens, cu_seqlens_k, key_lengths, window, scale);
  });
}

at::Tensor span_attention_cuda_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& spans,
                                        const OptionalTensor& cu_seqlens, const OptionalTensor& cu_seqlens_k,
                                        const OptionalTensor& key_lengths, int64_t window, std::optional<double> scale) {
  if (!at::GradMode::is_enabled() || !(q.requires_grad() || k.requires_grad() || v.requires_grad())) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return span_attention_cuda(q, k, v, spans, cu_seqlens, cu_seqlens_k, key_lengths, window, scale);
  }
  const c10::cuda::CUDAGuard device(q.device());
  const Arguments a{q, k, v, spans, cu_seqlens, cu_seqlens_k, key_lengths, window, scale};
  check(a);
  if (hopper_serves(a)) return SpanAttentionHopper::apply(q, k, v, spans, cu_seqlens, cu_seqlens_k, key_lengths, window, scale);
  if (is_flash(a) && !key_lengths) return FlashAttention::apply(q, k, v, spans, cu_seqlens, cu_seqlens_k, window, scale);
  return in_double(q, k, v, [&](const at::Tensor& a, const at::Tensor& b, const at::Tensor& c) {
    return span_attention_any_autograd(a, b, c, spans, cu_seqlens, cu_seqlens_k, key_lengths, window, scale);
  });
}

}  // namespace
}  // namespace oryx::ops

TORCH_LIBRARY_IMPL(oryx, CUDA, m) { m.impl("span_attention", oryx::ops::span_attention_cuda); }
TORCH_LIBRARY_IMPL(oryx, AutogradCUDA, m) { m.impl("span_attention", oryx::ops::span_attention_cuda_autograd); }
