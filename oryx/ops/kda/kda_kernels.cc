// Forward and backward of the chunked form (formulas at the head of kda_chunked.cc) in vectors, one sequence and head at a time, as
// gated_delta_kernels.cc does it: the state transposed, St [K, V]; N = -strictly lower(P_kk), so that the residual is z = v - (c * k) S0^T + N U with
// U = diag(b) z; q^ carries no scale. Rows of the wanted tokens span [lo, hi) of a chunk; everything of q stays within them.
//
// The tree of cuts ends at blocks of eight tokens. Within one, row i of P is had by walking from token i back: the row x_i * a_i * a_{i-1} .. meets
// k_{i-1}, k_{i-2}, .. on its way. That is a product of seven factors at most; all longer decays are exp of a sum.
#include <cmath>
#include <cstring>
#include <iterator>

#include "oryx/ops/kda/kda_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "oryx/ops/kda/kda_kernels.cc"
#include <hwy/foreach_target.h>
// After foreach_target.h:
#include "oryx/ops/gated_delta/delta_kernels-inl.h"

HWY_BEFORE_NAMESPACE();
namespace oryx::ops::kimi {
namespace HWY_NAMESPACE {

using namespace gated_delta::HWY_NAMESPACE;

constexpr size_t kBlock = 8;                    // tokens of a leaf of the tree
constexpr size_t kHalves[] = {32, 16, kBlock};  // half the blocks that are cut, level by level: kC / 2 and down
constexpr size_t kLevels = std::size(kHalves);

// f(begin, cut, end) for each block of a level that has tokens behind its cut, of L tokens.
template <class F>
HWY_INLINE void ForEachCut(size_t level, size_t L, const F& f) {
  const size_t h = kHalves[level];
  for (size_t begin = 0; begin + h < L; begin += 2 * h) f(begin, begin + h, std::min(begin + 2 * h, L));
}

// to = x * y; to may be one of them.
HWY_INLINE void Multiply(const float* x, const float* y, size_t n, float* to) {
  const Floats d;
  for (size_t j = 0; j < n; j += kLanes) hn::StoreU(hn::Mul(hn::LoadU(d, x + j), hn::LoadU(d, y + j)), d, to + j);
}

// to_i = exp of the sum of g over [from, i], for each i of [from, to).
HWY_INLINE void DecaysFrom(const float* g, size_t ld, size_t Kp, size_t from, size_t to, float* out) {
  const Floats d;
  for (size_t j = 0; j < Kp; j += kLanes) {
    Vector sum = hn::Zero(d);
    for (size_t i = from; i < to; ++i) {
      sum = hn::Add(sum, hn::LoadU(d, g + i * ld + j));
      hn::StoreU(ExpOf(sum), d, out + i * ld + j);
    }
  }
}

// The same of the sum over (i, to).
HWY_INLINE void DecaysTo(const float* g, size_t ld, size_t Kp, size_t from, size_t to, float* out) {
  const Floats d;
  for (size_t j = 0; j < Kp; j += kLanes) {
    Vector sum = hn::Zero(d);
    for (size_t i = to; i-- > from;) {
      hn::StoreU(ExpOf(sum), d, out + i * ld + j);
      sum = hn::Add(sum, hn::LoadU(d, g + i * ld + j));
    }
  }
}

// What of a chunk depends on the keys and gates alone. [C, K] unless said otherwise.
struct Keys {
  float *k, *g, *a;               // k^, log decays, decays
  float *c, *end, *kc, *k_end;    // decay from the chunk's start, to its end; -c * k^, end * k^
  float *cuts[kLevels];           // decay from the cut (tokens behind it) or to the cut (tokens before it)
  float *kd[kLevels];             // cuts * k^
  float *kdt[kLevels];            // its transpose, [K, C]
  float *N, *b, *r, *last, *row;  // [C, C]; [C]; [C], factors of normalisation; [K], decay over the chunk; [K], one row to work with
  size_t L, Lp;                   // tokens, and rounded up to whole vectors

