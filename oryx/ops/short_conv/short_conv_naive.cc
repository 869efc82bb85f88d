// The formula, token by token: differentiable by autograd, any dtype, the oracle of the tests.
#include <ATen/ATen.h>

#include "oryx/ops/sequences.h"
#include "oryx/ops/short_conv/short_conv.h"

namespace oryx::ops {

ShortConvResult short_conv_naive(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                 const std::optional<at::Tensor>& initial_state,
                                 const std::optional<at::Tensor>& cu_seqlens, Activation activation) {
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2), w = weight.size(1);
  const auto sequences = list_sequences("short_conv_naive", B, T, cu_seqlens);
  std::vector<std::vector<at::Tensor>> rows(B);
  std::vector<at::Tensor> finals;
  for (size_t n = 0; n < sequences.size(); ++n) {
    const Sequence& s = sequences[n];
    at::Tensor past =
        initial_state ? initial_state->select(0, static_cast<int64_t>(n)) : at::zeros({C, w - 1}, x.options());
    for (int64_t t = s.begin; t < s.begin + s.length; ++t) {
      const at::Tensor window = at::cat({past, x.select(0, s.row).select(0, t).unsqueeze(-1)}, -1);  // [C, w]
      at::Tensor y = (window * weight).sum(-1);
      if (bias) y = y + *bias;
      rows[s.row].push_back(activation == Activation::kSilu ? y * at::sigmoid(y) : y);
      past = window.slice(-1, 1);
    }
    finals.push_back(past);
  }
  std::vector<at::Tensor> stacked;
  for (const auto& row : rows) stacked.push_back(row.empty() ? at::zeros({0, C}, x.options()) : at::stack(row));
  const at::Tensor y = stacked.empty() ? at::zeros_like(x) : at::stack(stacked);
  return {y, finals.empty() ? at::zeros({0, C, w - 1}, x.options()) : at::stack(finals)};
}

}  // namespace oryx::ops
