// The insides of Engine, for its own files: engine.cc (admission and ends), reading.cc (prompts), writing.cc (texts,
// side by side), slots.cc (texts that have places of the fused decoder).
#pragma once

#include <chrono>
#include <deque>
#include <map>
#include <set>
#include <span>

#include "oryx/generate/routed_text.h"
#include "oryx/model/inspect.h"
#include "oryx/model/routed_cost.h"
#include "oryx/serve/engine.h"
#include "oryx/serve/piece_reader.h"
#include "oryx/serve/prefix_tree.h"

namespace oryx::serve {

using Clock = std::chrono::steady_clock;

inline double seconds_between(Clock::time_point a, Clock::time_point b) {
  return std::chrono::duration<double>(b - a).count();
}

// Whether a token of this batch reads keys and values of others.
bool looks_back(const LanguageModel& model, const Routings& routings);
// Tokens and modes of a chunk of a prompt, exactly.
std::string chunk_key(std::span<const int32_t> ids, const Routings& routings);

struct Engine::Run {
  int64_t id;
  Request request;
  Clock::time_point arrived, started, last_token;
  std::optional<State> state;  // while the prompt is read; then in a batch or a slot
  int64_t slot = -1;           // its place in Slots
  int flights = 0;             // steps that run for it whose results nobody has looked at
  // Of tokens from ahead_from on: modes by layer, and the share of layers in attention.
  int64_t ahead_from = 0;
  std::vector<uint8_t> ahead_modes;
  std::vector<double> ahead_attention;
  std::unique_ptr<RoutedText> routed;  // where the schedule has routers
  int64_t looked = -1;         // tokens of the prompt that were looked at for them; -1: none, or no longer
  PrefixTree::Keys keys;       // of the prompt's chunks
  int64_t length = 0;          // tokens that the state holds
  int64_t read = 0;            // tokens of the prompt that ran through the model for it
  int32_t next = -1;           // sampled, not yet run
  double attention_tokens = 0;
  bool over = false;
  Ended ended;

  int64_t prompt() const { return static_cast<int64_t>(request.prompt.size()); }
  int64_t total() const { return prompt() + request.max_tokens; }
  ModePiece piece(int64_t row, int64_t begin, int64_t count) const {
    ModePiece p{.row = row, .column = 0, .length = count, .start = begin, .context = {}};
    p.context.prompt_length = prompt();
    p.context.seed = static_cast<uint64_t>(request.sampling.seed);
    if (routed) p.context.facts = routed->facts();
    return p;
  }
  Routings route(int64_t begin, int64_t count) const {
    return request.schedule->route({piece(0, begin, count)}, 1, count);
  }
};

// Texts that are written side by side.
struct Engine::Batch {
  std::vector<Run*> runs;
  State state;  // its sequence j is that of runs[j]
};

// Places of the texts that are written, in one state. A step is launched before the results of the one before are
// looked at: the device does not wait for the host.
struct Engine::Slots {
  State state;
  std::vector<Run*> runs;  // by place; null: free
  std::vector<Run*> flying;  // the rows of the step whose results are pending
  SlotDecoder::Pending pending;
};

// How long steps and pieces take, by the times at which steps' results come: a step runs behind the pieces that were launched before it. What may be read between two steps of texts
// that should not wait longer than a given time follows from it.
class Pace {
 public:
  // A step was launched: the pieces since the step before run before it.
  void launched() { flying_.push_back(std::exchange(read_, 0)); }
  void read(int64_t tokens) { read_ += tokens; }
  // The results of the step that was launched longest ago are there.
  void came(Clock::time_point now);
  // No text is written: the time until the next results says nothing.
  void pause() { last_.reset(), flying_.clear(); }
  // Before the pieces of a round, of `piece` tokens at most, between two tokens of texts that should come `gap` seconds apart at most.
  void begin_round(double gap, int64_t piece);
  // Whether a piece of so many tokens may be read now; before anything is known, one a round.
  bool allows(int64_t tokens) const { return token_ > 0 ? credit_ >= seconds_of(tokens) : read_ == 0; }
  void spend(int64_t tokens) { credit_ -= seconds_of(tokens); }

