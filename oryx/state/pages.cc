#include "oryx/state/pages.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <map>

#include "oryx/common/error.h"
#include "oryx/common/progress.h"

namespace oryx {

void ByteBudget::check(int64_t bytes) const {
  if (limit_ == 0 || used_ + bytes <= limit_) return;
  if (reclaim_) reclaim_();
  if (used_ + bytes <= limit_) return;
  fail("the state's budget is {} and {} of it are in use: {} more do not fit; drop a fork or a snapshot, trim, or raise the budget",
       human_bytes(static_cast<double>(limit_)), human_bytes(static_cast<double>(used_)), human_bytes(static_cast<double>(bytes)));
}

Charge::Charge(std::shared_ptr<ByteBudget> budget, int64_t bytes) : budget_(std::move(budget)), bytes_(bytes) {
  budget_->check(bytes);
  budget_->used_ += bytes;
}

Charge::~Charge() {
  if (budget_ != nullptr) budget_->used_ -= bytes_;
}

Charge& Charge::operator=(Charge&& other) noexcept {
  std::swap(budget_, other.budget_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

RowStore::RowStore(int64_t sequences, std::shared_ptr<ByteBudget> budget, at::Device device, int64_t page_tokens, RowBound bound)
    : sequences_(static_cast<size_t>(sequences)), budget_(std::move(budget)), device_(device), page_tokens_(page_tokens), bound_(bound) {}

int64_t RowStore::add(const SlotSpec& spec) {
  specs_.push_back(spec);
  row_bytes_ += spec.bytes();
  return static_cast<int64_t>(specs_.size()) - 1;
}

std::shared_ptr<RowStore::Block> RowStore::make_block(int64_t pages) const {
  auto block = std::make_shared<Block>();
  block->pages = pages;
  block->charge = Charge(budget_, pages * page_tokens_ * row_bytes_);
  for (const auto& spec : specs_) {
    std::vector<int64_t> shape = {pages * page_tokens_};
    shape.insert(shape.end(), spec.shape.begin(), spec.shape.end());
    block->data.push_back(at::empty(shape, at::device(device_).dtype(spec.dtype)));
    block->paged.push_back(block->data.back().unflatten(0, {pages, page_tokens_}));
  }
  return block;
}

void RowStore::make_pool(int64_t pages) {
  if (specs_.empty()) return;
  TORCH_CHECK(pages * page_tokens_ <= INT32_MAX, "state: a pool of ", pages, " pages");
  pool_ = std::make_shared<Pool>(Pool{make_block(pages), PagePool(pages)});
}

std::vector<std::shared_ptr<const RowStore::Page>> RowStore::fresh_pages(int64_t count) const {
  std::vector<std::shared_ptr<const Page>> out;
  if (count == 0) return out;
  if (pool_ != nullptr) {
    for (const int64_t number : pool_->free.take(count)) {
      out.emplace_back(new Page{pool_->block, number * page_tokens_}, [pool = pool_, number](const Page* page) {
        pool->free.give_back(number);
        delete page;
      });
    }
    return out;
  }
  const auto block = make_block(count);
  for (int64_t i = 0; i < count; ++i) out.push_back(std::make_shared<const Page>(Page{block, i * page_tokens_}));
  return out;
}

void RowStore::find_runs(Sequence& s) {
  ++version_;
  s.runs.clear();
  for (const auto& [index, page] : s.pages) {
    Run* last = s.runs.empty() ? nullptr : &s.runs.back();
    const bool joins = last != nullptr && last->block == page->block.get() && last->first + last->rows == page->first &&
                       last->token + last->rows == index * page_tokens_;
    if (joins) {
      last->rows += page_tokens_;
    } else {
      s.runs.push_back({page->block.get(), index * page_tokens_, page->first, page_tokens_});
    }
  }
}

// f(block, its first row, rows) over tokens [begin, end).
template <typename F>
void RowStore::for_each_run(const Sequence& s, int64_t begin, int64_t end, F f) {
  int64_t at = begin;
  for (const Run& run : s.runs) {
    const int64_t lo = std::max(at, run.token), hi = std::min(end, run.token + run.rows);
    if (lo >= hi) continue;
    TORCH_CHECK(lo == at, "state: row ", at, " is not held");
    f(*run.block, run.first + lo - run.token, hi - lo);
    at = hi;
  }
  TORCH_CHECK(at >= end, "state: rows ", begin, " to ", end, ", held up to ", at);
}

bool RowStore::writable(const Sequence& s, int64_t begin, int64_t end) const {
  if (end > capacity(s)) return false;
  for (int64_t i = begin / page_tokens_; i < pages_of(end); ++i) {
    if (s.pages[static_cast<size_t>(i)].page.use_count() > 1) return false;
  }
  return true;
}

// Tokens [begin, end) of one page.
void RowStore::copy_rows(const Sequence& from, int64_t begin, int64_t end, const Page& to) const {
  ops::Copies copies;
  int64_t row = to.first + begin % page_tokens_;
  for_each_run(from, begin, end, [&](const Block& block, int64_t first, int64_t rows) {
    for (size_t i = 0; i < specs_.size(); ++i) copies.add_rows(to.block->data[i], row, block.data[i], first, rows);
    row += rows;
  });
  copies.run();
}

void RowStore::make_room(const std::vector<int64_t>& lengths, const std::vector<int64_t>& needs, bool exact) {
  if (specs_.empty()) return;
  if (bound_.on()) return make_bounded_room(lengths, needs, exact);
  bool room = true;
  for (size_t n = 0; n < sequences_.size(); ++n) room = room && (needs[n] <= lengths[n] || writable(sequences_[n], lengths[n], needs[n]));
  if (room) return;
  if (pool_ != nullptr) return make_pool_room(lengths, needs);
  // All sequences grow at once and to one size, so that those of a batch stay side by side. Growth by a quarter: appending token by token stays
  // linear, the reserve small.
  const int64_t need = *std::max_element(needs.begin(), needs.end());
  const int64_t tokens = exact ? need : std::max(need, need + need / 4 + 64);
  std::vector<int64_t> first(sequences_.size());  // the first page of each sequence that is replaced or new
  int64_t fresh = 0;
  for (size_t n = 0; n < sequences_.size(); ++n) {
    const auto& pages = sequences_[n].pages;
    const auto shared = [](const Entry& entry) { return entry.page.use_count() > 1; };
    // A sequence that shares nothing moves as a whole and stays in one piece; one that shares keeps what it only reads.
    first[n] = std::any_of(pages.begin(), pages.end(), shared) ? std::min(lengths[n] / page_tokens_, static_cast<int64_t>(pages.size())) : 0;
    fresh += pages_of(tokens) - first[n];
  }
  auto new_pages = fresh_pages(fresh);
  size_t used = 0;
  for (size_t n = 0; n < sequences_.size(); ++n) {
    Sequence old = sequences_[n];
    auto& pages = sequences_[n].pages;
    pages.resize(static_cast<size_t>(first[n]));
    for (int64_t i = first[n]; i < pages_of(tokens); ++i) {
      auto page = std::move(new_pages[used++]);
      const int64_t begin = i * page_tokens_, end = std::min(lengths[n], begin + page_tokens_);
      if (begin < end) copy_rows(old, begin, end, *page);
      pages.push_back({i, std::move(page)});
    }
    find_runs(sequences_[n]);
  }
}

// Each sequence by itself: pages that it shares and will write into are replaced by copies, and what is missing comes behind.
void RowStore::make_pool_room(const std::vector<int64_t>& lengths, const std::vector<int64_t>& needs) {
  const auto replaced = [&](size_t n, int64_t i) {
    const auto& pages = sequences_[n].pages;
    return i >= static_cast<int64_t>(pages.size()) || pages[static_cast<size_t>(i)].page.use_count() > 1;
  };
  int64_t fresh = 0;
  for (size_t n = 0; n < sequences_.size(); ++n) {
    for (int64_t i = lengths[n] / page_tokens_; needs[n] > lengths[n] && i < pages_of(needs[n]); ++i) fresh += replaced(n, i) ? 1 : 0;
  }
  auto new_pages = fresh_pages(fresh);
  size_t used = 0;
  for (size_t n = 0; n < sequences_.size(); ++n) {
    if (needs[n] <= lengths[n]) continue;
    auto& pages = sequences_[n].pages;
    for (int64_t i = lengths[n] / page_tokens_; i < pages_of(needs[n]); ++i) {
      if (!replaced(n, i)) continue;
      auto page = std::move(new_pages[used++]);
      const int64_t begin = i * page_tokens_, end = std::min(lengths[n], begin + page_tokens_);
      if (begin < end) copy_rows(sequences_[n], begin, end, *page);
      if (i < static_cast<int64_t>(pages.size())) {
        pages[static_cast<size_t>(i)].page = std::move(page);
      } else {
        pages.push_back({i, std::move(page)});
      }
    }
    find_runs(sequences_[n]);
  }
}

void RowStore::add_room(int64_t n, int64_t need) {
  TORCH_CHECK(!bound_.on(), "state: room behind the rows of a bounded store");
  Sequence& s = sequences_[static_cast<size_t>(n)];
  const auto held = static_cast<int64_t>(s.pages.size()), pages = pages_of(need) - held;
  if (specs_.empty() || pages <= 0) return;
  auto fresh = fresh_pages(pages);
  for (int64_t i = 0; i < pages; ++i) s.pages.push_back({held + i, std::move(fresh[static_cast<size_t>(i)])});
  find_runs(s);
}

void RowStore::take(RowStore& from, int64_t n) {
  if (specs_.empty()) specs_ = from.specs_, row_bytes_ = from.row_bytes_, pool_ = from.pool_;
  sequences_.emplace_back();
  take(from, n, static_cast<int64_t>(sequences_.size()) - 1);
}

void RowStore::take(RowStore& from, int64_t n, int64_t to) {
  TORCH_CHECK(from.budget_ == budget_ && from.pool_ == pool_ && from.page_tokens_ == page_tokens_, "state: a sequence of another store");
  Sequence& place = sequences_[static_cast<size_t>(to)];
  TORCH_CHECK(place.pages.empty(), "state: the rows of sequence ", to, " have pages already");
  place = std::move(from.sequences_[static_cast<size_t>(n)]);
  from.sequences_[static_cast<size_t>(n)] = {};
  ++version_, ++from.version_;
}

void RowStore::clear(int64_t n) {
  sequences_[static_cast<size_t>(n)] = {};
  ++version_;
}

at::Tensor RowStore::memory(int64_t slot) const {
  const Block* block = pool_ != nullptr ? pool_->block.get() : nullptr;
  for (size_t n = 0; n < sequences_.size() && pool_ == nullptr; ++n) {
    for (const Entry& e : sequences_[n].pages) {
      if (block == nullptr) block = e.page->block.get();
      if (block != e.page->block.get()) return {};
    }
  }
  return block != nullptr ? block->data[static_cast<size_t>(slot)] : at::Tensor();
}

std::vector<RowStore::NumberedPage> RowStore::numbered_pages(int64_t n) const {
  std::vector<NumberedPage> out;
  for (const auto& [index, page] : sequences_[static_cast<size_t>(n)].pages) out.push_back({index, static_cast<int32_t>(page->first / page_tokens_)});
  return out;
}

std::array<int64_t, 4> RowStore::kept(int64_t begin, int64_t end) const {
  if (!bound_.on()) return {begin, end, end, end};
  const int64_t tail = std::min(end, std::max({begin, bound_.first, end - bound_.last}));
  return {begin, std::max(begin, std::min(end, bound_.first)), tail, end};
}

void RowStore::write(int64_t slot, int64_t n, int64_t begin, const at::Tensor& rows, ops::Copies* together) {
  ops::Copies own, &copies = together != nullptr ? *together : own;
  const auto [head, head_end, tail, tail_end] = kept(begin, begin + rows.size(0));
  for (const auto& [from, to] : {std::pair(head, head_end), std::pair(tail, tail_end)}) {
    int64_t at = from - begin;
    if (from < to) {
      for_each_run(sequences_[static_cast<size_t>(n)], from, to, [&](const Block& block, int64_t first, int64_t count) {
        copies.add_rows(block.data[static_cast<size_t>(slot)], first, rows, at, count);
        at += count;
      });
    }
  }
  own.run();
}

at::Tensor RowStore::read(int64_t slot, int64_t length) const {
  return read(slot, std::vector<int64_t>(sequences_.size(), 0), std::vector<int64_t>(sequences_.size(), length));
}

at::Tensor RowStore::read(int64_t slot, const std::vector<int64_t>& begins, const std::vector<int64_t>& ends) const {
  const auto i = static_cast<size_t>(slot);
  const auto N = static_cast<int64_t>(sequences_.size());
  int64_t longest = 0;
  for (size_t n = 0; n < sequences_.size(); ++n) longest = std::max(longest, ends[n] - begins[n]);
  std::vector<int64_t> shape = {N, longest};
  shape.insert(shape.end(), specs_[i].shape.begin(), specs_[i].shape.end());
  if (longest == 0) return at::empty(shape, at::device(device_).dtype(specs_[i].dtype));
  // Side by side: every sequence in one run, at equal distances in one block.
  bool dense = true;
  int64_t origin = 0, distance = 0;
  const Block* block = nullptr;
  for (size_t n = 0; n < sequences_.size() && dense; ++n) {
    const auto& runs = sequences_[n].runs;
    const auto run = std::find_if(runs.begin(), runs.end(), [&](const Run& r) { return r.token <= begins[n] && begins[n] < r.token + r.rows; });
    dense = run != runs.end() && begins[n] + longest <= run->token + run->rows && (block == nullptr || block == run->block);
    if (!dense) break;
    const int64_t first = run->first + begins[n] - run->token;
    if (n == 0) block = run->block, origin = first;
    if (n == 1) distance = first - origin;
    dense = distance >= 0 && first == origin + static_cast<int64_t>(n) * distance;
  }
  if (dense) {
    const at::Tensor data = block->data[i].narrow(0, origin, longest + (N - 1) * distance);
    std::vector<int64_t> strides = data.strides().vec();
    strides.insert(strides.begin(), distance * data.stride(0));
    return data.as_strided(shape, strides);
  }
  at::Tensor out = at::empty(shape, at::device(device_).dtype(specs_[i].dtype));
  for (size_t n = 0; n < sequences_.size(); ++n) {
    int64_t at = 0;
    const Sequence& s = sequences_[n];
    for_each_run(s, begins[n], std::max(begins[n], std::min(ends[n], capacity(s))), [&](const Block& block, int64_t first, int64_t count) {
      out[static_cast<int64_t>(n)].narrow(0, at, count).copy_(block.data[i].narrow(0, first, count));
      at += count;
    });
  }
  return out;
}

RowStore::Pages RowStore::pages() const {
  Pages all;
  std::map<const Block*, int32_t> first;  // number of its first page
  int32_t numbers = 0;
  int64_t most = 0;
  for (const Sequence& s : sequences_) most = std::max(most, s.pages.empty() ? 0 : s.pages.back().index + 1);
  all.blocks = at::full({static_cast<int64_t>(sequences_.size()), most}, -1, at::kInt);
  int32_t* row = all.blocks.mutable_data_ptr<int32_t>();
  for (const Sequence& s : sequences_) {
    for (const auto& [index, page] : s.pages) {
      const Block* block = page->block.get();
      const auto [at, fresh] = first.emplace(block, numbers);
      if (fresh) {
        all.pools.push_back(block);
        numbers += static_cast<int32_t>(block->pages);
      }
      row[index] = at->second + static_cast<int32_t>(page->first / page_tokens_);
    }
    row += most;
  }
  return all;
}

std::vector<at::Tensor> RowStore::pools(int64_t slot, const Pages& pages) const {
  std::vector<at::Tensor> out;
  for (const Block* block : pages.pools) out.push_back(block->paged[static_cast<size_t>(slot)]);
  return out;
}

RowStore RowStore::fork(const std::vector<int64_t>& from, const std::vector<int64_t>& lengths) const {
  RowStore store(static_cast<int64_t>(from.size()), budget_, device_, page_tokens_, bound_);
  store.specs_ = specs_;
  store.row_bytes_ = row_bytes_;
  store.pool_ = pool_;
  if (specs_.empty()) return store;
  // The page that is partly filled is copied now, so that neither the sequence nor its forks have to move to go on.
  int64_t partly = 0;
  for (const int64_t n : from) partly += lengths[static_cast<size_t>(n)] % page_tokens_ > 0 ? 1 : 0;
  auto new_pages = fresh_pages(partly);
  size_t used = 0;
  for (size_t j = 0; j < from.size(); ++j) {
    const Sequence& source = sequences_[static_cast<size_t>(from[j])];
    const int64_t length = lengths[static_cast<size_t>(from[j])], full = length / page_tokens_;
    Sequence& own = store.sequences_[j];
    own.from = source.from;
    for (const Entry& entry : source.pages) {
      if (entry.index < full) own.pages.push_back(entry);
    }
    if (length % page_tokens_ > 0) {
      auto page = std::move(new_pages[used++]);
      copy_rows(source, full * page_tokens_, length, *page);
      own.pages.push_back({full, std::move(page)});
    }
    store.find_runs(own);
  }
  return store;
}

RowStore RowStore::view(int64_t n) const {
  RowStore store(1, budget_, device_, page_tokens_, bound_);
  store.specs_ = specs_;
  store.row_bytes_ = row_bytes_;
  store.pool_ = pool_;
  store.sequences_[0] = sequences_[static_cast<size_t>(n)];
  return store;
}

int64_t RowStore::used_bytes(const std::vector<int64_t>& lengths) const {
  std::map<const Page*, int64_t> held;  // rows of each page
  for (size_t n = 0; n < sequences_.size() && !specs_.empty(); ++n) {
    const int64_t length = lengths[n], head = std::min(length, bound_.first), tail = std::max(bound_.first, from(static_cast<int64_t>(n)));
    for (const auto& [index, page] : sequences_[n].pages) {
      const int64_t begin = index * page_tokens_, end = begin + page_tokens_;
      const int64_t here = std::max<int64_t>(0, std::min(end, head) - begin) + std::max<int64_t>(0, std::min(end, length) - std::max(begin, tail));
      int64_t& rows = held[page.get()];
      rows = std::max(rows, here);
    }
  }
  int64_t bytes = 0;
  for (const auto& [page, rows] : held) bytes += rows * row_bytes_;
  return bytes;
}

int64_t RowStore::reserved_bytes() const {
  std::map<const void*, int64_t> all;
  for (const Sequence& s : sequences_) {
    if (s.region.block) all[s.region.block.get()] = s.region.block->pages;
  }
  for (const Sequence& s : sequences_) {
    for (const auto& [index, page] : s.pages) {
      if (all.count(page->block.get()) == 0) all[page.get()] = 1;
    }
    for (const auto& page : s.spare) all[page.get()] = 1;
  }
  int64_t pages = 0;
  for (const auto& [what, each] : all) pages += each;
  return pages * page_tokens_ * row_bytes_;
}

}  // namespace oryx
