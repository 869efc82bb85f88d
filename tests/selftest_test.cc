// oryx selftest as a user runs it, and that a wrong operator would not pass it.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <string_view>

#include "oryx/ops/selftest/selftest.h"
#include "oryx/ops/swiglu/swiglu.h"
#include "tests/support/program.h"

namespace oryx::test {
namespace {

using ops::SelftestCase;
using ops::SelftestResult;
using ::testing::HasSubstr;
using Tensors = std::vector<at::Tensor>;

TEST(Selftest, PassesOnTheCpuAndNamesTheInstructionSet) {
  const auto r = run({"selftest", "--quick", "--only", "rms_norm,swiglu,gated_delta_step,ssd,span_attention,short_conv"});
  EXPECT_EQ(r.exit_code, 0) << r.out << r.err;
  EXPECT_THAT(r.out, HasSubstr("cpu, kernels for " + ops::cpu_target()));
  EXPECT_THAT(r.out, HasSubstr("checks passed"));
  EXPECT_THAT(r.out, HasSubstr("bfloat16"));
}

// Whatever is registered under torch.ops.oryx, but for what one operator asks of another (a leading underscore, a backward pass), is checked.
TEST(Selftest, EveryOperatorTakesPart) {
  std::vector<std::string> names;
  for (const auto& op : ops::selftest_operators()) {
    names.push_back(op.name);
    EXPECT_FALSE(op.cases(true).empty()) << op.name;
  }
  const std::map<std::string, std::string> parts = {{"adamw_step", "adamw"}, {"adamw_update", "adamw"}};
  int registered = 0;
  for (const auto& op : c10::Dispatcher::singleton().getAllOpNames()) {
    constexpr std::string_view kOurs = "oryx::";
    if (!std::string_view(op.name).starts_with(kOurs)) continue;
    const std::string name = op.name.substr(kOurs.size());
    if (name.starts_with('_') || name.ends_with("_backward")) continue;
    ++registered;
    EXPECT_THAT(names, ::testing::Contains(parts.count(name) > 0 ? parts.at(name) : name));
  }
  EXPECT_GE(registered, 18);
}

TEST(Selftest, UnknownOperatorAndDevice) {
  const auto operators = run({"selftest", "--only", "swigloo"});
  EXPECT_EQ(operators.exit_code, 1);
  EXPECT_THAT(operators.err, HasSubstr("Did you mean 'swiglu'"));
  const auto device = run({"selftest", "--device", "gpu"});
  EXPECT_EQ(device.exit_code, 1);
  EXPECT_THAT(device.err, HasSubstr("device is 'gpu', expected cpu, cuda or cuda:N"));
}

// ---- operators that are wrong: registered nowhere but here

Tensors naive(const Tensors& x) { return {ops::swiglu_naive(x[0], x[1])}; }

SelftestResult result_of(const ops::SelftestFunction& run) {
  static ops::SelftestFunction form;  // a function pointer carries nothing
  form = run;
  const auto cases = [](bool) { return std::vector<SelftestCase>{{"40 x 9", {{ops::selftest_random({40, 9}, 1)}, {ops::selftest_random({40, 9}, 2)}}, form, naive}}; };
  std::vector<SelftestResult> all;
  ops::run_selftest({{"faulty", cases}}, at::kCPU, true, [&](const SelftestResult& r) { all.push_back(r); });
  EXPECT_EQ(all.size(), 2u);  // float32, bfloat16
  EXPECT_EQ(all.at(0).passed(), all.at(1).passed());
  return all.at(0);
}

TEST(Selftest, ARightFormPasses) { EXPECT_TRUE(result_of(naive).passed()); }

TEST(Selftest, AWrongValueIsFound) {
  const SelftestResult r = result_of([](const Tensors& x) { return Tensors{ops::swiglu_naive(x[0], x[1]) * 1.05}; });
  EXPECT_FALSE(r.passed());
  EXPECT_NEAR(r.value_error, 0.05, 1e-3);
}

TEST(Selftest, AWrongGradientIsFound) {
  // Right values; of the second input's gradient a tenth is lost.
  const SelftestResult r = result_of([](const Tensors& x) { return Tensors{ops::swiglu_naive(x[0], x[1] * 0.9 + x[1].detach() * 0.1)}; });
  EXPECT_FALSE(r.passed());
  EXPECT_LE(r.value_error, 1e-5);
  EXPECT_NEAR(r.gradient_error, 0.1, 1e-2);
}

TEST(Selftest, WhatIsNotWrittenIsFound) {
  const SelftestResult r = result_of([](const Tensors& x) {
    at::Tensor y = at::empty_like(x[0]);
    y.narrow(0, 0, 39).copy_(ops::swiglu_naive(x[0], x[1]).narrow(0, 0, 39));  // the last row is forgotten
    return Tensors{y};
  });
  EXPECT_FALSE(r.passed());
  EXPECT_TRUE(std::isnan(r.value_error));
}

TEST(Selftest, AWrongShapeAndAnErrorAreFound) {
  EXPECT_FALSE(result_of([](const Tensors& x) { return Tensors{ops::swiglu_naive(x[0], x[1]).narrow(0, 0, 39)}; }).passed());
  const SelftestResult r = result_of([](const Tensors&) -> Tensors { throw std::runtime_error("no kernel\nfor this"); });
  EXPECT_FALSE(r.passed());
  EXPECT_EQ(r.error, "no kernel for this");
}

}  // namespace
}  // namespace oryx::test
