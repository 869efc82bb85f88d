#include "oryx/router/features.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>

#include "oryx/common/error.h"
#include "oryx/common/hash.h"
#include "oryx/common/options.h"
#include "oryx/common/utf8.h"
#include "oryx/model/scheduling.h"

namespace oryx {

namespace {

const at::Tensor& output_rows(const LanguageModel& model) { return model.parameter(model.config().tie_word_embeddings ? "embed.weight" : "lm_head.weight"); }

at::Tensor rows_of(const at::Tensor& table, const at::Tensor& ids) { return table.detach().index_select(0, ids.to(table.device())).to(at::kCPU, at::kFloat); }

float log_distance(int64_t distance) { return std::log1p(static_cast<float>(distance)); }

// What stands before a text's next tokens: what was before them (-1: nothing), and its hidden state [D] (undefined where it is not read, or there is none).
struct TokensBefore {
  int64_t id = -1;
  at::Tensor hidden;
};

// Rows of features [n, F] of a text's next tokens, n = ids.size(); hidden [n - 1, D] or more: their own hidden states (undefined where they are not read).
void fill_features(const LanguageModel& model, bool reads_hidden, std::span<const int64_t> ids, const TokensBefore& before, const at::Tensor& hidden, TokenHistory& history,
                   at::Tensor x) {
  const auto n = static_cast<int64_t>(ids.size()), D = model.config().layer.hidden_size, F = x.size(1);
  const at::Tensor& table = model.parameter("embed.weight");
  const at::Tensor all = at::tensor(std::vector<int64_t>(ids.begin(), ids.end()), at::kLong), embedded = rows_of(table, all);  // [n, D]
  x.narrow(1, D, D).copy_(embedded);
  at::Tensor past = x.narrow(1, 0, D);
  if (before.id < 0) {
    past.select(0, 0).zero_();
  } else if (reads_hidden) {
    past.select(0, 0).copy_(before.hidden.detach().to(at::kCPU, at::kFloat));
  } else {
    past.select(0, 0).copy_(rows_of(table, at::tensor({before.id}, at::kLong))[0]);
  }
  if (n > 1) past.narrow(0, 1, n - 1).copy_(reads_hidden ? hidden.detach().narrow(0, 0, n - 1).to(at::kCPU, at::kFloat) : embedded.narrow(0, 0, n - 1));
  const bool tied = model.config().tie_word_embeddings;
  const at::Tensor rows = !reads_hidden ? at::Tensor() : tied ? embedded : rows_of(output_rows(model), all);
  float* values = x.mutable_data_ptr<float>();
  const float* outputs = reads_hidden ? rows.const_data_ptr<float>() : nullptr;
  for (int64_t t = 0; t < n; ++t) {
    float* row = values + t * F;
    history.next(ids[static_cast<size_t>(t)], row + 2 * D);
    const bool has_logit = reads_hidden && (t > 0 || before.id >= 0);
    row[F - 1] = has_logit ? static_cast<float>(static_cast<double>(ordered_dot(row, outputs + t * D, D)) / model.config().logits_scaling) : 0.0F;
  }
}

constexpr int64_t kFeaturesAtOnce = 1024;  // rows, which bounds the memory of a long prompt

}  // namespace

std::string router_identity(const LanguageModel& model) {
  constexpr int64_t kValues = 64;  // of each weight
  const at::NoGradGuard no_grad;
  uint64_t hash = fnv1a(dump_options(model.config()));
  std::vector<at::Tensor> taken;
  for (const auto& p : model.parameters()) {
    const int64_t n = p.numel(), step = std::max<int64_t>(1, n / kValues);
    taken.push_back(p.detach().reshape({-1}).slice(0, 0, n, step));
  }
  const at::Tensor all = at::cat(taken).to(at::kCPU, at::kFloat).contiguous();
  return fmt::format("{:016x}", fnv1a(all.const_data_ptr(), all.nbytes(), hash));
}

void check_head(const ModelConfig& config, const std::string& identity, const GainHead& head, const std::string& file) {
  if (head.model != identity) fail("{}: was trained for the model {}, this one is {}; train one for it: oryx router train", file, shown(head.model), identity);
  const int64_t F = 2 * config.layer.hidden_size + TokenHistory::kScalars;
  if (head.features() != F) fail("{}: reads {} features, this model has {}; the file is damaged", file, head.features(), F);
}

void check_head(const LanguageModel& model, const GainHead& head, const std::string& file) { check_head(model.config(), router_identity(model), head, file); }

void check_heads(const LanguageModel& model, const ModelSchedule& schedule) {
  const auto heads = schedule.gain_heads();
  const std::string identity = heads.empty() ? "" : router_identity(model);
  for (const auto& [need, head] : heads) check_head(model.config(), identity, *head, need.substr(need.find(':') + 1));
}

void TokenHistory::next(int64_t id, float* out) {
  const auto pair = (static_cast<uint64_t>(before_) << 32) ^ static_cast<uint64_t>(id);
  const auto triple = (static_cast<uint64_t>(before_that_) << 42) ^ (static_cast<uint64_t>(before_) << 21) ^ static_cast<uint64_t>(id);
  Seen& seen = tokens_[id];
  const auto pair_at = length_ >= 1 ? pairs_.find(pair) : pairs_.end();
  const auto triple_at = length_ >= 2 ? triples_.find(triple) : triples_.end();
  out[0] = log_distance(length_);
  out[1] = seen.count > 0 ? 1.0F : 0.0F;
  out[2] = log_distance(seen.count);
  out[3] = seen.count > 0 ? log_distance(length_ - seen.last) : 0.0F;
  out[4] = pair_at != pairs_.end() ? 1.0F : 0.0F;
  out[5] = pair_at != pairs_.end() ? log_distance(length_ - pair_at->second) : 0.0F;
  out[6] = triple_at != triples_.end() ? 1.0F : 0.0F;
  ++seen.count;
  seen.last = length_;
  if (length_ >= 1) pairs_[pair] = length_;
  if (length_ >= 2) triples_[triple] = length_;
  before_that_ = before_;
  before_ = id;
  ++length_;
}

at::Tensor router_features(const LanguageModel& model, bool reads_hidden, std::span<const int64_t> ids, std::span<const int32_t> bounds, const at::Tensor& hidden) {
  const at::NoGradGuard no_grad;
  const auto T = static_cast<int64_t>(ids.size()), D = model.config().layer.hidden_size;
  TORCH_CHECK(bounds.size() >= 2 && bounds.front() == 0 && bounds.back() == T, "router: bounds of ", T, " tokens");
  at::Tensor x = at::zeros({T, 2 * D + TokenHistory::kScalars}, at::kFloat);
  for (size_t n = 0; n + 1 < bounds.size(); ++n) {
    const int64_t begin = bounds[n], count = bounds[n + 1] - begin;
    if (count == 0) continue;
    TokenHistory history;
    fill_features(model, reads_hidden, ids.subspan(static_cast<size_t>(begin), static_cast<size_t>(count)), {}, reads_hidden ? hidden.narrow(0, begin, count) : hidden, history,
                  x.narrow(0, begin, count));
  }
  return x;
}

std::vector<float> router_gains(const LanguageModel& model, std::shared_ptr<const GainHead> head, const at::Tensor& input_ids, std::span<const int32_t> bounds) {
  const at::NoGradGuard no_grad;
  TORCH_CHECK(input_ids.dim() == 2 && input_ids.size(0) == 1, "router: ids ", input_ids.sizes(), ", expected [1, T]");
  const int64_t T = input_ids.size(1);
  at::Tensor hidden;
  if (head->reads_hidden) {
    ModelInput input;
    input.input_ids = input_ids;
    if (bounds.size() > 2) input.cu_seqlens = at::tensor(std::vector<int32_t>(bounds.begin(), bounds.end()), at::kInt);
    ModePiece piece{.row = 0, .column = 0, .length = T, .start = 0, .context = {}};
    piece.context.prompt_length = T;
    input.routing = ModelSchedule(model.config(), "linear").route({piece}, 1, T);
    hidden = model.hidden(input)[0];
  }
  const at::Tensor ids = input_ids.reshape({-1}).to(at::kCPU, at::kInt).contiguous();
  std::vector<float> out;
  for (size_t n = 0; n + 1 < bounds.size(); ++n) {
    const int64_t begin = bounds[n], count = bounds[n + 1] - begin;
    if (count == 0) continue;
    const auto gains = GainReader(model, head).next({ids.const_data_ptr<int32_t>() + begin, static_cast<size_t>(count)}, {}, hidden.defined() ? hidden.narrow(0, begin, count) : hidden);
    out.insert(out.end(), gains.begin(), gains.end());
  }
  return out;
}

void GainReader::pass(std::span<const int32_t> ids) {
  float unused[TokenHistory::kScalars];
  for (const int32_t id : ids) history_.next(id, unused);
  if (!ids.empty()) before_ = ids.back();
  seen_ += static_cast<int64_t>(ids.size());
}

std::vector<float> GainReader::next(std::span<const int32_t> ids, const at::Tensor& previous, const at::Tensor& hidden) {
  const at::NoGradGuard no_grad;
  const auto n = static_cast<int64_t>(ids.size()), D = model_.config().layer.hidden_size;
  TORCH_CHECK(!head_->reads_hidden || ((before_ < 0 || previous.defined()) && (n <= 1 || hidden.defined())), "router: the hidden state of the token before is not known");
  std::vector<float> out;
  at::Tensor last = previous;
  for (int64_t begin = 0; begin < n; begin += kFeaturesAtOnce) {
    const int64_t count = std::min(kFeaturesAtOnce, n - begin);
    const std::vector<int64_t> own(ids.begin() + begin, ids.begin() + begin + count);
    at::Tensor x = at::empty({count, 2 * D + TokenHistory::kScalars}, at::kFloat);
    fill_features(model_, head_->reads_hidden, own, {before_, last}, hidden.defined() && count > 1 ? hidden.narrow(0, begin, count - 1) : hidden, history_, x);
    const at::Tensor gains = head_->predict(x);
    for (int64_t t = 0; t < count; ++t) {
      const float gain = gains.const_data_ptr<float>()[t];
      if (!std::isfinite(gain)) fail("the gain predicted for token {} is {}; the model's weights are damaged or overflow", seen_ + t, gain);
      out.push_back(gain);
    }
    if (head_->reads_hidden && begin + count < n) last = hidden[begin + count - 1];
    before_ = static_cast<int32_t>(own.back());
    seen_ += count;
  }
  return out;
}

}  // namespace oryx
