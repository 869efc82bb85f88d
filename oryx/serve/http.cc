#include "oryx/serve/http.h"

#include <httplib.h>
#include <sys/socket.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "oryx/common/interrupt.h"
#include "oryx/common/log.h"
#include "oryx/serve/channel.h"

namespace oryx::serve {

namespace {

using namespace std::chrono_literals;

constexpr auto kPoll = 50ms;                      // between looks at what does not wake: a gone client, Ctrl-C
constexpr size_t kLongestBody = size_t{1} << 26;  // bytes: tokens of a long prompt as numbers

constexpr char kBegun = 1, kOver = 2;              // of an answer in a stream

std::string dumped(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

void answer(httplib::Response& res, const ApiError& e) {
  res.status = e.status();
  if (e.status() == 429) res.set_header("Retry-After", "1");
  res.set_content(dumped(e.json()), "application/json");
}

ApiError error_of(const Ended& ended) {
  if (ended.outcome == Outcome::kCancelled) return ApiError(503, "the request was cut off: the server stops");
  return ApiError(500, ended.error);
}

}  // namespace

struct HttpServer::Impl {
  Engine& engine;
  const LanguageModel& model;
  const Tokenizer& tokenizer;
  HttpOptions options;
  httplib::Server server;
  int port = 0;
  int64_t started = std::time(nullptr);
  std::atomic<int64_t> open{0};  // completions that are being answered
  std::atomic<bool> closing{false};

  Impl(Engine& e, const LanguageModel& m, const Tokenizer& t, const HttpOptions& o)
      : engine(e), model(m), tokenizer(t), options(o) {
    const auto threads = static_cast<size_t>(engine.options().max_running + engine.options().max_queue + 16);
    server.new_task_queue = [threads] { return new httplib::ThreadPool(threads); };
    server.set_payload_max_length(kLongestBody);
    server.set_tcp_nodelay(true);
    server.set_keep_alive_timeout(1);  // which a stop waits for, where a client keeps its connection
    server.set_keep_alive_max_count(1000);
    // The library's default lets a second server listen on the same port.
    server.set_socket_options([](int socket) {
      const int yes = 1;
      ::setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    });
    server.set_error_handler([](const httplib::Request& req, httplib::Response& res) {
      if (!res.body.empty()) return;
      if (res.status == 404)
        return answer(
            res,
            ApiError(404, fmt::format(
                              "{} {} is not served; expected POST /v1/completions or /v1/chat/completions, GET /v1/models, /health or /metrics",
                              req.method, req.path)));
      if (res.status == 413)
        return answer(res, ApiError(413, fmt::format("the request's body is longer than {} bytes", kLongestBody)));
      answer(res, ApiError(res.status, "the request cannot be read as HTTP/1.1"));
    });
    server.set_exception_handler([](const httplib::Request&, httplib::Response& res, std::exception_ptr e) {
      try {
        std::rethrow_exception(std::move(e));
      } catch (const ApiError& error) {
        answer(res, error);
      } catch (const std::exception& error) {
        answer(res, ApiError(500, error.what()));
      }
    });
    server.Post("/v1/completions",
                [this](const httplib::Request& req, httplib::Response& res) { complete(req.body, res, Endpoint::kText); });
    server.Post("/v1/chat/completions",
                [this](const httplib::Request& req, httplib::Response& res) { complete(req.body, res, Endpoint::kChat); });
    server.Get("/v1/models", [this](const httplib::Request&, httplib::Response& res) {
      const Json one = {
          {"id", options.defaults.model}, {"object", "model"}, {"created", started}, {"owned_by", "oryx"}};
      res.set_content(dumped({{"object", "list"}, {"data", Json::array({one})}}), "application/json");
    });
    server.Get("/health", [this](const httplib::Request&, httplib::Response& res) {
      res.status = closing ? 503 : 200;
      res.set_content(closing ? R"({"status": "closing"})" : R"({"status": "ok"})", "application/json");
    });
    server.Get("/metrics", [this](const httplib::Request&, httplib::Response& res) {
      res.set_content(prometheus_text(engine.stats()), "text/plain; version=0.0.4");
    });
    port = options.port == 0                                 ? server.bind_to_any_port(options.host)
           : server.bind_to_port(options.host, options.port) ? options.port
                                                             : -1;
    if (port < 0) {
      fail("cannot listen on {}:{}: {}; is another server there? Give another --port (0: any that is free) or --host",
           options.host, options.port, std::strerror(errno));
    }
  }

  // A request in the engine, once for each answer. When nobody wants them any more, they are cancelled.
  struct Open {
    Impl& impl;
    Completion request;
    CompletionAnswer answer;
    std::shared_ptr<Channel> channel;
    std::vector<int64_t> ids;   // in the engine
    std::vector<char> begun;    // the first event of an answer was handed over

