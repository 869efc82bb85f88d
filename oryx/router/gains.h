// What attention gains at each token of a text, measured: how many nats less the prediction made at it costs when the token runs in attention, the text otherwise in linear mode.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "oryx/model/language_model.h"

namespace oryx {

// Packed texts: input_ids [1, T] and targets [1, T] int64 (-100: nobody asks, and nothing is gained), and the bounds of the texts: 0, ..., T.
struct GainText {
  at::Tensor input_ids, targets;
  std::vector<int32_t> bounds;
  int64_t document = -1;  // that they are windows of; texts of one document are fitted or held out together. -1: of none
};

struct MeasuredGains {
  at::Tensor gain, linear_nll;                  // [T] float32, CPU
  at::Tensor linear_hidden, attention_hidden;   // [T, D], in the type of activations: of each token in linear mode, and in attention
};

// One reading in linear mode, and `readings` of which each has every so manieth token in attention, the rest linear (1: all of them): token t's gain is its loss in the first
// less that in the one of the others in which it is in attention. The more readings, the nearer to a token that is alone in attention, the question that a router asks.
// Throws Error when the model has no attention to choose, or a loss is not finite.
MeasuredGains measure_gains(const LanguageModel& model, const GainText& text, int64_t readings);

// The gain of token `position` of a text [1, T] with no other token in attention: two readings of the tokens up to it.
double single_gain(const LanguageModel& model, const at::Tensor& input_ids, const at::Tensor& targets, int64_t position);

}  // namespace oryx
