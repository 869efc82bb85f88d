// A training run on disk.
//
//   RUN/config.json             every option, resolved
//   RUN/metrics.jsonl           one JSON object a line: "kind" train, validation or skipped, with "step"
//   RUN/report.html             curves
//   RUN/checkpoints/step-N/     model, tokenizer, optimizer.safetensors, trainer.json: whole or absent
//   RUN/lock                    held by the process that trains here
//   RUN/model                   a link to the newest checkpoint: `oryx eval RUN`, `oryx generate RUN`
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "oryx/common/json.h"
#include "oryx/data/tokenizer.h"
#include "oryx/model/language_model.h"
#include "oryx/train/optimizer.h"

namespace oryx {

class RunFolder {
 public:
  explicit RunFolder(std::filesystem::path folder) : folder_(std::move(folder)) {}
  ~RunFolder();
  RunFolder(const RunFolder&) = delete;
  RunFolder& operator=(const RunFolder&) = delete;

  const std::filesystem::path& path() const { return folder_; }
  std::filesystem::path metrics() const { return folder_ / "metrics.jsonl"; }
  bool exists() const { return std::filesystem::exists(folder_ / "config.json"); }

  // Step numbers of the whole checkpoints, rising.
  std::vector<int64_t> checkpoints() const;
  std::filesystem::path checkpoint(int64_t step) const;

  // Writes a checkpoint under another name and renames the folder; points RUN/model to it; removes all but the newest `keep`. What an
  // interrupted save left is removed first, and on an error what this one wrote. `trainer` is what a resume needs beside parameters and moments.
  void save(int64_t step, const LanguageModel& model, const Optimizer& optimizer, const Json& trainer, const Tokenizer* tokenizer, int64_t keep) const;
  // Loads a checkpoint into model and optimiser and returns its trainer.json. Throws Error.
  Json load(int64_t step, LanguageModel& model, Optimizer& optimizer) const;

  // Holds RUN/lock until this object goes: a second process that trains in the folder is refused. Throws Error. The lock falls with
  // its process, however that ends.
  void lock();

  // What a process that was killed left undone: RUN/model points to the newest checkpoint; partial files and folders go. The caller holds the lock.
  void point_to_newest() const;
  void clean() const;

  // Appends one line to metrics.jsonl; on an error the file is as it was.
  void log(const Json& line) const;
  // All lines up to `step`; later ones, and a half-written last one, are dropped from the file: they will be made again.
  std::vector<Json> rewind_metrics(int64_t step) const;

 private:
  static void publish(const std::filesystem::path& partial, const std::filesystem::path& final_name);

  std::filesystem::path folder_;
  int lock_ = -1;
};

}  // namespace oryx
