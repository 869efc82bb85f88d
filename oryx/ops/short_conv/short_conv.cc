#include "oryx/ops/short_conv/short_conv.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "oryx/ops/sequences.h"
#include "oryx/ops/short_conv/short_conv_kernels.h"

namespace oryx::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Tokens of one task. Fixed, so that the order of summation of the filter's gradient does not depend on the thread
// count.
constexpr int64_t kTaskTokens = 128;

struct Piece {
  int64_t sequence, begin, end;
};

// The sequences cut into pieces, consecutive pieces gathered into tasks of at most kTaskTokens tokens (at least one
// piece).
struct Tasks {
  std::vector<Piece> pieces;
  std::vector<int64_t> first;  // of each task in pieces, and the end
  int64_t count() const { return static_cast<int64_t>(first.size()) - 1; }
};

Tasks make_tasks(const std::vector<Sequence>& sequences) {
  Tasks tasks;
  int64_t tokens = kTaskTokens, pieces = kTaskTokens;  // both full: the first piece opens a task
  for (size_t n = 0; n < sequences.size(); ++n) {
    int64_t begin = 0;
    do {
      const int64_t end = std::min(begin + kTaskTokens, sequences[n].length);
      if (tokens + end - begin > kTaskTokens || pieces >= kTaskTokens) {
        tasks.first.push_back(static_cast<int64_t>(tasks.pieces.size()));
        tokens = pieces = 0;
      }
      tasks.pieces.push_back({static_cast<int64_t>(n), begin, end});
      tokens += end - begin;
      pieces += 1;
      begin = end;
    } while (begin < sequences[n].length);
  }
  tasks.first.push_back(static_cast<int64_t>(tasks.pieces.size()));
  return tasks;
}

bool given(const OptionalTensor& t) { return t.has_value() && t->defined(); }

at::ScalarType compute_dtype(at::ScalarType t) { return t == at::kDouble ? at::kDouble : at::kFloat; }

void check_arguments(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& state, int64_t N) {
  TORCH_CHECK(x.dim() == 3, "short_conv: x must be [B, T, C], got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kDouble,
              "short_conv: x must be float32, bfloat16 or float64, got ", x.scalar_type());
  const int64_t C = x.size(2);
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) == C, "short_conv: weight must be [C = ", C, ", w], got ",
              weight.sizes());
  const int64_t w = weight.size(1);
  TORCH_CHECK(w >= 1 && w <= kShortConvMaxWidth, "short_conv: width ", w, " is outside 1 .. ", kShortConvMaxWidth);
  TORCH_CHECK(!given(bias) || bias->sizes() == at::IntArrayRef({C}), "short_conv: bias must be [", C, "], got ",
              bias->sizes());
  TORCH_CHECK(!given(state) || state->sizes() == at::IntArrayRef({N, C, w - 1}), "short_conv: initial_state must be [",
              N, ", ", C, ", ", w - 1, "], got ", state->sizes());
}

// The arguments as the kernels want them, in float32 or float64.
struct Prepared {
  std::vector<Sequence> sequences;
  Tasks tasks;
  ShortConvShape shape;
  at::ScalarType dtype;
  at::Tensor x;        // channels contiguous
  at::Tensor weight;   // [w, C]
  at::Tensor bias;     // [C] or undefined
  at::Tensor history;  // [N, w - 1, C], or [w - 1, C] of zeros for all

  Prepared(const at::Tensor& x_in, const at::Tensor& weight_in, const OptionalTensor& bias_in,
           const OptionalTensor& state, const OptionalTensor& cu_seqlens, bool silu) {
    TORCH_CHECK(x_in.dim() == 3, "short_conv: x must be [B, T, C], got ", x_in.sizes());
    sequences = list_sequences("short_conv", x_in.size(0), x_in.size(1), cu_seqlens);
    check_arguments(x_in, weight_in, bias_in, state, count());
    tasks = make_tasks(sequences);
    shape = {x_in.size(2), weight_in.size(1), silu};
    dtype = compute_dtype(x_in.scalar_type());
    x = x_in.to(dtype);
    if (x.stride(2) != 1) x = x.contiguous();
    weight = weight_in.detach().to(dtype).t().contiguous();
    if (given(bias_in)) bias = bias_in->detach().to(dtype).contiguous();
    history = given(state) ? state->detach().to(dtype).transpose(1, 2).contiguous()
                           : at::zeros({shape.width - 1, shape.channels}, x.options());
  }

