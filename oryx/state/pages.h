// The rows of per-token slots, in pages that sequences share until one of them writes; and the budget of bytes that everything a state holds is
// charged to.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "oryx/ops/copies/copies.h"
#include "oryx/state/page_pool.h"
#include "oryx/state/slot.h"

namespace oryx {

// Bytes held by a state and by all that was forked from it: the pages of two pools, of rows (RowStore) and of recurrent states (FixedPool), and the current
// recurrent states.
class ByteBudget {
 public:
  explicit ByteBudget(int64_t limit) : limit_(limit) {}  // 0: no limit
  // Throws Error when `bytes` more would exceed the limit.
  void check(int64_t bytes) const;
  // Called when bytes would not fit, before that is an error: gives back what can be spared.
  void set_reclaim(std::function<void()> reclaim) { reclaim_ = std::move(reclaim); }
  int64_t used() const { return used_; }
  int64_t limit() const { return limit_; }

 private:
  friend class Charge;
  int64_t limit_, used_ = 0;
  std::function<void()> reclaim_;
};

// Bytes that count against a budget while this stands.
class Charge {
 public:
  Charge() = default;
  Charge(std::shared_ptr<ByteBudget> budget, int64_t bytes);  // throws Error when they do not fit
  ~Charge();
  Charge(Charge&& other) noexcept { *this = std::move(other); }
  Charge& operator=(Charge&& other) noexcept;
  Charge(const Charge&) = delete;
  Charge& operator=(const Charge&) = delete;

 private:
  std::shared_ptr<ByteBudget> budget_;
  int64_t bytes_ = 0;
};

// Which rows a store keeps of a sequence: all, or those of the first `first` and the last `last` tokens.
struct RowBound {
  int64_t first = 0, last = 0;  // last 0: all rows
  bool on() const { return last > 0; }
};

// The rows of N sequences in every per-token slot of a state. All slots have the same tokens, so one table of pages serves them all. A page that
// two sequences hold is never written: who appends into it gets a copy.
//
// Under a bound a sequence's new pages come from a region of its own, in order; when the region is used up, the pages that are still held move to its
// front. Memory is then constant, and the last rows stand side by side nearly always. Of a pool such a sequence has as many pages, which take turns, and nothing moves.
class RowStore {
 public:
  static constexpr int64_t kPageTokens = 32;

  RowStore(int64_t sequences, std::shared_ptr<ByteBudget> budget, at::Device device = at::kCPU, int64_t page_tokens = kPageTokens, RowBound bound = {});

  // Declares a slot, before the first row -> its number.
  int64_t add(const SlotSpec& spec);
  // Takes memory for so many pages at once, behind the last add() and before the first row: all pages of this store and of its forks then stand there, numbered from 0, and come
  // back to it one by one.
  void make_pool(int64_t pages);
  const PagePool* pool() const { return pool_ != nullptr ? &pool_->free : nullptr; }

  // Makes tokens [lengths[n], needs[n]) of each sequence n writable (of those that a bound will keep), with room for growth behind them (or none:
  // `exact`). Throws Error when the budget does not allow it; nothing has changed then.
  void make_room(const std::vector<int64_t>& lengths, const std::vector<int64_t>& needs, bool exact);
  // Pages for tokens up to `need` behind those that sequence n has, in a block of their own; no page moves. Not for a bounded store, whose pages move anyway.
  void add_room(int64_t n, int64_t need);
  // Takes sequence n of `from`, with its pages and its room, as this store's last one; or as sequence `to`, which must have no pages.
  void take(RowStore& from, int64_t n);
  void take(RowStore& from, int64_t n, int64_t to);
  // Sequence n has no pages any more.
  void clear(int64_t n);
  // For readers on a device: the memory that every page of every sequence stands in, the pool's or a block that they have in common, [pages * page_tokens, shape...], undefined where they
  // stand in several or there are none; the pages of sequence n by their numbers in it, ascending; and a number that differs when any of this may have changed.
  at::Tensor memory(int64_t slot) const;
  struct NumberedPage {
    int64_t index;  // its tokens begin at index * page_tokens
    int32_t number;
  };
  std::vector<NumberedPage> numbered_pages(int64_t n) const;
  int64_t version() const { return version_; }
  // rows [T, shape...] become tokens [begin, begin + T) of sequence n; under a bound only those that it keeps of begin + T tokens. On a GPU `together`, where given, does it when it runs:
  // until then nothing may be read, nor pages move.
  void write(int64_t slot, int64_t n, int64_t begin, const at::Tensor& rows, ops::Copies* together = nullptr);
  // Tokens [begins[n], ends[n]) of all sequences: [N, longest, shape...], unspecified behind a sequence's own. A view where pages lie side by side,
  // otherwise gathered. Every token must be held, but for those that lie behind a sequence's room.
  at::Tensor read(int64_t slot, const std::vector<int64_t>& begins, const std::vector<int64_t>& ends) const;
  at::Tensor read(int64_t slot, int64_t length) const;  // the first `length`

  // Where the rows of all sequences stand, the same in every slot: for readers that go there. Valid until rows move.
  struct Block;
  struct Pages {
    std::vector<const Block*> pools;
    at::Tensor blocks;  // [N, most] int32 on the CPU: the page of tokens from i * page_tokens on, numbered through the pools; -1: none
  };
  Pages pages() const;
  std::vector<at::Tensor> pools(int64_t slot, const Pages& pages) const;  // [pages, page_tokens, shape...] each

