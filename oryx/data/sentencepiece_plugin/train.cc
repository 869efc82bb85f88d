#include <sentencepiece_trainer.h>

#include <algorithm>
#include <optional>

#include "oryx/common/error.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/log.h"
#include "oryx/common/progress.h"
#include "oryx/common/random.h"
#include "oryx/data/sentencepiece_plugin/plugin.h"

namespace oryx {

namespace {

constexpr size_t kSampledBytes = 16 << 10;  // bytes of consecutive lines that are sampled together
constexpr size_t kSentence = 4 << 10;    // bytes: SentencePiece passes over what is longer than max_sentence_length
constexpr int64_t kSmallest = 261 + 64;  // unk, bos, eos, newline, tab, 256 bytes, and some characters

// A uniform sample of bounded size from a stream of unknown length: every piece draws a priority from its number, and
// the smallest are kept. Unlike a reservoir it depends on nothing but (seed, number).
class Sample {
 public:
  Sample(uint64_t limit, uint64_t seed) : limit_(limit), seed_(seed) {}

  void add(std::string_view text) {
    for (size_t begin = 0; begin < text.size();) {
      size_t end = std::min(begin + kSampledBytes, text.size());
      const size_t newline = text.find('\n', end);
      if (newline != std::string_view::npos && newline - begin < 2 * kSampledBytes) end = newline + 1;
      while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) ++end;
      add_piece(text.substr(begin, end - begin));
      begin = end;
    }
  }

  // In the order of the text.
  std::vector<std::string> take() {
    std::sort(heap_.begin(), heap_.end(), [](const Piece& a, const Piece& b) { return a.number < b.number; });
    std::vector<std::string> texts;
    for (auto& p : heap_) texts.push_back(std::move(p.text));
    return texts;
  }

 private:
  struct Piece {
    uint64_t priority, number;
    std::string text;
    bool operator<(const Piece& o) const { return std::tie(priority, number) < std::tie(o.priority, o.number); }
  };

  void add_piece(std::string_view text) {
    const uint64_t priority = CounterRng(seed_, count_).next64(), number = count_++;
    if (size_ >= limit_ && priority >= heap_.front().priority) return;
    heap_.push_back({priority, number, std::string(text)});
    std::push_heap(heap_.begin(), heap_.end());
    size_ += text.size();
    while (size_ - heap_.front().text.size() >= limit_) {
      size_ -= heap_.front().text.size();
      std::pop_heap(heap_.begin(), heap_.end());
      heap_.pop_back();
    }
  }

  uint64_t limit_, seed_, size_ = 0, count_ = 0;
  std::vector<Piece> heap_;  // the largest priority in front
};

// Lines without newline and tab (the trainer reserves the tab), long ones cut before a space.
std::vector<std::string> sentences(std::vector<std::string> pieces) {
  std::vector<std::string> out;
  for (auto& piece : pieces) {
    for (size_t i = 0; i < piece.size();) {
      const size_t end = std::min(piece.find_first_of("\n\t", i), piece.size());
      size_t size = end - i;
      if (size > kSentence) {
        const size_t space = piece.rfind(' ', i + kSentence);
        size = space != std::string::npos && space > i ? space - i : kSentence;
        while (i + size < end && (static_cast<unsigned char>(piece[i + size]) & 0xC0) == 0x80) ++size;
      }
      if (size > 0) out.push_back(piece.substr(i, size));
      i += size;
      if (i == end) ++i;
    }
    piece = {};
  }
  return out;
}

class Sentences : public sentencepiece::SentenceIterator {
 public:
  explicit Sentences(std::vector<std::string> list) : list_(std::move(list)) {}
  bool done() const override { return next_ >= list_.size(); }
  void Next() override { ++next_; }
  const std::string& value() const override { return list_[next_]; }
  sentencepiece::util::Status status() const override { return {}; }

 private:
  std::vector<std::string> list_;
  size_t next_ = 0;
};

std::vector<std::string> read_sample(TextSource& source, const SentencePieceTraining& options) {
  Sample sample(options.sample_bytes, options.seed);
  std::unique_ptr<ProgressBar> bar;
  if (options.progress)
    bar = std::make_unique<ProgressBar>("sampling", static_cast<int64_t>(source.total_bytes()), "B");
  for (Document d; source.next(d);) {
    sample.add(d.text);
    check_interrupt();
    if (bar) bar->update(static_cast<int64_t>(source.consumed_bytes()));
  }
  return sample.take();
}

}  // namespace

std::unique_ptr<Tokenizer> sentencepiece_plugin::train(TextSource& source, const SentencePieceTraining& options) {
  if (options.vocab_size < kSmallest || options.vocab_size > 1 << 20) {
    fail("vocabulary size {}: expected {} (the bytes and some characters) to {}", options.vocab_size, kSmallest,
         1 << 20);
  }
  std::vector<std::string> list = sentences(read_sample(source, options));
  if (list.empty()) fail("no text to learn a tokeniser from: the documents are empty");
  uint64_t bytes = 0;
  for (const auto& s : list) bytes += s.size() + 1;
  if (options.progress) {
    log::info("learning {} pieces from {} of text", human_count(static_cast<double>(options.vocab_size)),
              human_bytes(static_cast<double>(bytes)));
  }
  Sentences iterator(std::move(list));
  std::string model;
  std::optional<InterruptsEndAtOnce> interrupts(std::in_place);
  const auto status =
      sentencepiece::SentencePieceTrainer::Train({{"model_type", "bpe"},
                                                  {"vocab_size", std::to_string(options.vocab_size)},
                                                  {"hard_vocab_limit", "false"},
                                                  {"byte_fallback", "true"},
                                                  {"split_digits", "true"},
                                                  {"character_coverage", "0.9995"},
                                                  {"normalization_rule_name", "identity"},
                                                  {"add_dummy_prefix", "false"},
                                                  {"remove_extra_whitespaces", "false"},
                                                  {"allow_whitespace_only_pieces", "true"},
                                                  {"user_defined_symbols", "\n,\t"},
                                                  {"unk_id", "0"},
                                                  {"bos_id", "1"},
                                                  {"eos_id", "2"},
                                                  {"pad_id", "-1"},
                                                  {"max_sentence_length", std::to_string(2 * kSentence)},
                                                  {"num_threads", "1"},
                                                  {"minloglevel", "2"}},
                                                 &iterator, &model);
  interrupts.reset();
  if (!status.ok()) {
    std::string reason = status.ToString();
    std::replace(reason.begin(), reason.end(), '\n', ' ');
    fail("SentencePiece could not learn {} pieces from {} of text: {}", options.vocab_size,
         human_bytes(static_cast<double>(bytes)), reason);
  }
  auto tokenizer = load("the trained model", std::move(model));
  if (tokenizer->vocab_size() != options.vocab_size) {
    log::warn("the text gives {} pieces only, fewer than the {} asked for", tokenizer->vocab_size(),
              options.vocab_size);
  }
  return tokenizer;
}

}  // namespace oryx
