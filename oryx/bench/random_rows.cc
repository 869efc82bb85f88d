#include "oryx/bench/random_rows.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace oryx {

void fill_rows(const LanguageModel& model, State& state, int64_t length) {
  constexpr int64_t kPiece = 512;
  const auto slots = LanguageModel::slots(model.config(), model.compute_dtype(), state.options());
  while (state.lengths()[0] < length) {
    const int64_t count = std::min(kPiece, length - state.lengths()[0]), N = state.sequences();
    state.prepare(std::vector<int64_t>(static_cast<size_t>(N), count));
    for (size_t i = 0; i < slots.size(); ++i) {
      for (const SlotSpec& spec : slots[i]) {
        if (spec.kind != SlotKind::kPerToken) continue;
        std::vector<int64_t> shape = {N, count};
        shape.insert(shape.end(), spec.shape.begin(), spec.shape.end());
        const auto options = at::device(model.device()).dtype(spec.dtype);
        state.append(static_cast<int64_t>(i), spec.name, at::isFloatingType(spec.dtype) ? at::randn(shape, options) : at::zeros(shape, options), nullptr);
      }
    }
    state.advance(std::vector<int64_t>(static_cast<size_t>(N), count));
  }
}

}  // namespace oryx
