#include "oryx/router/train.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/progress.h"
#include "oryx/common/random.h"
#include "oryx/data/loader.h"
#include "oryx/data/packing.h"
#include "oryx/ops/adamw/adamw.h"
#include "oryx/router/features.h"

namespace oryx {

void RouterOptions::describe(Fields& f) {
  f.add("tokens", tokens, "tokens to measure, the held-out ones among them", at_least(2));
  f.add("readings", readings, "beside the linear one; each has every so manieth token in attention (1: all)", at_least(1));
  f.add("reads", reads, "hidden: the hidden state before the token and the tokens; tokens: these alone, without a first reading of a prompt", one_of({"hidden", "tokens"}));
  f.add("width", width, "hidden units", at_least(1));
  f.add("epochs", epochs, "passes over the measured tokens", at_least(1));
  f.add("batch_size", batch_size, "tokens of a step", at_least(1));
  f.add("lr", lr, "peak learning rate", above(0));
  f.add("weight_decay", weight_decay, "of AdamW", at_least(0));
  f.add("huber", huber, "nats beyond which an error counts linearly", above(0));
  f.add("attention_hidden", attention_hidden, "share of the tokens whose hidden state before is taken in attention", between(0, 1));
  f.add("holdout", holdout, "share of the texts held out", between(0.001, 0.9));
  f.add("flips", flips, "held-out tokens whose gain is measured alone as well, to see what the readings are worth", at_least(0));
  f.add("seed", seed, "of the order of texts, the first weights and the batches", at_least(0));
}

DocumentGains::DocumentGains(std::shared_ptr<const TokenFile> file, int64_t seq_len, uint64_t seed) : file_(std::move(file)), seq_len_(seq_len), seed_(seed) {
  TORCH_CHECK(seq_len_ >= 1, "router: windows of ", seq_len_, " tokens");
}

std::optional<GainText> DocumentGains::next() {
  constexpr uint64_t kFewDocuments = 10;  // with fewer, windows of one document may stand on both sides
  while (document_ < file_->documents()) {
    const uint64_t d = Permutation(file_->documents(), seed_, 0)(document_), size = file_->document_size(d);
    if (begin_ + 1 >= size) {
      ++document_;
      begin_ = 0;
      continue;
    }
    const auto n = static_cast<int64_t>(std::min<uint64_t>(static_cast<uint64_t>(seq_len_), size - 1 - begin_));
    std::vector<int64_t> ids(static_cast<size_t>(n + 1));
    file_->read(file_->document_begin(d) + begin_, ids);
    begin_ += static_cast<uint64_t>(n);
    const at::Tensor all = at::tensor(ids, at::kLong).unsqueeze(0);
    return GainText{all.narrow(1, 0, n).contiguous(), all.narrow(1, 1, n).contiguous(), {0, static_cast<int32_t>(n)}, file_->documents() < kFewDocuments ? -1 : static_cast<int64_t>(d)};
  }
  return std::nullopt;
}

RecallGains::RecallGains(const RecallOptions& task, uint64_t seed) : task_(task), seed_(seed) { check(task_); }

std::optional<GainText> RecallGains::next() {
  const int64_t T = task_.tokens(), B = std::max<int64_t>(1, 2048 / T);
  const RecallBatch batch = recall_batch(task_, seed_, index_, B);
  index_ += static_cast<uint64_t>(B);
  GainText text{batch.input_ids.reshape({1, B * T}), batch.targets.reshape({1, B * T}), {}, -1};
  for (int64_t b = 0; b <= B; ++b) text.bounds.push_back(static_cast<int32_t>(b * T));
  return text;
}

namespace {

constexpr uint64_t kRouterStream = 0x726f75746572;

// Measured tokens of texts, into [N, F] and [N] tensors that are there already.
class GainRows {
 public:
  GainRows(int64_t rows, int64_t features) : features_(at::empty({rows, features}, at::kHalf)), gains_(at::empty({rows}, at::kFloat)) {}
  // As many as there is room for -> so many.
  int64_t add(const at::Tensor& x, const at::Tensor& gains) {
    const int64_t n = std::min(x.size(0), features_.size(0) - rows_);
    features_.narrow(0, rows_, n).copy_(x.narrow(0, 0, n));
    gains_.narrow(0, rows_, n).copy_(gains.narrow(0, 0, n));
    rows_ += n;
    return n;
  }
  int64_t rows() const { return rows_; }
  int64_t room() const { return features_.size(0) - rows_; }
  at::Tensor features() const { return features_.narrow(0, 0, rows_); }
  at::Tensor gains() const { return gains_.narrow(0, 0, rows_); }

