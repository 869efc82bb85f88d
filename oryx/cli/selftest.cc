// oryx selftest: may this machine, and this device, be trusted?
#include "oryx/ops/selftest/selftest.h"

#include "oryx/cli/command.h"
#include "oryx/common/error.h"
#include "oryx/common/interrupt.h"
#include "oryx/model/device.h"

namespace oryx::cli {

namespace {

struct SelftestArguments {
  std::string device = "cpu";
  bool quick = false;
  std::vector<std::string> only;
};

std::vector<ops::SelftestOperator> chosen(const SelftestArguments& o) {
  std::vector<ops::SelftestOperator> all = ops::selftest_operators(), wanted;
  std::vector<std::string> names;
  for (const auto& op : all) names.push_back(op.name);
  for (const auto& name : o.only) {
    const auto it = std::find_if(all.begin(), all.end(), [&](const auto& op) { return op.name == name; });
    if (it == all.end()) fail("unknown operator '{}', known: {}{}", name, fmt::join(names, ", "), did_you_mean(name, names));
    wanted.push_back(*it);
  }
  return o.only.empty() ? all : wanted;
}

void print_line(const ops::SelftestResult& r) {
  const std::string gradients = r.has_gradients ? fmt::format("{:.1e}", r.gradient_error) : "-";
  const std::string limits = r.has_gradients ? fmt::format("{:.0e} {:.0e}", r.limits.values, r.limits.gradients) : fmt::format("{:.0e}", r.limits.values);
  print("{:<4} {:<20} {:<38} {:<8} {:>8.1e} {:>8}  {:<12} {:>7.1f}x{}\n", r.passed() ? "ok" : "BAD", r.name, r.shape, r.dtype, r.value_error, gradients, limits,
        r.speed_up, r.error.empty() ? "" : "  " + r.error);
  flush();
}

void selftest(const SelftestArguments& o) {
  const at::Device device = parse_device(o.device);
  const auto operators = chosen(o);
  catch_interrupts();
  print("{}\n", device.is_cpu() ? fmt::format("cpu, kernels for {}", ops::cpu_target()) : fmt::format("{}, {}", o.device, ops::gpu_name(device)));
  print("{:<4} {:<20} {:<38} {:<8} {:>8} {:>8}  {:<12} {:>8}\n", "", "operator", "shape", "type", "values", "grads", "limits", "speed-up");
  int64_t checks = 0, bad = 0;
  std::string first;
  ops::run_selftest(operators, device, o.quick, [&](const ops::SelftestResult& r) {
    print_line(r);
    ++checks;
    if (r.passed()) return;
    if (++bad == 1) first = fmt::format("{}, {}, {}", r.name, r.shape, r.dtype);
  });
  if (bad > 0) {
    fail("{} of {} checks failed on {} (the first: {}): its results are not to be trusted; please report the lines marked BAD", bad, checks, o.device, first);
  }
  print("all {} checks passed\n", checks);
}

ORYX_COMMAND(selftest, "check every operator on this machine against its formula in float64", [](CLI::App& app) {
  auto o = std::make_shared<SelftestArguments>();
  app.add_option("--device", o->device, "cpu, cuda or cuda:N")->capture_default_str();
  app.add_flag("--quick", o->quick, "short inputs only: seconds instead of minutes");
  app.add_option("--only", o->only, "operators to check")->delimiter(',')->type_name("NAME,NAME,...");
  app.callback([o] { selftest(*o); });
});

}  // namespace
}  // namespace oryx::cli