  int64_t count() const { return static_cast<int64_t>(sequences.size()); }
  template <typename T>
  const T* bias_data() const {
    return bias.defined() ? bias.const_data_ptr<T>() : nullptr;
  }
  template <typename T>
  ShortConvSequence<T> sequence(int64_t n) const {
    const Sequence& s = sequences[n];
    const int64_t step = history.dim() == 3 ? history.stride(0) : 0;
    // A tensor without elements (no tokens; a history of width 1) has no memory, and no place in it.
    const auto place = [](const at::Tensor& t, int64_t offset) { return t.numel() > 0 ? t.const_data_ptr<T>() + offset : nullptr; };
    return {place(x, s.row * x.stride(0) + s.begin * x.stride(1)), x.stride(1), s.length, place(history, n * step)};
  }
  // Element offset of a sequence in a contiguous [B, T, C].
  int64_t offset(int64_t n) const { return (sequences[n].row * x.size(1) + sequences[n].begin) * shape.channels; }
};

// The last w - 1 inputs of each sequence, history included: [N, C, w - 1].
template <typename T>
at::Tensor final_state(const Prepared& p) {
  const int64_t C = p.shape.channels, h = p.shape.width - 1;
  at::Tensor out = at::empty({p.count(), h, C}, p.x.options());
  for (int64_t n = 0; n < p.count(); ++n) {
    const ShortConvSequence<T> s = p.sequence<T>(n);
    for (int64_t i = 0; i < h; ++i) {
      const int64_t time = s.length - h + i;
      const T* row = time >= 0 ? s.x + time * s.x_stride : s.history + (time + h) * C;
      std::copy(row, row + C, out.mutable_data_ptr<T>() + (n * h + i) * C);
    }
  }
  return out.transpose(1, 2).contiguous();
}

template <typename T>
at::Tensor run_forward(const Prepared& p) {
  at::Tensor y = at::empty(p.x.sizes(), p.x.options());
  T* out = y.mutable_data_ptr<T>();
  at::parallel_for(0, p.tasks.count(), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = p.tasks.first[first]; i < p.tasks.first[last]; ++i) {
      const Piece& piece = p.tasks.pieces[i];
      short_conv_forward<T>(p.shape, p.sequence<T>(piece.sequence), piece.begin, piece.end,
                            p.weight.const_data_ptr<T>(), p.bias_data<T>(), out + p.offset(piece.sequence));
    }
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> short_conv_cpu(const at::Tensor& x, const at::Tensor& weight,
                                                  const OptionalTensor& bias, const OptionalTensor& initial_state,
                                                  const OptionalTensor& cu_seqlens, bool silu) {
  const Prepared p(x, weight, bias, initial_state, cu_seqlens, silu);
  const bool wide = p.dtype == at::kDouble;
  const at::Tensor y = wide ? run_forward<double>(p) : run_forward<float>(p);
  const at::Tensor state = wide ? final_state<double>(p) : final_state<float>(p);
  return {y.to(x.scalar_type()), state.to(x.scalar_type())};
}

struct Gradients {
  at::Tensor x, history, filter;  // [B, T, C], [N, w - 1, C], [w + 1, C]
};

template <typename T>
Gradients run_backward(const Prepared& p, const at::Tensor& d_y, const at::Tensor& d_final) {
  const int64_t C = p.shape.channels, w = p.shape.width, tasks = p.tasks.count(), filter = (w + 1) * C;
  Gradients g{at::empty(p.x.sizes(), p.x.options()), at::empty({p.count(), w - 1, C}, p.x.options()),
              at::zeros({w + 1, C}, p.x.options())};
  at::Tensor partial = at::zeros({tasks, w + 1, C}, p.x.options());
  T *dx = g.x.mutable_data_ptr<T>(), *dh = g.history.mutable_data_ptr<T>(), *sums = partial.mutable_data_ptr<T>();
  const T* dy = d_y.const_data_ptr<T>();
  const T* df = d_final.defined() ? d_final.const_data_ptr<T>() : nullptr;
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    std::vector<T> scratch(short_conv_scratch(p.shape, kTaskTokens));
    for (int64_t task = first; task < last; ++task) {
      for (int64_t i = p.tasks.first[task]; i < p.tasks.first[task + 1]; ++i) {
        const Piece& piece = p.tasks.pieces[i];
        const int64_t n = piece.sequence, at = p.offset(n), history = n * (w - 1) * C;
        const ShortConvGradients<T> grad{
            dy + at,       C, df != nullptr ? df + history : nullptr, dx + at, dh + history, sums + task * filter,
            scratch.data()};
        short_conv_backward<T>(p.shape, p.sequence<T>(n), piece.begin, piece.end, p.weight.const_data_ptr<T>(),
                               p.bias_data<T>(), grad);
      }
    }
  });
  // Task by task in order, whatever the thread count.
  T* total = g.filter.mutable_data_ptr<T>();
  at::parallel_for(0, filter, 1024, [&](int64_t first, int64_t last) {
    for (int64_t task = 0; task < tasks; ++task) {
      for (int64_t i = first; i < last; ++i) total[i] += sums[task * filter + i];
    }
  });
  return g;
}

