#include "oryx/report/axis.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "oryx/report/markup.h"

namespace oryx {

namespace {

// The smallest of 1, 2, 5 times a power of ten that is not below `step`.
double round_step(double step) {
  const double power = std::pow(10, std::floor(std::log10(step)));
  for (const double m : {1.0, 2.0, 5.0}) {
    if (step <= m * power * (1 + 1e-9)) return m * power;
  }
  return 10 * power;
}

}  // namespace

Axis::Axis(double low, double high, bool log, bool round_ends) : low_(low), high_(high), log_(log) {
  constexpr double kLargest = 1e300, kSmallest = 1e-300;  // their differences and quotients are finite
  low_ = std::clamp(low_, log_ ? kSmallest : -kLargest, kLargest);
  high_ = std::clamp(high_, log_ ? kSmallest : -kLargest, kLargest);
  // Ends that differ in their last digits only would leave no room for steps between them.
  const double size = std::max(std::abs(low_), std::abs(high_));
  if (high_ - low_ <= size * 1e-9) {
    const double widen = size < kSmallest ? 1 : size * 0.1;
    low_ = log_ ? low_ / 2 : low_ - widen;
    high_ = log_ ? high_ * 2 : high_ + widen;
  }
  if (log_) {
    log_ticks(round_ends);
  } else {
    linear_ticks(round_ends);
  }
}

double Axis::place(double value) const {
  if (log_) return (std::log(value) - std::log(low_)) / (std::log(high_) - std::log(low_));
  return (value - low_) / (high_ - low_);
}

void Axis::ticks_at(const std::vector<double>& values) {
  ticks_.clear();
  for (const double v : values) {
    // Whoever names the values wants to read them, not a rounded form.
    const bool whole = std::abs(v) < 1e7 && v == std::floor(v);
    if (shows(v) && v >= low_ && v <= high_) ticks_.push_back({v, whole ? std::to_string(static_cast<int64_t>(v)) : short_number(v)});
  }
}

bool Axis::shows(double value) const { return std::isfinite(value) && (!log_ || value > 0); }

void Axis::linear_ticks(bool round_ends) {
  constexpr int kAbout = 6;
  const double step = round_step((high_ - low_) / kAbout);
  double first = std::ceil(low_ / step - 1e-9), last = std::floor(high_ / step + 1e-9);
  if (round_ends) {
    first = std::floor(low_ / step + 1e-9);
    last = std::ceil(high_ / step - 1e-9);
    low_ = first * step;
    high_ = last * step;
  }
  for (double i = first; i <= last; ++i) ticks_.push_back({i * step, short_number(i * step)});
}

void Axis::log_ticks(bool round_ends) {
  const double decades = std::log10(high_) - std::log10(low_);
  // Few decades: 1, 2, 5 in each; many: some decades are left out.
  const std::vector<double> within = decades <= 3 ? std::vector<double>{1, 2, 5} : std::vector<double>{1};
  const int stride = std::max(1, static_cast<int>(std::ceil(decades / 8)));
  std::vector<double> values;
  for (int k = static_cast<int>(std::floor(std::log10(low_))); k <= static_cast<int>(std::ceil(std::log10(high_)));
       ++k) {
    if (k % stride != 0) continue;
    for (const double m : within) values.push_back(m * std::pow(10, k));
  }
  if (round_ends) {
    const double low = low_ * (1 + 1e-9), high = high_ * (1 - 1e-9);
    for (const double v : values) {
      if (v <= low) low_ = v;
    }
    const auto above = std::find_if(values.begin(), values.end(), [&](double v) { return v >= high; });
    if (above != values.end()) high_ = *above;
  }
  for (const double v : values) {
    if (v >= low_ * (1 - 1e-9) && v <= high_ * (1 + 1e-9)) ticks_.push_back({v, short_number(v)});
  }
}

}  // namespace oryx
