#include "oryx/generate/session.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/log.h"
#include "oryx/common/progress.h"
#include "oryx/model/inspect.h"
#include "oryx/model/routed_cost.h"
#include "oryx/ops/few_rows/few_rows.h"

namespace oryx {

namespace {

MemoryPlan checked_plan(const LanguageModel& model, const SessionOptions& o) {
  TORCH_CHECK(o.tokens > 0 && o.piece > 0 && o.prompt_length >= 0, "session: ", o.tokens, " tokens in pieces of ", o.piece);
  MemoryPlan plan = plan_memory(model.config(), o.tokens, std::min(o.piece, o.tokens), model.compute_dtype(), o.state);
  // The places to come back to: State::hold and hold_steps.
  if (o.drafted > 0) plan.activations += (o.drafted + 1) * (plan.state.recurrent + plan.state.tails);
  if (!model.device().is_cpu()) return plan;  // a GPU's memory is its own
  const auto free = static_cast<double>(available_memory());
  if (static_cast<double>(plan.total()) > free) {
    fail("{} tokens need about {} ({} of state, {} for a pass over {} tokens), but only {} of memory are free; use fewer tokens{}", o.tokens,
         human_bytes(static_cast<double>(plan.total())), human_bytes(static_cast<double>(plan.state.total())),
         human_bytes(static_cast<double>(plan.activations)), std::min(o.piece, o.tokens), human_bytes(free),
         plan.activations > plan.state.total() ? " or smaller pieces" : "");
  }
  return plan;
}

const TextRouters& checked_routers(const ModelSchedule& schedule, const TextRouters& routers) {
  if (!schedule.gain_heads().empty() && !routers.known()) {
    fail("the schedule '{}' has a router, which goes by all of a text, but the session was saved under a schedule without one; begin a session under one with a router (its share "
         "may be 0), or go on without",
         schedule.text());
  }
  return routers;
}

SessionOptions settled(SessionOptions options, const LanguageModel& model) {
  if (options.piece == 0) options.piece = model.device().is_cpu() ? 1024 : 8192;
  return options;
}

SessionOptions resumed(SessionOptions options, const LanguageModel& model, const State& state) {
  options.state = state.options();
  return settled(std::move(options), model);
}

}  // namespace

MemoryPlan plan_memory(const ModelConfig& config, int64_t tokens, int64_t piece, at::ScalarType compute, const StateOptions& state) {
  MemoryPlan plan;
  plan.state = state_bytes(config, tokens, compute, state);
  // Values a token that stand at once in a layer: the residual stream and its norms; keys, values and gate around the convolution; a
  // query and an output for each mixer; the recurrences' float32 working copies; the feed-forward's three. The widest layer counts.
  int64_t values = 0, key_width = 0;
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const LayerConfig c = config.layer_of(config.mixers_of(i));
    const auto mixers = static_cast<int64_t>(config.mixers_of(i).size());
    const int64_t stream = 6 * c.hidden_size + 3 * (c.key_width() + c.value_width()) + c.output_width();
    const int64_t mixing = mixers * 2 * (c.query_width() + c.output_width());
    const int64_t recurrence = 8 * c.output_heads() * std::max(c.head_dim, c.value_dim());
    values = std::max({values, stream + mixing + recurrence, stream + 3 * c.intermediate_size});
    key_width = std::max(key_width, c.key_width());
  }
  // float32 even where activations are shorter: norms, softmax and recurrences work in it.
  plan.activations = 4 * (piece * values + 2 * config.vocab_size);
  // Attention rotates a copy of one layer's cached keys, in float32 on the way.
  const RowBound bound = state.row_bound(LanguageModel::refill_tokens(config));
  const int64_t attended = bound.on() ? std::min(tokens, state.seen(tokens) + piece) : tokens;
  if (plan.state.tokens > 0) plan.activations += (4 + static_cast<int64_t>(at::elementSize(compute))) * attended * key_width;
  if (bound.on() && plan.state.tokens > 0) {
    // What is reserved beyond the rows held, so that they stand side by side; and a call's rows beside the past's, in one layer.
    const int64_t held = std::min(tokens, bound.first + bound.last), row = plan.state.tokens / held;
    const int64_t pages = std::min(RowStore::region_pages(bound, state.page_tokens), (tokens + state.page_tokens - 1) / state.page_tokens);
    plan.activations += row * std::max<int64_t>(0, pages * state.page_tokens - held) + (attended * row) / std::max<int64_t>(1, config.num_layers);
  }
  return plan;
}

