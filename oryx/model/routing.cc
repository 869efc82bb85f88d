#include "oryx/model/routing.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

#include "oryx/model/device.h"

namespace oryx {

Routing::Routing(int64_t B, int64_t T, const std::string& mixer) : B_(B), T_(T), mixers_{mixer} {
  for (int64_t b = 0; b < B; ++b) spans_.push_back({static_cast<int32_t>(b), 0, static_cast<int32_t>(T), 0});
}

Routing::Routing(int64_t B, int64_t T, std::vector<std::string> mixers, std::vector<RoutedSpan> spans)
    : B_(B), T_(T), mixers_(std::move(mixers)), spans_(std::move(spans)) {
  int64_t at = 0;  // flat position that must be covered next
  for (const auto& s : spans_) {
    TORCH_CHECK(s.row * T_ + s.begin == at && s.begin < s.end && s.end <= T_, "routing: spans must cover every token once, in order");
    TORCH_CHECK(s.mixer >= 0 && static_cast<size_t>(s.mixer) < mixers_.size(), "routing: mixer index ", s.mixer);
    at = s.row * T_ + s.end;
  }
  TORCH_CHECK(at == B_ * T_, "routing: spans cover ", at, " of ", B_ * T_, " tokens");
}

Routing::Routing(int64_t B, int64_t T, LayerSets sets, at::Device device) : B_(B), T_(T) {
  for (auto& [mixers, own] : sets) cache_.emplace(std::pair(device.str(), mixers), std::move(own));
}

const TokenSet& Routing::tokens(const std::vector<std::string>& layer_mixers, size_t m, at::Device device) const {
  const std::pair key(device.str(), layer_mixers);
  auto it = cache_.find(key);
  if (it == cache_.end()) {
    TORCH_CHECK(!mixers_.empty(), "routing: nothing is known of the tokens of mixers ", layer_mixers, " on ", device);
    std::vector<TokenSet> sets = split(layer_mixers);
    for (TokenSet& set : sets) {
      if (set.all) continue;
      set.spans = to_device(*set.spans, device);
      set.index = to_device(set.index, device);
    }
    it = cache_.emplace(key, std::move(sets)).first;
  }
  return it->second[m];
}

const at::Tensor& Routing::places(const std::vector<std::string>& layer_mixers, at::Device device) const {
  at::Tensor& places = places_[{device.str(), layer_mixers}];
  if (places.defined()) return places;
  if (!device.is_cpu()) return places = to_device(this->places(layer_mixers), device);
  places = at::zeros({B_ * T_}, at::kChar);
  for (size_t m = 1; m < layer_mixers.size(); ++m) {
    const TokenSet& set = tokens(layer_mixers, m);
    if (set.all) places.fill_(static_cast<int64_t>(m));
    if (!set.all && set.count > 0) places.index_fill_(0, set.index, static_cast<int64_t>(m));
  }
  places = places.view({B_, T_});
  return places;
}

std::vector<TokenSet> Routing::split(const std::vector<std::string>& layer_mixers) const {
  // Global mixer -> the layer's; unknown ones fall to the layer's first.
  std::vector<size_t> to_layer;
  for (const auto& name : mixers_) {
    const auto it = std::find(layer_mixers.begin(), layer_mixers.end(), name);
    to_layer.push_back(it == layer_mixers.end() ? 0 : static_cast<size_t>(it - layer_mixers.begin()));
  }
  std::vector<std::vector<int32_t>> flat(layer_mixers.size());
  std::vector<std::vector<int64_t>> index(layer_mixers.size());
  for (const auto& s : spans_) {
    const size_t m = to_layer[static_cast<size_t>(s.mixer)];
    auto& f = flat[m];
    const bool joins = !f.empty() && f[f.size() - 3] == s.row && f.back() == s.begin;
    if (joins) {
      f.back() = s.end;
    } else {
      f.insert(f.end(), {s.row, s.begin, s.end});
    }
    auto& ix = index[m];
    ix.resize(ix.size() + static_cast<size_t>(s.end - s.begin));
    std::iota(ix.end() - (s.end - s.begin), ix.end(), s.row * T_ + s.begin);
  }
  std::vector<TokenSet> sets;
  for (size_t m = 0; m < layer_mixers.size(); ++m) {
    TokenSet set;
    set.count = static_cast<int64_t>(index[m].size());
    set.all = set.count == B_ * T_;
    if (!set.all) {
      set.spans = at::tensor(flat[m], at::kInt).view({static_cast<int64_t>(flat[m].size()) / 3, 3});
      set.index = at::tensor(index[m], at::kLong);
    }
    sets.push_back(std::move(set));
  }
  return sets;
}

double Routing::share(const std::string& mixer) const {
  int64_t count = 0;
  for (const auto& s : spans_) count += mixers_[static_cast<size_t>(s.mixer)] == mixer ? s.end - s.begin : 0;
  return B_ * T_ > 0 ? static_cast<double>(count) / static_cast<double>(B_ * T_) : 0;
}

}  // namespace oryx
