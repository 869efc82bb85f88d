// Load on the serving engine.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>

#include "oryx/bench/bench.h"
#include "oryx/bench/measure.h"
#include "oryx/common/error.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/random.h"
#include "oryx/model/device.h"
#include "oryx/serve/engine.h"

namespace oryx {

namespace {

struct Arrival {
  double second;
  std::vector<int32_t> prompt;
};

std::vector<Arrival> draw_arrivals(const ServeBenchOptions& o, int64_t requests, int64_t vocab) {
  CounterRng rng(31);
  const auto draw = [&](int64_t tokens) {
    std::vector<int32_t> ids(static_cast<size_t>(tokens));
    for (auto& id : ids) id = static_cast<int32_t>(rng.below(static_cast<uint64_t>(vocab)));
    return ids;
  };
  std::vector<std::vector<int32_t>> shared;
  for (int64_t g = 0; g < o.groups; ++g) shared.push_back(draw(o.shared));
  std::vector<Arrival> all;
  double second = 0;
  for (int64_t i = 0; i < requests; ++i) {
    if (o.rate > 0) second -= std::log(1 - rng.uniform()) / o.rate;
    std::vector<int32_t> prompt = shared[static_cast<size_t>(rng.below(static_cast<uint64_t>(o.groups)))];
    const auto own = draw(o.prompt_least +
                          static_cast<int64_t>(rng.below(static_cast<uint64_t>(o.prompt_most - o.prompt_least + 1))));
    prompt.insert(prompt.end(), own.begin(), own.end());
    all.push_back({second, std::move(prompt)});
  }
  return all;
}

// The schedules of requests in turns.
std::vector<std::string> in_turns(const std::string& text) {
  std::vector<std::string> all;
  for (size_t begin = 0, end = 0; end != std::string::npos; begin = end + 1) {
    end = text.find('|', begin);
    all.push_back(text.substr(begin, end == std::string::npos ? end : end - begin));
  }
  return all;
}

double quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1) + 0.5)];
}

Json serve_row(const LanguageModel& model, const ServeBenchOptions& o, const std::vector<Arrival>& arrivals,
               const std::string& text, int64_t running) {
  serve::EngineOptions options{.max_running = running,
                               .max_queue = static_cast<int64_t>(arrivals.size()),
                               .piece = o.piece,
                               .gap_seconds = o.gap_ms / 1e3,
                               .keep_every = o.keep_every,
                               .state_budget = o.state_budget,
                               .fused = o.fused,
                               .captured_pieces = o.captured_pieces};
  set_kv(options.state, o.kv);
  const bool gpu = !model.device().is_cpu();
  if (gpu) reset_peak_device_memory(model.device());
  serve::Engine engine(model, options);
  std::vector<std::shared_ptr<const ModelSchedule>> schedules;
  for (const std::string& one : in_turns(text)) schedules.push_back(std::make_shared<const ModelSchedule>(model.config(), one));
  for (size_t i = 0; gpu && i < schedules.size(); ++i) {
    serve::Request r;
    r.prompt.assign(static_cast<size_t>(std::min<int64_t>(o.piece, 1024)), static_cast<int32_t>(i));
    r.schedule = schedules[i];
    r.max_tokens = 4;
    engine.submit(std::move(r));
    while (engine.step()) check_interrupt();
  }
  const serve::EngineStats before = engine.stats();
  std::vector<double> first, between;
  std::string error;
  const auto start = std::chrono::steady_clock::now();
  const auto now = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  size_t next = 0;
  int64_t prompt_tokens = 0, recurrent = 0, prefix = 0, rows = 0, decode_tokens = 0;
  double decode_seconds = 0;
  serve::EngineStats last = before;
  while (true) {
    check_interrupt();
    for (; next < arrivals.size() && arrivals[next].second <= now(); ++next) {
      serve::Request r;
      r.prompt = arrivals[next].prompt;
      r.schedule = schedules[next % schedules.size()];
      r.max_tokens = o.new_tokens;
      r.sampling = {.temperature = o.temperature, .seed = static_cast<int64_t>(next)};
      prompt_tokens += static_cast<int64_t>(r.prompt.size());
      const auto last = std::make_shared<double>(-1);
      r.on_token = [&, last, arrived = now()](int32_t) {
        const double t = now();
        *last < 0 ? first.push_back(t - arrived) : between.push_back(t - *last);
        *last = t;
        return true;
      };
      r.on_end = [&](const serve::Ended& ended) {
        if (!ended.error.empty()) error = ended.error;
      };
      engine.submit(std::move(r));
    }
    const double began = now();
    const bool busy = engine.step();
    const serve::EngineStats s = engine.stats();
    // Rounds between which nothing is read.
    if (s.tokens_read == last.tokens_read) {
      decode_seconds += now() - began;
      decode_tokens += s.tokens_written - last.tokens_written;
    }
    last = s;
    recurrent = std::max(recurrent, s.recurrent_bytes);
    prefix = std::max(prefix, s.prefix_bytes);
    rows = std::max(rows, s.row_bytes);
    if (busy) continue;
    if (next == arrivals.size()) break;
    std::this_thread::sleep_for(
        std::chrono::duration<double>(std::min(0.01, std::max(0.0, arrivals[next].second - now()))));
  }
  if (!error.empty()) fail("{}", error);
  const double seconds = now();
  serve::EngineStats s = engine.stats();
  s.tokens_read -= before.tokens_read, s.tokens_written -= before.tokens_written, s.tokens_reused -= before.tokens_reused;
  s.decode_passes -= before.decode_passes, s.decode_rows -= before.decode_rows;
  Json row = {
      {"schedule", text},
      {"running", running},
      {"first_ms", 1e3 * quantile(first, 0.5)},
      {"first_p95_ms", 1e3 * quantile(first, 0.95)},
      {"between_ms", 1e3 * quantile(between, 0.5)},
      {"between_p95_ms", 1e3 * quantile(between, 0.95)},
      {"read_per_second", static_cast<double>(s.tokens_read) / seconds},
      {"written_per_second", static_cast<double>(s.tokens_written) / seconds},
      {"reused", static_cast<double>(s.tokens_reused) / static_cast<double>(prompt_tokens)},
      {"batch", s.decode_passes > 0 ? static_cast<double>(s.decode_rows) / static_cast<double>(s.decode_passes) : 0},
      {"recurrent_bytes", recurrent},
      {"prefix_bytes", prefix},
      {"row_bytes", rows},
      {"prefixes", s.prefixes},
      {"decode_per_second", decode_seconds > 0 ? static_cast<double>(decode_tokens) / decode_seconds : 0},
      {"seconds", seconds}};
  if (gpu) row["peak_bytes"] = peak_device_memory(model.device()), row["fused"] = engine.fused();
  return row;
}

}  // namespace

