// Softmax attention over all earlier tokens of the document, and its sliding-window form (docs/model.md).
//
//   o_t = sum_{s <= t} softmax_s(rope(q_t) . rope(k_s) / sqrt(K)) v_s          sliding_window: s > t - window
//
// RoPE works on a view of k: the linear mixers and the cache see it unrotated. One new token a sequence rotates the
// cached keys as it reads them, on the CPU in the pages where they stand; a longer piece rotates a copy.
#include <ATen/ATen.h>

#include <array>

#include "oryx/mixers/mixer.h"
#include "oryx/ops/decode_attention/decode_attention.h"
#include "oryx/ops/norm/norm.h"
#include "oryx/ops/rope/rope.h"
#include "oryx/ops/span_attention/sink_attention.h"
#include "oryx/ops/span_attention/span_attention.h"

namespace oryx {

namespace {

class Attention : public Mixer {
 public:
  using Mixer::Mixer;

  std::string name() const override { return "attention"; }
  bool keeps_tokens() const override { return true; }

  std::vector<ParameterSpec> parameters() const override {
    if (!config_.qk_norm) return {};
    const bool together = config_.qk_norm_over == "all_heads";
    const Init init = config_.zero_centred_norm ? Init::kZeros : Init::kOnes;
    return {{"q_norm.weight", {together ? config_.query_width() : config_.head_dim}, init, false, "norm"},
            {"k_norm.weight", {together ? config_.key_width() : config_.head_dim}, init, false, "norm"}};
  }

  void bind(const ParameterMap& p, const std::string& prefix) override {
    if (!config_.qk_norm) return;
    q_norm_ = p.at(prefix + "q_norm.weight");
    k_norm_ = p.at(prefix + "k_norm.weight");
  }

  at::Tensor forward(const MixerInput& in) const override {
    if (in.cache != nullptr && in.cache->blocks.defined()) return over_pages(in);
    // Keys that pass through a norm first are normalised and rotated in a copy.
    if (in.cache != nullptr && in.cache->window == 0 && in.q.size(1) == 1 && !in.sequences.cu_seqlens &&
        !k_norm_.defined())
      return one_token(in);
    const at::Tensor q = rotate(in.q, q_norm_, in.sequences.positions);  // [B, T, H, K]
    if (in.cache == nullptr) {
      const at::Tensor k = rotate(in.k, k_norm_, in.sequences.positions);  // [B, T, Hk, K]
      return ops::span_attention(q, k, in.v, in.spans, in.sequences.cu_seqlens, {}, {}, window(), scale());
    }
    return over_cache(q, in);
  }

  MixerFlops flops(int64_t context) const override {
    const int64_t seen = window() > 0 ? std::min(window(), context) : context;
    return {0, 2.0 * config_.num_heads * static_cast<double>(seen) * (config_.head_dim + config_.value_dim())};
  }

 protected:
  virtual int64_t window() const { return 0; }

 private:
  // x [B, T, heads, K]
  at::Tensor normalised(const at::Tensor& x, const at::Tensor& norm_weight) const {
    if (!norm_weight.defined()) return x;
    const bool together = config_.qk_norm_over == "all_heads";
    return ops::rms_norm(together ? x.flatten(2) : x, norm_weight, config_.norm_eps, config_.zero_centred_norm)
        .reshape(x.sizes());
  }

  at::Tensor rotate(const at::Tensor& x, const at::Tensor& norm_weight, const at::Tensor& positions) const {
    const at::Tensor y = normalised(x, norm_weight);
    return config_.rope_theta > 0 ? ops::rope(y, positions, config_.rope_theta, config_.rotary_dim) : y;
  }

  std::optional<double> scale() const {
    if (config_.attention_scale > 0) return config_.attention_scale;
    return std::nullopt;
  }

  // Which sequences want their output: all, or those of the spans.
  static std::optional<at::Tensor> wanted_rows(const MixerInput& in) {
    if (!in.spans) return std::nullopt;
    const at::Tensor rows = in.spans->select(1, 0).to(at::kLong);
    return at::zeros({in.q.size(0)}, at::device(in.q.device()).dtype(at::kBool)).index_fill_(0, rows, true);
  }

  // The same by token, of [B * T]; on the CPU.
  static std::optional<at::Tensor> wanted_tokens(const MixerInput& in) {
    if (!in.spans) return std::nullopt;
    const at::Tensor wanted = at::zeros({in.q.size(0), in.q.size(1)}, at::kBool);
    for (int64_t i = 0; i < in.spans->size(0); ++i) {
      const at::Tensor span = (*in.spans)[i];
      const int64_t begin = span[1].item<int32_t>();
      wanted[span[0].item<int32_t>()].narrow(0, begin, span[2].item<int32_t>() - begin).fill_(true);
    }
    return wanted.flatten();
  }

  ops::DecodeRope decode_rope() const { return {config_.rope_theta > 0 ? config_.rope_theta : 0, config_.rotary_dim}; }

