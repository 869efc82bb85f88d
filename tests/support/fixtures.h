// Golden values (float64 results rounded to float32) from a folder of safetensors files with JSON sidecars.
//
// The folder is $ORYX_FIXTURES, or else ../shared/fixtures beside the source tree. Without $ORYX_FIXTURES a missing folder skips the test and
// says so; with it, a folder that holds none of the wanted files fails the test.
//
// Where there is a GPU every fixture comes twice, on the CPU and on the GPU: a test over fixtures() then checks both.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace oryx::test {

struct Fixture {
  std::string name;  // file name without ending, and " on cuda" there
  at::Device device = at::kCPU;
  nlohmann::json attrs, sidecar;
  std::map<std::string, at::Tensor> tensors;  // integers as stored (int32)

  bool has(const std::string& n) const { return tensors.count(n) > 0; }
  const at::Tensor& at(const std::string& n) const;
  // The tensor, or an undefined one.
  at::Tensor get(const std::string& n) const { return has(n) ? tensors.at(n) : at::Tensor(); }
  // A fresh float leaf that requires a gradient, or an undefined tensor.
  at::Tensor leaf(const std::string& n) const;
  // How far (fixture_error) a float32 result may be from tensor n: `least`, or, where the folder's shapes and seeds are harder than that, three times
  // what the plain float32 form errs there, which the sidecar tells.
  double limit(const std::string& n, double least) const;
};

std::filesystem::path fixture_folder();  // "" when there is none
Fixture load_fixture(const std::filesystem::path& stem);
std::vector<at::Device> devices();  // of this build and machine: the CPU, and a GPU where there is one

// Every fixture in `folder` (below the root: "ops", "block") whose sidecar says "op": op, sorted by name; then, with a GPU, all of them there.
std::vector<Fixture> fixtures(const std::string& folder, const std::string& op);

// max|x - ref| / max|ref|; with by_row the worst over rows (last axis). NaN and a wrong shape give infinity.
double fixture_error(const at::Tensor& x, const at::Tensor& ref, bool by_row = false);

// Relative error in norm, ||x - ref|| / ||ref||, in double. NaN and a wrong shape give infinity.
double norm_error(const at::Tensor& x, const at::Tensor& ref);

}  // namespace oryx::test

// Skips the test, saying where it looked, when there are no fixtures on this machine.
#define ORYX_REQUIRE_FIXTURES()                                                                          \
  if (oryx::test::fixture_folder().empty())                                                              \
  GTEST_SKIP() << "no golden fixtures here: set ORYX_FIXTURES to their folder"
