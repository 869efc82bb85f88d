// Short convolution, 4 x 1024 x 768, w = 4, SiLU, float32. Floor: bytes read and written once (forward x, y; backward
// x, dy, dx).
#include <ATen/ATen.h>
#include <benchmark/benchmark.h>
#include <torch/csrc/autograd/autograd.h>

#include "oryx/ops/short_conv/short_conv.h"

namespace oryx::ops {
namespace {

constexpr int64_t kB = 4, kT = 1024, kC = 768, kW = 4;

struct Data {
  at::Tensor x = at::randn({kB, kT, kC}).set_requires_grad(true);
  at::Tensor weight = at::randn({kC, kW}).set_requires_grad(true);
  at::Tensor up = at::randn({kB, kT, kC});
};

bool correct(const Data& d) {
  const at::Tensor x = d.x.detach().slice(1, 0, 40), y = short_conv(x, d.weight, {}, {}, {}, Activation::kSilu).y;
  const at::Tensor ref = short_conv_naive(x.to(at::kDouble), d.weight.to(at::kDouble), {}, {}, {}, Activation::kSilu).y;
  return ((y.to(at::kDouble) - ref).norm() / ref.norm()).item<double>() < 1e-6;
}

void report(benchmark::State& state, double bytes) {
  state.counters["floor_bytes"] = bytes;
  state.counters["bytes/s"] =
      benchmark::Counter(bytes * static_cast<double>(state.iterations()), benchmark::Counter::kIsRate);
}

void BM_ShortConvForward(benchmark::State& state) {
  const Data d;
  at::NoGradGuard no_grad;
  if (!correct(d)) return state.SkipWithError("differs from the naive form");
  for (auto _ : state) benchmark::DoNotOptimize(short_conv(d.x, d.weight, {}, {}, {}, Activation::kSilu).y);
  report(state, 2. * kB * kT * kC * 4);
}
BENCHMARK(BM_ShortConvForward)->UseRealTime()->Unit(benchmark::kMillisecond);

void BM_ShortConvBackward(benchmark::State& state) {
  const Data d;
  if (!correct(d)) return state.SkipWithError("differs from the naive form");
  const at::Tensor y = short_conv(d.x, d.weight, {}, {}, {}, Activation::kSilu).y;
  for (auto _ : state) {
    benchmark::DoNotOptimize(torch::autograd::grad({y}, {d.x, d.weight}, {d.up}, /*retain_graph=*/true));
  }
  report(state, 3. * kB * kT * kC * 4);
}
BENCHMARK(BM_ShortConvBackward)->UseRealTime()->Unit(benchmark::kMillisecond);

// The peer: ATen's depthwise convolution on channels-first data, activation apart.
void BM_ShortConvForwardAten(benchmark::State& state) {
  const Data d;
  at::NoGradGuard no_grad;
  const at::Tensor x = d.x.transpose(1, 2).contiguous();
  for (auto _ : state) {
    benchmark::DoNotOptimize(at::silu(at::conv1d(x, d.weight.unsqueeze(1), {}, 1, kW - 1, 1, kC).slice(2, 0, kT)));
  }
  report(state, 2. * kB * kT * kC * 4);
}
BENCHMARK(BM_ShortConvForwardAten)->UseRealTime()->Unit(benchmark::kMillisecond);

void BM_ShortConvStep(benchmark::State& state) {
  const Data d;
  at::NoGradGuard no_grad;
  const at::Tensor s = at::zeros({8, kC, kW - 1}), x = d.x.detach().slice(1, 0, 2).reshape({8, kC});
  for (auto _ : state) benchmark::DoNotOptimize(short_conv_step(x, d.weight, {}, s, Activation::kSilu));
  report(state, 8. * kC * 4 * (2 + 2 * (kW - 1)));
}
BENCHMARK(BM_ShortConvStep)->UseRealTime()->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace oryx::ops
