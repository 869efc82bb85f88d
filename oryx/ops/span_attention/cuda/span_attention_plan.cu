// One block that turns spans and bounds into work (span_attention_plan.cuh).
#include <climits>

#include "oryx/ops/cuda/dependent_launch.cuh"
#include "oryx/ops/span_attention/cuda/span_attention_plan.cuh"

namespace oryx::span_attention_cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kCache = 20 << 20;
constexpr size_t kMaxShared = 190 << 10;

struct Scan {
  int3 before, total;
};
// Exclusive sums over the block's threads. Not inlined: the kernel runs its code once, so fetching the code counts.
__device__ __noinline__ Scan block_scan(int3 x) {
  __shared__ int3 sums[33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto warp_scan = [&](int3 v) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int3 y = make_int3(__shfl_up_sync(~0u, v.x, d), __shfl_up_sync(~0u, v.y, d), __shfl_up_sync(~0u, v.z, d));
      if (lane >= d) v = make_int3(v.x + y.x, v.y + y.y, v.z + y.z);
    }
    return v;
  };
  const int3 sum = warp_scan(x);
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    const int3 own = sums[lane], s = warp_scan(own);
    sums[lane] = make_int3(s.x - own.x, s.y - own.y, s.z - own.z);
    if (lane == 31) sums[32] = s;
  }
  __syncthreads();
  const int3 base = sums[warp], total = sums[32];
  __syncthreads();
  return {make_int3(base.x + sum.x - x.x, base.y + sum.y - x.y, base.z + sum.z - x.z), total};
}

// The last i in [0, n) with key(i) <= x; key rises, key(0) <= x.
template <typename Key>
__device__ int last_at_most(int n, int x, Key key) {
  int lo = 0, hi = n;
#pragma unroll 1
  while (hi - lo > 1) {
    const int mid = (lo + hi) / 2;
    if (key(mid) <= x) lo = mid;
    else hi = mid;
  }
  return lo;
}

__device__ void mark_spans(const OryxSpanAttention& p, const Plan& plan) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < p.n_spans; i += kThreads / 32) {
    const int row = p.spans[3 * i], begin = max(p.spans[3 * i + 1], 0), end = min(p.spans[3 * i + 2], p.Tq);
    if (row < 0 || row >= p.B || begin >= end) continue;
    uint8_t* from = plan.mask + static_cast<size_t>(row) * p.Tq;
    const int64_t base = static_cast<int64_t>(row) * p.Tq;
    const int first = min(end, static_cast<int>((base + begin + 15) / 16 * 16 - base));  // the first whole 16 bytes
    const int last = max(first, static_cast<int>((base + end) / 16 * 16 - base));
#pragma unroll 1
    for (int t = begin + lane; t < first; t += 32) from[t] = 1;
#pragma unroll 1
    for (int t = first + 16 * lane; t < last; t += 512) *reinterpret_cast<uint4*>(from + t) = make_uint4(0x01010101, 0x01010101, 0x01010101, 0x01010101);
#pragma unroll 1
    for (int t = last + lane; t < end; t += 32) from[t] = 1;
  }
}

__device__ int marks(uint4 x) { return __popc(x.x) + __popc(x.y) + __popc(x.z) + __popc(x.w); }

// Computed queries before query row g.
__device__ __forceinline__ int computed_before(const int* before, const uint8_t* mask, int g) {
  const uint4 x = reinterpret_cast<const uint4*>(mask)[g / 16];
  const auto part = [&](uint32_t word, int from) {  // marks of the word's bytes before byte g % 16
    const int bytes = min(max(g % 16 - from, 0), 4);
    return __popc(bytes == 4 ? word : word & ((1u << 8 * bytes) - 1));
  };
  return before[g / 16] + part(x.x, 0) + part(x.y, 4) + part(x.z, 8) + part(x.w, 12);
}

