// Cross-entropy with and without the output projection, float32, 1024 tokens of width 768, 32,000 classes; a forward
// pass and the gradients. Floors: 6 N D C FLOPs of the three products (2 N D C without gradients); for cross_entropy
// alone, logits read twice and their gradient written once.
#include "oryx/ops/cross_entropy/cross_entropy.h"

#include <ATen/ATen.h>
#include <benchmark/benchmark.h>
#include <torch/csrc/autograd/autograd.h>

namespace oryx::ops {
namespace {

constexpr int64_t kN = 1024, kD = 768, kC = 32000;

struct Data {
  at::Tensor hidden = at::randn({kN, kD}).set_requires_grad(true);
  at::Tensor weight = (at::randn({kC, kD}) * 0.03).set_requires_grad(true);
  at::Tensor targets = at::randint(kC, {kN}, at::kLong);
};

at::Tensor fused(const Data& d) { return linear_cross_entropy(d.hidden, d.weight, d.targets).loss; }
at::Tensor aten(const Data& d) { return at::cross_entropy_loss(at::linear(d.hidden, d.weight), d.targets); }

bool correct(const Data& d) {
  const at::Tensor got = fused(d), want = aten(d);
  const auto a = torch::autograd::grad({got}, {d.hidden, d.weight}),
             b = torch::autograd::grad({want}, {d.hidden, d.weight});
  const auto differ = [](const at::Tensor& x, const at::Tensor& y) {
    return ((x - y).norm() / y.norm()).item<double>();
  };
  return differ(got, want) < 1e-6 && differ(a[0], b[0]) < 1e-5 && differ(a[1], b[1]) < 1e-5;
}

void report(benchmark::State& state, const char* unit, double amount) {
  state.counters[std::string("floor_") + unit] = amount;
  state.counters[std::string(unit) + "/s"] =
      benchmark::Counter(amount * static_cast<double>(state.iterations()), benchmark::Counter::kIsRate);
}

void train(benchmark::State& state, at::Tensor (*f)(const Data&)) {
  const Data d;
  if (!correct(d)) return state.SkipWithError("differs from linear and cross_entropy_loss");
  for (auto _ : state) benchmark::DoNotOptimize(torch::autograd::grad({f(d)}, {d.hidden, d.weight}));
  report(state, "FLOPs", 6. * kN * kD * kC);
}

void evaluate(benchmark::State& state, at::Tensor (*f)(const Data&)) {
  const Data d;
  if (!correct(d)) return state.SkipWithError("differs from linear and cross_entropy_loss");
  at::NoGradGuard no_grad;
  for (auto _ : state) benchmark::DoNotOptimize(f(d));
  report(state, "FLOPs", 2. * kN * kD * kC);
}

void from_logits(benchmark::State& state, bool ours) {
  const Data d;
  if (!correct(d)) return state.SkipWithError("differs from linear and cross_entropy_loss");
  const at::Tensor logits = at::linear(d.hidden, d.weight).detach().set_requires_grad(true);
  for (auto _ : state) {
    const at::Tensor loss = ours ? cross_entropy(logits, d.targets).loss : at::cross_entropy_loss(logits, d.targets);
    benchmark::DoNotOptimize(torch::autograd::grad({loss}, {logits}));
  }
  report(state, "bytes", 3. * kN * kC * 4);
}

void BM_LinearCrossEntropy(benchmark::State& s) { train(s, fused); }
void BM_LinearCrossEntropyAten(benchmark::State& s) { train(s, aten); }
void BM_LinearCrossEntropyNoGrad(benchmark::State& s) { evaluate(s, fused); }
void BM_LinearCrossEntropyNoGradAten(benchmark::State& s) { evaluate(s, aten); }
void BM_CrossEntropy(benchmark::State& s) { from_logits(s, true); }
void BM_CrossEntropyAten(benchmark::State& s) { from_logits(s, false); }
BENCHMARK(BM_LinearCrossEntropy)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK(BM_LinearCrossEntropyAten)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK(BM_LinearCrossEntropyNoGrad)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK(BM_LinearCrossEntropyNoGradAten)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK(BM_CrossEntropy)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK(BM_CrossEntropyAten)->UseRealTime()->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace oryx::ops