 private:
  double seconds_of(int64_t tokens) const { return token_ * static_cast<double>(tokens); }
  std::optional<Clock::time_point> last_;
  int64_t read_ = 0;
  std::deque<int64_t> flying_;   // tokens read before each step whose results nobody has looked at
  double step_ = 0, token_ = 0;  // seconds, of late
  double credit_ = 0;
};

// What a request takes of the budget: of a pool of rows that is part of it, pages.
struct Room {
  int64_t bytes = 0, pages = 0;
};

struct Engine::Impl {
  const LanguageModel& model;
  const EngineOptions& options;
  std::unique_ptr<SlotDecoder> decoder;  // null: texts are written operator by operator
  std::unique_ptr<PieceReader> pieces;   // null: prompts are read operator by operator
  std::string identity;    // of the model, as routers name it
  ModelSchedule linear;  // of what is read for them
  // The empty state that all others are forked from: one budget counts them.
  State root;
  int64_t fixed = 0, page_bytes = 0;
  PrefixTree prefixes;

  // Of the thread that runs the model.
  std::vector<std::unique_ptr<Run>> running;  // in the order of admission
  std::deque<Run*> reading;                   // the first one's turn is next
  std::vector<Batch> batches;
  std::optional<Slots> slots;  // with a decoder
  Pace pace;

  // Of all threads.
  mutable std::mutex mutex;
  std::condition_variable wake;
  std::deque<std::unique_ptr<Run>> queue;
  std::set<int64_t> cancelled;
  bool closed = false;
  int64_t next_id = 1;
  EngineStats stats;

  Impl(const LanguageModel& m, const EngineOptions& o, std::unique_ptr<SlotDecoder> d)
      : model(m),
        options(o),
        decoder(std::move(d)),
        identity(router_identity(m)),
        linear(m.config(), "linear"),
        root(m.make_state(1, o.state)) {
    const StateBytes none = state_bytes(model.config(), 0, model.compute_dtype(), options.state);
    fixed = none.recurrent + none.tails;
    page_bytes = root.row_pool().page_bytes;
    stats.budget_bytes = options.state.budget;
    if (decoder != nullptr) make_slots();
  }

  // ---- bytes

  int64_t pages(int64_t tokens) const { return (tokens + options.state.page_tokens - 1) / options.state.page_tokens; }
  bool bounded() const { return root.row_bound().on(); }
  // Of a bounded sequence at most.
  int64_t region_pages(int64_t tokens) const {
    return std::min(RowStore::region_pages(root.row_bound(), options.state.page_tokens), pages(tokens));
  }
  int64_t region_bytes(int64_t tokens) const { return page_bytes * region_pages(tokens); }
  // Of a request of `tokens` tokens that begins at a kept prefix of `reused`. Under a bound a region may be replaced:
  // both stand for a moment. Of a pool it has its own pages, whatever it shares.
  Room need(int64_t tokens, int64_t reused) const {
    if (bounded()) return pooled() ? Room{fixed, region_pages(tokens)} : Room{fixed + 2 * region_bytes(tokens)};
    return with_rows(fixed, pages(tokens) - reused / options.state.page_tokens);
  }
  bool pooled() const { return options.state.row_pages > 0; }
  Room with_rows(int64_t bytes, int64_t pages) const { return pooled() ? Room{bytes, pages} : Room{bytes + page_bytes * pages, 0}; }
  // What requests can have at most, all of them together.
  Room whole() const { return {options.state.budget - base_bytes(), options.state.row_pages}; }
  // Taken before there is any request: the empty state, the slots, the pool of rows.
  int64_t base_bytes() const { return fixed * (1 + (slots ? slots->state.sequences() : 0)) + page_bytes * options.state.row_pages; }
  bool fits(const Room& room) const {
    return options.state.budget - root.budget().used() >= room.bytes && (room.pages == 0 || root.free_pages() >= room.pages);
  }
  // Until so much is free: gives back what texts that have ended left in their batches, then drops kept prefixes,
  // the least recently used first.
  bool make_room(const Room& room, const PrefixTree::Node* spared = nullptr) {
    for (Batch& batch : batches) {
      if (!fits(room)) batch.state.give_back_room();
    }
    while (!fits(room)) {
      if (!prefixes.drop_one(spared)) return false;
    }
    return true;
  }

