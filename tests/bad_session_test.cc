// Session files that were cut, made by hand or meant for another model, and the one line that each must give.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/io/safetensors.h"
#include "oryx/model/state_file.h"
#include "tests/support/folder.h"
#include "tests/support/readers.h"

namespace oryx::test {
namespace {

using ::testing::HasSubstr;

// A good session of 6 tokens with checkpoints at 2, 4 and 6, to be spoilt.
class BadSession : public ::testing::Test {
 protected:
  BadSession() {
    const LanguageModel& m = session_model();
    const at::NoGradGuard no_grad;
    State state = m.make_state(1, {2, 0, true});
    for (int64_t t = 0; t < 6; t += 2) {
      ModelInput in;
      in.input_ids = at::arange(t, t + 2, at::kLong).view({1, 2});
      in.routing = {std::make_shared<Routing>(1, 2, "attention")};
      in.state = &state;
      (void)m.hidden(in);
    }
    save_state(m, state, path());
    const SafetensorsReader file(path());
    for (const auto& [name, info] : file.tensors()) tensors_.emplace_back(name, file.load(name));
    metadata_ = file.metadata();
  }
  std::filesystem::path path() const { return folder_ / "s.safetensors"; }
  at::Tensor& tensor(const std::string& name) {
    const auto it = std::find_if(tensors_.begin(), tensors_.end(), [&](const auto& t) { return t.first == name; });
    if (it == tensors_.end()) throw std::runtime_error("no tensor " + name);
    return it->second;
  }
  void expect_refused(const std::string& message) {
    try {
      (void)load_state(session_model(), path());
      ADD_FAILURE() << "was loaded, expected: " << message;
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), HasSubstr(message));
      EXPECT_THAT(e.what(), ::testing::StartsWith(path().string()));
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos) << e.what();
      EXPECT_LT(std::string(e.what()).size(), 2000u);
    }
  }
  void expect_refused_with(const std::string& key, const std::string& value, const std::string& message) {
    auto changed = metadata_;
    changed[key] = value;
    write_safetensors(path(), tensors_, changed);
    SCOPED_TRACE(key + " = " + value.substr(0, 100));
    expect_refused(message);
  }

  TemporaryFolder folder_;
  NamedTensors tensors_;
  std::map<std::string, std::string> metadata_;
};

TEST_F(BadSession, IsFineUntouched) {
  write_safetensors(path(), tensors_, metadata_);
  const State state = load_state(session_model(), path());
  EXPECT_EQ(state.lengths()[0], 6);
  EXPECT_EQ(state.checkpoints()[0], (std::vector<int64_t>{2, 4, 6}));
}

TEST_F(BadSession, Metadata) {
  expect_refused_with("format", "oryx-state 99", "its format is 'oryx-state 99', expected 'oryx-state 1'; another version of oryx wrote it");
  expect_refused_with("format", "two\nlines" + std::string(5000, 'x'), "its format is 'two lines");
  expect_refused_with("model", "0123456789abcdef", "is the session of another model (fingerprint 0123456789abcdef");
  expect_refused_with("lengths", "", "holds no sequence");
  expect_refused_with("lengths", "-6", "'lengths' in its metadata is '-6', expected integers");
  expect_refused_with("lengths", "6;6", "'lengths' in its metadata is '6;6', expected integers");
  expect_refused_with("lengths", "99999999999999999999", "expected integers of 0 to");
  expect_refused_with("lengths", "7", "is missing or not of 7 tokens");
  expect_refused_with("lengths", "6,6", "rows_from of 1 sequences, expected 2");
  expect_refused_with("checkpoints", "2,9", "a checkpoint at 9 in a sequence of 6 tokens");
  expect_refused_with("checkpoints", "4,2", "a checkpoint at 2 in a sequence of 6 tokens, after one at 4");
  expect_refused_with("checkpoints", "2,3,4,6", "is missing");
  expect_refused_with("checkpoint_every", "often", "'checkpoint_every' in its metadata is 'often', expected integers");
  expect_refused_with("checkpoint_every", "2,2", "'checkpoint_every' in its metadata is '2,2', expected one integer");
  expect_refused_with("ring", std::string(100000, '7'), "'ring' in its metadata is '777");
  expect_refused_with("ring", "1073741824", "its ring of 1073741824 tokens and pages of");
  for (const char* key : {"format", "model", "lengths", "checkpoints", "checkpoint_every", "ring", "keep_rows", "drop_rows"}) {
    auto changed = metadata_;
    changed.erase(key);
    write_safetensors(path(), tensors_, changed);
    expect_refused(fmt::format("no '{}' in its metadata, expected a session file written by oryx", key));
  }
}

