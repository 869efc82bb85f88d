// What a model costs before it exists: parameters by part and by mode, FLOPs a token, bytes of state.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "oryx/model/config.h"
#include "oryx/model/routing.h"
#include "oryx/state/state.h"

namespace oryx {

struct ModeUse {
  std::string mixer;
  int64_t parameters;   // that a token in this mode uses
  int64_t shared;       // of those, used by every mode
  double shared_share() const { return static_cast<double>(shared) / static_cast<double>(parameters); }
};

struct ParameterReport {
  int64_t total = 0;
  std::vector<std::pair<std::string, int64_t>> parts;  // in the order of the model
  std::vector<ModeUse> modes;
};

ParameterReport report_parameters(const ModelConfig& config);

// Forward FLOPs (a multiply-add is 2) of one token in mode `mixer` that sees `context` tokens, itself included: 2 a weight of every
// matrix it passes through (the output head included, the embedding look-up not), the state updates of all linear mixers, and
// its own mixer's readout or attention. In a layer without that mixer the layer's first works. Training costs three times as much.
double token_flops(const ModelConfig& config, const std::string& mixer, int64_t context);

// Forward FLOPs of a whole routed batch. context: of each of its rows * length tokens, how many it may look at, itself included; empty: its place in its row.
double batch_flops(const ModelConfig& config, const Routing& routing, const std::vector<int32_t>& context = {});

// Bytes of state of one sequence of `tokens` tokens, by part. Checkpoints: the most there are, one at every multiple of checkpoint_every. Ring: once
// it is full.
StateBytes state_bytes(const ModelConfig& config, int64_t tokens, at::ScalarType compute = at::kFloat, const StateOptions& options = {});

}  // namespace oryx
