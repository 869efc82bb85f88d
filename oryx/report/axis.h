// The scale of a chart's axis: from values to [0, 1], with ticks at round numbers.
#pragma once

#include <string>
#include <vector>

namespace oryx {

struct Tick {
  double value;
  std::string label;
};

class Axis {
 public:
  // Holds low <= high (log: both above 0); (nearly) equal ends are widened. `round_ends` widens to the next ticks.
  Axis(double low, double high, bool log, bool round_ends);

  double low() const { return low_; }
  double high() const { return high_; }
  double place(double value) const;  // low -> 0, high -> 1
  bool shows(double value) const;    // finite and, on a log axis, above 0
  const std::vector<Tick>& ticks() const { return ticks_; }
  // Ticks at these values, where the axis shows them, in place of round numbers.
  void ticks_at(const std::vector<double>& values);

 private:
  void linear_ticks(bool round_ends);
  void log_ticks(bool round_ends);

  double low_, high_;
  bool log_;
  std::vector<Tick> ticks_;
};

}  // namespace oryx
