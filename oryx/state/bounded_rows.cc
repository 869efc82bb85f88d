// Rows under a bound: pages from a region of constant size.
#include <ATen/ATen.h>

#include "oryx/state/pages.h"

namespace oryx {

const RowStore::Entry* RowStore::find(const Sequence& s, int64_t index) const {
  const auto it = std::lower_bound(s.pages.begin(), s.pages.end(), index, [](const Entry& e, int64_t i) { return e.index < i; });
  return it != s.pages.end() && it->index == index ? &*it : nullptr;
}

void RowStore::retire(int64_t n, int64_t length) {
  Sequence& s = sequences_[static_cast<size_t>(n)];
  if (!bound_.on() || length - bound_.last <= bound_.first) return;
  s.from = std::max(s.from, length - bound_.last);
  const int64_t first = pages_of(bound_.first), last = s.from / page_tokens_;  // pages that lie wholly between
  const size_t before = s.pages.size();
  std::erase_if(s.pages, [&](const Entry& e) { return e.index >= first && e.index < last; });
  if (s.pages.size() != before) find_runs(s);
}

void RowStore::trim(int64_t n, int64_t length) {
  Sequence& s = sequences_[static_cast<size_t>(n)];
  if (!bound_.on()) return;  // pages behind the length are room
  std::erase_if(s.pages, [&](const Entry& e) { return e.index >= pages_of(length); });
  s.from = length <= bound_.first ? 0 : std::min(s.from, length);
  find_runs(s);
}

// What a region must give for tokens [length, need) of a sequence; `exact`: only its size is wanted, pages come when their tokens do. Of the sequence's own
// pages those that another sequence holds too are replaced.
RowStore::Wanted RowStore::wanted(const Sequence& s, int64_t length, int64_t need, bool exact) const {
  Wanted w;
  if (need <= length) return w;
  const int64_t whole = region_pages(bound_, page_tokens_);
  if (exact) {
    const int64_t size = std::min(whole, pages_of(need));
    if (s.region.pages < size) w.region = std::max(size, static_cast<int64_t>(s.pages.size()));
    return w;
  }
  const auto [head, head_end, tail, tail_end] = kept(length, need);
  const auto want = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin / page_tokens_; begin < end && i < pages_of(end); ++i) {
      const Entry* entry = find(s, i);
      const bool free = entry != nullptr && entry->page.use_count() == 1;
      if (!free && (w.fresh.empty() || w.fresh.back() < i)) w.fresh.push_back(i);
    }
  };
  want(head, head_end);
  want(tail, tail_end);
  const auto fresh = static_cast<int64_t>(w.fresh.size());
  if (s.region.used + fresh <= s.region.pages) return w;
  const bool grown = s.region.pages >= std::min(whole, pages_of(need));
  if (grown && movable(s) && pages_in_region(s) + fresh <= s.region.pages) return w;
  w.region = std::max(static_cast<int64_t>(s.pages.size()) + fresh, std::min(whole, pages_of(need + need / 4 + 64)));
  return w;
}

bool RowStore::in_region(const Sequence& s, const Entry& e) const {
  const int64_t at = e.page->first / page_tokens_ - s.region.begin;
  return s.region.block == e.page->block && at >= 0 && at < s.region.pages;
}

int64_t RowStore::pages_in_region(const Sequence& s) const {
  return std::count_if(s.pages.begin(), s.pages.end(), [&](const Entry& e) { return in_region(s, e); });
}

// Whether nobody else holds a page of the region, be it one that this sequence has dropped long since: its memory is to be written again. Every page holds its
// block, and so does every region.
bool RowStore::movable(const Sequence& s) const {
  const auto& block = s.region.block;
  int64_t holders = 0;
  for (const Sequence& other : sequences_) {
    holders += other.region.block == block ? 1 : 0;
    for (const Entry& e : other.pages) {
      if (e.page->block != block) continue;
      if (e.page.use_count() > 1) return false;
      ++holders;
    }
  }
  return block != nullptr && block.use_count() == holders;
}

