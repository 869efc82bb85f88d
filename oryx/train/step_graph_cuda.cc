// Captured steps: forward, backward, gradient norm, clipping and AdamW of all of a step's batches in one graph; of several processes, forward and backward.
//
// A graph reads its batches from memory of its own, which run() fills in front of each replay (packed_batch.h); the learning rate, the number of steps taken, and whether the
// step is taken at all lie on the device anyway. All graphs share one pool: they run one behind the other, and of what one leaves only the parameters, moments and the
// optimiser's record are read afterwards, which lie outside.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <map>
#include <set>

#include "oryx/common/error.h"
#include "oryx/common/log.h"
#include "oryx/ops/cuda/captured_graph.h"
#include "oryx/ops/cuda/launch.h"
#include "oryx/train/step_graph.h"

namespace oryx {
namespace {

constexpr size_t kMostGraphs = 24, kMostKinds = 1000;

struct CapturedStep {
  std::vector<at::Tensor> inputs;  // a batch each
  std::unique_ptr<ops::cuda::CapturedGraph> graph;
};

class CudaStepGraphs : public StepGraphs {
 public:
  CudaStepGraphs(LanguageModel& model, Optimizer& optimizer, const StepOptions& options, CaptureWhere where)
      : model_(model),
        optimizer_(optimizer),
        options_(options),
        where_(where),
        pool_(at::cuda::graph_pool_handle()),
        side_(c10::cuda::getStreamFromPool(false, model.device().index())) {
    c10::cuda::CUDACachingAllocator::resetPeakStats(model.device().index());  // the peak from here on is a step's
  }

  bool run(const std::vector<FedBatch>& batches, BatchFeed& feed, double lr) override {
    if (broken_) return false;
    const c10::cuda::CUDAGuard guard(model_.device());
    std::string key, kind;
    for (const FedBatch& b : batches) {
      if (!b.packed.layout->fixed_shapes) return gathers();
      key += b.packed.layout->key + "\n", kind += b.packed.layout->kind + "\n";
    }
    auto it = steps_.find(key);
    if (it == steps_.end()) {
      // What kernels and libraries prepare when they first run, they prepare outside of a capture.
      if (steps_.size() >= kMostGraphs || (seen_.size() < kMostKinds && seen_.insert(kind).second) || seen_.count(kind) == 0) return by_kernels();
      CapturedStep step;
      if (!capture(batches, feed, step)) return false;
      it = steps_.emplace(key, std::move(step)).first;
    }
    CapturedStep& step = it->second;
    for (size_t i = 0; i < batches.size(); ++i) step.inputs[i].copy_(batches[i].packed.bytes, /*non_blocking=*/true);
    optimizer_.set_rate(lr);
    step.graph->replay();
    for (const at::Tensor& p : model_.parameters()) p.unsafeGetTensorImpl()->bump_version();  // as the operators do when they run
    if (optimizer_.divided()) optimizer_.update(optimizer_.sum_over_processes({}), lr, options_.clip);
    return true;
  }

  int64_t captured() const override { return static_cast<int64_t>(steps_.size()); }

 private:
  bool gathers() {
    if (where_ == CaptureWhere::kAnywhere && !std::exchange(told_, true)) log::info("layers as wide as these gather each mixer's tokens, as many as a batch has: such steps run kernel by kernel (docs/training.md)");
    return by_kernels();
  }

  struct Memory {
    int64_t free, reserved, used, most_used;  // of the device; of the allocator: from the device, for tensors, and for tensors at most
  };
  Memory memory() const {
    size_t free = 0, all = 0;
    ops::cuda::check("step graph", cudaMemGetInfo(&free, &all));
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(model_.device().index());
    constexpr auto kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    return {static_cast<int64_t>(free), stats.reserved_bytes[kAll].current, stats.allocated_bytes[kAll].current, stats.allocated_bytes[kAll].peak};
  }

