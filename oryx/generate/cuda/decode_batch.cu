// Kernels of decode_batch.h: what stands between the matrix products of a batch of sequences.
#include <cfloat>

#include "oryx/generate/cuda/decode_batch.h"
#include "oryx/generate/cuda/decode_common.cuh"

namespace oryx::decode_cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kNarrowParts = 4;   // blocks of a row that share out its narrow products
constexpr int kMaxColumns = 8192;

__device__ __forceinline__ void unpack8(uint4 w, float (&x)[8]) {
  x[0] = low(w.x), x[1] = high(w.x), x[2] = low(w.y), x[3] = high(w.y), x[4] = low(w.z), x[5] = high(w.z), x[6] = low(w.w), x[7] = high(w.w);
}

__device__ __forceinline__ float block_sum(float x, float* shared) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += shared[w];
  return total;
}

__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ OryxBatchNorm a) {
  extern __shared__ float row[];  // [D]
  __shared__ float sums[kWarps];
  const int64_t n = blockIdx.y;
  const int D = static_cast<int>(a.D), t = threadIdx.x;
  launch_dependents();
  wait_for_previous();
  float squares = 0.0f;
  for (int c = 8 * t; c < D; c += 8 * kThreads) {
    float x[8];
    if (a.x != nullptr) {
      const float4 p = __ldcg(reinterpret_cast<const float4*>(a.x + n * D + c)), q = __ldcg(reinterpret_cast<const float4*>(a.x + n * D + c) + 1);
      x[0] = p.x, x[1] = p.y, x[2] = p.z, x[3] = p.w, x[4] = q.x, x[5] = q.y, x[6] = q.z, x[7] = q.w;
    } else {
      unpack8(__ldg(reinterpret_cast<const uint4*>(static_cast<const bf16*>(a.embed) + static_cast<int64_t>(a.tokens[n]) * D + c)), x);
    }
    if (a.delta != nullptr) {
#pragma unroll 4
      for (int part = 0; part < a.delta_parts; ++part) {
        const float4* d = reinterpret_cast<const float4*>(a.delta + (part * a.N + n) * D + c);
        const float4 p = __ldcg(d), q = __ldcg(d + 1);
        x[0] += p.x, x[1] += p.y, x[2] += p.z, x[3] += p.w, x[4] += q.x, x[5] += q.y, x[6] += q.z, x[7] += q.w;
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) squares = fmaf(x[i], x[i], squares);
    *reinterpret_cast<float4*>(row + c) = make_float4(x[0], x[1], x[2], x[3]);
    *reinterpret_cast<float4*>(row + c + 4) = make_float4(x[4], x[5], x[6], x[7]);
    if (blockIdx.x == 0) {
      *reinterpret_cast<float4*>(a.sum + n * D + c) = make_float4(x[0], x[1], x[2], x[3]);
      *reinterpret_cast<float4*>(a.sum + n * D + c + 4) = make_float4(x[4], x[5], x[6], x[7]);
    }
  }
  const float scale = rsqrtf(block_sum(squares, sums) / static_cast<float>(D) + a.eps);
  for (int c = 8 * t; c < D; c += 8 * kThreads) {
    const float4 p = __ldg(reinterpret_cast<const float4*>(a.weight + c)), q = __ldg(reinterpret_cast<const float4*>(a.weight + c) + 1);
    const float w[8] = {p.x, p.y, p.z, p.w, q.x, q.y, q.z, q.w};
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = row[c + i] * scale * w[i], row[c + i] = x[i];
    if (blockIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < 8; i += 2) *activation_pair(a.out, a.tiles, static_cast<int>(n), c + i) = pack(x[i], x[i + 1]);
    }
  }
  if (a.w_narrow == nullptr) return;
  __syncthreads();
  const int lane = t % 32;
  for (int64_t r = blockIdx.x * kWarps + t / 32; r < a.narrow; r += static_cast<int64_t>(gridDim.x) * kWarps) {
    float sum = 0.0f;
    const float4* w = reinterpret_cast<const float4*>(a.w_narrow + r * D);
#pragma unroll 8
    for (int c = lane; c < D / 4; c += 32) {
      const float4 v = __ldg(w + c), x = *reinterpret_cast<const float4*>(row + 4 * c);
      sum = fmaf(v.x, x.x, fmaf(v.y, x.y, fmaf(v.z, x.z, fmaf(v.w, x.w, sum))));
    }
    sum = warp_sum(sum);
    if (lane == 0) a.narrow_out[n * a.narrow + r] = sum;
  }
}

// A block has one head of one sequence: sixteen warps of eight value rows, four keys a lane.
constexpr int kMixWarps = 16, kRows = kWidth / kMixWarps;
static_assert(kRows == 8);

