// Weights of a model as the fused decoders' kernels read them, packed once.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "oryx/model/language_model.h"

namespace oryx::fused {

// The weights of one layer as the kernels read them.
struct PackedLayer {
  at::Tensor in;          // bfloat16 [4 or 5 H K, D]: keys, values, gate, query of the linear mixer, query of attention
  at::Tensor narrow;      // b_proj, a_proj [2 H, D]: float32, or for the chain two bfloat16 rows for each (cuda/decode_product.h)
  int64_t narrow_rows = 0;
  at::Tensor out, gate_up, down;  // bfloat16; rows of gate_proj and up_proj in turn
  int64_t in_rows = 0;
  at::Tensor norm1, norm2, k_conv, v_conv, A_log, dt_bias, o_norm;  // float32
  bool attends = false;
};

struct PackedWeights {
  // For the persistent kernel (cuda/decode_step.h), or for the chain (cuda/decode_product.h).
  PackedWeights(const LanguageModel& model, bool persistent);
  // The model's, packed once for all.
  static std::shared_ptr<const PackedWeights> of(const LanguageModel& model, bool persistent) {
    return model.derived<PackedWeights>(persistent ? 1 : 0, [&] { return PackedWeights(model, persistent); });
  }
  // That a step reads when all sequences are in one mode.
  int64_t bytes() const;

  std::vector<PackedLayer> layers;
  at::Tensor embed, head, final_norm;
};

}  // namespace oryx::fused
