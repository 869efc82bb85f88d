// What the phases of the persistent decoding kernel (decode_step.cu) stand on: shared memory and workspace, the ring, exchanges within a group, the residual stream that all
// multiprocessors add to, matrix-vector products on the tensor cores.
#pragma once

#include "oryx/generate/cuda/decode_common.cuh"
#include "oryx/generate/cuda/decode_step.h"

namespace oryx::decode_cuda {
namespace {

constexpr int kWarps = 8, kConsumers = kWarps * 32, kThreads = kConsumers + 32;
constexpr int kStageBytes = 16384, kStages = 13;
constexpr int kGroup = 8, kSliceRows = kWidth / kGroup;  // a head's rows are shared out to the multiprocessors of its group
constexpr int kRows = 4;                  // weight rows of a row piece
constexpr int kTokens = 64;               // cached tokens of a piece, of one head
constexpr int kMaxPieces = 22;            // row pieces between two reductions
constexpr int kRedStride = 36;            // sums of a row: eight warps with four parts of the columns each, and a shift of the banks
constexpr int kMaxMids = 384;             // columns of one group in the down projection
constexpr int kMaxLayers = 128, kLayersAhead = 4;

// ---- the residual stream
// A group's products with W_out and W_down are parts of all D sums. They are added up in memory as integers, so that the order does not matter, in units of 2^-30 above ten bits
// that count: five the parts that have arrived, five those of them that were no numbers or beyond 2^19. Whoever reads a sum sees whether it is complete.
using Sum = unsigned long long;
constexpr int kCountBits = 5, kTagBits = 2 * kCountBits;
constexpr float kSumUnit = 1073741824.0f, kSumLimit = 524288.0f;

__device__ __forceinline__ void add_part(Sum* to, float x) {
  const bool good = fabsf(x) < kSumLimit;
  const Sum value = good ? (static_cast<Sum>(__float2ll_rn(x * kSumUnit)) << kTagBits) + 1 : (Sum{1} << kCountBits) + 1;
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}
__device__ __forceinline__ bool complete(Sum x, int parts) { return static_cast<int>(x & ((1u << kCountBits) - 1)) == parts; }
__device__ __forceinline__ float sum_value(Sum x) {
  const float y = static_cast<float>(static_cast<long long>(x) >> kTagBits) * (1.0f / kSumUnit);
  return (x >> kCountBits) & ((1u << kCountBits) - 1) ? __int_as_float(0x7fc00000) : y;
}

// ---- exchanges within a group
// Every value travels with the number of its layer since the beginning, in one word: who reads it sees whether it is there, and no fence is needed. Between two uses of a word
// all multiprocessors have met.
using Word = unsigned long long;
constexpr int kProjectedWords = 2 * kWidth + 2 * kGroup;   // keys, query; parts of write strength and decay
constexpr int kMixedWords = kWidth + kGroup * kWarps;      // o * weight * gate as two bfloat16; squares of o
constexpr int kPartsWords = kGroup * (kSliceRows + 2);     // for one multiprocessor: its values of each one's share of the cached tokens, their maxima and sums
struct Words {
  Word projected[kProjectedWords], mixed[kMixedWords], mids[kMaxMids], parts[kGroup][kPartsWords];
};

__device__ __forceinline__ void publish(Word* to, uint32_t value, uint32_t number) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(static_cast<Word>(number) << 32 | value) : "memory");
}
__device__ __forceinline__ void publish(Word* to, float value, uint32_t number) { publish(to, __float_as_uint(value), number); }
__device__ __forceinline__ Word look(const Word* from) {
  Word w;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(w) : "l"(from) : "memory");
  return w;
}
// All consumers: words [0, count) to shared memory, as soon as they are there.
template <int kMost>
__device__ __forceinline__ void collect(const Word* from, int count, uint32_t number, uint32_t* to) {
  constexpr int kEach = (kMost + kConsumers - 1) / kConsumers;
  Word w[kEach];
  bool all;
  do {
    all = true;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = threadIdx.x + i * kConsumers;
      w[i] = at < count ? look(from + at) : static_cast<Word>(number) << 32;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) all &= static_cast<uint32_t>(w[i] >> 32) == number;
  } while (!all);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = threadIdx.x + i * kConsumers;
    if (at < count) to[at] = static_cast<uint32_t>(w[i]);
  }
  named_barrier(1, kConsumers);
}

