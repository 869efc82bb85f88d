#include "oryx/modes/gain_budget.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace oryx {

double GainBudget::behind(double share, int64_t window) { return std::max(kAhead, share * static_cast<double>(window) / 4); }

GainBudget::GainBudget(const GainHead& head, double share, int64_t window) : share_(share), threshold_(head.threshold(share)) {
  TORCH_CHECK(share >= 0 && share <= 1 && window >= 0 && window <= kMostWindow, "GainBudget: share ", share, ", window ", window);
  if (window == 0) return;
  behind_ = behind(share, window);
  // Quantiles in the middle of `window` equal parts, strewn over the ring, so that the low ones do not leave it before the high ones.
  for (int64_t i = 0; i < window; ++i) sorted_.push_back(static_cast<float>(head.threshold(1 - (static_cast<double>(i) + 0.5) / static_cast<double>(window))));
  auto stride = std::max<int64_t>(1, static_cast<int64_t>(0.6180339887 * static_cast<double>(window)));
  while (std::gcd(stride, window) != 1) ++stride;
  for (int64_t i = 0; i < window; ++i) window_.push_back(sorted_[static_cast<size_t>(i * stride % window)]);
}

double GainBudget::threshold() const {
  if (window_.empty() || share_ <= 0) return threshold_;
  const double left = share_ * static_cast<double>(seen_ + 1) - static_cast<double>(taken_);
  const double wanted = share_ * (1 + std::clamp(left / (left > 0 ? behind_ : kAhead), -1.0, 1.0));
  const auto count = static_cast<double>(sorted_.size());
  // The gain that `wanted` of the window's exceed.
  const auto at = static_cast<int64_t>(std::ceil(count * (1 - std::min(wanted, 1.0)))) - 1;
  return at < 0 ? -std::numeric_limits<double>::infinity() : static_cast<double>(sorted_[static_cast<size_t>(at)]);
}

void GainBudget::follow(float gain) {
  sorted_.erase(std::lower_bound(sorted_.begin(), sorted_.end(), window_[oldest_]));
  sorted_.insert(std::upper_bound(sorted_.begin(), sorted_.end(), gain), gain);
  window_[oldest_] = gain;
  oldest_ = (oldest_ + 1) % window_.size();
}

bool GainBudget::take(float gain) {
  const bool worth = static_cast<double>(gain) > threshold();
  if (!window_.empty()) follow(gain);
  ++seen_;
  const double due = share_ * static_cast<double>(seen_);
  const bool owed = !window_.empty() && due - static_cast<double>(taken_) > behind_;
  const bool allowed = static_cast<double>(taken_ + 1) <= due + kAhead;
  if (!owed && !(worth && allowed)) return false;
  ++taken_;
  return true;
}

}  // namespace oryx
