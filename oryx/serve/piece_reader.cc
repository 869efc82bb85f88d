#include "oryx/serve/piece_reader.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "oryx/common/log.h"
#include "oryx/model/device.h"
#include "oryx/ops/copies/copies.h"

namespace oryx::serve {

namespace {

constexpr int64_t kSizes[] = {64, 128, 256, 384, 512, 768, 1024, 1536, 2048};

std::vector<int64_t> sizes_up_to(int64_t piece) {
  std::vector<int64_t> sizes;
  for (const int64_t size : kSizes) {
    if (size < piece) sizes.push_back(size);
  }
  if (piece <= std::end(kSizes)[-1]) sizes.push_back(piece);
  return sizes;
}

StateOptions scratch_options(const StateOptions& options, int64_t tokens) {
  StateOptions own;
  own.drop_rows = options.drop_rows;
  own.keep_rows = options.keep_rows;
  own.page_tokens = tokens;
  own.row_pages = options.drop_rows ? 0 : 1;
  return own;
}

// The mixer that processes every token of it; empty where there are several.
std::string only_mixer(const Routing& routing) {
  return routing.spans().size() == 1 ? routing.mixers()[static_cast<size_t>(routing.spans()[0].mixer)] : "";
}

ModePiece whole_piece(int64_t count) {
  ModePiece piece{.row = 0, .column = 0, .length = count, .start = 0, .context = {}};
  piece.context.prompt_length = count;
  return piece;
}

// Filled by a static initialiser of a build with CUDA, read-only afterwards.
detail::PassCaptureFactory& pass_capture_factory() {
  static detail::PassCaptureFactory f = nullptr;
  return f;
}

// Whether some layer reads the keys of earlier tokens, whatever the schedule.
bool always_looks_back(const LanguageModel& model) {
  for (int64_t i = 0; i < model.config().num_layers; ++i) {
    const MultiMixerLayer& layer = model.layer(i);
    if (layer.mixer(0).keeps_tokens()) return true;
    for (size_t m = 1; m < layer.mixer_names().size(); ++m) {
      if (model.config().layer.combine == "mean" && layer.mixer(m).keeps_tokens()) return true;
    }
  }
  return false;
}

}  // namespace

bool detail::register_pass_capture(PassCaptureFactory f) {
  pass_capture_factory() = f;
  return true;
}

std::unique_ptr<PieceReader> make_piece_reader(const LanguageModel& model, const StateOptions& options, int64_t piece, std::string* why) {
  std::string reason;
  if (!model.device().is_cuda()) reason = "the model is not on a GPU";
  if (reason.empty() && pass_capture_factory() == nullptr) reason = "this build has no CUDA";
  if (reason.empty() && options.kept.on()) reason = "the state chooses which rows it keeps";
  if (reason.empty() && !always_looks_back(model)) {
    try {
      auto reader = std::make_unique<PieceReader>(model, options, piece, pass_capture_factory()(model.device()));
      if (const int64_t most = reader->sizes().back(); piece > most) log::warn_once("pieces of {} tokens are read launch by launch: captured ones hold {} at most (--piece; docs/serving.md)", piece, most);
      return reader;
    } catch (const std::exception& e) {
      reason = e.what();
    }
  }
  if (why != nullptr) *why = reason;
  return nullptr;
}

PieceReader::PieceReader(const LanguageModel& model, const StateOptions& options, int64_t piece, const Capture& capture)
    : model_(model), linear_(model.config(), "linear"), scratch_(model.make_state(2, scratch_options(options, std::min(piece, std::end(kSizes)[-1])))), tokens_(sizes_up_to(piece)) {
  const at::NoGradGuard no_grad;
  const at::Device device = model.device();
  const auto layers = LanguageModel::slots(model.config(), model.compute_dtype(), scratch_.options());
  for (size_t i = 0; i < layers.size(); ++i) {
    for (const SlotSpec& slot : layers[i]) (slot.kind == SlotKind::kPerToken ? rows_ : fixed_).push_back({static_cast<int64_t>(i), slot.name});
  }
  ids_ = at::zeros({1, tokens_.back()}, at::device(device).dtype(at::kLong));
  bounds_ = at::zeros({3}, at::device(device).dtype(at::kInt));
  for (const int64_t size : tokens_) {
    auto pass = std::make_unique<Pass>();
    ModelInput& input = pass->input;
    input.input_ids = ids_.narrow(1, 0, size);
    input.routing = linear_.route({whole_piece(size)}, 1, size);
    input.state = &scratch_;
    // On the host all tokens are the first sequence's, so that rows of all of them are written; the device knows better.
    input.prepared = PreparedInput{input.input_ids, at::arange(size, at::device(device).dtype(at::kInt)).unsqueeze(0), bounds_, {0, size, size}};
    pass->run = [this, pass = pass.get()] { run_anew(*pass); };
    if (capture) {
      bounds_.copy_(at::tensor({0, static_cast<int32_t>(size), static_cast<int32_t>(size)}, at::kInt));
      pass->run = capture(pass->run);
    }
    passes_.push_back(std::move(pass));
  }
}

void PieceReader::run_anew(Pass& pass) {
  scratch_.clear(0);
  scratch_.clear(1);
  pass.hidden = model_.hidden(pass.input);
}

bool PieceReader::takes(const Routings& routings, int64_t count) const {
  if (count > tokens_.back()) return false;
  const Routings& own = passes_.front()->input.routing;
  for (size_t i = 0; i < static_cast<size_t>(model_.config().num_layers); ++i) {
    const auto of = [&](const Routings& all) { return only_mixer(*all[all.size() == 1 ? 0 : i]); };
    const std::string mixer = of(routings);
    if (mixer.empty() || mixer != of(own)) return false;
    if (routings.size() == 1 && own.size() == 1) break;
  }
  return true;
}

at::Tensor PieceReader::read(State& one, std::span<const int32_t> ids) {
  const auto n = static_cast<int64_t>(ids.size());
  const size_t place = static_cast<size_t>(std::lower_bound(tokens_.begin(), tokens_.end(), n) - tokens_.begin());
  TORCH_CHECK(n > 0 && place < tokens_.size() && one.sequences() == 1, "piece reader: ", n, " tokens of ", one.sequences(), " sequences");
  Pass& pass = *passes_[place];
  const int64_t size = tokens_[place];
  one.prepare({n});  // what may fail does so before anything is written
  std::vector<int64_t> padded(static_cast<size_t>(size), 0);
  std::copy(ids.begin(), ids.end(), padded.begin());
  ids_.narrow(1, 0, size).copy_(to_device(at::tensor(padded, at::kLong).unsqueeze(0), ids_.device()));
  bounds_.copy_(to_device(at::tensor({0, static_cast<int32_t>(n), static_cast<int32_t>(size)}, at::kInt), ids_.device()));
  ops::Copies copies;
  const auto scratch = [&](const Slot& slot) { return scratch_.layer(slot.layer).tensor(slot.name).narrow(0, 0, 1); };
  for (const Slot& slot : fixed_) copies.add(scratch(slot), one.layer(slot.layer).tensor(slot.name));
  copies.run();
  pass.run();
  for (const Slot& slot : fixed_) copies.add(one.layer(slot.layer).tensor(slot.name), scratch(slot));
  for (const Slot& slot : rows_) one.append(slot.layer, slot.name, scratch_.row_memory(slot.layer, slot.name).narrow(0, 0, n).unsqueeze(0), nullptr, &copies);
  copies.run();
  one.advance({n});
  return pass.hidden.squeeze(0).narrow(0, 0, n);
}

}  // namespace oryx::serve
