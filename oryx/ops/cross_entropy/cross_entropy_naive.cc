#include <ATen/ATen.h>

#include "oryx/ops/cross_entropy/cross_entropy.h"

namespace oryx::ops {

CrossEntropyResult cross_entropy_naive(const at::Tensor& logits, const at::Tensor& targets, int64_t ignore_index,
                                       double z_coef) {
  const at::Tensor x = logits.scalar_type() == at::kDouble ? logits : logits.to(at::kFloat);
  const at::Tensor kept = targets.ne(ignore_index);
  const at::Tensor lse = at::logsumexp(x, -1);  // [N]
  const at::Tensor picked = x.gather(-1, at::where(kept, targets, 0).to(at::kLong).unsqueeze(-1)).squeeze(-1);
  const at::Tensor zero = at::zeros_like(lse);
  const at::Tensor nll = at::where(kept, lse - picked, zero);
  const at::Tensor squares = at::where(kept, lse * lse, zero);
  const at::Tensor loss = (nll.sum() + z_coef * squares.sum()) / kept.sum().clamp_min(1);
  return {loss, nll.detach(), lse.detach()};
}

}  // namespace oryx::ops
