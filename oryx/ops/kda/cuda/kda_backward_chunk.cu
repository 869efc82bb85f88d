// What of the backward pass needs no walk (see kda_cuda.h): the gradients of q, k, g and beta of one chunk and output head at a time, from S0, dS1, U, W and dO.
//
// Products first, by tensor units: a warp has 16 tokens and half of the channels of four sums that stay in registers: of dq (from dO S0, then across the cuts
// behind which its tokens are), of dk as a row (from -W S0, likewise), of dk as a column (across the cuts before which they are) and of d(e k) (from U dS1). From one
// cut to the next a sum is decayed by the blocks between them, so that what is left at the end is the token's own decay to the ends of its block of eight. That,
// the leaves, dg and the way back through the normalisation are done channel by channel in float32, a warp to a block of eight tokens.
#include "kda_block.cuh"

namespace oryx::kda_cuda {
namespace {

constexpr int kThreads = 256;

template <int D>
struct Layout {
  static constexpr int kTile = kC * 2 * D;  // 64 tokens
  static constexpr int kS0 = 0, kS1 = kS0 + 2 * D * D, kO = kS1 + 2 * D * D, kW = kO + kTile, kU = kW + kTile;
  static constexpr int kOperands = kU + kTile;
  static constexpr int kDP = kOperands + Operands<D>::kBytes;  // dP of queries, of keys: 64 rows of 128 swizzled bytes each
  static constexpr int kLeaf = kDP + 2 * kC * 128;             // the same of the leaves in float32, [2][8 leaves][8][8]
  static constexpr int kDecay = kLeaf + 4096;                  // [8][D] floats
  static constexpr int kWhole = kDecay + 32 * D;               // [512 / D][D] floats: parts of the sums over V of S0 dS1
  static constexpr int kNorms = kWhole + 2048;                 // 1 / |k|, scale / |q|: 64 floats each
  static constexpr int kBytes = kNorms + 512;
  // The four sums, [64][kStride] floats each, in the place of what is spent; then dg's sums over blocks, [8][D] twice.
  static constexpr int kStride = D + 8;
  static constexpr int kSums = 0, kSumBytes = kC * kStride * 4, kOwn = 4 * kSumBytes, kEnds = kOwn + 32 * D;
  static_assert(kEnds + 32 * D <= kDP && kBytes <= 227 * 1024);
};

struct Arguments {
  const __nv_bfloat16 *q, *k, *u, *w, *d_o;
  const float *g, *beta;
  const char *states, *d_states;
  const uint8_t* wanted;
  float floor;
  __nv_bfloat16 *d_q, *d_k;
  float *d_g, *d_beta;
};

__device__ __forceinline__ void mma_bf16_8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(b));
}
__device__ __forceinline__ uint32_t negated(uint32_t x) { return x ^ 0x80008000u; }

// Right operand: 16 summed rows, of 2 D swizzled bytes, the first at `rows`, and channels of units `unit` and the next.
template <int D>
__device__ __forceinline__ void load_columns(uint32_t (&b)[4], uint32_t rows, int unit, int lane) {
  // Matrices: summed rows 0..7 and 8..15 of one unit, then of the next.
  load_matrix_transposed(b, rows + (lane % 8 + lane / 8 % 2 * 8) * 2 * D + (((unit + lane / 16) ^ (lane & 7)) << 4));
}

// A block of dP (rows of 128 swizzled bytes) as left operand: tokens i on from row, j on from column; and its transpose, whose rows are the columns.
__device__ __forceinline__ void load_dP(uint32_t (&a)[4], uint32_t dP, int row, int column, int lane) {
  load_matrix(a, dP + (row + lane % 16) * 128 + (((column / 8 + lane / 16) ^ (lane & 7)) << 4));
}
__device__ __forceinline__ void load_dP_transposed(uint32_t (&a)[4], uint32_t dP, int row, int column, int lane) {
  // Of the transpose's matrices (rows column.., summed row..): [column 0..7][row 0..7], [column 8..15][row 0..7], [0..7][8..15], [8..15][8..15].
  load_matrix_transposed(a, dP + (row + lane % 8 + lane / 16 * 8) * 128 + (((column / 8 + lane / 8 % 2) ^ (lane & 7)) << 4));
}

