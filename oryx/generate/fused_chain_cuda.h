// One token of each of up to 64 sequences by the chain of kernels in cuda/decode_batch.h, cuda/decode_product.h and oryx/ops/decode_attention: what it launches, over memory that
// others own, so that it can be captured.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

#include "oryx/generate/cuda/decode_batch.h"
#include "oryx/generate/cuda/decode_product.h"
#include "oryx/generate/fused_weights_cuda.h"
#include "oryx/model/language_model.h"
#include "oryx/ops/decode_attention/cuda/decode_attention.h"

namespace oryx::fused {

// What a step reads and writes of a layer's state: recurrent ones by sequence, rows [sequences, capacity, ...], or with pages [rows of a pool, ...].
struct LayerSlots {
  at::Tensor k_tail, v_tail, S, keys, values, g, beta, modes;  // the last five undefined where no rows are kept
};

struct ChainStep {
  int64_t N = 0;
  int64_t capacity = 0;  // tokens of a sequence at most
  const std::vector<LayerSlots>* slots = nullptr;
  at::Tensor id_rows = {};  // undefined: ids are not kept
  int32_t *tokens = nullptr, *positions = nullptr, *lengths = nullptr, *likeliest = nullptr;
  const int32_t *below = nullptr, *feed_back = nullptr;
  const uint8_t* modes = nullptr;  // [layers, N]
  const float* rope = nullptr;
  OryxBatchPlaces places = {};
};

// Why the kernels do not run on this device; empty: they do.
std::string device_refusal(at::Device device);

class DecodeChain {
 public:
  static constexpr int64_t kMost = 64;

  // For at most `most` sequences.
  DecodeChain(const LanguageModel& model, int64_t most);

  // Why there is none for the model, beside the reasons of device_refusal and detail::fused_refusal; empty: there is one.
  static std::string refusal(const LanguageModel& model);

  // Memory for attention over such a step. Not during a capture.
  void allocate(const ChainStep& s);
  // With `attention` also what tokens in attention mode need.
  void launch(const ChainStep& s, bool attention) const;
  // [N, vocabulary] bfloat16 of the last step.
  at::Tensor logits(int64_t N) const { return logits_.narrow(0, 0, N); }
  int64_t weight_bytes() const { return packed_.bytes(); }

 private:
  OryxProduct product_of(const ChainStep& s, int form, const at::Tensor& weight, const at::Tensor& x, const at::Tensor& out, int64_t rows, int64_t K) const;
  void run(const OryxProduct& a) const;
  void residual(const ChainStep& s, const at::Tensor& weight, const at::Tensor& x, int64_t K, const at::Tensor& norm_weight, size_t to) const;
  void mix(const ChainStep& s, size_t i, int64_t row) const;
  OryxDecodeAttention attention_of(const ChainStep& s, size_t i) const;
  bool attends(const ChainStep& s, size_t i) const { return packed_.layers[i].attends && (*s.slots)[i].keys.defined(); }

  const LanguageModel& model_;
  int64_t D_, H_, F_, vocab_;
  float scale_;
  PackedWeights packed_;
  at::Tensor x_, u_, y_, narrow_, projected_, mid_, squares_[2], logits_, workspace_;
};

}  // namespace oryx::fused