  // ---- admission (engine.cc)

  void check(const Request& r) const;
  // A state for the run, with room for all its tokens: forked from the longest kept prefix, or fresh. False when the
  // budget does not allow it now.
  bool find_room(Run& run);
  void admit();

  // ---- the end of a request (engine.cc)

  void end(Run& run, Outcome outcome, std::string error = {});
  void take_cancellations();

  // ---- reading (reading.cc)

  // What the prompt's beginnings are kept under, and found by.
  void make_keys(Run& run) const;
  // Of a prompt that routers want to know before it runs: its next piece in linear mode, or, where the tokens alone are
  // enough, all of it. True when it can be read in the same turn.
  bool look_ahead(Run& run);
  void count(Run& run, const Routings& routings, int64_t tokens);
  // A prompt that began alike may have come further meanwhile: prompts of a kind that arrive together are read once.
  void jump(Run& run);
  // -> tokens that were read
  int64_t read_piece();
  // One piece, or so many as texts may wait for.
  void read_pieces();
  // The tokens' hidden states [n, D], behind those that the run's state holds.
  at::Tensor run_piece(Run& run, std::span<const int32_t> ids, const Routings& routing);
  void keep_prefix(Run& run);
  // The prompt's tokens whose hidden states [n, D] are those of the tokens from `begin` on: of each the next one.
  void score_piece(const Run& run, int64_t begin, const at::Tensor& hidden) const;

  // ---- writing (writing.cc)

  // Draws the next token from logits [V] on the CPU, and says whether the request goes on. hidden [D]: the state that they
  // were made of, by which routers decide on the token.
  void take_token(Run& run, const at::Tensor& all, const at::Tensor& hidden);
  // The same with the token that was drawn.
  void take_next(Run& run, int32_t next);
  // Request::on_scores of a token, by the logits that it was drawn from.
  void tell_scores(const Run& run, const at::Tensor& logits, int32_t next) const;
  bool writes(const Run& run) const { return !run.over && run.next >= 0; }
  // Whether keys and values are read where they stand, so that it does not matter who looks back and how far.
  bool reads_in_place() const { return model.device().is_cpu(); }
  int64_t most_in_a_batch() const;
  // Which requests are written side by side. Each stays where it stood, as far as that is possible: what joins and what
  // fills the places of those that have left is all that is copied.
  std::vector<std::vector<Run*>> grouped() const;
  // The same where keys and values are gathered: those that look back apart from those that do not, in the order of their
  // admission.
  std::vector<std::vector<Run*>> grouped_apart() const;
  void form_batches();
  void write_one(Batch& batch);
  // Each row by its own schedule.
  Routings route_rows(const std::vector<Run*>& runs) const;
  void write_tokens();
  // What has ended leaves, and with it its bytes.
  void leave();

  // ---- writing by captured launches (slots.cc)

  void make_slots();
  // Whether it is written in a slot. Routers read every token's hidden state.
  bool slotted(const Run& run) const { return slots && !run.routed; }
  // Whether the host wants to see what its next token is drawn from.
  static bool wants_logits(const Run& run) { return run.request.top_logprobs >= 0; }
  // Resolves the schedule some tokens ahead where `position` is not among those that are known -> its place there.
  size_t modes_ahead(Run& run, int64_t position) const;
  void seat_texts();
  // Places of texts that have ended are free again.
  void clear_slots();
  std::vector<SlotDecoder::Row> next_rows(std::vector<Run*>& runs);
  void take_results(const SlotDecoder::Pending& pending, const std::vector<Run*>& runs);
  // Launches a token of every text that has a slot, then looks at the results of the launch before.
  void write_slots();
  // Waits for the pending step and takes its tokens.
  void land();
};

}  // namespace oryx::serve