Session::Session(const LanguageModel& model, const ModelSchedule& schedule, const SessionOptions& options)
    : model_(model), schedule_(schedule), options_(settled(options, model)), plan_(checked_plan(model, options_)), state_(model.make_state(1, options.state)), routed_(model, schedule, options.facts) {
  check_heads(model, schedule);
  state_.reserve(options_.tokens);
  routed_.begin_prompt(options_.prompt_length);
}

Session::Session(const LanguageModel& model, const ModelSchedule& schedule, const SessionOptions& options, State state, const TextRouters& routers)
    : model_(model), schedule_(schedule), options_(resumed(options, model, state)), plan_(checked_plan(model, options_)), state_(std::move(state)),
      routed_(model, schedule, checked_routers(schedule, routers), options.facts) {
  TORCH_CHECK(state_.sequences() == 1, "session: a state of ", state_.sequences(), " sequences");
  check_heads(model, schedule);
  length_ = state_.lengths()[0];
  TORCH_CHECK(!routed_.on() || routed_.length() == length_, "session: routers of ", routed_.length(), " tokens for ", length_);
  TORCH_CHECK(length_ <= options_.tokens, "session: ", length_, " tokens held, room for ", options_.tokens);
  state_.reserve(options_.tokens);
  routed_.begin_prompt(std::max<int64_t>(0, options_.prompt_length - length_));
  count_attention();
}

Session::Session(Session&& other) noexcept
    : model_(other.model_), schedule_(other.schedule_), options_(other.options_), plan_(other.plan_), state_(std::move(other.state_)), length_(other.length_),
      attention_tokens_(other.attention_tokens_), routed_(std::move(other.routed_)) {
  other.fused_.reset();
  other.verifier_.reset();
}

void Session::trim(int64_t length) {
  TORCH_CHECK(!routed_.on() && !verifying_, "session: a trim under a schedule with a router, or before keep()");
  state_.trim(0, length, model_);
  length_ = length;
  count_attention();
}

void Session::count_attention() {
  attention_tokens_ = length_ > 0 ? oryx::attention_share(model_.config(), route(0, length_)) * static_cast<double>(length_) : 0;
}

std::vector<std::shared_ptr<const Routing>> Session::route(const ModelSchedule& schedule, int64_t start, int64_t count) const {
  ModePiece piece{.row = 0, .column = 0, .length = count, .start = start, .context = {}};
  piece.context.prompt_length = options_.prompt_length;
  piece.context.seed = options_.seed;
  piece.context.facts = routed_.facts();
  return schedule.route({piece}, 1, count);
}

void Session::look_ahead(std::span<const int32_t> prompt) {
  if (!routed_.wants_prompt()) return;
  at::NoGradGuard no_grad;
  if (!routed_.wants_reading()) return routed_.look_ahead(prompt, {});
  const ModelSchedule linear(model_.config(), "linear");
  const bool fresh = length_ == 0;
  std::optional<State> fork;
  if (!fresh) fork.emplace(state_.fork({0}));
  State& state = fresh ? state_ : *fork;
  const auto count = static_cast<int64_t>(prompt.size());
  for (int64_t begin = 0, n = 0; begin < count; begin += n) {
    check_interrupt();
    n = std::min(options_.piece, count - begin);
    const auto ids = prompt.subspan(static_cast<size_t>(begin), static_cast<size_t>(n));
    ModePiece piece{.row = 0, .column = 0, .length = n, .start = length_ + begin, .context = {}};
    piece.context.prompt_length = options_.prompt_length;
    ModelInput input;
    input.input_ids = at::tensor(std::vector<int64_t>(ids.begin(), ids.end()), at::kLong).view({1, n});
    input.routing = linear.route({piece}, 1, n);
    input.state = &state;
    routed_.look_ahead(ids, model_.hidden(input).squeeze(0));
  }
  if (!fresh) return;
  state_ = model_.make_state(1, options_.state);  // as if nothing had been read
  state_.reserve(options_.tokens);
}

at::Tensor Session::run(std::span<const int32_t> ids) { return run_under(schedule_, ids, false); }

