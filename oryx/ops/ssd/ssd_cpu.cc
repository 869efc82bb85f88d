// Hands the tasks (state head x sequence) to the vector kernels and puts their results together.
#include <ATen/Parallel.h>

#include <cmath>

#include "oryx/ops/ssd/ssd_internal.h"
#include "oryx/ops/ssd/ssd_kernels.h"

namespace oryx::ops {
namespace {

// Memory aligned to cache lines: vectors of 64 bytes that straddle two of them load at half the speed.
class Scratch {
 public:
  explicit Scratch(size_t floats) : memory_(floats + 16) {}
  float* data() {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.data() + (64 - address % 64) % 64 / sizeof(float);
  }

 private:
  std::vector<float> memory_;
};

at::Tensor rows_contiguous(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

// One sequence's rows of x [B, T, heads, ...] from its first token and the given head on. A tensor without tokens has no memory, and no place in it.
template <typename T>
SsdRows<T> rows_at(T* data, const at::Tensor& x, const Sequence& s, int64_t head) {
  return {data == nullptr ? nullptr : data + s.row * x.stride(0) + s.begin * x.stride(1) + head * x.stride(2), x.stride(1), x.stride(2)};
}
SsdRows<const float> rows(const at::Tensor& x, const Sequence& s, int64_t head = 0) { return rows_at(x.const_data_ptr<float>(), x, s, head); }
SsdRows<float> mutable_rows(const at::Tensor& x, const Sequence& s, int64_t head) { return rows_at(x.mutable_data_ptr<float>(), x, s, head); }

class Tasks {
 public:
  Tasks(const SsdInputs& in, const SsdSizes& s)
      : s_(s),
        q_(rows_contiguous(in.q)),
        k_(rows_contiguous(in.k)),
        v_(rows_contiguous(in.v)),
        dt_raw_(in.dt_raw),
        dt_bias_(in.dt_bias.contiguous()),
        A_(-at::exp(in.A_log.to(at::kDouble)).to(at::kFloat).contiguous()),
        D_(in.D.contiguous()) {
    if (in.initial_state.defined()) state_ = in.initial_state.contiguous();
  }

  int64_t count() const { return s_.count() * s_.Hs; }
  // Heads outside, sequences inside: documents of unequal length then spread evenly over the threads.
  int64_t head(int64_t i) const { return i / s_.count(); }
  int64_t sequence(int64_t i) const { return i % s_.count(); }
  int64_t readers() const { return s_.Ho / s_.Hs; }
  int64_t state_offset(int64_t i) const { return (sequence(i) * s_.Hs + head(i)) * s_.V * s_.K; }

  SsdTask operator[](int64_t i) const {
    const int64_t h = head(i);
    const Sequence& seq = s_.sequences[sequence(i)];
    SsdTask t{};
    t.length = static_cast<size_t>(seq.length), t.K = static_cast<size_t>(s_.K), t.V = static_cast<size_t>(s_.V);
    t.readers = static_cast<size_t>(readers());
    t.q_head = static_cast<size_t>(h * readers() / (s_.Ho / s_.Hq));
    t.k_head = static_cast<size_t>(h / (s_.Hs / s_.Hk)), t.v_head = static_cast<size_t>(h / (s_.Hs / s_.Hv));
    t.q = rows(q_, seq), t.k = rows(k_, seq), t.v = rows(v_, seq), t.dt_raw = rows(dt_raw_, seq, h);
    t.dt_bias = dt_bias_.const_data_ptr<float>()[h], t.A = A_.const_data_ptr<float>()[h],
    t.D = D_.const_data_ptr<float>()[h];
    t.wanted = s_.wanted.empty() ? nullptr : s_.wanted.data() + seq.row * s_.T + seq.begin;
    t.initial_state = state_.defined() ? state_.const_data_ptr<float>() + state_offset(i) : nullptr;
    return t;
  }

 private:
  const SsdSizes& s_;
  at::Tensor q_, k_, v_, dt_raw_, dt_bias_, A_, D_, state_;
};

size_t longest(const SsdSizes& s) {
  int64_t length = 0;
  for (const Sequence& seq : s.sequences) length = std::max(length, seq.length);
  return static_cast<size_t>(length);
}

// Zeroed where the kernels leave tokens out.
at::Tensor readout_buffer(const SsdSizes& s, int64_t dim, const at::TensorOptions& options) {
  const std::array<int64_t, 4> size{s.B, s.T, s.Ho, dim};
  return s.wanted.empty() ? at::empty(size, options) : at::zeros(size, options);
}

// [B, T, H, d] -> [B, T, h, d], consecutive heads summed in order.
at::Tensor sum_heads(const at::Tensor& x, int64_t h) {
  const int64_t H = x.size(2), d = x.size(3), share = H / h;
  if (share == 1) return x;
  at::Tensor out = at::zeros({x.size(0), x.size(1), h, d}, x.options());
  const float* from = x.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, x.size(0) * x.size(1), 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * H; row < end * H; ++row) {
      float* sum = to + row / share * d;
      for (int64_t i = 0; i < d; ++i) sum[i] += from[row * d + i];
    }
  });
  return out;
}

