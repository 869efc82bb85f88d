#include "oryx/eval/sweep.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/utf8.h"
#include "oryx/model/inspect.h"
#include "oryx/report/report.h"

namespace oryx {

void SweepOptions::describe(Fields& f) {
  f.add("shares", shares, "share: of tokens in attention, each above 0 and below 1");
  f.add("chunk", chunk, "share: tokens of a chunk of the random schedule", at_least(1));
  f.add("rows", rows, "kv: rows that a state keeps beside its first ones, the window's included", at_least(1));
  f.add("first", first, "kv: first tokens that are always kept", at_least(0));
  f.add("window", window, "kv: last tokens that are always kept", at_least(1));
  f.add("chunks", chunks, "switches: tokens between switch points", at_least(1));
  f.add("draws", draws, "switches: random schedules for each", at_least(1));
  f.add("routers", routers, "share: files of routers (oryx router train), in which {model} stands for the model's folder");
  f.add("average", average, "share: routers also by their threshold alone, which keeps the share on average over texts (average=1)");
  f.add("without", without, "curves to leave out, by name");
  f.add("oracle", oracle, "share: the tokens at which attention gains most, measured in both modes");
  f.add("parts", parts, "the task's prompts have the parts question and needle");
}

void SweepOptions::validate() const {
  for (const double s : shares) {
    if (!(s > 0 && s < 1)) fail("shares: {}, expected more than 0 and less than 1", s);
  }
  for (const int64_t r : rows) {
    if (r <= window) fail("rows: {} rows beside the first ones, of which {} are the window's; expected more", r, window);
  }
}

namespace {

constexpr const char* kWithQuestion = ",part(attention=question),attention@gen";

std::vector<SweepPoint> share_points(const SweepOptions& o) {
  std::vector<SweepPoint> all;
  const auto add = [&](const std::string& curve, const std::string& label, const std::string& schedule) {
    if (std::find(o.without.begin(), o.without.end(), curve) == o.without.end()) all.push_back({"share", curve, label, schedule});
  };
  add("wholly linear", "", "linear");
  add("wholly attention", "", "attention");
  if (o.parts) {
    add("question only", "", std::string("linear") + kWithQuestion);
    add("needle only (oracle)", "", "linear,part(attention=needle)");
    add("needle and question (oracle)", "", std::string("linear,part(attention=needle)") + kWithQuestion);
  }
  for (const double s : o.shares) {
    const std::string label = fmt::format("{:g}%", 100 * s);
    add("last tokens", label, fmt::format("linear,attention@{}%:", std::lround(100 * (1 - s))));
    add("random tokens", label, fmt::format("random(attention={:g};chunk={})", s, o.chunk));
    add("most surprising", label, fmt::format("linear,surprise(attention={:g})", s));
    for (const auto& file : o.routers) {
      const std::string name = o.routers.size() == 1 ? "router" : fmt::format("router {}", std::filesystem::path(file).stem().string());
      add(name, label, fmt::format("linear,router(attention={:g};file={})", s, file));
      if (o.average) add(name + ", on average", label, fmt::format("linear,router(attention={:g};average=1;file={})", s, file));
    }
    if (o.oracle) add("most gained (oracle)", label, fmt::format("linear,oracle(attention={:g})", s));
    if (!o.parts) continue;
    add("random and question", label, fmt::format("random(attention={:g};chunk={}){}", s, o.chunk, kWithQuestion));
    add("surprising and question", label, fmt::format("linear,surprise(attention={:g}){}", s, kWithQuestion));
  }
  return all;
}

std::vector<SweepPoint> kv_points(const SweepOptions& o) {
  std::vector<SweepPoint> all;
  const std::string schedule = o.parts ? std::string("linear") + kWithQuestion : "attention";
  const auto add = [&](const std::string& curve, const std::string& label, const std::string& kv) { all.push_back({"kv", curve, label, schedule, kv}); };
  all.push_back({"kv", "none (wholly linear)", "", "linear", "drop"});
  for (const int64_t r : o.rows) {
    const std::string label = fmt::format("{} rows", o.first + r);
    const std::string rest = fmt::format("budget={},first={},window={}", r - o.window, o.first, o.window);
    add("last rows (bounded)", label, fmt::format("bounded:{}+{}", o.first, r));
    add("most surprising rows", label, "surprise:" + rest);
    add("rows that change the state most", label, "write:" + rest);
    add("random rows", label, "random:" + rest);
  }
  add("all rows", "", "keep");
  return all;
}

std::vector<SweepPoint> switch_points(const SweepOptions& o) {
  std::vector<SweepPoint> all;
  const auto add = [&](const std::string& curve, const std::string& label, const std::string& schedule) { all.push_back({"switches", curve, label, schedule}); };
  add("wholly linear", "", "linear");
  add("wholly attention", "", "attention");
  for (const int64_t c : o.chunks) {
    for (int64_t d = 0; d < o.draws; ++d) add("random switches", fmt::format("chunk {}, draw {}", c, d), fmt::format("random(attention=0.5;chunk={};seed={})", c, d + 1));
  }
  add("a switch at every token", "attention first", "linear,periodic(attention=1;every=2)");
  add("a switch at every token", "linear first", "linear,periodic(attention=1;every=2;offset=1)");
  for (const int64_t c : o.chunks) {
    if (c > 1) add("one token in another mode", fmt::format("attention once in {}", c), fmt::format("linear,periodic(attention=1;every={})", c));
    if (c > 1) add("one token in another mode", fmt::format("linear once in {}", c), fmt::format("attention,periodic(linear=1;every={})", c));
  }
  if (o.parts) {
    add("against the task", "all but the question in attention", "attention,part(linear=question),linear@gen");
    add("against the task", "all but the needle in attention", "attention,part(linear=needle)");
    add("against the task", "all but the needle and what follows in linear", "linear,part(attention=needle),attention@gen");
  }
  return all;
}

std::unique_ptr<EvalTask> sweep_task(const std::string& name) {
  std::vector<std::string> known;
  for (const EvalTaskKind& kind : eval_tasks()) {
    if (kind.name == name) return kind.make();
    known.push_back(kind.name);
  }
  fail("unknown task '{}', known: {}{}", name, fmt::join(known, ", "), did_you_mean(name, known));
}

}  // namespace

std::string bracketed(const Fields& fields, const std::string& assignment) {
  const size_t equals = assignment.find('=');
  for (const Fields::Field& field : fields.all()) {
    if (equals == std::string::npos || field.key != assignment.substr(0, equals)) continue;
    const bool list = field.type.starts_with("list") && field.form != detail::TextForm::kStringList && !assignment.substr(equals + 1).starts_with('[');
    if (list) return fmt::format("{}=[{}]", field.key, assignment.substr(equals + 1));
  }
  return assignment;
}

namespace {

constexpr std::string_view kModel = "{model}";
constexpr const char* kMeasures[] = {"accuracy", "contains", "acc", "perplexity"};

std::string measure_of(const Json& row) {
  for (const char* name : kMeasures) {
    if (row.contains(name)) return name;
  }
  fail("this task measures nothing that a sweep knows ({})", fmt::join(kMeasures, ", "));
}

double mean_of(const std::vector<Json>& rows, const std::string& key) {
  double sum = 0;
  for (const Json& row : rows) sum += row.at(key).get<double>();
  return sum / static_cast<double>(rows.size());
}

}  // namespace

std::vector<SweepPoint> sweep_points(const std::string& set, const SweepOptions& options) {
  options.validate();
  if (set == "share") return share_points(options);
  if (set == "kv") return kv_points(options);
  if (set == "switches") return switch_points(options);
  fail("unknown set '{}', known: share, kv, switches", set);
}

double SweepRow::mean() const { return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size()); }
double SweepRow::least() const { return *std::min_element(values.begin(), values.end()); }
double SweepRow::most() const { return *std::max_element(values.begin(), values.end()); }

