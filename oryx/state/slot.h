// What a layer or mixer wants remembered of a sequence.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace oryx {

enum class SlotKind { kRecurrent, kTail, kPerToken };

struct SlotSpec {
  std::string name;  // unique within a layer
  SlotKind kind;
  std::vector<int64_t> shape;  // of one sequence (recurrent, tail) or of one token
  at::ScalarType dtype = at::kFloat;
  // Recurrent, tail: the rows that the layer keeps determine it at every position.
  bool from_rows = false;
  // A row a token: later tokens look back at it (attention's keys and values), beyond its use in a replay.
  bool looked_at = false;

  int64_t bytes() const;  // of one sequence, or of one token
};

}  // namespace oryx
