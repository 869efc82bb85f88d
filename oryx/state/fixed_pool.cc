#include "oryx/state/fixed_pool.h"

#include <ATen/ATen.h>

namespace oryx {

namespace {

constexpr int64_t kAlign = 64;    // bytes: a line of the processor's caches
constexpr size_t kKeptPages = 2;  // free ones

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

}  // namespace

struct FixedPool::Shelf {
  std::vector<SlotSpec> slots;
  std::shared_ptr<ByteBudget> budget;
  at::Device device;
  std::vector<std::unique_ptr<FixedPage>> free = {};
  int64_t pages = 0;

  int64_t bytes() const {
    int64_t sum = 0;
    for (const auto& slot : slots) sum += slot.bytes();
    return sum;
  }
  void drop(FixedPage* page) {
    --pages;
    delete page;
  }
};

FixedPool::FixedPool(std::vector<SlotSpec> slots, std::shared_ptr<ByteBudget> budget, at::Device device)
    : shelf_(std::make_shared<Shelf>(Shelf{std::move(slots), std::move(budget), device})) {
  shelf_->budget->set_reclaim([shelf = std::weak_ptr<Shelf>(shelf_)] {
    const auto held = shelf.lock();
    if (held == nullptr) return;
    held->pages -= static_cast<int64_t>(held->free.size());
    held->free.clear();
  });
}

std::shared_ptr<FixedPage> FixedPool::take() {
  std::unique_ptr<FixedPage> page;
  if (!shelf_->free.empty()) {
    page = std::move(shelf_->free.back());
    shelf_->free.pop_back();
  } else {
    page = std::make_unique<FixedPage>();
    // What the slots hold is what counts; lining them up costs less than a line of the cache each.
    page->charge = Charge(shelf_->budget, shelf_->bytes());
    int64_t size = 0, at = 0;
    for (const auto& slot : shelf_->slots) size += aligned(slot.bytes());
    page->memory = at::empty({size}, at::device(shelf_->device).dtype(at::kByte));
    for (const auto& slot : shelf_->slots) {
      page->values.push_back(page->memory.narrow(0, at, slot.bytes()).view(slot.dtype).view(slot.shape));
      at += aligned(slot.bytes());
    }
    ++shelf_->pages;
  }
  return {page.release(), [shelf = shelf_](FixedPage* done) {
            if (shelf->free.size() >= kKeptPages) return shelf->drop(done);
            shelf->free.emplace_back(done);
          }};
}

int64_t FixedPool::page_bytes() const { return shelf_->bytes(); }
int64_t FixedPool::pages() const { return shelf_->pages; }

}  // namespace oryx
