#include "oryx/common/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace oryx {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

enum class Precision { kFloat32, kBfloat16 };

struct OptimizerOptions {
  double lr = 6e-4;
  std::vector<double> betas = {0.9, 0.95};
  void describe(Fields& f) {
    f.add("lr", lr, "peak learning rate", above(0));
    f.add("betas", betas, "moments", between(0, 1));
  }
};

struct RunOptions {
  int64_t steps = 1000;
  std::optional<int64_t> num_kv_heads;
  bool resume = false;
  std::string name = "run";
  std::string schedule = "linear";
  Precision precision = Precision::kFloat32;
  std::vector<std::string> schedules = {"linear", "attention"};
  std::vector<std::vector<std::string>> layer_mixers = {{"mamba2", "attention"}};
  Json layers = Json::object();
  OptimizerOptions optimizer;

  void describe(Fields& f) {
    f.add("steps", steps, "optimizer steps", at_least(1));
    f.add("num_kv_heads", num_kv_heads, "key/value heads; null: num_heads", at_least(1));
    f.add("resume", resume, "go on | start anew");
    f.add("name", name, "the run's name");
    f.add("schedule", schedule, "how tokens are mixed", one_of({"linear", "attention"}));
    f.add("precision", precision, "compute type",
          {{"float32", Precision::kFloat32}, {"bfloat16", Precision::kBfloat16}});
    f.add("schedules", schedules, "for validation");
    f.add("layer_mixers", layer_mixers, "the mixers of each layer", one_of({"mamba2", "attention"}));
    f.add("layers", layers, "anything");
    f.group("optimizer", optimizer);
  }
  void validate() const {
    if (name == "bad" && resume) fail("name is 'bad', which cannot be resumed");
  }
};

RunOptions read(const std::string& text, const std::vector<std::string>& overrides = {}) {
  RunOptions o;
  read_options(o, parse_json(text, "run.json"), "run.json", overrides);
  return o;
}

std::string error_of(const std::string& text, const std::vector<std::string>& overrides = {}) {
  try {
    read(text, overrides);
  } catch (const Error& e) {
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos) << e.what();
    return e.what();
  }
  return "no error";
}

TEST(Options, DefaultsAreTheStructs) {
  const RunOptions o = read("{}");
  EXPECT_EQ(o.steps, 1000);
  EXPECT_EQ(o.optimizer.lr, 6e-4);
  EXPECT_FALSE(o.num_kv_heads.has_value());
}

TEST(Options, EveryTypeFromJson) {
  const RunOptions o =
      read(R"({"steps": 1e4, "num_kv_heads": 4, "resume": true, "name": "a b", "precision": "bfloat16", "schedules": [],
      "layer_mixers": [["attention"], ["mamba2", "attention"]], "layers": {"0-3": "x"}, "optimizer": {"lr": 1, "betas": [0, 0.5]}})");
  EXPECT_EQ(o.steps, 10000);
  EXPECT_EQ(o.num_kv_heads, 4);
  EXPECT_TRUE(o.resume);
  EXPECT_EQ(o.name, "a b");
  EXPECT_EQ(o.precision, Precision::kBfloat16);
  EXPECT_TRUE(o.schedules.empty());
  EXPECT_EQ(o.layer_mixers, (std::vector<std::vector<std::string>>{{"attention"}, {"mamba2", "attention"}}));
  EXPECT_EQ(o.layers["0-3"], "x");
  EXPECT_EQ(o.optimizer.lr, 1.0);
  EXPECT_EQ(o.optimizer.betas, (std::vector<double>{0, 0.5}));
}

TEST(Options, EveryTypeFromOverrides) {
  const RunOptions o =
      read(R"({"steps": 5, "num_kv_heads": 3})",
           {"steps=7", "num_kv_heads=null", "resume=true", "name=a=b,c", "precision=bfloat16", "schedules=x,y",
            R"(layer_mixers=[["attention"]])", "optimizer.lr=3e-4", "optimizer.betas=[0.1,0.2]", "layers=[1]"});
  EXPECT_EQ(o.steps, 7);
  EXPECT_FALSE(o.num_kv_heads.has_value());
  EXPECT_TRUE(o.resume);
  EXPECT_EQ(o.name, "a=b,c");
  EXPECT_EQ(o.precision, Precision::kBfloat16);
  EXPECT_EQ(o.schedules, (std::vector<std::string>{"x", "y"}));
  EXPECT_EQ(o.layer_mixers, (std::vector<std::vector<std::string>>{{"attention"}}));
  EXPECT_EQ(o.optimizer.lr, 3e-4);
  EXPECT_EQ(o.optimizer.betas, (std::vector<double>{0.1, 0.2}));
  EXPECT_EQ(o.layers, Json::array({1}));
}

