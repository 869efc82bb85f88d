#include "oryx/ops/adamw/adamw.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "oryx/ops/adamw/adamw_internal.h"
#include "oryx/ops/adamw/adamw_kernels.h"

namespace oryx::ops {

void check_adamw(const at::Tensor& p, const at::Tensor& g, const at::Tensor& m, const at::Tensor& v) {
  TORCH_CHECK(p.sizes() == g.sizes() && p.sizes() == m.sizes() && p.sizes() == v.sizes(), "adamw_step: p ", p.sizes(),
              ", g ", g.sizes(), ", m ", m.sizes(), " and v ", v.sizes(), " differ in shape");
  TORCH_CHECK(p.is_contiguous() && m.is_contiguous() && v.is_contiguous(), "adamw_step: p, m and v must be contiguous");
  TORCH_CHECK(p.scalar_type() == at::kFloat || p.scalar_type() == at::kDouble, "adamw_step: p is ", p.scalar_type(),
              ", expected float32 or float64");
  TORCH_CHECK(m.scalar_type() == p.scalar_type() && v.scalar_type() == p.scalar_type(),
              "adamw_step: p, m and v must have one dtype");
}

void adamw_step_in_double(at::Tensor p, const at::Tensor& grad, at::Tensor m, at::Tensor v, int64_t step,
                    const AdamwOptions& o, double grad_scale) {
  const double n = static_cast<double>(step);
  const at::Tensor g = grad.to(at::kDouble) * grad_scale;
  p.mul_(1 - o.lr * o.weight_decay);
  m.mul_(o.beta1).add_(g, 1 - o.beta1);
  v.mul_(o.beta2).addcmul_(g, g, 1 - o.beta2);
  const at::Tensor root = v.sqrt().div_(std::sqrt(1 - std::pow(o.beta2, n))).add_(o.eps);
  p.addcdiv_(m, root, -o.lr / (1 - std::pow(o.beta1, n)));
}

namespace {

// One thread's piece of work: large enough to hide the loop's cost, small enough to share out evenly.
constexpr int64_t kPiece = 65536;

struct Piece {
  size_t tensor;
  int64_t begin, end;
};

std::vector<Piece> pieces_of(at::TensorList tensors) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t n = tensors[i].numel();
    for (int64_t b = 0; b < n; b += kPiece) pieces.push_back({i, b, std::min(n, b + kPiece)});
  }
  return pieces;
}

// Threads take whole runs of pieces, and none is started for less than kPiece elements.
template <class F>
void for_pieces(const std::vector<Piece>& pieces, F&& f) {
  int64_t elements = 0;
  for (const Piece& p : pieces) elements += p.end - p.begin;
  const int64_t count = static_cast<int64_t>(pieces.size());
  const int64_t grain = elements <= kPiece ? std::max<int64_t>(count, 1) : 1;
  at::parallel_for(0, count, grain, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) f(i, pieces[i]);
  });
}

void adamw_cpu(at::TensorList p, at::TensorList g, at::TensorList m, at::TensorList v, int64_t step, double lr,
               double beta1, double beta2, double eps, double weight_decay, double grad_scale) {
  TORCH_CHECK(g.size() == p.size() && m.size() == p.size() && v.size() == p.size(), "adamw_step: lists of ", p.size(),
              ", ", g.size(), ", ", m.size(), " and ", v.size(), " tensors");
  TORCH_CHECK(step >= 1, "adamw_step: step is ", step, ", expected 1 or more");
  const AdamwOptions options{lr, beta1, beta2, eps, weight_decay};
  std::vector<at::Tensor> parameters, gradients, first, second;  // the float32 ones
  for (size_t i = 0; i < p.size(); ++i) {
    check_adamw(p[i], g[i], m[i], v[i]);
    if (p[i].scalar_type() == at::kDouble) {
      adamw_step_in_double(p[i], g[i], m[i], v[i], step, options, grad_scale);
      continue;
    }
    parameters.push_back(p[i]);
    gradients.push_back(g[i].to(at::kFloat).contiguous());
    first.push_back(m[i]);
    second.push_back(v[i]);
    for (const at::Tensor& t : {p[i], m[i], v[i]}) t.unsafeGetTensorImpl()->bump_version();
  }
  const kernels::AdamwConstants c = adamw_constants<kernels::AdamwConstants>(step, options, grad_scale);
  for_pieces(pieces_of(parameters), [&](int64_t, const Piece& piece) {
    const size_t i = piece.tensor;
    const int64_t b = piece.begin;
    kernels::adamw(c, parameters[i].mutable_data_ptr<float>() + b, gradients[i].const_data_ptr<float>() + b,
                   first[i].mutable_data_ptr<float>() + b, second[i].mutable_data_ptr<float>() + b, piece.end - b);
  });
}

double squares_of(at::TensorList gradients) {
  std::vector<at::Tensor> wide;
  double rest = 0;
  for (const at::Tensor& g : gradients) {
    if (g.scalar_type() == at::kDouble) {
      rest += at::sum(at::square(g)).item<double>();
    } else {
      wide.push_back(g.to(at::kFloat).contiguous());
    }
  }
  const std::vector<Piece> pieces = pieces_of(wide);
  std::vector<double> sums(pieces.size());
  for_pieces(pieces, [&](int64_t i, const Piece& p) {
    sums[i] = kernels::sum_of_squares(wide[p.tensor].const_data_ptr<float>() + p.begin, p.end - p.begin);
  });
  for (const double s : sums) rest += s;
  return rest;
}

