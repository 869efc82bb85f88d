// The walk of the chunked delta rules over a sequence, forward and backward: what gated_delta_kernels.cc and kda_kernels.cc do alike. Letters as in
// gated_delta_kernels.cc. A Rule brings what depends on the decays' shape, as static functions (z the sizes, a and d the arguments):
//
//   Keys                   of a chunk, derived from ChunkKeys; made of (Arena, Sizes)
//   Gradients              of a chunk, derived from ChunkGradients; made of (Arena, Sizes)
//   LoadDecays             (a, z, begin, head, Keys): what is left of Keys once k, r, b, L and Lp are there
//   DecayFromStart         (z, Keys, i, x, to): to = x times the decay from the chunk's start to token i
//   Products               (z, Keys, lo, hi, Queries): P
//   UpdateState            (z, Keys, k, u, St): St = decay over the chunk * St + k^T u
//   BeginGradients         (z, Keys, Gradients): the gradient of the decay over the chunk by way of the state before it
//   KeyGradient            (z, Keys, Gradients): of k and the decays, through the residuals' gradients w.w
//   QueryGradient          (z, Keys, Queries, lo, hi, Gradients): the same of one query head, from w.X = do u^T and w.dq = do S
//   StoreDecayGradient     (a, z, begin, head, Keys, Gradients, d_g)
//
// Included once for each instruction set, like delta_kernels-inl.h.

#if defined(ORYX_OPS_GATED_DELTA_DELTA_WALK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ORYX_OPS_GATED_DELTA_DELTA_WALK_INL_H_
#undef ORYX_OPS_GATED_DELTA_DELTA_WALK_INL_H_
#else
#define ORYX_OPS_GATED_DELTA_DELTA_WALK_INL_H_
#endif

#include <algorithm>

#include "oryx/ops/gated_delta/delta_kernels-inl.h"

HWY_BEFORE_NAMESPACE();
namespace oryx::ops::gated_delta {
namespace HWY_NAMESPACE {

// What of a chunk depends on the keys and gates alone.
struct ChunkKeys {
  float *k, *kc, *k_end;  // k^ [C, K]; -(decay from the chunk's start) * k^; (decay to its end) * k^
  float* N;               // [C, C]
  float *b, *r;           // [C]; r the factors of normalisation
  size_t L, Lp;           // tokens, and rounded up to whole vectors

  ChunkKeys(Arena& m, const Sizes& z)
      : k(m.take(kC * z.ldk)), kc(m.take(kC * z.ldk)), k_end(m.take(kC * z.ldk)), N(m.take(kC * kLdc)), b(m.take(kC)), r(m.take(kC)) {}
};

// What of a chunk depends on one query head: rows [lo, hi).
struct Queries {
  float *q, *qc, *P, *r;  // q^ [C, K], (decay from the chunk's start) * q^, G * q^ k^T [C, C], factors of normalisation
  float* d_o;             // [C, V] scale * do, zero where not wanted (backward only)

  Queries(Arena& m, const Sizes& z, bool backward)
      : q(m.take(kC * z.ldk)), qc(m.take(kC * z.ldk)), P(m.take(kC * kLdc)), r(m.take(kC)), d_o(backward ? m.take(kC * z.ldv) : nullptr) {}
};

struct ChunkGradients {
  float *St, *S, *dSt, *dS;   // [K, V], [V, K]
  float *z, *u, *y, *w, *ut;  // [C, V]; ut [V, C]
  float *dk, *dq;             // [C, K]
  float* X;                   // [C, C]

