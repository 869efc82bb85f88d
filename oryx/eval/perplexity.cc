#include "oryx/eval/perplexity.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <map>
#include <numbers>
#include <optional>
#include <utility>
#include <vector>

#include "oryx/common/error.h"
#include "oryx/common/interrupt.h"
#include "oryx/model/inspect.h"
#include "oryx/eval/likelihood.h"
#include "oryx/generate/facts.h"
#include "oryx/model/routed_cost.h"

namespace oryx {

namespace {

// Each window is a document that is wholly prompt. Window i of the reader is sequence i: random draws do not depend on the packing.
ModePiece window_piece(int64_t column, int64_t length, int64_t window, const PerplexityOptions& o) {
  ModePiece p{.row = 0, .column = column, .length = length, .start = 0, .context = {}};
  p.context.prompt_length = length;
  p.context.seed = o.seed;
  p.context.step = o.step;
  p.context.sequence = static_cast<uint64_t>(window);
  return p;
}

// The scores of each window of a batch, where the schedule asks for them.
class WindowFacts {
 public:
  WindowFacts(const LanguageModel& model, const ModelSchedule& schedule, const EvalBatch& batch)
      : batch_(batch), read_(model, schedule, batch.input_ids, batch.bounds, batch.targets) {}
  std::shared_ptr<const TokenFacts> of(size_t window) const { return read_.of(batch_.bounds[window], batch_.bounds[window + 1]); }

 private:
  const EvalBatch& batch_;
  ReadFacts read_;
};

// What windows cost, by length where the schedule gives the same spans every time.
class CostMeter {
 public:
  CostMeter(const ModelConfig& config, const ModelSchedule& schedule, const PerplexityOptions& options)
      : config_(config), schedule_(schedule), options_(options) {}

  void add(int64_t length, int64_t window, const std::shared_ptr<const TokenFacts>& facts) {
    const Cost cost = schedule_.is_random() ? measure(length, window, facts) : cached(length, window, facts);
    const auto tokens = static_cast<double>(length);
    attention_ += cost.attention * tokens;
    flops_ += cost.flops;
    tokens_ += tokens;
  }
  double attention_share() const { return attention_ / tokens_; }
  double flops_per_token() const { return flops_ / tokens_; }

 private:
  struct Cost {
    double attention, flops;
  };
  Cost measure(int64_t length, int64_t window, const std::shared_ptr<const TokenFacts>& facts) const {
    ModePiece piece = window_piece(0, length, window, options_);
    piece.context.facts = facts;
    const Routings routings = schedule_.route({piece}, 1, length);
    const double flops = options_.count_flops ? routed_flops(config_, routings) - saved_flops(config_, routings, options_.state) + first_pass_flops(config_, schedule_, length) : 0;
    return {oryx::attention_share(config_, routings), flops};
  }
  const Cost& cached(int64_t length, int64_t window, const std::shared_ptr<const TokenFacts>& facts) {
    auto it = by_length_.find(length);
    if (it == by_length_.end()) it = by_length_.emplace(length, measure(length, window, facts)).first;
    return it->second;
  }

  const ModelConfig& config_;
  const ModelSchedule& schedule_;
  const PerplexityOptions& options_;
  std::map<int64_t, Cost> by_length_;
  double attention_ = 0, flops_ = 0, tokens_ = 0;
};

class ByteCounter {
 public:
  explicit ByteCounter(const Tokenizer* tokenizer) {
    if (tokenizer == nullptr) return;
    space_ = tokenizer->leading_space();
    for (int64_t i = 0; i < tokenizer->vocab_size(); ++i) {
      sizes_.push_back(static_cast<int64_t>(tokenizer->token_bytes(static_cast<int32_t>(i)).size()));
    }
  }

