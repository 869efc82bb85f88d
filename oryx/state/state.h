// What a model remembers of N sequences: the slots that its layers and mixers declare.
//
// A slot is recurrent or a tail (a fixed shape a sequence) or holds a row per token (keys, values, a linear mixer's
// scalars). The state knows shapes and lengths, not mixers. Rows of per-token slots are kept for every token, in order,
// up to lengths().
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "oryx/state/fixed_pool.h"
#include "oryx/state/kept_rows.h"
#include "oryx/state/pages.h"
#include "oryx/state/row_policy.h"
#include "oryx/state/slot.h"

namespace oryx {

// Which keys and values attention sees over a state, beside "all": those of the first `first` tokens of a sequence and, of query t, those of the last
// `window` tokens up to itself (s < first or s > t - window). Positions stay those in the document. Rows are kept for just these, so that memory does not
// grow.
struct RowWindow {
  int64_t first = 0;
  int64_t window = 0;  // 0: all rows are kept
  int64_t back = 0;    // tokens of a sequence's end that a trim may drop: so many rows more are kept behind the window
  bool on() const { return window > 0; }
};

struct StateOptions {
  // Tokens between checkpoints of the recurrent states and tails, from which a trim replays: one is taken at the end of
  // the first call that leaves a sequence at least this far behind its last one. 0: none but the start of the sequence,
  // which costs nothing.
  int64_t checkpoint_every = 0;
  // The last `ring` calls' recurrent states and tails and the last `ring` tokens' convolution inputs: going back to the
  // end of one of those calls is a copy, to a token within them a scan over a few rows.
  int64_t ring = 0;
  // Keep rows in layers where no mixer looks back, so that their recurrent states can be replayed too.
  bool keep_rows = false;
  // Keep no rows at all: memory that does not grow. A call whose tokens look back at earlier calls is then an Error.
  bool drop_rows = false;
  // Bytes that the state and everything forked from it may hold, reserves included; 0: no limit. What would exceed it is an Error.
  int64_t budget = 0;
  // Where slots stand; a model sets its own. Lengths stay on the CPU.
  at::Device device = at::kCPU;
  RowWindow bound = {};
  // Tokens of a page of rows: what forks share, and what a fork copies of a last, partly filled one is at most.
  int64_t page_tokens = RowStore::kPageTokens;
  // Memory for so many pages of rows is taken at once, and everything forked from the state has its rows there: readers on a device find all of them by one table of numbers. 0: memory
  // is taken as rows come. Not with rows kept by choice.
  int64_t row_pages = 0;
  // Of a bounded state: rows that are kept by choice beside the first and the last ones, which attention then sees too.
  KeptRule kept = {};

  // Throws Error for values that contradict each other.
  void validate() const;
  // The rows that a state of these options keeps of `tokens` tokens. `refill` as Replay::refill_tokens().
  RowBound row_bound(int64_t refill) const;
  // Keys that a query behind `context` tokens sees at most, itself included.
  int64_t seen(int64_t context) const;
};

// What is kept of keys and values, as text: "keep" (all rows), "drop" (none), "bounded:F+W" (the first F tokens' and the last W's), or a policy of row_policy.h, as in
// "surprise:budget=256,first=4,window=64" (budget, share or threshold; first 4, window 64 unless said; seed). Throws Error.
void set_kv(StateOptions& options, const std::string& text);
std::string kv_text(const StateOptions& options);

struct StateBytes {
  int64_t recurrent = 0, tails = 0, tokens = 0;
  int64_t checkpoints = 0, ring = 0;
  int64_t total() const { return recurrent + tails + tokens + checkpoints + ring; }
};

class State;

// What a state asks of the model that made it to reach an earlier position.
class Replay {
 public:
  virtual ~Replay() = default;
  // Tokens that refill() must run for every tail to be right.
  virtual int64_t refill_tokens() const = 0;
  // Brings the recurrent slots of `one`, a single sequence, over its rows [begin, end), without touching anything else.
  virtual void scan(State& one, int64_t begin, int64_t end) const = 0;
  // Runs the tokens from one.lengths() to `end`, whose rows `one` holds, through the model again: recurrent slots and
  // tails are then those at `end`.
  virtual void refill(State& one, int64_t end) const = 0;
};

// The slots of one layer.
class LayerState {
 public:
  // A recurrent slot or tail: [N, shape...]. Written in place by its owner.
  const at::Tensor& tensor(const std::string& name) const;
  bool has(const std::string& name) const { return slots_.count(name) > 0; }

