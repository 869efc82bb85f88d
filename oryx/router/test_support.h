// Routers for tests: heads of drawn weights, calibrated on their own predictions.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "oryx/common/random.h"
#include "oryx/router/features.h"

namespace oryx::test {

inline GainHead drawn_head(const LanguageModel& model, bool reads_hidden, uint64_t seed = 7) {
  const int64_t F = 2 * model.config().layer.hidden_size + TokenHistory::kScalars;
  CounterRng rng(seed);
  const auto draw = [&](std::vector<int64_t> shape) {
    at::Tensor x = at::empty(shape, at::kFloat);
    for (int64_t i = 0; i < x.numel(); ++i) x.mutable_data_ptr<float>()[i] = static_cast<float>(rng.normal());
    return x;
  };
  GainHead h;
  h.mean = at::zeros({F});
  h.scale = at::ones({F});
  h.w0 = draw({F});
  h.w1 = draw({3, F});
  h.b1 = draw({3});
  h.w2 = draw({3});
  h.reads_hidden = reads_hidden;
  h.model = router_identity(model);
  h.quantiles = {-40, 0, 40};
  return h;
}

// Its quantiles are those of its predictions for random tokens. -> "file=PATH"
inline std::string save_drawn_head(const LanguageModel& model, bool reads_hidden, const std::filesystem::path& path, uint64_t seed = 7) {
  constexpr int32_t kTokens = 60;
  GainHead head = drawn_head(model, reads_hidden, seed);
  CounterRng rng(12);
  std::vector<int64_t> ids(kTokens);
  for (auto& id : ids) id = static_cast<int64_t>(rng.below(static_cast<uint64_t>(model.config().vocab_size)));
  const std::vector<int32_t> bounds{0, kTokens};
  head.quantiles = router_gains(model, std::make_shared<const GainHead>(head), at::tensor(ids, at::kLong).unsqueeze(0), bounds);
  std::sort(head.quantiles.begin(), head.quantiles.end());
  save_head(head, path);
  return "file=" + path.string();
}

}  // namespace oryx::test
