#include "oryx/generate/facts.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

#include "oryx/data/packing.h"
#include "oryx/model/routed_cost.h"
#include "oryx/model/surprise.h"
#include "oryx/router/features.h"
#include "oryx/router/gains.h"

namespace oryx {

namespace {

constexpr const char* kOracle = "oracle";
constexpr int64_t kOracleReadings = 1;

bool needs_oracle(const ModelSchedule& schedule) {
  const auto needs = schedule.needs();
  return std::find(needs.begin(), needs.end(), kOracle) != needs.end();
}

at::Tensor next_tokens(const at::Tensor& input_ids, std::span<const int32_t> bounds) {
  at::Tensor targets = at::full_like(input_ids, kIgnoreTarget);
  if (const int64_t T = input_ids.size(1); T > 1) targets.narrow(1, 0, T - 1).copy_(input_ids.narrow(1, 1, T - 1));
  for (size_t n = 1; n < bounds.size(); ++n) {
    if (bounds[n] > 0) targets.select(1, bounds[n] - 1).fill_(kIgnoreTarget);
  }
  return targets;
}

template <class T>
std::vector<T> part_of(const std::vector<T>& all, int64_t begin, int64_t end) {
  return all.empty() ? all : std::vector<T>(all.begin() + begin, all.begin() + end);
}

}  // namespace

ReadFacts::ReadFacts(const LanguageModel& model, const ModelSchedule& schedule, const at::Tensor& input_ids, std::span<const int32_t> bounds, const at::Tensor& targets,
                     bool routers) {
  if (needs_surprise(schedule.needs())) {
    surprise_ = token_surprise(model, input_ids, bounds.size() > 2 ? std::optional(at::tensor(std::vector<int32_t>(bounds.begin(), bounds.end()), at::kInt)) : std::nullopt);
  }
  if (routers) check_heads(model, schedule);
  for (const auto& [need, head] : schedule.gain_heads()) {
    if (!routers) break;
    gains_[need] = router_gains(model, head, input_ids, bounds);
  }
  if (needs_oracle(schedule)) {
    const GainText text{input_ids, targets.defined() ? targets : next_tokens(input_ids, bounds), {bounds.begin(), bounds.end()}, -1};
    const at::Tensor gain = measure_gains(model, text, kOracleReadings).gain.contiguous();
    gains_[kOracle].assign(gain.const_data_ptr<float>(), gain.const_data_ptr<float>() + gain.numel());
  }
}

std::shared_ptr<TokenFacts> ReadFacts::of(int64_t begin, int64_t end, PromptParts parts) const {
  auto facts = std::make_shared<TokenFacts>();
  facts->parts = std::move(parts);
  facts->surprise = part_of(surprise_, begin, end);
  for (const auto& [need, gains] : gains_) facts->gains[need] = part_of(gains, begin, end);
  return facts;
}

std::shared_ptr<const TokenFacts> gather_facts(const LanguageModel& model, const ModelSchedule& schedule, std::span<const int32_t> prompt, PromptParts parts,
                                               std::span<const int32_t> continuation, bool routers) {
  const auto wanted = schedule.prompt_needs();
  const auto of_prompt = [&](const std::string& need) { return std::find(wanted.begin(), wanted.end(), need) != wanted.end(); };
  const auto heads = schedule.gain_heads();
  routers = routers && std::any_of(heads.begin(), heads.end(), [&](const auto& h) { return !continuation.empty() || of_prompt(h.first); });
  if (prompt.empty() || (!needs_surprise(schedule.needs()) && !routers && !needs_oracle(schedule))) {
    auto facts = std::make_shared<TokenFacts>();
    facts->parts = std::move(parts);
    return facts;
  }
  std::vector<int64_t> ids(prompt.begin(), prompt.end());
  ids.insert(ids.end(), continuation.begin(), continuation.end());
  const auto T = static_cast<int32_t>(ids.size());
  const std::vector<int32_t> bounds{0, T};
  auto facts = ReadFacts(model, schedule, at::tensor(ids, at::kLong).unsqueeze(0), bounds, {}, routers).of(0, T, std::move(parts));
  for (auto& [need, gains] : facts->gains) {
    if (heads.count(need) > 0 && !of_prompt(need)) std::fill_n(gains.begin(), prompt.size(), std::numeric_limits<float>::quiet_NaN());
  }
  return facts;
}

double first_pass_flops(const ModelConfig& config, const ModelSchedule& schedule, int64_t prompt_length) {
  auto heads = schedule.gain_heads();
  const auto wanted = schedule.prompt_needs();
  std::erase_if(heads, [&](const auto& h) { return std::find(wanted.begin(), wanted.end(), h.first) == wanted.end(); });
  const bool read = needs_surprise(schedule.needs()) || std::any_of(heads.begin(), heads.end(), [](const auto& h) { return h.second->reads_hidden; });
  double flops = 0;
  for (const auto& [need, head] : heads) flops += 2.0 * static_cast<double>(head->features() * (head->width() + 1)) * static_cast<double>(prompt_length);
  if (!read || prompt_length == 0) return flops;
  ModePiece piece{.row = 0, .column = 0, .length = prompt_length, .start = 0, .context = {}};
  piece.context.prompt_length = prompt_length;
  return flops + routed_flops(config, ModelSchedule(config, "linear").route({piece}, 1, prompt_length));
}

}  // namespace oryx
