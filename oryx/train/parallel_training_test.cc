// Runs of several ranks: the steps of one, whatever their number; the same bits twice; checkpoints that any number of ranks goes on from.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <mutex>

#include "oryx/common/error.h"
#include "oryx/common/random.h"
#include "oryx/io/safetensors.h"
#include "oryx/parallel/test_support.h"
#include "oryx/train/rank_batches.h"
#include "oryx/train/trainer.h"
#include "tests/support/folder.h"

namespace oryx {
namespace {

namespace fs = std::filesystem;

// Rows of random tokens in documents of random lengths: 3 rows' worth of text in few documents and one row in many, so that ranks have other numbers of targets.
class PackedRandom : public BatchSource {
 public:
  PackedRandom(int64_t rows, int64_t tokens, int64_t vocabulary) : rows_(rows), tokens_(tokens), vocabulary_(vocabulary) {}
  TrainBatch next() override {
    CounterRng rng(11, static_cast<uint64_t>(given_++));
    const int64_t n = rows_ * tokens_;
    TrainBatch b;
    b.input_ids = at::empty({1, n}, at::kLong);
    auto* ids = b.input_ids.mutable_data_ptr<int64_t>();
    for (int64_t i = 0; i < n; ++i) ids[i] = static_cast<int64_t>(rng.below(static_cast<uint64_t>(vocabulary_)));
    b.targets = b.input_ids.roll(-1, 1).contiguous();
    std::vector<int32_t> bounds = {0};
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t at = 0; at < tokens_;) {
        at = std::min(tokens_, at + 1 + static_cast<int64_t>(rng.below(static_cast<uint64_t>(row == 0 ? 4 : tokens_))));
        bounds.push_back(static_cast<int32_t>(row * tokens_ + at));
        b.targets[0][row * tokens_ + at - 1] = -100;
      }
    }
    b.cu_seqlens = at::tensor(bounds, at::kInt);
    b.pieces = packed_pieces(*b.cu_seqlens, {});
    return b;
  }
  Json position() const override { return {{"given", given_}}; }
  void seek(const Json& p) override { given_ = p.at("given").get<int64_t>(); }

 private:
  int64_t rows_, tokens_, vocabulary_, given_ = 0;
};

class ParallelTraining : public ::testing::Test {
 protected:
  TrainOptions options(const std::string& out, int64_t steps = 6) const {
    TrainOptions o;
    o.model.vocab_size = 40;
    o.model.num_layers = 2;
    o.model.layer.hidden_size = 32;
    o.model.layer.head_dim = 8;
    o.model.layer.intermediate_size = 48;
    o.out = (folder_ / out).string();
    o.steps = steps;
    o.batch_size = 4, o.seq_len = 24;
    o.warmup_steps = 2;
    o.lr = 3e-3;
    o.chunk = 4;
    o.attention_share = 0.5;
    o.save_every = 3;
    o.keep_checkpoints = 10;
    o.log_every = 1;
    o.validate_every = 0;
    return o;
  }

  struct Outcome {
    std::vector<double> losses, norms, shares;
    std::map<std::string, at::Tensor> tensors;
  };

  // ranks 0: without a group, as `oryx train` by itself.
  Outcome run(const TrainOptions& o, int64_t ranks, bool packed = true) const {
    const auto train_one = [&](ProcessGroup* group) {
      TrainTask task;
      if (packed) {
        task.source = std::make_unique<PackedRandom>(o.batch_size, o.seq_len, o.model.vocab_size);
      } else {
        RecallOptions r;
        r.pairs = 4, r.queries = 2, r.key_symbols = r.value_symbols = 16, r.filler_symbols = 8;
        task.source = std::make_unique<RecallBatches>(r, o.batch_size, 7);
      }
      train(o, task, group);
    };
    if (ranks == 0) train_one(nullptr);
    else test::for_ranks(ranks, [&](ProcessGroup& group) { train_one(&group); });
    Outcome out;
    for (const auto& line : RunFolder(o.out).rewind_metrics(1000)) {
      out.losses.push_back(line.at("loss").get<double>());
      out.norms.push_back(line.at("gradient_norm").get<double>());
      out.shares.push_back(line.at("attention_share").get<double>());
    }
    for (const char* file : {"model.safetensors", "optimizer.safetensors"}) {
      const SafetensorsReader reader(fs::path(o.out) / "model" / file);
      for (const auto& [name, info] : reader.tensors()) out.tensors[name] = reader.load(name);
    }
    return out;
  }