struct Workspace {
  uint32_t *arrived, *epoch, *steps;
  float2* top;   // [multiprocessors]
  Words* words;  // of this multiprocessor's group
  Sum* sums[2];  // [meetings, D]: of this step, and of the one before, which is cleared
};

__host__ __device__ inline int64_t workspace_bytes(int64_t D, int64_t layers) {
  return 4096 + D / kWidth * static_cast<int64_t>(sizeof(Words)) + 2 * (2 * layers * D) * static_cast<int64_t>(sizeof(Sum));
}

template <int kD>
__device__ Workspace carve(void* memory, int layers) {
  char* p = static_cast<char*>(memory);
  Workspace w;
  w.words = reinterpret_cast<Words*>(p + 4096) + blockIdx.x / kGroup;
  w.arrived = reinterpret_cast<uint32_t*>(p), w.epoch = reinterpret_cast<uint32_t*>(p + 128), w.steps = reinterpret_cast<uint32_t*>(p + 132);
  w.top = reinterpret_cast<float2*>(p + 256);
  Sum* sums = reinterpret_cast<Sum*>(p + 4096 + kD / kWidth * sizeof(Words));
  const int set = static_cast<int>(__ldcg(w.steps) & 1);
  w.sums[0] = sums + static_cast<int64_t>(set) * 2 * layers * kD;
  w.sums[1] = sums + static_cast<int64_t>(1 - set) * 2 * layers * kD;
  return w;
}

struct __align__(128) Shared {
  uint8_t ring[kStages][kStageBytes];
  float red[kMaxPieces * kRows * kRedStride];
  uint32_t projected[kProjectedWords], mixed[kMixedWords], mids[kMaxMids], parts[kPartsWords];
  float value[kSliceRows], gate[kSliceRows];
  float sums[kWarps];
  float half_ml[2][2 * kWarps];
  float best_value[kWarps];
  int best_index[kWarps];
  int8_t modes[kMaxLayers];
  OryxDecodeLayer layers[kLayersAhead];  // layer l at l % kLayersAhead, written by the producer two layers before its pieces
  uint64_t full[kStages], empty[kStages];
};
static_assert(sizeof(float) * kMaxPieces * kRows * kRedStride >= sizeof(float) * 2 * kWarps * kWidth, "what half-warps of attention found is put together there");
static_assert(sizeof(Shared) + 128 <= 227 * 1024);

// ---- the ring
struct Ring {
  uint32_t base, full, empty;
  int stage = 0;
  uint32_t phase = 0;
  __device__ explicit Ring(Shared& s) : base(smem_address(s.ring)), full(smem_address(s.full)), empty(smem_address(s.empty)) {}
  __device__ __forceinline__ uint32_t slot() const { return base + stage * kStageBytes; }
  __device__ __forceinline__ void step() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

__device__ __forceinline__ void wait_parity(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nL_WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra L_DONE;\nbra L_WAIT;\nL_DONE:\n}\n" ::"r"(bar), "r"(parity)
      : "memory");
}
__device__ __forceinline__ void stream_load(uint32_t dst, const void* src, int bytes, uint32_t bar, uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(dst), "l"(src), "r"(bytes), "r"(bar),
               "l"(policy)
               : "memory");
}

// The producer's warp.
struct Producer {
  Ring ring;
  uint64_t policy;
  int lane;
  __device__ explicit Producer(Shared& s) : ring(s), lane(threadIdx.x & 31) { asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy)); }
  __device__ __forceinline__ void load(const void* src, int bytes) {
    if (lane == 0) {
      wait_parity(ring.empty + 8 * ring.stage, ring.phase ^ 1);
      barrier_expect(ring.full + 8 * ring.stage, bytes);
      stream_load(ring.slot(), src, bytes, ring.full + 8 * ring.stage, policy);
    }
    ring.step();
  }
  __device__ __forceinline__ void load_all(const void* src, int64_t bytes) {
    const char* from = static_cast<const char*>(src);
    for (; bytes > 0; bytes -= kStageBytes, from += kStageBytes) load(from, static_cast<int>(min(bytes, static_cast<int64_t>(kStageBytes))));
  }
  // kTokens rows of kWidth values from row `row`, column `column` on.
  __device__ __forceinline__ void box(const void* map, int column, int row) {
    if (lane == 0) {
      wait_parity(ring.empty + 8 * ring.stage, ring.phase ^ 1);
      barrier_expect(ring.full + 8 * ring.stage, kTokens * kWidth * 2);
      asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(ring.slot()), "l"(map),
                   "r"(column), "r"(row), "r"(ring.full + 8 * ring.stage), "l"(policy)
                   : "memory");
    }
    ring.step();
  }
};

