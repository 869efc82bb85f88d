#include "oryx/generate/slot_decoder.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "oryx/common/random.h"

namespace oryx {
namespace {

TEST(SlotDecoder, SaysWhyThereIsNone) {
  ModelConfig c;
  c.vocab_size = 320, c.num_layers = 1;
  c.layer.hidden_size = 256, c.layer.num_heads = 2, c.layer.head_dim = 128, c.layer.intermediate_size = 256;
  const LanguageModel model(c, at::kBFloat16);
  std::string why;
  EXPECT_EQ(make_slot_decoder(model, {}, &why), nullptr);
  EXPECT_EQ(why, "the model is not on a GPU");
}

// What the device draws is what sample_token makes of the same logits, whatever is asked for; equal logits, which bfloat16 makes many, included.
TEST(SlotDecoderCuda, DrawsAsTheHostDoes) {
  if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  const at::NoGradGuard no_grad;
  for (const int64_t vocab : {320, 32000, 50272}) {
    ModelConfig c;
    c.vocab_size = vocab, c.num_layers = 1;
    c.layer.hidden_size = 256, c.layer.num_heads = 2, c.layer.head_dim = 128, c.layer.intermediate_size = 256;
    LanguageModel model(c, at::kBFloat16);
    model.initialize(3);
    model.to(at::kCUDA);
    StateOptions options;
    options.row_pages = 64;
    std::string why;
    const auto decoder = make_slot_decoder(model, options, &why);
    if (decoder == nullptr) GTEST_SKIP() << why;
    constexpr int64_t kSlots = 40;
    State slots = model.make_state(1, options).fork(std::vector<int64_t>(kSlots, 0));
    decoder->attach(slots);
    CounterRng rng(static_cast<uint64_t>(vocab));
    const uint8_t mode = 0;
    int64_t same = 0, all = 0;
    for (int step = 0; step < 12; ++step) {
      std::vector<SamplingOptions> sampling;
      std::vector<SlotDecoder::Row> rows;
      for (int64_t n = 0; n < kSlots; ++n) {
        SamplingOptions o{.temperature = n % 7 == 0 ? 0 : 0.02 + 3 * rng.uniform() * rng.uniform(), .seed = n};
        if (n % 2 == 1) o.top_p = 0.05 + 0.95 * rng.uniform();
        if (n % 3 == 1) o.top_k = 1 + static_cast<int64_t>(rng.below(n % 5 == 0 ? static_cast<uint64_t>(vocab) + 9 : 60));
        if (n % 5 == 2) o.min_p = rng.uniform() * rng.uniform();
        sampling.push_back(o);
      }
      for (int64_t n = 0; n < kSlots; ++n) {
        rows.push_back({.slot = (n + step) % kSlots,
                        .id = static_cast<int32_t>(rng.below(static_cast<uint64_t>(vocab))),
                        .modes = &mode,
                        .below = n % 4 == 0 ? vocab - 7 : 0,
                        .sampling = &sampling[static_cast<size_t>(n)],
                        .logits = true});
      }
      const auto results = decoder->step(rows)();
      for (size_t n = 0; n < rows.size(); ++n) {
        const at::Tensor logits = rows[n].below > 0 ? results.logits[n].narrow(0, 0, rows[n].below) : results.logits[n];
        const auto expected = sample_token(logits, sampling[n], static_cast<uint64_t>(slots.lengths()[static_cast<size_t>(rows[n].slot)]));
        ++all;
        same += results.tokens[n] == expected ? 1 : 0;
        if (sampling[n].temperature == 0) {
          EXPECT_EQ(results.tokens[n], expected);
        }
      }
    }
    EXPECT_GE(same, all - 1) << "of " << all << " with " << vocab << " ids";
  }
}

}  // namespace
}  // namespace oryx
