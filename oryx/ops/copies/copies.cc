#include "oryx/ops/copies/copies.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "oryx/ops/copies/cuda/copies_launch.h"

namespace oryx::ops {

namespace {

// Whether the elements of a row lie side by side.
bool rows_are_dense(const at::Tensor& x) {
  int64_t next = 1;
  for (int64_t i = x.dim() - 1; i > 0; --i) {
    if (x.size(i) != 1 && x.stride(i) != next) return false;
    next *= x.size(i);
  }
  return true;
}

int64_t address(const at::Tensor& x, int64_t row) {
  return static_cast<int64_t>(reinterpret_cast<intptr_t>(x.const_data_ptr())) + row * x.stride(0) * static_cast<int64_t>(x.element_size());
}

}  // namespace

void Copies::add(const at::Tensor& to, const at::Tensor& from) {
  TORCH_CHECK(to.sizes() == from.sizes(), "copies: ", from.sizes(), " does not fit ", to.sizes());
  if (to.numel() == 0) return;
  if (to.dim() == 0) return add(to.unsqueeze(0), from.unsqueeze(0));
  add_rows(to, 0, from, 0, to.size(0));
}

void Copies::add_rows(const at::Tensor& to, int64_t to_row, const at::Tensor& from, int64_t from_row, int64_t count) {
  const bool fits = to.dim() > 0 && to.dim() == from.dim() && to.sizes().slice(1) == from.sizes().slice(1) && to_row >= 0 && from_row >= 0 && to_row + count <= to.size(0) &&
                    from_row + count <= from.size(0);
  TORCH_CHECK(fits, "copies: rows ", from_row, " to ", from_row + count, " of ", from.sizes(), " do not fit rows from ", to_row, " of ", to.sizes());
  if (count == 0 || to.numel() == 0) return;
  if (!to.is_cuda() || from.device() != to.device() || from.scalar_type() != to.scalar_type() || !rows_are_dense(to) || !rows_are_dense(from)) {
    to.narrow(0, to_row, count).copy_(from.narrow(0, from_row, count));
    return;
  }
  if (!held_.empty() && held_.front().device() != to.device()) run();
  const auto size = static_cast<int64_t>(to.element_size()), width = to.numel() / to.size(0) * size;
  for (const int64_t word : {address(to, to_row), address(from, from_row), to.stride(0) * size, from.stride(0) * size, width, count}) words_.push_back(word);
  held_.push_back(to);
  held_.push_back(from);
  if (words_.size() == static_cast<size_t>(kOryxCopies) * kOryxCopyWords) run();
}

void Copies::run() {
  if (held_.empty()) return;
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("oryx::_copy_together", "").typed<void(const at::Tensor&, at::IntArrayRef)>();
  op.call(held_.front(), words_);
  words_.clear();
  held_.clear();
}

}  // namespace oryx::ops

// On the device of `where`: six numbers a copy, the addresses of what is written and read, the bytes from row to row of either, the bytes of a row, and rows.
TORCH_LIBRARY_FRAGMENT(oryx, m) { m.def("_copy_together(Tensor where, int[] copies) -> ()"); }
