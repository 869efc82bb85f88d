#include "oryx/parallel/launcher.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstring>
#include <fstream>
#include <map>
#include <vector>

#include "oryx/common/error.h"
#include "oryx/parallel/place.h"
#include "oryx/parallel/rendezvous.h"

extern char** environ;

namespace oryx {

namespace {

constexpr std::string_view kConsequence = " is gone: ";  // PeerLost: another process's end is the reason
constexpr auto kGrace = std::chrono::milliseconds(1500);
constexpr int kExitInterrupted = 130;

struct WorkerReport {
  int64_t rank;
  int code;
  std::string text;
};

std::vector<std::string> own_command_line() {
  std::vector<std::string> out;
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  const std::string all{std::istreambuf_iterator<char>(file), {}};
  for (size_t at = 0; at < all.size();) {
    const size_t end = std::min(all.find('\0', at), all.size());
    out.push_back(all.substr(at, end - at));
    at = end + 1;
  }
  return out;
}

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> out;
  for (std::string& t : texts) out.push_back(t.data());
  out.push_back(nullptr);
  return out;
}

// This process's environment with `changes` in place of what it says of them.
std::vector<std::string> environment(const std::map<std::string, std::string>& changes) {
  std::vector<std::string> out;
  for (char** at = environ; *at != nullptr; ++at) {
    const std::string_view entry(*at);
    if (changes.count(std::string(entry.substr(0, entry.find('=')))) == 0) out.emplace_back(entry);
  }
  for (const auto& [name, value] : changes) out.push_back(name + "=" + value);
  return out;
}

sigset_t set_of(std::initializer_list<int> signals) {
  sigset_t set;
  ::sigemptyset(&set);
  for (const int s : signals) ::sigaddset(&set, s);
  return set;
}

class Workers {
 public:
  Workers(int64_t count, int64_t threads) : count_(count), threads_(threads) {
    if (::pipe2(reports_, O_CLOEXEC) != 0) fail_errno("pipe", "open");
    ::fcntl(reports_[0], F_SETFL, O_NONBLOCK);
  }
  ~Workers() {
    signal_all(SIGKILL);
    while (!alive_.empty()) reap(true);
    ::close(reports_[0]);
    ::close(reports_[1]);
  }

  void start(uint16_t port) {
    for (int64_t rank = 0; rank < count_; ++rank) start_one(rank, port);
  }

  void watch(const sigset_t& signals) {
    while (!alive_.empty() && !failed_) {
      const timespec longest{1, 0};
      const int s = ::sigtimedwait(&signals, nullptr, &longest);
      if (s == SIGINT || s == SIGTERM) told_ = true, signal_all(s);
      reap(false);
    }
    if (!failed_ && !interrupted_) return;
    // Others may have noticed too, or may be about to say why: the first cause is wanted.
    for (const auto until = std::chrono::steady_clock::now() + kGrace; !alive_.empty() && std::chrono::steady_clock::now() < until;) {
      ::usleep(20'000);
      reap(false);
    }
    read_reports();
    say();
  }

 private:
  void start_one(int64_t rank, uint16_t port) {
    std::map<std::string, std::string> changes = {{"RANK", std::to_string(rank)},        {"LOCAL_RANK", std::to_string(rank)},
                                                  {"WORLD_SIZE", std::to_string(count_)}, {"LOCAL_WORLD_SIZE", std::to_string(count_)},
                                                  {"MASTER_ADDR", "127.0.0.1"},           {"MASTER_PORT", std::to_string(port)},
                                                  {kLauncherVariable, fmt::format("{} {}", reports_[1], ::getpid())}};
    if (threads_ > 0 && ::getenv("OMP_NUM_THREADS") == nullptr) changes["OMP_NUM_THREADS"] = std::to_string(threads_);
    std::vector<std::string> arguments = own_command_line(), variables = environment(changes);
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attributes;
    ::posix_spawn_file_actions_init(&files);
    ::posix_spawnattr_init(&attributes);
    ::posix_spawn_file_actions_adddup2(&files, reports_[1], reports_[1]);  // onto itself: open beyond exec
    const sigset_t none = set_of({}), ours = set_of({SIGINT, SIGTERM});
    ::posix_spawnattr_setsigmask(&attributes, &none);
    ::posix_spawnattr_setsigdefault(&attributes, &ours);
    // A group of their own: what Ctrl-C sends to the terminal's comes to the launcher alone, which hands it on once.
    ::posix_spawnattr_setpgroup(&attributes, alive_.empty() ? 0 : alive_.begin()->first);
    ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
    pid_t pid = 0;
    const int code = ::posix_spawn(&pid, "/proc/self/exe", &files, &attributes, pointers(arguments).data(), pointers(variables).data());
    ::posix_spawn_file_actions_destroy(&files);
    ::posix_spawnattr_destroy(&attributes);
    if (code != 0) fail("process {} of {} could not be started: {}", rank, count_, std::strerror(code));
    alive_[pid] = rank;
  }

  void signal_all(int signal) {
    for (const auto& [pid, rank] : alive_) ::kill(pid, signal);
  }

  void reap(bool wait) {
    int status = 0;
    pid_t pid = 0;
    while (!alive_.empty() && (pid = ::waitpid(-1, &status, wait ? 0 : WNOHANG)) > 0) {
      const auto it = alive_.find(pid);
      if (it == alive_.end()) continue;
      const int64_t rank = it->second;
      alive_.erase(it);
      if (WIFSIGNALED(status)) killed_.push_back({rank, WTERMSIG(status), fmt::format("{}", pid)});
      const bool interrupted = WIFEXITED(status) && WEXITSTATUS(status) == kExitInterrupted;  // the others leave too, each when it has saved
      if (interrupted) interrupted_ = true;
      else if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) failed_ = true;
      if (WIFEXITED(status) && WEXITSTATUS(status) != 0) codes_[rank] = WEXITSTATUS(status);
    }
  }

