#include "oryx/parallel/nccl_api.h"

#include <dlfcn.h>

#include "oryx/common/error.h"

namespace oryx {

namespace {

template <typename F>
void find_function(void* library, const char* name, F** function) {
  *function = reinterpret_cast<F*>(::dlsym(library, name));
  if (*function == nullptr) fail("libnccl.so.2 has no function {}; is it NCCL 2.14 or newer?", name);
}

NcclApi open_nccl() {
  // libtorch_cuda has opened it already where it comes with one; elsewhere the loader's path decides.
  void* library = ::dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    fail("NCCL, by which GPUs exchange gradients, was not found: {}; install the wheel nvidia-nccl-cu13 beside torch, or name the folder of libnccl.so.2 in LD_LIBRARY_PATH", ::dlerror());
  }
  NcclApi api{};
  find_function(library, "ncclGetVersion", &api.get_version);
  find_function(library, "ncclGetUniqueId", &api.get_unique_id);
  find_function(library, "ncclCommInitRank", &api.comm_init_rank);
  find_function(library, "ncclCommDestroy", &api.comm_destroy);
  find_function(library, "ncclCommAbort", &api.comm_abort);
  find_function(library, "ncclGetErrorString", &api.get_error_string);
  find_function(library, "ncclGetLastError", &api.get_last_error);
  find_function(library, "ncclAllReduce", &api.all_reduce);
  find_function(library, "ncclReduceScatter", &api.reduce_scatter);
  find_function(library, "ncclAllGather", &api.all_gather);
  find_function(library, "ncclGroupStart", &api.group_start);
  find_function(library, "ncclGroupEnd", &api.group_end);
  return api;
}

}  // namespace

const NcclApi& NcclApi::get() {
  static const NcclApi api = open_nccl();
  return api;
}

}  // namespace oryx