  int64_t count(const EvalBatch& batch) const {
    if (sizes_.empty()) return 0;
    const at::Tensor targets = batch.targets.contiguous();
    const int64_t* t = targets.const_data_ptr<int64_t>();
    int64_t bytes = 0;
    for (int64_t i = 0; i < targets.numel(); ++i) {
      if (t[i] == kIgnoreTarget) continue;
      if (t[i] >= static_cast<int64_t>(sizes_.size())) {
        fail("the data holds token {}, the tokeniser has {}; do they belong together?", t[i], sizes_.size());
      }
      bytes += sizes_[static_cast<size_t>(t[i])];
    }
    if (!space_) return bytes;
    // The space that a document's first token brings is not in the text.
    return bytes - std::count_if(batch.windows.begin(), batch.windows.end(), [](const EvalWindow& w) { return w.begin == 0; });
  }

 private:
  bool space_ = false;
  std::vector<int64_t> sizes_;
};

// Sum of the batch's losses, in nats.
double score(const LanguageModel& model, const ModelSchedule& schedule, const EvalBatch& batch, const WindowFacts& facts, int64_t first_window,
             const PerplexityOptions& o) {
  std::vector<ModePiece> pieces;
  for (size_t i = 0; i + 1 < batch.bounds.size(); ++i) {
    pieces.push_back(window_piece(batch.bounds[i], batch.bounds[i + 1] - batch.bounds[i], first_window + static_cast<int64_t>(i), o));
    pieces.back().context.facts = facts.of(i);
  }
  ModelInput input;
  input.input_ids = batch.input_ids;
  input.routing = schedule.route(pieces, 1, batch.input_ids.size(1));
  if (pieces.size() > 1) input.cu_seqlens = batch.cu_seqlens;
  std::optional<State> state;
  if (o.state.bound.on() || o.state.drop_rows) input.state = &state.emplace(model.make_state(static_cast<int64_t>(pieces.size()), o.state));
  const double sum = model.loss(model.hidden(input), batch.targets).nll.sum(at::kDouble).item<double>();
  if (!std::isfinite(sum)) {
    fail("schedule '{}': the loss is {} in the window that begins at token {} of document {}; the model's weights are damaged or overflow",
         schedule.text(), sum, batch.windows.front().begin, batch.windows.front().document);
  }
  return sum;
}

}  // namespace

double PerplexityResult::perplexity() const { return std::exp(nats()); }

std::optional<double> PerplexityResult::bits_per_byte() const {
  if (text_bytes == 0) return std::nullopt;
  return nll_sum / (static_cast<double>(text_bytes) * std::numbers::ln2);
}

PerplexityResult evaluate_perplexity(const LanguageModel& model, const ModelSchedule& schedule, EvalReader& reader, const PerplexityOptions& options) {
  at::NoGradGuard no_grad;
  const auto start = std::chrono::steady_clock::now();
  const ByteCounter bytes(options.tokenizer);
  CostMeter cost(model.config(), schedule, options);
  PerplexityResult r;
  r.schedule = schedule.text();
  reader.rewind();
  while (const auto batch = reader.next()) {
    check_interrupt();
    const WindowFacts facts(model, schedule, *batch);
    r.nll_sum += score(model, schedule, *batch, facts, r.windows, options);
    r.targets += batch->kept_targets;
    r.text_bytes += bytes.count(*batch);
    for (size_t i = 0; i + 1 < batch->bounds.size(); ++i) {
      const int64_t length = batch->bounds[i + 1] - batch->bounds[i];
      cost.add(length, r.windows++, facts.of(i));
      r.longest = std::max(r.longest, length);
    }
    if (options.progress) options.progress(r.targets, r.nats());
  }
  TORCH_CHECK(r.targets > 0, "perplexity: the reader gave no target");
  r.attention_share = cost.attention_share();
  r.flops_per_token = cost.flops_per_token();
  r.state_bytes = state_bytes(model.config(), r.longest, model.compute_dtype(), options.state).total();
  r.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return r;
}

}  // namespace oryx
