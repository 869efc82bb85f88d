// The part of NCCL's C interface that is used here, which has been stable since NCCL 2.4: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api.html. The library is opened at run time
// (libnccl.so.2, which libtorch's CUDA wheels bring along), so that nothing of it is needed to build.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace oryx {

using NcclComm = struct NcclCommOpaque*;
struct NcclUniqueId {
  char internal[128];
};
enum class NcclType : int { kInt8 = 0, kFloat32 = 7, kFloat64 = 8, kBfloat16 = 9 };
enum class NcclReduction : int { kSum = 0 };
using NcclResult = int;  // 0: fine

struct NcclApi {
  NcclResult (*get_version)(int*);
  NcclResult (*get_unique_id)(NcclUniqueId*);
  NcclResult (*comm_init_rank)(NcclComm*, int ranks, NcclUniqueId, int rank);
  NcclResult (*comm_destroy)(NcclComm);
  NcclResult (*comm_abort)(NcclComm);
  const char* (*get_error_string)(NcclResult);
  const char* (*get_last_error)(NcclComm);
  NcclResult (*all_reduce)(const void*, void*, size_t count, NcclType, NcclReduction, NcclComm, cudaStream_t);
  NcclResult (*reduce_scatter)(const void*, void*, size_t count_of_a_part, NcclType, NcclReduction, NcclComm, cudaStream_t);
  NcclResult (*all_gather)(const void*, void*, size_t count_of_a_part, NcclType, NcclComm, cudaStream_t);
  NcclResult (*group_start)();
  NcclResult (*group_end)();

  // Opens the library once a process. Throws Error where it is not found or lacks a function.
  static const NcclApi& get();
};

}  // namespace oryx
