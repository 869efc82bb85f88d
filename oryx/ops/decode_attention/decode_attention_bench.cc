// One new token over cached keys that were kept before RoPE, on the CPU: rotated as they are read, rotated into a copy first, and not rotated at all. Counter: bytes of keys and
// values that have to be read. Compared with the naive form first.
#include <ATen/ATen.h>
#include <benchmark/benchmark.h>

#include "oryx/ops/decode_attention/decode_attention.h"
#include "oryx/ops/rope/rope.h"
#include "oryx/ops/span_attention/span_attention.h"

namespace oryx::ops {
namespace {

constexpr int64_t kHeads = 12, kWidth = 64;
enum Form { kFused, kCopy, kPlain };

at::Tensor run(Form form, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& lengths) {
  if (form != kCopy) return decode_attention(q, k, v, lengths, {}, {}, {form == kFused ? 10000.0 : 0.0, 0});
  const at::Tensor positions = at::arange(k.size(1), at::kInt).unsqueeze(0);
  const at::Tensor turned = rope(q.unsqueeze(1), (lengths - 1).unsqueeze(1), 10000);
  return span_attention(turned, rope(k, positions, 10000), v, {}, {}, {}, lengths).squeeze(1);
}

void Decode(benchmark::State& state, Form form, at::ScalarType dtype) {
  at::manual_seed(1);
  const int64_t keys = state.range(0);
  const at::Tensor q = at::randn({1, kHeads, kWidth}).to(dtype), k = at::randn({1, keys, kHeads, kWidth}).to(dtype), v = at::randn_like(k);
  const at::Tensor lengths = at::full({1}, keys, at::kInt);
  const at::Tensor expected = decode_attention_naive(q.to(at::kDouble), k.to(at::kDouble), v.to(at::kDouble), lengths, {}, {}, {form == kPlain ? 0.0 : 10000.0, 0});
  const at::Tensor difference = run(form, q, k, v, lengths).to(at::kDouble) - expected;
  if ((difference.norm() / expected.norm()).item<double>() > (dtype == at::kFloat ? 1e-5 : 1e-2)) return state.SkipWithError("differs from the naive form");
  for (auto _ : state) benchmark::DoNotOptimize(run(form, q, k, v, lengths));
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(k.nbytes() + v.nbytes()));
}

void shapes(benchmark::internal::Benchmark* b) { b->Arg(4096)->Arg(16384)->ArgName("keys")->Unit(benchmark::kMicrosecond)->UseRealTime()->MeasureProcessCPUTime(); }

BENCHMARK_CAPTURE(Decode, rotated_as_read_float32, kFused, at::kFloat)->Apply(shapes);
BENCHMARK_CAPTURE(Decode, rotated_copy_float32, kCopy, at::kFloat)->Apply(shapes);
BENCHMARK_CAPTURE(Decode, not_rotated_float32, kPlain, at::kFloat)->Apply(shapes);
BENCHMARK_CAPTURE(Decode, rotated_as_read_bfloat16, kFused, at::kBFloat16)->Apply(shapes);
BENCHMARK_CAPTURE(Decode, rotated_copy_bfloat16, kCopy, at::kBFloat16)->Apply(shapes);
BENCHMARK_CAPTURE(Decode, not_rotated_bfloat16, kPlain, at::kBFloat16)->Apply(shapes);

}  // namespace
}  // namespace oryx::ops
