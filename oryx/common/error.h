// Errors that a user can cause. The program prints what() as one line and exits with 1; a library user catches oryx::Error.
//
// A message says what was found, where, what was expected and what to do, in one line:
//     model.safetensors: tensor 'embed.weight' is F16 [100, 64], expected F32 [97, 64]; is this the checkpoint of another config?
// Misuse of the library by its own code is TORCH_CHECK or assert instead.
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace oryx {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Ctrl-C (or SIGTERM) was seen at a point where the work can stop cleanly. The program exits with 130.
class Interrupted : public Error {
 public:
  using Error::Error;
};

template <typename... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(fmt::format(format, std::forward<Args>(args)...));
}

// Throws Error with the system's word for errno: "PATH: cannot WHAT: No space left on device".
[[noreturn]] void fail_errno(std::string_view path, std::string_view what);

// The candidate nearest to `word` by edit distance, or "" when none is near (more than a third of the letters differ).
std::string nearest(std::string_view word, const std::vector<std::string>& candidates);

// ". Did you mean 'x'?" or "", to append to a message about an unknown name.
std::string did_you_mean(std::string_view word, const std::vector<std::string>& candidates);

}  // namespace oryx
