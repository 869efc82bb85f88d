#include "oryx/cli/command.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <fmt/ranges.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <new>
#include <system_error>

#include "oryx/common/error.h"
#include "oryx/common/progress.h"
#include "oryx/parallel/launcher.h"

namespace oryx::cli {

namespace {

std::vector<Command>& registry() {
  static std::vector<Command> all;
  return all;
}

void output_failed(int code) {
  if (code == EPIPE) throw OutputClosed{};
  errno = code;
  fail_errno("standard output", "write");
}

}  // namespace

std::vector<Command> commands() {
  std::vector<Command> all = registry();
  std::sort(all.begin(), all.end(), [](const Command& a, const Command& b) { return a.name < b.name; });
  return all;
}

Registration::Registration(const char* name, const char* summary, void (*setup)(CLI::App&)) {
  registry().push_back({name, summary, setup});
}

void write(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size()) output_failed(errno);
}

void flush() {
  if (std::fflush(stdout) != 0) output_failed(errno);
}

CLI::Validator integer(int64_t least) {
  CLI::Validator check;
  check.operation([least](std::string& text) {
    int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error == std::errc() && end == text.data() + text.size() && value >= least) return std::string();
    return fmt::format("'{}', expected an integer{} that fits into 64 bits", text, least == INT64_MIN ? "" : fmt::format(" of at least {}", least));
  });
  return check;
}

namespace {

// The app of the innermost subcommand that was given.
CLI::App& innermost(CLI::App& app) {
  CLI::App* at = &app;
  while (!at->get_subcommands().empty()) at = at->get_subcommands().back();
  return *at;
}

// "oryx tokenizer train"
std::string full_name(const CLI::App& app) {
  const CLI::App* parent = app.get_parent();
  return parent == nullptr ? app.get_name() : full_name(*parent) + " " + app.get_name();
}

std::vector<std::string> option_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* at = &app; at != nullptr; at = at->get_parent()) {
    for (const CLI::Option* o : at->get_options()) {
      for (const auto& n : o->get_lnames()) names.push_back("--" + n);
    }
  }
  return names;
}

std::vector<std::string> command_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* s : app.get_subcommands([](const CLI::App*) { return true; })) names.push_back(s->get_name());
  return names;
}

// What is wrong with an argument that nothing took.
std::string about_unknown(const CLI::App& app, const std::string& argument) {
  if (argument.starts_with("-") && argument.size() > 1) {
    const std::string name = argument.substr(0, argument.find('='));
    const std::string hint = did_you_mean(name, option_names(app));
    // Such a command has keys beside its options: `oryx train steps=5`.
    const bool keys = hint.empty() && app.get_option_no_throw("overrides") != nullptr;
    return fmt::format("unknown option '{}' of {}{}", name, full_name(app),
                       !hint.empty() ? hint : fmt::format("; {}see {} --help", keys ? fmt::format("a key is written without dashes, {}=VALUE; ", name.substr(name.find_first_not_of('-'))) : "", full_name(app)));
  }
  const std::vector<std::string> names = command_names(app);
  if (names.empty()) return fmt::format("unexpected argument '{}'; see {} --help", argument, full_name(app));
  const std::string hint = did_you_mean(argument, names);
  return fmt::format("unknown command '{}' of {}{}", argument, full_name(app),
                     hint.empty() ? fmt::format("; expected one of: {}", fmt::join(names, ", ")) : hint);
}

std::string one_line(std::string_view text) {
  std::string line;
  for (const char c : text) line += c == '\n' || c == '\r' ? ' ' : c;
  line.erase(line.find_last_not_of(' ') + 1);
  return line;
}

std::string first_line(std::string_view text) { return std::string(text.substr(0, text.find('\n'))); }

[[noreturn]] void fail_parse(CLI::App& app, const CLI::ParseError& e) {
  const CLI::App& inner = innermost(app);
  const std::vector<std::string> unknown = app.remaining(true);
  if (!unknown.empty()) throw Error(about_unknown(inner, unknown.front()));
  const std::vector<std::string> names = command_names(inner);
  if (!names.empty() && dynamic_cast<const CLI::RequiredError*>(&e) != nullptr) {
    fail("{} is given no command; expected one of: {}; see {} --help", full_name(inner), fmt::join(names, ", "),
         full_name(inner));
  }
  fail("{}; see {} --help", one_line(e.what()), full_name(inner));
}

