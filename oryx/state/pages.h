// The rows of per-token slots, in pages that sequences share until one of them writes; and the budget of bytes that everything a state holds is
// charged to.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "oryx/state/slot.h"

namespace oryx {

// Bytes held by a state and by all that was forked from it.
class ByteBudget {
 public:
  explicit ByteBudget(int64_t limit) : limit_(limit) {}  // 0: no limit
  // Throws Error when `bytes` more would exceed the limit.
  void check(int64_t bytes) const;
  int64_t used() const { return used_; }
  int64_t limit() const { return limit_; }

 private:
  friend class Charge;
  int64_t limit_, used_ = 0;
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

// The rows of N sequences in every per-token slot of a state. All slots have the same tokens, so one table of pages serves them all. A page that
// two sequences hold is never written: who appends into it gets a copy.
class RowStore {
 public:
  static constexpr int64_t kPageTokens = 32;

  RowStore(int64_t sequences, std::shared_ptr<ByteBudget> budget, at::Device device = at::kCPU);

  // Declares a slot, before the first row -> its number.
  int64_t add(const SlotSpec& spec);

  // Makes tokens [lengths[n], needs[n]) of each sequence n writable, with room for growth behind them (or none: `exact`). Throws Error when the
  // budget does not allow it; nothing has changed then.
  void make_room(const std::vector<int64_t>& lengths, const std::vector<int64_t>& needs, bool exact);
  // rows [T, shape...] become tokens [begin, begin + T) of sequence n.
  void write(int64_t slot, int64_t n, int64_t begin, const at::Tensor& rows);
  // The first `length` rows of all sequences: [N, length, shape...]. A view where pages lie side by side, otherwise gathered.
  at::Tensor read(int64_t slot, int64_t length) const;

  // A store whose sequence j holds the first lengths[from[j]] tokens of sequence from[j] here. Full pages are shared, what stands in a last,
  // partly filled one is copied.
  RowStore fork(const std::vector<int64_t>& from, const std::vector<int64_t>& lengths) const;
  // The pages of sequence n as a store of its own, for reading.
  RowStore view(int64_t n) const;

  int64_t row_bytes() const { return row_bytes_; }              // of one token, in all slots
  int64_t used_bytes(const std::vector<int64_t>& lengths) const;  // shared pages once
  int64_t reserved_bytes() const;                               // shared pages once

 private:
  struct Block {
    std::vector<at::Tensor> data;  // by slot: [rows, shape...]
    Charge charge;
  };
  struct Page {
    std::shared_ptr<Block> block;
    int64_t first;  // row of the block
  };
  struct Run {  // pages side by side
    Block* block;
    int64_t first, rows;
  };
  struct Sequence {
    std::vector<std::shared_ptr<const Page>> pages;
    std::vector<Run> runs;
    int64_t capacity() const { return static_cast<int64_t>(pages.size()) * kPageTokens; }
  };

  std::shared_ptr<Block> make_block(int64_t pages) const;
  void copy_rows(const Sequence& from, int64_t begin, int64_t end, const Page& to) const;
  static void find_runs(Sequence& s);
  template <typename F>
  static void for_each_run(const Sequence& s, int64_t begin, int64_t end, F f);
  bool writable(const Sequence& s, int64_t begin, int64_t end) const;

  std::vector<SlotSpec> specs_;
  std::vector<Sequence> sequences_;
  std::shared_ptr<ByteBudget> budget_;
  at::Device device_;
  int64_t row_bytes_ = 0;
};

}  // namespace oryx
