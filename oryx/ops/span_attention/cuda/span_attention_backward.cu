// The backward pass on Hopper. With P = softmax(scale q k^T), delta = rowsum(o d_o), recomputed block by block from the saved logarithms:
//
//   dv = P^T d_o        dS = P (d_o v^T - delta)        dk = scale dS^T q        dq = scale dS k
//
// prepare_kernel gathers the planned slots of 64 into records (q and d_o as swizzled tiles, logarithms, delta, positions). backward_kernel is
// persistent: an item is a block of 128 keys of one key head and walks the tiles of slots that see it, of every query head of its group; where those are many, an item has one of
// the query heads. Its two warpgroups have 64 keys each; scores are computed transposed (keys by slots), so that P^T and dS^T are the left operands of dv and dk straight
// from registers, and dS goes through shared memory for dq, of which each warpgroup computes half the columns.
//
// dq is summed over key blocks in float32 in global memory: one of two warps adds a staged tile by a bulk reduction once the block after it in
// the sequence has added its own (a counter a tile and head), so the order, and with it every bit, is fixed. Blocks are taken from the last of
// a sequence: a block begins with the tiles at its diagonal, which the later ones passed before, and nobody waits for an item that no block has yet.
// The first block of a tile stores instead of adding. Few heads run at a time, so that queries, gradients and sums stay in the L2 cache.
// Where a group's query heads are items of their own, dk and dv are summed over them in the same manner, each in its turn.
// finish_kernel rounds dq and scatters it to its rows; the copying warpgroup's idle warp zeroes the rows outside spans.
#include "oryx/ops/span_attention/cuda/span_attention_backward.cuh"
#include "oryx/ops/span_attention/cuda/span_attention_encode.cuh"
#include "oryx/ops/span_attention/cuda/span_attention_plan.cuh"
#include "oryx/ops/span_attention/cuda/span_attention_products.cuh"