  at::Tensor one_token(const MixerInput& in) const {
    const auto& cache = *in.cache;
    return ops::decode_attention(in.q.squeeze(1), cache.keys, cache.values, cache.lengths_there, {},
                                 wanted_rows(in), decode_rope(), window(), scale())
        .unsqueeze(1);
  }

  // One token of each sequence, or the tokens of one sequence as steps, each with its own length.
  at::Tensor over_pages(const MixerInput& in) const {
    const auto& cache = *in.cache;
    ops::PagedDecode a{.q = normalised(in.q, q_norm_).flatten(0, 1),
                       .keys = cache.key_pools,
                       .values = cache.value_pools,
                       .lengths = cache.lengths,
                       .blocks = cache.blocks,
                       .wanted = wanted_tokens(in),
                       .rope = decode_rope(),
                       .window = cache.window,
                       .first = cache.window > 0 ? cache.first : 0,
                       .reach = window(),
                       .scale = scale()};
    if (k_norm_.defined()) {
      a.k_norm = config_.zero_centred_norm ? k_norm_ + 1 : k_norm_;
      a.norm_eps = config_.norm_eps;
    }
    return ops::paged_decode_attention(a).unflatten(0, {in.q.size(0), in.q.size(1)});
  }

  at::Tensor over_cache(const at::Tensor& q, const MixerInput& in) const {
    const auto& cache = *in.cache;
    const at::Tensor k = rotate(cache.keys, k_norm_, cache.positions);  // [N, longest, Hk, K]
    if (cache.window > 0) return over_window(q, k, cache.values, in);
    if (!in.sequences.cu_seqlens) {
      return ops::span_attention(q, k, cache.values, in.spans, {}, {}, cache.lengths_there, window(), scale());
    }
    const auto [ks, vs, cu_k] = side_by_side(k, cache.values, cache.lengths);
    return ops::span_attention(q, ks, vs, in.spans, in.sequences.cu_seqlens, cu_k, {}, window(), scale());
  }

  // Packed sequences with pasts of different lengths: their keys and values [N, longest, Hk, K or V] as [1, sum, Hk, K
  // or V], and the bounds.
  static std::array<at::Tensor, 3> side_by_side(const at::Tensor& k, const at::Tensor& v, const at::Tensor& lengths) {
    std::vector<at::Tensor> ks, vs;
    std::vector<int32_t> bounds{0};
    for (int64_t n = 0; n < k.size(0); ++n) {
      const int64_t length = lengths[n].item<int64_t>();
      ks.push_back(k[n].narrow(0, 0, length));
      vs.push_back(v[n].narrow(0, 0, length));
      bounds.push_back(bounds.back() + static_cast<int32_t>(length));
    }
    return {at::cat(ks).unsqueeze(0), at::cat(vs).unsqueeze(0), there(at::tensor(bounds, at::kInt), k.device())};
  }

  // A copy from pinned memory does not wait for what a GPU still has to do.
  static at::Tensor there(const at::Tensor& x, at::Device device) { return device.is_cuda() ? x.pin_memory().to(device, /*non_blocking=*/true) : x; }

  // Over a bounded state: k and v are the last rows, k rotated.
  at::Tensor over_window(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const MixerInput& in) const {
    const auto& cache = *in.cache;
    ops::SinkAttention a{.q = q,
                         .k = k,
                         .v = v,
                         .positions = in.sequences.positions,
                         .spans = in.spans,
                         .window = cache.window,
                         .scale = scale()};
    a.reach = window();
    a.sink_k = cache.first_keys.size(1) > 0 ? rotate(cache.first_keys, k_norm_, cache.first_positions) : cache.first_keys;
    a.sink_v = cache.first_values;
    a.key_lengths = cache.lengths_there;
    if (cache.kept_keys.defined()) {
      const at::Tensor keys = rotate(cache.kept_keys, k_norm_, there(cache.kept_positions, q.device()));
      a.between = ops::KeysBetween{keys, cache.kept_values, cache.kept_positions, cache.kept_from, cache.kept_until};
    }
    if (!in.sequences.cu_seqlens) return ops::sink_attention(a);
    const auto [ks, vs, cu_k] = side_by_side(k, v, cache.lengths);
    a.k = ks;
    a.v = vs;
    a.key_lengths.reset();
    a.cu_seqlens = in.sequences.cu_seqlens;
    a.cu_seqlens_k = cu_k;
    return ops::sink_attention(a);
  }

  at::Tensor q_norm_, k_norm_;
};

class SlidingWindow : public Attention {
 public:
  using Attention::Attention;
  std::string name() const override { return "sliding_window"; }
  std::string borrows_query_of() const override { return config_.sliding_window_query ? "" : "attention"; }

 protected:
  int64_t window() const override { return config_.window; }
};

ORYX_REGISTER_MIXER("attention", Attention);
ORYX_REGISTER_MIXER("sliding_window", SlidingWindow);

}  // namespace
}  // namespace oryx