 private:
  at::Tensor features_, gains_;
  int64_t rows_ = 0;
};

void add_flips(const LanguageModel& model, const GainText& text, const MeasuredGains& m, int64_t count, CounterRng& rng, GainData& data) {
  const int64_t T = text.input_ids.size(1);
  for (int64_t i = 0; i < count; ++i) {
    const auto t = static_cast<int64_t>(rng.below(static_cast<uint64_t>(T)));
    const auto after = std::upper_bound(text.bounds.begin(), text.bounds.end(), static_cast<int32_t>(t));
    const int64_t begin = *(after - 1), end = *after;
    if (text.targets[0][t].item<int64_t>() == kIgnoreTarget) continue;
    data.flip_gains.push_back(static_cast<float>(single_gain(model, text.input_ids.narrow(1, begin, end - begin), text.targets.narrow(1, begin, end - begin), t - begin)));
    data.flip_measured.push_back(m.gain[t].item<float>());
  }
}

}  // namespace

GainData collect_gains(const LanguageModel& model, GainSource& source, const RouterOptions& o, const std::function<void(int64_t tokens)>& progress) {
  const at::NoGradGuard no_grad;
  const int64_t F = 2 * model.config().layer.hidden_size + TokenHistory::kScalars;
  const bool reads_hidden = o.reads == "hidden";
  if (const double bytes = 2.0 * static_cast<double>(o.tokens * F), free = static_cast<double>(available_memory()); bytes > free) {
    fail("features of {} tokens take {}, but only {} of memory are free; use fewer tokens", o.tokens, human_bytes(bytes), human_bytes(free));
  }
  const auto held_rows = static_cast<int64_t>(std::ceil(o.holdout * static_cast<double>(o.tokens)));
  GainRows fit(o.tokens - held_rows, F), held(held_rows, F);
  CounterRng rng(static_cast<uint64_t>(o.seed) ^ kRouterStream);
  GainData data;
  double linear = 0;
  // Documents go to the side that is behind its share, so that both are full at the end, and none is on both.
  int64_t document = -1;
  bool to_held = false;
  for (auto text = source.next(); text && fit.room() + held.room() > 0; text = source.next()) {
    if (text->document < 0 || text->document != document) to_held = fit.room() == 0 || (held.room() > 0 && held.rows() * (o.tokens - held_rows) < fit.rows() * held_rows);
    document = text->document;
    if ((to_held ? held : fit).room() == 0) continue;
    const MeasuredGains m = measure_gains(model, *text, o.readings);
    at::Tensor hidden = m.linear_hidden;
    if (!to_held && o.attention_hidden > 0 && reads_hidden) {
      std::vector<uint8_t> take(static_cast<size_t>(hidden.size(0)));
      for (auto& t : take) t = rng.uniform() < o.attention_hidden ? 1 : 0;
      hidden = at::where(at::tensor(take, at::kByte).to(at::kBool).unsqueeze(1), m.attention_hidden, hidden);
    }
    const at::Tensor ids = text->input_ids.reshape({-1}).contiguous();
    const int64_t added = (to_held ? held : fit).add(router_features(model, reads_hidden, {ids.const_data_ptr<int64_t>(), static_cast<size_t>(ids.numel())}, text->bounds, hidden), m.gain);
    if (to_held) {
      data.texts += static_cast<int64_t>(text->bounds.size()) - 1;
      data.asked += text->targets.reshape({-1}).narrow(0, 0, added).ne(kIgnoreTarget).sum().item<int64_t>();
      linear += m.linear_nll.narrow(0, 0, added).sum(at::kDouble).item<double>();
      const int64_t due = o.flips * held.rows() / held_rows - static_cast<int64_t>(data.flip_gains.size());
      add_flips(model, *text, m, due, rng, data);
    }
    if (progress) progress(fit.rows() + held.rows());
  }
  if (fit.rows() == 0 || held.rows() == 0) fail("the data holds {} tokens to fit and {} to hold out, expected some of each: too few texts", fit.rows(), held.rows());
  data.features = fit.features();
  data.gains = fit.gains();
  data.held_features = held.features();
  data.held_gains = held.gains();
  data.linear_nats = linear / static_cast<double>(std::max<int64_t>(1, data.asked));
  return data;
}

double huber_loss(const GainHead& h, const at::Tensor& features, const at::Tensor& gains, double delta, GainHead* gradient) {
  const at::NoGradGuard no_grad;
  const auto n = static_cast<double>(gains.size(0));
  const at::Tensor z = (features.to(h.mean.scalar_type()) - h.mean) / h.scale;
  const at::Tensor a = at::addmm(h.b1, z, h.w1.t()), s = at::sigmoid(a), u = a * s;  // u = silu(a)
  const at::Tensor error = u.mv(h.w2) + z.mv(h.w0) + h.bias - gains;
  const at::Tensor size = error.abs();
  const double loss = at::where(size <= delta, error * error / 2, delta * (size - delta / 2)).sum(at::kDouble).item<double>() / n;
  if (gradient == nullptr) return loss;
  const at::Tensor d = error.clamp(-delta, delta) / n;                     // [N]
  const at::Tensor da = d.unsqueeze(1) * h.w2 * (s + u * (1 - s));          // silu' = s + a s (1 - s)
  gradient->w0 = z.t().mv(d);
  gradient->w2 = u.t().mv(d);
  gradient->w1 = da.t().mm(z);
  gradient->b1 = da.sum(0);
  gradient->bias = d.sum(at::kDouble).item<double>();
  return loss;
}

namespace {

// AdamW over a head's parts; the bias does not decay.
class HeadOptimizer {
 public:
  HeadOptimizer(GainHead& head, double weight_decay) : head_(head), weight_decay_(weight_decay), bias_(at::full({1}, head.bias, at::kDouble)) {
    for (const at::Tensor& p : parts_of(head)) m_.push_back(at::zeros_like(p)), v_.push_back(at::zeros_like(p));
    bias_m_ = at::zeros_like(bias_), bias_v_ = at::zeros_like(bias_);
  }

