// RMSNorm and its gated form, float32, rows of 16 to 768. Floor: each tensor read and written once. The ATen lines
// compose the same formula from ATen's operators, at::rms_norm where there is one.
#include "oryx/ops/norm/norm.h"

#include <ATen/ATen.h>
#include <benchmark/benchmark.h>
#include <torch/csrc/autograd/autograd.h>

namespace oryx::ops {
namespace {

constexpr int64_t kElements = 1024 * 768;

struct Data {
  at::Tensor x, gate, weight, up;
  explicit Data(int64_t dim)
      : x(at::randn({kElements / dim, dim}).set_requires_grad(true)),
        gate(at::randn({kElements / dim, dim}).set_requires_grad(true)),
        weight(at::randn({dim}).set_requires_grad(true)),
        up(at::randn({kElements / dim, dim})) {}
};

void report(benchmark::State& state, double tensors) {
  const double bytes = tensors * kElements * 4;
  state.counters["floor_bytes"] = bytes;
  state.counters["bytes/s"] =
      benchmark::Counter(bytes * static_cast<double>(state.iterations()), benchmark::Counter::kIsRate);
}

bool correct(const at::Tensor& got, const at::Tensor& want) {
  return ((got.to(at::kDouble) - want).norm() / want.norm()).item<double>() < 1e-6;
}

bool correct(const Data& d) {
  const at::Tensor x = d.x.detach(), g = d.gate.detach(), w = d.weight.detach(), xd = x.to(at::kDouble),
                   gd = g.to(at::kDouble), wd = w.to(at::kDouble);
  return correct(rms_norm(x, w, 1e-6), rms_norm_naive(xd, wd, 1e-6)) &&
         correct(gated_rms_norm(x, g, w, 1e-6), gated_rms_norm_naive(xd, gd, wd, 1e-6));
}

at::Tensor plain(const Data& d) { return rms_norm(d.x, d.weight, 1e-6); }
at::Tensor plain_aten(const Data& d) { return at::rms_norm(d.x, {d.x.size(-1)}, d.weight, 1e-6); }
at::Tensor gated(const Data& d) { return gated_rms_norm(d.x, d.gate, d.weight, 1e-6); }
at::Tensor gated_aten(const Data& d) { return plain_aten(d) * at::silu(d.gate); }

void forward(benchmark::State& state, at::Tensor (*f)(const Data&), double tensors) {
  const Data d(state.range(0));
  if (!correct(d)) return state.SkipWithError("differs from the naive form");
  at::NoGradGuard no_grad;
  for (auto _ : state) benchmark::DoNotOptimize(f(d));
  report(state, tensors);
}

void backward(benchmark::State& state, at::Tensor (*f)(const Data&), bool has_gate, double tensors) {
  const Data d(state.range(0));
  if (!correct(d)) return state.SkipWithError("differs from the naive form");
  const at::Tensor y = f(d);
  std::vector<at::Tensor> inputs = {d.x, d.weight};
  if (has_gate) inputs.push_back(d.gate);
  for (auto _ : state) benchmark::DoNotOptimize(torch::autograd::grad({y}, inputs, {d.up}, /*retain_graph=*/true));
  report(state, tensors);
}

void BM_RmsNormForward(benchmark::State& s) { forward(s, plain, 2); }
void BM_RmsNormForwardAten(benchmark::State& s) { forward(s, plain_aten, 2); }
void BM_RmsNormBackward(benchmark::State& s) { backward(s, plain, false, 3); }
void BM_RmsNormBackwardAten(benchmark::State& s) { backward(s, plain_aten, false, 3); }
void BM_GatedRmsNormForward(benchmark::State& s) { forward(s, gated, 3); }
void BM_GatedRmsNormForwardAten(benchmark::State& s) { forward(s, gated_aten, 3); }
void BM_GatedRmsNormBackward(benchmark::State& s) { backward(s, gated, true, 5); }
void BM_GatedRmsNormBackwardAten(benchmark::State& s) { backward(s, gated_aten, true, 5); }

#define ORYX_NORM_BENCHMARK(name) \
  BENCHMARK(name)->Arg(16)->Arg(64)->Arg(128)->Arg(768)->UseRealTime()->Unit(benchmark::kMicrosecond)
ORYX_NORM_BENCHMARK(BM_RmsNormForward);
ORYX_NORM_BENCHMARK(BM_RmsNormForwardAten);
ORYX_NORM_BENCHMARK(BM_RmsNormBackward);
ORYX_NORM_BENCHMARK(BM_RmsNormBackwardAten);
ORYX_NORM_BENCHMARK(BM_GatedRmsNormForward);
ORYX_NORM_BENCHMARK(BM_GatedRmsNormForwardAten);
ORYX_NORM_BENCHMARK(BM_GatedRmsNormBackward);
ORYX_NORM_BENCHMARK(BM_GatedRmsNormBackwardAten);
#undef ORYX_NORM_BENCHMARK

}  // namespace
}  // namespace oryx::ops