__global__ void __launch_bounds__(kMixWarps * 32, 2) mix_kernel(const __grid_constant__ OryxBatchMix a) {
  __shared__ float sums[kMixWarps];
  const int h = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = blockIdx.y, D = a.H * kWidth;
  float* S = a.S + ((n * a.H + h) * kWidth + warp * kRows) * kWidth + 4 * lane;
  // The state does not depend on what the kernel before this one does.
  float4 s[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) s[r] = __ldcs(reinterpret_cast<const float4*>(S + r * kWidth));
  launch_dependents();
  wait_for_previous();

  const bf16* projected = static_cast<const bf16*>(a.projected) + n * a.row;
  const bool linear = a.modes[n] == 0;
  const int position = a.positions[n];
  const bool keeps = a.keys != nullptr && position < a.capacity;
  // Keys and query: four channels a lane, the same in every warp.
  const int channel = h * kWidth + 4 * lane;
  const uint2 kw = __ldcg(reinterpret_cast<const uint2*>(projected + channel)), qw = __ldcg(reinterpret_cast<const uint2*>(projected + 3 * D + channel));
  const float raw[4] = {low(kw.x), high(kw.x), low(kw.y), high(kw.y)}, q[4] = {low(qw.x), high(qw.x), low(qw.y), high(qw.y)};
  Tail4 k_tail;
  k_tail.load(a.k_tail, n * D + channel);
  float k[4], kk = 0.0f, qq = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    k[i] = convolved(__ldg(reinterpret_cast<const float4*>(a.k_conv) + channel + i), k_tail.at(i, 0), k_tail.at(i, 1), k_tail.at(i, 2), raw[i]);
    kk = fmaf(k[i], k[i], kk), qq = fmaf(q[i], q[i], qq);
  }
  // Values: a row for every four lanes.
  const int own = h * kWidth + warp * kRows + lane / 4;
  bf16* tail = static_cast<bf16*>(a.v_tail) + (n * D + own) * 3;
  const float v_raw = __bfloat162float(projected[D + own]);
  const float t0 = __bfloat162float(tail[0]), t1 = __bfloat162float(tail[1]), t2 = __bfloat162float(tail[2]);
  const float v = convolved(__ldg(reinterpret_cast<const float4*>(a.v_conv) + own), t0, t1, t2, v_raw);
  const float gate = __bfloat162float(projected[2 * D + own]), weight = __ldg(a.o_norm + own % kWidth);
  const float beta = sigmoid(__ldcg(a.narrow + n * 2 * a.H + h));
  const float g = log_decay(__ldg(a.A_log + h), __ldcg(a.narrow + (n * 2 + 1) * a.H + h) + __ldg(a.dt_bias + h)), decay = __expf(g);
  kk = rsqrtf(warp_sum(kk) + 1e-6f), qq = rsqrtf(warp_sum(qq) + 1e-6f) * 0.08838834764831845f;

  float part[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) part[r] = fmaf(s[r].x, k[0], fmaf(s[r].y, k[1], fmaf(s[r].z, k[2], s[r].w * k[3])));
  const float write = beta * (v - decay * warp_sum8(part) * kk) * kk;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float w = __shfl_sync(~0u, write, 4 * r);
    s[r].x = fmaf(w, k[0], decay * s[r].x), s[r].y = fmaf(w, k[1], decay * s[r].y);
    s[r].z = fmaf(w, k[2], decay * s[r].z), s[r].w = fmaf(w, k[3], decay * s[r].w);
    __stcs(reinterpret_cast<float4*>(S + r * kWidth), s[r]);
    part[r] = fmaf(s[r].x, q[0], fmaf(s[r].y, q[1], fmaf(s[r].z, q[2], s[r].w * q[3])));
  }
  const float out = linear ? warp_sum8(part) * qq : 0.0f;
  float total = warp_sum(lane % 4 == 0 ? out * out : 0.0f);
  if (lane == 0) sums[warp] = total;
  __syncthreads();  // and every warp has read the tail of k
  total = 0.0f;