// Gradients of x, weight, bias, initial_state; the last two are undefined where the argument is absent.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> short_conv_backward_cpu(
    const at::Tensor& d_y, const OptionalTensor& d_final_state, const at::Tensor& x, const at::Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, bool silu) {
  const Prepared p(x, weight, bias, initial_state, cu_seqlens, silu);
  TORCH_CHECK(d_y.sizes() == x.sizes(), "short_conv_backward: d_y is ", d_y.sizes(), ", expected ", x.sizes());
  const at::Tensor dy = d_y.to(p.dtype).contiguous();
  const at::Tensor df = given(d_final_state) ? d_final_state->to(p.dtype).transpose(1, 2).contiguous() : at::Tensor();
  const Gradients g = p.dtype == at::kDouble ? run_backward<double>(p, dy, df) : run_backward<float>(p, dy, df);
  const int64_t w = p.shape.width;
  return {
      g.x.to(x.scalar_type()), g.filter.slice(0, 0, w).t().to(weight.scalar_type()).contiguous(),
      given(bias) ? g.filter.select(0, w).to(bias->scalar_type()).clone() : at::Tensor(),
      given(initial_state) ? g.history.transpose(1, 2).to(initial_state->scalar_type()).contiguous() : at::Tensor()};
}

at::Tensor short_conv_step_cpu(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                               at::Tensor& state, bool silu) {
  TORCH_CHECK(x.dim() == 2, "short_conv_step: x must be [N, C], got ", x.sizes());
  check_arguments(x.unsqueeze(1), weight, bias, state, x.size(0));
  const ShortConvShape shape{x.size(1), weight.size(1), silu};
  if (x.scalar_type() == at::kDouble) {
    const ShortConvResult r = short_conv_naive(x.unsqueeze(1), weight.to(at::kDouble), bias, state.to(at::kDouble), {},
                                               silu ? Activation::kSilu : Activation::kNone);
    state.copy_(r.final_state);
    return r.y.squeeze(1);
  }
  const at::Tensor in = x.to(at::kFloat).contiguous(), filter = weight.to(at::kFloat).contiguous();
  const at::Tensor b = given(bias) ? bias->to(at::kFloat).contiguous() : at::Tensor();
  const at::Tensor work = state.to(at::kFloat).contiguous();  // the state itself where that is possible
  at::Tensor y = at::empty(in.sizes(), in.options());
  const int64_t C = shape.channels, per_state = C * (shape.width - 1);
  const float* bias_data = b.defined() ? b.const_data_ptr<float>() : nullptr;
  float *state_data = work.mutable_data_ptr<float>(), *out = y.mutable_data_ptr<float>();
  at::parallel_for(0, x.size(0), std::max<int64_t>(1, 32768 / std::max<int64_t>(C, 1)),
                   [&](int64_t first, int64_t last) {
                     for (int64_t n = first; n < last; ++n) {
                       short_conv_step_kernel(shape, in.const_data_ptr<float>() + n * C, filter.const_data_ptr<float>(),
                                              bias_data, state_data + n * per_state, out + n * C);
                     }
                   });
  if (!work.is_same(state)) state.copy_(work);
  return y.to(x.scalar_type());
}

