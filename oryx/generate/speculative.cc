#include "oryx/generate/speculative.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "oryx/common/error.h"
#include "oryx/common/log.h"
#include "oryx/ops/few_rows/few_rows.h"

namespace oryx {

namespace {

static_assert(kMostDrafted + 1 == ops::kFewRows);

constexpr double kFirstAcceptance = 0.75, kFirstWeight = 4;  // before anything was tested
constexpr double kForget = 0.97;       // of what was tested, a token later
constexpr double kNewest = 0.2;        // what the newest time is worth beside those before
constexpr int64_t kFirstDraft = 4;     // tokens, before times are known
constexpr int64_t kAloneAtMost = 48;   // tokens without a draft before one is tried again: contexts grow, texts change; twice as many behind each that did not pay
constexpr int64_t kAloneAtLast = 1536;
constexpr int64_t kTrial = 2;          // tokens of that one
constexpr int64_t kDraftedAtMost = 64;  // passes before a token runs alone again, for the same reason

class Clock {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace

DraftLength::DraftLength(int64_t most, bool adapt)
    : most_(most), adapt_(adapt), accepted_(kFirstAcceptance * kFirstWeight), tested_(kFirstWeight), passes_(static_cast<size_t>(most) + 2), alone_most_(kAloneAtMost) {}

void DraftLength::tested(bool accepted) {
  accepted_ = kForget * accepted_ + (accepted ? 1 : 0);
  tested_ = kForget * tested_ + 1;
}

void DraftLength::Mean::add(double seconds) {
  if (!begun) {
    begun = true;
    return;
  }
  const double weight = value == 0 ? 1 : seconds < value / 2 ? 0.5 : kNewest;  // what was held up once is soon forgotten
  value += weight * (seconds - value);
}

void DraftLength::drafted(double seconds) { draft_.add(seconds); }
void DraftLength::passed(int64_t tokens, double seconds) {
  passes_.at(static_cast<size_t>(tokens)).add(seconds);
  if (tokens == 1) since_alone_ = 0;
}

// Where it is not known, that of the nearest pass that is: a try will tell.
double DraftLength::pass_seconds(int64_t tokens) const {
  const auto count = static_cast<int64_t>(passes_.size());
  for (int64_t away = 0; away < count; ++away) {
    for (const int64_t t : {tokens - away, tokens + away}) {
      if (t > 0 && t < count && passes_[static_cast<size_t>(t)].value > 0) return passes_[static_cast<size_t>(t)].value;
    }
  }
  return 0;
}

int64_t DraftLength::next(int64_t room) {
  const int64_t most = std::min(most_, room);
  if (most < 1) return 0;
  if (!adapt_) return most;
  // Tokens alone and short drafts first, so that there is something to go by.
  if (passes_[1].value == 0) return 0;
  if (draft_.value == 0) return std::min(most, kFirstDraft);
  // Of n drafted tokens the accepted ones and the one behind them: 1 + a + ... + a^n on average, where each is accepted with chance a (Leviathan et al.).
  int64_t best = 0;
  double best_rate = 1 / passes_[1].value, expected = 1, power = 1;
  for (int64_t n = 1; n <= most; ++n) {
    power *= acceptance();
    expected += power;
    const double rate = expected / (static_cast<double>(n) * draft_.value + pass_seconds(n + 1));
    if (rate > best_rate) best_rate = rate, best = n;
  }
  if (best > 0) {
    alone_most_ = kAloneAtMost;
  } else if (++since_draft_ > alone_most_) {
    best = std::min(most, kTrial), alone_most_ = std::min(2 * alone_most_, kAloneAtLast);
  }
  if (best > 0 && ++since_alone_ > kDraftedAtMost) best = 0;
  if (best > 0) since_draft_ = 0;
  return best;
}

void check_draft(const ModelConfig& config, const ModelSchedule& schedule, const DraftOptions& draft, const StateOptions& state) {
  if (draft.tokens < 1 || draft.tokens > kMostDrafted) fail("{} tokens to draft at once, expected 1 to {}", draft.tokens, kMostDrafted);
  if (!schedule.gain_heads().empty()) {
    fail("the schedule '{}' has a router, which decides on each token behind the one before it, so that no pass can verify several; draft under a schedule without one", schedule.text());
  }
  const ModelSchedule by(config, draft.schedule);
  if (!by.needs().empty()) fail("drafts by '{}': it goes by what tokens are ({}); expected a schedule of positions, as linear", by.text(), fmt::join(by.needs(), ", "));
  if (state.kept.on()) fail("drafts over keys and values '{}': which rows are kept is decided once, and a refused draft would have to be forgotten; draft with all rows (--kv keep)", kv_text(state));
  if (state.bound.on() && state.bound.back < draft.tokens + 1) {
    fail("drafts of {} tokens over keys and values '{}', whose window holds no rows of as many tokens more; draft with all rows, or begin the session with drafts of as many tokens", draft.tokens,
         kv_text(state));
  }
}

Drafter drafts_drawn(const ModelSchedule& schedule, DrawToken draw, int32_t end) {
  return [&schedule, draw = std::move(draw), end](Session& session, int32_t id, int64_t count) {
    std::vector<int32_t> drafts;
    for (int32_t last = id; static_cast<int64_t>(drafts.size()) < count;) {
      const at::Tensor logits = session.draft(last, schedule);
      last = draw(logits, session.length());
      if (last == end) break;
      drafts.push_back(last);
    }
    return drafts;
  };
}

Drafter drafts_likeliest(const ModelSchedule& schedule, int64_t below, int32_t end) {
  return [&schedule, below, end](Session& session, int32_t id, int64_t count) {
    std::vector<int32_t> drafts = session.draft_likeliest(id, count, schedule, below);
    drafts.erase(std::find(drafts.begin(), drafts.end(), end), drafts.end());
    return drafts;
  };
}

DraftedSession::DraftedSession(Session& session, Drafter drafter, const DraftOptions& options, const ModelSchedule* schedule)
    : session_(session), drafter_(std::move(drafter)), schedule_(schedule), count_(options.tokens, options.adapt) {}

void DraftedSession::settle() {
  if (!ids_.empty()) session_.keep(used_);
  ids_.clear();
  used_ = 0;
  rows_.reset();
}

// `id` and the drafts behind it; the session is where it was.
std::vector<int32_t> DraftedSession::draft(int32_t id, int64_t count) {
  std::vector<int32_t> ids{id};
  session_.hold();
  try {
    const std::vector<int32_t> drafts = drafter_(session_, id, count);
    TORCH_CHECK(static_cast<int64_t>(drafts.size()) <= count, "draft: ", drafts.size(), " tokens for ", count);
    ids.insert(ids.end(), drafts.begin(), drafts.end());
  } catch (...) {
    session_.back();
    throw;
  }
  session_.back();
  return ids;
}

at::Tensor DraftedSession::step(int32_t id, int64_t room) {
  TORCH_CHECK(room >= 1, "draft: room for ", room, " tokens");
  if (used_ < static_cast<int64_t>(ids_.size())) {
    const bool accepted = ids_[static_cast<size_t>(used_)] == id;
    count_.tested(accepted);
    ++stats_.tested;
    if (accepted) {
      ++stats_.accepted;
      return rows_[used_++].cpu();
    }
  }
  settle();
  // The last of the `room` tokens need not be drafted: the pass over those before it gives it.
  const int64_t most = session_.most_steps() - 1;
  if (count_.most() > most) log::warn_once("drafting {} tokens at once, not {}: so many are verified by one captured launch", most, count_.most());
  int64_t count = count_.next(std::min(room - 1, most));
  if (count > 0 && schedule_ != nullptr && session_.same_modes(*schedule_, count)) count = 0;  // nothing is cheaper than the text's own mode
  std::vector<int32_t> ids{id};
  if (count > 0) {
    const Clock clock;
    ids = draft(id, count);
    const auto made = static_cast<double>(std::max<size_t>(1, ids.size() - 1));
    count_.drafted(clock.seconds() / made);
    stats_.draft_seconds += clock.seconds();
    stats_.drafted += static_cast<int64_t>(ids.size()) - 1;
  }
  const Clock clock;
  if (ids.size() == 1) {
    const at::Tensor logits = session_.step(id).cpu();
    count_.passed(1, clock.seconds());
    ++stats_.alone;
    return logits;
  }
  rows_ = session_.steps(ids);
  const at::Tensor first = rows_[0].cpu();  // the clock stops when it has come back from the device
  ids_ = std::move(ids);
  used_ = 1;
  count_.passed(static_cast<int64_t>(ids_.size()), clock.seconds());
  stats_.verify_seconds += clock.seconds();
  ++stats_.passes;
  return first;
}

}  // namespace oryx
