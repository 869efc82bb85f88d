// The grammar of schedules (schedule.h), by recursive descent.
#include <cctype>

#include "oryx/common/error.h"
#include "oryx/common/utf8.h"
#include "oryx/modes/policy.h"
#include "oryx/modes/schedule.h"

namespace oryx {

namespace {

bool is_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }

// Of a policy's values: numbers, names and paths.
bool is_value(char c) { return is_name(c) || c == '.' || c == '-' || c == '+' || c == '/' || c == '~'; }

// What stands at `position`, as an error shows it: a whole word, or one sign.
std::string found_at(std::string_view text, size_t position) {
  if (position >= text.size()) return "the end";
  size_t end = position;
  while (end < text.size() && (is_name(text[end]) || text[end] == '.' || text[end] == '-')) ++end;
  end = std::max(end, position + 1);
  while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) ++end;  // a sign of several bytes, whole
  return fmt::format("'{}'", text.substr(position, end - position));
}

[[noreturn]] void fail_at(std::string_view text, size_t position, const std::string& expected,
                          const std::vector<std::string>& candidates) {
  const std::string found = found_at(text, position);
  const std::string hint =
      candidates.empty() || position >= text.size() ? "" : did_you_mean(found.substr(1, found.size() - 2), candidates);
  fail("schedule '{}': position {}: found {}, expected {}{}", shown(text, 400), position + 1, shown(found), expected, hint);
}

std::string join(const std::vector<std::string>& names, std::string_view behind = "") {
  std::string out;
  for (const auto& n : names) out += fmt::format("{}{}{}", out.empty() ? "" : ", ", n, behind);
  return out;
}

}  // namespace

class ScheduleParser {
 public:
  ScheduleParser(std::string_view text, const std::vector<std::string>& mixers,
                 const std::vector<std::string>& elsewhere, const OpenHead& open)
      : text_(text), mixers_(mixers), elsewhere_(elsewhere), open_(open) {}

  Schedule parse() {
    Schedule schedule;
    schedule.mixers_ = mixers_;
    do {
      schedule.entries_.push_back(entry());
    } while (accept(','));
    if (at_ < text_.size()) {
      const bool ranged = schedule.entries_.back().range.has_value();
      refuse(at_, ranged ? "',' or the end" : "'@', ',' or the end");
    }
    return schedule;
  }

 private:
  using Bound = Schedule::Bound;
  using Range = Schedule::Range;
  using Entry = Schedule::Entry;

  [[noreturn]] void refuse(size_t position, const std::string& expected,
                           const std::vector<std::string>& candidates = {}) const {
    fail_at(text_, position, expected, candidates);
  }

  void skip_spaces() {
    while (at_ < text_.size() && text_[at_] == ' ') ++at_;
  }

  bool accept(char c) {
    skip_spaces();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    skip_spaces();
    return true;
  }

  void expect(char c, const std::string& expected) {
    if (!accept(c)) refuse(at_, expected);
  }

  std::string_view word() {
    skip_spaces();
    const size_t begin = at_;
    while (at_ < text_.size() && is_name(text_[at_])) ++at_;
    return text_.substr(begin, at_ - begin);
  }

  Entry entry() {
    skip_spaces();
    const size_t begin = at_;
    Entry e;
    e.name = word();
    if (accept('(')) {
      e.policy = policy(e.name, begin, e.policy_text);
    } else {
      e.mixer = find_mixer(e.name, mixers_, elsewhere_);
      if (e.mixer < 0) refuse_name(begin);
    }
    if (accept('@')) e.range = range();
    return e;
  }

  [[noreturn]] void refuse_name(size_t position) const {
    std::vector<std::string> candidates = mixers_;
    candidates.insert(candidates.end(), elsewhere_.begin(), elsewhere_.end());
    candidates.push_back("linear");
    for (const auto& p : policy_names()) candidates.push_back(p);
    refuse(position, fmt::format("a mixer ({}) or a policy ({})", join(mixers_), join(policy_names(), "(...)")),
           candidates);
  }