#pragma unroll
  for (int w = 0; w < kMixWarps; ++w) total += sums[w];
  if (lane % 4 == 0) {
    if (linear) {
      *activation(a.out, a.tiles, static_cast<int>(n), own) = __float2bfloat16_rn(out * rsqrtf(total / kWidth + a.head_norm_eps) * weight * silu(gate));
    }
    tail[0] = __float2bfloat16_rn(t1), tail[1] = __float2bfloat16_rn(t2), tail[2] = __float2bfloat16_rn(v_raw);
    if (keeps) static_cast<bf16*>(a.values)[n * a.value_sequence + position * D + own] = __float2bfloat16_rn(v);
  }
  if (warp != 0) return;
  k_tail.shifted(raw).store(a.k_tail, n * D + channel);
  if (!keeps) return;
  *reinterpret_cast<uint2*>(static_cast<bf16*>(a.keys) + n * a.key_sequence + position * D + channel) = make_uint2(pack(k[0], k[1]), pack(k[2], k[3]));
  if (lane != 0) return;
  a.g_rows[n * a.g_sequence + position * a.H + h] = g;
  a.beta_rows[n * a.beta_sequence + position * a.H + h] = beta;
  if (h == 0 && a.mode_rows != nullptr) a.mode_rows[n * a.mode_sequence + position] = linear ? 0 : 1;
}

constexpr int kFinishThreads = 1024;

__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const bf16* logits, int64_t vocab, int below, int32_t* likeliest, int32_t* tokens, const int32_t* feed_back,
                                                                int32_t* positions, int32_t* lengths, int32_t* id_rows, int64_t id_sequence, int64_t capacity) {
  __shared__ float values[kFinishThreads / 32];
  __shared__ int indices[kFinishThreads / 32];
  const int64_t n = blockIdx.x;
  const int t = threadIdx.x, lane = t % 32;
  wait_for_previous();
  float best = -FLT_MAX;
  int index = 0x7fffffff;
  const auto better = [&](float y, int id) {
    if (y > best || (y == best && id < index)) best = y, index = id;
  };
  const bf16* row = logits + n * vocab;
  constexpr int kTogether = 4;  // loads of eight under way
  const int eights = vocab % 8 == 0 ? below / 8 : 0;
  for (int base = t; base < eights; base += kTogether * kFinishThreads) {
    uint4 w[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (base + i * kFinishThreads < eights) w[i] = __ldcg(reinterpret_cast<const uint4*>(row) + base + i * kFinishThreads);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (base + i * kFinishThreads >= eights) break;
      float x[8];
      unpack8(w[i], x);
#pragma unroll
      for (int j = 0; j < 8; ++j) better(x[j], 8 * (base + i * kFinishThreads) + j);
    }
  }
  for (int i = 8 * eights + t; i < below; i += kFinishThreads) better(__bfloat162float(row[i]), i);
#pragma unroll
  for (int d = 16; d > 0; d /= 2) better(__shfl_xor_sync(~0u, best, d), __shfl_xor_sync(~0u, index, d));
  if (lane == 0) values[t / 32] = best, indices[t / 32] = index;
  __syncthreads();
  if (t >= 32) return;
  best = values[lane], index = indices[lane];
#pragma unroll
  for (int d = 16; d > 0; d /= 2) better(__shfl_xor_sync(~0u, best, d), __shfl_xor_sync(~0u, index, d));
  if (lane != 0) return;
  const int position = positions[n];
  if (id_rows != nullptr && position < capacity) id_rows[n * id_sequence + position] = tokens[n];
  likeliest[n] = index;
  if (feed_back[0] != 0) tokens[n] = index;
  positions[n] = position + 1;
  lengths[n] = position + 2;  // with the next token's own key
}

}  // namespace
}  // namespace oryx::decode_cuda

using namespace oryx::decode_cuda;

extern "C" int oryx_batch_norm(const OryxBatchNorm* a, void* stream) {
  if (a->D % 8 != 0 || a->D > kMaxColumns || a->N > 65535) return cudaErrorInvalidValue;
  const dim3 grid(a->w_narrow != nullptr ? kNarrowParts : 1, static_cast<unsigned>(a->N));
  return launch_after(norm_kernel, grid, kThreads, static_cast<int>(a->D * 4), static_cast<cudaStream_t>(stream), *a);
}

extern "C" int oryx_batch_mix(const OryxBatchMix* a, void* stream) {
  if (a->N > 65535) return cudaErrorInvalidValue;
  return launch_after(mix_kernel, dim3(static_cast<unsigned>(a->H), static_cast<unsigned>(a->N)), kMixWarps * 32, 0, static_cast<cudaStream_t>(stream), *a);
}

extern "C" int oryx_batch_finish(const void* logits, int64_t vocab, int64_t below, int32_t* likeliest, int32_t* tokens, const int32_t* feed_back, int32_t* positions,
                                 int32_t* lengths, int32_t* id_rows, int64_t id_sequence, int64_t capacity, int64_t N, void* stream) {
  return launch_after(finish_kernel, dim3(static_cast<unsigned>(N)), kFinishThreads, 0, static_cast<cudaStream_t>(stream), static_cast<const bf16*>(logits), vocab,
                      static_cast<int>(below), likeliest, tokens, feed_back, positions, lengths, id_rows, id_sequence, capacity);
}
