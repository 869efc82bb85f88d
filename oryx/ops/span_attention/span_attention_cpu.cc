#include "oryx/ops/span_attention/span_attention_cpu.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

#include "oryx/ops/span_attention/balanced.h"
#include "oryx/ops/span_attention/span_attention_cpu_decode.h"
#include "oryx/ops/span_attention/span_attention_kernels.h"

namespace oryx::ops {
namespace {

namespace cpu = attention_cpu;

// The backward pass splits a key head's tiles when there are fewer (sequence, key head) pairs than this; each split has
// its own partial sums of dk and dv, hence the small number.
constexpr int64_t kBackwardTasks = 16, kMaxSplits = 4;

// Pointers and strides of one call. Strides in elements; q, o, d_o contiguous, the last dimension of k and v too.
struct View {
  explicit View(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionPlan& plan)
      : element(q.scalar_type() == at::kBFloat16 ? cpu::Element::kBFloat16 : cpu::Element::kFloat32),
        bytes(static_cast<int64_t>(q.element_size())),
        Tq(q.size(1)),
        Hq(q.size(2)),
        Hk(k.size(2)),
        q_data(q.const_data_ptr()),
        k_data(static_cast<const char*>(k.const_data_ptr())),
        v_data(static_cast<const char*>(v.const_data_ptr())),
        k_strides{k.stride(0), k.stride(1), k.stride(2)},
        v_strides{v.stride(0), v.stride(1), v.stride(2)},
        widths{q.size(3), v.size(3), k.stride(1), v.stride(1), static_cast<float>(plan.scale)} {}

  const void* keys(const AttentionSequence& s, int64_t head) const {
    return k_data + bytes * (s.row * k_strides[0] + s.k_begin * k_strides[1] + head * k_strides[2]);
  }
  const void* values(const AttentionSequence& s, int64_t head) const {
    return v_data + bytes * (s.row * v_strides[0] + s.k_begin * v_strides[1] + head * v_strides[2]);
  }

  cpu::Element element;
  int64_t bytes, Tq, Hq, Hk;
  const void* q_data;
  const char *k_data, *v_data;
  std::array<int64_t, 3> k_strides, v_strides;
  cpu::Widths widths;
};

// Queries of one (sequence, key head) that a kernel call works on.
struct Tile {
  const AttentionSequence* sequence;
  int64_t head;                     // of the keys
  int64_t first_lane, lanes, cost;  // lanes in the task's list; cost: query-key pairs
};

struct Tiles {
  std::vector<cpu::Lane> lanes;
  std::vector<Tile> tiles;
};

int64_t cost_of(const std::vector<cpu::Lane>& lanes, int64_t first, int64_t n) {
  int64_t cost = 0;
  for (int64_t l = first; l < first + n; ++l)
    cost += lanes[static_cast<size_t>(l)].end - lanes[static_cast<size_t>(l)].begin;
  return cost;
}

// The query heads that share a key head stand side by side in the tiles, so that a key is read once for all of them.
void add_tiles(const View& view, const AttentionPlan& plan, const AttentionSequence& s,
               const std::vector<int64_t>& queries, int64_t head, Tiles& out) {
  const int64_t group = view.Hq / view.Hk, first = static_cast<int64_t>(out.lanes.size());
  for (const int64_t i : queries) {
    const VisibleKeys keys = plan.visible(s, i);
    const int64_t row = (s.row * view.Tq + s.q_begin + i) * view.Hq + head * group;
    for (int64_t g = 0; g < group; ++g) out.lanes.push_back({row + g, keys.begin, keys.end});
  }
  const int64_t last = static_cast<int64_t>(out.lanes.size()), step = cpu::max_lanes();
  for (int64_t l = first; l < last; l += step) {
    const int64_t n = std::min(step, last - l);
    out.tiles.push_back({&s, head, l, n, cost_of(out.lanes, l, n)});
  }
}

std::vector<int64_t> longest_first(const std::vector<int64_t>& costs) {
  std::vector<int64_t> order(costs.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return costs[static_cast<size_t>(a)] > costs[static_cast<size_t>(b)]; });
  return order;
}

void forward_tiles(const View& view, const Tiles& t, void* o, float* lse) {
  std::vector<int64_t> costs;
  for (const Tile& tile : t.tiles) costs.push_back(tile.cost);
  const std::vector<int64_t> order = longest_first(costs);
  run_balanced(static_cast<int64_t>(order.size()), cpu::forward_scratch(view.widths.key, view.widths.value),
               [&](int64_t i, float* scratch) {
                 const Tile& tile = t.tiles[static_cast<size_t>(order[static_cast<size_t>(i)])];
                 cpu::forward_tile(view.element, view.widths, t.lanes.data() + tile.first_lane, tile.lanes, view.q_data,
                                   view.keys(*tile.sequence, tile.head), view.values(*tile.sequence, tile.head), o, lse,
                                   scratch);
               });
}

at::Tensor rows_in_order(const at::Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); }

