#include "oryx/ops/cross_entropy/cross_entropy.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "oryx/common/error.h"
#include "oryx/ops/cross_entropy/cross_entropy_internal.h"
#include "oryx/ops/cross_entropy/cross_entropy_kernels.h"

namespace oryx::ops {

int64_t count_kept(const char* op, const at::Tensor& targets, int64_t classes, int64_t ignore_index) {
  const int64_t* t = targets.const_data_ptr<int64_t>();
  int64_t kept = 0;
  for (int64_t i = 0; i < targets.numel(); ++i) {
    if (t[i] == ignore_index) continue;
    if (t[i] < 0 || t[i] >= classes) {
      fail(
          "{}: target {} at row {} is out of range, expected 0 to {} or {} (ignored); do tokeniser and vocabulary size "
          "agree?",
          op, t[i], i, classes - 1, ignore_index);
    }
    ++kept;
  }
  return kept;
}

void check_targets(const at::Tensor& targets, int64_t classes, int64_t ignore_index) { count_kept("linear_cross_entropy", targets.contiguous(), classes, ignore_index); }

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Five = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Rows of logits that stand at once: 64 MB of float32. More rows mean fewer passes over the weight's gradient, fewer mean
// less memory.
constexpr int64_t kBlockElements = int64_t{16} << 20;
constexpr int64_t kMinBlockRows = 64;

// ---- arguments

void check_shapes(const char* op, const at::Tensor& rows, const at::Tensor& targets) {
  TORCH_CHECK(rows.dim() == 2, op, ": expected two axes, found ", rows.sizes());
  TORCH_CHECK(targets.dim() == 1 && targets.size(0) == rows.size(0), op, ": targets ", targets.sizes(), " do not fit ",
              rows.sizes());
  TORCH_CHECK(targets.scalar_type() == at::kInt || targets.scalar_type() == at::kLong, op, ": targets are ",
              targets.scalar_type(), ", expected int32 or int64");
}

// ---- on the CPU

struct Statistics {
  at::Tensor nll, lse, max, inverse_sum;  // [N] float32
  explicit Statistics(int64_t n)
      : nll(at::empty({n}, at::kFloat)),
        lse(at::empty_like(nll)),
        max(at::empty_like(nll)),
        inverse_sum(at::empty_like(nll)) {}
};

// The rows from `first` on.
kernels::SoftmaxRows rows_of(const Statistics& s, const at::Tensor& targets, int64_t classes, int64_t ignore_index,
                             int64_t first = 0) {
  return {targets.const_data_ptr<int64_t>() + first,
          classes,
          ignore_index,
          s.nll.mutable_data_ptr<float>() + first,
          s.lse.mutable_data_ptr<float>() + first,
          s.max.mutable_data_ptr<float>() + first,
          s.inverse_sum.mutable_data_ptr<float>() + first};
}

// Calls f(pointer) with the elements of a contiguous tensor as the kernels want them.
template <class F>
void with_elements(const at::Tensor& x, F&& f) {
  if (x.scalar_type() == at::kFloat) return f(static_cast<float*>(x.mutable_data_ptr()));
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "cross_entropy: no kernel for ", x.scalar_type());
  f(static_cast<uint16_t*>(x.mutable_data_ptr()));
}

int64_t row_grain(int64_t classes) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(classes, 1)); }

// Sums in the order of the rows, in double.
at::Tensor mean_loss(const Statistics& s, const at::Tensor& targets, int64_t ignore_index, double z_coef,
                     int64_t kept) {
  const float *nll = s.nll.const_data_ptr<float>(), *lse = s.lse.const_data_ptr<float>();
  const int64_t* t = targets.const_data_ptr<int64_t>();
  double sum = 0;
  for (int64_t i = 0; i < targets.numel(); ++i) {
    if (t[i] != ignore_index) sum += nll[i] + z_coef * lse[i] * lse[i];
  }
  return at::scalar_tensor(kept > 0 ? sum / static_cast<double>(kept) : 0.0, at::kFloat);
}