 private:
  friend class State;
  struct Slot {
    SlotSpec spec;
    at::Tensor data;    // [N, shape...] of a recurrent slot or tail
    int64_t rows = -1;  // of a per-token slot: its number in the row store
    at::Tensor recent;  // of a tail with a ring: [N, ring + longest w - 1, C], the input of token t at t modulo its length
  };
  std::map<std::string, Slot> slots_;
};

class State {
 public:
  // Zeros for `sequences` sequences, no token seen.
  // `refill` as Replay::refill_tokens() of the model that it is for.
  State(const std::vector<std::vector<SlotSpec>>& layers, int64_t sequences, const StateOptions& options = {}, int64_t refill = 0);

  State(State&&) = default;
  State& operator=(State&&) = default;
  State(const State&) = delete;  // fork() says what is shared
  State& operator=(const State&) = delete;

  int64_t sequences() const { return static_cast<int64_t>(lengths_.size()); }
  const std::vector<int64_t>& lengths() const { return lengths_; }  // tokens seen, by sequence
  at::Tensor lengths_tensor() const;                                // [N] int32
  LayerState& layer(int64_t i) { return layers_[static_cast<size_t>(i)]; }
  const LayerState& layer(int64_t i) const { return layers_[static_cast<size_t>(i)]; }
  const StateOptions& options() const { return options_; }

  // Room for `tokens` tokens in all for each sequence, so that no later append moves rows.
  void reserve(int64_t tokens);
  // The same for a state of one sequence, whose rows stay where they are: only room behind them is added, as memory of its own. A fork that shares the pages up to there
  // then holds none of what is added.
  void reserve_behind(int64_t tokens);
  // Makes sure, before anything is written, that `counts` tokens more by sequence fit: rows, checkpoints and ring. Throws Error when the
  // budget does not allow them.
  void prepare(const std::vector<int64_t>& counts);

  // Writes rows behind those held, for slot `name` of layer `i`: rows [N, T, shape...], or [1, sum T, shape...] with
  // the host copy of cu_seqlens. Lengths do not move before advance(), so that every layer appends at the same place. On a GPU `together`, where given, writes them when it runs, before
  // anybody reads them.
  void append(int64_t i, const std::string& name, const at::Tensor& rows, const std::vector<int64_t>* cu_seqlens, ops::Copies* together = nullptr);
  // The first `length` rows of slot `name` of layer `i`: [N, length, shape...]; those behind a sequence's own length are unspecified. A view where
  // the pages of all sequences lie side by side (no forks), otherwise a copy.
  at::Tensor rows(int64_t i, const std::string& name, int64_t length) const;
  // Rows [begins[n], ends[n]) of each sequence n, which must be held: [N, longest, shape...].
  at::Tensor rows(int64_t i, const std::string& name, const std::vector<int64_t>& begins, const std::vector<int64_t>& ends) const;
  // Where rows stand, for readers that go there: pages of several pools, the same in every slot of every layer. Valid until the end of the call.
  RowStore::Pages pages() const { return rows_.pages(); }
  std::vector<at::Tensor> pools(int64_t i, const std::string& name, const RowStore::Pages& pages) const;  // [pages, page_tokens, shape...] each
  // True when rows of the sequence were dropped, or will be at `length` tokens.
  bool bounded(int64_t length) const { return rows_.bound().on() && length > options_.bound.first + options_.bound.window; }
  const RowBound& row_bound() const { return rows_.bound(); }
  // The rows that are kept by choice. A layer lets tokens go and gives the rows of those that are kept during its pass.
  const KeptRows& kept() const { return kept_; }
  KeptRows& kept() { return kept_; }
  // The inputs of the convolution whose tail is slot `name`, rows as in append(): for the ring; does nothing without
  // one.
  void record(int64_t i, const std::string& name, const at::Tensor& inputs, const std::vector<int64_t>* cu_seqlens);
  // The tokens of this call are part of the sequences from now on: `counts` new tokens by sequence.
  void advance(const std::vector<int64_t>& counts);

  // Sequence `sequence` forgets its tokens from `length` on: it is then as if it had never seen them, up to rounding
  // (bit for bit where a checkpoint or an entry of the ring stands at `length`). Otherwise the recurrent states are
  // scanned forward over the rows from the nearest checkpoint below, and the tails refilled by a run of the last
  // refill_tokens() tokens. Throws Error for a position that cannot be reached, naming the nearest one that can; the
  // state is then as it was.
  void trim(int64_t sequence, int64_t length, const Replay& model);
  // The last position up to `length` that trim() reaches.
  int64_t reachable(int64_t sequence, int64_t length) const;
  // True when trim() reaches every position: the rows determine every recurrent slot and tail, and none was dropped.
  bool replayable() const;

