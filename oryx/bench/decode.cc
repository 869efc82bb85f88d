// Time of one token against the bytes that it must move.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <ATen/detail/CUDAHooksInterface.h>

#include <algorithm>
#include <memory>

#include "oryx/bench/bench.h"
#include "oryx/bench/measure.h"
#include "oryx/bench/random_rows.h"
#include "oryx/common/error.h"
#include "oryx/common/log.h"
#include "oryx/common/random.h"
#include "oryx/generate/fused_decoder.h"
#include "oryx/model/device.h"
#include "oryx/model/inspect.h"
#include "oryx/model/scheduling.h"

namespace oryx {

namespace {

void wait_for(at::Device device) {
  if (device.is_cuda()) at::detail::getCUDAHooks().deviceSynchronize(device.index());
}

// Bytes a second of a large copy on the device, read plus written.
double copy_rate(at::Device device) {
  const int64_t bytes = int64_t{1} << (device.is_cuda() ? 30 : 28);
  const at::Tensor from = at::ones({bytes}, at::device(device).dtype(at::kByte)), to = at::empty_like(from);
  constexpr int64_t kCopies = 4;
  const auto copy = [&] {
    for (int64_t i = 0; i < kCopies; ++i) at::Tensor(to).copy_(from);
    wait_for(device);
  };
  return static_cast<double>(2 * kCopies * bytes) / time_repeated(1, 5, copy).median();
}

// A batch of sequences that decode side by side, through the fused decoder where there is one.
class DecodeBatch {
 public:
  DecodeBatch(const LanguageModel& model, const ModelSchedule& schedule, int64_t sequences, int64_t prompt, int64_t tokens, const StateOptions& state, bool fused)
      : model_(model), schedule_(schedule), prompt_(prompt), state_(model.make_state(sequences, state)) {
    state_.reserve(tokens);
    std::string why;
    if (fused && model.device().is_cuda()) {
      fused_ = make_fused_decoder(model, state_, tokens, &why);
      if (fused_ == nullptr) log::warn_once("decoding operator by operator, more slowly than by one captured launch a token: {} (docs/generation.md)", why);
    }
    if (fused_ != nullptr) fused_->feed_back(true);
    ids_ = at::zeros({sequences, 1}, at::kLong);
    CounterRng rng(2);
    for (int64_t n = 0; n < sequences; ++n) ids_[n][0] = static_cast<int64_t>(rng.below(static_cast<uint64_t>(model.config().vocab_size)));
  }

  void fill(int64_t length) { fill_rows(model_, state_, length); }

  void step() {
    const auto routing = route(state_.lengths()[0]);
    if (fused_ != nullptr && fused_->fits()) {
      (void)fused_->step(begun_ ? std::vector<int32_t>() : ids(), routing);
      begun_ = true;
      return;
    }
    ModelInput input;
    input.input_ids = ids_;
    input.routing = routing;
    input.state = &state_;
    ids_ = model_.logits(model_.hidden(input)).argmax(-1).cpu();
  }

  // Of the layers' tokens at this position, those in attention.
  double attention_share(int64_t position) const {
    const auto routing = route(position);
    double share = 0;
    for (const auto& r : routing) share += r->share("attention");
    return share / static_cast<double>(routing.size());
  }

  const State& state() const { return state_; }
  const FusedDecoder* fused() const { return fused_.get(); }

 private:
  std::vector<int32_t> ids() const {
    std::vector<int32_t> out;
    for (int64_t n = 0; n < state_.sequences(); ++n) out.push_back(static_cast<int32_t>(ids_[n][0].item<int64_t>()));
    return out;
  }
  std::vector<std::shared_ptr<const Routing>> route(int64_t position) const {
    std::vector<ModePiece> pieces;
    for (int64_t n = 0; n < state_.sequences(); ++n) {
      ModePiece piece{.row = n, .column = 0, .length = 1, .start = position, .context = {}};
      piece.context.prompt_length = prompt_;
      pieces.push_back(piece);
    }
    return schedule_.route(pieces, state_.sequences(), 1);
  }

