// What a run, a data set and a model in shards consist of, each file cut at every byte: refused in one line, whole again when the file is.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/data/dataset.h"
#include "oryx/data/sentencepiece.h"
#include "oryx/io/sharded_safetensors.h"
#include "oryx/train/run_folder.h"
#include "tests/support/folder.h"
#include "tests/support/readers.h"

namespace oryx::test {
namespace {

namespace fs = std::filesystem;

void put_bytes(const fs::path& path, std::string_view bytes) { std::ofstream(path, std::ios::binary) << bytes; }

// Cuts the file at every byte, or behind its first kHead at every `step`-th and at the last (where cuts of one long stretch of numbers are all alike); white
// space at its end may go. `read` must throw one line that names the file, and work at the end.
constexpr size_t kHead = 1500;
void expect_every_cut_is_refused(const fs::path& file, size_t step, const std::function<void()>& read) {
  const std::string bytes = read_file(file);
  size_t end = bytes.size();
  while (end > 0 && std::isspace(static_cast<unsigned char>(bytes[end - 1]))) --end;
  ASSERT_GT(end, 0u) << file;
  for (size_t size = end; size-- > 0;) {
    if (size > kHead && size != end - 1 && size % step != 0) continue;
    fs::resize_file(file, size);
    SCOPED_TRACE(fmt::format("{} cut to {} of {} bytes", file.filename().string(), size, bytes.size()));
    try {
      read();
      ADD_FAILURE() << "was read";
    } catch (const Error& e) {
      const std::string what = e.what();
      EXPECT_THAT(what, ::testing::HasSubstr(file.filename().string()));
      EXPECT_EQ(what.find('\n'), std::string::npos) << what;
      EXPECT_LT(what.size(), 2000u);
    }
    if (::testing::Test::HasFailure()) break;
  }
  put_bytes(file, bytes);
  EXPECT_NO_THROW(read()) << file;
}

TEST(CutFiles, Checkpoint) {
  const TemporaryFolder folder;
  const ModelConfig& config = session_model().config();
  LanguageModel model(config), loaded(config);
  model.initialize(1);
  Optimizer optimizer(model, {}), loaded_optimizer(loaded, {});
  const auto tokenizer = make_byte_tokenizer();
  const RunFolder run(folder.path());
  run.save(2, model, optimizer, {{"step", 2}, {"optimizer_steps", 0}, {"data", 0}}, tokenizer.get(), 1);
  const fs::path checkpoint = run.checkpoint(2);
  for (const char* name : {"model.safetensors", "optimizer.safetensors", "trainer.json"}) {
    expect_every_cut_is_refused(checkpoint / name, 101, [&] { (void)run.load(2, loaded, loaded_optimizer); });
  }
}

TEST(CutFiles, DataSet) {
  const TemporaryFolder folder;
  std::string text;
  for (int i = 0; i < 20; ++i) text += fmt::format("{{\"text\": \"Document {} says that the state is {}.\"}}\n", i, i * i);
  put_bytes(folder / "a.jsonl", text);
  DatasetOptions o;
  o.valid = 0.2;
  o.progress = false;
  const fs::path set = folder / "set";
  const DatasetInfo info = build_dataset(list_text_files(folder / "a.jsonl", {}), *make_byte_tokenizer(), set, o);
  const auto open = [&] {
    const Dataset d = open_dataset(set);
    d.train->verify();
    d.valid->verify();
  };
  for (const char* name : {"train.tok", "valid.tok", "dataset.json"}) expect_every_cut_is_refused(set / name, 1, open);
  // A SentencePiece model has no end of its own: what a cut leaves may be a model, but then it is another one than the tokens were made with.
  expect_every_cut_is_refused(set / info.tokenizer_file, 1, open);
}

TEST(CutFiles, Shards) {
  const TemporaryFolder folder;
  write_safetensors(folder / "model-00001-of-00002.safetensors", {{"a", at::ones({3, 4})}});
  write_safetensors(folder / "model-00002-of-00002.safetensors", {{"b", at::ones({5}, at::kBFloat16)}});
  put_bytes(folder / "model.safetensors.index.json",
            R"({"metadata": {"total_size": 58}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})");
  const auto load = [&] {
    const ShardedSafetensors files(folder.path());
    for (const auto& name : files.names()) (void)files.load(name);
  };
  for (const char* name : {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}) {
    expect_every_cut_is_refused(folder / name, 1, load);
  }
}

}  // namespace
}  // namespace oryx::test
