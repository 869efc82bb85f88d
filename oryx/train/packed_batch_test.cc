// A batch in one piece of memory is the batch: the same loss and gradients, bit for bit.
#include "oryx/train/packed_batch.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "oryx/data/loader.h"
#include "oryx/model/scheduling.h"
#include "oryx/train/batch_feed.h"

namespace oryx {
namespace {

ModelConfig packed_model(bool share_query) {
  ModelConfig c;
  c.vocab_size = 40;
  c.num_layers = 3;
  c.layer.hidden_size = 16;
  c.layer.head_dim = 8;
  c.layer.intermediate_size = 16;
  c.layer.share_query = share_query;
  c.layer_mixers = {{"gated_delta_net", "attention"}, {"mamba2"}, {"gated_delta_net", "attention"}};
  return c;
}

std::vector<int64_t> bounds_of(std::vector<int32_t> cu) {
  const at::Tensor padded = padded_bounds(at::tensor(cu, at::kInt), document_room(static_cast<int64_t>(cu.size()) - 1)).to(at::kLong);
  return {padded.data_ptr<int64_t>(), padded.data_ptr<int64_t>() + padded.numel()};
}

TEST(PackedBatch, BoundsAreFilledUpWithEmptyDocuments) {
  using ::testing::ElementsAre;
  EXPECT_THAT(bounds_of({0, 9}), ElementsAre(0, 9));
  EXPECT_THAT(bounds_of({0, 2, 3, 9}), ElementsAre(0, 2, 3, 9));
  EXPECT_THAT(bounds_of({0, 2, 3, 4, 5, 9}), ElementsAre(0, 2, 3, 4, 5, 9, 9));
  std::vector<size_t> sizes;
  for (const size_t n : {7u, 8u, 9u, 13u, 17u, 25u, 33u, 49u, 100u}) sizes.push_back(bounds_of(std::vector<int32_t>(n + 1, 0)).size() - 1);
  EXPECT_THAT(sizes, ElementsAre(8, 8, 12, 16, 24, 32, 48, 64, 128));
}

struct Case {
  const char* schedule;
  bool packed;
};

TEST(PackedBatch, IsTheBatch) {
  const ModelConfig config = packed_model(true);
  LanguageModel model(config);
  model.initialize(3);
  model.requires_grad(true);
  at::manual_seed(5);
  std::set<std::string> keys;
  for (const Case& c : {Case{"random(attention=0.5;chunk=4)", true}, {"random(attention=0.5;chunk=4)", false}, {"linear", true}, {"attention", false},
                        {R"({"layers": {"0": "linear,attention@-3:", "1": "linear", "2": "attention@:5"}})", true}}) {
    SCOPED_TRACE(c.schedule);
    const ModelSchedule schedule(config, c.schedule);
    ModelInput input;
    std::vector<ModePiece> pieces;
    if (c.packed) {
      input.input_ids = at::randint(40, {1, 30}, at::kLong);
      input.cu_seqlens = padded_bounds(at::tensor(std::vector<int32_t>{0, 7, 8, 19, 25, 30}, at::kInt), 8);
      pieces = packed_pieces(at::tensor(std::vector<int32_t>{0, 7, 8, 19, 25, 30}, at::kInt), {});
    } else {
      input.input_ids = at::randint(40, {3, 10}, at::kLong);
      ModeContext context;
      context.prompt_length = 10;
      pieces = row_pieces(3, 10, context);
    }
    const at::Tensor targets = at::randint(40, input.input_ids.sizes(), at::kLong);
    targets.view({-1})[4] = -100;
    input.routing = schedule.route(pieces, input.input_ids.size(0), input.input_ids.size(1));
    const PackedBatch packed = pack_batch(model, input, targets);
    EXPECT_TRUE(packed.layout->fixed_shapes);
    EXPECT_TRUE(keys.insert(packed.layout->key).second);
    const auto run = [&](const ModelInput& in, const at::Tensor& t) {
      for (size_t i = 0; i < model.parameters().size(); ++i) model.leaf(i).mutable_grad().reset();
      const at::Tensor loss = model.loss(model.hidden(in), t).loss;
      torch::autograd::backward({loss}, {});
      std::vector<at::Tensor> all{loss.detach()};
      for (size_t i = 0; i < model.parameters().size(); ++i) all.push_back(model.leaf(i).grad().defined() ? model.leaf(i).grad().clone() : at::zeros({0}));
      return all;
    };
    const auto want = run(input, targets);
    // Other contents of the same layout first: what is read is what lies there when the pass runs.
    const at::Tensor memory = packed.bytes.clone();
    const UnpackedBatch views = unpack_batch(*packed.layout, memory);
    EXPECT_TRUE(at::equal(views.input.input_ids, input.input_ids));
    const auto found = run(views.input, views.targets);
    for (size_t i = 0; i < want.size(); ++i) EXPECT_TRUE(at::equal(want[i], found[i])) << (i == 0 ? "loss" : model.specs()[i - 1].name);
  }
}

// One layout serves batches that differ in where the modes lie; without a shared query a CPU's products have as many rows as a mixer has tokens.
TEST(PackedBatch, OneLayoutServesManyBatches) {
  const ModelConfig config = packed_model(true);
  const LanguageModel model(config), gathers(packed_model(false));
  const ModelSchedule schedule(config, "random(attention=0.5;chunk=2)");
  std::set<std::string> keys, kinds;
  for (uint64_t step = 0; step < 20; ++step) {
    ModeContext context;
    context.prompt_length = 40;
    context.step = step;
    ModelInput input;
    input.input_ids = at::zeros({2, 40}, at::kLong);
    input.routing = schedule.route(row_pieces(2, 40, context), 2, 40);
    const PackedBatch packed = pack_batch(model, input, input.input_ids);
    keys.insert(packed.layout->key), kinds.insert(packed.layout->kind);
    EXPECT_FALSE(pack_batch(gathers, input, input.input_ids).layout->fixed_shapes);
  }
  EXPECT_EQ(keys.size(), 1u);
  EXPECT_EQ(kinds.size(), 1u);
}

// Rows of documents, their number another one in each batch.
class VaryingDocuments : public BatchSource {
 public:
  TrainBatch next() override {
    TrainBatch b;
    b.input_ids = at::full({1, 60}, given_ % 40, at::kLong), b.targets = b.input_ids;
    std::vector<int32_t> cu = {0};
    for (int32_t n = 3 + static_cast<int32_t>(given_ * 5 % 17); n > 0; --n) cu.push_back(cu.back() + 2);
    cu.back() = 60;
    ++given_;
    b.cu_seqlens = at::tensor(cu, at::kInt);
    b.pieces = packed_pieces(*b.cu_seqlens, {});
    return b;
  }
  Json position() const override { return {{"given", given_}}; }
  void seek(const Json&) override {}

