#include "oryx/generate/routed_text.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

#include "oryx/common/error.h"

namespace oryx {

namespace {

constexpr float kNotPredicted = std::numeric_limits<float>::quiet_NaN();

at::Tensor on_cpu(const at::Tensor& hidden) { return hidden.detach().to(at::kCPU, at::kFloat).clone(); }

}  // namespace

RoutedText::RoutedText(const LanguageModel& model, const ModelSchedule& schedule, const std::shared_ptr<const TokenFacts>& given) { make_routers(model, schedule, given); }

RoutedText::RoutedText(const LanguageModel& model, const ModelSchedule& schedule, const TextRouters& saved, const std::shared_ptr<const TokenFacts>& given) {
  make_routers(model, schedule, given);
  if (!on()) return;
  ids_ = saved.ids;
  last_hidden_ = ahead_hidden_ = saved.hidden;
  own_->prompts = saved.prompts;
  prompt_end_ = saved.prompts.empty() ? 0 : saved.prompts.back().second;
  for (Router& r : routers_) {
    const auto found = saved.gains.find(r.reader.head().identity());
    gains(r) = found != saved.gains.end() ? found->second : std::vector<float>(ids_.size(), kNotPredicted);
    r.reader.pass(ids_);
  }
}

void RoutedText::make_routers(const LanguageModel& model, const ModelSchedule& schedule, const std::shared_ptr<const TokenFacts>& given) {
  facts_ = given;
  const auto wanted = schedule.prompt_needs();
  for (const auto& [need, head] : schedule.gain_heads()) {
    routers_.push_back({need, GainReader(model, head), std::find(wanted.begin(), wanted.end(), need) != wanted.end()});
  }
  if (!on()) return;
  own_ = given ? std::make_shared<TokenFacts>(*given) : std::make_shared<TokenFacts>();
  facts_ = own_;
}

void RoutedText::begin_prompt(int64_t count) {
  TORCH_CHECK(length() >= prompt_end_, "routers: a prompt behind ", length(), " of ", prompt_end_, " tokens of one before");
  prompt_end_ = length() + count;
  if (on() && count > 0) own_->prompts.emplace_back(length(), prompt_end_);
}

bool RoutedText::wants_prompt() const {
  return std::any_of(routers_.begin(), routers_.end(), [&](const Router& r) { return r.of_prompts && known(r) < prompt_end_; });
}

bool RoutedText::wants_reading() const {
  return std::any_of(routers_.begin(), routers_.end(), [&](const Router& r) { return r.of_prompts && known(r) < prompt_end_ && r.reader.head().reads_hidden; });
}

int64_t RoutedText::known(const Router& r) const {
  const auto found = own_->gains.find(r.need);
  return found == own_->gains.end() ? 0 : static_cast<int64_t>(found->second.size());
}

void RoutedText::look_ahead(std::span<const int32_t> ids, const at::Tensor& hidden) {
  for (Router& r : routers_) {
    if (!r.of_prompts || known(r) >= prompt_end_) continue;
    TORCH_CHECK(known(r) == r.reader.seen(), "routers: ", known(r), " gains of ", r.reader.seen(), " tokens");
    const auto more = r.reader.next(ids, ahead_hidden_, r.reader.head().reads_hidden ? hidden : at::Tensor());
    gains(r).insert(gains(r).end(), more.begin(), more.end());
  }
  if (hidden.defined() && !ids.empty()) ahead_hidden_ = on_cpu(hidden[static_cast<int64_t>(ids.size()) - 1]);
}

int64_t RoutedText::ready(int64_t left) const {
  int64_t n = left;
  for (const Router& r : routers_) n = std::min(n, std::max(known(r), r.of_prompts ? 0 : prompt_end_) - length());
  return std::max(n, std::min<int64_t>(left, 1));
}

void RoutedText::before(std::span<const int32_t> ids) {
  if (!on()) return;
  const int64_t count = static_cast<int64_t>(ids.size()), end = length() + count;
  for (Router& r : routers_) {
    std::vector<float>& all = gains(r);
    if (const int64_t left_alone = std::min(end, r.of_prompts ? 0 : prompt_end_); known(r) < left_alone) all.resize(static_cast<size_t>(left_alone), kNotPredicted);
    const int64_t rest = std::max<int64_t>(0, end - known(r)), seen = r.reader.seen();  // it may have looked ahead
    TORCH_CHECK(rest <= 1, "routers: gains of ", rest, " tokens at once");
    if (seen < end - rest) r.reader.pass(ids.subspan(static_cast<size_t>(seen - length()), static_cast<size_t>(end - rest - seen)));
    if (rest == 1) all.push_back(r.reader.next(ids.last(1), last_hidden_).front());
  }
  ids_.insert(ids_.end(), ids.begin(), ids.end());
}

void RoutedText::after(const at::Tensor& last_hidden) {
  if (on()) last_hidden_ = ahead_hidden_ = on_cpu(last_hidden);
}

TextRouters RoutedText::saved() const {
  TextRouters out;
  if (!on()) return out;
  out.ids = ids_;
  out.hidden = last_hidden_;
  out.prompts = own_->prompts;
  for (const Router& r : routers_) {
    const std::vector<float>& all = gains(r);
    out.gains[r.reader.head().identity()] = {all.begin(), all.begin() + std::min<int64_t>(length(), known(r))};
  }
  return out;
}

}  // namespace oryx
