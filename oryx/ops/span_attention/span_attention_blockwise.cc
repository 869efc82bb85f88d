#include "oryx/ops/span_attention/span_attention_blockwise.h"

#include <ATen/ATen.h>

#include <limits>

namespace oryx::ops {
namespace {

constexpr int64_t kBlock = 128;

// A run of up to kBlock computed queries of one sequence and the keys that any of them sees.
struct Block {
  const AttentionSequence* sequence;
  at::Tensor index;           // [n] long: query rows of the batch row
  int64_t k_begin, k_length;  // keys, counted in the batch row
  at::Tensor hidden;          // [n, k_length] bool: true where the query does not see the key
};

Block make_block(const AttentionPlan& plan, const AttentionSequence& s, const int64_t* queries, int64_t n, at::Device device) {
  const int64_t first = plan.visible(s, queries[0]).begin, last = plan.visible(s, queries[n - 1]).end;
  at::Tensor index = at::empty({n}, at::kLong), begin = at::empty({n, 1}, at::kLong),
             end = at::empty({n, 1}, at::kLong);
  for (int64_t i = 0; i < n; ++i) {
    const VisibleKeys keys = plan.visible(s, queries[i]);
    index.mutable_data_ptr<int64_t>()[i] = s.q_begin + queries[i];
    begin.mutable_data_ptr<int64_t>()[i] = keys.begin;
    end.mutable_data_ptr<int64_t>()[i] = keys.end;
  }
  const at::Tensor key = at::arange(first, last, at::kLong).unsqueeze(0);
  const at::Tensor hidden = (key < begin) | (key >= end);
  return {&s, index.to(device), s.k_begin + first, last - first, hidden.to(device)};
}

template <typename Fn>
void for_each_block(const AttentionPlan& plan, at::Device device, Fn fn) {
  for (const AttentionSequence& s : plan.sequences) {
    const std::vector<int64_t> queries = plan.computed_queries(s);
    const int64_t count = static_cast<int64_t>(queries.size());
    for (int64_t i = 0; i < count; i += kBlock)
      fn(make_block(plan, s, queries.data() + i, std::min(kBlock, count - i), device));
  }
}

// Rows of a block's queries, grouped by key head: x [B, Tq, Hq, D] -> [Hk, G, n, D]
at::Tensor query_rows(const at::Tensor& x, const Block& b, int64_t Hk) {
  const at::Tensor rows = x[b.sequence->row].index_select(0, b.index);  // [n, Hq, D]
  return rows.unflatten(1, {Hk, -1}).permute({1, 2, 0, 3});
}

// The inverse: [Hk, G, n, D] -> [n, Hq, D]
at::Tensor as_rows(const at::Tensor& x) { return x.permute({2, 0, 1, 3}).flatten(1, 2); }

// x [B, Tk, Hk, D] -> [Hk, 1, keys, D]
at::Tensor key_rows(const at::Tensor& x, const Block& b) {
  return x[b.sequence->row].narrow(0, b.k_begin, b.k_length).transpose(0, 1).unsqueeze(1);
}

at::Tensor block_scores(const at::Tensor& q, const at::Tensor& k, const Block& b, double scale) {
  const at::Tensor scores = at::matmul(q, k.transpose(-1, -2)) * scale;  // [Hk, G, n, keys]
  return scores.masked_fill(b.hidden, -std::numeric_limits<double>::infinity());
}

}  // namespace

std::pair<at::Tensor, at::Tensor> span_attention_blockwise(const at::Tensor& q, const at::Tensor& k,
                                                           const at::Tensor& v, const AttentionPlan& plan) {
  const int64_t Hk = k.size(2);
  at::Tensor o = at::zeros({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
  at::Tensor lse = at::zeros({q.size(0), q.size(1), q.size(2)}, q.options());
  for_each_block(plan, q.device(), [&](const Block& b) {
    const at::Tensor scores = block_scores(query_rows(q, b, Hk), key_rows(k, b), b, plan.scale);
    const at::Tensor log_sum = scores.logsumexp(-1, true);
    const at::Tensor p = (scores - log_sum).exp();
    o[b.sequence->row].index_copy_(0, b.index, as_rows(at::matmul(p, key_rows(v, b))));
    lse[b.sequence->row].index_copy_(0, b.index, as_rows(log_sum).squeeze(-1));
  });
  return {o, lse};
}

std::array<at::Tensor, 3> span_attention_blockwise_backward(const at::Tensor& q, const at::Tensor& k,
                                                            const at::Tensor& v, const at::Tensor& o,
                                                            const at::Tensor& lse, const at::Tensor& d_o,
                                                            const AttentionPlan& plan) {
  const int64_t Hk = k.size(2);
  at::Tensor dq = at::zeros_like(q), dk = at::zeros_like(k), dv = at::zeros_like(v);
  for_each_block(plan, q.device(), [&](const Block& b) {
    const int64_t row = b.sequence->row;
    const at::Tensor qb = query_rows(q, b, Hk), kb = key_rows(k, b), vb = key_rows(v, b), dob = query_rows(d_o, b, Hk);
    const at::Tensor p = (block_scores(qb, kb, b, plan.scale) - query_rows(lse.unsqueeze(-1), b, Hk)).exp();
    const at::Tensor delta = (query_rows(o, b, Hk) * dob).sum(-1, true);
    const at::Tensor ds = p * (at::matmul(dob, vb.transpose(-1, -2)) - delta) * plan.scale;  // [Hk, G, n, keys]
    dq[row].index_copy_(0, b.index, as_rows(at::matmul(ds, kb)));
    dk[row].narrow(0, b.k_begin, b.k_length).add_(at::matmul(ds.transpose(-1, -2), qb).sum(1).transpose(0, 1));
    dv[row].narrow(0, b.k_begin, b.k_length).add_(at::matmul(p.transpose(-1, -2), dob).sum(1).transpose(0, 1));
  });
  return {dq, dk, dv};
}

}  // namespace oryx::ops
