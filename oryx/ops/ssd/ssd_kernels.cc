#include "oryx/ops/ssd/ssd_kernels.h"

#include <algorithm>
#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "oryx/ops/ssd/ssd_kernels.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <hwy/contrib/math/math-inl.h>

#include "oryx/ops/simd/small_matmul-inl.h"

HWY_BEFORE_NAMESPACE();
namespace oryx::ops {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
namespace mm = simd::HWY_NAMESPACE;
using mm::Order;
using mm::Triangle;

using mm::Floats;
constexpr size_t kC = kSsdChunk;
constexpr size_t kCs = mm::PadStride(kC);  // row stride of [.., c] buffers
// Below this a weight is taken as zero: products of such numbers would be denormal, which some processors compute
// slowly.
constexpr float kTiny = 1e-37f;
float Flush(float x) { return x < kTiny ? 0 : x; }

// Hands out pieces of the scratch memory.
struct Arena {
  float* base;  // null: only the size is wanted
  size_t used = 0;
  float* take(size_t rows, size_t stride) {
    float* p = base == nullptr ? nullptr : base + used;
    used += rows * stride;
    return p;
  }
};

size_t RoundUp4(size_t n) { return (n + 3) / 4 * 4; }

// What one chunk needs of the decays. Vectors have kC entries.
struct Decays {
  float *x, *dt, *alpha;  // dt_raw + dt_bias, its softplus, exp(dt A)
  float *gamma, *tail;    // product of alpha up to and with i; product of alpha after j
  explicit Decays(Arena& a)
      : x(a.take(1, kC)), dt(a.take(1, kC)), alpha(a.take(1, kC)), gamma(a.take(1, kC)), tail(a.take(1, kC)) {}
};

// log(1 + e^x), exact for every x: max(x, 0) + log1p(e^-|x|).
HWY_INLINE mm::Vector Softplus(Floats d, mm::Vector x) {
  return hn::Add(hn::Max(x, hn::Zero(d)), hn::Log1p(d, hn::Exp(d, hn::Neg(hn::Abs(x)))));
}

void LoadDecays(const SsdTask& t, size_t begin, size_t c, const Decays& s) {
  const Floats d;
  std::fill(s.x, s.x + kC, 0.f);
  for (size_t i = 0; i < c; ++i) s.x[i] = *t.dt_raw.at(begin + i, 0) + t.dt_bias;
  for (size_t i = 0; i < c; i += hn::Lanes(d)) {
    const auto dt = Softplus(d, hn::LoadU(d, s.x + i));
    hn::StoreU(dt, d, s.dt + i);
    hn::StoreU(hn::Exp(d, hn::Mul(dt, hn::Set(d, t.A))), d, s.alpha + i);
  }
  float product = 1;
  for (size_t i = 0; i < c; ++i) s.gamma[i] = product = Flush(product * s.alpha[i]);
  product = 1;
  for (size_t i = c; i-- > 0; product = Flush(product * s.alpha[i])) s.tail[i] = product;
}

// Row i of L from row i - 1 in place: products inside the segment, no difference of running sums. Entries beyond i
// become 0.
HWY_INLINE void NextDecayRow(size_t i, float alpha, const float* previous, float* row) {
  const Floats d;
  const auto va = hn::Set(d, alpha), tiny = hn::Set(d, kTiny);
  for (size_t j = 0; j < kC; j += hn::Lanes(d)) {
    auto l = i == 0 ? hn::Zero(d) : hn::Mul(hn::LoadU(d, previous + j), va);
    hn::StoreU(hn::IfThenElseZero(hn::Ge(l, tiny), l), d, row + j);
  }
  row[i] = 1;
}

// Mask of the lanes j .. j + lanes that lie at or before i.
HWY_INLINE hn::Mask<Floats> UpTo(Floats d, size_t j, size_t i) { return hn::FirstN(d, i < j ? 0 : i - j + 1); }

// First and last + 1 token of the chunk whose readout is wanted; equal when none is.
struct Hull {
  size_t begin, end;
};
Hull WantedHull(const uint8_t* wanted, size_t begin, size_t c) {
  if (wanted == nullptr) return {0, c};
  size_t first = 0, last = c;
  while (first < c && !wanted[begin + first]) ++first;
  while (last > first && !wanted[begin + last - 1]) --last;
  return {first, last};
}
bool Wanted(const SsdTask& t, size_t token) { return t.wanted == nullptr || t.wanted[token] != 0; }

// The rows begin .. begin + c of one head, padded with zeros to whole vectors and to a multiple of 4 rows.
void LoadRows(const SsdRows<const float>& from, size_t head, size_t begin, size_t c, size_t n, float* to, size_t ld) {
  for (size_t i = 0; i < c; ++i) mm::LoadRow(1, from.at(begin + i, head), n, to + i * ld);
  for (size_t i = c; i < RoundUp4(c); ++i) std::fill(to + i * ld, to + i * ld + mm::PadLength(n), 0.f);
}

void LoadMatrix(const float* from, size_t rows, size_t n, float* to, size_t ld) {
  for (size_t i = 0; i < RoundUp4(rows); ++i) {
    if (from != nullptr && i < rows) {
      mm::LoadRow(1, from + i * n, n, to + i * ld);
    } else {
      std::fill(to + i * ld, to + i * ld + ld, 0.f);
    }
  }
}

void StoreMatrix(const float* from, size_t ld, size_t rows, size_t n, float* to) {
  for (size_t i = 0; i < rows; ++i) mm::StoreRow(1, from + i * ld, n, to + i * n);
}

// row *= a
HWY_INLINE void ScaleRow(float a, float* row, size_t n) {
  const Floats d;
  for (size_t i = 0; i < n; i += hn::Lanes(d)) hn::StoreU(hn::Mul(hn::Set(d, a), hn::LoadU(d, row + i)), d, row + i);
}

// y += a x
HWY_INLINE void AddRow(float a, const float* x, size_t n, float* y) {
  const Floats d;
  const auto va = hn::Set(d, a);
  for (size_t i = 0; i < n; i += hn::Lanes(d))
    hn::StoreU(hn::MulAdd(va, hn::LoadU(d, x + i), hn::LoadU(d, y + i)), d, y + i);
}

// ---- forward

struct ForwardBuffers {
  size_t Ks, Vs;
  Arena arena;
  Decays decays;
  float *k, *kT, *u, *P, *o;  // [c, Ks], [K, c], [c, Vs], [c, c], [c, Vs]
  float *S, *edge, *row;      // the state transposed [K, Vs] and, at the ends of the sequence, as it is [V, Ks]; [c]
  ForwardBuffers(float* scratch, size_t K, size_t V)
      : Ks(mm::PadStride(K)),
        Vs(mm::PadStride(V)),
        arena{scratch, 0},
        decays(arena),
        k(arena.take(kC, Ks)),
        kT(arena.take(Ks, kCs)),
        u(arena.take(kC, Vs)),
        P(arena.take(kC, kCs)),
        o(arena.take(kC, Vs)),
        S(arena.take(Ks, Vs)),
        edge(arena.take(Vs, Ks)),
        row(arena.take(1, kCs)) {}
};

void StoreOutput(const SsdTask& t, const ForwardBuffers& b, size_t begin, Hull hull, size_t r,
                 const SsdRows<float>& out) {
  for (size_t i = hull.begin; i < hull.end; ++i) {
    float* to = out.at(begin + i, r);
    if (!Wanted(t, begin + i)) continue;
    const float *o = b.o + i * b.Vs, *v = t.v.at(begin + i, t.v_head);
    for (size_t x = 0; x < t.V; ++x) to[x] = o[x] + t.D * v[x];
  }
}

// The readout of one output head over the hull: o = ((q k^T) * L) u + gamma * (q S^T) + D v.
void ForwardReadout(const SsdTask& t, const ForwardBuffers& b, size_t begin, size_t c, Hull hull, size_t r,
                    const SsdRows<float>& out) {
  const Floats d;
  const size_t ldq = static_cast<size_t>(t.q.token_stride);
  const float* q = t.q.at(begin, t.q_head + r);
  mm::MatMulRange<Order::kPlain, Triangle::kLowerOut>(hull.begin, hull.end, c, 0, t.K, q, ldq, b.kT, kCs, 0, b.P, kCs);
  for (size_t i = 0; i < hull.end; ++i) {
    NextDecayRow(i, b.decays.alpha[i], b.row, b.row);
    if (i < hull.begin) continue;
    float* p = b.P + i * kCs;
    for (size_t j = 0; j < kC; j += hn::Lanes(d)) {
      hn::StoreU(hn::IfThenElseZero(UpTo(d, j, i), hn::Mul(hn::LoadU(d, p + j), hn::LoadU(d, b.row + j))), d, p + j);
    }
  }
  mm::MatMulRange(hull.begin, hull.end, t.V, 0, t.K, q, ldq, b.S, b.Vs, 0, b.o, b.Vs);
  for (size_t i = hull.begin; i < hull.end; ++i) ScaleRow(b.decays.gamma[i], b.o + i * b.Vs, t.V);
  mm::MatMulRange<Order::kPlain, Triangle::kLowerA>(hull.begin, hull.end, t.V, 0, c, b.P, kCs, b.u, b.Vs, 1, b.o, b.Vs);
  StoreOutput(t, b, begin, hull, r, out);
}

void Forward(const SsdTask& t, const SsdRows<float>& out, float* final_state, float* scratch) {
  const ForwardBuffers b(scratch, t.K, t.V);
  LoadMatrix(t.initial_state, t.V, t.K, b.edge, b.Ks);
  mm::Transpose(t.V, t.K, b.edge, b.Ks, b.S, b.Vs);
  for (size_t begin = 0; begin < t.length; begin += kC) {
    const size_t c = std::min(kC, t.length - begin);
    LoadDecays(t, begin, c, b.decays);
    for (size_t i = 0; i < c; ++i) mm::LoadRow(b.decays.dt[i], t.v.at(begin + i, t.v_head), t.V, b.u + i * b.Vs);
    const Hull hull = WantedHull(t.wanted, begin, c);
    if (hull.begin < hull.end) {
      LoadRows(t.k, t.k_head, begin, c, t.K, b.k, b.Ks);
      mm::Transpose(c, t.K, b.k, b.Ks, b.kT, kCs);
      for (size_t r = 0; r < t.readers; ++r) ForwardReadout(t, b, begin, c, hull, r, out);
    }
    for (size_t i = 0; i < c; ++i) ScaleRow(b.decays.tail[i], b.u + i * b.Vs, t.V);
    mm::MatMul<Order::kT>(t.K, t.V, c, t.k.at(begin, t.k_head), static_cast<size_t>(t.k.token_stride), b.u, b.Vs,
                          b.decays.gamma[c - 1], b.S, b.Vs);
  }
  mm::Transpose(t.K, t.V, b.S, b.Vs, b.edge, b.Ks);
  StoreMatrix(b.edge, b.Ks, t.V, t.K, final_state);
}

// ---- backward

struct BackwardBuffers {
  size_t Ks, Vs;
  Arena arena;
  Decays decays;
  float *q, *k, *kT, *v, *u, *uT;      // [c, Ks], [c, Ks], [K, c], [c, Vs], [c, Vs], [V, c]
  float *G, *P, *dW, *L;               // [c, Vs], [c, c] x 3
  float *dq, *dk, *du, *dv;            // [c, Ks], [c, Ks], [c, Vs], [c, Vs]
  float *dS, *dSt;                     // [V, Ks], [K, Vs]
  float *da, *d_gamma, *d_tail, *row;  // [c]
  float* states;                       // [chunks, V, Ks]: before each chunk
  BackwardBuffers(float* scratch, size_t K, size_t V)
      : Ks(mm::PadStride(K)),
        Vs(mm::PadStride(V)),
        arena{scratch, 0},
        decays(arena),
        q(arena.take(kC, Ks)),
        k(arena.take(kC, Ks)),
        kT(arena.take(Ks, kCs)),
        v(arena.take(kC, Vs)),
        u(arena.take(kC, Vs)),
        uT(arena.take(Vs, kCs)),
        G(arena.take(kC, Vs)),
        P(arena.take(kC, kCs)),
        dW(arena.take(kC, kCs)),
        L(arena.take(kC, kCs)),
        dq(arena.take(kC, Ks)),
        dk(arena.take(kC, Ks)),
        du(arena.take(kC, Vs)),
        dv(arena.take(kC, Vs)),
        dS(arena.take(Vs, Ks)),
        dSt(arena.take(Ks, Vs)),
        da(arena.take(1, kCs)),
        d_gamma(arena.take(1, kCs)),
        d_tail(arena.take(1, kCs)),
        row(arena.take(1, kCs)),
        states(arena.take(0, 0)) {}
};

void LoadChunk(const SsdTask& t, const BackwardBuffers& b, size_t begin, size_t c) {
  LoadDecays(t, begin, c, b.decays);
  LoadRows(t.k, t.k_head, begin, c, t.K, b.k, b.Ks);
  LoadRows(t.v, t.v_head, begin, c, t.V, b.v, b.Vs);
  for (size_t i = 0; i < RoundUp4(c); ++i) {
    mm::ScaleTo(i < c ? b.decays.dt[i] : 0.f, b.v + i * b.Vs, mm::PadLength(t.V), b.u + i * b.Vs);
  }
}

// The states before each chunk, computed again: the graph keeps none of them.
void RecomputeStates(const SsdTask& t, const BackwardBuffers& b) {
  const size_t size = t.V * b.Ks;
  LoadMatrix(t.initial_state, t.V, t.K, b.states, b.Ks);
  for (size_t begin = 0, i = 0; begin + kC < t.length; begin += kC, ++i) {
    LoadChunk(t, b, begin, kC);
    for (size_t j = 0; j < kC; ++j) ScaleRow(b.decays.tail[j], b.u + j * b.Vs, t.V);
    const float* S = b.states + i * size;
    float* next = b.states + (i + 1) * size;
    std::copy(S, S + size, next);
    mm::MatMul<Order::kT>(t.V, t.K, kC, b.u, b.Vs, b.k, b.Ks, b.decays.gamma[kC - 1], next, b.Ks);
  }
}

// Gradients through the state after the chunk, S' = gamma_end S + sum_j tail_j u_j k_j^T. Begins d_k and d_u; fills
// d_tail.
float StateBackward(const SsdTask& t, const BackwardBuffers& b, size_t c, const float* S) {
  mm::Transpose(t.V, t.K, b.dS, b.Ks, b.dSt, b.Vs);
  mm::MatMul(c, t.K, t.V, b.u, b.Vs, b.dS, b.Ks, 0, b.dk, b.Ks);
  mm::MatMul(c, t.V, t.K, b.k, b.Ks, b.dSt, b.Vs, 0, b.du, b.Vs);
  for (size_t j = 0; j < c; ++j) {
    ScaleRow(b.decays.tail[j], b.dk + j * b.Ks, t.K);
    ScaleRow(b.decays.tail[j], b.du + j * b.Vs, t.V);
    b.d_tail[j] = mm::Dot(b.dk + j * b.Ks, b.k + j * b.Ks, t.K);
  }
  float d_end = 0;
  for (size_t x = 0; x < t.V; ++x) d_end += mm::Dot(b.dS + x * b.Ks, S + x * b.Ks, t.K);
  return d_end * b.decays.gamma[c - 1];
}

// Rows from the last to the first: P = W * L, dW = dP * L, and with M = dP * P the sums da_m += sum_{i >= m, j < m}
// M[i, j], each share added once (a difference of totals would cancel).
void WeightsBackward(const BackwardBuffers& b, Hull hull) {
  const Floats d;
  std::fill(b.row, b.row + kC, 0.f);
  for (size_t i = hull.end; i-- > 0;) {
    float *p = b.P + i * kCs, *g = b.dW + i * kCs;
    const float* l = b.L + i * kCs;
    auto sum = hn::Zero(d);
    for (size_t j = 0; j < kC; j += hn::Lanes(d)) {
      auto crossing = hn::LoadU(d, b.row + j);
      if (i >= hull.begin) {
        const auto here = UpTo(d, j, i);
        const auto weight = hn::LoadU(d, l + j), dP = hn::IfThenElseZero(here, hn::LoadU(d, g + j));
        const auto P = hn::IfThenElseZero(here, hn::Mul(hn::LoadU(d, p + j), weight));
        hn::StoreU(P, d, p + j);
        hn::StoreU(hn::Mul(dP, weight), d, g + j);
        crossing = hn::MulAdd(dP, P, crossing);
        hn::StoreU(crossing, d, b.row + j);
      }
      if (i > j) sum = hn::Add(sum, hn::IfThenElseZero(UpTo(d, j, i - 1), crossing));
    }
    b.da[i] += hn::GetLane(hn::SumOfLanes(d, sum));
  }
}

// Gradients of one output head's readout.
void ReadoutBackward(const SsdTask& t, const BackwardBuffers& b, size_t begin, size_t c, Hull hull, size_t r,
                     const float* S, const SsdTaskGradients& grad, float beta_dS, double* d_D) {
  const size_t h0 = hull.begin, h1 = hull.end;
  for (size_t i = h0; i < h1; ++i) {
    float* G = b.G + i * b.Vs;
    mm::LoadRow(1, t.q.at(begin + i, t.q_head + r), t.K, b.q + i * b.Ks);
    if (Wanted(t, begin + i)) {
      mm::LoadRow(1, grad.d_o.at(begin + i, r), t.V, G);
    } else {
      std::fill(G, G + mm::PadLength(t.V), 0.f);
    }
    AddRow(t.D, G, t.V, b.dv + i * b.Vs);
    *d_D += mm::Dot(G, b.v + i * b.Vs, t.V);
  }
  mm::MatMulRange<Order::kPlain, Triangle::kLowerOut>(h0, h1, c, 0, t.K, b.q, b.Ks, b.kT, kCs, 0, b.P, kCs);
  mm::MatMulRange<Order::kPlain, Triangle::kLowerOut>(h0, h1, c, 0, t.V, b.G, b.Vs, b.uT, kCs, 0, b.dW, kCs);
  WeightsBackward(b, hull);
  mm::MatMulRange(h0, h1, t.K, 0, t.V, b.G, b.Vs, S, b.Ks, 0, b.dq, b.Ks);  // gamma * (G S)
  for (size_t i = h0; i < h1; ++i) {
    ScaleRow(b.decays.gamma[i], b.dq + i * b.Ks, t.K);
    b.d_gamma[i] += mm::Dot(b.dq + i * b.Ks, b.q + i * b.Ks, t.K);
  }
  mm::MatMulRange<Order::kPlain, Triangle::kLowerA>(h0, h1, t.K, 0, c, b.dW, kCs, b.k, b.Ks, 1, b.dq, b.Ks);
  for (size_t i = h0; i < h1; ++i) mm::StoreRow(1, b.dq + i * b.Ks, t.K, grad.d_q.at(begin + i, r));
  mm::MatMulRange<Order::kT, Triangle::kUpperA>(0, h1, t.K, h0, h1, b.dW, kCs, b.q, b.Ks, 1, b.dk, b.Ks);
  mm::MatMulRange<Order::kT, Triangle::kUpperA>(0, h1, t.V, h0, h1, b.P, kCs, b.G, b.Vs, 1, b.du, b.Vs);
  for (size_t i = h0; i < h1; ++i) ScaleRow(b.decays.gamma[i], b.G + i * b.Vs, t.V);
  mm::MatMulRange<Order::kT>(0, t.V, t.K, h0, h1, b.G, b.Vs, b.q, b.Ks, beta_dS, b.dS, b.Ks);
}

// The token's gradients from those of u and of the log decays.
void FinishChunk(const SsdTask& t, const BackwardBuffers& b, size_t begin, size_t c, float d_end,
                 const SsdTaskGradients& grad) {
  float after = 0;
  for (size_t i = c; i-- > 0;) {
    after += b.d_gamma[i];
    b.da[i] += after + d_end;
  }
  float before = 0;
  for (size_t i = 0; i < c; ++i) {
    b.da[i] += before;
    before += b.d_tail[i];
  }
  for (size_t i = 0; i < c; ++i) {
    const float x = b.decays.x[i];
    const float d_dt = mm::Dot(b.v + i * b.Vs, b.du + i * b.Vs, t.V) + t.A * b.da[i];
    const float d_x = d_dt / (1 + std::exp(-std::max(x, -88.f)));
    *grad.d_dt.at(begin + i, 0) = d_x;
    grad.d_head[0] += d_x;
    grad.d_head[1] += static_cast<double>(b.decays.dt[i]) * b.da[i];
    AddRow(b.decays.dt[i], b.du + i * b.Vs, t.V, b.dv + i * b.Vs);
    mm::StoreRow(1, b.dk + i * b.Ks, t.K, grad.d_k.at(begin + i, 0));
    mm::StoreRow(1, b.dv + i * b.Vs, t.V, grad.d_v.at(begin + i, 0));
  }
}

void BackwardChunk(const SsdTask& t, const BackwardBuffers& b, size_t begin, const float* S,
                   const SsdTaskGradients& grad) {
  const size_t c = std::min(kC, t.length - begin);
  LoadChunk(t, b, begin, c);
  const float d_end = StateBackward(t, b, c, S);
  std::fill(b.dv, b.dv + c * b.Vs, 0.f);
  std::fill(b.da, b.da + kC, 0.f);
  std::fill(b.d_gamma, b.d_gamma + kC, 0.f);
  float beta = b.decays.gamma[c - 1];
  const Hull hull = WantedHull(t.wanted, begin, c);
  if (hull.begin < hull.end) {
    mm::Transpose(c, t.K, b.k, b.Ks, b.kT, kCs);
    mm::Transpose(c, t.V, b.u, b.Vs, b.uT, kCs);
    for (size_t i = 0; i < c; ++i) NextDecayRow(i, b.decays.alpha[i], b.L + (i == 0 ? 0 : i - 1) * kCs, b.L + i * kCs);
    for (size_t r = 0; r < t.readers; ++r, beta = 1)
      ReadoutBackward(t, b, begin, c, hull, r, S, grad, beta, grad.d_head + 2);
  } else {
    for (size_t x = 0; x < t.V; ++x) ScaleRow(beta, b.dS + x * b.Ks, t.K);
  }
  FinishChunk(t, b, begin, c, d_end, grad);
}

void Backward(const SsdTask& t, const SsdTaskGradients& grad, float* scratch) {
  const BackwardBuffers b(scratch, t.K, t.V);
  LoadMatrix(grad.d_final_state, t.V, t.K, b.dS, b.Ks);
  if (t.length > 0) RecomputeStates(t, b);
  for (size_t i = (t.length + kC - 1) / kC; i-- > 0;) BackwardChunk(t, b, i * kC, b.states + i * t.V * b.Ks, grad);
  StoreMatrix(b.dS, b.Ks, t.V, t.K, grad.d_initial_state);
}

// ---- one token

// Rows x .. x + kRows of the state: S = decay S + u k^T and, in the same pass over them, S q.
template <size_t kRows>
void StepRows(const SsdTask& t, float decay, const float* u, const float* k, const float* q, float* S, float* dots) {
  const Floats d;
  const size_t lanes = hn::Lanes(d);
  mm::Vector sum[kRows];
  for (size_t r = 0; r < kRows; ++r) sum[r] = hn::Zero(d);
  size_t i = 0;
  for (; i + lanes <= t.K; i += lanes) {
    const auto kv = hn::LoadU(d, k + i), qv = hn::LoadU(d, q + i);
    for (size_t r = 0; r < kRows; ++r) {
      const auto s = hn::MulAdd(hn::Set(d, decay), hn::LoadU(d, S + r * t.K + i), hn::Mul(hn::Set(d, u[r]), kv));
      hn::StoreU(s, d, S + r * t.K + i);
      sum[r] = hn::MulAdd(s, qv, sum[r]);
    }
  }
  for (size_t r = 0; r < kRows; ++r) {
    dots[r] = hn::GetLane(hn::SumOfLanes(d, sum[r]));
    for (size_t j = i; j < t.K; ++j) {
      S[r * t.K + j] = decay * S[r * t.K + j] + u[r] * k[j];
      dots[r] += S[r * t.K + j] * q[j];
    }
  }
}

void Step(const SsdTask& t, float* state, const SsdRows<float>& o) {
  const float x = *t.dt_raw.at(0, 0) + t.dt_bias;
  const float dt = std::max(x, 0.f) + std::log1p(std::exp(-std::abs(x)));
  const float *k = t.k.at(0, t.k_head), *v = t.v.at(0, t.v_head);
  // The first reader's pass updates the state; the others' find it updated (decay 1, nothing written).
  for (size_t r = 0; r < t.readers; ++r) {
    const float decay = r == 0 ? std::exp(dt * t.A) : 1, write = r == 0 ? dt : 0;
    const float* q = t.q.at(0, t.q_head + r);
    float* out = o.at(0, r);
    size_t row = 0;
    for (; row + 4 <= t.V; row += 4) {
      const float u[4] = {write * v[row], write * v[row + 1], write * v[row + 2], write * v[row + 3]};
      StepRows<4>(t, decay, u, k, q, state + row * t.K, out + row);
    }
    for (; row < t.V; ++row) {
      const float u = write * v[row];
      StepRows<1>(t, decay, &u, k, q, state + row * t.K, out + row);
    }
    for (row = 0; row < t.V; ++row) out[row] += t.D * v[row];
  }
}

size_t ForwardScratch(size_t K, size_t V) { return ForwardBuffers(nullptr, K, V).arena.used; }

size_t BackwardScratch(size_t length, size_t K, size_t V) {
  const BackwardBuffers b(nullptr, K, V);
  return b.arena.used + ((length + kC - 1) / kC * V + 4) * b.Ks;  // 4: matrices are padded to a multiple of 4 rows
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace oryx::ops
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace oryx::ops {
HWY_EXPORT(Forward);
HWY_EXPORT(Backward);
HWY_EXPORT(Step);
HWY_EXPORT(ForwardScratch);
HWY_EXPORT(BackwardScratch);

size_t ssd_forward_scratch(size_t K, size_t V) { return HWY_DYNAMIC_DISPATCH(ForwardScratch)(K, V); }
size_t ssd_backward_scratch(size_t length, size_t K, size_t V) {
  return HWY_DYNAMIC_DISPATCH(BackwardScratch)(length, K, V);
}
void ssd_forward_kernel(const SsdTask& task, const SsdRows<float>& o, float* final_state, float* scratch) {
  HWY_DYNAMIC_DISPATCH(Forward)(task, o, final_state, scratch);
}
void ssd_backward_kernel(const SsdTask& task, const SsdTaskGradients& grad, float* scratch) {
  HWY_DYNAMIC_DISPATCH(Backward)(task, grad, scratch);
}
void ssd_step_kernel(const SsdTask& task, float* state, const SsdRows<float>& o) {
  HWY_DYNAMIC_DISPATCH(Step)(task, state, o);
}
}  // namespace oryx::ops
#endif
