#include <ATen/ATen.h>

#include "oryx/common/error.h"
#include "oryx/ops/decode_attention/decode_attention.h"
#include "oryx/ops/selftest/selftest.h"

namespace oryx::ops {
namespace {

using DecodeTensors = std::vector<at::Tensor>;

struct DecodeShape {
  int64_t heads, key_heads, width, rotary, window;
};

// T keys, of which each of three sequences holds another part: all, the first alone, and two thirds.
std::vector<SelftestInput> decode_inputs(int64_t T, const DecodeShape& s) {
  const auto third = static_cast<int32_t>(std::max<int64_t>(1, 2 * T / 3));
  return {{selftest_random({3, s.heads, s.width}, 1)},
          {selftest_random({3, T, s.key_heads, s.width}, 2)},
          {selftest_random({3, T, s.key_heads, s.width}, 3)},
          {selftest_ints({static_cast<int32_t>(T), 1, third})}};
}

template <class F>
SelftestFunction decode_form(F f, const DecodeShape& s) {
  return [f, s](const DecodeTensors& x) { return DecodeTensors{f(x[0], x[1], x[2], x[3], std::nullopt, std::nullopt, DecodeRope{10000, s.rotary}, s.window, std::nullopt)}; };
}

std::vector<SelftestCase> decode_cases(bool quick) {
  std::vector<SelftestCase> all;
  for (const int64_t T : selftest_lengths(quick)) {
    for (const DecodeShape& s : {DecodeShape{2, 2, 64, 0, 0}, {4, 2, 128, 0, 0}, {2, 2, 64, 16, 17}}) {
      const std::string more = s.window > 0 ? fmt::format(", rotated {}, window {}", s.rotary, s.window) : "";
      all.push_back({fmt::format("T {} H {}/{} d {}{}", T, s.heads, s.key_heads, s.width, more), decode_inputs(T, s), decode_form(decode_attention, s),
                     decode_form(decode_attention_naive, s), /*gradients=*/false});
    }
  }
  return all;
}

ORYX_SELFTEST(decode_attention, decode_cases);

}  // namespace
}  // namespace oryx::ops