  void step(const GainHead& gradient, double lr) {
    ++steps_;
    ops::AdamwOptions options{.lr = lr, .beta1 = 0.9, .beta2 = 0.99, .weight_decay = weight_decay_};
    ops::adamw_step_all(parts_of(head_), parts_of(gradient), m_, v_, steps_, options);
    options.weight_decay = 0;
    ops::adamw_step(bias_, at::full_like(bias_, gradient.bias), bias_m_, bias_v_, steps_, options);
    head_.bias = bias_.item<double>();
  }

 private:
  static std::vector<at::Tensor> parts_of(const GainHead& h) { return {h.w0, h.w1, h.b1, h.w2}; }

  GainHead& head_;
  double weight_decay_;
  int64_t steps_ = 0;
  std::vector<at::Tensor> m_, v_;
  at::Tensor bias_, bias_m_, bias_v_;
};

constexpr int64_t kRowsAtOnce = 8192;

at::Tensor predicted(const GainHead& h, const at::Tensor& features) {
  std::vector<at::Tensor> parts;
  for (int64_t begin = 0; begin < features.size(0); begin += kRowsAtOnce) {
    parts.push_back(h.predict(features.narrow(0, begin, std::min(kRowsAtOnce, features.size(0) - begin)).to(at::kFloat)));
  }
  return at::cat(parts);
}

double held_loss(const GainHead& h, const GainData& data, double delta) {
  double sum = 0;
  const int64_t n = data.held_gains.size(0);
  for (int64_t begin = 0; begin < n; begin += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, n - begin);
    sum += huber_loss(h, data.held_features.narrow(0, begin, rows), data.held_gains.narrow(0, begin, rows), delta) * static_cast<double>(rows);
  }
  return sum / static_cast<double>(n);
}

GainHead first_head(const LanguageModel& model, const GainData& data, const RouterOptions& o) {
  GainHead h;
  const int64_t F = data.features.size(1);
  at::Tensor sum = at::zeros({F}, at::kDouble), squares = at::zeros({F}, at::kDouble);
  for (int64_t begin = 0; begin < data.features.size(0); begin += kRowsAtOnce) {
    const at::Tensor x = data.features.narrow(0, begin, std::min(kRowsAtOnce, data.features.size(0) - begin)).to(at::kDouble);
    sum += x.sum(0);
    squares += x.pow(2).sum(0);
  }
  const auto n = static_cast<double>(data.features.size(0));
  const at::Tensor mean = sum / n, deviation = (squares / n - mean * mean).clamp_min(0).sqrt();
  h.mean = mean.to(at::kFloat);
  h.scale = at::where(deviation > 1e-4, deviation, at::ones_like(deviation)).to(at::kFloat);  // what never varies says nothing
  CounterRng rng(static_cast<uint64_t>(o.seed) ^ kRouterStream, 1);
  std::vector<float> draws(static_cast<size_t>(o.width * F));
  for (float& x : draws) x = static_cast<float>(rng.normal() / std::sqrt(static_cast<double>(F)));
  h.w0 = at::zeros({F}, at::kFloat);
  h.w1 = at::tensor(draws, at::kFloat).view({o.width, F});
  h.b1 = at::zeros({o.width}, at::kFloat);
  std::vector<float> out(static_cast<size_t>(o.width));
  for (float& x : out) x = static_cast<float>(0.1 * rng.normal() / std::sqrt(static_cast<double>(o.width)));
  h.w2 = at::tensor(out, at::kFloat);
  h.bias = data.gains.mean().item<double>();
  h.reads_hidden = o.reads == "hidden";
  h.model = router_identity(model);
  return h;
}

GainHead copy_of(const GainHead& h) {
  GainHead copy = h;
  copy.w0 = h.w0.clone();
  copy.w1 = h.w1.clone();
  copy.b1 = h.b1.clone();
  copy.w2 = h.w2.clone();
  return copy;
}

double correlation_of(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.to(at::kDouble), y = b.to(at::kDouble);
  const at::Tensor dx = x - x.mean(), dy = y - y.mean();
  const double norm = std::sqrt((dx * dx).sum().item<double>() * (dy * dy).sum().item<double>());
  return norm > 0 ? (dx * dy).sum().item<double>() / norm : 0;
}

at::Tensor ranks_of(const at::Tensor& x) { return x.argsort(int64_t{0}).argsort(int64_t{0}); }

// Of the sum of `gains`, what the tokens of the highest `scores` hold.
double captured_by(const at::Tensor& scores, const at::Tensor& gains, double share) {
  const auto count = static_cast<int64_t>(std::llround(share * static_cast<double>(gains.size(0))));
  const double all = gains.sum(at::kDouble).item<double>();
  if (count == 0 || all == 0) return 0;
  return gains.index_select(0, std::get<1>(scores.topk(count))).sum(at::kDouble).item<double>() / all;
}

RouterFit measure_fit(GainHead& h, const GainData& data) {
  constexpr int64_t kQuantiles = 1000;
  RouterFit fit;
  const at::Tensor scores = predicted(h, data.held_features), &gains = data.held_gains;
  const at::Tensor sorted = std::get<0>(scores.sort()).contiguous();
  const int64_t n = sorted.size(0);
  for (int64_t q = 0; q <= kQuantiles; ++q) h.quantiles.push_back(sorted.const_data_ptr<float>()[(n - 1) * q / kQuantiles]);
  fit.correlation = correlation_of(scores, gains);
  fit.rank_correlation = correlation_of(ranks_of(scores), ranks_of(gains));
  fit.mean_gain = gains.sum(at::kDouble).item<double>() / static_cast<double>(std::max<int64_t>(1, data.asked));
  for (const double share : fit.shares) {
    fit.captured.push_back(captured_by(scores, gains, share));
    fit.possible.push_back(captured_by(gains, gains, share));
  }
  fit.train_tokens = data.gains.size(0);
  fit.held_tokens = n;
  fit.flipped = static_cast<int64_t>(data.flip_gains.size());
  if (fit.flipped > 1) {
    const at::Tensor alone = at::tensor(data.flip_gains, at::kFloat), measured = at::tensor(data.flip_measured, at::kFloat);
    fit.flips = correlation_of(alone, measured);
    const double mean = alone.mean().item<double>();
    fit.flips_ratio = mean != 0 ? measured.mean().item<double>() / mean : 0;
  }
  return fit;
}

}  // namespace

