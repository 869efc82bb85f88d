// `oryx generate --save-session` under Ctrl-C: what was made is saved, and goes on as if it had never been left.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <random>

#include "oryx/common/file.h"
#include "oryx/common/json.h"
#include "oryx/common/random.h"
#include "oryx/data/tokenizer.h"
#include "oryx/model/checkpoint.h"
#include "tests/support/folder.h"
#include "tests/support/paths.h"
#include "tests/support/program.h"

namespace oryx::test {
namespace {

using ::testing::EndsWith;

class InterruptedGenerate : public ::testing::Test {
 protected:
  InterruptedGenerate() {
    ModelConfig c = preset("tiny");
    c.vocab_size = make_byte_tokenizer()->vocab_size();
    LanguageModel m(c);
    m.initialize(1);
    save_model(m, folder_ / "model");
  }
  std::string path(const std::string& name) const { return (folder_ / name).string(); }

  std::vector<std::string> command(const std::vector<std::string>& more) const {
    std::vector<std::string> all = {"generate", path("model"), "--tokenizer", "byte", "--threads", "1", "--temperature", "1", "--top-k", "3", "--seed", "5"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  Json made(const std::vector<std::string>& more) const {
    const auto r = run(command(more));
    EXPECT_EQ(r.exit_code, 0) << r.err;
    return parse_json(r.out, "output");
  }
  // Sends SIGINT `delay` seconds after the program has begun to catch it. The exit code stands on the last line of its output.
  ProgramResult interrupted(const std::vector<std::string>& more, double delay) const {
    const auto words = command(more);
    std::vector<std::string> all = {"bash", "-c",
                                    "delay=$1; shift; \"$0\" \"$@\" & "
                                    "while kill -0 $! && ! grep -q '^SigCgt:.*[2367abef]$' /proc/$!/status; do sleep 0.005; done; sleep $delay; kill -INT $!; wait $!; echo $?",
                                    program_path(), fmt::format("{:.3f}", delay)};
    all.insert(all.end(), words.begin(), words.end());
    return run_command(all);
  }

  TemporaryFolder folder_;
};

TEST_F(InterruptedGenerate, GoesOnAsIfItHadNeverBeenLeft) {
  CounterRng rng(std::random_device{}());
  const std::string session = path("session");
  std::vector<std::vector<int32_t>> texts;
  for (int i = 0; i < 3; ++i) {
    const double delay = 0.02 + 0.3 * rng.uniform();
    SCOPED_TRACE(delay);
    std::filesystem::remove(session);
    const auto first = interrupted({"--prompt", "One two", "--schedule", "attention@prompt,linear@gen", "--max-new-tokens", "100000", "--save-session", session, "--json"},
                                   delay);
    ASSERT_THAT(first.out, EndsWith("}\n130\n")) << first.err;
    const Json a = parse_json(first.out.substr(0, first.out.size() - 4), "output");
    EXPECT_EQ(a["stop"], "interrupted");
    EXPECT_EQ(first.err, fmt::format("oryx: error: interrupted after {} tokens, saved; go on with: oryx generate {} --session {} --prompt ''\n", a["ids"].size(), path("model"), session));
    const Json b = made({"--session", session, "--prompt", "", "--schedule", "attention@prompt,linear@gen", "--max-new-tokens", "12", "--json"});
    EXPECT_EQ(b["stats"]["held_tokens"], 8 + a["ids"].size());
    auto ids = a["ids"].get<std::vector<int32_t>>();
    const auto rest = b["ids"].get<std::vector<int32_t>>();
    ids.insert(ids.end(), rest.begin(), rest.end());
    texts.push_back(ids);
    for (const auto& entry : std::filesystem::directory_iterator(folder_.path())) EXPECT_FALSE(entry.path().filename().string().starts_with(".")) << entry.path();
  }
  size_t longest = 0;
  for (const auto& ids : texts) longest = std::max(longest, ids.size());
  const Json never_left = made({"--prompt", "One two", "--schedule", "attention@prompt,linear@gen", "--max-new-tokens", std::to_string(longest), "--json"});
  const auto all = never_left["ids"].get<std::vector<int32_t>>();
  for (auto& ids : texts) {
    ASSERT_LE(ids.size(), all.size());
    EXPECT_EQ(ids, std::vector<int32_t>(all.begin(), all.begin() + static_cast<int64_t>(ids.size())));
  }
}

TEST_F(InterruptedGenerate, AHalfReadPromptIsNotSaved) {
  write_file(path("prompt"), std::string(30000, 'a'));
  write_file(path("session"), "of before");
  const auto r = interrupted({"--prompt-file", path("prompt"), "--prefill-piece", "1", "--max-new-tokens", "10", "--save-session", path("session")}, 0.05);
  EXPECT_THAT(r.out, EndsWith("\n130\n"));
  EXPECT_EQ(r.err, "oryx: error: interrupted while the prompt was read, no session was saved\n");
  EXPECT_EQ(read_file(path("session")), "of before");
}

// Its reader takes nothing, so that the program cannot even print what it has: a first Ctrl-C waits for that, a second one does not.
TEST_F(InterruptedGenerate, ASecondCtrlCEndsAtOnce) {
  write_file(path("session"), "of before");
  const auto words = command({"--prompt", "a", "--max-new-tokens", "100000", "--save-session", path("session")});
  std::vector<std::string> all = {"python3", "-c", R"(
import fcntl, os, signal, subprocess, sys, time
r, w = os.pipe()
fcntl.fcntl(w, 1031, 4096)  # F_SETPIPE_SZ
os.write(w, bytes(4096))
p = subprocess.Popen(sys.argv[1:], stdout=w)
while not open(f"/proc/{p.pid}/syscall").read().startswith("1 0x1 "):
    assert p.poll() is None
    time.sleep(0.01)
p.send_signal(signal.SIGINT)
time.sleep(0.2)
print(p.poll())
p.send_signal(signal.SIGINT)
print(p.wait() == -signal.SIGINT)
)", program_path()};
  all.insert(all.end(), words.begin(), words.end());
  const auto r = run_command(all);
  EXPECT_EQ(r.out, "None\nTrue\n") << r.err;
  EXPECT_EQ(read_file(path("session")), "of before");
}

}  // namespace
}  // namespace oryx::test
