#include "oryx/router/gains.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <string>

#include "oryx/common/error.h"
#include "oryx/common/interrupt.h"
#include "oryx/data/packing.h"
#include "oryx/model/scheduling.h"

namespace oryx {

namespace {

struct GainReading {
  at::Tensor hidden, nll;  // [T, D], [T] float32 CPU
};

GainReading read_under(const LanguageModel& model, const GainText& text, const std::string& schedule) {
  check_interrupt();
  std::vector<ModePiece> pieces;
  for (size_t n = 0; n + 1 < text.bounds.size(); ++n) {
    const int64_t length = text.bounds[n + 1] - text.bounds[n];
    if (length == 0) continue;
    ModePiece piece{.row = 0, .column = text.bounds[n], .length = length, .start = 0, .context = {}};
    piece.context.prompt_length = length;
    pieces.push_back(piece);
  }
  ModelInput input;
  input.input_ids = text.input_ids;
  if (text.bounds.size() > 2) input.cu_seqlens = at::tensor(text.bounds, at::kInt);
  input.routing = ModelSchedule(model.config(), schedule).route(pieces, 1, text.input_ids.size(1));
  const at::Tensor hidden = model.hidden(input);
  const at::Tensor nll = model.loss(hidden, text.targets.to(hidden.device())).nll.to(at::kCPU, at::kFloat);
  const at::Tensor asked = text.targets.reshape({-1}).ne(kIgnoreTarget);
  if (!nll.masked_select(asked).isfinite().all().item<bool>()) fail("a loss under the schedule '{}' is not finite; the model's weights are damaged or overflow", schedule);
  return {hidden[0].cpu(), at::where(asked, nll, at::zeros_like(nll))};
}

}  // namespace

MeasuredGains measure_gains(const LanguageModel& model, const GainText& text, int64_t readings) {
  const at::NoGradGuard no_grad;
  TORCH_CHECK(readings >= 1, "gains: ", readings, " readings");
  const auto mixers = model.config().mixers();
  if (std::find(mixers.begin(), mixers.end(), "attention") == mixers.end()) fail("the model's mixers are {}: there is no attention to gain from", fmt::join(mixers, ", "));
  const GainReading linear = read_under(model, text, "linear");
  MeasuredGains m;
  m.linear_nll = linear.nll;
  m.linear_hidden = linear.hidden;
  if (readings == 1) {
    const GainReading other = read_under(model, text, "attention");
    m.gain = linear.nll - other.nll;
    m.attention_hidden = other.hidden;
    return m;
  }
  m.gain = at::zeros_like(linear.nll);
  m.attention_hidden = linear.hidden.clone();
  // Position within its text decides which reading has a token in attention.
  at::Tensor place = at::arange(text.input_ids.size(1), at::kLong);
  for (size_t n = 0; n + 1 < text.bounds.size(); ++n) place.narrow(0, text.bounds[n], text.bounds[n + 1] - text.bounds[n]).sub_(int64_t{text.bounds[n]});
  place.remainder_(readings);
  for (int64_t r = 0; r < readings; ++r) {
    const GainReading other = read_under(model, text, fmt::format("linear,periodic(attention=1;every={};offset={})", readings, r));
    const at::Tensor in = place.eq(r);
    m.gain = at::where(in, linear.nll - other.nll, m.gain);
    m.attention_hidden = at::where(in.unsqueeze(1), other.hidden, m.attention_hidden);
  }
  return m;
}

double single_gain(const LanguageModel& model, const at::Tensor& input_ids, const at::Tensor& targets, int64_t position) {
  const at::NoGradGuard no_grad;
  TORCH_CHECK(position >= 0 && position < input_ids.size(1), "gains: token ", position, " of ", input_ids.size(1));
  const GainText text{input_ids.narrow(1, 0, position + 1), targets.narrow(1, 0, position + 1), {0, static_cast<int32_t>(position + 1)}, -1};
  const double linear = read_under(model, text, "linear").nll[position].item<double>();
  return linear - read_under(model, text, fmt::format("linear,attention@{}:{}", position, position + 1)).nll[position].item<double>();
}

}  // namespace oryx
