// Which pages of a fixed number are free: those that are asked for together stand side by side where there is room for it.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace oryx {

class PagePool {
 public:
  explicit PagePool(int64_t pages);

  // `count` pages, from the smallest stretch of free ones that holds them all, else from the largest ones. Throws Error, and takes none, when there are too few.
  std::vector<int64_t> take(int64_t count);
  void give_back(int64_t page);

  int64_t pages() const { return pages_; }
  int64_t free() const { return free_; }

 private:
  int64_t pages_, free_;
  std::map<int64_t, int64_t> stretches_;  // of free pages: the first -> how many
};

}  // namespace oryx
