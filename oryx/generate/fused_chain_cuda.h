// One token of each of up to 64 sequences by the chain of kernels in cuda/decode_batch.h, cuda/decode_product.h and oryx/ops/decode_attention: what it launches, over memory that
// others own, so that it can be captured.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "oryx/generate/chain_step_cuda.h"
#include "oryx/generate/cuda/decode_batch.h"
#include "oryx/generate/cuda/decode_product.h"
#include "oryx/generate/fused_weights_cuda.h"
#include "oryx/model/language_model.h"
#include "oryx/ops/decode_attention/cuda/decode_attention.h"

namespace oryx::fused {

// What a step reads and writes of a layer's state: recurrent ones by sequence, rows [sequences, capacity, ...], or with pages [rows of all pages, ...].
struct LayerSlots {
  at::Tensor k_tail, v_tail, S, keys, values, g, beta, modes;  // the last five undefined where no rows are kept
  bool keeps_rows() const { return keys.defined(); }
};

// Why the kernels do not run on this device; empty: they do.
std::string device_refusal(at::Device device);

// What both steps of an Oryx-GDN stack, the chain and the persistent kernel, know of states and modes.
class GatedDeltaStack {
 public:
  using Slots = LayerSlots;
  using Step = ChainStep<Slots>;

  explicit GatedDeltaStack(const LanguageModel& model) : model_(model) {}
  LayerSlots slots_of(const LayerState& state, int64_t layer, const RowsOf& rows) const;
  // Whether some tensor of `state` is another than when `slots` were taken, rows aside.
  bool moved(const LayerState& state, int64_t layer, const LayerSlots& slots) const;
  std::string rows_name(const LayerState& state, int64_t layer) const;
  // Modes of a step of N sequences as bytes [layers, N]: 0 linear, 1 attention.
  int64_t mode_bytes(int64_t N) const { return model_.config().num_layers * N; }
  bool write_modes(uint8_t* modes, int64_t N, int64_t layer, int64_t n, uint8_t place) const;
  // Angles of tokens up to `capacity`.
  void reach(int64_t capacity);

 protected:
  float attention_scale() const;

  const LanguageModel& model_;
  at::Tensor rope_;
};

class DecodeChain : public GatedDeltaStack {
 public:
  static constexpr int64_t kMost = 64;
  static constexpr bool kReadsStretches = false;

  // For at most `most` sequences.
  DecodeChain(const LanguageModel& model, int64_t most);

  // Why there is none for the model, beside the reasons of device_refusal and detail::fused_refusal; empty: there is one.
  static std::string refusal(const LanguageModel& model);

  // Memory for attention over such a step, and angles for its capacity. Not during a capture.
  void allocate(const Step& s);
  // With `attention` also what tokens in attention mode need.
  void launch(const Step& s, bool attention) const;
  // Behind a step: the sums [N, D] that the final norm reads, float32, and logits [N, vocabulary], bfloat16.
  at::Tensor stream(int64_t N) const { return x_.narrow(0, 0, N); }
  at::Tensor logits(int64_t N) const { return logits_.narrow(0, 0, N); }
  int64_t weight_bytes(int64_t place) const { return (void)place, packed_->bytes(); }

 private:
  OryxProduct product_of(const Step& s, int form, const at::Tensor& weight, const at::Tensor& x, const at::Tensor& out, int64_t rows, int64_t K) const;
  void run(const OryxProduct& a) const;
  void residual(const Step& s, const at::Tensor& weight, const at::Tensor& x, int64_t K, const at::Tensor& norm_weight, size_t to) const;
  void mix(const Step& s, size_t i, int64_t row) const;
  void verify(const Step& s, size_t i, int64_t row) const;
  OryxDecodeAttention attention_of(const Step& s, size_t i) const;
  bool attends(const Step& s, size_t i) const { return packed_->layers[i].attends && (*s.slots)[i].keys.defined(); }

  int64_t D_, H_, F_, vocab_;
  std::shared_ptr<const PackedWeights> packed_;
  at::Tensor x_, u_, y_, narrow_, projected_, mid_, squares_[2], logits_, workspace_;
};

}  // namespace oryx::fused
