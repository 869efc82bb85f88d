#include "oryx/eval/likelihood.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "oryx/common/error.h"
#include "oryx/common/interrupt.h"
#include "oryx/generate/facts.h"
#include "oryx/model/inspect.h"
#include "oryx/model/routed_cost.h"

namespace oryx {

TokenPair encode_pair(const Tokenizer& tokenizer, std::string context, std::string continuation) {
  // Python's str.rstrip: the white space of ASCII is what texts here end in.
  const size_t end = context.find_last_not_of(" \t\n\r\f\v");
  const size_t kept = end == std::string::npos ? 0 : end + 1;
  continuation.insert(0, context, kept);
  context.resize(kept);
  std::vector<int32_t> whole = tokenizer.encode(context + continuation);
  const size_t head = context.empty() ? 0 : std::min(whole.size(), tokenizer.encode(context).size());
  TokenPair pair;
  pair.context.push_back(tokenizer.bos_id());
  pair.context.insert(pair.context.end(), whole.begin(), whole.begin() + static_cast<int64_t>(head));
  pair.continuation.assign(whole.begin() + static_cast<int64_t>(head), whole.end());
  if (pair.continuation.empty()) fail("nothing is left to score of '{}' behind its context: the tokeniser joins the two", continuation);
  return pair;
}

double saved_flops(const ModelConfig& config, const std::vector<std::shared_ptr<const Routing>>& routing, const StateOptions& options) {
  if (!options.bound.on()) return 0;
  const int64_t all_seen = options.bound.first + options.bound.window;
  double flops = 0;
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const auto& names = config.mixers_of(i);
    const Routing& r = *routing[routing.size() == 1 ? 0 : static_cast<size_t>(i)];
    for (size_t m = 0; m < names.size(); ++m) {
      const auto mixer = make_mixer(names[m], config.layer_of(names));
      if (mixer->predicts_values() && options.kept.measure() != TokenMeasure::kNone) {
        const MixerFlops readout = mixer->flops(1);
        flops -= (readout.every_token + readout.in_mode) * static_cast<double>(r.rows() * r.length());
      }
      if (!mixer->keeps_tokens()) continue;
      for (const RoutedSpan& span : r.spans()) {
        const std::string& mode = r.mixers()[static_cast<size_t>(span.mixer)];
        const auto at = std::find(names.begin(), names.end(), mode);
        const auto mine = at == names.end() ? size_t{0} : static_cast<size_t>(at - names.begin());
        if (mine != m && config.layer.combine != "mean") continue;
        for (int64_t t = std::max<int64_t>(span.begin, all_seen); t < span.end; ++t) flops += mixer->flops(t + 1).in_mode - mixer->flops(options.seen(t + 1)).in_mode;
      }
    }
  }
  return flops;
}

void EvalCost::add(const LanguageModel& model, const std::vector<std::shared_ptr<const Routing>>& routing, int64_t count, const StateOptions& options,
                   double more_flops) {
  const ModelConfig& config = model.config();
  const auto weight = static_cast<double>(count);
  const auto mean = [](double& value, double before, double more, double total) { value = (value * before + more) / total; };
  const auto held = static_cast<double>(tokens);
  mean(attention_share, held, oryx::attention_share(config, routing) * weight, held + weight);
  mean(flops_per_token, held, routed_flops(config, routing) - saved_flops(config, routing, options) + more_flops, held + weight);
  mean(state_bytes, static_cast<double>(sequences), static_cast<double>(oryx::state_bytes(config, count, model.compute_dtype(), options).total()),
       static_cast<double>(sequences + 1));
  ++sequences;
  tokens += count;
}