// The help of a command does not list what all of them take.
void name_common_options(CLI::App& app) {
  const auto inner = app.get_subcommands([](const CLI::App*) { return true; });
  for (CLI::App* s : inner) name_common_options(*s);
  if (inner.empty()) app.footer("As every command: --threads N, CPU threads to use (default: all cores)");
}

void parse_and_run(std::vector<std::string> arguments) {
  CLI::App app("Multi-mixer language models: softmax attention and linear recurrences that share one set of weights.",
               "oryx");
  app.fallthrough();
  app.require_subcommand(0, 1);
  app.set_version_flag("--version", fmt::format("oryx {} (libtorch {})", ORYX_VERSION, TORCH_VERSION));
  app.add_option_function<int>(
         "--threads", [](const int& n) { at::set_num_threads(n); }, "CPU threads to use (default: all cores)")
      ->check(CLI::Range(1, 4096))
      ->type_name("N");
  for (const Command& c : commands()) {
    CLI::App* command = app.add_subcommand(c.name, c.summary);
    c.setup(*command);
    name_common_options(*command);
  }
  if (!arguments.empty() && arguments.front() == "help") {  // as `git help` and others have it
    arguments.erase(arguments.begin());
    arguments.emplace_back("--help");
  }
  std::reverse(arguments.begin(), arguments.end());  // CLI11 takes them from the back
  try {
    app.parse(std::move(arguments));
  } catch (const CLI::CallForHelp&) {
    return write(app.help());
  } catch (const CLI::CallForVersion& e) {
    return write(std::string(e.what()) + "\n");
  } catch (const CLI::ParseError& e) {
    fail_parse(app, e);
  }
  if (app.get_subcommands().empty()) {
    fail("no command given; expected one of: {}; see oryx --help", fmt::join(command_names(app), ", "));
  }
}

int report(int code, std::string_view what) {
  if (report_to_launcher(code, one_line(what))) return code;
  ProgressBar::wipe_line();
  std::fputs(fmt::format("oryx: error: {}\n", one_line(what)).c_str(), stderr);
  return code;
}

// libtorch's CPU allocator has no exception type of its own.
bool is_out_of_memory(const c10::Error& e) {
  return dynamic_cast<const c10::OutOfMemoryError*>(&e) != nullptr ||
         std::string_view(e.what()).find("can't allocate memory") != std::string_view::npos;
}

constexpr int kOutputClosed = 141;

// "DefaultCPUAllocator: can't allocate memory: you tried to allocate 16000000000 bytes. Error code 12 ..." in a user's words.
std::string about_memory(const std::string& line) {
  constexpr std::string_view kAsked = "you tried to allocate ";
  const size_t at = line.find(kAsked);
  if (at == std::string::npos) return line;
  double bytes = 0;
  const char* digits = line.data() + at + kAsked.size();
  if (std::from_chars(digits, line.data() + line.size(), bytes).ec != std::errc()) return line;
  return human_bytes(bytes) + " were asked for at once; use fewer or shorter inputs, or a smaller model";
}

// Runs `f` and turns what it throws into a line and an exit code.
template <typename F>
int guarded(F&& f) {
  try {
    f();
    return 0;
  } catch (const OutputClosed&) {
    return kOutputClosed;
  } catch (const Interrupted& e) {
    return report(130, e.what());
  } catch (const Error& e) {
    return report(1, e.what());
  } catch (const std::bad_alloc&) {
    return report(1, "out of memory");
  } catch (const c10::Error& e) {
    const std::string line = first_line(e.what_without_backtrace());
    return is_out_of_memory(e) ? report(1, "out of memory: " + about_memory(line)) : report(2, "internal error: " + line);
  } catch (const std::system_error& e) {
    if (e.code() == std::errc::broken_pipe) return kOutputClosed;
    return report(1, e.what());
  } catch (const std::exception& e) {
    return report(2, "internal error: " + first_line(e.what()));
  } catch (...) {
    return report(2, "internal error: an exception of unknown type");
  }
}

}  // namespace

int run_program(std::vector<std::string> arguments) {
  const int code = guarded([&] { parse_and_run(std::move(arguments)); });
  if (code == kOutputClosed) return code;
  if (code != 0) {  // said already, in one line
    std::fflush(stdout);
    return code;
  }
  // What is still in the buffer may meet a full disk or a closed pipe; a result that was not written is no success.
  return guarded([] {
    const bool failed_before = std::ferror(stdout) != 0;
    flush();
    if (failed_before) fail("standard output: an earlier write failed");
  });
}

}  // namespace oryx::cli