template <int kN>
__device__ __forceinline__ void zero(float (&x)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) x[n][i] = 0.f;
}

template <int D>
__global__ void __launch_bounds__(kThreads, 1) backward_chunk_kernel(const Shape s, const Arguments p) {
  using L = Layout<D>;
  using O = Operands<D>;
  constexpr int N = D / 32, kTiles = D / 16;  // tiles of eight channels in half of them
  extern __shared__ __align__(128) char raw_shared[];
  char* const sh = raw_shared;
  const uint32_t base = smem_address(raw_shared);
  const auto floats = [&](int at) { return reinterpret_cast<float*>(sh + at); };
  const int thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0);
  const Work w(s);
  if (w.at.count == 0) return;
  const size_t record = static_cast<size_t>(w.chunk) * s.Hs + w.hs;

  // In this order: what the decayed keys and queries are made of, what dP is, the states. The other output heads of a state head add nothing to what the state's
  // gradients are made of: W and dS1 count as zero.
  TokenBlock<D> x;
  x.fetch(s, w, p.k, p.q, p.g, warp, lane);
  for (int i = thread; i < kC * D / 8; i += kThreads) {
    const int t = i / (D / 8), unit = i % (D / 8);
    const bool valid = t < w.at.count;
    const size_t token = w.at.token + (valid ? t : 0);
    const uint32_t at = t * 2 * D + ((unit ^ (t & 7)) << 4);
    copy16(base + L::kO + at, p.d_o + (token * s.Ho + w.ho) * D + 8 * unit, valid && (p.wanted == nullptr || p.wanted[token] != 0));
    copy16(base + L::kW + at, p.w + (token * s.Hs + w.hs) * D + 8 * unit, valid && w.first);
    copy16(base + L::kU + at, p.u + (token * s.Hs + w.hs) * D + 8 * unit, valid);
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
  for (int i = thread; i < 2 * D * D / 16; i += kThreads) {
    copy16(base + L::kS0 + 16 * i, p.states + record * state_bytes(D) + 16 * i, true);
    copy16(base + L::kS1 + 16 * i, p.d_states + record * state_bytes(D) + 16 * i, w.first);
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
  x.finish(w, warp);
  x.norms_and_decay(s, floats(L::kNorms), floats(L::kNorms) + kC, floats(L::kDecay), warp, lane);
  __syncthreads();
  x.normalise(floats(L::kNorms), floats(L::kNorms) + kC, warp);
  x.levels(base + L::kOperands, BlockDecays<N>(floats(L::kDecay) + N * lane, D, warp), warp, lane);
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  __syncthreads();

  // db
  if (w.first) {
    float v[16];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t x[N / 2], y[N / 2];
      load_words(x, sh + L::kW + row_place<D>(8 * warp + i, lane));
      load_words(y, sh + L::kU + row_place<D>(8 * warp + i, lane));
      v[i] = v[8 + i] = 0.f;
#pragma unroll
      for (int n = 0; n < N / 2; ++n) v[i] = fmaf(low(x[n]), low(y[n]), fmaf(high(x[n]), high(y[n]), v[i]));
    }
    const float sum = warp_sums(v, lane);
    const int t = 8 * warp + lane / 2;
    if (lane % 2 == 0 && lane < 16 && t < w.at.count) {
      const size_t at = static_cast<size_t>(w.at.token + t) * s.Hs + w.hs;
      float b = p.beta[at];
      b = fabsf(b) < p.floor ? p.floor : b;
      p.d_beta[at] = sum / b / b;
    }
  }
  // dP: warps 0 to 3 of queries, dO U^T, 4 to 7 of keys, -W U^T; 16 rows each, as far as the diagonal.
  {
    const int m = warp % 4, keys = warp / 4;
    const uint32_t rows = base + (keys ? L::kW : L::kO) + (16 * m + lane % 16) * 2 * D;
    for (int nb = 0; nb <= m; ++nb) {
      float d[2][4];
      zero(d);
      const uint32_t columns = base + L::kU + (16 * nb + lane % 8 + (lane >= 16 ? 8 : 0)) * 2 * D;
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        uint32_t a[4], b[4];
        load_matrix(a, rows + (((2 * step + lane / 16) ^ (lane & 7)) << 4));
        load_matrix(b, columns + (((2 * step + lane / 8 % 2) ^ (lane & 7)) << 4));
        mma_bf16(d[0], a, b[0], b[1]);
        mma_bf16(d[1], a, b[2], b[3]);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float x = d[n][2 * h], y = d[n][2 * h + 1];
          if (keys) x = -x, y = -y;
          const int t = 16 * m + 8 * h + lane / 4;
          *reinterpret_cast<uint32_t*>(sh + L::kDP + keys * kC * 128 + t * 128 + (((2 * nb + n) ^ (t & 7)) << 4) + lane % 4 * 4) = pack(x, y);
          if (nb == m && n == h) *reinterpret_cast<float2*>(floats(L::kLeaf) + (keys * 8 + 2 * m + h) * 64 + lane / 4 * 8 + 2 * (lane % 4)) = make_float2(x, y);
        }
    }
  }

  copy_wait();
  __syncthreads();
  // The parts of <S0, dS1>, channel by channel.
  {
    constexpr int kPairs = D / 2, kParts = kThreads / kPairs, kRows = D / kParts;
    const int pair = thread % kPairs, part = thread / kPairs;
    float x = 0.f, y = 0.f;
#pragma unroll 8
    for (int i = 0; i < kRows; ++i) {
      const int v = part * kRows + i, at = pair / 32 * D * 128 + v * 128 + (((pair % 32 / 4) ^ (v & 7)) << 4) + pair % 4 * 4;
      const uint32_t a = *reinterpret_cast<const uint32_t*>(sh + L::kS0 + at), b = *reinterpret_cast<const uint32_t*>(sh + L::kS1 + at);
      x = fmaf(low(a), low(b), x), y = fmaf(high(a), high(b), y);
    }
    *reinterpret_cast<float2*>(floats(L::kWhole) + part * D + 2 * pair) = make_float2(x, y);
  }

  // The four sums.
  float sq[kTiles][4], sk[kTiles][4], sc[kTiles][4], se[kTiles][4];
  zero(sq), zero(sk), zero(sc), zero(se);
  const int m = warp % 4, unit0 = warp / 4 * kTiles;  // 16 tokens; the first of this warp's units of eight channels
  {
    const uint32_t place = (16 * m + lane % 16) * 2 * D;
    // A unit's place in the panels of a state, at summed rows (V) of this lane.
    const auto state_unit = [&](int unit) { return unit / 8 * D * 128 + (lane % 8 + lane / 8 % 2 * 8) * 128 + (((unit % 8) ^ (lane & 7)) << 4); };
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t o[4], x[4], u[4];
      const uint32_t at = place + (((2 * step + lane / 16) ^ (lane & 7)) << 4);
      load_matrix(o, base + L::kO + at);
      load_matrix(x, base + L::kW + at);
      load_matrix(u, base + L::kU + at);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = negated(x[i]);
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t b[4];
        const uint32_t from = step * 16 * 128 + state_unit(unit0 + n + lane / 16);
        load_matrix_transposed(b, base + L::kS0 + from);
        mma_bf16(sq[n], o, b[0], b[1]);
        mma_bf16(sq[n + 1], o, b[2], b[3]);
        mma_bf16(sk[n], x, b[0], b[1]);
        mma_bf16(sk[n + 1], x, b[2], b[3]);
        load_matrix_transposed(b, base + L::kS1 + from);
        mma_bf16(se[n], u, b[0], b[1]);
        mma_bf16(se[n + 1], u, b[2], b[3]);
      }
    }
  }

  // A row of block decays, of this thread's two channels of tile n.
  const auto block_decay = [&](int block, int n) { return *reinterpret_cast<const float2*>(floats(L::kDecay) + block * D + 8 * (unit0 + n) + 2 * (lane % 4)); };
  // Two sums (or one) decayed by blocks [from, to): rows of the earlier block, the later one, or both (half 0, 1, 2).
  const auto decay_rows = [&](int from, int to, int half, float (&x)[kTiles][4], float (*y)[4]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float2 f = make_float2(1.f, 1.f);
      for (int i = from; i < to; ++i) {
        const float2 z = block_decay(i, n);
        f.x *= z.x, f.y *= z.y;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (half + h == 1) continue;
        x[n][2 * h] *= f.x, x[n][2 * h + 1] *= f.y;
        if (y != nullptr) y[n][2 * h] *= f.x, y[n][2 * h + 1] *= f.y;
      }
    }
  };
  const uint32_t dPq = base + L::kDP, dPk = dPq + kC * 128, operands = base + L::kOperands;
  // dq and dk of rows behind a cut: sums over 16 keys before it.
  const auto add_rows = [&](int column, int level) {
    uint32_t x[4], y[4], b[4];
    load_dP(x, dPq, 16 * m, column, lane);
    load_dP(y, dPk, 16 * m, column, lane);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      load_columns<D>(b, operands + O::keys(level) + column * 2 * D, unit0 + n, lane);
      mma_bf16(sq[n], x, b[0], b[1]);
      mma_bf16(sq[n + 1], x, b[2], b[3]);
      mma_bf16(sk[n], y, b[0], b[1]);
      mma_bf16(sk[n + 1], y, b[2], b[3]);
    }
  };
  // dk of columns before a cut: sums over 16 queries and keys behind it; query_row: the first's place among the level's queries.
  const auto add_columns = [&](int row, int query_row, int level) {
    uint32_t x[4], y[4], b[4];
    load_dP_transposed(x, dPq, row, 16 * m, lane);
    load_dP_transposed(y, dPk, row, 16 * m, lane);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      load_columns<D>(b, operands + O::queries(level) + query_row * 2 * D, unit0 + n, lane);
      mma_bf16(sc[n], x, b[0], b[1]);
      mma_bf16(sc[n + 1], x, b[2], b[3]);
      load_columns<D>(b, operands + O::keys(level) + row * 2 * D, unit0 + n, lane);
      mma_bf16(sc[n], y, b[0], b[1]);
      mma_bf16(sc[n + 1], y, b[2], b[3]);
    }
  };
  if (m >= 2) {
    decay_rows(0, 4, 2, sq, sk);
    add_rows(0, 2);
    add_rows(16, 2);
  } else {
    add_columns(32, 0, 2);
    add_columns(48, 16, 2);
  }
  if (m % 2 == 1) {
    decay_rows(2 * m - 2, 2 * m, 2, sq, sk);
    add_rows(16 * (m - 1), 1);
  } else {
    if (m == 0) decay_rows(2, 4, 2, sc, nullptr);
    add_columns(16 * (m + 1), O::query_row(1, 2 * m + 2), 1);
  }
  // The cut in the middle of these 16 tokens: the later eight are rows, of queries and of keys in one product, the earlier eight columns.
  decay_rows(2 * m, 2 * m + 1, 1, sq, sk);
  decay_rows(2 * m + 1, 2 * m + 2, 0, sc, nullptr);
  {
    uint32_t x[4], y[4];
    // [later][earlier] of queries, of keys (as rows); the same two transposed (as columns: the summed are eight queries, then eight keys).
    const int r = lane % 8, which = lane / 8;
    const uint32_t at = (which % 2 == 0 ? dPq : dPk) + (16 * m + 8 + r) * 128 + (((2 * m) ^ r) << 4);
    load_matrix(x, at);
    load_matrix_transposed(y, at);
    const uint32_t columns[4] = {y[0], 0u, y[1], 0u};
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4], c[4];
      // Earlier keys of units n, n + 1 (twice); later queries and keys of unit n, then of n + 1.
      const int unit = unit0 + n;
      load_matrix_transposed(b, operands + O::keys(0) + (16 * m + r) * 2 * D + (((unit + which % 2) ^ r) << 4));
      load_matrix_transposed(c, operands + (which % 2 == 0 ? O::queries(0) + (8 * m + r) * 2 * D : O::keys(0) + (16 * m + 8 + r) * 2 * D) +
                                    (((unit + which / 2) ^ r) << 4));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float d[4] = {};
        mma_bf16_8(d, x[0], x[1], b[i]);
        sq[n + i][2] += d[0], sq[n + i][3] += d[1];
        sk[n + i][2] += d[2], sk[n + i][3] += d[3];
        mma_bf16(sc[n + i], columns, c[2 * i], c[2 * i + 1]);
      }
    }
  }
  __syncthreads();  // nothing of what the sums are written over is read any more
  {
    const auto write = [&](int which, const float (&d)[kTiles][4]) {
      float* const to = floats(L::kSums + which * L::kSumBytes) + (16 * m + lane / 4) * L::kStride + 8 * unit0 + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) *reinterpret_cast<float2*>(to + 8 * h * L::kStride + 8 * n) = make_float2(d[n][2 * h], d[n][2 * h + 1]);
    };
    write(0, sq), write(1, sk), write(2, sc), write(3, se);
  }
  __syncthreads();

  // Channel by channel. A lane's numbers of token 8 warp + i in the four sums, which take what is made of them.
  const auto at = [&](int which, int i) { return floats(L::kSums + which * L::kSumBytes) + (8 * warp + i) * L::kStride + N * lane; };
  const float *const rk = floats(L::kNorms) + 8 * warp, *const rq = rk + kC;
  float kn[8][N], a[8][N], own[N], ends[N];
  TokenBlock<D> raw;
  raw.load(s, w, p.k, p.q, p.g, warp, lane);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    unpack(kn[i], raw.k[i]);
