// Models drawn at random, far from the shapes that anybody would choose: any split, packing, trim, fork and session gives what the whole gives, and a
// packed batch the gradients of its documents alone.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cstdlib>

#include "oryx/common/error.h"
#include "oryx/common/options.h"
#include "oryx/mixers/mixer.h"
#include "oryx/model/inspect.h"
#include "oryx/model/state_file.h"
#include "oryx/model/state_test_support.h"
#include "tests/support/folder.h"

namespace oryx {
namespace {

using namespace test;

constexpr double kLimit = 2e-4;  // float32, up to four layers of loud weights, different orders of summation

// A config that validate() takes, as the number draws it: every key that changes what a layer computes is drawn.
ModelConfig draw_config(uint64_t number) {
  for (uint32_t attempt = 0;; ++attempt) {
    CounterRng rng(71, number, attempt);
    const auto upto = [&](int64_t n) { return 1 + static_cast<int64_t>(rng.below(static_cast<uint64_t>(n))); };
    const auto flag = [&](uint64_t one_in) { return rng.below(one_in) == 0; };
    ModelConfig c;
    c.vocab_size = 40 + upto(20);
    c.num_layers = upto(4);
    LayerConfig& l = c.layer;
    l.hidden_size = 8 * upto(6);
    l.num_kv_heads = upto(3);
    l.num_heads = l.num_kv_heads * upto(3);
    l.num_value_heads = flag(3) ? l.num_kv_heads * upto(3) : 0;
    l.head_dim = upto(12) * (flag(4) ? 1 : 2);
    l.value_head_dim = flag(2) ? upto(24) : 0;
    l.intermediate_size = flag(4) ? 0 : 8 * upto(6);
    l.conv = !flag(5);
    l.conv_kernel = 1 + upto(5);
    l.conv_activation = std::vector<std::string>{"auto", "silu", "none"}[rng.below(3)];
    l.conv_bias = flag(3);
    l.query_conv = flag(3);
    l.gate = !flag(4);
    l.gate_activation = flag(3) ? "sigmoid" : "silu";
    l.head_norm = !flag(4);
    l.gated_norm_order = flag(4) ? "gate_first" : "norm_first";
    l.head_norm_groups = flag(4) ? 2 : 0;
    l.qk_norm = flag(3);
    l.qk_norm_over = flag(2) ? "all_heads" : "head";
    l.share_query = flag(4);
    l.share_kv = !flag(4);
    l.sliding_window_query = flag(3);
    l.window = upto(20);
    l.zero_centred_norm = flag(4);
    l.norm_placement = flag(4) ? "after" : "before";
    l.rope_theta = flag(4) ? 0 : 10000;
    l.rotary_dim = flag(3) ? 2 : 0;
    l.allow_neg_eigval = flag(3);
    l.combine = flag(6) ? "mean" : "select";
    c.tie_word_embeddings = !flag(3);
    c.layer_mixers.clear();
    for (int64_t n = upto(c.num_layers); n > 0; --n) {
      std::vector<std::string> names = mixer_names(), mine;
      for (int64_t m = upto(3); m > 0 && !names.empty(); --m) {
        const auto at = names.begin() + static_cast<int64_t>(rng.below(names.size()));
        mine.push_back(*at);
        names.erase(at);
      }
      c.layer_mixers.push_back(mine);
    }
    try {
      c.validate();
      return c;
    } catch (const Error&) {
      if (attempt > 10000) throw;
    }
  }
}

class RandomModel : public ::testing::TestWithParam<int> {
 protected:
  RandomModel() : c(draw_config(static_cast<uint64_t>(GetParam()))), m(make(c)), rng(72, static_cast<uint64_t>(GetParam())) {}
  std::string text() { return dump_options(c); }
  at::Tensor whole(const at::Tensor& ids, const std::vector<std::vector<int32_t>>& modes) { return run(*m, ids, routing(c, modes, 0, ids.size(1))); }

