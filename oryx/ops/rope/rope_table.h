// Cosines and sines of the rotary angles, computed in float64.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace oryx::ops {

// Row p of each is position first + p; a row has half = rotary_dim / 2 values.
struct RopeTable {
  int64_t half = 0;
  std::vector<float> cosine, sine;
  std::vector<int64_t> rows;  // empty: row of position p is p; else one row for each requested position, in that order
};

// A table that holds every one of the n positions (none negative). Tables of positions below 65,536 are kept for the
// life of the process, one for each (theta, rotary_dim), grown by powers of two: all layers and steps share them.
// Thread-safe.
std::shared_ptr<const RopeTable> rope_table(const int32_t* positions, int64_t n, double theta, int64_t rotary_dim);

// A table whose row p is position p, for every p < n: kept and grown as above, however long. For a caller that reads n keys anyway, so that the
// table stays small beside what it reads.
std::shared_ptr<const RopeTable> rope_rows(int64_t n, double theta, int64_t rotary_dim);

}  // namespace oryx::ops
