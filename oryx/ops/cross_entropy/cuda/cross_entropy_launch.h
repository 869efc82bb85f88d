// Launchers of cross-entropy on CUDA. Formulas: oryx/ops/cross_entropy/cross_entropy.h. dtype (logits, their gradient): 0 float32,
// 1 bfloat16. Targets are int32 on the device. What depends on the targets (how many are kept) stays there. Return a cudaError_t.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

extern "C" {
// counts[0]: targets that are not ignore_index. counts[1]: the first row whose target is neither that nor in [0, classes), or n.
int oryx_cross_entropy_count(const int32_t* targets, int64_t n, int64_t classes, int64_t ignore_index, int64_t* counts,
                             cudaStream_t stream);

// Rows of logits [rows, classes], a row every `stride` elements (both 16-byte aligned, else a slower kernel); each is read from
// memory once and its gradient written once.
struct OryxCrossEntropyRows {
  const void* logits;
  void* d_logits;  // null: no gradient. May be logits. Also a row every `stride` elements; what lies between rows is not written
  const int32_t* targets;
  float *nll, *lse;       // [rows] or null. nll is 0 where ignored, NaN where the target is no class
  const int64_t* counts;  // for the gradient: it is divided by max(counts[0], 1)
  const float* d_loss;    // and multiplied by *d_loss; null: 1
  int64_t rows, classes, stride, ignore_index;
  float z_coef;
};
int oryx_cross_entropy_rows(int dtype, const struct OryxCrossEntropyRows* rows, cudaStream_t stream);

// *loss = (sum of nll + z_coef lse^2 over kept rows) / max(counts[0], 1), added in double in a fixed order.
int oryx_cross_entropy_loss(const float* nll, const float* lse, const int32_t* targets, int64_t n, int64_t ignore_index,
                            double z_coef, const int64_t* counts, float* loss, cudaStream_t stream);

// x *= *factor; returns at once on the device where that is 1. n elements, 16-byte aligned.
int oryx_scale(int dtype, void* x, int64_t n, const float* factor, cudaStream_t stream);
}
