// Copies that run together. On a GPU a launch takes the host longer than most copies take the device: what a layer leaves in a state (rows of several slots, tails,
// recurrent states) goes there in one.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace oryx::ops {

class Copies {
 public:
  // to <- from, both of one shape, dtype and device; memory of no two copies' `to` overlaps. On the CPU at once. On a GPU when run() is called, or so many wait that they do not
  // fit into one launch: until then `to` must not be read, nor `from` written. Copies that no launch can take (rows that are not dense, another dtype) run at once there too.
  void add(const at::Tensor& to, const at::Tensor& from);
  // Rows [to_row, to_row + count) of `to` <- rows [from_row, from_row + count) of `from`; both [rows, shape...] of one shape.
  void add_rows(const at::Tensor& to, int64_t to_row, const at::Tensor& from, int64_t from_row, int64_t count);
  void run();
  bool empty() const { return held_.empty(); }

 private:
  std::vector<int64_t> words_;    // of each copy kWords, as the operator takes them
  std::vector<at::Tensor> held_;  // what they read and write
};

}  // namespace oryx::ops