    Open(Impl& i, Completion r)
        : impl(i), request(std::move(r)), channel(std::make_shared<Channel>(impl.tokenizer, request)), begun(static_cast<size_t>(request.answers()), 0) {
      ++impl.open;
    }
    ~Open() {
      cancel();
      --impl.open;
    }
    void cancel() {
      for (size_t i = 0; i < ids.size(); ++i) {
        if (!channel->is_over(i)) impl.engine.cancel(ids[i]);
      }
    }
  };

  // A model's vocabulary may be longer than its tokeniser's: a prompt of such ids has no text, which is the request's fault.
  std::shared_ptr<Open> opened(Completion request) {
    try {
      return std::make_shared<Open>(*this, std::move(request));
    } catch (const Error& e) {
      throw ApiError(400, e.what(), "prompt");
    }
  }

  Request request_of(const Open& o, size_t i) const {
    const Completion& c = o.request;
    Request r;
    r.prompt = c.prompt_of(static_cast<int64_t>(i));
    r.schedule = c.schedule;
    r.sampling = c.sampling;
    r.sampling.seed = static_cast<int64_t>((static_cast<uint64_t>(c.sampling.seed) + i % static_cast<uint64_t>(c.n)) & static_cast<uint64_t>(std::numeric_limits<int64_t>::max()));
    r.max_tokens = c.max_tokens;
    r.eos_id = c.ignore_eos ? -1 : tokenizer.eos_id();
    r.vocab_size = tokenizer.vocab_size();
    r.top_logprobs = c.top_logprobs;
    r.score_prompt = c.echo && (c.top_logprobs >= 0 || c.max_tokens == 0);
    r.on_token = [channel = o.channel, i](int32_t id) { return channel->add(i, id); };
    if (c.top_logprobs >= 0) r.on_scores = [channel = o.channel, i](TokenScores scores) { channel->score(i, std::move(scores)); };
    r.on_end = [channel = o.channel, i](const Ended& ended) { channel->end(i, ended); };
    return r;
  }

  // All answers of a request, or none where there is no room for them.
  void submit(Open& o) {
    std::vector<Request> requests;
    for (int64_t i = 0; i < o.request.answers(); ++i) requests.push_back(request_of(o, static_cast<size_t>(i)));
    try {
      o.ids = engine.submit(std::move(requests));
    } catch (const Busy& e) {
      throw ApiError(closing ? 503 : 429, e.what());
    } catch (const Error& e) {
      throw ApiError(400, e.what());
    }
  }

  void complete(const std::string& body, httplib::Response& res, Endpoint endpoint) {
    if (closing) throw ApiError(503, "the server stops; nothing more is accepted");
    const auto o = opened(parse_completion(body, model, tokenizer, options.defaults, endpoint));
    const Completion& c = o->request;
    if (const int64_t most = engine.options().max_running + engine.options().max_queue; c.answers() > most)
      throw ApiError(400, fmt::format("{} answers are asked for, but this server runs {} and lets {} wait", c.answers(), engine.options().max_running, engine.options().max_queue), "n");
    submit(*o);
    o->answer = {fmt::format("{}-{}", endpoint == Endpoint::kChat ? "chatcmpl" : "cmpl", o->ids.front()), options.defaults.model, std::time(nullptr), endpoint};
    return o->request.stream ? stream(o, res) : whole(o, res);
  }

  // Server-sent events. Between them we look whether the client is there: writing alone would tell late, and not at all
  // while a prompt is read.
  void stream(const std::shared_ptr<Open>& o, httplib::Response& res) {
    res.set_header("Cache-Control", "no-cache");
    res.set_chunked_content_provider("text/event-stream", [this, o](size_t, httplib::DataSink& sink) {
      const std::vector<Channel::News> all = o->channel->take();
      if (std::all_of(all.begin(), all.end(), [](const auto& news) { return news.empty(); })) return sink.is_writable();
      std::string events;
      const auto event = [&](const Json& json) { events += "data: " + dumped(json) + "\n\n"; };
      bool broken = false;
      for (size_t i = 0; i < all.size() && !broken; ++i) broken = !tell(*o, i, all[i], event);
      const bool over = broken || std::all_of(o->begun.begin(), o->begun.end(), [](char c) { return c == kOver; });
      if (broken) o->cancel();
      if (over) {
        if (!broken && o->request.include_usage) event(o->answer.usage_chunk(o->request, all_ended(*o)));
        events += "data: [DONE]\n\n";
      }
      if (!events.empty() && !sink.write(events.data(), events.size())) return false;
      if (over) sink.done();
      return true;
    });
  }

