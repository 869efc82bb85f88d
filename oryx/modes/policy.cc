#include "oryx/modes/policy.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <numeric>

#include "oryx/common/error.h"
#include "oryx/modes/gain_head.h"

namespace oryx {

namespace {

std::map<std::string, MakePolicy, std::less<>>& registry() {
  static std::map<std::string, MakePolicy, std::less<>> all;
  return all;
}

template <class T>
bool parse_whole(std::string_view text, T& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

}  // namespace

PolicyRegistration::PolicyRegistration(const char* name, MakePolicy make) { registry()[name] = make; }

MakePolicy find_policy(std::string_view name) {
  const auto it = registry().find(name);
  return it == registry().end() ? nullptr : it->second;
}

std::vector<std::string> policy_names() {
  std::vector<std::string> names;
  for (const auto& [name, make] : registry()) names.push_back(name);
  return names;
}

int32_t find_mixer(std::string_view name, const std::vector<std::string>& mixers,
                   const std::vector<std::string>& elsewhere) {
  const auto it = std::find(mixers.begin(), mixers.end(), name);
  if (it != mixers.end()) return static_cast<int32_t>(it - mixers.begin());
  const bool first = name == "linear" || std::find(elsewhere.begin(), elsewhere.end(), name) != elsewhere.end();
  return first ? 0 : -1;
}

void PolicyArguments::refuse_at(size_t position, const std::string& expected,
                                const std::vector<std::string>& candidates) const {
  fail_(text_, position, expected, candidates);
  throw std::logic_error("PolicyArguments: fail returned");
}

void PolicyArguments::refuse(const std::string& expected) const { refuse_at(position_, expected); }

int64_t PolicyArguments::integer_of(const Argument& argument, int64_t least) const {
  int64_t value = 0;
  if (!parse_whole(argument.value, value) || value < least) {
    refuse_at(argument.value_position, fmt::format("a whole number of at least {} for '{}'", least, argument.key));
  }
  return value;
}

std::optional<int64_t> PolicyArguments::integer(std::string_view key, int64_t least) {
  known_.emplace_back(key);
  for (Argument& a : arguments_) {
    if (a.key != key) continue;
    a.used = true;
    return integer_of(a, least);
  }
  return std::nullopt;
}

std::optional<std::string> PolicyArguments::text(std::string_view key) {
  known_.emplace_back(key);
  for (Argument& a : arguments_) {
    if (a.key != key) continue;
    a.used = true;
    return a.value;
  }
  return std::nullopt;
}

std::vector<std::pair<int32_t, double>> PolicyArguments::numbers_by_mixer(double least, double most) {
  known_.insert(known_.end(), mixers_.begin(), mixers_.end());
  std::vector<std::pair<int32_t, double>> found;
  for (Argument& a : arguments_) {
    const int32_t mixer = find_mixer(a.key, mixers_, elsewhere_);
    if (mixer < 0) continue;
    a.used = true;
    double value = 0;
    if (!parse_whole(a.value, value) || !(value >= least && value <= most)) {
      refuse_at(a.value_position, fmt::format("a number from {} to {} for '{}'", least, most, a.key));
    }
    found.emplace_back(mixer, value);
  }
  return found;
}

std::vector<std::pair<int32_t, int64_t>> PolicyArguments::integers_by_mixer(int64_t least) {
  known_.insert(known_.end(), mixers_.begin(), mixers_.end());
  std::vector<std::pair<int32_t, int64_t>> found;
  for (Argument& a : arguments_) {
    const int32_t mixer = find_mixer(a.key, mixers_, elsewhere_);
    if (mixer < 0) continue;
    a.used = true;
    found.emplace_back(mixer, integer_of(a, least));
  }
  return found;
}

std::vector<std::pair<int32_t, std::string>> PolicyArguments::names_by_mixer() {
  known_.insert(known_.end(), mixers_.begin(), mixers_.end());
  std::vector<std::pair<int32_t, std::string>> found;
  for (Argument& a : arguments_) {
    const int32_t mixer = find_mixer(a.key, mixers_, elsewhere_);
    if (mixer < 0) continue;
    a.used = true;
    found.emplace_back(mixer, a.value);
  }
  return found;
}

std::shared_ptr<const GainHead> PolicyArguments::head(const std::string& file) const { return open_ ? open_(file) : load_head(file); }

void PolicyArguments::finish() {
  for (const Argument& a : arguments_) {
    if (a.used) continue;
    std::string keys;
    for (const auto& k : known_) keys += (keys.empty() ? "" : ", ") + k;
    refuse_at(a.key_position, "one of the keys " + keys, known_);
  }
}

std::vector<int64_t> highest_share(const std::vector<float>& scores, int64_t length, double share) {
  std::vector<int64_t> order(static_cast<size_t>(length));
  std::iota(order.begin(), order.end(), 0);
  const int64_t count = std::min(length, static_cast<int64_t>(std::llround(share * static_cast<double>(length))));
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)]; });
  order.resize(static_cast<size_t>(count));
  std::sort(order.begin(), order.end());
  return order;
}

void add_token(int64_t t, int32_t mixer, std::vector<ModeSpan>& spans) {
  const auto at = static_cast<int32_t>(t);
  if (!spans.empty() && spans.back().end == at) {
    ++spans.back().end;
  } else {
    spans.push_back({at, at + 1, mixer});
  }
}

}  // namespace oryx
