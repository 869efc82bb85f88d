#include "oryx/common/progress.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <exception>

namespace oryx {

namespace {
std::atomic<bool> bar_on_line{false};
constexpr auto kTerminalPeriod = std::chrono::milliseconds(100);
constexpr auto kPlainPeriod = std::chrono::seconds(10);

size_t terminal_width() {
  winsize size{};
  return ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 ? size.ws_col : 0;
}
}  // namespace

void ProgressBar::wipe_line() {
  if (bar_on_line.exchange(false)) std::fputs("\r\x1b[K", stderr);
}

ProgressBar::ProgressBar(std::string label, int64_t total, std::string unit, int64_t done)
    : label_(std::move(label)),
      unit_(std::move(unit)),
      total_(total),
      start_done_(done),
      done_(done),
      terminal_(isatty(STDERR_FILENO) != 0),
      exceptions_(std::uncaught_exceptions()),
      start_(std::chrono::steady_clock::now()),
      next_draw_(start_ + (terminal_ ? std::chrono::milliseconds(0) : std::chrono::milliseconds(kPlainPeriod))) {}

ProgressBar::~ProgressBar() {
  // Work that ends in an error leaves the line to its message.
  if (std::uncaught_exceptions() > exceptions_) {
    wipe_line();
  } else {
    finish();
  }
}

double ProgressBar::seconds() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

void ProgressBar::update(int64_t done, std::string_view note) {
  done_ = done;
  note_ = note;
  const auto now = std::chrono::steady_clock::now();
  if (now < next_draw_) return;
  next_draw_ = now + (terminal_ ? std::chrono::milliseconds(kTerminalPeriod) : std::chrono::milliseconds(kPlainPeriod));
  draw(false);
}

void ProgressBar::finish() {
  if (finished_) return;
  finished_ = true;
  draw(true);
}

void ProgressBar::draw(bool last) {
  const double elapsed = seconds();
  const double rate = elapsed > 0 ? static_cast<double>(done_ - start_done_) / elapsed : 0;
  const bool bytes = unit_ == "B";
  auto amount = [&](double n) { return bytes ? human_bytes(n) : human_count(n); };
  std::string bar, text;
  if (total_ > 0) {
    const double share = std::clamp(static_cast<double>(done_) / static_cast<double>(total_), 0.0, 1.0);
    if (terminal_) {
      constexpr int kWidth = 24;
      const int full = static_cast<int>(share * kWidth);
      bar = fmt::format(" [{}{}]", std::string(full, '#'), std::string(kWidth - full, '.'));
    }
    text += fmt::format(" {:3.0f}% {}/{}", 100 * share, amount(static_cast<double>(done_)),
                        amount(static_cast<double>(total_)));
  } else {
    text += fmt::format(" {}", amount(static_cast<double>(done_)));
  }
  text += bytes ? fmt::format(" | {}/s", human_bytes(rate)) : fmt::format(" {} | {}/s", unit_, human_count(rate));
  if (last || total_ <= 0) {
    text += fmt::format(" | {}", human_seconds(elapsed));
  } else if (rate > 0) {
    text += fmt::format(" | {} left", human_seconds(static_cast<double>(total_ - done_) / rate));
  }
  if (!note_.empty()) text += " | " + note_;
  text = terminal_ && !last ? one_row(label_, bar, text, terminal_width()) : label_ + bar + text;
  if (terminal_) {
    fmt::print(stderr, "\r{}\x1b[K{}", text, last ? "\n" : "");
    bar_on_line = !last;
  } else {
    fmt::print(stderr, "{}\n", text);
  }
  std::fflush(stderr);
}

std::string ProgressBar::one_row(std::string_view label, std::string_view bar, std::string_view text, size_t width) {
  const auto fits = [&](size_t size) { return width == 0 || size < width; };
  if (fits(label.size() + bar.size() + text.size())) return fmt::format("{}{}{}", label, bar, text);
  if (fits(label.size() + text.size())) return fmt::format("{}{}", label, text);
  constexpr std::string_view kCut = "..";
  constexpr size_t kLeast = 8;  // of the label
  const size_t room = width > text.size() + kCut.size() + kLeast + 1 ? width - text.size() - kCut.size() - 1 : std::min(kLeast, label.size());
  return fmt::format("{}{}{}", label.substr(0, room), kCut, text).substr(0, width - 1);
}

std::string human_count(double n) {
  if (n < 1000) return n == static_cast<int64_t>(n) ? fmt::format("{:.0f}", n) : fmt::format("{:.1f}", n);
  if (n < 1e6) return fmt::format("{:.3g}k", n / 1e3);
  if (n < 1e9) return fmt::format("{:.3g}M", n / 1e6);
  return fmt::format("{:.3g}G", n / 1e9);
}

std::string human_seconds(double s) {
  if (s < 60) return fmt::format("{:.1f} s", s);
  const auto whole = static_cast<int64_t>(s + 0.5);
  if (whole < 3600) return fmt::format("{}m{:02}s", whole / 60, whole % 60);
  return fmt::format("{}h{:02}m", whole / 3600, whole % 3600 / 60);
}

std::string human_bytes(double n) {
  if (n < 1024) return fmt::format("{:.0f} B", n);
  constexpr const char* kUnits[] = {"KiB", "MiB", "GiB", "TiB"};
  int unit = -1;
  do {
    n /= 1024;
    ++unit;
  } while (n >= 1024 && unit < 3);
  return fmt::format("{:.{}f} {}", n, n < 10 ? 2 : n < 100 ? 1 : 0, kUnits[unit]);
}

}  // namespace oryx
