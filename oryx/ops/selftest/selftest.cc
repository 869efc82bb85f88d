#include "oryx/ops/selftest/selftest.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <map>

#include "oryx/common/error.h"
#include "oryx/common/interrupt.h"

namespace oryx::ops {

namespace {

using Tensors = std::vector<at::Tensor>;

// Filled by static initialisers, read-only afterwards.
std::map<std::string, SelftestOperator>& registry() {
  static std::map<std::string, SelftestOperator> r;
  return r;
}

class Silence : public c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

// While it stands, libtorch fills whatever is allocated without a value with NaN: what an operator forgets to write is seen.
class Poison {
 public:
  Poison() : warnings_(&silence_) {
    at::Context& c = at::globalContext();
    algorithms_ = c.deterministicAlgorithms(), warn_ = c.deterministicAlgorithmsWarnOnly(), fill_ = c.deterministicFillUninitializedMemory();
    c.setDeterministicAlgorithms(true, /*warn_only=*/true);
    c.setDeterministicFillUninitializedMemory(true);
  }
  ~Poison() {
    at::Context& c = at::globalContext();
    c.setDeterministicAlgorithms(algorithms_, warn_);
    c.setDeterministicFillUninitializedMemory(fill_);
  }
  Poison(const Poison&) = delete;
  Poison& operator=(const Poison&) = delete;

 private:
  Silence silence_;
  c10::WarningUtils::WarningHandlerGuard warnings_;
  bool algorithms_, warn_, fill_;
};

bool is_float(const at::Tensor& x) { return at::isFloatingType(x.scalar_type()); }

// The case's inputs as the operator takes them, or (exact) the same values in float64 on the CPU.
Tensors prepare(const SelftestCase& c, at::ScalarType dtype, at::Device device, bool exact, bool gradients) {
  Tensors out;
  for (const SelftestInput& in : c.inputs) {
    if (!is_float(in.value)) {
      out.push_back(exact ? in.value : in.value.to(device));
      continue;
    }
    const at::Tensor narrow = in.value.to(in.wide ? at::kFloat : dtype);
    const at::Tensor x = exact ? narrow.to(at::kDouble) : narrow.to(device, narrow.scalar_type(), false, /*copy=*/true);
    out.push_back(x.detach().requires_grad_(gradients));
  }
  return out;
}

// floor: of the norm that the difference is measured against.
double relative_error(const at::Tensor& found, const at::Tensor& expected, double floor = 1e-30) {
  if (!found.defined() || found.sizes() != expected.sizes()) return std::numeric_limits<double>::quiet_NaN();
  if (expected.numel() == 0) return 0;
  const at::Tensor a = found.detach().to(at::kCPU, at::kDouble), b = expected.detach();
  const double norm = b.norm().item<double>();
  return (a - b).norm().item<double>() / std::max(norm, floor);
}

// The larger one, and NaN if either is.
double worse(double a, double b) { return std::isnan(a) || a > b ? a : b; }

void synchronise(at::Device device) {
  if (!device.is_cpu()) c10::impl::VirtualGuardImpl(device.type()).synchronizeDevice(device.has_index() ? device.index() : 0);
}

// Seconds of a call: the median of three, or of one that takes long.
double seconds_of(const SelftestFunction& f, const Tensors& inputs, at::Device device) {
  at::NoGradGuard no_grad;
  std::vector<double> all;
  for (int i = 0; i < 4 && (i < 2 || all.back() < 0.1); ++i) {
    check_interrupt();
    synchronise(device);
    const auto start = std::chrono::steady_clock::now();
    f(inputs);
    synchronise(device);
    const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (i > 0 || s >= 0.1) all.push_back(s);  // the first call warms up
    if (s >= 0.1) break;
  }
  std::sort(all.begin(), all.end());
  return all[all.size() / 2];
}

Tensors upstream(const Tensors& outputs, at::ScalarType dtype) {
  Tensors up;
  for (size_t i = 0; i < outputs.size(); ++i) {
    up.push_back(selftest_random(outputs[i].sizes(), 1000 + i).to(dtype == at::kBFloat16 && outputs[i].scalar_type() != at::kFloat ? dtype : at::kFloat));
  }
  return up;
}

void compare(const SelftestCase& c, at::ScalarType dtype, at::Device device, SelftestResult& result) {
  const Tensors exact = prepare(c, dtype, device, true, c.gradients), inputs = prepare(c, dtype, device, false, c.gradients);
  const Tensors expected = c.naive(exact);
  Tensors found, up;
  {
    const Poison poison;
    found = c.run(inputs);
    TORCH_CHECK(found.size() == expected.size(), "gave ", found.size(), " outputs, expected ", expected.size());
    for (size_t i = 0; i < found.size(); ++i) {
      result.value_error = worse(relative_error(found[i], expected[i]), result.value_error);
    }
    if (!c.gradients) return;
    Tensors up_device, up_exact;
    up = upstream(found, dtype);
    for (size_t i = 0; i < found.size(); ++i) {
      up_device.push_back(up[i].to(found[i].device(), found[i].scalar_type()));
      up_exact.push_back(up[i].to(at::kDouble));
    }
    torch::autograd::backward(found, up_device);
    torch::autograd::backward(expected, up_exact);
  }
  // A gradient that vanishes (of one query with one key) is measured against a hundredth of the largest one.
  double largest = 0;
  for (const at::Tensor& x : exact) {
    if (is_float(x) && x.grad().defined()) largest = std::max(largest, x.grad().norm().item<double>());
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!is_float(inputs[i]) || !exact[i].grad().defined()) continue;
    result.gradient_error = worse(relative_error(inputs[i].grad(), exact[i].grad(), std::max(1e-2 * largest, 1e-30)), result.gradient_error);
  }
}

SelftestResult check(const std::string& name, const SelftestCase& c, at::ScalarType dtype, at::Device device) {
  SelftestResult r;
  r.name = name, r.shape = c.shape, r.dtype = dtype == at::kFloat ? "float32" : "bfloat16";
  r.limits = selftest_limits(dtype);
  r.limits.values *= c.slack, r.limits.gradients *= c.slack;
  r.has_gradients = c.gradients;
  try {
    compare(c, dtype, device, r);
    const Tensors inputs = prepare(c, dtype, device, false, false);
    const double own = seconds_of(c.run, inputs, device);
    r.speed_up = seconds_of(c.naive, inputs, device) / own;
  } catch (const Interrupted&) {
    throw;
  } catch (const c10::Error& e) {
    r.error = e.what_without_backtrace();
  } catch (const std::exception& e) {
    r.error = e.what();
  }
  std::replace(r.error.begin(), r.error.end(), '\n', ' ');
  return r;
}

}  // namespace