at::Tensor Session::run_under(const ModelSchedule& schedule, std::span<const int32_t> ids, bool as_steps) {
  const auto count = static_cast<int64_t>(ids.size());
  routed_.before(ids);
  ModelInput input;
  input.input_ids = at::tensor(std::vector<int64_t>(ids.begin(), ids.end()), at::kLong).view({1, count});
  input.routing = route(schedule, length_, count);
  input.state = &state_;
  input.as_steps = as_steps;
  const at::Tensor hidden = model_.hidden(input).squeeze(0);  // [count, D]
  routed_.after(hidden[count - 1]);
  length_ += count;
  attention_tokens_ += oryx::attention_share(model_.config(), input.routing) * static_cast<double>(count);
  return hidden;
}

at::Tensor Session::step(int32_t id) { return step_under(schedule_, id); }

bool Session::fused() {
  if (!asked_ && options_.fused && model_.device().is_cuda()) {
    std::string why;
    fused_ = make_fused_decoder(model_, state_, options_.tokens, &why, /*hidden=*/routed_.on());
    if (fused_ == nullptr) log::warn_once("decoding operator by operator, more slowly than by one captured launch a token: {} (docs/generation.md)", why);
  }
  asked_ = true;
  if (fused_ == nullptr) return false;
  if (fused_->fits()) return true;
  log::warn_once("decoding operator by operator, more slowly than by one captured launch a token: rows of the state do not lie where a captured step can write, behind a fork or a trim (docs/generation.md)");
  return false;
}

at::Tensor Session::step_under(const ModelSchedule& schedule, int32_t id) {
  TORCH_CHECK(length_ < options_.tokens && !verifying_, "session: ", length_ + 1, " tokens, reserved for ", options_.tokens, ", or before keep()");
  at::NoGradGuard no_grad;
  if (!fused()) return model_.logits(run_under(schedule, {&id, 1}, false)).squeeze(0);
  routed_.before({&id, 1});
  const auto routing = route(schedule, length_, 1);
  const at::Tensor logits = fused_->step({id}, routing).squeeze(0);
  if (routed_.on()) routed_.after(fused_->hidden()[0]);
  ++length_;
  attention_tokens_ += oryx::attention_share(model_.config(), routing);
  return logits;
}

void Session::hold() {
  TORCH_CHECK(!routed_.on(), "session: a draft under a schedule with a router");
  state_.hold();
  held_length_ = length_;
  held_attention_ = attention_tokens_;
}

at::Tensor Session::draft(int32_t id, const ModelSchedule& by) { return step_under(by, id); }

std::vector<int32_t> Session::draft_likeliest(int32_t id, int64_t count, const ModelSchedule& by, int64_t below) {
  at::NoGradGuard no_grad;
  const int64_t looked_at = below > 0 ? below : model_.config().vocab_size;
  std::vector<int32_t> drafts;
  if (!fused()) {
    for (int64_t i = 0; i < count; ++i) drafts.push_back(static_cast<int32_t>(step_under(by, i == 0 ? id : drafts.back()).narrow(0, 0, looked_at).argmax().item<int64_t>()));
    return drafts;
  }
  TORCH_CHECK(length_ + count <= options_.tokens, "session: ", length_ + count, " tokens, reserved for ", options_.tokens);
  // Each token is fed back on the device, and all of them come at once.
  at::Tensor all = at::empty({count}, at::device(model_.device()).dtype(at::kInt));
  // What throws between leaves the decoder taking the caller's ids again.
  const std::unique_ptr<FusedDecoder, void (*)(FusedDecoder*)> fed((fused_->feed_back(true, looked_at), fused_.get()), [](FusedDecoder* d) { d->feed_back(false); });
  for (int64_t i = 0; i < count; ++i) {
    (void)fused_->step(i == 0 ? std::vector<int32_t>{id} : std::vector<int32_t>(), route(by, length_, 1));
    all.narrow(0, i, 1).copy_(fused_->likeliest());
    ++length_;
  }
  const at::Tensor host = all.cpu();
  drafts.assign(host.const_data_ptr<int32_t>(), host.const_data_ptr<int32_t>() + count);
  for (const int32_t draft : drafts) {
    if (draft < 0) fail("the logits of a draft are not finite; the model's weights or state are damaged");
  }
  return drafts;
}

void Session::back() {
  state_.back(held_length_);
  length_ = held_length_;
  attention_tokens_ = held_attention_;
}

DraftVerifier* Session::verifier() {
  if (!asked_verifier_ && options_.fused && model_.device().is_cuda()) {
    std::string why;
    verifier_ = make_draft_verifier(model_, state_, options_.tokens, &why);
    if (verifier_ == nullptr) log::warn_once("verifying drafts operator by operator, more slowly than by one captured launch: {} (docs/generation.md)", why);
  }
  asked_verifier_ = true;
  return verifier_.get();
}