struct Consumer {
  Ring ring;
  __device__ explicit Consumer(Shared& s) : ring(s) {}
  __device__ __forceinline__ uint32_t wait() const {
    wait_parity(ring.full + 8 * ring.stage, ring.phase);
    return ring.slot();
  }
  __device__ __forceinline__ void release() {
    __syncwarp();
    barrier_arrive_warp(ring.empty + 8 * ring.stage, threadIdx.x & 31);
    ring.step();
  }
};

__device__ __forceinline__ float4 lds_float4(uint32_t a) {
  const uint4 v = lds128(a);
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

// A number as the sum of two bfloat16, the larger one low.
__device__ __forceinline__ uint32_t split(float x) { return pack(x, x - round_bf16(x)); }

// ---- products with the tensor cores: a vector's two parts are two columns of the 16 x 8 operand
// The thread's columns of the residual stream and of what is made of it, kept by two neighbours each: 256 warp + 64 i + 16 (g / 2) + 2 t + {0, 1, 8, 9}, i = 0..3, lane 4 g + t.
__device__ __forceinline__ int first_column() {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  return 256 * warp + 16 * (lane >> 3) + 2 * (lane & 3);
}

// Operand of 4 x 64 blocks of weights: column n has part n % 2 of the 16 columns n / 2.
__device__ __forceinline__ void fragments_of(const float (&x)[16], uint32_t (&b)[8]) {
  const bool rest = threadIdx.x & 4;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float p = x[2 * i], q = x[2 * i + 1];
    b[i] = rest ? pack(p - round_bf16(p), q - round_bf16(q)) : pack(p, q);
  }
}

// Row pieces: parts of the sums of row 4 piece + r to red[(4 piece + r) * kRedStride + 4 warp + 0..3].
__device__ __forceinline__ void row_product(Consumer& in, int pieces, const uint32_t (&b)[8], float* red) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const bool mine = (g >> 2) == (t & 1);
  float* to = red + (g & 3) * kRedStride + 4 * warp + t;
  const uint32_t offset = warp * 2048 + lane * 16;
  const auto fetch = [&](uint4(&w)[4]) {
    const uint32_t at = in.wait() + offset;
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = lds128(at + 512 * i);
    in.release();
  };
  const auto multiply = [&](const uint4(&w)[4], int piece) {
    float c[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t a[4] = {w[i].x, w[i].y, w[i].z, w[i].w};
      mma_bf16(c[i & 1], a, b[2 * i], b[2 * i + 1]);
    }
    const float sum = t < 2 ? (c[0][0] + c[1][0]) + (c[0][1] + c[1][1]) : (c[0][2] + c[1][2]) + (c[0][3] + c[1][3]);
    if (mine) to[piece * kRows * kRedStride] = sum;
  };
  int piece = 0;
  for (; piece + 1 < pieces; piece += 2) {
    uint4 w[2][4];
    fetch(w[0]);
    fetch(w[1]);
    multiply(w[0], piece);
    multiply(w[1], piece + 1);
  }
  if (piece < pieces) {
    uint4 w[4];
    fetch(w);
    multiply(w, piece);
  }
}
// The sum of a row, to four neighbouring threads, which ask for it together.
__device__ __forceinline__ float row_total(const float* red, int row) {
  const uint32_t at = smem_address(red + row * kRedStride) + (threadIdx.x & 3) * 32;
  const float4 p = lds_float4(at), q = lds_float4(at + 16);
  float x = ((p.x + p.y) + (p.z + p.w)) + ((q.x + q.y) + (q.z + q.w));
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Column pieces: the warp's 32 rows over `tiles` tiles of a vector in parts; the thread has the sum of row column_row().
__device__ __forceinline__ int column_row() {
  const int lane = threadIdx.x & 31;
  return 32 * (threadIdx.x >> 5) + 8 * (lane & 3) + (lane >> 2);
}
__device__ __forceinline__ float column_product(Consumer& in, int tiles, const uint32_t* parts) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, t = lane & 3;
  const uint32_t select = lane & 4 ? 0x7632 : 0x5410;  // columns 2, 4, 6 are as column 0, the rest as 1
  uint32_t from = smem_address(parts) + 8 * t;
  float c[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
  const auto tile = [&](const uint4(&w)[2]) {
    const uint2 lo = lds64(from), hi = lds64(from + 32);
    const uint32_t b0 = __byte_perm(lo.x, lo.y, select), b1 = __byte_perm(hi.x, hi.y, select);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t a[4] = {w[r].x, w[r].y, w[r].z, w[r].w};
      mma_bf16(c[r], a, b0, b1);
    }
    from += 64;
  };
  int k = 0;
  for (; k + 1 < tiles; k += 2) {
    const uint32_t at = in.wait() + warp * 2048 + lane * 16;
    uint4 w[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i & 1][i >> 1] = lds128(at + 512 * i);
    in.release();
    tile(w[0]);
    tile(w[1]);
  }
  if (k < tiles) {
    const uint32_t at = in.wait() + warp * 1024 + lane * 16;
    uint4 w[2] = {lds128(at), lds128(at + 512)};
    in.release();
    tile(w);
  }
  // Every column of sums is there four times: each lane takes one of the four rows that its quad has.
  const float s00 = c[0][0] + c[0][1], s01 = c[0][2] + c[0][3], s10 = c[1][0] + c[1][1], s11 = c[1][2] + c[1][3];
  return t & 2 ? (t & 1 ? s11 : s10) : (t & 1 ? s01 : s00);
}

