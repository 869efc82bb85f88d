// The forward pass on Hopper: o = softmax(scale q k^T) v over the planned tiles (span_attention_plan.cuh).
//
// A block is persistent, one a multiprocessor: a thread that copies keys and values (TMA, two stages of 128 rows each) and hands out tiles, and two
// warpgroups with 64 slots each of the tile of 128. A warpgroup, for each block of keys n:
//
//   issue S = Q K_n^T, then O += P V_(n-1);  wait for S;  m' = max(m, rowmax S);  P = exp2(c (S - m'));  l = l exp2(c (m - m')) + rowsum P;
//   wait for O;  O *= exp2(c (m - m'))                                                                             c = scale log2(e)
//
// so the softmax of one block runs beside the products of the one before, and, the two warpgroups taking turns at issuing (named barriers), beside the
// other's. Scores, sums and O are float32 in registers; P is rounded to bfloat16 for its product. Queries are gathered slot by slot: a tile may hold
// any queries of a sequence, and each row has its own last (and, with a window, first) key; blocks that all rows see whole are not masked.
//
// Which block takes a tile when depends on time, but no sum does: the bits of the result do not vary. Tiles that were split leave partial results;
// whoever finishes the last piece adds them up, in the order of the keys. The copying warpgroup's idle warps zero the rows of o outside spans meanwhile.
//
// Far keys (a sequence's first ones, and keys between, span_attention_launch.h) are blocks in front of a tile's others: the same loop over other tensor maps, with masks of
// their own. They are a form of the kernel of their own (kFar), so that the other one carries none of it.
#include "oryx/ops/cuda/dependent_launch.cuh"
#include "oryx/ops/span_attention/cuda/span_attention_encode.cuh"
#include "oryx/ops/span_attention/cuda/span_attention_plan.cuh"
#include "oryx/ops/span_attention/cuda/span_attention_products.cuh"
#include "oryx/ops/span_attention/cuda/span_attention_softmax.cuh"

