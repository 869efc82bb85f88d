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
#include "oryx/ops/gated_delta/delta_walk-inl.h"

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

struct GatedKeys : ChunkKeys {
  float* kt;         // transpose of k^, [K, C]
  float* G;          // [C, C]
  float *c, *row;    // [C]; row to work with
  const float* end;  // last row of G
  float last;        // decay over the chunk

  GatedKeys(Arena& m, const Sizes& z) : ChunkKeys(m, z), kt(m.take(z.Kp * kLdc)), G(m.take(kC * kLdc)), c(m.take(kC)), row(m.take(kC)) {}
};

// G, c. Sums over segments grow row by row: row i adds g_i to every sum that began before it.
HWY_NOINLINE void Decays(const KernelArgs& a, int64_t begin, int64_t head, GatedKeys& s) {
  const Floats d;
  const float minus_infinity = -HUGE_VALF;
  float from_start = 0;
  for (size_t j = 0; j < kC; ++j) s.row[j] = minus_infinity, s.c[j] = 0;
  for (size_t i = 0; i < s.L; ++i) {
    const float g = a.g[(begin + static_cast<int64_t>(i)) * a.Hs + head];
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

struct GatedGradients : ChunkGradients {
  float* dk_end;               // [C, K]
  float *E, *D;                // [C, C]
  float *from_start, *to_end;  // [C]: each decay's gradient times the decay
  float whole;                 // the same of the decay over the chunk

  GatedGradients(Arena& m, const Sizes& z)
      : ChunkGradients(m, z), dk_end(m.take(kC * z.ldk)), E(m.take(kC * kLdc)), D(m.take(kC * kLdc)), from_start(m.take(kC)), to_end(m.take(kC)) {}
};

// The part of dk, D and from_start, to_end that comes through the keys' side; E = E_k.
HWY_NOINLINE void GatedKeyGradient(const Sizes& z, const GatedKeys& s, GatedGradients& w) {
  const Floats d;
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

// dg_l = whole + sum_{i >= l} (from_start_i + sum_{j < l} D_ij) + sum_{j < l} to_end_j: only sums, so that small terms
// are not lost in differences of large ones.
HWY_NOINLINE void DecayGradient(const GatedKeys& s, const GatedGradients& w, float* dg) {
  const Floats d;
  float* column = s.row;  // sum of D's rows so far, from the last
  std::memset(column, 0, kC * sizeof(float));
  float start = w.whole;
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

// Of delta_walk-inl.h.
struct GatedDelta {
  using Keys = GatedKeys;
  using Gradients = GatedGradients;

  static HWY_INLINE void LoadDecays(const KernelArgs& a, const Sizes& z, int64_t begin, int64_t head, Keys& s) {
    ZeroRows(s.k, z.ldk, s.L, s.Lp);
    Transpose(s.Lp, z.Kp, s.k, z.ldk, s.kt, kLdc);
    Decays(a, begin, head, s);
    for (size_t i = 0; i < s.L; ++i) {
      ScaleTo(-s.c[i], s.k + i * z.ldk, z.Kp, s.kc + i * z.ldk);
      ScaleTo(s.end[i], s.k + i * z.ldk, z.Kp, s.k_end + i * z.ldk);
    }
    MatMul<Order::kPlain, Triangle::kLowerOut>(s.L, s.Lp, z.K, s.k, z.ldk, s.kt, kLdc, 0, s.N, kLdc);
    for (size_t i = 0; i < s.L; ++i) MaskedProduct(s.G + i * kLdc, s.N + i * kLdc, i, s.Lp, -1, s.N + i * kLdc);
  }

  static HWY_INLINE void DecayFromStart(const Sizes& z, const Keys& s, size_t i, const float* x, float* to) { ScaleTo(s.c[i], x, z.Kp, to); }

  static HWY_INLINE void Products(const Sizes& z, const Keys& s, size_t lo, size_t hi, Queries& x) {
    MatMulRange<Order::kPlain, Triangle::kLowerOut>(lo, hi, s.Lp, 0, z.K, x.q, z.ldk, s.kt, kLdc, 0, x.P, kLdc);
    for (size_t i = lo; i < hi; ++i) MaskedProduct(s.G + i * kLdc, x.P + i * kLdc, i + 1, s.Lp, 1, x.P + i * kLdc);
  }

  static HWY_INLINE void UpdateState(const Sizes& z, const Keys& s, const float* k, const float* u, float* St) {
    MatMul<Order::kT>(z.K, z.Vp, s.L, k, z.ldk, u, z.ldv, s.last, St, z.ldv);
  }

  static HWY_INLINE void BeginGradients(const Sizes& z, const Keys& s, Gradients& w) {
    float whole = 0;
    for (size_t i = 0; i < z.K; ++i) whole += Dot(w.St + i * z.ldv, w.dSt + i * z.ldv, z.Vp);
    w.whole = s.last * whole;
  }

  static HWY_INLINE void KeyGradient(const Sizes& z, const Keys& s, Gradients& w) { GatedKeyGradient(z, s, w); }

  static HWY_INLINE void QueryGradient(const Sizes& z, const Keys& s, const Queries& x, size_t lo, size_t hi, Gradients& w) {
    for (size_t i = lo; i < hi; ++i) {
      AddMaskedProduct(x.P + i * kLdc, w.X + i * kLdc, i, w.D + i * kLdc);
      MaskedProduct(s.G + i * kLdc, w.X + i * kLdc, i + 1, s.Lp, 1, w.E + i * kLdc);
      w.from_start[i] += Dot(x.qc + i * z.ldk, w.dq + i * z.ldk, z.Kp);
      ScaleTo(s.c[i], w.dq + i * z.ldk, z.Kp, w.dq + i * z.ldk);
    }
    MatMulRange<Order::kPlain, Triangle::kLowerA>(lo, hi, z.Kp, 0, s.L, w.E, kLdc, s.k, z.ldk, 1, w.dq, z.ldk);
    MatMulRange<Order::kT, Triangle::kUpperA>(0, hi, z.Kp, lo, hi, w.E, kLdc, x.q, z.ldk, 1, w.dk, z.ldk);
  }

  static HWY_INLINE void StoreDecayGradient(const KernelArgs& a, const Sizes&, int64_t begin, int64_t head, const Keys& s, const Gradients& w, float* d_g) {
    float dg[kC];
    DecayGradient(s, w, dg);
    for (size_t i = 0; i < s.L; ++i) d_g[(begin + static_cast<int64_t>(i)) * a.Hs + head] = dg[i];
  }
};

void ForwardHead(const KernelArgs& a, const KernelSequence& seq, int64_t head, float* scratch) { WalkForward<GatedDelta>(a, seq, head, scratch); }

void BackwardHead(const KernelArgs& a, const KernelGradients& d, const KernelSequence& seq, int64_t head, float* scratch) {
  WalkBackward<GatedDelta>(a, d, seq, head, scratch);
}

size_t ScratchFloats(const KernelArgs& a, bool backward) { return WalkFloats<GatedDelta>(a, backward); }

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
