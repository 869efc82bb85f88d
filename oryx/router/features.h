// What a router knows of a token before the token runs in any mode: the final hidden state of the token before it, its embedding, and what stands in the text's tokens
// alone (whether it, or the pair or triple that it ends, stood there before, and how far back).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "oryx/model/language_model.h"
#include "oryx/model/scheduling.h"
#include "oryx/modes/gain_head.h"

namespace oryx {

// 16 hexadecimal digits of config and of values out of every weight (not of the type of activations): cheap enough to be asked for each prompt, and another for another model.
std::string router_identity(const LanguageModel& model);

// Throws Error when the head was trained for another model. `file` is for the message, `identity` that of the model.
void check_head(const ModelConfig& config, const std::string& identity, const GainHead& head, const std::string& file);
void check_head(const LanguageModel& model, const GainHead& head, const std::string& file);
// The same of all heads of a schedule.
void check_heads(const LanguageModel& model, const ModelSchedule& schedule);

// A text's tokens one after the other -> of each what its past says.
class TokenHistory {
 public:
  static constexpr int64_t kScalars = 8;
  // The next token; writes kScalars - 1 numbers (the last one, its logit before it came, is the model's).
  void next(int64_t id, float* out);

 private:
  struct Seen {
    int64_t count = 0, last = 0;
  };
  std::unordered_map<int64_t, Seen> tokens_;
  std::unordered_map<uint64_t, int64_t> pairs_, triples_;  // -> where it ended last
  int64_t length_ = 0, before_ = -1, before_that_ = -1;
};

// Features of all tokens of packed texts: ids [T], bounds of the texts in them, hidden [T, D] (not read, and may be undefined, where the head reads tokens alone), of which
// token t's are those of t - 1. -> [T, F] float32, CPU; F = 2 D + TokenHistory::kScalars.
at::Tensor router_features(const LanguageModel& model, bool reads_hidden, std::span<const int64_t> ids, std::span<const int32_t> bounds, const at::Tensor& hidden);

// The gains that a head predicts for packed texts [1, T]: by one reading in linear mode where it reads hidden states, by the tokens alone where not. bounds: 0, ..., T.
std::vector<float> router_gains(const LanguageModel& model, std::shared_ptr<const GainHead> head, const at::Tensor& input_ids, std::span<const int32_t> bounds);

// The same for a text that is being read or written, in any split: a token's gain is bit for bit a function of the tokens up to it and of the hidden state before it.
class GainReader {
 public:
  GainReader(const LanguageModel& model, std::shared_ptr<const GainHead> head) : model_(model), head_(std::move(head)) {}
  // Tokens whose gains are not wanted, or known.
  void pass(std::span<const int32_t> ids);
  // The gains of the next tokens. previous [D]: the hidden state after the token before them (undefined at a text's beginning); hidden [n - 1, D] or more: those after
  // themselves, for whoever comes next (undefined for one token); in whichever mode each ran. Neither is looked at where the head reads tokens alone. Throws Error for a gain
  // that is not finite.
  std::vector<float> next(std::span<const int32_t> ids, const at::Tensor& previous, const at::Tensor& hidden = {});
  // Tokens so far.
  int64_t seen() const { return seen_; }
  const GainHead& head() const { return *head_; }

 private:
  const LanguageModel& model_;
  std::shared_ptr<const GainHead> head_;
  TokenHistory history_;
  int32_t before_ = -1;
  int64_t seen_ = 0;
};

}  // namespace oryx