auto call(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
          const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, bool silu) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("oryx::short_conv", "").typed<decltype(short_conv_cpu)>();
  return op.call(x, weight, bias, initial_state, cu_seqlens, silu);
}

class ShortConvFunction : public torch::autograd::Function<ShortConvFunction> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                                                const at::Tensor& weight, const OptionalTensor& bias,
                                                const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                                bool silu) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, state] = call(x, weight, bias, initial_state, cu_seqlens, silu);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({x, weight, bias.value_or(at::Tensor()), initial_state.value_or(at::Tensor()),
                            cu_seqlens.value_or(at::Tensor())});
    ctx->saved_data["silu"] = silu;
    return {y, state};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("oryx::short_conv_backward", "")
                               .typed<decltype(short_conv_backward_cpu)>();
    const auto saved = ctx->get_saved_variables();
    const auto optional = [](const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : OptionalTensor(); };
    const at::Tensor d_y = grads[0].defined() ? grads[0] : at::zeros_like(saved[0]);
    auto [d_x, d_weight, d_bias, d_state] =
        op.call(d_y, optional(grads[1]), saved[0], saved[1], optional(saved[2]), optional(saved[3]), optional(saved[4]),
                ctx->saved_data["silu"].toBool());
    return {d_x, d_weight, d_bias, d_state, at::Tensor(), at::Tensor()};
  }
};

std::tuple<at::Tensor, at::Tensor> short_conv_autograd(const at::Tensor& x, const at::Tensor& weight,
                                                       const OptionalTensor& bias, const OptionalTensor& initial_state,
                                                       const OptionalTensor& cu_seqlens, bool silu) {
  const auto out = ShortConvFunction::apply(x, weight, bias, initial_state, cu_seqlens, silu);
  return {out[0], out[1]};
}

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def(
      "short_conv(Tensor x, Tensor weight, Tensor? bias=None, Tensor? initial_state=None, Tensor? cu_seqlens=None, "
      "bool silu=False) "
      "-> (Tensor y, Tensor final_state)");
  m.def(
      "short_conv_backward(Tensor d_y, Tensor? d_final_state, Tensor x, Tensor weight, Tensor? bias, Tensor? "
      "initial_state, "
      "Tensor? cu_seqlens, bool silu) -> (Tensor d_x, Tensor d_weight, Tensor d_bias, Tensor d_initial_state)");
  m.def("short_conv_step(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, bool silu=False) -> Tensor");
}
TORCH_LIBRARY_IMPL(oryx, CPU, m) {
  m.impl("short_conv", short_conv_cpu);
  m.impl("short_conv_backward", short_conv_backward_cpu);
  m.impl("short_conv_step", short_conv_step_cpu);
}
TORCH_LIBRARY_IMPL(oryx, Autograd, m) { m.impl("short_conv", short_conv_autograd); }

}  // namespace

ShortConvResult short_conv(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           const std::optional<at::Tensor>& initial_state, const std::optional<at::Tensor>& cu_seqlens,
                           Activation activation) {
  auto [y, state] = call(x, weight, bias, initial_state, cu_seqlens, activation == Activation::kSilu);
  return {y, state};
}

at::Tensor short_conv_step(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           at::Tensor state, Activation activation) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("oryx::short_conv_step", "")
                             .typed<decltype(short_conv_step_cpu)>();
  at::NoGradGuard no_grad;
  return op.call(x, weight, bias, state, activation == Activation::kSilu);
}

}  // namespace oryx::ops
