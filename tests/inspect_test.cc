// oryx inspect, as a user runs it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>

#include "oryx/common/file.h"
#include "oryx/common/options.h"
#include "oryx/model/checkpoint.h"
#include "tests/support/folder.h"
#include "tests/support/program.h"

namespace oryx::test {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

nlohmann::json inspect_json(std::vector<std::string> args) {
  args.insert(args.begin(), "inspect");
  args.push_back("--json");
  const auto r = run(args);
  EXPECT_EQ(r.exit_code, 0) << r.err;
  return r.exit_code == 0 ? nlohmann::json::parse(r.out) : nlohmann::json();
}

int64_t part(const nlohmann::json& report, const std::string& name) {
  for (const auto& p : report["parameters"]["parts"]) {
    if (p["part"] == name) return p["parameters"];
  }
  return -1;
}

TEST(Inspect, TransformerCountsAreLlamas) {
  const auto j = inspect_json({"130m-transformer"});
  const int64_t D = 768, F = 2048, V = 32000, L = 12;
  EXPECT_EQ(j["parameters"]["total"], V * D + L * (4 * D * D + 3 * D * F + 2 * D) + D);
  EXPECT_EQ(part(j, "embedding"), V * D);
  EXPECT_EQ(part(j, "feed-forward"), L * 3 * D * F);
  EXPECT_EQ(part(j, "query"), L * D * D);
  EXPECT_EQ(part(j, "key and value"), 2 * L * D * D);
  EXPECT_EQ(part(j, "norm"), (2 * L + 1) * D);
  ASSERT_EQ(j["parameters"]["modes"].size(), 1u);
  EXPECT_EQ(j["parameters"]["modes"][0]["shared_share"], 1.0);
}

TEST(Inspect, OryxCountsByHand) {
  const auto j = inspect_json({"130m"});
  const int64_t D = 768, F = 2048, V = 32000, L = 12, H = 12, w = 4, dim = 64;
  // Queries of two mixers; keys, values, gate and output; two convolutions; two projections and two vectors for decay
  // and step.
  const int64_t query = 2 * D * D, kv = 2 * D * D, conv = 2 * D * w, decay = 2 * H * D + 2 * H;
  const int64_t layer = query + kv + D * D + D * D + conv + decay + dim + 2 * D + 3 * D * F;
  EXPECT_EQ(j["parameters"]["total"], V * D + L * layer + D);
  EXPECT_EQ(part(j, "decay and step"), L * decay);
  EXPECT_EQ(part(j, "convolution"), L * conv);
  for (const auto& mode : j["parameters"]["modes"]) {
    const bool linear = mode["mode"] == "gated_delta_net";
    EXPECT_EQ(mode["shared"], V * D + L * (layer - query - decay) + D);
    EXPECT_EQ(mode["parameters"], V * D + L * (layer - query / 2 - (linear ? 0 : decay)) + D) << mode["mode"];
  }
}

TEST(Inspect, StateBytesByHand) {
  const auto j = inspect_json({"130m", "--context", "1,1000"});
  const int64_t L = 12, H = 12, dim = 64, w = 4;
  const int64_t replay = L * (2 * H * 4 + 1) + 4;  // a token's g and beta by head, its mode by layer, its id: what a trim reads
  ASSERT_EQ(j["state_bytes"].size(), 2u);
  for (const auto& row : j["state_bytes"]) {
    const int64_t tokens = row["context"];
    EXPECT_EQ(row["recurrent"], L * H * dim * dim * 4);
    EXPECT_EQ(row["tails"], L * 2 * H * dim * (w - 1) * 4);
    EXPECT_EQ(row["tokens"], tokens * (L * 2 * H * dim * 4 + replay));
    EXPECT_EQ(row["total"].get<int64_t>(),
              row["recurrent"].get<int64_t>() + row["tails"].get<int64_t>() + row["tokens"].get<int64_t>());
  }
  const auto half = inspect_json({"130m", "--context", "1000", "--precision", "bfloat16"})["state_bytes"][0];
  EXPECT_EQ(half["recurrent"], L * H * dim * dim * 4);  // float32 always
  EXPECT_EQ(half["tokens"], 1000 * (L * 2 * H * dim * 2 + replay));
  // A purely linear model keeps no tokens.
  EXPECT_EQ(inspect_json({"130m-gdn", "--context", "1000"})["state_bytes"][0]["tokens"], 0);
}

TEST(Inspect, AttentionsFlopsGrowByItsKeysAlone) {
  const auto j = inspect_json({"130m", "--context", "1000,3000"});
  std::map<std::string, std::vector<double>> flops;
  for (const auto& row : j["flops_per_token"]) flops[row["mode"]].push_back(row["flops"]);
  const double L = 12, D = 768;
  EXPECT_EQ(flops["gated_delta_net"][0], flops["gated_delta_net"][1]);
  EXPECT_DOUBLE_EQ(flops["attention"][1] - flops["attention"][0], 2000 * L * 2 * 2 * D);
  const auto t = inspect_json({"130m-transformer", "--context", "1"});
  // Every weight once but the norms; the tied embedding as output head; one key.
  const double norms = (2 * L + 1) * D, total = t["parameters"]["total"].get<double>();
  EXPECT_NEAR(t["flops_per_token"][0]["flops"].get<double>(), 2 * (total - norms) + L * 4 * D, 2 * norms);
}

TEST(Inspect, TableForPeople) {
  const auto r = run({"inspect", "1.4b"});
  ASSERT_EQ(r.exit_code, 0) << r.err;
  for (const char* word : {"24 layers of [gated_delta_net, attention]", "feed-forward", "key and value", "attention",
                           "131,072", "GiB", "92."}) {
    EXPECT_THAT(r.out, HasSubstr(word));
  }
  EXPECT_EQ(r.err, "");
}

TEST(Inspect, OverridesChangeTheModel) {
  const auto j =
      inspect_json({"tiny", "num_layers=2", "layer_mixers=[[\"mamba2\",\"sliding_window\"]]", "num_kv_heads=1"});
  EXPECT_EQ(j["config"]["num_layers"], 2);
  EXPECT_EQ(j["parameters"]["modes"].size(), 2u);
  EXPECT_EQ(j["parameters"]["modes"][1]["mode"], "sliding_window");
}

TEST(Inspect, ModelsWithoutAChoiceHaveOneMode) {
  for (const char* name : {"tiny-inter-layer", "tiny-intra-layer"}) {
    const auto j = inspect_json({name});
    ASSERT_EQ(j["parameters"]["modes"].size(), 1u) << name;
    EXPECT_EQ(j["parameters"]["modes"][0]["mode"], "linear");
    EXPECT_EQ(j["parameters"]["modes"][0]["parameters"], j["parameters"]["total"]);
  }
}

TEST(Inspect, FamiliesAreMatchedWithinOnePercent) {
  for (const auto& size : preset_sizes()) {
    const auto j = inspect_json({"--family", size});
    EXPECT_EQ(j["variants"].size(), preset_variants().size());
    for (const auto& v : j["variants"]) {
      EXPECT_LT(std::abs(v["difference"].get<double>()), 0.01) << size << " " << v["variant"];
      EXPECT_EQ(v["intermediate_size"].get<int64_t>() % 16, 0);
      for (const auto& mode : v["modes"]) EXPECT_LE(mode["parameters"], v["total"]);
    }
  }
  const auto text = run({"inspect", "--family", "130m"});
  EXPECT_THAT(text.out, HasSubstr("inter-layer"));
  EXPECT_THAT(text.out, HasSubstr("+0.00%"));
}

TEST(Inspect, ListAndKeys) {
  const auto list = run({"inspect", "--list"});
  for (const auto& name : preset_sizes()) EXPECT_THAT(list.out, HasSubstr(name));
  for (const auto& name : preset_variants()) EXPECT_THAT(list.out, HasSubstr(name));
  EXPECT_EQ(inspect_json({"--list"})["sizes"][1]["parameters"], inspect_json({"130m"})["parameters"]["total"]);
  EXPECT_EQ(run({"inspect", "--keys"}).out, options_table<ModelConfig>());
}

class InspectFiles : public ::testing::Test {
 protected:
  void SetUp() override {
    ModelConfig c = preset("tiny");
    c.vocab_size = 64;
    c.num_layers = 1;
    LanguageModel model(c);
    model.initialize(0);
    save_model(model, folder_ / "run/model");
    total_ = count_parameters(c);
  }
  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  TemporaryFolder folder_;
  int64_t total_ = 0;
};

TEST_F(InspectFiles, ModelFolderAndRunFolder) {
  for (const char* name : {"run/model", "run"}) {
    const auto j = inspect_json({path(name)});
    EXPECT_EQ(j["parameters"]["total"], total_) << name;
    EXPECT_EQ(j["checkpoint"]["bytes"], 4 * total_);
    EXPECT_EQ(j["checkpoint"]["matches_config"], true);
  }
  EXPECT_EQ(inspect_json({path("run/model/config.json")})["parameters"]["total"], total_);
  EXPECT_EQ(inspect_json({path("run/model/config.json"), "num_layers=2"})["config"]["num_layers"], 2);
}

TEST_F(InspectFiles, TensorsOfAFile) {
  const auto j = inspect_json({path("run/model/model.safetensors")});
  EXPECT_EQ(j["elements"], total_);
  EXPECT_EQ(j["bytes"], 4 * total_);
  EXPECT_EQ(j["metadata"]["format"], "oryx");
  EXPECT_EQ(j["count"], j["tensors"].size());
  EXPECT_EQ(j["tensors"][0]["name"], "embed.weight");  // the order of the data
  EXPECT_EQ(j["tensors"][0]["dtype"], "F32");
  EXPECT_EQ(j["tensors"][0]["shape"].dump(), "[64,128]");
  const auto r = run({"inspect", path("run/model/model.safetensors")});
  EXPECT_THAT(r.out, HasSubstr("[64, 128]"));
  EXPECT_THAT(r.out, HasSubstr("metadata format = oryx"));
}

TEST_F(InspectFiles, ControlCharactersStayOffTheTerminal) {
  write_safetensors(folder_ / "evil.safetensors", {{"a\x1b[2Jb", at::zeros({1})}}, {{"k\n", "v\x1b]0;x\x07"}});
  const auto r = run({"inspect", path("evil.safetensors")});
  ASSERT_EQ(r.exit_code, 0) << r.err;
  EXPECT_THAT(r.out, Not(HasSubstr("\x1b")));
  EXPECT_THAT(r.out, HasSubstr("a?[2Jb"));
}

TEST_F(InspectFiles, OtherFilesAreNamedForWhatTheyAre) {
  make_folders(folder_ / "set");
  write_file(folder_ / "set/dataset.json", "{}");
  write_file(folder_ / "set/train.tok", "oryx.tok");
  write_file(folder_ / "t.model", "\n\x0e");
  for (const auto& [name, message] : {std::pair{"set", "oryx data inspect "}, {"set/train.tok", "oryx data inspect "}, {"t.model", "no model by its name"}}) {
    const auto r = run({"inspect", path(name)});
    EXPECT_EQ(r.exit_code, 1) << name;
    EXPECT_THAT(r.err, HasSubstr(message));
    EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
  }
}

TEST_F(InspectFiles, TrainingConfigsAreModelsToo) {
  write_file(folder_ / "train.json", R"({"preset": "tiny-mamba2", "model": {"num_layers": 3}, "steps": 5000})");
  const auto j = inspect_json({path("train.json"), "model.vocab_size=100"});
  EXPECT_EQ(j["config"]["num_layers"], 3);
  EXPECT_EQ(j["config"]["vocab_size"], 100);
  EXPECT_EQ(j["config"]["layer_mixers"].dump(), R"([["mamba2"]])");
}

}  // namespace
}  // namespace oryx::test