namespace oryx::span_attention_cuda {
namespace {

constexpr int kThreads = 384, kWorkers = 256;

// Barriers, 8 bytes each, from kBarriers.
constexpr int kKvFull = 0, kKvEmpty = 1, kQFull = 2, kQEmpty = 4, kDoFull = 6, kDoEmpty = 8, kDqFull = 10, kDqEmpty = 12, kWorkFull = 14, kWorkEmpty = 16;

template <int D>
__device__ void copy_loop(const Arguments& a, const CUtensorMap* k_map, const CUtensorMap* v_map, uint32_t base) {
  using L = Layout<D>;
  const uint32_t bars = base + L::kBarriers;
  const int items = a.plan.counts->blocks * a.Hq, tiles = a.slots / kSmall;
  int at = 0;
  for (int round = 0;; ++round) {
    const int item = atomicAdd(&a.plan.counts->next_block, 1), ring = round % 2;
    int words[kWorkWords] = {-1};  // block, backward tiles before the sequence, [begin, end) of its, keys, batch row, first key, first query head, heads, blocks before the sequence
    if (item < items) {
      // Sequence by sequence, in it chunk by chunk of its heads, in it blocks from the last, in it heads. Where a group is one item a sequence has numbers to spare, behind its items.
      const Sequence s = a.plan.sequences[a.plan.blocks[item / a.Hq].sequence];
      const int blocks = (s.keys + kKeys - 1) / kKeys, share = s.split ? 1 : a.group, rest = item - s.block * a.Hq;
      if (rest >= blocks * (a.Hq / share)) {
        atomicMax(&a.plan.counts->next_block, (s.block + blocks) * a.Hq);
        --round;
        continue;
      }
      const int chunk = rest / (blocks * s.heads), place = rest % (blocks * s.heads);
      const KeyBlock x = a.plan.blocks[s.block + blocks - 1 - place / s.heads];
      words[0] = x.block, words[1] = s.small, words[2] = x.begin, words[3] = x.end;
      words[4] = s.keys, words[5] = s.row, words[6] = s.k_begin, words[7] = (chunk * s.heads + place % s.heads) * share, words[8] = share, words[9] = s.block;
    }
    if (round >= 2) barrier_wait(bars + 8 * (kWorkEmpty + ring), (round / 2 - 1) & 1);
#pragma unroll
    for (int i = 0; i < kWorkWords; ++i) store_shared4(base + L::kWork + kWorkStride * ring + 4 * i, words[i]);
    barrier_arrive(bars + 8 * (kWorkFull + ring));
    if (item >= items) break;
    const int tiles_here = words[3] - words[2], steps = tiles_here * words[8], key_head = words[7] / a.group;
    for (int i = 0; i < max(steps, 1); ++i, ++at) {
      const int stage = at % kStages;
      if (i < steps) {
        const uint32_t parity = (at / kStages - 1) & 1;
        const int head = words[7] + i / tiles_here, m = words[1] + words[2] + i % tiles_here;
        const char* record = a.records + (static_cast<int64_t>(head) * tiles + m) * L::kRecord;
        const uint32_t q_full = bars + 8 * (kQFull + stage), do_full = bars + 8 * (kDoFull + stage);
        if (at >= kStages) barrier_wait(bars + 8 * (kQEmpty + stage), parity);
        barrier_expect(q_full, L::kSmallMatrix + kStatsBytes);
        bulk_load(base + L::kQ + stage * L::kSmallMatrix, record, L::kSmallMatrix, q_full);
        bulk_load(base + L::kStats + stage * kStatsStride, record + 2 * L::kSmallMatrix, kStatsBytes, q_full);
        if (at >= kStages) barrier_wait(bars + 8 * (kDoEmpty + stage), parity);
        barrier_expect(do_full, L::kSmallMatrix);
        bulk_load(base + L::kDo + stage * L::kSmallMatrix, record + L::kSmallMatrix, L::kSmallMatrix, do_full);
      }
      if (i == 0) {
        if (round > 0) barrier_wait(bars + 8 * kKvEmpty, (round - 1) & 1);
        barrier_expect(bars + 8 * kKvFull, 2 * L::kMatrix);
        for (int j = 0; j < L::kPanels; ++j) {
          tensor_load(base + L::kK + j * L::kPanel, k_map, bars + 8 * kKvFull, 64 * j, key_head, words[6] + words[0] * kKeys, words[5]);
          tensor_load(base + L::kV + j * L::kPanel, v_map, bars + 8 * kKvFull, 64 * j, key_head, words[6] + words[0] * kKeys, words[5]);
        }
      }
      if (steps == 0) break;
    }
  }
}

__device__ __forceinline__ int load_acquire(const int* p) {
  int x;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
__device__ __forceinline__ void store_release(int* p, int x) { asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(x) : "memory"); }

// One thread for every other step's dq: its way to the L2 cache and back, which the next block's turn waits for, takes longer than a step.
template <int D>
__device__ void add_loop(const Arguments& a, uint32_t base, int buffer) {
  using L = Layout<D>;
  const uint32_t bars = base + L::kBarriers;
  const int tiles = a.slots / kSmall;
  int at = 0;
  for (int round = 0;; ++round) {
    const int ring = round % 2;
    const uint32_t work = base + L::kWork + kWorkStride * ring;
    barrier_wait(bars + 8 * (kWorkFull + ring), (round / 2) & 1);
    const int block = load_shared_int(work), small = load_shared_int(work + 4), begin = load_shared_int(work + 8), end = load_shared_int(work + 12);
    const int first_head = load_shared_int(work + 28), heads = load_shared_int(work + 32);
    barrier_arrive(bars + 8 * (kWorkEmpty + ring));
    if (block < 0) break;
    for (int head = first_head; head < first_head + heads; ++head) {
      for (int j = begin; j < end; ++j, ++at) {
        if (at % 2 != buffer) continue;
        const int64_t tile = static_cast<int64_t>(head) * tiles + small + j;
        // The last key block that sees the tile adds first.
        const int first = *reinterpret_cast<const int*>(a.records + tile * L::kRecord + 2 * L::kSmallMatrix + 4 * 193) / kKeys;
        int* turn = a.turns + tile;
        float* to = a.dq_sum + tile * kSmall * D;
        const uint32_t from = base + L::kDq + buffer * 2 * L::kHalf;
        if (block != first) {
          while (load_acquire(turn) != first - block) __nanosleep(20);
        }
        barrier_wait(bars + 8 * (kDqFull + buffer), (at / 2) & 1);
        if (block == first) bulk_store(to, from, 2 * L::kHalf);
        else bulk_add(to, from, 2 * L::kHalf);
        bulk_commit();
        bulk_wait();
        store_release(turn, first - block + 1);
        barrier_arrive(bars + 8 * (kDqEmpty + buffer));
      }
    }
  }
}

// Adds an item's dv and dk of a warpgroup's 64 keys to those of the query heads before it in the group, which share the key head; true: of all of them now, in the registers.
template <int D>
__device__ __forceinline__ bool add_group(const Arguments& a, float (&dv)[D / 2], float (&dk)[D / 2], int64_t place, int part, int barrier, int thread) {
  int* turn = a.group_turns + place;
  float4* sums = reinterpret_cast<float4*>(a.group_sum) + place * (D / 4 * 128) + thread;
  const auto wait_turn = [&] {
    if (thread == 0) {
      while (load_acquire(turn) != part) __nanosleep(20);
    }
    named_barrier(barrier, 128);
  };
  const auto add = [](float4 x, float* to) { to[0] += x.x, to[1] += x.y, to[2] += x.z, to[3] += x.w; };
  if (part > 0) {
    wait_turn();
#pragma unroll
    for (int i = 0; i < D / 8; ++i) add(__ldcg(sums + i * 128), dv + 4 * i);
#pragma unroll
    for (int i = 0; i < D / 8; ++i) add(__ldcg(sums + (D / 8 + i) * 128), dk + 4 * i);
  }
  if (part + 1 == a.group) return true;
#pragma unroll
  for (int i = 0; i < D / 8; ++i) __stcg(sums + i * 128, make_float4(dv[4 * i], dv[4 * i + 1], dv[4 * i + 2], dv[4 * i + 3]));
#pragma unroll
  for (int i = 0; i < D / 8; ++i) __stcg(sums + (D / 8 + i) * 128, make_float4(dk[4 * i], dk[4 * i + 1], dk[4 * i + 2], dk[4 * i + 3]));
  __threadfence();
  named_barrier(barrier, 128);
  if (thread == 0) store_release(turn, part + 1);
  return false;
}

__device__ void zero_rows(const Arguments& a, int bytes, int warp, int warps, int lane) {
  for (int64_t g = warp; g < a.queries; g += warps) {
    if (a.plan.mask[g] != 0) continue;
    char* row = reinterpret_cast<char*>(a.dq) + g * bytes;
    for (int i = 16 * lane; i < bytes; i += 512) *reinterpret_cast<uint4*>(row + i) = make_uint4(0, 0, 0, 0);
  }
}

// 64 rows of `x` times `factor` into panels of 64 rows, swizzled.
template <int D>
__device__ __forceinline__ void stage_rows(const float (&x)[D / 2], float factor, uint32_t at, int row, int column) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = row + 8 * h;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
      store_shared4(at + j / 8 * Layout<D>::kSmallPanel + r * 128 + ((j % 8 ^ r % 8) << 4) + 2 * column,
                    pack(x[4 * j + 2 * h] * factor, x[4 * j + 2 * h + 1] * factor));
  }
}
template <int D>
__device__ __forceinline__ void write_rows(__nv_bfloat16* to, size_t stride, uint32_t at, int rows, int thread) {
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    const int r = (thread + 128 * i) / (D / 8), unit = (thread + 128 * i) % (D / 8);
    const uint32_t from = at + unit / 8 * Layout<D>::kSmallPanel + r * 128 + ((unit % 8 ^ r % 8) << 4);
    if (r < rows) *reinterpret_cast<uint4*>(to + r * stride + unit * 8) = load_shared16(from);
  }
}

