// Which of a text's tokens go into attention as they come, when a share of them may: by the gains that a head predicts (gain_head.h), one token after the other, without looking ahead.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "oryx/modes/gain_head.h"

namespace oryx {

// Without a window the threshold stands still: it is the one that the share of the head's held-out tokens exceeds. A token above it is taken as long as of n tokens at most
// share * n + kAhead are. What a dull stretch leaves is there for a later one, and a dull text uses less than the share.
//
// With a window W the threshold follows the text: it is a quantile of the last W gains (before there are so many, of the held-out ones in their place), the share's own when as
// much was used as may be, a lower one the more is left and a higher one the more is overdrawn. And whatever the gains are, of n tokens
//
//     share * n - behind(share, W) <= taken <= share * n + kAhead
//
// since a token is taken whatever its gain when the former would break, and none when the latter would; so of any stretch of tokens the share, up to behind + kAhead.
// What is decided is a function of the gains so far alone.
class GainBudget {
 public:
  static constexpr double kAhead = 8;
  static constexpr int64_t kMostWindow = 1 << 16;
  // Tokens that may be saved up: a quarter of a window's share, and no fewer than kAhead.
  static double behind(double share, int64_t window);

  // window: 0, or 1 to kMostWindow.
  GainBudget(const GainHead& head, double share, int64_t window = 0);
  bool take(float gain);  // the next token
  int64_t seen() const { return seen_; }
  int64_t taken() const { return taken_; }
  // What the next gain has to exceed.
  double threshold() const;

 private:
  void follow(float gain);

  double share_, threshold_, behind_ = 0;
  int64_t seen_ = 0, taken_ = 0;
  std::vector<float> window_, sorted_;  // the last gains, in a ring; the same, rising
  size_t oldest_ = 0;
};

}  // namespace oryx
