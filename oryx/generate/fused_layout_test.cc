#include "oryx/generate/fused_layout.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace oryx {
namespace {

// Every element is where cuda/decode_step.h and cuda/decode_product.h say: at(r, c) is the place of row r, column c.
template <typename At>
void expect_order(int64_t rows, int64_t columns, at::Tensor (*pack)(const at::Tensor&), At at) {
  const at::Tensor x = pack(at::arange(rows * columns, at::kInt).view({rows, columns})).contiguous();
  ASSERT_EQ(x.numel(), rows * columns);
  const int* got = x.const_data_ptr<int>();
  int64_t wrong = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) wrong += got[at(r, c)] != r * columns + c;
  }
  EXPECT_EQ(wrong, 0);
}

// In a tile of 16 x 16, and in a block of 4 x 64.
int64_t in_tile(int64_t r, int64_t c) { return (4 * (r % 8) + c % 8 / 2) * 8 + c % 16 / 8 * 4 + r % 16 / 8 * 2 + c % 2; }
int64_t in_block(int64_t r, int64_t c) {
  return (4 * (4 * (c % 32 / 16) + r % 4) + c % 8 / 2) * 8 + c % 16 / 8 * 4 + c % 64 / 32 * 2 + c % 2;
}

TEST(FusedLayout, ProductFragments) {
  expect_order(32, 48, fused::product_fragments, [](int64_t r, int64_t c) { return (r / 16 * 3 + c / 16) * 256 + in_tile(r, c); });
}

TEST(FusedLayout, RowPieces) {
  expect_order(8, 128, fused::row_pieces, [](int64_t r, int64_t c) { return (r / 4 * 2 + c / 64) * 256 + in_block(r, c); });
}

TEST(FusedLayout, RowPiecesByHead) {
  expect_order(512, 64, [](const at::Tensor& w) { return fused::row_pieces_by_head(w, 2); }, [](int64_t r, int64_t c) {  // two sections of two heads
    const int64_t section = r / 256, member = r % 256 / 16, i = r % 16 / 4;
    return ((section * 4 + i) * 16 + member) * 256 + in_block(r, c);
  });
}

TEST(FusedLayout, RowPiecesByGroup) {
  expect_order(5 * 32, 64, [](const at::Tensor& w) { return fused::row_pieces_by_group(w, 2); }, [](int64_t r, int64_t c) {  // tiles of 32 rows: 2 and 3
    const int64_t group = r < 64 ? 0 : 1, count = 2 + group, piece = (r - 64 * group) / 4, member = piece / count, i = piece % count;
    return (i < 2 ? i * 16 + group * 8 + member : 32 + member) * 256 + in_block(r, c);
  });
}

TEST(FusedLayout, ColumnPieces) {
  expect_order(2048, 11 * 16, [](const at::Tensor& w) { return fused::column_pieces(w, 3); }, [](int64_t r, int64_t c) {  // 3, 4 and 4 tiles
    const int64_t tile = c / 16, group = tile < 3 ? 0 : tile < 7 ? 1 : 2, begin = group == 0 ? 0 : 4 * group - 1, own = tile - begin, count = group == 0 ? 3 : 4;
    const int64_t member = r / 256, warp = r % 256 / 32, half = r % 32 / 16;
    if (own < 2) return ((group * 8 + member) * 8 + warp) * 1024 + (half * 2 + own) * 256 + in_tile(r, c);
    const int64_t rest = count - 2, before = group == 0 ? 0 : 2 * group - 1;  // tiles behind the pairs
    return 3 * 8 * 8 * 1024 + before * 32768 + (member * 8 + warp) * rest * 512 + (half * rest + own - 2) * 256 + in_tile(r, c);
  });
}

}  // namespace
}  // namespace oryx
