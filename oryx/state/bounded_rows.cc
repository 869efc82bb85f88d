// Rows under a bound: pages from a region of constant size, or so many of a pool.
#include <ATen/ATen.h>

#include "oryx/state/pages.h"

namespace oryx {

const RowStore::Entry* RowStore::find(const Sequence& s, int64_t index) const {
  const auto it = std::lower_bound(s.pages.begin(), s.pages.end(), index, [](const Entry& e, int64_t i) { return e.index < i; });
  return it != s.pages.end() && it->index == index ? &*it : nullptr;
}

// Those for which dropped(entry) holds.
template <typename F>
void RowStore::drop_pages(Sequence& s, F dropped) {
  const size_t before = s.pages.size();
  // What is nobody else's is wanted again.
  for (const Entry& e : s.pages) {
    if (pool_ != nullptr && dropped(e) && e.page.use_count() == 1) s.spare.push_back(e.page);
  }
  std::erase_if(s.pages, dropped);
  if (s.pages.size() != before) find_runs(s);
}

void RowStore::retire(int64_t n, int64_t length) {
  Sequence& s = sequences_[static_cast<size_t>(n)];
  if (!bound_.on() || length - bound_.last <= bound_.first) return;
  s.from = std::max(s.from, length - bound_.last);
  const int64_t first = pages_of(bound_.first), last = s.from / page_tokens_;  // pages that lie wholly between
  drop_pages(s, [&](const Entry& e) { return e.index >= first && e.index < last; });
}

void RowStore::trim(int64_t n, int64_t length) {
  Sequence& s = sequences_[static_cast<size_t>(n)];
  if (!bound_.on()) return;  // pages behind the length are room
  // The region's last places that nobody else holds are free again: the tokens that come next stand where these did.
  for (auto e = s.pages.rbegin(); pool_ == nullptr && e != s.pages.rend() && e->index >= pages_of(length); ++e) {
    if (!in_region(s, *e) || e->page.use_count() > 1 || e->page->first / page_tokens_ != s.region.begin + s.region.used - 1) break;
    --s.region.used;
  }
  drop_pages(s, [&](const Entry& e) { return e.index >= pages_of(length); });
  s.from = length <= bound_.first ? 0 : std::min(s.from, length);
}

// Pages that tokens [length, need) of a sequence want new; of its own those that another sequence holds too are replaced.
std::vector<int64_t> RowStore::fresh_indices(const Sequence& s, int64_t length, int64_t need) const {
  std::vector<int64_t> fresh;
  const auto [head, head_end, tail, tail_end] = kept(length, need);
  const auto want = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin / page_tokens_; begin < end && i < pages_of(end); ++i) {
      const Entry* entry = find(s, i);
      const bool free = entry != nullptr && entry->page.use_count() == 1;
      if (!free && (fresh.empty() || fresh.back() < i)) fresh.push_back(i);
    }
  };
  want(head, head_end);
  want(tail, tail_end);
  return fresh;
}

// What a region must give for tokens [length, need) of a sequence; `exact`: only its size is wanted, pages come when their tokens do.
RowStore::Wanted RowStore::wanted(const Sequence& s, int64_t length, int64_t need, bool exact) const {
  Wanted w;
  if (need <= length) return w;
  const int64_t whole = region_pages(bound_, page_tokens_);
  if (exact) {
    const int64_t size = std::min(whole, pages_of(need));
    if (s.region.pages < size) w.region = std::max(size, static_cast<int64_t>(s.pages.size()));
    return w;
  }
  w.fresh = fresh_indices(s, length, need);
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
    // Within a block pages move towards its front, in pieces that do not reach into where they come from; towards its end only to where none of them stands.
    const int64_t rows = static_cast<int64_t>(end - begin) * page_tokens_, ahead = from.first - to.first;
    TORCH_INTERNAL_ASSERT(from.block != to.block || ahead > 0 || -ahead >= rows, "state: pages out of order");
    const int64_t most = from.block == to.block && ahead > 0 ? ahead : rows;
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

// The page `index` of a sequence: new, or in place of the one there, whose rows it takes over.
void RowStore::put_in(Sequence& s, int64_t index, std::shared_ptr<const Page> page) {
  const auto it = std::lower_bound(s.pages.begin(), s.pages.end(), index, [](const Entry& e, int64_t i) { return e.index < i; });
  if (it == s.pages.end() || it->index != index) {
    s.pages.insert(it, {index, std::move(page)});
    return;
  }
  copy_pages({{*it->page, *page}});
  it->page = std::move(page);
}

// `exact`: each sequence gets the pages that it will have at most. Else its spare ones are put in, and what is missing comes from those that nobody has.
void RowStore::make_bounded_pool_room(const std::vector<int64_t>& lengths, const std::vector<int64_t>& needs, bool exact) {
  const int64_t whole = region_pages(bound_, page_tokens_);
  std::vector<std::vector<int64_t>> fresh(sequences_.size());
  std::vector<int64_t> missing(sequences_.size(), 0);
  int64_t all = 0;
  for (size_t n = 0; n < sequences_.size(); ++n) {
    if (needs[n] <= lengths[n]) continue;
    const Sequence& s = sequences_[n];
    const auto spare = static_cast<int64_t>(s.spare.size()), own = std::count_if(s.pages.begin(), s.pages.end(), [](const Entry& e) { return e.page.use_count() == 1; });
    if (!exact) fresh[n] = fresh_indices(s, lengths[n], needs[n]);
    const int64_t wanted = exact ? std::min(whole, pages_of(needs[n])) - own : static_cast<int64_t>(fresh[n].size());
    missing[n] = std::max<int64_t>(0, wanted - spare);
    all += missing[n];
  }
  auto pages = fresh_pages(all);
  size_t used = 0;
  for (size_t n = 0; n < sequences_.size(); ++n) {
    Sequence& s = sequences_[n];
    for (int64_t i = 0; i < missing[n]; ++i) s.spare.push_back(std::move(pages[used++]));
    for (const int64_t index : fresh[n]) {
      put_in(s, index, std::move(s.spare.front()));
      s.spare.pop_front();
    }
    if (!fresh[n].empty()) find_runs(s);
  }
}

void RowStore::make_bounded_room(const std::vector<int64_t>& lengths, const std::vector<int64_t>& needs, bool exact) {
  if (pool_ != nullptr) return make_bounded_pool_room(lengths, needs, exact);
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
    for (const int64_t index : w.fresh) put_in(s, index, take_page(s));
    find_runs(s);
  }
}

}  // namespace oryx
