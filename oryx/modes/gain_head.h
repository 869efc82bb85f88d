// The learned part of the policy `router`: a small network that says, before a token runs, how many nats attention would take off the loss of the prediction made at it.
//
//     z = (x - mean) / scale
//     gain = w0 . z + w2 . silu(W1 z + b1) + b
//
// What x holds is known to oryx/router/features.h alone. A head belongs to one model.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace oryx {

struct GainHead {
  at::Tensor mean, scale;     // [F] float32
  at::Tensor w0, w1, b1, w2;  // [F], [H, F], [H], [H] float32
  double bias = 0;
  bool reads_hidden = true;   // x holds the final hidden state before the token; false: the tokens alone
  std::string model;          // identity (oryx/router/features.h)
  std::vector<float> quantiles;                // rising: of the gains predicted for held-out tokens, at 0, 1/n, ..., 1
  std::map<std::string, std::string> notes;    // how it was made, for people

  int64_t features() const { return mean.size(0); }
  int64_t width() const { return w1.size(0); }
  // x [N, F] float32 -> gains [N] float32, each bit for bit the same whatever stands beside it.
  at::Tensor predict(const at::Tensor& x) const;
  // The gain that a share of the held-out tokens exceeds: +infinity for 0, -infinity for 1.
  double threshold(double share) const;
  // 16 hexadecimal digits of everything that predictions follow from: two heads that predict differently have, but for chance, different ones.
  std::string identity() const;
};

// a . b, in an order of summation that n alone gives.
float ordered_dot(const float* a, const float* b, int64_t n);

// One safetensors file, whole or absent: tensors mean, scale, w0, w1, b1, w2, quantiles; metadata format ("oryx-router 1"), model, bias, reads, and the notes.
void save_head(const GainHead& head, const std::filesystem::path& path);

// Throws Error, one line, for a file of another format, or with a tensor or an entry that is missing, of another shape or dtype, or not finite.
std::shared_ptr<const GainHead> load_head(const std::filesystem::path& path);

}  // namespace oryx
