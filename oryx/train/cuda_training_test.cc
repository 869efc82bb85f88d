// Training on a GPU: two runs from one seed are one, they are the CPU's run within the rounding of bfloat16, and captured steps are those that run kernel by kernel, bit for bit.
// Skipped, saying so, where there is no CUDA.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>

#include "oryx/common/error.h"
#include "oryx/io/safetensors.h"
#include "oryx/train/trainer.h"
#include "tests/support/folder.h"

namespace oryx {
namespace {

namespace fs = std::filesystem;

class CudaTraining : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  }

  // 12 steps with half of the chunks in attention, through the kernels for heads of 64.
  TrainOptions options(const std::string& out, const std::string& device) const {
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
    return o;
  }

  static std::unique_ptr<RecallBatches> recall() {
    RecallOptions r;
    r.pairs = 16;
    r.queries = 8;
    r.key_symbols = r.value_symbols = 24;
    r.filler_symbols = 8;
    return std::make_unique<RecallBatches>(r, 8, 7);
  }

  // The losses of every step.
  static std::vector<double> run(const TrainOptions& o, std::unique_ptr<BatchSource> source = recall(), TrainSummary* summary = nullptr) {
    TrainTask task;
    task.source = std::move(source);
    task.validate = [](const LanguageModel& model, const std::vector<std::string>&) {
      const at::NoGradGuard no_grad;
      for (const int64_t rows : {3, 70}) {  // memory that comes and goes between two steps
        ModelInput input;
        input.input_ids = at::zeros({rows, 50}, at::kLong);
        input.routing = {std::make_shared<Routing>(rows, 50, model.config().mixers().back())};
        (void)model.loss(model.hidden(input), input.input_ids).loss.item<float>();
      }
      return std::vector<Json>();
    };
    const TrainSummary s = train(o, task);
    if (summary != nullptr) *summary = s;
    std::vector<double> losses;
    for (const auto& line : RunFolder(o.out).rewind_metrics(100)) losses.push_back(line.at("loss").get<double>());
    return losses;
  }
  std::vector<double> run(const std::string& out, const std::string& device) const { return run(options(out, device)); }

  // A run whose steps are captured against one whose steps are not.
  template <typename Edit, typename Source>
  void expect_captured(const std::string& name, Edit edit, Source source) const {
    SCOPED_TRACE(name);
    TrainOptions off = options(name + "-off", "cuda"), on = options(name + "-on", "cuda");
    edit(off), edit(on);
    off.cuda_graph = CudaGraph::kOff, on.cuda_graph = CudaGraph::kOn;
    TrainSummary plain, captured;
    const auto want = run(off, source(), &plain), found = run(on, source(), &captured);
    EXPECT_EQ(want.size(), 12u);
    EXPECT_EQ(want, found);
    EXPECT_EQ(plain.captured, 0);
    EXPECT_GE(captured.captured, 1);
    expect_same(name + "-off", name + "-on");
  }
  void expect_same(const std::string& one, const std::string& other) const {
    const auto a = tensors(one), b = tensors(other);
    ASSERT_EQ(a.size(), b.size());
    for (const auto& [name, t] : a) EXPECT_TRUE(at::equal(t, b.at(name))) << name;
  }

  std::map<std::string, at::Tensor> tensors(const std::string& out) const {
    std::map<std::string, at::Tensor> all;
    for (const char* file : {"model.safetensors", "optimizer.safetensors"}) {
      const SafetensorsReader reader(folder_ / out / "model" / file);
      for (const auto& [name, info] : reader.tensors()) all[name] = reader.load(name);
    }
    return all;
  }

  test::TemporaryFolder folder_;
};

TEST_F(CudaTraining, TwoRunsFromOneSeedAreOne) {
  EXPECT_EQ(run("one", "cuda"), run("two", "cuda"));
  const auto one = tensors("one"), two = tensors("two");
  ASSERT_EQ(one.size(), two.size());
  for (const auto& [name, t] : one) EXPECT_TRUE(at::equal(t, two.at(name))) << name;
}

