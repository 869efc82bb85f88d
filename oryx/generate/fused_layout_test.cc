#include "oryx/generate/fused_layout.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace oryx {
namespace {

// Every element is where cuda/decode_step.h and cuda/decode_product.h say.
TEST(FusedLayout, ProductFragments) {
  const at::Tensor w = at::arange(32 * 48, at::kInt).view({32, 48}), x = fused::product_fragments(w).flatten();
  for (int64_t r = 0; r < 32; ++r) {
    for (int64_t c = 0; c < 48; ++c) {
      const int64_t lane = 4 * (r % 8) + c % 8 / 2, item = c % 16 / 8 * 4 + r % 16 / 8 * 2 + c % 2;
      EXPECT_EQ(x[((r / 16 * 3 + c / 16) * 32 + lane) * 8 + item].item<int>(), w[r][c].item<int>()) << r << ", " << c;
    }
  }
}

TEST(FusedLayout, RowPieces) {
  const at::Tensor w = at::arange(8 * 128, at::kInt).view({8, 128}), x = fused::row_pieces(w).flatten();
  const int* got = x.const_data_ptr<int>();
  for (int64_t r = 0; r < 8; ++r) {
    for (int64_t column = 0; column < 128; ++column) {
      const int64_t c = column % 64 / 32, a = column % 32 / 16, b = column % 16 / 8, t = column % 8 / 2, lane = 4 * (4 * a + r % 4) + t;
      EXPECT_EQ(got[((r / 4 * 2 + column / 64) * 32 + lane) * 8 + 4 * b + 2 * c + column % 2], r * 128 + column);
    }
  }
}

TEST(FusedLayout, ColumnPieces) {
  constexpr int64_t kRows = 2048, kTiles = 7, kClusters = 3;  // 2, 2 and 3 tiles
  const at::Tensor w = at::arange(kRows * kTiles * 16, at::kInt).view({kRows, kTiles * 16}), x = fused::column_pieces(w, kClusters);
  ASSERT_EQ(x.numel(), w.numel());
  const int* got = x.const_data_ptr<int>();
  int64_t wrong = 0;
  for (int64_t cluster = 0; cluster < kClusters; ++cluster) {
    const int64_t begin = kTiles * cluster / kClusters, count = kTiles * (cluster + 1) / kClusters - begin;
    for (int64_t tile = 0; tile < count; ++tile) {
      const int64_t width = tile / 2 * 2 + 1 < count ? 2 : 1;  // of the pair
      for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t c = 0; c < 16; ++c) {
          const int64_t share = r / 256, warp = r % 256 / 32, half = r % 32 / 16, lane = 4 * (r % 8) + c % 8 / 2;
          const int64_t base = begin * 16 * kRows + share * count * 16 * 256 + tile / 2 * 2 * 16 * 256;
          const int64_t at = base + (((warp * 2 + half) * width + tile % 2) * 32 + lane) * 8 + c / 8 * 4 + r % 16 / 8 * 2 + c % 2;
          wrong += got[at] != r * kTiles * 16 + (begin + tile) * 16 + c;
        }
      }
    }
  }
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace oryx
