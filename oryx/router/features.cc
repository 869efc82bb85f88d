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

// Logits [N] of tokens [N] under hidden states [N, D].
at::Tensor logits_of(const LanguageModel& model, const at::Tensor& hidden, const at::Tensor& ids) {
  return (hidden * rows_of(output_rows(model), ids)).sum(1) / model.config().logits_scaling;
}

float log_distance(int64_t distance) { return std::log1p(static_cast<float>(distance)); }

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

void check_head(const LanguageModel& model, const GainHead& head, const std::string& file) {
  const std::string own = router_identity(model);
  if (head.model != own) fail("{}: was trained for the model {}, this one is {}; train one for it: oryx router train", file, shown(head.model), own);
  const int64_t F = 2 * model.config().layer.hidden_size + TokenHistory::kScalars;
  if (head.features() != F) fail("{}: reads {} features, this model has {}; the file is damaged", file, head.features(), F);
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
  const at::Tensor all = at::tensor(std::vector<int64_t>(ids.begin(), ids.end()), at::kLong);
  const at::Tensor embedded = rows_of(model.parameter("embed.weight"), all);  // [T, D]
  at::Tensor x = at::zeros({T, 2 * D + TokenHistory::kScalars}, at::kFloat);
  x.narrow(1, D, D).copy_(embedded);
  if (T > 1) {
    const at::Tensor before = reads_hidden ? hidden.detach().narrow(0, 0, T - 1).to(at::kCPU, at::kFloat) : embedded.narrow(0, 0, T - 1);
    x.narrow(1, 0, D).narrow(0, 1, T - 1).copy_(before);
    if (reads_hidden) x.select(1, 2 * D + TokenHistory::kScalars - 1).narrow(0, 1, T - 1).copy_(logits_of(model, before, all.narrow(0, 1, T - 1)));
  }
  float* values = x.mutable_data_ptr<float>() + 2 * D;
  for (size_t n = 0; n + 1 < bounds.size(); ++n) {
    if (bounds[n] == bounds[n + 1]) continue;
    TokenHistory history;
    x[bounds[n]].narrow(0, 0, D).zero_();
    x[bounds[n]][2 * D + TokenHistory::kScalars - 1].zero_();
    for (int64_t t = bounds[n]; t < bounds[n + 1]; ++t) history.next(ids[static_cast<size_t>(t)], values + t * x.size(1));
  }
  return x;
}

std::vector<float> router_gains(const LanguageModel& model, const GainHead& head, const at::Tensor& input_ids, std::span<const int32_t> bounds) {
  const at::NoGradGuard no_grad;
  TORCH_CHECK(input_ids.dim() == 2 && input_ids.size(0) == 1, "router: ids ", input_ids.sizes(), ", expected [1, T]");
  const int64_t T = input_ids.size(1);
  at::Tensor hidden;
  if (head.reads_hidden) {
    ModelInput input;
    input.input_ids = input_ids;
    if (bounds.size() > 2) input.cu_seqlens = at::tensor(std::vector<int32_t>(bounds.begin(), bounds.end()), at::kInt);
    ModePiece piece{.row = 0, .column = 0, .length = T, .start = 0, .context = {}};
    piece.context.prompt_length = T;
    input.routing = ModelSchedule(model.config(), "linear").route({piece}, 1, T);
    hidden = model.hidden(input)[0];
  }
  const at::Tensor ids = input_ids.reshape({-1}).to(at::kCPU, at::kLong).contiguous();
  const at::Tensor gains = head.predict(router_features(model, head.reads_hidden, {ids.const_data_ptr<int64_t>(), static_cast<size_t>(T)}, bounds, hidden)).contiguous();
  std::vector<float> out(gains.const_data_ptr<float>(), gains.const_data_ptr<float>() + T);
  for (int64_t t = 0; t < T; ++t) {
    if (!std::isfinite(out[static_cast<size_t>(t)])) fail("the gain predicted for token {} is {}; the model's weights are damaged or overflow", t, out[static_cast<size_t>(t)]);
  }
  return out;
}

void GainReader::pass(std::span<const int32_t> ids) {
  float unused[TokenHistory::kScalars];
  for (const int32_t id : ids) history_.next(id, unused);
  if (!ids.empty()) before_ = ids.back();
}

float GainReader::next(int32_t id, const at::Tensor& previous) {
  const at::NoGradGuard no_grad;
  const int64_t D = model_.config().layer.hidden_size;
  at::Tensor x = at::zeros({1, 2 * D + TokenHistory::kScalars}, at::kFloat);
  const at::Tensor own = at::tensor({static_cast<int64_t>(id)}, at::kLong);
  x.narrow(1, D, D).copy_(rows_of(model_.parameter("embed.weight"), own));
  if (before_ >= 0 && head_->reads_hidden) {
    TORCH_CHECK(previous.defined(), "router: the hidden state of the token before is not known");
    const at::Tensor before = previous.detach().to(at::kCPU, at::kFloat).view({1, D});
    x.narrow(1, 0, D).copy_(before);
    x.select(1, 2 * D + TokenHistory::kScalars - 1).copy_(logits_of(model_, before, own));
  } else if (before_ >= 0) {
    x.narrow(1, 0, D).copy_(rows_of(model_.parameter("embed.weight"), at::tensor({static_cast<int64_t>(before_)}, at::kLong)));
  }
  history_.next(id, x.mutable_data_ptr<float>() + 2 * D);
  before_ = id;
  return head_->predict(x).item<float>();
}

}  // namespace oryx