// Documents of random lengths in one row, their number another one in each batch.
class PackedRecall : public BatchSource {
 public:
  explicit PackedRecall(std::unique_ptr<RecallBatches> inner) : inner_(std::move(inner)) {}
  TrainBatch next() override {
    TrainBatch b = inner_->next();
    const int64_t tokens = b.input_ids.numel();
    at::manual_seed(++given_);
    std::vector<int32_t> cuts = {0};
    for (int64_t n = 3 + at::randint(5, {}, at::kLong).item<int64_t>(); n > 0; --n) cuts.push_back(at::randint(1, tokens, {}, at::kLong).item<int32_t>());
    cuts.push_back(static_cast<int32_t>(tokens));
    std::sort(cuts.begin(), cuts.end());
    TrainBatch out;
    out.input_ids = b.input_ids.view({1, -1}), out.targets = b.targets.contiguous().view({1, -1});
    out.cu_seqlens = at::tensor(cuts, at::kInt);
    out.pieces = packed_pieces(*out.cu_seqlens, {});
    return out;
  }
  Json position() const override { return {{"given", given_}, {"inner", inner_->position()}}; }
  void seek(const Json& p) override { given_ = p.at("given").get<uint64_t>(), inner_->seek(p.at("inner")); }

 private:
  std::unique_ptr<RecallBatches> inner_;
  uint64_t given_ = 0;
};

// Every kind of model, on rows long enough that work is split over the device: the same bits twice. Plain rows wholly in attention take another way than packed ones (span_attention_cuda.cc).
TEST_F(CudaTraining, EveryModelRepeats) {
  using Change = void (*)(TrainOptions&);
  const std::tuple<const char*, const char*, Change> models[] = {
      {"transformer", "transformer", [](TrainOptions&) {}},
      {"transformer, grouped heads of 128", "transformer", [](TrainOptions& o) { o.model.layer.head_dim = 128, o.model.layer.num_kv_heads = 1; }},
      {"transformer, float32", "transformer", [](TrainOptions& o) { o.precision = Precision::kFloat32; }},
      {"gdn", "gdn", [](TrainOptions&) {}},
      {"gdn, float32", "gdn", [](TrainOptions& o) { o.precision = Precision::kFloat32; }},
      {"mamba2", "mamba2", [](TrainOptions&) {}},
      {"kda", "kda", [](TrainOptions&) {}},
      {"oryx-gdn", "oryx-gdn", [](TrainOptions&) {}},
      {"oryx-gdn, captured", "oryx-gdn", [](TrainOptions& o) { o.cuda_graph = CudaGraph::kOn, o.steps = 6; }},
      {"oryx-mamba2", "oryx-mamba2", [](TrainOptions&) {}},
      {"inter-layer", "inter-layer", [](TrainOptions&) {}},
      {"intra-layer", "intra-layer", [](TrainOptions&) {}},
      {"three-mixer", "three-mixer", [](TrainOptions&) {}},
  };
  const auto source = [](bool packed) -> std::unique_ptr<BatchSource> {
    RecallOptions r;
    r.pairs = 300, r.queries = 211, r.key_symbols = r.value_symbols = 400, r.filler_symbols = 8;
    auto rows = std::make_unique<RecallBatches>(r, 4, 7);
    if (packed) return std::make_unique<PackedRecall>(std::move(rows));
    return rows;
  };
  int number = 0;
  for (const auto& [name, variant, change] : models) {
    for (const bool packed : {false, true}) {
      SCOPED_TRACE(std::string(name) + (packed ? ", packed" : ", plain"));
      const std::string one = std::to_string(number++), two = std::to_string(number++);
      std::vector<std::vector<double>> losses;
      for (const std::string& out : {one, two}) {
        TrainOptions o = options(out, "cuda");
        o.model = preset(std::string("130m-") + variant);
        o.model.vocab_size = 1024;
        o.model.num_layers = static_cast<int64_t>(std::max<size_t>(2, o.model.layer_mixers.size()));
        o.model.layer.hidden_size = 256, o.model.layer.num_heads = 4, o.model.layer.head_dim = 64, o.model.layer.intermediate_size = 512;
        o.steps = 3, o.chunk = 64, o.cuda_graph = CudaGraph::kOff;
        change(o);
        losses.push_back(run(o, source(packed)));
      }
      EXPECT_GE(losses[0].size(), 3u);
      EXPECT_EQ(losses[0], losses[1]);
      expect_same(one, two);
      fs::remove_all(folder_ / one), fs::remove_all(folder_ / two);
    }
  }
}

