#include "oryx/data/dataset.h"

#include <nlohmann/json.hpp>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/utf8.h"

namespace oryx {

namespace fs = std::filesystem;

namespace {

SplitInfo parse_split(const nlohmann::json& json) {
  return {json.at("documents").get<uint64_t>(), json.at("tokens").get<uint64_t>(), json.at("bytes").get<uint64_t>()};
}

DatasetInfo parse_info(const fs::path& path) {
  const std::string text = read_file(path);
  DatasetInfo info;
  try {
    const auto json = nlohmann::json::parse(text);
    if (json.at("format").get<std::string>() != "oryx dataset 1") {
      fail("{}: format '{}', expected 'oryx dataset 1'", path.string(), shown(json.at("format").get<std::string>(), 40));
    }
    info.train = parse_split(json.at("train"));
    info.valid = parse_split(json.at("valid"));
    info.empty_documents = json.at("empty_documents").get<uint64_t>();
    const auto& tokenizer = json.at("tokenizer");
    info.tokenizer_file = tokenizer.at("file").get<std::string>();
    info.vocab_size = tokenizer.at("vocab_size").get<int64_t>();
    info.fingerprint = parse_fingerprint(tokenizer.at("fingerprint").get<std::string>());
    info.sources = json.at("sources").get<std::vector<std::string>>();
  } catch (const nlohmann::json::exception& e) {
    const std::string_view reason = e.what();  // "[json.exception.out_of_range.403] key 'format' not found"
    const size_t end = reason.find("] ");
    fail("{}: not the description of a data set ({})", path.string(), shown(end == std::string_view::npos ? reason : reason.substr(end + 2), 200));
  }
  if (fs::path(info.tokenizer_file).filename() != info.tokenizer_file) {
    fail("{}: tokeniser file '{}' is not a plain name", path.string(), shown(info.tokenizer_file));
  }
  return info;
}

std::shared_ptr<const TokenFile> open_split(const fs::path& path, const SplitInfo& split, const DatasetInfo& info) {
  auto file = std::make_shared<TokenFile>(path);
  const auto& h = file->header();
  if (h.tokens != split.tokens || h.documents != split.documents) {
    fail("{}: {} tokens in {} documents, but dataset.json says {} in {}; build the data set again", path.string(),
         h.tokens, h.documents, split.tokens, split.documents);
  }
  if (h.fingerprint != info.fingerprint || h.vocab_size != static_cast<uint64_t>(info.vocab_size)) {
    fail("{}: made with tokeniser {}, but dataset.json names {}; build the data set again", path.string(),
         fingerprint_text(h.fingerprint), fingerprint_text(info.fingerprint));
  }
  return file;
}

}  // namespace

Dataset open_dataset(const fs::path& folder) {
  if (!fs::exists(folder / "dataset.json")) {
    fail("{}: not a data set (no dataset.json); make one with: oryx data build TEXT --tokenizer FILE --out {}",
         folder.string(), folder.string());
  }
  Dataset d;
  d.info = parse_info(folder / "dataset.json");
  d.tokenizer = load_tokenizer(folder / d.info.tokenizer_file);
  if (d.tokenizer->fingerprint() != d.info.fingerprint) {
    fail("{}: tokeniser {}, but dataset.json names {}; build the data set again",
         (folder / d.info.tokenizer_file).string(), fingerprint_text(d.tokenizer->fingerprint()),
         fingerprint_text(d.info.fingerprint));
  }
  d.train = open_split(folder / "train.tok", d.info.train, d.info);
  d.valid = open_split(folder / "valid.tok", d.info.valid, d.info);
  return d;
}

}  // namespace oryx
