// Sums over the GPUs of several processes by NCCL, on a stream of their own, so that a backward pass goes on meanwhile.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <unistd.h>

#include <cstring>
#include <exception>

#include "oryx/common/error.h"
#include "oryx/ops/cuda/launch.h"
#include "oryx/parallel/nccl_api.h"
#include "oryx/parallel/process_group.h"

namespace oryx {
namespace {

NcclType nccl_type(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return NcclType::kFloat32;
    case at::kDouble: return NcclType::kFloat64;
    case at::kBFloat16: return NcclType::kBfloat16;
    default: TORCH_CHECK(false, "process group: tensors of ", x.scalar_type(), ", expected float32, float64 or bfloat16");
  }
}

// A card of a host, whatever number a process knows it by.
std::string card_name(at::Device device) {
  char host[256] = {};
  ::gethostname(host, sizeof host - 1);
  char bus[32] = {};
  ops::cuda::check("process group", cudaDeviceGetPCIBusId(bus, sizeof bus, device.index()));
  return fmt::format("{} of host {}", bus, host);
}

class NcclGroup : public ProcessGroup {
 public:
  NcclGroup(std::unique_ptr<Ring> own_ring, at::Device device)
      : ProcessGroup(std::move(own_ring)), device_(device), stream_(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device.index())) {
    const auto cards = gather(card_name(device));
    for (size_t a = 0; a < cards.size(); ++a) {
      for (size_t b = 0; b < a; ++b) {
        if (cards[a] == cards[b]) fail("ranks {} and {} are both on GPU {}; start no more processes than GPUs, each on one of its own", b, a, cards[a]);
      }
    }
    c10::cuda::set_device(device.index());  // of this thread: what asks for memory by no tensor's name asks here
    for (cudaEvent_t* event : {&ready_, &done_}) ops::cuda::check("process group", cudaEventCreateWithFlags(event, cudaEventDisableTiming));
    NcclUniqueId id{};
    std::string told;
    if (first()) {
      check(NcclApi::get().get_unique_id(&id), "begin");
      told.assign(id.internal, sizeof id.internal);
    }
    const std::string chosen = gather(told)[0];
    TORCH_CHECK(chosen.size() == sizeof id.internal, "process group: an id of ", chosen.size(), " bytes");
    std::memcpy(id.internal, chosen.data(), chosen.size());
    check(NcclApi::get().comm_init_rank(&comm_, static_cast<int>(size()), id, static_cast<int>(rank())), "join");
  }

  // Nobody waits for ranks that may be gone: only where all is well do all leave together.
  ~NcclGroup() override {
    const auto& api = NcclApi::get();
    if (comm_ != nullptr) (void)(std::uncaught_exceptions() > 0 ? api.comm_abort(comm_) : api.comm_destroy(comm_));
    for (cudaEvent_t event : {ready_, done_}) {
      if (event != nullptr) (void)cudaEventDestroy(event);
    }
  }

  at::Device device() const override { return device_; }

  void reduce_scatter(const at::Tensor& parts) override {
    const size_t count = part_of(parts);
    const On on(*this);
    auto* const base = static_cast<char*>(parts.mutable_data_ptr());
    check(NcclApi::get().reduce_scatter(base, base + own_offset(parts, count), count, nccl_type(parts), NcclReduction::kSum, comm_, stream_.stream()), "sum over the processes");
  }

  void all_gather(const at::Tensor& parts) override {
    const size_t count = part_of(parts);
    const On on(*this);
    auto* const base = static_cast<char*>(parts.mutable_data_ptr());
    check(NcclApi::get().all_gather(base + own_offset(parts, count), base, count, nccl_type(parts), comm_, stream_.stream()), "gather from the processes");
  }

  void all_reduce(const at::Tensor& values) override {
    TORCH_CHECK(values.device() == device_ && values.is_contiguous(), "process group: expected a contiguous tensor on ", device_);
    const On on(*this);
    void* const base = values.mutable_data_ptr();
    check(NcclApi::get().all_reduce(base, base, static_cast<size_t>(values.numel()), nccl_type(values), NcclReduction::kSum, comm_, stream_.stream()), "sum over the processes");
  }

  void finish() override {
    const c10::cuda::CUDAGuard guard(device_);
    order(done_, stream_, c10::cuda::getCurrentCUDAStream(device_.index()));
  }

  std::string transport() const override {
    int v = 0;
    (void)NcclApi::get().get_version(&v);
    return fmt::format("NCCL {}.{}.{}", v / 10000, v / 100 % 100, v % 100);
  }

 private:
  // What `second` is given from now on runs behind what `first` has been given so far.
  static void order(cudaEvent_t event, cudaStream_t first, cudaStream_t second) {
    ops::cuda::check("process group", cudaEventRecord(event, first));
    ops::cuda::check("process group", cudaStreamWaitEvent(second, event, 0));
  }
  // Our stream behind the caller's. (Tensors live on until finish() has ordered the streams the other way around.)
  struct On {
    explicit On(NcclGroup& group) : guard(group.device_) { order(group.ready_, c10::cuda::getCurrentCUDAStream(group.device_.index()), group.stream_); }
    c10::cuda::CUDAGuard guard;
  };

  size_t part_of(const at::Tensor& x) const {
    TORCH_CHECK(x.device() == device_ && x.is_contiguous() && x.numel() % size() == 0, "process group: expected a contiguous tensor on ", device_, " in ", size(), " equal parts");
    return static_cast<size_t>(x.numel() / size());
  }
  size_t own_offset(const at::Tensor& x, size_t count) const { return static_cast<size_t>(rank()) * count * x.element_size(); }

  void check(NcclResult result, const char* what) const {
    if (result == 0) return;
    const auto& api = NcclApi::get();
    const char* more = api.get_last_error(nullptr);
    fail("rank {} of {} could not {}: NCCL says {}{}{}; NCCL_DEBUG=INFO says more", rank(), size(), what, api.get_error_string(result), more != nullptr && *more != 0 ? ": " : "",
         more != nullptr ? more : "");
  }

  at::Device device_;
  c10::cuda::CUDAStream stream_;
  NcclComm comm_ = nullptr;
  cudaEvent_t ready_ = nullptr, done_ = nullptr;
};

std::unique_ptr<ProcessGroup> make_nccl_group(std::unique_ptr<Ring> ring, at::Device device) {
  return std::make_unique<NcclGroup>(std::move(ring), device);
}

const bool kNcclRegistered = detail::register_device_group(make_nccl_group);

}  // namespace
}  // namespace oryx
