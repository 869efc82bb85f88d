// What `oryx inspect` says: each report is JSON with exact numbers, and the text is made from the JSON, so that the two
// cannot differ.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "oryx/common/json.h"
#include "oryx/io/safetensors.h"
#include "oryx/model/config.h"
#include "oryx/state/state.h"

namespace oryx::cli {

// Parameters by part and by mode, forward FLOPs of a token by mode and context, bytes of state by context. `contexts`
// are lengths in tokens; `compute` is the type of activations, in which tails, keys and values are kept; `state` says which of them. Throws Error
// when the bytes pass 2^62.
Json model_report(const std::string& name, ModelConfig config, const std::vector<int64_t>& contexts,
                  at::ScalarType compute, const StateOptions& state = {});
std::string model_text(const Json& report);

// The variants of one size, each with the intermediate_size that matches the parameters of the Oryx (Gated DeltaNet) of
// that size. `overrides` (key=value) hold for every variant. Throws Error for an unknown size.
Json family_report(const std::string& size, const std::vector<std::string>& overrides);
std::string family_text(const Json& report);

// The presets' sizes and variants.
Json list_report();
std::string list_text(const Json& report);

// The tensors of a file in the order of their data, and its metadata.
Json tensors_report(const SafetensorsReader& file);
std::string tensors_text(const Json& report);

}  // namespace oryx::cli