 private:
  int64_t given_ = 0;
};

TEST(PackedBatch, AStepsBatchesAreFilledUpAlike) {
  const ModelConfig config = packed_model(true);
  const LanguageModel model(config);
  const ModelSchedule schedule(config, "random(attention=0.5;chunk=1)");
  VaryingDocuments packs, plain;
  BatchFeed fed(packs, schedule, model, {.accumulate = 3, .pack = true}, 2), one_by_one(plain, schedule, model, {.accumulate = 3});
  std::set<int64_t> rooms;
  for (int64_t step = 0; step < 4; ++step) {
    std::vector<FedBatch> batches;
    for (int i = 0; i < 3; ++i) {
      batches.push_back(fed.next());
      const FedBatch want = one_by_one.next();
      EXPECT_EQ(fed.position(), one_by_one.position());  // not of what was drawn ahead
      EXPECT_TRUE(at::equal(batches.back().input.input_ids, want.input.input_ids));
      EXPECT_EQ(batches.back().attention_share, want.attention_share);
      EXPECT_EQ(batches.back().flops, want.flops);
    }
    EXPECT_EQ(batches[0].packed.layout->bounds, batches[1].packed.layout->bounds);
    EXPECT_EQ(batches[0].packed.layout->bounds, batches[2].packed.layout->bounds);
    rooms.insert(batches[0].packed.layout->bounds - 1);
  }
  for (const int64_t room : rooms) EXPECT_EQ(room, document_room(room));
  EXPECT_GT(rooms.size(), 1u);
}

}  // namespace
}  // namespace oryx
