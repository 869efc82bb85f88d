#include "oryx/ops/rope/rope_table.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <mutex>
#include <utility>

namespace oryx::ops {
namespace {

// 65,536 positions of width 64 are 16 MB; positions beyond are computed for each call, but for rope_rows().
constexpr int64_t kKeptPositions = 65536;

std::vector<double> frequencies(double theta, int64_t rotary_dim) {
  std::vector<double> w(static_cast<size_t>(rotary_dim / 2));
  for (size_t m = 0; m < w.size(); ++m)
    w[m] = std::pow(theta, -2.0 * static_cast<double>(m) / static_cast<double>(rotary_dim));
  return w;
}

// Fills row r with the angles of position position_of(r).
template <typename PositionOf>
void fill(RopeTable& table, const std::vector<double>& w, int64_t first_row, int64_t rows, PositionOf position_of) {
  const int64_t half = table.half;
  table.cosine.resize(static_cast<size_t>(rows * half));
  table.sine.resize(static_cast<size_t>(rows * half));
  at::parallel_for(first_row, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t m = 0; m < half; ++m) {
        const double angle = static_cast<double>(position_of(r)) * w[static_cast<size_t>(m)];
        table.cosine[static_cast<size_t>(r * half + m)] = static_cast<float>(std::cos(angle));
        table.sine[static_cast<size_t>(r * half + m)] = static_cast<float>(std::sin(angle));
      }
    }
  });
}

std::shared_ptr<const RopeTable> kept_table(int64_t positions, double theta, int64_t rotary_dim) {
  static std::mutex mutex;
  static std::map<std::pair<double, int64_t>, std::shared_ptr<const RopeTable>> tables;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<const RopeTable>& kept = tables[{theta, rotary_dim}];
  const int64_t half = rotary_dim / 2;
  const int64_t have = kept ? static_cast<int64_t>(kept->cosine.size()) / half : 0;
  if (have >= positions) return kept;
  // Readers may hold the old table: a grown one is a new object.
  auto grown = std::make_shared<RopeTable>();
  if (kept) *grown = *kept;
  grown->half = half;
  const int64_t rows = std::max<int64_t>(256, static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(positions))));
  fill(*grown, frequencies(theta, rotary_dim), have, rows, [](int64_t r) { return r; });
  kept = grown;
  return kept;
}

// One row for each distinct position, and for each request the row it finds its angles in.
std::shared_ptr<const RopeTable> own_table(const int32_t* positions, int64_t n, double theta, int64_t rotary_dim) {
  std::vector<int32_t> distinct(positions, positions + n);
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  auto table = std::make_shared<RopeTable>();
  table->half = rotary_dim / 2;
  fill(*table, frequencies(theta, rotary_dim), 0, static_cast<int64_t>(distinct.size()),
       [&](int64_t r) { return distinct[static_cast<size_t>(r)]; });
  table->rows.resize(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    table->rows[static_cast<size_t>(i)] =
        std::lower_bound(distinct.begin(), distinct.end(), positions[i]) - distinct.begin();
  }
  return table;
}

}  // namespace

std::shared_ptr<const RopeTable> rope_table(const int32_t* positions, int64_t n, double theta, int64_t rotary_dim) {
  const int64_t largest = n > 0 ? *std::max_element(positions, positions + n) : 0;
  if (largest < kKeptPositions) return kept_table(largest + 1, theta, rotary_dim);
  return own_table(positions, n, theta, rotary_dim);
}

std::shared_ptr<const RopeTable> rope_rows(int64_t n, double theta, int64_t rotary_dim) { return kept_table(n, theta, rotary_dim); }

}  // namespace oryx::ops
