#include "oryx/modes/schedule.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "oryx/modes/policy.h"

namespace oryx {

namespace {

// Appends [begin, end), grown onto the last span when that ends there in the same mixer.
void append(std::vector<ModeSpan>& spans, int64_t begin, int64_t end, int32_t mixer) {
  if (begin >= end) return;
  if (!spans.empty() && spans.back().end == begin && spans.back().mixer == mixer) {
    spans.back().end = static_cast<int32_t>(end);
  } else {
    spans.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(end), mixer});
  }
}

// `base` covers a window without holes; the result is `top` where that has spans, else `base`. Linear in both.
std::vector<ModeSpan> overlay(const std::vector<ModeSpan>& base, const std::vector<ModeSpan>& top) {
  std::vector<ModeSpan> out;
  size_t next = 0;
  int32_t done = base.empty() ? 0 : base.front().begin;
  const auto copy_base = [&](int32_t until) {
    while (done < until) {
      while (base[next].end <= done) ++next;
      const int32_t end = std::min(base[next].end, until);
      append(out, done, end, base[next].mixer);
      done = end;
    }
  };
  for (const ModeSpan& s : top) {
    copy_base(s.begin);
    append(out, s.begin, s.end, s.mixer);
    done = s.end;
  }
  if (!base.empty()) copy_base(base.back().end);
  return out;
}

}  // namespace

int64_t Schedule::Bound::position(int64_t prompt_length) const {
  switch (kind) {
    case Kind::kToken:
      return value;
    case Kind::kBeforePromptEnd:
      return std::max<int64_t>(0, prompt_length - value);
    case Kind::kPercent:
      return prompt_length * value / 100;
  }
  return 0;
}

std::string Schedule::Bound::text() const {
  const char* sign = kind == Kind::kBeforePromptEnd ? "-" : "";
  return fmt::format("{}{}{}", sign, value, kind == Kind::kPercent ? "%" : "");
}

std::pair<int64_t, int64_t> Schedule::absolute(const std::optional<Range>& range, int64_t prompt_length) {
  if (!range) return {0, kOpen};
  if (range->kind == Range::Kind::kPrompt) return {0, prompt_length};
  if (range->kind == Range::Kind::kGenerated) return {prompt_length, kOpen};
  return {range->begin ? range->begin->position(prompt_length) : 0,
          range->end ? range->end->position(prompt_length) : kOpen};
}

std::string Schedule::text_of(const Range& range) {
  if (range.kind == Range::Kind::kPrompt) return "prompt";
  if (range.kind == Range::Kind::kGenerated) return "gen";
  return fmt::format("{}:{}", range.begin ? range.begin->text() : "", range.end ? range.end->text() : "");
}

std::string Schedule::text() const {
  std::string out;
  for (const Entry& e : entries_) {
    if (!out.empty()) out += ",";
    out += e.policy ? e.policy_text : e.name;
    if (e.range) out += "@" + text_of(*e.range);
  }
  return out;
}

std::vector<ModeSpan> Schedule::resolve(const ModeContext& context, int64_t begin, int64_t end) const {
  TORCH_CHECK(0 <= begin && begin <= end && end <= std::numeric_limits<int32_t>::max() && context.prompt_length >= 0,
              "Schedule::resolve: tokens ", begin, " to ", end, " of a prompt of ", context.prompt_length);
  std::vector<ModeSpan> spans;
  append(spans, begin, end, 0);
  for (const Entry& e : entries_) {
    const auto [from, to] = absolute(e.range, context.prompt_length);
    const int64_t first = std::max(from, begin), last = std::min(to, end);
    if (first >= last) continue;
    std::vector<ModeSpan> top;
    if (e.policy) {
      e.policy->assign(context, first, last, top);
    } else {
      append(top, first, last, e.mixer);
    }
    spans = overlay(spans, top);
  }
  return spans;
}

int32_t Schedule::mixer_at(const ModeContext& context, int64_t position) const {
  return resolve(context, position, position + 1).front().mixer;
}

std::vector<std::string> Schedule::needs() const {
  std::set<std::string> all;
  for (const Entry& e : entries_) {
    if (!e.policy) continue;
    for (auto& need : e.policy->needs()) all.insert(std::move(need));
  }
  return {all.begin(), all.end()};
}

bool Schedule::is_behind_prompt(const std::optional<Range>& range) {
  if (!range || range->kind == Range::Kind::kPrompt) return false;
  return range->kind == Range::Kind::kGenerated || (range->begin && range->begin->kind == Bound::Kind::kPercent && range->begin->value == 100);
}

std::vector<std::string> Schedule::prompt_needs() const {
  std::set<std::string> all;
  for (const Entry& e : entries_) {
    if (!e.policy || is_behind_prompt(e.range)) continue;
    for (auto& need : e.policy->needs()) all.insert(std::move(need));
  }
  return {all.begin(), all.end()};
}

std::map<std::string, std::shared_ptr<const GainHead>> Schedule::gain_heads() const {
  std::map<std::string, std::shared_ptr<const GainHead>> all;
  for (const Entry& e : entries_) {
    if (e.policy && e.policy->gain_head()) all.emplace(e.policy->needs().front(), e.policy->gain_head());
  }
  return all;
}

bool Schedule::is_random() const {
  return std::any_of(entries_.begin(), entries_.end(),
                     [](const Entry& e) { return e.policy && (e.policy->is_random() || !e.policy->needs().empty()); });
}

}  // namespace oryx
