#include "oryx/mixers/layer_config.h"

#include "oryx/common/options.h"

namespace oryx {

void LayerConfig::describe(Fields& f) {
  constexpr double kWide = 1 << 24;
  f.add("hidden_size", hidden_size, "D, model width", between(1, kWide));
  f.add("num_heads", num_heads, "H, query heads", between(1, 65536));
  f.add("num_kv_heads", num_kv_heads, "Hk, key/value heads, each with a linear state of its own; 0: num_heads", between(0, 65536));
  f.add("head_dim", head_dim, "K, width of a query or key head", between(1, 1024));
  f.add("value_head_dim", value_head_dim, "V, width of a value head; 0: head_dim", between(0, 1024));
  f.add("intermediate_size", intermediate_size, "F, feed-forward width; 0: no feed-forward", between(0, kWide));
  f.add("conv", conv, "short convolution over keys and values");
  f.add("conv_kernel", conv_kernel, "w, width of the short convolution", between(2, 32));
  f.add("conv_activation", conv_activation, "behind the convolution; auto: none where mamba2 shares a layer with attention, else silu",
        one_of({"auto", "silu", "none"}));
  f.add("query_conv", query_conv, "the linear query passes through a convolution of its own");
  f.add("gate", gate, "y = norm(o) * silu(g)");
  f.add("head_norm", head_norm, "RMSNorm over each head's output");
  f.add("qk_norm", qk_norm, "RMSNorm on attention's query and key heads");
  f.add("share_query", share_query, "ablation: one query projection for all mixers");
  f.add("share_kv", share_kv, "false: ablation, each mixer its own keys and values");
  f.add("sliding_window_query", sliding_window_query, "sliding_window gets a query of its own beside attention's");
  f.add("window", window, "of sliding_window, in tokens", between(1, 1e12));
  f.add("norm_eps", norm_eps, "of every RMSNorm", between(1e-12, 1));
  f.add("rope_theta", rope_theta, "base of the rotary embedding; 0: no rotation", at_least(0));
  f.add("combine", combine, "select: a token's mode says whose output it takes; mean: all mixers, head-normalised and averaged",
        one_of({"select", "mean"}));
}

}  // namespace oryx