// The tiles [first, last) of one (sequence, key head): the unit of the backward pass.
struct BackwardTask {
  const AttentionSequence* sequence;
  int64_t head, first, last, cost;
  int64_t key_begin, key_end;  // keys that its queries see
  at::Tensor dk, dv;           // partial sums [key_end - key_begin, padded width]
};

// Cuts tiles [first, last) into runs of about equal cost.
void cut_tasks(const Tiles& t, int64_t first, int64_t last, int64_t splits, std::vector<BackwardTask>& tasks) {
  int64_t total = 0;
  for (int64_t i = first; i < last; ++i) total += t.tiles[static_cast<size_t>(i)].cost;
  int64_t begin = first, done = 0;
  for (int64_t p = 0; p < splits && begin < last; ++p) {
    int64_t end = begin, cost = 0;
    const int64_t goal = total * (p + 1) / splits;
    while (end < last && (end == begin || done < goal || p + 1 == splits)) {
      const int64_t c = t.tiles[static_cast<size_t>(end++)].cost;
      cost += c;
      done += c;
    }
    const Tile& a = t.tiles[static_cast<size_t>(begin)];
    const Tile& z = t.tiles[static_cast<size_t>(end - 1)];
    tasks.push_back({a.sequence,
                     a.head,
                     begin,
                     end,
                     cost,
                     t.lanes[static_cast<size_t>(a.first_lane)].begin,
                     t.lanes[static_cast<size_t>(z.first_lane + z.lanes - 1)].end,
                     {},
                     {}});
    begin = end;
  }
}

// Adds a task's sums to dk and dv [B, Tk, Hk, width]: the tasks of one key head in order, so that the sum is always the
// same.
void add_partial(const BackwardTask& task, const at::Tensor& partial, const at::Tensor& grad, double factor) {
  const int64_t begin = task.sequence->k_begin + task.key_begin, n = task.key_end - task.key_begin,
                width = grad.size(3);
  const int64_t row_stride = grad.stride(1), padded = partial.size(1);
  float* out = grad.mutable_data_ptr<float>() + task.sequence->row * grad.stride(0) + begin * row_stride +
               task.head * grad.stride(2);
  const float* in = partial.const_data_ptr<float>();
  const float f = static_cast<float>(factor);
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t c = 0; c < width; ++c) out[j * row_stride + c] += f * in[j * padded + c];
  }
}

// Sequences with a single query to compute.
void forward_single(const View& view, const std::vector<DecodeSequence>& sequences, const at::Tensor& q, const at::Tensor& o,
                    const at::Tensor& lse, double scale) {
  cpu::DecodeShape shape{};
  shape.query_heads = view.Hq, shape.key_heads = view.Hk;
  shape.key = view.widths.key, shape.value = view.widths.value;
  shape.key_head_stride = view.k_strides[2], shape.value_head_stride = view.v_strides[2];
  const DecodeRows rows{view.bytes * view.k_strides[1], view.bytes * view.v_strides[1], 0, nullptr, nullptr};
  decode_sequences(view.element, shape, rows, sequences, q, o, lse, scale);
}

}  // namespace

std::pair<at::Tensor, at::Tensor> span_attention_cpu(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
                                                     const AttentionPlan& plan, bool want_lse) {
  const at::Tensor q = q_in.contiguous(), k = rows_in_order(k_in), v = rows_in_order(v_in);
  const View view(q, k, v, plan);
  const std::vector<int64_t> shape{q.size(0), q.size(1), q.size(2), v.size(3)};
  // With spans, or bounds that leave tokens out, some rows are never written.
  at::Tensor o = plan.in_span.empty() ? at::empty(shape, q.options()) : at::zeros(shape, q.options());
  at::Tensor lse =
      want_lse ? at::zeros({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat)) : at::Tensor();
  Tiles tiles;
  std::vector<DecodeSequence> single;
  for (const AttentionSequence& s : plan.sequences) {
    const std::vector<int64_t> queries = plan.computed_queries(s);
    if (queries.size() == 1) {
      const VisibleKeys keys = plan.visible(s, queries[0]);
      single.push_back({s.row * view.Tq + s.q_begin + queries[0], 0, 0, keys.begin, keys.end,
                        static_cast<const char*>(view.keys(s, 0)), static_cast<const char*>(view.values(s, 0)), nullptr});
      continue;
    }
    for (int64_t head = 0; head < view.Hk && !queries.empty(); ++head) add_tiles(view, plan, s, queries, head, tiles);
  }
  forward_tiles(view, tiles, o.mutable_data_ptr(), want_lse ? lse.mutable_data_ptr<float>() : nullptr);
  forward_single(view, single, q, o, lse, plan.scale);
  return {o, lse};
}

