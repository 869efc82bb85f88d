// Several writers of one path at once: who reads sees one of them, whole, at every moment, and nothing is left beside it.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <fstream>
#include <thread>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/data/dataset.h"
#include "oryx/data/sentencepiece.h"
#include "oryx/io/safetensors.h"
#include "oryx/model/checkpoint.h"
#include "oryx/model/state_file.h"
#include "tests/support/folder.h"
#include "tests/support/program.h"
#include "tests/support/readers.h"
#include "tests/support/small_model.h"

namespace oryx::test {
namespace {

namespace fs = std::filesystem;

constexpr int kWriters = 3, kRounds = 12;

// Runs write(writer) on threads, kRounds times each, and read() beside them until all are done; then read() once more.
void write_at_once(const std::function<void(int)>& write, const std::function<void()>& read) {
  write(0);
  std::atomic<int> left{kWriters};
  std::vector<std::thread> writers;
  for (int w = 0; w < kWriters; ++w) {
    writers.emplace_back([&, w] {
      try {
        for (int i = 0; i < kRounds; ++i) write(w);
      } catch (const std::exception& e) {
        ADD_FAILURE() << e.what();
      }
      --left;
    });
  }
  while (left > 0) {
    try {
      read();
    } catch (const std::exception& e) {
      ADD_FAILURE() << e.what();
    }
  }
  for (auto& t : writers) t.join();
  read();
}

size_t entries(const fs::path& folder) { return static_cast<size_t>(std::distance(fs::directory_iterator(folder), fs::directory_iterator())); }

TEST(ConcurrentWriters, TensorsOfOneFile) {
  const TemporaryFolder folder;
  const fs::path path = folder / "a.safetensors";
  const auto read = [&] {
    const SafetensorsReader file(path);
    const at::Tensor a = file.load("a");
    EXPECT_EQ(a.size(0), 1000 + a[0].item<int64_t>());  // lengths differ, so that no file fits into another's place
    EXPECT_TRUE((a == a[0]).all().item<bool>());
    EXPECT_EQ(file.metadata().at("writer"), std::to_string(a[0].item<int64_t>()));
  };
  write_at_once([&](int w) { write_safetensors(path, {{"a", at::full({1000 + w}, w, at::kLong)}}, {{"writer", std::to_string(w)}}); }, read);
  EXPECT_EQ(entries(folder.path()), 1u);
}

TEST(ConcurrentWriters, Sessions) {
  const TemporaryFolder folder;
  const LanguageModel& model = session_model();
  std::vector<State> states;
  for (int w = 0; w < kWriters; ++w) {
    const at::NoGradGuard no_grad;
    states.push_back(model.make_state(1));
    ModelInput in;
    in.input_ids = at::arange(w + 2, at::kLong).view({1, -1});
    in.routing = {std::make_shared<Routing>(1, w + 2, "attention")};
    in.state = &states.back();
    (void)model.hidden(in);
  }
  const fs::path path = folder / "s.safetensors";
  const auto read = [&] {
    const State s = load_state(model, path);
    const int64_t length = s.lengths()[0];
    ASSERT_TRUE(length >= 2 && length < 2 + kWriters) << length;
    const auto mine = s.tensors(), theirs = states[static_cast<size_t>(length - 2)].tensors();
    ASSERT_EQ(mine.size(), theirs.size());
    for (size_t i = 0; i < mine.size(); ++i) EXPECT_TRUE(at::equal(mine[i].second, theirs[i].second)) << mine[i].first;
  };
  write_at_once([&](int w) { save_state(model, states[static_cast<size_t>(w)], path); }, read);
  EXPECT_EQ(entries(folder.path()), 1u);
}

// Files that belong together, of two different texts: who opens them finds one of the sets, or is told in one line that the parts do not belong together.
TEST(ConcurrentWriters, DataSets) {
  const TemporaryFolder folder;
  std::vector<std::vector<TextFile>> texts;
  for (int w = 0; w < kWriters; ++w) {
    const fs::path path = folder / fmt::format("{}.jsonl", w);
    std::ofstream out(path);
    for (int i = 0; i < 20 + w; ++i) out << fmt::format("{{\"text\": \"Document {} of writer {}.\"}}\n", i, w);
    out.close();
    texts.push_back(list_text_files(path, {}));
  }
  const auto tokenizer = make_byte_tokenizer();
  DatasetOptions o;
  o.valid = 0.2;
  o.overwrite = true;
  o.progress = false;
  int opened = 0;
  const auto read = [&] {
    try {
      const Dataset d = open_dataset(folder / "set");
      d.train->verify();
      d.valid->verify();
      EXPECT_EQ(d.info.train.documents + d.info.valid.documents, d.train->documents() + d.valid->documents());
      ++opened;
    } catch (const Error& e) {
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos) << e.what();
    }
  };
  write_at_once([&](int w) { (void)build_dataset(texts[static_cast<size_t>(w)], *tokenizer, folder / "set", o); }, read);
  EXPECT_EQ(entries(folder / "set"), 4u);
  EXPECT_GT(opened, 0);
  (void)build_dataset(texts[0], *tokenizer, folder / "set", o);  // and the next build makes it whole
  opened = 0;
  read();
  EXPECT_EQ(opened, 1);
}

// Two programs make one folder: one of them does, the other says that it is there, and the folder is whole.
TEST(ConcurrentWriters, ExportsOfTwoPrograms) {
  const TemporaryFolder folder;
  ModelConfig c = small_model();
  c.layer_mixers = {{"attention"}};
  c.layer.conv = c.layer.gate = c.layer.head_norm = false;
  LanguageModel model(c);
  model.initialize(1);
  save_model(model, folder / "ours");
  ProgramResult results[2];
  std::thread other([&] { results[1] = run({"export", (folder / "ours").string(), "--out", (folder / "hf").string()}); });
  results[0] = run({"export", (folder / "ours").string(), "--out", (folder / "hf").string()});
  other.join();
  int made = 0;
  for (const auto& r : results) {
    made += r.exit_code == 0;
    if (r.exit_code == 0) continue;
    EXPECT_EQ(r.exit_code, 1);
    EXPECT_THAT(r.err, ::testing::HasSubstr("hf"));
    EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
  }
  EXPECT_EQ(made, 1);
  EXPECT_EQ(entries(folder.path()), 2u);
  EXPECT_EQ(SafetensorsReader(folder / "hf" / "model.safetensors").tensors().size(), named_parameters(model).size());
}

}  // namespace
}  // namespace oryx::test
