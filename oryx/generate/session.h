// One sequence under a mode schedule: its tokens go in, in any split, and hidden states come out.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "oryx/generate/fused_decoder.h"
#include "oryx/generate/routed_text.h"
#include "oryx/generate/verifier.h"
#include "oryx/model/language_model.h"
#include "oryx/model/scheduling.h"

namespace oryx {

// What a sequence will take, before anything is allocated.
struct MemoryPlan {
  StateBytes state;            // of a sequence of all its tokens: exact
  int64_t activations = 0;     // of a pass over one piece: an estimate, on the high side
  int64_t total() const { return state.total() + activations; }
};
MemoryPlan plan_memory(const ModelConfig& config, int64_t tokens, int64_t piece, at::ScalarType compute, const StateOptions& state = {});

struct SessionOptions {
  int64_t prompt_length = 0;  // tokens: what the schedule's ranges refer to
  int64_t tokens = 0;         // that the session will hold at most; at least 1
  int64_t piece = 0;          // tokens of one pass at most: bounds the memory of a long prompt; 0: 1,024, on a GPU 8,192, which shorter ones do not fill
  uint64_t seed = 0;          // of a random schedule
  StateOptions state = {};    // checkpoints, ring, rows, budget
  std::shared_ptr<const TokenFacts> facts = {};  // what the schedule needs (ModelSchedule::needs) of the prompt; a router's gains behind it are the session's own work
  bool fused = true;          // step() on a GPU through the fused decoder (fused_decoder.h); where there is none for this model or device, one notice says why
  int64_t drafted = 0;        // tokens that are drafted at once at most (speculative.h): what comes on top for them is planned
};

class Session {
 public:
  // Model and schedule must outlive the session. Throws Error when the plan exceeds the free memory, before allocating.
  Session(const LanguageModel& model, const ModelSchedule& schedule, const SessionOptions& options);

  // Goes on from a state of one sequence (a fork, or one that was loaded). options.state is the state's. A schedule with routers wants to know what routers knew of its text,
  // which a session under a schedule with any router has in routers(). Throws Error without.
  Session(const LanguageModel& model, const ModelSchedule& schedule, const SessionOptions& options, State state, const TextRouters& routers = {});

  // The decoder of step() points into the state and stays behind: it is made anew.
  Session(Session&& other) noexcept;

  // Before a prompt runs, the whole of it: what routers want to know of its tokens, by a reading in linear mode, piece by piece, where one of them goes by hidden states. Does
  // nothing where there are no routers, or their gains were given (SessionOptions::facts). Throws Interrupted between pieces after Ctrl-C.
  void look_ahead(std::span<const int32_t> prompt);

  // Runs `ids` (at least one) behind the tokens held, piece by piece -> hidden states [keep, D] of the last `keep` of them (1 <= keep <=
  // ids). Throws Interrupted between pieces after Ctrl-C, Error for ids outside of the vocabulary.
  at::Tensor extend(std::span<const int32_t> ids, int64_t keep = 1);

  // Runs one token behind those held -> its logits [vocabulary], valid until the next call. Like extend() and the model's head, but through the fused decoder where there is
  // one for this model and device, and without asking for interrupts.
  at::Tensor step(int32_t id);

  // Forgets the tokens from `length` on (State::trim). Not for a schedule with a router, which reads a text forwards.
  void trim(int64_t length);

  // What drafts want (speculative.h), of a session without routers: hold() remembers where it stands, draft() runs a token as step() does but under the schedule `by`, and back() stands
  // there again, as if nothing had run since.
  void hold();
  at::Tensor draft(int32_t id, const ModelSchedule& by);
  // `count` tokens behind `id` that way, each the likeliest of the first `below` ids (0: all).
  std::vector<int32_t> draft_likeliest(int32_t id, int64_t count, const ModelSchedule& by, int64_t below);
  void back();
  // Runs `ids` behind those held in one pass, each as step() would (by a DraftVerifier where there is one, else ModelInput::as_steps) -> logits [ids, vocabulary], valid until the next call.
  // keep() then forgets all but the first `count` of them, at least one; before anything else is done.
  at::Tensor steps(std::span<const int32_t> ids);
  // Tokens of steps() that cost little more than one: what the verifier takes at once, or a product of few rows.
  int64_t most_steps();
  void keep(int64_t count);
  // Whether the next `count` tokens run in the same mixers, in every layer, under the schedule `other`.
  bool same_modes(const ModelSchedule& other, int64_t count) const;

  int64_t length() const { return length_; }
  const State& state() const { return state_; }
  // The schedule's facts so far: those it was given and, of tokens behind the prompt, the gains that its routers predicted for them.
  const std::shared_ptr<const TokenFacts>& facts() const { return routed_.facts(); }
  // What a session goes on by elsewhere, under a schedule with routers.
  TextRouters routers() const { return routed_.saved(); }
  const MemoryPlan& plan() const { return plan_; }
  // Of all (token, layer) pairs so far, those that ran in the mixer `attention`.
  double attention_share() const { return length_ > 0 ? attention_tokens_ / static_cast<double>(length_) : 0; }

 private:
  at::Tensor run(std::span<const int32_t> ids);
  void count_attention();
  bool fused();  // whether the next token can go through the fused decoder
  DraftVerifier* verifier();
  at::Tensor step_under(const ModelSchedule& schedule, int32_t id);
  at::Tensor run_under(const ModelSchedule& schedule, std::span<const int32_t> ids, bool as_steps);
  std::vector<std::shared_ptr<const Routing>> route(int64_t start, int64_t count) const { return route(schedule_, start, count); }
  std::vector<std::shared_ptr<const Routing>> route(const ModelSchedule& schedule, int64_t start, int64_t count) const;

  const LanguageModel& model_;
  const ModelSchedule& schedule_;
  SessionOptions options_;
  MemoryPlan plan_;
  State state_;
  int64_t length_ = 0;
  double attention_tokens_ = 0;
  std::unique_ptr<FusedDecoder> fused_;  // made by the first step()
  bool asked_ = false;
  std::unique_ptr<DraftVerifier> verifier_;  // made by the first steps()
  bool asked_verifier_ = false, verifying_ = false;
  RoutedText routed_;
  int64_t held_length_ = 0;  // by hold(), and before steps()
  double held_attention_ = 0;
};

}  // namespace oryx
