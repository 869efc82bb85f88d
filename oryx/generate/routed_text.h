// What the routers of a schedule know of one text while it is read and written: its tokens, the gains they predict, and what these decide. One a sequence, whoever runs the
// model (a Session, the server): look ahead at a prompt, then before() and after() of every pass.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "oryx/model/language_model.h"
#include "oryx/model/scheduling.h"
#include "oryx/model/state_file.h"
#include "oryx/router/features.h"

namespace oryx {

class RoutedText {
 public:
  // `given`: what is known of the text besides, gains among it (of tokens from the first one on; those that are known are not predicted again). The schedule's heads must be the
  // model's (check_heads). Model and schedule must outlive it.
  RoutedText(const LanguageModel& model, const ModelSchedule& schedule, const std::shared_ptr<const TokenFacts>& given = nullptr);
  // Goes on behind a text that was saved. Of its tokens those gains are known that a router of the schedule predicted then; others ran before there was this router.
  RoutedText(const LanguageModel& model, const ModelSchedule& schedule, const TextRouters& saved, const std::shared_ptr<const TokenFacts>& given = nullptr);

  bool on() const { return !routers_.empty(); }
  // ModeContext::facts of every token that before() was told of. Without routers what was given.
  const std::shared_ptr<const TokenFacts>& facts() const { return facts_; }
  // Tokens that before() was told of.
  int64_t length() const { return static_cast<int64_t>(ids_.size()); }

  // The next `count` tokens are a prompt. (Text behind a prompt is written.)
  void begin_prompt(int64_t count);
  // Whether a router wants to know of the prompt's tokens before the first of them runs; and whether it wants hidden states of them for that, which a reading in linear mode gives.
  bool wants_prompt() const;
  bool wants_reading() const;
  // The prompt's next tokens [n] as they are looked at, and their hidden states [n, D] of that reading (undefined where it is not wanted).
  void look_ahead(std::span<const int32_t> ids, const at::Tensor& hidden);

  // Of so many next tokens those that can run at once: one where a router goes by the hidden state of the one before.
  int64_t ready(int64_t left) const;
  // The next tokens, before they run: their gains, where there are none yet. Must be told of ready() tokens at most, in order, once.
  void before(std::span<const int32_t> ids);
  // They have run; the hidden state [D] of the last one.
  void after(const at::Tensor& last_hidden);

  // What goes on elsewhere, behind after().
  TextRouters saved() const;

 private:
  struct Router {
    std::string need;
    GainReader reader;
    bool of_prompts;  // decides in prompts, not only behind them
  };
  void make_routers(const LanguageModel& model, const ModelSchedule& schedule, const std::shared_ptr<const TokenFacts>& given);
  std::vector<float>& gains(const Router& r) const { return own_->gains[r.need]; }
  int64_t known(const Router& r) const;

  std::vector<Router> routers_;
  std::shared_ptr<TokenFacts> own_;  // facts_, where there are routers
  std::shared_ptr<const TokenFacts> facts_;
  std::vector<int32_t> ids_;
  int64_t prompt_end_ = 0;   // of the last prompt
  at::Tensor last_hidden_;   // [D] float32, CPU: of the last token that ran
  at::Tensor ahead_hidden_;  // of the last token looked at
};

}  // namespace oryx
