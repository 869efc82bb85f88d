// SwiGLU, 1024 x 2048, float32. Floor: forward reads gate, up and writes y; backward reads d_y, gate, up and writes
// two.
#include "oryx/ops/swiglu/swiglu.h"

#include <ATen/ATen.h>
#include <benchmark/benchmark.h>
#include <torch/csrc/autograd/autograd.h>

namespace oryx::ops {
namespace {

constexpr int64_t kRows = 1024, kWidth = 2048;

struct Data {
  at::Tensor gate = at::randn({kRows, kWidth}).set_requires_grad(true);
  at::Tensor up = at::randn({kRows, kWidth}).set_requires_grad(true);
  at::Tensor d_y = at::randn({kRows, kWidth});
};

at::Tensor aten(const at::Tensor& gate, const at::Tensor& up) { return at::silu(gate) * up; }

bool correct(const Data& d) {
  const at::Tensor want = swiglu_naive(d.gate.detach().to(at::kDouble), d.up.detach().to(at::kDouble));
  const at::Tensor got = swiglu(d.gate.detach(), d.up.detach());
  return ((got.to(at::kDouble) - want).norm() / want.norm()).item<double>() < 1e-6;
}

void report(benchmark::State& state, double tensors) {
  const double bytes = tensors * kRows * kWidth * 4;
  state.counters["floor_bytes"] = bytes;
  state.counters["bytes/s"] =
      benchmark::Counter(bytes * static_cast<double>(state.iterations()), benchmark::Counter::kIsRate);
}

using Form = at::Tensor (*)(const at::Tensor&, const at::Tensor&);

void forward(benchmark::State& state, Form f) {
  const Data d;
  if (!correct(d)) return state.SkipWithError("differs from the naive form");
  at::NoGradGuard no_grad;
  for (auto _ : state) benchmark::DoNotOptimize(f(d.gate, d.up));
  report(state, 3);
}

void backward(benchmark::State& state, Form f) {
  const Data d;
  if (!correct(d)) return state.SkipWithError("differs from the naive form");
  const at::Tensor y = f(d.gate, d.up);
  for (auto _ : state) {
    benchmark::DoNotOptimize(torch::autograd::grad({y}, {d.gate, d.up}, {d.d_y}, /*retain_graph=*/true));
  }
  report(state, 5);
}

void BM_SwigluForward(benchmark::State& s) { forward(s, swiglu); }
void BM_SwigluForwardAten(benchmark::State& s) { forward(s, aten); }
void BM_SwigluBackward(benchmark::State& s) { backward(s, swiglu); }
void BM_SwigluBackwardAten(benchmark::State& s) { backward(s, aten); }
BENCHMARK(BM_SwigluForward)->UseRealTime()->Unit(benchmark::kMicrosecond);
BENCHMARK(BM_SwigluForwardAten)->UseRealTime()->Unit(benchmark::kMicrosecond);
BENCHMARK(BM_SwigluBackward)->UseRealTime()->Unit(benchmark::kMicrosecond);
BENCHMARK(BM_SwigluBackwardAten)->UseRealTime()->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace oryx::ops
