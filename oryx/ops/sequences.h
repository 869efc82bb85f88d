// The sequences of a batch: rows of a dense batch [B, T], or the packed documents that cu_seqlens marks in one row.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

namespace oryx::ops {

struct Sequence {
  int64_t row;     // of the batch
  int64_t begin;   // first token in the row
  int64_t length;  // tokens, may be 0
};

// cu_seqlens [N + 1] integers, non-decreasing, first 0, last T; then B must be 1. Throws c10::Error naming `op`
// otherwise.
inline std::vector<Sequence> list_sequences(const char* op, int64_t B, int64_t T,
                                            const std::optional<at::Tensor>& cu_seqlens) {
  std::vector<Sequence> out;
  if (!cu_seqlens.has_value() || !cu_seqlens->defined()) {
    for (int64_t b = 0; b < B; ++b) out.push_back({b, 0, T});
    return out;
  }
  TORCH_CHECK(B == 1, op, ": packed documents (cu_seqlens) stand in one row, but the batch has ", B, " rows");
  TORCH_CHECK(
      cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 2 && at::isIntegralType(cu_seqlens->scalar_type(), false), op,
      ": cu_seqlens must be a vector of at least 2 integers, got ", cu_seqlens->scalar_type(), " ",
      cu_seqlens->sizes());
  const at::Tensor cu = cu_seqlens->to(at::kCPU, at::kLong).contiguous();
  const int64_t* c = cu.const_data_ptr<int64_t>();
  const int64_t n = cu.numel() - 1;
  TORCH_CHECK(c[0] == 0 && c[n] == T, op, ": cu_seqlens runs from ", c[0], " to ", c[n], ", expected 0 to T = ", T);
  for (int64_t i = 0; i < n; ++i) {
    TORCH_CHECK(c[i] <= c[i + 1], op, ": cu_seqlens decreases at ", i + 1);
    out.push_back({0, c[i], c[i + 1] - c[i]});
  }
  return out;
}

// How many there are. cu_seqlens on a GPU is not read, which would wait for it: what it holds is then the caller's to get right.
inline int64_t count_sequences(const char* op, int64_t B, int64_t T, const std::optional<at::Tensor>& cu_seqlens) {
  if (!cu_seqlens.has_value() || !cu_seqlens->defined() || cu_seqlens->is_cpu()) {
    return static_cast<int64_t>(list_sequences(op, B, T, cu_seqlens).size());
  }
  TORCH_CHECK(B == 1, op, ": packed documents (cu_seqlens) stand in one row, but the batch has ", B, " rows");
  TORCH_CHECK(
      cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 2 && at::isIntegralType(cu_seqlens->scalar_type(), false), op,
      ": cu_seqlens must be a vector of at least 2 integers, got ", cu_seqlens->scalar_type(), " ",
      cu_seqlens->sizes());
  return cu_seqlens->numel() - 1;
}

}  // namespace oryx::ops
