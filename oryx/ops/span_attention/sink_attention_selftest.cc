#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "oryx/common/error.h"
#include "oryx/ops/selftest/selftest.h"
#include "oryx/ops/span_attention/sink_attention.h"

namespace oryx::ops {
namespace {

constexpr int64_t kSinks = 70, kSinkWindow = 90;

// The first keys of a sequence, zeros behind its own.
at::Tensor first_keys(const at::Tensor& x) {
  const int64_t own = std::min(kSinks, x.size(1));
  return at::constant_pad_nd(x.narrow(1, 0, own), {0, 0, 0, 0, 0, kSinks - own});
}

std::vector<at::Tensor> sinks_and_window(const std::vector<at::Tensor>& x) {
  SinkAttention a{.q = x[0], .k = x[1], .v = x[2], .sink_k = first_keys(x[1]), .sink_v = first_keys(x[2]), .positions = x[3]};
  a.window = kSinkWindow;
  return {sink_attention(a)};
}

std::vector<at::Tensor> sinks_and_window_naive(const std::vector<at::Tensor>& x) {
  const auto heads = [&](const at::Tensor& y) { return y.repeat_interleave(x[0].size(2) / y.size(2), 2).transpose(1, 2); };  // [B, H, T, d]
  const at::Tensor t = x[3][0].unsqueeze(1), s = x[3][0].unsqueeze(0);
  const at::Tensor hidden = (s > t) | ((s >= kSinks) & (s <= t - kSinkWindow));
  const at::Tensor scores = at::matmul(heads(x[0]), heads(x[1]).transpose(2, 3)) / std::sqrt(static_cast<double>(x[0].size(3)));
  return {at::matmul(scores.masked_fill(hidden, -std::numeric_limits<double>::infinity()).softmax(-1), heads(x[2])).transpose(1, 2)};
}

std::vector<SelftestCase> sink_selftests(bool quick) {
  std::vector<SelftestCase> all;
  for (const int64_t T : selftest_lengths(quick)) {
    for (const int64_t d : {64, 128}) {
      std::vector<SelftestInput> in = {{selftest_random({2, T, 4, d}, 1)}, {selftest_random({2, T, 2, d}, 2)}, {selftest_random({2, T, 2, d}, 3)}};
      in.push_back({at::arange(T, at::kInt).expand({2, T})});
      all.push_back({fmt::format("T {} H 4/2 d {}, first {} and last {}", T, d, kSinks, kSinkWindow), in, sinks_and_window, sinks_and_window_naive, /*gradients=*/false});
    }
  }
  return all;
}

ORYX_SELFTEST(sink_attention, sink_selftests);

}  // namespace
}  // namespace oryx::ops
