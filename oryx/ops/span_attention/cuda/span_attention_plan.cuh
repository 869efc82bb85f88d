// The plan of span_attention's Hopper kernels: its parts in memory and how a kernel reads its work from them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "oryx/ops/span_attention/cuda/span_attention_launch.h"

namespace oryx::span_attention_cuda {

constexpr int kTile = 128;   // slots of a forward tile
constexpr int kKeys = 128;   // keys of a block
constexpr int kSmall = 64;   // slots of a backward tile
constexpr int kMinPiece = 4; // key blocks of the smallest piece of a split tile
constexpr int kMostWhole = 4096;  // queries (splits_groups)

// A sequence. Query g of its row stands at key g - q_begin + shift.
struct alignas(16) Sequence {
  int row, q_begin, queries, shift;     // q_begin: row of q in all rows, b * Tq + t
  int k_begin, keys, slot, count;       // k_begin: token of batch row `row`; slot, count: its computed queries
  int tile, small, block, heads;        // before it: forward tiles, backward tiles, key blocks; heads: heads of the backward pass's items that run together
  int split, pad[3];                    // split: the query heads of a group are items of their own, backward
};

struct alignas(16) Tile {
  int sequence, slot, count, first_block;
  int blocks, row_tile, row_tiles;  // row_tile, row_tiles: the tiles of its batch row, in the sorted list
  uint32_t far;                     // of the blocks those in front of first_block: of first keys, and, times 2^16, of keys between

  __host__ __device__ int firsts() const { return static_cast<int>(far & 0xffff); }
  __host__ __device__ int all_far() const { return static_cast<int>((far & 0xffff) + (far >> 16)); }
};

struct alignas(16) KeyBlock {
  int sequence, block, begin, end;  // begin, end: the backward tiles that see it, counted within the sequence
};

// A piece of a unit (a tile of one head) at the end of the list: key blocks [begin, begin + blocks) of the tile's.
struct alignas(16) Piece {
  int unit, begin, blocks, part;  // part: where the partial result goes
  int split, pieces, first, pad;  // the unit's place among those that are split, its pieces, the part of the first; pieces 1: the unit is whole
};

// Of a block of keys between: when the first is seen first and the last one last, and from when until when all are.
struct alignas(16) SeenBlock {
  int from, until, all_from, all_until;
};

struct Counts {
  int tiles, whole, items;                   // forward: units [0, whole) are items themselves, then come pieces
  int small, blocks, next_item, next_block;  // next_*: what the persistent kernels take next; block i of the forward pass begins with item i
};

struct Plan {
  Counts* counts;
  Sequence* sequences;  // [N]
  Tile *unsorted, *tiles;
  int* cost;
  Piece* pieces;
  int* arrived;         // of each split unit and half tile, the pieces that are done
  KeyBlock* blocks;     // filled by the backward pass
  int* rows;      // [slots]
  int* before;    // computed queries before every 16th query row
  uint8_t* mask;  // [B * Tq], with spans only
  SeenBlock* seen;  // [N][blocks of keys between]
  int sequence_count;
  int head_group; // query heads whose tiles run together, so that their keys and values stay in the L2 cache
  size_t bytes;
};

inline int64_t slots(const OryxSpanAttention& p) {
  const int64_t q = static_cast<int64_t>(p.B) * p.Tq;
  return (q + kSmall - 1) / kSmall * kSmall + static_cast<int64_t>(p.N) * kSmall;
}
// Whether a key block's work for all query heads that share a key head is so long that the last blocks would keep the others waiting, for a sequence of `count` queries. Each item
// costs the sums of dk and dv, as much as a few tiles.
__host__ __device__ inline bool splits_groups(const OryxSpanAttention& p, int count) {
  return p.Hq > p.Hk && count > kMostWhole && (p.window == 0 || p.window > kMostWhole);
}
inline int64_t max_tiles(const OryxSpanAttention& p) { return static_cast<int64_t>(p.B) * p.Tq / kTile + p.N; }
inline int64_t max_blocks(const OryxSpanAttention& p) { return (static_cast<int64_t>(p.B) * p.Tk) / kKeys + p.N; }
inline int between_blocks(const OryxSpanAttention& p) { return (p.between.keys + kKeys - 1) / kKeys; }
inline int max_parts(const OryxSpanAttention& p) { return 4 * p.processors; }

inline Plan layout(const OryxSpanAttention& p, void* memory) {
  Plan r{};
  char* at = static_cast<char*>(memory);
  size_t used = 0;
  const auto take = [&](auto*& pointer, size_t n) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at + used);
    used += (n * sizeof(*pointer) + 127) / 128 * 128;
  };
  const size_t q = static_cast<size_t>(p.B) * p.Tq;
  take(r.counts, 1);
  take(r.sequences, p.N);
  take(r.unsorted, max_tiles(p));
  take(r.tiles, max_tiles(p));
  take(r.cost, max_tiles(p));
  take(r.pieces, max_parts(p));
  take(r.arrived, 2 * p.processors);
  take(r.blocks, max_blocks(p));
  take(r.rows, slots(p));
  if (p.between.keys > 0) take(r.seen, static_cast<size_t>(p.N) * between_blocks(p));
  if (p.spans != nullptr) {
    take(r.before, q / 16 + 2);
    take(r.mask, (q + 31) / 16 * 16);
  }
  r.bytes = used;
  r.sequence_count = p.N;
  // Half of a 50 MB cache, whole groups of query heads that share a key head.
  const int64_t head = static_cast<int64_t>(p.Tk) * p.D * 4;
  int n = p.Hk;
  while (n > 1 && (n * head > (24 << 20) || p.Hk % n != 0)) --n;
  r.head_group = n * (p.Hq / p.Hk);
  return r;
}

struct Unit {
  int tile, head;
};
#ifdef __CUDACC__
// Units run batch row by batch row, in it head group by head group, in it tiles from the heaviest, in it heads.
__device__ __forceinline__ Unit unit_of(const Plan& plan, int unit, int heads) {
  const Tile& t = plan.tiles[unit / heads];
  const int in_row = unit - t.row_tile * heads, span = t.row_tiles * plan.head_group;
  const int group = in_row / span, rest = in_row % span;
  return {t.row_tile + rest / plan.head_group, group * plan.head_group + rest % plan.head_group};
}
#endif

}  // namespace oryx::span_attention_cuda
