// Load on a server over HTTP, as its clients see it.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <future>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <system_error>
#include <thread>

#include "oryx/bench/bench.h"
#include "oryx/bench/exchange.h"
#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/log.h"
#include "oryx/common/random.h"

namespace oryx {

namespace {

using namespace std::chrono_literals;

constexpr const char* kMeasures[] = {"ttft", "tpot", "itl", "e2e"};
constexpr auto kLook = 5ms, kSample = 50ms;  // between looks at Ctrl-C; at the server's memory
constexpr int64_t kMostRequests = 1'000'000;   // of a row: all of its prompts are drawn before the first is sent

double seconds_now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Between the values that stand at the rank's sides, as numpy has it.
double percentile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const double rank = q * static_cast<double>(values.size() - 1);
  const auto below = static_cast<size_t>(rank);
  const double part = rank - static_cast<double>(below);
  return part == 0 ? values[below] : values[below] * (1 - part) + values[below + 1] * part;
}

double mean(const std::vector<double>& values) {
  return values.empty() ? 0 : std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

// Words that most tokenisers know as one token each.
Json draw_words(CounterRng& rng, int64_t count) {
  static constexpr const char* kWords[] = {"time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state", "family", "student", "group",
                                           "country", "problem", "hand", "part", "place", "case", "week", "company", "system", "program", "question", "work", "number", "night", "point", "home"};
  std::string text;
  for (int64_t i = 0; i < count; ++i) text += (text.empty() ? "" : " ") + std::string(kWords[rng.below(std::size(kWords))]);
  return text;
}

Json draw_ids(CounterRng& rng, int64_t count, int64_t vocab) {
  Json ids = Json::array();
  for (int64_t i = 0; i < count; ++i) ids.push_back(rng.below(static_cast<uint64_t>(vocab)));
  return ids;
}

std::vector<Json> draw_prompts(const HttpBenchOptions& o, int64_t count, uint64_t seed) {
  CounterRng rng(seed);
  const bool ids = o.prompts == "ids";
  const auto draw = [&](int64_t tokens) { return ids ? draw_ids(rng, tokens, o.vocab) : draw_words(rng, tokens); };
  CounterRng common(30);  // the same beginnings for all rows
  std::vector<Json> shared;
  for (int64_t g = 0; g < o.groups; ++g) shared.push_back(ids ? draw_ids(common, o.shared, o.vocab) : draw_words(common, o.shared));
  std::vector<Json> all;
  for (int64_t i = 0; i < count; ++i) {
    Json prompt = shared[static_cast<size_t>(rng.below(static_cast<uint64_t>(o.groups)))];
    const Json own = draw(o.prompt_least + static_cast<int64_t>(rng.below(static_cast<uint64_t>(o.prompt_most - o.prompt_least + 1))));
    if (ids) {
      prompt.insert(prompt.end(), own.begin(), own.end());
    } else {
      prompt = prompt.get<std::string>() + (o.shared > 0 ? " " : "") + own.get<std::string>();
    }
    all.push_back(std::move(prompt));
  }
  return all;
}

struct Limit {
  std::string of;
  double ms;
};

std::vector<Limit> read_limits(const std::vector<std::string>& texts) {
  std::vector<Limit> limits;
  for (const std::string& text : texts) {
    const size_t at = text.find(':');
    const std::string of = text.substr(0, at);
    char* end = nullptr;
    const double ms = at == std::string::npos ? 0 : std::strtod(text.c_str() + at + 1, &end);
    if ((of != "ttft" && of != "tpot" && of != "e2e") || end == nullptr || *end != 0 || !(ms > 0)) fail("--goodput '{}': expected ttft:MS, tpot:MS or e2e:MS", text);
    limits.push_back({of, ms});
  }
  return limits;
}

bool within(const Exchange& e, const std::vector<Limit>& limits) {
  return std::all_of(limits.begin(), limits.end(), [&](const Limit& limit) {
    const double seconds = limit.of == "ttft" ? e.first_seconds() : limit.of == "tpot" ? e.token_seconds() : e.total_seconds();
    return 1e3 * seconds <= limit.ms;
  });
}

// The sum of the server's oryx_state_bytes, or -1.
int64_t state_bytes_of(const serve::HttpClient::Reply& metrics) {
  if (!metrics.ok()) return -1;
  int64_t sum = -1;
  for (size_t at = 0; (at = metrics.body.find("\noryx_state_bytes{", at)) != std::string::npos; ++at) {
    const size_t value = metrics.body.find("} ", at);
    if (value != std::string::npos) sum = std::max<int64_t>(sum, 0) + std::strtoll(metrics.body.c_str() + value + 2, nullptr, 10);
  }
  return sum;
}

int64_t requests_of(const HttpBenchOptions& o, double rate) { return rate > 0 && o.seconds > 0 ? std::max<int64_t>(1, std::llround(rate * o.seconds)) : o.requests; }

// What cannot be sent, or be written to --json, is found out before anything is measured.
void check_text(const char* option, const std::string& text) {
  try {
    (void)Json(text).dump();
  } catch (const Json::exception&) {
    fail("{}: expected UTF-8, found bytes that are none", option);
  }
}

// What `work` does with the client, in a thread, so that Ctrl-C ends it.
template <class Work>
auto until_interrupt(serve::HttpClient& client, const Work& work) {
  std::future<decltype(work())> result;
  try {
    result = std::async(std::launch::async, work);
  } catch (const std::system_error& e) {
    fail("no thread for a request: {}", e.what());
  }
  while (result.wait_for(kLook) != std::future_status::ready) {
    if (interrupted()) client.stop();
  }
  return result.get();
}

class HttpLoad {
 public:
  explicit HttpLoad(const HttpBenchOptions& o) : o_(o), limits_(read_limits(o.goodput)), path_(o.chat ? "/v1/chat/completions" : "/v1/completions") {
    serve::HttpClient client(o.url, o.key, o.timeout);
    const auto models = until_interrupt(client, [&] { return client.get("/v1/models"); });
    if (interrupted()) throw Interrupted("interrupted; no request had been answered");
    if (models.status == 0) fail("{}: {}; is a server there?", o.url, models.failure);
    model_ = !o.model.empty() ? o.model : first_model(models);
    if (o.body.empty()) return;
    more_ = Json::parse(o.body, nullptr, false);
    if (!more_.is_object()) fail("--body '{}': expected a JSON object with fields of a request", o.body);
  }

  void warm_up(const std::string& schedule) {
    const std::vector<Json> prompts = draw_prompts(o_, o_.warmup, 7);
    for (const Json& prompt : prompts) {
      if (interrupted()) return;
      serve::HttpClient client(o_.url, o_.key, o_.timeout);
      const Exchange e = until_interrupt(client, [&] { return exchange(client, path_, body_of(prompt, o_.new_tokens, schedule), seconds_now); });
      if (interrupted()) return;
      if (!e.error.empty()) fail("{}{}: {}", o_.url, path_, e.error);
    }
  }

  // rate > 0: arrivals at random; else `concurrency` at once. Null when Ctrl-C came before any answer.
  Json row(const std::string& schedule, double rate, int64_t concurrency) {
    const int64_t requests = requests_of(o_, rate);
    const std::vector<Json> prompts = draw_prompts(o_, requests, 31);
    std::vector<int64_t> lengths;
    for (CounterRng rng(33); lengths.size() < prompts.size();) lengths.push_back(o_.new_tokens + (o_.new_most > 0 ? static_cast<int64_t>(rng.below(static_cast<uint64_t>(o_.new_most - o_.new_tokens + 1))) : 0));
    std::vector<Exchange> all(prompts.size());
    std::vector<std::shared_ptr<serve::HttpClient>> clients(prompts.size());
    std::mutex mutex;
    std::atomic<bool> stop{false};
    std::atomic<size_t> next{0}, running{0};
    const auto ask = [&](size_t i) {
      try {
        auto client = std::make_shared<serve::HttpClient>(o_.url, o_.key, o_.timeout);
        {
          const std::lock_guard lock(mutex);
          if (stop) return;
          clients[i] = client;
        }
        all[i] = exchange(*client, path_, body_of(prompts[i], lengths[i], schedule), seconds_now);
      } catch (const std::exception& e) {  // a thread that throws would end the program
        all[i].error = e.what();
      }
      const std::lock_guard lock(mutex);
      clients[i].reset();
    };
    std::list<std::thread> threads, ended;  // under `mutex`
    std::string no_thread;                  // why one could not be made
    // A thread that has ended keeps its stack until it is joined.
    const auto join_ended = [&] {
      std::list<std::thread> now;
      {
        const std::lock_guard lock(mutex);
        now.swap(ended);
      }
      for (std::thread& thread : now) {
        if (thread.joinable()) thread.join();
      }
    };
    const auto begin = [&](auto work) {
      ++running;
      try {
        join_ended();
        std::list<std::thread>::iterator place;
        {
          const std::lock_guard lock(mutex);
          place = threads.emplace(threads.end());
        }
        *place = std::thread([&, work, place] {
          work();
          {
            const std::lock_guard lock(mutex);
            ended.splice(ended.end(), threads, place);
          }
          --running;
        });
      } catch (const std::exception& e) {  // std::system_error, as a rule
        no_thread = fmt::format("{} requests at once are more threads than this machine gives ({})", running.load(), e.what());
        --running;
      }
    };
    std::atomic<bool> over{false};
    serve::HttpClient metrics(o_.url, o_.key, o_.timeout);
    std::future<int64_t> sampler;
    try {
      sampler = std::async(std::launch::async, [&] { return sample_state(metrics, over); });
    } catch (const std::system_error& e) {
      fail("no thread to look at the server's states: {}", e.what());
    }
    const double start = seconds_now();
    if (rate > 0) {
      CounterRng rng(32);
      double second = 0;
      for (size_t i = 0; i < prompts.size() && no_thread.empty() && !interrupted(); ++i) {
        second -= std::log(1 - rng.uniform()) / rate;
        for (double left; (left = start + second - seconds_now()) > 0 && !interrupted();) {
          std::this_thread::sleep_for(std::chrono::duration<double>(std::min(left, 0.005)));
        }
        if (interrupted()) break;
        begin([&ask, i] { ask(i); });
      }
    } else {
      for (int64_t w = 0; w < std::min<int64_t>(concurrency, requests) && no_thread.empty(); ++w) {
        begin([&] {
          for (size_t i; !stop && (i = next++) < prompts.size();) ask(i);
        });
      }
    }
    while (running > 0 && no_thread.empty() && !interrupted()) std::this_thread::sleep_for(kLook);
    while (running > 0) {  // after Ctrl-C or without a thread, until none is there any more: one may have been about to ask
      {
        const std::lock_guard lock(mutex);
        stop = true;
        for (const auto& client : clients) {
          if (client) client->stop();
        }
      }
      std::this_thread::sleep_for(kLook);
    }
    join_ended();
    over = true;
    const double ended_at = seconds_now();
    while (sampler.wait_for(kLook) != std::future_status::ready) {
      if (interrupted() || seconds_now() > ended_at + 1) metrics.stop();
    }
    const int64_t state_bytes = sampler.get();
    if (!no_thread.empty() && !interrupted()) fail("{}", no_thread);
    Json json = {{"schedule", schedule}, {"requests", requests}};
    rate > 0 ? json["rate"] = rate : json["concurrency"] = concurrency;
    json["line"] = o_.name.empty() ? schedule.empty() ? model_ : schedule : o_.name;
    return summed(json, all, start, state_bytes);
  }

  const std::string& model() const { return model_; }

 private:
  static std::string first_model(const serve::HttpClient::Reply& models) {
    const Json json = Json::parse(models.body, nullptr, false);
    const bool known = models.ok() && json.is_object() && json.contains("data") && json["data"].is_array() && !json["data"].empty() && json["data"][0].is_object() &&
                       json["data"][0].contains("id") && json["data"][0]["id"].is_string();
    if (!known) fail("GET /v1/models names no model (status {}); name it with --model", models.status);
    return json["data"][0]["id"];
  }

  Json body_of(const Json& prompt, int64_t tokens, const std::string& schedule) const {
    Json body = {{"model", model_}, {"max_tokens", tokens}, {"temperature", o_.temperature}, {"stream", true}, {"stream_options", {{"include_usage", true}}}};
    if (o_.chat) {
      body["messages"] = Json::array({{{"role", "user"}, {"content", prompt}}});
    } else {
      body["prompt"] = prompt;
    }
    if (o_.ignore_eos) body["ignore_eos"] = true;
    if (!schedule.empty()) body["schedule"] = schedule;
    body.update(more_);
    return body;
  }

  static int64_t sample_state(serve::HttpClient& client, const std::atomic<bool>& over) {
    int64_t most = -1;
    auto next = std::chrono::steady_clock::now();
    while (!over && !interrupted()) {
      if (std::chrono::steady_clock::now() < next) {
        std::this_thread::sleep_for(kLook);
        continue;
      }
      const int64_t bytes = state_bytes_of(client.get("/metrics"));
      if (bytes < 0) return most;
      most = std::max(most, bytes);
      next = std::chrono::steady_clock::now() + kSample;
    }
    return most;
  }

  Json summed(Json json, const std::vector<Exchange>& all, double start, int64_t state_bytes) const {
    std::map<std::string, std::vector<double>> ms;
    int64_t completed = 0, failed = 0, written = 0, good = 0, prompt_tokens = 0, counted = 0;
    double end = start, busy = 0;
    std::string error;
    for (const Exchange& e : all) {
      // Ctrl-C is nobody's failure.
      if ((e.sent < 0 && e.error.empty()) || (!e.done && interrupted())) continue;
      if (!e.done) {
        if (failed++ == 0) error = e.error;
        continue;
      }
      ++completed;
      written += e.written();
      good += within(e, limits_) ? 1 : 0;
      if (e.prompt_tokens >= 0) prompt_tokens += e.prompt_tokens, ++counted;
      end = std::max(end, e.last);
      busy += e.total_seconds();
      ms["ttft"].push_back(1e3 * e.first_seconds());
      if (e.written() > 1) ms["tpot"].push_back(1e3 * e.token_seconds());
      ms["e2e"].push_back(1e3 * e.total_seconds());
      for (const double gap : e.gaps) ms["itl"].push_back(1e3 * gap);
    }
    if (completed == 0 && interrupted()) return nullptr;
    if (completed == 0) fail("{}{}: no request was answered; the first error: {}", o_.url, path_, error);
    if (failed > 0) log::warn("{} of {} requests failed; the first: {}", failed, all.size(), error);
    const double seconds = std::max(1e-9, end - start);
    const auto per_second = [&](int64_t n) { return static_cast<double>(n) / seconds; };
    json["completed"] = completed, json["failed"] = failed, json["seconds"] = seconds;
    json["requests_per_second"] = per_second(completed), json["tokens_per_second"] = per_second(written);
    json["prompt_tokens"] = counted > 0 ? static_cast<double>(prompt_tokens) / static_cast<double>(counted) : 0;
    json["new_tokens"] = static_cast<double>(written) / static_cast<double>(completed);
    json["in_flight"] = busy / seconds;
    for (const char* of : kMeasures) {
      const std::vector<double>& values = ms[of];
      json[fmt::format("{}_ms_mean", of)] = mean(values);
      for (const int q : {50, 90, 99}) json[fmt::format("{}_ms_p{}", of, q)] = percentile(values, q / 100.0);
    }
    if (!limits_.empty()) json["goodput"] = per_second(good);
    if (state_bytes >= 0) json["state_bytes"] = state_bytes;
    return json;
  }

  const HttpBenchOptions& o_;
  std::vector<Limit> limits_;
  std::string path_, model_;
  Json more_ = Json::object();
};

std::vector<Json> http_rows_of_file(const std::string& path, bool rates) {
  const Json all = parse_json(read_file(path), path);
  if (!all.is_object() || all.value("benchmark", Json()) != "http" || !all.contains("rows") || !all["rows"].is_array()) fail("{}: expected what oryx bench http --json wrote", path);
  const char *load = rates ? "rate" : "concurrency", *other = rates ? "concurrency" : "rate";
  for (const Json& row : all["rows"]) {
    if (row.is_object() && !row.contains(load) && row.contains(other)) fail("{}: its rows go by {}, these by {}", path, other, load);
    for (const char* key : {"line", load, "ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99", "state_bytes"}) {
      const bool text = std::string_view(key) == "line", may_lack = std::string_view(key) == "state_bytes";
      if (!row.is_object() || (!row.contains(key) && !may_lack)) fail("{}: a row without '{}'; expected what oryx bench http --json wrote", path, key);
      if (row.contains(key) && !(text ? row[key].is_string() : row[key].is_number())) {
        fail("{}: a row's '{}' is {}, expected a {}", path, key, describe_json(row[key]), text ? "text" : "number");
      }
    }
  }
  return all["rows"];
}

// Median and 99% against the load, a line for each kind of request.
std::vector<Chart> http_charts(const std::vector<Json>& rows, bool rates) {
  const std::string load = rates ? "requests a second" : "requests in flight";
  Chart first{.title = "To the first token", .x_label = load, .y_label = "ms", .log_y = true};
  Chart between{.title = "Between tokens", .x_label = load, .y_label = "ms", .log_y = true};
  Chart memory{.title = "States of requests, at most", .x_label = load, .y_label = "GiB"};
  const auto add = [&](Chart& chart, const std::string& name, double x, double y) {
    const auto found = std::find_if(chart.series.begin(), chart.series.end(), [&](const Series& s) { return s.name == name; });
    (found != chart.series.end() ? *found : chart.series.emplace_back(Series{name})).points.emplace_back(x, y);
  };
  for (const Json& row : rows) {
    const char* key = rates ? "rate" : "concurrency";
    const auto x = row[key].get<double>();
    const auto name = row["line"].get<std::string>();
    for (const int q : {50, 99}) {
      const std::string line = name + (q == 50 ? ", median" : ", 99%");
      add(first, line, x, row[fmt::format("ttft_ms_p{}", q)].get<double>());
      add(between, line, x, row[fmt::format("itl_ms_p{}", q)].get<double>());
    }
    if (row.contains("state_bytes")) add(memory, name, x, row["state_bytes"].get<double>() / (1 << 30));
  }
  std::vector<Chart> charts = {first, between};
  if (!memory.series.empty()) charts.push_back(memory);
  return charts;
}

EvalTable http_table(std::vector<Json> rows, bool rates, bool limits) {
  const auto any = [&](auto has) { return std::any_of(rows.begin(), rows.end(), has); };
  EvalTable table;
  if (any([](const Json& row) { return row["schedule"] != ""; })) table.columns.push_back({"schedule", "schedule", cell_text()});
  table.columns.push_back(rates ? EvalColumn{"rate", "arrivals/s", cell_text()} : EvalColumn{"concurrency", "in flight", cell_text()});
  table.columns.push_back({"completed", "answered", cell_text()});
  if (any([](const Json& row) { return row["failed"] != 0; })) table.columns.push_back({"failed", "failed", cell_text()});
  table.columns.push_back({"requests_per_second", "requests/s", cell_fixed(2)});
  table.columns.push_back({"tokens_per_second", "tokens/s", cell_fixed(1)});
  for (const std::string of : kMeasures) {
    table.columns.push_back({of + "_ms_p50", of + " ms", cell_fixed(of == "ttft" || of == "e2e" ? 1 : 2)});
    table.columns.push_back({of + "_ms_p90", "90%", table.columns.back().format});
    table.columns.push_back({of + "_ms_p99", "99%", table.columns.back().format});
  }
  if (limits) table.columns.push_back({"goodput", "goodput/s", cell_fixed(2)});
  if (!rows.empty() && std::all_of(rows.begin(), rows.end(), [](const Json& row) { return row.contains("state_bytes"); })) table.columns.push_back({"state_bytes", "states", cell_bytes()});
  table.rows = std::move(rows);
  return table;
}

}  // namespace

BenchResult bench_http(const HttpBenchOptions& o) {
  if (o.prompt_most < o.prompt_least) fail("--prompt-most is {}, expected at least --prompt-least, {}", o.prompt_most, o.prompt_least);
  if (o.new_most > 0 && o.new_most < o.new_tokens) fail("--new-most is {}, expected at least --new-tokens, {}", o.new_most, o.new_tokens);
  if (o.rates.empty() == o.concurrency.empty()) fail("expected --rate (arrivals a second) or --concurrency (requests in flight), and not both");
  if (o.chat && o.prompts == "ids") fail("a chat's messages are texts; expected --prompts text with --chat");
  const bool rates = !o.rates.empty();
  check_text("URL", o.url);
  check_text("--model", o.model);
  check_text("--name", o.name);
  for (const std::string& schedule : o.schedules) check_text("--schedule", schedule);
  for (const double rate : rates ? o.rates : std::vector<double>{0}) {
    if (const int64_t n = requests_of(o, rate); n > kMostRequests) fail("{} requests of a row are too many, expected {} at most; fewer --{}?", n, kMostRequests, rate > 0 && o.seconds > 0 ? "seconds" : "requests");
  }
  if (o.warmup > kMostRequests) fail("--warmup is {}, expected {} at most", o.warmup, kMostRequests);
  std::vector<Json> drawn;
  for (const std::string& path : o.with) {
    for (Json& row : http_rows_of_file(path, rates)) drawn.push_back(std::move(row));
  }
  HttpLoad load(o);
  std::vector<Json> rows;
  BenchResult result;
  try {
    for (const std::string& schedule : o.schedules) {
      load.warm_up(schedule);
      for (size_t i = 0; i < (rates ? o.rates.size() : o.concurrency.size()) && !interrupted(); ++i) {
        Json row = load.row(schedule, rates ? o.rates[i] : 0, rates ? 0 : o.concurrency[i]);
        if (!row.is_null()) rows.push_back(std::move(row));
      }
    }
  } catch (const std::exception& e) {
    if (rows.empty()) throw;
    result.error = e.what();
  }
  if (rows.empty()) throw Interrupted("interrupted; no request had been answered");
  drawn.insert(drawn.begin(), rows.begin(), rows.end());
  result.charts = http_charts(drawn, rates);
  result.table = http_table(std::move(rows), rates, !o.goodput.empty());
  if (!result.error.empty()) result.note = "a row failed: what was measured before it";
  if (interrupted()) result.note = "interrupted: the last row holds what had been answered";
  result.options = {{"url", o.url},       {"model", load.model()}, {"chat", o.chat},       {"requests", o.requests}, {"seconds", o.seconds}, {"warmup", o.warmup},
                    {"prompt", {o.prompt_least, o.prompt_most}},   {"shared", o.shared},   {"groups", o.groups},     {"new_tokens", {o.new_tokens, std::max(o.new_tokens, o.new_most)}},
                    {"prompts", o.prompts}, {"vocab", o.vocab},    {"temperature", o.temperature}, {"ignore_eos", o.ignore_eos},
                    {"body", o.body},     {"goodput", o.goodput}};
  return result;
}

}  // namespace oryx
