// A batch in one piece of memory, for captured steps: all that differs from batch to batch lies in it at fixed places, padded so that few layouts serve all batches.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "oryx/model/language_model.h"

namespace oryx {

// The least of 1, 2, 3, 4, 6, 8, 12, 16, 24 ... that is no less than `documents`: to how many documents packed batches are filled up. How kernels cut a batch into work depends on
// their number, and so do the last bits of what they add: on a GPU every step's batches are filled up, captured or not, all of a step to the same number.
int64_t document_room(int64_t documents);
// cu_seqlens (int32 [N + 1] on the CPU) with empty documents behind the last, `documents` in all.
at::Tensor padded_bounds(const at::Tensor& cu_seqlens, int64_t documents);

struct BatchLayout {
  // Layers whose mixers have these names under one routing.
  struct Group {
    size_t routing = 0;  // among the distinct ones
    std::vector<std::string> mixers;
    enum class Share : char { kNone = '0', kSome = 's', kAll = '1' };
    std::vector<Share> shares;            // of the tokens, by mixer
    int64_t places_at = -1;               // int8 [rows, tokens]: each token's mixer; where some mixer has kSome
    std::vector<int64_t> spans_at;        // int32 [spans, 3], the last ones empty; -1 where the mixer has all tokens or none
  };
  int64_t rows = 0, tokens = 0, bounds = 0, spans = 0;  // bounds: values of cu_seqlens, 0 where not packed; spans: room for those of a mixer
  int64_t ids_at = 0, targets_at = 0, positions_at = 0, bounds_at = -1, weight_at = -1, bytes = 0;
  std::vector<size_t> routings;  // of each entry of ModelInput::routing its place among the distinct ones
  std::vector<Group> groups;
  bool fixed_shapes = true;  // false where some layer's products have as many rows as a mixer has tokens
  std::string key;   // equal for layouts that are equal
  std::string kind;  // the same without the sizes that padding rounds: batches of one kind run the same operators
};

struct PackedBatch {
  std::shared_ptr<const BatchLayout> layout;
  at::Tensor bytes;  // [layout->bytes] uint8 on the model's device
};

// input as ModelInput takes it, without a state and on the CPU; targets int64 like its ids. least_spans: room for so many spans of each mixer at least. weight: StepBatch::weight.
PackedBatch pack_batch(const LanguageModel& model, const ModelInput& input, const at::Tensor& targets, int64_t least_spans = 0, std::optional<double> weight = {});

struct UnpackedBatch {
  ModelInput input;
  at::Tensor targets, weight;  // the weight undefined where none was given
};
// The batch again, as views of `bytes`: it changes with them. What it takes to make masks of places is launched here.
UnpackedBatch unpack_batch(const BatchLayout& layout, const at::Tensor& bytes);

}  // namespace oryx