  // Positions of a state of one sequence to come back to by a copy of recurrent slots and tails, bit for bit, whether it keeps rows or none: what a draft wants
  // (oryx/generate/speculative.h). Pages of the fixed pool, taken once. hold() remembers the present one, and no other.
  void hold();
  // Remembers the position behind each of the next call's `tokens` tokens but the last, in place of what is held: the call must run them one by one (ModelInput::as_steps), and say of
  // each recurrent slot and tail, by keep_step(), when token t of the call has gone through it.
  void hold_steps(int64_t tokens);
  void keep_step(int64_t i, const std::string& name, int64_t t);
  // Goes back to a position that is held (or stays, at lengths()), and forgets the tokens behind it as trim() does. What was dropped under a bound since is gone: the state must keep the
  // rows of as many tokens more (RowWindow::back).
  void back(int64_t length);

  // A state whose sequence j is a copy of sequence from[j]: {0, 0, 0} makes three. Full pages of rows are shared until one of the two writes there;
  // recurrent slots and tails are copied, checkpoints and the ring's entries shared. One budget counts for all of them.
  State fork(const std::vector<int64_t>& from) const;
  // A fork of every sequence, to be kept aside; restore() makes this state what it was then.
  State snapshot() const;
  void restore(const State& snapshot) { *this = snapshot.snapshot(); }
  // Sequences of several states that were forked from one, side by side in new states: targets[k][j] is (source, sequence) of sequence j of the k-th of them, each at most
  // once; sequences that stand in no target are dropped. Pages of rows move as they are, with what was reserved; recurrent slots and tails are copied. A source that
  // becomes a target whole is moved. On the CPU those that keep their places in one source stay where they are, when it has room for the others, and only these are
  // copied: room that sequences left behind is kept for the next, and counts, until give_back_room(). States with rows kept by choice only move whole.
  using SequencePlace = std::pair<size_t, int64_t>;
  static std::vector<State> regroup(std::vector<State> sources, const std::vector<std::vector<SequencePlace>>& targets);

  // For a state whose sequences are places that come to be taken and left: recurrent slots and tails stay where they are, whoever sits there. seat() makes sequence n, which must hold
  // no token, that of `one`, a state of one sequence forked from the same: its rows move as they are, with what was reserved, its recurrent slots and tails are copied; unseat() is the way
  // back. Behind it and behind clear() sequence n holds no token and no rows; what its recurrent slots hold is unspecified until the next seat(). Not with rows kept by choice, checkpoints or a ring.
  void seat(int64_t n, State one);
  State unseat(int64_t n);
  void clear(int64_t n);
  // For readers on a device, where all pages of all sequences stand in one memory (RowStore::memory): that of slot `name` of layer `i`, [rows, shape...], else undefined; the pages of
  // sequence n by their numbers in it; a number that differs when they may have changed. And how many pages of a pool nobody has.
  at::Tensor row_memory(int64_t i, const std::string& name) const;
  std::vector<RowStore::NumberedPage> numbered_pages(int64_t n) const { return rows_.numbered_pages(n); }
  int64_t pages_version() const { return rows_.version(); }
  int64_t free_pages() const { return rows_.pool() != nullptr ? rows_.pool()->free() : 0; }

  // Sequences that recurrent slots and tails have room for beyond those that there are.
  int64_t spare_sequences() const { return room_ - sequences(); }
  void give_back_room();

  // Everything that save files hold, by name: recurrent slots, tails, rows up to the lengths, checkpoints; the ring is not kept.
  std::vector<std::pair<std::string, at::Tensor>> tensors() const;
  // Takes over what tensors() gave: `get` returns a tensor by name and throws when there is none; `shape` and dtype are checked by it. The
  // state must be fresh.
  void assign(const std::vector<int64_t>& lengths, const std::vector<int64_t>& rows_from, const std::vector<std::vector<int64_t>>& checkpoints,
              const std::vector<int64_t>& kept_lost, const std::function<at::Tensor(const std::string& name, const SlotSpec& spec, int64_t rows)>& get);
  static constexpr int64_t kAnyRows = -2;  // what assign() asks for where only the tensor knows how many there are
  std::vector<std::vector<int64_t>> checkpoints() const;  // positions, by sequence
  // Drops checkpoints until those of a sequence stand at least `every` tokens apart, and from its start; 0: drops all. Frees memory for longer trims.
  void thin_checkpoints(int64_t every);
  // Rows [bound.first, rows_from) of each sequence were dropped; 0: none.
  std::vector<int64_t> rows_from() const;

