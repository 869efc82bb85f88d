// Launchers of RMSNorm and its gated forms on CUDA. Forms and formulas: oryx/ops/norm/norm_kernels.h, numbered
// 0 plain, 1 add, 2 gate after, 3 gate first. dtype (x, residual, gate, y, sum and their gradients) and weight_dtype
// (weight and its gradient): 0 float32, 1 bfloat16. All arrays contiguous; rows of dim elements, row r uses weights
// [(r % groups) * dim, ...), to which weight_offset is added. Return a cudaError_t.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

extern "C" {
// residual and sum: form 1 only; gate: forms 2 and 3 only; rstd [rows] float32, written.
int oryx_norm_forward(int form, int dtype, int weight_dtype, const void* x, const void* residual, const void* gate,
                      const void* weight, void* y, void* sum, float* rstd, int64_t rows, int64_t dim, int64_t groups,
                      float eps, float weight_offset, cudaStream_t stream);

// The float32 elements of workspace that oryx_norm_backward wants.
int64_t oryx_norm_backward_workspace(int form, int dtype, int64_t rows, int64_t dim, int64_t groups);

// Forms 0, 2, 3 (form 1 is form 0 on the sum). d_sum may be null, else it is added to d_x (form 0 only). d_weight is the same
// from run to run: partial sums of a fixed set of rows each, added up in a fixed order.
int oryx_norm_backward(int form, int dtype, int weight_dtype, const void* d_y, const void* x, const void* gate,
                       const void* weight, const float* rstd, const void* d_sum, void* d_x, void* d_gate, void* d_weight,
                       float* workspace, int64_t rows, int64_t dim, int64_t groups, float weight_offset,
                       cudaStream_t stream);
}
