#include <algorithm>
#include <cmath>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/random.h"
#include "oryx/data/synthetic.h"

namespace oryx {

namespace {

constexpr const char* kNoise[] = {"The hills were quiet in the morning.", "A cart went slowly along the road.",
                                  "Rain had fallen during the night.", "The baker opened his shop at six.",
                                  "Two birds sat on the roof of the barn."};
constexpr const char* kAdjectives[] = {"amber",  "silver", "crimson", "hollow",  "gentle", "northern",
                                       "rusty",  "velvet", "bright",  "distant", "frozen", "golden",
                                       "humble", "ivory",  "jagged",  "lonely"};
constexpr const char* kNouns[] = {"lantern", "harbour", "orchard", "bridge", "compass", "anchor", "meadow", "chimney",
                                  "violin",  "saddle",  "tunnel",  "ledger", "kettle",  "timber", "paddle", "statue"};
constexpr size_t kLongestSentence = 400;              // bytes; hay without full stops is cut at a space
constexpr int64_t kSmallPrompt = int64_t{1} << 24;    // tokens of a prompt that needs no look at the memory
constexpr uint64_t kLargestHay = uint64_t{16} << 20;  // bytes kept of the documents

// Pieces that end behind a full stop, question or exclamation mark, or behind newlines; together they are `text`. A
// space stays with the sentence after it: that is how words are tokenised.
std::vector<std::string> split_sentences(std::string_view text) {
  std::vector<std::string> out;
  while (!text.empty()) {
    size_t end = text.find_first_of(".?!\n");
    while (end != std::string_view::npos && end + 1 < text.size() && text[end] != '\n' && text[end + 1] != ' ' &&
           text[end + 1] != '\n') {
      end = text.find_first_of(".?!\n", end + 1);
    }
    size_t size = end == std::string_view::npos ? text.size() : end + 1;
    if (size > kLongestSentence) {
      const size_t space = text.rfind(' ', kLongestSentence);
      if (space != std::string_view::npos && space > 0) size = space;
    }
    while (size < text.size() && text[size] == '\n') ++size;
    out.emplace_back(text.substr(0, size));
    text.remove_prefix(size);
  }
  return out;
}

void append(std::vector<int32_t>& to, const std::vector<int32_t>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

}  // namespace

NeedleKind parse_needle_kind(const std::string& name) {
  for (const auto kind : {NeedleKind::noise, NeedleKind::essay_number, NeedleKind::essay_word}) {
    if (name == to_string(kind)) return kind;
  }
  fail("'{}' is not a haystack; expected noise, essay_number or essay_word{}", name,
       did_you_mean(name, {"noise", "essay_number", "essay_word"}));
}

std::string to_string(NeedleKind kind) {
  switch (kind) {
    case NeedleKind::noise:
      return "noise";
    case NeedleKind::essay_number:
      return "essay_number";
    case NeedleKind::essay_word:
      return "essay_word";
  }
  throw std::logic_error("NeedleKind");
}

NeedleTask::NeedleTask(const Tokenizer& tokenizer, NeedleKind kind, const std::vector<std::string>& documents)
    : tokenizer_(tokenizer), kind_(kind) {
  if (kind == NeedleKind::noise) {
    for (const char* s : kNoise) sentences_.push_back(tokenizer.encode(fmt::format(" {}", s)));
    return;
  }
  uint64_t bytes = 0;
  for (const auto& document : documents) {
    if (bytes >= kLargestHay) break;
    for (const auto& s : split_sentences(document)) {
      sentences_.push_back(tokenizer.encode(s));
      bytes += s.size();
    }
  }
  if (sentences_.empty()) fail("needle: {} needs documents for its hay, there are none", to_string(kind));
}

NeedleExample NeedleTask::example(int64_t length, double depth, uint64_t seed, uint64_t index) const {
  if (length > kSmallPrompt) expect_memory(16 * static_cast<double>(length), fmt::format("needle: a prompt of {} tokens", length));
  if (!(depth >= 0 && depth <= 1)) fail("needle: depth {}, expected 0 to 1", depth);
  CounterRng rng(seed, index);
  NeedleExample e;
  const std::string name =
      fmt::format("{} {}", kAdjectives[rng.below(std::size(kAdjectives))], kNouns[rng.below(std::size(kNouns))]);
  const bool word = kind_ == NeedleKind::essay_word;
  e.answer = word ? fmt::format("{:08x}", rng.next32()) : std::to_string(1000000 + rng.below(9000000));
  const char* what = word ? "word" : "number";
  e.needle = fmt::format("The secret {} of the {} is {}.", what, name, e.answer);
  e.question =
      fmt::format("Question: What is the secret {0} of the {1}?\nAnswer: The secret {0} of the {1} is", what, name);

  const auto needle = tokenizer_.encode(" " + e.needle), question = tokenizer_.encode("\n\n" + e.question);
  e.answer_ids = tokenizer_.encode(" " + e.answer);
  const int64_t room = length - 1 - static_cast<int64_t>(needle.size() + question.size());
  if (room < 0) {
    fail("needle: a prompt of {} tokens is too short for needle and question, which take {}", length,
         1 + needle.size() + question.size());
  }
  // Essays are entered at a sentence of the example's own; noise always reads the same.
  const size_t first = kind_ == NeedleKind::noise ? 0 : rng.below(sentences_.size());
  int64_t hay = 0, count = 0;
  const auto sentence = [&](int64_t i) -> const auto& { return sentences_[(first + i) % sentences_.size()]; };
  while (hay + static_cast<int64_t>(sentence(count).size()) <= room) hay += sentence(count++).size();

  e.ids = {tokenizer_.bos_id()};
  const auto put_needle = [&] {
    e.needle_begin = static_cast<int64_t>(e.ids.size());
    append(e.ids, needle);
    e.needle_end = static_cast<int64_t>(e.ids.size());
  };
  const double before = depth * static_cast<double>(hay);
  for (int64_t i = 0; i < count; ++i) {
    // The needle goes to the border nearest to where it should stand.
    const double done = static_cast<double>(e.ids.size()) - 1, half = static_cast<double>(sentence(i).size()) / 2;
    if (e.needle_end == 0 && before < done + half) put_needle();
    append(e.ids, sentence(i));
  }
  if (e.needle_end == 0) put_needle();
  append(e.ids, question);
  return e;
}

}  // namespace oryx
