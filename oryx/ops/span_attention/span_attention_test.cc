#include "oryx/ops/span_attention/span_attention.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <array>
#include <limits>
#include <string>
#include <vector>

#include "oryx/common/error.h"
#include "oryx/ops/rope/rope.h"
#include "oryx/ops/span_attention/span_attention_plan.h"
#include "tests/support/fixtures.h"

namespace oryx::ops {
namespace {

using oryx::test::fixture_error;
using oryx::test::norm_error;
using Optional = std::optional<at::Tensor>;

// One problem: inputs and the optional arguments.
struct Case {
  at::Tensor q, k, v;
  Optional spans, cu, cu_k, key_lengths;
  int64_t window = 0;
  std::optional<double> scale;

  Case to(at::ScalarType dtype) const {
    Case c = *this;
    c.q = q.detach().to(dtype), c.k = k.detach().to(dtype), c.v = v.detach().to(dtype);
    return c;
  }
};

Case make_case(int64_t B, int64_t Tq, int64_t Tk, int64_t Hq, int64_t Hk, int64_t K, int64_t V) {
  return {at::randn({B, Tq, Hq, K}), at::randn({B, Tk, Hk, K}), at::randn({B, Tk, Hk, V}), {}, {}, {}, {}, 0, {}};
}

at::Tensor run(const Case& c) {
  return span_attention(c.q, c.k, c.v, c.spans, c.cu, c.cu_k, c.key_lengths, c.window, c.scale);
}
at::Tensor run_naive(const Case& c) {
  return span_attention_naive(c.q, c.k, c.v, c.spans, c.cu, c.cu_k, c.key_lengths, c.window, c.scale);
}

// o, dq, dk, dv
template <typename Fn>
std::array<at::Tensor, 4> with_gradients(const Fn& fn, Case c, const at::Tensor& up) {
  for (at::Tensor* t : {&c.q, &c.k, &c.v}) *t = t->detach().clone().requires_grad_();
  const at::Tensor o = fn(c);
  const auto d = torch::autograd::grad({o}, {c.q, c.k, c.v}, {up.to(o.scalar_type())});
  return {o.detach(), d[0], d[1], d[2]};
}

// max|x - ref| over max|ref|, or over 0.01 where the true gradient is nearly nothing (a query that sees one key).
double gradient_error(const at::Tensor& x, const at::Tensor& ref) {
  const double largest = ref.abs().max().item<double>();
  return fixture_error(x, ref) * (largest / std::max(largest, 1e-2));
}

// Float32 kernel against the naive form in float64, values and gradients.
void expect_like_naive(const Case& c, const std::string& what, double limit = 4e-6, double gradient_limit = 1e-5) {
  const at::Tensor up = at::randn({c.q.size(0), c.q.size(1), c.q.size(2), c.v.size(3)});
  const auto got = with_gradients(run, c, up), ref = with_gradients(run_naive, c.to(at::kDouble), up);
  EXPECT_LT(fixture_error(got[0], ref[0]), limit) << what;
  for (size_t i = 1; i < 4; ++i)
    EXPECT_LT(gradient_error(got[i], ref[i]), gradient_limit) << what << ", d"
                                                              << " qkv"[i];
}

at::Tensor span_list(const std::vector<std::array<int, 3>>& spans) {
  at::Tensor t = at::empty({static_cast<int64_t>(spans.size()), 3}, at::kInt);
  for (size_t i = 0; i < spans.size(); ++i) {
    for (size_t c = 0; c < 3; ++c) t.mutable_data_ptr<int32_t>()[i * 3 + c] = spans[i][c];
  }
  return t;
}

TEST(SpanAttention, FixtureValuesAndGradients) {
  ORYX_REQUIRE_FIXTURES();
  const auto all = oryx::test::fixtures("ops", "attention");
  ASSERT_FALSE(all.empty());
  for (const auto& f : all) {
    const at::Tensor q = f.leaf("q"), k = f.leaf("k"), v = f.leaf("v");
    const auto optional = [&](const char* name) { return f.has(name) ? Optional(f.at(name)) : Optional(); };
    const int64_t B = q.size(0), past = k.size(1) - q.size(1);
    at::Tensor qr = q, kr = k;
    int64_t furthest = 0;
    if (!f.attrs.at("rope_theta").is_null()) {
      const double theta = f.attrs.at("rope_theta").get<double>();
      Optional offset;
      at::Tensor positions = sequence_positions(B, k.size(1), f.has("cu_seqlens") ? Optional(f.at("cu_seqlens").cpu()) : Optional()).to(f.device);
      if (f.has("pos_offset")) positions = positions + f.at("pos_offset").to(at::kInt).view({B, 1});
      furthest = positions.max().item<int>();
      qr = rope(q, positions.narrow(1, past, q.size(1)), theta);
      kr = rope(k, positions, theta);
    }
    const at::Tensor o =
        span_attention(qr, kr, v, f.at("spans"), optional("cu_seqlens"), {}, {}, 0, f.attrs.at("scale").get<double>());
    const bool far = furthest > 500;
    EXPECT_LT(fixture_error(o, f.at("o")), f.limit("o", far ? 4e-5 : 4e-6)) << f.name;
    const auto grads = torch::autograd::grad({o}, {q, k, v}, {f.at("up_o")});
    const double limit = far ? 9e-5 : 1e-5;
    EXPECT_LT(fixture_error(grads[0], f.at("d_q")), f.limit("d_q", limit)) << f.name;
    EXPECT_LT(fixture_error(grads[1], f.at("d_k")), f.limit("d_k", limit)) << f.name;
    EXPECT_LT(fixture_error(grads[2], f.at("d_v")), f.limit("d_v", limit)) << f.name;
  }
}

TEST(SpanAttention, OddShapesEqualNaive) {
  at::manual_seed(1);
  for (const int64_t T : {1, 2, 63, 100}) expect_like_naive(make_case(2, T, T, 2, 2, 64, 64), "T " + std::to_string(T));
  expect_like_naive(make_case(1, 1000, 1000, 1, 1, 64, 64), "T 1000");
  expect_like_naive(make_case(1, 65, 200, 6, 2, 80, 48), "grouped, past");
  expect_like_naive(make_case(2, 130, 130, 4, 1, 5, 7), "odd widths");
  expect_like_naive(make_case(1, 70, 70, 5, 1, 128, 33), "five heads on one");
}

TEST(SpanAttention, WindowEqualsNaive) {
  at::manual_seed(2);
  for (const int64_t window : {1, 5, 16, 70, 500}) {
    for (const int64_t heads : {2, 8}) {
      Case c = make_case(1, 200, 230, heads, 2, 32, 32);
      c.window = window;
      expect_like_naive(c, "window " + std::to_string(window));
    }
  }
}

TEST(SpanAttention, SpansAreRowsOfTheWhole) {
  at::manual_seed(3);
  Case c = make_case(2, 300, 310, 4, 2, 32, 16);
  const at::Tensor whole = run(c);
  for (const int64_t window : {0, 20}) {
    c.window = window;
    // Overlapping, empty, unordered, single and scattered spans.
    c.spans =
        span_list({{1, 250, 300}, {0, 0, 1}, {0, 17, 17}, {1, 3, 4}, {1, 260, 270}, {0, 100, 164}, {0, 290, 291}});
    expect_like_naive(c, "spans");
  }
  c.window = 0;
  at::Tensor mask = at::zeros({2, 300, 1, 1});
  const at::Tensor rows = *c.spans;
  for (int64_t s = 0; s < rows.size(0); ++s) {
    mask[rows[s][0].item<int64_t>()]
        .narrow(0, rows[s][1].item<int64_t>(), (rows[s][2] - rows[s][1]).item<int64_t>())
        .fill_(1);
  }
  const at::Tensor o = run(c);
  EXPECT_TRUE(at::allclose(o, whole * mask, 1e-5, 2e-6));
  EXPECT_EQ((o * (1 - mask)).abs().max().item<float>(), 0.0f);
  c.spans = at::empty({0, 3}, at::kInt);
  EXPECT_EQ(run(c).abs().max().item<float>(), 0.0f);
  expect_like_naive(
      [&] {
        Case e = c;
        e.spans = span_list({{1, 5, 6}});
        return e;
      }(),
      "one query");
}

TEST(SpanAttention, PackedEqualsSeparate) {
  at::manual_seed(4);
  Case c = make_case(1, 264, 264, 4, 2, 32, 32);
  c.cu = at::tensor({0, 1, 64, 64, 164, 264}, at::kInt);
  expect_like_naive(c, "packed");
  const at::Tensor o = run(c);
  for (const auto& [begin, end] : std::vector<std::pair<int64_t, int64_t>>{{0, 1}, {1, 64}, {64, 164}, {164, 264}}) {
    const auto cut = [begin = begin, end = end](const at::Tensor& t) { return t.narrow(1, begin, end - begin); };
    EXPECT_TRUE(at::equal(span_attention(cut(c.q), cut(c.k), cut(c.v)), cut(o))) << begin;
  }
  // Documents with keys of earlier pieces before their queries.
  Case p = make_case(1, 40, 300, 4, 4, 32, 32);
  p.cu = at::tensor({0, 1, 30, 40}, at::kInt);
  p.cu_k = at::tensor({0, 120, 149, 300}, at::kInt);
  p.window = 50;
  expect_like_naive(p, "packed with past");
}

TEST(SpanAttention, KeyLengthsEqualSlicedKeys) {
  at::manual_seed(5);
  for (const int64_t Tq : {1, 3, 40}) {
    Case c = make_case(3, Tq, 1200, 4, 2, 64, 64);
    c.key_lengths = at::tensor({1200, 40, 777}, at::kInt);
    for (int64_t b = 0; b < 3; ++b) {  // what lies behind a row's length is never read
      const int64_t n = (*c.key_lengths)[b].item<int64_t>();
      c.k[b].narrow(0, n, 1200 - n).fill_(std::numeric_limits<float>::quiet_NaN());
      c.v[b].narrow(0, n, 1200 - n).fill_(std::numeric_limits<float>::quiet_NaN());
    }
    const at::Tensor up = at::randn({3, Tq, 4, 64});
    const auto got = with_gradients(run, c, up);
    for (int64_t b = 0; b < 3; ++b) {
      const int64_t n = (*c.key_lengths)[b].item<int64_t>();
      Case one{c.q.narrow(0, b, 1),
               c.k.narrow(0, b, 1).narrow(1, 0, n),
               c.v.narrow(0, b, 1).narrow(1, 0, n),
               {},
               {},
               {},
               {},
               0,
               {}};
      const auto ref = with_gradients(run_naive, one.to(at::kDouble), up.narrow(0, b, 1));
      EXPECT_LT(fixture_error(got[0].narrow(0, b, 1), ref[0]), 4e-6);
      EXPECT_LT(fixture_error(got[1].narrow(0, b, 1), ref[1]), 1e-5);
      for (const size_t i : {2, 3}) {
        EXPECT_LT(gradient_error(got[i].narrow(0, b, 1).narrow(1, 0, n), ref[i]), 1e-5);
        EXPECT_EQ(got[i][b].narrow(0, n, 1200 - n).abs().sum().item<float>(), 0.0f);
      }
    }
  }
}

TEST(SpanAttention, DecodeEqualsNaive) {
  at::manual_seed(6);
  for (const int64_t window : {0, 600}) {
    Case c = make_case(3, 1, 2000, 6, 2, 40, 24);
    c.key_lengths = at::tensor({2000, 1, 1033}, at::kInt);
    c.window = window;
    EXPECT_LT(fixture_error(run(c), run_naive(c.to(at::kDouble))), 4e-6);
    const Case low = c.to(at::kBFloat16);
    EXPECT_LT(norm_error(run(low), run_naive(low.to(at::kDouble))), 1e-2);
  }
}

TEST(SpanAttention, StridedKeysNeedNoCopy) {
  at::manual_seed(7);
  const at::Tensor qkv = at::randn({2, 100, 12, 32});
  Case c{qkv.narrow(2, 0, 4), qkv.narrow(2, 4, 4), qkv.narrow(2, 8, 4), {}, {}, {}, {}, 0, {}};
  Case packed{c.q.contiguous(), c.k.contiguous(), c.v.contiguous(), {}, {}, {}, {}, 0, {}};
  EXPECT_TRUE(at::equal(run(c), run(packed)));
  const at::Tensor heads_first = at::randn({2, 4, 100, 32});
  c.k = heads_first.transpose(1, 2);
  packed.k = c.k.contiguous();
  EXPECT_TRUE(at::equal(run(c), run(packed)));
}

TEST(SpanAttention, LargeScoresStayFinite) {
  at::manual_seed(8);
  for (const int64_t Tq : {1, 150}) {
    Case c = make_case(1, Tq, 150, 2, 2, 64, 64);
    c.q = c.q * 100;
    c.k = c.k * 100;
    const at::Tensor up = at::randn({1, Tq, 2, 64});
    const auto got = with_gradients(run, c, up), ref = with_gradients(run_naive, c.to(at::kDouble), up);
    EXPECT_LT(fixture_error(got[0], ref[0]), 2e-2);  // scores near 1e5: a rounding of one is 1e-2
    for (const at::Tensor& t : got) EXPECT_TRUE(t.isfinite().all().item<bool>());
  }
  Case c = make_case(1, 100, 100, 1, 1, 16, 16);
  c.scale = -0.7;
  expect_like_naive(c, "negative scale");
}

TEST(SpanAttention, NanIsNotHidden) {
  at::manual_seed(9);
  for (const int64_t Tq : {1, 100}) {
    Case c = make_case(1, Tq, 100, 1, 1, 16, 16);
    c.k[0][50].fill_(std::numeric_limits<float>::quiet_NaN());
    EXPECT_TRUE(run(c)[0][Tq - 1].isnan().all().item<bool>());
  }
}

TEST(SpanAttention, Bfloat16IsNearNaive) {
  at::manual_seed(10);
  const Case c = make_case(2, 200, 200, 4, 2, 64, 64).to(at::kBFloat16);
  const at::Tensor up = at::randn({2, 200, 4, 64}).to(at::kBFloat16);
  const auto got = with_gradients(run, c, up), ref = with_gradients(run_naive, c.to(at::kDouble), up);
  EXPECT_EQ(got[0].scalar_type(), at::kBFloat16);
  EXPECT_LT(norm_error(got[0], ref[0]), 1e-2);
  for (size_t i = 1; i < 4; ++i) EXPECT_LT(norm_error(got[i], ref[i]), 2e-2);
}

TEST(SpanAttention, Float64GradientsEqualNaive) {
  at::manual_seed(11);
  for (const int64_t window : {0, 30}) {
    Case c = make_case(2, 150, 170, 4, 2, 8, 6).to(at::kDouble);
    c.window = window;
    c.spans = span_list({{0, 0, 140}, {1, 7, 9}});
    const at::Tensor up = at::randn({2, 150, 4, 6}, at::kDouble);
    const auto got = with_gradients(run, c, up), ref = with_gradients(run_naive, c, up);
    for (size_t i = 0; i < 4; ++i) EXPECT_LT(fixture_error(got[i], ref[i]), 1e-13) << i;
  }
}

TEST(SpanAttention, ResultDoesNotDependOnThreads) {
  at::manual_seed(12);
  const Case c = make_case(1, 500, 500, 3, 3, 32, 32);
  const at::Tensor up = at::randn({1, 500, 3, 32});
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const auto one = with_gradients(run, c, up);
  at::set_num_threads(3);
  const auto three = with_gradients(run, c, up);
  at::set_num_threads(threads);
  for (size_t i = 0; i < 4; ++i) EXPECT_TRUE(at::equal(one[i], three[i])) << i;
}

TEST(SpanAttention, BadInputIsOneLine) {
  const Case good = make_case(2, 10, 12, 4, 2, 8, 8);
  const auto message = [&](const auto& change) -> std::string {
    Case c = good;
    change(c);
    try {
      run(c);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  const std::vector<std::pair<std::string, std::string>> messages = {
      {"span 0", message([](Case& c) {
         c.spans = span_list({{0, 3, 11}});
       })},
      {"row below 2", message([](Case& c) {
         c.spans = span_list({{2, 3, 4}});
       })},
      {"spans", message([](Case& c) {
         c.spans = at::zeros({1, 3}, at::kLong);
       })},
      {"[n, 3]", message([](Case& c) { c.spans = at::zeros({3}, at::kInt); })},
      {"one row", message([](Case& c) {
         c.cu = at::tensor({0, 10}, at::kInt);
       })},
      {"at least as many keys", message([](Case& c) {
         c.key_lengths = at::tensor({12, 9}, at::kInt);
       })},
      {"exceeds", message([](Case& c) {
         c.key_lengths = at::tensor({12, 13}, at::kInt);
       })},
      {"entries", message([](Case& c) { c.key_lengths = at::tensor({12}, at::kInt); })},
      {"window", message([](Case& c) { c.window = -1; })},
      {"finite", message([](Case& c) { c.scale = std::numeric_limits<double>::infinity(); })},
      {"one dtype", message([](Case& c) { c.k = c.k.to(at::kDouble); })},
      {"groups", message([](Case& c) {
         c.q = at::randn({2, 10, 3, 8});
       })},
      {"width", message([](Case& c) {
         c.q = at::randn({2, 10, 4, 6});
       })},
      {"expected q [B", message([](Case& c) {
         c.q = at::randn({10, 4, 8});
       })},
      {"cu_seqlens_k without", message([](Case& c) {
         c.cu_k = at::tensor({0, 12}, at::kInt);
       })},
  };
  for (const auto& [expected, m] : messages) {
    EXPECT_NE(m.find(expected), std::string::npos) << m;
    EXPECT_EQ(m.rfind("span_attention: ", 0), 0u) << m;
    EXPECT_EQ(m.find('\n'), std::string::npos) << m;
  }
}

// What the device's kernels rely on without reading a value.
TEST(SpanAttention, ShapesAreCheckedWithoutValues) {
  const at::Tensor q = at::zeros({1, 10, 2, 8}), k = at::zeros({1, 12, 2, 8}), two = at::zeros({2, 10, 2, 8});
  const auto ints = [](at::IntArrayRef shape) { return std::optional<at::Tensor>(at::zeros(shape, at::kInt)); };
  EXPECT_NO_THROW(check_attention_shapes(q, k, ints({4, 3}), ints({3}), ints({3}), {}));
  EXPECT_NO_THROW(check_attention_shapes(q, k, {}, {}, {}, ints({1})));
  EXPECT_THROW(check_attention_shapes(q, k, ints({4, 2}), {}, {}, {}), Error);
  EXPECT_THROW(check_attention_shapes(q, k, {}, ints({3}), {}, {}), Error);         // 12 keys under the queries' bounds
  EXPECT_THROW(check_attention_shapes(q, k, {}, ints({3}), ints({4}), {}), Error);
  EXPECT_THROW(check_attention_shapes(q, q, {}, ints({0}), {}, {}), Error);
  EXPECT_THROW(check_attention_shapes(two, two, {}, ints({3}), {}, {}), Error);
  EXPECT_THROW(check_attention_shapes(k, q, {}, {}, {}, {}), Error);                // more queries than keys
  EXPECT_THROW(check_attention_shapes(q, k, {}, {}, {}, ints({2})), Error);
}

}  // namespace
}  // namespace oryx::ops
