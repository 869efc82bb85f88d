// The persistent decoding kernel of decode_step.h.
//
// Warp 8 is the producer: it walks through the whole step and copies 16 KB pieces into the ring. Warps 0 to 7 walk through the same pieces and compute. A matrix-vector
// product keeps the vector in registers (thread t holds columns 8 t to 8 t + 7, and every 2,048 columns on) and reads each row of weights once; a row's sum goes through
// the warp, then through shared memory. Between phases all multiprocessors meet:
//
//   1  u = norm(x):            k, v, gate, query, beta, decay
//   2  convolutions, S, readout; in attention mode this share of the cached tokens instead of the readout, and 2b: the shares together
//   3  head norm, gate, x += W_out o
//   4  h = norm(x):            silu(W_gate h) * (W_up h)
//   5  x += W_down (...)
//
// Sums are in a fixed order: the same inputs give the same bits.
#include <cfloat>

#include "oryx/generate/cuda/decode_step_mix.cuh"
#include "oryx/generate/cuda/decode_step_ring.cuh"

namespace oryx::decode_cuda {
namespace {

template <int kD, int kF, typename Out>
__device__ void produce(const OryxDecodeStep& a, Shared& s, Out out) {
  constexpr int H = kD / kWidth;
  const int position = __ldcg(a.position);
  const auto rows = [&](const void* w, Share share, int piece_rows, int columns) {
    const char* from = static_cast<const char*>(w) + static_cast<int64_t>(share.begin) * piece_rows * columns * 2;
    for (int i = share.begin; i < share.end; ++i, from += piece_rows * columns * 2) out.load(from, piece_rows * columns * 2);
  };
  for (int l = 0; l < a.num_layers; ++l) {
    const OryxDecodeLayer& layer = a.layers[l];
    const bool attention = s.modes[l] != 0;
    const Share in(4 * kD / kRows, 0);
    for (int i = in.begin; i < in.end; ++i) {
      const int row = i * kRows + (attention && i * kRows >= 3 * kD ? kD : 0);
      out.load(static_cast<const bf16*>(layer.w_in) + static_cast<int64_t>(row) * kD, kRows * kD * 2);
    }
    const int narrow = static_cast<int>(blockIdx.x) - (static_cast<int>(gridDim.x) - 2 * H);
    if (narrow >= 0) out.load(layer.w_beta_decay + static_cast<int64_t>(narrow) * kD, kD * 4);
    if (blockIdx.x < H * kSlices) out.load(layer.S + static_cast<int64_t>(blockIdx.x) * kSliceRows * kWidth, kSliceRows * kWidth * 4);
    if (attention) {
      const Share share((position + kTokens - 1) / kTokens, 3);
      for (int i = share.begin; i < share.end; ++i) {
        const int64_t at = static_cast<int64_t>(i) * kTokens * kD;
        const int bytes = min(kTokens, position - i * kTokens) * kD * 2;
        out.load(static_cast<const bf16*>(layer.keys) + at, bytes);
        out.load(static_cast<const bf16*>(layer.values) + at, bytes);
      }
    }
    rows(layer.w_out, Share(kD / kRows, 1), kRows, kD);
    rows(layer.w_gate_up, Share(2 * kF / kRows, 2), kRows, kD);
    rows(layer.w_down, Share(kD, 4), 1, kF);
  }
  rows(a.head, Share(a.vocab_size / kRows, 5), kRows, kD);
}

template <int kD, int kF>
__device__ void consume(const OryxDecodeStep& a, Shared& s, const Workspace& ws) {
  constexpr int H = kD / kWidth;
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  Consumer in(s);
  const int position = __ldcg(a.position), token = __ldcg(a.token);
  const uint32_t start = __ldcg(ws.epoch);
  Grid grid{ws.arrived, start};
  float x[8];
  for (int l = 0; l < a.num_layers; ++l) {
    const OryxDecodeLayer& layer = a.layers[l];
    const bool attention = s.modes[l] != 0;
    // 1
    if (l > 0) {
      read_columns<kD>(ws.x, x);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = 0.0f;
      if (t < kD / 8) {
        const uint4 e = __ldg(reinterpret_cast<const uint4*>(static_cast<const bf16*>(a.embed) + static_cast<int64_t>(token) * kD) + t);
        x[0] = low(e.x), x[1] = high(e.x), x[2] = low(e.y), x[3] = high(e.y), x[4] = low(e.z), x[5] = high(e.z), x[6] = low(e.w), x[7] = high(e.w);
        if (blockIdx.x == 0) {
          reinterpret_cast<float4*>(ws.x)[2 * t] = make_float4(x[0], x[1], x[2], x[3]);
          reinterpret_cast<float4*>(ws.x)[2 * t + 1] = make_float4(x[4], x[5], x[6], x[7]);
        }
      }
      if (blockIdx.x == 0 && t == 0 && a.id_rows != nullptr && position < a.capacity) a.id_rows[position] = token;
    }
    normalise<kD>(x, layer.norm1, a.norm_eps, s);
    {
      const Share share(4 * kD / kRows, 0);
      const int count = share.end - share.begin;
      product<kD, kRows>(in, count, x, s.red);
      const int narrow = static_cast<int>(blockIdx.x) - (static_cast<int>(gridDim.x) - 2 * H);
      if (narrow >= 0) {
        const uint32_t at = in.wait();
        float sum = 0.0f;
        if (t < kD / 8) {
          const float4 p = lds_float4(at + 32 * t), q = lds_float4(at + 32 * t + 16);
          sum = p.x * x[0] + p.y * x[1] + p.z * x[2] + p.w * x[3] + q.x * x[4] + q.y * x[5] + q.z * x[6] + q.w * x[7];
        }
        in.release();
        sum = warp_sum(sum);
        if (lane == 0) s.red[count * kRows * kRedStride + warp] = sum;
      }
      named_barrier(1, kConsumers);
      if (t < count * kRows) ws.proj[share.begin * kRows + t] = row_total(s.red, t);
      if (narrow >= 0 && t == kConsumers - 1) ws.proj[4 * kD + narrow] = row_total(s.red, count * kRows);
    }
    // 2
    float gate[8];
    mix<kD>(gate, a, layer, ws, in, grid, position, attention);
    // 3
    {
      read_columns<kD>(ws.o, x);
      float sum = 0.0f;
      const float4 n0 = __ldg(reinterpret_cast<const float4*>(layer.o_norm) + 2 * (t & 15)), n1 = __ldg(reinterpret_cast<const float4*>(layer.o_norm) + 2 * (t & 15) + 1);
      const float n[8] = {n0.x, n0.y, n0.z, n0.w, n1.x, n1.y, n1.z, n1.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = fmaf(x[i], x[i], sum);
#pragma unroll
      for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
      const float scale = rsqrtf(sum / kWidth + a.head_norm_eps);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] *= scale * n[i] * silu(gate[i]);
      const Share share(kD / kRows, 1);
      const int count = share.end - share.begin;
      product<kD, kRows>(in, count, x, s.red);
      named_barrier(1, kConsumers);
      if (t < count * kRows) {
        float* to = ws.x + share.begin * kRows + t;
        *to = __ldcg(to) + row_total(s.red, t);
      }
    }
    grid.meet();
    // 4
    {
      read_columns<kD>(ws.x, x);
      normalise<kD>(x, layer.norm2, a.norm_eps, s);
      const Share share(2 * kF / kRows, 2);
      const int count = share.end - share.begin;
      product<kD, kRows>(in, count, x, s.red);
      named_barrier(1, kConsumers);
      for (int r = t; r < count * kRows / 2; r += kConsumers) ws.mid[share.begin * kRows / 2 + r] = silu(row_total(s.red, 2 * r)) * row_total(s.red, 2 * r + 1);
    }
    grid.meet();
    // 5
    {
      float wide[kVectors<kF> * 8];
#pragma unroll
      for (int v = 0; v < kVectors<kF>; ++v) {
#pragma unroll
        for (int i = 0; i < 8; ++i) wide[8 * v + i] = 0.0f;
        const int vector = t + v * kConsumers;
        if (vector < kF / 8) {
          const float4 p = read4(ws.mid + 8 * vector), q = read4(ws.mid + 8 * vector + 4);
          wide[8 * v] = p.x, wide[8 * v + 1] = p.y, wide[8 * v + 2] = p.z, wide[8 * v + 3] = p.w;
          wide[8 * v + 4] = q.x, wide[8 * v + 5] = q.y, wide[8 * v + 6] = q.z, wide[8 * v + 7] = q.w;
        }
      }
      const Share share(kD, 4);
      const int count = share.end - share.begin;
      product<kF, 1>(in, count, wide, s.red);
      named_barrier(1, kConsumers);
      if (t < count) {
        float* to = ws.x + share.begin + t;
        *to = __ldcg(to) + row_total(s.red, t);
      }
    }
    grid.meet();
  }
  // The head, and the likeliest token.
  read_columns<kD>(ws.x, x);
  normalise<kD>(x, a.final_norm, a.norm_eps, s);
  const Share share(a.vocab_size / kRows, 5);
  const int count = share.end - share.begin;
  product<kD, kRows>(in, count, x, s.red);
  named_barrier(1, kConsumers);
  float best = -FLT_MAX;
  int index = 0x7fffffff;
  for (int r = t; r < count * kRows; r += kConsumers) {
    const float y = row_total(s.red, r);
    const int id = share.begin * kRows + r;
    a.logits[id] = y;
    if (id < a.below && (y > best || (y == best && id < index))) best = y, index = id;
  }
  const auto better = [&](float y, int id) {
    if (y > best || (y == best && id < index)) best = y, index = id;
  };
#pragma unroll
  for (int d = 16; d > 0; d /= 2) better(__shfl_xor_sync(~0u, best, d), __shfl_xor_sync(~0u, index, d));
  if (lane == 0) s.best_value[warp] = best, s.best_index[warp] = index;
  named_barrier(1, kConsumers);
  if (t == 0) {
    for (int w = 1; w < kWarps; ++w) better(s.best_value[w], s.best_index[w]);
    reinterpret_cast<float2*>(ws.top)[blockIdx.x] = make_float2(best, __int_as_float(index));
  }
  grid.meet();
  if (blockIdx.x != 0 || warp != 0) return;
  best = -FLT_MAX, index = 0x7fffffff;
  for (int c = lane; c < static_cast<int>(gridDim.x); c += 32) {
    const float2 top = __ldcg(reinterpret_cast<const float2*>(ws.top) + c);
    better(top.x, __float_as_int(top.y));
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) better(__shfl_xor_sync(~0u, best, d), __shfl_xor_sync(~0u, index, d));
  if (lane == 0) {
    *a.likeliest = index;
    if (__ldcg(a.feed_back) != 0) *a.token = index;
    *a.position = position + 1;
    *ws.epoch = grid.target;
  }
}

template <int kD, int kF>
__global__ void __launch_bounds__(kThreads, 1) decode_step_kernel(const __grid_constant__ OryxDecodeStep a) {
  extern __shared__ uint8_t raw[];
  Shared& s = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(raw) + 127) & ~static_cast<uintptr_t>(127));
  for (int l = threadIdx.x; l < a.num_layers; l += kThreads) s.modes[l] = static_cast<int8_t>(__ldcg(a.modes + l));
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) barrier_init(smem_address(s.full + i), 1), barrier_init(smem_address(s.empty + i), kWarps);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    if (threadIdx.x == kConsumers) produce<kD, kF>(a, s, Producer(s));
    return;
  }
  consume<kD, kF>(a, s, carve<kD, kF>(a.workspace));
}

