// Many requests on one model: they join and leave at any token, share a budget of bytes for their states, and begin
// where a prompt that began alike was kept. No HTTP here.
//
// One thread runs the model (step() or run()); submit(), cancel() and stats() may be called from any. A step admits
// what fits, reads one piece of one prompt (in turns), and writes one token of every request whose prompt is read, so
// that a running text never waits for more than one piece. Texts are written side by side in one pass, whatever their
// modes. On a GPU that the fused decoder knows, each text that is written has a place there, and a pass is one captured launch (oryx/generate/slot_decoder.h); on others keys and values
// are gathered, and there is one pass for texts that look back and one for the others.
//
// The tokens of a request do not depend on what else runs, ran before or is kept: docs/serving.md says where that holds
// to the last bit.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "oryx/common/error.h"
#include "oryx/generate/sampling.h"
#include "oryx/generate/slot_decoder.h"
#include "oryx/model/language_model.h"
#include "oryx/model/scheduling.h"
#include "oryx/serve/metrics.h"
#include "oryx/serve/scores.h"

namespace oryx::serve {

struct EngineOptions {
  int64_t max_running = 0;   // requests that are read or written at once; 0: 8, by captured launches 64
  int64_t max_queue = 64;    // requests that may wait
  int64_t piece = 0;         // tokens of a prompt in one pass at most; 0: 256, on a GPU 1,024
  double gap_seconds = 0;    // how long texts may wait for a token where prompts are read: so many pieces a round as fit, at times none; 0: one a round
  int64_t keep_every = -1;   // prefixes are kept at multiples of it, which must be a multiple of piece; 0: none are; -1: as piece
  int64_t state_budget = 0;  // bytes for the states of requests and prefixes; 0: a quarter of the memory that is free (on a GPU: half of its)
  StateOptions state = {};   // what is kept of keys and values (set_kv)
  bool fused = true;         // on a GPU: by captured launches, where the model is one that they know
  bool captured_pieces = true;  // and with it: pieces of prompts in linear modes, each by one captured launch (piece_reader.h)

  // Throws Error.
  void validate() const;
  // What is left to the device, and to whether texts are written by captured launches, is settled.
  void settle(at::Device device, bool captured);
};

enum class Outcome { kEos, kLength, kStopped, kCancelled, kFailed };
std::string to_string(Outcome outcome);  // "eos", "length", "stopped", "cancelled", "failed"

struct Ended {
  Outcome outcome = Outcome::kLength;
  std::string error = {};  // of kFailed
  int64_t prompt_tokens = 0, reused_tokens = 0;
  int64_t new_tokens = 0;  // that were sampled, an eos included
  double queue_seconds = 0, first_token_seconds = 0, total_seconds = 0;
  double attention_share = 0;  // of the (token, layer) pairs that ran for it
};

inline bool failed(const Ended& ended) { return ended.outcome == Outcome::kFailed || ended.outcome == Outcome::kCancelled; }

struct Request {
  std::vector<int32_t> prompt;                    // at least one token
  std::shared_ptr<const ModelSchedule> schedule;  // of the engine's model; of places and routers, not of other scores
  SamplingOptions sampling = {};
  int64_t max_tokens = 16;
  int32_t eos_id = -1;     // ends the text and is not part of it; -1: nothing does
  int64_t vocab_size = 0;  // only tokens below are drawn; 0: all
  int64_t top_logprobs = -1;  // on_scores is told of each new token, with so many likeliest ones; -1: of none
  bool score_prompt = false;  // and before them of each token of the prompt, which is then read whole; max_tokens may be 0
  // Called by the thread that runs the model, and must not wait: each new token (false: it was the last one), and the
  // end, once for each request that was accepted.
  std::function<bool(int32_t id)> on_token = {};
  std::function<void(TokenScores)> on_scores = {};  // before on_token
  std::function<void(const Ended&)> on_end = {};
};

// The queue is full, or the engine is closing.
class Busy : public Error {
 public:
  using Error::Error;
};

class Engine {
 public:
  // The model must outlive the engine, and nobody else may run it meanwhile. Throws Error for bad options and a budget
  // that the smallest request would not fit into. `decoders` is for tests.
  using Decoders = std::function<std::unique_ptr<SlotDecoder>(const LanguageModel&, const StateOptions&, std::string* why)>;
  Engine(const LanguageModel& model, const EngineOptions& options, const Decoders& decoders = make_slot_decoder);
  ~Engine();

  // -> the request's number. Throws Error for a request that could never run (no prompt, ids outside of the vocabulary,
  // bad sampling options, more bytes than the whole budget, a schedule that looks back at what is dropped), Busy for
  // one that could later.
  int64_t submit(Request request);
  // The same of several that belong together: all are taken, or none is.
  std::vector<int64_t> submit(std::vector<Request> requests);
  // It ends before its next token, unless it has ended.
  void cancel(int64_t id);
  EngineStats stats() const;

  // One round; false when there was nothing to do.
  bool step();
  // Waits until there may be something to do, at most so long.
  void wait(double seconds);
  // Rounds until close() was called and everything has ended.
  void run();
  // Nothing is accepted any more. With `abort` what runs or waits is cancelled.
  void close(bool abort);

  // Bytes that a request of so many tokens takes at most, prompt and text together: what admission goes by.
  int64_t predicted_bytes(int64_t tokens) const;
  const EngineOptions& options() const { return options_; }
  // Whether texts are written by captured launches.
  bool fused() const;

 private:
  struct Run;
  std::unique_ptr<Run> accepted(Request request) const;
  struct Batch;
  struct Slots;
  struct Impl;
  std::unique_ptr<Impl> impl_;
  EngineOptions options_;
};

}  // namespace oryx::serve
