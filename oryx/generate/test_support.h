// What tests of the decoders for a GPU write alike.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <span>
#include <vector>

#include "oryx/generate/session.h"

namespace oryx::test {

// The norm of the difference over the norm of `ref`.
inline double norm_error(const at::Tensor& x, const at::Tensor& ref) {
  return ((x.to(at::kDouble) - ref.to(at::kDouble)).norm() / ref.to(at::kDouble).norm().clamp_min(1e-30)).item<double>();
}

// What another changes in the state between steps is seen: a trim goes back, a fork takes the pages apart.
inline void expect_goes_on_behind_trim_and_fork(const ModelConfig& config, const StateOptions& state = {}) {
  const at::NoGradGuard no_grad;
  LanguageModel model(config, at::kBFloat16);
  model.initialize(1);
  model.to(at::kCUDA);
  const ModelSchedule schedule(model.config(), "linear,attention@20:");
  const std::vector<int32_t> ids(30, 17);
  Session a(model, schedule, {.prompt_length = 16, .tokens = 40, .state = state, .fused = true}), b(model, schedule, {.prompt_length = 16, .tokens = 40, .state = state, .fused = false});
  (void)a.extend(std::span(ids).first(16));
  at::Tensor last, expected;
  for (int t = 0; t < 8; ++t) (void)a.step(17 + t);
  a.trim(18);
  const State fork = a.state().fork({0});
  for (int t = 2; t < 8; ++t) last = a.step(17 + t).clone();
  (void)b.extend(std::span(ids).first(16));
  for (int t = 0; t < 8; ++t) expected = b.step(17 + t);
  EXPECT_LT(norm_error(last, expected), 3e-2);
  EXPECT_EQ(fork.lengths()[0], 18);
}

}  // namespace oryx::test
