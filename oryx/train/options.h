// Everything that a training run is told: a JSON file plus key=value overrides (docs/training.md lists the keys).
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "oryx/common/options.h"
#include "oryx/model/config.h"

namespace oryx {

enum class Precision { kFloat32, kBfloat16 };
enum class CudaGraph { kAuto, kOn, kOff };

struct TrainOptions {
  std::string data, out;
  std::string preset = "tiny";
  ModelConfig model;  // the preset's, then the model.* keys
  int64_t steps = 1000, batch_size = 8, seq_len = 512, accumulate = 1;
  int64_t seed = 0;
  Precision precision = Precision::kFloat32;
  std::string device = "cpu";
  CudaGraph cuda_graph = CudaGraph::kAuto;
  bool checkpoint_layers = false;

  double lr = 6e-4, min_lr_ratio = 0.1;
  int64_t warmup_steps = 100;
  double weight_decay = 0.1, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, clip = 1.0, z_loss = 0;

  std::string schedule;  // "": random with the two keys below where a layer selects among mixers
  double attention_share = 0.25;
  int64_t chunk = 256;

  int64_t log_every = 10, validate_every = 200, validate_tokens = 65536, save_every = 500, keep_checkpoints = 2;
  std::vector<std::string> validate_schedules;  // empty: every mixer alone, and the training schedule

  void describe(Fields& f);
  void validate() const;
  // The schedule that training uses, spelled out.
  std::string training_schedule() const;
  std::vector<std::string> validation_schedules() const;
};

// The file (or none, when the path is empty) and the overrides: the preset first, then what they say of the model. The vocabulary is
// the data set's, rounded up to a multiple of 64, unless model.vocab_size is given. Throws Error.
TrainOptions load_train_options(const std::filesystem::path& file, const std::vector<std::string>& overrides, int64_t data_vocab_size = 0);

// The keys as a Markdown table, but for model.*, which docs/model.md lists.
std::string train_options_table();

}  // namespace oryx
