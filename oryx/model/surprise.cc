#include "oryx/model/surprise.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "oryx/common/error.h"
#include "oryx/model/scheduling.h"

namespace oryx {

std::vector<float> token_surprise(const LanguageModel& model, const at::Tensor& input_ids, const std::optional<at::Tensor>& cu_seqlens) {
  const at::NoGradGuard no_grad;
  TORCH_CHECK(input_ids.dim() == 2 && input_ids.size(0) == 1, "surprise: ids ", input_ids.sizes(), ", expected [1, T]");
  const int64_t T = input_ids.size(1);
  at::Tensor sum;
  int64_t count = 0;
  ModelInput input;
  input.input_ids = input_ids;
  input.cu_seqlens = cu_seqlens;
  ModePiece piece{.row = 0, .column = 0, .length = T, .start = 0, .context = {}};
  piece.context.prompt_length = T;
  input.routing = ModelSchedule(model.config(), "linear").route({piece}, 1, T);
  input.surprise = [&](const at::Tensor& score) {
    sum = sum.defined() ? sum + score : score;
    ++count;
  };
  (void)model.hidden(input);
  if (count == 0) fail("the model's mixers are {}: none of them predicts values, as 'surprise' wants (gated_delta_net, kimi_delta_attention, mamba2)", fmt::join(model.config().mixers(), ", "));
  const at::Tensor mean = (sum[0] / static_cast<double>(count)).to(at::kFloat).cpu().contiguous();
  std::vector<float> scores(mean.const_data_ptr<float>(), mean.const_data_ptr<float>() + T);
  const auto bad = std::find_if(scores.begin(), scores.end(), [](float x) { return !std::isfinite(x); });
  if (bad != scores.end()) fail("the surprise of token {} is {}; the model's weights are damaged or overflow", bad - scores.begin(), *bad);
  return scores;
}

bool needs_surprise(const std::vector<std::string>& needs) { return std::find(needs.begin(), needs.end(), "surprise") != needs.end(); }

}  // namespace oryx
