// A model as captured decoding reads it: which layers it knows, and their weights packed for cuda/decode_product.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "oryx/model/language_model.h"

namespace oryx::captured {

enum class Kind { kGatedDelta, kSsd, kKda, kAttention };
// What becomes of a narrow projection's columns (cuda/captured_step.h).
enum class Function { kCopy, kWrite, kDecay };

struct ScalarPlan {
  Function function;
  int64_t column = 0, width = 0;  // among the narrow columns
  std::string rows;               // the slot that keeps them
};

// Keys and values: one pair for all mixers of a layer, or one for each.
struct GroupPlan {
  std::string prefix;           // of its slots' names
  int64_t keys = 0, values = 0;  // their first columns in the projected row
  at::Tensor key_filter, value_filter, key_bias, value_bias;  // float32, undefined where there is none
};

struct MixerPlan {
  std::string name;
  Kind kind = Kind::kAttention;
  size_t group = 0;
  int64_t query = 0;    // its first column in the projected row
  std::vector<ScalarPlan> scalars = {};  // write strengths and decays (of Kimi Delta Attention what these are made of), or steps
  at::Tensor A_log, dt_bias, D, decay_up, query_filter, query_bias;  // float32
  // Of attention.
  int64_t window = 0;   // 0: all tokens
  at::Tensor q_norm, k_norm;  // float32, factors of queries and keys; undefined where they pass through no norm
};

// The projected row of a token is keys, values, gate and the linear mixers' queries, then those of attention; each begins at a multiple of 32.
struct LayerPlan {
  LayerConfig config;
  std::vector<GroupPlan> groups;
  std::vector<MixerPlan> mixers;
  bool silu = false;
  int64_t gate = -1, rows = 0;
  int64_t optional = 0;  // from this column on only mixers that look back read; rows: none do
  at::Tensor in, narrow, out, gate_up, down;  // bfloat16, packed; narrow: two rows for each, undefined where there are none
  int64_t narrow_rows = 0, scalars = 0;
  int64_t width = 0, feed_forward = 0;  // of out's and down's inputs, rounded up to a multiple of 32; no feed-forward: 0
  bool norms_behind = false;            // norm1 and norm2 stand behind their parts, and hold the residual multiplier
  at::Tensor norm1, norm2, o_norm;      // float32, undefined where there is none
};

struct Plan {
  std::vector<LayerPlan> layers;
  at::Tensor embed, head, final_norm;
  int64_t head_rows = 0;  // the vocabulary, rounded up to a multiple of 32
};

// Why a model of this shape is none that captured decoding knows; empty when it is.
std::string refusal(const LanguageModel& model);
// Why over a state of these options there is none.
std::string refusal(const StateOptions& state);
// A model that refusal() lets pass, on its device.
Plan make_plan(const LanguageModel& model);

}  // namespace oryx::captured
