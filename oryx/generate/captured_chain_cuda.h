// One token of each of up to 64 sequences by the chain of kernels of captured decoding (cuda/captured_step.h, cuda/decode_product.h, the operators' steps): what it launches, over
// memory that others own, so that it can be captured.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "oryx/generate/captured_weights.h"
#include "oryx/generate/chain_step_cuda.h"
#include "oryx/generate/cuda/captured_step.h"
#include "oryx/generate/cuda/decode_product.h"
#include "oryx/ops/decode_attention/cuda/decode_attention.h"

namespace oryx::captured {

// What a step reads and writes of a layer's state: recurrent ones by sequence, rows [sequences, capacity, ...], or with pages [rows of all pages, ...]; undefined where none are kept.
struct Slots {
  struct OfGroup {
    at::Tensor key_tail, value_tail, keys, values;
  };
  struct OfMixer {
    at::Tensor S, query_tail;
    std::vector<at::Tensor> scalar_rows;  // in the order of the mixer's scalars
  };
  at::Tensor modes;
  std::vector<OfGroup> groups;
  std::vector<OfMixer> mixers;

  bool keeps_rows() const { return std::any_of(groups.begin(), groups.end(), [](const OfGroup& g) { return g.keys.defined(); }); }
};

using Step = fused::ChainStep<Slots>;

class Chain {
 public:
  static constexpr int64_t kMost = 64;
  static constexpr bool kReadsStretches = false;
  using Slots = captured::Slots;

  // For at most `most` sequences, of a model that refusal() lets pass.
  Chain(const LanguageModel& model, int64_t most);

  // A layer's slots; rows as `rows(slot)` has them.
  Slots slots_of(const LayerState& state, int64_t layer, const fused::RowsOf& rows) const;
  // Whether some tensor of `state` is another than when `slots` were taken, rows aside.
  bool moved(const LayerState& state, int64_t layer, const Slots& slots) const;

  // A slot of the layer that keeps rows; empty: none does.
  std::string rows_name(const LayerState& state, int64_t layer) const;

  // Modes of a step of N sequences, as bytes: by layer each sequence's mixer (by its place), then which sequences want each mixer, and which want one that looks back.
  int64_t mode_bytes(int64_t N) const { return static_cast<int64_t>(plan_->layers.size()) * (mixers_ + 2) * N; }
  // Those of sequence n in a layer, into zeros -> whether it looks back.
  bool write_modes(uint8_t* modes, int64_t N, int64_t layer, int64_t n, uint8_t place) const;

  // Angles of tokens up to `capacity`: all or, where memory is short, an Error and those that there were.
  void reach(int64_t capacity);
  // Memory for attention over such a step, and angles for its capacity. Not during a capture.
  void allocate(const Step& s);
  // With `looks_back` also what mixers that look back need.
  void launch(const Step& s, bool looks_back) const;
  // Behind a step: the sums [N, D] that the final norm reads, float32, and logits [N, vocabulary], bfloat16, whose rows may lie further apart.
  at::Tensor stream(int64_t N) const { return x_.narrow(0, 0, N); }
  at::Tensor logits(int64_t N) const { return logits_.narrow(0, 0, N).narrow(1, 0, vocab_); }
  // Of weights that a step reads when all sequences are in one mode.
  int64_t weight_bytes(int64_t place) const;

 private:
  // What one mixer's step reads and writes beside the state: those of all layers in turn.
  struct MixerBuffers {
    at::Tensor query, o, scalars[2], decays;  // bfloat16 [N, ...]; float32 [N, ...]
  };

  MixerBuffers buffers_of(size_t m, int64_t most, const at::TensorOptions& half) const;
  int64_t modes_at(int64_t layer, int64_t what, int64_t N) const { return (layer * (mixers_ + 2) + what) * N; }
  const uint8_t* modes_of(const Step& s, size_t layer) const { return s.modes + modes_at(static_cast<int64_t>(layer), 0, s.N); }
  at::BFloat16* projected(int64_t column) const;
  OryxProduct product_of(const Step& s, int form, const at::Tensor& weight, const at::Tensor& x, const at::Tensor& out, int64_t rows, int64_t K, double eps) const;
  void run(const OryxProduct& a) const;
  void reads_stream(OryxProduct& a, const at::Tensor& norm, size_t part) const;
  void add(const Step& s, const LayerPlan& l, const at::Tensor& weight, const at::Tensor& x, int64_t K, const at::Tensor& norm, const at::Tensor& next, size_t to) const;
  at::Tensor norm_in_front(size_t layer, bool feed_forward) const;
  void mix(const Step& s, size_t i, int64_t row, bool looks_back) const;
  bool mix_whole(const Step& s, size_t i, const OryxCapturedPrepare& before, const OryxCapturedReadout& read) const;
  OryxCapturedPrepare prepare_of(const Step& s, size_t i, int64_t row) const;
  OryxCapturedReadout readout_of(const Step& s, size_t i, int64_t row) const;
  void advance(const Step& s, size_t i, size_t m) const;
  bool keeps_itself(const Step& s, size_t i) const;
  bool attend(const Step& s, size_t i, size_t m, int64_t row) const;
  OryxDecodeAttention attention_of(const Step& s, size_t i, size_t m) const;

  at::Device device_;
  std::shared_ptr<const Plan> plan_;
  double final_eps_;
  int64_t D_, vocab_, mixers_ = 0;
  std::vector<MixerBuffers> buffers_;  // by place
  std::vector<at::Tensor> ropes_;      // by layer
  std::vector<at::Tensor> keys_, values_;  // by group
  at::Tensor x_, u_, y_, mid_, projected_, narrow_, product_, squares_[2], logits_, workspace_;
};

}  // namespace oryx::captured
