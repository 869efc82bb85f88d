// `oryx train` in several processes: started by itself, by a launcher's variables, stopped, killed, and refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>

#include "oryx/common/file.h"
#include "tests/support/folder.h"
#include "tests/support/paths.h"
#include "tests/support/program.h"

namespace oryx::test {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using ::testing::StartsWith;

class Processes : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string text;
    for (int i = 0; i < 300; ++i) text += "line " + std::to_string(i * 7919 % 1000) + (i % 5 == 4 ? "\n\n" : " of a text; ");
    fs::create_directory(folder_ / "text");
    for (int i = 0; i < 8; ++i) write_file(folder_ / "text" / (std::to_string(i) + ".txt"), text.substr(static_cast<size_t>(i) * 100));
    ASSERT_EQ(run({"tokenizer", "train", path("text"), "--vocab-size", "330", "--out", path("t.model")}).exit_code, 0);
    ASSERT_EQ(run({"data", "build", path("text"), "--tokenizer", path("t.model"), "--out", path("data")}).exit_code, 0);
  }
  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  std::vector<std::string> command(const std::string& out, const std::vector<std::string>& more) const {
    std::vector<std::string> all = {"train",          "data=" + path("data"), "out=" + path(out), "model.num_layers=1", "model.hidden_size=32",  "model.head_dim=8", "model.intermediate_size=48",
                                    "warmup_steps=2", "batch_size=4",         "seq_len=32",       "chunk=8",            "validate_tokens=100", "log_every=1"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  ProgramResult train(const std::string& out, const std::vector<std::string>& more, const std::map<std::string, std::string>& env = {}) const {
    ProgramOptions o;
    o.env = env;
    o.env["OMP_NUM_THREADS"] = "1";
    return run(command(out, more), o);
  }
  // Runs a Python script on a training of many steps: `begin()` starts it and returns the launcher and the ranks' process numbers once it has logged steps.
  ProgramResult script(const std::string& text, const std::vector<std::string>& words) const {
    std::vector<std::string> all = {"python3", "-c", R"py(
import os, signal, subprocess, sys, time
out, program = sys.argv[1], sys.argv[2:]
def begin():
    p = subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not os.path.exists(out + "/metrics.jsonl") or os.path.getsize(out + "/metrics.jsonl") < 500:
        assert p.poll() is None and time.monotonic() < end, p.stderr.read()
        time.sleep(0.01)
    return p, [int(x) for x in open(f"/proc/{p.pid}/task/{p.pid}/children").read().split()]
def gone(pids):
    end = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{x}") and not open(f"/proc/{x}/stat").read().split(") ")[1].startswith("Z") for x in pids):
        assert time.monotonic() < end, pids
        time.sleep(0.01)
)py" + text,
                                    path("run"), program_path()};
    all.insert(all.end(), words.begin(), words.end());
    return run_command(all, {.env = {{"OMP_NUM_THREADS", "1"}}});
  }

  TemporaryFolder folder_;
};

TEST_F(Processes, OneCommandTrainsInTwo) {
  const auto two = train("two", {"steps=4", "--processes", "2"});
  EXPECT_EQ(two.exit_code, 0) << two.err;
  EXPECT_THAT(two.out, StartsWith("4 steps, 512 tokens"));  // said once, of all
  EXPECT_THAT(two.out, HasSubstr("held-out perplexity"));
  ASSERT_EQ(train("one", {"steps=4"}).exit_code, 0);
  // The run's config does not know of processes: one goes on where two stopped.
  EXPECT_EQ(read_file(path("one/config.json")).size(), read_file(path("two/config.json")).size());
  const auto more = run({"train", "--resume", path("two"), "steps=5"});
  EXPECT_EQ(more.exit_code, 0) << more.err;
  EXPECT_THAT(more.out, StartsWith("5 steps, 128 tokens"));
  EXPECT_EQ(fs::read_symlink(path("two/model")), "checkpoints/step-000000005");
}

