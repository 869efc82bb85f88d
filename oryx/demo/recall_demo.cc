#include "oryx/demo/recall_demo.h"

#include <algorithm>
#include <chrono>

#include "oryx/common/error.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/progress.h"
#include "oryx/model/checkpoint.h"
#include "oryx/train/lr_schedule.h"
#include "oryx/train/train_step.h"

namespace oryx {

void RecallDemoOptions::describe(Fields& f) {
  f.add("seed", seed, "of initialisation, examples and modes", at_least(0));
  f.add("steps", steps, "optimiser steps", at_least(1));
  f.add("tokens_per_step", tokens_per_step, "tokens of a batch, about", at_least(1));
  f.add("warmup_steps", warmup_steps, "of the learning rate", at_least(0));
  f.add("lr", lr, "peak learning rate", above(0));
  f.add("weight_decay", weight_decay, "of AdamW", at_least(0));
  f.add("pairs", pairs, "key-value pairs of a sequence", at_least(1));
  f.add("queries", queries, "keys that are asked for at its end", at_least(1));
  f.add("symbols", symbols, "different keys, and as many values", at_least(2));
  f.add("length", length, "tokens of a sequence, filled up with noise; 0: no noise", at_least(0));
  f.add("filler_symbols", filler_symbols, "different noise tokens", at_least(0));
  f.add("first_pairs", first_pairs, "pairs at the first step; they grow to `pairs`", at_least(1));
  f.add("curriculum", curriculum, "share of the steps over which they grow", between(0, 1));
  f.add("hidden_size", hidden_size, "model width", at_least(1));
  f.add("heads", heads, "heads", at_least(1));
  f.add("head_dim", head_dim, "width of a key", at_least(1));
  f.add("value_head_dim", value_head_dim, "width of a value", at_least(1));
  f.add("layers", layers, "layers", at_least(1));
  f.add("chunk", chunk, "tokens that take one mode in training", at_least(1));
  f.add("attention_share", attention_share, "probability that a chunk is in attention in training", between(0, 1));
  f.add("examples", examples, "unseen sequences for each figure", at_least(1));
  f.add("want_attention", want_attention, "share correct that attention must reach", between(0, 1));
  f.add("want_mixed_within", want_mixed_within, "how far mixed may stay behind attention", between(0, 1));
  f.add("want_linear_below", want_linear_below, "how far linear must stay behind attention", between(0, 1));
}

void RecallDemoOptions::validate() const {
  check(task());
  model().validate();
  if (first_pairs > pairs) fail("first_pairs is {}, expected at most pairs {}", first_pairs, pairs);
}

ModelConfig RecallDemoOptions::model() const {
  ModelConfig c;
  c.vocab_size = task().vocab_size();
  c.num_layers = layers;
  c.layer.hidden_size = hidden_size;
  c.layer.num_heads = heads;
  c.layer.head_dim = head_dim;
  c.layer.value_head_dim = value_head_dim;
  c.layer.intermediate_size = 2 * hidden_size;
  return c;
}

RecallOptions RecallDemoOptions::task() const {
  RecallOptions t;
  t.pairs = pairs;
  t.queries = queries;
  t.key_symbols = t.value_symbols = symbols;
  t.length = length;
  t.filler_symbols = filler_symbols;
  return t;
}

namespace {

// The task's size at a step: pairs grow, queries in proportion.
RecallOptions task_at(const RecallDemoOptions& o, int64_t step) {
  RecallOptions t = o.task();
  const double progress = o.curriculum > 0 ? std::min(1.0, static_cast<double>(step) / (o.curriculum * static_cast<double>(o.steps))) : 1;
  t.pairs = o.first_pairs + static_cast<int64_t>(progress * static_cast<double>(o.pairs - o.first_pairs));
  return t;
}

void train(const RecallDemoOptions& o, LanguageModel& model, RecallDemoResult& result) {
  const auto seed = static_cast<uint64_t>(o.seed);
  Optimizer optimizer(model, {o.lr, 0.9, 0.95, 1e-8, o.weight_decay});
  const ModelSchedule schedule(model.config(), fmt::format("random(attention={};chunk={})", o.attention_share, o.chunk));
  ProgressBar bar("training", o.steps, "steps");
  uint64_t index = 0;
  for (int64_t step = 0; step < o.steps; ++step) {
    check_interrupt();
    const RecallOptions task = task_at(o, step);
    const int64_t batch = std::max<int64_t>(1, o.tokens_per_step / task.tokens());
    RecallBatches source(task, batch, seed);
    source.seek({{"index", index}});
    index += static_cast<uint64_t>(batch);
    const double lr = cosine_with_warmup(step + 1, o.lr, o.warmup_steps, o.steps, 0.02);
    const StepResult r = train_step(model, optimizer, source, schedule, lr, seed, step, {});
    if (r.skipped) fail("recall demo: loss or gradient was not finite at step {} (loss {}); lower lr (now {})", step + 1, r.loss, o.lr);
    result.losses.emplace_back(static_cast<double>(step + 1), r.loss);
    result.train_tokens += r.tokens;
    bar.update(step + 1, fmt::format("{} pairs | loss {:.3f}", task.pairs, r.loss));
  }
}

RecallResult evaluate(const RecallDemoOptions& o, const LanguageModel& model, const std::string& schedule) {
  check_interrupt();
  RecallEvaluation e;
  e.schedule = schedule;
  e.examples = o.examples;
  e.batch_size = 32;
  return evaluate_recall(model, o.task(), e);
}

void judge(const RecallDemoOptions& o, RecallDemoResult& r) {
  const double attention = r.attention.accuracy(), mixed = r.mixed.accuracy(), linear = r.linear.accuracy();
  auto want = [&](bool holds, const std::string& text) {
    if (!holds) r.missed.push_back(text);
  };
  want(attention >= o.want_attention, fmt::format("attention is {:.1f}% correct, expected at least {:.1f}%", 100 * attention, 100 * o.want_attention));
  want(mixed >= attention - o.want_mixed_within,
       fmt::format("mixed is {:.1f} points below attention, expected at most {:.1f}", 100 * (attention - mixed), 100 * o.want_mixed_within));
  want(linear <= attention - o.want_linear_below,
       fmt::format("linear is {:.1f} points below attention, expected at least {:.1f}", 100 * (attention - linear), 100 * o.want_linear_below));
  want(r.mixed.attention_share < 0.1, fmt::format("mixed has {:.1f}% attention tokens, expected under 10%", 100 * r.mixed.attention_share));
}

}  // namespace

RecallDemoResult run_recall_demo(const RecallDemoOptions& o, const std::filesystem::path& model_folder) {
  const auto start = std::chrono::steady_clock::now();
  RecallDemoResult result;
  LanguageModel model(o.model());
  model.initialize(static_cast<uint64_t>(o.seed));
  model.requires_grad(true);
  train(o, model, result);
  model.requires_grad(false);
  if (!model_folder.empty()) save_model(model, model_folder);

  const int64_t tokens = o.task().tokens(), asked = 2 * o.queries;
  std::vector<int64_t> last;
  for (const int64_t n : {asked / 8, asked / 4, asked / 2, 3 * asked / 4, asked, 2 * asked, tokens / 2}) {
    if (n > 0 && n < tokens && (last.empty() || n > last.back())) last.push_back(n);
  }
  const std::vector<double> shares = {0.05, 0.1, 0.25, 0.5, 0.75};
  ProgressBar bar("evaluating", 3 + static_cast<int64_t>(last.size() + shares.size()), "schedules");
  int64_t done = 0;
  auto run = [&](const std::string& schedule) {
    RecallResult r = evaluate(o, model, schedule);
    bar.update(++done, schedule);
    return r;
  };
  result.linear = run("linear");
  result.attention = run("attention");
  result.mixed = run("queries");
  for (const int64_t n : last) result.by_last.push_back(run(fmt::format("linear,attention@-{}:", n)));
  for (const double share : shares) result.by_random.push_back(run(fmt::format("random(attention={};chunk=1)", share)));
  bar.finish();
  judge(o, result);
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

}  // namespace oryx
