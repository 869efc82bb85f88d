#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "oryx/bench/bench.h"
#include "oryx/bench/measure.h"
#include "oryx/ops/span_attention/span_attention.h"

namespace oryx {

namespace {

struct Case {
  std::string name;
  std::optional<at::Tensor> spans;  // absent: every query
  double pairs = 0;                 // attended query-key pairs
  Times times = {};
};

Case make_case(const std::string& name, const std::vector<std::pair<int64_t, int64_t>>& ranges, int64_t length) {
  Case c{name, {}, 0};
  std::vector<int32_t> list;
  for (const auto& [begin, end] : ranges) {
    list.insert(list.end(), {0, static_cast<int32_t>(begin), static_cast<int32_t>(end)});
    for (int64_t i = begin; i < end; ++i) c.pairs += static_cast<double>(i + 1);
  }
  const bool all = ranges.size() == 1 && ranges[0].first == 0 && ranges[0].second == length;
  if (!all) c.spans = at::tensor(list, at::kInt).view({-1, 3});
  return c;
}

// Chunks spread evenly over the sequence.
std::vector<std::pair<int64_t, int64_t>> quarter_of_chunks(int64_t length) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (int64_t begin = 256; begin < length; begin += 1024) ranges.emplace_back(begin, std::min(begin + 256, length));
  return ranges;
}

}  // namespace

BenchResult bench_attention(const AttentionBenchOptions& o) {
  at::NoGradGuard no_grad;
  const int64_t T = o.length;
  std::vector<Case> cases;
  cases.push_back(make_case("full causal", {{0, T}}, T));
  cases.push_back(make_case("last 10% of the queries", {{T - std::max<int64_t>(1, T / 10), T}}, T));
  if (T > 256) cases.push_back(make_case("a quarter of the chunks", quarter_of_chunks(T), T));
  at::manual_seed(1);
  const at::Tensor q = at::randn({1, T, o.heads, o.head_dim}), k = at::randn_like(q), v = at::randn_like(q);
  // Interleaved: what else the machine does falls on all cases alike.
  for (int64_t r = -1; r < o.repeat; ++r) {
    for (Case& c : cases) {
      const Times t = time_repeated(0, 1, [&] { (void)ops::span_attention(q, k, v, c.spans); });
      if (r >= 0) c.times.seconds.push_back(t.seconds.front());
    }
  }
  BenchResult result;
  for (const Case& c : cases) {
    result.table.rows.push_back({{"case", c.name},
                                 {"ms", 1e3 * c.times.median()},
                                 {"relative_time", c.times.median() / cases.front().times.median()},
                                 {"relative_area", c.pairs / cases.front().pairs},
                                 {"gflops", 4e-9 * c.pairs * static_cast<double>(o.heads * o.head_dim) / c.times.median()}});
  }
  result.table.columns = {{"case", "case", cell_text()},
                          {"ms", "ms", cell_fixed(1)},
                          {"relative_time", "time", cell_percent()},
                          {"relative_area", "attended area", cell_percent()},
                          {"gflops", "GFLOP/s", cell_fixed(1)}};
  result.options = {{"length", o.length}, {"heads", o.heads}, {"head_dim", o.head_dim}, {"repeat", o.repeat}};
  return result;
}

}  // namespace oryx