  static void expect_near(const Outcome& a, const Outcome& b, double losses, double tensors) {
    ASSERT_EQ(a.losses.size(), b.losses.size());
    for (size_t i = 0; i < a.losses.size(); ++i) {
      EXPECT_NEAR(a.losses[i] / b.losses[i], 1, losses) << "step " << i + 1;
      EXPECT_NEAR(a.norms[i] / b.norms[i], 1, 10 * losses) << "step " << i + 1;
      EXPECT_NEAR(a.shares[i], b.shares[i], 1e-12) << "step " << i + 1;  // the same modes
    }
    ASSERT_EQ(a.tensors.size(), b.tensors.size());
    for (const auto& [name, t] : a.tensors) {
      const at::Tensor other = b.tensors.at(name);
      EXPECT_LE((t - other).norm().item<double>(), tensors * (1e-6 + other.norm().item<double>())) << name;
    }
  }
  static void expect_same(const Outcome& a, const Outcome& b) {
    EXPECT_EQ(a.losses, b.losses);
    EXPECT_EQ(a.norms, b.norms);
    ASSERT_EQ(a.tensors.size(), b.tensors.size());
    for (const auto& [name, t] : a.tensors) EXPECT_TRUE(at::equal(t, b.tensors.at(name))) << name;
  }

  test::TemporaryFolder folder_;
};

TEST_F(ParallelTraining, AnyNumberOfRanksTakesTheSameSteps) {
  const Outcome one = run(options("one"), 0);
  for (const int64_t ranks : {1, 2, 4}) {
    SCOPED_TRACE(fmt::format("{} ranks", ranks));
    const Outcome several = run(options(fmt::format("{}", ranks)), ranks);
    expect_near(several, one, 2e-6, 2e-4);
    expect_same(several, run(options(fmt::format("{}-again", ranks)), ranks));
  }
}

TEST_F(ParallelTraining, RowsAndAccumulatedBatchesAreDivided) {
  for (const bool packed : {false, true}) {
    const auto with = [&](const std::string& name, int64_t accumulate, int64_t batch) {
      TrainOptions o = options(fmt::format("{}-{}", name, packed));
      o.accumulate = accumulate, o.batch_size = batch, o.steps = 4;
      return o;
    };
    expect_near(run(with("a2", 2, 2), 2, packed), run(with("a0", 2, 2), 0, packed), 2e-6, 3e-4);  // a batch each
    if (!packed) continue;
    expect_near(run(with("b4", 2, 2), 4, packed), run(with("b0", 2, 2), 0, packed), 2e-6, 3e-4);  // half of a batch each
    expect_near(run(with("c2", 4, 1), 2, packed), run(with("c0", 4, 1), 0, packed), 2e-6, 3e-4);  // two batches each
    expect_near(run(with("d2", 3, 2), 2, packed), run(with("d0", 3, 2), 0, packed), 2e-6, 3e-4);  // a row of each of three batches
  }
}

// A chunk is a whole row: at most steps some rank has a mixer that no token of its own takes, and no gradients for it.
TEST_F(ParallelTraining, MixersThatARankDoesNotUse) {
  const auto with = [&](const std::string& name) {
    TrainOptions o = options(name);
    o.chunk = 100;
    o.batch_size = 2;
    return o;
  };
  expect_near(run(with("two"), 2, false), run(with("one"), 0, false), 2e-6, 3e-4);
}

TEST_F(ParallelTraining, ClippingSkippingAndRecomputation) {
  const auto with = [&](const std::string& name) {
    TrainOptions o = options(name);
    o.clip = 0.05;
    o.z_loss = 1e-3;
    o.checkpoint_layers = true;
    return o;
  };
  expect_near(run(with("two"), 2), run(with("one"), 0), 2e-6, 3e-4);
  const auto bfloat = [&](const std::string& name) {
    TrainOptions o = options(name);
    o.precision = Precision::kBfloat16;
    return o;
  };
  expect_near(run(bfloat("bf2"), 2), run(bfloat("bf1"), 0), 3e-3, 0.2);
}