namespace oryx::span_attention_cuda {
namespace {

constexpr int kStages = 2, kThreads = 384;
constexpr int kWorkers = 256;  // threads of the two warpgroups that compute

struct Work {  // an item, as the copying thread hands it out; first_block: as if the far blocks stood side by side in front of the tile's own
  int count, slot, shift, head, first_block, blocks, part, split, keys, pieces, first_part, row, key_head, k_begin;
  int begin, far, start, sequence;  // kFar: the item's first block among all of the tile, Tile::far, the position of key 0
};
constexpr int kWorkWords = 11, kFarWords = 4;  // of which the warpgroups read so many

// k and v of the last keys, the first ones and those between.
struct Maps {
  CUtensorMap k[3], v[3];
};

struct Arguments {
  Plan plan;
  const __nv_bfloat16* q;
  __nv_bfloat16* o;
  float *lse, *parts;
  int64_t q_row, q_token, q_head;
  int64_t slots;
  int Tq, Tk, Hq, group, queries, window;
  float scale;
  bool zero;
  const int32_t *positions, *seen;  // kFar, and the rest too
  int first_keys, between_blocks, far_window, reach;
};

template <int D>
struct Layout {
  static constexpr int kPanels = D / 64, kPanel = 128 * 128, kMatrix = kPanels * kPanel;
  static constexpr int kQ = 0, kK = 2 * kMatrix, kV = kK + kStages * kMatrix, kWork = kV + kStages * kMatrix;
  static constexpr int kBarriers = kWork + 2 * 64;
  static constexpr int kBytes = kBarriers + 8 * (4 * kStages + 4) + 1024;
};

template <bool kFar>
__device__ Work make_work(const Arguments& a, int item, int whole) {
  Piece piece{item, 0, -1, 0, 0, 1, 0, 0};
  if (item >= whole) piece = a.plan.pieces[item - whole];
  const Unit u = unit_of(a.plan, piece.unit, a.Hq);
  const Tile t = a.plan.tiles[u.tile];
  const Sequence s = a.plan.sequences[t.sequence];
  const int blocks = piece.blocks < 0 ? t.blocks : piece.blocks;
  Work w{t.count,     t.slot, s.shift - s.q_begin, u.head,      t.first_block + piece.begin, blocks,           piece.part,
         piece.split, s.keys, piece.pieces,        piece.first, s.row,                       u.head / a.group, s.k_begin};
  if constexpr (kFar) {
    w.first_block -= t.all_far();
    w.begin = piece.begin, w.far = static_cast<int>(t.far), w.start = a.positions[s.q_begin] - s.shift, w.sequence = t.sequence;
  }
  return w;
}

template <int D, bool kFar>
__device__ void copy_loop(const Arguments& a, const Maps& maps, uint32_t base) {
  using L = Layout<D>;
  const uint32_t k_full = base + L::kBarriers, k_empty = k_full + 8 * kStages, v_full = k_empty + 8 * kStages, v_empty = v_full + 8 * kStages;
  const uint32_t work_full = v_empty + 8 * kStages, work_empty = work_full + 16;
  const int items = a.plan.counts->items, whole = a.plan.counts->whole;
  // Claims an item, writes it for the warpgroups.
  const auto claim = [&](int round) {
    const int item = round == 0 ? blockIdx.x : atomicAdd(&a.plan.counts->next_item, 1), ring = round % 2;
    Work w{};
    if (item < items) w = make_work<kFar>(a, item, whole);
    if (round >= 2) barrier_wait(work_empty + 8 * ring, (round / 2 - 1) & 1);
    const int words[kWorkWords + kFarWords] = {w.count, w.slot,   w.shift,      w.head,  w.first_block, w.blocks, w.part,    w.split,
                                               w.keys,  w.pieces, w.first_part, w.begin, w.far,         w.start,  w.sequence};
#pragma unroll
    for (int i = 0; i < kWorkWords + (kFar ? kFarWords : 0); ++i) store_shared4(base + L::kWork + 64 * ring + 4 * i, words[i]);
    barrier_arrive(work_full + 8 * ring);
    return w;
  };
  int at = 0;
  Work w = claim(0);
  for (int round = 0; w.count > 0; ++round) {
    Work next{};
    for (int i = 0; i < w.blocks; ++i, ++at) {
      // Some blocks early: reading the plan takes as long as a block, and the next queries are loaded before this item ends.
      if (i == max(0, w.blocks - 3)) next = claim(round + 1);
      const int stage = at % kStages;
      int token = w.k_begin + (w.first_block + i) * kKeys, row = w.row, source = 0;
      if constexpr (kFar) {
        const int block = w.begin + i, firsts = w.far & 0xffff, far = firsts + static_cast<int>(static_cast<uint32_t>(w.far) >> 16);
        if (block < far) source = block < firsts ? 1 : 2, token = (block < firsts ? block : block - firsts) * kKeys, row = w.sequence;
      }
      const CUtensorMap *k_map = maps.k + source, *v_map = maps.v + source;
      const uint32_t parity = (at / kStages - 1) & 1;
      if (at >= kStages) barrier_wait(k_empty + 8 * stage, parity);
      barrier_expect(k_full + 8 * stage, L::kMatrix);
      for (int j = 0; j < L::kPanels; ++j)
        tensor_load(base + L::kK + stage * L::kMatrix + j * L::kPanel, k_map, k_full + 8 * stage, 64 * j, w.key_head, token, row);
      if (at >= kStages) barrier_wait(v_empty + 8 * stage, parity);
      barrier_expect(v_full + 8 * stage, L::kMatrix);
      for (int j = 0; j < L::kPanels; ++j)
        tensor_load(base + L::kV + stage * L::kMatrix + j * L::kPanel, v_map, v_full + 8 * stage, 64 * j, w.key_head, token, row);
    }
    w = next;
  }
}

// Rows of o that no span has, by warps [0, warps) of the grid.
__device__ void zero_rows(const Arguments& a, int bytes, int warp, int warps, int lane) {
  for (int64_t g = warp; g < a.queries; g += warps) {
    if (a.plan.mask[g] != 0) continue;
    char* row = reinterpret_cast<char*>(a.o) + g * bytes;
    for (int i = 16 * lane; i < bytes; i += 512) *reinterpret_cast<uint4*>(row + i) = make_uint4(0, 0, 0, 0);
  }
}

template <int D>
__device__ __forceinline__ void scores(float (&s)[64], uint32_t q, uint32_t k) {
#pragma unroll
  for (int kk = 0; kk < D / 16; ++kk) {
    const int at = kk / 4 * Layout<D>::kPanel + kk % 4 * 32;
    wgmma(s, descriptor(q + at, 16, 1024), descriptor(k + at, 16, 1024), kk > 0);
  }
  wgmma_commit();
}
template <int D>
__device__ __forceinline__ void add_values(float (&o)[D / 2], const uint32_t (&p)[32], uint32_t v) {
#pragma unroll
  for (int kk = 0; kk < 8; ++kk) wgmma<true>(o, p + 4 * kk, descriptor(v + kk * 2048, Layout<D>::kPanel, 1024), 1);
  wgmma_commit();
}

// An item as a warpgroup sees it. All but `last` is the same for all lanes, which the compiler must know to keep products in flight.
struct Item {
  int count, slot, head, first_block, blocks, part, split, keys, pieces, first_part;
  int begin, far, start, sequence;  // as in Work
  int low_key, high_key;  // the keys of the warpgroup's first and last query
  int last[2];            // of the thread's two rows
  __device__ int mine(int group) const { return min(64, count - 64 * group); }  // slots of the warpgroup
};

// Takes the next item and starts loading its queries.
template <int D, bool kFar>
__device__ __forceinline__ Item take_item(const Arguments& a, uint32_t base, int round, int group, int row, int thread) {
  using L = Layout<D>;
  const uint32_t work_full = base + L::kBarriers + 8 * 4 * kStages, work = base + L::kWork + round % 2 * 64;
  barrier_wait(work_full + 8 * (round % 2), (round / 2) & 1);
  const auto field = [&](int i) { return __shfl_sync(~0u, load_shared_int(work + 4 * i), 0); };
  Item x;
  x.count = field(0), x.slot = field(1) + 64 * group, x.head = field(3), x.first_block = field(4), x.blocks = field(5), x.part = field(6);
  x.split = field(7), x.keys = field(8), x.pieces = field(9), x.first_part = field(10);
  if constexpr (kFar) x.begin = field(11), x.far = field(12), x.start = field(13), x.sequence = field(14);
  const int shift = field(2), mine = x.mine(group);
  __syncwarp();
  barrier_arrive_warp(work_full + 16 + 8 * (round % 2), thread % 32);
  x.low_key = x.high_key = x.last[0] = x.last[1] = 0;
  if (mine <= 0) return x;
  const int* rows = a.plan.rows + x.slot;
  const uint32_t to = base + L::kQ + round % 2 * L::kMatrix + group * 64 * 128;
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    const int r = (thread + 128 * i) / (D / 8), unit = (thread + 128 * i) % (D / 8);
    const bool valid = r < mine;
    const int g = valid ? rows[r] : 0;
    const __nv_bfloat16* from = a.q + g / a.Tq * a.q_row + g % a.Tq * a.q_token + x.head * a.q_head + unit * 8;
    copy16(to + unit / 8 * L::kPanel + r * 128 + ((unit % 8 ^ r % 8) << 4), from, valid);
  }
  x.low_key = rows[0] + shift, x.high_key = rows[mine - 1] + shift;
#pragma unroll
  for (int h = 0; h < 2; ++h) x.last[h] = row + 8 * h < mine ? rows[row + 8 * h] + shift : x.high_key;
  return x;
}

template <int D, bool kFar>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments a) {
  using L = Layout<D>;
  extern __shared__ char raw_shared[];
  const uint32_t base = (smem_address(raw_shared) + 1023) & ~1023u;
  const uint32_t k_full = base + L::kBarriers, k_empty = k_full + 8 * kStages, v_full = k_empty + 8 * kStages, v_empty = v_full + 8 * kStages;
  const uint32_t work_full = v_empty + 8 * kStages, work_empty = work_full + 16;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(k_full + 8 * i, 1);
      barrier_init(v_full + 8 * i, 1);
      barrier_init(k_empty + 8 * i, kWorkers / 32 * kWarpArrivals);
      barrier_init(v_empty + 8 * i, kWorkers / 32 * kWarpArrivals);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(work_full + 8 * i, 1);
      barrier_init(work_empty + 8 * i, kWorkers / 32 * kWarpArrivals);
    }
    barrier_init_fence();
  }
  __syncthreads();
  ops::cuda::wait_for_previous();  // the plan: nothing of it is read before this

  if (warp >= kWorkers / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");  // 40 x 128 + 232 x 256 are the registers that the block was started with
    if (warp == kWorkers / 32) {
      if (lane == 0) copy_loop<D, kFar>(a, maps, base);
    } else if (a.zero) {
      zero_rows(a, a.Hq * D * 2, (warp - kWorkers / 32 - 1) * gridDim.x + blockIdx.x, 3 * gridDim.x, lane);
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  const int group = warp / 4, row = warp % 4 * 16 + lane / 4, column = 2 * (lane % 4), thread = threadIdx.x % 128;
  const float c = a.scale * 1.4426950408889634f;
  if (group == 1) barrier_arrive_named(2, kWorkers);  // the first turn is the first warpgroup's

  int at = 0;  // key blocks so far
  Item item = take_item<D, kFar>(a, base, 0, group, row, thread);
  for (int round = 0; item.count > 0; ++round) {
    const int mine = item.mine(group), blocks = item.blocks, first_block = item.first_block;
    const bool both = item.count > 64;
    if (mine <= 0) {  // the other warpgroup works alone
      for (int i = 0; i < blocks; ++i, ++at) {
        const int stage = at % kStages;
        barrier_wait(k_full + 8 * stage, (at / kStages) & 1);
        barrier_arrive_warp(k_empty + 8 * stage, lane);
        barrier_wait(v_full + 8 * stage, (at / kStages) & 1);
        barrier_arrive_warp(v_empty + 8 * stage, lane);
      }
      named_barrier(4 + group, 128);  // nobody loads queries where another warp still reads results
      item = take_item<D, kFar>(a, base, round + 1, group, row, thread);
      continue;
    }
    const uint32_t own_q = base + L::kQ + round % 2 * L::kMatrix + group * 64 * 128;  // the warpgroup's 64 rows of each panel
    const int* rows = a.plan.rows + item.slot;
    int last[2], first[2];  // seen keys of the thread's two rows, from its first column
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      last[h] = item.last[h] - first_block * kKeys - column;
      first[h] = a.window > 0 ? last[h] - a.window + 1 : INT_MIN;
    }
    const int whole_until = item.low_key + 1, whole_from = a.window > 0 ? item.high_key - a.window + 1 : 0;  // keys that every row sees
    copy_wait();
    fence_async_proxy();
    named_barrier(4 + group, 128);

    float o[D / 2], s[64], m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f}, factor[2];
    uint32_t p[32];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0.f;
    const int firsts = kFar ? item.far & 0xffff : 0, far = kFar ? firsts + static_cast<int>(static_cast<uint32_t>(item.far) >> 16) - item.begin : 0;
    const auto hide_far = [&](int n) {
      const int block = item.begin + n, low = item.low_key + item.start, high = item.high_key + item.start;
      const int t[2] = {item.last[0] + item.start, item.last[1] + item.start};
      if (block < firsts) {
        const int key = block * kKeys;
        if (key + kKeys <= min(a.first_keys, low - a.far_window + 1) && (a.reach == 0 || key > high - a.reach)) return;
        int f[2], e[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          e[h] = min(a.first_keys - 1, t[h] - a.far_window) - key - column;
          f[h] = a.reach > 0 ? t[h] - a.reach + 1 - key - column : INT_MIN;
        }
        hide(s, f, e);
        return;
      }
      const int between = item.sequence * a.between_blocks + block - firsts;
      const SeenBlock bounds = a.plan.seen[between];
      if (bounds.all_from > low || bounds.all_until <= high)
        hide_between(s, reinterpret_cast<const int4*>(a.seen + (static_cast<int64_t>(between) * kKeys + column) * 2), t);
    };
    const auto soften = [&](int n) {
      const int key = (first_block + n) * kKeys;
      if (kFar && n < far) {
        hide_far(n);
      } else if (key + kKeys > whole_until || key < whole_from) {
        const int f[2] = {a.window > 0 ? first[0] - n * kKeys : INT_MIN, a.window > 0 ? first[1] - n * kKeys : INT_MIN};
        const int e[2] = {last[0] - n * kKeys, last[1] - n * kKeys};
        hide(s, f, e);
      }
      softmax(s, m, l, factor, c);
    };
    const auto round_probabilities = [&]() {
#pragma unroll
      for (int i = 0; i < 32; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
    };

    barrier_wait(k_full + 8 * (at % kStages), (at / kStages) & 1);
    wgmma_fence();
    scores<D>(s, own_q, base + L::kK + at % kStages * L::kMatrix);
    wgmma_wait<0>();
    keep(s);
    barrier_arrive_warp(k_empty + 8 * (at % kStages), lane);
    soften(0);
    round_probabilities();
    for (int n = 1; n < blocks; ++n) {
      const int stage = at % kStages, next = (at + 1) % kStages;
      barrier_wait(k_full + 8 * next, ((at + 1) / kStages) & 1);
      if (both) named_barrier(2 + group, kWorkers);
      keep(o);
      keep(p);
      wgmma_fence();
      scores<D>(s, own_q, base + L::kK + next * L::kMatrix);
      barrier_wait(v_full + 8 * stage, (at / kStages) & 1);
      wgmma_fence();
      add_values<D>(o, p, base + L::kV + stage * L::kMatrix);
      if (both) barrier_arrive_named(3 - group, kWorkers);
      wgmma_wait<1>();
      keep(s);
      barrier_arrive_warp(k_empty + 8 * next, lane);
      soften(n);
      wgmma_wait<0>();
      keep(o);
      keep(p);
      barrier_arrive_warp(v_empty + 8 * stage, lane);
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i] *= factor[i / 2 % 2];
      round_probabilities();
      ++at;
    }
    Item next;
    {
      const int stage = at % kStages, in_use = item.keys - (first_block + blocks - 1) * kKeys;
      barrier_wait(v_full + 8 * stage, (at / kStages) & 1);
      if (in_use < kKeys) {
        clear_rows(base + L::kV + stage * L::kMatrix, L::kPanels, kKeys, in_use, thread, 128);
        fence_async_proxy();
        named_barrier(4 + group, 128);
      }
      keep(o);
      keep(p);
      wgmma_fence();
      add_values<D>(o, p, base + L::kV + stage * L::kMatrix);
      next = take_item<D, kFar>(a, base, round + 1, group, row, thread);
      wgmma_wait<0>();
      keep(o);
      barrier_arrive_warp(v_empty + 8 * stage, lane);
      ++at;
    }

    float inverse[2], lse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      l[h] += __shfl_xor_sync(~0u, l[h], 1);
      l[h] += __shfl_xor_sync(~0u, l[h], 2);
      inverse[h] = l[h] == 0.f ? 0.f : 1.f / l[h];  // 0: a piece none of whose keys the row sees
      lse[h] = l[h] == 0.f ? -INFINITY : m[h] * c + log2f(l[h]);
    }
    if (item.pieces > 1) {
      // A float4 a thread side by side: o in the order of the accumulators, then the two rows' logarithms.
      constexpr int kHalf = (D / 8 + 1) * 128;
      float4* parts = reinterpret_cast<float4*>(a.parts);
      float4* own = parts + static_cast<size_t>(2 * item.part + group) * kHalf + thread;
#pragma unroll
      for (int i = 0; i < D / 8; ++i)
        own[i * 128] = make_float4(o[4 * i] * inverse[0], o[4 * i + 1] * inverse[0], o[4 * i + 2] * inverse[1], o[4 * i + 3] * inverse[1]);
      own[D / 8 * 128] = make_float4(lse[0], lse[1], 0.f, 0.f);
      __threadfence();
      named_barrier(4 + group, 128);
      const uint32_t flag = base + L::kWork + 64 * group + 60;
      if (thread == 0) store_shared4(flag, atomicAdd(a.plan.arrived + 2 * item.split + group, 1) == item.pieces - 1);
      named_barrier(4 + group, 128);
      if (__shfl_sync(~0u, load_shared_int(flag), 0) == 0) {
        item = next;
        continue;
      }
      // The last to arrive adds up all pieces, in their order.
      __threadfence();
      const float4* all = parts + static_cast<size_t>(2 * item.first_part + group) * kHalf + thread;
      float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};
      for (int n = 0; n < item.pieces; ++n) {
        const float4 x = __ldcg(all + static_cast<size_t>(n) * 2 * kHalf + D / 8 * 128);
        top[0] = fmaxf(top[0], x.x), top[1] = fmaxf(top[1], x.y);
      }
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i] = 0.f;
      for (int n = 0; n < item.pieces; ++n) {
        const float4* from = all + static_cast<size_t>(n) * 2 * kHalf;
        const float4 x = __ldcg(from + D / 8 * 128);
        const float w[2] = {top[0] == -INFINITY ? 0.f : exp2_fast(x.x - top[0]), top[1] == -INFINITY ? 0.f : exp2_fast(x.y - top[1])};
        total[0] += w[0], total[1] += w[1];
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
          const float4 y = __ldcg(from + i * 128);
          o[4 * i] += w[0] * y.x, o[4 * i + 1] += w[0] * y.y, o[4 * i + 2] += w[1] * y.z, o[4 * i + 3] += w[1] * y.w;
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) inverse[h] = 1.f / total[h], lse[h] = top[h] + log2f(total[h]);
    }
    named_barrier(4 + group, 128);  // all warps' products have read the queries
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 8 * h;
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
        store_shared4(own_q + j / 8 * L::kPanel + r * 128 + ((j % 8 ^ r % 8) << 4) + 2 * column,
                      pack(o[4 * j + 2 * h] * inverse[h], o[4 * j + 2 * h + 1] * inverse[h]));
      if (column == 0 && a.lse != nullptr && r < mine) a.lse[item.head * a.slots + item.slot + r] = lse[h];
    }
    named_barrier(4 + group, 128);
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      const int r = (thread + 128 * i) / (D / 8), unit = (thread + 128 * i) % (D / 8);
      if (r >= mine) continue;
      const uint4 x = load_shared16(own_q + unit / 8 * L::kPanel + r * 128 + ((unit % 8 ^ r % 8) << 4));
      *reinterpret_cast<uint4*>(a.o + (static_cast<int64_t>(rows[r]) * a.Hq + item.head) * D + unit * 8) = x;
    }
    item = next;
  }
}

