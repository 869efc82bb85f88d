// The registry of subcommands: one file in oryx/cli/ a subcommand, which registers itself and is found by main.
//
//     struct Options { std::string folder; bool json = false; };
//
//     void count(const Options& o) { print("{} files in {}\n", n, o.folder); }
//
//     ORYX_COMMAND(count, "count the files of a folder", [](CLI::App& app) {
//       auto o = std::make_shared<Options>();  // lives as long as the callback that holds it
//       app.add_option("folder", o->folder, "the folder")->required();
//       app.add_flag("--json", o->json, "print JSON");
//       app.callback([o] { count(*o); });
//     });
//
// A command that has subcommands of its own adds them with app.add_subcommand and app.require_subcommand(1). Errors are
// thrown (oryx::fail); main prints them as one line. Options of the whole program (--threads) are accepted behind a
// subcommand too.
#pragma once

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace oryx::cli {

struct Command {
  std::string name, summary;
  void (*setup)(CLI::App& app);  // adds the options and the callback
};

// Every registered command, sorted by name.
std::vector<Command> commands();

struct Registration {
  Registration(const char* name, const char* summary, void (*setup)(CLI::App&));
};

// Thrown when the reader of standard output is gone (`oryx ... | head`): the program ends quietly with 141, as the
// shell expects.
struct OutputClosed {};

// Writes to standard output; throws OutputClosed or oryx::Error (disk full). Results go here, everything else to
// standard error.
void write(std::string_view text);
// Makes what was written visible now (streamed tokens).
void flush();

template <typename... Args>
void print(fmt::format_string<Args...> format, Args&&... args) {
  write(fmt::format(format, std::forward<Args>(args)...));
}

// A check for integers of at least `least`. Without one CLI11 takes the nearest that 64 bits hold of what they do not.
CLI::Validator integer(int64_t least = INT64_MIN);

// Parses the arguments (without the program's name) and runs the command; returns the exit code. Errors are printed:
// 0 done, 1 the user's error, 2 an internal error, 130 interrupted, 141 the reader of standard output is gone.
int run_program(std::vector<std::string> arguments);

}  // namespace oryx::cli

// The name is an identifier, the last argument a function of CLI::App&.
#define ORYX_COMMAND(name, summary, ...) \
  static const ::oryx::cli::Registration oryx_command_##name(#name, summary, __VA_ARGS__)
