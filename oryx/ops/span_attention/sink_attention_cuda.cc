// sink_attention on CUDA: in bfloat16 with K = V = 64 or 128 on Hopper one pass of span_attention's kernel over the first keys, those between and the window, which reads
// nothing back to the host; all else as two or three softmaxes that are joined.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>

#include "oryx/ops/span_attention/sink_attention.h"
#include "oryx/ops/span_attention/span_attention_hopper.h"
#include "oryx/ops/span_attention/span_attention_internal.h"
#include "oryx/ops/span_attention/span_attention_plan.h"

namespace oryx::ops {
namespace {

constexpr int64_t kBlock = 128, kMostKeys = int64_t{1} << 22;  // of the kernel; so many blocks of either kind can it count

// From when until when each key between is seen, as the kernel reads it: made where the tensors lie, the host as a rule.
at::Tensor seen_of(const KeysBetween& b, int64_t reach, at::Device device) {
  const int64_t N = b.from.size(0), C = b.from.size(1);
  const at::Tensor seen = at::zeros({N, (C + kBlock - 1) / kBlock * kBlock, 2}, b.from.options());  // what begins at 0 and ends there is never seen
  const at::Tensor own = seen.narrow(1, 0, C);
  own.select(2, 0).copy_(b.from);
  own.select(2, 1).copy_(reach > 0 ? at::minimum(b.until, b.positions.to(b.until.device()) + reach) : b.until);
  return ints_on(seen, device);
}

void check_far_keys(const char* name, const at::Tensor& k, const at::Tensor& v, const SinkAttention& a) {
  const int64_t N = a.cu_seqlens ? a.cu_seqlens->size(0) - 1 : a.q.size(0);
  TORCH_CHECK(k.dim() == 4 && v.sizes() == k.sizes() && k.size(0) == N && k.size(2) == a.k.size(2) && k.size(3) == a.k.size(3), "sink_attention: ", name, " are ", k.sizes(),
              " and ", v.sizes(), ", expected [", N, ", keys, ", a.k.size(2), ", ", a.k.size(3), "]");
  TORCH_CHECK(k.scalar_type() == a.q.scalar_type() && v.scalar_type() == a.q.scalar_type(), "sink_attention: ", name, " are of another type than q");
}

at::Tensor sink_attention_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& sink_k, const at::Tensor& sink_v, const at::Tensor& positions,
                               const std::optional<at::Tensor>& between_k, const std::optional<at::Tensor>& between_v, const std::optional<at::Tensor>& between_positions,
                               const std::optional<at::Tensor>& between_from, const std::optional<at::Tensor>& between_until, const std::optional<at::Tensor>& spans,
                               const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& cu_seqlens_k, const std::optional<at::Tensor>& key_lengths,
                               int64_t window, int64_t reach, std::optional<double> scale) {
  const c10::cuda::CUDAGuard device(q.device());
  const SinkAttention a = sink_arguments(q, k, v, sink_k, sink_v, positions, between_k, between_v, between_positions, between_from, between_until, spans, cu_seqlens,
                                         cu_seqlens_k, key_lengths, window, reach, scale);
  const AttentionArguments arguments{q, k, v, spans, cu_seqlens, cu_seqlens_k, key_lengths, window, scale};
  check_attention_arguments(q, k, v, cu_seqlens, cu_seqlens_k, key_lengths, window, scale);
  check_attention_shapes(q, k, spans, cu_seqlens, cu_seqlens_k, key_lengths);
  check_far_keys("the first keys and values", sink_k, sink_v, a);
  if (a.between) check_far_keys("the keys and values between", a.between->k, a.between->v, a);
  if (!hopper_serves(arguments) || sink_k.size(1) > kMostKeys || (a.between && a.between->k.size(1) > kMostKeys)) return sink_attention_any(a);
  HopperFarKeys far{.window = window, .reach = reach};
  far.first_k = hopper_aligned(sink_k), far.first_v = hopper_aligned(sink_v);
  if (a.between) {
    far.between_k = hopper_aligned(a.between->k), far.between_v = hopper_aligned(a.between->v);
    far.seen = seen_of(*a.between, reach, q.device());
  }
  far.positions = positions.is_cuda() && positions.scalar_type() == at::kInt ? positions.contiguous() : ints_on(positions, q.device());
  return hopper_forward(hopper_arguments(arguments), false, &far).o;
}

}  // namespace
}  // namespace oryx::ops

TORCH_LIBRARY_IMPL(oryx, CUDA, m) { m.impl("sink_attention", oryx::ops::sink_attention_cuda); }