TEST(Options, AStringMayStandInTheQuotesOfAFile) {
  EXPECT_EQ(read("{}", {R"(name="a b")"}).name, "a b");
  EXPECT_EQ(read("{}", {R"(precision="bfloat16")"}).precision, Precision::kBfloat16);
  EXPECT_EQ(read("{}", {R"(name="a" or "b")"}).name, R"("a" or "b")");
  EXPECT_EQ(read("{}", {R"(name=")"}).name, "\"");
}

TEST(Options, LaterOverridesWin) { EXPECT_EQ(read("{}", {"steps=7", "steps=8"}).steps, 8); }

TEST(Options, UnknownKeysNameTheNearest) {
  EXPECT_EQ(error_of(R"({"stpes": 3})"), "run.json: unknown key 'stpes'. Did you mean 'steps'?");
  EXPECT_EQ(error_of(R"({"optimizer": {"lt": 3}})"),
            "run.json: unknown key 'optimizer.lt'. Did you mean 'optimizer.lr'?");
  EXPECT_EQ(error_of(R"({"optimiser": {}})"), "run.json: unknown key 'optimiser'. Did you mean 'optimizer'?");
  EXPECT_EQ(error_of(R"({"betas": [1, 2]})"), "run.json: unknown key 'betas'. Did you mean 'optimizer.betas'?");
  EXPECT_EQ(error_of(R"({"optimizer": {"steps": 1}})"),
            "run.json: unknown key 'optimizer.steps'. Did you mean 'steps'?");
  EXPECT_EQ(error_of(R"({"optimizer.lr": 1})"),
            "run.json: the key 'optimizer.lr' holds a dot; write it as an object within an object");
  EXPECT_EQ(error_of(R"({"zzzzzzzzzz": 1})"), "run.json: unknown key 'zzzzzzzzzz'");
  EXPECT_EQ(error_of("{}", {"stepz=1"}), "override 'stepz=1': unknown key 'stepz'. Did you mean 'steps'?");
}

TEST(Options, WrongTypesSayWhatWasFoundAndExpected) {
  EXPECT_EQ(error_of(R"({"steps": "many"})"),
            "run.json: steps is \"many\" (a string), expected an integer of at least 1");
  EXPECT_EQ(error_of(R"({"steps": 1.5})"), "run.json: steps is 1.5, expected an integer of at least 1");
  EXPECT_EQ(error_of(R"({"steps": null})"), "run.json: steps is null, expected an integer of at least 1");
  EXPECT_EQ(error_of(R"({"steps": 18446744073709551615})"),
            "run.json: steps is 18446744073709551615, expected an integer of at least 1");
  EXPECT_EQ(error_of(R"({"num_kv_heads": true})"),
            "run.json: num_kv_heads is true, expected an integer or null, of at least 1");
  EXPECT_EQ(error_of(R"({"resume": 1})"), "run.json: resume is 1, expected true or false");
  EXPECT_EQ(error_of(R"({"name": [1]})"), "run.json: name is [1] (a list), expected a string");
  EXPECT_EQ(error_of(R"({"schedules": "x"})"), "run.json: schedules is \"x\" (a string), expected a list of strings");
  EXPECT_EQ(error_of(R"({"layer_mixers": ["mamba2"]})"),
            "run.json: layer_mixers is [\"mamba2\"] (a list), expected a list of lists of strings, each one of mamba2, "
            "attention");
  EXPECT_EQ(error_of(R"({"optimizer": 3})"), "run.json: optimizer is 3, expected an object");
  EXPECT_EQ(error_of("[]"), "run.json: the file is [] (a list), expected an object");
}

TEST(Options, WrongOverrides) {
  EXPECT_EQ(error_of("{}", {"steps=many"}),
            "override 'steps=many': steps is \"many\" (a string), expected an integer of at least 1");
  EXPECT_EQ(error_of("{}", {"optimizer.lr=nan"}),
            "override 'optimizer.lr=nan': optimizer.lr is \"nan\" (a string), expected a number above 0");
  EXPECT_THAT(error_of("{}", {"optimizer.lr=1e999"}), HasSubstr("expected a number above 0"));
  EXPECT_EQ(error_of("{}", {"optimizer=3"}),
            "override 'optimizer=3': optimizer is a group of keys; set them one by one (optimizer.NAME=VALUE)");
  EXPECT_EQ(error_of("{}", {"steps"}), "'steps': expected key=value");
  EXPECT_EQ(error_of("{}", {"=3"}), "'=3': expected key=value");
  EXPECT_EQ(error_of("{}", {"name=\xff"}), "the value of 'name' is not UTF-8");
}

TEST(Options, RangesAndChoices) {
  EXPECT_EQ(error_of(R"({"steps": 0})"), "run.json: steps is 0, expected an integer of at least 1");
  EXPECT_EQ(error_of(R"({"optimizer": {"lr": -1}})"), "run.json: optimizer.lr is -1, expected a number above 0");
  EXPECT_EQ(error_of(R"({"optimizer": {"betas": [0.5, 2]}})"),
            "run.json: optimizer.betas holds 2, expected a list of numbers, from 0 to 1");
  EXPECT_EQ(
      error_of(R"({"schedule": "atention"})"),
      "run.json: schedule is \"atention\" (a string), expected one of linear, attention. Did you mean 'attention'?");
  EXPECT_EQ(
      error_of(R"({"precision": "bfloat"})"),
      "run.json: precision is \"bfloat\" (a string), expected one of float32, bfloat16. Did you mean 'bfloat16'?");
  EXPECT_THAT(error_of(R"({"precision": 32})"), HasSubstr("precision is 32, expected one of float32, bfloat16"));
  EXPECT_THAT(error_of(R"({"layer_mixers": [["mamba"]]})"), HasSubstr("layer_mixers holds \"mamba\""));
}

TEST(Options, ARefusedValueLeavesTheObjectAsItWas) {
  RunOptions o;
  Fields f = fields_of(o);
  EXPECT_THROW(f.override_with("steps=-5"), Error);
  EXPECT_EQ(o.steps, 1000);
  EXPECT_THROW(f.override_with("optimizer.betas=[0.1,7]"), Error);
  EXPECT_EQ(o.optimizer.betas, (std::vector<double>{0.9, 0.95}));
}

TEST(Options, ValidateSeesSeveralKeys) {
  EXPECT_EQ(error_of(R"({"name": "bad"})", {"resume=true"}), "run.json: name is 'bad', which cannot be resumed");
  EXPECT_EQ(read(R"({"name": "bad"})").name, "bad");
}

TEST(Options, BadJsonIsOneLine) {
  EXPECT_EQ(error_of(R"({"steps": 1, "steps": 2})"), "run.json: the key 'steps' stands twice in one object");
  EXPECT_EQ(error_of(R"({"optimizer": {"lr": 1, "lr": 1}})"), "run.json: the key 'lr' stands twice in one object");
  EXPECT_THAT(error_of("{\n \"steps\": }"), StartsWith("run.json: not valid JSON: parse error at line 2, column "));
  EXPECT_THAT(error_of(""), StartsWith("run.json: not valid JSON: "));
  EXPECT_THAT(error_of("{\"name\": \"\xff\"}"), StartsWith("run.json: not valid JSON: "));
}

TEST(Options, DumpHoldsEveryKeyInOrderAndReadsBack) {
  RunOptions o = read("{}", {"num_kv_heads=2", "precision=bfloat16", "optimizer.lr=0.1"});
  const std::string text = dump_options(o);
  EXPECT_THAT(text, StartsWith("{\n  \"steps\": 1000,\n  \"num_kv_heads\": 2,\n  \"resume\": false,\n"));
  EXPECT_THAT(text, HasSubstr("\"optimizer\": {\n    \"lr\": 0.1,\n"));
  EXPECT_EQ(dump_options(read(text)), text);
  EXPECT_EQ(dump_options(read(dump_options(RunOptions{}))), dump_options(RunOptions{}));
}

TEST(Options, MarkdownTable) {
  const std::string table = options_table<RunOptions>();
  EXPECT_THAT(
      table,
      StartsWith("| key | type | default | meaning |\n| --- | --- | --- | --- |\n"
                 "| `steps` | integer of at least 1 | `1000` | optimizer steps |\n"
                 "| `num_kv_heads` | integer or null, of at least 1 | `null` | key/value heads; null: num_heads |\n"
                 "| `resume` | boolean | `false` | go on \\| start anew |\n"));
  EXPECT_THAT(table, HasSubstr("| `precision` | one of float32, bfloat16 | `\"float32\"` | compute type |\n"));
  EXPECT_THAT(table, HasSubstr("| `optimizer.lr` | number above 0 | `0.0006` | peak learning rate |\n"));
}

TEST(Options, DeclaringAKeyTwiceIsAnInternalError) {
  Fields f;
  double x = 0;
  f.add("x", x, "");
  EXPECT_THROW(f.add("x", x, ""), std::logic_error);
}

TEST(Options, LoadNamesTheFile) {
  try {
    load_options<RunOptions>("/nonexistent/run.json");
    FAIL();
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), HasSubstr("/nonexistent/run.json"));
  }
  EXPECT_EQ(load_options<RunOptions>("", {"steps=3"}).steps, 3);
}

}  // namespace
}  // namespace oryx
