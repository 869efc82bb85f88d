// oryx demo: the main job in a few minutes, on a CPU.
#include <memory>

#include "oryx/cli/command.h"
#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/progress.h"
#include "oryx/demo/recall_demo.h"
#include "oryx/demo/text_demo.h"

namespace oryx {

namespace {

struct DemoArguments {
  std::string text, out = "runs/demo", json, only;
  double text_seconds = 60;
  std::vector<std::string> overrides;
  bool keys = false;
};

void print_row(const char* name, const RecallResult& r) {
  cli::print("  {:<34} {:>7.1f}% {:>11.1f}% {:>13}\n", name, 100 * r.accuracy(), 100 * r.attention_share, human_count(r.flops_per_token));
}

// Returns what was not reached.
std::vector<std::string> recall(const DemoArguments& a) {
  RecallDemoOptions o;
  read_options(o, Json::object(), "options", a.overrides);
  cli::print("Recall: {} key-value pairs, {} layer(s) with a linear state of {} x {} x {}; one set of weights, trained with mixed modes\n", o.pairs, o.layers,
             o.heads, o.head_dim, o.value_head_dim);
  cli::flush();
  const auto model = std::filesystem::path(a.out) / "recall";
  make_folders(model);
  const RecallDemoResult r = run_recall_demo(o, model);
  cli::print("  {:<34} {:>8} {:>12} {:>13}\n", "the same weights, run", "correct", "attention", "FLOPs a token");
  print_row("wholly linear", r.linear);
  print_row("mixed: attention at the queries", r.mixed);
  print_row("wholly in attention", r.attention);
  const auto report = std::filesystem::path(a.out) / "recall.html";
  write_recall_report(o, r, report);
  cli::print("  {} in all; report: {}, model: {}\n", human_seconds(r.seconds), report.string(), model.string());
  cli::flush();
  if (!a.json.empty()) {
    const Json json = {{"attention", r.attention.accuracy()},       {"linear", r.linear.accuracy()}, {"mixed", r.mixed.accuracy()},
                       {"attention_share", r.mixed.attention_share}, {"seconds", r.seconds}};
    write_file(a.json, json.dump(2) + "\n");
  }
  return r.missed;
}

TextDemoOptions text_options(const DemoArguments& a) {
  TextDemoOptions o;
  o.text = a.text.empty() ? "." : a.text;
  o.out = std::filesystem::path(a.out) / "text";
  o.seconds = a.text_seconds;
  return o;
}

void text(const DemoArguments& a) {
  const TextDemoOptions o = text_options(a);
  cli::print("\nText: {}\n", o.text);
  cli::flush();
  const TextDemoResult r = run_text_demo(o);
  cli::print("  {} documents, {} tokens; {} parameters, {} steps\n", r.documents, human_count(static_cast<double>(r.train_tokens)),
             human_count(static_cast<double>(r.parameters)), r.steps);
  for (const auto& [schedule, perplexity] : r.perplexity) cli::print("  held-out perplexity {:8.1f}  {}\n", perplexity, schedule);
  cli::print("  prompt: {}\n", r.prompt);
  for (const auto& [schedule, sample] : r.samples) cli::print("\n  [{}] {}\n", schedule, sample);
  cli::print("\n  model: {0}/run/model   report: {0}/run/report.html\n", o.out.string());
}

void run_demo(const DemoArguments& a) {
  if (a.keys) return cli::print("{}", options_table<RecallDemoOptions>());
  if (!a.only.empty() && a.only != "recall" && a.only != "text") fail("--only is '{}', expected recall or text", a.only);
  catch_interrupts();
  // What is wrong with the second part, or with where the results go, is found out before the first one's minute and a half.
  if (!a.json.empty()) check_output(a.json);
  if (a.only != "recall") check_text_demo(text_options(a));
  std::vector<std::string> missed;
  if (a.only != "text") missed = recall(a);
  if (a.only != "recall") text(a);
  if (!missed.empty()) fail("the recall demo did not reach what it should: {}", fmt::join(missed, "; "));
}

}  // namespace

ORYX_COMMAND(demo, "the main job in a few minutes: recall by mode, then a small text model", [](CLI::App& app) {
  auto a = std::make_shared<DemoArguments>();
  app.add_option("overrides", a->overrides, "key=value: options of the recall task (see --keys)");
  app.add_option("--text", a->text, "folder of text for the second part (default: the current folder)")->type_name("DIR");
  app.add_option("--out", a->out, "where reports and models go (default: runs/demo)")->type_name("DIR");
  app.add_option("--json", a->json, "write the recall figures here")->type_name("FILE");
  app.add_option("--only", a->only, "recall or text");
  app.add_option("--text-seconds", a->text_seconds, "training time of the text part (default: 60)")->type_name("S");
  app.add_flag("--keys", a->keys, "print the options of the recall task");
  app.callback([a] { run_demo(*a); });
});

}  // namespace oryx
