#include <ATen/ATen.h>

#include "oryx/common/error.h"
#include "oryx/ops/norm/norm.h"
#include "oryx/ops/selftest/selftest.h"

namespace oryx::ops {
namespace {

using Tensors = std::vector<at::Tensor>;
constexpr double kEps = 1e-6;

std::vector<SelftestInput> rows(int64_t T, int64_t D, int activations) {
  std::vector<SelftestInput> in;
  for (int i = 0; i < activations; ++i) in.push_back({selftest_random({T, D}, static_cast<uint64_t>(i))});
  in.push_back({selftest_random({D}, 9), /*wide=*/true});
  return in;
}

std::string shape(int64_t T, int64_t D) { return fmt::format("{} x {}", T, D); }

std::vector<SelftestCase> plain(bool quick) {
  std::vector<SelftestCase> cases;
  for (const int64_t T : selftest_lengths(quick)) {
    for (const int64_t D : {63, 2048}) {
      cases.push_back({shape(T, D), rows(T, D, 1), [](const Tensors& x) { return Tensors{rms_norm(x[0], x[1], kEps)}; },
                       [](const Tensors& x) { return Tensors{rms_norm_naive(x[0], x[1], kEps)}; }});
    }
  }
  return cases;
}

std::vector<SelftestCase> with_residual(bool quick) {
  std::vector<SelftestCase> cases;
  for (const int64_t T : selftest_lengths(quick)) {
    for (const int64_t D : {63, 2048}) {
      cases.push_back({shape(T, D), rows(T, D, 2),
                       [](const Tensors& x) {
                         const auto [y, sum] = add_rms_norm(x[0], x[1], x[2], kEps);
                         return Tensors{y, sum};
                       },
                       [](const Tensors& x) {
                         const at::Tensor sum = x[0] + x[1];
                         return Tensors{rms_norm_naive(sum, x[2], kEps), sum};
                       }});
    }
  }
  return cases;
}

std::vector<SelftestCase> gated(bool quick) {
  std::vector<SelftestCase> cases;
  for (const int64_t T : selftest_lengths(quick)) {
    for (const bool first : {false, true}) {
      cases.push_back({shape(16 * T, 128) + (first ? ", gate first" : ""), rows(16 * T, 128, 2),
                       [first](const Tensors& x) { return Tensors{gated_rms_norm(x[0], x[1], x[2], kEps, first)}; },
                       [first](const Tensors& x) { return Tensors{gated_rms_norm_naive(x[0], x[1], x[2], kEps, first)}; }});
    }
  }
  return cases;
}

ORYX_SELFTEST(rms_norm, plain);
ORYX_SELFTEST(add_rms_norm, with_residual);
ORYX_SELFTEST(gated_rms_norm, gated);

}  // namespace
}  // namespace oryx::ops
