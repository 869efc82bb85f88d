// Runs: resumed equals uninterrupted bit for bit, what a checkpoint must hold, steps that are skipped.
#include "oryx/train/trainer.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <limits>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/model/checkpoint.h"
#include "oryx/train/train_step.h"
#include "tests/support/folder.h"

namespace oryx {
namespace {

namespace fs = std::filesystem;

class Training : public ::testing::Test {
 protected:
  TrainOptions options(const std::string& out, int64_t steps) const {
    TrainOptions o;
    o.model.vocab_size = 40;
    o.model.num_layers = 2;
    o.model.layer.hidden_size = 32;
    o.model.layer.head_dim = 8;
    o.model.layer.intermediate_size = 48;
    o.out = (folder_ / out).string();
    o.steps = steps;
    o.warmup_steps = 2;
    o.chunk = 4;
    o.save_every = 3;
    o.keep_checkpoints = 10;
    o.log_every = 1;
    o.validate_every = 0;
    return o;
  }

  static TrainTask task() {
    RecallOptions r;
    r.pairs = 4;
    r.queries = 2;
    r.key_symbols = r.value_symbols = 16;
    r.filler_symbols = 8;
    TrainTask t;
    t.source = std::make_unique<RecallBatches>(r, 4, 7);
    return t;
  }

  static TrainSummary run(const TrainOptions& o) {
    TrainTask t = task();
    return train(o, t);
  }

  // Everything that the newest checkpoint says of the training.
  static std::map<std::string, at::Tensor> tensors(const TrainOptions& o) {
    std::map<std::string, at::Tensor> all;
    for (const char* file : {"model.safetensors", "optimizer.safetensors"}) {
      const SafetensorsReader reader(fs::path(o.out) / "model" / file);
      for (const auto& [name, info] : reader.tensors()) all[name] = reader.load(name);
    }
    return all;
  }

  test::TemporaryFolder folder_;
};

void expect_same(const std::map<std::string, at::Tensor>& a, const std::map<std::string, at::Tensor>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [name, t] : a) EXPECT_TRUE(at::equal(t, b.at(name))) << name;
}

TEST_F(Training, ResumedEqualsUninterrupted) {
  const TrainOptions whole = options("whole", 8), parts = options("parts", 8);
  run(whole);
  // As if the process had died after the checkpoint of step 3: what came later is gone, with a partial save left behind.
  run(parts);
  for (const char* name : {"step-000000006", "step-000000008"}) fs::remove_all(fs::path(parts.out) / "checkpoints" / name);
  fs::create_directories(fs::path(parts.out) / "checkpoints" / "step-000000006.partial");
  EXPECT_EQ(RunFolder(parts.out).checkpoints(), std::vector<int64_t>{3});
  EXPECT_EQ(run(parts).step, 8);
  expect_same(tensors(whole), tensors(parts));
  EXPECT_FALSE(fs::exists(fs::path(parts.out) / "checkpoints" / "step-000000006.partial"));
  // The metrics tell one story: every step once.
  std::vector<int64_t> steps;
  for (const auto& m : RunFolder(parts.out).rewind_metrics(100)) steps.push_back(m["step"].get<int64_t>());
  EXPECT_EQ(steps, (std::vector<int64_t>{1, 2, 3, 4, 5, 6, 7, 8}));
}

TEST_F(Training, AccumulationAndRecomputationAreTheSameStep) {
  TrainOptions plain = options("plain", 3), checkpointed = options("checkpointed", 3);
  plain.accumulate = checkpointed.accumulate = 2;
  checkpointed.checkpoint_layers = true;
  run(plain);
  run(checkpointed);
  expect_same(tensors(plain), tensors(checkpointed));
}

TEST_F(Training, OneProcessAFolder) {
  const TrainOptions o = options("locked", 3);
  RunFolder holder(o.out);
  holder.lock();
  try {
    run(o);
    FAIL() << "trained in a locked folder";
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), ::testing::HasSubstr("another process is training in this folder"));
  }
  EXPECT_FALSE(fs::exists(fs::path(o.out) / "config.json"));
}

TEST_F(Training, ForeignMetricsLinesAreDropped) {
  TrainOptions o = options("foreign", 3);
  run(o);
  const fs::path metrics = fs::path(o.out) / "metrics.jsonl";
  write_file(metrics, read_file(metrics) + "3\n{\"step\": \"two\"}\n{\"kind\": \"train\", \"step\": 2}\n{\"kind\": \"train\", \"st");
  o.steps = 4;
  EXPECT_EQ(run(o).step, 4);
  EXPECT_EQ(RunFolder(o.out).rewind_metrics(100).size(), 4u);
}

TEST_F(Training, TokensAreCountedAcrossAChangeOfBatch) {
  TrainOptions o = options("tokens", 3);
  o.batch_size = 2;
  o.seq_len = 10;
  run(o);
  o.batch_size = 4;
  o.steps = 4;
  run(o);
  EXPECT_EQ(RunFolder(o.out).rewind_metrics(100).back()["tokens"].get<int64_t>(), 3 * 20 + 40);
  EXPECT_EQ(run(o).tokens, 0);  // all steps are done
}