  Keys(Arena& m, const Sizes& z) {
    for (float** x : {&k, &g, &a, &c, &end, &kc, &k_end}) *x = m.take(kC * z.ldk);
    for (size_t l = 0; l < kLevels; ++l) cuts[l] = m.take(kC * z.ldk), kd[l] = m.take(kC * z.ldk), kdt[l] = m.take(z.Kp * kLdc);
    N = m.take(kC * kLdc);
    b = m.take(kC), r = m.take(kC), last = m.take(z.Kp), row = m.take(z.Kp);
  }
};

// Rows [lo, hi) of P (times sign): x_i . (G_ij * k_j) at j < i, at j = i too unless strict, zero elsewhere.
HWY_NOINLINE void Products(const Sizes& z, const Keys& s, const float* x, size_t lo, size_t hi, bool strict, float sign, float* xd, float* P) {
  ZeroRows(P, kLdc, lo, hi);
  for (size_t l = 0; l < kLevels; ++l) {
    ForEachCut(l, s.L, [&](size_t begin, size_t cut, size_t end) HWY_ATTR {
      const size_t from = std::max(cut, lo), to = std::min(end, hi);
      for (size_t i = from; i < to; ++i) {
        Multiply(x + i * z.ldk, s.cuts[l] + i * z.ldk, z.Kp, xd + i * z.ldk);
        if (sign != 1) ScaleTo(sign, xd + i * z.ldk, z.Kp, xd + i * z.ldk);
      }
      // Whole vectors: the narrowest level may write a leaf's columns beyond the cut, which the leaf itself then writes.
      if (from < to) MatMulRange(from, to, cut - begin, 0, z.K, xd, z.ldk, s.kdt[l] + begin, kLdc, 0, P + begin, kLdc);
    });
  }
  const Floats d;
  for (size_t i = lo; i < hi; ++i) {
    float* Pi = P + i * kLdc;
    const size_t first = i / kBlock * kBlock;
    std::memset(Pi + i, 0, (first + kBlock - i) * sizeof(float));
    ScaleTo(sign, x + i * z.ldk, z.Kp, s.row);
    if (!strict) Pi[i] = Dot(s.row, s.k + i * z.ldk, z.Kp);
    for (size_t j = i; j-- > first;) {
      const float *a = s.a + (j + 1) * z.ldk, *k = s.k + j * z.ldk;
      Vector sum = hn::Zero(d);
      for (size_t m = 0; m < z.Kp; m += kLanes) {
        const Vector w = hn::Mul(hn::LoadU(d, s.row + m), hn::LoadU(d, a + m));
        hn::StoreU(w, d, s.row + m);
        sum = hn::MulAdd(w, hn::LoadU(d, k + m), sum);
      }
      Pi[j] = hn::GetLane(hn::SumOfLanes(d, sum));
    }
  }
}

HWY_NOINLINE void LoadKeys(const KernelArgs& a, const Sizes& z, int64_t begin, size_t L, int64_t head, float* xd, Keys& s) {
  s.L = L;
  s.Lp = PadLength(L);
  const int64_t b = begin / a.T, t0 = begin % a.T;
  const float* from = a.k.data + b * a.k.batch + t0 * a.k.token + head / (a.Hs / a.Hk) * a.k.head;
  for (size_t i = 0; i < L; ++i) {
    const int64_t at = (begin + static_cast<int64_t>(i)) * a.Hs + head;
    s.r[i] = LoadUnitRow(from + i * a.k.token, z.K, a.l2_eps, s.k + i * z.ldk);
    s.b[i] = a.beta[at];
    LoadRow(1, a.g + at * a.K, z.K, s.g + i * z.ldk);
  }
  const Floats d;
  for (size_t i = 0; i < L * z.ldk; i += z.ldk) {
    for (size_t j = i; j < i + z.Kp; j += kLanes) hn::StoreU(ExpOf(hn::LoadU(d, s.g + j)), d, s.a + j);
  }
  DecaysFrom(s.g, z.ldk, z.Kp, 0, L, s.c);
  DecaysTo(s.g, z.ldk, z.Kp, 0, L, s.end);
  std::memcpy(s.last, s.c + (L - 1) * z.ldk, z.Kp * sizeof(float));
  for (size_t i = 0; i < L; ++i) {
    Multiply(s.c + i * z.ldk, s.k + i * z.ldk, z.Kp, s.kc + i * z.ldk);
    ScaleTo(-1, s.kc + i * z.ldk, z.Kp, s.kc + i * z.ldk);
    Multiply(s.end + i * z.ldk, s.k + i * z.ldk, z.Kp, s.k_end + i * z.ldk);
  }
  for (size_t l = 0; l < kLevels; ++l) {
    ForEachCut(l, L, [&](size_t first, size_t cut, size_t end) HWY_ATTR {
      DecaysTo(s.g, z.ldk, z.Kp, first, cut, s.cuts[l]);
      DecaysFrom(s.g, z.ldk, z.Kp, cut, end, s.cuts[l]);
      for (size_t i = first; i < end; ++i) Multiply(s.cuts[l] + i * z.ldk, s.k + i * z.ldk, z.Kp, s.kd[l] + i * z.ldk);
      Transpose(cut - first, z.Kp, s.kd[l] + first * z.ldk, z.ldk, s.kdt[l] + first, kLdc);
    });
  }
  Products(z, s, s.k, 0, L, /*strict=*/true, -1, xd, s.N);
}

// What of a chunk depends on one query head: rows [lo, hi).
struct Queries {
  float *q, *qc, *P, *r;  // q^ [C, K], c * q^, P_qk [C, C], factors of normalisation
  float* d_o;             // [C, V] scale * do, zero where not wanted (backward only)

