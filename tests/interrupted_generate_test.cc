// `oryx generate --save-session` under Ctrl-C: what was made is saved, and goes on as if it had never been left.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>
#include <random>

#include "oryx/common/file.h"
#include "oryx/common/random.h"
#include "tests/support/byte_model.h"
#include "tests/support/folder.h"
#include "tests/support/paths.h"
#include "tests/support/program.h"

namespace oryx::test {
namespace {

using ::testing::AnyOf;

class InterruptedGenerate : public ::testing::Test {
 protected:
  InterruptedGenerate() { save_byte_model(folder_ / "model"); }
  std::string path(const std::string& name) const { return (folder_ / name).string(); }

  std::vector<std::string> command(const std::vector<std::string>& more) const {
    std::vector<std::string> all = {"generate", path("model"), "--tokenizer", "byte", "--threads", "1", "--temperature", "1", "--top-k", "3", "--seed", "5"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  TemporaryFolder folder_;
};

// At a random time behind the first token. Texts are compared, of random bytes: half a character at the end of one is whole at the beginning of the next.
TEST_F(InterruptedGenerate, GoesOnAsIfItHadNeverBeenLeft) {
  CounterRng rng(std::random_device{}());
  const std::string session = path("session");
  const std::vector<std::string> schedule = {"--schedule", "attention@prompt,linear@gen"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.end(), schedule.begin(), schedule.end());
    return command(more);
  };
  for (int i = 0; i < 3; ++i) {
    const double delay = 0.3 * rng.uniform();
    SCOPED_TRACE(delay);
    const auto first = run_interrupted(with({"--prompt", "One two", "--max-new-tokens", "100000", "--save-session", session}), "[ -s $out ]", delay);
    ASSERT_EQ(first.exit_code, 130) << first.err;
    int tokens = 0, read = 0;
    ASSERT_EQ(std::sscanf(first.err.c_str(), "oryx: error: interrupted after %d tokens, saved%n", &tokens, &read), 1) << first.err;
    EXPECT_EQ(first.err.substr(static_cast<size_t>(read)), fmt::format("; go on with: oryx generate {} --session {} --prompt ''\n", path("model"), session));
    const auto rest = run(with({"--session", session, "--prompt", "", "--max-new-tokens", "12"}));
    const auto whole = run(with({"--prompt", "One two", "--max-new-tokens", std::to_string(tokens + 12)}));
    ASSERT_EQ(rest.exit_code, 0) << rest.err;
    EXPECT_EQ(whole.out, first.out.substr(0, first.out.size() - 1) + rest.out);
    for (const auto& entry : std::filesystem::directory_iterator(folder_.path())) EXPECT_FALSE(entry.path().filename().string().starts_with(".")) << entry.path();
    std::filesystem::remove(session);
  }
}

TEST_F(InterruptedGenerate, AHalfReadPromptIsNotSaved) {
  write_file(path("prompt"), std::string(100000, 'a'));
  write_file(path("session"), "of before");
  // A second of processor time: the prompt takes minutes of it. A program that has not begun yet (with sanitizers) says less.
  const auto r = run_interrupted(command({"--prompt-file", path("prompt"), "--prefill-piece", "1", "--max-new-tokens", "10", "--save-session", path("session")}),
                                 "awk '{exit $14 + $15 < 100}' /proc/$!/stat");
  EXPECT_EQ(r.exit_code, 130);
  EXPECT_THAT(r.err, AnyOf("oryx: error: interrupted while the prompt was read, no session was saved\n", "oryx: error: interrupted\n"));
  EXPECT_EQ(read_file(path("session")), "of before");
}

// Its reader takes nothing, so that the program cannot even print what it has: a first Ctrl-C waits for that, a second one does not.
TEST_F(InterruptedGenerate, ASecondCtrlCEndsAtOnce) {
  write_file(path("session"), "of before");
  const auto words = command({"--prompt", "a", "--max-new-tokens", "100000", "--save-session", path("session")});
  std::vector<std::string> all = {"python3", "-c", R"py(
import fcntl, os, re, signal, subprocess, sys, time
r, w = os.pipe()
fcntl.fcntl(w, 1031, 4096)  # F_SETPIPE_SZ
os.write(w, bytes(4096))
p = subprocess.Popen(sys.argv[1:], stdout=w)
while not open(f"/proc/{p.pid}/syscall").read().startswith("1 0x1 "):
    assert p.poll() is None
    time.sleep(0.01)
p.send_signal(signal.SIGINT)
while int(re.search(r"SigCgt:\s*(\w+)", open(f"/proc/{p.pid}/status").read())[1], 16) & 1 << signal.SIGINT - 1:  # until it was taken: two that wait are one
    time.sleep(0.01)
print(p.poll())
p.send_signal(signal.SIGINT)
print(p.wait() == -signal.SIGINT)
)py", program_path()};
  all.insert(all.end(), words.begin(), words.end());
  const auto r = run_command(all);
  EXPECT_EQ(r.out, "None\nTrue\n") << r.err;
  EXPECT_EQ(read_file(path("session")), "of before");
}

}  // namespace
}  // namespace oryx::test