  // `position` is the name's; "(" was taken already.
  std::shared_ptr<const ModePolicy> policy(const std::string& name, size_t position, std::string& canonical) {
    const MakePolicy make = find_policy(name);
    if (make == nullptr) refuse(position, "a policy: " + join(policy_names()), policy_names());
    std::vector<PolicyArguments::Argument> arguments;
    do {
      arguments.push_back(argument(arguments));
    } while (accept(';'));
    expect(')', "';' or ')'");
    canonical = name + "(";
    for (const auto& a : arguments) canonical += (canonical.back() == '(' ? "" : ";") + a.key + "=" + a.value;
    canonical += ")";
    PolicyArguments checked(text_, position, std::move(arguments), mixers_, elsewhere_, fail_at, open_);
    return make(checked);
  }

  PolicyArguments::Argument argument(const std::vector<PolicyArguments::Argument>& before) {
    skip_spaces();
    PolicyArguments::Argument a;
    a.key_position = at_;
    a.key = word();
    if (a.key.empty()) refuse(at_, "key=value");
    for (const auto& b : before) {
      if (b.key == a.key) refuse(a.key_position, "each key once");
    }
    expect('=', "'='");
    a.value_position = at_;
    while (at_ < text_.size() && is_value(text_[at_])) ++at_;
    a.value = text_.substr(a.value_position, at_ - a.value_position);
    if (a.value.empty()) refuse(at_, fmt::format("a value for '{}'", a.key));
    return a;
  }

  Range range() {
    const std::string expected = "a range: BEGIN:END (either may be missing), prompt or gen";
    skip_spaces();
    const size_t begin = at_;
    Range r;
    if (at_ < text_.size() && std::isalpha(static_cast<unsigned char>(text_[at_]))) {
      const std::string_view name = word();
      if (name != "prompt" && name != "gen") refuse(begin, expected, {"prompt", "gen"});
      r.kind = name == "prompt" ? Range::Kind::kPrompt : Range::Kind::kGenerated;
      return r;
    }
    r.begin = bound();
    if (!accept(':')) refuse(at_, r.begin ? "':'" : expected);
    r.end = bound();
    check_order(r, begin);
    return r;
  }

  // Two bounds of one kind can be compared before any document is known.
  void check_order(const Range& r, size_t position) const {
    if (!r.begin || !r.end || r.begin->kind != r.end->kind) return;
    const bool backwards = r.begin->kind == Bound::Kind::kBeforePromptEnd;
    const int64_t begin = r.begin->value, end = r.end->value;
    if (backwards ? begin <= end : begin >= end) refuse(position, "a range whose begin lies before its end");
  }

  std::optional<Bound> bound() {
    skip_spaces();
    const size_t begin = at_;
    const bool negative = accept('-');
    const size_t digits = at_;
    int64_t value = 0;
    for (; at_ < text_.size() && std::isdigit(static_cast<unsigned char>(text_[at_])); ++at_) {
      if (at_ - digits >= 12) refuse(begin, "a number of at most 12 digits");
      value = value * 10 + (text_[at_] - '0');
    }
    if (at_ == digits) {
      if (negative) refuse(at_, "a whole number");
      return std::nullopt;
    }
    if (accept('%')) {
      if (negative || value > 100) refuse(begin, "a percentage from 0% to 100%");
      return Bound{Bound::Kind::kPercent, value};
    }
    if (at_ < text_.size() && (is_name(text_[at_]) || text_[at_] == '.'))
      refuse(begin, "a whole number, or one with '%'");
    if (negative && value == 0) refuse(begin, "a number other than -0 (the prompt's end is 100%)");
    return Bound{negative ? Bound::Kind::kBeforePromptEnd : Bound::Kind::kToken, value};
  }

  std::string_view text_;
  const std::vector<std::string>&mixers_, &elsewhere_;
  const OpenHead& open_;
  size_t at_ = 0;
};

Schedule Schedule::parse(std::string_view text, const std::vector<std::string>& mixers,
                         const std::vector<std::string>& elsewhere, const OpenHead& open) {
  if (mixers.empty()) throw std::logic_error("Schedule::parse: a layer without mixers");
  constexpr size_t kLongest = 1 << 16;
  if (text.size() > kLongest) fail("schedule of {} bytes, expected at most {}", text.size(), kLongest);
  return ScheduleParser(text, mixers, elsewhere, open).parse();
}

}  // namespace oryx
