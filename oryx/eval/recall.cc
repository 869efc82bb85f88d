#include "oryx/eval/recall.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <utility>

#include "oryx/common/error.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/random.h"
#include "oryx/data/packing.h"
#include "oryx/eval/likelihood.h"
#include "oryx/generate/facts.h"
#include "oryx/model/inspect.h"
#include "oryx/model/routed_cost.h"
#include "oryx/model/scheduling.h"

namespace oryx {

namespace {

constexpr const char* kQueries = "queries";

int32_t index_of(const std::vector<std::string>& names, const std::string& name) {
  return static_cast<int32_t>(std::find(names.begin(), names.end(), name) - names.begin());
}

// Attention at the query positions, mixer 0 elsewhere.
std::shared_ptr<const Routing> route_queries(const std::vector<std::string>& mixers, const RecallBatch& batch) {
  const int64_t B = batch.input_ids.size(0), T = batch.input_ids.size(1);
  const int32_t attention = index_of(mixers, "attention");
  const at::Tensor positions = batch.query_positions.contiguous();  // [B, Q] rising
  std::vector<RoutedSpan> spans;
  for (int64_t b = 0; b < B; ++b) {
    const auto row = static_cast<int32_t>(b);
    int32_t at = 0;
    for (int64_t i = 0; i < positions.size(1); ++i) {
      const int32_t p = positions.const_data_ptr<int32_t>()[b * positions.size(1) + i];
      if (p > at) spans.push_back({row, at, p, 0});
      spans.push_back({row, p, p + 1, attention});
      at = p + 1;
    }
    if (at < T) spans.push_back({row, at, static_cast<int32_t>(T), 0});
  }
  return std::make_shared<Routing>(B, T, mixers, std::move(spans));
}

// The parts of row b: "question" and "needle".
PromptParts recall_parts(const RecallBatch& batch, int64_t b) {
  const at::Tensor ids = batch.input_ids[b].contiguous(), queries = batch.query_positions[b].contiguous();
  const auto* id = ids.const_data_ptr<int64_t>();
  const auto* at = queries.const_data_ptr<int32_t>();
  std::vector<std::pair<int64_t, int64_t>> question, needle;
  for (int64_t i = 0; i < queries.numel(); ++i) {
    question.emplace_back(at[i], at[i] + 1);
    const auto* pair = std::find(id, id + at[0], id[at[i]]);
    if (pair != id + at[0]) needle.emplace_back(pair - id, pair - id + 2);
  }
  std::sort(needle.begin(), needle.end());
  needle.erase(std::unique(needle.begin(), needle.end()), needle.end());
  return {{"question", question}, {"needle", needle}};
}

bool keeps_all(const StateOptions& options) { return !options.drop_rows && !options.bound.on(); }

// Adds a batch's answers to `r`.
void score(const LanguageModel& model, const RecallBatch& batch, const Routings& routing, const StateOptions& options, RecallResult& r) {
  ModelInput input;
  input.input_ids = batch.input_ids;
  input.routing = routing;
  std::optional<State> state;
  if (!keeps_all(options)) input.state = &state.emplace(model.make_state(batch.input_ids.size(0), options));
  const at::Tensor at_queries = batch.query_positions.to(model.device(), at::kLong);                                       // [B, Q]
  const at::Tensor hidden = model.hidden(input);                                                           // [B, T, D]
  const at::Tensor wanted = hidden.gather(1, at_queries.unsqueeze(-1).expand({-1, -1, hidden.size(-1)}));  // [B, Q, D]
  const at::Tensor targets = batch.targets.to(model.device()).gather(1, at_queries);                                          // [B, Q]
  const at::Tensor log_p = model.logits(wanted).to(at::kFloat).log_softmax(-1);                            // [B, Q, V]
  const at::Tensor nll = -log_p.gather(-1, targets.unsqueeze(-1));
  const double sum = nll.sum(at::kDouble).item<double>();
  // A NaN among the logits spreads to the whole row's log-softmax.
  if (!std::isfinite(sum)) fail("recall: schedule '{}' gives logits that are not finite; the model's weights are damaged", r.schedule);
  if (state) r.state_bytes += state->bytes().total();
  r.nll_sum += sum;
  r.correct += log_p.argmax(-1).eq(targets).sum().item<int64_t>();
  r.queries += targets.numel();
}

}  // namespace

namespace {

// The batch in the evaluation's tokens, behind its bos.
RecallBatch recall_tokens(RecallBatch batch, const RecallEvaluation& e) {
  if (!e.symbols.empty()) {
    const at::Tensor tokens = at::tensor(std::vector<int64_t>(e.symbols.begin(), e.symbols.end()), at::kLong);
    batch.input_ids = tokens.index({batch.input_ids});
    batch.targets = at::where(batch.targets == kIgnoreTarget, batch.targets, tokens.index({batch.targets.clamp_min(0)}));
  }
  if (e.bos >= 0) {
    const std::vector<int64_t> column{batch.input_ids.size(0), 1};
    batch.input_ids = at::cat({at::full(column, e.bos, at::kLong), batch.input_ids}, 1);
    batch.targets = at::cat({at::full(column, kIgnoreTarget, at::kLong), batch.targets}, 1);
    batch.query_positions = batch.query_positions + 1;
  }
  return batch;
}

}  // namespace

std::vector<int32_t> word_symbols(const Tokenizer& tokenizer, int64_t count, uint64_t seed) {
  std::vector<int32_t> words;
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    const std::string text(tokenizer.token_bytes(id));
    const bool word = text.size() >= 4 && text[0] == ' ' && std::all_of(text.begin() + 1, text.end(), [](char c) { return c >= 'a' && c <= 'z'; });
    if (word && tokenizer.encode(text) == std::vector<int32_t>{id}) words.push_back(id);
  }
  if (static_cast<int64_t>(words.size()) < count) fail("recall: {} symbols want as many words, the tokeniser has {} that are one token", count, words.size());
  CounterRng rng(seed, 0);
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) std::swap(words[i], words[i + static_cast<size_t>(rng.below(words.size() - i))]);
  words.resize(static_cast<size_t>(count));
  return words;
}

