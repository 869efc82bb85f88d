// Text generation: the prompt in pieces, then token by token, under a mode schedule.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "oryx/generate/sampling.h"
#include "oryx/generate/session.h"
#include "oryx/generate/speculative.h"
#include "oryx/model/language_model.h"
#include "oryx/model/scheduling.h"
#include "oryx/model/state_file.h"

namespace oryx {

struct GenerateOptions {
  int64_t max_new_tokens = 256;  // at least 1
  int64_t prefill_piece = 0;  // tokens of one pass over the prompt at most; 0: as SessionOptions::piece says
  int32_t eos_id = -1;           // ends the text and is not part of it; -1: nothing does
  int64_t vocab_size = 0;        // only tokens below are drawn: a model's vocabulary may be padded beyond its tokeniser's; 0: all
  SamplingOptions sampling = {};
  StateOptions state = {};       // what is kept of keys and values, among others
  bool fused = true;             // on a GPU decode by one captured launch a token (SessionOptions)
  DraftOptions draft = {};       // tokens drafted in a cheaper mode and verified several at once: the same text. A bounded state is given the rows that this wants (bound.back).
  // Go on from this state of one sequence (one that was loaded, a fork), which is moved from: the prompt comes behind the tokens that it holds, and counts as the end of a
  // prompt that begins with them. `state` is then the state's own.
  State* from = nullptr;
  TextEnd from_end = {};  // of `from`: with its logits the prompt may be empty, and the text goes on as if it had never been left
  // Sees the state at the end, which then holds prompt and new tokens to the last (an eos is not of the text), and where the text stands. Also after an interrupt, but not
  // after one while the prompt was read.
  std::function<void(const State&, const TextEnd&)> at_end = {};
};

enum class StopReason { kEos, kLength, kCallback, kInterrupted };
std::string to_string(StopReason reason);  // "eos", "length", "callback", "interrupted"

struct GenerateStats {
  int64_t held_tokens = 0;                    // of the state that was gone on from
  int64_t prompt_tokens = 0, new_tokens = 0;  // new_tokens counts what was sampled, an eos included
  double prefill_seconds = 0;
  double decode_seconds = 0;       // of decode_steps passes over one token
  int64_t decode_steps = 0;
  double attention_share = 0;      // see Session
  DraftStats draft;                // of DraftOptions; its times are part of decode_seconds
  MemoryPlan predicted;            // for the prompt and max_new_tokens
  StateBytes predicted_state;      // for the tokens that were really held at the end
  StateBytes state;                // measured at the end

  double prefill_tokens_per_second() const { return prefill_seconds > 0 ? static_cast<double>(prompt_tokens) / prefill_seconds : 0; }
  double decode_ms_per_token() const { return decode_steps > 0 ? 1e3 * decode_seconds / static_cast<double>(decode_steps) : 0; }
};

struct Generated {
  std::vector<int32_t> ids;  // the new tokens, without eos
  StopReason stop = StopReason::kLength;
  GenerateStats stats;
};

// `on_token` sees each new token as it comes and returns whether to go on. After Ctrl-C what was generated so far is returned with
// kInterrupted. Throws Error for an empty prompt (see from_end), bad options, a schedule that wants scores of a whole prompt of which the state holds a part (a router wants from_end.routers), ids outside of the vocabulary, logits that are not finite, and, before
// allocating, when prompt and new tokens need more memory than is free.
Generated generate(const LanguageModel& model, const ModelSchedule& schedule, std::span<const int32_t> prompt, const GenerateOptions& options,
                   const std::function<bool(int32_t id)>& on_token = {});

}  // namespace oryx
