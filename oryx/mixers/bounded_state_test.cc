// Attention over a bounded state is the formula: models whose attention is written out with an explicit mask, over all rows, say what it must give.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "oryx/mixers/mixer.h"
#include "oryx/model/state_test_support.h"
#include "oryx/ops/norm/norm.h"
#include "oryx/ops/rope/rope.h"

namespace oryx {
namespace {

using namespace test;

constexpr int64_t kFirst = 3, kWindow = 7;

// Softmax over s <= t with (s < first or s > t - window), and s > t - reach; every token's score is made and then masked.
class NaiveBounded : public Mixer {
 public:
  NaiveBounded(const LayerConfig& c, std::string name, int64_t reach) : Mixer(c), name_(std::move(name)), reach_(reach) {}
  std::string name() const override { return name_; }
  bool keeps_tokens() const override { return true; }
  MixerFlops flops(int64_t) const override { return {}; }

  std::vector<ParameterSpec> parameters() const override {
    if (!config_.qk_norm) return {};
    const bool together = config_.qk_norm_over == "all_heads";
    const Init init = config_.zero_centred_norm ? Init::kZeros : Init::kOnes;
    return {{"q_norm.weight", {together ? config_.query_width() : config_.head_dim}, init, false, "norm"},
            {"k_norm.weight", {together ? config_.key_width() : config_.head_dim}, init, false, "norm"}};
  }
  void bind(const ParameterMap& p, const std::string& prefix) override {
    if (!config_.qk_norm) return;
    q_norm_ = p.at(prefix + "q_norm.weight");
    k_norm_ = p.at(prefix + "k_norm.weight");
  }

  at::Tensor forward(const MixerInput& in) const override {
    const int64_t B = in.q.size(0), T = in.q.size(1);
    const at::Tensor q = rotate(in.q, q_norm_, in.sequences.positions);
    at::Tensor o = at::zeros({B, T, config_.num_heads, config_.value_dim()}, q.options());
    std::vector<int64_t> cu;
    if (in.sequences.cu_seqlens) {
      const at::Tensor c = in.sequences.cu_seqlens->to(at::kLong);
      cu.assign(c.data_ptr<int64_t>(), c.data_ptr<int64_t>() + c.numel());
    }
    for (int64_t n = 0; n < in.cache->keys.size(0); ++n) {
      const int64_t row = cu.empty() ? n : 0, begin = cu.empty() ? 0 : cu[n], count = cu.empty() ? T : cu[n + 1] - cu[n];
      const int64_t length = in.cache->lengths[n].item<int64_t>();
      const at::Tensor s = at::arange(length, at::kInt);
      const at::Tensor k = rotate(in.cache->keys.narrow(0, n, 1).narrow(1, 0, length), k_norm_, s.unsqueeze(0))[0];
      const at::Tensor v = in.cache->values[n].narrow(0, 0, length);
      const int64_t groups = config_.num_heads / config_.kv_heads();
      const double scale = config_.attention_scale > 0 ? config_.attention_scale : 1 / std::sqrt(static_cast<double>(config_.head_dim));
      const at::Tensor scores = at::einsum("thk,shk->hts", {q[row].narrow(0, begin, count), k.repeat_interleave(groups, 1)}) * scale;
      const at::Tensor t = s.narrow(0, length - count, count).unsqueeze(1);
      at::Tensor seen = (s <= t) & ((s < kFirst) | (s > t - kWindow));
      if (reach_ > 0) seen = seen & (s > t - reach_);
      const at::Tensor p = scores.masked_fill(seen.logical_not(), -std::numeric_limits<double>::infinity()).softmax(-1);
      o[row].narrow(0, begin, count).copy_(at::einsum("hts,shv->thv", {p, v.repeat_interleave(groups, 1)}));
    }
    if (!in.spans) return o;
    at::Tensor mask = at::zeros({B, T, 1, 1});
    for (int64_t i = 0; i < in.spans->size(0); ++i) {
      const auto at = [&](int64_t j) { return (*in.spans)[i][j].item<int64_t>(); };
      mask[at(0)].narrow(0, at(1), at(2) - at(1)).fill_(1);
    }
    return o * mask;
  }

 private:
  at::Tensor rotate(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& positions) const {
    at::Tensor y = x;
    if (weight.defined()) {
      const bool together = config_.qk_norm_over == "all_heads";
      y = ops::rms_norm(together ? x.flatten(2) : x, weight, config_.norm_eps, config_.zero_centred_norm).reshape(x.sizes());
    }
    return config_.rope_theta > 0 ? ops::rope(y.contiguous(), positions, config_.rope_theta, config_.rotary_dim) : y;
  }
  std::string name_;
  int64_t reach_;
  at::Tensor q_norm_, k_norm_;
};

const bool kRegistered =
    detail::register_mixer("naive_attention",
                           [](const LayerConfig& c) -> std::unique_ptr<Mixer> { return std::make_unique<NaiveBounded>(c, "naive_attention", 0); }) &&
    detail::register_mixer("naive_window", [](const LayerConfig& c) -> std::unique_ptr<Mixer> {
      return std::make_unique<NaiveBounded>(c, "naive_window", c.window);
    });

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) text.replace(at, from.size(), to);
  return text;
}

