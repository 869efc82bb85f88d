#include "oryx/train/options.h"

#include <algorithm>

#include "oryx/model/device.h"
#include "oryx/model/scheduling.h"

namespace oryx {

void TrainOptions::describe(Fields& f) {
  f.add("data", data, "data set folder, as `oryx data build` writes it");
  f.add("out", out, "run folder: checkpoints, metrics, report");
  f.add("preset", preset, "the model to start from: SIZE or SIZE-VARIANT, see `oryx inspect --list`");
  f.add("steps", steps, "optimiser steps", at_least(1));
  f.add("batch_size", batch_size, "rows of a batch", at_least(1));
  f.add("seq_len", seq_len, "tokens of a row", at_least(2));
  f.add("accumulate", accumulate, "batches whose gradients make one step", at_least(1));
  f.add("seed", seed, "of initialisation, data order and modes", at_least(0));
  f.add("precision", precision, "of activations and matrix products; parameters are float32 always",
        {{"float32", Precision::kFloat32}, {"bfloat16", Precision::kBfloat16}});
  f.add("device", device, "where the model runs: cpu, cuda or cuda:N (docs/cuda.md)");
  f.add("cuda_graph", cuda_graph, "on a GPU each kind of step is captured once and then launched whole; auto: where it can be and there is memory to spare",
        {{"auto", CudaGraph::kAuto}, {"on", CudaGraph::kOn}, {"off", CudaGraph::kOff}});
  f.add("checkpoint_layers", checkpoint_layers, "recompute each layer's activations in the backward pass: less memory, a third more time");
  f.add("lr", lr, "peak learning rate", above(0));
  f.add("min_lr_ratio", min_lr_ratio, "the cosine ends at this share of lr", between(0, 1));
  f.add("warmup_steps", warmup_steps, "of the linear warm-up", at_least(0));
  f.add("weight_decay", weight_decay, "decoupled; none on norms, decays and convolution filters", at_least(0));
  f.add("beta1", beta1, "AdamW's first moment", between(0, 1));
  f.add("beta2", beta2, "AdamW's second moment", between(0, 1));
  f.add("eps", eps, "AdamW's epsilon", above(0));
  f.add("clip", clip, "largest global gradient norm; 0: no clipping", at_least(0));
  f.add("z_loss", z_loss, "weight of log^2 Z in the loss", at_least(0));
  f.add("schedule", schedule, "modes in training, see docs/modes.md; empty: random with attention_share and chunk");
  f.add("attention_share", attention_share, "probability that a chunk is in attention", between(0, 1));
  f.add("chunk", chunk, "tokens of a chunk that takes one mode", at_least(1));
  f.add("log_every", log_every, "steps between metrics lines", at_least(1));
  f.add("validate_every", validate_every, "steps between validations; 0: never", at_least(0));
  f.add("validate_tokens", validate_tokens, "held-out tokens of a validation", at_least(1));
  f.add("validate_schedules", validate_schedules, "schedules to validate; empty: every mixer alone, and the training schedule");
  f.add("save_every", save_every, "steps between checkpoints; the last step is always saved", at_least(1));
  f.add("keep_checkpoints", keep_checkpoints, "older checkpoints are removed", at_least(1));
  f.group("model", model);
}

void TrainOptions::validate() const {
  model.validate();
  const at::Device where = parse_device(device);
  if (cuda_graph == CudaGraph::kOn && !where.is_cuda()) fail("cuda_graph is on, but device is '{}'; expected device=cuda, or cuda_graph=auto or off", device);
  if (beta1 >= 1 || beta2 >= 1) fail("beta1 is {} and beta2 is {}, expected both below 1", beta1, beta2);
  if (batch_size > INT32_MAX / seq_len) fail("batch_size {} x seq_len {} is more tokens than a batch can hold (2^31)", batch_size, seq_len);
  if (warmup_steps >= steps) fail("warmup_steps is {}, expected less than steps {}", warmup_steps, steps);
  (void)ModelSchedule(model, training_schedule());
  for (const auto& s : validation_schedules()) (void)ModelSchedule(model, s);
}

namespace {

// Whether tokens choose among mixers anywhere.
bool selects_modes(const ModelConfig& model) {
  return model.layer.combine == "select" &&
         std::any_of(model.layer_mixers.begin(), model.layer_mixers.end(), [](const auto& l) { return l.size() > 1; });
}

}  // namespace

std::string TrainOptions::training_schedule() const {
  if (!schedule.empty()) return schedule;
  const auto mixers = model.mixers();
  if (!selects_modes(model)) return "linear";
  // Where no layer has attention its windowed form takes attention's share. Further mixers divide the rest evenly with the first; where
  // nothing looks back all of them divide the whole. None is left untrained.
  std::string looks_back;
  for (const char* name : {"sliding_window", "attention"}) {
    if (std::find(mixers.begin(), mixers.end(), name) != mixers.end()) looks_back = name;
  }
  const double rest = looks_back.empty() ? 1.0 : 1.0 - attention_share;
  const double each = rest / static_cast<double>(mixers.size() - (looks_back.empty() ? 0 : 1));
  std::string text = "random(";
  for (size_t i = 0; i < mixers.size(); ++i) {
    const bool first = i == 0 && mixers[i] != looks_back;  // takes what is left
    if (!first) text += fmt::format("{}={};", mixers[i], mixers[i] == looks_back ? attention_share : each);
  }
  return text + fmt::format("chunk={})", chunk);
}

std::vector<std::string> TrainOptions::validation_schedules() const {
  if (!validate_schedules.empty()) return validate_schedules;
  std::vector<std::string> all = model.mixers();
  if (!selects_modes(model)) return all.size() == 1 ? all : std::vector<std::string>{"linear"};
  all.push_back(training_schedule());
  return all;
}

namespace {

// The value of a string key in the file or, later and stronger, among the overrides.
bool given(const Json& json, const std::vector<std::string>& overrides, const std::string& group, const std::string& key, std::string* value) {
  bool found = false;
  const Json* at = &json;
  if (!group.empty()) at = json.contains(group) ? &json[group] : nullptr;
  if (at != nullptr && at->is_object() && at->contains(key)) {
    found = true;
    if ((*at)[key].is_string()) *value = (*at)[key].get<std::string>();
  }
  const std::string name = (group.empty() ? "" : group + ".") + key + "=";
  for (const auto& o : overrides) {
    if (o.rfind(name, 0) != 0) continue;
    found = true;
    *value = override_string(std::string_view(o).substr(name.size()));
  }
  return found;
}

}  // namespace

TrainOptions load_train_options(const std::filesystem::path& file, const std::vector<std::string>& overrides, int64_t data_vocab_size) {
  const Json json = file.empty() ? Json::object() : read_json_file(file);
  TrainOptions o;
  std::string name = o.preset, ignored;
  given(json, overrides, "", "preset", &name);
  o.model = preset(name);
  if (data_vocab_size > 0 && !given(json, overrides, "model", "vocab_size", &ignored)) o.model.vocab_size = (data_vocab_size + 63) / 64 * 64;
  read_options(o, json, file.empty() ? "options" : file.string(), overrides);
  if (data_vocab_size > o.model.vocab_size) {
    fail("model.vocab_size is {}, but the data set's tokeniser has {} tokens", o.model.vocab_size, data_vocab_size);
  }
  return o;
}

std::string train_options_table() {
  const std::string all = options_table<TrainOptions>();
  return all.substr(0, all.find("| `model."));  // the group stands last
}

}  // namespace oryx