  void read_reports() {
    std::string all;
    char bytes[4096];
    for (ssize_t n = 0; (n = ::read(reports_[0], bytes, sizeof bytes)) > 0;) all.append(bytes, static_cast<size_t>(n));
    for (size_t at = 0; at < all.size();) {
      const size_t end = std::min(all.find('\n', at), all.size());
      WorkerReport r{0, 0, {}};
      const char *p = all.data() + at, *last = all.data() + end;
      p = std::from_chars(p, last, r.rank).ptr;
      p = std::from_chars(std::min(p + 1, last), last, r.code).ptr;
      r.text.assign(std::min(p + 1, last), last);
      said_.push_back(std::move(r));
      at = end + 1;
    }
  }

  [[noreturn]] void say() {
    const auto consequence = [](const WorkerReport& r) { return r.text.find(kConsequence) != std::string::npos; };
    const auto cause = std::find_if(said_.begin(), said_.end(), [&](const WorkerReport& r) { return r.code != kExitInterrupted && !consequence(r); });
    if (cause != said_.end()) {
      const bool all_say_so = std::any_of(said_.begin(), said_.end(), [&](const WorkerReport& r) { return r.rank == 0 && r.text == cause->text; });
      throw Error(all_say_so ? cause->text : fmt::format("rank {}: {}", cause->rank, cause->text));
    }
    if (!killed_.empty()) {
      const WorkerReport& k = killed_.front();
      if (told_ && (k.code == SIGINT || k.code == SIGTERM)) throw Interrupted("interrupted twice, not saved; the same command goes on from the last checkpoint");
      fail("rank {} (process {}) ended by signal {} ({}); all {} processes of the run were ended, the same command goes on from its last checkpoint", k.rank, k.text, k.code,
           ::strsignal(k.code), count_);
    }
    const auto interrupted = std::find_if(said_.begin(), said_.end(), [](const WorkerReport& r) { return r.code == kExitInterrupted && r.rank == 0; });
    if (interrupted != said_.end()) throw Interrupted(interrupted->text);
    if (!said_.empty()) throw Error(said_.front().text);
    if (!codes_.empty() && codes_.begin()->second == kExitInterrupted) throw Interrupted("interrupted");
    fail("rank {} ended with code {} and said no more", codes_.empty() ? 0 : codes_.begin()->first, codes_.empty() ? 0 : codes_.begin()->second);
  }

  int64_t count_, threads_;
  int reports_[2] = {-1, -1};
  std::map<pid_t, int64_t> alive_;  // and their ranks
  std::map<int64_t, int> codes_;    // by rank, of those that ended by themselves and not well
  std::vector<WorkerReport> killed_, said_;
  bool failed_ = false, interrupted_ = false;  // some process has ended so
  bool told_ = false;                          // they were sent a signal
};

bool& is_launched() {
  static bool launched = false;
  return launched;
}

// "FD PID" of our launcher.
bool launcher_of_this_process(int* fd, pid_t* pid) {
  const char* text = ::getenv(kLauncherVariable);
  if (text == nullptr) return false;
  const char* end = text + std::strlen(text);
  const auto first = std::from_chars(text, end, *fd);
  return first.ec == std::errc() && first.ptr != end && std::from_chars(first.ptr + 1, end, *pid).ec == std::errc();
}

}  // namespace

void run_processes(int64_t count, int64_t threads) {
  const sigset_t signals = set_of({SIGINT, SIGTERM, SIGCHLD});
  sigset_t before;
  ::pthread_sigmask(SIG_BLOCK, &signals, &before);  // before the meeting's thread begins, which takes the mask over
  struct Restore {
    const sigset_t& mask;
    ~Restore() { ::pthread_sigmask(SIG_SETMASK, &mask, nullptr); }
  } restore{before};
  const Rendezvous meeting(count);
  Workers workers(count, threads);
  workers.start(meeting.port());
  workers.watch(signals);
}

bool begin_launched_process() {
  int fd = 0;
  pid_t launcher = 0;
  if (!launcher_of_this_process(&fd, &launcher)) return false;
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != launcher) {  // it went before we asked, or never was
    constexpr char line[] = "oryx: error: ORYX_LAUNCHER names a process that did not start this one; unset it\n";
    (void)!::write(STDERR_FILENO, line, sizeof line - 1);
    ::_exit(1);
  }
  ::fcntl(fd, F_SETFD, FD_CLOEXEC);
  is_launched() = true;
  return true;
}

bool report_to_launcher(int code, const std::string& text) {
  int fd = 0;
  pid_t launcher = 0;
  if (!is_launched() || !launcher_of_this_process(&fd, &launcher)) return false;
  const char* rank = ::getenv("RANK");
  const std::string line = fmt::format("{} {} {}\n", rank == nullptr ? "0" : rank, code, text.substr(0, 3000));  // less than a pipe takes at once
  return ::write(fd, line.data(), line.size()) == static_cast<ssize_t>(line.size());
}

}  // namespace oryx
