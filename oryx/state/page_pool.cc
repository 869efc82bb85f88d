#include "oryx/state/page_pool.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <iterator>

#include "oryx/common/error.h"

namespace oryx {

PagePool::PagePool(int64_t pages) : pages_(pages), free_(pages) {
  if (pages > 0) stretches_.emplace(0, pages);
}

std::vector<int64_t> PagePool::take(int64_t count) {
  if (count > free_) fail("{} pages of rows are wanted, but of the state's {} only {} are free; drop a fork, or raise the budget", count, pages_, free_);
  std::vector<int64_t> out;
  while (count > 0) {
    // The smallest that holds them all; while none does, the largest.
    auto best = stretches_.begin();
    for (auto it = stretches_.begin(); it != stretches_.end(); ++it) {
      const bool holds = it->second >= count, best_holds = best->second >= count;
      if (holds != best_holds ? holds : holds ? it->second < best->second : it->second > best->second) best = it;
    }
    const auto [first, length] = *best;
    const int64_t taken = std::min(count, length);
    for (int64_t i = 0; i < taken; ++i) out.push_back(first + i);
    stretches_.erase(best);
    if (taken < length) stretches_.emplace(first + taken, length - taken);
    count -= taken, free_ -= taken;
  }
  return out;
}

void PagePool::give_back(int64_t page) {
  TORCH_CHECK(page >= 0 && page < pages_, "state: page ", page, " of ", pages_);
  const auto after = stretches_.upper_bound(page);
  const auto before = after == stretches_.begin() ? stretches_.end() : std::prev(after);
  const bool joins_before = before != stretches_.end() && before->first + before->second == page;
  const bool joins_after = after != stretches_.end() && after->first == page + 1;
  TORCH_CHECK(before == stretches_.end() || before->first + before->second <= page, "state: page ", page, " is free already");
  ++free_;
  const int64_t length = 1 + (joins_after ? after->second : 0);
  if (joins_after) stretches_.erase(after);
  if (joins_before) {
    before->second += length;
  } else {
    stretches_.emplace(page, length);
  }
}

}  // namespace oryx
