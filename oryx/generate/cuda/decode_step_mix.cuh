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
__device__ __forceinline__ void attend_share(const OryxDecodeStep& a, const OryxDecodeLayer& layer, const Workspace& ws, Consumer& in, int position) {
  constexpr int H = kD / kWidth;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, l = lane & 15, head = 2 * warp + (lane >> 4);
  const bool works = 2 * warp < H;  // H is even
  const Share share((position + kTokens - 1) / kTokens, 3);
  // The query turned to where it stands seen from the first key, then back by one position a key: R(p)q . R(j)k = R(p - j)q . k.
  float lo[4], hi[4], c1[4], s1[4], acc[8];
  float m = -1e30f, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) acc[i] = 0.0f;
  float q_lo[4], q_hi[4];
  if (works && share.begin < share.end) {
    const float4 ql = read4(ws.proj + 3 * kD + head * kWidth + 4 * l), qh = read4(ws.proj + 3 * kD + head * kWidth + 64 + 4 * l);
    const float scale = a.attention_scale * kLog2e;
    q_lo[0] = ql.x * scale, q_lo[1] = ql.y * scale, q_lo[2] = ql.z * scale, q_lo[3] = ql.w * scale;
    q_hi[0] = qh.x * scale, q_hi[1] = qh.y * scale, q_hi[2] = qh.z * scale, q_hi[3] = qh.w * scale;
    const float4 c = __ldg(reinterpret_cast<const float4*>(a.rope + 128) + l), s = __ldg(reinterpret_cast<const float4*>(a.rope + 192) + l);
    c1[0] = c.x, c1[1] = c.y, c1[2] = c.z, c1[3] = c.w, s1[0] = s.x, s1[1] = s.y, s1[2] = s.z, s1[3] = s.w;
  }
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
    uint32_t at = in.wait();
    if (works) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const uint32_t row = at + t * (kD * 2) + head * (kWidth * 2) + l * 8;
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
    }
    in.release();
    float p = 0.0f;
    const bool up = lane & 8, right = lane & 4;
    const int mine = (up ? 2 : 0) + (right ? 1 : 0);
    if (works) {
      const float s0 = __shfl_xor_sync(~0u, up ? score[0] : score[2], 8), s1x = __shfl_xor_sync(~0u, up ? score[1] : score[3], 8);
      const float k0 = (up ? score[2] : score[0]) + s0, k1 = (up ? score[3] : score[1]) + s1x;
      float k = (right ? k1 : k0) + __shfl_xor_sync(~0u, right ? k0 : k1, 4);
      k += __shfl_xor_sync(~0u, k, 2);
      k += __shfl_xor_sync(~0u, k, 1);
      if (mine >= tokens) k = -1e30f;  // what lies in the ring there belongs to no token
      float top = fmaxf(k, __shfl_xor_sync(~0u, k, 8));
      top = fmaxf(m, fmaxf(top, __shfl_xor_sync(~0u, top, 4)));
      const float shrink = exp2f(m - top);
      p = mine < tokens ? exp2f(k - top) : 0.0f;
      sum = sum * shrink + p;
      m = top;
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[i] *= shrink;
    }
    at = in.wait();
    if (works) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float pt = __shfl_sync(~0u, p, (lane & 16) | ((t >> 1) << 3) | ((t & 1) << 2));
        if (t >= tokens) break;
        const uint4 v = lds128(at + t * (kD * 2) + head * (kWidth * 2) + l * 16);
        acc[0] = fmaf(low(v.x), pt, acc[0]), acc[1] = fmaf(high(v.x), pt, acc[1]);
        acc[2] = fmaf(low(v.y), pt, acc[2]), acc[3] = fmaf(high(v.y), pt, acc[3]);
        acc[4] = fmaf(low(v.z), pt, acc[4]), acc[5] = fmaf(high(v.z), pt, acc[5]);
        acc[6] = fmaf(low(v.w), pt, acc[6]), acc[7] = fmaf(high(v.w), pt, acc[7]);
      }
    }
    in.release();
  }
  if (!works) return;
  sum += __shfl_xor_sync(~0u, sum, 8);
  sum += __shfl_xor_sync(~0u, sum, 4);
  const int part = blockIdx.x * H + head;
  if (l == 0) ws.part_ml[part] = make_float2(m, sum);
  float4* out = reinterpret_cast<float4*>(ws.part_o + static_cast<int64_t>(part) * kWidth + 8 * l);
  out[0] = make_float4(acc[0], acc[1], acc[2], acc[3]);
  out[1] = make_float4(acc[4], acc[5], acc[6], acc[7]);
}

