// What a schedule's policies want to know of a prompt before it runs.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "oryx/model/language_model.h"
#include "oryx/model/scheduling.h"

namespace oryx {

using PromptParts = std::map<std::string, std::vector<std::pair<int64_t, int64_t>>>;

// `parts` and, when the schedule needs them, the scores of a first pass in linear mode (oryx/model/surprise.h), over the whole prompt at once.
std::shared_ptr<const TokenFacts> gather_facts(const LanguageModel& model, const ModelSchedule& schedule, std::span<const int32_t> prompt, PromptParts parts = {});

// FLOPs of that first pass: 0 when there is none.
double first_pass_flops(const ModelConfig& config, const ModelSchedule& schedule, int64_t prompt_length);

}  // namespace oryx
