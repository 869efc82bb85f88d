#include "oryx/serve/scores.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "oryx/common/error.h"
#include "oryx/common/utf8.h"

namespace oryx::serve {

namespace {

constexpr double kLeast = -9999;  // what JSON has for a token that cannot come

Json number_or_null(double logprob) { return std::isnan(logprob) ? Json() : Json(std::max(logprob, kLeast)); }

Json bytes_of(const Tokenizer& tokenizer, int32_t id) {
  Json bytes = Json::array();
  for (const char c : tokenizer.token_bytes(id)) bytes.push_back(static_cast<unsigned char>(c));
  return bytes;
}

Json chat_token(const Tokenizer& tokenizer, int32_t id, double logprob) {
  return {{"token", token_text(tokenizer, id)}, {"logprob", number_or_null(logprob)}, {"bytes", bytes_of(tokenizer, id)}};
}

}  // namespace

TokenScores score_token(const at::Tensor& logits, int32_t id, int64_t top) {
  const at::Tensor row = logits.detach().to(at::kCPU, at::kFloat).contiguous();
  const auto V = row.numel();
  if (id < 0 || id >= V) fail("token id {} has no logit among {}", id, V);
  const float* x = row.const_data_ptr<float>();
  const double most = *std::max_element(x, x + V);
  double sum = 0;
  for (int64_t i = 0; i < V; ++i) sum += std::exp(static_cast<double>(x[i]) - most);
  const double norm = most + std::log(sum);
  std::vector<int32_t> order(static_cast<size_t>(V));
  std::iota(order.begin(), order.end(), 0);
  const int64_t count = std::min(top, V);
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](int32_t a, int32_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; });
  TokenScores scores{id, static_cast<double>(x[id]) - norm, {}};
  for (int64_t i = 0; i < count; ++i) {
    const int32_t other = order[static_cast<size_t>(i)];
    scores.top.emplace_back(other, static_cast<double>(x[other]) - norm);
  }
  return scores;
}

namespace {

// Rises with x, and where two are equal with the lower place: what the likeliest are picked by, as partial_sort above. x [n, V] float32.
at::Tensor ranks(const at::Tensor& x) {
  const at::Tensor bits = (x + 0.0).view(at::kInt).to(at::kLong);  // + 0: one zero
  const at::Tensor ordered = at::where(bits < 0, bits.bitwise_xor(0x7fffffff), bits);
  return ordered * (int64_t{1} << 32) - at::arange(x.size(1), ordered.options());
}

}  // namespace

std::vector<TokenScores> score_rows(const at::Tensor& logits, std::span<const int32_t> ids, int64_t top) {
  const int64_t n = logits.size(0), V = logits.size(1), count = std::min(top, V);
  TORCH_CHECK(n == static_cast<int64_t>(ids.size()), "score_rows: ", n, " rows for ", ids.size(), " ids");
  for (const int32_t id : ids) {
    if (id < 0 || id >= V) fail("token id {} has no logit among {}", id, V);
  }
  const at::Tensor x = logits.detach().to(at::kFloat), wide = x.to(at::kDouble);
  const at::Tensor norm = wide.logsumexp(1, true);  // [n, 1]
  const at::Tensor own = at::tensor(at::ArrayRef<int32_t>(ids.data(), ids.size()), at::kInt).to(x.device(), at::kLong).unsqueeze(1);
  at::Tensor places = own;  // [n, 1 + count]
  if (count > 0) places = at::cat({own, std::get<1>(ranks(x).topk(count, 1))}, 1);
  const at::Tensor scores = (wide.gather(1, places) - norm).cpu();
  places = places.cpu();
  std::vector<TokenScores> all;
  for (int64_t i = 0; i < n; ++i) {
    const auto* score = scores.const_data_ptr<double>() + i * (1 + count);
    const auto* place = places.const_data_ptr<int64_t>() + i * (1 + count);
    TokenScores one{static_cast<int32_t>(place[0]), score[0], {}};
    for (int64_t j = 1; j <= count; ++j) one.top.emplace_back(static_cast<int32_t>(place[j]), score[j]);
    all.push_back(std::move(one));
  }
  return all;
}

std::string token_text(const Tokenizer& tokenizer, int32_t id) {
  if (id < 0 || id >= tokenizer.vocab_size()) return "";
  const std::string_view bytes = tokenizer.token_bytes(id);
  if (scan_utf8(bytes).valid == bytes.size()) return std::string(bytes);
  std::string out = "bytes:";
  for (const char c : bytes) out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
  return out;
}

Json completion_logprobs(const Tokenizer& tokenizer, std::span<const ShownToken> tokens, int64_t top) {
  Json out = {{"tokens", Json::array()}, {"token_logprobs", Json::array()}, {"top_logprobs", top > 0 ? Json::array() : Json()}, {"text_offset", Json::array()}};
  for (const auto& [scores, offset] : tokens) {
    out["tokens"].push_back(token_text(tokenizer, scores.id));
    out["token_logprobs"].push_back(number_or_null(scores.logprob));
    out["text_offset"].push_back(offset);
    if (top == 0) continue;
    Json likeliest = std::isnan(scores.logprob) ? Json() : Json::object();
    for (const auto& [id, logprob] : scores.top) {
      const std::string text = token_text(tokenizer, id);
      if (!likeliest.contains(text)) likeliest[text] = number_or_null(logprob);  // of two tokens of one text the likelier
    }
    out["top_logprobs"].push_back(std::move(likeliest));
  }
  return out;
}

Json chat_logprobs(const Tokenizer& tokenizer, std::span<const ShownToken> tokens) {
  Json content = Json::array();
  for (const auto& [scores, offset] : tokens) {
    Json one = chat_token(tokenizer, scores.id, scores.logprob);
    one["top_logprobs"] = Json::array();
    for (const auto& [id, logprob] : scores.top) one["top_logprobs"].push_back(chat_token(tokenizer, id, logprob));
    content.push_back(std::move(one));
  }
  return {{"content", std::move(content)}};
}

}  // namespace oryx::serve