void run_sweep(SweepResult& result, const EvalSubject& subject, const std::string& task, const std::vector<std::string>& overrides, const std::vector<SweepPoint>& points,
               const std::function<void(const SweepRow& row)>& progress) {
  TORCH_CHECK(result.models.empty() || result.rows.size() == points.size(), "sweep: ", points.size(), " points, of other models ", result.rows.size());
  const bool first = result.models.empty();
  const auto before = static_cast<double>(result.models.size());
  const auto fixed = static_cast<double>(state_bytes(subject.model.config(), 0, subject.model.compute_dtype()).total());
  result.task = task;
  for (size_t i = 0; i < points.size(); ++i) {
    check_interrupt();
    const SweepPoint& point = points[i];
    const auto evaluation = sweep_task(task);
    Fields fields = fields_of(*evaluation);
    for (const auto& o : overrides) fields.override_with(bracketed(fields, o));
    if (point.kv != "keep") fields.override_with("kv=" + point.kv);
    evaluation->validate();
    std::string schedule = point.schedule;
    if (const size_t at = schedule.find(kModel); at != std::string::npos) schedule.replace(at, kModel.size(), subject.name);
    const EvalTable table = evaluation->run(subject, {schedule});
    check_finite(table);
    TORCH_CHECK(!table.rows.empty(), "sweep: the task gave no rows");
    result.measure = measure_of(table.rows[0]);
    if (first) result.rows.push_back({point, {}});
    SweepRow& row = result.rows[i];
    const auto more = [&](double& mean, double value) { mean = (mean * before + value) / (before + 1); };
    row.values.push_back(mean_of(table.rows, result.measure));
    more(row.attention_share, mean_of(table.rows, "attention_share"));
    more(row.flops_per_token, mean_of(table.rows, "flops_per_token"));
    more(row.kv_bytes, std::max(0.0, mean_of(table.rows, "state_bytes") - fixed));
    if (progress) progress(row);
  }
  result.models.push_back(subject.name);
}