double global_norm_cpu(at::TensorList gradients) { return std::sqrt(squares_of(gradients)); }

at::Tensor sum_of_squares_cpu(at::TensorList gradients) { return at::scalar_tensor(squares_of(gradients), at::kDouble); }

}  // namespace

void adamw_step_all(const std::vector<at::Tensor>& p, const std::vector<at::Tensor>& g,
                    const std::vector<at::Tensor>& m, const std::vector<at::Tensor>& v, int64_t step,
                    const AdamwOptions& o, double grad_scale) {
  TORCH_CHECK(g.size() == p.size() && m.size() == p.size() && v.size() == p.size(), "adamw_step: lists of ", p.size(),
              ", ", g.size(), ", ", m.size(), " and ", v.size(), " tensors");
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("oryx::adamw_step", "").typed<decltype(adamw_cpu)>();
  std::vector<at::Tensor> with_gradient[4];
  for (size_t i = 0; i < p.size(); ++i) {
    if (!g[i].defined()) continue;
    with_gradient[0].push_back(p[i]);
    with_gradient[1].push_back(g[i]);
    with_gradient[2].push_back(m[i]);
    with_gradient[3].push_back(v[i]);
  }
  if (with_gradient[0].empty()) return;
  at::NoGradGuard no_grad;
  at::AutoDispatchBelowADInplaceOrView guard;
  op.call(with_gradient[0], with_gradient[1], with_gradient[2], with_gradient[3], step, o.lr, o.beta1, o.beta2, o.eps,
          o.weight_decay, grad_scale);
}

void adamw_step(at::Tensor p, const at::Tensor& g, at::Tensor m, at::Tensor v, int64_t step,
                const AdamwOptions& options, double grad_scale) {
  TORCH_CHECK(g.defined(), "adamw_step: the gradient is undefined");
  adamw_step_all({std::move(p)}, {g}, {std::move(m)}, {std::move(v)}, step, options, grad_scale);
}

void adamw_update(const AdamwUpdate& lists, at::Tensor control, const at::Tensor& loss, const AdamwOptions& o, double clip, const at::Tensor& squares, bool decided) {
  using Signature = void(at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::IntArrayRef, at::Tensor&, const at::Tensor&,
                         double, double, double, double, double, double, const std::optional<at::Tensor>&, bool);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("oryx::adamw_update", "").typed<Signature>();
  const size_t n = lists.p.size();
  TORCH_CHECK(lists.g.size() == n && lists.m.size() == n && lists.v.size() == n && lists.weight.size() == n && lists.decays.size() == n,
              "adamw_update: lists of different lengths");
  std::vector<at::Tensor> weight = lists.weight;
  for (size_t i = 0; i < n; ++i) {
    if (!weight[i].defined()) weight[i] = at::empty({0}, lists.p[i].options().dtype(at::kBFloat16));
  }
  const std::vector<int64_t> decays(lists.decays.begin(), lists.decays.end());
  at::NoGradGuard no_grad;
  at::AutoDispatchBelowADInplaceOrView guard;
  op.call(lists.p, lists.g, lists.m, lists.v, weight, decays, control, loss, o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, clip,
          squares.defined() ? std::optional<at::Tensor>(squares) : std::nullopt, decided);
}

at::Tensor sum_of_squares(const std::vector<at::Tensor>& gradients) {
  if (gradients.empty()) return {};
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("oryx::sum_of_squares", "").typed<at::Tensor(at::TensorList)>();
  at::NoGradGuard no_grad;
  return op.call(gradients);
}

double global_norm(const std::vector<at::Tensor>& gradients) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("oryx::global_norm", "").typed<decltype(global_norm_cpu)>();
  std::vector<at::Tensor> defined;
  for (const at::Tensor& g : gradients) {
    if (g.defined()) defined.push_back(g);
  }
  if (defined.empty()) return 0;
  at::NoGradGuard no_grad;
  return op.call(defined);
}

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def(
      "adamw_step(Tensor(a!)[] p, Tensor[] g, Tensor(b!)[] m, Tensor(c!)[] v, int step, float lr, float beta1, float "
      "beta2, "
      "float eps, float weight_decay, float grad_scale=1) -> ()");
  m.def("global_norm(Tensor[] gradients) -> float");
  m.def(
      "adamw_update(Tensor(a!)[] p, Tensor[] g, Tensor(b!)[] m, Tensor(c!)[] v, Tensor(d!)[] weight, int[] decays, Tensor(e!) control, Tensor loss, float lr, "
      "float beta1, float beta2, float eps, float weight_decay, float clip, Tensor? squares=None, bool decided=False) -> ()");
  m.def("sum_of_squares(Tensor[] gradients) -> Tensor");
}

TORCH_LIBRARY_IMPL(oryx, CPU, m) {
  m.impl("adamw_step", adamw_cpu);
  m.impl("global_norm", global_norm_cpu);
  m.impl("sum_of_squares", sum_of_squares_cpu);
}

}  // namespace oryx::ops
