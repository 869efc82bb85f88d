#include "oryx/train/run_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <sstream>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/options.h"
#include "oryx/model/checkpoint.h"

namespace oryx {

namespace fs = std::filesystem;

namespace {

constexpr std::string_view kPrefix = "step-", kPartial = ".partial", kReplaced = ".old.partial";

std::optional<int64_t> step_of(const fs::path& folder) {
  const std::string name = folder.filename().string();
  if (name.rfind(kPrefix, 0) != 0) return {};
  int64_t step = 0;
  const auto [end, error] = std::from_chars(name.data() + kPrefix.size(), name.data() + name.size(), step);
  return error == std::errc() && end == name.data() + name.size() ? std::optional(step) : std::nullopt;
}

// A line of ours; anything else in the file (half a line, another tool's) is dropped.
bool is_metrics_line(const Json& json) {
  if (!json.is_object() || !json.value("kind", Json()).is_string() || !json.value("step", Json()).is_number_integer()) return false;
  const auto number = [&](const char* key) { return json.value(key, Json()).is_number(); };
  if (json["kind"] == "train") return number("loss") && number("lr") && number("gradient_norm") && number("tokens_per_second");
  if (json["kind"] == "validation") return json.value("schedule", Json()).is_string() && number("loss");
  return json["kind"] == "skipped";
}

// A folder goes under its own name or not at all: a process killed while it removes files leaves no half checkpoint.
void remove_checkpoint(const fs::path& folder) {
  const fs::path partial = folder.string() + std::string(kPartial);
  std::error_code error;
  fs::rename(folder, partial, error);
  if (!error) fs::remove_all(partial, error);
}

void remove_partial(const fs::path& checkpoints) {
  std::error_code error;
  std::vector<fs::path> found;
  for (fs::directory_iterator entry(checkpoints, error), end; !error && entry != end; entry.increment(error)) {
    if (entry->path().extension() == kPartial) found.push_back(entry->path());
  }
  for (const auto& path : found) fs::remove_all(path, error);
}

// A process killed while it put a checkpoint in the place of an older one of the same step left the older one aside.
void bring_back_replaced(const fs::path& checkpoints) {
  std::error_code error;
  std::vector<fs::path> found;
  for (fs::directory_iterator entry(checkpoints, error), end; !error && entry != end; entry.increment(error)) found.push_back(entry->path());
  for (const auto& path : found) {
    const std::string name = path.string();
    if (!name.ends_with(kReplaced)) continue;
    const fs::path own = name.substr(0, name.size() - kReplaced.size());
    if (!fs::exists(own, error)) rename_path(path, own);
  }
}

}  // namespace

RunFolder::~RunFolder() {
  if (lock_ >= 0) ::close(lock_);
}

void RunFolder::lock() {
  make_folders(folder_);
  const std::string name = (folder_ / "lock").string();
  lock_ = ::open(name.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (lock_ < 0) fail_errno(name, "open");
  if (::flock(lock_, LOCK_EX | LOCK_NB) == 0) return;
  if (errno != EWOULDBLOCK) fail_errno(name, "lock");
  fail("{}: another process is training in this folder; wait for it, or choose another out=DIR", folder_.string());
}

std::vector<int64_t> RunFolder::checkpoints() const {
  std::vector<int64_t> steps;
  if (!fs::is_directory(folder_ / "checkpoints")) return steps;
  for (const auto& entry : fs::directory_iterator(folder_ / "checkpoints")) {
    if (const auto step = step_of(entry.path())) steps.push_back(*step);
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

fs::path RunFolder::checkpoint(int64_t step) const { return folder_ / "checkpoints" / fmt::format("{}{:09}", kPrefix, step); }

void RunFolder::save(int64_t step, const LanguageModel& model, const Optimizer& optimizer, const Json& trainer, const Tokenizer* tokenizer,
                     int64_t keep) const {
  const fs::path final_name = checkpoint(step), partial = final_name.string() + std::string(kPartial);
  make_folders(final_name.parent_path());
  remove_partial(final_name.parent_path());
  try {
    save_model(model, partial);
    write_safetensors(partial / "optimizer.safetensors", optimizer.state(), {{"format", "oryx-adamw"}});
    if (tokenizer != nullptr) tokenizer->save(partial / tokenizer->file_name());
    write_file(partial / "trainer.json", trainer.dump(2) + "\n");
    if (std::error_code error; fs::exists(metrics(), error)) sync_file(metrics());  // a checkpoint's metrics are on disk before it is
    publish(partial, final_name);
  } catch (const Error&) {
    std::error_code ignored;
    fs::remove_all(partial, ignored);  // a full disk gets its space back
    throw;
  }
  point_to_newest();
  sync_folder(folder_);  // the link is on disk before what it pointed to is removed
  const auto steps = checkpoints();
  for (size_t i = 0; i + static_cast<size_t>(keep) < steps.size(); ++i) remove_checkpoint(checkpoint(steps[i]));
}

void RunFolder::publish(const fs::path& partial, const fs::path& final_name) {
  const fs::path aside = final_name.string() + std::string(kReplaced);  // the same step, saved before
  const bool replaces = fs::exists(final_name);
  if (replaces) rename_path(final_name, aside);
  try {
    rename_path(partial, final_name);
  } catch (const Error&) {
    if (replaces) rename_path(aside, final_name);
    throw;
  }
  sync_folder(final_name.parent_path());
  std::error_code ignored;
  fs::remove_all(aside, ignored);
}

void RunFolder::point_to_newest() const {
  const auto steps = checkpoints();
  if (steps.empty()) return;
  const fs::path link = folder_ / "model", target = fs::path("checkpoints") / checkpoint(steps.back()).filename();
  std::error_code error;
  if (fs::read_symlink(link, error) == target && !error) return;
  replace_link(link, target);
}

void RunFolder::clean() const {
  for (const char* name : {"config.json", "metrics.jsonl", "report.html"}) remove_temporaries(folder_, name);
  bring_back_replaced(folder_ / "checkpoints");
  remove_partial(folder_ / "checkpoints");
}

Json RunFolder::load(int64_t step, LanguageModel& model, Optimizer& optimizer) const {
  const fs::path folder = checkpoint(step);
  const ModelConfig config = load_options<ModelConfig>(folder / "config.json");
  if (dump_options(config) != dump_options(model.config())) {
    fail("{}: its config.json is not the model of this run; was the run folder's config changed?", folder.string());
  }
  const Json trainer = read_json_file(folder / "trainer.json");
  const bool whole = trainer.is_object() && trainer.contains("data") && trainer.value("step", Json()).is_number_unsigned() &&
                     trainer["step"] == step && trainer.value("optimizer_steps", Json()).is_number_unsigned() &&
                     trainer["optimizer_steps"] <= step;
  if (!whole) fail("{}: lacks step (the folder's), optimizer_steps or data; is this a checkpoint of the trainer?", (folder / "trainer.json").string());
  optimizer.prepare_load();
  load_parameters(model, SafetensorsReader(folder / "model.safetensors"));
  optimizer.load(SafetensorsReader(folder / "optimizer.safetensors"), trainer["optimizer_steps"].get<int64_t>());
  return trainer;
}

void RunFolder::log(const Json& line) const { append_line(metrics(), line.dump()); }

std::vector<Json> RunFolder::rewind_metrics(int64_t step) const {
  std::vector<Json> kept;
  if (!fs::exists(metrics())) return kept;
  std::istringstream in(read_file(metrics()));
  std::string text;
  for (std::string line; std::getline(in, line);) {
    const Json json = Json::parse(line, nullptr, false);
    if (!is_metrics_line(json) || json["step"].get<int64_t>() > step) continue;
    kept.push_back(json);
    text += line + '\n';
  }
  write_file(metrics(), text);
  return kept;
}

}  // namespace oryx
