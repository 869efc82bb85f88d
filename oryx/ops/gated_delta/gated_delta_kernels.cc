// Forward and backward of the chunked form (formulas at the head of gated_delta_chunked.cc), one sequence and head at a
// time, all of a chunk's matrices in the L2 cache. Letters as there; what differs:
//
//   the state is kept transposed, St [K, V]: then k S0^T = k St, and U^T k of the update is k^T U, need no
//   transposition N = -strictly lower(G * k k^T), so that the residual is z = v - diag(c) k S0^T + N U with U = diag(b)
//   z q^ carries no scale: o is scaled when it is written, do when it is read
//
// Rows of the wanted tokens span [lo, hi) of a chunk; everything of q stays within them.
#include "oryx/ops/gated_delta/gated_delta_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "oryx/ops/gated_delta/gated_delta_kernels.cc"
#include <hwy/foreach_target.h>
// After foreach_target.h:
#include "oryx/ops/gated_delta/delta_kernels-inl.h"

HWY_BEFORE_NAMESPACE();
namespace oryx::ops::gated_delta {
namespace HWY_NAMESPACE {

// to = (G * x) at columns j < count, zero from there to `columns`. Both may hold anything at or beyond count.
HWY_INLINE void MaskedProduct(const float* G, const float* x, size_t count, size_t columns, float sign, float* to) {
  const Floats d;
  const Vector s = hn::Set(d, sign);
  for (size_t j = 0; j < columns; j += kLanes) {
    const auto mask = hn::FirstN(d, j < count ? count - j : 0);
    const Vector y = hn::Mul(hn::Mul(s, hn::LoadU(d, G + j)), hn::LoadU(d, x + j));
    hn::StoreU(hn::IfThenElseZero(mask, y), d, to + j);
  }
}

// sum += x * y at columns j < count.
HWY_INLINE void AddMaskedProduct(const float* x, const float* y, size_t count, float* sum) {
  const Floats d;
  for (size_t j = 0; j < count; j += kLanes) {
    const Vector p = hn::Mul(hn::LoadU(d, x + j), hn::LoadU(d, y + j));
    hn::StoreU(hn::Add(hn::LoadU(d, sum + j), hn::IfThenElseZero(hn::FirstN(d, count - j), p)), d, sum + j);
  }
}

// What of a chunk depends on the keys and gates alone.
struct Keys {
  float *k, *kt, *kc, *k_end;  // k^ [C, K], its transpose, -diag(c) k^, diag(G_C) k^
  float *G, *N;                // [C, C]
  float *b, *c, *r, *row;      // [C]; r the factors of normalisation, row one row to work with
  const float* end;            // last row of G
  size_t L, Lp;                // tokens, and rounded up to whole vectors
  float last;                  // decay over the chunk