template <int kD, int kF>
int launch(const OryxDecodeStep* step, cudaStream_t stream) {
  int device = 0, count = 0;
  if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
  if (const cudaError_t e = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device); e != cudaSuccess) return e;
  if (count < kD / kWidth * kSlices || count > kMaxGrid || step->num_layers > kMaxLayers || step->vocab_size % kRows != 0) return cudaErrorInvalidValue;
  if ((step->vocab_size / kRows + count - 1) / count * kRows > kMaxRows) return cudaErrorInvalidValue;
  const int bytes = static_cast<int>(sizeof(Shared)) + 128;
  const auto kernel = decode_step_kernel<kD, kF>;
  if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); e != cudaSuccess) return e;
  void* arguments[] = {const_cast<OryxDecodeStep*>(step)};
  return cudaLaunchCooperativeKernel(kernel, dim3(count), dim3(kThreads), arguments, bytes, stream);
}

}  // namespace
}  // namespace oryx::decode_cuda

extern "C" int64_t oryx_decode_workspace(int32_t hidden_size, int32_t intermediate_size) {
  return 4 * oryx::decode_cuda::workspace_floats(hidden_size, intermediate_size);
}

extern "C" int oryx_decode_supports(int32_t hidden_size, int32_t num_heads, int32_t intermediate_size) {
  return hidden_size == 2048 && num_heads == 16 && intermediate_size == 5440;
}

extern "C" int oryx_decode_step(const OryxDecodeStep* step, int32_t hidden_size, int32_t intermediate_size, void* stream) {
  if (hidden_size == 2048 && intermediate_size == 5440) return oryx::decode_cuda::launch<2048, 5440>(step, static_cast<cudaStream_t>(stream));
  return cudaErrorInvalidValue;
}
