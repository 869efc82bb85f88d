#include "oryx/generate/fused_layout.h"

#include <ATen/ATen.h>

#include <vector>

namespace oryx::fused {

at::Tensor product_fragments(const at::Tensor& w) {
  TORCH_CHECK(w.dim() == 2 && w.size(0) % 16 == 0 && w.size(1) % 16 == 0, "product_fragments: a weight of ", w.sizes());
  return w.contiguous().view({w.size(0) / 16, 2, 8, w.size(1) / 16, 2, 4, 2}).permute({0, 3, 2, 5, 4, 1, 6}).contiguous();
}

at::Tensor row_pieces(const at::Tensor& w) {
  TORCH_CHECK(w.dim() == 2 && w.size(0) % 4 == 0 && w.size(1) % 64 == 0, "row_pieces: a weight of ", w.sizes());
  return w.contiguous().view({w.size(0) / 4, 4, w.size(1) / 64, 2, 2, 2, 4, 2}).permute({0, 2, 4, 1, 6, 5, 3, 7}).contiguous();
}

at::Tensor column_pieces(const at::Tensor& w, int64_t clusters) {
  constexpr int64_t kShares = 8, kWarps = 8;
  TORCH_CHECK(w.dim() == 2 && w.size(0) == kShares * kWarps * 32 && w.size(1) % 16 == 0, "column_pieces: a weight of ", w.sizes());
  const int64_t tiles = w.size(1) / 16;
  // [multiprocessor][warp][16 rows][tile of 16 columns][a fragment]
  const at::Tensor all = product_fragments(w).view({kShares, kWarps, 2, tiles, 256});
  std::vector<at::Tensor> out;
  for (int64_t c = 0; c < clusters; ++c) {
    const int64_t begin = tiles * c / clusters, count = tiles * (c + 1) / clusters - begin, paired = count / 2 * 2;
    const at::Tensor pairs = all.narrow(3, begin, paired).reshape({kShares, kWarps, 2, paired / 2, 2, 256}).permute({0, 3, 1, 2, 4, 5}).reshape({kShares, -1});
    const at::Tensor rest = all.narrow(3, begin + paired, count - paired).reshape({kShares, kWarps * 2 * (count - paired) * 256});
    out.push_back(at::cat({pairs, rest}, 1).flatten());
  }
  return at::cat(out);
}

}  // namespace oryx::fused