std::shared_ptr<const RowStore::Page> RowStore::take_page(Sequence& s) {
  return std::make_shared<const Page>(Page{s.region.block, (s.region.begin + s.region.used++) * page_tokens_});
}

// Pages that stand side by side before and behind are one copy in every slot: on a GPU, launches are what moving costs.
void RowStore::copy_pages(const std::vector<Move>& moves) const {
  for (size_t begin = 0, end = 1; begin < moves.size(); begin = end++) {
    const Page &from = moves[begin].from, &to = moves[begin].to;
    const auto follows = [&](const Move& next, int64_t distance) {
      return next.from.block == from.block && next.to.block == to.block && next.from.first == from.first + distance && next.to.first == to.first + distance;
    };
    while (end < moves.size() && follows(moves[end], static_cast<int64_t>(end - begin) * page_tokens_)) ++end;
    // Within a block pages move towards its front, in pieces that do not reach into where they come from.
    const int64_t rows = static_cast<int64_t>(end - begin) * page_tokens_, most = from.block == to.block ? from.first - to.first : rows;
    TORCH_INTERNAL_ASSERT(most > 0, "state: pages out of order");
    for (int64_t at = 0; at < rows; at += most) {
      const int64_t count = std::min(most, rows - at);
      ops::Copies copies;  // a launch writes nothing that another of its copies reads
      for (size_t i = 0; i < specs_.size(); ++i) copies.add_rows(to.block->data[i], to.first + at, from.block->data[i], from.first + at, count);
      copies.run();
    }
  }
}

// Moves the region's pages to its front. They stand there in the order of their tokens: each goes to a place that is free or its own.
void RowStore::compact(Sequence& s) {
  s.region.used = 0;
  std::vector<Move> moves;
  for (Entry& e : s.pages) {
    if (!in_region(s, e)) continue;
    auto page = take_page(s);
    if (page->first == e.page->first) continue;
    moves.push_back({*e.page, *page});
    e.page = std::move(page);
  }
  copy_pages(moves);
}

void RowStore::make_bounded_room(const std::vector<int64_t>& lengths, const std::vector<int64_t>& needs, bool exact) {
  std::vector<Wanted> all;
  int64_t pages = 0;
  for (size_t n = 0; n < sequences_.size(); ++n) {
    all.push_back(wanted(sequences_[n], lengths[n], needs[n], exact));
    pages += all.back().region;
  }
  // One block for all new regions: what may fail does so before anything has changed, and the sequences of a batch stand at equal distances.
  const auto block = pages > 0 ? make_block(pages) : nullptr;
  int64_t at = 0;
  for (size_t n = 0; n < sequences_.size(); ++n) {
    Sequence& s = sequences_[n];
    const Wanted& w = all[n];
    if (w.fresh.empty() && w.region == 0) continue;
    if (w.region > 0) {
      s.region = {block, at, w.region, 0};
      at += w.region;
      // Pages that nobody else holds move along; the others are read where they are.
      std::vector<Move> moves;
      for (Entry& e : s.pages) {
        if (e.page.use_count() > 1) continue;
        auto page = take_page(s);
        moves.push_back({*e.page, *page});
        e.page = std::move(page);
      }
      copy_pages(moves);
    } else if (s.region.used + static_cast<int64_t>(w.fresh.size()) > s.region.pages) {
      compact(s);
    }
    for (const int64_t index : w.fresh) {
      auto page = take_page(s);
      const auto it = std::lower_bound(s.pages.begin(), s.pages.end(), index, [](const Entry& e, int64_t i) { return e.index < i; });
      if (it == s.pages.end() || it->index != index) {
        s.pages.insert(it, {index, std::move(page)});
        continue;
      }
      copy_pages({{*it->page, *page}});
      it->page = std::move(page);
    }
    find_runs(s);
  }
}

}  // namespace oryx