  Queries(Arena& m, const Sizes& z, bool backward)
      : q(m.take(kC * z.ldk)), qc(m.take(kC * z.ldk)), P(m.take(kC * kLdc)), r(m.take(kC)), d_o(backward ? m.take(kC * z.ldv) : nullptr) {}
};

HWY_NOINLINE void LoadQueries(const KernelArgs& a, const Sizes& z, const Keys& s, int64_t begin, size_t lo, size_t hi, int64_t out_head, float* xd,
                              Queries& x) {
  const int64_t b = begin / a.T, t0 = begin % a.T;
  const float* from = a.q.data + b * a.q.batch + t0 * a.q.token + out_head / (a.Hs * a.groups / a.Hq) * a.q.head;
  for (size_t i = lo; i < hi; ++i) {
    x.r[i] = LoadUnitRow(from + i * a.q.token, z.K, a.l2_eps, x.q + i * z.ldk);
    Multiply(s.c + i * z.ldk, x.q + i * z.ldk, z.Kp, x.qc + i * z.ldk);
  }
  Products(z, s, x.q, lo, hi, /*strict=*/false, 1, xd, x.P);
}

// Each row of St times its channel's decay.
HWY_INLINE void DecayState(const Sizes& z, const float* last, float* St) {
  for (size_t i = 0; i < z.K; ++i) ScaleTo(last[i], St + i * z.ldv, z.Vp, St + i * z.ldv);
}

// ---------------------------------------------------------------- forward

struct ForwardScratch {
  Keys s;
  Queries x;
  float *St, *tmp, *xd, *z, *u, *o;
  ForwardScratch(Arena& m, const Sizes& q)
      : s(m, q),
        x(m, q, false),
        St(m.take(q.Kp * q.ldv)),
        tmp(m.take(q.Vp * q.ldk)),
        xd(m.take(kC * q.ldk)),
        z(m.take(kC * q.ldv)),
        u(m.take(kC * q.ldv)),
        o(m.take(kC * q.ldv)) {}
};

HWY_NOINLINE void Readout(const KernelArgs& a, const Sizes& z, ForwardScratch& w, int64_t begin, int64_t head) {
  size_t lo, hi;
  WantedRows(a, begin, w.s.L, &lo, &hi);
  for (int64_t r = 0; r < a.groups; ++r) {
    const int64_t out_head = head * a.groups + r;
    if (lo < hi) {
      LoadQueries(a, z, w.s, begin, lo, hi, out_head, w.xd, w.x);
      MatMulRange(lo, hi, z.Vp, 0, z.K, w.x.qc, z.ldk, w.St, z.ldv, 0, w.o, z.ldv);
      MatMulRange<Order::kPlain, Triangle::kLowerA>(lo, hi, z.Vp, 0, w.s.L, w.x.P, kLdc, w.u, z.ldv, 1, w.o, z.ldv);
    }
    StoreOutputs(a, z, begin, w.s.L, out_head, w.o);
  }
}

void ForwardHead(const KernelArgs& a, const KernelSequence& seq, int64_t head, float* scratch) {
  const Sizes z(a);
  Arena arena{scratch};
  ForwardScratch w(arena, z);
  const int64_t state_at = (seq.index * a.Hs + head) * a.V * a.K;
  LoadState(z, a.initial_state == nullptr ? nullptr : a.initial_state + state_at, w.tmp, w.St);
  int64_t chunk = seq.first_chunk;
  for (int64_t begin = seq.begin; begin < seq.end; begin += kC, ++chunk) {
    const size_t L = std::min<int64_t>(kC, seq.end - begin);
    if (a.chunk_states != nullptr) {
      float* to = a.chunk_states + (chunk * a.Hs + head) * a.K * a.V;
      for (size_t i = 0; i < z.K; ++i) StoreRow(1, w.St + i * z.ldv, z.V, to + i * z.V);
    }
    LoadKeys(a, z, begin, L, head, w.xd, w.s);
    const float* v = a.v.data + begin / a.T * a.v.batch + begin % a.T * a.v.token + head / (a.Hs / a.Hv) * a.v.head;
    for (size_t i = 0; i < L; ++i) LoadRow(1, v + i * a.v.token, z.V, w.z + i * z.ldv);
    MatMul(L, z.Vp, z.K, w.s.kc, z.ldk, w.St, z.ldv, 1, w.z, z.ldv);
    Solve<false>(L, z.Vp, w.s.N, w.s.b, w.z, w.u, z.ldv);
    if (a.residual != nullptr) {
      for (size_t i = 0; i < L; ++i) StoreRow(1, w.z + i * z.ldv, z.V, a.residual + ((begin + i) * a.Hs + head) * a.V);
    }
    Readout(a, z, w, begin, head);
    DecayState(z, w.s.last, w.St);
    MatMul<Order::kT>(z.K, z.Vp, L, w.s.k_end, z.ldk, w.u, z.ldv, 1, w.St, z.ldv);
  }
  StoreState(z, w.St, w.tmp, a.final_state + state_at);
}

// ---------------------------------------------------------------- backward

struct BackwardScratch {
  Keys s;
  float *St, *S, *dSt, *dS;            // [K, V], [V, K]
  float *z, *u, *y, *w, *ut;           // [C, V]; ut [V, C]
  float *dk, *dq, *dx, *dg, *xd, *xt;  // [C, K]; dx: of keys in their place as rows of P; xd, xt to work with
  float *from_start, *to_end;          // [C, K]: the gradients of the exponents of c and end
  float *X, *whole;                    // [C, C]; [K], of the exponent of c_C before S0
  BackwardScratch(Arena& m, const Sizes& q) : s(m, q) {
    for (float** x : {&St, &dSt}) *x = m.take(q.Kp * q.ldv);
    for (float** x : {&S, &dS}) *x = m.take(q.Vp * q.ldk);
    for (float** x : {&z, &u, &y, &w}) *x = m.take(kC * q.ldv);
    for (float** x : {&dk, &dq, &dx, &dg, &xd, &xt, &from_start, &to_end}) *x = m.take(kC * q.ldk);
    ut = m.take(q.Vp * kLdc), X = m.take(kC * kLdc), whole = m.take(q.Kp);
  }
};

// St, z, u of the chunk, and what follows from them and dSt by transposition.
HWY_NOINLINE void LoadSaved(const KernelArgs& a, const Sizes& z, BackwardScratch& w, int64_t chunk, int64_t begin, int64_t head) {
  const float* from = a.chunk_states + (chunk * a.Hs + head) * a.K * a.V;
  for (size_t i = 0; i < z.K; ++i) LoadRow(1, from + i * z.V, z.V, w.St + i * z.ldv);
  ZeroRows(w.St, z.ldv, z.K, z.Kp);
  for (size_t i = 0; i < w.s.L; ++i) {
    LoadRow(1, a.residual + ((begin + i) * a.Hs + head) * a.V, z.V, w.z + i * z.ldv);
    ScaleTo(w.s.b[i], w.z + i * z.ldv, z.Vp, w.u + i * z.ldv);
  }
  ZeroRows(w.u, z.ldv, w.s.L, w.s.Lp);
  Transpose(z.Kp, z.Vp, w.St, z.ldv, w.S, z.ldk);
  Transpose(z.Kp, z.Vp, w.dSt, z.ldv, w.dS, z.ldk);
  Transpose(w.s.Lp, z.Vp, w.u, z.ldv, w.ut, kLdc);
  for (size_t i = 0; i < z.Kp; ++i) w.whole[i] = i < z.K ? w.s.last[i] * Dot(w.St + i * z.ldv, w.dSt + i * z.ldv, z.Vp) : 0;
}

// Of one leaf's rows [lo, hi), beginning at token `first`: adds to dx, dk, dg. The walk of Products backwards: with G the gradient of the row that met
// k_j, that of a_j * it is a_j * G, and its part of dg_j is the row times G.
HWY_INLINE void LeafBackward(const Sizes& z, const Keys& s, const float* x, size_t first, size_t lo, size_t hi, bool strict, const float* dP,
                             BackwardScratch& w, float* dx) {
  const Floats d;
  for (size_t m = 0; m < z.Kp; m += kLanes) {
    const auto at = [&](const float* p, size_t i) HWY_ATTR { return hn::LoadU(d, p + i * z.ldk + m); };
    const auto add = [&](float* p, size_t i, Vector v) HWY_ATTR { hn::StoreU(hn::Add(at(p, i), v), d, p + i * z.ldk + m); };
    for (size_t i = lo; i < hi; ++i) {
      Vector met[kBlock];  // the row as it meets k_j
      met[i - first] = at(x, i);
      for (size_t j = i; j-- > first;) met[j - first] = hn::Mul(met[j + 1 - first], at(s.a, j + 1));
      Vector G = hn::Zero(d);
      for (size_t j = first; j < i + !strict; ++j) {
        const Vector p = hn::Set(d, dP[i * kLdc + j]);
        add(w.dk, j, hn::Mul(p, met[j - first]));
        G = hn::MulAdd(p, at(s.k, j), G);
        if (j == i) break;
        add(w.dg, j + 1, hn::Mul(met[j - first], G));
        G = hn::Mul(G, at(s.a, j + 1));
      }
      add(dx, i, G);
    }
  }
}

// Rows [lo, hi) of dP, of which only j < i (and j = i unless strict) is read, added to dx, dk and dg.
HWY_NOINLINE void ProductsBackward(const Sizes& z, const float* x, size_t lo, size_t hi, bool strict, const float* dP, BackwardScratch& w, float* dx) {
  const Floats d;
  const Keys& s = w.s;
  const size_t ld = z.ldk;
  for (size_t l = 0; l < kLevels; ++l) {
    const float* cuts = s.cuts[l];
    ForEachCut(l, s.L, [&](size_t begin, size_t cut, size_t end) HWY_ATTR {
      const size_t from = std::max(cut, lo), to = std::min(end, hi);
      if (from >= to) return;
      for (size_t i = from; i < to; ++i) Multiply(x + i * ld, cuts + i * ld, z.Kp, w.xd + i * ld);
      MatMulRange(from, to, z.Kp, begin, cut, dP, kLdc, s.kd[l], ld, 0, w.xt, ld);
      MatMulRange<Order::kT>(begin, cut, z.Kp, from, to, dP, kLdc, w.xd, ld, 0, w.xt, ld);
      // An exponent's gradient is the factor times the factor's own; token l's g stands in those of i >= l behind the cut, of j < l before it.
      for (size_t m = 0; m < z.Kp; m += kLanes) {
        Vector sum = hn::Zero(d);
        for (size_t i = to; i-- > cut;) {
          const size_t at = i * ld + m;
          if (i >= from) {
            const Vector g = hn::Mul(hn::LoadU(d, cuts + at), hn::LoadU(d, w.xt + at));
            hn::StoreU(hn::Add(hn::LoadU(d, dx + at), g), d, dx + at);
            sum = hn::MulAdd(hn::LoadU(d, x + at), g, sum);
          }
          hn::StoreU(hn::Add(hn::LoadU(d, w.dg + at), sum), d, w.dg + at);
        }
        sum = hn::Zero(d);
        for (size_t j = begin; j < cut; ++j) {
          const size_t at = j * ld + m;
          hn::StoreU(hn::Add(hn::LoadU(d, w.dg + at), sum), d, w.dg + at);
          const Vector g = hn::Mul(hn::LoadU(d, cuts + at), hn::LoadU(d, w.xt + at));
          hn::StoreU(hn::Add(hn::LoadU(d, w.dk + at), g), d, w.dk + at);
          sum = hn::MulAdd(hn::LoadU(d, s.k + at), g, sum);
        }
      }
    });
  }
  for (size_t first = lo / kBlock * kBlock; first < hi; first += kBlock) {
    LeafBackward(z, s, x, first, std::max(first, lo), std::min(first + kBlock, hi), strict, dP, w, dx);
  }
}

// The part of dk, dg, from_start and to_end that comes through the keys' side.
HWY_NOINLINE void KeyGradient(const Sizes& z, BackwardScratch& w) {
  const Floats d;
  const Keys& s = w.s;
  MatMul(s.L, z.Kp, z.V, w.w, z.ldv, w.S, z.ldk, 0, w.xd, z.ldk);
  MatMul(s.L, z.Kp, z.V, w.u, z.ldv, w.dS, z.ldk, 0, w.xt, z.ldk);
  for (size_t i = 0; i < s.L; ++i) {
    for (size_t at = i * z.ldk; at < i * z.ldk + z.Kp; at += kLanes) {
      const Vector k = hn::LoadU(d, s.k + at);
      const Vector past = hn::Neg(hn::Mul(hn::LoadU(d, s.c + at), hn::LoadU(d, w.xd + at))),
                   later = hn::Mul(hn::LoadU(d, s.end + at), hn::LoadU(d, w.xt + at));
      hn::StoreU(hn::Mul(k, past), d, w.from_start + at);
      hn::StoreU(hn::Mul(k, later), d, w.to_end + at);
      hn::StoreU(hn::Add(past, later), d, w.dk + at);
    }
  }
  ZeroRows(w.dg, z.ldk, 0, s.L);
  ZeroRows(w.dx, z.ldk, 0, s.L);
  MatMul<Order::kPlain, Triangle::kLowerOut>(s.L, s.Lp, z.V, w.w, z.ldv, w.ut, kLdc, 0, w.X, kLdc);
  for (size_t i = 0; i < s.L; ++i) ScaleTo(-1, w.X + i * kLdc, i, w.X + i * kLdc);
  ProductsBackward(z, s.k, 0, s.L, /*strict=*/true, w.X, w, w.dx);
  for (size_t i = 0; i < s.L; ++i) {
    for (size_t at = i * z.ldk; at < i * z.ldk + z.Kp; at += kLanes) hn::StoreU(hn::Add(hn::LoadU(d, w.dk + at), hn::LoadU(d, w.dx + at)), d, w.dk + at);
  }
}

// Through one query head: dq (written out), and its part of dk, dSt, dg, from_start.
HWY_NOINLINE void QueryGradient(const KernelArgs& a, const Sizes& z, BackwardScratch& w, const Queries& x, int64_t begin, size_t lo, size_t hi,
                                int64_t out_head, float* d_q) {
  const Floats d;
  const Keys& s = w.s;
  if (lo < hi) {
    MatMulRange<Order::kPlain, Triangle::kLowerOut>(lo, hi, s.Lp, 0, z.V, x.d_o, z.ldv, w.ut, kLdc, 0, w.X, kLdc);
    MatMulRange(lo, hi, z.Kp, 0, z.V, x.d_o, z.ldv, w.S, z.ldk, 0, w.dq, z.ldk);
    for (size_t i = lo; i < hi; ++i) {
      for (size_t at = i * z.ldk; at < i * z.ldk + z.Kp; at += kLanes) {
        const Vector g = hn::Mul(hn::LoadU(d, s.c + at), hn::LoadU(d, w.dq + at));
        hn::StoreU(g, d, w.dq + at);
        hn::StoreU(hn::MulAdd(hn::LoadU(d, x.q + at), g, hn::LoadU(d, w.from_start + at)), d, w.from_start + at);
      }
    }
    ProductsBackward(z, x.q, lo, hi, /*strict=*/false, w.X, w, w.dq);
    MatMulRange<Order::kT>(0, z.K, z.Vp, lo, hi, x.qc, z.ldk, x.d_o, z.ldv, 1, w.dSt, z.ldv);
  }
  const int64_t Ho = a.Hs * a.groups;
  for (size_t i = 0; i < s.L; ++i) {
    float* to = d_q + ((begin + static_cast<int64_t>(i)) * Ho + out_head) * a.K;
    if (i < lo || i >= hi) {
      std::memset(to, 0, z.K * sizeof(float));
      continue;
    }
    UnitRowBackward(x.q + i * z.ldk, x.r[i], z.Kp, w.dq + i * z.ldk);
    StoreRow(1, w.dq + i * z.ldk, z.K, to);
  }
}

// dg_l += whole + sum_{i >= l} from_start_i + sum_{j < l} to_end_j: only sums, so that small terms are not lost in differences of large ones.
HWY_NOINLINE void DecayGradient(const Sizes& z, BackwardScratch& w) {
  const Floats d;
  for (size_t m = 0; m < z.Kp; m += kLanes) {
    Vector start = hn::LoadU(d, w.whole + m), end = hn::Zero(d);
    for (size_t i = w.s.L; i-- > 0;) {
      start = hn::Add(start, hn::LoadU(d, w.from_start + i * z.ldk + m));
      hn::StoreU(hn::Add(start, hn::LoadU(d, w.dg + i * z.ldk + m)), d, w.dg + i * z.ldk + m);
    }
    for (size_t i = 0; i < w.s.L; ++i) {
      hn::StoreU(hn::Add(end, hn::LoadU(d, w.dg + i * z.ldk + m)), d, w.dg + i * z.ldk + m);
      end = hn::Add(end, hn::LoadU(d, w.to_end + i * z.ldk + m));
    }
  }
}

void BackwardHead(const KernelArgs& a, const KernelGradients& d, const KernelSequence& seq, int64_t head, float* scratch) {
  const Sizes z(a);
  Arena arena{scratch};
  BackwardScratch w(arena, z);
  Keys& s = w.s;
  const int64_t state_at = (seq.index * a.Hs + head) * a.V * a.K;
  LoadState(z, d.d_final + state_at, w.S, w.dSt);
  const int64_t chunks = (seq.end - seq.begin + static_cast<int64_t>(kC) - 1) / static_cast<int64_t>(kC);
  for (int64_t m = chunks; m-- > 0;) {
    const int64_t begin = seq.begin + m * static_cast<int64_t>(kC);
    const size_t L = std::min<int64_t>(kC, seq.end - begin);
    size_t lo, hi;
    WantedRows(a, begin, L, &lo, &hi);
    LoadKeys(a, z, begin, L, head, w.xd, s);
    LoadSaved(a, z, w, seq.first_chunk + m, begin, head);

    // dU into y, then the residuals' gradients y and w = diag(b) y = dv
    MatMul(L, z.Vp, z.K, s.k_end, z.ldk, w.dSt, z.ldv, 0, w.y, z.ldv);
    Arena group_arena = arena;
    for (int64_t r = 0; r < a.groups; ++r) {
      Queries x(group_arena, z, true);
      if (lo == hi) continue;
      LoadQueries(a, z, s, begin, lo, hi, head * a.groups + r, w.xd, x);
      LoadUpstream(a, z, d.d_o, begin, lo, hi, head * a.groups + r, x.d_o);
      MatMulRange<Order::kT, Triangle::kUpperA>(0, hi, z.Vp, lo, hi, x.P, kLdc, x.d_o, z.ldv, 1, w.y, z.ldv);
    }
    Solve<true>(L, z.Vp, s.N, s.b, w.y, w.w, z.ldv);

    KeyGradient(z, w);
    DecayState(z, s.last, w.dSt);
    MatMul<Order::kT>(z.K, z.Vp, L, s.kc, z.ldk, w.w, z.ldv, 1, w.dSt, z.ldv);
    group_arena = arena;
    for (int64_t r = 0; r < a.groups; ++r) {
      const Queries x(group_arena, z, true);
      QueryGradient(a, z, w, x, begin, lo, hi, head * a.groups + r, d.q);
    }
    DecayGradient(z, w);
    for (size_t i = 0; i < L; ++i) {
      const int64_t at = (begin + static_cast<int64_t>(i)) * a.Hs + head;
      UnitRowBackward(s.k + i * z.ldk, s.r[i], z.Kp, w.dk + i * z.ldk);
      StoreRow(1, w.dk + i * z.ldk, z.K, d.k + at * a.K);
      StoreRow(1, w.w + i * z.ldv, z.V, d.v + at * a.V);
      StoreRow(1, w.dg + i * z.ldk, z.K, d.g + at * a.K);
      d.beta[at] = Dot(w.y + i * z.ldv, w.z + i * z.ldv, z.Vp);
    }
  }
  StoreState(z, w.dSt, w.S, d.state + state_at);
}

size_t ScratchFloats(const KernelArgs& a, bool backward) {
  const Sizes z(a);
  Arena count{nullptr};
  if (!backward) {
    ForwardScratch w(count, z);
  } else {
    BackwardScratch w(count, z);
    for (int64_t r = 0; r < a.groups; ++r) Queries x(count, z, true);
  }
  return count.used;
}

}  // namespace HWY_NAMESPACE
}  // namespace oryx::ops::kimi
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace oryx::ops::kimi {

HWY_EXPORT(ForwardHead);
HWY_EXPORT(BackwardHead);
HWY_EXPORT(ScratchFloats);

size_t scratch_floats(const KernelArgs& a, bool backward) { return HWY_DYNAMIC_DISPATCH(ScratchFloats)(a, backward); }

void forward_head(const KernelArgs& a, const KernelSequence& s, int64_t head, float* scratch) { HWY_DYNAMIC_DISPATCH(ForwardHead)(a, s, head, scratch); }

void backward_head(const KernelArgs& a, const KernelGradients& d, const KernelSequence& s, int64_t head, float* scratch) {
  HWY_DYNAMIC_DISPATCH(BackwardHead)(a, d, s, head, scratch);
}

}  // namespace oryx::ops::kimi
#endif
