// Training on a GPU: two runs from one seed are one, and they are the CPU's run within the rounding of bfloat16. Skipped, saying so, where there is no CUDA.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "oryx/io/safetensors.h"
#include "oryx/train/trainer.h"

namespace oryx {
namespace {

namespace fs = std::filesystem;

class CudaTraining : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
    std::string name = (fs::temp_directory_path() / "oryx-cuda-XXXXXX").string();
    folder_ = mkdtemp(name.data());
  }
  void TearDown() override {
    if (!folder_.empty()) fs::remove_all(folder_);
  }

  // Losses of 12 steps with half of the chunks in attention, through the kernels for heads of 64.
  std::vector<double> run(const std::string& out, const std::string& device) const {
    TrainOptions o;
    o.model.vocab_size = 64;
    o.model.num_layers = 2;
    o.model.layer.hidden_size = 128;
    o.model.layer.num_heads = 2;
    o.model.layer.head_dim = 64;
    o.model.layer.intermediate_size = 256;
    o.model.layer_mixers = {{"gated_delta_net", "attention"}};
    o.precision = Precision::kBfloat16;
    o.device = device;
    o.out = (folder_ / out).string();
    o.steps = 12;
    o.warmup_steps = 2;
    o.chunk = 16;
    o.attention_share = 0.5;
    o.log_every = 1;
    o.validate_every = 0;
    RecallOptions r;
    r.pairs = 16;
    r.queries = 8;
    r.key_symbols = r.value_symbols = 24;
    r.filler_symbols = 8;
    TrainTask task;
    task.source = std::make_unique<RecallBatches>(r, 8, 7);
    train(o, task);
    std::vector<double> losses;
    for (const auto& line : RunFolder(o.out).rewind_metrics(100)) losses.push_back(line.at("loss").get<double>());
    return losses;
  }

  std::map<std::string, at::Tensor> tensors(const std::string& out) const {
    std::map<std::string, at::Tensor> all;
    for (const char* file : {"model.safetensors", "optimizer.safetensors"}) {
      const SafetensorsReader reader(folder_ / out / "model" / file);
      for (const auto& [name, info] : reader.tensors()) all[name] = reader.load(name);
    }
    return all;
  }

  fs::path folder_;
};

TEST_F(CudaTraining, TwoRunsFromOneSeedAreOne) {
  EXPECT_EQ(run("one", "cuda"), run("two", "cuda"));
  const auto one = tensors("one"), two = tensors("two");
  ASSERT_EQ(one.size(), two.size());
  for (const auto& [name, t] : one) EXPECT_TRUE(at::equal(t, two.at(name))) << name;
}

TEST_F(CudaTraining, LossesAreTheCpus) {
  const std::vector<double> gpu = run("gpu", "cuda"), cpu = run("cpu", "cpu");
  ASSERT_EQ(gpu.size(), 12u);
  ASSERT_EQ(cpu.size(), 12u);
  for (size_t i = 0; i < gpu.size(); ++i) EXPECT_NEAR(gpu[i] / cpu[i], 1, 1e-2) << "step " << i + 1;
}

}  // namespace
}  // namespace oryx