#pragma unroll
    for (int n = 0; n < N; ++n) kn[i][n] *= rk[i], a[i][n] = raw.a[i][n];
  }
  {
    float dc[8][N], F[N];
#pragma unroll
    for (int n = 0; n < N; ++n) F[n] = 1.f;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int n = 0; n < N; ++n) dc[i][n] = 0.f;
    const float *const leaf_q = floats(L::kLeaf) + warp * 64, *const leaf_k = leaf_q + 512;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float dq[N], dk[N], qn[N], G[N];
      load_floats(dq, at(0, i));
      load_floats(dk, at(1, i));
      unpack(qn, raw.q[i]);
#pragma unroll
      for (int n = 0; n < N; ++n) F[n] *= a[i][n], dq[n] *= F[n], dk[n] *= F[n], qn[n] *= rq[i], G[n] = 1.f;
#pragma unroll
      for (int j = 7; j >= 0; --j) {
        if (j > i) continue;
        const float eq = leaf_q[8 * i + j], ek = j < i ? leaf_k[8 * i + j] : 0.f;
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const float x = G[n] * kn[j][n];
          dq[n] = fmaf(eq, x, dq[n]);
          dk[n] = fmaf(ek, x, dk[n]);
          dc[j][n] = fmaf(G[n], fmaf(eq, qn[n], ek * kn[i][n]), dc[j][n]);
          G[n] *= a[j][n];
        }
      }
      store_floats(at(0, i), dq);
      store_floats(at(1, i), dk);
    }
    const BlockDecays<N> blocks(floats(L::kDecay) + N * lane, D, warp);
    float v[16];
