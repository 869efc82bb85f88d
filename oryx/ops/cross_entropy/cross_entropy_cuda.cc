// Cross-entropy on CUDA: products by cuBLAS into one buffer of logits, everything between them by cuda/cross_entropy.cu.
#include <torch/library.h>

#include <algorithm>

#include "oryx/common/error.h"
#include "oryx/ops/cross_entropy/cross_entropy_internal.h"
#include "oryx/ops/cross_entropy/cuda/cross_entropy_launch.h"
#include "oryx/ops/cuda/launch.h"

namespace oryx::ops {
namespace {

using Five = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Bytes of logits that stand at once: 16,384 rows of 32,000 classes in bfloat16. The weight's gradient is one product then; further
// blocks add to it in float32.
constexpr int64_t kBlockBytes = int64_t{1} << 30;
constexpr int64_t kMinBlockRows = 256;

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) == cudaSuccess && status != cudaStreamCaptureStatusNone;
}

struct Targets {
  at::Tensor rows;    // [N] int32 on the device
  at::Tensor counts;  // [2] int64: how many are kept, the first bad row
};

// Targets on the CPU are checked there. Those on the device are checked on it, which waits for them, but not while a graph is
// captured: a bad target then makes the loss NaN.
Targets take_targets(const char* op, const at::Tensor& targets, int64_t classes, int64_t ignore_index, const at::Tensor& like, bool check = true) {
  const cudaStream_t stream = cuda::stream_of(like);
  const bool on_device = targets.is_cuda();
  const at::Tensor wide = targets.to(at::kLong).contiguous();
  if (check && !on_device) count_kept(op, wide, classes, ignore_index);
  TORCH_CHECK(ignore_index >= INT32_MIN && ignore_index <= INT32_MAX, op, ": ignore_index ", ignore_index, " is no int32");
  Targets t;
  if (on_device) {
    t.rows = wide.clamp(INT32_MIN, INT32_MAX).to(like.device(), at::kInt);
  } else {
    t.rows = wide.to(at::kInt).pin_memory().to(like.device(), at::kInt, /*non_blocking=*/true);
  }
  t.counts = at::empty({2}, t.rows.options().dtype(at::kLong));
  const int64_t n = targets.numel();
  cuda::check(op, oryx_cross_entropy_count(t.rows.const_data_ptr<int32_t>(), n, classes, ignore_index, t.counts.mutable_data_ptr<int64_t>(),
                                           stream));
  if (check && on_device && !is_capturing(stream) && t.counts[1].item<int64_t>() < n) count_kept(op, wide.cpu(), classes, ignore_index);
  return t;
}

// Statistics of `logits` into nll and lse (both [rows] or undefined), its gradient into d_logits unless that is undefined.
void softmax(const char* op, const at::Tensor& logits, const at::Tensor& d_logits, const Targets& t, int64_t first, const at::Tensor& nll,
             const at::Tensor& lse, const at::Tensor& d_loss, int64_t ignore_index, double z_coef) {
  OryxCrossEntropyRows rows{};
  rows.logits = logits.const_data_ptr();
  rows.d_logits = cuda::write_or_null(d_logits);
  rows.targets = t.rows.const_data_ptr<int32_t>() + first;
  rows.nll = nll.defined() ? nll.mutable_data_ptr<float>() + first : nullptr;
  rows.lse = lse.defined() ? lse.mutable_data_ptr<float>() + first : nullptr;
  rows.counts = t.counts.const_data_ptr<int64_t>();
  rows.d_loss = static_cast<const float*>(cuda::read_or_null(d_loss));
  rows.rows = logits.size(0), rows.classes = logits.size(1), rows.stride = logits.stride(0);
  rows.ignore_index = ignore_index, rows.z_coef = static_cast<float>(z_coef);
  cuda::check(op, oryx_cross_entropy_rows(cuda::kernel_dtype(op, logits), &rows, cuda::stream_of(logits)));
}

at::Tensor mean_loss(const char* op, const at::Tensor& nll, const at::Tensor& lse, const Targets& t, int64_t ignore_index, double z_coef) {
  const at::Tensor loss = at::empty({}, nll.options());
  cuda::check(op, oryx_cross_entropy_loss(nll.const_data_ptr<float>(), lse.const_data_ptr<float>(), t.rows.const_data_ptr<int32_t>(),
                                          nll.numel(), ignore_index, z_coef, t.counts.const_data_ptr<int64_t>(),
                                          loss.mutable_data_ptr<float>(), cuda::stream_of(nll)));
  return loss;
}

// loss, nll, lse, and two that only the CPU's backward wants
Five forward_cuda(const at::Tensor& logits, const at::Tensor& targets, int64_t ignore_index, double z_coef) {
  const char* op = "cross_entropy";
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor x = logits.contiguous();
  const Targets t = take_targets(op, targets, x.size(1), ignore_index, x);
  const at::Tensor nll = at::empty({x.size(0)}, x.options().dtype(at::kFloat)), lse = at::empty_like(nll), none = at::empty({0}, nll.options());
  softmax(op, x, {}, t, 0, nll, lse, {}, ignore_index, z_coef);
  return {mean_loss(op, nll, lse, t, ignore_index, z_coef), nll, lse, none, none};
}