TEST_F(CudaTraining, CapturedStepsAreTheSameSteps) {
  const auto nothing = [](TrainOptions&) {};
  const auto packed = [] { return std::make_unique<PackedRecall>(recall()); };
  expect_captured("mixed", nothing, recall);
  expect_captured("packed", nothing, packed);
  expect_captured("mamba2", [](TrainOptions& o) { o.model.layer_mixers = {{"mamba2", "attention"}}; }, packed);
  expect_captured("kda", [](TrainOptions& o) { o.model.layer_mixers = {{"kimi_delta_attention", "attention"}}; }, packed);
  expect_captured("attention", [](TrainOptions& o) { o.model.layer_mixers = {{"attention"}}; }, recall);
  expect_captured("layers", [](TrainOptions& o) { o.model.layer_mixers = {{"gated_delta_net"}, {"gated_delta_net", "sliding_window", "attention"}}, o.schedule = "linear,attention@-40:"; }, recall);
  expect_captured("accumulate", [](TrainOptions& o) { o.accumulate = 3; }, recall);
  expect_captured("accumulate-packed", [](TrainOptions& o) { o.accumulate = 2; }, packed);
  expect_captured("recomputed", [](TrainOptions& o) { o.checkpoint_layers = true, o.z_loss = 1e-4; }, packed);
  // Validations and checkpoints between the steps, and few steps looked at.
  expect_captured("validated", [](TrainOptions& o) { o.validate_every = 4, o.save_every = 3; }, recall);
}

// Every part of a layer that has keys of its own in a config, each in a graph.
TEST_F(CudaTraining, CapturedStepsOfManyModels) {
  const auto packed = [] { return std::make_unique<PackedRecall>(recall()); };
  using Change = void (*)(ModelConfig&);
  const std::pair<const char*, Change> changes[] = {
      {"shared-query", [](ModelConfig& m) { m.layer.share_query = true; }},
      {"own-keys", [](ModelConfig& m) { m.layer.share_kv = false; }},
      {"no-conv", [](ModelConfig& m) { m.layer.conv = false; }},
      {"query-conv", [](ModelConfig& m) { m.layer.query_conv = m.layer.conv_bias = true; }},
      {"mean", [](ModelConfig& m) { m.layer.combine = "mean"; }},
      {"plain", [](ModelConfig& m) { m.layer.gate = m.layer.head_norm = false, m.tie_word_embeddings = false; }},
      {"published", [](ModelConfig& m) { m.layer.norm_placement = "after", m.layer.qk_norm = m.layer.zero_centred_norm = true, m.layer.gate_activation = "sigmoid"; }},
      {"grouped", [](ModelConfig& m) { m.layer.num_kv_heads = 1, m.layer.head_dim = 128, m.layer.rope_theta = 0, m.logits_scaling = 2; }},
      {"three", [](ModelConfig& m) { m.layer_mixers = {{"gated_delta_net", "sliding_window", "attention"}}, m.layer.window = 20; }},
      {"looking-back", [](ModelConfig& m) { m.layer_mixers = {{"attention", "sliding_window"}, {"mamba2"}}, m.layer.window = 20; }},
  };
  for (const auto& [name, change] : changes) expect_captured(name, [change](TrainOptions& o) { change(o.model); }, packed);
}

TEST_F(CudaTraining, CapturedStepsGoOnWhereARunStopped) {
  TrainOptions whole = options("whole", "cuda"), parts = options("parts", "cuda");
  whole.cuda_graph = CudaGraph::kOff, parts.cuda_graph = CudaGraph::kOn;
  whole.save_every = parts.save_every = 5, whole.keep_checkpoints = parts.keep_checkpoints = 10;
  run(whole, std::make_unique<PackedRecall>(recall()));
  run(parts, std::make_unique<PackedRecall>(recall()));
  for (const char* name : {"step-000000010", "step-000000012"}) fs::remove_all(fs::path(parts.out) / "checkpoints" / name);
  TrainSummary s;
  run(parts, std::make_unique<PackedRecall>(recall()), &s);
  EXPECT_EQ(s.step, 12);
  EXPECT_GE(s.captured, 1);
  expect_same("whole", "parts");
}

