// The persistent decoding kernel of decode_step.h.
//
// The last warp is the producer: it walks through the whole step and copies units of at most 4 KB, a row of weights or of cached keys, into a ring of slots. Twelve warps walk
// through the same units and compute. For a matrix-vector product every warp holds the vector in registers and takes whole rows; the wide product of the feed-forward's
// second half splits a row among three warps.
//
// Phases of a layer:
//   1  u = norm(x):            k, v, gate, query, beta, decay
//   2  convolutions, S, readout; in attention mode this share of the cached tokens instead of the readout, then the shares together
//   3  head norm, gate, xa = x + W_out o
//   4  h = norm(xa):           silu(W_gate h) * (W_up h)
//   5  x = xa + W_down (...)
//
// There is no barrier among multiprocessors. What goes from one to another is written as words of 8 bytes, a value and the number of the step and layer it belongs to; whoever needs it reads until the
// number is right. A word is overwritten a layer later at the earliest, which every multiprocessor reaches only with the results of phases 3 and 5 of all others, so after
// they have read it. Sums are in a fixed order: the same inputs give the same bits.
#include <cfloat>

#include "oryx/generate/cuda/decode_step_mix.cuh"
#include "oryx/generate/cuda/decode_step_ring.cuh"

namespace oryx::decode_cuda {
namespace {

template <int kD, int kF>
__device__ void produce(const OryxDecodeStep& a, Shared<kD, kF>& s) {
  constexpr int H = kD / kWidth;
  Producer out(s);
  const int position = __ldcg(a.position);
  const auto rows = [&](const void* w, Share share, int count) {
    const char* from = static_cast<const char*>(w) + static_cast<int64_t>(share.begin) * count * kD * 2;
    for (int i = 0; i < share.count() * count; ++i, from += kD * 2) out.load(from, kD * 2);
  };
  for (int l = 0; l < a.num_layers; ++l) {
    const OryxDecodeLayer& layer = a.layers[l];
    const bool attention = s.modes[l] != 0;
    const Share in(2 * kD, 0);
    for (int row = 2 * in.begin; row < 2 * in.end; ++row) {
      out.load(static_cast<const bf16*>(layer.w_in) + static_cast<int64_t>(row + (attention && row >= 3 * kD ? kD : 0)) * kD, kD * 2);
    }
    const int narrow = static_cast<int>(blockIdx.x) - (static_cast<int>(gridDim.x) - 2 * H);
    if (narrow >= 0) {
      for (int half = 0; half < 2; ++half) out.load(layer.w_beta_decay + static_cast<int64_t>(narrow) * kD + half * (kD / 2), kD * 2);
    }
    if (attention) {
      const Share share((position + kTokens - 1) / kTokens, 3);
      for (int i = share.begin; i < share.end; ++i) {
        const int tokens = min(kTokens, position - i * kTokens);
        for (int t = 0; t < 2 * tokens; ++t) {
          const void* from = t < tokens ? layer.keys : layer.values;
          out.load(static_cast<const bf16*>(from) + (static_cast<int64_t>(i) * kTokens + t % tokens) * kD, kD * 2);
        }
      }
    }
    rows(layer.w_out, Share(kD, 1), 1);
    rows(layer.w_gate_up, Share(kF / 2, 2), 4);
    const Share down(kD, 4);
    constexpr int kPart = (kF / 8 + kParts - 1) / kParts;  // vectors of eight columns
    for (int row = down.begin; row < down.end; ++row) {
      for (int part = 0; part < kParts; ++part) {
        const int vectors = min(kPart, kF / 8 - part * kPart);
        out.load(static_cast<const bf16*>(layer.w_down) + static_cast<int64_t>(row) * kF + part * kPart * 8, vectors * 16);
      }
    }
  }
  rows(a.head, Share(a.vocab_size / 4, 5), 4);
}

template <int kD, int kF>
__device__ void consume(const OryxDecodeStep& a, Shared<kD, kF>& s, const Workspace& ws) {
  constexpr int H = kD / kWidth;
  static_assert(kD * 2 <= kSlotBytes && kD % 256 == 0 && kD / 8 <= kConsumers && H % 2 == 0 && H <= 2 * kMixWarps);
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  Consumer in(s);
  const int position = __ldcg(a.position), token = __ldcg(a.token);
  const uint32_t launch = __ldcg(ws.launch);
  const bf16* embedding = static_cast<const bf16*>(a.embed) + static_cast<int64_t>(token) * kD;
  const int head = blockIdx.x / kSlices, slice = blockIdx.x % kSlices;
  if (blockIdx.x == 0 && t == 0 && a.id_rows != nullptr && position < a.capacity) a.id_rows[position] = token;
  float x[kVectors<kD> * 8];
  uint32_t before = 0;
  for (int l = 0; l < a.num_layers; ++l) {
    const OryxDecodeLayer& layer = a.layers[l];
    const bool attention = s.modes[l] != 0;
    const uint32_t flag = launch + l + 1;
    // 1
    {
      const float scale = gather_normed<kD>(s.narrow, s.sums[0], layer.norm1, a.norm_eps, [&](float(&y)[8]) {
        if (l > 0) return await<4>(ws.x + 8 * t, 2, before, y);
        const uint4 e = __ldg(reinterpret_cast<const uint4*>(embedding) + t);
        y[0] = low(e.x), y[1] = high(e.x), y[2] = low(e.y), y[3] = high(e.y), y[4] = low(e.z), y[5] = high(e.z), y[6] = low(e.w), y[7] = high(e.w);
      });
      take_vector<kD>(s.narrow, x);
      const Share share(2 * kD, 0);
      product<kD, 2>(in, share.count(), x, [&](int row, const float(&sum)[2]) {
        if (lane == 0) put2(ws.proj + 2 * share.begin + row, __float_as_uint(sum[0] * scale), __float_as_uint(sum[1] * scale), flag);
      });
      const int narrow = static_cast<int>(blockIdx.x) - (static_cast<int>(gridDim.x) - 2 * H);
      if (narrow >= 0) {
        if (warp == kWarps - 1) {
          float sum = 0.0f;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t at = in.wait(half);
#pragma unroll
            for (int v = 0; v < kVectors<kD> / 2; ++v) {
              const float4 p = lds_float4(at + (lane + 32 * v) * 32), q = lds_float4(at + (lane + 32 * v) * 32 + 16);
              const float* y = x + 8 * (v + half * (kVectors<kD> / 2));
              sum += p.x * y[0] + p.y * y[1] + p.z * y[2] + p.w * y[3] + q.x * y[4] + q.y * y[5] + q.z * y[6] + q.w * y[7];
            }
            in.release<8>(at);
          }
          sum = warp_sum(sum);
          if (lane == 0) put(ws.proj + 4 * kD + narrow, sum * scale, flag);
        }
        in.next_phase(2);
      }
    }
    // 2
    const bool mine = head < H && warp < kMixWarps;
    HeadWork work;
    if (mine) work = advance_state<kD>(layer, ws, head, slice, position, layer.keys != nullptr && position < a.capacity, !attention, flag);
    if (attention) {
      __syncwarp();
      named_barrier(1, kConsumers);  // all of phase 1's units have been read (Consumer::wait)
      if (warp < kMixWarps) attend_share<kD>(a, ws, in, position, flag);
      in.next_phase(attention_units(position));
      if (mine) join_shares<kD>(a, ws, work, head, slice, flag);
    }
    // 3
    {
      if (t < kD / 8) {
        float gate[8], o[8], sum = 0.0f;
        await<4>(ws.proj + 2 * kD + 8 * t, 2, flag, gate);
        const float4 n0 = __ldg(reinterpret_cast<const float4*>(layer.o_norm) + 2 * (t & 15)), n1 = __ldg(reinterpret_cast<const float4*>(layer.o_norm) + 2 * (t & 15) + 1);
        const float n[8] = {n0.x, n0.y, n0.z, n0.w, n1.x, n1.y, n1.z, n1.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) gate[i] = silu(gate[i]) * n[i];
        await<4>(ws.o + 8 * t, 2, flag, o);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = fmaf(o[i], o[i], sum);
#pragma unroll
        for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
        const float scale = rsqrtf(sum / kWidth + a.head_norm_eps);
#pragma unroll
        for (int i = 0; i < 8; ++i) o[i] *= scale * gate[i];
        s.other.narrow[0][t] = make_float4(o[0], o[1], o[2], o[3]);
        s.other.narrow[1][t] = make_float4(o[4], o[5], o[6], o[7]);
      }
      __syncwarp();
      named_barrier(1, kConsumers);
      // Every slice has given its part of o, so it has read the old tail.
      if (mine && slice == 0 && warp == 0) work.new_tail.store(layer.k_tail, head * kWidth + 4 * lane);
      take_vector<kD>(s.other.narrow, x);
      const Share share(kD, 1);
      product<kD, 1>(in, share.count(), x, [&](int i, const float(&sum)[1]) {
        const int row = share.begin + i;
        if (lane == 0) put(ws.xa + row, sum[0] + (l > 0 ? __uint_as_float(look(ws.x + row).x) : __bfloat162float(embedding[row])), flag);
      });
    }
    // 4
    {
      const float scale = gather_normed<kD>(s.narrow, s.sums[1], layer.norm2, a.norm_eps, [&](float(&y)[8]) { await<4>(ws.xa + 8 * t, 2, flag, y); });
      take_vector<kD>(s.narrow, x);
      const Share share(kF / 2, 2);
      product<kD, 4>(in, share.count(), x, [&](int row, const float(&sum)[4]) {
        if (lane == 0) put(ws.mid + share.begin + row / 4, pack(silu(sum[0] * scale) * sum[1] * scale, silu(sum[2] * scale) * sum[3] * scale), flag);
      });
    }
    // 5
    {
      constexpr int kPairs = kF / 4, kTurns = (kPairs + kConsumers - 1) / kConsumers;  // two words each
      uint4 v[kTurns];
      bool missing;
      do {
        missing = false;
#pragma unroll
        for (int i = 0; i < kTurns; ++i) {
          v[i] = make_uint4(0, flag, 0, flag);
          if (t + i * kConsumers < kPairs) v[i] = look2(ws.mid + 2 * (t + i * kConsumers));
        }
#pragma unroll
        for (int i = 0; i < kTurns; ++i) missing |= v[i].y != flag || v[i].w != flag;
      } while (missing);
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
        if (t + i * kConsumers < kPairs) reinterpret_cast<uint2*>(s.other.wide)[t + i * kConsumers] = make_uint2(v[i].x, v[i].z);
      }
      __syncwarp();
      named_barrier(1, kConsumers);
      constexpr int kPart = (kF / 8 + kParts - 1) / kParts, kMost = (kPart + 31) / 32;
      static_assert(kPart * 16 <= kSlotBytes && kMost == kVectors<kD>);
      const int part = warp % kParts, trio = warp / kParts, vectors = min(kPart, kF / 8 - part * kPart);
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        uint4 w = make_uint4(0, 0, 0, 0);
        if (lane + 32 * i < vectors) w = s.other.wide[part * kPart + lane + 32 * i];
        x[8 * i] = low(w.x), x[8 * i + 1] = high(w.x), x[8 * i + 2] = low(w.y), x[8 * i + 3] = high(w.y);
        x[8 * i + 4] = low(w.z), x[8 * i + 5] = high(w.z), x[8 * i + 6] = low(w.w), x[8 * i + 7] = high(w.w);
      }
      const Share share(kD, 4);
      constexpr int kTrios = kWarps / kParts;
      int turn = 0;
      for (int i = trio; i < share.count(); i += kTrios, ++turn) {
        const uint32_t at = in.wait(i * kParts + part);
        float sum = row_part<kMost>(at, vectors, x);
        in.release<8>(at);
        sum = warp_sum(sum);
        if (lane == 0) s.red[trio][turn][part] = sum;
      }
      in.next_phase(share.count() * kParts);
      named_barrier(2 + trio, kParts * 32);
      if (part == 0 && lane < turn) {
        const int row = share.begin + trio + lane * kTrios;
        put(ws.x + row, __uint_as_float(look(ws.xa + row).x) + (s.red[trio][lane][0] + s.red[trio][lane][1] + s.red[trio][lane][2]), flag);
      }
    }
    before = flag;
  }
  // The head, and the likeliest token.
  const float scale = gather_normed<kD>(s.narrow, s.sums[0], a.final_norm, a.norm_eps, [&](float(&y)[8]) { await<4>(ws.x + 8 * t, 2, before, y); });
  take_vector<kD>(s.narrow, x);
  const Share share(a.vocab_size / 4, 5);
  float best = -FLT_MAX;
  int index = 0x7fffffff;
  const auto better = [&](float y, int id) {
    if (y > best || (y == best && id < index)) best = y, index = id;
  };
  product<kD, 4>(in, share.count(), x, [&](int row, const float(&sum)[4]) {
    const int id = share.begin * 4 + row;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (id + r < a.below) better(sum[r] * scale, id + r);
    }
    if (lane == 0) *reinterpret_cast<float4*>(a.logits + id) = make_float4(sum[0] * scale, sum[1] * scale, sum[2] * scale, sum[3] * scale);
  });
  if (lane == 0) s.best_value[warp] = best, s.best_index[warp] = index;
  named_barrier(1, kConsumers);
  const uint32_t flag = launch + a.num_layers + 1;
  if (t == 0) {
    for (int w = 1; w < kWarps; ++w) better(s.best_value[w], s.best_index[w]);
    put2(ws.top + blockIdx.x, __float_as_uint(best), static_cast<uint32_t>(index), flag);
  }
  if (blockIdx.x != 0 || warp != 0) return;
  best = -FLT_MAX, index = 0x7fffffff;
  for (int c = lane; c < static_cast<int>(gridDim.x); c += 32) {
    uint4 top;
    do {
      top = look2(ws.top + c);
    } while (top.y != flag || top.w != flag);
    better(__uint_as_float(top.x), static_cast<int>(top.z));
  }
  __syncwarp();
