// What Qwen3-Next and Qwen3.5 share: Gated DeltaNet layers beside gated attention, norms that multiply by 1 + weight.
#pragma once

#include <string>
#include <vector>

#include "oryx/model/hf/family.h"

namespace oryx {

// Everything but the feed-forward's kind, which the family checks.
ModelConfig qwen_config(HfConfig& hf);
// Everything but the projections of the Gated DeltaNet layers, which differ: `projections` adds those of layer i with names PREFIX...
std::vector<HfTensor> qwen_tensors(const ModelConfig& c,
                                   void (*projections)(std::vector<HfTensor>& out, const LayerConfig& l, int64_t i, const std::string& prefix));

}  // namespace oryx
