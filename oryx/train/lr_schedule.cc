#include "oryx/train/lr_schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace oryx {

double cosine_with_warmup(int64_t step, double peak, int64_t warmup, int64_t total, double min_ratio) {
  if (step < warmup) return peak * static_cast<double>(step) / static_cast<double>(std::max<int64_t>(1, warmup));
  const double progress = std::min(1.0, static_cast<double>(step - warmup) / static_cast<double>(std::max<int64_t>(1, total - warmup)));
  return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + std::cos(std::numbers::pi * progress)));
}

}  // namespace oryx
