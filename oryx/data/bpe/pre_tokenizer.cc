#include "oryx/data/bpe/pre_tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "oryx/common/error.h"
#include "oryx/common/utf8.h"

namespace oryx::bpe {

namespace {

// GPT-2's expression (Radford et al. 2019), which "use_regex" of ByteLevel stands for.
constexpr const char* kGpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

std::string text_of(const nlohmann::json& json, const char* key) {
  const auto it = json.find(key);
  return it != json.end() && it->is_string() ? it->get<std::string>() : std::string();
}

std::string pcre_message(int code) {
  PCRE2_UCHAR buffer[160];
  return pcre2_get_error_message(code, buffer, sizeof buffer) > 0 ? reinterpret_cast<const char*>(buffer) : fmt::format("error {}", code);
}

std::string escaped(std::string_view text) { return "\\Q" + std::string(text) + "\\E"; }

}  // namespace

Regex::Regex(std::string_view pattern, const std::string& where) {
  int code = 0;
  PCRE2_SIZE offset = 0;
  // \C, one byte whatever it is part of, would cut characters: matching goes on from within one, which PCRE2 must never be asked to do.
  pcre2_code* compiled =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &code, &offset, nullptr);
  if (compiled == nullptr) fail("{}: pre_tokenizer: the expression '{}' cannot be read at {}: {}", where, shown(pattern), offset, pcre_message(code));
  pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE);  // slower but the same where there is no JIT
  code_ = std::shared_ptr<void>(compiled, [](void* p) { pcre2_code_free(static_cast<pcre2_code*>(p)); });
}

std::vector<std::pair<size_t, size_t>> Regex::matches(std::string_view text) const {
  const auto* code = static_cast<const pcre2_code*>(code_.get());
  const std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)> data(pcre2_match_data_create_from_pattern(code, nullptr), pcre2_match_data_free);
  std::vector<std::pair<size_t, size_t>> found;
  size_t at = 0;
  while (at < text.size()) {
    // The text was checked once, where it came in.
    const int rc = pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at, PCRE2_NO_UTF_CHECK, data.get(), nullptr);
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0) fail("the tokeniser's expression gave up at byte {} of a text of {} bytes: {}", at, text.size(), pcre_message(rc));
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(data.get());
    if (range[1] > range[0]) {
      found.emplace_back(range[0], range[1]);
      at = range[1];
    } else {  // an empty match: on by one character
      at = range[1] + 1;
      while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) ++at;
    }
  }
  return found;
}

PreTokenizer::PreTokenizer(const nlohmann::json& json, const std::string& where) {
  if (!json.is_object()) fail("{}: pre_tokenizer is missing, expected ByteLevel or a Sequence that ends in it", where);
  add(json, where);
  if (!byte_level_) fail("{}: pre_tokenizer has no ByteLevel; only byte-level BPE is read", where);
}

void PreTokenizer::add(const nlohmann::json& json, const std::string& where) {
  const std::string type = text_of(json, "type");
  if (type == "Sequence" && json.contains("pretokenizers") && json["pretokenizers"].is_array()) {
    for (const auto& part : json["pretokenizers"]) {
      if (!part.is_object() || text_of(part, "type") == "Sequence") fail("{}: pre_tokenizer: a Sequence within a Sequence is not read", where);
      add(part, where);
    }
    return;
  }
  if (byte_level_) fail("{}: pre_tokenizer: found {} after ByteLevel, expected it last", where, shown(type));
  Step step;
  if (type == "ByteLevel") {
    step.add_space = json.value("add_prefix_space", true);
    if (json.value("use_regex", true)) {
      step.regex.emplace_back(kGpt2, where);
    } else {
      step.kind = Step::Kind::kKeep;
    }
    byte_level_ = true;
  } else if (type == "Digits") {
    step.regex.emplace_back(json.value("individual_digits", false) ? R"(\p{N})" : R"(\p{N}+)", where);
  } else if (type == "Split" && json.contains("pattern") && json["pattern"].is_object()) {
    const auto& pattern = json["pattern"];
    const std::string regex = text_of(pattern, "Regex"), plain = text_of(pattern, "String");
    if (regex.empty() == plain.empty()) fail("{}: pre_tokenizer: a Split's pattern is {}, expected a Regex or a String", where, shown(pattern.dump()));
    step.regex.emplace_back(regex.empty() ? escaped(plain) : regex, where);
    step.invert = json.value("invert", false);
    const std::string behavior = text_of(json, "behavior");
    if (behavior == "Isolated") {
      step.kind = Step::Kind::kIsolate;
    } else if (behavior == "Removed") {
      step.kind = Step::Kind::kRemove;
    } else if (behavior == "MergedWithPrevious") {
      step.kind = Step::Kind::kMergeWithPrevious;
    } else if (behavior == "MergedWithNext") {
      step.kind = Step::Kind::kMergeWithNext;
    } else {
      fail("{}: pre_tokenizer: a Split's behavior is '{}', expected Isolated, Removed, MergedWithPrevious or MergedWithNext", where, shown(behavior));
    }
  } else {
    fail("{}: pre_tokenizer: found {}, expected ByteLevel, Split, Digits or a Sequence of them", where, shown(type.empty() ? json.dump() : type));
  }
  steps_.push_back(std::move(step));
}

bool PreTokenizer::adds_space() const {
  return std::any_of(steps_.begin(), steps_.end(), [](const Step& s) { return s.add_space; });
}

void PreTokenizer::cut(const Step& step, std::string_view text, std::vector<std::string>& out) {
  // Runs of the text, each a delimiter or not.
  struct Run {
    size_t begin, end;
    bool delimiter;
  };
  std::vector<Run> runs;
  size_t at = 0;
  for (const auto& [begin, end] : step.regex.front().matches(text)) {
    if (begin > at) runs.push_back({at, begin, step.invert});
    runs.push_back({begin, end, !step.invert});
    at = end;
  }
  if (at < text.size()) runs.push_back({at, text.size(), step.invert});
  using Kind = Step::Kind;
  bool joins = false;  // the last piece still waits for what follows (merged with next)
  const size_t first = out.size();
  bool after_delimiter = false;
  for (const Run& r : runs) {
    const auto part = text.substr(r.begin, r.end - r.begin);
    if (step.kind == Kind::kRemove && r.delimiter) continue;
    if (step.kind == Kind::kMergeWithPrevious && r.delimiter && out.size() > first && !after_delimiter) {
      out.back() += part;
    } else if (step.kind == Kind::kMergeWithNext && joins && !r.delimiter) {
      out.back() += part;
    } else {
      out.emplace_back(part);
    }
    after_delimiter = r.delimiter;
    joins = r.delimiter;
  }
}

std::vector<std::string> PreTokenizer::split(std::string_view text) const {
  std::vector<std::string> pieces{std::string(text)};
  for (const Step& step : steps_) {
    std::vector<std::string> next;
    for (std::string& piece : pieces) {
      if (piece.empty()) continue;
      if (step.add_space && piece.front() != ' ') piece.insert(0, 1, ' ');
      if (step.kind == Step::Kind::kKeep) {
        next.push_back(std::move(piece));
      } else {
        cut(step, piece, next);
      }
    }
    pieces = std::move(next);
  }
  return pieces;
}

}  // namespace oryx::bpe
