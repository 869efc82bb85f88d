// Phase 2 of the persistent decoding kernel (decode_step.cu): what a group makes of the keys, values, gate and query of its head; the recurrent state; the cached tokens.
#pragma once

#include "oryx/generate/cuda/decode_step_ring.cuh"

namespace oryx::decode_cuda {
namespace {

// What a thread reads ahead of the meeting in front of a layer. Threads come in fours: the one of row t / 4 of the multiprocessor's 64 rows, sixteen each of keys, values, gate, query.
struct Ahead {
  float4 filter;
  float tail[3];
  bf16* tail_at;
};

__device__ __forceinline__ Ahead read_ahead(const OryxDecodeLayer& layer, int channel) {
  const int section = threadIdx.x >> 6;
  Ahead a{};
  if (section < 2) {
    a.filter = __ldg(reinterpret_cast<const float4*>(section == 0 ? layer.k_conv : layer.v_conv) + channel);
    a.tail_at = static_cast<bf16*>(section == 0 ? layer.k_tail : layer.v_tail) + 3 * channel;
#pragma unroll
    for (int i = 0; i < 3; ++i) a.tail[i] = __bfloat162float(a.tail_at[i]);
  }
  return a;
}

// The sum y of the thread's row: through the convolution, into the state's rows, to the multiprocessors of the group.
template <int kD>
__device__ __forceinline__ void publish_projected(const OryxDecodeLayer& layer, Shared& s, Words* words, uint32_t number, const Ahead& a, float y, int head, int rank, int kept_row,
                                                  bool keeps) {
  const int section = threadIdx.x >> 6, row = (threadIdx.x >> 2) & 15, part = threadIdx.x & 3;
  const int of_head = rank * kSliceRows + row, channel = head * kWidth + of_head;
  if (section < 2) {
    const float raw = round_bf16(y);
    const float z = convolved(a.filter, a.tail[0], a.tail[1], a.tail[2], raw);
    if (part == 0) {
      if (section == 0) {
        publish(words->projected + of_head, z, number);
      } else {
        s.value[row] = z;
      }
    } else if (part == 1) {
      a.tail_at[0] = __float2bfloat16_rn(a.tail[1]), a.tail_at[1] = __float2bfloat16_rn(a.tail[2]), a.tail_at[2] = __float2bfloat16_rn(raw);
    } else if (part == 2 && keeps) {
      static_cast<bf16*>(section == 0 ? layer.keys : layer.values)[static_cast<int64_t>(kept_row) * kD + channel] = __float2bfloat16_rn(z);
    }
  } else if (section == 2) {
    if (part == 0) s.gate[row] = silu(y);
  } else if (part == 0) {
    publish(words->projected + kWidth + of_head, y, number);
  }
}

// Write strength and decay before their functions are products with float32 rows. A multiprocessor has 256 of the columns, which lie in the registers of the warp of its rank: lanes with
// an even g take the row of the write strength, the others that of the decay.
__device__ __forceinline__ void read_narrow(const OryxDecodeLayer& layer, float (&w)[16], int head, int heads, int columns) {
  read_weights(w, layer.w_beta_decay + static_cast<int64_t>(threadIdx.x & 4 ? heads + head : head) * columns);
}
__device__ __forceinline__ void publish_narrow(const float (&u)[16], const float (&w)[16], Words* words, uint32_t number, int rank) {
  const int lane = threadIdx.x & 31;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 16; ++i) sum = fmaf(u[i], w[i], sum);
#pragma unroll
  for (const int d : {1, 2, 8, 16}) sum += __shfl_xor_sync(~0u, sum, d);
  if (lane % 4 == 0 && lane < 8) publish(words->projected + 2 * kWidth + lane / 4 * kGroup + rank, sum, number);
}

// The tokens before `position` that are seen, [0, first_end) and [begin, position), each cut to pieces by itself, and where their rows stand.
struct Seen {
  int position, first_end, begin, split, before, behind;
  __device__ Seen(const OryxDecodeStep& a, int position) : position(position) {
    const int window = static_cast<int>(a.window);
    begin = window > 0 ? max(0, position + 1 - window) : 0, first_end = min(begin, static_cast<int>(a.first));
    const bool apart = a.stretches != nullptr;
    split = apart ? __ldcg(a.stretches) : 0, before = apart ? __ldcg(a.stretches + 1) : 0, behind = apart ? __ldcg(a.stretches + 2) : 0;
  }
  __device__ __forceinline__ int row(int token) const { return token + (token < split ? before : behind); }
  __device__ __forceinline__ int first_pieces() const { return (first_end + kTokens - 1) / kTokens; }
  __device__ __forceinline__ int pieces() const { return first_pieces() + (position - begin + kTokens - 1) / kTokens; }
  __device__ __forceinline__ int first_of(int piece) const { return piece < first_pieces() ? piece * kTokens : begin + (piece - first_pieces()) * kTokens; }
  __device__ __forceinline__ int end_of(int piece) const { return piece < first_pieces() ? first_end : position; }
};

// This multiprocessor's share of these pieces.
struct TokenShare {
  int begin, end;
  __device__ TokenShare(const Seen& seen, int rank) {
    const int pieces = seen.pieces();
    begin = pieces * rank / kGroup, end = pieces * (rank + 1) / kGroup;
  }
};

// Half a warp takes four tokens of a piece. What it found goes to the multiprocessors of the group, sixteen values of the head each.
__device__ __forceinline__ void attend(const OryxDecodeStep& a, Shared& s, Words* words, uint32_t number, Consumer& in, const Seen& seen, int rank) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, l = lane & 15, half = 2 * warp + (lane >> 4);
  constexpr int kOwn = 4;
  const TokenShare share(seen, rank);
  // The query turned to where it stands seen from the first key, then back by one position a key: R(p)q . R(j)k = R(p - j)q . k.
  float lo[4], hi[4], c1[4], s1[4], cj[4], sj[4], q_lo[4], q_hi[4], acc[8];
  float m = -1e30f, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) acc[i] = 0.0f;
  const auto angles = [&](int64_t distance, float(&c)[4], float(&sn)[4]) {
    const float* row = a.rope + distance * 128;
    const float4 x = __ldg(reinterpret_cast<const float4*>(row) + l), y = __ldg(reinterpret_cast<const float4*>(row + 64) + l);
    c[0] = x.x, c[1] = x.y, c[2] = x.z, c[3] = x.w, sn[0] = y.x, sn[1] = y.y, sn[2] = y.z, sn[3] = y.w;
  };
  if (share.begin < share.end) {
    const float scale = a.attention_scale * kLog2e;
#pragma unroll
    for (int i = 0; i < 4; ++i) q_lo[i] = __uint_as_float(s.projected[kWidth + 4 * l + i]) * scale, q_hi[i] = __uint_as_float(s.projected[kWidth + 64 + 4 * l + i]) * scale;
    angles(1, c1, s1);
    if (share.end - share.begin > 1) angles(kTokens - kOwn, cj, sj);
  }
  for (int piece = share.begin; piece < share.end; ++piece) {
    const int first = seen.first_of(piece) + kOwn * half, tokens = max(0, min(kOwn, seen.end_of(piece) - first));
    // The exact angle again where the tokens go on elsewhere, and so that rounding does not build up; behind the last token it does not matter.
    if ((piece - share.begin) % 16 == 0 || piece == seen.first_pieces()) {
      float cc[4], ss[4];
      angles(max(seen.position - first, 0), cc, ss);
#pragma unroll
      for (int i = 0; i < 4; ++i) lo[i] = q_lo[i] * cc[i] - q_hi[i] * ss[i], hi[i] = q_hi[i] * cc[i] + q_lo[i] * ss[i];
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = lo[i], y = hi[i];
        lo[i] = fmaf(y, sj[i], x * cj[i]), hi[i] = fmaf(-x, sj[i], y * cj[i]);
      }
    }
    float score[kOwn];
    uint32_t at = in.wait() + half * (kOwn * kWidth * 2);
