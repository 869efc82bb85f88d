// Copies of the matrices in the type of computation: the same model, and its gradients are theirs.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "oryx/model/language_model.h"
#include "oryx/model/scheduling.h"

namespace oryx {
namespace {

ModelConfig tied_config(bool tied) {
  ModelConfig c;
  c.vocab_size = 50;
  c.num_layers = 2;
  c.layer.hidden_size = 32;
  c.layer.head_dim = 16;
  c.layer.intermediate_size = 48;
  c.layer_mixers = {{"gated_delta_net", "attention"}};
  c.tie_word_embeddings = tied;
  return c;
}

at::Tensor loss_of(const LanguageModel& model) {
  const ModelSchedule schedule(model.config(), "random(attention=0.5;chunk=4)");
  ModeContext context;
  context.prompt_length = 19;
  ModelInput in;
  in.input_ids = (at::arange(38).view({2, 19}) * 7).remainder(50);
  in.routing = schedule.route(row_pieces(2, 19, context), 2, 19);
  return model.loss(model.hidden(in), in.input_ids.roll(-1, 1)).loss;
}

TEST(Copies, TheSameLossAndGradients) {
  for (const bool tied : {false, true}) {
    LanguageModel plain(tied_config(tied), at::kBFloat16), with(tied_config(tied), at::kBFloat16);
    for (LanguageModel* m : {&plain, &with}) {
      m->initialize(3);
      m->requires_grad(true);
    }
    with.keep_copies();
    const at::Tensor a = loss_of(plain), b = loss_of(with);
    EXPECT_TRUE(at::equal(a, b));
    torch::autograd::backward({a}, {});
    torch::autograd::backward({b}, {});
    size_t copied = 0;
    for (size_t i = 0; i < plain.specs().size(); ++i) {
      const at::Tensor expected = plain.parameters()[i].grad(), found = with.leaf(i).grad();
      ASSERT_TRUE(found.defined() == expected.defined()) << plain.specs()[i].name;
      if (!expected.defined()) continue;
      copied += with.leaf(i).scalar_type() == at::kBFloat16;
      EXPECT_LE((found.to(at::kFloat) - expected).norm().item<double>(), 1e-2 * expected.norm().item<double>()) << plain.specs()[i].name;
    }
    EXPECT_GE(copied, 10u);
  }
}

TEST(Copies, FollowTheirParametersWhenAsked) {
  LanguageModel model(tied_config(true), at::kBFloat16);
  model.initialize(3);
  model.keep_copies();
  const at::Tensor before = loss_of(model);
  {
    const at::NoGradGuard no_grad;
    for (const at::Tensor& p : model.parameters()) p.mul_(1.5);
  }
  model.refresh_copies();
  LanguageModel other(tied_config(true), at::kBFloat16);
  other.initialize(3);
  {
    const at::NoGradGuard no_grad;
    for (const at::Tensor& p : other.parameters()) p.mul_(1.5);
  }
  EXPECT_TRUE(at::equal(loss_of(model), loss_of(other)));
  EXPECT_FALSE(at::equal(loss_of(model), before));
}

}  // namespace
}  // namespace oryx