  const LanguageModel& model_;
  const ModelSchedule& schedule_;
  int64_t prompt_;
  State state_;
  std::unique_ptr<FusedDecoder> fused_;
  at::Tensor ids_;  // [N, 1]
  bool begun_ = false;
};

}  // namespace

BenchResult bench_decode(const DecodeBenchOptions& o) {
  const at::Device device = parse_device(o.model.device);
  const ModelConfig config = o.model.config();
  const ModelSchedule schedule(config, o.schedule);
  for (size_t i = 1; i < o.contexts.size(); ++i) {
    if (o.contexts[i] < o.contexts[i - 1] + o.tokens) {
      fail("contexts {} and {}: expected each at least {} tokens (--tokens) above the one before", o.contexts[i - 1], o.contexts[i], o.tokens);
    }
  }
  StateOptions state;
  set_kv(state, o.kv);
  if (state.kept.on()) fail("--kv {}: rows here are random, so that none can be chosen; expected keep, drop or bounded:F+W", o.kv);
  LanguageModel model(config, o.model.compute());
  model.initialize(0);
  model.to(device);
  at::NoGradGuard no_grad;
  const double rate = copy_rate(device);
  const int64_t longest = o.contexts.back() + o.tokens;
  // The same sequences grow through all contexts; what is decoded at one is part of the next.
  DecodeBatch batch(model, schedule, o.batch, longest, longest + o.tokens, state, o.fused);
  int64_t weights = 0;  // bytes that a step reads of them
  if (batch.fused() != nullptr) weights = batch.fused()->weight_bytes(0);
  for (const ModeUse& use : report_parameters(config).modes) {
    if (batch.fused() == nullptr) weights = std::max(weights, use.parameters * static_cast<int64_t>(sizeof(float)));
  }
  BenchResult result;
  auto& rows = result.table.rows;
  for (const int64_t context : o.contexts) {
    batch.fill(context);
    batch.step();  // sets itself up
    wait_for(device);
    const double share = batch.attention_share(context);
    double ms = 0;
    if (device.is_cuda()) {  // tokens follow one another without the host
      ms = 1e3 * time_repeated(0, 1, [&] {
             for (int64_t t = 1; t < o.tokens; ++t) batch.step();
             wait_for(device);
           }).median() / static_cast<double>(std::max<int64_t>(1, o.tokens - 1));
    } else {
      ms = 1e3 * time_repeated(0, std::max<int64_t>(1, o.tokens - 1), [&] { batch.step(); }).median();
    }
    const StateBytes predicted = state_bytes(config, batch.state().lengths()[0], o.model.compute(), state), measured = batch.state().bytes();
    const double moved = static_cast<double>(weights) + 2.0 * static_cast<double>(measured.recurrent) + share * static_cast<double>(measured.tokens);
    const double bound = 1e3 * moved / rate;
    rows.push_back({{"context", context},
                    {"ms_per_token", ms},
                    {"relative_time", rows.empty() ? 1.0 : ms / rows.front()["ms_per_token"].get<double>()},
                    {"bound_ms", bound},
                    {"of_bound", bound / ms},
                    {"predicted_bytes", o.batch * predicted.total()},
                    {"measured_bytes", measured.total()},
                    {"difference", static_cast<double>(measured.total()) / static_cast<double>(o.batch * predicted.total()) - 1},
                    {"recurrent_bytes", measured.recurrent},
                    {"resident_bytes", resident_memory()}});
  }
  result.table.columns = {{"context", "context", cell_text()},
                          {"ms_per_token", "ms/token", cell_fixed(3)},
                          {"relative_time", "relative", cell_fixed(3)},
                          {"bound_ms", "bound ms", cell_fixed(3)},
                          {"of_bound", "of it", cell_percent()},
                          {"predicted_bytes", "state predicted", cell_bytes()},
                          {"measured_bytes", "measured", cell_bytes()},
                          {"difference", "difference", cell_percent()},
                          {"recurrent_bytes", "recurrent", cell_bytes()},
                          {"resident_bytes", "process", cell_bytes()}};
  result.options = {{"preset", o.model.preset}, {"dtype", o.model.precision}, {"device", o.model.device}, {"schedule", o.schedule}, {"batch", o.batch},
                    {"contexts", o.contexts}, {"tokens", o.tokens}, {"kv", o.kv}, {"copy_bytes_per_second", rate}, {"fused", batch.fused() != nullptr}};
  return result;
}

}  // namespace oryx