#pragma unroll
  for (int d = 16; d > 0; d /= 2) better(__shfl_xor_sync(~0u, best, d), __shfl_xor_sync(~0u, index, d));
  if (lane == 0) {
    *a.likeliest = index;
    if (__ldcg(a.feed_back) != 0) *a.token = index;
    *a.position = position + 1;
    *ws.launch = launch + 128;
  }
}

template <int kD, int kF>
__global__ void __launch_bounds__(kThreads, 1) decode_step_kernel(const __grid_constant__ OryxDecodeStep a) {
  extern __shared__ uint8_t raw[];
  auto& s = *reinterpret_cast<Shared<kD, kF>*>((reinterpret_cast<uintptr_t>(raw) + 127) & ~static_cast<uintptr_t>(127));
  for (int l = threadIdx.x; l < a.num_layers; l += kThreads) s.modes[l] = static_cast<int8_t>(__ldcg(a.modes + l));
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) barrier_init(smem_address(s.full + i), 1), barrier_init(smem_address(s.empty + i), 8);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    if (threadIdx.x == kConsumers) produce<kD, kF>(a, s);
    return;
  }
  consume<kD, kF>(a, s, carve<kD, kF>(a.workspace));
}

template <int kD, int kF>
int launch(const OryxDecodeStep* step, cudaStream_t stream) {
  int device = 0, count = 0;
  if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
  if (const cudaError_t e = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device); e != cudaSuccess) return e;
  // 32 rows of phase 5 a multiprocessor at most.
  if (count < kD / kWidth * kSlices || count < kD / 32 || count > kMaxGrid || step->num_layers >= kMaxLayers || step->vocab_size % 4 != 0) return cudaErrorInvalidValue;
  const int bytes = static_cast<int>(sizeof(Shared<kD, kF>)) + 128;
  const auto kernel = decode_step_kernel<kD, kF>;
  if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); e != cudaSuccess) return e;
  void* arguments[] = {const_cast<OryxDecodeStep*>(step)};
  return cudaLaunchCooperativeKernel(kernel, dim3(count), dim3(kThreads), arguments, bytes, stream);
}

}  // namespace
}  // namespace oryx::decode_cuda

extern "C" int64_t oryx_decode_workspace(int32_t hidden_size, int32_t intermediate_size) {
  return oryx::decode_cuda::workspace_bytes(hidden_size, intermediate_size);
}

extern "C" int oryx_decode_supports(int32_t hidden_size, int32_t num_heads, int32_t intermediate_size) {
  return hidden_size == 2048 && num_heads == 16 && intermediate_size == 5440;
}

extern "C" int oryx_decode_step(const OryxDecodeStep* step, int32_t hidden_size, int32_t intermediate_size, void* stream) {
  if (hidden_size == 2048 && intermediate_size == 5440) return oryx::decode_cuda::launch<2048, 5440>(step, static_cast<cudaStream_t>(stream));
  return cudaErrorInvalidValue;
}
