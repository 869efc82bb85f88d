#include <ATen/ATen.h>

#include "oryx/common/error.h"
#include "oryx/ops/selftest/selftest.h"
#include "oryx/ops/span_attention/span_attention.h"

namespace oryx::ops {
namespace {

using Tensors = std::vector<at::Tensor>;

std::vector<SelftestInput> inputs(int64_t T, int64_t Hq, int64_t Hk, int64_t d) {
  return {{selftest_random({1, T, Hq, d}, 1)}, {selftest_random({1, T, Hk, d}, 2)}, {selftest_random({1, T, Hk, d}, 3)}};
}

template <class F>
SelftestFunction plain(F f, int64_t window) {
  return [f, window](const Tensors& x) { return Tensors{f(x[0], x[1], x[2], std::nullopt, std::nullopt, std::nullopt, std::nullopt, window, std::nullopt)}; };
}

template <class F>
SelftestFunction packed(F f, int64_t window) {
  return [f, window](const Tensors& x) { return Tensors{f(x[0], x[1], x[2], x[4], x[3], std::nullopt, std::nullopt, window, std::nullopt)}; };
}

std::vector<SelftestCase> cases(bool quick) {
  std::vector<SelftestCase> all;
  for (const int64_t T : selftest_lengths(quick)) {
    for (const int64_t d : {64, 128}) {
      all.push_back({fmt::format("T {} H 2 d {}", T, d), inputs(T, 2, 2, d), plain(span_attention, 0), plain(span_attention_naive, 0)});
    }
    for (const int64_t window : {0, 17}) {
      auto in = inputs(T, 4, 2, 128);
      in.push_back({selftest_documents(T)});
      in.push_back({selftest_spans(T)});
      all.push_back({fmt::format("T {} H 4/2 d 128, packed, spans{}", T, window > 0 ? ", window 17" : ""), in, packed(span_attention, window),
                     packed(span_attention_naive, window)});
    }
  }
  return all;
}

ORYX_SELFTEST(span_attention, cases);

}  // namespace
}  // namespace oryx::ops
