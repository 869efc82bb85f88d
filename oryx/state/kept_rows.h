// The rows that a bounded state keeps by choice, beside its first and last ones (row_policy.h): in each layer other ones.
//
// A token s leaves the window when the query s + window runs. Then the layer's rule keeps it or not, and may drop a row that it kept before: what is kept is a function of
// the scores of the tokens that have left, in their order, so that any split of a sequence into calls keeps the same. A row that is dropped at query t is not seen
// from t on, but was by the queries before it, so rows have an end (`until`), and stay until their end lies behind the call, or as far behind as a trim may go back.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "oryx/state/pages.h"
#include "oryx/state/row_policy.h"
#include "oryx/state/slot.h"

namespace oryx {

struct KeptRow {
  static constexpr int32_t kAlive = std::numeric_limits<int32_t>::max();
  int32_t position;
  int32_t until;  // seen by queries [position + window, until)
  float score;
  int64_t row;  // where its keys and values stand
};

class KeptRows {
 public:
  // Bytes of a row beside its keys and values: position, until, score.
  static constexpr int64_t kRowBytes = 12;

  KeptRows() = default;
  // `layers`: the per-token slots of each layer that later tokens look at. Rows that a trim may want again are held for `back` tokens.
  KeptRows(const std::vector<std::vector<SlotSpec>>& layers, int64_t sequences, const KeptRule& rule, int64_t first, int64_t window, int64_t back,
           std::shared_ptr<ByteBudget> budget, at::Device device);

  bool on() const { return rule_.on(); }

  // Tokens [first, second) of a sequence of `length` that leave the window while `count` more are read.
  std::pair<int64_t, int64_t> leaving(int64_t length, int64_t count) const;

  // Layer i lets the tokens of `leaving` go, for each sequence n of lengths[n] tokens: measured[n] holds what the policy wants of them, in order (or nothing).
  // Throws Error for a score that is not finite.
  void choose(int64_t i, const std::vector<int64_t>& lengths, const std::vector<int64_t>& counts, const std::vector<std::vector<float>>& measured);
  // Tokens that the last choose() of layer i has taken in, ascending: their rows are unspecified until write() gives them, [tokens, shape...].
  const std::vector<int64_t>& fresh(int64_t i, int64_t n) const;
  void write(int64_t i, const std::string& slot, int64_t n, const at::Tensor& rows);

  // The rows of a layer: [N, capacity, shape...], a view; finite everywhere.
  const at::Tensor& rows(int64_t i, const std::string& slot) const;
  struct Places {
    at::Tensor positions, from, until;  // [N, capacity] int32 on the CPU: query t sees a row when from <= t < until
  };
  Places places(int64_t i) const;
  const std::vector<KeptRow>& kept(int64_t i, int64_t n) const { return layers_[static_cast<size_t>(i)].sequences[static_cast<size_t>(n)].rows; }

  // Before a call: throws Error when the rows that it may take in do not fit into the budget, in the worst case.
  void check_room(const std::vector<int64_t>& lengths, const std::vector<int64_t>& counts) const;
  // Sequence n has `length` tokens now: rows whose end lies behind are dropped. Then, for all, memory that is not needed goes back.
  void settle(int64_t n, int64_t length);
  void shrink();

  // Whether all rows that queries from `query` on see, or choose among, are held.
  bool holds(int64_t n, int64_t query) const;
  // Sequence n forgets its tokens from `length` on.
  void trim(int64_t n, int64_t length);

  KeptRows fork(const std::vector<int64_t>& from) const;
  KeptRows view(int64_t n) const;  // for reading

  int64_t bytes() const;
  int64_t reserved_bytes() const;
  // Rows of one layer at most when `tokens` tokens were read, tokens that a trim may want not counted; all that left the window where no limit is set.
  static int64_t most_rows(const KeptRule& rule, int64_t first, int64_t window, int64_t tokens);

  // The last query by which a row was dropped for good, by sequence; 0: none was.
  const std::vector<int64_t>& lost() const { return lost_; }
  // What files hold, by layer and sequence: places [rows, 2] int32 (position, until), scores [rows], and the rows of each slot.
  void save(int64_t n, const std::string& prefix, std::vector<std::pair<std::string, at::Tensor>>& out) const;
  // Takes over what save() gave, into a fresh store: `get` returns a tensor by name, of any number of rows of this shape. Throws Error for places that a sequence of
  // `length` tokens does not have.
  void load(int64_t n, int64_t length, int64_t lost, const std::string& prefix, const std::function<at::Tensor(const std::string& name, const SlotSpec& spec)>& get);

 private:
  struct Sequence {
    std::vector<KeptRow> rows;    // ascending by position
    std::vector<int64_t> fresh;
  };
  struct Slot {
    SlotSpec spec;
    at::Tensor data;  // [N, capacity, shape...]
  };
  struct Layer {
    std::map<std::string, Slot> slots;
    std::vector<Sequence> sequences;
    int64_t capacity = 0, row_bytes = 0;
    std::shared_ptr<Charge> charge;
  };

  bool over(const KeptRow& row, int64_t length) const;
  void resize(Layer& layer, int64_t capacity);
  void drop(Sequence& s, int64_t n, int64_t length);

  KeptRule rule_;
  int64_t first_ = 0, window_ = 0, back_ = 0;
  std::shared_ptr<ByteBudget> budget_;
  at::Device device_ = at::kCPU;
  std::vector<Layer> layers_;
  std::vector<int64_t> lost_;  // by sequence
};

}  // namespace oryx