__device__ Sequence sequence_of(const OryxSpanAttention& p, int s) {
  Sequence r{};
  if (p.cu_q != nullptr) {
    const int32_t* cu_k = p.cu_k != nullptr ? p.cu_k : p.cu_q;
    r.q_begin = min(max(p.cu_q[s], 0), p.Tq), r.queries = min(max(p.cu_q[s + 1], r.q_begin), p.Tq) - r.q_begin;
    r.k_begin = min(max(cu_k[s], 0), p.Tk), r.keys = min(max(cu_k[s + 1], r.k_begin), p.Tk) - r.k_begin;
  } else {
    r.row = s, r.q_begin = s * p.Tq, r.queries = p.Tq;
    r.keys = p.key_lengths != nullptr ? min(max(p.key_lengths[s], 0), p.Tk) : p.Tk;
  }
  r.shift = r.keys - r.queries;
  return r;
}

// Bounds of the blocks of keys between, a warp each.
__device__ void bound_seen(const OryxSpanAttention& p, const Plan& plan) {
  const int lane = threadIdx.x % 32, blocks = p.N * ((p.between.keys + kKeys - 1) / kKeys);
  const int2* seen = reinterpret_cast<const int2*>(p.seen);
#pragma unroll 1
  for (int b = threadIdx.x / 32; b < blocks; b += kThreads / 32) {
    SeenBlock s{INT_MAX, INT_MIN, INT_MIN, INT_MAX};
#pragma unroll
    for (int i = 0; i < kKeys / 32; ++i) {
      const int2 x = seen[static_cast<int64_t>(b) * kKeys + 32 * i + lane];
      s.all_from = max(s.all_from, x.x), s.all_until = min(s.all_until, x.y);
      if (x.x < x.y) s.from = min(s.from, x.x), s.until = max(s.until, x.y);
    }
    s = {__reduce_min_sync(~0u, s.from), __reduce_max_sync(~0u, s.until), __reduce_max_sync(~0u, s.all_from), __reduce_min_sync(~0u, s.all_until)};
    if (lane == 0) plan.seen[b] = s;
  }
}

// The blocks of far keys that a tile of queries at positions [low, high] sees.
__device__ uint32_t far_blocks(const OryxSpanAttention& p, const Plan& plan, int sequence, int low, int high) {
  const int end = min(p.first.keys, high - p.far_window + 1);  // of first keys
  const bool any = end > 0 && (p.reach == 0 || end - 1 > low - p.reach);
  const uint32_t firsts = any ? (end + kKeys - 1) / kKeys : 0;
  const int blocks = (p.between.keys + kKeys - 1) / kKeys;
  int between = blocks;
#pragma unroll 1
  for (; between > 0; --between) {
    const SeenBlock s = plan.seen[sequence * blocks + between - 1];
    if (s.from <= high && s.until > low) break;
  }
  return firsts | static_cast<uint32_t>(between) << 16;
}

constexpr int kSharedSequences = 256, kSharedTiles = 2048;
constexpr int kShort = 32;     // key blocks of a short unit, on average
constexpr int kPieceCost = 3;  // what beginning and ending a piece takes, in blocks
constexpr int kBins = 64;  // of pieces by length

// Key blocks of a piece where `units` units, fewer than processors, of `total` blocks are cut at the same keys: two pieces a processor, whose reads of the same keys and values
// meet in the L2 cache. Where units are short, beginning and ending a piece weighs more than idle processors: the cut that needs least of rounds times pieces then.
__device__ int piece_length(int total, int units, int processors) {
  int best = max(kMinPiece, (total + 2 * processors - 1) / (2 * processors));
  const int length = units > 0 ? (total + units - 1) / units : 0;
  if (length > kShort) return best;
  const auto cost = [&](int pieces) { return (units * pieces + processors - 1) / processors * ((length + pieces - 1) / pieces + kPieceCost); };
  int most = max(1, (length + best - 1) / best), chosen = most;
#pragma unroll 1
  for (int pieces = most - 1; pieces > 0; --pieces) {
    if (cost(pieces) <= cost(chosen)) chosen = pieces;
  }
  return chosen == most ? best : (length + chosen - 1) / chosen;
}

// Of a block of keys of a tile: a warpgroup alone takes four fifths of the time of two.
__device__ int block_cost(const Tile& t) { return t.count > kTile / 2 ? 5 : 4; }

