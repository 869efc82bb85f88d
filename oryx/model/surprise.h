// Which tokens a linear mixer's memory has most trouble with: a first pass for schedules and memories that treat them otherwise.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "oryx/model/language_model.h"
#include "oryx/modes/schedule.h"

namespace oryx {

// A pass in linear mode over [1, T] tokens (packed documents with cu_seqlens) -> of each token, the mean over all linear mixers of Mixer::surprise(): how
// badly the state before it predicts its value. Throws Error when the model has no mixer that says so, or a score is not finite.
std::vector<float> token_surprise(const LanguageModel& model, const at::Tensor& input_ids, const std::optional<at::Tensor>& cu_seqlens = {});

// True when a schedule needs the scores.
bool needs_surprise(const std::vector<std::string>& needs);

}  // namespace oryx