  // The events of an answer's news; false for one that failed.
  template <class F>
  bool tell(Open& o, size_t i, const Channel::News& news, const F& event) const {
    if (news.empty()) return true;
    const auto index = static_cast<int64_t>(i);
    if (o.request.endpoint == Endpoint::kChat && o.begun[i] == 0) event(o.answer.begin(index));
    o.begun[i] = news.over ? kOver : kBegun;
    if (!news.text.empty() || !news.tokens.empty()) event(o.answer.chunk(index, news.text, logprobs_of(o.request, tokenizer, news.tokens), ""));
    if (!news.over) return true;
    const Ended ended = o.channel->ended(i);
    event(failed(ended) ? error_of(ended).json() : o.answer.chunk(index, "", nullptr, finish_reason(ended.outcome)));
    return !failed(ended);
  }

  static std::vector<Ended> all_ended(const Open& o) {
    std::vector<Ended> all;
    for (size_t i = 0; i < o.ids.size(); ++i) all.push_back(o.channel->ended(i));
    return all;
  }
  // One that failed, once all have ended or one failed.
  static std::optional<Ended> failure(const Open& o) {
    for (size_t i = 0; i < o.ids.size(); ++i) {
      if (o.channel->is_over(i) && failed(o.channel->ended(i))) return o.channel->ended(i);
    }
    return std::nullopt;
  }

  Json whole_answer(const Open& o) const {
    if (const auto ended = failure(o)) return error_of(*ended).json();
    const std::vector<Channel::News> all = o.channel->take();
    std::vector<CompletionAnswer::Whole> answers;
    for (size_t i = 0; i < all.size(); ++i) answers.push_back({all[i].text, logprobs_of(o.request, tokenizer, all[i].tokens), o.channel->ended(i)});
    return o.answer.whole(answers, o.request);
  }

  // The status is known with the first token; from there on we look whether the client is there.
  void whole(const std::shared_ptr<Open>& o, httplib::Response& res) {
    o->channel->wait_for_begin();
    if (o->channel->wait_for_end()) {
      if (const auto ended = failure(*o)) throw error_of(*ended);
      return res.set_content(dumped(whole_answer(*o)), "application/json");
    }
    res.set_chunked_content_provider("application/json", [this, o](size_t, httplib::DataSink& sink) {
      if (!o->channel->wait_for_end()) return sink.is_writable();
      const std::string text = dumped(whole_answer(*o));
      if (!sink.write(text.data(), text.size())) return false;
      sink.done();
      return true;
    });
  }

  int64_t run() {
    std::atomic<bool> deaf{false};
    std::thread listener([&] {
      server.listen_after_bind();
      deaf = true;
    });
    while (!server.is_running() && !deaf) std::this_thread::sleep_for(1ms);  // stop() does nothing before
    std::exception_ptr error;
    int64_t cut_off = 0;
    try {
      std::optional<std::chrono::steady_clock::time_point> end;
      bool aborted = false;
      while (true) {
        if (interrupted() && !end) {
          const EngineStats s = engine.stats();
          log::info("stopping: {} requests run and {} wait; they have {:g} s (Ctrl-C again ends at once)", s.running,
                    s.queued, options.grace_seconds);
          closing = true;
          end = std::chrono::steady_clock::now() +
                std::chrono::milliseconds(static_cast<int64_t>(1e3 * options.grace_seconds));
        }
        if (end && !aborted && std::chrono::steady_clock::now() >= *end) {
          const EngineStats s = engine.stats();
          cut_off = s.running + s.queued;
          engine.close(/*abort=*/true);
          aborted = true;
        }
        if (deaf) fail("the port {} was closed under the server; nothing can reach it any more", port);
        if (engine.step()) continue;
        if (end && engine.stats().queued == 0 && open == 0) break;
        engine.wait(std::chrono::duration<double>(kPoll).count());
      }
    } catch (...) {
      error = std::current_exception();
      engine.close(true);
      // A round begins with what was cancelled: whoever waits for an answer hears of it, also when the round fails
      // again.
      try {
        engine.step();
      } catch (...) {
      }
    }
    server.stop();
    listener.join();
    if (error) std::rethrow_exception(error);
    return cut_off;
  }
};

HttpServer::HttpServer(Engine& engine, const LanguageModel& model, const Tokenizer& tokenizer,
                       const HttpOptions& options)
    : impl_(std::make_unique<Impl>(engine, model, tokenizer, options)) {}
HttpServer::~HttpServer() = default;
int HttpServer::port() const { return impl_->port; }
int64_t HttpServer::run() { return impl_->run(); }

}  // namespace oryx::serve