  Keys(Arena& m, const Sizes& z)
      : k(m.take(kC * z.ldk)),
        kt(m.take(z.Kp * kLdc)),
        kc(m.take(kC * z.ldk)),
        k_end(m.take(kC * z.ldk)),
        G(m.take(kC * kLdc)),
        N(m.take(kC * kLdc)),
        b(m.take(kC)),
        c(m.take(kC)),
        r(m.take(kC)),
        row(m.take(kC)) {}
};

// G, c. Sums over segments grow row by row: row i adds g_i to every sum that began before it.
HWY_NOINLINE void Decays(const KernelArgs& a, int64_t begin, int64_t head, Keys& s) {
  const Floats d;
  const float minus_infinity = -HUGE_VALF;
  float from_start = 0;
  for (size_t j = 0; j < kC; ++j) s.row[j] = minus_infinity, s.c[j] = 0;
  for (size_t i = 0; i < s.L; ++i) {
    const int64_t at = (begin + static_cast<int64_t>(i)) * a.Hs + head;
    const float g = a.g[at];
    s.b[i] = a.beta[at];
    from_start += g;
    s.c[i] = from_start;
    const Vector vg = hn::Set(d, g);
    float* Gi = s.G + i * kLdc;
    for (size_t j = 0; j < s.Lp; j += kLanes) {
      if (j > i) {
        hn::StoreU(hn::Zero(d), d, Gi + j);
        continue;
      }
      const Vector sum = hn::Add(hn::LoadU(d, s.row + j), vg);
      hn::StoreU(sum, d, s.row + j);
      hn::StoreU(hn::IfThenElseZero(hn::FirstN(d, i + 1 - j), ExpOf(sum)), d, Gi + j);
    }
    s.row[i] = 0;
    Gi[i] = 1;
  }
  for (size_t j = 0; j < s.Lp; j += kLanes) hn::StoreU(ExpOf(hn::LoadU(d, s.c + j)), d, s.c + j);
  s.end = s.G + (s.L - 1) * kLdc;
  s.last = s.c[s.L - 1];
}

HWY_NOINLINE void LoadKeys(const KernelArgs& a, const Sizes& z, int64_t begin, size_t L, int64_t head, Keys& s) {
  s.L = L;
  s.Lp = PadLength(L);
  const int64_t b = begin / a.T, t0 = begin % a.T;
  const float* from = a.k.data + b * a.k.batch + t0 * a.k.token + head / (a.Hs / a.Hk) * a.k.head;
  for (size_t i = 0; i < L; ++i) s.r[i] = LoadUnitRow(from + i * a.k.token, z.K, a.l2_eps, s.k + i * z.ldk);
  ZeroRows(s.k, z.ldk, L, s.Lp);
  Transpose(s.Lp, z.Kp, s.k, z.ldk, s.kt, kLdc);
  Decays(a, begin, head, s);
  for (size_t i = 0; i < L; ++i) {
    ScaleTo(-s.c[i], s.k + i * z.ldk, z.Kp, s.kc + i * z.ldk);
    ScaleTo(s.end[i], s.k + i * z.ldk, z.Kp, s.k_end + i * z.ldk);
  }
  MatMul<Order::kPlain, Triangle::kLowerOut>(L, s.Lp, z.K, s.k, z.ldk, s.kt, kLdc, 0, s.N, kLdc);
  for (size_t i = 0; i < L; ++i) MaskedProduct(s.G + i * kLdc, s.N + i * kLdc, i, s.Lp, -1, s.N + i * kLdc);
}

// What of a chunk depends on one query head: rows [lo, hi).
struct Queries {
  float *q, *qc, *P, *r;  // q^ [C, K], diag(c) q^, G * q^ k^T [C, C], factors of normalisation
  float* d_o;             // [C, V] scale * do, zero where not wanted (backward only)

