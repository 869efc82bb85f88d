// What `oryx selftest` checks: every operator on this machine and device against its naive form in float64. An operator takes part by a file
// NAME_selftest.cc that lists its cases and ends in ORYX_SELFTEST.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <vector>

namespace oryx::ops {

using SelftestFunction = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>;

// An argument as the case draws it: float64, or integers, on the CPU.
struct SelftestInput {
  at::Tensor value;
  bool wide = false;  // stays float32 where the operator works in bfloat16: decays, weights of norms
};

// What both forms are called with; the outputs (floating) are compared, and the gradients of all floating inputs, from random upstream ones.
struct SelftestCase {
  std::string shape;  // for the table: "T 100 H 2/1 K 64, packed, decays"
  std::vector<SelftestInput> inputs;
  SelftestFunction run;    // the operator: on the device, float32 or bfloat16
  SelftestFunction naive;  // its formula: on the CPU in float64, and on the device for the speed-up
  bool gradients = true;   // false: steps, optimisers
  double slack = 1;        // of the limits, where a comment in the case's file says why
};

struct SelftestOperator {
  std::string name;
  // `quick`: few and small ones.
  std::vector<SelftestCase> (*cases)(bool quick);
};

// Norms of the differences over norms, the largest of all outputs and of all gradients. NaN never passes.
struct SelftestLimits {
  double values, gradients;
};
SelftestLimits selftest_limits(at::ScalarType dtype);

struct SelftestResult {
  std::string name, shape, dtype;
  double value_error = 0, gradient_error = 0, speed_up = 0;  // of a forward pass over the naive form's on the same device
  SelftestLimits limits{};
  bool has_gradients = false;
  std::string error;  // what was thrown, else ""
  bool passed() const;
};

// Every case in float32 and bfloat16 on `device`. Memory that an operator asks for is filled with NaN before it gets it. `done` sees each result at once;
// `wanted` says which operators run (null: all).
void run_selftest(const std::vector<SelftestOperator>& operators, at::Device device, bool quick, const std::function<void(const SelftestResult&)>& done);

// The registered operators, sorted by name.
std::vector<SelftestOperator> selftest_operators();

// The instruction set that this machine's CPU kernels run with (Highway's name of it), and the name of a GPU ("" in a build without CUDA).
std::string cpu_target();
std::string gpu_name(at::Device device);

// ---- for the files that list cases

// Standard normal, float64; a function of the seed.
at::Tensor selftest_random(at::IntArrayRef shape, uint64_t seed);
at::Tensor selftest_ints(const std::vector<int32_t>& values);
// Bounds of packed documents in T tokens, an empty one among them: int32.
at::Tensor selftest_documents(int64_t T);
// Some spans of a row of T tokens, none longer than a third: int32 [n, 3].
at::Tensor selftest_spans(int64_t T);
// Log decays [1, T, H] of every kind in turn: none, slow, usual, and so strong that nothing is left.
at::Tensor selftest_decays(int64_t T, int64_t H);
// The lengths that are checked: 1, 63, 100, 1000.
std::vector<int64_t> selftest_lengths(bool quick);

struct SelftestRegistration {
  SelftestRegistration(const char* name, std::vector<SelftestCase> (*cases)(bool));
};
// Set by the CUDA build.
extern std::string (*gpu_name_of)(int index);

}  // namespace oryx::ops

// `name` is an identifier, `cases` a function of bool quick.
#define ORYX_SELFTEST(name, cases) static const ::oryx::ops::SelftestRegistration oryx_selftest_##name(#name, cases)
