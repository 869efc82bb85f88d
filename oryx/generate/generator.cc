#include "oryx/generate/generator.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <optional>

#include "oryx/common/error.h"
#include "oryx/common/interrupt.h"
#include "oryx/generate/facts.h"
#include "oryx/model/inspect.h"

namespace oryx {

namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

int64_t held_tokens(const GenerateOptions& o) { return o.from != nullptr ? o.from->lengths().at(0) : 0; }

// A window is given the rows that a refused draft wants.
StateOptions draft_state(const GenerateOptions& o) {
  StateOptions state = o.state;
  if (o.draft.on() && state.bound.on()) state.bound.back = std::max(state.bound.back, o.draft.tokens + 1);
  return state;
}

void check(const ModelConfig& config, const ModelSchedule& schedule, std::span<const int32_t> prompt, const GenerateOptions& o) {
  if (prompt.empty() && o.from == nullptr) fail("the prompt is empty; there is nothing to go on from");
  if (prompt.empty() && !o.from_end.logits.defined()) fail("the prompt is empty, and the session does not hold what follows its text; give a prompt to go on with");
  if (o.max_new_tokens < 1) fail("max_new_tokens is {}, expected an integer of at least 1", o.max_new_tokens);
  if (o.prefill_piece < 0) fail("prefill_piece is {}, expected an integer of at least 1, or 0: by device", o.prefill_piece);
  if (o.vocab_size < 0 || o.vocab_size > config.vocab_size) fail("vocab_size is {}, expected 0 to {}", o.vocab_size, config.vocab_size);
  // Positions are int32.
  const int64_t room = std::numeric_limits<int32_t>::max() - held_tokens(o) - static_cast<int64_t>(prompt.size());
  if (o.max_new_tokens > room) fail("max_new_tokens is {}, expected at most {} after this prompt", o.max_new_tokens, room);
  for (const auto& need : schedule.needs()) {
    if (o.from == nullptr || need.starts_with("router:")) continue;
    fail("the schedule '{}' wants to know the whole prompt, of which the session holds {} tokens already; expected a schedule of positions, or a router", schedule.text(), held_tokens(o));
  }
  o.sampling.validate();
  o.state.validate();
  if (o.draft.on()) check_draft(config, schedule, o.draft, o.from != nullptr ? o.from->options() : draft_state(o));
}

class Decoder {
 public:
  Decoder(const LanguageModel& model, const ModelSchedule& schedule, std::span<const int32_t> prompt, const GenerateOptions& options)
      : model_(model),
        options_(options),
        held_(held_tokens(options)),
        session_(options.from == nullptr ? Session(model, schedule, session_options(model, schedule, held_, prompt, options))
                                         : Session(model, schedule, session_options(model, schedule, held_, prompt, options), std::move(*options.from), options.from_end.routers)) {
    out_.stats.held_tokens = held_;
    out_.stats.prompt_tokens = static_cast<int64_t>(prompt.size());
    out_.stats.predicted = session_.plan();
    if (!options.draft.on()) return;
    draft_schedule_.emplace(model.config(), options.draft.schedule);
    const auto draw = [this](const at::Tensor& logits, int64_t position) { return static_cast<int32_t>(sample_token(drawn_from(logits), options_.sampling, static_cast<uint64_t>(position))); };
    drafted_.emplace(session_, options.sampling.temperature == 0 ? drafts_likeliest(*draft_schedule_, options.vocab_size, options.eos_id) : drafts_drawn(*draft_schedule_, draw, options.eos_id), options.draft,
                     &*draft_schedule_);
  }

  void prefill(std::span<const int32_t> prompt) {
    at::NoGradGuard no_grad;
    const auto start = std::chrono::steady_clock::now();
    session_.look_ahead(prompt);
    take(prompt.empty() ? options_.from_end.logits : model_.logits(session_.extend(prompt)).squeeze(0));
    end_.ids = options_.from_end.ids;
    end_.ids.insert(end_.ids.end(), prompt.begin(), prompt.end());
    out_.stats.prefill_seconds = seconds_since(start);
    prompt_is_read_ = true;
  }