// The shares of all multiprocessors and the new token itself, for two values of one head a warp.
template <int kD>
__device__ __forceinline__ void join_shares(const OryxDecodeStep& a, const Workspace& ws, const HeadWork& w, int head, int slice) {
  constexpr int H = kD / kWidth;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, G = gridDim.x;
  const int d = slice * kSliceRows + 2 * warp;
  float own = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) own = fmaf(w.q[i], w.k[i], own);
  own = warp_sum(own) * a.attention_scale * kLog2e;  // both at the same angle
  constexpr int kTurns = kMaxGrid / 32;
  float2 ml[kTurns], value[kTurns];
  float m = own;
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int c = lane + 32 * i;
    ml[i] = make_float2(-1e30f, 0.0f), value[i] = make_float2(0.0f, 0.0f);
    if (c < G) {
      ml[i] = __ldcg(ws.part_ml + c * H + head);
      value[i] = __ldcg(reinterpret_cast<const float2*>(ws.part_o + (static_cast<int64_t>(c) * H + head) * kWidth + d));
    }
    m = fmaxf(m, ml[i].x);
  }
  m = warp_max(m);
  float total = 0.0f, x = 0.0f, y = 0.0f;
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const float e = exp2f(ml[i].x - m);
    total = fmaf(e, ml[i].y, total), x = fmaf(e, value[i].x, x), y = fmaf(e, value[i].y, y);
  }
  const float e = exp2f(own - m);
  total = warp_sum(total) + e;
  x = (warp_sum(x) + e * w.v[0]) / total;
  y = (warp_sum(y) + e * w.v[1]) / total;
  if (lane == 0) *reinterpret_cast<float2*>(ws.o + head * kWidth + d) = make_float2(x, y);
}

// Convolutions, the recurrent state of one (head, slice) and, in linear mode, its readout.
template <int kD>
__device__ __forceinline__ HeadWork advance_state(const OryxDecodeLayer& layer, const Workspace& ws, Consumer& in, int head, int slice, int position, bool keeps, bool linear,
                                                  const Tail4& k_tail, const float4 (&k_filter)[4], const float (&v_tail)[2][3], const float4 (&v_filter)[2]) {
  constexpr int H = kD / kWidth;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int channel = head * kWidth + 4 * lane, row = slice * kSliceRows + 2 * warp;
  HeadWork w;
  const float4 k_in = read4(ws.proj + channel), q_in = read4(ws.proj + 3 * kD + channel);
  const float2 v_in = __ldcg(reinterpret_cast<const float2*>(ws.proj + kD + head * kWidth + row));
  const float b_in = __ldcg(ws.proj + 4 * kD + head), a_in = __ldcg(ws.proj + 4 * kD + H + head);
  const float raw[4] = {round_bf16(k_in.x), round_bf16(k_in.y), round_bf16(k_in.z), round_bf16(k_in.w)};
  w.q[0] = q_in.x, w.q[1] = q_in.y, w.q[2] = q_in.z, w.q[3] = q_in.w;
  float kk = 0.0f, qq = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    w.k[i] = convolved(k_filter[i], k_tail.at(i, 0), k_tail.at(i, 1), k_tail.at(i, 2), raw[i]);
    kk = fmaf(w.k[i], w.k[i], kk), qq = fmaf(w.q[i], w.q[i], qq);
  }
  w.new_tail = k_tail.shifted(raw);
  const float v_raw[2] = {round_bf16(v_in.x), round_bf16(v_in.y)};