#pragma unroll
    for (int t = 0; t < kOwn; ++t) {
      const uint32_t row = at + t * (kWidth * 2) + l * 8;
      const uint2 ka = lds64(row), kb = lds64(row + 128);
      float p = low(ka.x) * lo[0];
      p = fmaf(high(ka.x), lo[1], p), p = fmaf(low(ka.y), lo[2], p), p = fmaf(high(ka.y), lo[3], p);
      p = fmaf(low(kb.x), hi[0], p), p = fmaf(high(kb.x), hi[1], p), p = fmaf(low(kb.y), hi[2], p), p = fmaf(high(kb.y), hi[3], p);
      score[t] = p;
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // R(-1)
        const float x = lo[i], y = hi[i];
        lo[i] = fmaf(y, s1[i], x * c1[i]), hi[i] = fmaf(-x, s1[i], y * c1[i]);
      }
    }
    in.release();
    const bool up = lane & 8, right = lane & 4;
    const int mine = (up ? 2 : 0) + (right ? 1 : 0);
    const float o0 = __shfl_xor_sync(~0u, up ? score[0] : score[2], 8), o1 = __shfl_xor_sync(~0u, up ? score[1] : score[3], 8);
    const float k0 = (up ? score[2] : score[0]) + o0, k1 = (up ? score[3] : score[1]) + o1;
    float k = (right ? k1 : k0) + __shfl_xor_sync(~0u, right ? k0 : k1, 4);
    k += __shfl_xor_sync(~0u, k, 2);
    k += __shfl_xor_sync(~0u, k, 1);
    if (mine >= tokens) k = -1e30f;  // what lies in the ring there belongs to no token
    float top = fmaxf(k, __shfl_xor_sync(~0u, k, 8));
    top = fmaxf(m, fmaxf(top, __shfl_xor_sync(~0u, top, 4)));
    const float shrink = exp2f(m - top);
    const float p = mine < tokens ? exp2f(k - top) : 0.0f;
    sum = sum * shrink + p;
    m = top;
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i] *= shrink;
    at = in.wait() + half * (kOwn * kWidth * 2);
