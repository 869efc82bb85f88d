// What a model remembers of N sequences: the slots that its layers and mixers declare.
//
// A slot is recurrent or a tail (a fixed shape a sequence) or holds a row per token (keys, values). The state knows shapes and lengths, not
// mixers. Rows of per-token slots are kept for every token, in order, up to lengths().
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace oryx {

enum class SlotKind { kRecurrent, kTail, kPerToken };

struct SlotSpec {
  std::string name;            // unique within a layer
  SlotKind kind;
  std::vector<int64_t> shape;  // of one sequence (recurrent, tail) or of one token
  at::ScalarType dtype = at::kFloat;

  int64_t bytes() const;  // of one sequence, or of one token
};

// The slots of one layer.
class LayerState {
 public:
  // The whole slot: [N, shape...], or [N, capacity, shape...] for a per-token slot. Written in place by its owner.
  const at::Tensor& tensor(const std::string& name) const;
  bool has(const std::string& name) const { return slots_.count(name) > 0; }

 private:
  friend class State;
  struct Slot {
    SlotSpec spec;
    at::Tensor data;
  };
  std::map<std::string, Slot> slots_;
};

struct StateBytes {
  int64_t recurrent = 0, tails = 0, tokens = 0;
  int64_t total() const { return recurrent + tails + tokens; }
};

class State {
 public:
  // Zeros for `sequences` sequences on `device`, no token seen. Lengths stay on the CPU.
  State(const std::vector<std::vector<SlotSpec>>& layers, int64_t sequences, at::Device device = at::kCPU);

  int64_t sequences() const { return static_cast<int64_t>(lengths_.size()); }
  const std::vector<int64_t>& lengths() const { return lengths_; }  // tokens seen, by sequence
  at::Tensor lengths_tensor() const;                                // [N] int32
  LayerState& layer(int64_t i) { return layers_[static_cast<size_t>(i)]; }
  const LayerState& layer(int64_t i) const { return layers_[static_cast<size_t>(i)]; }
  int64_t num_layers() const { return static_cast<int64_t>(layers_.size()); }

  // Room for `tokens` tokens in all for each sequence, so that no later append moves rows.
  void reserve(int64_t tokens);

  // Writes rows behind those held, for slot `name` of layer `i`: rows [N, T, shape...], or [1, sum T, shape...] with the host
  // copy of cu_seqlens. Lengths do not move before advance(), so that every layer appends at the same place.
  void append(int64_t i, const std::string& name, const at::Tensor& rows, const std::vector<int64_t>* cu_seqlens);
  // The tokens of this call are part of the sequences from now on: `counts` new tokens by sequence.
  void advance(const std::vector<int64_t>& counts);

  // Bytes in use by part: per-token slots count the tokens held, not the reserve. `reserved` counts what is allocated.
  StateBytes bytes() const;
  StateBytes reserved_bytes() const;

 private:
  StateBytes count(bool reserved) const;

  std::vector<LayerState> layers_;
  std::vector<int64_t> lengths_;
  int64_t capacity_ = 0;
};

}  // namespace oryx
