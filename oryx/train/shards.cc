#include "oryx/train/shards.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <limits>

#include "oryx/common/error.h"

namespace oryx {

namespace {

constexpr int64_t kBucketValues = 32 << 20;  // 128 MiB of sums: long enough for the full bandwidth, short enough that the last one is soon done
constexpr int64_t kPlaceValues = 128;        // parameters begin where kernels want their weights to: at multiples of 256 bytes

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace

struct Shards::Hook : torch::autograd::PostAccumulateGradHook {
  Hook(Shards& shards, size_t parameter) : shards(shards), parameter(parameter) {}
  void operator()(const at::Tensor& leaf) override { shards.arrived(parameter, leaf); }
  Shards& shards;
  size_t parameter;
};

Shards::Shards(const LanguageModel& model, ProcessGroup& group) : model_(model), group_(group), bucket_of_(model.specs().size()), gradients_(model.specs().size()), filled_(model.specs().size()) {
  const at::NoGradGuard no_grad;
  for (const auto& p : model.parameters()) TORCH_CHECK(p.scalar_type() == at::kFloat, "shards: parameters are ", p.scalar_type(), ", expected float32");
  lay_out();
  for (Bucket& b : buckets_) make_bucket(b);
  if (pieces_.empty()) fail("the model has too few parameters for {} processes; start fewer", group.size());
  loss_ = at::zeros({}, at::TensorOptions(model.device()).dtype(at::kFloat));
  take_parameters();
  if (!model.device().is_cpu()) c10::getDeviceAllocator(model.device().type())->emptyCache();  // what was freed lies in pieces that a step's tensors do not fit
  for (size_t i = 0; i < filled_.size(); ++i) torch::autograd::impl::set_post_acc_grad_hooks(model.leaf(i), std::make_unique<Hook>(*this, i));
}

Shards::~Shards() {
  for (size_t i = 0; i < filled_.size(); ++i) torch::autograd::impl::set_post_acc_grad_hooks(model_.leaf(i), nullptr);
}

void Shards::lay_out() {
  // Gradients come from the last layer to the first.
  std::vector<Bucket> last(2);  // of each kind the one that is being filled
  std::vector<int64_t> sizes(2);
  const auto close = [&](size_t kind) {
    if (last[kind].parameters.empty()) return;
    last[kind].copies = kind == 1;
    last[kind].part = rounded_up(sizes[kind], group_.size() * kPlaceValues) / group_.size();
    for (const size_t p : last[kind].parameters) bucket_of_[p] = buckets_.size();
    buckets_.push_back(std::move(last[kind]));
    last[kind] = {}, sizes[kind] = 0;
  };
  for (size_t i = model_.specs().size(); i-- > 0;) {
    const size_t kind = !model_.copies().empty() && model_.copies()[i].defined() ? 1 : 0;
    last[kind].parameters.push_back(i);
    last[kind].offsets.push_back(sizes[kind]);
    sizes[kind] += rounded_up(model_.specs()[i].numel(), kPlaceValues);
    if (sizes[kind] >= kBucketValues) close(kind);
  }
  close(1), close(0);
}

void Shards::make_bucket(Bucket& b) {
  const int64_t whole = b.part * group_.size(), begin = b.part * group_.rank(), end = begin + b.part;
  const at::TensorOptions here(model_.device());
  b.gradients = at::zeros({whole}, here.dtype(at::kFloat));
  if (b.copies) b.masters = at::zeros({b.part}, here.dtype(at::kFloat));
  b.weights = at::zeros({whole}, here.dtype(b.copies ? model_.copies()[b.parameters[0]].scalar_type() : at::kFloat));
  const size_t index = static_cast<size_t>(&b - buckets_.data());
  for (size_t k = 0; k < b.parameters.size(); ++k) {
    const size_t i = b.parameters[k];
    const int64_t at = b.offsets[k], n = model_.specs()[i].numel();
    gradients_[i] = b.gradients.narrow(0, at, n).view(model_.specs()[i].shape);
    at::Tensor leaf = model_.leaf(i);
    const at::Tensor place = b.weights.narrow(0, at, n).view(leaf.sizes());
    place.copy_(leaf.detach());
    leaf.set_data(place);
    const int64_t from = std::max(at, begin), to = std::min(at + n, end);
    if (from >= to) continue;
    Piece piece{i, {}, b.gradients.narrow(0, from, to - from), {}, index, from - begin, from - at};
    piece.p = b.copies ? b.masters.narrow(0, piece.at, to - from) : model_.parameters()[i].detach().view({-1}).narrow(0, from - at, to - from);
    if (b.copies) piece.weight = b.weights.narrow(0, from, to - from);
    pieces_.push_back(std::move(piece));
  }
}

int64_t Shards::part(size_t bucket) const { return buckets_[bucket].part; }

void Shards::begin(int64_t passes, bool early) {
  passes_ = passes, pass_ = 0, early_ = early, started_ = 0, open_ = true;
  std::fill(filled_.begin(), filled_.end(), 0);
  for (Bucket& b : buckets_) b.open = static_cast<int64_t>(b.parameters.size());
  if (!model_.device().is_cpu()) stream_ = c10::impl::VirtualGuardImpl(model_.device().type()).getStream(model_.device());
}

// Called from within a backward pass, when a leaf's gradient of this pass is whole.
void Shards::arrived(size_t i, const at::Tensor& leaf) {
  if (!open_) return;  // somebody else's backward pass
  const at::NoGradGuard no_grad;
  const c10::OptionalStreamGuard on(stream_);  // that of the leaf may be another
  Bucket& b = buckets_[bucket_of_[i]];
  TORCH_CHECK(bucket_of_[i] >= started_, "shards: a gradient of ", model_.specs()[i].name, " came when it had been summed over the processes");
  at::Tensor own = leaf;
  if (filled_[i] != 0) gradients_[i].add_(own.grad());
  else gradients_[i].copy_(own.grad());
  filled_[i] = 1;
  own.mutable_grad().reset();
  if (pass_ + 1 < passes_) return;
  --b.open;
  while (early_ && started_ < buckets_.size() && buckets_[started_].open <= 0) start(buckets_[started_++]);
}

void Shards::start(Bucket& b) { group_.reduce_scatter(b.gradients); }

void Shards::end(const at::Tensor& loss) {
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < filled_.size(); ++i) {
    if (filled_[i] == 0) gradients_[i].zero_();
  }
  loss_.copy_(loss.detach());
  open_ = false;
}

void Shards::reduce() {
  while (started_ < buckets_.size()) start(buckets_[started_++]);
  started_ = 0;
  group_.all_reduce(loss_);
  group_.finish();
}

void Shards::gather_weights(size_t bucket) { group_.all_gather(buckets_[bucket].weights); }

void Shards::finish_weights() {
  group_.finish();
  for (size_t i = 0; i < filled_.size(); ++i) {  // written by way of their buckets
    for (const at::Tensor* t : {&model_.leaf(i), &model_.parameters()[i]}) t->unsafeGetTensorImpl()->bump_version();
  }
}

void Shards::assemble(const std::function<at::Tensor(size_t)>& values, const std::function<void(size_t, const at::Tensor&)>& take) {
  const at::NoGradGuard no_grad;
  for (size_t at = 0; at < buckets_.size(); ++at) {
    const Bucket& b = buckets_[at];
    const at::Tensor whole = at::empty_like(b.gradients);
    whole.narrow(0, b.part * group_.rank(), b.part).copy_(values(at));
    group_.all_gather(whole);
    group_.finish();
    for (size_t k = 0; k < b.parameters.size(); ++k) {
      const auto& spec = model_.specs()[b.parameters[k]];
      take(b.parameters[k], whole.narrow(0, b.offsets[k], spec.numel()).view(spec.shape));
    }
  }
}

void Shards::assemble_parameters() {
  const auto own = [&](size_t bucket) {
    const Bucket& b = buckets_[bucket];
    return b.copies ? b.masters : b.weights.narrow(0, b.part * group_.rank(), b.part);
  };
  assemble(own, [&](size_t i, const at::Tensor& whole) {
    at::Tensor parameter = model_.parameters()[i];
    if (group_.first() && buckets_[bucket_of_[i]].copies) parameter.set_data(whole.cpu());
  });
}

void Shards::hold_parameters() {
  for (const Bucket& b : buckets_) {
    for (const size_t i : b.parameters) {
      at::Tensor parameter = model_.parameters()[i];
      if (b.copies) parameter.set_data(at::empty(model_.specs()[i].shape, loss_.options()));
    }
  }
}

void Shards::take_parameters() {
  const at::NoGradGuard no_grad;
  for (const Piece& piece : pieces_) {
    if (piece.weight.defined()) at::Tensor(piece.p).copy_(model_.parameters()[piece.parameter].detach().reshape({-1}).narrow(0, piece.from, piece.p.numel()));
  }
  release_parameters();
}

void Shards::release_parameters() {
  const at::Tensor nothing = at::full({1}, std::numeric_limits<double>::quiet_NaN(), loss_.options());  // who reads it all the same shall notice
  for (const Bucket& b : buckets_) {
    for (const size_t i : b.parameters) {
      at::Tensor parameter = model_.parameters()[i];
      if (b.copies) parameter.set_data(nothing.expand(model_.specs()[i].shape));
    }
  }
}

}  // namespace oryx