  // Sequence n has `length` tokens now: what a bound does not keep of them is dropped.
  void retire(int64_t n, int64_t length);
  // Sequence n forgets its tokens from `length` on.
  void trim(int64_t n, int64_t length);
  // Rows [first, from) of a bounded sequence are gone; 0: none are.
  int64_t from(int64_t n) const { return sequences_[static_cast<size_t>(n)].from; }
  void set_from(int64_t n, int64_t from) { sequences_[static_cast<size_t>(n)].from = from; }
  // True when every row of [begin, end) is held, as far as a bound goes.
  bool holds(int64_t n, int64_t begin, int64_t end) const { return begin >= end || end <= bound_.first || std::max(begin, bound_.first) >= from(n); }
  const RowBound& bound() const { return bound_; }

  // A store whose sequence j holds the first lengths[from[j]] tokens of sequence from[j] here. Full pages are shared, what stands in a last,
  // partly filled one is copied.
  RowStore fork(const std::vector<int64_t>& from, const std::vector<int64_t>& lengths) const;
  // The pages of sequence n as a store of its own, for reading.
  RowStore view(int64_t n) const;

  int64_t page_tokens() const { return page_tokens_; }
  int64_t page_bytes() const { return page_tokens_ * row_bytes_; }
  // Pages of a sequence's whole region under a bound: its first rows, the last ones before and after a call, and one more at every border.
  static int64_t region_pages(const RowBound& bound, int64_t page_tokens) {
    const auto pages = [&](int64_t tokens) { return (tokens + page_tokens - 1) / page_tokens; };
    return pages(bound.first) + 2 * (pages(bound.last) + 1);
  }
  int64_t row_bytes() const { return row_bytes_; }              // of one token, in all slots
  int64_t used_bytes(const std::vector<int64_t>& lengths) const;  // shared pages once
  int64_t reserved_bytes() const;                               // shared pages once

 private:
  struct Page {
    std::shared_ptr<Block> block;
    int64_t first;  // row of the block
  };
  struct Entry {
    int64_t index;  // the page's tokens begin at index * page_tokens
    std::shared_ptr<const Page> page;
  };
  struct Run {  // pages side by side
    Block* block;
    int64_t token, first, rows;
  };
  // Under a bound: where new pages come from, pages [begin, begin + pages) of the block.
  struct Region {
    std::shared_ptr<Block> block;
    int64_t begin = 0, pages = 0, used = 0;
  };
  struct Sequence {
    std::vector<Entry> pages;  // ascending
    std::vector<Run> runs;
    int64_t from = 0;
    Region region;
    std::deque<std::shared_ptr<const Page>> spare;  // of a bounded store with a pool: pages beside these that are the sequence's, the longest unused first
  };
  // What a call wants of one sequence's pages.
  struct Wanted {
    std::vector<int64_t> fresh;  // indices of pages that are new or replaced, ascending
    int64_t region = 0;          // pages of a new region; 0: the old one will do
  };

  int64_t pages_of(int64_t tokens) const { return (tokens + page_tokens_ - 1) / page_tokens_; }
  int64_t capacity(const Sequence& s) const { return s.pages.empty() ? 0 : (s.pages.back().index + 1) * page_tokens_; }
  std::shared_ptr<Block> make_block(int64_t pages) const;
  // Pages that nobody has: of the pool, or side by side in a block of their own.
  std::vector<std::shared_ptr<const Page>> fresh_pages(int64_t count) const;
  void make_pool_room(const std::vector<int64_t>& lengths, const std::vector<int64_t>& needs);
  void copy_rows(const Sequence& from, int64_t begin, int64_t end, const Page& to) const;
  void find_runs(Sequence& s);
  template <typename F>
  static void for_each_run(const Sequence& s, int64_t begin, int64_t end, F f);
  bool writable(const Sequence& s, int64_t begin, int64_t end) const;
  // Ranges of [begin, end) that a bound keeps of `end` tokens: {head begin, head end, tail begin, tail end}.
  std::array<int64_t, 4> kept(int64_t begin, int64_t end) const;
  const Entry* find(const Sequence& s, int64_t index) const;
  Wanted wanted(const Sequence& s, int64_t length, int64_t need, bool exact) const;
  std::vector<int64_t> fresh_indices(const Sequence& s, int64_t length, int64_t need) const;
  template <typename F>
  void drop_pages(Sequence& s, F dropped);
  bool in_region(const Sequence& s, const Entry& e) const;
  int64_t pages_in_region(const Sequence& s) const;
  bool movable(const Sequence& s) const;
  std::shared_ptr<const Page> take_page(Sequence& s);
  struct Move {
    Page from, to;
  };
  void copy_pages(const std::vector<Move>& moves) const;
  void compact(Sequence& s);
  void make_bounded_room(const std::vector<int64_t>& lengths, const std::vector<int64_t>& needs, bool exact);
  void make_bounded_pool_room(const std::vector<int64_t>& lengths, const std::vector<int64_t>& needs, bool exact);
  void put_in(Sequence& s, int64_t index, std::shared_ptr<const Page> page);

  struct Pool {
    std::shared_ptr<Block> block;
    PagePool free;
  };

  std::vector<SlotSpec> specs_;
  std::vector<Sequence> sequences_;
  std::shared_ptr<Pool> pool_;
  int64_t version_ = 0;
  std::shared_ptr<ByteBudget> budget_;
  at::Device device_;
  int64_t page_tokens_;
  RowBound bound_;
  int64_t row_bytes_ = 0;
};

struct RowStore::Block {
  std::vector<at::Tensor> data;   // by slot: [rows, shape...]
  std::vector<at::Tensor> paged;  // the same memory: [pages, page_tokens, shape...]
  int64_t pages = 0;
  Charge charge;
};

}  // namespace oryx
