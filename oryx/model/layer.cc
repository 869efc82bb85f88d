#include "oryx/model/layer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "oryx/common/error.h"
#include "oryx/ops/few_rows/few_rows.h"
#include "oryx/ops/norm/norm.h"
#include "oryx/ops/short_conv/short_conv.h"
#include "oryx/ops/swiglu/swiglu.h"

namespace oryx {

namespace {

// Tokens of the feed-forward at once without gradients: what stays near the processor; on a GPU, products large enough to fill it.
constexpr int64_t kFeedForwardTokens = 2048, kFeedForwardTokensOnGpu = 8192;

// On a GPU, without a state, every token's query is projected in layers up to this wide, and where the whole product is at most so many multiply-adds: gathering rows and putting them
// back takes as long there.
constexpr int64_t kWholeQueryWidth = 512, kWholeQueryProduct = int64_t{1} << 33;

bool has(const std::vector<std::string>& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

bool conv_silu(const LayerConfig& c, const std::vector<std::unique_ptr<Mixer>>& mixers) {
  if (c.conv_activation != "auto") return c.conv_activation == "silu";
  const auto any = [&](auto wish) { return std::any_of(mixers.begin(), mixers.end(), wish); };
  return !(any([](const auto& m) { return m->plain_keys(); }) && any([](const auto& m) { return m->keeps_tokens(); }));
}

}  // namespace

at::Tensor norm_factor(const LayerConfig& config, const at::Tensor& weight) { return config.zero_centred_norm ? weight + 1 : weight; }

MultiMixerLayer::MultiMixerLayer(const LayerConfig& config, std::vector<std::string> mixers, int64_t index)
    : config_(config), index_(index), prefix_(fmt::format("layers.{}.", index)), names_(std::move(mixers)) {
  for (const auto& name : names_) {
    mixers_.push_back(make_mixer(name, config_));
    const Mixer& mixer = *mixers_.back();
    if (groups_.empty() || !config_.share_kv) groups_.push_back({config_.share_kv ? "" : name + ".", false, {}, {}, {}, {}, {}, {}});
    groups_.back().keeps_tokens |= mixer.keeps_tokens();
    const std::string lender = mixer.borrows_query_of();
    Query query;
    query.name = config_.share_query ? "q_proj.weight" : (has(names_, lender) ? lender : name) + ".q_proj.weight";
    query.everywhere = (config_.query_conv && mixer.advances_everywhere()) || combines_all();
    queries_.push_back(query);
  }
  silu_ = conv_silu(config_, mixers_);
  for (auto& q : queries_) {
    const auto same = [&](const Query& other) { return other.name == q.name; };
    if (std::count_if(queries_.begin(), queries_.end(), same) > 1) q.everywhere = true;
  }
}

std::vector<ParameterSpec> MultiMixerLayer::parameters() const {
  const LayerConfig& c = config_;
  const std::string m = prefix_ + "mixer.";
  const Init norm_init = c.zero_centred_norm ? Init::kZeros : Init::kOnes;
  std::vector<ParameterSpec> p;
  p.push_back({prefix_ + "norm1.weight", {c.hidden_size}, norm_init, false, "norm"});
  for (size_t i = 0; i < groups_.size(); ++i) {
    const auto& g = groups_[i];
    const auto owner = config_.share_kv ? std::vector<std::string>{} : std::vector<std::string>{names_[i]};
    p.push_back({m + g.prefix + "k_proj.weight", {c.key_width(), c.hidden_size}, Init::kNormal, true, "key and value", owner});
    p.push_back({m + g.prefix + "v_proj.weight", {c.value_width(), c.hidden_size}, Init::kNormal, true, "key and value", owner});
    if (!c.conv) continue;
    p.push_back({m + g.prefix + "k_conv.weight", {c.key_width(), c.conv_kernel}, Init::kConv, false, "convolution", owner});
    p.push_back({m + g.prefix + "v_conv.weight", {c.value_width(), c.conv_kernel}, Init::kConv, false, "convolution", owner});
    if (!c.conv_bias) continue;
    p.push_back({m + g.prefix + "k_conv.bias", {c.key_width()}, Init::kZeros, false, "convolution", owner});
    p.push_back({m + g.prefix + "v_conv.bias", {c.value_width()}, Init::kZeros, false, "convolution", owner});
  }
  if (c.gate) p.push_back({m + "g_proj.weight", {c.output_width(), c.hidden_size}, Init::kNormal, true, "gate"});
  for (size_t i = 0; i < names_.size(); ++i) {
    const bool first = std::none_of(queries_.begin(), queries_.begin() + static_cast<int64_t>(i), [&](const Query& q) { return q.name == queries_[i].name; });
    std::vector<std::string> readers;
    for (size_t j = 0; j < names_.size() && !config_.share_query; ++j) {
      if (queries_[j].name == queries_[i].name) readers.push_back(names_[j]);
    }
    if (first) p.push_back({m + queries_[i].name, {c.query_width(), c.hidden_size}, Init::kNormal, true, "query", readers});
    if (c.query_conv && mixers_[i]->advances_everywhere()) {
      p.push_back({m + names_[i] + ".q_conv.weight", {c.query_width(), c.conv_kernel}, Init::kConv, false, "convolution", {names_[i]}});
      if (c.conv_bias) p.push_back({m + names_[i] + ".q_conv.bias", {c.query_width()}, Init::kZeros, false, "convolution", {names_[i]}});
    }
    for (ParameterSpec own : mixers_[i]->parameters()) {
      own.name = m + names_[i] + "." + own.name;
      own.mixers = {names_[i]};
      p.push_back(own);
    }
  }
  if (c.head_norm) p.push_back({m + "o_norm.weight", {c.head_norm_groups > 0 ? c.output_width() : c.value_dim()}, Init::kOnes, false, "norm"});
  p.push_back({m + "o_proj.weight", {c.hidden_size, c.output_width()}, Init::kResidual, true, "output"});
  if (c.intermediate_size > 0) {
    p.push_back({prefix_ + "norm2.weight", {c.hidden_size}, norm_init, false, "norm"});
    p.push_back({prefix_ + "mlp.gate_proj.weight", {c.intermediate_size, c.hidden_size}, Init::kNormal, true, "feed-forward"});
    p.push_back({prefix_ + "mlp.up_proj.weight", {c.intermediate_size, c.hidden_size}, Init::kNormal, true, "feed-forward"});
    p.push_back({prefix_ + "mlp.down_proj.weight", {c.hidden_size, c.intermediate_size}, Init::kResidual, true, "feed-forward"});
  }
  return p;
}

std::vector<SlotSpec> MultiMixerLayer::slots(at::ScalarType compute, const StateOptions& options) const {
  const LayerConfig& c = config_;
  const auto keeps = [&](const KeyValueGroup& g) { return !options.drop_rows && (g.keeps_tokens || options.keep_rows); };
  std::vector<SlotSpec> s;
  for (const auto& g : groups_) {
    if (c.conv) {
      s.push_back({g.prefix + "k_conv", SlotKind::kTail, {c.key_width(), c.conv_kernel - 1}, compute, keeps(g)});
      s.push_back({g.prefix + "v_conv", SlotKind::kTail, {c.value_width(), c.conv_kernel - 1}, compute, keeps(g)});
    }
    if (keeps(g)) {
      s.push_back({g.prefix + "keys", SlotKind::kPerToken, {c.kv_heads(), c.head_dim}, compute, false, g.keeps_tokens});
      s.push_back({g.prefix + "values", SlotKind::kPerToken, {c.value_heads(), c.value_dim()}, compute, false, g.keeps_tokens});
    }
  }
  for (size_t i = 0; i < mixers_.size(); ++i) {
    if (c.query_conv && mixers_[i]->advances_everywhere()) {
      s.push_back({names_[i] + ".q_conv", SlotKind::kTail, {c.query_width(), c.conv_kernel - 1}, compute, keeps(group_of(i))});
    }
    const bool rows = keeps(group_of(i));
    for (auto own : mixers_[i]->slots()) {
      own.from_rows = rows;
      s.push_back(own);
    }
    if (!rows) continue;
    for (const auto& own : mixers_[i]->row_slots()) s.push_back(own);
  }
  const bool looked_at = std::any_of(s.begin(), s.end(), [](const SlotSpec& slot) { return slot.looked_at; });
  if (looked_at && options.kept.measure() != TokenMeasure::kNone) {
    if (std::none_of(mixers_.begin(), mixers_.end(), [](const auto& m) { return m->predicts_values(); })) {
      fail("keys and values '{}': a layer's mixers are {}, none of which predicts values (as gated_delta_net, kimi_delta_attention and mamba2 do), so nothing says which rows it "
           "keeps; bound them (bounded:F+W) instead",
           kv_text(options), fmt::join(names_, ", "));
    }
    s.push_back({"surprise", SlotKind::kPerToken, {}, at::kFloat});
  }
  const auto any_rows = std::any_of(s.begin(), s.end(), [](const SlotSpec& slot) { return slot.kind == SlotKind::kPerToken; });
  if (any_rows && names_.size() > 1 && !combines_all()) s.push_back({"mode", SlotKind::kPerToken, {}, at::kChar});
  return s;
}

void MultiMixerLayer::check_past(const Routing& routing, const State& state) const {
  const auto& lengths = state.lengths();
  const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
  for (size_t m = 0; m < mixers_.size() && longest > 0; ++m) {
    if (!mixers_[m]->keeps_tokens() || state.layer(index_).has(group_of(m).prefix + "keys")) continue;
    const int64_t count = combines_all() ? routing.rows() * routing.length() : routing.tokens(names_, m).count;
    if (count == 0) continue;
    fail("{} to run in '{}' behind {} tokens whose keys and values were dropped (drop_rows); keep them, or schedule a linear mixer for what comes later",
         count == 1 ? "a token is" : fmt::format("{} tokens are", count), names_[m], longest);
  }
}

void MultiMixerLayer::bind(const ParameterMap& p) {
  const std::string m = prefix_ + "mixer.";
  norm1_ = p.at(prefix_ + "norm1.weight");
  for (auto& g : groups_) {
    g.k_proj = p.at(m + g.prefix + "k_proj.weight");
    g.v_proj = p.at(m + g.prefix + "v_proj.weight");
    if (!config_.conv) continue;
    g.k_conv = p.at(m + g.prefix + "k_conv.weight");
    g.v_conv = p.at(m + g.prefix + "v_conv.weight");
    if (!config_.conv_bias) continue;
    g.k_conv_bias = p.at(m + g.prefix + "k_conv.bias");
    g.v_conv_bias = p.at(m + g.prefix + "v_conv.bias");
  }
  if (config_.gate) g_proj_ = p.at(m + "g_proj.weight");
  for (size_t i = 0; i < names_.size(); ++i) {
    queries_[i].proj = p.at(m + queries_[i].name);
    if (config_.query_conv && mixers_[i]->advances_everywhere()) {
      queries_[i].conv = p.at(m + names_[i] + ".q_conv.weight");
      if (config_.conv_bias) queries_[i].conv_bias = p.at(m + names_[i] + ".q_conv.bias");
    }
    mixers_[i]->bind(p, m + names_[i] + ".");
  }
  if (config_.head_norm) o_norm_ = p.at(m + "o_norm.weight");
  o_proj_ = p.at(m + "o_proj.weight");
  if (config_.intermediate_size > 0) {
    norm2_ = p.at(prefix_ + "norm2.weight");
    gate_proj_ = p.at(prefix_ + "mlp.gate_proj.weight");
    up_proj_ = p.at(prefix_ + "mlp.up_proj.weight");
    down_proj_ = p.at(prefix_ + "mlp.down_proj.weight");
  }
}

std::vector<std::vector<std::string>> MultiMixerLayer::neighbours() const {
  const std::string m = prefix_ + "mixer.";
  // Tokens read their own mixer's query: the first one's stands before what all read, the second one's behind it.
  std::vector<std::string> mixer = {m + queries_.front().name};
  for (const auto& g : groups_) mixer.insert(mixer.end(), {m + g.prefix + "k_proj.weight", m + g.prefix + "v_proj.weight"});
  if (config_.gate) mixer.push_back(m + "g_proj.weight");
  if (queries_.size() > 1 && queries_[1].name != queries_[0].name) mixer.push_back(m + queries_[1].name);
  std::vector<std::vector<std::string>> all = {mixer};
  if (config_.intermediate_size > 0) all.push_back({prefix_ + "mlp.gate_proj.weight", prefix_ + "mlp.up_proj.weight"});
  return all;
}

at::Tensor MultiMixerLayer::convolve(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias_or_none, const std::string& slot,
                                     ForwardPass& pass) const {
  std::optional<at::Tensor> bias;
  if (bias_or_none.defined()) bias = bias_or_none;
  const auto act = silu_ ? ops::Activation::kSilu : ops::Activation::kNone;
  if (pass.state == nullptr) return ops::short_conv(x, weight, bias, {}, pass.sequences.cu_seqlens, act).y;
  pass.state->record(index_, slot, x, pass.cu_seqlens.empty() ? nullptr : &pass.cu_seqlens);
  at::Tensor tail = pass.state->layer(index_).tensor(slot);  // [N, C, w - 1]
  if (pass.as_steps) {
    std::vector<at::Tensor> y;
    for (int64_t t = 0; t < x.size(1); ++t) {
      y.push_back(ops::short_conv_step(x.select(1, t), weight, bias, tail, act));
      pass.state->keep_step(index_, slot, t);
    }
    return at::stack(y, 1);
  }
  if (x.size(1) == 1 && !pass.sequences.cu_seqlens) return ops::short_conv_step(x.squeeze(1), weight, bias, tail, act).unsqueeze(1);
  const auto r = ops::short_conv(x, weight, bias, tail, pass.sequences.cu_seqlens, act);
  pass.copies.add(tail, r.final_state);
  return r.y;
}

MultiMixerLayer::KeyValues MultiMixerLayer::project_kv(const KeyValueGroup& group, const Projections& u, ForwardPass& pass) const {
  const LayerConfig& c = config_;
  const int64_t B = u.input().size(0), T = u.input().size(1);
  at::Tensor k = u(group.k_proj), v = u(group.v_proj);  // [B, T, Hk K], [B, T, Hv V]
  if (c.conv) {
    k = convolve(k, group.k_conv, group.k_conv_bias, group.prefix + "k_conv", pass);
    v = convolve(v, group.v_conv, group.v_conv_bias, group.prefix + "v_conv", pass);
  }
  KeyValues kv{k.view({B, T, c.kv_heads(), c.head_dim}), v.view({B, T, c.value_heads(), c.value_dim()}), {}, false};
  if (pass.state == nullptr || !pass.state->layer(index_).has(group.prefix + "keys")) return kv;
  // A refill's convolutions run for their tails' sake: their first outputs lack the inputs before it, and the rows are there.
  kv.k = keep(group.prefix + "keys", kv.k, pass);
  kv.v = keep(group.prefix + "values", kv.v, pass);
  kv.cached = group.keeps_tokens;
  return kv;
}

at::Tensor MultiMixerLayer::keep(const std::string& slot, const at::Tensor& rows, ForwardPass& pass) const {
  if (pass.refill) {
    const int64_t begin = pass.state->lengths()[0];
    return pass.state->rows(index_, slot, {begin}, {begin + rows.size(1)});
  }
  pass.state->append(index_, slot, rows, pass.cu_seqlens.empty() ? nullptr : &pass.cu_seqlens, &pass.copies);
  return rows;
}

void MultiMixerLayer::replay(State& one, int64_t begin, int64_t end) const {
  const auto rows = [&](const std::string& slot) { return one.rows(index_, slot, {begin}, {end}); };
  for (size_t m = 0; m < mixers_.size(); ++m) {
    if (mixers_[m]->slots().empty()) continue;
    const std::string& prefix = group_of(m).prefix;
    mixers_[m]->replay({rows(prefix + "keys"), rows(prefix + "values"), rows}, one.layer(index_));
  }
}

at::Tensor MultiMixerLayer::places(const State& one, int64_t begin, int64_t end) const {
  if (!one.layer(index_).has("mode")) return {};
  return one.rows(index_, "mode", {begin}, {end})[0];
}

bool MultiMixerLayer::whole_queries(int64_t tokens, at::Device device) const {
  if (std::all_of(queries_.begin(), queries_.end(), [](const Query& q) { return q.everywhere; })) return true;
  return !device.is_cpu() && (config_.hidden_size <= kWholeQueryWidth || tokens * config_.hidden_size * config_.query_width() <= kWholeQueryProduct);
}

at::Tensor MultiMixerLayer::project_query(const Query& query, const TokenSet& tokens, const Projections& u) const {
  const int64_t B = u.input().size(0), T = u.input().size(1);
  // A gather and a scatter cost less than projecting tokens whose query nobody reads, where those are many.
  const bool many = u.input().is_cuda() && 2 * tokens.count > B * T;
  if (query.everywhere || tokens.all || many) return u(query.proj);
  const at::Tensor q = u.rows(query.proj, tokens.index);
  return at::zeros({B * T, q.size(-1)}, q.options()).index_copy_(0, tokens.index, q).view({B, T, -1});
}

// What every token's pass reads, and the query of a mixer that answers for all of them, in the order of neighbours().
void MultiMixerLayer::project_ahead(Projections& reads, const Routing& routing) const {
  const auto wanted = [&](size_t m) { return m < mixers_.size() && (combines_all() || queries_[m].everywhere || routing.tokens(names_, m, reads.input().device()).all); };
  std::vector<at::Tensor> weights;
  if (wanted(0)) weights.push_back(queries_[0].proj);
  for (const auto& g : groups_) weights.push_back(g.k_proj), weights.push_back(g.v_proj);
  if (config_.gate) weights.push_back(g_proj_);
  if (wanted(1) && queries_[1].name != queries_[0].name) weights.push_back(queries_[1].proj);
  reads.ahead(weights);
}

at::Tensor MultiMixerLayer::mix(const at::Tensor& normed, const Routing& routing, ForwardPass& pass) const {
  const LayerConfig& c = config_;
  Projections reads(normed);
  const at::Tensor& u = reads.input();
  const int64_t B = u.size(0), T = u.size(1);
  if (pass.state != nullptr && u.is_cuda()) project_ahead(reads, routing);
  LayerState* state = pass.state != nullptr ? &pass.state->layer(index_) : nullptr;
  static const TokenSet kEverything;
  std::vector<KeyValues> kvs;
  for (const auto& g : groups_) kvs.push_back(project_kv(g, reads, pass));
  const bool kept = state != nullptr && choose_rows(reads, kvs, pass);
  // Rows are gathered only for those who look at them in this call, and where some are to be kept.
  for (size_t m = 0; m < mixers_.size(); ++m) {
    const size_t i = config_.share_kv ? 0 : m;
    const bool looks = kvs[i].cached && mixers_[m]->keeps_tokens() && (kept || combines_all() || routing.tokens(names_, m, u.device()).count > 0);
    if (!looks || kvs[i].cache.made()) continue;
    pass.copies.run();  // this call's rows are among those that are looked at
    kvs[i].cache = past_and_present(groups_[i], kvs[i].k, kvs[i].v, pass);
  }
  if (state != nullptr && state->has("mode")) keep("mode", routing.places(names_, u.device()), pass);
  std::vector<at::Tensor> outputs;  // [B, T, output heads, V] each
  std::vector<const TokenSet*> rows;  // of each: the tokens that it answers for
  bool writable = false;            // the first output, by the others' rows
  std::map<std::string, at::Tensor> projected;
  const bool whole = state == nullptr && whole_queries(B * T, u.device());  // a prompt's piece in one mode spends nothing on the other's queries
  for (size_t m = 0; m < mixers_.size(); ++m) {
    const TokenSet& tokens = combines_all() ? kEverything : routing.tokens(names_, m, u.device());
    const bool idle = !combines_all() && tokens.count == 0;
    // A state must see every token; a mixer with none to answer for and no state to keep costs nothing.
    if (idle && !pass.surprise && (state == nullptr || !mixers_[m]->advances_everywhere())) continue;
    const Query& query = queries_[m];
    const KeyValues& kv = kvs[config_.share_kv ? 0 : m];
    at::Tensor q;
    if (idle && !query.everywhere) {
      q = kv.k;  // nobody reads what comes out: any query will do
    } else if (auto it = projected.find(query.name); it != projected.end()) {
      q = it->second;
    } else {
      q = whole ? reads(query.proj) : project_query(query, tokens, reads);
      if (query.everywhere) projected.emplace(query.name, q);
    }
    if (query.conv.defined()) q = convolve(q, query.conv, query.conv_bias, names_[m] + ".q_conv", pass);
    MixerInput input{u, reads, q.view({B, T, -1, c.head_dim}), kv.k, kv.v, tokens.spans, pass.sequences, state,
                     kv.cached && mixers_[m]->keeps_tokens() ? &kv.cache : nullptr};
    if (state != nullptr && state->has(group_of(m).prefix + "keys")) {
      input.keep = [&](const std::string& slot, const at::Tensor& rows) { return keep(slot, rows, pass); };
    }
    input.copies = &pass.copies;
    input.as_steps = pass.as_steps;
    if (pass.as_steps) input.stepped = [&](const std::string& slot, int64_t t) { pass.state->keep_step(index_, slot, t); };
    if (pass.surprise) {
      if (const auto score = mixers_[m]->surprise(input, TokenMeasure::kSurprise)) pass.surprise(*score);
    }
    at::Tensor part = mixers_[m]->forward(input);
    if (idle) continue;
    // Steps read out every row; rows in another mode are dropped here.
    if ((T == 1 || pass.as_steps) && state != nullptr && tokens.index.defined()) {
      const at::Tensor read = part.flatten(0, 1);
      part = at::zeros_like(read).index_copy(0, tokens.index, read.index_select(0, tokens.index)).view_as(part);
    }
    // What looks back keeps its output for the backward pass; what does not stands first, to be written over.
    const bool first = !combines_all() && mixers_[m]->advances_everywhere();
    writable |= first;
    outputs.insert(first ? outputs.begin() : outputs.end(), part);
    rows.insert(first ? rows.begin() : rows.end(), &tokens);
  }
  pass.copies.run();
  at::Tensor o;
  for (size_t i = 0; i < outputs.size(); ++i) {
    at::Tensor part = outputs[i];
    // mean: each output is head-normalised before the average; select: they are zero but for their own tokens.
    if (combines_all() && c.head_norm) part = ops::rms_norm(part, o_norm_, c.o_norm_eps());
    if (!o.defined()) {
      // Where all look back (attention beside sliding_window) a copy is written over.
      o = outputs.size() > 1 && !writable && !combines_all() && at::GradMode::is_enabled() ? part.clone() : part;
    } else if (combines_all() || rows[i]->all) {
      o = o + part;
    } else {
      o = rows[i]->mask.defined() ? join_where(o, part, rows[i]->mask) : join_rows(o, part, rows[i]->index);
    }
  }
  if (combines_all()) o = o / static_cast<double>(outputs.size());
  return project(gated(o, reads).reshape({B, T, c.output_width()}), o_proj_);
}

// Head norm and gate: o [B, T, output heads, V] -> the same, or its heads side by side.
at::Tensor MultiMixerLayer::gated(const at::Tensor& o, const Projections& u) const {
  const LayerConfig& c = config_;
  const bool norm = c.head_norm && !combines_all();
  if (!c.gate) return norm ? ops::rms_norm(o, o_norm_, c.o_norm_eps()) : o;
  const at::Tensor flat = u(g_proj_), gate = flat.view(o.sizes());
  const bool sigmoid = c.gate_activation == "sigmoid";
  if (norm && c.head_norm_groups > 0) {
    return ops::gated_rms_norm(o.flatten(2), gate.flatten(2), o_norm_, c.o_norm_eps(), /*gate_first=*/true, c.head_norm_groups);
  }
  if (norm && !sigmoid) return ops::gated_rms_norm(o, gate, o_norm_, c.o_norm_eps(), c.gated_norm_order == "gate_first");
  const at::Tensor x = norm ? ops::rms_norm(o, o_norm_, c.o_norm_eps()) : o;
  return sigmoid ? x * ops::rows_apart(flat).sigmoid().view(o.sizes()) : ops::swiglu(gate, x);
}

at::Tensor MultiMixerLayer::feed_forward(const at::Tensor& h) const {
  const auto whole = [this](const at::Tensor& x) {
    Projections reads(x);
    reads.ahead({gate_proj_, up_proj_});
    return project(ops::swiglu(reads(gate_proj_), reads(up_proj_)), down_proj_);
  };
  const int64_t tokens = h.size(0) * h.size(1);
  const int64_t most = h.is_cuda() ? kFeedForwardTokensOnGpu : kFeedForwardTokens;
  if (at::GradMode::is_enabled() || tokens <= most) return whole(h);
  // Nothing is kept for a backward pass, so the widest activations of the model need not stand for all tokens at once: less memory, and
  // what stands stays near the processor.
  at::Tensor out = at::empty_like(h);
  const at::Tensor x = h.view({tokens, h.size(2)}), y = out.view({tokens, h.size(2)});
  for (int64_t begin = 0; begin < tokens; begin += most) {
    const int64_t n = std::min(most, tokens - begin);
    y.narrow(0, begin, n).copy_(whole(x.narrow(0, begin, n)));
  }
  return out;
}

// stream + delta and what a sublayer reads of it: {input, sum}. delta may be undefined.
std::pair<at::Tensor, at::Tensor> MultiMixerLayer::norm_before(const at::Tensor& delta, const at::Tensor& stream, const at::Tensor& weight) const {
  if (config_.norm_placement == "after") {
    const at::Tensor sum = delta.defined() ? stream + delta : stream;
    return {sum, sum};
  }
  const at::Tensor factor = norm_factor(config_, weight);
  if (!delta.defined()) return {ops::rms_norm(stream, factor, config_.norm_eps), stream};
  const auto [normed, sum] = ops::add_rms_norm(delta, stream, factor, config_.norm_eps);
  return {normed, sum};
}

// What a sublayer's output y adds to the residual stream.
at::Tensor MultiMixerLayer::contribution(const at::Tensor& y, const at::Tensor& norm) const {
  const at::Tensor out = config_.norm_placement == "after" ? ops::rms_norm(y, norm_factor(config_, norm), config_.norm_eps) : y;
  return config_.residual_multiplier == 1 ? out : out * config_.residual_multiplier;
}

std::pair<at::Tensor, at::Tensor> MultiMixerLayer::forward(const at::Tensor& x, const at::Tensor& delta, const Routing& routing,
                                                           ForwardPass& pass) const {
  auto [u, stream] = norm_before(delta, x, norm1_);
  at::Tensor y = mix(u, routing, pass);
  if (pass.tap) pass.tap("mixer_out", index_, y);
  y = contribution(y, norm1_);
  if (config_.intermediate_size > 0) {
    at::Tensor h;
    std::tie(h, stream) = norm_before(y, stream, norm2_);
    y = contribution(feed_forward(h), norm2_);
  }
  if (pass.tap) pass.tap("hidden", index_, stream + y);
  return {stream, y};
}

}  // namespace oryx
