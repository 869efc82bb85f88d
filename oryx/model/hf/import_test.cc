// Published checkpoints of every family: logits against the golden values, decoding through the state, and the way back
// bit for bit.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "oryx/common/file.h"
#include "oryx/common/options.h"
#include "oryx/data/test_support.h"
#include "oryx/io/sharded_safetensors.h"
#include "oryx/model/checkpoint.h"
#include "oryx/model/hf/convert.h"
#include "oryx/model/hf/family.h"
#include "oryx/ops/rope/rope.h"
#include "tests/support/fixtures.h"
#include "tests/support/paths.h"

namespace oryx {
namespace {

namespace fs = std::filesystem;
using test::error_of;
using test::TemporaryFolder;
using ::testing::HasSubstr;

constexpr double kLogits = 7e-5;
constexpr double kBfloat16 = 0.05;

std::vector<fs::path> published() {
  std::vector<fs::path> folders;
  for (const auto& entry : fs::directory_iterator(test::fixture_folder() / "models")) {
    if (fs::exists(entry.path() / "expected.safetensors")) folders.push_back(entry.path());
  }
  std::sort(folders.begin(), folders.end());
  return folders;
}

// A fixture that this test can change.
void copy_checkpoint(const fs::path& from, const fs::path& to) {
  make_folders(to);
  for (const char* name : {"config.json", "model.safetensors"}) write_file(to / name, read_file(from / name));
}

NamedTensors tensors_of(const fs::path& file) {
  const SafetensorsReader reader(file);
  NamedTensors out;
  for (const auto& [name, info] : reader.tensors()) out.emplace_back(name, reader.load(name));
  return out;
}

std::vector<std::shared_ptr<const Routing>> routing(const LanguageModel& m, const at::Tensor& ids) {
  return {std::make_shared<Routing>(ids.size(0), ids.size(1), m.config().mixers().front())};
}

at::Tensor logits_of(const LanguageModel& m, const at::Tensor& ids, State* state = nullptr) {
  ModelInput in;
  in.input_ids = ids;
  in.routing = routing(m, ids);
  in.state = state;
  return m.logits(m.hidden(in));
}

TEST(FixtureModel, LogitsOfEveryFamily) {
  ORYX_REQUIRE_FIXTURES();
  at::NoGradGuard no_grad;
  const auto folders = published();
  ASSERT_FALSE(folders.empty());
  for (const auto& folder : folders) {
    SCOPED_TRACE(folder.filename());
    const TemporaryFolder out;
    import_checkpoint(folder, out / "model");
    const auto model = load_model(out / "model");
    const test::Fixture f = test::load_fixture(folder / "expected");
    for (const at::Device device : test::devices()) {
      SCOPED_TRACE(device.str());
      model->to(device);
      EXPECT_LT(test::fixture_error(logits_of(*model, f.at("input_ids").to(at::kLong)).cpu(), f.at("logits")), kLogits);
    }
  }
}

TEST(FixtureModel, ComputesInBfloat16) {
  ORYX_REQUIRE_FIXTURES();
  at::NoGradGuard no_grad;
  for (const auto& folder : published()) {
    SCOPED_TRACE(folder.filename());
    const TemporaryFolder out;
    import_checkpoint(folder, out / "model");
    const auto model = load_model(out / "model", at::kBFloat16);
    const test::Fixture f = test::load_fixture(folder / "expected");
    for (const at::Device device : test::devices()) {
      SCOPED_TRACE(device.str());
      model->to(device);
      const double error = test::norm_error(logits_of(*model, f.at("input_ids").to(at::kLong)).cpu(), f.at("logits"));
      RecordProperty(folder.filename().string() + " " + device.str(), std::to_string(error));
      EXPECT_LT(error, kBfloat16);
    }
  }
}

TEST(FixtureModel, DecodesThroughTheState) {
  ORYX_REQUIRE_FIXTURES();
  at::NoGradGuard no_grad;
  for (const auto& folder : published()) {
    SCOPED_TRACE(folder.filename());
    const TemporaryFolder out;
    import_checkpoint(folder, out / "model");
    const auto model = load_model(out / "model");
    const test::Fixture f = test::load_fixture(folder / "expected");
    const at::Tensor ids = f.at("input_ids").to(at::kLong);
    for (const at::Device device : test::devices()) {
      SCOPED_TRACE(device.str());
      model->to(device);
      State state = model->make_state(ids.size(0));
      std::vector<at::Tensor> parts;
      const int64_t prompt = std::max<int64_t>(f.attrs.at("prefill").get<int64_t>(), 5);
      // The prompt, a piece shorter than the convolutions reach, then token by token.
      for (int64_t begin = 0, n = prompt; begin < ids.size(1); begin += n, n = parts.size() == 1 ? 2 : 1) {
        parts.push_back(logits_of(*model, ids.narrow(1, begin, n), &state));
      }
      EXPECT_LT(test::fixture_error(at::cat(parts, 1).cpu(), f.at("logits")), kLogits);
    }
  }
}

TEST(FixtureModel, PackedRowsGiveTheSame) {
  ORYX_REQUIRE_FIXTURES();
  at::NoGradGuard no_grad;
  for (const auto& folder : published()) {
    SCOPED_TRACE(folder.filename());
    const TemporaryFolder out;
    import_checkpoint(folder, out / "model");
    const auto model = load_model(out / "model");
    const test::Fixture f = test::load_fixture(folder / "expected");
    const at::Tensor ids = f.at("input_ids").to(at::kLong);
    const int64_t T = ids.size(1);
    ModelInput in;
    in.input_ids = at::cat({ids[0], ids[1].narrow(0, 0, T - 7)}).unsqueeze(0);
    in.cu_seqlens = at::tensor({int64_t{0}, T, 2 * T - 7}, at::kInt);
    in.routing = routing(*model, in.input_ids);
    const at::Tensor got = model->logits(model->hidden(in))[0];
    const at::Tensor want = at::cat({f.at("logits")[0], f.at("logits")[1].narrow(0, 0, T - 7)});
    EXPECT_LT(test::fixture_error(got, want), kLogits);
  }
}

TEST(FixtureModel, ExportGivesBackEveryBit) {
  ORYX_REQUIRE_FIXTURES();
  for (const auto& folder : published()) {
    SCOPED_TRACE(folder.filename());
    const TemporaryFolder out;
    // Half of them in the dtype that most published files have.
    const bool narrow = folder.filename().string().size() % 2 == 0;
    copy_checkpoint(folder, out / "theirs");
    NamedTensors theirs = tensors_of(folder / "model.safetensors");
    for (auto& [name, t] : theirs) t = narrow ? t.to(at::kBFloat16) : t;
    write_safetensors(out / "theirs/model.safetensors", theirs, {{"format", "pt"}});
    write_file(out / "theirs/tokenizer.json", "{\"model\": {}}");
    import_checkpoint(out / "theirs", out / "ours");
    export_checkpoint(out / "ours", out / "back");
    const NamedTensors back = tensors_of(out / "back/model.safetensors");
    ASSERT_EQ(back.size(), theirs.size());
    for (size_t i = 0; i < back.size(); ++i) {
      EXPECT_EQ(back[i].first, theirs[i].first);
      EXPECT_EQ(back[i].second.scalar_type(), theirs[i].second.scalar_type()) << back[i].first;
      EXPECT_TRUE(at::equal(back[i].second, theirs[i].second)) << back[i].first;
    }
    for (const char* name : {"config.json", "tokenizer.json"})
      EXPECT_EQ(read_file(out / "back" / name), read_file(out / "theirs" / name));
  }
}

TEST(FixtureModel, ShardsAreOneModel) {
  ORYX_REQUIRE_FIXTURES();
  for (const auto& folder : published()) {
    SCOPED_TRACE(folder.filename());
    const TemporaryFolder out;
    NamedTensors shards[2];
    Json index = {{"metadata", Json::object()}, {"weight_map", Json::object()}};
    size_t i = 0;
    for (const auto& [name, t] : tensors_of(folder / "model.safetensors")) {
      index["weight_map"][name] = i % 2 == 0 ? "a.safetensors" : "b.safetensors";
      shards[i++ % 2].emplace_back(name, t);
    }
    make_folders(out / "hf");
    write_file(out / "hf/config.json", read_file(folder / "config.json"));
    write_safetensors(out / "hf/a.safetensors", shards[0]);
    write_safetensors(out / "hf/b.safetensors", shards[1]);
    write_file(out / "hf/model.safetensors.index.json", index.dump());
    import_checkpoint(out / "hf", out / "sharded");
    import_checkpoint(folder, out / "single");
    EXPECT_EQ(read_file(out / "sharded/model.safetensors"), read_file(out / "single/model.safetensors"));

    index["weight_map"][shards[0][0].first] = "b.safetensors";
    write_file(out / "hf/model.safetensors.index.json", index.dump());
    EXPECT_THAT(error_of([&] { import_checkpoint(out / "hf", out / "wrong"); }),
                HasSubstr("'" + shards[0][0].first + "' is not in b.safetensors"));
    index["weight_map"][shards[0][0].first] = "../a.safetensors";
    write_file(out / "hf/model.safetensors.index.json", index.dump());
    EXPECT_THAT(error_of([&] { import_checkpoint(out / "hf", out / "wrong"); }),
                HasSubstr("expected a file beside the index"));
    EXPECT_FALSE(fs::exists(out / "wrong"));
  }
}

// What is refused of a fixture after `change`.
std::string refusal(const fs::path& folder, const std::function<void(Json&)>& change) {
  const TemporaryFolder out;
  copy_checkpoint(folder, out / "hf");
  Json config = read_json_file(folder / "config.json");
  change(config);
  write_file(out / "hf/config.json", config.dump(2));
  const std::string message = error_of([&] { import_checkpoint(out / "hf", out / "model"); });
  EXPECT_EQ(std::distance(fs::directory_iterator(out / ""), fs::directory_iterator{}), message.empty() ? 2 : 1)
      << "something half-written";
  return message;
}

TEST(FixtureModel, RefusesEveryTensorThatIsWrong) {
  ORYX_REQUIRE_FIXTURES();
  for (const auto& folder : published()) {
    SCOPED_TRACE(folder.filename());
    const NamedTensors theirs = tensors_of(folder / "model.safetensors");
    const TemporaryFolder out;
    copy_checkpoint(folder, out / "hf");
    const auto error_with = [&](const NamedTensors& tensors) {
      write_safetensors(out / "hf/model.safetensors", tensors);
      const std::string message = error_of([&] { import_checkpoint(out / "hf", out / "model"); });
      EXPECT_EQ(std::distance(fs::directory_iterator(out / ""), fs::directory_iterator{}), 1)
          << "something half-written";
      return message;
    };
    // Each write is synced to disk: a step that shares no factor with the layers' tensors sees every kind in some
    // family.
    for (size_t i = 0; i < theirs.size(); i += 5) {
      NamedTensors changed = theirs;
      changed.erase(changed.begin() + static_cast<int64_t>(i));
      EXPECT_THAT(error_with(changed), HasSubstr("tensor '" + theirs[i].first + "' is missing"));
      changed = theirs;
      changed[i].second = at::cat({theirs[i].second, theirs[i].second});
      EXPECT_THAT(error_with(changed), HasSubstr("tensor '" + theirs[i].first + "' has shape ["));
    }
    NamedTensors changed = theirs;
    changed.emplace_back("model.layers.0.extra.weight", at::ones({2}));
    EXPECT_THAT(error_with(changed), HasSubstr("'model.layers.0.extra.weight' is not part of"));
    changed = theirs;
    changed[0].second = theirs[0].second.to(at::kInt);
    EXPECT_THAT(error_with(changed), HasSubstr("is I32, expected F32, BF16 or F16"));
  }
}

TEST(FixtureModel, RefusesOptionsThatAreNotSupported) {
  ORYX_REQUIRE_FIXTURES();
  for (const auto& folder : published()) {
    SCOPED_TRACE(folder.filename());
    EXPECT_EQ(refusal(folder, [](Json&) {}), "");
    EXPECT_EQ(refusal(folder, [](Json& c) { c["torch_dtype"] = "bfloat16"; }), "");
    EXPECT_THAT(refusal(folder, [](Json& c) { c["model_type"] = "gpt2"; }),
                HasSubstr("model_type is \"gpt2\", supported: "));
    EXPECT_THAT(refusal(folder, [](Json& c) { c["architectures"] = {"OtherModel"}; }),
                HasSubstr("architectures is [\"OtherModel\"]"));
    EXPECT_THAT(refusal(folder, [](Json& c) { c["hidden_act"] = "gelu"; }),
                HasSubstr("hidden_act is \"gelu\" (a string), supported: \"silu\""));
    EXPECT_THAT(refusal(folder,
                        [](Json& c) {
                          c["quantization_config"] = {{"bits", 4}};
                        }),
                HasSubstr("the key 'quantization_config' is"));
    EXPECT_THAT(refusal(folder, [](Json& c) { c.erase("hidden_size"); }),
                HasSubstr("the key 'hidden_size' is missing"));
    EXPECT_THAT(refusal(folder, [](Json& c) { c["hidden_size"] = 0; }), HasSubstr("hidden_size"));
    EXPECT_THAT(refusal(folder, [](Json& c) { c["hidden_size"] = "64"; }),
                HasSubstr("hidden_size is \"64\" (a string), supported: a whole number"));
    EXPECT_THAT(refusal(folder, [](Json& c) { c["num_hidden_layers"] = 4; }), HasSubstr("layer"));
    const Json config = read_json_file(folder / "config.json");
    if (config.contains("attention_bias")) {
      EXPECT_THAT(refusal(folder, [](Json& c) { c["attention_bias"] = true; }),
                  HasSubstr("attention_bias is true, supported: false"));
    }
    if (config.contains("rope_parameters")) {
      EXPECT_THAT(refusal(folder, [](Json& c) { c["rope_parameters"]["rope_type"] = "yarn"; }),
                  HasSubstr("rope_parameters is"));
      EXPECT_THAT(refusal(folder,
                          [](Json& c) {
                            c["rope_scaling"] = {{"type", "linear"}, {"factor", 2}};
                          }),
                  HasSubstr("rope_scaling is"));
    }
    for (const char* experts : {"num_experts", "num_local_experts"}) {
      if (!config.contains(experts)) continue;
      EXPECT_THAT(refusal(folder, [&](Json& c) { c[experts] = 8; }),
                  HasSubstr(std::string(experts) + " is 8, supported: 0"));
      EXPECT_THAT(refusal(folder, [&](Json& c) { c.erase(experts); }), HasSubstr(experts));
    }
    if (config.contains("time_step_limit")) {
      EXPECT_THAT(refusal(folder, [](Json& c) { c["time_step_limit"] = {0.0, 0.1}; }), HasSubstr("time_step_limit is"));
    }
  }
}

TEST(FixtureModel, NoOddValueOfAKeyIsMoreThanAnError) {
  ORYX_REQUIRE_FIXTURES();
  const TemporaryFolder out;
  for (const auto& folder : published()) {
    SCOPED_TRACE(folder.filename());
    make_folders(out / "hf");  // without tensors: what passes the config ends there
    const Json config = read_json_file(folder / "config.json");
    for (const auto& [key, value] : config.items()) {
      for (const char* odd : {"null", "-1", "0", "1", "3", "2147483647", "1e300", "\"x\"", "[]", "[[]]", "{}",
                              "[\"attention\"]", "[0, 1]", "true"}) {
        Json changed = config;
        changed[key] = Json::parse(odd);
        std::ofstream(out / "hf/config.json") << changed.dump();  // write_file would sync thousands of files
        EXPECT_NE(error_of([&] { import_checkpoint(out / "hf", out / "model"); }), "") << key << ": " << odd;
      }
    }
  }
}

TEST(FixtureModel, ATiedHeadMayStandInTheFile) {
  ORYX_REQUIRE_FIXTURES();
  const auto folder = test::fixture_folder() / "models" / "llama_tied";
  if (!fs::exists(folder)) GTEST_SKIP() << "no llama_tied among the fixtures";
  const TemporaryFolder out;
  copy_checkpoint(folder, out / "hf");
  NamedTensors tensors = tensors_of(folder / "model.safetensors");
  const at::Tensor embedding = SafetensorsReader(folder / "model.safetensors").load("model.embed_tokens.weight");
  tensors.emplace_back("lm_head.weight", embedding);
  tensors.emplace_back("model.layers.0.self_attn.rotary_emb.inv_freq", at::ones({8}));
  write_safetensors(out / "hf/model.safetensors", tensors);
  import_checkpoint(out / "hf", out / "model");
  import_checkpoint(folder, out / "plain");
  EXPECT_EQ(read_file(out / "model/model.safetensors"), read_file(out / "plain/model.safetensors"));
  for (const at::Tensor& head : {embedding + 1, embedding.to(at::kBFloat16), embedding.narrow(0, 0, 3)}) {
    tensors[tensors.size() - 2].second = head;
    write_safetensors(out / "hf/model.safetensors", tensors);
    EXPECT_THAT(error_of([&] { import_checkpoint(out / "hf", out / "other"); }),
                HasSubstr("'lm_head.weight' differs from the embedding"));
  }
}

ModelConfig small(const std::string& name) {
  ModelConfig c = preset(name);
  c.vocab_size = 50;
  c.num_layers = 2;
  c.layer.hidden_size = 32;
  c.layer.head_dim = 16;
  c.layer.intermediate_size = 48;
  return c;
}

TEST(HfExport, AModelOfOurOwnBecomesALlama) {
  at::NoGradGuard no_grad;
  for (const bool tied : {true, false}) {
    const TemporaryFolder out;
    ModelConfig c = small("tiny-transformer");
    c.tie_word_embeddings = tied;
    c.layer.num_kv_heads = tied ? 0 : 1;
    LanguageModel model(c);
    model.initialize(3);
    save_model(model, out / "ours");
    EXPECT_EQ(export_checkpoint(out / "ours", out / "hf").family, "llama");
    const Json config = read_json_file(out / "hf/config.json");
    EXPECT_EQ(config.at("architectures"), Json::array({"LlamaForCausalLM"}));
    EXPECT_EQ(config.at("num_key_value_heads"), tied ? 2 : 1);
    import_checkpoint(out / "hf/", out / "again/");
    const at::Tensor ids = at::arange(22, at::kLong).view({2, 11});
    EXPECT_TRUE(at::equal(logits_of(*load_model(out / "again"), ids), logits_of(model, ids)));
  }
}

TEST(HfExport, WhatNoFamilyHasIsRefused) {
  const TemporaryFolder out;
  LanguageModel model(small("tiny"));
  save_model(model, out / "ours");
  EXPECT_THAT(error_of([&] { export_checkpoint(out / "ours", out / "hf"); }),
              HasSubstr("a llama has layer_mixers [[\"attention\"]"));
  EXPECT_FALSE(fs::exists(out / "hf"));
  ModelConfig c = small("tiny-transformer");
  c.layer.qk_norm = true;
  save_model(LanguageModel(c), out / "normed");
  EXPECT_THAT(error_of([&] { export_checkpoint(out / "normed", out / "hf"); }),
              HasSubstr("a llama has qk_norm false, this model true"));
  EXPECT_FALSE(fs::exists(out / "hf"));
}

TEST(HfExport, AFolderThatIsThereStays) {
  const TemporaryFolder out;
  save_model(LanguageModel(small("tiny-transformer")), out / "ours");
  make_folders(out / "hf");
  write_file(out / "hf/mine.txt", "mine");
  EXPECT_THAT(error_of([&] { export_checkpoint(out / "ours", out / "hf"); }), HasSubstr("is there already"));
  EXPECT_EQ(read_file(out / "hf/mine.txt"), "mine");
}

TEST(HfExport, AConfigThatWasChangedSinceIsRefused) {
  const TemporaryFolder out;
  ModelConfig c = small("tiny-transformer");
  save_model(LanguageModel(c), out / "ours");
  export_checkpoint(out / "ours", out / "hf");
  import_checkpoint(out / "hf", out / "model");
  c.layer.rope_theta = 500000;
  write_file(out / "model/config.json", dump_options(c));
  EXPECT_THAT(error_of([&] { export_checkpoint(out / "model", out / "back"); }),
              HasSubstr("rope_theta is 500000.0, but hf_config.json makes it 10000.0"));
}

TEST(HfFamilies, StandInTheDocs) {
  const std::string page = read_file(test::source_path("docs/importing.md"));
  ASSERT_GE(hf_families().size(), 7u);
  for (const auto& family : hf_families()) {
    EXPECT_THAT(page, HasSubstr("`" + family.model_type + "`"));
    EXPECT_THAT(page, HasSubstr("`" + family.architecture + "`"));
  }
}

}  // namespace
}  // namespace oryx
