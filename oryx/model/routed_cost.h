// What a routed batch costs when layers may be routed differently.
#pragma once

#include <memory>
#include <vector>

#include "oryx/model/config.h"
#include "oryx/model/routing.h"
#include "oryx/modes/span_table.h"

namespace oryx {

// As ModelInput::routing: one for all layers, or one a layer.
using Routings = std::vector<std::shared_ptr<const Routing>>;

// Share of (token, layer) pairs that run in the mixer `attention`: a token whose mode a layer lacks runs in the layer's first mixer;
// where a layer combines all its mixers ("mean"), all of them run.
double attention_share(const ModelConfig& config, const Routings& routings);

// Forward FLOPs of a batch (see token_flops in inspect.h for what is counted; `context` as there for batch_flops).
double routed_flops(const ModelConfig& config, const Routings& routings, const std::vector<int32_t>& context = {});
// The same of a batch made of these pieces of documents: a token's context ends at its document's start.
double pieces_flops(const ModelConfig& config, const Routings& routings, const std::vector<ModePiece>& pieces);

}  // namespace oryx