  ModelConfig c;
  std::unique_ptr<LanguageModel> m;
  CounterRng rng;
};

TEST_P(RandomModel, AnySplitAndPackingGiveTheWhole) {
  SCOPED_TRACE(text());
  const int64_t T = 70;
  const at::Tensor ids = random_ids(rng, 2, T, c.vocab_size);
  const auto modes = random_modes(rng, 2, T, c.mixers().size());
  const at::Tensor expected = whole(ids, modes);
  State state = m->make_state(2);
  std::vector<at::Tensor> pieces;
  for (int64_t at = 0; at < T;) {
    const int64_t n = std::min<int64_t>(T - at, rng.below(2) == 0 ? 1 : 1 + static_cast<int64_t>(rng.below(40)));
    pieces.push_back(run(*m, ids.narrow(1, at, n), routing(c, modes, at, at + n), &state));
    at += n;
  }
  EXPECT_LT(fixture_error(at::cat(pieces, 1), expected), kLimit) << "in pieces";
  EXPECT_EQ(state.bytes().total(), 2 * state_bytes(c, T).total());
  // Both rows cut somewhere: three documents of one packed row, the second row's first.
  const int64_t cut = 1 + static_cast<int64_t>(rng.below(T - 1));
  const at::Tensor packed_ids = at::cat({ids.narrow(0, 1, 1).narrow(1, 0, cut), ids.narrow(0, 0, 1)}, 1);
  std::vector<std::vector<int32_t>> packed_modes = {{modes[1].begin(), modes[1].begin() + cut}};
  packed_modes[0].insert(packed_modes[0].end(), modes[0].begin(), modes[0].end());
  const auto bounds = at::tensor({int64_t{0}, cut, cut, cut + T}, at::kLong).to(at::kInt);
  const at::Tensor packed = run(*m, packed_ids, routing(c, packed_modes, 0, cut + T), nullptr, bounds);
  EXPECT_LT(fixture_error(packed.narrow(1, cut, T), expected.narrow(0, 0, 1)), kLimit) << "packed";
  EXPECT_LT(fixture_error(packed.narrow(1, 0, cut), expected.narrow(0, 1, 1).narrow(1, 0, cut)), kLimit) << "packed, its beginning";
}

TEST_P(RandomModel, APackedBatchHasTheGradientsOfItsDocuments) {
  SCOPED_TRACE(text());
  const std::vector<int64_t> lengths = {1 + static_cast<int64_t>(rng.below(30)), 1 + static_cast<int64_t>(rng.below(5)), 1 + static_cast<int64_t>(rng.below(30))};
  std::vector<int32_t> bounds = {0};
  for (const int64_t n : lengths) bounds.push_back(bounds.back() + static_cast<int32_t>(n));
  const int64_t T = bounds.back();
  const at::Tensor ids = random_ids(rng, 1, T, c.vocab_size);
  const auto modes = random_modes(rng, 1, T, c.mixers().size());
  m->requires_grad(true);
  // What a loss would send back: any weights will do.
  const at::Tensor up = at::randn({1, T, c.vocab_size}, at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(GetParam())));
  const auto gradients = [&](const std::function<at::Tensor()>& loss) {
    torch::autograd::backward({loss()}, {});
    std::vector<at::Tensor> all;
    for (const auto& parameter : m->parameters()) {
      at::Tensor p = parameter;
      all.push_back(p.grad().defined() ? p.grad().clone() : at::zeros_like(p));
      p.mutable_grad() = at::Tensor();
    }
    return all;
  };
  const auto part = [&](int64_t begin, int64_t end, std::optional<at::Tensor> cu) {
    ModelInput in;
    in.input_ids = ids.narrow(1, begin, end - begin);
    in.routing = {routing(c, modes, begin, end)};
    in.cu_seqlens = std::move(cu);
    return (m->logits(m->hidden(in)) * up.narrow(1, begin, end - begin)).sum();
  };
  const auto packed = gradients([&] { return part(0, T, at::tensor(bounds, at::kInt)); });
  const auto alone = gradients([&] {
    at::Tensor sum = at::zeros({});
    for (size_t n = 0; n < lengths.size(); ++n) sum = sum + part(bounds[n], bounds[n + 1], {});
    return sum;
  });
  // Some vanish but for rounding: a bias of keys that are not rotated moves all scores of a query alike.
  double largest = 0;
  for (const auto& g : alone) largest = std::max(largest, g.abs().max().item<double>());
  for (size_t i = 0; i < packed.size(); ++i) {
    const double scale = std::max(alone[i].abs().max().item<double>(), 1e-3 * largest);
    const double error = (packed[i] - alone[i]).abs().max().item<double>() / scale;
    EXPECT_TRUE(error < 10 * kLimit) << m->specs()[i].name << ": " << error;
  }
}

TEST_P(RandomModel, TrimForkSaveAndGoOnIsNeverHavingSeenTheRest) {
  SCOPED_TRACE(text());
  const int64_t T = 70, more = 9;
  const at::Tensor ids = random_ids(rng, 1, T, c.vocab_size), other = random_ids(rng, 1, more, c.vocab_size);
  const auto modes = random_modes(rng, 1, T, c.mixers().size()), other_modes = random_modes(rng, 1, more, c.mixers().size());
  const StateOptions options{static_cast<int64_t>(rng.below(25)), static_cast<int64_t>(rng.below(5)), true};
  State state = m->make_state(1, options);
  feed(*m, state, ids, modes, T, rng);
  const TemporaryFolder folder;
  for (int64_t length = T; length > 0; length -= 1 + static_cast<int64_t>(rng.below(30))) {
    SCOPED_TRACE(length);
    state.trim(0, length, *m);
    State fresh = m->make_state(1, {0, 0, true}), fork = state.fork({0});
    run(*m, ids.narrow(1, 0, length), routing(c, modes, 0, length), &fresh);
    for (const auto& [a, b] : {std::pair{&state, "trimmed"}, {&fork, "forked"}}) {
      const auto x = fixed_slots(*m, *a, 0), y = fixed_slots(*m, fresh, 0);
      for (size_t i = 0; i < x.size(); ++i) {
        const double scale = std::max(y[i].second.abs().max().item<double>(), 1e-3);
        EXPECT_TRUE((x[i].second - y[i].second).abs().max().item<double>() / scale < kLimit) << b << " " << x[i].first;
      }
    }
    save_state(*m, state, folder / "s.safetensors");
    State loaded = load_state(*m, folder / "s.safetensors");
    const auto go_on = [&](State& s) { return run(*m, other, routing(c, other_modes, 0, more), &s); };
    const at::Tensor expected = go_on(fresh), of_fork = go_on(fork);
    EXPECT_LT(fixture_error(of_fork, expected), kLimit);
    EXPECT_LT(fixture_error(go_on(loaded), of_fork), kLimit);
  }
}

// Whatever the modes, the first layer's recurrent states are those of a run in its first mixer alone: they read the same keys and values.
TEST_P(RandomModel, ModesLeaveTheFirstLayersStateAlone) {
  SCOPED_TRACE(text());
  const int64_t T = 50;
  const at::Tensor ids = random_ids(rng, 1, T, c.vocab_size);
  const auto modes = random_modes(rng, 1, T, c.mixers().size());
  State a = m->make_state(1), b = m->make_state(1);
  run(*m, ids, routing(c, modes, 0, T), &a);
  run(*m, ids, routing(c, {std::vector<int32_t>(static_cast<size_t>(T), 0)}, 0, T), &b);
  const auto x = fixed_slots(*m, a, 0), y = fixed_slots(*m, b, 0);
  for (size_t i = 0; i < x.size() && x[i].first.starts_with("layer 0 "); ++i) {
    const double scale = std::max(y[i].second.abs().max().item<double>(), 1e-3);
    EXPECT_TRUE((x[i].second - y[i].second).abs().max().item<double>() / scale < kLimit) << x[i].first;
  }
}

// ORYX_RANDOM_CASES=1000 tries more of them.
int models() {
  const char* given = std::getenv("ORYX_RANDOM_CASES");
  return given != nullptr ? std::atoi(given) : 12;
}

INSTANTIATE_TEST_SUITE_P(Drawn, RandomModel, ::testing::Range(0, models()));

}  // namespace
}  // namespace oryx