// loss, nll, lse, max, inverse_sum
Five forward_cpu(const at::Tensor& logits, const at::Tensor& targets, int64_t ignore_index, double z_coef) {
  const at::Tensor x = logits.contiguous(), t = targets.to(at::kLong).contiguous();
  const int64_t kept = count_kept("cross_entropy", t, x.size(1), ignore_index);
  const Statistics s(x.size(0));
  const kernels::SoftmaxRows rows = rows_of(s, t, x.size(1), ignore_index);
  with_elements(x, [&](auto* p) {
    at::parallel_for(0, x.size(0), row_grain(x.size(1)),
                     [&](int64_t b, int64_t e) { kernels::softmax_forward(rows, p, b, e); });
  });
  return {mean_loss(s, t, ignore_index, z_coef, kept), s.nll, s.lse, s.max, s.inverse_sum};
}

at::Tensor backward_cpu(const at::Tensor& d_loss, const at::Tensor& logits, const at::Tensor& targets,
                        const at::Tensor& lse, const at::Tensor& max, const at::Tensor& inverse_sum,
                        int64_t ignore_index, double z_coef) {
  const at::Tensor x = logits.contiguous(), t = targets.to(at::kLong).contiguous();
  const int64_t kept = std::max<int64_t>(1, count_kept("cross_entropy", t, x.size(1), ignore_index));
  const float scale = static_cast<float>(d_loss.item<double>() / static_cast<double>(kept));
  Statistics s(0);
  s.lse = lse, s.max = max, s.inverse_sum = inverse_sum;
  const kernels::SoftmaxRows rows = rows_of(s, t, x.size(1), ignore_index);
  at::Tensor d_logits = at::empty_like(x);
  with_elements(x, [&](auto* p) {
    auto* out = static_cast<decltype(p)>(d_logits.mutable_data_ptr());
    at::parallel_for(0, x.size(0), row_grain(x.size(1)), [&](int64_t b, int64_t e) {
      kernels::softmax_backward(rows, p, out, scale, static_cast<float>(z_coef), b, e);
    });
  });
  return d_logits;
}

// The gradient of weight, summed over blocks in float32.
class WeightGradient {
 public:
  explicit WeightGradient(const at::Tensor& weight) : dtype_(weight.scalar_type()) {
    total_ = at::empty(weight.sizes(), weight.options().dtype(at::kFloat));
  }

  void add(const at::Tensor& d_logits, const at::Tensor& hidden) {
    if (dtype_ == at::kFloat) {
      if (first_) {
        at::mm_out(total_, d_logits.t(), hidden);
      } else {
        total_.addmm_(d_logits.t(), hidden);
      }
    } else {
      const at::Tensor part = at::mm(d_logits.t(), hidden);
      if (first_) {
        total_.copy_(part);
      } else {
        total_.add_(part);
      }
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

// loss, nll, lse, d_hidden, d_weight; the gradients are those of the loss, empty where not wanted.
Five linear_forward_cpu(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                        int64_t ignore_index, double z_coef, bool want_hidden, bool want_weight) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor h = hidden.contiguous(), w = weight.contiguous(), t = targets.to(at::kLong).contiguous();
  const int64_t n = h.size(0), classes = w.size(0);
  const int64_t kept = count_kept("linear_cross_entropy", t, classes, ignore_index);
  const float scale = 1.0f / static_cast<float>(std::max<int64_t>(kept, 1));
  const Statistics s(n);
  at::Tensor d_hidden = at::empty({0}, h.options());
  if (want_hidden) d_hidden = at::empty_like(h);
  std::optional<WeightGradient> d_weight;
  if (want_weight) d_weight.emplace(w);

  // Blocks of equal height: a low last one would cost nearly as much as a whole one.
  const int64_t most = std::max(kMinBlockRows, kBlockElements / std::max<int64_t>(classes, 1));
  const int64_t blocks = (n + most - 1) / most, height = blocks > 0 ? (n + blocks - 1) / blocks : 0;
  const at::Tensor buffer = at::empty({height, classes}, h.options());
  for (int64_t first = 0; first < n; first += height) {
    const int64_t count = std::min(height, n - first);
    const at::Tensor part = h.narrow(0, first, count);
    at::Tensor logits = buffer.narrow(0, 0, count);
    at::mm_out(logits, part, w.t());
    const kernels::SoftmaxRows rows = rows_of(s, t, classes, ignore_index, first);
    with_elements(logits, [&](auto* p) {
      at::parallel_for(0, count, row_grain(classes), [&](int64_t b, int64_t e) {
        for (int64_t r = b; r < e; ++r) {  // row by row: the gradient's pass finds the row in the cache
          kernels::softmax_forward(rows, p, r, r + 1);
          if (want_hidden || want_weight) {
            kernels::softmax_backward(rows, p, p, scale, static_cast<float>(z_coef), r, r + 1);
          }
        }
      });
    });
    if (want_hidden) {
      at::Tensor out = d_hidden.narrow(0, first, count);
      at::mm_out(out, logits, w);
    }
    if (d_weight) d_weight->add(logits, part);
  }
  return {mean_loss(s, t, ignore_index, z_coef, kept), s.nll, s.lse, d_hidden,
          d_weight ? d_weight->take() : at::empty({0}, w.options())};
}

void scale_cpu(at::TensorList tensors, const at::Tensor& factor) {
  const double by = factor.item<double>();
  for (const at::Tensor& x : tensors) {
    if (by != 1) x.mul_(by);
  }
}

// ---- through the dispatcher

template <class F>
auto operator_of(const char* name, F*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& logits, const at::Tensor& targets,
                               int64_t ignore_index, double z_coef) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = operator_of("oryx::_cross_entropy", forward_cpu);
    auto [loss, nll, lse, max, inverse_sum] = op.call(logits, targets, ignore_index, z_coef);
    ctx->save_for_backward({logits, targets, lse, max, inverse_sum});
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["z_coef"] = z_coef;
    ctx->mark_non_differentiable({nll, lse});
    return {loss, nll, lse};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = operator_of("oryx::_cross_entropy_backward", backward_cpu);
    const auto s = ctx->get_saved_variables();
    const at::Tensor d_logits = op.call(grads[0], s[0], s[1], s[2], s[3], s[4], ctx->saved_data["ignore_index"].toInt(),
                                        ctx->saved_data["z_coef"].toDouble());
    return {d_logits, {}, {}, {}};
  }
};

