// Kimi Delta Attention: forward, forward + backward and the one-token step by kernels and by tensor operations, beside the gated delta rule's kernels on
// the same q, k, v.
//
//   build/cpu/oryx_bench --benchmark_filter=Kda
//
// Each shape first passes a correctness gate: equal decays in all channels give what the gated delta rule gives.
#include <ATen/ATen.h>
#include <benchmark/benchmark.h>

#include "oryx/ops/gated_delta/gated_delta.h"
#include "oryx/ops/kda/kda_internal.h"

namespace oryx::ops::kimi {
namespace {

struct Data {
  Inputs x;
  Problem p;
  at::Tensor up_o, up_state;
};

Data data(const benchmark::State& state) {
  const int64_t B = state.range(0), T = state.range(1), H = state.range(2), K = state.range(3), V = state.range(4);
  at::manual_seed(1);
  Data d;
  d.x = {at::randn({B, T, H, K}), at::randn({B, T, H, K}), at::randn({B, T, H, V}), -at::rand({B, T, H, K}), at::randn({B, T, H}).sigmoid(),
         at::randn({B, H, V, K})};
  d.p = kimi::check_arguments("bench", d.x.q, d.x.k, d.x.v, d.x.g, d.x.beta, d.x.state, {}, {}, {}, 1e-6);
  d.up_o = at::randn({B, T, H, V});
  d.up_state = at::randn({B, H, V, K});
  return d;
}

bool close(const at::Tensor& a, const at::Tensor& b) { return ((a - b).abs().max() / b.abs().max()).item<double>() < 1e-5; }

bool correct(const Data& d) {
  Inputs x = d.x;
  const at::Tensor g = x.g.select(-1, 0).contiguous();
  x.g = g.unsqueeze(-1).expand_as(x.g).contiguous();
  const auto expected = gated_delta_rule(x.q, x.k, x.v, g, x.beta, x.state);
  for (const Outputs& out : {kimi::chunked_forward(d.p, x, false), kimi::kernel_forward(d.p, x, false)}) {
    if (!close(out.o, expected.o) || !close(out.final_state, expected.final_state)) return false;
  }
  return true;
}

template <bool kKernel>
void Forward(benchmark::State& state) {
  const at::NoGradGuard no_grad;
  const Data d = data(state);
  if (!correct(d)) return state.SkipWithError("equal channels differ from the gated delta rule");
  for (auto _ : state) benchmark::DoNotOptimize((kKernel ? kimi::kernel_forward(d.p, d.x, false) : kimi::chunked_forward(d.p, d.x, false)).o.data_ptr());
}

template <bool kKernel>
void ForwardBackward(benchmark::State& state) {
  const at::NoGradGuard no_grad;
  const Data d = data(state);
  if (!correct(d)) return state.SkipWithError("equal channels differ from the gated delta rule");
  for (auto _ : state) {
    const Outputs out = kKernel ? kimi::kernel_forward(d.p, d.x, true) : kimi::chunked_forward(d.p, d.x, true);
    const Gradients gradients =
        kKernel ? kimi::kernel_backward(d.p, d.x, out, d.up_o, d.up_state) : kimi::chunked_backward(d.p, d.x, out, d.up_o, d.up_state);
    benchmark::DoNotOptimize(gradients.q.data_ptr());
  }
}

void GatedDeltaForward(benchmark::State& state) {
  const at::NoGradGuard no_grad;
  const Data d = data(state);
  const at::Tensor g = d.x.g.select(-1, 0).contiguous();
  for (auto _ : state) benchmark::DoNotOptimize(gated_delta_rule(d.x.q, d.x.k, d.x.v, g, d.x.beta, d.x.state).o.data_ptr());
}

// B sequences, one token each; T is not used. The floor is one read and one write of the state.
template <bool kKernel>
void Step(benchmark::State& state) {
  const at::NoGradGuard no_grad;
  const Data d = data(state);
  const auto one = [](const at::Tensor& x) { return x.select(1, 0).contiguous(); };
  const Inputs x{one(d.x.q), one(d.x.k), one(d.x.v), one(d.x.g), one(d.x.beta), {}};
  at::Tensor a = d.x.state.clone(), b = a.clone();
  const Problem p = kimi::check_step(x.q, x.k, x.v, x.g, x.beta, a, {}, 1e-6);
  if (!close(kimi::kernel_step(p, x, a), kimi::plain_step(p, x, b)) || !close(a, b)) return state.SkipWithError("kernel and tensor form differ");
  for (auto _ : state) benchmark::DoNotOptimize((kKernel ? kimi::kernel_step(p, x, a) : kimi::plain_step(p, x, a)).data_ptr());
  const double bytes = 2.0 * static_cast<double>(a.nbytes());
  state.counters["MB"] = bytes / 1e6;
  state.counters["GB/s"] = benchmark::Counter(bytes / 1e9, benchmark::Counter::kIsIterationInvariantRate);
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "T", "H", "K", "V"})->Unit(benchmark::kMillisecond);
  b->Args({2, 512, 12, 64, 64})->Args({1, 4096, 16, 128, 128})->Args({16, 128, 1, 16, 64});
}

BENCHMARK(Forward<true>)->Name("Kda/Forward/kernel")->Apply(shapes);
BENCHMARK(Forward<false>)->Name("Kda/Forward/tensors")->Apply(shapes);
BENCHMARK(GatedDeltaForward)->Name("Kda/Forward/gated_delta_kernel")->Apply(shapes);
BENCHMARK(ForwardBackward<true>)->Name("Kda/ForwardBackward/kernel")->Apply(shapes);
BENCHMARK(ForwardBackward<false>)->Name("Kda/ForwardBackward/tensors")->Apply(shapes);
BENCHMARK(Step<true>)->Name("Kda/Step/kernel")->Apply(shapes);
BENCHMARK(Step<false>)->Name("Kda/Step/tensors")->Apply(shapes);

}  // namespace
}  // namespace oryx::ops::kimi
