// Self-speculative decoding: the weights draft tokens in one mode, in which a token is cheap, and one pass over all of them in the text's own modes says which of them it would have
// drawn itself (docs/generation.md, docs/decisions/0020-self-speculative-decoding.md).
//
// The text is that of the text's own modes alone. Each of its tokens is drawn from their logits, with the draw that belongs to its place; a draft that is not that token is forgotten with
// all behind it. The idea of drafts and one verifying pass: Leviathan et al. 2022 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318); of a draft by the model's own cheaper attention:
// TriForce (arXiv 2404.11912), MagicDec (arXiv 2408.11049); of draws that drafts and text share in place of the rejection rule: Daliri et al. 2024 (arXiv 2408.07978).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "oryx/generate/session.h"
#include "oryx/model/scheduling.h"

namespace oryx {

struct DraftOptions {
  std::string schedule;  // modes of the drafts (docs/modes.md), by positions alone; empty: nothing is drafted
  int64_t tokens = 7;    // drafted for one pass at most: 1 to kMostDrafted, and no more than the session verifies in one go (Session::most_steps)
  bool adapt = true;     // as many as pay by the acceptance and times measured so far, none too; false: always so many

  bool on() const { return !schedule.empty(); }
};
// A pass takes one token more, and on the CPU gives each the bits that it gets alone up to ops::kFewRows of them.
inline constexpr int64_t kMostDrafted = 15;

struct DraftStats {
  int64_t drafted = 0;   // tokens
  int64_t tested = 0;    // of them those that stood behind none that was refused
  int64_t accepted = 0;  // of these
  int64_t passes = 0;    // that verified drafts
  int64_t alone = 0;     // tokens that ran without a draft
  double draft_seconds = 0, verify_seconds = 0;

  double acceptance() const { return tested > 0 ? static_cast<double>(accepted) / static_cast<double>(tested) : 0; }
  double tokens_a_pass() const { return passes > 0 ? 1 + static_cast<double>(accepted) / static_cast<double>(passes) : 0; }
};

// How many tokens to draft, from what drafts and passes took and how many were accepted so far.
class DraftLength {
 public:
  DraftLength(int64_t most, bool adapt);
  // Of `room` tokens at most; 0: run the token alone.
  int64_t next(int64_t room);
  void tested(bool accepted);
  void drafted(double seconds_a_token);
  void passed(int64_t tokens, double seconds);  // one: a token alone
  int64_t most() const { return most_; }
  double acceptance() const { return accepted_ / tested_; }

 private:
  // A running mean of seconds; the first time, which holds what is made once (packed weights, captures), does not count. 0: not known.
  struct Mean {
    double value = 0;
    bool begun = false;
    void add(double seconds);
  };
  double pass_seconds(int64_t tokens) const;

  int64_t most_;
  bool adapt_;
  double accepted_, tested_;
  Mean draft_;                // of a token
  std::vector<Mean> passes_;  // over so many tokens
  int64_t since_draft_ = 0;   // tokens that ran alone since the last draft
  int64_t alone_most_;        // of those before one is tried
  int64_t since_alone_ = 0;   // passes since a token last ran alone
};

// Throws Error, one line, where no draft can be made: a schedule with a router, rows kept by choice, a draft's schedule that wants to know tokens, bad counts; and over a bounded state
// whose window keeps no rows of the tokens that may be forgotten (StateOptions::bound.back of tokens + 1 at least).
void check_draft(const ModelConfig& config, const ModelSchedule& schedule, const DraftOptions& draft, const StateOptions& state);

// Makes up to `count` tokens that may follow `id`, which the text goes on with behind those that the session holds. It may run the session (Session::draft): that goes back to where it was.
using Drafter = std::function<std::vector<int32_t>(Session& session, int32_t id, int64_t count)>;
// The token of a row of logits [vocabulary] at its position in the text.
using DrawToken = std::function<int32_t(const at::Tensor& logits, int64_t position)>;
// Tokens drawn under `schedule`, which must outlive it, with the text's own draws; none behind `end`.
Drafter drafts_drawn(const ModelSchedule& schedule, DrawToken draw, int32_t end = -1);
// The likeliest of the first `below` ids (0: all) under `schedule`; on a GPU, where tokens are decoded by captured launches, without the host between them.
Drafter drafts_likeliest(const ModelSchedule& schedule, int64_t below = 0, int32_t end = -1);

// Stands in for Session::step of one text, token by token.
class DraftedSession {
 public:
  // The session must outlive it. `schedule`: modes of the drafts, for which nothing is drafted where they are those of the text; null: drafts are not of the model, or always worth it.
  // Options as check_draft() wants them.
  DraftedSession(Session& session, Drafter drafter, const DraftOptions& options, const ModelSchedule* schedule = nullptr);

  // As Session::step: the next token, behind those of earlier calls -> its logits [vocabulary], valid until the next call. Of what follows the caller will want `room` tokens at most (at
  // least 1): they must find room in the session.
  at::Tensor step(int32_t id, int64_t room);
  // Forgets drafts that no step() has asked for: the session then holds the tokens of all calls and no more, as if nothing had been drafted. Before anybody else looks at it.
  void settle();
  int64_t length() const { return session_.length() - static_cast<int64_t>(ids_.size()) + used_; }
  const DraftStats& stats() const { return stats_; }

 private:
  std::vector<int32_t> draft(int32_t id, int64_t count);

  Session& session_;
  Drafter drafter_;
  const ModelSchedule* schedule_;
  DraftLength count_;
  DraftStats stats_;
  // The last pass: its tokens, of which the first `used_` are the text's, and the logits behind each [ids, vocabulary].
  std::vector<int32_t> ids_;
  int64_t used_ = 0;
  at::Tensor rows_;
};

}  // namespace oryx