template <int D>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map, const __grid_constant__ Arguments a) {
  using L = Layout<D>;
  extern __shared__ char raw_shared[];
  const uint32_t base = (smem_address(raw_shared) + 1023) & ~1023u, bars = base + L::kBarriers;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    barrier_init(bars + 8 * kKvFull, 1);
    barrier_init(bars + 8 * kKvEmpty, kWorkers / 32 * kWarpArrivals);
    for (int i = 0; i < 2; ++i) {
      barrier_init(bars + 8 * (kQFull + i), 1);
      barrier_init(bars + 8 * (kDoFull + i), 1);
      barrier_init(bars + 8 * (kQEmpty + i), kWorkers / 32 * kWarpArrivals);
      barrier_init(bars + 8 * (kDoEmpty + i), kWorkers / 32 * kWarpArrivals);
      barrier_init(bars + 8 * (kDqFull + i), kWorkers / 32 * kWarpArrivals);
      barrier_init(bars + 8 * (kDqEmpty + i), 1);
      barrier_init(bars + 8 * (kWorkFull + i), 1);
      barrier_init(bars + 8 * (kWorkEmpty + i), kWorkers / 32 * kWarpArrivals + 2);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (warp >= kWorkers / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");  // 24 x 128 + 240 x 256 are the registers that the block was started with
    const int role = warp - kWorkers / 32;
    if (role == 0 && lane == 0) copy_loop<D>(a, &k_map, &v_map, base);
    if ((role == 1 || role == 2) && lane == 0) add_loop<D>(a, base, role - 1);
    if (role == 3 && a.zero) zero_rows(a, a.Hq * D * 2, blockIdx.x, gridDim.x, lane);
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  const int group = warp / 4, row = warp % 4 * 16 + lane / 4, column = 2 * (lane % 4), thread = threadIdx.x % 128;
  const uint32_t own_k = base + L::kK + group * 64 * 128, own_v = base + L::kV + group * 64 * 128;
  const float c = a.scale * 1.4426950408889634f;

  int at = 0;
  for (int round = 0;; ++round) {
    const int ring = round % 2;
    const uint32_t work = base + L::kWork + kWorkStride * ring;
    barrier_wait(bars + 8 * (kWorkFull + ring), (round / 2) & 1);
    const auto field = [&](int i) { return __shfl_sync(~0u, load_shared_int(work + 4 * i), 0); };
    const int block = field(0), heads = field(8), steps = (field(3) - field(2)) * heads, keys = field(4), batch = field(5), k_begin = field(6), head = field(7), before = field(9);
    __syncwarp();
    barrier_arrive_warp(bars + 8 * (kWorkEmpty + ring), lane);
    if (block < 0) break;
    barrier_wait(bars + 8 * kKvFull, round & 1);
    const int in_use = keys - block * kKeys;
    if (in_use < kKeys) {
      clear_rows(base + L::kK, L::kPanels, kKeys, in_use, threadIdx.x, kWorkers);
      clear_rows(base + L::kV, L::kPanels, kKeys, in_use, threadIdx.x, kWorkers);
      fence_async_proxy();
      named_barrier(1, kWorkers);
    }
    float dk[D / 2], dv[D / 2];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0.f;
    const int key = block * kKeys + 64 * group + row;  // of the thread: this one and 8 further on

    // Scores of a step are issued behind the products of the step before.
    float s[32];
    const auto issue_scores = [&](int n, bool wait) {
      const int stage = n % kStages;
      const uint32_t q = base + L::kQ + stage * L::kSmallMatrix;
      if (wait) barrier_wait(bars + 8 * (kQFull + stage), (n / kStages) & 1);
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < D / 16; ++kk)
        if (kk == 0) wgmma_start(s, descriptor(own_k, 16, 1024), descriptor(q, 16, 1024));
        else wgmma(s, descriptor(own_k + kk / 4 * L::kPanel + kk % 4 * 32, 16, 1024),
                                descriptor(q + kk / 4 * L::kSmallPanel + kk % 4 * 32, 16, 1024), 1);
    };
    if (steps > 0) {
      issue_scores(at, true);
      wgmma_commit();
      wgmma_wait<0>();
      keep(s);
      for (int left = steps; left > 0; --left) {
        const int stage = at % kStages;
        const uint32_t parity = (at / kStages) & 1;
        const uint32_t q = base + L::kQ + stage * L::kSmallMatrix, d_o = base + L::kDo + stage * L::kSmallMatrix;
        const uint32_t ds = base + L::kDs + at % 2 * 2 * L::kSmallPanel;
        const uint32_t stats = base + L::kStats + stage * kStatsStride;
        float dp[32];
        barrier_wait(bars + 8 * (kDoFull + stage), parity);
        wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < D / 16; ++kk)
          if (kk == 0) wgmma_start(dp, descriptor(own_v, 16, 1024), descriptor(d_o, 16, 1024));
          else wgmma(dp, descriptor(own_v + kk / 4 * L::kPanel + kk % 4 * 32, 16, 1024),
                                  descriptor(d_o + kk / 4 * L::kSmallPanel + kk % 4 * 32, 16, 1024), 1);
        wgmma_commit();
        const int first = __shfl_sync(~0u, load_shared_int(stats + 4 * 192), 0), last = __shfl_sync(~0u, load_shared_int(stats + 4 * 193), 0);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float2 lse = load_shared2(stats + 4 * (8 * j + column));
#pragma unroll
          for (int i = 0; i < 4; ++i) s[4 * j + i] = exp2_fast(fmaf(s[4 * j + i], c, i % 2 == 0 ? -lse.x : -lse.y));
        }
        if (first < (block + 1) * kKeys - 1 || (a.window > 0 && last - a.window >= block * kKeys)) {
#pragma unroll
          for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int position = load_shared_int(stats + 4 * (128 + 8 * j + column + i));
              const int from = a.window > 0 ? position - a.window + 1 : 0;
              if (key > position || key < from) s[4 * j + i] = 0.f;
              if (key + 8 > position || key + 8 < from) s[4 * j + 2 + i] = 0.f;
            }
        }
        uint32_t pb[16], sb[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) pb[i] = pack(s[2 * i], s[2 * i + 1]);
        wgmma_wait<0>();
        keep(dp);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float2 delta = load_shared2(stats + 4 * (64 + 8 * j + column));
#pragma unroll
          for (int i = 0; i < 4; i += 2)
            sb[2 * j + i / 2] = pack(s[4 * j + i] * (dp[4 * j + i] - delta.x), s[4 * j + i + 1] * (dp[4 * j + i + 1] - delta.y));
        }
        keep(pb);
        keep(sb);
        keep(dv);
        wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < 4; ++kk) wgmma<true>(dv, pb + 4 * kk, descriptor(d_o + kk * 2048, L::kSmallPanel, 1024), 1);
        wgmma_commit();
