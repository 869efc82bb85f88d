#include "tests/support/program.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <stdexcept>

#include "tests/support/paths.h"

extern char** environ;

namespace oryx::test {

namespace {

// A nameless file: output of any length, with no pipe that could fill up.
class TemporaryFile {
 public:
  TemporaryFile() : file_(std::tmpfile()) {
    if (file_ == nullptr) throw std::runtime_error("cannot create a temporary file");
  }
  ~TemporaryFile() { std::fclose(file_); }
  int fd() const { return ::fileno(file_); }
  void fill(const std::string& text) {
    std::fwrite(text.data(), 1, text.size(), file_);
    std::rewind(file_);
  }
  std::string read() {
    std::string text;
    std::rewind(file_);
    for (int c; (c = std::fgetc(file_)) != EOF;) text += static_cast<char>(c);
    return text;
  }

 private:
  std::FILE* file_;
};

std::vector<std::string> environment(const std::map<std::string, std::string>& added) {
  std::vector<std::string> all;
  for (char** e = environ; *e != nullptr; ++e) {
    const std::string entry = *e;
    if (added.count(entry.substr(0, entry.find('='))) == 0) all.push_back(entry);
  }
  for (const auto& [name, value] : added) all.push_back(name + "=" + value);
  return all;
}

std::vector<char*> pointers(std::vector<std::string>& strings) {
  std::vector<char*> out;
  for (auto& s : strings) out.push_back(s.data());
  out.push_back(nullptr);
  return out;
}

}  // namespace

ProgramResult run_command(const std::vector<std::string>& command, const ProgramOptions& options) {
  TemporaryFile in, out, err;
  in.fill(options.input);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, in.fd(), 0);
  if (options.stdout_path.empty()) {
    posix_spawn_file_actions_adddup2(&actions, out.fd(), 1);
  } else {
    posix_spawn_file_actions_addopen(&actions, 1, options.stdout_path.c_str(), O_WRONLY, 0);
  }
  posix_spawn_file_actions_adddup2(&actions, err.fd(), 2);
  if (!options.folder.empty()) posix_spawn_file_actions_addchdir_np(&actions, options.folder.c_str());

  std::vector<std::string> words = command, env = environment(options.env);
  pid_t pid = 0;
  const int error =
      posix_spawnp(&pid, words[0].c_str(), &actions, nullptr, pointers(words).data(), pointers(env).data());
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) throw std::runtime_error("cannot start " + command[0]);

  int status = 0;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), out.read(), err.read()};
}

ProgramResult run(const std::vector<std::string>& args, const ProgramOptions& options) {
  std::vector<std::string> command = {test::program_path()};
  command.insert(command.end(), args.begin(), args.end());
  return run_command(command, options);
}

ProgramResult run_interrupted(const std::vector<std::string>& args, const std::string& when, double delay) {
  const std::string script = "out=$(mktemp); \"$0\" \"$@\" > $out & "
                             "while kill -0 $! && ! { grep -q '^SigCgt:.*[2367abef]$' /proc/$!/status && " + when + "; }; do sleep 0.005; done; "
                             "sleep " + std::to_string(delay) + "; kill -INT $!; wait $!; code=$?; cat $out; rm $out; exit $code";
  std::vector<std::string> command = {"bash", "-c", script, program_path()};
  command.insert(command.end(), args.begin(), args.end());
  return run_command(command);
}

}  // namespace oryx::test