  ChunkGradients(Arena& m, const Sizes& q) {
    for (float** x : {&St, &dSt}) *x = m.take(q.Kp * q.ldv);
    for (float** x : {&S, &dS}) *x = m.take(q.Vp * q.ldk);
    for (float** x : {&z, &u, &y, &w}) *x = m.take(kC * q.ldv);
    for (float** x : {&dk, &dq}) *x = m.take(kC * q.ldk);
    ut = m.take(q.Vp * kLdc), X = m.take(kC * kLdc);
  }
};

template <class Rule>
HWY_NOINLINE void LoadKeys(const KernelArgs& a, const Sizes& z, int64_t begin, size_t L, int64_t head, typename Rule::Keys& s) {
  s.L = L;
  s.Lp = PadLength(L);
  const int64_t b = begin / a.T, t0 = begin % a.T;
  const float* from = a.k.data + b * a.k.batch + t0 * a.k.token + head / (a.Hs / a.Hk) * a.k.head;
  for (size_t i = 0; i < L; ++i) {
    s.r[i] = LoadUnitRow(from + i * a.k.token, z.K, a.l2_eps, s.k + i * z.ldk);
    s.b[i] = a.beta[(begin + static_cast<int64_t>(i)) * a.Hs + head];
  }
  Rule::LoadDecays(a, z, begin, head, s);
}

template <class Rule>
HWY_NOINLINE void LoadQueries(const KernelArgs& a, const Sizes& z, const typename Rule::Keys& s, int64_t begin, size_t lo, size_t hi, int64_t out_head, Queries& x) {
  const int64_t b = begin / a.T, t0 = begin % a.T;
  const float* from = a.q.data + b * a.q.batch + t0 * a.q.token + out_head / (a.Hs * a.groups / a.Hq) * a.q.head;
  for (size_t i = lo; i < hi; ++i) {
    x.r[i] = LoadUnitRow(from + i * a.q.token, z.K, a.l2_eps, x.q + i * z.ldk);
    Rule::DecayFromStart(z, s, i, x.q + i * z.ldk, x.qc + i * z.ldk);
  }
  Rule::Products(z, s, lo, hi, x);
}

// ---------------------------------------------------------------- forward

template <class Rule>
struct ForwardScratch {
  typename Rule::Keys s;
  Queries x;
  float *St, *tmp, *z, *u, *o;
  ForwardScratch(Arena& m, const Sizes& q)
      : s(m, q),
        x(m, q, false),
        St(m.take(q.Kp * q.ldv)),
        tmp(m.take(q.Vp * q.ldk)),
        z(m.take(kC * q.ldv)),
        u(m.take(kC * q.ldv)),
        o(m.take(kC * q.ldv)) {}
};

template <class Rule>
HWY_NOINLINE void Readout(const KernelArgs& a, const Sizes& z, ForwardScratch<Rule>& w, int64_t begin, int64_t head) {
  const size_t L = w.s.L;
  size_t lo, hi;
  WantedRows(a, begin, L, &lo, &hi);
  for (int64_t r = 0; r < a.groups; ++r) {
    const int64_t out_head = head * a.groups + r;
    if (lo < hi) {
      LoadQueries<Rule>(a, z, w.s, begin, lo, hi, out_head, w.x);
      MatMulRange(lo, hi, z.Vp, 0, z.K, w.x.qc, z.ldk, w.St, z.ldv, 0, w.o, z.ldv);
      MatMulRange<Order::kPlain, Triangle::kLowerA>(lo, hi, z.Vp, 0, L, w.x.P, kLdc, w.u, z.ldv, 1, w.o, z.ldv);
    }
    StoreOutputs(a, z, begin, L, out_head, w.o);
  }
}

template <class Rule>
HWY_INLINE void WalkForward(const KernelArgs& a, const KernelSequence& seq, int64_t head, float* scratch) {
  const Sizes z(a);
  Arena arena{scratch};
  ForwardScratch<Rule> w(arena, z);
  const int64_t state_at = (seq.index * a.Hs + head) * a.V * a.K;
  LoadState(z, a.initial_state == nullptr ? nullptr : a.initial_state + state_at, w.tmp, w.St);
  int64_t chunk = seq.first_chunk;
  for (int64_t begin = seq.begin; begin < seq.end; begin += kC, ++chunk) {
    const size_t L = std::min<int64_t>(kC, seq.end - begin);
    if (a.chunk_states != nullptr) {
      float* to = a.chunk_states + (chunk * a.Hs + head) * a.K * a.V;
      for (size_t i = 0; i < z.K; ++i) StoreRow(1, w.St + i * z.ldv, z.V, to + i * z.V);
    }
    LoadKeys<Rule>(a, z, begin, L, head, w.s);
    const float* v = a.v.data + begin / a.T * a.v.batch + begin % a.T * a.v.token + head / (a.Hs / a.Hv) * a.v.head;
    for (size_t i = 0; i < L; ++i) LoadRow(1, v + i * a.v.token, z.V, w.z + i * z.ldv);
    MatMul(L, z.Vp, z.K, w.s.kc, z.ldk, w.St, z.ldv, 1, w.z, z.ldv);
    Solve<false>(L, z.Vp, w.s.N, w.s.b, w.z, w.u, z.ldv);
    if (a.residual != nullptr) {
      for (size_t i = 0; i < L; ++i) StoreRow(1, w.z + i * z.ldv, z.V, a.residual + ((begin + i) * a.Hs + head) * a.V);
    }
    Readout<Rule>(a, z, w, begin, head);
    Rule::UpdateState(z, w.s, w.s.k_end, w.u, w.St);
  }
  StoreState(z, w.St, w.tmp, a.final_state + state_at);
}

// ---------------------------------------------------------------- backward

template <class Rule>
struct BackwardScratch {
  typename Rule::Keys s;
  typename Rule::Gradients w;
  BackwardScratch(Arena& m, const Sizes& z) : s(m, z), w(m, z) {}
};

// St, z, u of the chunk, and what follows from them and dSt by transposition.
HWY_INLINE void LoadSaved(const KernelArgs& a, const Sizes& z, const ChunkKeys& s, ChunkGradients& w, int64_t chunk, int64_t begin, int64_t head) {
  const float* from = a.chunk_states + (chunk * a.Hs + head) * a.K * a.V;
  for (size_t i = 0; i < z.K; ++i) LoadRow(1, from + i * z.V, z.V, w.St + i * z.ldv);
  ZeroRows(w.St, z.ldv, z.K, z.Kp);
  for (size_t i = 0; i < s.L; ++i) {
    LoadRow(1, a.residual + ((begin + i) * a.Hs + head) * a.V, z.V, w.z + i * z.ldv);
    ScaleTo(s.b[i], w.z + i * z.ldv, z.Vp, w.u + i * z.ldv);
  }
  ZeroRows(w.u, z.ldv, s.L, s.Lp);
  Transpose(z.Kp, z.Vp, w.St, z.ldv, w.S, z.ldk);
  Transpose(z.Kp, z.Vp, w.dSt, z.ldv, w.dS, z.ldk);
  Transpose(s.Lp, z.Vp, w.u, z.ldv, w.ut, kLdc);
}

// Through one query head: dq (written out), and its part of dk, dSt and the decays' gradients.
template <class Rule>
HWY_NOINLINE void ReadoutGradient(const KernelArgs& a, const Sizes& z, const typename Rule::Keys& s, const Queries& x, int64_t begin, size_t lo, size_t hi, int64_t out_head,
                                  typename Rule::Gradients& w, float* d_q) {
  if (lo < hi) {
    MatMulRange<Order::kPlain, Triangle::kLowerOut>(lo, hi, s.Lp, 0, z.V, x.d_o, z.ldv, w.ut, kLdc, 0, w.X, kLdc);
    MatMulRange(lo, hi, z.Kp, 0, z.V, x.d_o, z.ldv, w.S, z.ldk, 0, w.dq, z.ldk);
    Rule::QueryGradient(z, s, x, lo, hi, w);
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

template <class Rule>
HWY_INLINE void WalkBackward(const KernelArgs& a, const KernelGradients& d, const KernelSequence& seq, int64_t head, float* scratch) {
  const Sizes z(a);
  Arena arena{scratch};
  BackwardScratch<Rule> both(arena, z);
  typename Rule::Keys& s = both.s;
  typename Rule::Gradients& w = both.w;
  const int64_t state_at = (seq.index * a.Hs + head) * a.V * a.K;
  LoadState(z, d.d_final + state_at, w.S, w.dSt);
  const int64_t chunks = (seq.end - seq.begin + static_cast<int64_t>(kC) - 1) / static_cast<int64_t>(kC);
  for (int64_t m = chunks; m-- > 0;) {
    const int64_t begin = seq.begin + m * static_cast<int64_t>(kC);
    const size_t L = std::min<int64_t>(kC, seq.end - begin);
    size_t lo, hi;
    WantedRows(a, begin, L, &lo, &hi);
    LoadKeys<Rule>(a, z, begin, L, head, s);
    LoadSaved(a, z, s, w, seq.first_chunk + m, begin, head);
    Rule::BeginGradients(z, s, w);

    // dU into y, then the residuals' gradients y and w = diag(b) y = dv
    MatMul(L, z.Vp, z.K, s.k_end, z.ldk, w.dSt, z.ldv, 0, w.y, z.ldv);
    Arena group_arena = arena;
    for (int64_t r = 0; r < a.groups; ++r) {
      Queries x(group_arena, z, true);
      if (lo == hi) continue;
      LoadQueries<Rule>(a, z, s, begin, lo, hi, head * a.groups + r, x);
      LoadUpstream(a, z, d.d_o, begin, lo, hi, head * a.groups + r, x.d_o);
      MatMulRange<Order::kT, Triangle::kUpperA>(0, hi, z.Vp, lo, hi, x.P, kLdc, x.d_o, z.ldv, 1, w.y, z.ldv);
    }
    Solve<true>(L, z.Vp, s.N, s.b, w.y, w.w, z.ldv);

    Rule::KeyGradient(z, s, w);
    Rule::UpdateState(z, s, s.kc, w.w, w.dSt);
    group_arena = arena;
    for (int64_t r = 0; r < a.groups; ++r) {
      const Queries x(group_arena, z, true);
      ReadoutGradient<Rule>(a, z, s, x, begin, lo, hi, head * a.groups + r, w, d.q);
    }
    Rule::StoreDecayGradient(a, z, begin, head, s, w, d.g);
    for (size_t i = 0; i < L; ++i) {
      const int64_t at = (begin + static_cast<int64_t>(i)) * a.Hs + head;
      UnitRowBackward(s.k + i * z.ldk, s.r[i], z.Kp, w.dk + i * z.ldk);
      StoreRow(1, w.dk + i * z.ldk, z.K, d.k + at * a.K);
      StoreRow(1, w.w + i * z.ldv, z.V, d.v + at * a.V);
      d.beta[at] = Dot(w.y + i * z.ldv, w.z + i * z.ldv, z.Vp);
    }
  }
  StoreState(z, w.dSt, w.S, d.state + state_at);
}

// What WalkForward or WalkBackward takes of `scratch`.
template <class Rule>
HWY_INLINE size_t WalkFloats(const KernelArgs& a, bool backward) {
  const Sizes z(a);
  Arena count{nullptr};
  if (!backward) {
    ForwardScratch<Rule> w(count, z);
  } else {
    BackwardScratch<Rule> w(count, z);
    for (int64_t r = 0; r < a.groups; ++r) Queries x(count, z, true);
  }
  return count.used;
}

}  // namespace HWY_NAMESPACE
}  // namespace oryx::ops::gated_delta
HWY_AFTER_NAMESPACE();

#endif  // ORYX_OPS_GATED_DELTA_DELTA_WALK_INL_H_
