// oryx serve: a model behind HTTP.
#include <filesystem>

#include "oryx/cli/command.h"
#include "oryx/cli/model_folder.h"
#include "oryx/common/error.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/log.h"
#include "oryx/common/progress.h"
#include "oryx/modes/gain_head.h"
#include "oryx/router/features.h"
#include "oryx/serve/http.h"

namespace oryx::cli {

namespace {

struct ServeArguments {
  ModelArguments model;
  serve::EngineOptions engine;
  serve::HttpOptions http;
  std::string kv = "keep", name, chat;
  std::vector<std::string> routers;
  bool random_weights = false;
};

// The folder's own name as it was given, not that of a checkpoint that RUN/model points to; of RUN/model the run's.
std::string model_name(const std::string& folder) {
  std::filesystem::path path = std::filesystem::absolute(folder).lexically_normal();
  if (!path.has_filename()) path = path.parent_path();  // behind a slash
  if (path.filename() == "model" && path.has_parent_path()) path = path.parent_path();
  return path.filename().string();
}

// NAME=FILE, or FILE, whose name is as it stands there.
void add_router(serve::CompletionDefaults& defaults, const std::string& text) {
  const size_t at = text.find('=');
  const std::string name = text.substr(0, at), file = at == std::string::npos ? text : text.substr(at + 1);
  if (name.empty() || file.empty()) fail("--router '{}': expected FILE or NAME=FILE", text);
  if (defaults.routers.count(name) > 0) fail("--router '{}': there are two of that name", name);
  defaults.routers[name] = load_head(file);
}

// Those that the server has, and others that its own schedule names.
std::shared_ptr<const GainHead> own_router(serve::CompletionDefaults& defaults, const std::string& file) {
  if (defaults.routers.count(file) == 0) defaults.routers[file] = load_head(file);
  return defaults.routers[file];
}

void serve_model(ServeArguments o) {
  set_kv(o.engine.state, o.kv);
  o.engine.validate();
  if (!o.chat.empty()) o.http.defaults.chat = serve::ChatTemplate(o.chat);
  const LoadedModel loaded = o.random_weights ? load_random(o.model) : load(o.model);
  if (!loaded.tokenizer) fail("{}: has no tokeniser; give one with --tokenizer", loaded.name);
  for (const auto& text : o.routers) add_router(o.http.defaults, text);
  const ModelSchedule schedule(loaded.model->config(), o.http.defaults.schedule, [&](const std::string& file) { return own_router(o.http.defaults, file); });
  if (!o.http.defaults.routers.empty()) {
    const std::string identity = router_identity(*loaded.model);
    for (const auto& [name, head] : o.http.defaults.routers) check_head(loaded.model->config(), identity, *head, name);
  }
  o.http.defaults.schedule = schedule.text();
  o.http.defaults.model = o.name.empty() ? model_name(o.model.folder) : o.name;
  serve::Engine engine(*loaded.model, o.engine);
  serve::HttpServer server(engine, *loaded.model, *loaded.tokenizer, o.http);
  catch_interrupts();
  log::info("serving '{}' at http://{}:{}: up to {} requests side by side, {} of states", o.http.defaults.model,
            o.http.host, server.port(), engine.options().max_running,
            human_bytes(static_cast<double>(engine.options().state_budget)));
  const int64_t cut_off = server.run();
  if (cut_off > 0)
    throw Interrupted(fmt::format("interrupted; {} requests were cut off after {:g} s", cut_off, o.http.grace_seconds));
  log::info("stopped; every request was answered");
}

ORYX_COMMAND(serve, "answer requests over HTTP with a model (OpenAI's completions)", [](CLI::App& app) {
  auto o = std::make_shared<ServeArguments>();
  o->model.add_to(app);
  app.add_flag("--random-weights", o->random_weights, "MODEL is a preset (130m) or a training config, served with random weights: for load tests (oryx bench http)");
  app.add_option("--host", o->http.host,
                 "the address to listen on; 0.0.0.0 is all of this machine's, and there is no access control")
      ->capture_default_str();
  app.add_option("--port", o->http.port, "the port; 0: any that is free")
      ->check(CLI::Range(0, 65535))
      ->capture_default_str();
  app.add_option("--name", o->name, "the model's name in requests and answers (default: its folder's)");
  app.add_option("--schedule", o->http.defaults.schedule,
                 "modes of requests that name none (docs/modes.md; default: linear)");
  app.add_option("--router", o->routers,
                 "a router (oryx router train) that requests may name in their schedules, by NAME or as it stands here; "
                 "may be given several times")
      ->type_name("[NAME=]FILE")
      ->allow_extra_args(false);
  app.add_option("--chat-template", o->chat,
                 "how a chat's messages become text: chatml, llama3, or one message as '{role}: {content}\\n' "
                 "(default: chats are not served)")
      ->type_name("TEXT");
  app.add_option("--state-budget", o->engine.state_budget,
                 "memory for the states of requests and of kept prefixes, as 4GiB or 512MiB (default: a quarter of "
                 "what is free, of a GPU half)")
      ->transform(CLI::AsSizeValue(false))
      ->type_name("BYTES");
  app.add_option("--max-running", o->engine.max_running,
                 "requests that are read or written side by side (default: 8, on a GPU 64)")
      ->check(CLI::Range(1, 4096))
      ->type_name("N");
  app.add_option("--max-queue", o->engine.max_queue, "requests that may wait; more are refused")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str()
      ->type_name("N");
  app.add_option("--piece", o->engine.piece,
                 "tokens of a prompt read at once: what a running text waits for at most (default: 256, on a GPU 1024)")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->type_name("N");
  app.add_option_function<double>("--gap", [o](double ms) { o->engine.gap_seconds = ms / 1e3; },
                                  "milliseconds that a running text may wait for a token while prompts are read: so many pieces between two tokens as fit, at times none (default: one)")
      ->check(CLI::Range(0.1, 3.6e6))
      ->type_name("MS");
  app.add_option(
         "--keep-every", o->engine.keep_every,
         "keep the states of prompts' beginnings at multiples of so many tokens, a multiple of --piece; 0: none "
         "(default: as --piece)")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 20))
      ->type_name("N");
  app.add_option("--kv", o->kv, "keys and values: keep, drop, or bounded:F+W (docs/state.md)")
      ->type_name("POLICY")
      ->capture_default_str();
  app.add_flag("--fused,!--no-fused", o->engine.fused, "on a GPU, write by captured launches (default; docs/serving.md)");
  app.add_flag("--captured-pieces,!--no-captured-pieces", o->engine.captured_pieces, "on a GPU, read prompts in linear modes by captured launches too (default)");
  app.add_option("--grace", o->http.grace_seconds, "seconds that running requests have after Ctrl-C")
      ->check(CLI::Range(0.0, 86400.0))
      ->capture_default_str()
      ->type_name("S");
  app.callback([o] { serve_model(*o); });
});

}  // namespace
}  // namespace oryx::cli
