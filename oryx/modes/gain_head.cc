#include "oryx/modes/gain_head.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "oryx/common/error.h"
#include "oryx/common/hash.h"
#include "oryx/common/utf8.h"
#include "oryx/io/safetensors.h"

namespace oryx {

namespace {

constexpr const char* kHeadFormat = "oryx-router 1";
constexpr const char* kHeadKeys[] = {"format", "model", "bias", "reads"};

const std::string& head_entry(const SafetensorsReader& file, const std::string& key) {
  const auto it = file.metadata().find(key);
  if (it == file.metadata().end()) fail("{}: no '{}' in its metadata, expected a router written by oryx router train", file.path(), key);
  return it->second;
}

// A float32 tensor of this shape; -1 for a size that the file may choose.
at::Tensor head_tensor(const SafetensorsReader& file, const std::string& name, const std::vector<int64_t>& shape) {
  const auto it = file.tensors().find(name);
  if (it == file.tensors().end()) fail("{}: no tensor '{}', expected a router written by oryx router train", file.path(), name);
  const TensorInfo& info = it->second;
  bool fits = info.dtype == at::kFloat && info.shape.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 ? info.shape[i] > 0 : info.shape[i] == shape[i];
  if (!fits) {
    std::vector<std::string> sizes;
    for (const int64_t s : shape) sizes.push_back(s < 0 ? "1 or more" : std::to_string(s));
    fail("{}: tensor '{}' is {} [{}], expected F32 [{}]", file.path(), name, safetensors_dtype(info.dtype), fmt::join(info.shape, ", "), fmt::join(sizes, ", "));
  }
  at::Tensor x = file.load(name);
  if (!x.isfinite().all().item<bool>()) fail("{}: tensor '{}' holds values that are not finite; the file is damaged", file.path(), name);
  return x;
}

}  // namespace

float ordered_dot(const float* a, const float* b, int64_t n) {
  constexpr int64_t kLanes = 16;  // apart, so that they are added side by side
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) sums[l] += a[i + l] * b[i + l];
  }
  for (; i < n; ++i) sums[i % kLanes] += a[i] * b[i];
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) sums[l] += sums[l + width];
  }
  return sums[0];
}

at::Tensor GainHead::predict(const at::Tensor& x) const {
  const int64_t F = features(), H = width();
  TORCH_CHECK(x.dim() == 2 && x.size(1) == F && x.scalar_type() == at::kFloat, "router: features ", x.sizes(), ", expected [N, ", F, "]");
  const at::Tensor rows = x.contiguous(), inner = w1.contiguous();
  at::Tensor out = at::empty({x.size(0)}, at::kFloat);
  const float *from = rows.const_data_ptr<float>(), *m = mean.const_data_ptr<float>(), *s = scale.const_data_ptr<float>(), *a0 = w0.const_data_ptr<float>(),
              *a1 = inner.const_data_ptr<float>(), *c1 = b1.const_data_ptr<float>(), *a2 = w2.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, x.size(0), 16, [&](int64_t begin, int64_t end) {
    std::vector<float> z(static_cast<size_t>(F)), u(static_cast<size_t>(H));
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t f = 0; f < F; ++f) z[static_cast<size_t>(f)] = (from[n * F + f] - m[f]) / s[f];
      for (int64_t h = 0; h < H; ++h) {
        const float a = ordered_dot(z.data(), a1 + h * F, F) + c1[h];
        u[static_cast<size_t>(h)] = a / (1 + std::exp(-a));
      }
      to[n] = ordered_dot(z.data(), a0, F) + ordered_dot(u.data(), a2, H) + static_cast<float>(bias);
    }
  });
  return out;
}

std::string GainHead::identity() const {
  uint64_t hash = fnv1a(fmt::format("{} {} {}", model, reads_hidden, bias));
  for (const at::Tensor& part : {mean, scale, w0, w1, b1, w2}) {
    const at::Tensor x = part.contiguous();
    hash = fnv1a(x.const_data_ptr(), x.nbytes(), hash);
  }
  return fmt::format("{:016x}", hash);
}

double GainHead::threshold(double share) const {
  if (share <= 0) return std::numeric_limits<double>::infinity();
  if (share >= 1) return -std::numeric_limits<double>::infinity();
  const double at = (1 - share) * static_cast<double>(quantiles.size() - 1);
  const auto below = std::min(static_cast<size_t>(at), quantiles.size() - 2);
  const double part = at - static_cast<double>(below);
  return static_cast<double>(quantiles[below]) * (1 - part) + static_cast<double>(quantiles[below + 1]) * part;
}

void save_head(const GainHead& h, const std::filesystem::path& path) {
  std::map<std::string, std::string> meta = h.notes;
  meta["format"] = kHeadFormat;
  meta["model"] = h.model;
  meta["bias"] = fmt::format("{}", h.bias);
  meta["reads"] = h.reads_hidden ? "hidden" : "tokens";
  const at::Tensor quantiles = at::tensor(h.quantiles, at::kFloat);
  write_safetensors(path, {{"mean", h.mean}, {"scale", h.scale}, {"w0", h.w0}, {"w1", h.w1}, {"b1", h.b1}, {"w2", h.w2}, {"quantiles", quantiles}}, meta);
}

std::shared_ptr<const GainHead> load_head(const std::filesystem::path& path) {
  const SafetensorsReader file(path);
  const std::string& format = head_entry(file, "format");
  if (format != kHeadFormat) fail("{}: its format is '{}', expected '{}'", file.path(), shown(format), kHeadFormat);
  auto h = std::make_shared<GainHead>();
  h->model = head_entry(file, "model");
  const std::string &bias = head_entry(file, "bias"), &reads = head_entry(file, "reads");
  const auto [end, error] = std::from_chars(bias.data(), bias.data() + bias.size(), h->bias);
  if (error != std::errc() || end != bias.data() + bias.size() || !std::isfinite(h->bias)) fail("{}: 'bias' in its metadata is '{}', expected a number", file.path(), shown(bias));
  if (reads != "hidden" && reads != "tokens") fail("{}: 'reads' in its metadata is '{}', expected hidden or tokens", file.path(), shown(reads));
  h->reads_hidden = reads == "hidden";
  h->mean = head_tensor(file, "mean", {-1});
  const int64_t F = h->mean.size(0);
  h->scale = head_tensor(file, "scale", {F});
  if (!h->scale.gt(0).all().item<bool>()) fail("{}: tensor 'scale' holds values of 0 or less; the file is damaged", file.path());
  h->w0 = head_tensor(file, "w0", {F});
  h->w1 = head_tensor(file, "w1", {-1, F});
  const int64_t H = h->w1.size(0);
  h->b1 = head_tensor(file, "b1", {H});
  h->w2 = head_tensor(file, "w2", {H});
  const at::Tensor quantiles = head_tensor(file, "quantiles", {-1});
  h->quantiles.assign(quantiles.const_data_ptr<float>(), quantiles.const_data_ptr<float>() + quantiles.numel());
  if (h->quantiles.size() < 2 || !std::is_sorted(h->quantiles.begin(), h->quantiles.end())) fail("{}: tensor 'quantiles' does not rise; the file is damaged", file.path());
  for (const auto& [key, value] : file.metadata()) {
    if (std::find(std::begin(kHeadKeys), std::end(kHeadKeys), key) == std::end(kHeadKeys)) h->notes[key] = value;
  }
  return h;
}

}  // namespace oryx