namespace {

// Pairs [first, last) in one packed row.
void score_batch(const LanguageModel& model, const ModelSchedule& schedule, const std::vector<TokenPair>& pairs, size_t first, size_t last,
                 const LikelihoodOptions& o, EvalCost& cost, std::vector<Likelihood>& out) {
  std::vector<int64_t> ids, wanted, targets;
  std::vector<int32_t> bounds{0};
  std::vector<ModePiece> pieces;
  for (size_t i = first; i < last; ++i) {
    const TokenPair& p = pairs[i];
    const auto column = static_cast<int64_t>(ids.size()), head = static_cast<int64_t>(p.context.size());
    ids.insert(ids.end(), p.context.begin(), p.context.end());
    ids.insert(ids.end(), p.continuation.begin(), p.continuation.end() - 1);  // the last token predicts nothing that is scored
    for (size_t k = 0; k < p.continuation.size(); ++k) wanted.push_back(column + head - 1 + static_cast<int64_t>(k));
    targets.insert(targets.end(), p.continuation.begin(), p.continuation.end());
    bounds.push_back(static_cast<int32_t>(ids.size()));
    ModePiece piece{.row = 0, .column = column, .length = static_cast<int64_t>(ids.size()) - column, .start = 0, .context = {}};
    piece.context.prompt_length = head;
    piece.context.seed = o.seed;
    piece.context.sequence = o.first + i;
    piece.context.facts = p.facts;
    pieces.push_back(piece);
    ModePiece alone = piece;
    alone.column = 0;
    cost.add(model, schedule.route({alone}, 1, alone.length), alone.length, o.state, first_pass_flops(model.config(), schedule, head));
  }
  const auto T = static_cast<int64_t>(ids.size());
  ModelInput input;
  input.input_ids = at::tensor(ids, at::kLong).view({1, T});
  if (pieces.size() > 1) input.cu_seqlens = at::tensor(bounds, at::kInt);
  input.routing = schedule.route(pieces, 1, T);
  std::optional<State> state;
  if (kv_text(o.state) != "keep") input.state = &state.emplace(model.make_state(static_cast<int64_t>(pieces.size()), o.state));
  const at::Tensor hidden = model.hidden(input)[0].index_select(0, at::tensor(wanted, at::kLong).to(model.device()));  // [W, D]
  // Logits never stand for all tokens at once.
  constexpr int64_t kRows = 1024;
  std::vector<double> log_p;
  std::vector<bool> greedy;
  const at::Tensor all = at::tensor(targets, at::kLong).to(model.device());
  for (int64_t begin = 0; begin < hidden.size(0); begin += kRows) {
    const int64_t n = std::min(kRows, hidden.size(0) - begin);
    const at::Tensor rows = model.logits(hidden.narrow(0, begin, n)).to(at::kFloat).log_softmax(-1), target = all.narrow(0, begin, n);  // [n, V]
    const at::Tensor p = rows.gather(1, target.unsqueeze(1)).squeeze(1).to(at::kDouble).cpu(), hit = rows.argmax(-1).eq(target).cpu();
    for (int64_t i = 0; i < n; ++i) {
      log_p.push_back(p[i].item<double>());
      greedy.push_back(hit[i].item<bool>());
    }
  }
  size_t at = 0;
  for (size_t i = first; i < last; ++i) {
    Likelihood l{0, true};
    for (size_t k = 0; k < pairs[i].continuation.size(); ++k, ++at) {
      l.log_p += log_p[at];
      l.greedy = l.greedy && greedy[at];
    }
    if (!std::isfinite(l.log_p)) fail("schedule '{}': the log-likelihood of example {} is {}; the model's weights are damaged or overflow", schedule.text(), o.first + i, l.log_p);
    out.push_back(l);
  }
}

}  // namespace

std::vector<Likelihood> score_pairs(const LanguageModel& model, const ModelSchedule& schedule, const std::vector<TokenPair>& pairs,
                                    const LikelihoodOptions& o, EvalCost& cost) {
  const at::NoGradGuard no_grad;
  TORCH_CHECK(!o.state.drop_rows, "likelihood: a sequence that is read in one call looks at rows before they are dropped");
  std::vector<Likelihood> out;
  for (size_t first = 0; first < pairs.size();) {
    check_interrupt();
    size_t last = first;
    int64_t tokens = 0;
    const auto size = [&](size_t i) { return static_cast<int64_t>(pairs[i].context.size() + pairs[i].continuation.size()) - 1; };
    while (last < pairs.size() && (last == first || tokens + size(last) <= o.batch_tokens)) tokens += size(last++);
    score_batch(model, schedule, pairs, first, last, o, cost, out);
    first = last;
    if (o.progress) o.progress(static_cast<int64_t>(first));
  }
  return out;
}

Spread spread_of(const std::vector<double>& values) {
  TORCH_CHECK(!values.empty(), "eval: no values");
  const auto n = static_cast<double>(values.size());
  Spread s;
  s.mean = std::accumulate(values.begin(), values.end(), 0.0) / n;
  double squares = 0;
  for (const double v : values) squares += (v - s.mean) * (v - s.mean);
  s.stderr_of_mean = values.size() > 1 ? std::sqrt(squares / (n - 1)) / std::sqrt(n) : 0;
  return s;
}

}  // namespace oryx
