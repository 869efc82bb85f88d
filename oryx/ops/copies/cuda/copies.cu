// Up to kOryxCopies copies in one launch: blocks of 256 threads over pieces of about 16 KB. A piece is a part of one run of bytes where rows follow each other without a gap on both
// sides, else some whole rows.
#include "oryx/ops/copies/cuda/copies_launch.h"

#include <cuda_runtime.h>

namespace oryx::ops::cuda {
namespace {

constexpr int kThreads = 256, kAtOnce = 4;  // words that a thread has on their way

struct Copy {
  char* to;
  const char* from;
  int64_t to_pitch, from_pitch;  // in bytes
  int64_t width;                 // words of a row
  int64_t rows;
  int64_t piece;  // words of a row in a piece, or, negative, rows of a piece
  int32_t first;  // block
  int32_t word;   // bytes
};

struct Arguments {
  Copy copies[kOryxCopies];
  int count;
};

template <typename Word>
__device__ __forceinline__ void copy(const Copy& c, int64_t piece) {
  if (c.piece > 0) {  // one row
    const int64_t begin = piece * c.piece, end = begin + c.piece < c.width ? begin + c.piece : c.width;
    Word* const to = reinterpret_cast<Word*>(c.to);
    const Word* const from = reinterpret_cast<const Word*>(c.from);
#pragma unroll 1
    for (int64_t at = begin + threadIdx.x; at < end; at += kThreads * kAtOnce) {
      Word x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (at + i * kThreads < end) x[i] = from[at + i * kThreads];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (at + i * kThreads < end) to[at + i * kThreads] = x[i];
      }
    }
    return;
  }
  const int64_t first = piece * -c.piece, last = first - c.piece < c.rows ? first - c.piece : c.rows;
#pragma unroll 1
  for (int64_t row = first + threadIdx.x / 32; row < last; row += kThreads / 32) {
    Word* const to = reinterpret_cast<Word*>(c.to + row * c.to_pitch);
    const Word* const from = reinterpret_cast<const Word*>(c.from + row * c.from_pitch);
#pragma unroll 1
    for (int64_t at = threadIdx.x % 32; at < c.width; at += 32) to[at] = from[at];
  }
}

__global__ __launch_bounds__(kThreads) void copy_kernel(const __grid_constant__ Arguments a) {
  int i = 0;
#pragma unroll 1
  while (i + 1 < a.count && static_cast<int>(blockIdx.x) >= a.copies[i + 1].first) ++i;
  const Copy& c = a.copies[i];
  const int64_t piece = static_cast<int>(blockIdx.x) - c.first;
  switch (c.word) {
    case 16: return copy<uint4>(c, piece);
    case 4: return copy<uint32_t>(c, piece);
    default: return copy<uint8_t>(c, piece);
  }
}

}  // namespace
}  // namespace oryx::ops::cuda

extern "C" int oryx_copy_together(const int64_t* copies, int count, CUstream_st* stream) {
  using namespace oryx::ops::cuda;
  if (count < 0 || count > kOryxCopies) return cudaErrorInvalidValue;
  Arguments a{};
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t* w = copies + i * kOryxCopyWords;
    int64_t to_pitch = w[2], from_pitch = w[3], width = w[4], rows = w[5];
    if (width == 0 || rows == 0) continue;
    if ((to_pitch == width && from_pitch == width) || rows == 1) width *= rows, to_pitch = from_pitch = 0, rows = 1;
    const int64_t together = w[0] | w[1] | to_pitch | from_pitch | width;
    const int word = together % 16 == 0 ? 16 : together % 4 == 0 ? 4 : 1;
    Copy& c = a.copies[a.count++];
    c = {reinterpret_cast<char*>(w[0]), reinterpret_cast<const char*>(w[1]), to_pitch, from_pitch, width / word, rows, 0, static_cast<int32_t>(blocks), word};
    if (rows == 1) {
      c.piece = kThreads * kAtOnce;
      blocks += (c.width + c.piece - 1) / c.piece;
    } else {
      constexpr int64_t kBytes = kThreads * kAtOnce * 16;
      const int64_t most = width < kBytes / 8 ? kBytes / width : 8;  // at least a row a warp
      c.piece = -most;
      blocks += (rows + most - 1) / most;
    }
  }
  if (a.count == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  copy_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}