TEST_F(BadSession, Tensors) {
  const auto with = [&](const std::string& name, const at::Tensor& value, const std::string& message) {
    const at::Tensor old = tensor(name);
    tensor(name) = value;
    write_safetensors(path(), tensors_, metadata_);
    SCOPED_TRACE(name);
    expect_refused(message);
    tensor(name) = old;
  };
  with("sequence0.0.gated_delta_net.S", at::zeros({2, 4, 5}), "is F32 [2, 4, 5], expected F32 [2, 4, 4]");
  with("sequence0.1.mamba2.S", at::zeros({2, 4, 4}, at::kBFloat16), "is BF16 [2, 4, 4], expected F32 [2, 4, 4]");
  with("sequence0.0.keys", at::zeros({5, 2, 4}), "'sequence0.0.keys' is missing or not of 6 tokens");
  with("sequence0.0.keys", at::zeros({}), "'sequence0.0.keys' is missing or not of 6 tokens");
  with("sequence0.0.values", at::zeros({6, 4, 2}), "expected F32 [6, 2, 4]");
  const NamedTensors whole = tensors_;
  for (size_t i = 0; i < whole.size(); ++i) {
    tensors_ = whole;
    tensors_.erase(tensors_.begin() + static_cast<int64_t>(i));
    write_safetensors(path(), tensors_, metadata_);
    SCOPED_TRACE(whole[i].first);
    expect_refused("is missing");
  }
}

TEST_F(BadSession, EndOfText) {
  tensors_.emplace_back("end.logits", at::arange(16, at::kFloat));
  tensors_.emplace_back("end.ids", at::tensor({3, 15}, at::kInt));
  write_safetensors(path(), tensors_, metadata_);
  TextEnd end;
  (void)load_state(session_model(), path(), 0, &end);
  EXPECT_TRUE(end.logits.equal(at::arange(16, at::kFloat)));
  EXPECT_EQ(end.ids, (std::vector<int32_t>{3, 15}));

  const auto with = [&](const std::string& name, const at::Tensor& value, const std::string& message) {
    const at::Tensor old = tensor(name);
    tensor(name) = value;
    write_safetensors(path(), tensors_, metadata_);
    try {
      (void)load_state(session_model(), path(), 0, &end);
      ADD_FAILURE() << "was loaded, expected: " << message;
    } catch (const Error& e) {
      EXPECT_EQ(std::string(e.what()), path().string() + ": " + message);
    }
    tensor(name) = old;
  };
  with("end.logits", at::zeros({15}), "tensor 'end.logits' is F32 [15], expected F32 [16]");
  with("end.logits", at::zeros({16}, at::kBFloat16), "tensor 'end.logits' is BF16 [16], expected F32 [16]");
  with("end.ids", at::zeros({17}, at::kInt), "tensor 'end.ids' is I32 [17], expected I32 [16] at most");
  with("end.ids", at::zeros({2}, at::kLong), "tensor 'end.ids' is I64 [2], expected I32 [16] at most");
  with("end.ids", at::tensor({3, 16}, at::kInt), "tensor 'end.ids' holds the token 16, expected 0 to 15");
  with("end.ids", at::tensor({-1}, at::kInt), "tensor 'end.ids' holds the token -1, expected 0 to 15");
  tensors_.pop_back();
  with("end.logits", at::zeros({16}), "has one of 'end.logits' and 'end.ids', expected both or none");
}

TEST_F(BadSession, Files) {
  const std::string whole = read_file(path());
  for (const auto& [bytes, message] : std::vector<std::pair<std::string, std::string>>{
           {"", "0 bytes are too few for a safetensors file"},
           {whole.substr(0, whole.size() / 2), "truncated?"},
           {whole.substr(0, whole.size() - 1), "truncated?"},
           {"not a session at all", "is this a safetensors file?"}}) {
    write_file(path(), bytes);
    expect_refused(message);
  }
  write_safetensors(path(), {{"a", at::zeros({2})}});
  expect_refused("no 'format' in its metadata, expected a session file written by oryx");
}

}  // namespace
}  // namespace oryx::test
