// What a parameter is, declared before any memory is taken: a model is counted, checked and initialised from these.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace oryx {

enum class Init {
  kNormal,    // normal(0, 0.02)
  kResidual,  // normal(0, 0.02 / sqrt(2 * layers)): projections that write to the residual stream
  kOnes,
  kZeros,
  kConv,      // uniform(-1/sqrt(w), 1/sqrt(w)): torch's default for a depthwise filter of width w
  kLogDecay,  // log U(1, 16): A_log
  kTimeStep,  // softplus^-1(exp U(log 1e-3, log 1e-1)): dt_bias
};

struct ParameterSpec {
  std::string name;
  std::vector<int64_t> shape;
  Init init = Init::kNormal;
  bool weight_decay = true;
  std::string part;        // what `oryx inspect` counts it under: "embedding", "key/value", "query", "norm" ...
  std::vector<std::string> mixers = {};  // that use it; empty: all do

  // A matrix that activations are multiplied by in the type they have (embeddings are looked up in it). The rest, and what decays and
  // steps are made of, works in float32 always.
  bool computes_narrow() const { return shape.size() == 2 && weight_decay && part != "decay and step"; }
  int64_t numel() const {
    int64_t n = 1;
    for (const int64_t s : shape) n *= s;
    return n;
  }
};

// Parameters by full name. Layers keep the tensors' handles: an optimiser that updates in place needs no second look-up.
class ParameterMap {
 public:
  void add(const std::string& name, at::Tensor t) { map_[name] = std::move(t); }
  const at::Tensor& at(const std::string& name) const;
  bool has(const std::string& name) const { return map_.count(name) > 0; }

 private:
  std::unordered_map<std::string, at::Tensor> map_;
};

}  // namespace oryx
