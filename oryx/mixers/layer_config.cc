#include "oryx/mixers/layer_config.h"

#include "oryx/common/options.h"

namespace oryx {

void LayerConfig::describe(Fields& f) {
  constexpr double kWide = 1 << 24;
  f.add("hidden_size", hidden_size, "D, model width", between(1, kWide));
  f.add("num_heads", num_heads, "H, query heads", between(1, 65536));
  f.add("num_kv_heads", num_kv_heads, "Hk, key/value heads, each with a linear state of its own; 0: num_heads", between(0, 65536));
  f.add("num_value_heads", num_value_heads,
        "Hv, value heads, with a linear state each where there are more than keys; 0: num_kv_heads", between(0, 65536));
  f.add("head_dim", head_dim, "K, width of a query or key head", between(1, 1024));
  f.add("value_head_dim", value_head_dim, "V, width of a value head; 0: head_dim", between(0, 1024));
  f.add("intermediate_size", intermediate_size, "F, feed-forward width; 0: no feed-forward", between(0, kWide));
  f.add("conv", conv, "short convolution over keys and values");
  f.add("conv_kernel", conv_kernel, "w, width of the short convolution", between(2, 32));
  f.add("conv_activation", conv_activation, "behind the convolution; auto: none where mamba2 shares a layer with attention, else silu",
        one_of({"auto", "silu", "none"}));
  f.add("conv_bias", conv_bias, "the convolutions have a bias");
  f.add("query_conv", query_conv, "the linear query passes through a convolution of its own");
  f.add("gate", gate, "y = norm(o) * silu(g)");
  f.add("gate_activation", gate_activation, "of the gate", one_of({"silu", "sigmoid"}));
  f.add("head_norm", head_norm, "RMSNorm over each head's output");
  f.add("gated_norm_order", gated_norm_order, "norm_first: norm(o) * silu(g); gate_first: norm(o * silu(g))", one_of({"norm_first", "gate_first"}));
  f.add("head_norm_groups", head_norm_groups,
        "0: the head norm works on each head, with one weight for all; n, gate_first only: on n equal slices of all heads' values together",
        between(0, 65536));
  f.add("head_norm_eps", head_norm_eps, "of the head norm; 0: norm_eps", between(0, 1));
  f.add("qk_norm", qk_norm, "RMSNorm on attention's query and key heads");
  f.add("qk_norm_over", qk_norm_over, "head: each head, one weight for all; all_heads: the heads' values together", one_of({"head", "all_heads"}));
  f.add("share_query", share_query, "ablation: one query projection for all mixers");
  f.add("share_kv", share_kv, "false: ablation, each mixer its own keys and values");
  f.add("sliding_window_query", sliding_window_query, "sliding_window gets a query of its own beside attention's");
  f.add("window", window, "of sliding_window, in tokens", between(1, 1e12));
  f.add("norm_eps", norm_eps, "of every RMSNorm", between(1e-12, 1));
  f.add("zero_centred_norm", zero_centred_norm, "RMSNorm multiplies by 1 + weight; not the head norm");
  f.add("norm_placement", norm_placement, "before: x + f(norm(x)); after: x + norm(f(x))", one_of({"before", "after"}));
  f.add("residual_multiplier", residual_multiplier, "what a layer's two parts add to the residual stream is multiplied by it");
  f.add("rope_theta", rope_theta, "base of the rotary embedding; 0: no rotation", at_least(0));
  f.add("rotary_dim", rotary_dim, "how many of a head's dimensions, the first ones, are rotated; 0: all", between(0, 1024));
  f.add("attention_scale", attention_scale, "of attention's scores; 0: 1 / sqrt(head_dim)", at_least(0));
  f.add("allow_neg_eigval", allow_neg_eigval, "delta rules: write strengths up to 2 instead of 1");
  f.add("combine", combine, "select: a token's mode says whose output it takes; mean: all mixers, head-normalised and averaged",
        one_of({"select", "mean"}));
}

}  // namespace oryx
