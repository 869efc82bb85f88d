// Learning rate: linear warm-up, then a cosine down to a floor (Loshchilov & Hutter 2017, arXiv 1608.03983).
#pragma once

#include <cstdint>

namespace oryx {

// The rate of optimiser step `step`, counted from 0: peak * step / warmup below `warmup`, then
// peak * (min_ratio + (1 - min_ratio) * (1 + cos(pi * progress)) / 2), progress = (step - warmup) / (total - warmup), at most 1:
// past `total` it stays at the floor.
double cosine_with_warmup(int64_t step, double peak, int64_t warmup, int64_t total, double min_ratio);

}  // namespace oryx