Json SweepResult::json() const {
  Json out = {{"task", task}, {"measure", measure}, {"models", models}, {"rows", Json::array()}};
  for (const SweepRow& r : rows) {
    out["rows"].push_back({{"set", r.point.set},
                           {"curve", r.point.curve},
                           {"label", r.point.label},
                           {"schedule", r.point.schedule},
                           {"kv", r.point.kv},
                           {"values", r.values},
                           {"mean", r.mean()},
                           {"least", r.least()},
                           {"most", r.most()},
                           {"attention_share", r.attention_share},
                           {"kv_bytes", std::llround(r.kv_bytes)},
                           {"flops_per_token", r.flops_per_token}});
  }
  return out;
}

EvalTable SweepResult::table(const std::string& set) const {
  const bool share = measure != "perplexity";
  const CellFormat value = share ? cell_percent() : cell_fixed(3);
  EvalTable t{{{"curve", "policy", cell_text()},
               {"label", "setting", cell_text()},
               {"mean", measure, value},
               {"least", "least", value},
               {"most", "most", value},
               {"attention_share", "attention", cell_percent()},
               {"kv_bytes", "keys and values", cell_bytes()},
               {"flops_per_token", "FLOPs/token", cell_count()}},
              {}};
  // Curve by curve, whatever order they ran in.
  std::vector<std::string> curves;
  const Json all = json();
  for (const Json& row : all["rows"]) {
    const auto curve = row["curve"].get<std::string>();
    if (row["set"] == set && std::find(curves.begin(), curves.end(), curve) == curves.end()) curves.push_back(curve);
  }
  for (const auto& curve : curves) {
    for (const Json& row : all["rows"]) {
      if (row["set"] == set && row["curve"] == curve) t.rows.push_back(row);
    }
  }
  return t;
}

namespace {

Chart sweep_chart(const SweepResult& r, const std::string& set, bool bytes) {
  const double scale = r.measure == "perplexity" ? 1 : 100;
  Chart chart;
  chart.title = fmt::format("{}: {} against {}", r.task, r.measure, bytes ? "bytes of keys and values" : "share of attention tokens");
  chart.x_label = bytes ? "keys and values of one sequence at its end, KiB" : "tokens in attention, %";
  chart.y_label = scale == 1 ? r.measure : r.measure + ", %";
  if (scale == 100) chart.y_low = 0, chart.y_high = 100;
  std::vector<std::string> curves;
  std::map<std::string, std::vector<std::pair<double, double>>> points;
  for (const SweepRow& row : r.rows) {
    if (row.point.set != set) continue;
    if (points.count(row.point.curve) == 0) curves.push_back(row.point.curve);
    points[row.point.curve].emplace_back(bytes ? row.kv_bytes / 1024 : 100 * row.attention_share, scale * row.mean());
  }
  for (const auto& curve : curves) {
    auto& xy = points[curve];
    std::sort(xy.begin(), xy.end());
    chart.series.push_back({curve, xy, xy.size() > 1});
  }
  return chart;
}

}  // namespace

void write_sweep(const SweepResult& r, const std::string& command, const std::filesystem::path& folder) {
  Report report(fmt::format("Which tokens deserve attention: {}", r.task));
  report.text(fmt::format("{} model(s), the same weights at every point of theirs. Values are means over models; least and most are the models' range.", r.models.size()));
  report.code(command);
  const auto any = [&](const std::string& set) { return std::any_of(r.rows.begin(), r.rows.end(), [&](const SweepRow& row) { return row.point.set == set; }); };
  const auto part = [&](const std::string& set, const std::string& heading, const std::string& text) {
    if (!any(set)) return;
    report.heading(heading);
    report.text(text);
    if (set != "switches") {
      const Chart chart = sweep_chart(r, set, set == "kv");
      report.chart(chart);
      write_file(folder / (set + ".svg"), chart_svg(chart));
    }
    auto cells = table_cells(r.table(set));
    const std::vector<std::string> head = cells.front();
    cells.erase(cells.begin());
    report.table(head, cells);
  };
  part("share", "Share of attention tokens", "Every row of keys and values is kept; a rule picks the tokens that run in attention.");
  part("kv", "Bytes of keys and values", "The question runs in attention; the state keeps some rows of keys and values, as many for each rule.");
  part("switches", "Switch points", "Switch points that nobody chose for the model's good.");
  report.write(folder / "report.html");
  write_file(folder / "sweep.json", r.json().dump(2) + "\n");
}

}  // namespace oryx
