// What users get wrong about configs, schedules and model folders, and the one line that each mistake must give.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "oryx/common/file.h"
#include "oryx/common/options.h"
#include "oryx/model/checkpoint.h"
#include "tests/support/folder.h"
#include "tests/support/program.h"

namespace oryx::test {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

void expect_error(const std::vector<std::string>& args, const std::string& message) {
  const auto r = run(args);
  EXPECT_EQ(r.exit_code, 1) << message;
  EXPECT_EQ(r.out, "");
  EXPECT_THAT(r.err, StartsWith("oryx: error: "));
  EXPECT_THAT(r.err, HasSubstr(message));
  EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
}

struct BadConfig {
  const char *text, *message;
};

void expect_refused(const std::vector<BadConfig>& configs) {
  const TemporaryFolder folder;
  const auto path = folder / "config.json";
  for (const auto& c : configs) {
    write_file(path, c.text);
    SCOPED_TRACE(c.text);
    expect_error({"inspect", path.string()}, c.message);
  }
}

TEST(BadModel, FilesThatAreNoConfig) {
  expect_refused({{"", "config.json: not valid JSON: parse error at line 1, column 1"},
                  {"{", "config.json: not valid JSON: parse error at line 1, column 2"},
                  {"{\n  \"num_layers\": 2,\n}", "config.json: not valid JSON: parse error at line 3, column 1"},
                  {"\xFF\xFE{}", "config.json: not valid JSON"},
                  {"[]", "expected an object"},
                  {"null", "expected an object"},
                  {R"({"num_layers": 2, "num_layers": 3})", "the key 'num_layers' stands twice"}});
}

TEST(BadModel, ConfigKeys) {
  expect_refused({{R"({"num_layer": 2})", "unknown key 'num_layer'. Did you mean 'num_layers'?"},
                  {R"({"frobnicate": 2})", "unknown key 'frobnicate'"},
                  {R"({"num_layers": 0})", "num_layers is 0, expected an integer from 1 to 10000"},
                  {R"({"num_layers": "two"})", "num_layers is \"two\""},
                  {R"({"num_layers": 1e300})", "num_layers is"},
                  {R"({"hidden_size": 1.5})", "hidden_size is 1.5"},
                  {R"({"conv": 1})", "conv is 1, expected true or false"},
                  {R"({"norm_eps": -1})", "norm_eps is -1"},
                  {R"({"combine": "selct"})", "Did you mean 'select'?"},
                  {R"({"layer_mixers": "attention"})", "layer_mixers is \"attention\" (a string), expected a list"},
                  {R"({"layer_mixers": [["atention"]]})", "Did you mean 'attention'?"}});
}

TEST(BadModel, ConfigsThatContradictThemselves) {
  expect_refused(
      {{R"({"layer_mixers": []})", "layer_mixers is empty"},
       {R"({"layer_mixers": [["attention"], []]})", "layer_mixers[1] is empty"},
       {R"({"layer_mixers": [["mamba2", "mamba2"]]})", "layer_mixers[0] names a mixer twice: mamba2, mamba2"},
       {R"({"layer_mixers": [["attention"], ["mamba2"], ["attention"]]})",
        "layer_mixers names 3 layers, but num_layers is 2"},
       {R"({"num_heads": 3, "num_kv_heads": 2})", "num_heads is 3, expected a multiple of num_kv_heads 2"},
       {R"({"head_dim": 33})", "head_dim is 33, expected an even number"},
       {R"({"conv": false, "query_conv": true})", "query_conv is on but conv is off"},
       {R"({"combine": "mean", "head_norm": false})", "switch head_norm on"},
       {R"({"hidden_size": 16777216, "num_heads": 65536, "head_dim": 1024, "intermediate_size": 16777216, "num_layers": 10000})",
        "expected at most 1e15"}});
}

TEST(BadModel, TrainingConfigsAndSchedules) {
  expect_refused(
      {{R"({"preset": "tinny"})", "Did you mean 'tiny'?"},
       {R"({"preset": 5})", "preset is 5, expected a string"},
       {R"({"preset": "tiny", "model": 3})", "model is 3, expected an object"},
       {R"({"preset": "tiny", "model": {"hidden_sise": 64}})",
        "unknown key 'model.hidden_sise'. Did you mean 'model.hidden_size'?"},
       {R"({"preset": "tiny", "frobnicate": 1})", "unknown key 'frobnicate'"},
       {R"({"preset": "tiny", "steps": 10, "warmup_steps": 10})", "warmup_steps is 10, expected less than steps 10"},
       {R"({"preset": "tiny", "schedule": "linear,atention@-256:"})", "position 8: found 'atention'"},
       {R"({"preset": "tiny", "schedule": "mamba2"})", "'mamba2'"},
       {R"({"preset": "tiny", "schedule": "attention@5:3"})", "schedule 'attention@5:3'"},
       {R"~({"preset": "tiny", "schedule": "random(attention=1.5)"})~", "schedule 'random(attention=1.5)'"},
       {R"({"preset": "tiny", "schedule": "{\"layers\": {\"0-9\": \"linear\"}}"})", "0-9"},
       {R"({"preset": "tiny", "validate_schedules": ["linear", "attention@"]})", "schedule 'attention@'"}});
}

TEST(BadModel, SubjectsOfInspect) {
  expect_error({"inspect"}, "expected one of: a preset");
  expect_error({"inspect", "num_layers=3"}, "expected one of: a preset");
  expect_error({"inspect", "130m", "--list"}, "expected one of: a preset");
  expect_error({"inspect", "131m"}, "unknown preset '131m'");
  expect_error({"inspect", "131m"}, "Did you mean '130m'?");
  expect_error({"inspect", "130m-transformr"}, "Did you mean 'transformer'?");
  expect_error({"inspect", "--family", "131m"}, "--family: unknown size '131m'");
  expect_error({"inspect", "none.json"}, "none.json: cannot");
  expect_error({"inspect", "nowhere/model"}, "nowhere/model: cannot");
  expect_error({"inspect", "none.safetensors"}, "none.safetensors: cannot");
  expect_error({"inspect", "tiny", "num_layers"}, "'num_layers': expected key=value");
  expect_error({"inspect", "tiny", "num_layer=3"}, "Did you mean 'num_layers'?");
  expect_error({"inspect", "tiny", "num_layers=3", "num_heads=5", "num_kv_heads=2"}, "tiny: num_heads is 5");
  expect_error({"inspect", "tiny", "--context", "0"}, "--context");
  expect_error({"inspect", "tiny", "--context", "1k"}, "--context");
  expect_error({"inspect", "tiny", "--precision", "float16"}, "--precision");
}

class BadModelFolder : public ::testing::Test {
 protected:
  BadModelFolder() : model_(config()) {
    model_.initialize(0);
    save_model(model_, path());
    tensors_ = named_parameters(model_);
  }
  static ModelConfig config() {
    ModelConfig c = preset("tiny");
    c.vocab_size = 300;
    c.num_layers = 1;
    return c;
  }
  std::filesystem::path path() const { return folder_ / "model"; }
  void rewrite() const { write_safetensors(path() / "model.safetensors", tensors_); }
  at::Tensor& tensor(const std::string& name) {
    for (auto& [n, t] : tensors_) {
      if (n == name) return t;
    }
    throw std::runtime_error("no tensor " + name);
  }
  // Whoever looks at the folder says the same.
  void expect_refused(const std::string& message) const {
    expect_error({"inspect", path().string()}, message);
    expect_error({"generate", path().string(), "--tokenizer", "byte", "--prompt", "x"}, message);
  }

