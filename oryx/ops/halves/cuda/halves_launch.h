// Launcher of a float32 matrix's halves in bfloat16 (../halves.h). No torch header.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

constexpr int kOryxHalvesParts = 4;  // at most

// A cudaError_t. parts [rows[i], in] dense; out [2 sum of rows, in] bfloat16, dense.
extern "C" int oryx_bfloat16_halves(const float* const* parts, const int64_t* rows, int count, int64_t in, void* out, cudaStream_t stream);
