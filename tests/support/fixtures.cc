#include "tests/support/fixtures.h"

#include <ATen/Context.h>

#include <algorithm>
#include <cstdlib>
#include <limits>

#include "oryx/common/file.h"
#include "oryx/io/safetensors.h"
#include "tests/support/paths.h"

namespace oryx::test {

namespace fs = std::filesystem;

const at::Tensor& Fixture::at(const std::string& n) const {
  const auto it = tensors.find(n);
  if (it == tensors.end()) throw std::runtime_error("fixture " + name + " holds no tensor " + n);
  return it->second;
}

at::Tensor Fixture::leaf(const std::string& n) const {
  return has(n) ? at(n).clone().set_requires_grad(true) : at::Tensor();
}

double Fixture::limit(const std::string& n, double least) const {
  const auto& told = sidecar.at("tensors").at(n);
  const double size = told.value("max_abs", 0.0);
  return size > 0 ? std::max(least, 3 * told.value("fp32_naive_max_abs_error", 0.0) / size) : least;
}

fs::path fixture_folder() {
  if (const char* env = std::getenv("ORYX_FIXTURES"); env != nullptr && *env != '\0') {
    if (!fs::is_directory(env)) throw std::runtime_error(std::string("ORYX_FIXTURES=") + env + " is no folder");
    return env;
  }
  const fs::path beside = fs::path(test::source_path("..")) / "shared" / "fixtures";
  return fs::is_directory(beside) ? fs::canonical(beside) : fs::path();
}

Fixture load_fixture(const fs::path& stem) {
  Fixture f;
  f.name = stem.filename().string();
  f.sidecar = nlohmann::json::parse(read_file(stem.string() + ".json"));
  f.attrs = f.sidecar.value("attrs", nlohmann::json::object());
  const SafetensorsReader reader(stem.string() + ".safetensors");
  for (const auto& [name, info] : reader.tensors()) f.tensors[name] = reader.load(name);
  return f;
}

std::vector<at::Device> devices() {
  std::vector<at::Device> all{at::kCPU};
  if (at::hasCUDA() && at::getNumGPUs() > 0) all.emplace_back(at::kCUDA, 0);
  return all;
}

std::vector<Fixture> fixtures(const std::string& folder, const std::string& op) {
  std::vector<fs::path> stems;
  for (const auto& entry : fs::directory_iterator(fixture_folder() / folder)) {
    if (entry.path().extension() != ".json") continue;
    const auto sidecar = nlohmann::json::parse(read_file(entry.path()));
    if (sidecar.value("op", "") == op) stems.push_back(entry.path().parent_path() / entry.path().stem());
  }
  std::sort(stems.begin(), stems.end());
  std::vector<Fixture> out;
  for (const at::Device device : devices()) {
    for (const auto& stem : stems) {
      Fixture& f = out.emplace_back(load_fixture(stem));
      if (device.is_cpu()) continue;
      f.device = device;
      f.name += " on cuda";
      for (auto& [name, tensor] : f.tensors) tensor = tensor.to(device);
    }
  }
  EXPECT_FALSE(out.empty()) << "no fixture of op '" << op << "' in " << (fixture_folder() / folder);
  return out;
}

double fixture_error(const at::Tensor& x, const at::Tensor& ref, bool by_row) {
  if (!x.defined() || x.sizes() != ref.sizes()) return std::numeric_limits<double>::infinity();
  at::Tensor diff = (x.detach().to(at::kDouble) - ref.to(at::kDouble)).abs();
  at::Tensor size = ref.to(at::kDouble).abs();
  if (by_row && ref.dim() > 0) {
    diff = diff.amax(-1);
    size = size.amax(-1);
  } else if (ref.numel() > 0) {
    diff = diff.max();
    size = size.max();
  }
  if (ref.numel() == 0) return 0;
  const double e = (diff / size.clamp_min(1e-30)).max().item<double>();
  return std::isfinite(e) ? e : std::numeric_limits<double>::infinity();
}

double norm_error(const at::Tensor& x, const at::Tensor& ref) {
  if (!x.defined() || x.sizes() != ref.sizes()) return std::numeric_limits<double>::infinity();
  const at::Tensor r = ref.detach().to(at::kDouble);
  const double e = ((x.detach().to(at::kDouble) - r).norm() / r.norm().clamp_min(1e-30)).item<double>();
  return std::isfinite(e) ? e : std::numeric_limits<double>::infinity();
}

}  // namespace oryx::test
