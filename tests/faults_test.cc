// A disk that fails at the n-th call, n = 1, 2, ...: every writer and reader ends in one line, leaves what stood there, and works the next time.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/data/dataset.h"
#include "oryx/data/sentencepiece.h"
#include "oryx/common/options.h"
#include "oryx/io/sharded_safetensors.h"
#include "oryx/model/checkpoint.h"
#include "oryx/model/hf/convert.h"
#include "oryx/model/state_file.h"
#include "oryx/train/run_folder.h"
#include "tests/support/faults.h"
#include "tests/support/folder.h"
#include "tests/support/paths.h"
#include "tests/support/readers.h"
#include "tests/support/small_model.h"

namespace oryx::test {
namespace {

namespace fs = std::filesystem;

void nothing(const fs::path&) {}

// Tests write much and need no disk under it.
void put(const fs::path& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

// On an empty folder and over what a first run left (`first` makes it).
void try_fresh_and_over(const std::function<void(const fs::path&)>& first, const std::function<void(const fs::path&)>& run, int least) {
  EXPECT_GE(try_all_faults({nothing, run}), least);
  EXPECT_GE(try_all_faults({first, run}), least);
}

TEST(Faults, AtomicFile) {
  const std::string large(3 << 20, 'x');
  const auto write = [&](const fs::path& folder) {
    AtomicFile f(folder / "a");
    f.write("head");
    f.write(large);
    f.write("tail");
    f.write_at(0, "HEAD", 4);
    f.commit();
  };
  try_fresh_and_over([](const fs::path& folder) { put(folder / "a", "old"); }, write, 20);
}

TEST(Faults, Folders) {
  EXPECT_GE(try_all_faults({nothing, [](const fs::path& folder) { make_folders(folder / "a" / "b"); },
                            // A parent may stand already when its child fails: folders are no output.
                            [](const fs::path& folder, const Tree&, const Tree&) { make_folders(folder / "a" / "b"); }}),
            6);
}

TEST(Faults, AppendedLines) {
  const std::string line(100, 'm');
  const auto append = [&](const fs::path& folder) { append_line(folder / "metrics.jsonl", line); };
  // A line whose close fails is there, and there twice after the second call: what is read must be whole lines, none lost.
  const auto whole_lines = [&](const fs::path& folder, const Tree& before, const Tree&) {
    const std::string old = before.count("metrics.jsonl") ? before.at("metrics.jsonl") : "";
    const std::string now = fs::exists(folder / "metrics.jsonl") ? read_file(folder / "metrics.jsonl") : "";
    EXPECT_TRUE(now == old || now == old + line + "\n") << now;
  };
  EXPECT_GE(try_all_faults({nothing, append, whole_lines}), 5);
  EXPECT_GE(try_all_faults({[](const fs::path& folder) { put(folder / "metrics.jsonl", "first\n"); }, append, whole_lines}), 5);
}

TEST(Faults, HalfALineOfAKilledProcessIsClosed) {
  const TemporaryFolder folder;
  put(folder / "m", "whole\nhal");
  append_line(folder / "m", "next");
  EXPECT_EQ(read_file(folder / "m"), "whole\nhal\nnext\n");
}

TEST(Faults, ReadFile) {
  const auto prepare = [](const fs::path& folder) { put(folder / "a", std::string(10000, 'r')); };
  const auto read = [](const fs::path& folder) { EXPECT_EQ(read_file(folder / "a"), std::string(10000, 'r')); };
  EXPECT_GE(try_all_faults({prepare, read}), 6);
}

TEST(Faults, Safetensors) {
  const NamedTensors tensors = {{"a", at::arange(1000, at::kFloat)}, {"b", at::ones({3, 5}, at::kLong)}};
  const auto write = [&](const fs::path& folder) { write_safetensors(folder / "x.safetensors", tensors); };
  try_fresh_and_over([](const fs::path& folder) { write_safetensors(folder / "x.safetensors", {{"old", at::zeros({4})}}); }, write, 8);
  const auto read = [&](const fs::path& folder) {
    EXPECT_TRUE(at::equal(SafetensorsReader(folder / "x.safetensors").load("a"), tensors[0].second));
  };
  EXPECT_GE(try_all_faults({write, read}), 3);
}

// An index and two shards.
TEST(Faults, ShardedSafetensors) {
  const auto write = [](const fs::path& folder) {
    write_safetensors(folder / "one.safetensors", {{"a", at::ones({7})}});
    write_safetensors(folder / "two.safetensors", {{"b", at::zeros({3, 2})}});
    put(folder / "model.safetensors.index.json", R"({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})");
  };
  EXPECT_GE(try_all_faults({write, [](const fs::path& folder) { EXPECT_EQ(ShardedSafetensors(folder).load("b").numel(), 6); }}), 8);
}

TEST(Faults, TokenFile) {
  for (const auto encoding : {TokenEncoding::raw, TokenEncoding::zstd}) {
    const auto write_tokens = [&](const fs::path& folder, int32_t last) {
      TokenFileWriter w(folder / "a.tok", 300, 7, {.encoding = encoding, .block_tokens = 64});
      for (int32_t i = 1; i < last; ++i) w.add(std::vector<int32_t>(static_cast<size_t>(i), i));
      w.finish();
    };
    const auto write = [&](const fs::path& folder) { write_tokens(folder, 40); };
    try_fresh_and_over([&](const fs::path& folder) { write_tokens(folder, 20); }, write, 8);
    EXPECT_GE(try_all_faults({write, [](const fs::path& folder) { TokenFile(folder / "a.tok").verify(); }}), 3);
  }
}

class TextFaults : public ::testing::Test {
 protected:
  TextFaults() {
    for (int i = 0; i < 40; ++i) text_ += fmt::format("{{\"text\": \"Document {} says that the state is {}.\"}}\n", i, i * i);
  }
  std::vector<TextFile> files(const fs::path& folder) const { return list_text_files(folder / "a.jsonl", {}); }
  std::string text_;
};

TEST_F(TextFaults, DataSet) {
  const auto tokenizer = make_byte_tokenizer();
  const auto build = [&](const fs::path& folder, uint64_t seed) {
    DatasetOptions o;
    o.valid = 0.2;
    o.seed = seed;
    o.overwrite = true;
    o.progress = false;
    build_dataset(files(folder), *tokenizer, folder / "set", o);
  };
  const auto text = [&](const fs::path& folder) {
    put(folder / "a.jsonl", text_);
    fs::create_directory(folder / "set");
  };
  const auto run = [&](const fs::path& folder) { build(folder, 1); };
  EXPECT_GE(try_all_faults({text, run}), 30);
  const auto there = [&](const fs::path& folder) {
    text(folder);
    build(folder, 2);
  };
  EXPECT_GE(try_all_faults({there, run}), 30);
  EXPECT_GE(try_all_faults({there, [](const fs::path& folder) { open_dataset(folder / "set"); }}), 12);
}

TEST_F(TextFaults, TokenizerTraining) {
  const auto train = [&](const fs::path& folder) {
    TextSource source(files(folder));
    SentencePieceTraining o;
    o.vocab_size = 330;
    o.progress = false;
    train_sentencepiece(source, o)->save(folder / "tokenizer.model");
  };
  const auto text = [&](const fs::path& folder) { put(folder / "a.jsonl", text_); };
  EXPECT_GE(try_all_faults({text, train}), 10);
  const auto there = [&](const fs::path& folder) {
    text(folder);
    make_byte_tokenizer()->save(folder / "tokenizer.model");
  };
  EXPECT_GE(try_all_faults({there, train}), 10);
}

TEST(Faults, ModelFolder) {
  LanguageModel old(small_model()), model(small_model());
  old.initialize(1);
  model.initialize(2);
  try_fresh_and_over([&](const fs::path& folder) { save_model(old, folder); }, [&](const fs::path& folder) { save_model(model, folder); }, 14);
  EXPECT_GE(try_all_faults({[&](const fs::path& folder) { save_model(model, folder); }, [](const fs::path& folder) { load_model(folder); }}), 5);
}

// A session is one file: written over an older one, and read.
TEST(Faults, Session) {
  const LanguageModel& model = session_model();
  const auto state_of = [&](int64_t tokens) {
    const at::NoGradGuard no_grad;
    State state = model.make_state(1, {2, 2, true});
    for (int64_t t = 0; t < tokens; t += 3) {
      ModelInput in;
      in.input_ids = at::arange(3, at::kLong).view({1, 3});
      in.routing = {std::make_shared<Routing>(1, 3, "attention")};
      in.state = &state;
      (void)model.hidden(in);
    }
    return state;
  };
  const State old = state_of(3), state = state_of(9);
  const auto save = [&](const fs::path& folder) { save_state(model, state, folder / "s.safetensors"); };
  try_fresh_and_over([&](const fs::path& folder) { save_state(model, old, folder / "s.safetensors"); }, save, 8);
  const auto load = [&](const fs::path& folder) { EXPECT_EQ(load_state(model, folder / "s.safetensors").lengths()[0], 9); };
  EXPECT_GE(try_all_faults({save, load}), 3);
}

TEST(Faults, ImportAndExport) {
  ModelConfig c = small_model();
  c.layer_mixers = {{"attention"}};
  c.layer.conv = c.layer.gate = c.layer.head_norm = false;
  LanguageModel model(c);
  model.initialize(1);
  const auto saved = [&](const fs::path& folder) { save_model(model, folder / "model"); };
  EXPECT_GE(try_all_faults({saved, [](const fs::path& folder) { export_checkpoint(folder / "model", folder / "hf"); }, {}}), 20);
  const auto exported = [&](const fs::path& folder) {
    saved(folder);
    export_checkpoint(folder / "model", folder / "hf");
  };
  EXPECT_GE(try_all_faults({exported, [](const fs::path& folder) { import_checkpoint(folder / "hf", folder / "again"); }, {}}), 20);
}

TEST(Faults, ReadersOfTokenizersAndConfigs) {
  const auto prepare = [](const fs::path& folder) {
    fs::copy_file(source_path("tests/data/bpe/gpt2.json"), folder / "tokenizer.json");
    put(folder / "config.json", R"({"num_layers": 3})");
  };
  EXPECT_GE(try_all_faults({prepare, [](const fs::path& folder) { load_tokenizer(folder / "tokenizer.json"); }}), 4);
  EXPECT_GE(try_all_faults({prepare, [](const fs::path& folder) { load_options<ModelConfig>(folder / "config.json"); }}), 4);
}

// After an error at step 2 the run has whole checkpoints alone, and RUN/model is one of them.
TEST(Faults, RunFolder) {
  LanguageModel model(small_model()), loaded(small_model());
  model.initialize(1);
  Optimizer optimizer(model, {}), loaded_optimizer(loaded, {});
  const auto tokenizer = make_byte_tokenizer();
  const auto save = [&](const fs::path& folder, int64_t step) {
    const RunFolder run(folder);
    run.log({{"kind", "skipped"}, {"step", step}});
    run.save(step, model, optimizer, {{"step", step}, {"optimizer_steps", 0}, {"data", 0}}, tokenizer.get(), 1);
  };
  const auto whole = [&](const fs::path& folder, const Tree& before, const Tree&) {
    const RunFolder run(folder);
    const auto steps = run.checkpoints();
    EXPECT_GE(steps.size(), before.empty() ? 0u : 1u);
    for (const int64_t step : steps) {
      EXPECT_NO_THROW(run.load(step, loaded, loaded_optimizer));
      EXPECT_EQ(tree_of(run.checkpoint(step)).size(), 5u);
    }
    for (const auto& entry : fs::directory_iterator(folder)) EXPECT_NE(entry.path().filename().string().front(), '.') << entry.path();
    EXPECT_TRUE(before.empty() || fs::exists(folder / "model" / "trainer.json"));
    save(folder, 2);  // the next call works
    EXPECT_EQ(run.checkpoints(), std::vector<int64_t>{2});
    EXPECT_EQ(fs::read_symlink(folder / "model"), "checkpoints/step-000000002");
  };
  EXPECT_GE(try_all_faults({nothing, [&](const fs::path& folder) { save(folder, 2); }, whole}), 40);
  EXPECT_GE(try_all_faults({[&](const fs::path& folder) { save(folder, 1); }, [&](const fs::path& folder) { save(folder, 2); }, whole}), 40);
  EXPECT_GE(try_all_faults({[&](const fs::path& folder) { save(folder, 2); }, [&](const fs::path& folder) { save(folder, 2); }, whole}), 40);
}

// What a resumed run reads: a checkpoint and the metrics so far.
TEST(Faults, ResumedRun) {
  LanguageModel model(small_model()), loaded(small_model());
  model.initialize(1);
  Optimizer optimizer(model, {}), loaded_optimizer(loaded, {});
  const auto tokenizer = make_byte_tokenizer();
  const auto saved = [&](const fs::path& folder) {
    const RunFolder run(folder);
    run.log({{"kind", "skipped"}, {"step", 3}});
    run.save(3, model, optimizer, {{"step", 3}, {"optimizer_steps", 0}, {"data", 0}}, tokenizer.get(), 1);
  };
  EXPECT_GE(try_all_faults({saved, [&](const fs::path& folder) { RunFolder(folder).load(3, loaded, loaded_optimizer); }}), 8);
}

// Killed while a checkpoint took the place of one of the same step: the older one stands aside, whole, and is the run's checkpoint again.
TEST(Faults, ACheckpointThatWasBeingReplacedComesBack) {
  const TemporaryFolder folder;
  LanguageModel model(small_model()), loaded(small_model());
  Optimizer optimizer(model, {}), loaded_optimizer(loaded, {});
  const auto tokenizer = make_byte_tokenizer();
  const RunFolder run(folder.path());
  run.save(2, model, optimizer, {{"step", 2}, {"optimizer_steps", 0}, {"data", 0}}, tokenizer.get(), 1);
  const fs::path own = run.checkpoint(2);
  fs::rename(own, own.string() + ".old.partial");
  fs::create_directory(own.string() + ".partial");  // the new one, not whole yet
  run.clean();
  EXPECT_EQ(run.checkpoints(), std::vector<int64_t>{2});
  EXPECT_NO_THROW(run.load(2, loaded, loaded_optimizer));
  for (const auto& entry : fs::directory_iterator(folder / "checkpoints")) EXPECT_NE(entry.path().extension(), ".partial") << entry.path();
}

TEST(Faults, TemporariesOfAKilledProcessGo) {
  const TemporaryFolder folder;
  for (const char* name : {".a.json.x1Y2z3", ".a.json.x1Y2z3.old", "a.json", ".a.json.x", ".b.json.x1Y2z3"}) put(folder / name, "");
  remove_temporaries(folder.path(), "a.json");
  EXPECT_EQ(tree_of(folder.path()), (Tree{{"a.json", ""}, {".a.json.x", ""}, {".b.json.x1Y2z3", ""}}));
}

}  // namespace
}  // namespace oryx::test
