// Phase 2 of the persistent decoding kernel (decode_step.cu): convolutions and the recurrent state of a slice of a head; this multiprocessor's share of the cached tokens.
#pragma once

#include "oryx/generate/cuda/decode_step_ring.cuh"

namespace oryx::decode_cuda {
namespace {

struct HeadWork {  // of one (head, slice): four keys a lane, two value rows a warp
  float k[4], q[4];  // after convolution and rounding; query as projected
  float v[2];
  Tail4 new_tail;
};

template <int kD>
__device__ __forceinline__ void attend_share(const OryxDecodeStep& a, const Workspace& ws, Consumer& in, int position, uint32_t flag) {
  constexpr int H = kD / kWidth;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, l = lane & 15, head = 2 * warp + (lane >> 4);
  const Share share((position + kTokens - 1) / kTokens, 3);
  const int units = share.count() > 0 ? 2 * (min(share.end * kTokens, position) - share.begin * kTokens) : 0;
  // Every unit has eight arrivals, however many heads there are: a warp without heads arrives too.
  const bool works = 2 * warp < H;
  // The query turned to where it stands seen from the first key, then back by one position a key: R(p)q . R(j)k = R(p - j)q . k.
  float lo[4], hi[4], c1[4], s1[4], acc[8], q_lo[4], q_hi[4];
  float m = -1e30f, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) acc[i] = 0.0f;
  if (works && units > 0) {
    await<2>(ws.proj + 3 * kD + head * kWidth + 4 * l, 2, flag, q_lo);
    await<2>(ws.proj + 3 * kD + head * kWidth + 64 + 4 * l, 2, flag, q_hi);
#pragma unroll
    for (int i = 0; i < 4; ++i) q_lo[i] *= a.attention_scale * kLog2e, q_hi[i] *= a.attention_scale * kLog2e;
    const float4 c = __ldg(reinterpret_cast<const float4*>(a.rope + 128) + l), s = __ldg(reinterpret_cast<const float4*>(a.rope + 192) + l);
    c1[0] = c.x, c1[1] = c.y, c1[2] = c.z, c1[3] = c.w, s1[0] = s.x, s1[1] = s.y, s1[2] = s.z, s1[3] = s.w;
  }
  int unit = 0;
  for (int piece = share.begin; piece < share.end; ++piece) {
    const int first = piece * kTokens, tokens = min(kTokens, position - first);
    float score[kTokens];
    if (works && (piece - share.begin) % 16 == 0) {  // the exact angle again, so that rounding does not build up
      const float* row = a.rope + static_cast<int64_t>(position - first) * 128;
      const float4 c = __ldg(reinterpret_cast<const float4*>(row) + l), s = __ldg(reinterpret_cast<const float4*>(row + 64) + l);
      const float cc[4] = {c.x, c.y, c.z, c.w}, ss[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) lo[i] = q_lo[i] * cc[i] - q_hi[i] * ss[i], hi[i] = q_hi[i] * cc[i] + q_lo[i] * ss[i];
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      score[t] = -1e30f;
      if (t >= tokens) break;
      const uint32_t at = in.wait(unit + t);
      if (works) {
        const uint32_t row = at + head * (kWidth * 2) + l * 8;
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
      in.release<1>(at);
    }
    const bool up = lane & 8, right = lane & 4;
    const int mine = (up ? 2 : 0) + (right ? 1 : 0);
    float p;
    {
      const float s0 = __shfl_xor_sync(~0u, up ? score[0] : score[2], 8), s1x = __shfl_xor_sync(~0u, up ? score[1] : score[3], 8);
      const float k0 = (up ? score[2] : score[0]) + s0, k1 = (up ? score[3] : score[1]) + s1x;
      float k = (right ? k1 : k0) + __shfl_xor_sync(~0u, right ? k0 : k1, 4);
      k += __shfl_xor_sync(~0u, k, 2);
      k += __shfl_xor_sync(~0u, k, 1);
      if (mine >= tokens) k = -1e30f;
      float top = fmaxf(k, __shfl_xor_sync(~0u, k, 8));
      top = fmaxf(m, fmaxf(top, __shfl_xor_sync(~0u, top, 4)));
      const float shrink = exp2f(m - top);
      p = mine < tokens ? exp2f(k - top) : 0.0f;
      sum = sum * shrink + p;
      m = top;
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[i] *= shrink;
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const float pt = __shfl_sync(~0u, p, (lane & 16) | ((t >> 1) << 3) | ((t & 1) << 2));
      if (t >= tokens) break;
      const uint32_t at = in.wait(unit + tokens + t);
      if (works) {
        const uint4 v = lds128(at + head * (kWidth * 2) + l * 16);
        acc[0] = fmaf(low(v.x), pt, acc[0]), acc[1] = fmaf(high(v.x), pt, acc[1]);
        acc[2] = fmaf(low(v.y), pt, acc[2]), acc[3] = fmaf(high(v.y), pt, acc[3]);
        acc[4] = fmaf(low(v.z), pt, acc[4]), acc[5] = fmaf(high(v.z), pt, acc[5]);
        acc[6] = fmaf(low(v.w), pt, acc[6]), acc[7] = fmaf(high(v.w), pt, acc[7]);
      }
      in.release<1>(at);
    }
    unit += 2 * tokens;
  }
  sum += __shfl_xor_sync(~0u, sum, 8);
  sum += __shfl_xor_sync(~0u, sum, 4);
  if (!works) return;
  const int part = blockIdx.x * H + head;
  if (l == 0) put2(ws.part_ml + part, __float_as_uint(m), __float_as_uint(sum), flag);
  uint2* out = ws.part_o + static_cast<int64_t>(part) * kWidth + 8 * l;
#pragma unroll
  for (int i = 0; i < 4; ++i) put2(out + 2 * i, __float_as_uint(acc[2 * i]), __float_as_uint(acc[2 * i + 1]), flag);
}

__device__ __forceinline__ int attention_units(int position) {
  const Share share((position + kTokens - 1) / kTokens, 3);
  return share.count() > 0 ? 2 * (min(share.end * kTokens, position) - share.begin * kTokens) : 0;
}

// The shares of all multiprocessors and the new token itself, for two values of one head a warp.
template <int kD>
__device__ __forceinline__ void join_shares(const OryxDecodeStep& a, const Workspace& ws, const HeadWork& w, int head, int slice, uint32_t flag) {
  constexpr int H = kD / kWidth;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, G = gridDim.x;
  const int d = slice * kSliceRows + 2 * warp;
  float own = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) own = fmaf(w.q[i], w.k[i], own);
  own = warp_sum(own) * a.attention_scale * kLog2e;  // both at the same angle
  constexpr int kTurns = kMaxGrid / 32;
  uint4 ml[kTurns], value[kTurns];
  bool missing;
  do {
    missing = false;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int c = lane + 32 * i;
      ml[i] = make_uint4(__float_as_uint(-1e30f), flag, 0, flag), value[i] = make_uint4(0, flag, 0, flag);
      if (c < G) ml[i] = look2(ws.part_ml + c * H + head), value[i] = look2(ws.part_o + (static_cast<int64_t>(c) * H + head) * kWidth + d);
    }
#pragma unroll
    for (int i = 0; i < kTurns; ++i) missing |= ml[i].y != flag || ml[i].w != flag || value[i].y != flag || value[i].w != flag;
  } while (missing);
  float m = own;
#pragma unroll
  for (int i = 0; i < kTurns; ++i) m = fmaxf(m, __uint_as_float(ml[i].x));
  __syncwarp();
  m = warp_max(m);
  float total = 0.0f, x = 0.0f, y = 0.0f;
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const float e = exp2f(__uint_as_float(ml[i].x) - m);
    total = fmaf(e, __uint_as_float(ml[i].z), total), x = fmaf(e, __uint_as_float(value[i].x), x), y = fmaf(e, __uint_as_float(value[i].z), y);
  }
  const float e = exp2f(own - m);
  total = warp_sum(total) + e;
  x = (warp_sum(x) + e * w.v[0]) / total;
  y = (warp_sum(y) + e * w.v[1]) / total;
  if (lane == 0) put2(ws.o + head * kWidth + d, __float_as_uint(x), __float_as_uint(y), flag);
}

