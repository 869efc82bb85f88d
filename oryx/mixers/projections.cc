#include "oryx/mixers/projections.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "oryx/ops/few_rows/few_rows.h"
#include "oryx/ops/halves/halves.h"

namespace oryx {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor flat(const at::Tensor& x) { return x.reshape({-1, x.size(-1)}); }

at::Tensor unflat(const at::Tensor& y, const at::Tensor& x) {
  auto sizes = x.sizes().vec();
  sizes.back() = y.size(-1);
  return y.view(sizes);
}

at::Tensor cast(const at::Tensor& weight, const at::Tensor& x) { return weight.scalar_type() == x.scalar_type() ? weight : weight.to(x.scalar_type()); }

// Where few_rows_product() suits it stands in for the library's, so that a row's result does not depend on the rows beside it.
at::Tensor row_product(const at::Tensor& x, const at::Tensor& weight) {
  if (ops::few_rows_suit(x, weight)) return ops::few_rows_product(x, weight);
  // What linear comes down to, past four calls on the way.
  if (x.is_cuda() && !at::GradMode::is_enabled() && x.dim() > 1) return unflat(at::mm(flat(x), weight.t()), x);
  return at::linear(x, weight);
}

// Whether b begins where a ends, in one memory and of a's form.
bool follows(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type() && a.is_contiguous() && b.is_contiguous() && a.is_alias_of(b) &&
         b.storage_offset() == a.storage_offset() + a.numel();
}

// The sum of the shares of one activation's gradient, [rows, in].
struct Sink : torch::CustomClassHolder {
  at::Tensor sum;
  void add_product(const at::Tensor& dy, const at::Tensor& weight) {
    if (sum.defined()) {
      sum.addmm_(dy, weight);
    } else {
      sum = at::mm(dy, weight);
    }
  }
  void add(const at::Tensor& share) {
    if (sum.defined()) {
      sum.add_(share);
    } else {
      sum = share;
    }
  }
};

Sink& sink_of(const c10::IValue& capsule) { return *static_cast<Sink*>(capsule.toCapsule().get()); }

// x -> x. Its backward pass runs when those of all readers have run: the products' shares lie in the sink, the others' come as usual.
struct FanOut : torch::autograd::Function<FanOut> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const c10::IValue& sink) {
    ctx->saved_data["sink"] = sink;
    ctx->saved_data["sizes"] = x.sizes();
    ctx->set_materialize_grads(false);
    return x;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::Tensor& sum = sink_of(ctx->saved_data["sink"]).sum;  // [rows, D]
    at::Tensor total = grads[0];
    if (sum.defined()) {
      const at::Tensor products = sum.view(ctx->saved_data["sizes"].toIntVector());
      total = total.defined() ? products.add_(total) : products;
    }
    sum.reset();
    return {total, at::Tensor()};
  }
};

enum class Form { kPlain, kRows, kWide };

// float32 weights over a bfloat16 activation on a GPU: two products in bfloat16 for one.
bool by_halves(const at::Tensor& x, at::TensorList weights) {
  return x.is_cuda() && x.scalar_type() == at::kBFloat16 && weights.size() <= 4 &&
         std::all_of(weights.begin(), weights.end(), [](const at::Tensor& weight) { return weight.scalar_type() == at::kFloat; });
}

// The weights' rows below each other.
at::Tensor wide_product(const at::Tensor& x, at::TensorList weights) {
  if (!by_halves(x, weights)) {
    const at::Tensor weight = weights.size() == 1 ? weights[0] : at::cat(weights);
    return at::linear(x.to(weight.scalar_type()), weight);
  }
  const at::Tensor halves = ops::bfloat16_halves(weights);
  const int64_t n = halves.size(0) / 2;
  const at::Tensor both = at::mm(flat(x), halves.t(), at::kFloat);  // [rows, 2 n]
  return unflat(both.narrow(1, 0, n) + both.narrow(1, n, n), x);
}

struct Product : torch::autograd::Function<Product> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& index, const c10::IValue& sink,
                            int64_t form) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["sink"] = sink;
    ctx->saved_data["form"] = form;
    ctx->save_for_backward({x, weight, index.value_or(at::Tensor())});
    ctx->set_materialize_grads(false);
    if (form == static_cast<int64_t>(Form::kWide)) return wide_product(x, {weight});
    if (form == static_cast<int64_t>(Form::kRows)) return at::linear(flat(x).index_select(0, *index), cast(weight, x));
    return at::linear(x, cast(weight, x));
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const at::Tensor none;
    if (!grads[0].defined()) return {none, none, none, none, none};
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = ctx->get_saved_variables();
    const at::Tensor& weight = saved[1];
    const auto form = static_cast<Form>(ctx->saved_data["form"].toInt());
    // On the CPU no product takes bfloat16 and gives float32: the narrow ones are made in float32 there.
    const bool exact = weight.scalar_type() == at::kFloat && saved[0].scalar_type() == at::kBFloat16;
    if (form == Form::kWide && exact && !saved[0].is_cuda()) {
      const at::Tensor x = flat(saved[0]).to(at::kFloat), dy = flat(grads[0]).to(at::kFloat);
      if (ctx->needs_input_grad(0)) sink_of(ctx->saved_data["sink"]).add(at::mm(dy, weight).to(saved[0].scalar_type()));
      return {none, ctx->needs_input_grad(1) ? at::mm(dy.t(), x) : none, none, none, none};
    }
    const at::Tensor x = form == Form::kRows ? flat(saved[0]).index_select(0, saved[2]) : flat(saved[0]);
    const at::Tensor dy = flat(grads[0]).to(x.scalar_type());
    if (ctx->needs_input_grad(0)) {
      Sink& sink = sink_of(ctx->saved_data["sink"]);
      if (form == Form::kRows) {
        // Each row at most once: taken out, added to, put back.
        if (!sink.sum.defined()) sink.sum = at::zeros({saved[0].numel() / saved[0].size(-1), saved[0].size(-1)}, x.options());
        sink.sum.index_copy_(0, saved[2], sink.sum.index_select(0, saved[2]).addmm_(dy, cast(weight, x)));
      } else {
        sink.add_product(dy, cast(weight, x));
      }
    }
    at::Tensor d_weight;
    if (ctx->needs_input_grad(1)) {
      d_weight = exact && x.is_cuda() ? at::mm(dy.t(), x, at::kFloat) : at::mm(dy.t(), x).to(weight.scalar_type());
    }
    return {none, d_weight, none, none, none};
  }
};

