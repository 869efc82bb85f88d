// Reading a prompt: time and memory against the share of its tokens that are read in attention.
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <span>

#include "oryx/bench/bench.h"
#include "oryx/bench/measure.h"
#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/log.h"
#include "oryx/common/random.h"
#include "oryx/generate/session.h"
#include "oryx/model/device.h"
#include "oryx/model/inspect.h"
#include "oryx/model/scheduling.h"

namespace oryx {

namespace {

std::vector<int32_t> random_prompt(int64_t count, int64_t vocabulary) {
  CounterRng rng(2);
  std::vector<int32_t> ids(static_cast<size_t>(count));
  for (auto& id : ids) id = static_cast<int32_t>(rng.below(static_cast<uint64_t>(vocabulary)));
  return ids;
}

// The tokens in attention: the prompt's last ones, as a question behind a document, or chunks drawn at random.
std::string schedule_of(const std::string& placement, int64_t percent) {
  if (percent == 0) return "linear";
  if (percent == 100) return "attention";
  if (placement == "last") return fmt::format("linear,attention@{}%:", 100 - percent);
  return fmt::format("random(attention={};chunk=256)", static_cast<double>(percent) / 100);
}

struct Pass {
  double ms = 0, attention_share = 0;
  int64_t state = 0, peak = 0;
};

Pass read_prompt(const LanguageModel& model, const std::string& text, const std::vector<int32_t>& ids, const PrefillBenchOptions& o) {
  const at::Device device = model.device();
  const ModelSchedule schedule(model.config(), text);
  SessionOptions s;
  s.prompt_length = s.tokens = static_cast<int64_t>(ids.size());
  s.piece = std::min(o.piece, s.tokens);
  set_kv(s.state, o.kv);
  s.state.page_tokens = o.page_tokens;
  Pass pass;
  const auto once = [&] {
    Session session(model, schedule, s);
    (void)session.extend(ids);
    pass.state = session.state().bytes().total();
    pass.attention_share = session.attention_share();
  };
  int64_t before = 0;
  if (!reset_peak_memory() && device.is_cpu()) log::warn_once("the peak of memory cannot be reset here: it is that of the whole run");
  if (device.is_cpu()) {
    before = resident_memory();
  } else {
    reset_peak_device_memory(device);
  }
  const Times times = device.is_cpu() ? time_repeated(0, o.repeat, once) : time_repeated_on(device, 0, o.repeat, once);
  pass.ms = 1e3 * times.median();
  pass.peak = device.is_cpu() ? peak_memory() - before : peak_device_memory(device);
  return pass;
}

Series& series_of(Chart& chart, const std::string& name) {
  const auto found = std::find_if(chart.series.begin(), chart.series.end(), [&](const Series& s) { return s.name == name; });
  return found != chart.series.end() ? *found : chart.series.emplace_back(Series{name});
}

// 131072 -> "131,072"
std::string with_commas(int64_t n) {
  std::string text = std::to_string(n);
  for (int64_t at = static_cast<int64_t>(text.size()) - 3; at > 0; at -= 3) text.insert(static_cast<size_t>(at), 1, ',');
  return text;
}

// What the line of a chart is called: the length, and what of the model's keys and values is kept where that is not all.
std::string line_of(int64_t length, const PrefillBenchOptions& o) {
  std::string name = with_commas(length) + " tokens";
  if (!o.name.empty()) name += ", " + o.name;
  if (o.kv != "keep") name += ", keys and values " + o.kv;
  return name;
}

std::vector<Json> rows_of_file(const std::string& path) {
  const Json all = parse_json(read_file(path), path);
  if (!all.is_object() || all.value("benchmark", Json()) != "prefill" || !all.contains("rows") || !all["rows"].is_array()) {
    fail("{}: expected what oryx bench prefill --json wrote", path);
  }
  std::vector<Json> rows = all["rows"];
  for (const Json& row : rows) {
    for (const char* key : {"line", "attention_share", "ms", "peak_bytes"}) {
      if (!row.is_object() || !row.contains(key)) fail("{}: a row without '{}'; expected what oryx bench prefill --json wrote", path, key);
    }
  }
  return rows;
}

std::vector<Chart> charts_of(const std::vector<Json>& rows) {
  Chart time{.title = "Reading a prompt", .x_label = "% of its tokens in attention", .y_label = "ms", .log_y = true, .x_ticks = {0, 5, 10, 25, 50, 75, 100}};
  Chart memory{.title = "Peak memory while reading it", .x_label = "% of its tokens in attention", .y_label = "GiB", .x_ticks = {0, 5, 10, 25, 50, 75, 100}};
  for (const Json& row : rows) {
    const auto name = row["line"].get<std::string>();
    const double share = 100 * row["attention_share"].get<double>();
    series_of(time, name).points.emplace_back(share, row["ms"].get<double>());
    series_of(memory, name).points.emplace_back(share, row["peak_bytes"].get<double>() / (1 << 30));
  }
  return {time, memory};
}

}  // namespace

BenchResult bench_prefill(const PrefillBenchOptions& o) {
  const ModelConfig config = o.model.config();
  const at::Device device = parse_device(o.model.device);
  StateOptions kept;
  set_kv(kept, o.kv);
  if (kept.drop_rows && o.shares != std::vector<int64_t>{0}) fail("--kv drop keeps no keys and values for attention to look at; use --shares 0");
  LanguageModel model(config, o.model.compute());
  model.initialize(0);
  model.to(device);
  if (device.is_cuda()) model.keep_copies();
  const at::NoGradGuard no_grad;
  // Thread pools, handles and scratch space come with the first pass and belong to no length; memory of a GPU comes with the first pass at a length.
  PrefillBenchOptions first = o;
  first.repeat = 1;
  for (const int64_t percent : o.shares) (void)read_prompt(model, schedule_of(o.placement, percent), random_prompt(o.lengths.front(), config.vocab_size), first);

  BenchResult result;
  auto& rows = result.table.rows;
  std::vector<Json> drawn;  // with the other files'
  for (const std::string& path : o.with) {
    for (const Json& row : rows_of_file(path)) drawn.push_back(row);
  }
  for (const int64_t length : o.lengths) {
    const std::vector<int32_t> ids = random_prompt(length, config.vocab_size);
    if (device.is_cuda() && length != o.lengths.front()) (void)read_prompt(model, schedule_of(o.placement, o.shares.front()), ids, first);
    for (const int64_t percent : o.shares) {
      const Pass pass = read_prompt(model, schedule_of(o.placement, percent), ids, o);
      rows.push_back({{"tokens", length},
                      {"line", line_of(length, o)},
                      {"attention_share", pass.attention_share},
                      {"ms", pass.ms},
                      {"tokens_per_second", 1e3 * static_cast<double>(length) / pass.ms},
                      {"peak_bytes", pass.peak},
                      {"state_bytes", pass.state}});
    }
  }
  result.table.columns = {{"tokens", "tokens", cell_text()},
                          {"attention_share", "in attention", cell_percent()},
                          {"ms", "ms", cell_fixed(1)},
                          {"tokens_per_second", "tokens/s", cell_fixed(0)},
                          {"peak_bytes", "peak memory", cell_bytes()},
                          {"state_bytes", "state", cell_bytes()}};
  drawn.insert(drawn.begin(), rows.begin(), rows.end());
  result.charts = charts_of(drawn);
  result.options = {{"preset", o.model.preset}, {"dtype", o.model.precision}, {"device", o.model.device},       {"placement", o.placement},
                    {"lengths", o.lengths},     {"shares", o.shares},         {"piece", o.piece},               {"kv", o.kv},   {"page_tokens", o.page_tokens},
                    {"repeat", o.repeat}};
  return result;
}

}  // namespace oryx