  TemporaryFolder folder_;
  LanguageModel model_;
  NamedTensors tensors_;
};

TEST_F(BadModelFolder, IsFineUntouched) {
  rewrite();
  EXPECT_EQ(run({"inspect", path().string()}).exit_code, 0);
  EXPECT_EQ(
      run({"generate", path().string(), "--tokenizer", "byte", "--prompt", "x", "--max-new-tokens", "1"}).exit_code, 0);
}

TEST_F(BadModelFolder, MissingTensor) {
  tensors_.pop_back();
  rewrite();
  expect_refused("model.safetensors: tensor 'final_norm.weight' is missing");
}

TEST_F(BadModelFolder, ExtraTensor) {
  tensors_.emplace_back("lm_head.weight", at::zeros({300, 128}));
  rewrite();
  expect_refused("model.safetensors: tensor 'lm_head.weight' is not part of the model");
}

TEST_F(BadModelFolder, WrongShape) {
  tensor("layers.0.mixer.o_proj.weight") = at::zeros({128, 64});
  rewrite();
  expect_refused("tensor 'layers.0.mixer.o_proj.weight' has shape [128, 64], the config wants [128, 128]");
}

TEST_F(BadModelFolder, WrongDtype) {
  tensor("final_norm.weight") = at::ones({128}, at::kInt);
  rewrite();
  expect_refused("tensor 'final_norm.weight' is I32, expected F32, BF16 or F16");
}

TEST_F(BadModelFolder, HalfPrecisionIsWelcome) {
  for (auto& [name, t] : tensors_) t = t.to(at::kBFloat16);
  rewrite();
  EXPECT_EQ(run({"inspect", path().string()}).exit_code, 0);
}

TEST_F(BadModelFolder, ConfigOfAnotherModel) {
  ModelConfig other = config();
  other.num_layers = 2;
  write_file(path() / "config.json", dump_options(other));
  expect_refused("tensor 'layers.1.norm1.weight' is missing; is this the checkpoint of another config?");
}

TEST_F(BadModelFolder, Truncated) {
  const std::string whole = read_file(path() / "model.safetensors");
  write_file(path() / "model.safetensors", std::string_view(whole).substr(0, whole.size() / 2));
  expect_refused("truncated?");
}

TEST_F(BadModelFolder, ForeignFile) {
  write_file(path() / "model.safetensors", "\x89PNG\r\n\x1a\n and so on");
  expect_refused("is this a safetensors file?");
}

TEST_F(BadModelFolder, PartsMissing) {
  std::filesystem::remove(path() / "config.json");
  expect_error({"inspect", path().string()}, "config.json: cannot");
  expect_error({"generate", path().string(), "--tokenizer", "byte", "--prompt", "x"}, "holds no config.json");
  std::filesystem::remove(path() / "model.safetensors");
  expect_error({"inspect", path().string()}, "holds no model.safetensors");
  expect_error({"inspect", folder_.path().string()}, "holds no model.safetensors");
}

TEST_F(BadModelFolder, OverridesCannotChangeIt) {
  expect_error({"inspect", path().string(), "num_layers=2"}, "'num_layers=2' cannot change what is there already");
  expect_error({"inspect", (path() / "model.safetensors").string(), "num_layers=2"}, "'num_layers=2' cannot change");
}

}  // namespace
}  // namespace oryx::test
