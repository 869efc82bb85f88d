// Two to eight query heads a key head, or as many tokens of one sequence: the tensor cores serve them all at once (mma m16n8k16). A warp takes sixteen tokens of one key head of a piece:
//
//   S [16 tokens x 8 heads] = R(j) K_j q^T,   P = exp2(S - m),   O^T [V x 8 heads] += V^T P
//
// with its own m, sums and O, all float32; P and the turned keys and queries are rounded to bfloat16. m is a bound, not the maximum: it moves on only where a score exceeds it by
// more than kSlack, so that tiles need neither a maximum over the warp nor a new scale of O.
//
// The order of the summed index is free, so each lane reads 16 bytes of a row at a time as they lie: lane (r, c) = (lane / 4, lane % 4) holds chunks c, c + 4, ... of rows r and
// r + 8 of the keys, hence both halves of every pair that RoPE turns. Row r's angles stay in registers and go on by a piece a piece, those of r + 8 are made of them. Of values
// it holds four tokens' chunks.
#pragma once

#include "oryx/ops/decode_attention/cuda/decode_attention_parts.cuh"

namespace oryx::decode_attention_cuda {
namespace {

constexpr int kTileTokens = 16, kMostGroup = 8;
constexpr float kSlack = 8.0f;  // of base-2 exponents: P stays below 2^8
template <int K>
constexpr int kGroupedStageBytes = kGroupedWarps * kTileTokens * K * 2;

__device__ __forceinline__ uint32_t transpose(uint32_t x) {  // of an 8 x 8 matrix over the warp
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

struct Turns {  // cosines and sines of eight pairs of a lane
  float c[8], s[8];
  __device__ __forceinline__ void load(const float* cosines, const float* sines) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float4 x = reinterpret_cast<const float4*>(cosines)[h], y = reinterpret_cast<const float4*>(sines)[h];
      c[4 * h] = x.x, c[4 * h + 1] = x.y, c[4 * h + 2] = x.z, c[4 * h + 3] = x.w;
      s[4 * h] = y.x, s[4 * h + 1] = y.y, s[4 * h + 2] = y.z, s[4 * h + 3] = y.w;
    }
  }
  __device__ __forceinline__ void go_on(const Turns& by) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float x = c[e], y = s[e];
      c[e] = fmaf(-y, by.s[e], x * by.c[e]), s[e] = fmaf(x, by.s[e], y * by.c[e]);
    }
  }
  __device__ __forceinline__ void apply(uint4& lo, uint4& hi) const {
    uint32_t x[4] = {lo.x, lo.y, lo.z, lo.w}, y[4] = {hi.x, hi.y, hi.z, hi.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float a = low(x[w]), b = high(x[w]), p = low(y[w]), q = high(y[w]);
      x[w] = pack(fmaf(-p, s[2 * w], a * c[2 * w]), fmaf(-q, s[2 * w + 1], b * c[2 * w + 1]));
      y[w] = pack(fmaf(a, s[2 * w], p * c[2 * w]), fmaf(b, s[2 * w + 1], q * c[2 * w + 1]));
    }
    lo = make_uint4(x[0], x[1], x[2], x[3]), hi = make_uint4(y[0], y[1], y[2], y[3]);
  }
};

// Rows of the table by which angles go on: eight tokens, a piece.
template <int K>
__device__ void load_steps(const OryxDecodeAttention& a, Shared& s, const Layout& layout) {
  if (a.rope == nullptr) return;
  for (int i = threadIdx.x; i < K; i += static_cast<int>(blockDim.x)) {
    s.steps[0][i] = __ldg(a.rope + min(int64_t{8}, a.capacity - 1) * K + i);
    s.steps[1][i] = __ldg(a.rope + min(static_cast<int64_t>(layout.piece), a.capacity - 1) * K + i);
  }
}