ModelConfig written_out(ModelConfig c) {
  const bool quiet = c.layer_mixers[0].size() > 1 && c.layer_mixers[0][0] == "mamba2";
  for (auto& layer : c.layer_mixers) {
    for (auto& name : layer) name = name == "attention" ? "naive_attention" : name == "sliding_window" ? "naive_window" : name;
  }
  if (quiet) c.layer.conv_activation = "none";
  Json overrides = Json::object();
  for (const auto& [name, keys] : c.layer_overrides.items()) overrides[name == "attention" ? "naive_attention" : name] = keys;
  c.layer_overrides = overrides;
  return c;
}

std::unique_ptr<LanguageModel> same_weights(const LanguageModel& m) {
  auto naive = std::make_unique<LanguageModel>(written_out(m.config()));
  for (size_t i = 0; i < naive->specs().size(); ++i) {
    const std::string& name = naive->specs()[i].name;
    std::string original = replaced(replaced(name, "naive_attention", "attention"), "naive_window", "sliding_window");
    const bool there = std::any_of(m.specs().begin(), m.specs().end(), [&](const ParameterSpec& s) { return s.name == original; });
    if (!there) original = replaced(original, "sliding_window", "attention");  // one query for both
    naive->parameters()[i].copy_(m.parameter(original));
  }
  return naive;
}

class BoundedAttention : public ::testing::TestWithParam<Case> {};

TEST_P(BoundedAttention, IsTheMaskWrittenOut) {
  ASSERT_TRUE(kRegistered);
  const auto m = make(GetParam().config);
  const auto naive = same_weights(*m);
  const ModelConfig& c = m->config();
  const int64_t B = 2, T = 120;
  for (uint64_t seed = 0; seed < 3; ++seed) {
    CounterRng rng(70 + seed);
    const at::Tensor ids = random_ids(rng, B, T, c.vocab_size);
    const auto modes = random_modes(rng, B, T, c.mixers().size());
    StateOptions options;
    options.bound = {kFirst, kWindow, 0};
    options.page_tokens = seed == 0 ? 32 : 4;
    State state = m->make_state(B, options), all = naive->make_state(B);
    const at::Tensor expected = run(*naive, ids, routing(naive->config(), modes, 0, T), &all);
    // Whole, token by token, and in pieces of random length (longer and shorter than the window).
    std::vector<at::Tensor> out;
    for (int64_t at = 0; at < T;) {
      const int64_t n = seed == 0 ? T : std::min<int64_t>(T - at, seed == 1 ? 1 : 1 + static_cast<int64_t>(rng.below(20)));
      out.push_back(run(*m, ids.narrow(1, at, n), routing(c, modes, at, at + n), &state));
      at += n;
    }
    EXPECT_LT(fixture_error(at::cat(out, 1), expected), kTolerance) << "split " << seed;
  }
}

// Sequences of one row, of different pasts, some with nothing new.
TEST_P(BoundedAttention, PackedIsTheMaskWrittenOut) {
  const auto m = make(GetParam().config);
  const auto naive = same_weights(*m);
  const ModelConfig& c = m->config();
  CounterRng rng(80);
  const int64_t N = 3;
  StateOptions options;
  options.bound = {kFirst, kWindow, 0};
  options.page_tokens = 4;
  State state = m->make_state(N, options), all = naive->make_state(N);
  for (int round = 0; round < 6; ++round) {
    std::vector<int32_t> cu{0};
    for (int64_t n = 0; n < N; ++n) cu.push_back(cu.back() + static_cast<int32_t>(rng.below(n == 0 ? 2 : 30)));
    const int64_t T = cu.back();
    if (T == 0) continue;
    const at::Tensor ids = random_ids(rng, 1, T, c.vocab_size), bounds = at::tensor(cu, at::kInt);
    const auto modes = random_modes(rng, 1, T, c.mixers().size());
    const at::Tensor expected = run(*naive, ids, routing(naive->config(), modes, 0, T), &all, bounds);
    EXPECT_LT(fixture_error(run(*m, ids, routing(c, modes, 0, T), &state, bounds), expected), kTolerance) << "round " << round;
  }
}

std::vector<Case> with_attention() {
  std::vector<Case> all;
  for (const Case& c : cases()) {
    const auto mixers = c.config.mixers();
    if (std::find(mixers.begin(), mixers.end(), "attention") != mixers.end()) all.push_back(c);
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Models, BoundedAttention, ::testing::ValuesIn(with_attention()), [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace oryx
