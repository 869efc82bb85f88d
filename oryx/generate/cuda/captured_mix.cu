// A layer's recurrence from its projections to the output projection's input, in one kernel (captured_step.h): a block has a head of a sequence, whose state is under way while the
// kernel in front still runs. Its threads make keys, values, query, gate and scalars, a pair of channels each; its warps then hold eight or sixteen rows of the state, as in
// oryx/ops/cuda/state_step.cuh.
#include "oryx/generate/cuda/captured_common.cuh"
#include "oryx/ops/cuda/state_step.cuh"

namespace oryx::decode_cuda {
namespace {

template <int kK>
constexpr int kMixThreads = kK * kK / 32;  // eight values of the state by four columns a lane

template <int kK, bool kDelta>
__global__ void __launch_bounds__(kMixThreads<kK>) captured_mix_kernel(const __grid_constant__ OryxCapturedMix a) {
  constexpr int kLanesARow = kK / 4, kSide = 32 / kLanesARow, kWarpRows = kStepRows * kSide, kWarps = kK / kWarpRows, kOwners = kLanesARow / 8;
  static_assert(32 * kWarps == kMixThreads<kK> && kMixThreads<kK> >= 2 * kK);
  __shared__ __align__(16) float keys[kK], queries[kK];
  __shared__ float values[kK], gates[kK], scalars[2], squares[kWarps];
  const int t = threadIdx.x, lane = t % 32, warp = t / 32, l = lane % kLanesARow, side = lane / kLanesARow, h = blockIdx.x;
  const int64_t n = blockIdx.y;
  launch_dependents();
  if (n >= active_of(a.prepare.places, a.prepare.N)) return wait_for_previous();
  // Row r of this group of lanes belongs to its lanes l with l / kOwners == r.
  const auto row_of = [&](int r) { return warp * kWarpRows + r * kSide + side; };
  float4* const state = reinterpret_cast<float4*>(a.S + (place_of(a.prepare.places, static_cast<int>(n)) * a.H + h) * kK * kK) + l;
  float4 s[kStepRows];
#pragma unroll
  for (int r = 0; r < kStepRows; ++r) s[r] = __ldcs(state + row_of(r) * kLanesARow);
  const int own_row = row_of(l / kOwners);
  const float norm = a.readout.norm != nullptr ? __ldg(a.readout.norm + own_row) : 1.0f;
  wait_for_previous();
  const int position = a.prepare.positions[n];
  const bool reads = a.readout.modes[n] == a.place;
  const int what = t / (kK / 2), pair = 2 * (t % (kK / 2));
  if (what < 3) {
    const uint32_t x = channel_pair(a.prepare, a.prepare.channels[what], n, h * kK + pair, position);
    float* to = (what == 0 ? keys : what == 1 ? values : queries) + pair;
    to[0] = low(x), to[1] = high(x);
  } else if (what == 3) {
    const Two g = gate_at(a.readout, n, h * kK + pair);
    gates[pair] = g.x, gates[pair + 1] = g.y;
  }
  if (t < a.prepare.num_scalars) scalars[t] = scalar(a.prepare, a.prepare.scalars[t], n, h, position);
  if (t == 32 && h == 0) keep_mode(a.prepare, n, position);
  __syncthreads();
  const float4 k = reinterpret_cast<const float4*>(keys)[l], q = reinterpret_cast<const float4*>(queries)[l];
  const auto parts = [&](const float4& x, float(&p)[kStepRows]) {
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) p[r] = fmaf(s[r].x, x.x, fmaf(s[r].y, x.y, fmaf(s[r].z, x.z, s[r].w * x.w)));
  };
  const auto square = [&](const float4& x) { return row_sum<kLanesARow>(fmaf(x.x, x.x, fmaf(x.y, x.y, fmaf(x.z, x.z, x.w * x.w)))); };
  const float value = values[own_row];
  float p[kStepRows], decay, own, query_scale = 1.0f, skip = 0.0f;
  if constexpr (kDelta) {
    const float key_scale = rsqrtf(square(k) + a.l2_eps);
    query_scale = a.scale * rsqrtf(square(q) + a.l2_eps);
    decay = expf(scalars[1]);
    parts(k, p);
    own = scalars[0] * key_scale * (value - decay * key_scale * row_sum8<kLanesARow>(p, l));
  } else {
    const float step = softplus(scalars[0] + __ldg(a.dt_bias + h));
    decay = expf(-step * expf(__ldg(a.A_log + h))), skip = __ldg(a.D + h);
    own = step * value;
  }
#pragma unroll
  for (int r = 0; r < kStepRows; ++r) {
    const float write = __shfl_sync(~0u, own, (lane & ~(kLanesARow - 1)) + r * kOwners);
    s[r].x = fmaf(write, k.x, decay * s[r].x), s[r].y = fmaf(write, k.y, decay * s[r].y);
    s[r].z = fmaf(write, k.z, decay * s[r].z), s[r].w = fmaf(write, k.w, decay * s[r].w);
    __stcs(state + row_of(r) * kLanesARow, s[r]);
  }
  if (!reads) return;  // the whole block's
  parts(q, p);
  float out = fmaf(row_sum8<kLanesARow>(p, l), query_scale, skip * value);
  const float gate = gates[own_row];
  if (a.readout.gate_first) out *= gate;
  const bool owner = l % kOwners == 0;
  if (a.readout.norm != nullptr) {
    float sum = warp_sum(owner ? out * out : 0.0f);
    if (lane == 0) squares[warp] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += squares[w];
    out *= rsqrtf(sum / kK + a.readout.eps) * norm;
  }
  if (!a.readout.gate_first) out *= gate;
  if (owner) *activation(a.readout.out, a.readout.tiles, static_cast<int>(n), h * kK + own_row) = __float2bfloat16_rn(out);
}

}  // namespace
}  // namespace oryx::decode_cuda

using namespace oryx::decode_cuda;

extern "C" int oryx_captured_mix_supports(const OryxCapturedMix* a) {
  const OryxCapturedPrepare& p = a->prepare;
  const auto whole = [&](int i) { return p.channels[i].channels == a->H * a->K; };
  return (a->K == 64 || a->K == 128) && p.num_channels == 3 && whole(0) && whole(1) && whole(2) && p.num_scalars == (a->delta ? 2 : 1) && p.scalars[0].heads == a->H && !a->readout.mean &&
         a->readout.width == a->H * a->K && a->readout.slice == a->K && (a->readout.norm == nullptr || a->readout.norm_length == a->K) && aligned16(a->S);
}

extern "C" int oryx_captured_mix(const OryxCapturedMix* a, void* stream) {
  if (oryx_captured_mix_supports(a) == 0 || a->prepare.N < 1 || a->prepare.N > 65535) return cudaErrorInvalidValue;
  const auto run = [&](auto kernel, int threads) {
    return launch_after(kernel, dim3(static_cast<unsigned>(a->H), static_cast<unsigned>(a->prepare.N)), threads, 0, static_cast<cudaStream_t>(stream), *a);
  };
  if (a->K == 64) return a->delta ? run(captured_mix_kernel<64, true>, kMixThreads<64>) : run(captured_mix_kernel<64, false>, kMixThreads<64>);
  return a->delta ? run(captured_mix_kernel<128, true>, kMixThreads<128>) : run(captured_mix_kernel<128, false>, kMixThreads<128>);
}