// Sums [N, Hs, 3] over the sequences in order, whatever the thread count: three [Hs] in float32.
std::array<at::Tensor, 3> sum_sequences(const std::vector<double>& parts, const SsdSizes& s,
                                        const at::TensorOptions& options) {
  std::array<at::Tensor, 3> out;
  for (size_t i = 0; i < 3; ++i) {
    out[i] = at::empty({s.Hs}, options);
    for (int64_t h = 0; h < s.Hs; ++h) {
      double sum = 0;
      for (int64_t n = 0; n < s.count(); ++n) sum += parts[static_cast<size_t>((h * s.count() + n) * 3) + i];
      out[i].mutable_data_ptr<float>()[h] = static_cast<float>(sum);
    }
  }
  return out;
}

}  // namespace

SsdResult ssd_vector(const SsdInputs& in, const SsdSizes& s) {
  const Tasks tasks(in, s);
  const at::Tensor o = readout_buffer(s, s.V, in.v.options()),
                   final_state = at::empty({s.count(), s.Hs, s.V, s.K}, in.v.options());
  const size_t scratch_size = ssd_forward_scratch(static_cast<size_t>(s.K), static_cast<size_t>(s.V));
  at::parallel_for(0, tasks.count(), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(scratch_size);
    for (int64_t i = begin; i < end; ++i) {
      const SsdRows<float> out = mutable_rows(o, s.sequences[tasks.sequence(i)], tasks.head(i) * tasks.readers());
      ssd_forward_kernel(tasks[i], out, final_state.mutable_data_ptr<float>() + tasks.state_offset(i), scratch.data());
    }
  });
  return {o, final_state};
}

SsdGradients ssd_vector_backward(const SsdInputs& in, const SsdSizes& s, const at::Tensor& d_o,
                                 const at::Tensor& d_final_state) {
  const Tasks tasks(in, s);
  const auto options = in.v.options();
  const at::Tensor up = rows_contiguous(d_o),
                   up_state = d_final_state.defined() ? d_final_state.contiguous() : at::Tensor();
  // Each task writes rows of its own, also where heads share keys or values; those are summed afterwards, in a fixed
  // order.
  const at::Tensor d_q = readout_buffer(s, s.K, options), d_k = at::empty({s.B, s.T, s.Hs, s.K}, options);
  const at::Tensor d_v = at::empty({s.B, s.T, s.Hs, s.V}, options), d_dt = at::empty({s.B, s.T, s.Hs}, options);
  const at::Tensor d_state = at::empty({s.count(), s.Hs, s.V, s.K}, options);
  std::vector<double> d_head(static_cast<size_t>(tasks.count()) * 3, 0.0);
  const size_t scratch_size = ssd_backward_scratch(longest(s), static_cast<size_t>(s.K), static_cast<size_t>(s.V));
  at::parallel_for(0, tasks.count(), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(scratch_size);
    for (int64_t i = begin; i < end; ++i) {
      const Sequence& seq = s.sequences[tasks.sequence(i)];
      const int64_t h = tasks.head(i), reader = h * tasks.readers(), state = tasks.state_offset(i);
      SsdTaskGradients g{};
      g.d_o = rows(up, seq, reader);
      g.d_final_state = up_state.defined() ? up_state.const_data_ptr<float>() + state : nullptr;
      g.d_q = mutable_rows(d_q, seq, reader);
      g.d_k = mutable_rows(d_k, seq, h), g.d_v = mutable_rows(d_v, seq, h), g.d_dt = mutable_rows(d_dt, seq, h);
      g.d_initial_state = d_state.mutable_data_ptr<float>() + state;
      g.d_head = d_head.data() + i * 3;
      ssd_backward_kernel(tasks[i], g, scratch.data());
    }
  });
  const auto [d_dt_bias, dA, dD] = sum_sequences(d_head, s, options);
  return {sum_heads(d_q, s.Hq),
          sum_heads(d_k, s.Hk),
          sum_heads(d_v, s.Hv),
          d_dt,
          d_dt_bias,
          dA * -at::exp(in.A_log),
          dD,
          in.initial_state.defined() ? d_state : at::Tensor()};
}

at::Tensor ssd_vector_step(const SsdInputs& in, const SsdSizes& s, const at::Tensor& state) {
  const Tasks tasks(in, s);
  const at::Tensor o = at::empty({s.B, 1, s.Ho, s.V}, in.v.options());
  const int64_t grain = std::max<int64_t>(1, 65536 / (s.V * s.K));  // below that a thread costs more than it saves
  at::parallel_for(0, tasks.count(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const SsdRows<float> out = mutable_rows(o, s.sequences[tasks.sequence(i)], tasks.head(i) * tasks.readers());
      ssd_step_kernel(tasks[i], state.mutable_data_ptr<float>() + tasks.state_offset(i), out);
    }
  });
  return o;
}

}  // namespace oryx::ops