// Where memory is short, graphs are dropped in front of a step of a new kind, and captured anew; `auto` captures only where there is room beside. Of one row of two chunks there are
// steps with all, some and none in attention. All but a few hundred megabytes of the device are taken meanwhile.
TEST_F(CudaTraining, CapturedStepsGiveWay) {
  if (getenv("ORYX_GPU_ALONE") == nullptr) GTEST_SKIP() << "takes the whole device's memory: where nothing else uses it, set ORYX_GPU_ALONE=1";
  const auto one_row = [] {
    RecallOptions r;
    r.length = 1 << 15;
    r.key_symbols = r.value_symbols = 24;
    r.filler_symbols = 8;
    return std::make_unique<RecallBatches>(r, 1, 7);
  };
  const auto two_chunks = [](TrainOptions& o) { o.chunk = 1 << 14; };
  auto* allocator = c10::getDeviceAllocator(at::kCUDA);
  TrainOptions off = options("off", "cuda");
  two_chunks(off);
  off.cuda_graph = CudaGraph::kOff;
  allocator->resetPeakStats(0);
  const int64_t before = allocator->getDeviceStats(0).allocated_bytes[0].current;
  run(off, one_row());
  const int64_t step = allocator->getDeviceStats(0).allocated_bytes[0].peak - before;
  for (const double steps : {1.25, 1.8, 0.0}) {  // that there is memory for; 0: all of the device
    SCOPED_TRACE(steps);
    at::Tensor blocker;
    allocator->emptyCache();
    const auto left = static_cast<int64_t>(steps * static_cast<double>(step));
    if (left > 0) blocker = at::empty({static_cast<int64_t>(allocator->getMemoryInfo(0).first) - left}, at::device(at::kCUDA).dtype(at::kByte));
    const std::string name = std::to_string(steps);
    TrainOptions automatic = options(name + "-auto", "cuda");
    two_chunks(automatic);
    TrainSummary summary;
    run(automatic, one_row(), &summary);
    if (steps == 1.25) EXPECT_EQ(summary.captured, 0);
    else EXPECT_GE(summary.captured, 1);
    expect_same("off", name + "-auto");
    if (steps != 1.25) expect_captured(name, two_chunks, one_row);
  }
}

// A step that is not finite is skipped, on the device, in a captured step too.
TEST_F(CudaTraining, CapturedStepsAreSkippedWhereNotFinite) {
  for (const bool on : {false, true}) {
    TrainOptions o = options(on ? "skips-on" : "skips-off", "cuda");
    o.cuda_graph = on ? CudaGraph::kOn : CudaGraph::kOff;
    o.steps = 9, o.lr = 1e30, o.warmup_steps = 0, o.clip = 0;  // the second step runs away
    TrainTask task;
    task.source = recall();
    train(o, task);
    int skipped = 0;
    for (const auto& line : RunFolder(o.out).rewind_metrics(100)) skipped += line.at("kind") == "skipped";
    EXPECT_GE(skipped, 5);
  }
  expect_same("skips-off", "skips-on");
}

TEST_F(CudaTraining, WhatCannotBeCapturedSaysSo) {
  TrainOptions o = options("float32", "cuda");
  o.precision = Precision::kFloat32, o.cuda_graph = CudaGraph::kAuto;
  TrainSummary s;
  run(o, recall(), &s);
  EXPECT_EQ(s.captured, 0);
  o.cuda_graph = CudaGraph::kOn, o.out += "-on";
  try {
    run(o);
    FAIL() << "captured in float32";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "cuda_graph is on, but this model's steps cannot be captured: activations are float32 (precision=bfloat16); use cuda_graph=auto or off");
  }
}

TEST_F(CudaTraining, LossesAreTheCpus) {
  const std::vector<double> gpu = run("gpu", "cuda"), cpu = run("cpu", "cpu");
  ASSERT_EQ(gpu.size(), 12u);
  ASSERT_EQ(cpu.size(), 12u);
  for (size_t i = 0; i < gpu.size(); ++i) EXPECT_NEAR(gpu[i] / cpu[i], 1, 1e-2) << "step " << i + 1;
}

}  // namespace
}  // namespace oryx
