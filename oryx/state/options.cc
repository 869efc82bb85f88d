// A state's options: checks, and their forms as text.
#include <fmt/format.h>

#include <charconv>
#include <cmath>

#include "oryx/common/error.h"
#include "oryx/common/utf8.h"
#include "oryx/state/state.h"

namespace oryx {

void StateOptions::validate() const {
  if (bound.first < 0 || bound.window < 0 || bound.back < 0 || (!bound.on() && (bound.first > 0 || bound.back > 0))) {
    fail("a state bounded to {} first and {} last tokens, {} behind them; expected a window of at least 1 and nothing negative", bound.first, bound.window,
         bound.back);
  }
  constexpr int64_t kMost = int64_t{1} << 31;
  if (bound.first > kMost || bound.window > kMost || bound.back > kMost) fail("a state bounded to more than {} tokens", kMost);
  if (bound.on() && drop_rows) fail("a state cannot both drop its rows and keep those of a window; choose one");
  if (kept.on() && !bound.on()) fail("rows kept by '{}' stand beside those of a window: give it one (bound)", kept.by);
  kept.validate();
  if (row_pages < 0 || (row_pages > 0 && kept.on())) fail("a state that keeps rows by choice has no pool of {} pages", row_pages);
  if (page_tokens < 1 || page_tokens > (1 << 20)) fail("pages of {} tokens, expected 1 to {}", page_tokens, 1 << 20);
}

RowBound StateOptions::row_bound(int64_t refill) const {
  if (!bound.on()) return {};
  return {bound.first, bound.window + std::max(ring, bound.back > 0 ? bound.back + refill : 0)};
}

int64_t StateOptions::seen(int64_t context) const {
  if (!bound.on()) return context;
  return std::min(context, bound.first + bound.window + KeptRows::most_rows(kept, bound.first, bound.window, context));
}

namespace {

constexpr int64_t kFirstTokens = 4, kWindowTokens = 64;  // beside chosen rows, unless said otherwise

[[noreturn]] void refuse_kv(const std::string& text) {
  fail("keys and values '{}': expected keep, drop or bounded:F+W, the first F and the last W tokens (W at least 1), as in bounded:4+1024, or rows kept by a policy ({}), as in "
       "surprise:budget=256,first=4,window=64 (budget, share or threshold)",
       shown(text, 80), fmt::join(row_policy_names(), ", "));
}

template <typename T>
T kv_number(const std::string& text, std::string_view digits) {
  T value{};
  const auto [next, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (error != std::errc() || next != digits.data() + digits.size() || digits.empty()) refuse_kv(text);
  return value;
}

int64_t kv_count(const std::string& text, std::string_view digits, int64_t least) {
  const auto value = kv_number<int64_t>(text, digits);
  if (value < least) refuse_kv(text);
  return value;
}

// "key=value,..." of a policy.
void set_kept(StateOptions& options, const std::string& text, std::string_view keys) {
  options.bound = {kFirstTokens, kWindowTokens, 0};
  while (!keys.empty()) {
    const size_t comma = std::min(keys.find(','), keys.size()), equals = keys.substr(0, comma).find('=');
    if (equals == std::string_view::npos) refuse_kv(text);
    const std::string_view key = keys.substr(0, equals);
    std::string_view value = keys.substr(equals + 1, comma - equals - 1);
    if (key == "budget") {
      options.kept.budget = kv_count(text, value, 1);
    } else if (key == "share") {
      const bool percent = value.ends_with('%');
      if (percent) value.remove_suffix(1);
      options.kept.share = kv_number<double>(text, value) / (percent ? 100 : 1);
      if (!(options.kept.share > 0 && options.kept.share <= 1)) refuse_kv(text);
    } else if (key == "threshold") {
      options.kept.threshold = kv_number<double>(text, value);
    } else if (key == "first") {
      options.bound.first = kv_count(text, value, 0);
    } else if (key == "window") {
      options.bound.window = kv_count(text, value, 1);
    } else if (key == "seed") {
      options.kept.seed = kv_number<uint64_t>(text, value);
    } else {
      refuse_kv(text);
    }
    keys.remove_prefix(std::min(comma + 1, keys.size()));
  }
}

}  // namespace

void set_kv(StateOptions& options, const std::string& text) {
  options.bound = {};
  options.kept = {};
  options.drop_rows = text == "drop";
  if (text == "keep" || text == "drop") return;
  const size_t colon = std::min(text.find(':'), text.size());
  const std::string name = text.substr(0, colon);
  const std::string_view rest = std::string_view(text).substr(std::min(colon + 1, text.size()));
  if (find_row_policy(name) != nullptr) {
    options.kept.by = name;
    set_kept(options, text, rest);
  } else if (name == "bounded" && rest.find('+') != std::string_view::npos) {
    const size_t plus = rest.find('+');
    options.bound.first = kv_count(text, rest.substr(0, plus), 0);
    options.bound.window = kv_count(text, rest.substr(plus + 1), 1);
  } else {
    refuse_kv(text);
  }
  options.validate();
}

std::string kv_text(const StateOptions& options) {
  if (options.drop_rows) return "drop";
  if (options.kept.on()) return fmt::format("{},first={},window={}", options.kept.text(), options.bound.first, options.bound.window);
  return options.bound.on() ? fmt::format("bounded:{}+{}", options.bound.first, options.bound.window) : "keep";
}

}  // namespace oryx
