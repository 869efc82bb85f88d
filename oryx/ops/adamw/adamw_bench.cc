// AdamW over the parameters of a 130M model: 147 tensors, 124 million float32. Floor: p, g, m, v read and p, m, v
// written once; for the norm, g read once. "Small" is 2,000 tensors of 64: the cost of a tensor. The ATen line is the
// fused step torch.optim uses.
#include "oryx/ops/adamw/adamw.h"

#include <ATen/ATen.h>
#include <benchmark/benchmark.h>

namespace oryx::ops {
namespace {

struct State {
  std::vector<at::Tensor> p, g, m, v;
  void add(at::IntArrayRef shape) {
    p.push_back(at::randn(shape));
    g.push_back(at::randn(shape));
    m.push_back(at::randn(shape) * 0.1);
    v.push_back(at::rand(shape));
  }
  double numel() const {
    double n = 0;
    for (const at::Tensor& t : p) n += static_cast<double>(t.numel());
    return n;
  }
};

State model() {
  State s;
  s.add({50304, 768});
  for (int layer = 0; layer < 12; ++layer) {
    for (int i = 0; i < 4; ++i) s.add({768, 768});
    for (int i = 0; i < 2; ++i) s.add({2048, 768});
    s.add({768, 2048});
    for (int i = 0; i < 5; ++i) s.add({768});
  }
  s.add({768});
  return s;
}

State small() {
  State s;
  for (int i = 0; i < 2000; ++i) s.add({64});
  return s;
}

bool correct() {
  State a, b;
  a.add({1001});
  for (auto [from, to] : {std::pair(&a.p, &b.p), std::pair(&a.g, &b.g), std::pair(&a.m, &b.m), std::pair(&a.v, &b.v)}) {
    to->push_back((*from)[0].to(at::kDouble));
  }
  adamw_step_all(a.p, a.g, a.m, a.v, 3, {});
  adamw_step_all(b.p, b.g, b.m, b.v, 3, {});
  return ((a.p[0] - b.p[0]).norm() / b.p[0].norm()).item<double>() < 1e-6;
}

void report(benchmark::State& state, double bytes) {
  state.counters["floor_bytes"] = bytes;
  state.counters["bytes/s"] =
      benchmark::Counter(bytes * static_cast<double>(state.iterations()), benchmark::Counter::kIsRate);
}

void step(benchmark::State& state, State s) {
  if (!correct()) return state.SkipWithError("differs from float64");
  for (auto _ : state) adamw_step_all(s.p, s.g, s.m, s.v, 10, {});
  report(state, 7 * 4 * s.numel());
}

void step_aten(benchmark::State& state, State s) {
  if (!correct()) return state.SkipWithError("differs from float64");
  std::vector<at::Tensor> steps;
  for (size_t i = 0; i < s.p.size(); ++i) steps.push_back(at::scalar_tensor(10.0, at::kFloat));
  for (auto _ : state) {
    at::_fused_adamw_(s.p, s.g, s.m, s.v, {}, steps, 1e-3, 0.9, 0.95, 0.1, 1e-8, /*amsgrad=*/false, /*maximize=*/false);
  }
  report(state, 7 * 4 * s.numel());
}

void BM_Adamw(benchmark::State& s) { step(s, model()); }
void BM_AdamwAten(benchmark::State& s) { step_aten(s, model()); }
void BM_AdamwSmall(benchmark::State& s) { step(s, small()); }
void BM_AdamwSmallAten(benchmark::State& s) { step_aten(s, small()); }
void BM_GlobalNorm(benchmark::State& state) {
  const State s = model();
  for (auto _ : state) benchmark::DoNotOptimize(global_norm(s.g));
  report(state, 4 * s.numel());
}
BENCHMARK(BM_Adamw)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK(BM_AdamwAten)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK(BM_AdamwSmall)->UseRealTime()->Unit(benchmark::kMicrosecond);
BENCHMARK(BM_AdamwSmallAten)->UseRealTime()->Unit(benchmark::kMicrosecond);
BENCHMARK(BM_GlobalNorm)->UseRealTime()->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace oryx::ops
