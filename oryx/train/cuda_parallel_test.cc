// Training on several GPUs, as many as there are, and on one through the same code. Skipped, saying so, where there is no CUDA.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <map>

#include "oryx/io/safetensors.h"
#include "oryx/parallel/test_support.h"
#include "oryx/train/trainer.h"
#include "tests/support/folder.h"

namespace oryx {
namespace {

namespace fs = std::filesystem;

// Ranks that share one card, for machines that have but one: their tensors go around by way of the host, when finish() comes (backward passes of one card share a thread, which must not wait).
class OnOneCard : public ProcessGroup {
 public:
  explicit OnOneCard(const Place& place) : ProcessGroup(std::make_unique<Ring>(place)) {}
  at::Device device() const override { return {at::kCUDA, 0}; }
  void reduce_scatter(const at::Tensor& x) override {
    later_.push_back([this, x] { by_host(x, [this](const at::Tensor& t) { ProcessGroup::reduce_scatter(t); }); });
  }
  void all_gather(const at::Tensor& x) override {
    later_.push_back([this, x] { by_host(x, [this](const at::Tensor& t) { ProcessGroup::all_gather(t); }); });
  }
  void all_reduce(const at::Tensor& x) override {
    later_.push_back([this, x] { by_host(x, [this](const at::Tensor& t) { ProcessGroup::all_reduce(t); }); });
  }
  void finish() override {
    for (const auto& f : later_) f();
    later_.clear();
  }

 private:
  template <typename F>
  static void by_host(at::Tensor x, F&& f) {
    const at::NoGradGuard no_grad;
    const at::Tensor host = x.cpu();
    f(host);
    x.copy_(host);
  }
  std::vector<std::function<void()>> later_;
};

class CudaParallel : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  }
  // 1, 2, 4 ... as far as there are GPUs.
  static std::vector<int64_t> numbers() {
    std::vector<int64_t> all;
    for (int64_t n = 1; n <= std::min<int64_t>(static_cast<int64_t>(at::getNumGPUs()), 4); n *= 2) all.push_back(n);
    return all;
  }

  TrainOptions options(const std::string& out) const {
    TrainOptions o;
    o.model.vocab_size = 64;
    o.model.num_layers = 2;
    o.model.layer.hidden_size = 128;
    o.model.layer.num_heads = 2;
    o.model.layer.head_dim = 64;
    o.model.layer.intermediate_size = 256;
    o.model.layer_mixers = {{"gated_delta_net", "attention"}};
    o.precision = Precision::kBfloat16;
    o.device = "cuda";
    o.cuda_graph = CudaGraph::kOff;
    o.out = (folder_ / out).string();
    o.steps = 12;
    o.batch_size = 8, o.seq_len = 64;
    o.warmup_steps = 2;
    o.chunk = 16;
    o.attention_share = 0.5;
    o.log_every = 1;
    o.validate_every = 0;
    o.save_every = 5, o.keep_checkpoints = 10;
    return o;
  }

  struct Outcome {
    std::vector<double> losses, norms;
    std::map<std::string, at::Tensor> tensors;
    int64_t captured = 0;
  };
  // ranks 0: without a group.
  Outcome run(const TrainOptions& o, int64_t ranks, const test::JoinGroup& join = test::join_on_gpus) const {
    Outcome out;
    const auto train_one = [&](ProcessGroup* group) {
      RecallOptions r;
      r.pairs = 16, r.queries = 8, r.key_symbols = r.value_symbols = 24, r.filler_symbols = 8;
      TrainTask task;
      task.source = std::make_unique<RecallBatches>(r, o.batch_size, 7);
      const TrainSummary s = train(o, task, group);
      if (group == nullptr || group->first()) out.captured = s.captured;
    };
    if (ranks == 0) train_one(nullptr);
    else test::for_ranks(ranks, [&](ProcessGroup& group) { train_one(&group); }, join);
    for (const auto& line : RunFolder(o.out).rewind_metrics(1000)) {
      out.losses.push_back(line.at("loss").get<double>());
      out.norms.push_back(line.at("gradient_norm").get<double>());
    }
    for (const char* file : {"model.safetensors", "optimizer.safetensors"}) {
      const SafetensorsReader reader(fs::path(o.out) / "model" / file);
      for (const auto& [name, info] : reader.tensors()) out.tensors[name] = reader.load(name);
    }
    return out;
  }
  static void expect_same(const Outcome& a, const Outcome& b) {
    EXPECT_EQ(a.losses, b.losses);
    ASSERT_EQ(a.tensors.size(), b.tensors.size());
    for (const auto& [name, t] : a.tensors) EXPECT_TRUE(at::equal(t, b.tensors.at(name))) << name;
  }
  static void expect_near(const Outcome& a, const Outcome& b) {
    ASSERT_EQ(a.losses.size(), b.losses.size());
    for (size_t i = 0; i < a.losses.size(); ++i) EXPECT_NEAR(a.losses[i] / b.losses[i], 1, 1e-2) << "step " << i + 1;
  }

