// Pages for recurrent slots and tails: each holds those of one sequence at one position, in one piece of memory. Checkpoints and entries of the ring are such
// pages; forks share them. Rows have a pool and a page size of their own (oryx/state/pages.h); both draw on one budget.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "oryx/state/pages.h"
#include "oryx/state/slot.h"

namespace oryx {

struct FixedPage {
  std::vector<at::Tensor> values;  // by slot, in the order in which the pool was given them
  at::Tensor memory;
  Charge charge;
};

class FixedPool {
 public:
  FixedPool(std::vector<SlotSpec> slots, std::shared_ptr<ByteBudget> budget, at::Device device);

  // A page whose values are unspecified. It comes back to the pool when nobody holds it; a few are kept for the next take(). Throws Error when the budget
  // does not allow a new one.
  std::shared_ptr<FixedPage> take();

  int64_t page_bytes() const;
  int64_t pages() const;       // that exist, free ones included

 private:
  struct Shelf;
  std::shared_ptr<Shelf> shelf_;
};

}  // namespace oryx
