#include "oryx/data/packing.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

namespace oryx {

BatchBuilder::BatchBuilder(int64_t rows, int64_t columns) : rows_(rows), columns_(columns) {
  TORCH_CHECK(rows > 0 && columns > 0 && rows <= std::numeric_limits<int32_t>::max() / columns,
              "BatchBuilder: a batch of ", rows, " x ", columns, " tokens");
  batch_.input_ids = at::empty({rows, columns}, at::kLong);
  batch_.targets = at::empty({rows, columns}, at::kLong);
  batch_.bounds = {0};
}

void BatchBuilder::add(std::span<const int64_t> tokens, bool continues) {
  const auto n = static_cast<int64_t>(tokens.size()) - continues;
  TORCH_CHECK(n > 0 && !full() && n <= free_in_row(), "BatchBuilder: ", n, " tokens do not fit the row");
  std::copy_n(tokens.begin(), n, batch_.input_ids.mutable_data_ptr<int64_t>() + filled_);
  int64_t* targets = batch_.targets.mutable_data_ptr<int64_t>() + filled_;
  std::copy(tokens.begin() + 1, tokens.end(), targets);
  if (!continues) targets[n - 1] = kIgnoreTarget;
  filled_ += n;
  batch_.kept_targets += continues ? n : n - 1;
  batch_.max_seqlen = std::max(batch_.max_seqlen, static_cast<int32_t>(n));
  batch_.bounds.push_back(static_cast<int32_t>(filled_));
}

Batch BatchBuilder::finish() {
  TORCH_CHECK(full() || (rows_ == 1 && filled_ > 0), "BatchBuilder: ", filled_, " of ", rows_ * columns_, " tokens");
  if (!full()) {
    batch_.input_ids = batch_.input_ids.narrow(1, 0, filled_).contiguous();
    batch_.targets = batch_.targets.narrow(1, 0, filled_).contiguous();
  }
  batch_.cu_seqlens = at::tensor(batch_.bounds, at::kInt);
  return std::move(batch_);
}

}  // namespace oryx
