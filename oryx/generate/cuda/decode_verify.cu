// Kernels of decode_verify.h. A block has a head: sixteen warps hold its state in registers, eight value rows each, and go over the tokens in order. The arithmetic of a token is that of
// decode_mix.cu, so that a state that is kept has the bits that the batch's step gives it.
#include "oryx/generate/cuda/decode_common.cuh"
#include "oryx/generate/cuda/decode_verify.h"

namespace oryx::decode_cuda {
namespace {

constexpr int kVerifyWarps = 16, kVerifyRows = kWidth / kVerifyWarps, kVerifyThreads = 32 * kVerifyWarps;
static_assert(kVerifyRows == 8 && kOryxVerifyMost <= kVerifyWarps);

// What a head needs of one token.
struct VerifyToken {
  float k[kWidth], q[kWidth], v[kWidth], factor[kWidth];  // factor: head norm's weight times the gate
  float beta, decay, k_scale, q_scale;
  int linear, unused[3];
};

__device__ __forceinline__ void unpack4(const void* p, int64_t at, float (&x)[4]) {
  const uint2 w = __ldcg(reinterpret_cast<const uint2*>(static_cast<const bf16*>(p) + at));
  x[0] = low(w.x), x[1] = high(w.x), x[2] = low(w.y), x[3] = high(w.y);
}
__device__ __forceinline__ void pack4(void* p, int64_t at, const float (&x)[4]) {
  *reinterpret_cast<uint2*>(static_cast<bf16*>(p) + at) = make_uint2(pack(x[0], x[1]), pack(x[2], x[3]));
}

// The inputs of token t's convolutions, oldest first, from this pass's tokens and the tails; four channels a lane.
__device__ __forceinline__ void inputs_of(const OryxVerifyMix& a, const Tail4& tail, int t, int64_t column, float (&x)[4][4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int at = t - 3 + j;
    if (at >= 0) {
      unpack4(a.projected, at * a.row + column, x[j]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[j][i] = at == -3 ? tail.at(i, 0) : at == -2 ? tail.at(i, 1) : tail.at(i, 2);
    }
  }
}

// What a head needs that the kernel before this one does not make. A warp, four channels a lane.
struct VerifyFixed {
  Tail4 k_tail, v_tail;
  float4 k_filters[4], v_filters[4], weight;
  float A_log, bias;
  __device__ __forceinline__ void load(const OryxVerifyMix& a, int h, int lane) {
    const int64_t channel = h * kWidth + 4 * lane;
    k_tail.load(a.layer.k_tail, channel), v_tail.load(a.layer.v_tail, channel);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      k_filters[i] = __ldg(reinterpret_cast<const float4*>(a.k_conv) + channel + i), v_filters[i] = __ldg(reinterpret_cast<const float4*>(a.v_conv) + channel + i);
    }
    weight = __ldg(reinterpret_cast<const float4*>(a.o_norm) + lane);
    A_log = __ldg(a.A_log + h), bias = __ldg(a.dt_bias + h);
  }
};

// A warp, for token t of head h.
__device__ __forceinline__ void prepare_token(const OryxVerifyMix& a, const VerifyFixed& in, int t, int h, VerifyToken& to, int lane) {
  const int64_t D = a.H * kWidth, channel = h * kWidth + 4 * lane;
  float kx[4][4], vx[4][4], gate[4], q[4], k[4], v[4], kk = 0.0f, qq = 0.0f;
  const float write = __ldcg(a.narrow + t * 2 * a.H + h), step = __ldcg(a.narrow + (t * 2 + 1) * a.H + h);
  inputs_of(a, in.k_tail, t, channel, kx), inputs_of(a, in.v_tail, t, D + channel, vx);
  unpack4(a.projected, t * a.row + 2 * D + channel, gate), unpack4(a.projected, t * a.row + 3 * D + channel, q);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 kf = in.k_filters[i], vf = in.v_filters[i];
    k[i] = convolved(kf, kx[0][i], kx[1][i], kx[2][i], kx[3][i]), v[i] = convolved(vf, vx[0][i], vx[1][i], vx[2][i], vx[3][i]);
    kk = fmaf(k[i], k[i], kk), qq = fmaf(q[i], q[i], qq);
  }
  const float beta = sigmoid(write), g = log_decay(in.A_log, step + in.bias);
  kk = rsqrtf(warp_sum(kk) + 1e-6f), qq = rsqrtf(warp_sum(qq) + 1e-6f) * 0.08838834764831845f;
  const bool linear = a.modes[t] == 0;
  *reinterpret_cast<float4*>(to.k + 4 * lane) = make_float4(k[0], k[1], k[2], k[3]);
  *reinterpret_cast<float4*>(to.q + 4 * lane) = make_float4(q[0], q[1], q[2], q[3]);
  *reinterpret_cast<float4*>(to.v + 4 * lane) = make_float4(v[0], v[1], v[2], v[3]);
  *reinterpret_cast<float4*>(to.factor + 4 * lane) = make_float4(in.weight.x * silu(gate[0]), in.weight.y * silu(gate[1]), in.weight.z * silu(gate[2]), in.weight.w * silu(gate[3]));
  if (lane == 0) to.beta = beta, to.decay = __expf(g), to.k_scale = kk, to.q_scale = qq, to.linear = linear;
  const OryxVerifyLayer& l = a.layer;
  pack4(l.inputs, 2 * t * D + channel, kx[3]), pack4(l.inputs, (2 * t + 1) * D + channel, vx[3]);
  pack4(l.k, t * D + channel, k), pack4(l.v, t * D + channel, v);
  if (lane == 0) l.g[t * a.H + h] = g, l.beta[t * a.H + h] = beta;
  const int64_t row = a.positions[t];
  if (a.keys == nullptr || row >= a.capacity) return;
  pack4(a.keys, row * D + channel, k), pack4(a.values, row * D + channel, v);
  if (lane != 0) return;
  a.g_rows[row * a.H + h] = g, a.beta_rows[row * a.H + h] = beta;
  if (h == 0 && a.mode_rows != nullptr) a.mode_rows[row] = linear ? 0 : 1;
}

// Eight rows of a state over one token: k [128] by lanes, v of the row that the lane's four stand for.
__device__ __forceinline__ void go_over(float4 (&s)[kVerifyRows], float4 k, float v, float beta, float decay, float kk) {
  float part[kVerifyRows];
#pragma unroll
  for (int r = 0; r < kVerifyRows; ++r) part[r] = fmaf(s[r].x, k.x, fmaf(s[r].y, k.y, fmaf(s[r].z, k.z, s[r].w * k.w)));
  const float write = beta * (v - decay * warp_sum8(part) * kk) * kk;
#pragma unroll
  for (int r = 0; r < kVerifyRows; ++r) {
    const float w = __shfl_sync(~0u, write, 4 * r);
    s[r].x = fmaf(w, k.x, decay * s[r].x), s[r].y = fmaf(w, k.y, decay * s[r].y);
    s[r].z = fmaf(w, k.z, decay * s[r].z), s[r].w = fmaf(w, k.w, decay * s[r].w);
  }
}

__device__ __forceinline__ void load_state(const float* S, int h, int warp, int lane, float4 (&s)[kVerifyRows]) {
  const float4* from = reinterpret_cast<const float4*>(S + (static_cast<int64_t>(h) * kWidth + warp * kVerifyRows) * kWidth) + lane;
#pragma unroll
  for (int r = 0; r < kVerifyRows; ++r) s[r] = __ldcg(from + r * (kWidth / 4));
}

__global__ void __launch_bounds__(kVerifyThreads, 1) verify_mix_kernel(const __grid_constant__ OryxVerifyMix a) {
  __shared__ VerifyToken tokens[kOryxVerifyMost];
  __shared__ float sums[2][kVerifyWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, h = static_cast<int>(blockIdx.x), T = static_cast<int>(a.T), own = warp * kVerifyRows + lane / 4;
  launch_dependents();
  // Modes, state and tails do not depend on what the kernels of this pass do. Where no token reads the state out, nobody needs it here: what is kept of the tokens suffices for the end.
  bool reads = false;
  for (int t = 0; t < T; ++t) reads |= __ldg(a.modes + t) == 0;
  float4 s[kVerifyRows];
  if (reads) load_state(a.layer.S, h, warp, lane, s);
  VerifyFixed fixed;
  if (warp < T) fixed.load(a, h, lane);
  wait_for_previous();
  if (warp < T) prepare_token(a, fixed, warp, h, tokens[warp], lane);
  if (!reads) return;
  __syncthreads();
  int odd = 0;  // readouts take turns at `sums`: between two of them there may be tokens in attention, without a meeting
  for (int t = 0; t < T; ++t) {
    const VerifyToken& p = tokens[t];
    const float4 k = *reinterpret_cast<const float4*>(p.k + 4 * lane);
    go_over(s, k, p.v[own], p.beta, p.decay, p.k_scale);
    if (p.linear == 0) continue;  // the whole block's
    const float4 q = *reinterpret_cast<const float4*>(p.q + 4 * lane);
    float part[kVerifyRows];
#pragma unroll
    for (int r = 0; r < kVerifyRows; ++r) part[r] = fmaf(s[r].x, q.x, fmaf(s[r].y, q.y, fmaf(s[r].z, q.z, s[r].w * q.w)));
    const float out = warp_sum8(part) * p.q_scale;
    float squares = warp_sum(lane % 4 == 0 ? out * out : 0.0f);
    if (lane == 0) sums[odd][warp] = squares;
    __syncthreads();
    squares = 0.0f;
#pragma unroll
    for (int w = 0; w < kVerifyWarps; ++w) squares += sums[odd][w];
    odd ^= 1;
    if (lane % 4 == 0) *activation(a.out, a.tiles, t, h * kWidth + own) = __float2bfloat16_rn(out * rsqrtf(squares / kWidth + a.head_norm_eps) * p.factor[own]);
  }
}

__global__ void __launch_bounds__(kVerifyThreads) verify_keep_kernel(const OryxVerifyLayer* layers, int H, int count) {
  const OryxVerifyLayer l = layers[blockIdx.y];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, h = static_cast<int>(blockIdx.x), own = warp * kVerifyRows + lane / 4;
  const int64_t D = static_cast<int64_t>(H) * kWidth;
  float4 s[kVerifyRows];
  load_state(l.S, h, warp, lane, s);
  for (int t = 0; t < count; ++t) {
    float k[4], kk = 0.0f;
    unpack4(l.k, t * D + h * kWidth + 4 * lane, k);
#pragma unroll
    for (int i = 0; i < 4; ++i) kk = fmaf(k[i], k[i], kk);
    kk = rsqrtf(warp_sum(kk) + 1e-6f);
    const float v = __bfloat162float(static_cast<const bf16*>(l.v)[t * D + h * kWidth + own]);
    go_over(s, make_float4(k[0], k[1], k[2], k[3]), v, __ldcg(l.beta + t * H + h), __expf(__ldcg(l.g + t * H + h)), kk);
  }
  float4* to = reinterpret_cast<float4*>(l.S + (static_cast<int64_t>(h) * kWidth + warp * kVerifyRows) * kWidth) + lane;
#pragma unroll
  for (int r = 0; r < kVerifyRows; ++r) to[r * (kWidth / 4)] = s[r];
  // Tails: a thread has a channel of keys or of values.
  const int channel = static_cast<int>(threadIdx.x) % kWidth, which = static_cast<int>(threadIdx.x) / kWidth;
  if (which > 1) return;
  bf16* tail = static_cast<bf16*>(which == 0 ? l.k_tail : l.v_tail) + 3 * (h * kWidth + channel);
  bf16 last[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const int at = count - 3 + i;
    last[i] = at >= 0 ? static_cast<const bf16*>(l.inputs)[(2 * at + which) * D + h * kWidth + channel] : tail[at + 3];
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) tail[i] = last[i];
}

}  // namespace
}  // namespace oryx::decode_cuda

using namespace oryx::decode_cuda;

extern "C" int oryx_verify_mix(const OryxVerifyMix* a, void* stream) {
  if (a->T < 1 || a->T > kOryxVerifyMost) return cudaErrorInvalidValue;
  return launch_after(verify_mix_kernel, dim3(static_cast<unsigned>(a->H)), kVerifyThreads, 0, static_cast<cudaStream_t>(stream), *a);
}

extern "C" int oryx_verify_keep(const OryxVerifyLayer* layers, int64_t num_layers, int64_t H, int64_t count, void* stream) {
  if (count < 1 || count > kOryxVerifyMost) return cudaErrorInvalidValue;
  verify_keep_kernel<<<dim3(static_cast<unsigned>(H), static_cast<unsigned>(num_layers)), kVerifyThreads, 0, static_cast<cudaStream_t>(stream)>>>(layers, static_cast<int>(H),
                                                                                                                                               static_cast<int>(count));
  return cudaGetLastError();
}
