#include "oryx/data/loader.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <bit>
#include <nlohmann/json.hpp>

#include "oryx/common/error.h"
#include "oryx/common/random.h"
#include "oryx/data/tokenizer.h"

namespace oryx {

namespace {
constexpr int kFeistelRounds = 6;
}

Permutation::Permutation(uint64_t n, uint64_t seed, uint64_t epoch) : n_(n), seed_(seed), epoch_(epoch) {
  TORCH_CHECK(n > 0 && n <= uint64_t{1} << 60, "Permutation of ", n);
  half_bits_ = (std::bit_width(n - 1) + 1) / 2;
}

uint64_t Permutation::operator()(uint64_t i) const {
  TORCH_CHECK(i < n_, "Permutation: ", i, " of ", n_);
  const uint32_t mask = (uint64_t{1} << half_bits_) - 1;
  const std::array<uint32_t, 2> key = {static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32)};
  do {
    auto left = static_cast<uint32_t>(i >> half_bits_), right = static_cast<uint32_t>(i) & mask;
    for (uint32_t round = 0; round < kFeistelRounds; ++round) {
      const auto mixed =
          philox({right, round, static_cast<uint32_t>(epoch_), static_cast<uint32_t>(epoch_ >> 32)}, key)[0];
      left = std::exchange(right, (left ^ mixed) & mask);
    }
    i = uint64_t{left} << half_bits_ | right;
  } while (i >= n_);
  return i;
}

void to_json(nlohmann::json& json, const LoaderPosition& p) {
  json = {{"epoch", p.epoch},
          {"document", p.document},
          {"offset", p.offset},
          {"data", fingerprint_text(p.data)},
          {"seed", p.seed}};
}

void from_json(const nlohmann::json& json, LoaderPosition& p) {
  try {
    p.epoch = json.at("epoch").get<uint64_t>();
    p.document = json.at("document").get<uint64_t>();
    p.offset = json.at("offset").get<uint64_t>();
    p.data = parse_fingerprint(json.at("data").get<std::string>());
    p.seed = json.at("seed").get<uint64_t>();
  } catch (const nlohmann::json::exception& e) {
    fail("position of the data loader: {}; expected epoch, document, offset, data and seed", e.what());
  }
}

TrainLoader::TrainLoader(std::shared_ptr<const TokenFile> file, const LoaderOptions& options)
    : file_(std::move(file)), options_(options), order_(std::max<uint64_t>(file_->documents(), 1), options.seed, 0) {
  if (file_->tokens() < 2) fail("{}: holds {} tokens; there is nothing to train on", file_->path(), file_->tokens());
  TORCH_CHECK(options.batch_size > 0 && options.seq_len > 0, "TrainLoader: batch ", options.batch_size, " x ",
              options.seq_len);
  TORCH_CHECK(options.world > 0 && options.rank >= 0 && options.rank < options.world, "TrainLoader: rank ",
              options.rank, " of ", options.world);
  position_.data = file_->identity();
  position_.seed = options.seed;
}

Batch TrainLoader::next() {
  BatchBuilder builder(options_.batch_size, options_.seq_len);
  for (int rank = 0; rank < options_.world; ++rank) {
    for (int64_t row = 0; row < options_.batch_size; ++row) next_row(rank == options_.rank ? &builder : nullptr);
  }
  return builder.finish();
}

void TrainLoader::next_row(BatchBuilder* builder) {
  for (auto left = static_cast<uint64_t>(options_.seq_len); left > 0;) {
    const uint64_t document = order_(position_.document);
    const uint64_t rest = file_->document_size(document) - position_.offset;
    const uint64_t n = std::min(left, rest);
    if (builder != nullptr) {
      const bool continues = n < rest;
      buffer_.resize(n + continues);
      file_->read(file_->document_begin(document) + position_.offset, buffer_);
      builder->add(buffer_, continues);
    }
    left -= advance(n);
  }
}

// A document whose last token alone is left would give a sequence without a target; the row takes it all the same, so
// that a position in tokens is a position in targets.
uint64_t TrainLoader::advance(uint64_t tokens) {
  position_.offset += tokens;
  if (position_.offset < file_->document_size(order_(position_.document))) return tokens;
  position_.offset = 0;
  if (++position_.document == file_->documents()) {
    position_.document = 0;
    order_ = Permutation(file_->documents(), options_.seed, ++position_.epoch);
  }
  return tokens;
}

void TrainLoader::seek(const LoaderPosition& position) {
  if (position.data != file_->identity()) {
    fail("{}: not the data that this training began with ({}, expected {})", file_->path(),
         fingerprint_text(file_->identity()), fingerprint_text(position.data));
  }
  if (position.seed != options_.seed) {
    fail("data seed {}: this training began with seed {}", options_.seed, position.seed);
  }
  const Permutation order(file_->documents(), options_.seed, position.epoch);
  if (position.document >= file_->documents() || position.offset >= file_->document_size(order(position.document))) {
    fail("position of the data loader: document {} offset {} is not in {}", position.document, position.offset,
         file_->path());
  }
  position_ = position;
  order_ = order;
}

EvalReader::EvalReader(std::shared_ptr<const TokenFile> file, const EvalOptions& options)
    : file_(std::move(file)), options_(options) {
  TORCH_CHECK(options.seq_len > 0, "EvalReader: windows of ", options.seq_len);
  uint64_t longest = 0;
  for (uint64_t i = 0; i < file_->documents(); ++i) longest = std::max(longest, file_->document_size(i));
  if (longest < 2) fail("{}: no document has two tokens; there is nothing to score", file_->path());
  // Memory for a batch is taken whole: not for more than the file can fill.
  options_.seq_len = std::min(options_.seq_len, static_cast<int64_t>(longest));
  options_.tokens_per_batch = std::min(std::max(options_.tokens_per_batch, options_.seq_len), static_cast<int64_t>(file_->tokens()));
}

bool EvalReader::at_end() {
  while (document_ < file_->documents() && begin_ + 1 >= file_->document_size(document_)) {
    ++document_;
    begin_ = 0;
    if (options_.max_tokens > 0 && given_ >= options_.max_tokens) document_ = file_->documents();
  }
  return document_ == file_->documents();
}

std::optional<EvalBatch> EvalReader::next() {
  if (at_end()) return std::nullopt;
  BatchBuilder builder(1, options_.tokens_per_batch);
  std::vector<EvalWindow> windows;
  while (!builder.full() && !at_end()) {
    const uint64_t inputs = file_->document_size(document_) - 1 - begin_;
    const uint64_t n = std::min<uint64_t>(inputs, options_.seq_len);
    if (n > static_cast<uint64_t>(builder.free_in_row())) break;
    buffer_.resize(n + 1);
    file_->read(file_->document_begin(document_) + begin_, buffer_);
    builder.add(buffer_, true);
    windows.push_back({document_, begin_});
    begin_ += n;
    given_ += n;
  }
  return EvalBatch{builder.finish(), std::move(windows)};
}

}  // namespace oryx
