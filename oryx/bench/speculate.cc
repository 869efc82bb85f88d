// Time of a token that is drafted in one mode and verified in another, against context, drafted tokens and acceptance. The acceptance is given, not measured: weights are random.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "oryx/bench/bench.h"
#include "oryx/bench/measure.h"
#include "oryx/bench/random_rows.h"
#include "oryx/common/error.h"
#include "oryx/common/random.h"
#include "oryx/generate/speculative.h"
#include "oryx/model/device.h"

namespace oryx {

namespace {

constexpr int64_t kPasses = 12;  // timed by themselves

// A text of random tokens, of which a drafter guesses each with the same chance.
class GuessedText {
 public:
  GuessedText(int64_t vocab, double acceptance) : vocab_(static_cast<uint64_t>(vocab)), acceptance_(acceptance) {}
  int32_t token(int64_t position) const { return static_cast<int32_t>(CounterRng(1, static_cast<uint64_t>(position)).below(vocab_)); }
  int32_t guess(int64_t position) const {
    const bool right = CounterRng(2, static_cast<uint64_t>(position)).uniform() < acceptance_;
    return right ? token(position) : static_cast<int32_t>((static_cast<uint64_t>(token(position)) + 1) % vocab_);
  }

 private:
  uint64_t vocab_;
  double acceptance_;
};

// Of each context the modes alone, and the drafts of the largest count.
Chart speculation_chart(const std::vector<Json>& rows, int64_t most, const std::string& title) {
  Chart chart{.title = title, .x_label = "drafts accepted, % of those tested", .y_label = "ms a token"};
  double low = 100;
  for (const Json& row : rows) {
    if (row["draft_tokens"] == most) low = std::min(low, 100 * row["acceptance"].get<double>());
  }
  for (const Json& row : rows) {
    const std::string context = fmt::format("{} tokens", row["context"].get<int64_t>());
    const double ms = row["ms_per_token"].get<double>();
    if (row["draft_tokens"] == 0) {
      chart.series.push_back({context + ", alone", {{low, ms}, {100, ms}}});
      chart.series.push_back({fmt::format("{}, {} drafted", context, most)});
    } else if (row["draft_tokens"] == most) {
      chart.series.back().points.emplace_back(100 * row["acceptance"].get<double>(), ms);
    }
  }
  for (Series& s : chart.series) std::sort(s.points.begin(), s.points.end());
  chart.y_low = 0;
  return chart;
}

}  // namespace

BenchResult bench_speculate(const SpeculateBenchOptions& o) {
  const at::Device device = parse_device(o.model.device);
  const ModelConfig config = o.model.config();
  const ModelSchedule schedule(config, o.schedule), draft(config, o.draft);
  for (const int64_t n : o.draft_tokens) check_draft(config, schedule, {o.draft, n}, {});
  for (const double a : o.acceptance) {
    if (!(a >= 0 && a <= 1)) fail("an acceptance of {}, expected 0 to 1", a);
  }
  // A run: so many tokens and, where the last pass ends behind them, its drafts.
  const int64_t runs = 2 + static_cast<int64_t>(o.draft_tokens.size() * o.acceptance.size()), grown = runs * (o.tokens + 2 * kMostDrafted + 2) + kPasses * 2 * static_cast<int64_t>(o.draft_tokens.size());
  for (size_t i = 1; i < o.contexts.size(); ++i) {
    if (o.contexts[i] < o.contexts[i - 1] + grown) fail("contexts {} and {}: expected each at least {} tokens above the one before", o.contexts[i - 1], o.contexts[i], grown);
  }
  LanguageModel model(config, o.model.compute());
  model.initialize(0);
  model.to(device);
  if (device.is_cuda()) model.keep_copies();  // the way operator by operator then converts no weights
  const at::NoGradGuard no_grad;
  BenchResult result;
  auto& rows = result.table.rows;
  for (const int64_t context : o.contexts) {
    State state = model.make_state(1);
    state.reserve(context + grown);
    fill_rows(model, state, context);
    Session session(model, schedule, {.prompt_length = context, .tokens = context + grown, .fused = o.fused}, std::move(state));
    const auto run_alone = [&] {
      const GuessedText text(config.vocab_size, 1);
      for (int64_t t = 0; t < o.tokens; ++t) (void)session.step(text.token(session.length())).cpu();
    };
    (void)time_repeated(0, 1, run_alone);  // sets itself up
    const double alone = 1e3 * time_repeated(0, 1, run_alone).min() / static_cast<double>(o.tokens);
    rows.push_back({{"context", context}, {"draft_tokens", 0}, {"wanted", nullptr}, {"acceptance", nullptr}, {"ms_per_token", alone}, {"speed", 1.0}, {"tokens_a_pass", 1.0}, {"draft_ms", nullptr}, {"pass_ms", alone}, {"device_ms", nullptr}});
    for (const int64_t count : o.draft_tokens) {
      // A pass and what keeps one of its tokens, behind one another without the host.
      std::vector<int32_t> ids(static_cast<size_t>(count) + 1, 1);
      double device_ms = 0;
      if (device.is_cuda()) {
        device_ms = 1e3 * time_repeated_on(device, 2, kPasses, [&] {
                            (void)session.steps(ids);
                            session.keep(1);
                          }).median();
      }
      bool warm = false;
      for (const double acceptance : o.acceptance) {
        const GuessedText text(config.vocab_size, acceptance);
        DraftStats stats;
        // Drafts as they are made, of which the guesses then take the place.
        const Drafter likeliest = drafts_likeliest(draft);
        const auto guessed = [&](Session& by, int32_t id, int64_t tokens) {
          const int64_t begin = by.length() + 1;
          std::vector<int32_t> drafts = likeliest(by, id, tokens);
          for (size_t i = 0; i < drafts.size(); ++i) drafts[i] = text.guess(begin + static_cast<int64_t>(i));
          return drafts;
        };
        const auto run = [&](int64_t tokens) {
          DraftedSession drafted(session, guessed, {o.draft, count, false}, &draft);
          for (int64_t t = 0; t < tokens; ++t) (void)drafted.step(text.token(drafted.length()), tokens - t + count);
          drafted.settle();
          stats = drafted.stats();
        };
        if (!warm) run(1);
        warm = true;
        const double ms = 1e3 * time_repeated(0, 1, [&] { run(o.tokens); }).min() / static_cast<double>(o.tokens);
        const auto each = [](double seconds, int64_t n) { return n > 0 ? 1e3 * seconds / static_cast<double>(n) : 0; };
        rows.push_back({{"context", context},
                        {"draft_tokens", count},
                        {"wanted", acceptance},
                        {"acceptance", stats.acceptance()},
                        {"ms_per_token", ms},
                        {"speed", alone / ms},
                        {"tokens_a_pass", stats.tokens_a_pass()},
                        {"draft_ms", each(stats.draft_seconds, stats.drafted)},
                        {"pass_ms", each(stats.verify_seconds, stats.passes)},
                        {"device_ms", device.is_cuda() ? Json(device_ms) : Json()}});
      }
    }
  }
  result.table.columns = {{"context", "context", cell_text()},       {"draft_tokens", "drafted", cell_text()},        {"wanted", "acceptance given", cell_fixed(2)}, {"acceptance", "came out", cell_fixed(3)},
                          {"ms_per_token", "ms/token", cell_fixed(3)}, {"speed", "speed", cell_fixed(2)},              {"tokens_a_pass", "tokens a pass", cell_fixed(2)}, {"draft_ms", "ms a draft", cell_fixed(3)},
                          {"pass_ms", "ms a pass", cell_fixed(3)},   {"device_ms", "by the device alone", cell_fixed(3)}};
  result.options = {{"preset", o.model.preset}, {"dtype", o.model.precision}, {"device", o.model.device}, {"schedule", o.schedule}, {"draft", o.draft}, {"contexts", o.contexts},
                    {"tokens", o.tokens},       {"draft_tokens", o.draft_tokens}, {"acceptance", o.acceptance}, {"fused", o.fused}};
  result.charts = {speculation_chart(rows, *std::max_element(o.draft_tokens.begin(), o.draft_tokens.end()), fmt::format("{} in {}, drafted in {}", o.model.preset, o.schedule, o.draft))};
  result.note = "Weights are random: the acceptance is given, each draft is right with that chance by itself.";
  return result;
}

}  // namespace oryx
