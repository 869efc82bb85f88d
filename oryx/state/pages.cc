#include "oryx/state/pages.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <map>

#include "oryx/common/error.h"
#include "oryx/common/progress.h"

namespace oryx {

namespace {

int64_t pages_of(int64_t tokens) { return (tokens + RowStore::kPageTokens - 1) / RowStore::kPageTokens; }

}  // namespace

void ByteBudget::check(int64_t bytes) const {
  if (limit_ == 0 || used_ + bytes <= limit_) return;
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

RowStore::RowStore(int64_t sequences, std::shared_ptr<ByteBudget> budget, at::Device device)
    : sequences_(static_cast<size_t>(sequences)), budget_(std::move(budget)), device_(device) {}

int64_t RowStore::add(const SlotSpec& spec) {
  specs_.push_back(spec);
  row_bytes_ += spec.bytes();
  return static_cast<int64_t>(specs_.size()) - 1;
}

std::shared_ptr<RowStore::Block> RowStore::make_block(int64_t pages) const {
  auto block = std::make_shared<Block>();
  block->charge = Charge(budget_, pages * kPageTokens * row_bytes_);
  for (const auto& spec : specs_) {
    std::vector<int64_t> shape = {pages * kPageTokens};
    shape.insert(shape.end(), spec.shape.begin(), spec.shape.end());
    block->data.push_back(at::empty(shape, at::device(device_).dtype(spec.dtype)));
  }
  return block;
}

void RowStore::find_runs(Sequence& s) {
  s.runs.clear();
  for (const auto& page : s.pages) {
    if (!s.runs.empty() && s.runs.back().block == page->block.get() && s.runs.back().first + s.runs.back().rows == page->first) {
      s.runs.back().rows += kPageTokens;
    } else {
      s.runs.push_back({page->block.get(), page->first, kPageTokens});
    }
  }
}

// f(block, its first row, rows) over tokens [begin, end).
template <typename F>
void RowStore::for_each_run(const Sequence& s, int64_t begin, int64_t end, F f) {
  int64_t at = 0;  // the run's first token
  for (const Run& run : s.runs) {
    const int64_t lo = std::max(begin, at), hi = std::min(end, at + run.rows);
    if (lo < hi) f(*run.block, run.first + lo - at, hi - lo);
    at += run.rows;
  }
  TORCH_CHECK(end <= at, "state: rows ", begin, " to ", end, " of ", at);
}

bool RowStore::writable(const Sequence& s, int64_t begin, int64_t end) const {
  if (end > s.capacity()) return false;
  for (int64_t i = begin / kPageTokens; i < pages_of(end); ++i) {
    if (s.pages[static_cast<size_t>(i)].use_count() > 1) return false;
  }
  return true;
}

// Tokens [begin, end) of one page.
void RowStore::copy_rows(const Sequence& from, int64_t begin, int64_t end, const Page& to) const {
  for_each_run(from, begin, end, [&](const Block& block, int64_t first, int64_t rows) {
    for (size_t i = 0; i < specs_.size(); ++i) {
      to.block->data[i].narrow(0, to.first + begin % kPageTokens, rows).copy_(block.data[i].narrow(0, first, rows));
    }
  });
}

void RowStore::make_room(const std::vector<int64_t>& lengths, const std::vector<int64_t>& needs, bool exact) {
  bool room = true;
  for (size_t n = 0; n < sequences_.size(); ++n) room = room && (needs[n] <= lengths[n] || writable(sequences_[n], lengths[n], needs[n]));
  if (room || specs_.empty()) return;
  // All sequences grow at once and to one size, so that those of a batch stay side by side. Growth by a quarter: appending token by token stays
  // linear, the reserve small.
  const int64_t need = *std::max_element(needs.begin(), needs.end());
  const int64_t tokens = exact ? need : std::max(need, need + need / 4 + 64);
  std::vector<int64_t> first(sequences_.size());  // the first page of each sequence that is replaced or new
  int64_t fresh = 0;
  for (size_t n = 0; n < sequences_.size(); ++n) {
    const auto& pages = sequences_[n].pages;
    const auto shared = [](const auto& page) { return page.use_count() > 1; };
    // A sequence that shares nothing moves as a whole and stays in one piece; one that shares keeps what it only reads.
    first[n] = std::any_of(pages.begin(), pages.end(), shared) ? std::min(lengths[n] / kPageTokens, static_cast<int64_t>(pages.size())) : 0;
    fresh += pages_of(tokens) - first[n];
  }
  const auto block = make_block(fresh);
  int64_t row = 0;
  for (size_t n = 0; n < sequences_.size(); ++n) {
    Sequence old = sequences_[n];
    auto& pages = sequences_[n].pages;
    pages.resize(static_cast<size_t>(first[n]));
    for (int64_t i = first[n]; i < pages_of(tokens); ++i, row += kPageTokens) {
      auto page = std::make_shared<const Page>(Page{block, row});
      const int64_t begin = i * kPageTokens, end = std::min(lengths[n], begin + kPageTokens);
      if (begin < end) copy_rows(old, begin, end, *page);
      pages.push_back(std::move(page));
    }
    find_runs(sequences_[n]);
  }
}

void RowStore::write(int64_t slot, int64_t n, int64_t begin, const at::Tensor& rows) {
  int64_t at = 0;
  for_each_run(sequences_[static_cast<size_t>(n)], begin, begin + rows.size(0), [&](const Block& block, int64_t first, int64_t count) {
    block.data[static_cast<size_t>(slot)].narrow(0, first, count).copy_(rows.narrow(0, at, count));
    at += count;
  });
}

at::Tensor RowStore::read(int64_t slot, int64_t length) const {
  const auto i = static_cast<size_t>(slot);
  const auto N = static_cast<int64_t>(sequences_.size());
  std::vector<int64_t> shape = {N, length};
  shape.insert(shape.end(), specs_[i].shape.begin(), specs_[i].shape.end());
  if (length == 0) return at::empty(shape, at::device(device_).dtype(specs_[i].dtype));
  // Side by side: every sequence in one run, at equal distances in one block.
  bool dense = true;
  int64_t distance = 0;
  for (size_t n = 0; n < sequences_.size() && dense; ++n) {
    const auto& runs = sequences_[n].runs;
    dense = !runs.empty() && runs[0].rows >= length && runs[0].block == sequences_[0].runs[0].block;
    if (n == 1 && dense) distance = runs[0].first - sequences_[0].runs[0].first;
    dense = dense && distance >= 0 && runs[0].first == sequences_[0].runs[0].first + static_cast<int64_t>(n) * distance;
  }
  if (dense) {
    const Run& run = sequences_[0].runs[0];
    const at::Tensor data = run.block->data[i].narrow(0, run.first, length + (N - 1) * distance);
    std::vector<int64_t> strides = data.strides().vec();
    strides.insert(strides.begin(), distance * data.stride(0));
    return data.as_strided(shape, strides);
  }
  at::Tensor out = at::empty(shape, at::device(device_).dtype(specs_[i].dtype));
  for (size_t n = 0; n < sequences_.size(); ++n) {
    int64_t at = 0;
    const Sequence& s = sequences_[n];
    for_each_run(s, 0, std::min(length, s.capacity()), [&](const Block& block, int64_t first, int64_t count) {
      out[static_cast<int64_t>(n)].narrow(0, at, count).copy_(block.data[i].narrow(0, first, count));
      at += count;
    });
  }
  return out;
}

RowStore RowStore::fork(const std::vector<int64_t>& from, const std::vector<int64_t>& lengths) const {
  RowStore store(static_cast<int64_t>(from.size()), budget_, device_);
  store.specs_ = specs_;
  store.row_bytes_ = row_bytes_;
  if (specs_.empty()) return store;
  // The page that is partly filled is copied now, so that neither the sequence nor its forks have to move to go on.
  int64_t partly = 0;
  for (const int64_t n : from) partly += lengths[static_cast<size_t>(n)] % kPageTokens > 0 ? 1 : 0;
  const auto block = partly > 0 ? make_block(partly) : nullptr;
  int64_t row = 0;
  for (size_t j = 0; j < from.size(); ++j) {
    const Sequence& source = sequences_[static_cast<size_t>(from[j])];
    const int64_t length = lengths[static_cast<size_t>(from[j])], full = length / kPageTokens;
    auto& pages = store.sequences_[j].pages;
    pages.assign(source.pages.begin(), source.pages.begin() + full);
    if (length % kPageTokens > 0) {
      auto page = std::make_shared<const Page>(Page{block, row});
      copy_rows(source, full * kPageTokens, length, *page);
      pages.push_back(std::move(page));
      row += kPageTokens;
    }
    find_runs(store.sequences_[j]);
  }
  return store;
}

RowStore RowStore::view(int64_t n) const {
  RowStore store(1, budget_, device_);
  store.specs_ = specs_;
  store.row_bytes_ = row_bytes_;
  store.sequences_[0] = sequences_[static_cast<size_t>(n)];
  return store;
}

int64_t RowStore::used_bytes(const std::vector<int64_t>& lengths) const {
  std::map<const Page*, int64_t> held;  // rows of each page
  for (size_t n = 0; n < sequences_.size(); ++n) {
    for (int64_t i = 0; i < pages_of(lengths[n]) && !specs_.empty(); ++i) {
      int64_t& rows = held[sequences_[n].pages[static_cast<size_t>(i)].get()];
      rows = std::max(rows, std::min(kPageTokens, lengths[n] - i * kPageTokens));
    }
  }
  int64_t bytes = 0;
  for (const auto& [page, rows] : held) bytes += rows * row_bytes_;
  return bytes;
}

int64_t RowStore::reserved_bytes() const {
  std::map<const Page*, int64_t> all;
  for (const Sequence& s : sequences_) {
    for (const auto& page : s.pages) all[page.get()] = kPageTokens * row_bytes_;
  }
  int64_t bytes = 0;
  for (const auto& [page, each] : all) bytes += each;
  return bytes;
}

}  // namespace oryx
