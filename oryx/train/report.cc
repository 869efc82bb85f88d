// The report of a run: curves of loss by mode, learning rate, gradient norm and throughput.
#include "oryx/report/report.h"

#include <map>

#include "oryx/train/trainer.h"

namespace oryx {

namespace {

Series curve(const std::vector<Json>& metrics, const std::string& name, const std::string& key) {
  Series s{.name = name};
  for (const auto& m : metrics) {
    if (m["kind"] == "train" && m.contains(key)) s.points.emplace_back(m["step"].get<double>(), m[key].get<double>());
  }
  return s;
}

std::map<std::string, Series> validation_curves(const std::vector<Json>& metrics) {
  std::map<std::string, Series> by_schedule;
  for (const auto& m : metrics) {
    if (m["kind"] != "validation") continue;
    const auto schedule = m["schedule"].get<std::string>();
    by_schedule[schedule].name = "held out, " + schedule;
    by_schedule[schedule].points.emplace_back(m["step"].get<double>(), m["loss"].get<double>());
  }
  return by_schedule;
}

}  // namespace

void write_report(const RunFolder& run, const TrainOptions& options, const std::vector<Json>& metrics) {
  const auto folder = run.path().has_filename() ? run.path() : run.path().parent_path();  // "runs/a/"
  Report report(fmt::format("Training run {}", folder.filename().string()));
  report.text(fmt::format("{} parameters; schedule {}; {} steps of {} tokens.", count_parameters(options.model), options.training_schedule(), options.steps,
                          options.batch_size * options.accumulate * options.seq_len));
  Chart loss{.title = "Loss", .x_label = "step", .y_label = "nats a token", .series = {curve(metrics, "training", "loss")}};
  std::vector<std::vector<std::string>> rows;
  for (auto& [schedule, series] : validation_curves(metrics)) {
    const double last = series.points.back().second;
    rows.push_back({schedule, fmt::format("{:.0f}", series.points.back().first), fmt::format("{:.4f}", last), fmt::format("{:.2f}", std::exp(last))});
    loss.series.push_back(std::move(series));
  }
  report.chart(loss);
  if (!rows.empty()) report.table({"schedule", "step", "held-out loss", "perplexity"}, rows);
  report.chart({.title = "Gradient norm before clipping", .x_label = "step", .series = {curve(metrics, "norm", "gradient_norm")}, .log_y = true});
  report.chart({.title = "Learning rate", .x_label = "step", .series = {curve(metrics, "rate", "lr")}});
  report.chart({.title = "Throughput", .x_label = "step", .y_label = "tokens a second", .series = {curve(metrics, "tokens/s", "tokens_per_second")}});
  report.heading("Options");
  report.code(dump_options(options));
  report.write(run.path() / "report.html");
}

}  // namespace oryx
