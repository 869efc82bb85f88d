#include "oryx/state/row_policy.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "oryx/common/error.h"

namespace oryx {

namespace {

std::map<std::string, RowPolicy, std::less<>>& row_policies() {
  static std::map<std::string, RowPolicy, std::less<>> all;
  return all;
}

}  // namespace

RowPolicyRegistration::RowPolicyRegistration(const RowPolicy& policy) { row_policies().emplace(policy.name, policy); }

const RowPolicy* find_row_policy(std::string_view name) {
  const auto it = row_policies().find(name);
  return it == row_policies().end() ? nullptr : &it->second;
}

std::vector<std::string> row_policy_names() {
  std::vector<std::string> names;
  for (const auto& [name, policy] : row_policies()) names.push_back(name);
  return names;
}

TokenMeasure KeptRule::measure() const {
  const RowPolicy* policy = find_row_policy(by);
  return policy != nullptr ? policy->wants : TokenMeasure::kNone;
}

int64_t KeptRule::limit(int64_t left) const {
  int64_t most = std::numeric_limits<int64_t>::max();
  if (budget > 0) most = budget;
  // A hair below, so that 10% of 30 is 3 although 0.1 is a little more than a tenth.
  if (share > 0) most = std::min(most, static_cast<int64_t>(std::ceil(share * static_cast<double>(left) - 1e-9)));
  return most;
}

void KeptRule::validate() const {
  if (!on()) return;
  if (find_row_policy(by) == nullptr) fail("rows are to be kept by '{}', expected one of {}", by, fmt::join(row_policy_names(), ", "));
  if (budget < 0 || budget > (int64_t{1} << 31)) fail("rows kept by '{}': a budget of {}, expected 1 to {}", by, budget, int64_t{1} << 31);
  if (!(share >= 0 && share <= 1)) fail("rows kept by '{}': a share of {}, expected more than 0 and at most 1", by, share);
  if (threshold && !std::isfinite(*threshold)) fail("rows kept by '{}': a threshold of {}, expected a number", by, *threshold);
  if (budget == 0 && share == 0 && !threshold) fail("rows kept by '{}': how many is not said, expected a budget, a share or a threshold", by);
}

std::string KeptRule::text() const {
  std::vector<std::string> keys;
  if (budget > 0) keys.push_back(fmt::format("budget={}", budget));
  if (share > 0) keys.push_back(fmt::format("share={:.12g}%", 100 * share));
  if (threshold) keys.push_back(fmt::format("threshold={:.9g}", *threshold));
  if (seed > 0) keys.push_back(fmt::format("seed={}", seed));
  return fmt::format("{}:{}", by, fmt::join(keys, ","));
}

}  // namespace oryx
