// Routers: gains that are known by hand, heads that learn them, budgets that hold, files of others that are refused.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/random.h"
#include "oryx/io/safetensors.h"
#include "oryx/modes/gain_budget.h"
#include "oryx/model/scheduling.h"
#include "oryx/router/features.h"
#include "oryx/router/train.h"
#include "tests/support/folder.h"
#include "tests/support/small_model.h"

namespace oryx {
namespace {

using ::testing::HasSubstr;

std::unique_ptr<LanguageModel> router_model(uint64_t seed = 3) {
  auto m = std::make_unique<LanguageModel>(test::small_model());
  m->initialize(seed);
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < m->specs().size(); ++i) {
    if (m->specs()[i].shape.size() == 2 && m->specs()[i].part != "convolution") at::Tensor(m->parameters()[i]).mul_(5);  // so that modes differ
  }
  return m;
}

template <typename F>
std::string router_error(F f) {
  try {
    f();
  } catch (const Error& e) {
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
    return e.what();
  }
  return "no error";
}

at::Tensor draw(std::vector<int64_t> shape, uint64_t seed) {
  CounterRng rng(seed);
  at::Tensor x = at::empty(shape, at::kFloat);
  for (int64_t i = 0; i < x.numel(); ++i) x.mutable_data_ptr<float>()[i] = static_cast<float>(rng.normal());
  return x;
}

std::vector<int64_t> router_ids(size_t length, uint64_t seed, uint64_t vocabulary = 40) {
  CounterRng rng(seed);
  std::vector<int64_t> ids(length);
  for (auto& id : ids) id = static_cast<int64_t>(rng.below(vocabulary));
  return ids;
}

GainHead head_of(const LanguageModel& model, uint64_t seed, bool reads_hidden = true) {
  const int64_t F = 2 * model.config().layer.hidden_size + TokenHistory::kScalars;
  GainHead h;
  h.mean = draw({F}, seed);
  h.scale = draw({F}, seed + 1).abs() + 0.5;
  h.w0 = draw({F}, seed + 2) * 0.1;
  h.w1 = draw({5, F}, seed + 3) * 0.1;
  h.b1 = draw({5}, seed + 4);
  h.w2 = draw({5}, seed + 5);
  h.bias = 0.25;
  h.reads_hidden = reads_hidden;
  h.model = router_identity(model);
  for (int i = 0; i <= 10; ++i) h.quantiles.push_back(static_cast<float>(i) - 5);
  return h;
}

TEST(RouterHead, GradientsAreThoseOfDifferences) {
  const auto m = router_model();
  const GainHead h = head_of(*m, 1);
  const at::Tensor x = draw({7, h.features()}, 9), g = draw({7}, 10) * 2;
  GainHead gradient;
  (void)huber_loss(h, x, g, 0.7, &gradient);
  // In float64, so that differences are sharp.
  const auto loss = [&](const std::function<void(GainHead&)>& change) {
    GainHead other = h;
    for (at::Tensor* p : {&other.mean, &other.scale, &other.w0, &other.w1, &other.b1, &other.w2}) *p = p->to(at::kDouble);
    change(other);
    return huber_loss(other, x, g.to(at::kDouble), 0.7);
  };
  const double e = 1e-5;
  const auto check = [&](at::Tensor GainHead::*part, int64_t i) {
    const double up = loss([&](GainHead& o) { (o.*part).view({-1})[i] += e; }), down = loss([&](GainHead& o) { (o.*part).view({-1})[i] -= e; });
    EXPECT_NEAR((gradient.*part).reshape({-1})[i].item<double>(), (up - down) / (2 * e), 1e-4) << i;
  };
  for (const int64_t i : {0, 3, 40}) {
    check(&GainHead::w0, i);
    check(&GainHead::w1, i * 2 + 1);
  }
  for (const int64_t i : {0, 2, 4}) {
    check(&GainHead::b1, i);
    check(&GainHead::w2, i);
  }
  EXPECT_NEAR(gradient.bias, (loss([&](GainHead& o) { o.bias += e; }) - loss([&](GainHead& o) { o.bias -= e; })) / (2 * e), 1e-4);
}

TEST(RouterHead, LearnsWhatIsKnown) {
  const auto m = router_model();
  const int64_t F = 2 * m->config().layer.hidden_size + TokenHistory::kScalars;
  // A rule with which no linear head correlates at all.
  const auto gains_of = [](const at::Tensor& x) { return x.select(1, 3).to(at::kFloat).abs(); };
  GainData data;
  data.features = draw({4000, F}, 1).to(at::kHalf);
  data.gains = gains_of(data.features);
  data.held_features = draw({1000, F}, 2).to(at::kHalf);
  data.held_gains = gains_of(data.held_features);
  data.asked = 1000;
  RouterOptions o;
  o.width = 24;
  o.epochs = 10;
  o.batch_size = 100;
  o.lr = 1e-2;
  const auto [head, fit] = fit_router(*m, data, o);
  EXPECT_GT(fit.correlation, 0.9);
  EXPECT_GT(fit.captured[3], 0.9 * fit.possible[3]);
  EXPECT_NEAR(fit.possible[3], 0.517, 0.04) << "of |x| of a normal x, by the largest quarter";
  EXPECT_NEAR(fit.mean_gain, std::sqrt(2 / 3.14159265), 0.05);
  EXPECT_EQ(head.quantiles.size(), 1001u);
  EXPECT_TRUE(std::is_sorted(head.quantiles.begin(), head.quantiles.end()));
  // The threshold of a share is exceeded by that share of the held-out tokens.
  const at::Tensor scores = head.predict(data.held_features.to(at::kFloat));
  for (const double share : {0.05, 0.25, 0.5}) EXPECT_NEAR(scores.gt(head.threshold(share)).sum().item<double>() / 1000, share, 0.003) << share;
  o.epochs = 1;
  EXPECT_TRUE(at::equal(fit_router(*m, data, o).first.w1, fit_router(*m, data, o).first.w1)) << "a function of the seed";
}

TEST(RouterGains, AreLossesInBothModes) {
  const auto m = router_model();
  const std::vector<int64_t> ids = router_ids(30, 4), next = router_ids(30, 5);
  GainText text{at::tensor(ids, at::kLong).unsqueeze(0), at::tensor(next, at::kLong).unsqueeze(0), {0, 11, 30}, -1};
  text.targets[0][7] = -100;
  const auto nll = [&](const std::string& schedule) {
    ModelInput input;
    input.input_ids = text.input_ids;
    input.cu_seqlens = at::tensor(text.bounds, at::kInt);
    std::vector<ModePiece> pieces;
    for (const auto& [from, to] : {std::pair{0, 11}, std::pair{11, 30}}) {
      pieces.push_back({.row = 0, .column = from, .length = to - from, .start = 0, .context = {}});
      pieces.back().context.prompt_length = to - from;
    }
    input.routing = ModelSchedule(m->config(), schedule).route(pieces, 1, 30);
    const at::NoGradGuard no_grad;
    return -m->logits(m->hidden(input))[0].log_softmax(-1).gather(1, text.targets[0].clamp_min(0).unsqueeze(1)).squeeze(1);
  };
  const MeasuredGains one = measure_gains(*m, text, 1), three = measure_gains(*m, text, 3);
  const at::Tensor linear = nll("linear"), all = linear - nll("attention");
  EXPECT_GT(all.abs().max().item<float>(), 0.05) << "the modes must differ";
  for (int64_t t = 0; t < 30; ++t) {
    if (t == 7) continue;
    EXPECT_NEAR(one.gain[t].item<float>(), all[t].item<float>(), 1e-4) << t;
    const int64_t place = t < 11 ? t : t - 11;
    const at::Tensor third = linear - nll(fmt::format("linear,periodic(attention=1;every=3;offset={})", place % 3));
    EXPECT_NEAR(three.gain[t].item<float>(), third[t].item<float>(), 1e-4) << t;
  }
  EXPECT_EQ(one.gain[7].item<float>(), 0) << "nobody asks";
  // One layer: a token's mode is all that matters, so that the readings agree with a token flipped alone.
  const GainText second{text.input_ids.narrow(1, 11, 19), text.targets.narrow(1, 11, 19), {0, 19}, -1};
  for (const int64_t t : {0, 5, 18}) EXPECT_NEAR(single_gain(*m, second.input_ids, second.targets, t), one.gain[11 + t].item<double>(), 1e-4) << t;
}

TEST(RouterGains, FillBothSidesAndAreAskedForAtTheQueriesAlone) {
  const auto m = router_model();
  RecallGains source({.pairs = 4, .queries = 2, .key_symbols = 12, .value_symbols = 12, .filler_symbols = 4}, 3);
  RouterOptions o;
  o.tokens = 3000;
  o.holdout = 0.25;
  o.flips = 10;
  int64_t last = 0;
  const GainData data = collect_gains(*m, source, o, [&](int64_t tokens) { last = tokens; });
  EXPECT_EQ(last, 3000);
  EXPECT_EQ(data.gains.size(0), 2250);
  EXPECT_EQ(data.held_gains.size(0), 750);
  EXPECT_NEAR(static_cast<double>(data.asked), 750 / 6.0, 2);
  EXPECT_LE(data.held_gains.ne(0).sum().item<int64_t>(), data.asked);
  EXPECT_GT(data.held_gains.ne(0).sum().item<int64_t>(), data.asked / 2);
  EXPECT_GT(data.linear_nats, 0);
  EXPECT_EQ(data.flip_gains.size(), data.flip_measured.size());
  o.tokens = 1000000000000;
  EXPECT_THAT(router_error([&] { (void)collect_gains(*m, source, o); }), HasSubstr("only"));
}

TEST(RouterFeatures, TokenByTokenAreThoseOfTheWhole) {
  const auto m = router_model();
  const std::vector<int64_t> ids = router_ids(40, 6, 9);  // few tokens: pairs and triples come again
  const std::vector<int32_t> bounds{0, 15, 40};
  const at::Tensor hidden = draw({40, m->config().layer.hidden_size}, 7);
  for (const bool reads_hidden : {true, false}) {
    const auto head = std::make_shared<const GainHead>(head_of(*m, 11, reads_hidden));
    const at::Tensor x = router_features(*m, reads_hidden, ids, bounds, hidden);
    const at::Tensor whole = head->predict(x);
    for (size_t n = 0; n + 1 < bounds.size(); ++n) {
      GainReader reader(*m, head);
      for (int64_t t = bounds[n]; t < bounds[n + 1]; ++t) {
        const int64_t place = t - bounds[n];
        const float gain = place == 4 && !reads_hidden ? (reader.pass(std::vector<int32_t>{static_cast<int32_t>(ids[static_cast<size_t>(t)])}), whole[t].item<float>())
                                                       : reader.next(std::vector<int32_t>{static_cast<int32_t>(ids[static_cast<size_t>(t)])}, place > 0 ? hidden[t - 1] : at::Tensor()).front();
        EXPECT_EQ(gain, whole[t].item<float>()) << t;
      }
      // In any split.
      GainReader split(*m, head);
      std::vector<float> gains;
      for (int64_t t = bounds[n]; t < bounds[n + 1]; t += 6) {
        const int64_t count = std::min<int64_t>(6, bounds[n + 1] - t);
        const std::vector<int32_t> own(ids.begin() + t, ids.begin() + t + count);
        const auto more = split.next(own, t > bounds[n] ? hidden[t - 1] : at::Tensor(), hidden.narrow(0, t, count));
        gains.insert(gains.end(), more.begin(), more.end());
      }
      for (size_t i = 0; i < gains.size(); ++i) EXPECT_EQ(gains[i], whole[bounds[n] + static_cast<int64_t>(i)].item<float>()) << i;
    }
    const int64_t pairs = 2 * m->config().layer.hidden_size + 4;
    EXPECT_GT(x.select(1, pairs).sum().item<float>(), 0) << "some pairs stood there before";
    EXPECT_EQ(x[15].narrow(0, 0, m->config().layer.hidden_size).abs().sum().item<float>(), 0) << "nothing before a text's first token";
  }
}

TEST(RouterBudget, IsNeverExceeded) {
  GainHead h;
  for (int i = 0; i <= 100; ++i) h.quantiles.push_back(static_cast<float>(i) / 100);
  for (const double share : {0.0, 0.05, 0.3, 1.0}) {
    // As calibrated, always below, always above, and bursts.
    for (int kind = 0; kind < 4; ++kind) {
      CounterRng rng(5, static_cast<uint64_t>(kind));
      GainBudget budget(h, share);
      for (int t = 1; t <= 2000; ++t) {
        const double u = rng.uniform();
        budget.take(static_cast<float>(kind == 0 ? u : kind == 1 ? -1 : kind == 2 ? 2 : t / 100 % 2 == 0 ? -1 : 2));
        ASSERT_LE(static_cast<double>(budget.taken()), share * t + GainBudget::kAhead);
      }
      if (kind == 0 && share > 0 && share < 1) {
        EXPECT_NEAR(static_cast<double>(budget.taken()) / 2000, share, 0.03);
      }
      if (kind == 1 || share == 0) {
        EXPECT_EQ(budget.taken(), share == 1 ? 2000 : 0);
      }
      if (kind == 3 && share == 0.3) {
        EXPECT_GT(budget.taken(), 580) << "what a dull stretch leaves is spent later";
      }
    }
  }
}

// Gains of every kind: as the head was calibrated, on another scale, all equal, bursts, rising and falling without end, and what tells what was decided and does the contrary.
float awkward_gain(int kind, int64_t t, CounterRng& rng, const GainBudget& budget) {
  const auto x = static_cast<double>(t);
  switch (kind) {
    case 0: return static_cast<float>(rng.uniform());
    case 1: return static_cast<float>(50 + 100 * rng.uniform());
    case 2: return 0.5F;
    case 3: return static_cast<float>(t / 90 % 2 == 0 ? rng.uniform() - 1 : rng.uniform() + 1);
    case 4: return static_cast<float>(x);
    case 5: return static_cast<float>(-x);
    case 6: return static_cast<float>(budget.threshold() > 0 ? budget.threshold() - 1e-3 : -1e3);
    default: return static_cast<float>(std::min(1e30, budget.threshold() + 1));
  }
}

TEST(RouterBudget, AWindowKeepsTheShareWhateverTheGains) {
  GainHead h;
  for (int i = 0; i <= 100; ++i) h.quantiles.push_back(static_cast<float>(i) / 100);
  for (const double share : {0.0, 0.05, 0.1, 0.37, 1.0}) {
    for (const int64_t window : {1, 32, 300}) {
      const double behind = GainBudget::behind(share, window);
      for (int kind = 0; kind < 8; ++kind) {
        CounterRng rng(6, static_cast<uint64_t>(kind));
        GainBudget budget(h, share, window), again(h, share, window);
        for (int64_t t = 1; t <= 1500; ++t) {
          const float gain = awkward_gain(kind, t, rng, budget);
          ASSERT_EQ(budget.take(gain), again.take(gain));
          const double due = share * static_cast<double>(t), taken = static_cast<double>(budget.taken());
          ASSERT_LE(taken, due + GainBudget::kAhead) << share << " " << window << " " << kind << " " << t;
          if (share == 0) { ASSERT_EQ(taken, 0) << window << " " << kind << " " << t; }
          ASSERT_GE(taken, due - behind - 1e-9) << share << " " << window << " " << kind << " " << t;
        }
      }
    }
  }
}

// On gains of another scale than the held-out ones the share is still spent on the largest: a threshold that stands still takes those that come first, or none.
TEST(RouterBudget, AWindowFollowsTheText) {
  GainHead h;
  for (int i = 0; i <= 100; ++i) h.quantiles.push_back(static_cast<float>(i) / 100);
  constexpr double kShare = 0.1;
  constexpr int64_t kTokens = 4000;
  for (const double offset : {-0.5, 0.0, 0.5}) {
    CounterRng rng(9);
    std::vector<float> gains;
    for (int64_t t = 0; t < kTokens; ++t) gains.push_back(static_cast<float>(rng.uniform() + offset));
    const auto worth = [&](GainBudget budget) {  // mean of what is taken, over the share's tokens
      double sum = 0;
      for (const float g : gains) sum += budget.take(g) ? g - offset : 0;
      return sum / (kShare * kTokens);
    };
    const double best = 0.95;  // the mean of the highest tenth
    EXPECT_GT(worth(GainBudget(h, kShare, 256)), best - 0.06) << offset;
    if (offset != 0) {
      EXPECT_LT(worth(GainBudget(h, kShare)), best - 0.15) << offset;
    }
  }
}

TEST(RouterFile, ComesBackAndRefusesOthers) {
  const test::TemporaryFolder folder;
  const auto m = router_model(), other = router_model(4);
  GainHead h = head_of(*m, 1);
  h.notes["data"] = "made up";
  const auto path = folder / "router.safetensors";
  save_head(h, path);
  const auto read = load_head(path);
  const at::Tensor x = draw({9, h.features()}, 2);
  EXPECT_TRUE(at::equal(read->predict(x), h.predict(x)));
  EXPECT_TRUE(at::equal(read->predict(x.narrow(0, 4, 2)), h.predict(x).narrow(0, 4, 2))) << "whatever stands beside it";
  EXPECT_EQ(read->identity(), h.identity());
  EXPECT_NE(head_of(*m, 2).identity(), h.identity());
  EXPECT_EQ(read->quantiles, h.quantiles);
  EXPECT_EQ(read->notes.at("data"), "made up");
  EXPECT_NO_THROW(check_head(*m, *read, "r"));
  EXPECT_THAT(router_error([&] { check_head(*other, *read, "r.safetensors"); }), HasSubstr("r.safetensors: was trained for the model " + h.model));
  const std::string file = "file=" + path.string();
  const ModelSchedule schedule(m->config(), "linear,router(attention=0.3;" + file + ")");
  EXPECT_EQ(schedule.gain_heads().size(), 1u);
  EXPECT_THAT(router_error([&] { ModelSchedule(m->config(), "linear,router(attention=0.3;file=/nowhere/r)"); }), HasSubstr("/nowhere/r"));
  EXPECT_THAT(router_error([&] { ModelSchedule(m->config(), "linear,router(attention=0.3)"); }), HasSubstr("a router's file"));
  EXPECT_THAT(router_error([&] { ModelSchedule(m->config(), "linear,router(attention=1.3;" + file + ")"); }), HasSubstr("a number from 0 to 1"));

  // Damage of every kind, each with its line.
  const auto written = [&](const std::function<void(NamedTensors&, std::map<std::string, std::string>&)>& change) {
    const SafetensorsReader whole(path);
    NamedTensors tensors;
    for (const auto& [name, info] : whole.tensors()) tensors.emplace_back(name, whole.load(name));
    auto meta = whole.metadata();
    change(tensors, meta);
    write_safetensors(folder / "bad", tensors, meta);
    return router_error([&] { (void)load_head(folder / "bad"); });
  };
  const auto tensor = [](NamedTensors& all, const std::string& name) -> at::Tensor& {
    return std::find_if(all.begin(), all.end(), [&](const auto& t) { return t.first == name; })->second;
  };
  EXPECT_EQ(written([](auto&, auto&) {}), "no error");
  EXPECT_THAT(written([](auto&, auto& meta) { meta["format"] = "oryx-state 1"; }), HasSubstr("its format is 'oryx-state 1', expected 'oryx-router 1'"));
  EXPECT_THAT(written([](auto&, auto& meta) { meta.erase("model"); }), HasSubstr("no 'model' in its metadata"));
  EXPECT_THAT(written([](auto&, auto& meta) { meta["bias"] = "nan"; }), HasSubstr("'bias' in its metadata is 'nan'"));
  EXPECT_THAT(written([](auto&, auto& meta) { meta["reads"] = "minds"; }), HasSubstr("expected hidden or tokens"));
  EXPECT_THAT(written([](auto& all, auto&) { all.pop_back(); }), HasSubstr("no tensor"));
  EXPECT_THAT(written([&](auto& all, auto&) { tensor(all, "w0") = at::zeros({3}); }), HasSubstr("tensor 'w0' is F32 [3], expected F32 [72]"));
  EXPECT_THAT(written([&](auto& all, auto&) { tensor(all, "w2") = tensor(all, "w2").to(at::kDouble); }), HasSubstr("tensor 'w2' is F64"));
  EXPECT_THAT(written([&](auto& all, auto&) { tensor(all, "w1")[0][0] = std::nanf(""); }), HasSubstr("not finite"));
  EXPECT_THAT(written([&](auto& all, auto&) { tensor(all, "scale")[0] = 0; }), HasSubstr("values of 0 or less"));
  EXPECT_THAT(written([&](auto& all, auto&) { tensor(all, "quantiles")[0] = 99; }), HasSubstr("does not rise"));
  write_file(folder / "bad", "no router");
  EXPECT_THAT(router_error([&] { (void)load_head(folder / "bad"); }), HasSubstr("bad"));
}

ModeContext with_gains(const std::filesystem::path& path, int64_t prompt, std::vector<float> gains) {
  TokenFacts facts;
  facts.gains["router:" + path.string()] = std::move(gains);
  ModeContext c{.prompt_length = prompt};
  c.facts = std::make_shared<const TokenFacts>(std::move(facts));
  return c;
}

TEST(RouterPolicy, SpendsTheShareOnTheLargestGains) {
  const test::TemporaryFolder folder;
  const auto m = router_model();
  const auto path = folder / "r";
  save_head(head_of(*m, 1), path);  // thresholds from -5 to 5
  const std::vector<std::string> mixers{"gated_delta_net", "attention"};
  const auto taken = [&](const Schedule& s, const ModeContext& c, int64_t begin, int64_t end) {
    std::vector<int64_t> at;
    for (const ModeSpan& span : s.resolve(c, begin, end)) {
      for (int64_t t = span.begin; t < span.end; ++t) {
        if (span.mixer == 1) at.push_back(t);
      }
    }
    return at;
  };
  const Schedule s = Schedule::parse("linear,router(attention=0.4;file=" + path.string() + ")", mixers);
  EXPECT_EQ(Schedule::parse(s.text(), mixers).text(), s.text());
  EXPECT_EQ(s.needs(), std::vector<std::string>{"router:" + path.string()});
  // Five of the prompt: the two largest. Behind it those above the threshold of 40%, which is 1.
  const ModeContext c = with_gains(path, 5, {0.1F, -1, 3, 0.2F, 0.3F, 1.5F, 0.9F, 4});
  EXPECT_EQ(taken(s, c, 0, 8), (std::vector<int64_t>{2, 4, 5, 7}));
  EXPECT_EQ(taken(s, c, 3, 6), (std::vector<int64_t>{4, 5})) << "any piece";
  EXPECT_EQ(s.mixer_at(c, 7), 1);
  // Exactly the share of any prompt.
  CounterRng rng(8);
  for (const int64_t length : {1, 3, 17, 100}) {
    std::vector<float> gains;
    for (int64_t t = 0; t < length; ++t) gains.push_back(static_cast<float>(rng.normal()));
    const auto expected = static_cast<size_t>(std::llround(0.4 * static_cast<double>(length)));
    EXPECT_EQ(taken(s, with_gains(path, length, gains), 0, length).size(), expected);
  }
  // As they come, also in a prompt.
  const Schedule causal = Schedule::parse("linear,router(attention=0.4;causal=1;file=" + path.string() + ")", mixers);
  EXPECT_EQ(taken(causal, with_gains(path, 5, {0.1F, 1.1F, 3, 1.2F, 0.3F}), 0, 5), (std::vector<int64_t>{1, 2, 3}));
  // A window: of gains that all lie above the held-out ones' threshold the larger.
  const Schedule window = Schedule::parse("linear,router(attention=0.4;causal=1;window=8;file=" + path.string() + ")", mixers);
  std::vector<float> high;
  for (int t = 0; t < 200; ++t) high.push_back(t % 5 < 2 ? 9.0F : 7.0F);
  const auto followed = taken(window, with_gains(path, 200, high), 0, 200);
  EXPECT_NEAR(static_cast<double>(followed.size()), 80, 8);
  EXPECT_GT(std::count_if(followed.begin(), followed.end(), [](int64_t t) { return t % 5 < 2; }), 64);
  const ModeContext pieces = with_gains(path, 200, high);
  std::vector<int64_t> all;
  for (int64_t begin = 0; begin < 200; begin += 7) {
    for (const int64_t t : taken(window, pieces, begin, std::min<int64_t>(200, begin + 7))) all.push_back(t);
  }
  EXPECT_EQ(all, followed) << "any piece";
  EXPECT_THAT(router_error([&] { Schedule::parse("router(attention=0.4;average=1;window=8;file=" + path.string() + ")", mixers); }), HasSubstr("either average=1"));
  EXPECT_THAT(router_error([&] { Schedule::parse("router(attention=0.4;window=70000;file=" + path.string() + ")", mixers); }), HasSubstr("at most 65536"));
  const Schedule average = Schedule::parse("linear,router(attention=0.4;average=1;file=" + path.string() + ")", mixers);
  EXPECT_EQ(taken(average, with_gains(path, 3, {2, 2, 2, 0.9F, 2}), 0, 5), (std::vector<int64_t>{0, 1, 2, 4})) << "whatever above the threshold";
  for (const ModeContext& bad : {ModeContext{.prompt_length = 5}, with_gains(path, 5, {1, 2})}) {
    EXPECT_THAT(router_error([&] { (void)s.resolve(bad, 0, 5); }), HasSubstr("and there are none here"));
  }
  EXPECT_THAT(router_error([&] { (void)s.resolve(c, 0, 9); }), HasSubstr("the gain of token 8, behind the prompt"));
  const Schedule prompt = Schedule::parse("linear,router(attention=0.4;file=" + path.string() + ")@prompt", mixers);
  EXPECT_EQ(taken(prompt, c, 0, 20), (std::vector<int64_t>{2, 4}));
  // What was not predicted is left alone and not counted; a text that was left and gone on with has several prompts, each of which gets its share.
  const float none = std::nanf("");
  const Schedule behind = Schedule::parse("linear,router(attention=0.4;file=" + path.string() + ")@gen", mixers);
  EXPECT_EQ(taken(behind, with_gains(path, 5, {none, none, none, none, none, 1.5F, 0.9F, 4}), 0, 8), (std::vector<int64_t>{5, 7}));
  EXPECT_TRUE(behind.prompt_needs().empty());
  EXPECT_EQ(s.prompt_needs(), s.needs());
  TokenFacts twice;
  twice.gains["router:" + path.string()] = {0.1F, 5, 0.3F, 0.2F, 0.4F, 1.5F, 0.9F, 6, 8, 7, 1, 2, 4, 0};
  twice.prompts = {{0, 5}, {8, 13}};
  ModeContext again{.prompt_length = 13};
  again.facts = std::make_shared<const TokenFacts>(std::move(twice));
  EXPECT_EQ(taken(s, again, 0, 14), (std::vector<int64_t>{1, 4, 5, 7, 8, 9}));
  // An oracle's facts.
  const Schedule oracle = Schedule::parse("linear,oracle(attention=0.4)", mixers);
  EXPECT_EQ(oracle.needs(), std::vector<std::string>{"oracle"});
  EXPECT_THAT(router_error([&] { (void)oracle.resolve(c); }), HasSubstr("'oracle' wants what attention gains"));
}

}  // namespace
}  // namespace oryx