  // Bytes in use by part: per-token slots count the tokens held, not the reserve. `reserved` counts what is allocated.
  StateBytes bytes() const;
  StateBytes reserved_bytes() const;
  // The two pools under the budget: pages of rows (page_tokens tokens in every slot) and of recurrent slots and tails (a sequence's at one position).
  struct PoolUse {
    int64_t page_bytes, pages;  // pages that exist: this state's of rows; of recurrent states those of all forks, free ones included
  };
  PoolUse row_pool() const { return {rows_.page_bytes(), rows_.page_bytes() > 0 ? rows_.reserved_bytes() / rows_.page_bytes() : 0}; }
  PoolUse fixed_pool() const { return {pool_->page_bytes(), pool_->pages()}; }
  const ByteBudget& budget() const { return *budget_; }

 private:
  // Recurrent slots and tails of one sequence after `length` tokens.
  struct Mark {
    int64_t length = 0;
    std::shared_ptr<FixedPage> page;  // values in the order of for_each_fixed; never written again while two states hold it
  };
  struct Marks {
    std::deque<Mark> checkpoints, ring;  // ascending
    int64_t recent_from = 0;             // first token whose convolution inputs the ring holds
    int64_t last_checkpoint = 0;         // where the last one was taken, also when it was dropped since
  };

  // f(slot) for recurrent slots and tails.
  template <typename F>
  void for_each_fixed(F f) const {
    for (const auto& layer : layers_) {
      for (const auto& [name, slot] : layer.slots_) {
        if (slot.spec.kind != SlotKind::kPerToken) f(slot);
      }
    }
  }
  StateBytes count(bool reserved) const;
  int64_t mark_bytes(SlotKind kind) const;
  int64_t fixed_bytes() const;  // of one sequence: recurrent slots, tails and the ring of inputs
  void take(int64_t n, Mark& mark) const;
  void take_marks(int64_t n);
  bool checkpoint_due(int64_t n, int64_t length) const;
  const Mark* nearest_mark(int64_t n, int64_t length) const;  // at or before; null: the start
  // How trim() gets to a position.
  struct Way {
    const Mark* mark;     // to begin at; null: the start
    int64_t scanned;      // tokens whose rows are scanned; those behind it are run again
    bool tails_in_ring;
  };
  std::optional<Way> way_to(int64_t n, int64_t length) const;
  bool rows_determine() const;
  [[noreturn]] void refuse_trim(int64_t n, int64_t length) const;
  bool sees_what_it_must(int64_t n, int64_t length) const;
  State one_sequence(int64_t n, const Mark* from) const;
  void adopt(int64_t n, int64_t length, const State& one);
  void forget(int64_t n, int64_t length);
  bool tails_in_ring(int64_t n, int64_t length) const {
    return marks_[static_cast<size_t>(n)].recent_from <= std::max<int64_t>(0, length - tail_);
  }
  void read_tails(int64_t n, int64_t length, State& one) const;
  void restart_ring(int64_t n);

  struct Empty {};
  State(Empty, const State& like, RowStore rows, KeptRows kept, int64_t sequences);
  static State joined(std::vector<State>& sources, const std::vector<SequencePlace>& places);
  // The source in whose memory a target can be made; none: in new memory.
  static std::optional<size_t> base_of(const std::vector<State>& sources, const std::vector<std::vector<SequencePlace>>& targets, size_t target);
  static State joined_in(size_t base, std::vector<State>& sources, const std::vector<SequencePlace>& places);
  static RowStore rows_of(std::vector<State>& sources, const std::vector<SequencePlace>& places);
  void take_histories(std::vector<State>& sources, const std::vector<SequencePlace>& places);

  StateOptions options_;
  std::shared_ptr<ByteBudget> budget_;
  Charge charge_;  // of recurrent slots, tails and the ring of inputs
  std::shared_ptr<FixedPool> pool_;  // one for all forks
  RowStore rows_;
  KeptRows kept_;
  std::vector<LayerState> layers_;
  std::vector<int64_t> lengths_;
  std::vector<Marks> marks_;  // by sequence
  int64_t room_ = 0;    // sequences that recurrent slots and tails have memory for; their tensors are its first rows
  // What hold() and hold_steps() keep: entry t of `marks` is the position `from` + t. Not part of forks.
  struct Held {
    int64_t from = 0, count = 0;
    std::vector<Mark> marks;                                 // of which the first `count` count
    std::map<std::pair<int64_t, std::string>, size_t> places;  // of (layer, slot) in the order of for_each_fixed
  };
  Held held_;
  int64_t recent_ = 0;  // tokens of the ring of convolution inputs
  int64_t tail_ = 0;    // w - 1: tokens of the longest tail
  int64_t refill_ = 0;  // Replay::refill_tokens()
  bool looked_at_ = false;  // some slot's rows are
};

}  // namespace oryx
