#include <ATen/Parallel.h>

#include <array>
#include <nlohmann/json.hpp>
#include <optional>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/hash.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/log.h"
#include "oryx/common/progress.h"
#include "oryx/common/random.h"
#include "oryx/data/dataset.h"

namespace oryx {

namespace fs = std::filesystem;

namespace {

constexpr size_t kChunk = size_t{8} << 20;  // bytes of text encoded together, by all threads

struct Encoded {
  std::vector<int32_t> ids;
  size_t file = 0;
  double draw = 0;  // from the text's hash, in [0, 1): below the share it is held out
  uint64_t bytes = 0;
};

class Builder {
 public:
  Builder(const std::vector<TextFile>& files, const Tokenizer& tokenizer, const fs::path& out,
          const DatasetOptions& options)
      : files_(files),
        tokenizer_(tokenizer),
        options_(options),
        train_(out / "train.tok", tokenizer.vocab_size(), tokenizer.fingerprint(), options.tokens),
        valid_(out / "valid.tok", tokenizer.vocab_size(), tokenizer.fingerprint(), options.tokens) {
    for (const auto& f : files) {
      const bool held = std::any_of(options.valid_files.begin(), options.valid_files.end(),
                                    [&](const auto& p) { return matches_pattern(f.name, p); });
      held_files_.push_back(held);
    }
  }

  void read_all() {
    TextSource source(files_);
    std::unique_ptr<ProgressBar> bar;
    if (options_.progress)
      bar = std::make_unique<ProgressBar>("tokenising", static_cast<int64_t>(source.total_bytes()), "B");
    std::vector<Document> chunk;
    size_t bytes = 0;
    for (Document d; source.next(d);) {
      bytes += d.text.size();
      chunk.push_back(std::move(d));
      if (bytes < kChunk) continue;
      encode(chunk);
      bytes = 0;
      check_interrupt();
      if (bar) {
        bar->update(static_cast<int64_t>(source.consumed_bytes()),
                    fmt::format("{} tokens", human_count(static_cast<double>(train_.tokens() + valid_.tokens()))));
      }
    }
    encode(chunk);
    if (bar) bar->update(static_cast<int64_t>(source.total_bytes()));
    info.empty_documents = source.empty_documents();
    for (const auto& f : files_) info.sources.push_back(f.name);
  }

  // Decides what was not decided while reading.
  void settle() {
    settle_spare();
    if (info.train.documents == 0)
      fail("no document is left to train on: all are empty, or all belong to the validation set");
    info.train.tokens = train_.tokens();
    info.valid.tokens = valid_.tokens();
  }

  AtomicFile& train_file() { return train_.complete(); }
  AtomicFile& valid_file() { return valid_.complete(); }

  DatasetInfo info;

 private:
  void encode(std::vector<Document>& chunk) {
    std::vector<Encoded> done(chunk.size());
    at::parallel_for(0, static_cast<int64_t>(chunk.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Document& d = chunk[i];
        done[i] = {tokenizer_.encode_document(d.text), d.file, CounterRng(options_.seed, fnv1a(d.text)).uniform(),
                   d.text.size()};
      }
    });
    for (auto& e : done) place(std::move(e));
    chunk.clear();
  }

  void place(Encoded e) {
    if (!options_.valid_files.empty()) return put(e, held_files_[e.file]);
    if (options_.valid <= 0) return put(e, false);
    // The document with the smallest draw stays in hand to the end: it is held out even where the share is too small
    // for any.
    if (!spare_) {
      spare_ = std::move(e);
      return;
    }
    if (e.draw < spare_->draw) std::swap(*spare_, e);
    put(e, e.draw < options_.valid);
  }

  void settle_spare() {
    if (!spare_) return;
    if (info.train.documents + info.valid.documents == 0) return split_only_document();
    put(*spare_, info.train.documents > 0);
  }

  // Both parts are documents again, with bos and eos. The bytes are those of the parts' text.
  void split_only_document() {
    const auto& ids = spare_->ids;
    const auto text = static_cast<int64_t>(ids.size()) - 2;
    if (text < 2) fail("one document of {} token: too little text for training and validation", text);
    const int64_t held =
        std::clamp<int64_t>(static_cast<int64_t>(static_cast<double>(text) * options_.valid), 1, text - 1);
    Encoded head{{ids.begin(), ids.end() - 1 - held}, spare_->file, 0, 0},
        tail{{ids.end() - 1 - held, ids.end()}, spare_->file, 0, 0};
    head.ids.push_back(tokenizer_.eos_id());
    tail.ids.insert(tail.ids.begin(), tokenizer_.bos_id());
    for (const int32_t id : tail.ids) tail.bytes += tokenizer_.token_bytes(id).size();
    head.bytes = spare_->bytes - std::min(spare_->bytes, tail.bytes);
    put(head, false);
    put(tail, true);
  }