std::string (*gpu_name_of)(int) = nullptr;

std::string gpu_name(at::Device device) { return gpu_name_of == nullptr || device.is_cpu() ? "" : gpu_name_of(device.has_index() ? device.index() : 0); }

SelftestRegistration::SelftestRegistration(const char* name, std::vector<SelftestCase> (*cases)(bool)) { registry()[name] = {name, cases}; }

std::vector<SelftestOperator> selftest_operators() {
  std::vector<SelftestOperator> all;
  for (const auto& [name, op] : registry()) all.push_back(op);
  return all;
}

SelftestLimits selftest_limits(at::ScalarType dtype) { return dtype == at::kBFloat16 ? SelftestLimits{1e-2, 2e-2} : SelftestLimits{5e-5, 2e-4}; }

bool SelftestResult::passed() const { return error.empty() && value_error <= limits.values && (!has_gradients || gradient_error <= limits.gradients); }

void run_selftest(const std::vector<SelftestOperator>& operators, at::Device device, bool quick, const std::function<void(const SelftestResult&)>& done) {
  for (const SelftestOperator& op : operators) {
    for (const SelftestCase& c : op.cases(quick)) {
      for (const auto dtype : {at::kFloat, at::kBFloat16}) done(check(op.name, c, dtype, device));
    }
  }
}

at::Tensor selftest_random(at::IntArrayRef shape, uint64_t seed) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::randn(shape, generator, at::TensorOptions(at::kDouble));
}

at::Tensor selftest_ints(const std::vector<int32_t>& values) { return at::tensor(values, at::kInt); }

at::Tensor selftest_documents(int64_t T) {
  const auto end = static_cast<int32_t>(T), first = (end + 2) / 3, second = first + (end - first + 4) / 5;
  return selftest_ints({0, first, first, second, end});
}

at::Tensor selftest_spans(int64_t T) {
  const auto end = static_cast<int32_t>(T);
  std::vector<int32_t> flat;
  const auto add = [&](int32_t begin, int32_t last) {
    if (begin < last) flat.insert(flat.end(), {0, begin, last});
  };
  add(end / 10, end / 4);
  const int32_t last = end - (end + 4) / 5;
  if (end / 2 < last) add(end / 2, end / 2 + 1);
  add(last, end);
  return selftest_ints(flat).view({-1, 3});
}

at::Tensor selftest_decays(int64_t T, int64_t H) {
  const at::Tensor kinds = at::tensor(std::vector<double>{0.0, -1e-4, -0.1, -60.0}, at::kDouble);
  // Runs of one kind, so that chunks are met that hold one kind and chunks that hold several.
  const at::Tensor index = (at::arange(T).div(23, "floor").unsqueeze(1) + at::arange(H).unsqueeze(0)).remainder(4);
  return kinds.index_select(0, index.reshape({-1})).view({1, T, H});
}

std::vector<int64_t> selftest_lengths(bool quick) {
  return quick ? std::vector<int64_t>{1, 100} : std::vector<int64_t>{1, 63, 100, 1000};
}

}  // namespace oryx::ops