#pragma unroll
    for (int t = 0; t < kOwn; ++t) {
      const float pt = __shfl_sync(~0u, p, (lane & 16) | ((t >> 1) << 3) | ((t & 1) << 2));
      if (t < tokens) {
        const uint4 v = lds128(at + t * (kWidth * 2) + l * 16);
        acc[0] = fmaf(low(v.x), pt, acc[0]), acc[1] = fmaf(high(v.x), pt, acc[1]);
        acc[2] = fmaf(low(v.y), pt, acc[2]), acc[3] = fmaf(high(v.y), pt, acc[3]);
        acc[4] = fmaf(low(v.z), pt, acc[4]), acc[5] = fmaf(high(v.z), pt, acc[5]);
        acc[6] = fmaf(low(v.w), pt, acc[6]), acc[7] = fmaf(high(v.w), pt, acc[7]);
      }
    }
    in.release();
  }
  sum += __shfl_xor_sync(~0u, sum, 8);
  sum += __shfl_xor_sync(~0u, sum, 4);
  float* own = s.red + half * kWidth;
  if (l == 0) s.half_ml[0][half] = m, s.half_ml[1][half] = sum;
  reinterpret_cast<float4*>(own)[2 * l] = make_float4(acc[0], acc[1], acc[2], acc[3]);
  reinterpret_cast<float4*>(own)[2 * l + 1] = make_float4(acc[4], acc[5], acc[6], acc[7]);
  named_barrier(1, kConsumers);
  if (threadIdx.x >= kWidth) return;
  const int d = threadIdx.x;
  float top = -1e30f, total = 0.0f, o = 0.0f;
#pragma unroll
  for (int i = 0; i < 2 * kWarps; ++i) top = fmaxf(top, s.half_ml[0][i]);
#pragma unroll
  for (int i = 0; i < 2 * kWarps; ++i) {
    const float e = exp2f(s.half_ml[0][i] - top);
    total = fmaf(e, s.half_ml[1][i], total), o = fmaf(e, s.red[i * kWidth + d], o);
  }
  Word* to = words->parts[d / kSliceRows] + rank * (kSliceRows + 2);
  publish(to + 2 + d % kSliceRows, o, number);
  if (d % kSliceRows == 0) publish(to, top, number), publish(to + 1, total, number);
}