  // A step by kernels takes as much memory again as the graphs' pool: where that is more than there is, graphs go, and are captured anew.
  bool by_kernels() {
    if (steps_.empty()) return false;
    const Memory m = memory();
    if (m.free + (m.reserved - m.used - pool_bytes_) >= step_bytes_) return false;
    ops::cuda::check("step graph", cudaDeviceSynchronize());
    steps_.clear();
    pool_ = at::cuda::graph_pool_handle();  // a pool that no graph uses any more takes no new ones
    pool_bytes_ = 0;
    c10::cuda::CUDACachingAllocator::emptyCache();
    return false;
  }

  bool capture(const std::vector<FedBatch>& batches, BatchFeed& feed, CapturedStep& step) {
    const auto pause = feed.pause();
    optimizer_.clear_gradients();
    for (const FedBatch& b : batches) step.inputs.push_back(at::empty_like(b.packed.bytes));
    step.graph = std::make_unique<ops::cuda::CapturedGraph>();
    ops::cuda::check("step graph", cudaDeviceSynchronize());
    c10::cuda::CUDACachingAllocator::emptyCache();
    const Memory before = memory();
    step_bytes_ = std::max(step_bytes_, before.most_used - before.used);
    if (where_ == CaptureWhere::kInRoom && before.free + pool_bytes_ < step_bytes_ + step_bytes_ / 2) {
      broken_ = true;
      return false;
    }
    const c10::cuda::CUDAStreamGuard on(side_);
    bool begun = false;
    optimizer_.sum_early(false);
    try {
      step.graph->capture_begin(pool_, cudaStreamCaptureModeThreadLocal);
      begun = true;
      const at::Tensor loss = add_gradients(model_, optimizer_, options_, [&](int64_t i) {
        const auto place = static_cast<size_t>(i);
        UnpackedBatch batch = unpack_batch(*batches[place].packed.layout, step.inputs[place]);
        return StepBatch{std::move(batch.input), std::move(batch.targets), std::move(batch.weight)};
      });
      // Of several processes each captures when its own batches are of a kind that it has seen: what they do together stays outside.
      if (!optimizer_.divided()) optimizer_.update(loss, Optimizer::kRateOnDevice, options_.clip);
      optimizer_.clear_gradients();  // their memory is the graph's
    } catch (const std::exception& e) {
      return give_up(step, begun, e.what());
    }
    try {
      step.graph->capture_end();
    } catch (const std::exception& e) {
      return give_up(step, begun, e.what());
    }
    optimizer_.sum_early(true);
    pool_bytes_ += memory().reserved - before.reserved;
    return true;
  }

  bool give_up(CapturedStep& step, bool begun, std::string_view why) {
    broken_ = true;
    optimizer_.sum_early(true);
    if (begun) step.graph->abandon();
    optimizer_.clear_gradients();
    log::warn("a training step could not be captured in a CUDA graph ({}); steps run kernel by kernel from here on", why.substr(0, why.find('\n')));
    return false;
  }

  LanguageModel& model_;
  Optimizer& optimizer_;
  StepOptions options_;
  CaptureWhere where_;
  c10::MempoolId_t pool_;
  c10::cuda::CUDAStream side_;  // of every capture: cuBLAS keeps a workspace for each stream that it has seen
  std::map<std::string, CapturedStep> steps_;
  std::set<std::string> seen_;  // kinds that have run
  int64_t step_bytes_ = 0, pool_bytes_ = 0;  // the most that a step by kernels takes beside what stays; the pool
  bool broken_ = false, told_ = false;       // no more captures; the notice has been given
};

std::unique_ptr<StepGraphs> make_cuda_step_graphs(LanguageModel& model, Optimizer& optimizer, const StepOptions& options, CaptureWhere where, std::string* why) {
  const auto* properties = at::cuda::getDeviceProperties(model.device().index());
  if (properties->major != 9) {
    *why = fmt::format("{}: the kernels are for Hopper", properties->name);
    return nullptr;
  }
  return std::make_unique<CudaStepGraphs>(model, optimizer, options, where);
}

const bool kStepGraphsRegistered = detail::register_step_graphs(make_cuda_step_graphs);

}  // namespace
}  // namespace oryx
