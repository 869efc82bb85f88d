#include "oryx/common/progress.h"
#include "oryx/demo/recall_demo.h"
#include "oryx/model/inspect.h"
#include "oryx/report/report.h"

namespace oryx {

namespace {

using Point = std::pair<double, double>;

Series curve(const std::string& name, const RecallDemoResult& r, const std::vector<RecallResult>& between, double (*x)(const RecallResult&)) {
  Series s{.name = name};
  s.points.emplace_back(x(r.linear), 100 * r.linear.accuracy());
  for (const auto& e : between) s.points.emplace_back(x(e), 100 * e.accuracy());
  s.points.emplace_back(x(r.attention), 100 * r.attention.accuracy());
  return s;
}

double share_of(const RecallResult& r) { return 100 * r.attention_share; }
double flops_of(const RecallResult& r) { return r.flops_per_token / 1e3; }

std::vector<std::string> row(const std::string& name, const RecallResult& r, const RecallDemoOptions& o) {
  const StateBytes state = state_bytes(o.model(), o.task().tokens());
  const bool keeps = r.attention_share > 0;
  return {name, fmt::format("{:.1f}%", 100 * r.accuracy()), fmt::format("{:.1f}%", 100 * r.attention_share), human_count(r.flops_per_token),
          human_bytes(static_cast<double>(state.recurrent + state.tails)), keeps ? human_bytes(static_cast<double>(state.tokens)) : "not needed"};
}

}  // namespace

void write_recall_report(const RecallDemoOptions& o, const RecallDemoResult& r, const std::filesystem::path& path) {
  Report report("Recall: one set of weights, three ways to run it");
  const int64_t cells = o.heads * o.head_dim * o.value_head_dim;
  report.text(fmt::format("A multi-mixer model of {} parameters ({} layers, width {}) was trained for {} steps on associative recall, each chunk of {} tokens "
                          "at random in attention (probability {:.2f}) or in linear mode (gated delta rule). A sequence shows {} key-value pairs and then asks for {} "
                          "of the keys; it has {} tokens.",
                          count_parameters(o.model()), o.layers, o.hidden_size, o.steps, o.chunk, o.attention_share, o.pairs, o.queries, o.task().tokens()));
  report.text(fmt::format("The task was chosen so that the linear state is too small for it: {} head(s) of {} x {} hold {} numbers a layer, and keys live in {} dimensions, "
                          "of which at most {} can be told apart without interference, while {} pairs are shown.",
                          o.heads, o.head_dim, o.value_head_dim, cells, o.head_dim, o.head_dim, o.pairs));
  report.heading("The same weights on unseen sequences");
  report.table({"run", "correct", "attention tokens", "FLOPs a token", "recurrent state", "keys and values"},
               {row("wholly linear", r.linear, o), row("mixed: attention at the queries", r.mixed, o), row("wholly in attention", r.attention, o)},
               fmt::format("{} sequences, {} queries; guessing is {:.1f}% correct", o.examples, r.linear.queries, 100.0 / static_cast<double>(o.symbols)));
  if (r.missed.empty()) {
    report.text("All that was expected holds.");
  } else {
    for (const auto& m : r.missed) report.text("NOT REACHED: " + m);
  }
  const Series mixed{"attention at the queries", {Point{share_of(r.mixed), 100 * r.mixed.accuracy()}}, false};
  const Series mixed_cost{"attention at the queries", {Point{flops_of(r.mixed), 100 * r.mixed.accuracy()}}, false};
  report.chart({.title = "Recall against the share of attention tokens", .x_label = "tokens in attention mode, %", .y_label = "correct, %",
                .series = {curve("the last tokens in attention", r, r.by_last, share_of), curve("random tokens in attention", r, r.by_random, share_of), mixed},
                .y_low = 0, .y_high = 100});
  report.chart({.title = "Recall against cost", .x_label = "thousand FLOPs a token (forward)", .y_label = "correct, %",
                .series = {curve("the last tokens in attention", r, r.by_last, flops_of), curve("random tokens in attention", r, r.by_random, flops_of), mixed_cost},
                .y_low = 0, .y_high = 100});
  report.chart({.title = "Training loss", .x_label = "step", .y_label = "nats a query", .series = {{"training", r.losses}}});
  report.heading("Options");
  report.code(dump_options(o));
  report.write(path);
}

}  // namespace oryx
