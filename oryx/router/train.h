// Training of a router: gains measured on texts, and a head (oryx/modes/gain_head.h) fitted to them. The model is frozen.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "oryx/common/json.h"
#include "oryx/common/options.h"
#include "oryx/data/synthetic.h"
#include "oryx/data/token_file.h"
#include "oryx/modes/gain_head.h"
#include "oryx/router/gains.h"

namespace oryx {

struct RouterOptions {
  int64_t tokens = 200000;         // measured, held-out ones among them
  int64_t readings = 1;            // measure_gains
  std::string reads = "hidden";    // or "tokens"
  int64_t width = 64, epochs = 6, batch_size = 1024;
  double lr = 1e-3, weight_decay = 0.05;
  double huber = 2;                // nats: beyond it an error counts linearly
  double attention_hidden = 0.25;  // of the tokens before, as many as hidden states of attention: what a router meets while it writes
  double holdout = 0.1;            // of the texts
  int64_t flips = 0;               // tokens of held-out texts whose gain is measured alone as well
  int64_t seed = 0;

  void describe(Fields& f);
};

// Texts to measure on, in an order that the seed gives.
class GainSource {
 public:
  virtual ~GainSource() = default;
  virtual std::optional<GainText> next() = 0;  // nothing: there are no more
};

// Windows of at most seq_len tokens of a file's documents, in shuffled order.
class DocumentGains : public GainSource {
 public:
  DocumentGains(std::shared_ptr<const TokenFile> file, int64_t seq_len, uint64_t seed);
  std::optional<GainText> next() override;

 private:
  std::shared_ptr<const TokenFile> file_;
  int64_t seq_len_;
  uint64_t seed_, document_ = 0, begin_ = 0;
};

// Sequences of associative recall (oryx/data/synthetic.h), packed; asked for at the queries alone.
class RecallGains : public GainSource {
 public:
  RecallGains(const RecallOptions& task, uint64_t seed);
  std::optional<GainText> next() override;

 private:
  RecallOptions task_;
  uint64_t seed_, index_ = 0;
};

// Rows of features, in half precision, and the gains to fit.
struct GainData {
  at::Tensor features, gains;        // [N, F] float16, [N] float32: to fit
  at::Tensor held_features, held_gains;
  double linear_nats = 0;            // mean loss of the held-out tokens that are asked for, in linear mode
  int64_t texts = 0, asked = 0;      // held-out ones
  std::vector<float> flip_gains, flip_measured;  // of the tokens flipped alone: gain alone, gain by readings
};

// Progress: tokens measured so far.
GainData collect_gains(const LanguageModel& model, GainSource& source, const RouterOptions& options, const std::function<void(int64_t tokens)>& progress = {});

// Sum over rows of the Huber loss of head.predict(features) against gains, over their number; with `gradient` those of w0, w1, b1, w2 and bias (as a head of gradients).
double huber_loss(const GainHead& head, const at::Tensor& features, const at::Tensor& gains, double delta, GainHead* gradient = nullptr);

// How well a head does on held-out tokens.
struct RouterFit {
  double correlation = 0, rank_correlation = 0;  // of predicted with measured gains, over tokens that are asked for
  double mean_gain = 0;                          // nats a token that is asked for: linear mode's loss less attention's
  std::vector<double> shares{0.02, 0.05, 0.1, 0.25, 0.5, 0.75};
  std::vector<double> captured, possible;        // of all gain (the sum over tokens, losses included), by the tokens of the highest predictions, and of the highest gains
  std::optional<double> flips;                   // correlation of gains by readings with those of tokens flipped alone
  double flips_ratio = 0;                        // the former's mean over the latter's
  int64_t train_tokens = 0, held_tokens = 0, flipped = 0, best_epoch = 0;

  Json json() const;
};

// Fits by AdamW with a falling rate; keeps the epoch that is best on the held-out rows. Progress: steps done, and the held-out loss at the end of each epoch. Throws Error
// where there is nothing to fit or to hold out.
std::pair<GainHead, RouterFit> fit_router(const LanguageModel& model, const GainData& data, const RouterOptions& options,
                                          const std::function<void(int64_t steps, int64_t of, double held_loss)>& progress = {});

}  // namespace oryx