TEST_F(ParallelTraining, AnyNumberGoesOnFromACheckpoint) {
  const Outcome whole = run(options("whole"), 2), alone = run(options("alone"), 0);
  const auto stopped = [&](const std::string& name, int64_t ranks) {
    run(options(name), ranks);
    fs::remove_all(folder_ / name / "checkpoints" / "step-000000006");  // as if it had died after step 3
    return options(name);
  };
  expect_same(run(stopped("two-two", 2), 2), whole);
  expect_near(run(stopped("two-one", 2), 0), whole, 2e-6, 2e-4);
  expect_near(run(stopped("one-four", 0), 4), alone, 2e-6, 2e-4);
  // What is saved shows no trace of the number.
  ASSERT_EQ(whole.tensors.size(), alone.tensors.size());
  for (const auto& [name, t] : alone.tensors) EXPECT_EQ(whole.tensors.at(name).sizes(), t.sizes()) << name;
}

TEST_F(ParallelTraining, RanksTakeTurnsAtValidation) {
  TrainOptions o = options("validated");
  o.validate_schedules = {"linear", "attention", "random(attention=0.5;chunk=4)"};
  std::mutex mutex;
  std::map<int64_t, std::vector<std::string>> asked;
  test::for_ranks(2, [&](ProcessGroup& group) {
    TrainTask task;
    task.source = std::make_unique<PackedRandom>(o.batch_size, o.seq_len, o.model.vocab_size);
    task.validate = [&](const LanguageModel&, const std::vector<std::string>& schedules) {
      const std::lock_guard lock(mutex);
      std::vector<Json> rows;
      for (const auto& s : schedules) asked[group.rank()].push_back(s), rows.push_back({{"schedule", s}, {"loss", 1.0}});
      return rows;
    };
    const TrainSummary s = train(o, task, &group);
    ASSERT_EQ(s.validation.size(), 3u);
    for (size_t i = 0; i < 3; ++i) EXPECT_EQ(s.validation[i]["schedule"], o.validate_schedules[i]);
    EXPECT_EQ(s.tokens, 6 * 4 * 24);
  });
  EXPECT_EQ(asked[0], (std::vector<std::string>{o.validate_schedules[0], o.validate_schedules[2]}));
  EXPECT_EQ(asked[1], (std::vector<std::string>{o.validate_schedules[1]}));
}

// What was trained is kept: a rank whose validation fails leaves when rank 0 has saved, not before.
TEST_F(ParallelTraining, NobodyLeavesBeforeACheckpointIsWritten) {
  TrainOptions o = options("fails", 9);
  o.save_every = 100, o.validate_every = 2;
  std::vector<int64_t> found;
  EXPECT_THROW(test::for_ranks(2, [&](ProcessGroup& group) {
    TrainTask task;
    task.source = std::make_unique<PackedRandom>(o.batch_size, o.seq_len, o.model.vocab_size);
    task.validate = [&](const LanguageModel&, const std::vector<std::string>&) -> std::vector<Json> {
      if (group.rank() == 1) fail("nothing to score");
      return {};
    };
    try {
      train(o, task, &group);
    } catch (const Error&) {
      if (group.rank() == 1) found = RunFolder(o.out).checkpoints();
      throw;
    }
  }), Error);
  EXPECT_EQ(found, std::vector<int64_t>{2});
}

TEST_F(ParallelTraining, WhatCannotBeDividedIsRefused) {
  const auto message = [&](int64_t accumulate, int64_t batch, int64_t size) {
    try {
      (void)divide_batches(accumulate, batch, size);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("no error");
  };
  EXPECT_EQ(message(1, 8, 8), "no error");
  EXPECT_EQ(message(8, 1, 8), "no error");
  EXPECT_EQ(message(2, 4, 8), "no error");
  EXPECT_EQ(message(6, 2, 4), "no error");
  EXPECT_THAT(message(1, 4, 3), ::testing::HasSubstr("accumulate 1 x batch_size 4 rows cannot be divided over 3 processes"));
  EXPECT_THAT(message(6, 2, 8), ::testing::HasSubstr("multiple of 8"));
  TrainOptions o = options("refused");
  EXPECT_THROW(run(o, 3), Error);
  EXPECT_FALSE(fs::exists(o.out));
  o.device = "cuda:1";
  EXPECT_THAT([&] { (void)device_of_process(o.device, 0, 2); }, ::testing::Throws<Error>(::testing::Property(&Error::what, ::testing::HasSubstr("expected cpu, or cuda"))));
}

}  // namespace
}  // namespace oryx