struct LinearCrossEntropyFunction : torch::autograd::Function<LinearCrossEntropyFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& hidden, const at::Tensor& weight,
                               const at::Tensor& targets, int64_t ignore_index, double z_coef) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = operator_of("oryx::_linear_cross_entropy", linear_forward_cpu);
    auto [loss, nll, lse, d_hidden, d_weight] =
        op.call(hidden, weight, targets, ignore_index, z_coef, hidden.requires_grad(), weight.requires_grad());
    ctx->saved_data["d_hidden"] = d_hidden;
    ctx->saved_data["d_weight"] = d_weight;
    ctx->mark_non_differentiable({nll, lse});
    return {loss, nll, lse};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    TORCH_CHECK(!ctx->saved_data.empty(),
                "linear_cross_entropy: a second backward; the first one gave its gradients away");
    at::Tensor d_hidden = ctx->saved_data["d_hidden"].toTensor(), d_weight = ctx->saved_data["d_weight"].toTensor();
    ctx->saved_data.clear();  // so that the weight's gradient becomes the parameter's without a copy
    static const auto scale = operator_of("oryx::_linear_cross_entropy_scale_", scale_cpu);
    scale.call({d_hidden, d_weight}, grads[0]);
    if (!ctx->needs_input_grad(0)) d_hidden.reset();
    if (!ctx->needs_input_grad(1)) d_weight.reset();
    return {d_hidden, d_weight, {}, {}, {}};
  }
};

Three as_three(CrossEntropyResult r) { return {std::move(r.loss), std::move(r.nll), std::move(r.lse)}; }

Three cross_entropy_composite(const at::Tensor& logits, const at::Tensor& targets, int64_t ignore_index,
                              double z_coef) {
  check_shapes("cross_entropy", logits, targets);
  if (logits.scalar_type() == at::kDouble) {  // for checks of gradients
    count_kept("cross_entropy", targets.to(at::kCPU, at::kLong).contiguous(), logits.size(1), ignore_index);
    return as_three(cross_entropy_naive(logits, targets.to(logits.device()), ignore_index, z_coef));
  }
  if (at::GradMode::is_enabled() && logits.requires_grad()) {
    auto out = CrossEntropyFunction::apply(logits, targets, ignore_index, z_coef);
    return {out[0], out[1], out[2]};
  }
  static const auto op = operator_of("oryx::_cross_entropy", forward_cpu);
  auto [loss, nll, lse, max, inverse_sum] = op.call(logits, targets, ignore_index, z_coef);
  return {loss, nll, lse};
}

