// Gated delta rule: forward, forward + backward and the one-token step, kernels beside the form from ATen's batched
// products.
//
//   build/cpu/oryx_bench --benchmark_filter=GatedDelta
//
// Each shape first passes a correctness gate (kernels against the other form). Counters: GFLOP/s of the products that
// the algorithm needs (triangles at half), as a share of what at::mm reaches on 1024^3 in the same process, and the
// bytes that inputs and outputs have at least.
#include <ATen/ATen.h>
#include <benchmark/benchmark.h>

#include "oryx/ops/gated_delta/gated_delta.h"
#include "oryx/ops/gated_delta/gated_delta_internal.h"

namespace oryx::ops::gated_delta {
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
  d.x = {at::randn({B, T, H, K}), at::randn({B, T, H, K}),        at::randn({B, T, H, V}),
         -at::rand({B, T, H}),    at::randn({B, T, H}).sigmoid(), at::randn({B, H, V, K})};
  d.p = check_arguments("bench", d.x.q, d.x.k, d.x.v, d.x.g, d.x.beta, d.x.state, {}, {}, {}, 1e-6);
  d.up_o = at::randn({B, T, H, V});
  d.up_state = at::randn({B, H, V, K});
  return d;
}

bool close(const at::Tensor& a, const at::Tensor& b) {
  return ((a - b).abs().max() / b.abs().max()).item<double>() < 1e-5;
}

bool correct(const Data& d) {
  const Outputs x = kernel_forward(d.p, d.x, true), y = chunked_forward(d.p, d.x, true);
  const Gradients a = kernel_backward(d.p, d.x, x, d.up_o, d.up_state),
                  b = chunked_backward(d.p, d.x, y, d.up_o, d.up_state);
  return close(x.o, y.o) && close(x.final_state, y.final_state) && close(a.q, b.q) && close(a.k, b.k) &&
         close(a.v, b.v) && close(a.g, b.g) && close(a.beta, b.beta) && close(a.state, b.state);
}

// What the machine's own product reaches, to read the others' GFLOP/s against.
void MatMul1024(benchmark::State& state) {
  const at::Tensor a = at::randn({1024, 1024}), b = at::randn({1024, 1024});
  for (auto _ : state) benchmark::DoNotOptimize(at::mm(a, b).data_ptr());
  state.counters["GFLOP/s"] = benchmark::Counter(2 * 1.073741824, benchmark::Counter::kIsIterationInvariantRate);
}

// Products of one chunk of C tokens and one head, in C K V multiply-adds and the like. Forward: k k^T, q k^T, P U and
// the solution are triangles; k S, q S, the new state are full. Backward: q k^T, k k^T, dU, solution, do U^T, dW U^T,
// E_q k, E_q^T q, E_k k, E_k^T k are triangles; k_end dS, do S, dW S, U dS and the two of dS0 are full.
double flops(const Problem& p, bool backward) {
  const double C = kChunk, K = p.K, V = p.V, chunks = static_cast<double>(p.chunks.size()) * p.Hs;
  const double forward = C * C * (K + V) + 2 * C * K * V * 3;
  return chunks * (forward + (backward ? C * C * (6 * K + 4 * V) + 2 * C * K * V * 6 : 0));
}

void report(benchmark::State& state, const Problem& p, bool backward) {
  const double work = flops(p, backward), io = static_cast<double>(p.B * p.T * p.Hs) * (2 * p.K + 2 * p.V + 2) * 4;
  state.counters["GFLOP/s"] = benchmark::Counter(work / 1e9, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["MFLOP"] = work / 1e6;
  state.counters["MB"] = io * (backward ? 3 : 1) / 1e6;  // backward reads the inputs and do, writes four gradients
}

template <bool kKernel>
void Forward(benchmark::State& state) {
  const at::NoGradGuard no_grad;
  const Data d = data(state);
  if (!correct(d)) return state.SkipWithError("kernels and tensor form differ");
  for (auto _ : state) {
    const Outputs out = kKernel ? kernel_forward(d.p, d.x, false) : chunked_forward(d.p, d.x, false);
    benchmark::DoNotOptimize(out.o.data_ptr());
  }
  report(state, d.p, false);
}

template <bool kKernel>
void ForwardBackward(benchmark::State& state) {
  const at::NoGradGuard no_grad;
  const Data d = data(state);
  if (!correct(d)) return state.SkipWithError("kernels and tensor form differ");
  for (auto _ : state) {
    const Outputs out = kKernel ? kernel_forward(d.p, d.x, true) : chunked_forward(d.p, d.x, true);
    const Gradients g = kKernel ? kernel_backward(d.p, d.x, out, d.up_o, d.up_state)
                                : chunked_backward(d.p, d.x, out, d.up_o, d.up_state);
    benchmark::DoNotOptimize(g.q.data_ptr());
  }
  report(state, d.p, true);
}

// B sequences, one token each; T is not used. The floor is one read and one write of the state.
template <bool kKernel>
void Step(benchmark::State& state) {
  const at::NoGradGuard no_grad;
  const Data d = data(state);
  const auto one = [](const at::Tensor& x) { return x.select(1, 0).contiguous(); };
  const Inputs x{one(d.x.q), one(d.x.k), one(d.x.v), one(d.x.g), one(d.x.beta), {}};
  at::Tensor a = d.x.state.clone(), b = a.clone();
  const Problem p = check_step("bench", x.q, x.k, x.v, x.g, x.beta, a, {}, 1e-6);
  if (!close(kernel_step(p, x, a), plain_step(p, x, b)) || !close(a, b)) {
    return state.SkipWithError("kernel and tensor form differ");
  }
  for (auto _ : state) {
    const at::Tensor o = kKernel ? kernel_step(p, x, a) : plain_step(p, x, a);
    benchmark::DoNotOptimize(o.data_ptr());
  }
  const double bytes = 2.0 * static_cast<double>(a.nbytes());
  state.counters["MB"] = bytes / 1e6;
  state.counters["GB/s"] = benchmark::Counter(bytes / 1e9, benchmark::Counter::kIsIterationInvariantRate);
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "T", "H", "K", "V"})->Unit(benchmark::kMillisecond);
  b->Args({2, 512, 12, 64, 64})->Args({1, 4096, 16, 128, 128})->Args({16, 128, 1, 16, 64});
}

BENCHMARK(MatMul1024)->Name("GatedDelta/mm1024")->Unit(benchmark::kMillisecond);
BENCHMARK(Forward<true>)->Name("GatedDelta/Forward/kernel")->Apply(shapes);
BENCHMARK(Forward<false>)->Name("GatedDelta/Forward/tensors")->Apply(shapes);
BENCHMARK(ForwardBackward<true>)->Name("GatedDelta/ForwardBackward/kernel")->Apply(shapes);
BENCHMARK(ForwardBackward<false>)->Name("GatedDelta/ForwardBackward/tensors")->Apply(shapes);
BENCHMARK(Step<true>)->Name("GatedDelta/Step/kernel")->Apply(shapes);
BENCHMARK(Step<false>)->Name("GatedDelta/Step/tensors")->Apply(shapes);

}  // namespace
}  // namespace oryx::ops::gated_delta
