#include "oryx/serve/completion.h"

#include <random>

#include "oryx/common/utf8.h"

namespace oryx::serve {

namespace {

constexpr int64_t kChatTokens = 512;  // of an answer in a chat that says nothing else

const char* error_type(int status) {
  if (status == 429) return "rate_limit_error";
  return status >= 500 ? "server_error" : "invalid_request_error";
}

[[noreturn]] void wrong(const std::string& field, const Json& found, const char* expected) {
  throw ApiError(400, fmt::format("{} is {}, expected {}", field, describe_json(found), expected), field);
}

// Reads the fields of a body, each by its name; what nobody asked for is an error.
class Fields {
 public:
  explicit Fields(const Json& body) : body_(body) {}

  // Null where it is absent or null.
  const Json* find(const std::string& name) {
    known_.push_back(name);
    const auto it = body_.find(name);
    return it == body_.end() || it->is_null() ? nullptr : &*it;
  }
  void integer(const std::string& name, int64_t& value, int64_t least) {
    const Json* found = find(name);
    if (found == nullptr) return;
    const bool fits = found->is_number_integer() &&
                      !(found->is_number_unsigned() &&
                        found->get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()));
    if (!fits || found->get<int64_t>() < least)
      wrong(name, *found, least == 0 ? "an integer of at least 0" : "an integer of at least 1");
    value = found->get<int64_t>();
  }
  void number(const std::string& name, double& value) {
    const Json* found = find(name);
    if (found == nullptr) return;
    if (!found->is_number()) wrong(name, *found, "a number");
    value = found->get<double>();
  }
  void flag(const std::string& name, bool& value) {
    const Json* found = find(name);
    if (found == nullptr) return;
    if (!found->is_boolean()) wrong(name, *found, "true or false");
    value = found->get<bool>();
  }
  bool text(const std::string& name, std::string& value) {
    const Json* found = find(name);
    if (found == nullptr) return false;
    if (!found->is_string()) wrong(name, *found, "a string");
    value = found->get<std::string>();
    return true;
  }
  // A field of the protocol whose only value served is `only` (or none).
  void only(const std::string& name, const Json& only) {
    const Json* found = find(name);
    if (found != nullptr && *found != only)
      throw ApiError(400,
                     fmt::format("{} is {}, which is not served; expected {} or nothing", name, describe_json(*found),
                                 only.dump()),
                     name);
  }
  void finish() const {
    for (const auto& [name, value] : body_.items()) {
      if (std::find(known_.begin(), known_.end(), name) != known_.end()) continue;
      const std::string hint = did_you_mean(name, known_);
      throw ApiError(400,
                     fmt::format("unknown field '{}'{}", shown(name),
                                 hint.empty() ? fmt::format("; expected {}", fmt::join(known_, ", ")) : hint),
                     shown(name));
    }
  }

