// Log lines on standard error; standard output belongs to results.
#pragma once

#include <fmt/format.h>

#include <string_view>

namespace oryx::log {

// From now on this process logs nothing: of several that do the same, one speaks.
void say_nothing();
void line(std::string_view level, std::string_view text);
// True the first time `key` is seen in this process; used to say a thing once (a slow path taken, a fallback).
bool first_time(std::string_view key);

template <typename... Args>
void info(fmt::format_string<Args...> format, Args&&... args) {
  line("", fmt::format(format, std::forward<Args>(args)...));
}
template <typename... Args>
void warn(fmt::format_string<Args...> format, Args&&... args) {
  line("warning: ", fmt::format(format, std::forward<Args>(args)...));
}
// Says it once a process: for a slow path that is taken.
template <typename... Args>
void warn_once(fmt::format_string<Args...> format, Args&&... args) {
  const std::string text = fmt::format(format, std::forward<Args>(args)...);
  if (first_time(text)) line("warning: ", text);
}

}  // namespace oryx::log