// Marks and their sums are kept in shared memory while they are read, where they fit.
__global__ void __launch_bounds__(kThreads) plan_kernel(const OryxSpanAttention p, Plan plan, bool in_shared) {
  extern __shared__ __align__(16) uint8_t shared_marks[];
  __shared__ __align__(16) Sequence shared_sequences[kSharedSequences];
  __shared__ int shared_cost[kSharedTiles];
  ops::cuda::launch_dependents();
  const int tid = threadIdx.x, queries = p.B * p.Tq, sixteens = (queries + 15) / 16;
  const bool all = p.spans == nullptr;
  uint8_t* const mask = plan.mask;
  Sequence* const sequences = plan.sequences;
  if (in_shared) plan.mask = shared_marks, plan.before = reinterpret_cast<int*>(shared_marks + (queries + 31) / 16 * 16);
  if (p.N <= kSharedSequences) plan.sequences = shared_sequences;
  if (p.between.keys > 0) bound_seen(p, plan);
  if (!all) {
#pragma unroll 1
    for (int i = tid; i < (queries + 31) / 16; i += kThreads) reinterpret_cast<uint4*>(plan.mask)[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    mark_spans(p, plan);
    __syncthreads();
    int carry = 0;
#pragma unroll 1
    for (int i0 = 0; i0 < sixteens; i0 += kThreads) {
      const int i = i0 + tid;
      const uint4 x = i < sixteens ? reinterpret_cast<const uint4*>(plan.mask)[i] : make_uint4(0, 0, 0, 0);
      const Scan scan = block_scan(make_int3(marks(x), 0, 0));
      if (i < sixteens) plan.before[i] = carry + scan.before.x;
      if (i < sixteens && in_shared) reinterpret_cast<uint4*>(mask)[i] = x;
      carry += scan.total.x;
    }
    if (tid == 0) plan.before[sixteens] = carry;
  }
  __syncthreads();

  int slot = 0, tiles = 0, blocks = 0;
#pragma unroll 1
  for (int s0 = 0; s0 < p.N; s0 += kThreads) {
    const int s = s0 + tid;
    Sequence r{};
    if (s < p.N) {
      r = sequence_of(p, s);
      r.count = all ? r.queries : computed_before(plan.before, plan.mask, r.q_begin + r.queries) - computed_before(plan.before, plan.mask, r.q_begin);
      if (r.shift < 0) r.count = 0;  // more queries than keys: not in the contract
      r.split = splits_groups(p, r.count);
      // As many heads (of queries with split, else of keys) as find room in a part of the L2 cache with their queries, their gradients and the sums of dq.
      const int heads = r.split ? p.Hq : p.Hk;
      const float room = static_cast<float>(kCache) / (static_cast<float>(max(r.count, 1)) * static_cast<float>(p.D * 8 * (p.Hq / heads)));
      r.heads = max(1, static_cast<int>(fminf(room, static_cast<float>(heads))));
      while (heads % r.heads != 0) --r.heads;
    }
    const Scan scan = block_scan(make_int3((r.count + kSmall - 1) / kSmall * kSmall, (r.count + kTile - 1) / kTile, (r.keys + kKeys - 1) / kKeys));
    r.slot = slot + scan.before.x, r.small = r.slot / kSmall, r.tile = tiles + scan.before.y, r.block = blocks + scan.before.z;
    slot += scan.total.x, tiles += scan.total.y, blocks += scan.total.z;
    if (s < p.N) sequences[s] = r;
    if (s < p.N && p.N <= kSharedSequences) shared_sequences[s] = r;
  }
  __syncthreads();
  const Sequence* seq = plan.sequences;

  // Rows, four slots a thread where they are consecutive; the slots that fill up a sequence's last 64 hold -1.
  if (all) {
#pragma unroll 1
    for (int i = 4 * tid; i < slot; i += 4 * kThreads) {
      const Sequence& r = seq[last_at_most(p.N, i, [&](int j) { return seq[j].slot; })];
      const int t = i - r.slot, g = r.q_begin + t, n = r.count - t;
      *reinterpret_cast<int4*>(plan.rows + i) = make_int4(n > 0 ? g : -1, n > 1 ? g + 1 : -1, n > 2 ? g + 2 : -1, n > 3 ? g + 3 : -1);
    }
  } else {
#pragma unroll 1
    for (int s = tid / 32; s < p.N; s += kThreads / 32) {
#pragma unroll 1
      for (int i = seq[s].count + tid % 32; i < (seq[s].count + kSmall - 1) / kSmall * kSmall; i += 32) plan.rows[seq[s].slot + i] = -1;
    }
#pragma unroll 1
    for (int i = tid; i < sixteens; i += kThreads) {
      const uint4 x = reinterpret_cast<const uint4*>(plan.mask)[i];
      if (marks(x) == 0) continue;
      int s = last_at_most(p.N, 16 * i, [&](int j) { return seq[j].q_begin; });
      int first = computed_before(plan.before, plan.mask, seq[s].q_begin), to = plan.before[i] - first;
      if (s + 1 == p.N || seq[s + 1].q_begin >= 16 * i + 16) {  // of one sequence
        const int end = seq[s].q_begin + (seq[s].count > 0 ? seq[s].queries : 0);
        int* rows = plan.rows + seq[s].slot;
        // A byte's mark is its lowest bit: four marks to four bits.
        const auto bits = [](uint32_t word) { return (word * 0x01020408u >> 24) & 15u; };
        uint32_t left = bits(x.x) | bits(x.y) << 4 | bits(x.z) << 8 | bits(x.w) << 12;
#pragma unroll 1
        for (; left != 0; left &= left - 1) {
          const int g = 16 * i + __ffs(left) - 1;
          if (g < end) rows[to++] = g;
        }
        continue;
      }
      to += first;
#pragma unroll 1
      for (int b = 0; b < 16; ++b) {
        if (plan.mask[16 * i + b] == 0) continue;
        const int g = 16 * i + b;
        while (s + 1 < p.N && seq[s + 1].q_begin <= g) first = computed_before(plan.before, plan.mask, seq[++s].q_begin);
        if (g < seq[s].q_begin + seq[s].queries && seq[s].count > 0) plan.rows[seq[s].slot + to - first] = g;
        ++to;
      }
    }
  }
  __syncthreads();

  if (tiles <= kSharedTiles) plan.cost = shared_cost;
  // forward tiles, sorted by batch row, then from the heaviest
  Tile own{};
#pragma unroll 1
  for (int t = tid; t < tiles; t += kThreads) {
    const int s = last_at_most(p.N, t, [&](int i) { return seq[i].tile; });
    const Sequence r = seq[s];
    Tile x{};
    x.sequence = s;
    x.slot = r.slot + (t - r.tile) * kTile;
    x.count = min(kTile, r.count - (t - r.tile) * kTile);
    const auto position = [&](int slot) { return (all ? slot - r.slot : plan.rows[slot] - r.q_begin) + r.shift; };
    const int first = position(x.slot), last = position(x.slot + x.count - 1);
    x.first_block = p.window > 0 ? max(0, first - p.window + 1) / kKeys : 0;
    x.blocks = last / kKeys + 1 - x.first_block;
    if (p.positions != nullptr) {
      const int start = p.positions[r.q_begin] - r.shift;  // the position of key 0
      x.far = far_blocks(p, plan, s, start + first, start + last);
      x.blocks += x.all_far();
    }
    x.row_tile = p.cu_q != nullptr ? 0 : r.tile;
    x.row_tiles = p.cu_q != nullptr ? tiles : (r.count + kTile - 1) / kTile;
    plan.unsorted[t] = own = x;
    plan.cost[t] = x.blocks * block_cost(x);
  }
  __syncthreads();
#pragma unroll 1
  for (int t = tid; t < tiles; t += kThreads) {
    const Tile x = t == tid && tiles <= kThreads ? own : plan.unsorted[t];
    const int cost = x.blocks * block_cost(x);
    int rank = x.row_tile;
#pragma unroll 1
    for (int u = x.row_tile; u < x.row_tile + x.row_tiles; ++u) {
      const int c = plan.cost[u];
      rank += c > cost || (c == cost && u < t);
    }
    plan.tiles[rank] = x;
  }
  __syncthreads();

  // The units beyond whole rounds of the multiprocessors are cut along their keys where equal shares of them, one a multiprocessor, end, and the longest
  // pieces come first, so that all finish together. Where there is little else, memory counts: all units are cut at the same keys and stay in their
  // order, so that the tiles of a head read the same keys at the same time.
  __shared__ int bins[kBins];
  if (tid < kBins) bins[tid] = 0;
  const int units = tiles * p.Hq, whole = units / p.processors * p.processors, unit = whole + tid;
  int length = 0, weight = 1;
  if (unit < units) {
    const Tile& t = plan.tiles[unit_of(plan, unit, p.Hq).tile];
    length = t.blocks, weight = block_cost(t);
  }
  const Scan cost = block_scan(make_int3(length * weight, length, 0));
  const bool aligned = whole < 2 * p.processors;
  const int share = max(1, (cost.total.x + p.processors - 1) / p.processors);
  const int piece = piece_length(cost.total.y, units - whole, p.processors);
  const auto for_each_piece = [&](auto f) {
    int begin = 0;
    if (aligned) {
#pragma unroll 1
      for (; begin < length; begin += piece) f(begin, min(begin + piece, length));
      return;
    }
#pragma unroll 1
    for (int cut = (cost.before.x / share + 1) * share; cut < cost.before.x + length * weight; cut += share) {
      const int end = (cut - cost.before.x + weight / 2) / weight;
      if (end - begin < kMinPiece || length - end < kMinPiece) continue;
      f(begin, end);
      begin = end;
    }
    if (length > 0) f(begin, length);
  };
  const auto bin = [&](int begin, int end) { return max(0, kBins - 1 - (end - begin) * weight * (kBins * 3 / 4) / share); };
  int pieces = 0;
  for_each_piece([&](int begin, int end) { ++pieces, atomicAdd(bins + bin(begin, end), 1); });
  const Scan scan = block_scan(make_int3(pieces, pieces > 1 ? pieces : 0, pieces > 1));
  if (tid < 32) {
    const int x = bins[2 * tid], y = bins[2 * tid + 1];
    int sum = x + y;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, sum, d);
      if (tid >= d) sum += other;
    }
    bins[2 * tid] = sum - x - y, bins[2 * tid + 1] = sum - y;
  }
  __syncthreads();
  // Where a piece stands among those as long as it depends on time; where its result goes does not.
  int part = scan.before.y, at = scan.before.x;
  for_each_piece([&](int begin, int end) {
    plan.pieces[aligned ? at++ : atomicAdd(bins + bin(begin, end), 1)] = {unit, begin, end - begin, part++, scan.before.z, pieces, scan.before.y, 0};
  });
  if (tid < 2 * p.processors) plan.arrived[tid] = 0;
  if (tid == 0) *plan.counts = {tiles, whole, whole + scan.total.x, slot / kSmall, blocks, p.processors, 0};
}

}  // namespace
}  // namespace oryx::span_attention_cuda

using namespace oryx::span_attention_cuda;

extern "C" int64_t oryx_span_attention_slots(const OryxSpanAttention* p) { return slots(*p); }
extern "C" size_t oryx_span_attention_plan_bytes(const OryxSpanAttention* p) { return layout(*p, nullptr).bytes; }
extern "C" int oryx_span_attention_plan(const OryxSpanAttention* p, void* memory, cudaStream_t stream) {
  const size_t marks = p->spans == nullptr ? 0 : (static_cast<size_t>(p->B) * p->Tq + 31) / 16 * 16, bytes = marks + marks / 16 * 4 + 16;
  const bool in_shared = marks > 0 && bytes <= kMaxShared;
  if (in_shared) {
    const cudaError_t status = cudaFuncSetAttribute(plan_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (status != cudaSuccess) return status;
  }
  plan_kernel<<<1, kThreads, in_shared ? bytes : 0, stream>>>(*p, layout(*p, memory), in_shared);
  return cudaGetLastError();
}
