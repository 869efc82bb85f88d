// How often two modes of a model draw the same token, by the rule that draws. A text is written in attention behind a prompt; at each of its places a draft in linear mode, one to four tokens
// deep, says what it would draw there. docs/results/2026-11-26-speculative.md has what it printed.
//
//     build/cpu/examples/draft_agreement MODEL PROMPT.txt [TOKENS]
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <map>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/data/tokenizer.h"
#include "oryx/generate/sampling.h"
#include "oryx/generate/session.h"
#include "oryx/model/checkpoint.h"

namespace {

constexpr size_t kDepths = 4;
constexpr int64_t kDraws = 16;  // at each place

// What remains of the softmax behind temperature and top-p, [V] float64.
at::Tensor drawn_from(const at::Tensor& logits, const oryx::SamplingOptions& o) {
  const at::Tensor p = (logits.to(at::kDouble) / o.temperature).softmax(0);
  if (o.top_p >= 1) return p;
  const auto [sorted, order] = p.sort(/*dim=*/0, /*descending=*/true);
  const at::Tensor kept = sorted * (sorted.cumsum(0) - sorted < o.top_p);
  return at::zeros_like(p).scatter(0, order, kept / kept.sum());
}

struct Agreement {
  double best = 0, race = 0, sums = 0, greedy = 0;  // best: 1 - TV, what a rule can reach that keeps the distribution
  int64_t places = 0;
};

void compare(const at::Tensor& text, const at::Tensor& draft, oryx::SamplingOptions o, int64_t place, Agreement& a) {
  a.best += at::minimum(drawn_from(text, o), drawn_from(draft, o)).sum().item<double>();
  for (o.seed = 0; o.seed < kDraws; ++o.seed) {
    for (const bool race : {true, false}) {
      o.race = race;
      const bool same = oryx::sample_token(text, o, static_cast<uint64_t>(place)) == oryx::sample_token(draft, o, static_cast<uint64_t>(place));
      (race ? a.race : a.sums) += same ? 1.0 / kDraws : 0;
    }
  }
  a.greedy += oryx::sample_token(text, {}, 0) == oryx::sample_token(draft, {}, 0) ? 1 : 0;
  ++a.places;
}

void measure(const oryx::LanguageModel& model, const std::vector<int32_t>& prompt, int64_t vocab, int64_t count, oryx::SamplingOptions o) {
  const oryx::ModelSchedule attention(model.config(), "attention"), linear(model.config(), "linear");
  const auto length = static_cast<int64_t>(prompt.size());
  oryx::Session text(model, attention, {.prompt_length = length, .tokens = length + count});
  const auto row = [&](const at::Tensor& logits) { return logits.narrow(0, 0, vocab).clone(); };
  std::vector<at::Tensor> rows{row(model.logits(text.extend(prompt)).squeeze(0))};  // behind each token of the text
  oryx::Session again(model, attention, {.prompt_length = length, .tokens = length + count}, text.state().fork({0}));
  std::vector<int32_t> ids;
  for (int64_t t = 0; t < count; ++t) {
    o.race = true;
    ids.push_back(static_cast<int32_t>(oryx::sample_token(rows.back(), o, static_cast<uint64_t>(text.length()))));
    rows.push_back(row(text.step(ids.back())));
  }
  std::array<Agreement, kDepths> by_depth;
  for (size_t t = 0; t < ids.size(); ++t) {
    again.hold();
    for (size_t d = 0; d < kDepths && t + d < ids.size(); ++d) compare(rows[t + d + 1], row(again.draft(ids[t + d], linear)), o, length + static_cast<int64_t>(t + d) + 1, by_depth[d]);
    again.back();
    (void)again.step(ids[t]);
  }
  for (size_t d = 0; d < kDepths; ++d) {
    const Agreement& a = by_depth[d];
    const auto share = [&](double x) { return x / static_cast<double>(a.places); };
    fmt::print("prompt {} tokens, temperature {}, top-p {}, {} deep: best possible {:.3f}, race {:.3f}, running sums {:.3f}, greedy {:.3f} ({} places)\n", length, o.temperature, o.top_p, d + 1, share(a.best),
               share(a.race), share(a.sums), share(a.greedy), a.places);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    fmt::print(stderr, "usage: draft_agreement MODEL PROMPT.txt [TOKENS]\n");
    return 2;
  }
  try {
    const at::NoGradGuard no_grad;
    const auto model = oryx::load_model(argv[1]);
    const auto tokenizer = oryx::load_tokenizer(argv[1]);
    const std::vector<int32_t> prompt = tokenizer->encode_prompt(oryx::read_file(argv[2]));
    const int64_t count = argc > 3 ? std::stoll(argv[3]) : 200;
    for (const oryx::SamplingOptions& o : {oryx::SamplingOptions{.temperature = 1}, {.temperature = 0.8, .top_p = 0.95}}) measure(*model, prompt, tokenizer->vocab_size(), count, o);
  } catch (const std::exception& e) {
    fmt::print(stderr, "draft_agreement: {}\n", e.what());
    return 1;
  }
  return 0;
}