  void put(const Encoded& e, bool held) {
    (held ? valid_ : train_).add(e.ids);
    SplitInfo& split = held ? info.valid : info.train;
    ++split.documents;
    split.bytes += e.bytes;
  }

  const std::vector<TextFile>& files_;
  const Tokenizer& tokenizer_;
  const DatasetOptions& options_;
  TokenFileWriter train_, valid_;
  std::vector<char> held_files_;
  std::optional<Encoded> spare_;
};

nlohmann::json split_json(const SplitInfo& s) {
  return {{"documents", s.documents}, {"tokens", s.tokens}, {"bytes", s.bytes}};
}

std::string info_text(const DatasetInfo& info, const DatasetOptions& options) {
  const nlohmann::ordered_json json = {
      {"format", "oryx dataset 1"},
      {"train", split_json(info.train)},
      {"valid", split_json(info.valid)},
      {"empty_documents", info.empty_documents},
      {"tokenizer",
       {{"file", info.tokenizer_file},
        {"vocab_size", info.vocab_size},
        {"fingerprint", fingerprint_text(info.fingerprint)}}},
      {"valid_share", options.valid_files.empty() ? nlohmann::ordered_json(options.valid) : nlohmann::ordered_json()},
      {"seed", options.seed},
      {"sources", info.sources}};
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

// "valid-00.jsonl.zst", "test.txt": as data sets name what they hold out. Of sources and other files a name says nothing.
bool held_out_by_name(const TextFile& f) {
  const std::string name = fs::path(f.name).filename().string(), ending = text_ending(name);
  return (ending == ".txt" || ending == ".jsonl") && (name.starts_with("valid") || name.starts_with("test"));
}

void check_options(const std::vector<TextFile>& files, const fs::path& out, const DatasetOptions& options) {
  if (!(options.valid >= 0 && options.valid < 1))
    fail("share of validation {}: expected 0 or more and below 1", options.valid);
  if (fs::exists(out / "dataset.json") && !options.overwrite) {
    fail("{}: holds a data set already; choose another folder, or replace it with --overwrite", out.string());
  }
  for (const auto& pattern : options.valid_files) {
    if (std::none_of(files.begin(), files.end(), [&](const auto& f) { return matches_pattern(f.name, pattern); })) {
      fail("no text file matches '{}', which names the validation set", pattern);
    }
  }
  if (!options.valid_files.empty()) return;
  for (const auto& f : files) {
    if (!held_out_by_name(f)) continue;
    log::warn("{}: by its name held-out text, used for training too; keep it apart with --valid-files or --exclude",
              f.name);
  }
}

// Made for what is to stand in it: gone again when nothing came to stand there.
class NewFolder {
 public:
  explicit NewFolder(const fs::path& path) : path_(path) {
    std::error_code ignored;
    made_ = !fs::exists(path_, ignored);
    make_folders(path_);
  }
  ~NewFolder() {
    std::error_code ignored;
    if (made_ && fs::is_empty(path_, ignored)) fs::remove(path_, ignored);
  }
  NewFolder(const NewFolder&) = delete;
  NewFolder& operator=(const NewFolder&) = delete;

 private:
  fs::path path_;
  bool made_ = false;
};

}  // namespace

DatasetInfo build_dataset(const std::vector<TextFile>& files, const Tokenizer& tokenizer, const fs::path& out,
                          const DatasetOptions& options) {
  check_options(files, out, options);
  const NewFolder folder(out);
  Builder builder(files, tokenizer, out, options);
  builder.read_all();
  builder.settle();
  DatasetInfo& info = builder.info;
  info.vocab_size = tokenizer.vocab_size();
  info.fingerprint = tokenizer.fingerprint();
  info.tokenizer_file = tokenizer.file_name();
  AtomicFile model(out / info.tokenizer_file), description(out / "dataset.json");
  model.write(tokenizer.serialized());
  description.write(info_text(info, options));
  commit_together(std::array{&builder.train_file(), &builder.valid_file(), &model, &description});
  return info;
}

}  // namespace oryx