  test::TemporaryFolder folder_;
};

TEST_F(CudaParallel, AnyNumberOfGpusTakesTheSameSteps) {
  for (const int64_t accumulate : {1, 2}) {
    const auto with = [&](const std::string& name, CudaGraph graph) {
      TrainOptions o = options(fmt::format("{}-{}", name, accumulate));
      o.accumulate = accumulate;
      o.cuda_graph = graph;
      return o;
    };
    const Outcome one = run(with("one", CudaGraph::kOff), 0);
    for (const int64_t n : numbers()) {
      SCOPED_TRACE(fmt::format("{} GPUs, accumulate {}", n, accumulate));
      const Outcome several = run(with(fmt::format("{}", n), CudaGraph::kOff), n);
      expect_near(several, one);
      expect_same(several, run(with(fmt::format("{}-again", n), CudaGraph::kOff), n));
      const Outcome captured = run(with(fmt::format("{}-captured", n), CudaGraph::kOn), n);
      EXPECT_GE(captured.captured, 1);
      expect_same(several, captured);
    }
  }
}

TEST_F(CudaParallel, RanksOnOneCardTakeTheSameSteps) {
  const auto join = [](const Place& place) { return std::make_unique<OnOneCard>(place); };
  for (const int64_t accumulate : {1, 2}) {
    const auto with = [&](const std::string& name) {
      TrainOptions o = options(fmt::format("{}-{}", name, accumulate));
      o.accumulate = accumulate;
      return o;
    };
    const Outcome one = run(with("one"), 0);
    for (const int64_t n : {1, 2, 4}) {
      SCOPED_TRACE(fmt::format("{} ranks, accumulate {}", n, accumulate));
      const Outcome several = run(with(fmt::format("{}", n)), n, join);
      expect_near(several, one);
      for (size_t i = 0; i < one.norms.size(); ++i) EXPECT_NEAR(several.norms[i] / one.norms[i], 1, i == 0 ? 4e-3 : 5e-2) << "step " << i + 1;
    }
  }
}

TEST_F(CudaParallel, AnyNumberGoesOnFromACheckpoint) {
  const int64_t most = numbers().back();
  const Outcome whole = run(options("whole"), most), alone = run(options("alone"), 0);
  const auto stopped = [&](const std::string& name, int64_t ranks) {
    run(options(name), ranks);
    for (const char* later : {"step-000000010", "step-000000012"}) fs::remove_all(folder_ / name / "checkpoints" / later);
    return options(name);
  };
  expect_same(run(stopped("same", most), most), whole);
  expect_near(run(stopped("fewer", most), 0), whole);
  expect_near(run(stopped("more", 0), most), alone);
}

TEST_F(CudaParallel, Float32AndSkippedSteps) {
  const auto with = [&](const std::string& name) {
    TrainOptions o = options(name);
    o.precision = Precision::kFloat32;
    return o;
  };
  const Outcome one = run(with("one"), 0), several = run(with("several"), numbers().back());
  for (size_t i = 0; i < one.losses.size(); ++i) EXPECT_NEAR(several.losses[i] / one.losses[i], 1, 2e-4) << "step " << i + 1;
  TrainOptions o = options("skips");
  o.steps = 9, o.lr = 1e30, o.warmup_steps = 0, o.clip = 0;  // the second step runs away
  test::for_ranks(numbers().back(), [&](ProcessGroup& group) {
    RecallOptions r;
    r.pairs = 16, r.queries = 8, r.key_symbols = r.value_symbols = 24, r.filler_symbols = 8;
    TrainTask task;
    task.source = std::make_unique<RecallBatches>(r, o.batch_size, 7);
    train(o, task, &group);
  }, test::join_on_gpus);
  int skipped = 0;
  for (const auto& line : RunFolder(o.out).rewind_metrics(100)) skipped += line.at("kind") == "skipped";
  EXPECT_GE(skipped, 5);
}

}  // namespace
}  // namespace oryx