// The state of the multiprocessor's sixteen value rows, two a warp; the output of the layer's mode for them, through weight and gate, to the group. The head norm's factor is
// wanted only behind the product with W_out: squares go along.
template <int kD>
__device__ __forceinline__ void mix(const OryxDecodeStep& a, const OryxDecodeLayer& layer, Shared& s, Words* words, uint32_t number, Consumer& in, int head, int rank, const Seen& seen, int kept_row,
                                    bool keeps, bool attention, float scale, float2 o_norm, float A_log, float dt_bias) {
  constexpr int H = kD / kWidth;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = 2 * warp;
  collect<kProjectedWords>(words->projected, kProjectedWords, number, s.projected);
  const float* projected = reinterpret_cast<const float*>(s.projected);
  const float4 kv = *reinterpret_cast<const float4*>(projected + 4 * lane), qv = *reinterpret_cast<const float4*>(projected + kWidth + 4 * lane);
  const float k[4] = {kv.x, kv.y, kv.z, kv.w}, q[4] = {qv.x, qv.y, qv.z, qv.w};
  float pre[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float* parts = projected + 2 * kWidth + i * kGroup;
    const float4 p = *reinterpret_cast<const float4*>(parts), r = *reinterpret_cast<const float4*>(parts + 4);
    pre[i] = scale * (((p.x + p.y) + (p.z + p.w)) + ((r.x + r.y) + (r.z + r.w)));
  }
  const float beta = sigmoid(pre[0]), g = log_decay(A_log, pre[1] + dt_bias), decay = __expf(g);
  const uint32_t at = in.wait() + row * (kWidth * 4) + lane * 16;
  float4 state[2] = {lds_float4(at), lds_float4(at + kWidth * 4)};
  in.release();
  const auto dot = [](float4 x, const float(&y)[4]) { return fmaf(x.x, y[0], fmaf(x.y, y[1], fmaf(x.z, y[2], x.w * y[3]))); };
  const float each[8] = {dot(kv, k), dot(qv, q), dot(kv, q), dot(state[0], k), dot(state[1], k), dot(state[0], q), dot(state[1], q), 0.0f};
  const float sums = warp_sum8(each);
  const auto sum = [&](int i) { return __shfl_sync(~0u, sums, 4 * i); };
  const float kn = rsqrtf(sum(0) + 1e-6f), qn = rsqrtf(sum(1) + 1e-6f) * 0.08838834764831845f, kq = sum(2);
  float v[2] = {s.value[row], s.value[row + 1]}, o[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float delta = beta * (v[r] - decay * sum(3 + r) * kn) * kn;
    float4 x = state[r];
    x.x = fmaf(delta, k[0], decay * x.x), x.y = fmaf(delta, k[1], decay * x.y);
    x.z = fmaf(delta, k[2], decay * x.z), x.w = fmaf(delta, k[3], decay * x.w);
    __stcs(reinterpret_cast<float4*>(layer.S + (static_cast<int64_t>(head) * kWidth + rank * kSliceRows + row + r) * kWidth + 4 * lane), x);
    o[r] = (decay * sum(5 + r) + delta * kq) * qn;  // the state behind the update, without another pass over it
  }
  if (keeps && rank == 0 && threadIdx.x == 0) {
    layer.g_rows[static_cast<int64_t>(kept_row) * H + head] = g;
    layer.beta_rows[static_cast<int64_t>(kept_row) * H + head] = beta;
  }
  if (attention) {
    attend(a, s, words, number, in, seen, rank);
    collect<kPartsWords>(words->parts[rank], kPartsWords, number, s.parts);
    const float* parts = reinterpret_cast<const float*>(s.parts);
    const float own = kq * a.attention_scale * kLog2e;  // both at the same angle
    float top = own;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) top = fmaxf(top, parts[i * (kSliceRows + 2)]);
    const float e_own = exp2f(own - top);
    float total = e_own, x = e_own * v[0], y = e_own * v[1];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float* part = parts + i * (kSliceRows + 2);
      const float e = exp2f(part[0] - top);
      total = fmaf(e, part[1], total), x = fmaf(e, part[2 + row], x), y = fmaf(e, part[3 + row], y);
    }
    o[0] = x / total, o[1] = y / total;
  }
  if (lane < 2) {
    publish(words->mixed + rank * kSliceRows + row + lane, split(lane == 0 ? o[0] * o_norm.x * s.gate[row] : o[1] * o_norm.y * s.gate[row + 1]), number);
  } else if (lane == 2) {
    publish(words->mixed + kWidth + rank * kWarps + warp, fmaf(o[0], o[0], o[1] * o[1]), number);
  }
}

}  // namespace
}  // namespace oryx::decode_cuda
