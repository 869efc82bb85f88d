#include "oryx/generate/facts.h"

#include <ATen/ATen.h>

#include "oryx/model/routed_cost.h"
#include "oryx/model/surprise.h"

namespace oryx {

std::shared_ptr<const TokenFacts> gather_facts(const LanguageModel& model, const ModelSchedule& schedule, std::span<const int32_t> prompt, PromptParts parts) {
  auto facts = std::make_shared<TokenFacts>();
  facts->parts = std::move(parts);
  if (needs_surprise(schedule.needs())) {
    const at::Tensor ids = at::tensor(std::vector<int64_t>(prompt.begin(), prompt.end()), at::kLong).unsqueeze(0);
    facts->surprise = token_surprise(model, ids);
  }
  return facts;
}

double first_pass_flops(const ModelConfig& config, const ModelSchedule& schedule, int64_t prompt_length) {
  if (!needs_surprise(schedule.needs())) return 0;
  ModePiece piece{.row = 0, .column = 0, .length = prompt_length, .start = 0, .context = {}};
  piece.context.prompt_length = prompt_length;
  return routed_flops(config, ModelSchedule(config, "linear").route({piece}, 1, prompt_length));
}

}  // namespace oryx