 private:
  const Json& body_;
  std::vector<std::string> known_;
};

constexpr const char* kPrompts = "a text, a list of token ids, or a list of texts or of such lists";

std::vector<int32_t> read_ids(const Json& list, const LanguageModel& model) {
  std::vector<int32_t> ids;
  for (const Json& id : list) {
    if (!id.is_number_integer()) wrong("prompt", id, kPrompts);
    const bool known = (!id.is_number_unsigned() || id.get<uint64_t>() < (uint64_t{1} << 31)) &&
                       id.get<int64_t>() >= 0 && id.get<int64_t>() < model.config().vocab_size;
    if (!known)
      throw ApiError(400,
                     fmt::format("prompt: token id {} is outside of the model's vocabulary of {}", id.dump(),
                                 model.config().vocab_size),
                     "prompt");
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

// One prompt, or several of one kind. `framed` becomes the tokens that the tokeniser puts before each text.
std::vector<std::vector<int32_t>> read_prompts(Fields& fields, const LanguageModel& model, const Tokenizer& tokenizer, size_t& framed) {
  const Json* prompt = fields.find("prompt");
  if (prompt == nullptr) throw ApiError(400, fmt::format("prompt is missing; expected {}", kPrompts), "prompt");
  const bool one = prompt->is_string() || (prompt->is_array() && !prompt->empty() && prompt->front().is_number());
  const Json all = one ? Json::array({*prompt}) : *prompt;
  if (!all.is_array() || all.empty()) wrong("prompt", *prompt, kPrompts);
  framed = all.front().is_string() ? 1 : 0;
  std::vector<std::vector<int32_t>> prompts;
  for (const Json& p : all) {
    if (p.is_string() != all.front().is_string() || (!p.is_string() && (!p.is_array() || p.empty()))) wrong("prompt", p, kPrompts);
    prompts.push_back(p.is_string() ? tokenizer.encode_prompt(p.get<std::string>()) : read_ids(p, model));
  }
  return prompts;
}

// A message's content: a text, or a list of parts that are texts.
std::string read_content(const Json* content, const std::string& where) {
  if (content == nullptr) throw ApiError(400, where + ".content is missing; expected a text", where);
  if (content->is_string()) return content->get<std::string>();
  if (!content->is_array()) wrong(where + ".content", *content, "a text, or a list of parts of type text");
  std::string all;
  for (const Json& part : *content) {
    if (!part.is_object() || part.value("type", Json()) != "text" || !part.value("text", Json()).is_string())
      wrong(where + ".content", part, "a text, or a list of parts of type text");
    all += part["text"].get<std::string>();
  }
  return all;
}

std::vector<int32_t> read_messages(Fields& fields, const ChatTemplate& chat, const Tokenizer& tokenizer) {
  const Json* messages = fields.find("messages");
  if (messages == nullptr || !messages->is_array() || messages->empty())
    wrong("messages", messages == nullptr ? Json() : *messages, "a list of messages, each with a role and a content");
  std::vector<ChatMessage> all;
  for (size_t i = 0; i < messages->size(); ++i) {
    const std::string where = fmt::format("messages[{}]", i);
    const Json& message = (*messages)[i];
    if (!message.is_object()) wrong(where, message, "an object with a role and a content");
    Fields inner(message);
    ChatMessage m;
    inner.text("role", m.role);
    if (m.role != "system" && m.role != "user" && m.role != "assistant")
      wrong(where + ".role", message.value("role", Json()), "system, user or assistant");
    m.content = read_content(inner.find("content"), where);
    inner.finish();
    all.push_back(std::move(m));
  }
  return tokenizer.encode_prompt(chat.prompt(all));
}

std::vector<std::string> read_stops(Fields& fields) {
  const Json* stop = fields.find("stop");
  if (stop == nullptr) return {};
  std::vector<std::string> stops;
  for (const Json& s : stop->is_array() ? *stop : Json::array({*stop})) {
    if (!s.is_string() || s.get<std::string>().empty())
      wrong("stop", s, "a text, or a list of up to 16 texts, none empty");
    stops.push_back(s.get<std::string>());
  }
  if (stops.size() > 16) throw ApiError(400, fmt::format("stop has {} texts, expected up to 16", stops.size()), "stop");
  return stops;
}

constexpr int64_t kMostChoices = 128, kMostLikeliest = 20;

// `n`, `logprobs` and their kin.
void read_scores(Fields& fields, Completion& c, bool chat) {
  fields.integer("n", c.n, 1);
  if (c.n > kMostChoices) throw ApiError(400, fmt::format("n is {}, expected 1 to {}", c.n, kMostChoices), "n");
  const auto at_most = [](const char* name, int64_t value) {
    if (value > kMostLikeliest) throw ApiError(400, fmt::format("{} is {}, expected 0 to {}", name, value, kMostLikeliest), name);
  };
  if (chat) {
    bool wanted = false;
    fields.flag("logprobs", wanted);
    if (wanted) c.top_logprobs = 0;
    int64_t top = 0;
    fields.integer("top_logprobs", top, 0);
    at_most("top_logprobs", top);
    if (top > 0 && !wanted) throw ApiError(400, fmt::format("top_logprobs is {}, which wants logprobs to be true", top), "top_logprobs");
    c.top_logprobs = std::max(c.top_logprobs, wanted ? top : int64_t{-1});
    return;
  }
  fields.flag("echo", c.echo);
  if (const Json* found = fields.find("logprobs"); found != nullptr && *found != false) {
    fields.integer("logprobs", c.top_logprobs, 0);
    at_most("logprobs", c.top_logprobs);
  }
  int64_t best = c.n;
  fields.integer("best_of", best, 1);
  if (best != c.n) throw ApiError(400, fmt::format("best_of is {}, which is not served; expected n, {}, or nothing", best, c.n), "best_of");
}

Json usage(const Completion& request, const std::vector<Ended>& ended) {
  int64_t prompt = 0, tokens = 0, reused = 0;
  for (const auto& ids : request.prompts) prompt += static_cast<int64_t>(ids.size());
  for (size_t i = 0; i < ended.size(); ++i) {
    tokens += ended[i].new_tokens;
    if (static_cast<int64_t>(i) % request.n == 0) reused += ended[i].reused_tokens;  // as the prompt, once
  }
  return {{"prompt_tokens", prompt},
          {"completion_tokens", tokens},
          {"total_tokens", prompt + tokens},
          {"prompt_tokens_details", {{"cached_tokens", reused}}}};
}

}  // namespace

std::shared_ptr<const GainHead> CompletionDefaults::router(const std::string& name) const {
  const auto found = routers.find(name);
  if (found != routers.end()) return found->second;
  std::string known;
  for (const auto& [own, head] : routers) known += (known.empty() ? "; known: " : ", ") + own;
  fail("the router '{}' is not served here{}; a server has those that it was started with (--router NAME=FILE)", shown(name), known);
}

ApiError::ApiError(int status, const std::string& message, std::string param, std::string code)
    : Error(message), status_(status), param_(std::move(param)), code_(std::move(code)) {}

Json ApiError::json() const {
  const auto or_null = [](const std::string& text) { return text.empty() ? Json() : Json(text); };
  return {{"error",
           {{"message", replace_invalid_utf8(what())},
            {"type", error_type(status_)},
            {"param", or_null(param_)},
            {"code", or_null(code_)}}}};
}

Completion parse_completion(const std::string& text, const LanguageModel& model, const Tokenizer& tokenizer,
                            const CompletionDefaults& defaults, Endpoint endpoint) {
  const bool chat = endpoint == Endpoint::kChat;
  if (chat && !defaults.chat.on()) {
    throw ApiError(400,
                   "this server has no chat template; start it with --chat-template, or send the whole text to "
                   "/v1/completions");
  }
  Json body;
  try {
    body = parse_json(text, "the request's body");
  } catch (const Error& e) {
    throw ApiError(400, e.what());
  }
  if (!body.is_object())
    throw ApiError(400, fmt::format("the request's body is {}, expected an object with {}", describe_json(body), chat ? "messages" : "a prompt"));
  Fields fields(body);
  Completion c;
  c.endpoint = endpoint;
  if (chat) c.max_tokens = kChatTokens;
  std::string name = defaults.model, schedule = defaults.schedule, ignored;
  if (fields.text("model", name) && name != defaults.model) {
    throw ApiError(404, fmt::format("the model '{}' is not served here; expected '{}'", shown(name), defaults.model),
                   "model", "model_not_found");
  }
  // The sampling of the protocol: temperature 1 unless said, and another draw each time without a seed.
  c.sampling.temperature = 1;
  c.sampling.seed = static_cast<int64_t>(std::random_device{}());
  fields.number("temperature", c.sampling.temperature);
  fields.number("top_p", c.sampling.top_p);
  fields.number("min_p", c.sampling.min_p);
  fields.integer("top_k", c.sampling.top_k, 0);
  fields.integer("seed", c.sampling.seed, 0);
  fields.integer("max_tokens", c.max_tokens, 0);
  if (chat) fields.integer("max_completion_tokens", c.max_tokens, 1);
  fields.flag("ignore_eos", c.ignore_eos);
  fields.flag("stream", c.stream);
  if (const Json* options = fields.find("stream_options")) {
    if (!options->is_object()) wrong("stream_options", *options, "an object");
    Fields inner(*options);
    inner.flag("include_usage", c.include_usage);
    inner.finish();
  }
  fields.text("user", ignored);
  read_scores(fields, c, chat);
  if (c.max_tokens == 0 && !c.echo) throw ApiError(400, "max_tokens is 0, expected an integer of at least 1 (0 with echo: the prompt alone)", "max_tokens");
  if (chat) {
    fields.only("tools", Json::array());
    fields.only("response_format", {{"type", "text"}});
  } else {
    fields.only("suffix", "");
  }
  fields.only("presence_penalty", 0);
  fields.only("frequency_penalty", 0);
  fields.only("repetition_penalty", 1);
  fields.only("logit_bias", Json::object());
  fields.text("schedule", schedule);
  c.stops = read_stops(fields);
  if (chat && !defaults.chat.stop().empty()) c.stops.push_back(defaults.chat.stop());
  const char* asked = chat ? "messages" : "prompt";
  if (!body.contains(asked)) {
    (void)fields.find(asked);
    fields.finish();  // a misspelt prompt is said as such
  }
  try {
    c.framed = 1;
    if (chat) {
      c.prompts.push_back(read_messages(fields, defaults.chat, tokenizer));
    } else {
      c.prompts = read_prompts(fields, model, tokenizer, c.framed);
    }
    if (c.answers() > kMostChoices) throw ApiError(400, fmt::format("{} prompts with n {} are {} answers, expected at most {}", c.prompts.size(), c.n, c.answers(), kMostChoices), "prompt");
    fields.finish();
    c.sampling.validate();
  } catch (const ApiError&) {
    throw;
  } catch (const Error& e) {
    throw ApiError(400, e.what());
  }
  try {
    c.schedule = std::make_shared<ModelSchedule>(model.config(), schedule, [&](const std::string& file) { return defaults.router(file); });
  } catch (const Error& e) {
    throw ApiError(400, e.what(), "schedule");
  } catch (const Json::exception&) {
    throw ApiError(400,
                   fmt::format("schedule is {}, expected a schedule or the JSON form of one a layer",
                               describe_json(Json(schedule))),
                   "schedule");
  }
  return c;
}

namespace {

Json choice_of(int64_t index, const char* key, const Json& text, const Json& logprobs, const std::string& reason) {
  return {{key, text}, {"index", index}, {"logprobs", logprobs}, {"finish_reason", reason.empty() ? Json() : Json(reason)}};
}

Json answer_of(const CompletionAnswer& a, const char* object, Json choices) {
  return {{"id", a.id}, {"object", object}, {"created", a.created}, {"model", a.model}, {"choices", std::move(choices)}};
}

}  // namespace

Json CompletionAnswer::begin(int64_t index) const {
  return answer_of(*this, "chat.completion.chunk", Json::array({choice_of(index, "delta", {{"role", "assistant"}, {"content", ""}}, nullptr, "")}));
}

Json CompletionAnswer::chunk(int64_t index, const std::string& text, const Json& logprobs, const std::string& reason) const {
  if (endpoint == Endpoint::kText) return answer_of(*this, "text_completion", Json::array({choice_of(index, "text", text, logprobs, reason)}));
  const Json delta = text.empty() ? Json::object() : Json{{"content", text}};
  return answer_of(*this, "chat.completion.chunk", Json::array({choice_of(index, "delta", delta, logprobs, reason)}));
}

Json CompletionAnswer::whole(const std::vector<Whole>& answers, const Completion& request) const {
  const bool chat = endpoint == Endpoint::kChat;
  Json choices = Json::array();
  std::vector<Ended> ended;
  double share = 0;
  for (const Whole& a : answers) {
    const Json text = chat ? Json{{"role", "assistant"}, {"content", a.text}} : Json(a.text);
    choices.push_back(choice_of(static_cast<int64_t>(choices.size()), chat ? "message" : "text", text, a.logprobs, finish_reason(a.ended.outcome)));
    ended.push_back(a.ended);
    share += a.ended.attention_share / static_cast<double>(answers.size());
  }
  Json json = answer_of(*this, chat ? "chat.completion" : "text_completion", std::move(choices));
  json["usage"] = usage(request, ended);
  json["oryx"] = {{"schedule", request.schedule->text()}, {"seed", request.sampling.seed}, {"attention_share", share}};
  return json;
}

Json CompletionAnswer::usage_chunk(const Completion& request, const std::vector<Ended>& ended) const {
  Json json = chunk(0, "", nullptr, "");
  json["choices"] = Json::array();
  json["usage"] = usage(request, ended);
  return json;
}

Json logprobs_of(const Completion& request, const Tokenizer& tokenizer, std::span<const ShownToken> tokens) {
  if (request.top_logprobs < 0) return nullptr;
  return request.endpoint == Endpoint::kChat ? chat_logprobs(tokenizer, tokens) : completion_logprobs(tokenizer, tokens, request.top_logprobs);
}

std::string finish_reason(Outcome outcome) { return outcome == Outcome::kLength ? "length" : "stop"; }

}  // namespace oryx::serve
