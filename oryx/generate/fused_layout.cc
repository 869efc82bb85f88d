#include "oryx/generate/fused_layout.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

namespace oryx::fused {

namespace {

constexpr int64_t kMembers = 8;  // multiprocessors of a group

// [R / 16, C / 16, 256]: tiles as operands of the tensor cores.
at::Tensor tiles_of(const at::Tensor& w) {
  TORCH_CHECK(w.dim() == 2 && w.size(0) % 16 == 0 && w.size(1) % 16 == 0, "fragments: a weight of ", w.sizes());
  return w.contiguous().view({w.size(0) / 16, 2, 8, w.size(1) / 16, 2, 4, 2}).permute({0, 3, 2, 5, 4, 1, 6}).reshape({w.size(0) / 16, w.size(1) / 16, 256});
}

// [R / 4, 4 C]
at::Tensor pieces_of(const at::Tensor& w) {
  TORCH_CHECK(w.dim() == 2 && w.size(0) % 4 == 0 && w.size(1) % 64 == 0, "row pieces: a weight of ", w.sizes());
  return w.contiguous().view({w.size(0) / 4, 4, w.size(1) / 64, 2, 2, 2, 4, 2}).permute({0, 2, 4, 1, 6, 5, 3, 7}).reshape({w.size(0) / 4, 4 * w.size(1)});
}

// Where `tiles` are cut for `groups`.
std::vector<int64_t> cuts(int64_t tiles, int64_t groups) {
  std::vector<int64_t> begins;
  for (int64_t i = 0; i <= groups; ++i) begins.push_back(tiles * i / groups);
  return begins;
}

}  // namespace

at::Tensor product_fragments(const at::Tensor& w) {
  return tiles_of(w).flatten();
}

at::Tensor row_pieces(const at::Tensor& w) { return pieces_of(w).flatten(); }

at::Tensor row_pieces_by_head(const at::Tensor& w, int64_t heads) {
  return pieces_of(w).view({-1, heads * kMembers, 4, 4 * w.size(1)}).transpose(1, 2).flatten();
}

at::Tensor row_pieces_by_group(const at::Tensor& w, int64_t groups) {
  TORCH_CHECK(w.size(0) % 32 == 0, "row pieces: a weight of ", w.sizes());
  const std::vector<int64_t> begins = cuts(w.size(0) / 32, groups);
  int64_t most = 0;
  for (int64_t g = 0; g < groups; ++g) most = std::max(most, begins[static_cast<size_t>(g) + 1] - begins[static_cast<size_t>(g)]);
  std::vector<int64_t> order;
  for (int64_t i = 0; i < most; ++i) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = begins[static_cast<size_t>(g)], count = begins[static_cast<size_t>(g) + 1] - begin;
      for (int64_t m = 0; m < kMembers && i < count; ++m) order.push_back(kMembers * begin + m * count + i);
    }
  }
  return pieces_of(w).index_select(0, at::tensor(order, at::kLong).to(w.device())).flatten();
}

at::Tensor column_pieces(const at::Tensor& w, int64_t groups) {
  constexpr int64_t kWarps = 8;
  TORCH_CHECK(w.dim() == 2 && w.size(0) == kMembers * kWarps * 32 && w.size(1) % 16 == 0, "column_pieces: a weight of ", w.sizes());
  const int64_t tiles = w.size(1) / 16, pairs = tiles / groups / 2;
  const std::vector<int64_t> begins = cuts(tiles, groups);
  const at::Tensor all = tiles_of(w).view({kMembers, kWarps, 2, tiles, 256});
  std::vector<at::Tensor> out;
  for (int64_t k = 0; k < pairs; ++k) {
    for (int64_t g = 0; g < groups; ++g) out.push_back(all.narrow(3, begins[static_cast<size_t>(g)] + 2 * k, 2).flatten());
  }
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = begins[static_cast<size_t>(g)] + 2 * pairs, count = begins[static_cast<size_t>(g) + 1] - begin, paired = count / 2 * 2;
    const at::Tensor more = all.narrow(3, begin, paired).reshape({kMembers, kWarps, 2, paired / 2, 2, 256}).permute({0, 3, 1, 2, 4, 5}).reshape({kMembers, paired * kWarps * 512});
    const at::Tensor odd = all.narrow(3, begin + paired, count - paired).reshape({kMembers, (count - paired) * kWarps * 512});
    out.push_back(at::cat({more, odd}, 1).flatten());
  }
  return at::cat(out);
}

}  // namespace oryx::fused
