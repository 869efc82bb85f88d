// SSD in float32: parallel form forward and backward, and one-token steps, at the shapes of small text models and of
// the 1.4B model.
//
// Floor: floating-point operations of the chunked form at chunk 64, triangles counted as half (multiply and add are
// two), and the bytes of arguments and results, each moved once. FLOP/s and bytes/s are these over the measured time.
#include <ATen/ATen.h>
#include <benchmark/benchmark.h>
#include <torch/csrc/autograd/autograd.h>

#include "oryx/ops/ssd/ssd.h"
#include "oryx/ops/ssd/ssd_internal.h"

namespace oryx::ops {
namespace {

constexpr double kChunk = 64;

struct Data {
  int64_t B, T, H, K, V;
  SsdInputs in;
  at::Tensor up;

  // Decays as at initialisation: dt from 1e-3 to 1e-1, A from -1 to -16.
  explicit Data(const benchmark::State& s) : B(s.range(0)), T(s.range(1)), H(s.range(2)), K(s.range(3)), V(s.range(4)) {
    in.q = at::randn({B, T, H, K}), in.k = at::randn({B, T, H, K}), in.v = at::randn({B, T, H, V});
    in.dt_raw = at::randn({B, T, H}) - 4.5, in.dt_bias = at::zeros({H}), in.D = at::ones({H});
    in.A_log = at::rand({H}) * 2.77;
    up = at::randn({B, T, H, V});
  }
  SsdInputs first_tokens(int64_t n, at::ScalarType dtype) const {
    SsdInputs out = ssd_convert(in, dtype);
    for (at::Tensor* t : {&out.q, &out.k, &out.v, &out.dt_raw}) *t = t->slice(1, 0, n);
    return out;
  }
};

double difference(const at::Tensor& x, const at::Tensor& ref) {
  return ((x.to(at::kDouble) - ref).norm() / ref.norm()).item<double>();
}

SsdResult run(const SsdInputs& in) { return ssd(in.q, in.k, in.v, in.dt_raw, in.dt_bias, in.A_log, in.D); }

// Values against the naive form in float64, gradients against the float64 chunked form (which the tests hold to the
// naive one).
bool correct(const Data& d) {
  const SsdInputs narrow = d.first_tokens(100, at::kFloat), wide = d.first_tokens(100, at::kDouble);
  const SsdResult r = run(narrow);
  const SsdResult ref = ssd_naive(wide.q, wide.k, wide.v, wide.dt_raw, wide.dt_bias, wide.A_log, wide.D);
  if (difference(r.o, ref.o) > 5e-6 || difference(r.final_state, ref.final_state) > 5e-6) return false;
  const at::Tensor up = d.up.slice(1, 0, 100);
  const SsdGradients a = ssd_vector_backward(narrow, ssd_sizes("bench", narrow), up, {});
  const SsdGradients b = ssd_chunked_backward(wide, ssd_sizes("bench", wide), up.to(at::kDouble), {});
  return difference(a.q, b.q) < 1e-5 && difference(a.k, b.k) < 1e-5 && difference(a.v, b.v) < 1e-5 &&
         difference(a.dt_raw, b.dt_raw) < 1e-5 && difference(a.A_log, b.A_log) < 5e-5;
}

void report(benchmark::State& state, double flops, double bytes) {
  const double n = static_cast<double>(state.iterations());
  state.counters["floor_flops"] = flops;
  state.counters["floor_bytes"] = bytes;
  state.counters["FLOP/s"] = benchmark::Counter(flops * n, benchmark::Counter::kIsRate);
  state.counters["bytes/s"] = benchmark::Counter(bytes * n, benchmark::Counter::kIsRate);
}

void forward(benchmark::State& state, SsdResult (*form)(const SsdInputs&, const SsdSizes&)) {
  const Data d(state);
  if (!correct(d)) return state.SkipWithError("differs from the naive form");
  const SsdSizes sizes = ssd_sizes("bench", d.in);
  for (auto _ : state) benchmark::DoNotOptimize(form(d.in, sizes));
  const double tokens = static_cast<double>(d.B * d.T * d.H), K = static_cast<double>(d.K),
               V = static_cast<double>(d.V);
  report(state, tokens * (kChunk * (K + V) + 4 * K * V), 4 * tokens * (2 * K + 2 * V + 1));
}

void backward(benchmark::State& state,
              SsdGradients (*form)(const SsdInputs&, const SsdSizes&, const at::Tensor&, const at::Tensor&)) {
  const Data d(state);
  if (!correct(d)) return state.SkipWithError("differs from the naive form");
  const SsdSizes sizes = ssd_sizes("bench", d.in);
  for (auto _ : state) benchmark::DoNotOptimize(form(d.in, sizes, d.up, {}));
  const double tokens = static_cast<double>(d.B * d.T * d.H), K = static_cast<double>(d.K),
               V = static_cast<double>(d.V);
  report(state, tokens * (kChunk * (3 * K + 2 * V) + 10 * K * V), 4 * tokens * (4 * K + 3 * V + 2));
}

void BM_SsdForward(benchmark::State& state) { forward(state, ssd_vector); }
void BM_SsdForwardAten(benchmark::State& state) { forward(state, ssd_chunked); }
void BM_SsdBackward(benchmark::State& state) { backward(state, ssd_vector_backward); }
void BM_SsdBackwardAten(benchmark::State& state) { backward(state, ssd_chunked_backward); }

void BM_SsdStep(benchmark::State& state) {
  const Data d(state);
  if (!correct(d)) return state.SkipWithError("differs from the naive form");
  const auto token = [](const at::Tensor& t) { return t.select(1, 0).contiguous(); };
  const at::Tensor q = token(d.in.q), k = token(d.in.k), v = token(d.in.v), dt = token(d.in.dt_raw);
  const at::Tensor S = at::zeros({d.B, d.H, d.V, d.K});
  for (auto _ : state) benchmark::DoNotOptimize(ssd_step(q, k, v, dt, d.in.dt_bias, d.in.A_log, d.in.D, S));
  const double heads = static_cast<double>(d.B * d.H), KV = static_cast<double>(d.K * d.V);
  report(state, heads * 5 * KV, heads * 8 * KV);
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "T", "H", "K", "V"})->Args({2, 512, 12, 64, 64})->Args({1, 4096, 16, 128, 128});
  b->UseRealTime()->Unit(benchmark::kMillisecond);
}
BENCHMARK(BM_SsdForward)->Apply(shapes);
BENCHMARK(BM_SsdForwardAten)->Apply(shapes);
BENCHMARK(BM_SsdBackward)->Apply(shapes);
BENCHMARK(BM_SsdBackwardAten)->Apply(shapes);
BENCHMARK(BM_SsdStep)->Apply(shapes)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace oryx::ops
