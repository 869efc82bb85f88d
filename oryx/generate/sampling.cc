#include "oryx/generate/sampling.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "oryx/common/error.h"
#include "oryx/common/random.h"

namespace oryx {

namespace {

struct Candidate {
  double weight;  // exp((logit - highest) / temperature)
  int64_t id;
};

// Likelier first; of equals the lower id.
bool behind(const Candidate& a, const Candidate& b) { return a.weight != b.weight ? a.weight < b.weight : a.id > b.id; }

int64_t argmax(std::span<const float> logits) {
  size_t best = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i]) || logits[i] == std::numeric_limits<float>::infinity()) {
      fail("the logit of token {} is {}; the model's weights or state are damaged", i, logits[i]);
    }
    if (logits[i] > logits[best]) best = i;
  }
  if (!std::isfinite(logits[best])) fail("no token has a finite logit; the model's weights or state are damaged");
  return static_cast<int64_t>(best);
}

double total(const std::vector<Candidate>& all) {
  double sum = 0;
  for (const auto& c : all) sum += c.weight;
  return sum;
}

// Leaves the likeliest, in order, up to what the filters admit. A heap: the filters mostly stop after a few of many.
void filter(std::vector<Candidate>& all, const SamplingOptions& o) {
  const size_t most = o.top_k > 0 ? std::min(all.size(), static_cast<size_t>(o.top_k)) : all.size();
  double mass = total(all);
  if (most < all.size()) {
    std::partial_sort(all.begin(), all.begin() + static_cast<int64_t>(most), all.end(), [](const auto& a, const auto& b) { return behind(b, a); });
    all.resize(most);
    mass = total(all);
  }
  std::make_heap(all.begin(), all.end(), behind);
  std::vector<Candidate> kept;
  double sum = 0;
  while (!all.empty() && (kept.empty() || sum < o.top_p * mass)) {
    std::pop_heap(all.begin(), all.end(), behind);
    const Candidate next = all.back();
    all.pop_back();
    if (next.weight < o.min_p) break;  // the likeliest has weight 1
    sum += next.weight;
    kept.push_back(next);
  }
  all = std::move(kept);
}

int64_t draw(const std::vector<Candidate>& all, double uniform) {
  double left = uniform * total(all);
  for (const auto& c : all) {
    left -= c.weight;
    if (left < 0) return c.id;
  }
  // Rounding may leave a crumb: the last one that can be drawn at all.
  return std::find_if(all.rbegin(), all.rend(), [](const auto& c) { return c.weight > 0; })->id;
}

// Two clocks a block of the generator; a stream apart from that of draw().
int64_t first_to_ring(const std::vector<Candidate>& all, uint64_t seed, uint64_t position, uint32_t sequence) {
  const std::array<uint32_t, 2> key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  constexpr uint32_t kRaces = 0x80000000;
  double first = std::numeric_limits<double>::infinity();
  int64_t winner = all.front().id, block_of = -1;
  std::array<uint32_t, 4> block{};
  for (const auto& c : all) {
    if (!(c.weight > 0)) continue;
    if (c.id / 2 != block_of) {
      block_of = c.id / 2;
      block = philox({static_cast<uint32_t>(block_of), sequence ^ kRaces, static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32)}, key);
    }
    const size_t half = 2 * static_cast<size_t>(c.id % 2);
    const double uniform = static_cast<double>(((uint64_t{block[half]} << 32) | block[half + 1]) >> 11) * 0x1.0p-53;
    const double rings = -std::log1p(-uniform) / c.weight;
    if (rings < first || (rings == first && c.id < winner)) first = rings, winner = c.id;
  }
  return winner;
}

}  // namespace

void SamplingOptions::validate() const {
  if (!(temperature >= 0 && std::isfinite(temperature))) fail("temperature is {}, expected a number of at least 0", temperature);
  if (top_k < 0) fail("top_k is {}, expected an integer of at least 0", top_k);
  if (!(top_p > 0 && top_p <= 1)) fail("top_p is {}, expected a number above 0 and up to 1", top_p);
  if (!(min_p >= 0 && min_p <= 1)) fail("min_p is {}, expected a number from 0 to 1", min_p);
  if (seed < 0) fail("seed is {}, expected an integer of at least 0", seed);
}

int64_t sample_token(const at::Tensor& logits, const SamplingOptions& o, uint64_t position, uint32_t sequence) {
  TORCH_CHECK(logits.dim() == 1 && logits.numel() > 0, "sample_token: logits of shape ", logits.sizes());
  o.validate();
  const at::Tensor row = logits.detach().to(at::kCPU, at::kFloat).contiguous();
  const std::span<const float> values(row.const_data_ptr<float>(), static_cast<size_t>(row.numel()));
  const int64_t best = argmax(values);
  if (o.temperature == 0) return best;
  const double highest = values[static_cast<size_t>(best)];
  std::vector<Candidate> all;
  all.reserve(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    // Not (value - highest) / temperature as 0 / tiny: a tiny temperature must stay greedy, not become NaN.
    const double gap = values[i] - highest;
    all.push_back({gap == 0 ? 1.0 : std::exp(gap / o.temperature), static_cast<int64_t>(i)});
  }
  if (o.top_k > 0 || o.top_p < 1 || o.min_p > 0) filter(all, o);
  if (o.race) return first_to_ring(all, static_cast<uint64_t>(o.seed), position, sequence);
  return draw(all, CounterRng(static_cast<uint64_t>(o.seed), position, sequence).uniform());
}

}  // namespace oryx
