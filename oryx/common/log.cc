#include "oryx/common/log.h"

#include <atomic>
#include <cstdio>
#include <mutex>
#include <set>
#include <string>

#include "oryx/common/progress.h"

namespace oryx::log {

namespace {
std::atomic<bool> silent{false};
}

void say_nothing() { silent = true; }

void line(std::string_view level, std::string_view text) {
  if (silent) return;
  // A progress bar may stand on the terminal's current line: it is wiped first and redraws itself at its next tick.
  ProgressBar::wipe_line();
  fmt::print(stderr, "{}{}\n", level, text);
  std::fflush(stderr);
}

bool first_time(std::string_view key) {
  static std::mutex mutex;
  static std::set<std::string, std::less<>> seen;
  std::lock_guard lock(mutex);
  return seen.emplace(key).second;
}

}  // namespace oryx::log