BenchResult bench_serve(const ServeBenchOptions& o) {
  if (o.prompt_most < o.prompt_least)
    fail("--prompt-most is {}, expected at least --prompt-least, {}", o.prompt_most, o.prompt_least);
  const ModelConfig config = o.model.config();
  for (const std::string& text : o.schedules) {
    for (const std::string& one : in_turns(text)) (void)ModelSchedule(config, one);
  }
  const at::Device device = parse_device(o.model.device);
  LanguageModel model(config, o.model.compute());
  model.initialize(0);
  model.to(device);
  if (!device.is_cpu()) model.keep_copies();
  BenchResult result;
  for (const std::string& text : o.schedules) {
    for (const int64_t running : o.running) {
      for (const int64_t prompt : o.prompts.empty() ? std::vector<int64_t>{0} : o.prompts) {
        ServeBenchOptions own = o;
        if (prompt > 0) own.prompt_least = own.prompt_most = prompt;
        const auto arrivals = draw_arrivals(own, o.requests > 0 ? o.requests : running, config.vocab_size);
        result.table.rows.push_back(serve_row(model, own, arrivals, text, running));
        if (prompt > 0) result.table.rows.back()["prompt"] = prompt;
      }
    }
  }
  result.table.columns = {{"schedule", "schedule", cell_text()},
                          {"running", "side by side", cell_text()},
                          {"first_ms", "first ms", cell_fixed(1)},
                          {"first_p95_ms", "95%", cell_fixed(1)},
                          {"between_ms", "between ms", cell_fixed(2)},
                          {"between_p95_ms", "95%", cell_fixed(2)},
                          {"read_per_second", "read/s", cell_fixed(0)},
                          {"written_per_second", "written/s", cell_fixed(1)},
                          {"decode_per_second", "alone", cell_fixed(1)},
                          {"reused", "reused", cell_percent()},
                          {"batch", "batch", cell_fixed(2)},
                          {"recurrent_bytes", "recurrent", cell_bytes()},
                          {"prefix_bytes", "prefixes", cell_bytes()},
                          {"row_bytes", "rows", cell_bytes()}};
  if (!o.prompts.empty()) result.table.columns.insert(result.table.columns.begin() + 2, {"prompt", "prompt", cell_text()});
  if (!device.is_cpu()) {
    result.table.columns.push_back({"peak_bytes", "GPU peak", cell_bytes()});
    result.table.columns.push_back({"fused", "fused", cell_text()});
  }
  result.options = {{"preset", o.model.preset},
                    {"dtype", o.model.precision},
                    {"device", o.model.device},
                    {"requests", o.requests},
                    {"rate", o.rate},
                    {"prompt", {o.prompt_least, o.prompt_most}},
                    {"shared", o.shared},
                    {"groups", o.groups},
                    {"new_tokens", o.new_tokens},
                    {"temperature", o.temperature},
                    {"piece", o.piece},
                    {"gap_ms", o.gap_ms},
                    {"keep_every", o.keep_every},
                    {"kv", o.kv},
                    {"fused", o.fused},
                    {"captured_pieces", o.captured_pieces},
                    {"prompts", o.prompts}};
  return result;
}

}  // namespace oryx
