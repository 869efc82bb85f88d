// Which tokens' keys and values a bounded state keeps beside those of the first and the last tokens. In each layer a token has a score; when it leaves the window, it
// is kept or dropped by it (KeptRule), and a row that was kept may be dropped later for one of a higher score.
//
// What gives the score is a policy: one file in oryx/state/row_policies/ that ends in ORYX_ROW_POLICY. The idea is that of Hybrid Associative Memories (arXiv 2603.22325): a
// linear mixer's state remembers what it can predict, so keys and values are kept of what it predicts badly.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace oryx {

// What a linear mixer says of a token (Mixer::surprise): how far its value lies from what the state predicted, relative to the value; or how much it writes into the state.
enum class TokenMeasure { kNone, kSurprise, kWrite };

// A token in one layer.
struct RowToken {
  int64_t layer, position;
  float measured;  // what the policy wants, the mean over the layer's linear mixers; 0 where it wants nothing
  uint64_t seed;
};

struct RowPolicy {
  std::string name, summary;
  TokenMeasure wants;
  float (*score)(const RowToken& token);  // the larger, the sooner kept
};

// The score of a policy that wants a measure and takes it as it is.
inline float score_as_measured(const RowToken& token) { return token.measured; }

const RowPolicy* find_row_policy(std::string_view name);  // null when there is none of that name
std::vector<std::string> row_policy_names();              // sorted

struct RowPolicyRegistration {
  explicit RowPolicyRegistration(const RowPolicy& policy);
};

// How many rows are kept, and by which scores. At least one of budget, share and threshold says so; with several each of them holds.
struct KeptRule {
  std::string by;        // the policy's name; empty: no rows but the first and the last ones
  int64_t budget = 0;    // rows of a layer at most; 0: no such limit
  double share = 0;      // of the tokens that have left the window, rounded up, at most; 0: no such limit
  std::optional<double> threshold = {};  // a kept token's score is at least this
  uint64_t seed = 0;     // of policies that draw at random

  bool on() const { return !by.empty(); }
  TokenMeasure measure() const;  // what the policy wants
  // Rows that may be kept when `left` tokens have left the window.
  int64_t limit(int64_t left) const;
  // Throws Error for values that contradict each other.
  void validate() const;
  // "surprise:budget=256", without the state's first and last tokens.
  std::string text() const;
};

}  // namespace oryx

// `name` is an identifier.
#define ORYX_ROW_POLICY(name, summary, wants, score) \
  static const ::oryx::RowPolicyRegistration oryx_row_policy_##name(::oryx::RowPolicy{#name, summary, wants, score})
