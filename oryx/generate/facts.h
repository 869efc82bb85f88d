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

// What readings of whole texts say, as a schedule needs it: the scores of a reading in linear mode (oryx/model/surprise.h), the gains that its routers predict (after such a
// reading, or by the tokens alone: oryx/router/features.h), and those that an oracle measures.
class ReadFacts {
 public:
  // Packed texts [1, T] with bounds 0, ..., T. An oracle's targets are the texts' own next tokens, unless `targets` [1, T] (-100: nobody asks) says otherwise. Throws
  // Error for a router of another model.
  ReadFacts(const LanguageModel& model, const ModelSchedule& schedule, const at::Tensor& input_ids, std::span<const int32_t> bounds, const at::Tensor& targets = {},
            bool routers = true);
  // Of the tokens [begin, end) of the row.
  std::shared_ptr<TokenFacts> of(int64_t begin, int64_t end, PromptParts parts = {}) const;

 private:
  std::vector<float> surprise_;
  std::map<std::string, std::vector<float>> gains_;
};

// `parts` and, when the schedule needs them, ReadFacts of the whole prompt. With a `continuation` that is known too (a text that is scored, not written) the gains go on behind
// the prompt: as predicted in a reading of both. A router that has nothing to decide in the prompt (`@gen`) leaves it alone. Whoever writes a text through a Session or a
// RoutedText may leave the gains to it (`routers` false).
std::shared_ptr<const TokenFacts> gather_facts(const LanguageModel& model, const ModelSchedule& schedule, std::span<const int32_t> prompt, PromptParts parts = {},
                                               std::span<const int32_t> continuation = {}, bool routers = true);

// FLOPs of readings that the facts of a prompt take: 0 when there are none. An oracle's are not counted: nobody has one.
double first_pass_flops(const ModelConfig& config, const ModelSchedule& schedule, int64_t prompt_length);

}  // namespace oryx