// Convolutions, the recurrent state of one (head, slice) and, in linear mode, its readout. What does not depend on the new token is read first.
template <int kD>
__device__ __forceinline__ HeadWork advance_state(const OryxDecodeLayer& layer, const Workspace& ws, int head, int slice, int position, bool keeps, bool linear, uint32_t flag) {
  constexpr int H = kD / kWidth;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int channel = head * kWidth + 4 * lane, row = slice * kSliceRows + 2 * warp;
  float* S = layer.S + (static_cast<int64_t>(head) * kWidth + row) * kWidth + 4 * lane;
  float4 state[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) state[r] = __ldcg(reinterpret_cast<const float4*>(S + r * kWidth));
  Tail4 k_tail;
  k_tail.load(layer.k_tail, channel);
  uint32_t* v_tail = reinterpret_cast<uint32_t*>(static_cast<bf16*>(layer.v_tail) + 3 * (head * kWidth + row));
  const uint32_t t0 = __ldcg(v_tail), t1 = __ldcg(v_tail + 1), t2 = __ldcg(v_tail + 2);
  float4 k_filter[4], v_filter[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) k_filter[i] = __ldg(reinterpret_cast<const float4*>(layer.k_conv) + channel + i);
#pragma unroll
  for (int i = 0; i < 2; ++i) v_filter[i] = __ldg(reinterpret_cast<const float4*>(layer.v_conv) + head * kWidth + row + i);
  const float A_log = __ldg(layer.A_log + head), dt_bias = __ldg(layer.dt_bias + head);

  HeadWork w;
  float raw[4], v_raw[2];
  await<2>(ws.proj + channel, 2, flag, raw);
  await<2>(ws.proj + 3 * kD + channel, 2, flag, w.q);
  await<1>(ws.proj + kD + head * kWidth + row, 2, flag, v_raw);
  const float b_in = await(ws.proj + 4 * kD + head, flag), a_in = await(ws.proj + 4 * kD + H + head, flag);
  __syncwarp();
  float kk = 0.0f, qq = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    raw[i] = round_bf16(raw[i]);
    w.k[i] = convolved(k_filter[i], k_tail.at(i, 0), k_tail.at(i, 1), k_tail.at(i, 2), raw[i]);
    kk = fmaf(w.k[i], w.k[i], kk), qq = fmaf(w.q[i], w.q[i], qq);
  }
  w.new_tail = k_tail.shifted(raw);
  v_raw[0] = round_bf16(v_raw[0]), v_raw[1] = round_bf16(v_raw[1]);
  w.v[0] = convolved(v_filter[0], low(t0), high(t0), low(t1), v_raw[0]);
  w.v[1] = convolved(v_filter[1], high(t1), low(t2), high(t2), v_raw[1]);
  const float g = log_decay(A_log, a_in + dt_bias), beta = sigmoid(b_in), decay = __expf(g);
  float predicted[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) predicted[r] = fmaf(state[r].x, w.k[0], fmaf(state[r].y, w.k[1], fmaf(state[r].z, w.k[2], state[r].w * w.k[3])));
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {  // four sums side by side
    kk += __shfl_xor_sync(~0u, kk, d), qq += __shfl_xor_sync(~0u, qq, d);
    predicted[0] += __shfl_xor_sync(~0u, predicted[0], d), predicted[1] += __shfl_xor_sync(~0u, predicted[1], d);
  }
  kk = rsqrtf(kk + 1e-6f), qq = rsqrtf(qq + 1e-6f) * 0.08838834764831845f;
  float out[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float write = beta * (w.v[r] - decay * predicted[r] * kk) * kk;
    float4& s = state[r];
    s.x = fmaf(write, w.k[0], decay * s.x), s.y = fmaf(write, w.k[1], decay * s.y);
    s.z = fmaf(write, w.k[2], decay * s.z), s.w = fmaf(write, w.k[3], decay * s.w);
    out[r] = fmaf(s.x, w.q[0], fmaf(s.y, w.q[1], fmaf(s.z, w.q[2], s.w * w.q[3])));
  }
  if (linear) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) out[0] += __shfl_xor_sync(~0u, out[0], d), out[1] += __shfl_xor_sync(~0u, out[1], d);
    if (lane == 0) put2(ws.o + head * kWidth + row, __float_as_uint(out[0] * qq), __float_as_uint(out[1] * qq), flag);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) *reinterpret_cast<float4*>(S + r * kWidth) = state[r];
  if (lane == 0) {  // this warp alone reads and writes these two channels
    v_tail[0] = pack(high(t0), low(t1)), v_tail[1] = pack(v_raw[0], low(t2)), v_tail[2] = pack(high(t2), v_raw[1]);
    if (keeps) *reinterpret_cast<uint32_t*>(static_cast<bf16*>(layer.values) + static_cast<int64_t>(position) * kD + head * kWidth + row) = pack(w.v[0], w.v[1]);
  }
  if (keeps && slice == 0 && warp == 0) {
    *reinterpret_cast<uint2*>(static_cast<bf16*>(layer.keys) + static_cast<int64_t>(position) * kD + channel) = make_uint2(pack(w.k[0], w.k[1]), pack(w.k[2], w.k[3]));
    if (lane == 0) {
      layer.g_rows[static_cast<int64_t>(position) * H + head] = g;
      layer.beta_rows[static_cast<int64_t>(position) * H + head] = beta;
      if (head == 0 && layer.mode_rows != nullptr) layer.mode_rows[position] = linear ? 0 : 1;
    }
  }
  return w;
}

}  // namespace
}  // namespace oryx::decode_cuda