struct JoinRows : torch::autograd::Function<JoinRows> {
  static at::Tensor forward(AutogradContext* ctx, at::Tensor o, const at::Tensor& part, const at::Tensor& index) {
    at::AutoDispatchBelowADInplaceOrView guard;
    o.flatten(0, 1).index_copy_(0, index, part.flatten(0, 1).index_select(0, index));
    o.unsafeGetTensorImpl()->bump_version();  // a mixer that kept o for its own backward pass would then fail, not be wrong
    ctx->mark_dirty({o});
    return o;
  }
  // Neither mixer looks at the gradient of rows that are not its own.
  static variable_list backward(AutogradContext*, variable_list grads) { return {grads[0], grads[0], at::Tensor()}; }
};

struct JoinWhere : torch::autograd::Function<JoinWhere> {
  static at::Tensor forward(AutogradContext*, const at::Tensor& o, const at::Tensor& part, const at::Tensor& mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return at::where(mask.unsqueeze(-1).unsqueeze(-1), part, o);
  }
  static variable_list backward(AutogradContext*, variable_list grads) { return {grads[0], grads[0], at::Tensor()}; }
};

}  // namespace

at::Tensor join_where(const at::Tensor& o, const at::Tensor& part, const at::Tensor& mask) { return JoinWhere::apply(o, part, mask); }

at::Tensor join_rows(const at::Tensor& o, const at::Tensor& part, const at::Tensor& index) {
  if (!o.is_contiguous()) return o + part;
  return JoinRows::apply(o, part, index);
}

at::Tensor project(const at::Tensor& x, const at::Tensor& weight) { return row_product(x, cast(weight, x)); }

Projections::Projections(const at::Tensor& x) : x_(x) {
  if (!at::GradMode::is_enabled() || !x.requires_grad()) return;
  sink_ = c10::IValue::make_capsule(c10::make_intrusive<Sink>());
  x_ = FanOut::apply(x, sink_);
}

void Projections::ahead(at::TensorList weights) {
  constexpr int64_t kFewRows = 2048;
  const int64_t rows = x_.numel() / x_.size(-1);
  if (!x_.is_cuda() || at::GradMode::is_enabled() || rows > kFewRows || rows == 1) return;
  for (size_t begin = 0, end; begin < weights.size(); begin = end) {
    for (end = begin + 1; end < weights.size() && follows(weights[end - 1], weights[end]);) ++end;
    const at::Tensor& first = weights[begin];
    const auto count = static_cast<int64_t>(end - begin);
    if (count < 2 || first.scalar_type() != x_.scalar_type()) continue;
    const at::Tensor all = first.as_strided({count, first.size(0), first.size(1)}, {first.numel(), first.size(1), 1});
    const at::Tensor x = flat(x_), products = at::bmm(x.unsqueeze(0).expand({count, x.size(0), x.size(1)}), all.transpose(1, 2));  // [count, rows, out]
    for (int64_t i = 0; i < count; ++i) made_.emplace_back(weights[begin + static_cast<size_t>(i)].const_data_ptr(), unflat(products[i], x_));
  }
}

at::Tensor Projections::operator()(const at::Tensor& weight) const {
  for (const auto& [memory, product] : made_) {
    if (memory == weight.const_data_ptr()) return product;
  }
  return collects() ? Product::apply(x_, weight, std::optional<at::Tensor>(), sink_, static_cast<int64_t>(Form::kPlain)) : project(x_, weight);
}

at::Tensor Projections::rows(const at::Tensor& weight, const at::Tensor& index) const {
  return collects() ? Product::apply(x_, weight, std::optional<at::Tensor>(index), sink_, static_cast<int64_t>(Form::kRows)) : project(flat(x_).index_select(0, index), weight);
}

at::Tensor Projections::wide(at::TensorList weights) const {
  if (!collects() && x_.is_cuda() && !at::GradMode::is_enabled()) return wide_product(x_, weights);
  const at::Tensor weight = weights.size() == 1 ? weights[0] : at::cat(weights);
  if (collects()) return Product::apply(x_, weight, std::optional<at::Tensor>(), sink_, static_cast<int64_t>(Form::kWide));
  return row_product(x_.to(weight.scalar_type()), weight);
}

}  // namespace oryx
