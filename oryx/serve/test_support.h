// What tests of the engine write alike: requests that write down what they get, and what the same text gets alone.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "oryx/common/random.h"
#include "oryx/generate/generator.h"
#include "oryx/serve/engine.h"

namespace oryx::test {

inline std::vector<int32_t> random_prompt(CounterRng& rng, int64_t vocab, size_t length) {
  std::vector<int32_t> ids(length);
  for (auto& id : ids) id = static_cast<int32_t>(rng.below(static_cast<uint64_t>(vocab)));
  return ids;
}

struct Text {
  std::vector<int32_t> ids;
  std::optional<serve::Ended> ended;
};

// A request that writes down what it gets.
inline serve::Request request_of(const LanguageModel& m, std::vector<int32_t> prompt, const std::string& schedule, int64_t max_tokens, Text& text,
                                 SamplingOptions sampling = {}) {
  serve::Request r;
  r.prompt = std::move(prompt);
  r.schedule = std::make_shared<ModelSchedule>(m.config(), schedule);
  r.max_tokens = max_tokens;
  r.sampling = sampling;
  r.on_token = [&text](int32_t id) {
    text.ids.push_back(id);
    return true;
  };
  r.on_end = [&text](const serve::Ended& e) {
    EXPECT_FALSE(text.ended.has_value());
    text.ended = e;
  };
  return r;
}

// What `generate` writes of it.
inline std::vector<int32_t> alone(const LanguageModel& m, const serve::Request& r, int64_t piece, const StateOptions& state = {}) {
  GenerateOptions o{.max_new_tokens = r.max_tokens, .prefill_piece = piece, .sampling = r.sampling};
  o.state = state;
  return generate(m, *r.schedule, r.prompt, o).ids;
}

}  // namespace oryx::test
