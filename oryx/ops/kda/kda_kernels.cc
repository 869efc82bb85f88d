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
#include "oryx/ops/gated_delta/delta_walk-inl.h"

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

// [C, K] unless said otherwise.
struct KimiKeys : ChunkKeys {
  float *g, *a;                   // log decays, decays
  float *c, *end;                 // decay from the chunk's start, to its end
  float *cuts[kLevels];           // decay from the cut (tokens behind it) or to the cut (tokens before it)
  float *kd[kLevels];             // cuts * k^
  float *kdt[kLevels];            // its transpose, [K, C]
  float *last, *row, *xd;         // [K], decay over the chunk; [K] and [C, K], to work with

  KimiKeys(Arena& m, const Sizes& z) : ChunkKeys(m, z) {
    for (float** x : {&g, &a, &c, &end, &xd}) *x = m.take(kC * z.ldk);
    for (size_t l = 0; l < kLevels; ++l) cuts[l] = m.take(kC * z.ldk), kd[l] = m.take(kC * z.ldk), kdt[l] = m.take(z.Kp * kLdc);
    last = m.take(z.Kp), row = m.take(z.Kp);
  }
};

// Rows [lo, hi) of P (times sign): x_i . (G_ij * k_j) at j < i, at j = i too unless strict, zero elsewhere.
HWY_NOINLINE void RowProducts(const Sizes& z, const KimiKeys& s, const float* x, size_t lo, size_t hi, bool strict, float sign, float* P) {
  float* xd = s.xd;
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

HWY_NOINLINE void KeyDecays(const KernelArgs& a, const Sizes& z, int64_t begin, int64_t head, KimiKeys& s) {
  const Floats d;
  const size_t L = s.L;
  for (size_t i = 0; i < L; ++i) LoadRow(1, a.g + ((begin + static_cast<int64_t>(i)) * a.Hs + head) * a.K, z.K, s.g + i * z.ldk);
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
  RowProducts(z, s, s.k, 0, L, /*strict=*/true, -1, s.N);
}

// ---------------------------------------------------------------- backward

struct KimiGradients : ChunkGradients {
  float *dx, *dg, *xt;         // [C, K]; dx: of keys in their place as rows of P; xt to work with
  float *from_start, *to_end;  // [C, K]: the gradients of the exponents of c and end
  float* whole;                // [K], of the exponent of c_C before S0

  KimiGradients(Arena& m, const Sizes& q) : ChunkGradients(m, q) {
    for (float** x : {&dx, &dg, &xt, &from_start, &to_end}) *x = m.take(kC * q.ldk);
    whole = m.take(q.Kp);
  }
};

// Of one leaf's rows [lo, hi), beginning at token `first`: adds to dx, dk, dg. The walk of Products backwards: with G the gradient of the row that met
// k_j, that of a_j * it is a_j * G, and its part of dg_j is the row times G.
HWY_INLINE void LeafBackward(const Sizes& z, const KimiKeys& s, const float* x, size_t first, size_t lo, size_t hi, bool strict, const float* dP,
                             KimiGradients& w, float* dx) {
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
HWY_NOINLINE void ProductsBackward(const Sizes& z, const KimiKeys& s, const float* x, size_t lo, size_t hi, bool strict, const float* dP, KimiGradients& w,
                                   float* dx) {
  const Floats d;
  const size_t ld = z.ldk;
  for (size_t l = 0; l < kLevels; ++l) {
    const float* cuts = s.cuts[l];
    ForEachCut(l, s.L, [&](size_t begin, size_t cut, size_t end) HWY_ATTR {
      const size_t from = std::max(cut, lo), to = std::min(end, hi);
      if (from >= to) return;
      for (size_t i = from; i < to; ++i) Multiply(x + i * ld, cuts + i * ld, z.Kp, s.xd + i * ld);
      MatMulRange(from, to, z.Kp, begin, cut, dP, kLdc, s.kd[l], ld, 0, w.xt, ld);
      MatMulRange<Order::kT>(begin, cut, z.Kp, from, to, dP, kLdc, s.xd, ld, 0, w.xt, ld);
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
HWY_NOINLINE void KimiKeyGradient(const Sizes& z, const KimiKeys& s, KimiGradients& w) {
  const Floats d;
  MatMul(s.L, z.Kp, z.V, w.w, z.ldv, w.S, z.ldk, 0, s.xd, z.ldk);
  MatMul(s.L, z.Kp, z.V, w.u, z.ldv, w.dS, z.ldk, 0, w.xt, z.ldk);
  for (size_t i = 0; i < s.L; ++i) {
    for (size_t at = i * z.ldk; at < i * z.ldk + z.Kp; at += kLanes) {
      const Vector k = hn::LoadU(d, s.k + at);
      const Vector past = hn::Neg(hn::Mul(hn::LoadU(d, s.c + at), hn::LoadU(d, s.xd + at))),
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
  ProductsBackward(z, s, s.k, 0, s.L, /*strict=*/true, w.X, w, w.dx);
  for (size_t i = 0; i < s.L; ++i) {
    for (size_t at = i * z.ldk; at < i * z.ldk + z.Kp; at += kLanes) hn::StoreU(hn::Add(hn::LoadU(d, w.dk + at), hn::LoadU(d, w.dx + at)), d, w.dk + at);
  }
}

// dg_l += whole + sum_{i >= l} from_start_i + sum_{j < l} to_end_j: only sums, so that small terms are not lost in differences of large ones.
HWY_NOINLINE void DecayGradient(const Sizes& z, size_t L, KimiGradients& w) {
  const Floats d;
  for (size_t m = 0; m < z.Kp; m += kLanes) {
    Vector start = hn::LoadU(d, w.whole + m), end = hn::Zero(d);
    for (size_t i = L; i-- > 0;) {
      start = hn::Add(start, hn::LoadU(d, w.from_start + i * z.ldk + m));
      hn::StoreU(hn::Add(start, hn::LoadU(d, w.dg + i * z.ldk + m)), d, w.dg + i * z.ldk + m);
    }
    for (size_t i = 0; i < L; ++i) {
      hn::StoreU(hn::Add(end, hn::LoadU(d, w.dg + i * z.ldk + m)), d, w.dg + i * z.ldk + m);
      end = hn::Add(end, hn::LoadU(d, w.to_end + i * z.ldk + m));
    }
  }
}

// Of delta_walk-inl.h.
struct KimiDelta {
  using Keys = KimiKeys;
  using Gradients = KimiGradients;

  static HWY_INLINE void LoadDecays(const KernelArgs& a, const Sizes& z, int64_t begin, int64_t head, Keys& s) { KeyDecays(a, z, begin, head, s); }

  static HWY_INLINE void DecayFromStart(const Sizes& z, const Keys& s, size_t i, const float* x, float* to) { Multiply(s.c + i * z.ldk, x, z.Kp, to); }

  static HWY_INLINE void Products(const Sizes& z, const Keys& s, size_t lo, size_t hi, Queries& x) {
    RowProducts(z, s, x.q, lo, hi, /*strict=*/false, 1, x.P);
  }

  // A decay for each row of St.
  static HWY_INLINE void UpdateState(const Sizes& z, const Keys& s, const float* k, const float* u, float* St) {
    for (size_t i = 0; i < z.K; ++i) ScaleTo(s.last[i], St + i * z.ldv, z.Vp, St + i * z.ldv);
    MatMul<Order::kT>(z.K, z.Vp, s.L, k, z.ldk, u, z.ldv, 1, St, z.ldv);
  }

  static HWY_INLINE void BeginGradients(const Sizes& z, const Keys& s, Gradients& w) {
    for (size_t i = 0; i < z.Kp; ++i) w.whole[i] = i < z.K ? s.last[i] * Dot(w.St + i * z.ldv, w.dSt + i * z.ldv, z.Vp) : 0;
  }

  static HWY_INLINE void KeyGradient(const Sizes& z, const Keys& s, Gradients& w) { KimiKeyGradient(z, s, w); }

  static HWY_INLINE void QueryGradient(const Sizes& z, const Keys& s, const Queries& x, size_t lo, size_t hi, Gradients& w) {
    const Floats d;
    for (size_t i = lo; i < hi; ++i) {
      for (size_t at = i * z.ldk; at < i * z.ldk + z.Kp; at += kLanes) {
        const Vector g = hn::Mul(hn::LoadU(d, s.c + at), hn::LoadU(d, w.dq + at));
        hn::StoreU(g, d, w.dq + at);
        hn::StoreU(hn::MulAdd(hn::LoadU(d, x.q + at), g, hn::LoadU(d, w.from_start + at)), d, w.from_start + at);
      }
    }
    ProductsBackward(z, s, x.q, lo, hi, /*strict=*/false, w.X, w, w.dq);
  }

  static HWY_INLINE void StoreDecayGradient(const KernelArgs& a, const Sizes& z, int64_t begin, int64_t head, const Keys& s, Gradients& w, float* d_g) {
    DecayGradient(z, s.L, w);
    for (size_t i = 0; i < s.L; ++i) StoreRow(1, w.dg + i * z.ldk, z.K, d_g + ((begin + static_cast<int64_t>(i)) * a.Hs + head) * a.K);
  }
};

void ForwardHead(const KernelArgs& a, const KernelSequence& seq, int64_t head, float* scratch) { WalkForward<KimiDelta>(a, seq, head, scratch); }

void BackwardHead(const KernelArgs& a, const KernelGradients& d, const KernelSequence& seq, int64_t head, float* scratch) {
  WalkBackward<KimiDelta>(a, d, seq, head, scratch);
}

size_t ScratchFloats(const KernelArgs& a, bool backward) { return WalkFloats<KimiDelta>(a, backward); }

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