std::pair<GainHead, RouterFit> fit_router(const LanguageModel& model, const GainData& data, const RouterOptions& o,
                                          const std::function<void(int64_t steps, int64_t of, double held_loss)>& progress) {
  const at::NoGradGuard no_grad;
  GainHead h = first_head(model, data, o), gradient, best;
  HeadOptimizer optimizer(h, o.weight_decay);
  const int64_t N = data.gains.size(0), batch = std::min(o.batch_size, N), steps_each = std::max<int64_t>(1, N / batch), steps = steps_each * o.epochs;
  double best_loss = held_loss(h, data, o.huber), last_loss = best_loss;
  int64_t best_epoch = 0;
  best = copy_of(h);
  std::vector<int64_t> order(static_cast<size_t>(N));
  std::iota(order.begin(), order.end(), 0);
  CounterRng rng(static_cast<uint64_t>(o.seed) ^ kRouterStream, 2);
  for (int64_t step = 0; step < steps; ++step) {
    check_interrupt();
    if (step % steps_each == 0) {
      for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[static_cast<size_t>(rng.below(i))]);
    }
    const auto from = order.begin() + (step % steps_each) * batch;
    const at::Tensor index = at::tensor(std::vector<int64_t>(from, from + batch), at::kLong);
    (void)huber_loss(h, data.features.index_select(0, index), data.gains.index_select(0, index), o.huber, &gradient);
    const double done = static_cast<double>(step) / static_cast<double>(steps), warm = std::min(1.0, static_cast<double>(step + 1) / 50);
    optimizer.step(gradient, o.lr * warm * 0.5 * (1 + std::cos(3.14159265358979 * done)));
    if ((step + 1) % steps_each == 0) {
      last_loss = held_loss(h, data, o.huber);
      if (!std::isfinite(last_loss)) fail("the held-out loss of the router is {} after {} steps; a lower lr may help", last_loss, step + 1);
      if (last_loss < best_loss) {
        best_loss = last_loss;
        best_epoch = (step + 1) / steps_each;
        best = copy_of(h);
      }
    }
    if (progress) progress(step + 1, steps, last_loss);
  }
  RouterFit fit = measure_fit(best, data);
  fit.best_epoch = best_epoch;
  return {std::move(best), std::move(fit)};
}

Json RouterFit::json() const {
  Json rows = Json::array();
  for (size_t i = 0; i < shares.size(); ++i) rows.push_back({{"share", shares[i]}, {"router", captured[i]}, {"oracle", possible[i]}});
  return {{"correlation", correlation},   {"rank_correlation", rank_correlation}, {"mean_gain", mean_gain},     {"captured", rows},
          {"train_tokens", train_tokens}, {"held_tokens", held_tokens},           {"best_epoch", best_epoch},   {"flips", flips ? Json(*flips) : Json(nullptr)},
          {"flips_ratio", flips_ratio},   {"flipped", flipped}};
}

}  // namespace oryx
