// Pieces of prompts in linear modes, on a GPU by one captured launch each. A piece is some hundred launches, which cost the host as much for 64 tokens as for 1,024; captured they cost
// one. A captured pass has fixed shapes: there is one for each of a few sizes, and a piece runs in the smallest that holds it, with tokens behind its end that nobody looks at. They are
// a document of their own behind it (cu_seqlens is device data), so that they touch neither its outputs nor its state.
//
// A pass works on a state of its own: the text's recurrent states and tails are copied there before it, and back behind it with the rows of keys and values. Which text that is, where its
// rows stand and how long it is varies from piece to piece, and the capture does not know it. Modes that look back at earlier tokens do not go this way: how many keys there are decides
// the shapes of their launches.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "oryx/model/language_model.h"
#include "oryx/model/routed_cost.h"
#include "oryx/model/scheduling.h"
#include "oryx/state/state.h"

namespace oryx::serve {

class PieceReader {
 public:
  // Runs `pass`, captures what it launches, and returns what launches that again.
  using Capture = std::function<std::function<void()>(const std::function<void()>& pass)>;
  // For pieces of up to `piece` tokens of states made with `options`, which choose no rows to keep. Without `capture` each pass runs anew, on any device (for tests). The model must outlive it.
  PieceReader(const LanguageModel& model, const StateOptions& options, int64_t piece, const Capture& capture);

  // Whether a piece of `count` tokens with these modes goes this way.
  bool takes(const Routings& routings, int64_t count) const;
  // Runs the tokens behind those that `one`, a state of one sequence, holds -> their hidden states [n, D], which stand until the next call. Throws Error as LanguageModel::hidden() does when
  // the state has no room; ids must be of the vocabulary.
  at::Tensor read(State& one, std::span<const int32_t> ids);

  const std::vector<int64_t>& sizes() const { return tokens_; }

 private:
  struct Pass {
    ModelInput input;
    at::Tensor hidden;  // [1, size, D]
    std::function<void()> run;
  };
  struct Slot {
    int64_t layer;
    std::string name;
  };

  void run_anew(Pass& pass);

  const LanguageModel& model_;
  ModelSchedule linear_;
  State scratch_;                   // two sequences: the piece, and what stands behind it
  std::vector<Slot> fixed_, rows_;  // recurrent states and tails; rows a token
  std::vector<int64_t> tokens_;     // of the passes, ascending
  at::Tensor ids_, bounds_;         // [largest] int64, [3] int32, on the model's device
  std::vector<std::unique_ptr<Pass>> passes_;
};

// Null, with the reason in *why, where the model, its device or states of these options are none for it; without a reason where the model looks back in every mode.
std::unique_ptr<PieceReader> make_piece_reader(const LanguageModel& model, const StateOptions& options, int64_t piece, std::string* why);

namespace detail {
using PassCaptureFactory = PieceReader::Capture (*)(at::Device device);
bool register_pass_capture(PassCaptureFactory factory);
}  // namespace detail

}  // namespace oryx::serve