template <int K>
__device__ void consume_grouped(const OryxDecodeAttention& a, Shared& s, const Layout& layout, float2* part_ml, float* part_o) {
  constexpr int kHalf = K / 64, kTiles = K / 16;  // chunks of a half row that a lane has; tiles of 16 values
  const int lane = threadIdx.x & 31, r = lane / 4, c = lane % 4, warp = threadIdx.x / 32, group = static_cast<int>(a.Hq / a.Hk);
  const int local = warp % layout.heads, side = warp / layout.heads, head = blockIdx.y * layout.heads + local;
  const int heads = min(layout.heads, static_cast<int>(a.Hk) - static_cast<int>(blockIdx.y) * layout.heads);
  const bool works = side < layout.side && local < heads, turns = a.rope != nullptr;
  const int later = a.steps > 0 ? static_cast<int>(a.steps) - 1 : 0;  // of several tokens, those behind the first: query g sees later - g keys less than the last one
  const int row_bytes = heads * K * 2, piece = layout.piece;
  const float scale = a.scale * kLog2e;
  // Of the pairs of chunk h: a position's angles, and those of a step.
  const auto at_position = [&](int64_t position, int h) {
    Turns x;
    const float* row = a.rope + position * K + 8 * (c + 4 * h);
    x.load(row, row + K / 2);
    return x;
  };
  const auto step = [&](int which, int h) {
    Turns x;
    const float* row = s.steps[which] + 8 * (c + 4 * h);
    x.load(row, row + K / 2);
    return x;
  };
  Ring<kGroupedStageBytes<K>> in(s);
  uint4* own_q = s.queries[warp] + lane;
  for_each_part(a, s, piece, [&](int n, Range range, int from, int to) {
    float o[kTiles][4] = {}, m[2] = {kLowest, kLowest}, sum[2] = {};
    Turns angle[kHalf] = {};  // of row r
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      uint4 lo = make_uint4(0, 0, 0, 0), hi = lo;
      if (works && r < group) {
        const int64_t row = a.steps > 0 ? r * a.q_row + head * K : n * a.q_row + (head * group + r) * K;
        const uint2* from_q = reinterpret_cast<const uint2*>(static_cast<const bf16*>(a.q) + row) + 2 * (c + 4 * i);
        const uint2 w = __ldg(from_q), x = __ldg(from_q + 1), y = __ldg(from_q + K / 8), z = __ldg(from_q + K / 8 + 1);
        lo = make_uint4(w.x, w.y, x.x, x.y), hi = make_uint4(y.x, y.y, z.x, z.y);
      }
      if (turns) at_position(range.end - 1 - max(later - r, 0), i).apply(lo, hi);
      own_q[64 * i] = lo, own_q[64 * i + 32] = hi;  // read by this lane alone
    }
    int first = range.first_of(from, piece), end = range.end_of(from, piece);  // of the piece, and of the tokens side by side with it
    bool starts = true;
#pragma unroll 1
    for (int i = from; i < to; ++i, first += piece) {
      if (first >= end) first = range.begin, end = range.end, starts = true;
      const int left = end - (first + side * kTileTokens), tokens = works ? min(max(left, 0), kTileTokens) : 0;
      if (starts && turns) {
#pragma unroll
        for (int h = 0; h < kHalf; ++h) angle[h] = at_position(min(first + side * kTileTokens + r, range.end - 1), h);
        starts = false;
      }
      const uint32_t tile = (side * kTileTokens * heads + local) * (K * 2);
      uint32_t at = in.wait() + tile + r * row_bytes + 16 * c;
      uint4 lo[kHalf][2], hi[kHalf][2];
#pragma unroll
      for (int h = 0; h < kHalf; ++h) {
#pragma unroll
        for (int t = 0; t < 2; ++t) lo[h][t] = lds128(at + 8 * t * row_bytes + 64 * h), hi[h][t] = lds128(at + 8 * t * row_bytes + K + 64 * h);
      }
      in.release();
      float score[2][4] = {};
#pragma unroll
      for (int h = 0; h < kHalf; ++h) {
        if (turns) {
          angle[h].apply(lo[h][0], hi[h][0]);
          Turns eight_on = angle[h];
          eight_on.go_on(step(0, h));
          eight_on.apply(lo[h][1], hi[h][1]);
          angle[h].go_on(step(1, h));
        }
        const uint4 q_lo = own_q[64 * h], q_hi = own_q[64 * h + 32];
        mma_bf16(score[0], {lo[h][0].x, lo[h][1].x, lo[h][0].y, lo[h][1].y}, q_lo.x, q_lo.y);
        mma_bf16(score[1], {hi[h][0].x, hi[h][1].x, hi[h][0].y, hi[h][1].y}, q_hi.x, q_hi.y);
        mma_bf16(score[0], {lo[h][0].z, lo[h][1].z, lo[h][0].w, lo[h][1].w}, q_lo.z, q_lo.w);
        mma_bf16(score[1], {hi[h][0].z, hi[h][1].z, hi[h][0].w, hi[h][1].w}, q_hi.z, q_hi.w);
      }
      at = in.wait() + tile + 16 * r;
      uint4 v[4][kHalf];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int token = 2 * c + t % 2 + 8 * (t / 2);
#pragma unroll
        for (int h = 0; h < kHalf; ++h) {
          v[t][h] = lds128(at + token * row_bytes + 128 * h);
          if (token >= tokens) v[t][h] = make_uint4(0, 0, 0, 0);  // 0 times whatever lies there might be NaN
        }
      }
      float x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = r + 8 * (e / 2) < min(tokens, left - max(later - 2 * c - e % 2, 0)) ? (score[0][e] + score[1][e]) * scale : kLowest;
      const float top[2] = {fmaxf(x[0], x[2]), fmaxf(x[1], x[3])};
      if (__any_sync(~0u, top[0] > m[0] + kSlack || top[1] > m[1] + kSlack)) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float bound = fmaxf(m[h], top[h]);
#pragma unroll
          for (int d = 4; d < 32; d *= 2) bound = fmaxf(bound, __shfl_xor_sync(~0u, bound, d));
          const float shrink = exp2_fast(m[h] - bound);
          m[h] = bound, sum[h] *= shrink;
#pragma unroll
          for (int j = 0; j < kTiles; ++j) o[j][h] *= shrink, o[j][2 + h] *= shrink;
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        x[e] = exp2_fast(x[e] - m[e % 2]);
        sum[e % 2] += x[e];
      }
      const uint32_t b0 = transpose(pack(x[0], x[1])), b1 = transpose(pack(x[2], x[3]));
      in.release();
      // Two tokens' value e of chunk h, side by side.
      const auto pair = [&](int t, int e) {
        const uint4 &y = v[t][e / 8], &z = v[t + 1][e / 8];
        const uint32_t p[4] = {y.x, y.y, y.z, y.w}, q[4] = {z.x, z.y, z.z, z.w};
        return __byte_perm(p[e % 8 / 2], q[e % 8 / 2], e % 2 == 0 ? 0x5410 : 0x7632);
      };
#pragma unroll
      for (int j = 0; j < kTiles; ++j) mma_bf16(o[j], {pair(0, j), pair(0, j + kTiles), pair(2, j), pair(2, j + kTiles)}, b0, b1);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int d = 4; d < 32; d *= 2) sum[h] += __shfl_xor_sync(~0u, sum[h], d);
      const int g = 2 * c + h;
      if (!works || g >= group) continue;
      // Of a slot without tokens m is kLowest, for which the join has no weight.
      const int64_t part = ((static_cast<int64_t>(blockIdx.x) + n) * a.Hq + head * group + g) * layout.side + side;
      if (r == 0) part_ml[part] = make_float2(m[h], sum[h]);
      float* out = part_o + part * K + 8 * r;
#pragma unroll
      for (int j = 0; j < kTiles; j += 4) {  // value j of the lane is 8 r + j, and 64 + 8 r + (j - 8) from the ninth
        *reinterpret_cast<float4*>(out + j) = make_float4(o[j][h], o[j + 1][h], o[j + 2][h], o[j + 3][h]);
        *reinterpret_cast<float4*>(out + (kTiles == 8 ? 64 : 4) + j) = make_float4(o[j][2 + h], o[j + 1][2 + h], o[j + 2][2 + h], o[j + 3][2 + h]);
      }
    }
  });
}

}  // namespace
}  // namespace oryx::decode_attention_cuda