  Queries(Arena& m, const Sizes& z, bool backward)
      : q(m.take(kC * z.ldk)),
        qc(m.take(kC * z.ldk)),
        P(m.take(kC * kLdc)),
        r(m.take(kC)),
        d_o(backward ? m.take(kC * z.ldv) : nullptr) {}
};

HWY_NOINLINE void LoadQueries(const KernelArgs& a, const Sizes& z, const Keys& s, int64_t begin, size_t lo, size_t hi,
                              int64_t out_head, Queries& x) {
  const int64_t b = begin / a.T, t0 = begin % a.T;
  const float* from = a.q.data + b * a.q.batch + t0 * a.q.token + out_head / (a.Hs * a.groups / a.Hq) * a.q.head;
  for (size_t i = lo; i < hi; ++i) {
    x.r[i] = LoadUnitRow(from + i * a.q.token, z.K, a.l2_eps, x.q + i * z.ldk);
    ScaleTo(s.c[i], x.q + i * z.ldk, z.Kp, x.qc + i * z.ldk);
  }
  MatMulRange<Order::kPlain, Triangle::kLowerOut>(lo, hi, s.Lp, 0, z.K, x.q, z.ldk, s.kt, kLdc, 0, x.P, kLdc);
  for (size_t i = lo; i < hi; ++i) MaskedProduct(s.G + i * kLdc, x.P + i * kLdc, i + 1, s.Lp, 1, x.P + i * kLdc);
}

// ---------------------------------------------------------------- forward

struct ForwardScratch {
  Keys s;
  Queries x;
  float *St, *tmp, *z, *u, *o;
  ForwardScratch(Arena& m, const Sizes& z_)
      : s(m, z_),
        x(m, z_, false),
        St(m.take(z_.Kp * z_.ldv)),
        tmp(m.take(z_.Vp * z_.ldk)),
        z(m.take(kC * z_.ldv)),
        u(m.take(kC * z_.ldv)),
        o(m.take(kC * z_.ldv)) {}
};

HWY_NOINLINE void Readout(const KernelArgs& a, const Sizes& z, ForwardScratch& w, int64_t begin, int64_t head) {
  const size_t L = w.s.L;
  size_t lo, hi;
  WantedRows(a, begin, L, &lo, &hi);
  for (int64_t r = 0; r < a.groups; ++r) {
    const int64_t out_head = head * a.groups + r;
    if (lo < hi) {
      LoadQueries(a, z, w.s, begin, lo, hi, out_head, w.x);
      MatMulRange(lo, hi, z.Vp, 0, z.K, w.x.qc, z.ldk, w.St, z.ldv, 0, w.o, z.ldv);
      MatMulRange<Order::kPlain, Triangle::kLowerA>(lo, hi, z.Vp, 0, L, w.x.P, kLdc, w.u, z.ldv, 1, w.o, z.ldv);
    }
    StoreOutputs(a, z, begin, L, out_head, w.o);
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
    LoadKeys(a, z, begin, L, head, w.s);
    const float* v = a.v.data + begin / a.T * a.v.batch + begin % a.T * a.v.token + head / (a.Hs / a.Hv) * a.v.head;
    for (size_t i = 0; i < L; ++i) LoadRow(1, v + i * a.v.token, z.V, w.z + i * z.ldv);
    MatMul(L, z.Vp, z.K, w.s.kc, z.ldk, w.St, z.ldv, 1, w.z, z.ldv);
    Solve<false>(L, z.Vp, w.s.N, w.s.b, w.z, w.u, z.ldv);
    if (a.residual != nullptr) {
      for (size_t i = 0; i < L; ++i) StoreRow(1, w.z + i * z.ldv, z.V, a.residual + ((begin + i) * a.Hs + head) * a.V);
    }
    Readout(a, z, w, begin, head);
    MatMul<Order::kT>(z.K, z.Vp, L, w.s.k_end, z.ldk, w.u, z.ldv, w.s.last, w.St, z.ldv);
  }
  StoreState(z, w.St, w.tmp, a.final_state + state_at);
}

// ---------------------------------------------------------------- backward

struct BackwardScratch {
  Keys s;
  float *St, *S, *dSt, *dS;    // [K, V], [V, K]
  float *z, *u, *y, *w, *ut;   // [C, V]; ut [V, C]
  float *dk, *dk_end, *dq;     // [C, K]
  float *E, *X, *D;            // [C, C]
  float *from_start, *to_end;  // [C]: each decay's gradient times the decay
  BackwardScratch(Arena& m, const Sizes& q)
      : s(m, q),
        St(m.take(q.Kp * q.ldv)),
        S(m.take(q.Vp * q.ldk)),
        dSt(m.take(q.Kp * q.ldv)),
        dS(m.take(q.Vp * q.ldk)),
        z(m.take(kC * q.ldv)),
        u(m.take(kC * q.ldv)),
        y(m.take(kC * q.ldv)),
        w(m.take(kC * q.ldv)),
        ut(m.take(q.Vp * kLdc)),
        dk(m.take(kC * q.ldk)),
        dk_end(m.take(kC * q.ldk)),
        dq(m.take(kC * q.ldk)),
        E(m.take(kC * kLdc)),
        X(m.take(kC * kLdc)),
        D(m.take(kC * kLdc)),
        from_start(m.take(kC)),
        to_end(m.take(kC)) {}
};

// St, z, u of the chunk, and what follows from them and dSt by transposition.
HWY_NOINLINE void LoadSaved(const KernelArgs& a, const Sizes& z, BackwardScratch& w, int64_t chunk, int64_t begin,
                            int64_t head) {
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
}

// The part of dk, D and from_start, to_end that comes through the keys' side; E = E_k.
HWY_NOINLINE void KeyGradient(const Sizes& z, BackwardScratch& w) {
  const Floats d;
  const Keys& s = w.s;
  MatMul<Order::kPlain, Triangle::kLowerOut>(s.L, s.Lp, z.V, w.w, z.ldv, w.ut, kLdc, 0, w.X, kLdc);
  for (size_t i = 0; i < s.L; ++i) {
    MaskedProduct(s.G + i * kLdc, w.X + i * kLdc, i, s.Lp, -1, w.E + i * kLdc);
    MaskedProduct(s.N + i * kLdc, w.X + i * kLdc, i, s.Lp, 1, w.D + i * kLdc);
  }
  MatMul(s.L, z.Kp, z.V, w.w, z.ldv, w.S, z.ldk, 0, w.dk, z.ldk);
  MatMul(s.L, z.Kp, z.V, w.u, z.ldv, w.dS, z.ldk, 0, w.dk_end, z.ldk);
  for (size_t i = 0; i < s.L; ++i) {
    const Vector c = hn::Set(d, -s.c[i]), e = hn::Set(d, s.end[i]);
    Vector start = hn::Zero(d), end = hn::Zero(d);
    for (size_t j = 0; j < z.Kp; j += kLanes) {
      const Vector k = hn::LoadU(d, s.k + i * z.ldk + j);
      const Vector past = hn::Mul(c, hn::LoadU(d, w.dk + i * z.ldk + j)),
                   later = hn::Mul(e, hn::LoadU(d, w.dk_end + i * z.ldk + j));
      start = hn::MulAdd(k, past, start);
      end = hn::MulAdd(k, later, end);
      hn::StoreU(hn::Add(past, later), d, w.dk + i * z.ldk + j);
    }
    w.from_start[i] = hn::GetLane(hn::SumOfLanes(d, start));
    w.to_end[i] = hn::GetLane(hn::SumOfLanes(d, end));
  }
  MatMul<Order::kPlain, Triangle::kLowerA>(s.L, z.Kp, s.L, w.E, kLdc, s.k, z.ldk, 1, w.dk, z.ldk);
  MatMul<Order::kT, Triangle::kUpperA>(s.L, z.Kp, s.L, w.E, kLdc, s.k, z.ldk, 1, w.dk, z.ldk);
}

// Through one query head: dq (written out), and its part of dk, dSt, D, from_start.
HWY_NOINLINE void QueryGradient(const KernelArgs& a, const Sizes& z, BackwardScratch& w, const Queries& x,
                                int64_t begin, size_t lo, size_t hi, int64_t out_head, float* d_q) {
  const Keys& s = w.s;
  if (lo < hi) {
    MatMulRange<Order::kPlain, Triangle::kLowerOut>(lo, hi, s.Lp, 0, z.V, x.d_o, z.ldv, w.ut, kLdc, 0, w.X, kLdc);
    for (size_t i = lo; i < hi; ++i) {
      AddMaskedProduct(x.P + i * kLdc, w.X + i * kLdc, i, w.D + i * kLdc);
      MaskedProduct(s.G + i * kLdc, w.X + i * kLdc, i + 1, s.Lp, 1, w.E + i * kLdc);
    }
    MatMulRange(lo, hi, z.Kp, 0, z.V, x.d_o, z.ldv, w.S, z.ldk, 0, w.dq, z.ldk);
    for (size_t i = lo; i < hi; ++i) {
      w.from_start[i] += Dot(x.qc + i * z.ldk, w.dq + i * z.ldk, z.Kp);
      ScaleTo(s.c[i], w.dq + i * z.ldk, z.Kp, w.dq + i * z.ldk);
    }
    MatMulRange<Order::kPlain, Triangle::kLowerA>(lo, hi, z.Kp, 0, s.L, w.E, kLdc, s.k, z.ldk, 1, w.dq, z.ldk);
    MatMulRange<Order::kT, Triangle::kUpperA>(0, hi, z.Kp, lo, hi, w.E, kLdc, x.q, z.ldk, 1, w.dk, z.ldk);
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

// dg_l = whole + sum_{i >= l} (from_start_i + sum_{j < l} D_ij) + sum_{j < l} to_end_j: only sums, so that small terms
// are not lost in differences of large ones.
HWY_NOINLINE void DecayGradient(BackwardScratch& w, float whole, float* dg) {
  const Floats d;
  const Keys& s = w.s;
  float* column = s.row;  // sum of D's rows so far, from the last
  std::memset(column, 0, kC * sizeof(float));
  float start = whole;
  for (size_t i = s.L; i-- > 0;) {
    Vector sum = hn::Zero(d);
    for (size_t j = 0; j < i; j += kLanes) {
      const Vector x = hn::Add(hn::LoadU(d, column + j), hn::LoadU(d, w.D + i * kLdc + j));
      hn::StoreU(x, d, column + j);
      sum = hn::Add(sum, hn::IfThenElseZero(hn::FirstN(d, i - j), x));
    }
    start += w.from_start[i];
    dg[i] = start + hn::GetLane(hn::SumOfLanes(d, sum));
  }
  float end = 0;
  for (size_t i = 0; i < s.L; ++i) {
    dg[i] += end;
    end += w.to_end[i];
  }
}

void BackwardHead(const KernelArgs& a, const KernelGradients& d, const KernelSequence& seq, int64_t head,
                  float* scratch) {
  const Sizes z(a);
  Arena arena{scratch};
  BackwardScratch w(arena, z);
  float dg[kC];
  Keys& s = w.s;
  const int64_t state_at = (seq.index * a.Hs + head) * a.V * a.K;
  LoadState(z, d.d_final + state_at, w.S, w.dSt);
  const int64_t chunks = (seq.end - seq.begin + static_cast<int64_t>(kC) - 1) / static_cast<int64_t>(kC);
  for (int64_t m = chunks; m-- > 0;) {
    const int64_t begin = seq.begin + m * static_cast<int64_t>(kC);
    const size_t L = std::min<int64_t>(kC, seq.end - begin);
    size_t lo, hi;
    WantedRows(a, begin, L, &lo, &hi);
    LoadKeys(a, z, begin, L, head, s);
    LoadSaved(a, z, w, seq.first_chunk + m, begin, head);
    float whole = 0;
    for (size_t i = 0; i < z.K; ++i) whole += Dot(w.St + i * z.ldv, w.dSt + i * z.ldv, z.Vp);

    // dU into y, then the residuals' gradients y and w = diag(b) y = dv
    MatMul(L, z.Vp, z.K, s.k_end, z.ldk, w.dSt, z.ldv, 0, w.y, z.ldv);
    Arena group_arena = arena;
    for (int64_t r = 0; r < a.groups; ++r) {
      Queries x(group_arena, z, true);
      if (lo == hi) continue;
      LoadQueries(a, z, s, begin, lo, hi, head * a.groups + r, x);
      LoadUpstream(a, z, d.d_o, begin, lo, hi, head * a.groups + r, x.d_o);
      MatMulRange<Order::kT, Triangle::kUpperA>(0, hi, z.Vp, lo, hi, x.P, kLdc, x.d_o, z.ldv, 1, w.y, z.ldv);
    }
    Solve<true>(L, z.Vp, s.N, s.b, w.y, w.w, z.ldv);

    KeyGradient(z, w);
    MatMul<Order::kT>(z.K, z.Vp, L, s.kc, z.ldk, w.w, z.ldv, s.last, w.dSt, z.ldv);
    group_arena = arena;
    for (int64_t r = 0; r < a.groups; ++r) {
      const Queries x(group_arena, z, true);
      QueryGradient(a, z, w, x, begin, lo, hi, head * a.groups + r, d.q);
    }
    DecayGradient(w, s.last * whole, dg);
    for (size_t i = 0; i < L; ++i) {
      const int64_t at = (begin + static_cast<int64_t>(i)) * a.Hs + head;
      UnitRowBackward(s.k + i * z.ldk, s.r[i], z.Kp, w.dk + i * z.ldk);
      StoreRow(1, w.dk + i * z.ldk, z.K, d.k + at * a.K);
      StoreRow(1, w.w + i * z.ldv, z.V, d.v + at * a.V);
      d.beta[at] = Dot(w.y + i * z.ldv, w.z + i * z.ldv, z.Vp);
      d.g[at] = dg[i];
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
}  // namespace oryx::ops::gated_delta
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace oryx::ops::gated_delta {

HWY_EXPORT(ForwardHead);
HWY_EXPORT(BackwardHead);
HWY_EXPORT(ScratchFloats);

size_t scratch_floats(const KernelArgs& a, bool backward) { return HWY_DYNAMIC_DISPATCH(ScratchFloats)(a, backward); }

void forward_head(const KernelArgs& a, const KernelSequence& s, int64_t head, float* scratch) {
  HWY_DYNAMIC_DISPATCH(ForwardHead)(a, s, head, scratch);
}

void backward_head(const KernelArgs& a, const KernelGradients& d, const KernelSequence& s, int64_t head,
                   float* scratch) {
  HWY_DYNAMIC_DISPATCH(BackwardHead)(a, d, s, head, scratch);
}

std::vector<int64_t> instruction_sets() { return hwy::SupportedAndGeneratedTargets(); }

void choose_instruction_set(int64_t target) {
  hwy::SetSupportedTargetsForTest(target);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

}  // namespace oryx::ops::gated_delta
#endif
