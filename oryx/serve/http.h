// The engine behind HTTP: OpenAI's text completions, models, health, metrics (docs/serving.md).
#pragma once

#include <memory>
#include <string>

#include "oryx/serve/completion.h"

namespace oryx::serve {

struct HttpOptions {
  std::string host = "127.0.0.1";
  int port = 8080;            // 0: any that is free
  double grace_seconds = 30;  // that what runs has to end after Ctrl-C
  CompletionDefaults defaults;
};

class HttpServer {
 public:
  // All of them must outlive the server. Binds the port: throws Error when it is in use.
  HttpServer(Engine& engine, const LanguageModel& model, const Tokenizer& tokenizer, const HttpOptions& options);
  ~HttpServer();

  int port() const;
  // Runs the model on this thread and answers on others until Ctrl-C; then nothing new is accepted, and what runs may
  // end within the grace time. -> the requests that it cut off.
  int64_t run();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace oryx::serve