template <int D, bool kFar>
int launch(const OryxSpanAttention& p, void* memory, void* scratch, cudaStream_t stream) {
  Arguments a{};
  a.plan = layout(p, memory);
  a.q = static_cast<const __nv_bfloat16*>(p.q), a.o = static_cast<__nv_bfloat16*>(p.o), a.lse = p.lse, a.parts = static_cast<float*>(scratch);
  a.q_row = p.q_stride[0], a.q_token = p.q_stride[1], a.q_head = p.q_stride[2];
  a.slots = slots(p);
  a.Tq = p.Tq, a.Tk = p.Tk, a.Hq = p.Hq, a.group = p.Hq / p.Hk, a.queries = p.B * p.Tq, a.window = p.window, a.scale = p.scale;
  a.zero = p.spans != nullptr;
  a.positions = p.positions, a.seen = p.seen, a.first_keys = p.first.keys, a.between_blocks = between_blocks(p), a.far_window = p.far_window, a.reach = p.reach;
  Maps maps{};
  cudaError_t status = encode(&maps.k[0], p.k, p.k_stride, p.B, p.Tk, p.Hk, D, kKeys);
  if (status == cudaSuccess) status = encode(&maps.v[0], p.v, p.v_stride, p.B, p.Tk, p.Hk, D, kKeys);
  for (int i = 1; i < 3; ++i) {
    const OryxFarKeys& far = i == 1 ? p.first : p.between;
    if (!kFar || far.keys == 0) continue;
    if (status == cudaSuccess) status = encode(&maps.k[i], far.k, far.k_stride, p.N, far.keys, p.Hk, D, kKeys);
    if (status == cudaSuccess) status = encode(&maps.v[i], far.v, far.v_stride, p.N, far.keys, p.Hk, D, kKeys);
  }
  if (status == cudaSuccess) status = cudaFuncSetAttribute(forward_kernel<D, kFar>, cudaFuncAttributeMaxDynamicSharedMemorySize, Layout<D>::kBytes);
  if (status != cudaSuccess) return status;
  return ops::cuda::launch_after(forward_kernel<D, kFar>, dim3(p.processors), kThreads, Layout<D>::kBytes, stream, maps, a);
}

}  // namespace
}  // namespace oryx::span_attention_cuda

using namespace oryx::span_attention_cuda;

extern "C" size_t oryx_span_attention_forward_bytes(const OryxSpanAttention* p) {
  return static_cast<size_t>(max_parts(*p)) * kTile * (p->D + 8) * sizeof(float);
}
extern "C" int oryx_span_attention_forward(const OryxSpanAttention* p, void* plan, void* scratch, cudaStream_t stream) {
  if (p->positions != nullptr) return p->D == 64 ? launch<64, true>(*p, plan, scratch, stream) : launch<128, true>(*p, plan, scratch, stream);
  return p->D == 64 ? launch<64, false>(*p, plan, scratch, stream) : launch<128, false>(*p, plan, scratch, stream);
}