int64_t Session::most_steps() { return verifier() != nullptr ? verifier_->most() : ops::kFewRows; }

at::Tensor Session::steps(std::span<const int32_t> ids) {
  const auto count = static_cast<int64_t>(ids.size());
  TORCH_CHECK(count > 0 && length_ + count <= options_.tokens, "session: ", length_ + count, " tokens, reserved for ", options_.tokens);
  TORCH_CHECK(!routed_.on(), "session: several tokens as steps under a schedule with a router");
  at::NoGradGuard no_grad;
  held_length_ = length_;
  held_attention_ = attention_tokens_;
  verifying_ = verifier() != nullptr && count >= 2 && count <= verifier_->most();
  if (verifying_ && !verifier_->fits(count)) {
    log::warn_once("verifying drafts operator by operator, more slowly than by one captured launch: rows of the state do not lie where it can write, behind a fork or a trim (docs/generation.md)");
    verifying_ = false;
  }
  if (verifying_) {
    const at::Tensor logits = verifier_->run({ids.begin(), ids.end()}, route(length_, count));
    length_ += count;
    return logits;
  }
  state_.hold_steps(count);
  return model_.logits(run_under(schedule_, ids, true));
}

void Session::keep(int64_t count) {
  TORCH_CHECK(count > 0 && held_length_ + count <= length_, "session: the first ", count, " of ", length_ - held_length_, " tokens");
  if (verifying_) {
    verifier_->keep(count);
    verifying_ = false;
  } else if (held_length_ + count == length_) {
    return;
  } else {
    state_.back(held_length_ + count);
  }
  length_ = held_length_ + count;
  attention_tokens_ = held_attention_ + oryx::attention_share(model_.config(), route(held_length_, count)) * static_cast<double>(count);
}

bool Session::same_modes(const ModelSchedule& other, int64_t count) const {
  const auto own = route(length_, count), others = route(other, length_, count);
  const Routing *last_own = nullptr, *last_other = nullptr;
  const std::vector<std::string>* last_mixers = nullptr;
  for (int64_t i = 0; i < model_.config().num_layers; ++i) {
    const Routing &a = *own[own.size() == 1 ? 0 : static_cast<size_t>(i)], &b = *others[others.size() == 1 ? 0 : static_cast<size_t>(i)];
    const MultiMixerLayer& layer = model_.layer(i);
    if (layer.mixer_names().size() == 1 || layer.config().combine == "mean") continue;  // no choice
    if (&a == last_own && &b == last_other && layer.mixer_names() == *last_mixers) continue;
    if (!at::equal(a.places(layer.mixer_names()), b.places(layer.mixer_names()))) return false;
    last_own = &a, last_other = &b, last_mixers = &layer.mixer_names();
  }
  return true;
}

at::Tensor Session::extend(std::span<const int32_t> ids, int64_t keep) {
  const auto count = static_cast<int64_t>(ids.size());
  TORCH_CHECK(count > 0 && keep > 0 && keep <= count, "session: ", keep, " of ", count, " hidden states");
  TORCH_CHECK(length_ + count <= options_.tokens && !verifying_, "session: ", length_ + count, " tokens, reserved for ", options_.tokens, ", or before keep()");
  at::NoGradGuard no_grad;
  std::vector<at::Tensor> kept;
  for (int64_t begin = 0, n = 0; begin < count; begin += n) {
    check_interrupt();
    n = std::min(options_.piece, routed_.ready(count - begin));
    at::Tensor hidden;
    try {
      hidden = run(ids.subspan(static_cast<size_t>(begin), static_cast<size_t>(n)));
    } catch (const c10::OutOfMemoryError&) {  // a GPU's: on the CPU checked_plan() has looked
      fail("the device's memory does not hold a pass over {} tokens, about {} beside the state; use smaller pieces (--prefill-piece), or keep fewer keys and values (--kv)", n,
           human_bytes(static_cast<double>(plan_.activations)));
    }
    const int64_t wanted = std::min(n, begin + n - (count - keep));  // of this piece
    // A copy: a view would hold the whole piece.
    if (wanted > 0) kept.push_back(hidden.narrow(0, n - wanted, wanted).clone());
  }
  return kept.size() == 1 ? kept.front() : at::cat(kept);
}

}  // namespace oryx
