// Batches that a thread draws ahead are those that are drawn one by one.
#include "oryx/train/batch_feed.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "oryx/common/error.h"
#include "oryx/model/routed_cost.h"

namespace oryx {
namespace {

ModelConfig small() {
  ModelConfig c;
  c.vocab_size = 40;
  c.num_layers = 1;
  c.layer.hidden_size = 16;
  c.layer.head_dim = 8;
  c.layer.intermediate_size = 16;
  c.layer_mixers = {{"gated_delta_net", "attention"}};
  return c;
}

RecallBatches recall() {
  RecallOptions r;
  r.pairs = 4;
  r.queries = 2;
  r.key_symbols = r.value_symbols = 16;
  r.filler_symbols = 6;
  return RecallBatches(r, 3, 7);
}

// One that fails, or gives an id that no model knows, after some batches.
class Failing : public BatchSource {
 public:
  explicit Failing(bool bad_id) : inner_(recall()), bad_id_(bad_id) {}
  TrainBatch next() override {
    if (++given_ <= 2) return inner_.next();
    if (!bad_id_) fail("the disk is gone");
    TrainBatch b = inner_.next();
    b.input_ids.fill_(40);
    return b;
  }
  Json position() const override { return {{"given", given_}}; }
  void seek(const Json&) override {}

 private:
  RecallBatches inner_;
  bool bad_id_;
  int64_t given_ = 0;
};

TEST(BatchFeed, AheadOrNotTheSameBatches) {
  const ModelConfig config = small();
  const LanguageModel model(config);
  const ModelSchedule schedule(config, "random(attention=0.5;chunk=4)");
  RecallBatches one = recall(), two = recall();
  BatchFeed now(one, schedule, model, {5, 3, 2}, 0), ahead(two, schedule, model, {5, 3, 2}, 3);
  EXPECT_EQ(ahead.position(), now.position());
  for (int i = 0; i < 7; ++i) {
    const FedBatch a = now.next(), b = ahead.next();
    EXPECT_TRUE(at::equal(a.input.input_ids, b.input.input_ids)) << i;
    EXPECT_TRUE(at::equal(a.targets, b.targets)) << i;
    EXPECT_TRUE(at::equal(a.input.prepared->positions, b.input.prepared->positions)) << i;
    EXPECT_EQ(a.attention_share, b.attention_share) << i;
    EXPECT_EQ(a.flops, b.flops) << i;
    EXPECT_EQ(now.position(), ahead.position()) << i;  // not that of batches which nobody has taken
  }
}  // with batches left in the queue

TEST(BatchFeed, ErrorsReachTheOneWhoAsks) {
  const ModelConfig config = small();
  const LanguageModel model(config);
  const ModelSchedule schedule(config, "linear");
  for (const bool bad_id : {false, true}) {
    for (const int64_t ahead : {0, 3}) {
      Failing source(bad_id);
      BatchFeed feed(source, schedule, model, {}, ahead);
      (void)feed.next();
      (void)feed.next();
      try {
        (void)feed.next();
        FAIL() << "no error";
      } catch (const Error& e) {
        EXPECT_THAT(e.what(), ::testing::HasSubstr(bad_id ? "token id 40 is outside" : "the disk is gone"));
      }
    }
  }
}

// FLOPs are counted within documents: two short ones cost less attention than one long one.
TEST(BatchFeed, FlopsStopAtDocuments) {
  const ModelConfig config = small();
  const ModelSchedule schedule(config, "attention");
  ModeContext context;
  context.prompt_length = 8;
  const auto flops = [&](const std::vector<ModePiece>& pieces) { return pieces_flops(config, schedule.route(pieces, 1, 16), pieces); };
  const double two = flops(packed_pieces(at::tensor(std::vector<int32_t>{0, 8, 16}, at::kInt), context));
  const double one = flops(packed_pieces(at::tensor(std::vector<int32_t>{0, 16}, at::kInt), context));
  // 2 heads of 8 + 8, 2 FLOPs each, for each token seen: 36 + 36 against 136 pairs.
  EXPECT_DOUBLE_EQ(one - two, 2 * 2 * 16 * (136 - 72));
}

}  // namespace
}  // namespace oryx
