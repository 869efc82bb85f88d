// The bodies of POST /v1/completions and /v1/chat/completions (OpenAI's, and a few fields more), their answers and errors.
// No HTTP here.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "oryx/common/error.h"
#include "oryx/common/json.h"
#include "oryx/data/tokenizer.h"
#include "oryx/modes/gain_head.h"
#include "oryx/serve/chat.h"
#include "oryx/serve/engine.h"

namespace oryx::serve {

// An answer with an error: its HTTP status, and what OpenAI's error objects hold.
class ApiError : public Error {
 public:
  ApiError(int status, const std::string& message, std::string param = "", std::string code = "");
  int status() const { return status_; }
  Json json() const;  // {"error": {"message", "type", "param", "code"}}

 private:
  int status_;
  std::string param_, code_;
};

struct CompletionDefaults {
  std::string model;     // its name, the only one that is served
  std::string schedule;  // of requests that name none
  ChatTemplate chat = {};
  // Heads by the name that schedules give them: no other file is opened for a request.
  std::map<std::string, std::shared_ptr<const GainHead>> routers = {};
  std::shared_ptr<const GainHead> router(const std::string& name) const;  // Throws Error.
};

enum class Endpoint { kText, kChat };

struct Completion {
  std::vector<std::vector<int32_t>> prompts;  // at least one
  std::shared_ptr<const ModelSchedule> schedule;
  SamplingOptions sampling;
  int64_t max_tokens = 16;
  bool ignore_eos = false;  // an end of text is a token like others
  std::vector<std::string> stops;
  int64_t n = 1;              // answers to each prompt, of which the i-th is drawn by seed + i
  int64_t top_logprobs = -1;  // likeliest tokens beside each token's log-probability; -1: no log-probabilities
  bool echo = false;          // the prompt stands at the head of each answer
  size_t framed = 0;          // tokens at a prompt's head that are not of its text: a begin of text
  // Of all prompts: those to prompt p are p * n and the n - 1 behind.
  int64_t answers() const { return n * static_cast<int64_t>(prompts.size()); }
  const std::vector<int32_t>& prompt_of(int64_t answer) const { return prompts[static_cast<size_t>(answer / n)]; }
  bool stream = false, include_usage = false;
  Endpoint endpoint = Endpoint::kText;
};

// Throws ApiError: 400 for what is wrong in the body, 404 for another model.
Completion parse_completion(const std::string& body, const LanguageModel& model, const Tokenizer& tokenizer,
                            const CompletionDefaults& defaults, Endpoint endpoint = Endpoint::kText);

// The objects of an answer. `id` and `created` are those of the request.
struct CompletionAnswer {
  std::string id, model;
  int64_t created = 0;
  Endpoint endpoint = Endpoint::kText;
  // Of a chat, the first piece of a stream of answer `index`: the role.
  Json begin(int64_t index) const;
  // A piece of a stream, of answer `index`: finish_reason "" is null, and so are logprobs where none were asked for.
  Json chunk(int64_t index, const std::string& text, const Json& logprobs, const std::string& finish_reason) const;
  // All answers whole: one text, its logprobs and its end for each.
  struct Whole {
    std::string text;
    Json logprobs;
    Ended ended;
  };
  Json whole(const std::vector<Whole>& answers, const Completion& request) const;
  // The last piece of a stream with stream_options.include_usage: no choices, but usage.
  Json usage_chunk(const Completion& request, const std::vector<Ended>& ended) const;
};

// `logprobs` of these tokens, or null where none were asked for.
Json logprobs_of(const Completion& request, const Tokenizer& tokenizer, std::span<const ShownToken> tokens);

// "stop" for an end of text or a stop string, "length".
std::string finish_reason(Outcome outcome);

}  // namespace oryx::serve