TEST_F(Processes, CtrlCSavesOnceAndAllLeave) {
  const auto r = script(R"py(
p, ranks = begin()
assert len(ranks) == 2, ranks
p.send_signal(signal.SIGINT)
o, e = p.communicate()
assert p.returncode == 130 and e.count("oryx: error: interrupted at step") == 1 and "--resume" in e and "--processes 2" in e, (p.returncode, e)
gone(ranks)
assert len(os.listdir(out + "/checkpoints")) == 1
print("ok")
)py", command("run", {"steps=1000000", "warmup_steps=10", "validate_every=0", "save_every=1000000", "--processes", "2"}));
  EXPECT_EQ(r.out, "ok\n") << r.err;
}

TEST_F(Processes, ARankThatDiesEndsAllInOneLine) {
  const auto r = script(R"py(
p, ranks = begin()
os.kill(ranks[1], signal.SIGKILL)
o, e = p.communicate()
lines = [l for l in e.splitlines() if "error" in l]
assert p.returncode == 1 and len(lines) == 1 and f"rank 1 (process {ranks[1]}) ended by signal 9" in lines[0], (p.returncode, e)
gone(ranks)
p, ranks = begin()
p.kill()  # the launcher itself
gone(ranks)
print("ok")
)py", command("run", {"steps=1000000", "warmup_steps=10", "validate_every=0", "save_every=1000000", "--processes", "2"}));
  EXPECT_EQ(r.out, "ok\n") << r.err;
}

TEST_F(Processes, AsALauncherStartsThem) {
  std::vector<std::string> all = {"python3", "-c", R"py(
import os, socket, subprocess, sys
s = socket.socket(); s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]; s.close()
def start(rank, *more):
    env = dict(os.environ, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    return subprocess.Popen(sys.argv[1:] + list(more), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
def ends(*ps): return [(p.communicate(), p.returncode) for p in ps]
(a, ac), (b, bc) = ends(start(0), start(1))
assert ac == bc == 0 and a[0].startswith("4 steps") and b[0] == "", (a, b)
(a, ac), (b, bc) = ends(start(0, "steps=8"), start(1, "steps=9"))
assert ac == bc == 1 and "rank 1 has other options than rank 0" in a[1] and a[1].count("\n") == 1, (a, b)
t = socket.socket(); t.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); t.bind(("0.0.0.0", port)); t.listen()
a, ac = ends(start(0, "steps=8"))[0]
assert ac == 1 and a[1].startswith(f"oryx: error: MASTER_PORT {port}: Address already in use") and a[1].count("\n") == 1, a
print("ok")
)py", program_path()};
  const auto words = command("run", {"steps=4"});
  all.insert(all.end(), words.begin(), words.end());
  const auto r = run_command(all);
  EXPECT_EQ(r.out, "ok\n") << r.err;
}

TEST_F(Processes, WhatCannotBeIsRefusedInOneLine) {
  const auto refused = [&](const std::vector<std::string>& more, const std::map<std::string, std::string>& env = {}) {
    const auto r = train("refused", more, env);
    EXPECT_EQ(r.exit_code, 1);
    EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
    EXPECT_FALSE(fs::exists(path("refused")));
    return r.err;
  };
  EXPECT_THAT(refused({"--processes", "3"}), HasSubstr("batch_size 4 rows cannot be divided over 3 processes"));
  EXPECT_THAT(refused({"--processes", "0"}), HasSubstr("--processes: '0'"));
  EXPECT_THAT(refused({"--processes", "2", "device=cuda:1"}), HasSubstr("device"));
  EXPECT_THAT(refused({}, {{"WORLD_SIZE", "x"}}), HasSubstr("WORLD_SIZE is 'x'"));
  EXPECT_THAT(refused({}, {{"WORLD_SIZE", "2"}}), HasSubstr("RANK is not"));
  EXPECT_THAT(refused({"--processes", "2"}, {{"WORLD_SIZE", "2"}, {"RANK", "0"}, {"MASTER_ADDR", "localhost"}, {"MASTER_PORT", "1"}}), HasSubstr("leave the option out"));
}

}  // namespace
}  // namespace oryx::test