at::Tensor backward_cuda(const at::Tensor& d_loss, const at::Tensor& logits, const at::Tensor& targets, const at::Tensor&, const at::Tensor&,
                         const at::Tensor&, int64_t ignore_index, double z_coef) {
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor x = logits.contiguous(), d_logits = at::empty_like(x);
  const Targets t = take_targets("cross_entropy", targets, x.size(1), ignore_index, x, /*check=*/false);
  softmax("cross_entropy", x, d_logits, t, 0, {}, {}, d_loss.to(x.device(), at::kFloat).contiguous(), ignore_index, z_coef);
  return d_logits;
}

// The gradient of weight [C, D] over blocks of rows: one product where one block holds all; else in float32, to which cuBLAS adds.
class WeightGradient {
 public:
  WeightGradient(const at::Tensor& weight, bool one_block) : dtype_(weight.scalar_type()) {
    total_ = at::empty(weight.sizes(), weight.options().dtype(one_block ? dtype_ : at::kFloat));
  }

  void add(const at::Tensor& d_logits, const at::Tensor& hidden) {
    const at::Tensor left = d_logits.t();
    const bool widens = total_.scalar_type() != left.scalar_type();
    if (first_) {
      widens ? at::mm_out(total_, left, hidden, at::kFloat) : at::mm_out(total_, left, hidden);
    } else {
      widens ? at::addmm_out(total_, total_, left, hidden, at::kFloat) : at::addmm_out(total_, total_, left, hidden);
    }
    first_ = false;
  }

  at::Tensor take() {
    if (first_) total_.zero_();
    return total_.to(dtype_);
  }

 private:
  at::ScalarType dtype_;
  at::Tensor total_;
  bool first_ = true;
};

Five linear_forward_cuda(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets, int64_t ignore_index, double z_coef,
                         bool want_hidden, bool want_weight) {
  const char* op = "linear_cross_entropy";
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const c10::cuda::CUDAGuard guard(hidden.device());
  const at::Tensor h = hidden.contiguous(), w = weight.contiguous();
  const int64_t n = h.size(0), classes = w.size(0), packet = 16 / h.element_size();
  const Targets t = take_targets(op, targets, classes, ignore_index, h);
  const at::Tensor nll = at::empty({n}, h.options().dtype(at::kFloat)), lse = at::empty_like(nll);
  at::Tensor d_hidden = at::empty({0}, h.options());
  if (want_hidden) d_hidden = at::empty_like(h);

  const int64_t stride = (classes + packet - 1) / packet * packet;  // rows begin at multiples of 16 bytes
  const int64_t most = std::max(kMinBlockRows, kBlockBytes / std::max<int64_t>(stride * h.element_size(), 1) / 128 * 128);
  const int64_t blocks = (n + most - 1) / most, height = blocks > 0 ? (n + blocks - 1) / blocks : 0;
  const at::Tensor buffer = at::empty({height, stride}, h.options());
  if (stride > classes) buffer.narrow(1, classes, stride - classes).zero_();  // read with the last packet, and left out there
  std::optional<WeightGradient> d_weight;
  if (want_weight) d_weight.emplace(w, blocks <= 1);
  for (int64_t first = 0; first < n; first += height) {
    const int64_t count = std::min(height, n - first);
    const at::Tensor part = h.narrow(0, first, count);
    at::Tensor logits = buffer.narrow(0, 0, count).narrow(1, 0, classes);
    at::mm_out(logits, part, w.t());
    softmax(op, logits, want_hidden || want_weight ? logits : at::Tensor(), t, first, nll, lse, {}, ignore_index, z_coef);
    if (want_hidden) {
      at::Tensor out = d_hidden.narrow(0, first, count);
      at::mm_out(out, logits, w);
    }
    if (d_weight) d_weight->add(logits, part);
  }
  return {mean_loss(op, nll, lse, t, ignore_index, z_coef), nll, lse, d_hidden, d_weight ? d_weight->take() : at::empty({0}, w.options())};
}

// Without waiting for the factor.
void scale_cuda(at::TensorList tensors, const at::Tensor& factor) {
  for (const at::Tensor& x : tensors) {
    if (x.numel() == 0) continue;
    const c10::cuda::CUDAGuard guard(x.device());
    const at::Tensor by = factor.to(x.device(), at::kFloat).contiguous();
    cuda::check("linear_cross_entropy", oryx_scale(cuda::kernel_dtype("linear_cross_entropy", x), x.mutable_data_ptr(), x.numel(),
                                                   by.const_data_ptr<float>(), cuda::stream_of(x)));
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(oryx, CUDA, m) {
  m.impl("_cross_entropy", forward_cuda);
  m.impl("_cross_entropy_backward", backward_cuda);
  m.impl("_linear_cross_entropy", linear_forward_cuda);
  m.impl("_linear_cross_entropy_scale_", scale_cuda);
}

}  // namespace oryx::ops
