// A progress bar on standard error: rate and time left; plain lines, thinned out, when it is not a terminal.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

namespace oryx {

class ProgressBar {
 public:
  // `label` stands in front; `total` <= 0 means unknown; `unit` names what is counted ("tokens", "B" for bytes: shown as KiB, MiB).
  // `done` > 0 starts from there (resumed work): the rate counts only what is done from now on.
  ProgressBar(std::string label, int64_t total, std::string unit, int64_t done = 0);
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  // `done` so far, with a short text behind it ("loss 2.31"). Cheap: draws at most ten times a second
  // (on a terminal), or once in ten seconds (elsewhere).
  void update(int64_t done, std::string_view note = {});
  // Draws the last state and ends the line. Called by the destructor too, unless an exception is on its way.
  void finish();

  double seconds() const;

  // Wipes a bar that stands on the terminal's current line, so that a log line can take its place.
  static void wipe_line();

  // Label, bar and text in one row of a terminal, narrower than `width` (0: of no known width): what wraps could not be drawn over. The bar goes first, then the label's end.
  static std::string one_row(std::string_view label, std::string_view bar, std::string_view text, size_t width);

 private:
  void draw(bool last);

  std::string label_, unit_, note_;
  int64_t total_, start_done_, done_;
  bool terminal_, finished_ = false;
  int exceptions_;  // under way when the bar was made
  std::chrono::steady_clock::time_point start_, next_draw_;
};

// "1.2k", "3.45M", "1h02m", "4.2 s", "1.5 GiB": for people.
std::string human_count(double n);
std::string human_seconds(double s);
std::string human_bytes(double n);

}  // namespace oryx