// ---- all multiprocessors
struct Grid {
  uint32_t* counter;
  uint32_t target;
  // Consumers only. Says that this multiprocessor has come here; orders nothing.
  __device__ __forceinline__ void arrive() {
    target += gridDim.x;
    named_barrier(1, kConsumers);
    if (threadIdx.x == 0) asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
  }
  __device__ __forceinline__ void wait() const {
    if (threadIdx.x == 0) {
      uint32_t seen;
      do {
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      } while (static_cast<int32_t>(seen - target) < 0);
    }
    named_barrier(1, kConsumers);
  }
  // Everything written before is visible to reads from L2 after.
  __device__ __forceinline__ void meet() {
    __threadfence();
    arrive();
    wait();
    __threadfence();
  }
};

// Adds the sums of a meeting to the thread's columns, and clears this multiprocessor's part of the same meeting's sums of the other step.
template <int kD>
__device__ __forceinline__ void add_sums(float (&x)[16], const Workspace& ws, int meeting) {
  constexpr int H = kD / kWidth, kClear = kD / (H * kGroup);
  const Sum* from = ws.sums[0] + static_cast<int64_t>(meeting) * kD + first_column();
  Sum s[16];
  bool all;
  do {  // nearly always there at once: the counter says that they are on their way
    all = true;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(s[2 * i]), "=l"(s[2 * i + 1]) : "l"(from + 64 * (i / 2) + 8 * (i & 1)) : "memory");
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) all &= complete(s[i], H);
  } while (!all);
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] += sum_value(s[i]);
  if (threadIdx.x < kClear) ws.sums[1][static_cast<int64_t>(meeting) * kD + blockIdx.x * kClear + threadIdx.x] = 0;
}

__device__ __forceinline__ void read_weights(float (&w)[16], const float* from) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 p = __ldg(reinterpret_cast<const float2*>(from + first_column() + 64 * (i / 2) + 8 * (i & 1)));
    w[2 * i] = p.x, w[2 * i + 1] = p.y;
  }
}

// x * weight as an operand. The norm's factor is wanted only behind the product: squares of x to s.sums, and norm_scale() behind the next barrier of all consumers.
__device__ __forceinline__ void weighted(const float (&x)[16], const float (&w)[16], float (&u)[16], uint32_t (&b)[8], Shared& s) {
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < 16; ++i) squares = fmaf(x[i], x[i], squares), u[i] = x[i] * w[i];
  fragments_of(u, b);
  squares = warp_sum(squares);
  if ((threadIdx.x & 31) == 0) s.sums[threadIdx.x >> 5] = 0.5f * squares;  // every column is there twice
}
template <int kD>
__device__ __forceinline__ float norm_scale(const Shared& s, float eps) {
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += s.sums[i];
  return rsqrtf(total / kD + eps);
}

}  // namespace
}  // namespace oryx::decode_cuda