std::array<at::Tensor, 3> span_attention_cpu_backward(const at::Tensor& q_in, const at::Tensor& k_in,
                                                      const at::Tensor& v_in, const at::Tensor& o,
                                                      const at::Tensor& lse, const at::Tensor& d_o_in,
                                                      const AttentionPlan& plan) {
  const at::Tensor q = q_in.contiguous(), k = rows_in_order(k_in), v = rows_in_order(v_in);
  const at::Tensor d_o = d_o_in.to(q.scalar_type()).contiguous();
  const View view(q, k, v, plan);
  const auto floats = q.options().dtype(at::kFloat);
  at::Tensor dq = plan.in_span.empty() ? at::empty(q.sizes(), floats) : at::zeros(q.sizes(), floats);
  at::Tensor dk = at::zeros(k.sizes(), floats), dv = at::zeros(v.sizes(), floats);

  Tiles tiles;
  std::vector<BackwardTask> tasks;
  std::vector<size_t> group_ends;  // tasks of one (sequence, key head) stand side by side
  const int64_t pairs = std::max<int64_t>(1, static_cast<int64_t>(plan.sequences.size()) * view.Hk);
  const int64_t splits = std::clamp<int64_t>((kBackwardTasks + pairs - 1) / pairs, 1, kMaxSplits);
  for (const AttentionSequence& s : plan.sequences) {
    const std::vector<int64_t> queries = plan.computed_queries(s);
    for (int64_t head = 0; head < view.Hk && !queries.empty(); ++head) {
      const int64_t first = static_cast<int64_t>(tiles.tiles.size());
      add_tiles(view, plan, s, queries, head, tiles);
      cut_tasks(tiles, first, static_cast<int64_t>(tiles.tiles.size()), splits, tasks);
      group_ends.push_back(tasks.size());
    }
  }
  std::vector<int64_t> costs;
  for (const BackwardTask& task : tasks) costs.push_back(task.cost);
  const std::vector<int64_t> order = longest_first(costs);
  const int64_t kp = cpu::padded(q.size(3)), vp = cpu::padded(v.size(3));
  const auto finish = [&](const BackwardTask& task) {
    add_partial(task, task.dk, dk, cpu::kLn2);
    add_partial(task, task.dv, dv, 1.0);
  };
  run_balanced(
      static_cast<int64_t>(order.size()), cpu::backward_scratch(q.size(3), v.size(3)), [&](int64_t i, float* scratch) {
        BackwardTask& task = tasks[static_cast<size_t>(order[static_cast<size_t>(i)])];
        task.dk = at::zeros({task.key_end - task.key_begin, kp}, floats);
        task.dv = at::zeros({task.key_end - task.key_begin, vp}, floats);
        // The kernel counts keys from the sequence's first.
        float* dk_base = task.dk.mutable_data_ptr<float>() - task.key_begin * kp;
        float* dv_base = task.dv.mutable_data_ptr<float>() - task.key_begin * vp;
        for (int64_t t = task.first; t < task.last; ++t) {
          const Tile& tile = tiles.tiles[static_cast<size_t>(t)];
          cpu::backward_tile(view.element, view.widths, tiles.lanes.data() + tile.first_lane, tile.lanes, view.q_data,
                             view.keys(*task.sequence, task.head), view.values(*task.sequence, task.head),
                             o.const_data_ptr(), d_o.const_data_ptr(), lse.const_data_ptr<float>(),
                             dq.mutable_data_ptr<float>(), dk_base, dv_base, scratch);
        }
        if (splits > 1) return;
        finish(task);
        task.dk.reset();
        task.dv.reset();
      });
  at::parallel_for(0, splits > 1 ? static_cast<int64_t>(group_ends.size()) : 0, 1, [&](int64_t begin, int64_t end) {
    for (size_t i = begin == 0 ? 0 : group_ends[static_cast<size_t>(begin) - 1];
         i < group_ends[static_cast<size_t>(end) - 1]; ++i) {
      finish(tasks[i]);
    }
  });
  return {dq.to(q.scalar_type()), dk.to(q.scalar_type()), dv.to(q.scalar_type())};
}

}  // namespace oryx::ops