struct RecallRouting::Parts {
  std::string text;
  std::vector<std::string> mixers;
  std::optional<ModelSchedule> schedule;  // absent: queries
};

RecallRouting::RecallRouting(const ModelConfig& config, const std::string& schedule) : parts_(std::make_unique<Parts>()) {
  parts_->text = schedule;
  parts_->mixers = config.mixers();
  if (schedule != kQueries) {
    parts_->schedule.emplace(config, schedule);
    parts_->text = parts_->schedule->text();
  } else if (index_of(parts_->mixers, "attention") == static_cast<int32_t>(parts_->mixers.size())) {
    fail("schedule 'queries' puts the queries into attention, but the model's mixers are {}", fmt::join(parts_->mixers, ", "));
  }
}

RecallRouting::~RecallRouting() = default;
RecallRouting::RecallRouting(RecallRouting&&) noexcept = default;

const std::string& RecallRouting::text() const { return parts_->text; }

double RecallRouting::first_pass_flops(const ModelConfig& config, int64_t length) const { return parts_->schedule ? oryx::first_pass_flops(config, *parts_->schedule, length) : 0; }

std::vector<std::shared_ptr<const TokenFacts>> RecallRouting::facts(const LanguageModel& model, const RecallBatch& batch) const {
  if (!parts_->schedule || parts_->schedule->needs().empty()) return {};
  const int64_t B = batch.input_ids.size(0), T = batch.input_ids.size(1);
  std::vector<int32_t> bounds;
  for (int64_t b = 0; b <= B; ++b) bounds.push_back(static_cast<int32_t>(b * T));
  const ReadFacts read(model, *parts_->schedule, batch.input_ids.reshape({1, B * T}), bounds, batch.targets.reshape({1, B * T}));
  std::vector<std::shared_ptr<const TokenFacts>> all;
  for (int64_t b = 0; b < B; ++b) all.push_back(read.of(b * T, (b + 1) * T, recall_parts(batch, b)));
  return all;
}

std::vector<std::shared_ptr<const Routing>> RecallRouting::route(const RecallBatch& batch, uint64_t seed, uint64_t step, uint64_t first_sequence,
                                                                 const std::vector<std::shared_ptr<const TokenFacts>>& facts) const {
  if (!parts_->schedule) return {route_queries(parts_->mixers, batch)};
  const int64_t B = batch.input_ids.size(0), T = batch.input_ids.size(1);
  ModeContext context;
  context.prompt_length = T;
  context.seed = seed;
  context.step = step;
  context.sequence = first_sequence;
  std::vector<ModePiece> pieces = row_pieces(B, T, context);
  for (size_t b = 0; b < facts.size(); ++b) pieces[b].context.facts = facts[b];
  return parts_->schedule->route(pieces, B, T);
}

void check_recall(const ModelConfig& config, const RecallOptions& task) {
  check(task);
  if (task.vocab_size() > config.vocab_size) {
    fail("recall: {} key, {} value and {} filler symbols need a vocabulary of {}, the model's is {}", task.key_symbols, task.value_symbols,
         task.filler_symbols, task.vocab_size(), config.vocab_size);
  }
}

RecallResult evaluate_recall(const LanguageModel& model, const RecallOptions& task, const RecallEvaluation& e) {
  if (e.symbols.empty()) check_recall(model.config(), task);
  TORCH_CHECK(e.symbols.empty() || static_cast<int64_t>(e.symbols.size()) >= task.vocab_size(), "recall: ", e.symbols.size(), " tokens for ", task.vocab_size(), " symbols");
  if (e.examples < 1 || e.batch_size < 1) fail("recall: {} examples, {} at a time, expected at least one of each", e.examples, e.batch_size);
  at::NoGradGuard no_grad;
  const auto start = std::chrono::steady_clock::now();
  const RecallRouting modes(model.config(), e.schedule);
  e.state.validate();
  RecallResult r;
  r.schedule = modes.text();
  double attention = 0, flops = 0;
  for (int64_t done = 0; done < e.examples;) {
    check_interrupt();
    const int64_t B = std::min(e.batch_size, e.examples - done);
    const uint64_t first = e.first_index + static_cast<uint64_t>(done);
    const RecallBatch batch = recall_tokens(recall_batch(task, e.seed, first, B), e);
    const Routings routing = modes.route(batch, e.seed, 0, first, modes.facts(model, batch));
    score(model, batch, routing, e.state, r);
    attention += oryx::attention_share(model.config(), routing) * static_cast<double>(B);
    flops += routed_flops(model.config(), routing) - saved_flops(model.config(), routing, e.state);
    flops += static_cast<double>(B) * modes.first_pass_flops(model.config(), batch.input_ids.size(1));
    done += B;
    if (e.progress) e.progress(done, r.accuracy());
  }
  r.attention_share = attention / static_cast<double>(e.examples);
  const int64_t tokens = task.tokens() + (e.bos >= 0 ? 1 : 0);
  r.flops_per_token = flops / static_cast<double>(e.examples * tokens);
  if (keeps_all(e.state)) {
    r.state_bytes = state_bytes(model.config(), tokens, model.compute_dtype()).total();
  } else {
    r.state_bytes /= e.examples;  // as measured
  }
  r.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return r;
}

}  // namespace oryx