Three linear_cross_entropy_composite(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                     int64_t ignore_index, double z_coef) {
  check_shapes("linear_cross_entropy", hidden, targets);
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) == hidden.size(1), "linear_cross_entropy: weight ", weight.sizes(),
              " does not fit hidden ", hidden.sizes());
  const auto device = hidden.device().type();
  if (at::autocast::is_autocast_enabled(device) && hidden.scalar_type() != at::kDouble) {
    const auto dtype = at::autocast::get_autocast_dtype(device);
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    if (hidden.scalar_type() != dtype || weight.scalar_type() != dtype) {
      return linear_cross_entropy_composite(hidden.to(dtype), weight.to(dtype), targets, ignore_index, z_coef);
    }
  }
  TORCH_CHECK(hidden.scalar_type() == weight.scalar_type(), "linear_cross_entropy: hidden is ", hidden.scalar_type(),
              ", weight is ", weight.scalar_type());
  if (hidden.scalar_type() == at::kDouble) {
    return cross_entropy_composite(at::linear(hidden, weight), targets, ignore_index, z_coef);
  }
  if (at::GradMode::is_enabled() && (hidden.requires_grad() || weight.requires_grad())) {
    auto out = LinearCrossEntropyFunction::apply(hidden, weight, targets, ignore_index, z_coef);
    return {out[0], out[1], out[2]};
  }
  static const auto op = operator_of("oryx::_linear_cross_entropy", linear_forward_cpu);
  auto [loss, nll, lse, d_hidden, d_weight] = op.call(hidden, weight, targets, ignore_index, z_coef, false, false);
  return {loss, nll, lse};
}

}  // namespace

CrossEntropyResult cross_entropy(const at::Tensor& logits, const at::Tensor& targets, int64_t ignore_index,
                                 double z_coef) {
  static const auto op = operator_of("oryx::cross_entropy", cross_entropy_composite);
  auto [loss, nll, lse] = op.call(logits, targets, ignore_index, z_coef);
  return {loss, nll, lse};
}

CrossEntropyResult linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                        int64_t ignore_index, double z_coef) {
  static const auto op = operator_of("oryx::linear_cross_entropy", linear_cross_entropy_composite);
  auto [loss, nll, lse] = op.call(hidden, weight, targets, ignore_index, z_coef);
  return {loss, nll, lse};
}

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def(
      "cross_entropy(Tensor logits, Tensor targets, int ignore_index=-100, float z_coef=0) -> (Tensor loss, Tensor "
      "nll, "
      "Tensor lse)");
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int ignore_index=-100, float z_coef=0) -> "
      "(Tensor "
      "loss, Tensor nll, Tensor lse)");
  m.def(
      "_cross_entropy(Tensor logits, Tensor targets, int ignore_index, float z_coef) -> (Tensor, Tensor, Tensor, "
      "Tensor, "
      "Tensor)");
  m.def(
      "_cross_entropy_backward(Tensor d_loss, Tensor logits, Tensor targets, Tensor lse, Tensor max, Tensor "
      "inverse_sum, int "
      "ignore_index, float z_coef) -> Tensor");
  m.def(
      "_linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, float z_coef, bool "
      "want_hidden, "
      "bool want_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("_linear_cross_entropy_scale_(Tensor(a!)[] tensors, Tensor factor) -> ()");
}

TORCH_LIBRARY_IMPL(oryx, CompositeImplicitAutograd, m) {
  m.impl("cross_entropy", cross_entropy_composite);
  m.impl("linear_cross_entropy", linear_cross_entropy_composite);
}

TORCH_LIBRARY_IMPL(oryx, CPU, m) {
  m.impl("_cross_entropy", forward_cpu);
  m.impl("_cross_entropy_backward", backward_cpu);
  m.impl("_linear_cross_entropy", linear_forward_cpu);
  m.impl("_linear_cross_entropy_scale_", scale_cpu);
}

}  // namespace oryx::ops