  StopReason decode(const std::function<bool(int32_t)>& on_token) {
    at::NoGradGuard no_grad;
    while (!interrupted()) {
      const auto next = static_cast<int32_t>(sample_token(logits_, options_.sampling, static_cast<uint64_t>(drafted_ ? drafted_->length() : session_.length())));
      ++out_.stats.new_tokens;
      if (next == options_.eos_id) return StopReason::kEos;
      out_.ids.push_back(next);
      if (on_token && !on_token(next)) return StopReason::kCallback;
      if (out_.stats.new_tokens == options_.max_new_tokens) return StopReason::kLength;
      step(next);
    }
    return StopReason::kInterrupted;
  }

  Generated finish(StopReason stop) {
    out_.stop = stop;
    if (drafted_) {
      at::NoGradGuard no_grad;
      drafted_->settle();
      out_.stats.draft = drafted_->stats();
    }
    if (options_.at_end && prompt_is_read_) {
      at::NoGradGuard no_grad;
      if (const int64_t all = held_ + out_.stats.prompt_tokens + static_cast<int64_t>(out_.ids.size()); session_.length() < all) take(session_.step(out_.ids.back()));
      options_.at_end(session_.state(), text_end());
    }
    out_.stats.attention_share = session_.attention_share();
    out_.stats.state = session_.state().bytes();
    out_.stats.predicted_state = state_bytes(model_.config(), session_.length(), model_.compute_dtype(), session_.state().options());
    return std::move(out_);
  }

 private:
  static SessionOptions session_options(const LanguageModel& model, const ModelSchedule& schedule, int64_t held, std::span<const int32_t> prompt, const GenerateOptions& o) {
    const int64_t length = held + static_cast<int64_t>(prompt.size());
    return {length, length + o.max_new_tokens, o.prefill_piece, static_cast<uint64_t>(o.sampling.seed), draft_state(o), gather_facts(model, schedule, prompt, {}, {}, /*routers=*/false), o.fused, o.draft.on() ? o.draft.tokens : 0};
  }

  // The clock stops when the logits have come back from the device.
  void take(const at::Tensor& logits) {
    all_logits_ = logits.cpu();
    logits_ = drawn_from(all_logits_);
  }

  at::Tensor drawn_from(const at::Tensor& logits) const { return options_.vocab_size > 0 ? logits.narrow(0, 0, options_.vocab_size) : logits; }

  TextEnd text_end() {
    end_.ids.insert(end_.ids.end(), out_.ids.begin(), out_.ids.end());
    if (end_.ids.size() > TextEnd::kIds) end_.ids.erase(end_.ids.begin(), end_.ids.end() - TextEnd::kIds);
    end_.logits = all_logits_.to(at::kFloat);
    end_.routers = session_.routers();
    return end_;
  }

  void step(int32_t id) {
    const auto start = std::chrono::steady_clock::now();
    take(drafted_ ? drafted_->step(id, options_.max_new_tokens - out_.stats.new_tokens) : session_.step(id));
    out_.stats.decode_seconds += seconds_since(start);
    ++out_.stats.decode_steps;
  }

  const LanguageModel& model_;
  const GenerateOptions& options_;
  int64_t held_;
  Session session_;
  std::optional<ModelSchedule> draft_schedule_;
  std::optional<DraftedSession> drafted_;  // stands in for the session's step()
  at::Tensor all_logits_, logits_;  // [V]: after the last token; those that are drawn from
  TextEnd end_;
  bool prompt_is_read_ = false;
  Generated out_;
};

}  // namespace

std::string to_string(StopReason reason) {
  switch (reason) {
    case StopReason::kEos: return "eos";
    case StopReason::kLength: return "length";
    case StopReason::kCallback: return "callback";
    case StopReason::kInterrupted: return "interrupted";
  }
  TORCH_CHECK(false, "StopReason");
}

Generated generate(const LanguageModel& model, const ModelSchedule& schedule, std::span<const int32_t> prompt, const GenerateOptions& options,
                   const std::function<bool(int32_t id)>& on_token) {
  check(model.config(), schedule, prompt, options);
  Decoder decoder(model, schedule, prompt, options);
  try {
    decoder.prefill(prompt);
    return decoder.finish(decoder.decode(on_token));
  } catch (const Interrupted&) {
    return decoder.finish(StopReason::kInterrupted);
  }
}

}  // namespace oryx