#pragma unroll
        for (int jj = 0; jj < 4; ++jj) {
          const int t = 8 * (2 * jj + lane / 16) + lane % 8, unit = 2 * (warp % 4) + lane / 8 % 2;
          store_matrix_transposed(ds + group * L::kSmallPanel + t * 128 + ((unit ^ t % 8) << 4), sb[4 * jj], sb[4 * jj + 1], sb[4 * jj + 2],
                                  sb[4 * jj + 3]);
        }
        fence_async_proxy();
        named_barrier(1, kWorkers);
        float dq[D / 4];
        wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < 8; ++kk)
          wgmma<true>(dq, descriptor(ds + kk / 4 * L::kSmallPanel + kk % 4 * 32, 16, 1024),
                            descriptor(base + L::kK + (D == 128 ? group * L::kPanel : group * 64) + kk * 2048, L::kPanel, 1024), kk > 0);
        wgmma_commit();
        keep(dk);
        wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < 4; ++kk) wgmma<true>(dk, sb + 4 * kk, descriptor(q + kk * 2048, L::kSmallPanel, 1024), 1);
        wgmma_commit();
        wgmma_wait<2>();
        keep(dv);
        keep(pb);
        barrier_arrive_warp(bars + 8 * (kDoEmpty + stage), lane);
        // After the last step: of whatever the stage holds, for nothing. A branch here would make the compiler serialize the products.
        issue_scores(at + 1, left > 1);
        wgmma_commit();
        const int buffer = at % 2;
        if (at >= 2) barrier_wait(bars + 8 * (kDqEmpty + buffer), (at / 2 - 1) & 1);
        wgmma_wait<2>();
        keep(dq);