#pragma unroll
    for (int n = 0; n < N; ++n) F[n] = 1.f, own[n] = ends[n] = 0.f;
#pragma unroll
    for (int i = 7; i >= 0; --i) {
      float dq[N], dk[N], x[N], e[N], qn[N];
      load_floats(dq, at(0, i));
      load_floats(dk, at(1, i));
      load_floats(x, at(2, i));
      load_floats(e, at(3, i));
      unpack(qn, raw.q[i]);
      v[i] = v[8 + i] = 0.f;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float column = fmaf(F[n], x[n], dc[i][n]), end = F[n] * blocks.after[n] * e[n];
        qn[n] *= rq[i];
        own[n] += fmaf(qn[n], dq[n], kn[i][n] * (dk[n] - column));
        x[n] = own[n];
        e[n] = kn[i][n] * end;
        ends[n] += e[n];
        dk[n] += column + end;
        v[i] = fmaf(kn[i][n], dk[n], v[i]);
        v[8 + i] = fmaf(qn[n], dq[n], v[8 + i]);
        F[n] *= a[i][n];
      }
      store_floats(at(1, i), dk);
      store_floats(at(2, i), x);
      store_floats(at(3, i), e);
    }
    store_floats(floats(L::kOwn) + warp * D + N * lane, own);
    store_floats(floats(L::kEnds) + warp * D + N * lane, ends);
    // Through the normalisation: lanes 2 i and 2 i + 1 have k.dk of token i, 16 further on scale times q.(scale dq).
    const float dots = warp_sums(v, lane);
    __syncthreads();
    const float inverse = 1.f / s.scale;
    // What all tokens of the block get: of later blocks, earlier ones, and the state before the chunk.
    float whole[N];
    const auto add = [&](float (&x)[N], int table, int from, int to) {
#pragma unroll
      for (int n = 0; n < N; ++n) x[n] = 0.f;
#pragma unroll 1
      for (int i = from; i < to; ++i) {
        float y[N];
        load_floats(y, floats(table) + i * D + N * lane);
#pragma unroll
        for (int n = 0; n < N; ++n) x[n] += y[n];
      }
    };
    add(whole, L::kWhole, 0, kThreads / (D / 2));
    add(own, L::kOwn, warp + 1, 8);
    add(ends, L::kEnds, 0, warp);
    {
      float x[N];
      load_floats(x, floats(L::kDecay) + warp * D + N * lane);
#pragma unroll
      for (int n = 0; n < N; ++n) own[n] += blocks.before[n] * x[n] * blocks.after[n] * whole[n];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float dq[N], dk[N], x[N], e[N], qn[N];
      load_floats(dq, at(0, i));
      load_floats(dk, at(1, i));
      load_floats(x, at(2, i));
      load_floats(e, at(3, i));
      unpack(qn, raw.q[i]);
      const float dot_k = __shfl_sync(~0u, dots, 2 * i), dot_q = __shfl_sync(~0u, dots, 16 + 2 * i) * inverse;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        x[n] = a[i][n] == 0.f ? 0.f : x[n] + own[n] + ends[n];  // forgotten at once: no gradient, not that of the rounding of sums
        ends[n] += e[n];
        dq[n] = rq[i] * (dq[n] - qn[n] * rq[i] * inverse * dot_q);
        dk[n] = rk[i] * (dk[n] - kn[i][n] * dot_k);
      }
      if (8 * warp + i < w.at.count) {
        const size_t to = (static_cast<size_t>(w.at.token + 8 * warp + i) * s.Ho + w.ho) * D + N * lane;
        store_rounded(p.d_q + to, dq);
        store_rounded(p.d_k + to, dk);
        store_floats(p.d_g + to, x);
      }
    }
  }
}

template <int D>
cudaError_t launch(const Shape& s, dim3 grid, const Arguments& a, cudaStream_t stream) {
  const cudaError_t status = cudaFuncSetAttribute(backward_chunk_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, Layout<D>::kBytes);
  if (status != cudaSuccess) return status;
  backward_chunk_kernel<D><<<grid, kThreads, Layout<D>::kBytes, stream>>>(s, a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_backward_chunk(const OryxKda& p, const OryxKdaGradients& d, const Shape& s, int records, const char* states, const char* d_states, const void* u,
                                  const void* w, void* d_q, void* d_k, float* d_g, cudaStream_t stream) {
  if (records == 0) return cudaSuccess;
  using T = __nv_bfloat16;
  const Arguments a{static_cast<const T*>(p.q), static_cast<const T*>(p.k), static_cast<const T*>(u), static_cast<const T*>(w), static_cast<const T*>(d.d_o),
                    p.g, p.beta, states, d_states, p.wanted, kFloor, static_cast<T*>(d_q), static_cast<T*>(d_k), d_g, d.d_beta};
  return s.D == 64 ? launch<64>(s, work_grid(s, records), a, stream) : launch<128>(s, work_grid(s, records), a, stream);
}

}  // namespace oryx::kda_cuda
