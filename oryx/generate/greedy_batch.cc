#include "oryx/generate/greedy_batch.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "oryx/common/error.h"
#include "oryx/common/interrupt.h"
#include "oryx/generate/routed_text.h"

namespace oryx {

namespace {

class GreedyBatch {
 public:
  GreedyBatch(const LanguageModel& model, const ModelSchedule& schedule, const std::vector<BatchPrompt>& prompts, const GreedyBatchOptions& options)
      : model_(model), schedule_(schedule), prompts_(prompts), options_(options), state_(model.make_state(static_cast<int64_t>(prompts.size()), options.state)) {
    check_heads(model, schedule);
    int64_t longest = 0;
    for (const auto& p : prompts) longest = std::max(longest, static_cast<int64_t>(p.ids.size()));
    state_.reserve(longest + options.max_new_tokens);
    for (size_t i = 0; i < prompts.size(); ++i) {
      running_.push_back(i);
      routed_.emplace_back(model, schedule, prompts[i].facts);
      routed_.back().begin_prompt(static_cast<int64_t>(prompts[i].ids.size()));
    }
  }

  // -> the first new token of each prompt
  std::vector<int32_t> read() {
    ModelInput input;
    std::vector<int64_t> ids, last;
    std::vector<int32_t> bounds{0};
    std::vector<ModePiece> pieces;
    for (size_t i = 0; i < prompts_.size(); ++i) {
      const auto count = static_cast<int64_t>(prompts_[i].ids.size());
      routed_[i].before(prompts_[i].ids);
      pieces.push_back(piece(i, 0, static_cast<int64_t>(ids.size()), 0, count));
      ids.insert(ids.end(), prompts_[i].ids.begin(), prompts_[i].ids.end());
      bounds.push_back(static_cast<int32_t>(ids.size()));
      last.push_back(static_cast<int64_t>(ids.size()) - 1);
    }
    const auto T = static_cast<int64_t>(ids.size());
    input.input_ids = at::tensor(ids, at::kLong).view({1, T});
    if (prompts_.size() > 1) input.cu_seqlens = at::tensor(bounds, at::kInt);
    input.routing = schedule_.route(pieces, 1, T);
    return ran(run(input)[0].index_select(0, at::tensor(last, at::kLong).to(model_.device())));
  }

  // The prompts that the state still holds, in its order.
  const std::vector<size_t>& running() const { return running_; }

  // Goes on with these of running(), by their places in it.
  void keep(const std::vector<int64_t>& places) {
    state_ = state_.fork(places);
    std::vector<size_t> kept;
    for (const int64_t p : places) kept.push_back(running_[static_cast<size_t>(p)]);
    running_ = std::move(kept);
  }

  // One token more of each that runs.
  std::vector<int32_t> step(const std::vector<int32_t>& ids) {
    const auto N = static_cast<int64_t>(ids.size());
    std::vector<ModePiece> pieces;
    for (size_t i = 0; i < ids.size(); ++i) routed_[running_[i]].before({&ids[i], 1});
    for (size_t i = 0; i < ids.size(); ++i) pieces.push_back(piece(running_[i], static_cast<int64_t>(i), 0, state_.lengths()[i], 1));
    ModelInput input;
    input.input_ids = at::tensor(std::vector<int64_t>(ids.begin(), ids.end()), at::kLong).view({N, 1});
    input.routing = schedule_.route(pieces, N, 1);
    return ran(run(input).select(1, 0));
  }

 private:
  ModePiece piece(size_t i, int64_t row, int64_t column, int64_t start, int64_t length) const {
    ModePiece p{.row = row, .column = column, .length = length, .start = start, .context = {}};
    p.context.prompt_length = static_cast<int64_t>(prompts_[i].ids.size());
    p.context.seed = options_.seed;
    p.context.sequence = i;
    p.context.facts = routed_[i].facts();
    return p;
  }

  at::Tensor run(ModelInput& input) {
    input.state = &state_;
    return model_.hidden(input);
  }

  // The hidden states [N, D] after the last token of each that runs -> its next token.
  std::vector<int32_t> ran(const at::Tensor& hidden) {
    for (size_t k = 0; k < running_.size(); ++k) routed_[running_[k]].after(hidden[static_cast<int64_t>(k)]);
    return likeliest(hidden);
  }

  std::vector<int32_t> likeliest(const at::Tensor& hidden) const {  // [N, D]
    at::Tensor logits = model_.logits(hidden).to(at::kFloat);
    if (options_.vocab_size > 0) logits = logits.narrow(1, 0, options_.vocab_size);
    // A NaN is the largest there is to max().
    const auto [most, at] = logits.max(1);
    if (!at::isfinite(most).all().item<bool>()) fail("schedule '{}' gives logits that are not finite; the model's weights are damaged", schedule_.text());
    const at::Tensor ids = at.to(at::kInt).cpu().contiguous();
    return {ids.const_data_ptr<int32_t>(), ids.const_data_ptr<int32_t>() + ids.numel()};
  }

  const LanguageModel& model_;
  const ModelSchedule& schedule_;
  const std::vector<BatchPrompt>& prompts_;
  const GreedyBatchOptions& options_;
  State state_;
  std::vector<size_t> running_;
  std::vector<RoutedText> routed_;  // of each prompt
};

}  // namespace

void generate_greedily(const LanguageModel& model, const ModelSchedule& schedule, const std::vector<BatchPrompt>& prompts, const GreedyBatchOptions& options,
                       const std::function<bool(size_t prompt, int32_t id)>& on_token) {
  TORCH_CHECK(!prompts.empty() && options.max_new_tokens > 0, "greedy: ", prompts.size(), " prompts, ", options.max_new_tokens, " new tokens");
  const at::NoGradGuard no_grad;
  GreedyBatch batch(model, schedule, prompts, options);
  std::vector<char> open(prompts.size(), 1);
  std::vector<int32_t> next = batch.read();
  for (int64_t n = 1;; ++n) {
    check_interrupt();
    std::vector<int64_t> left;
    for (size_t k = 0; k < next.size(); ++k) {
      const size_t i = batch.running()[k];
      if (open[i]) open[i] = on_token(i, next[k]);
      if (open[i]) left.push_back(static_cast<int64_t>(k));
    }
    if (n == options.max_new_tokens || left.empty()) return;
    // What is done runs along, unlooked at, until half of the batch is: leaving it out costs a copy.
    if (2 * left.size() <= next.size()) {
      std::vector<int32_t> ids;
      for (const int64_t k : left) ids.push_back(next[static_cast<size_t>(k)]);
      batch.keep(left);
      next = std::move(ids);
    }
    next = batch.step(next);
  }
}

}  // namespace oryx
