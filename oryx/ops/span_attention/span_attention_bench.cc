// Attention's time on the CPU in float32: full causal, spans, decode, and libtorch's own attention beside it.
// Counters: GFLOPS over the attended query-key pairs (4 D each forward, 10 D backward with the recomputed scores), and
// for decode the bytes of keys and values that have to be read. Every case is first compared with the naive form on a
// small problem of its kind.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>
#include <torch/csrc/autograd/autograd.h>

#include "oryx/ops/span_attention/span_attention.h"

namespace oryx::ops {
namespace {

constexpr int64_t kHeads = 12, kWidth = 64;
enum Which { kFull, kChunks, kTail, kTorch };

struct Problem {
  at::Tensor q, k, v;
  std::optional<at::Tensor> spans;
  double pairs = 0;  // attended query-key pairs of all heads and rows
};

// The spans of a case as a list, and the pairs they attend.
std::pair<at::Tensor, double> make_spans(int64_t B, int64_t T, Which which) {
  std::vector<int32_t> list;
  double pairs = 0;
  const auto add = [&](int64_t row, int64_t begin, int64_t end) {
    for (const int64_t x : {row, begin, end}) list.push_back(static_cast<int32_t>(x));
    for (int64_t i = begin; i < end; ++i) pairs += static_cast<double>(i + 1);
  };
  for (int64_t b = 0; b < B; ++b) {
    if (which == kTail) add(b, T - T / 10, T);
    // A quarter of the 256-token chunks, spread by a fixed permutation of four.
    for (int64_t c = 0; which == kChunks && c * 256 < T; ++c) {
      if ((c * 7 + c / 4 * 3 + b) % 4 == 1) add(b, c * 256, std::min(T, c * 256 + 256));
    }
    if (which == kFull || which == kTorch) add(b, 0, T);
  }
  const int64_t n = static_cast<int64_t>(list.size()) / 3;
  return {at::tensor(list, at::kInt).view({n, 3}), pairs};
}

Problem make_problem(int64_t B, int64_t T, Which which) {
  at::manual_seed(1);
  Problem p;
  for (at::Tensor* t : {&p.q, &p.k, &p.v}) *t = at::randn({B, T, kHeads, kWidth});
  const auto [spans, pairs] = make_spans(B, T, which);
  p.pairs = pairs * kHeads;
  if (which != kFull && which != kTorch) p.spans = spans;
  return p;
}

at::Tensor attend(const Problem& p, Which which) {
  if (which != kTorch) return span_attention(p.q, p.k, p.v, p.spans);
  return at::scaled_dot_product_attention(p.q.transpose(1, 2), p.k.transpose(1, 2), p.v.transpose(1, 2), {}, 0.0, true)
      .transpose(1, 2);
}

bool agrees_with_naive(Which which) {
  const Problem p = make_problem(1, 600, which);
  return at::allclose(attend(p, which), span_attention_naive(p.q, p.k, p.v, p.spans), 1e-4, 1e-5);
}

void Forward(benchmark::State& state, Which which) {
  if (!agrees_with_naive(which)) return state.SkipWithError("differs from the naive form");
  const Problem p = make_problem(state.range(0), state.range(1), which);
  for (auto _ : state) benchmark::DoNotOptimize(attend(p, which));
  state.counters["GFLOPS"] = benchmark::Counter(4e-9 * kWidth * p.pairs, benchmark::Counter::kIsIterationInvariantRate);
}

void Backward(benchmark::State& state, Which which) {
  if (!agrees_with_naive(which)) return state.SkipWithError("differs from the naive form");
  Problem p = make_problem(state.range(0), state.range(1), which);
  for (at::Tensor* t : {&p.q, &p.k, &p.v}) t->requires_grad_();
  const at::Tensor o = attend(p, which), up = at::randn_like(o.detach());
  for (auto _ : state) benchmark::DoNotOptimize(torch::autograd::grad({o}, {p.q, p.k, p.v}, {up}, true));
  state.counters["GFLOPS"] =
      benchmark::Counter(10e-9 * kWidth * p.pairs, benchmark::Counter::kIsIterationInvariantRate);
}

// One token of each of B sequences over T keys.
void Decode(benchmark::State& state, at::ScalarType dtype, int64_t key_heads) {
  const int64_t B = state.range(0), T = state.range(1);
  at::manual_seed(1);
  const at::Tensor q = at::randn({B, 1, kHeads, kWidth}).to(dtype), k = at::randn({B, T, key_heads, kWidth}).to(dtype);
  const at::Tensor v = at::randn({B, T, key_heads, kWidth}).to(dtype), lengths = at::full({B}, T, at::kInt);
  const at::Tensor ref = span_attention_naive(q.to(at::kFloat), k.to(at::kFloat), v.to(at::kFloat));
  const bool good = at::allclose(span_attention(q, k, v, {}, {}, {}, lengths).to(at::kFloat), ref, 2e-2,
                                 dtype == at::kFloat ? 1e-5 : 1e-3);
  if (!good) return state.SkipWithError("differs from the naive form");
  for (auto _ : state) benchmark::DoNotOptimize(span_attention(q, k, v, {}, {}, {}, lengths));
  const double bytes = 2.0 * static_cast<double>(k.numel()) * static_cast<double>(k.element_size());
  state.counters["GB/s"] = benchmark::Counter(bytes * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

void shapes(benchmark::internal::Benchmark* b) {
  b->Args({2, 512})
      ->Args({1, 2048})
      ->Args({1, 4096})
      ->Args({1, 8192})
      ->ArgNames({"B", "T"})
      ->Unit(benchmark::kMillisecond)
      ->UseRealTime()
      ->MeasureProcessCPUTime();
}
void spans_shapes(benchmark::internal::Benchmark* b) {
  b->Args({1, 2048})
      ->Args({1, 8192})
      ->ArgNames({"B", "T"})
      ->Unit(benchmark::kMillisecond)
      ->UseRealTime()
      ->MeasureProcessCPUTime();
}
void decode_shapes(benchmark::internal::Benchmark* b) {
  b->Args({1, 4096})
      ->Args({8, 4096})
      ->Args({1, 32768})
      ->ArgNames({"B", "keys"})
      ->Unit(benchmark::kMicrosecond)
      ->UseRealTime()
      ->MeasureProcessCPUTime();
}

BENCHMARK_CAPTURE(Forward, span_attention_full, kFull)->Apply(shapes);
BENCHMARK_CAPTURE(Forward, span_attention_torch, kTorch)->Apply(shapes);
BENCHMARK_CAPTURE(Forward, span_attention_chunks25, kChunks)->Apply(spans_shapes);
BENCHMARK_CAPTURE(Forward, span_attention_last10, kTail)->Apply(spans_shapes);
BENCHMARK_CAPTURE(Backward, span_attention_full, kFull)->Apply(shapes);
BENCHMARK_CAPTURE(Backward, span_attention_torch, kTorch)->Apply(shapes);
BENCHMARK_CAPTURE(Backward, span_attention_chunks25, kChunks)->Apply(spans_shapes);
BENCHMARK_CAPTURE(Backward, span_attention_last10, kTail)->Apply(spans_shapes);
BENCHMARK_CAPTURE(Decode, span_attention_float32, at::kFloat, kHeads)->Apply(decode_shapes);
BENCHMARK_CAPTURE(Decode, span_attention_bfloat16, at::kBFloat16, kHeads)->Apply(decode_shapes);
BENCHMARK_CAPTURE(Decode, span_attention_grouped, at::kFloat, 4)->Apply(decode_shapes);

}  // namespace
}  // namespace oryx::ops