TEST_F(Training, BfloatLearns) {
  TrainOptions o = options("bf16", 4);
  o.precision = Precision::kBfloat16;
  const TrainSummary s = run(o);
  EXPECT_TRUE(std::isfinite(s.last_loss));
  EXPECT_LT(s.last_loss, 2 * std::log(40.0));
}

TEST_F(Training, KeepsTheNewestCheckpoints) {
  TrainOptions o = options("keep", 9);
  o.keep_checkpoints = 2;
  run(o);
  EXPECT_EQ(RunFolder(o.out).checkpoints(), (std::vector<int64_t>{6, 9}));
  EXPECT_EQ(fs::read_symlink(fs::path(o.out) / "model"), "checkpoints/step-000000009");
  EXPECT_TRUE(fs::exists(fs::path(o.out) / "report.html"));
}

TEST_F(Training, RefusesADamagedCheckpoint) {
  const TrainOptions o = options("damaged", 3);
  run(o);
  const fs::path file = fs::path(o.out) / "model" / "optimizer.safetensors";
  fs::resize_file(file, fs::file_size(file) - 5);
  TrainOptions more = o;
  more.steps = 5;
  EXPECT_THROW(run(more), Error);
}

TEST_F(Training, RefusesAnotherModel) {
  TrainOptions o = options("other", 3);
  run(o);
  o.model.layer.intermediate_size = 64;
  o.steps = 5;
  EXPECT_THROW(run(o), Error);
}

// A source whose loss is not finite: targets are fine, a parameter is poisoned by the step before.
TEST_F(Training, SkipsStepsThatAreNotFinite) {
  const TrainOptions o = options("nan", 2);
  LanguageModel model(o.model);
  model.initialize(1);
  Optimizer optimizer(model, {});
  model.requires_grad(true);
  TrainTask t = task();
  const ModelSchedule schedule(o.model, "linear");
  {
    at::NoGradGuard no_grad;
    at::Tensor p = model.parameters()[0];
    p.view({-1})[0] = std::numeric_limits<float>::quiet_NaN();
    p.select(0, 0).fill_(std::numeric_limits<float>::quiet_NaN());
  }
  const at::Tensor before = model.parameter("final_norm.weight").detach().clone();
  const StepResult r = train_step(model, optimizer, *t.source, schedule, 1e-3, 0, 0, {});
  EXPECT_TRUE(r.skipped);
  EXPECT_TRUE(at::equal(before, model.parameter("final_norm.weight").detach()));
  EXPECT_EQ(optimizer.steps(), 0);
}

TEST_F(Training, CapturedStepsWantAGpu) {
  TrainOptions o = options("captured", 3);
  o.cuda_graph = CudaGraph::kOn;
  try {
    run(o);
    FAIL() << "captured on the CPU";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "cuda_graph is on, but device is 'cpu'; expected device=cuda, or cuda_graph=auto or off");
  }
  EXPECT_FALSE(fs::exists(o.out));
  o.cuda_graph = CudaGraph::kAuto;
  EXPECT_EQ(run(o).captured, 0);
}

TEST_F(Training, OptionsNameWhatIsWrong) {
  auto message = [](const std::vector<std::string>& overrides) {
    try {
      load_train_options("", overrides);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("no error");
  };
  EXPECT_THAT(message({"stepz=3"}), ::testing::HasSubstr("steps"));
  EXPECT_THAT(message({"preset=130n"}), ::testing::HasSubstr("130m"));
  EXPECT_THAT(message({"lr=-1"}), ::testing::HasSubstr("lr is -1"));
  EXPECT_THAT(message({"schedule=atention"}), ::testing::HasSubstr("attention"));
  EXPECT_THAT(message({"model.num_heads=3", "model.num_kv_heads=2"}), ::testing::HasSubstr("num_kv_heads"));
  EXPECT_THAT(message({"cuda_graph=yes"}), ::testing::HasSubstr("cuda_graph"));
  EXPECT_NO_THROW(load_train_options("", {"cuda_graph=off"}).validate());
  EXPECT_EQ(load_train_options("", {"preset=tiny-transformer"}).training_schedule(), "linear");
  EXPECT_EQ(load_train_options("", {R"(preset="tiny-transformer")"}).training_schedule(), "linear");
  EXPECT_EQ(load_train_options("", {"preset=tiny-transformer"}).validation_schedules(), (std::vector<std::string>{"attention"}));
  EXPECT_EQ(load_train_options("", {"preset=tiny", "chunk=64"}).training_schedule(), "random(attention=0.25;chunk=64)");
  // No mixer is left untrained where layers have no attention.
  const std::string mixers = "model.layer_mixers=";
  EXPECT_EQ(load_train_options("", {mixers + R"([["gated_delta_net","sliding_window"]])", "chunk=64"}).training_schedule(),
            "random(sliding_window=0.25;chunk=64)");
  EXPECT_EQ(load_train_options("", {mixers + R"([["gated_delta_net","mamba2"]])", "chunk=64"}).training_schedule(), "random(mamba2=0.5;chunk=64)");
  EXPECT_EQ(load_train_options("", {mixers + R"([["attention","mamba2"]])", "chunk=64"}).training_schedule(),
            "random(attention=0.25;mamba2=0.75;chunk=64)");
  EXPECT_EQ(load_train_options("", {"preset=tiny"}, 1000).model.vocab_size, 1024);
}

}  // namespace
}  // namespace oryx