#pragma unroll
  for (int i = 0; i < 2; ++i) w.v[i] = convolved(v_filter[i], v_tail[i][0], v_tail[i][1], v_tail[i][2], v_raw[i]);
  kk = rsqrtf(warp_sum(kk) + 1e-6f), qq = rsqrtf(warp_sum(qq) + 1e-6f) * 0.08838834764831845f;
  const float g = log_decay(__ldg(layer.A_log + head), a_in + __ldg(layer.dt_bias + head)), beta = sigmoid(b_in), decay = __expf(g);

  const uint32_t at = in.wait();
  float4 state[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) state[r] = lds_float4(at + (2 * warp + r) * (kWidth * 4) + lane * 16);
  float predicted[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    predicted[r] = fmaf(state[r].x, w.k[0], fmaf(state[r].y, w.k[1], fmaf(state[r].z, w.k[2], state[r].w * w.k[3])));
    predicted[r] = warp_sum(predicted[r]) * kk;
  }
  in.release();
  float out[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float delta = beta * (w.v[r] - decay * predicted[r]) * kk;
    float4 s = state[r];
    s.x = fmaf(delta, w.k[0], decay * s.x), s.y = fmaf(delta, w.k[1], decay * s.y);
    s.z = fmaf(delta, w.k[2], decay * s.z), s.w = fmaf(delta, w.k[3], decay * s.w);
    *reinterpret_cast<float4*>(layer.S + (static_cast<int64_t>(head) * kWidth + row + r) * kWidth + 4 * lane) = s;
    out[r] = fmaf(s.x, w.q[0], fmaf(s.y, w.q[1], fmaf(s.z, w.q[2], s.w * w.q[3])));
  }
  if (linear) {
#pragma unroll
    for (int r = 0; r < 2; ++r) out[r] = warp_sum(out[r]) * qq;
    if (lane == 0) *reinterpret_cast<float2*>(ws.o + head * kWidth + row) = make_float2(out[0], out[1]);
  }
  if (lane == 0) {  // this warp alone reads and writes these two channels
    bf16* tail = static_cast<bf16*>(layer.v_tail) + (head * kWidth + row) * 3;
    uint32_t* words = reinterpret_cast<uint32_t*>(tail);
    words[0] = pack(v_tail[0][1], v_tail[0][2]), words[1] = pack(v_raw[0], v_tail[1][1]), words[2] = pack(v_tail[1][2], v_raw[1]);
    if (keeps) *reinterpret_cast<uint32_t*>(static_cast<bf16*>(layer.values) + static_cast<int64_t>(position) * kD + head * kWidth + row) = pack(w.v[0], w.v[1]);
  }
  if (keeps && slice == 0 && warp == 0) {
    *reinterpret_cast<uint2*>(static_cast<bf16*>(layer.keys) + static_cast<int64_t>(position) * kD + channel) = make_uint2(pack(w.k[0], w.k[1]), pack(w.k[2], w.k[3]));
    if (lane == 0) {
      layer.g_rows[static_cast<int64_t>(position) * H + head] = g;
      layer.beta_rows[static_cast<int64_t>(position) * H + head] = beta;
    }
  }
  return w;
}

// The gate of the thread's eight columns is read on the way, as soon as it is there.
template <int kD>
__device__ __forceinline__ void mix(float (&gate)[8], const OryxDecodeStep& a, const OryxDecodeLayer& layer, const Workspace& ws, Consumer& in, Grid& grid, int position, bool attention) {
  constexpr int H = kD / kWidth;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int head = blockIdx.x / kSlices, slice = blockIdx.x % kSlices;
  const bool mine = head < H;
  const bool keeps = layer.keys != nullptr && position < a.capacity;
  Tail4 k_tail;
  float4 k_filter[4], v_filter[2];
  float v_tail[2][3];
  if (mine) {  // what no other multiprocessor of this phase writes is read before they meet
    const int channel = head * kWidth + 4 * lane, row = head * kWidth + slice * kSliceRows + 2 * warp;
    k_tail.load(layer.k_tail, channel);
    const uint32_t* two = reinterpret_cast<const uint32_t*>(static_cast<const bf16*>(layer.v_tail) + 3 * row);
    const uint32_t w0 = __ldcg(two), w1 = __ldcg(two + 1), w2 = __ldcg(two + 2);
    v_tail[0][0] = low(w0), v_tail[0][1] = high(w0), v_tail[0][2] = low(w1), v_tail[1][0] = high(w1), v_tail[1][1] = low(w2), v_tail[1][2] = high(w2);
#pragma unroll
    for (int i = 0; i < 4; ++i) k_filter[i] = __ldg(reinterpret_cast<const float4*>(layer.k_conv) + channel + i);
#pragma unroll
    for (int i = 0; i < 2; ++i) v_filter[i] = __ldg(reinterpret_cast<const float4*>(layer.v_conv) + row + i);
  }
  grid.meet();
  HeadWork w;
  if (mine) w = advance_state<kD>(layer, ws, in, head, slice, position, keeps, !attention, k_tail, k_filter, v_tail, v_filter);
  read_columns<kD>(ws.proj + 2 * kD, gate);
  if (attention) attend_share<kD>(a, layer, ws, in, position);
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0 && layer.mode_rows != nullptr && position < a.capacity) layer.mode_rows[position] = attention ? 1 : 0;
  grid.meet();
  if (mine && slice == 0 && warp == 0) w.new_tail.store(layer.k_tail, head * kWidth + 4 * lane);  // all eight slices have read the old one
  if (!attention) return;
  if (mine) join_shares<kD>(a, ws, w, head, slice);
  grid.meet();
}

}  // namespace
}  // namespace oryx::decode_cuda