#pragma unroll
        for (int i = 0; i < D / 16; ++i)
          store_shared16(base + L::kDq + (2 * buffer + group) * L::kHalf + i * 2048 + thread * 16,
                         make_uint4(__float_as_uint(dq[4 * i]), __float_as_uint(dq[4 * i + 1]), __float_as_uint(dq[4 * i + 2]),
                                    __float_as_uint(dq[4 * i + 3])));
        fence_async_proxy();
        __syncwarp();
        barrier_arrive_warp(bars + 8 * (kDqFull + buffer), lane);
        wgmma_wait<1>();
        keep(dk);
        keep(sb);
        barrier_arrive_warp(bars + 8 * (kQEmpty + stage), lane);
        wgmma_wait<0>();
        keep(s);
        ++at;
      }
    }

    if (in_use < kKeys) fence_async_proxy();  // rows were cleared
    __syncwarp();
    barrier_arrive_warp(bars + 8 * kKvEmpty, lane);  // the next keys are on their way while these leave by way of dq's two buffers
    const int key_head = head / a.group;
    if (heads < a.group && !add_group<D>(a, dv, dk, (static_cast<int64_t>(before + block) * a.Hk + key_head) * 2 + group, head % a.group, 2 + group, thread)) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (at + i >= 2) barrier_wait(bars + 8 * (kDqEmpty + (at + i) % 2), ((at + i) / 2 - 1) & 1);
    const uint32_t out = base + L::kDq + group * L::kHalf;  // of the first buffer; in the second 2 kHalf further on
    stage_rows<D>(dv, 1.f, out, row, column);
    stage_rows<D>(dk, a.scale, out + 2 * L::kHalf, row, column);
    named_barrier(2 + group, 128);
    const size_t stride = static_cast<size_t>(a.Hk) * D;
    const size_t to = (static_cast<size_t>(batch) * a.Tk + k_begin + block * kKeys + 64 * group) * stride + key_head * D;
    write_rows<D>(a.dv + to, stride, out, in_use - 64 * group, thread);
    write_rows<D>(a.dk + to, stride, out + 2 * L::kHalf, in_use - 64 * group, thread);
  }
}

