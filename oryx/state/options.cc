// A state's options: checks, and their forms as text.
#include <fmt/format.h>

#include <charconv>

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
  if (page_tokens < 1 || page_tokens > (1 << 20)) fail("pages of {} tokens, expected 1 to {}", page_tokens, 1 << 20);
}

RowBound StateOptions::row_bound(int64_t refill) const {
  if (!bound.on()) return {};
  return {bound.first, bound.window + std::max(ring, bound.back > 0 ? bound.back + refill : 0)};
}

void set_kv(StateOptions& options, const std::string& text) {
  const auto refuse = [&] {
    fail("keys and values '{}': expected keep, drop or bounded:F+W, the first F and the last W tokens (W at least 1), as in bounded:4+1024", shown(text, 80));
  };
  options.bound = {};
  options.drop_rows = text == "drop";
  if (text == "keep" || text == "drop") return;
  constexpr std::string_view kBounded = "bounded:";
  if (!text.starts_with(kBounded)) refuse();
  const char *at = text.data() + kBounded.size(), *end = text.data() + text.size();
  const auto number = [&](int64_t& value) {
    const auto [next, error] = std::from_chars(at, end, value);
    if (error != std::errc() || value < 0) refuse();
    at = next;
  };
  number(options.bound.first);
  if (at == end || *at != '+') refuse();
  ++at;
  number(options.bound.window);
  if (at != end || options.bound.window < 1) refuse();
  options.validate();
}

std::string kv_text(const StateOptions& options) {
  if (options.drop_rows) return "drop";
  return options.bound.on() ? fmt::format("bounded:{}+{}", options.bound.first, options.bound.window) : "keep";
}

}  // namespace oryx
