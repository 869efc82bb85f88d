#include "oryx/bench/exchange.h"

#include <fmt/format.h>

#include <algorithm>

#include "oryx/common/error.h"

namespace oryx {

namespace {

// A text of the server, in one line that is not too long.
std::string in_a_line(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text.size() <= 200 ? text : text.substr(0, 200) + "...";
}

// OpenAI's error objects, or whatever else came.
std::string error_text(const Json& json, const std::string& raw) {
  const Json* error = json.is_object() && json.contains("error") ? &json["error"] : nullptr;
  if (error != nullptr && error->is_object() && error->contains("message") && (*error)["message"].is_string()) return in_a_line((*error)["message"].get<std::string>());
  return in_a_line(raw);
}

// The text of an event's first choice, of either endpoint.
std::string text_of(const Json& choice) {
  const auto string_at = [](const Json& json, const char* key) { return json.is_object() && json.contains(key) && json[key].is_string() ? json[key].get<std::string>() : ""; };
  if (choice.is_object() && choice.contains("delta")) {
    // Models that think aloud write tokens there first.
    const std::string text = string_at(choice["delta"], "content");
    return text.empty() ? string_at(choice["delta"], "reasoning_content") : text;
  }
  return string_at(choice, "text");
}

void take_event(Exchange& e, const std::string& data, double at) {
  if (data == "[DONE]") return void(e.done = true);
  const Json json = Json::parse(data, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return void(e.error = "an event is no JSON object: " + in_a_line(data));
  if (json.contains("error")) return void(e.error = error_text(json, data));
  if (json.contains("usage") && json["usage"].is_object()) {
    const Json& usage = json["usage"];
    if (const auto it = usage.find("prompt_tokens"); it != usage.end() && it->is_number_integer()) e.prompt_tokens = it->get<int64_t>();
    if (const auto it = usage.find("completion_tokens"); it != usage.end() && it->is_number_integer()) e.new_tokens = it->get<int64_t>();
  }
  if (!json.contains("choices") || !json["choices"].is_array() || json["choices"].empty() || text_of(json["choices"][0]).empty()) return;
  e.first < 0 ? void(e.first = at) : e.gaps.push_back(at - e.last);
  e.last = at;
  ++e.pieces;
}

}  // namespace

std::vector<std::string> EventReader::add(std::string_view piece) {
  std::vector<std::string> all;
  for (const char c : piece) {
    if (c != '\n') {
      line_ += c;
      continue;
    }
    if (line_.ends_with('\r')) line_.pop_back();
    if (line_.starts_with("data:")) all.push_back(line_.substr(line_.starts_with("data: ") ? 6 : 5));
    line_.clear();
  }
  return all;
}

Exchange exchange(serve::HttpClient& client, const std::string& path, const Json& body, const std::function<double()>& now) {
  Exchange e;
  EventReader events;
  const std::string text = body.dump();
  e.sent = now();
  const auto reply = client.post(path, text, [&](std::string_view piece) {
    const double at = now();
    for (const std::string& data : events.add(piece)) {
      if (e.error.empty()) take_event(e, data, at);
    }
    return e.error.empty();
  });
  if (reply.status != 200 && reply.status != 0) {
    e.error = fmt::format("{}: {}", reply.status, error_text(Json::parse(reply.body, nullptr, false), reply.body));
  } else if (e.error.empty() && !e.done) {
    e.error = !reply.failure.empty() ? reply.failure : "the answer ended without [DONE]; does the server stream?";
  } else if (e.error.empty() && e.first < 0) {
    e.error = "the answer has no text";
  }
  e.done = e.error.empty();
  return e;
}

}  // namespace oryx