struct Scratch {
  size_t records, sums, turns, group_sums, group_turns, bytes;
};
Scratch scratch_of(const OryxSpanAttention& p) {
  const size_t tiles = static_cast<size_t>(slots(p)) / kSmall * p.Hq;
  Scratch r{};
  r.sums = tiles * (p.D == 64 ? Layout<64>::kRecord : Layout<128>::kRecord);
  r.turns = r.sums + tiles * kSmall * p.D * sizeof(float);
  // dk and dv of query heads that share a key head, where they may be items of their own: float32, a warpgroup's 64 keys together.
  const size_t halves = splits_groups(p, p.Tq) ? 2 * static_cast<size_t>(max_blocks(p)) * p.Hk : 0;
  r.group_sums = (r.turns + tiles * sizeof(int) + 15) / 16 * 16;
  r.group_turns = r.group_sums + halves * 2 * kKeys / 2 * p.D * sizeof(float);
  r.bytes = r.group_turns + halves * sizeof(int);
  return r;
}

template <int D>
int launch(const OryxSpanAttention& p, void* memory, void* scratch, cudaStream_t stream) {
  Arguments a{};
  a.plan = layout(p, memory);
  a.q = static_cast<const __nv_bfloat16*>(p.q), a.o = static_cast<const __nv_bfloat16*>(p.o_in), a.d_o = static_cast<const __nv_bfloat16*>(p.d_o);
  a.lse = p.lse;
  a.dq = static_cast<__nv_bfloat16*>(p.dq), a.dk = static_cast<__nv_bfloat16*>(p.dk), a.dv = static_cast<__nv_bfloat16*>(p.dv);
  const Scratch s = scratch_of(p);
  a.records = static_cast<char*>(scratch);
  a.dq_sum = reinterpret_cast<float*>(a.records + s.sums), a.turns = reinterpret_cast<int*>(a.records + s.turns);
  a.group_sum = reinterpret_cast<float*>(a.records + s.group_sums), a.group_turns = reinterpret_cast<int*>(a.records + s.group_turns);
  a.q_row = p.q_stride[0], a.q_token = p.q_stride[1], a.q_head = p.q_stride[2];
  a.slots = slots(p);
  a.Tq = p.Tq, a.Tk = p.Tk, a.Hq = p.Hq, a.Hk = p.Hk, a.group = p.Hq / p.Hk, a.queries = p.B * p.Tq, a.window = p.window, a.scale = p.scale;
  a.zero = p.spans != nullptr;
  CUtensorMap k_map{}, v_map{};
  cudaError_t status = encode(&k_map, p.k, p.k_stride, p.B, p.Tk, p.Hk, D, kKeys);
  if (status == cudaSuccess) status = encode(&v_map, p.v, p.v_stride, p.B, p.Tk, p.Hk, D, kKeys);
  if (status == cudaSuccess) status = cudaFuncSetAttribute(backward_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, Layout<D>::kBytes);
  if (status != cudaSuccess) return status;
  const dim3 tiles(static_cast<unsigned>(a.slots / kSmall), p.Hq);
  prepare_kernel<D><<<dim3(tiles.x, p.Hq + 1), 256, 0, stream>>>(a);
  if ((status = cudaGetLastError()) != cudaSuccess) return status;
  backward_kernel<D><<<p.processors, kThreads, Layout<D>::kBytes, stream>>>(k_map, v_map, a);
  if ((status = cudaGetLastError()) != cudaSuccess) return status;
  finish_kernel<D><<<tiles, 256, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace
}  // namespace oryx::span_attention_cuda

using namespace oryx::span_attention_cuda;

extern "C" size_t oryx_span_attention_backward_bytes(const OryxSpanAttention* p) { return scratch_of(*p).bytes; }
extern "C" int oryx_span_attention_backward(const OryxSpanAttention* p, void* plan, void* scratch, cudaStream_t stream) {
  return p->D == 64 ? launch<64>(*p, plan, scratch, stream) : launch<128>(*p, plan, scratch, stream);
}
