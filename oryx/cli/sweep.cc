// oryx sweep TASK MODEL...: one task under many schedules and many policies of kept rows, over several models: table, JSON and pictures.
#include "oryx/cli/command.h"
#include "oryx/cli/model_folder.h"
#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/log.h"
#include "oryx/eval/sweep.h"

namespace oryx::cli {

namespace {

struct SweepArguments {
  std::string task, out = "runs/sweep";
  std::vector<std::string> models, sets{"share", "kv"}, options, settings;
  ModelArguments model;
  bool keys = false;
};

void sweep(const SweepArguments& a) {
  SweepOptions o;
  if (a.keys) return print("{}", options_table<SweepOptions>());
  const Fields fields = fields_of(o);
  std::vector<std::string> settings;
  for (const auto& s : a.settings) settings.push_back(bracketed(fields, s));
  read_options(o, Json::object(), "settings", settings);
  std::vector<SweepPoint> points;
  for (const auto& set : a.sets) {
    const auto more = sweep_points(set, o);
    points.insert(points.end(), more.begin(), more.end());
  }
  for (const auto& folder : a.models) check_model_folder(folder);  // before the first is run, not after it
  catch_interrupts();
  make_folders(a.out);
  std::string command = fmt::format("oryx sweep {} {} --set {}", a.task, fmt::join(a.models, " "), fmt::join(a.sets, ","));
  for (const auto& option : a.options) command += " --option " + option;
  for (const auto& setting : a.settings) command += " --setting " + setting;
  SweepResult result;
  for (const auto& folder : a.models) {
    ModelArguments arguments = a.model;
    arguments.folder = folder;
    const LoadedModel loaded = load(arguments);
    run_sweep(result, {*loaded.model, loaded.tokenizer.get(), loaded.name}, a.task, a.options, points, [&](const SweepRow& row) {
      log::info("{}: {} {} {}: {:.4f}", loaded.name, row.point.set, row.point.curve, row.point.label, row.values.back());
    });
    write_sweep(result, command, a.out);  // what is there so far
  }
  for (const auto& set : a.sets) print("{}\n{}\n", set, format_table(result.table(set)));
  print("report: {}\n", (std::filesystem::path(a.out) / "report.html").string());
}

ORYX_COMMAND(sweep, "which tokens deserve attention, and which keys and values are worth keeping: curves of a task", [](CLI::App& app) {
  auto a = std::make_shared<SweepArguments>();
  app.add_option("TASK", a->task, "of oryx eval, with an option kv where --set holds kv: recall, needle, ...");
  app.add_option("MODEL", a->models, "folders of models (several: seeds)");
  app.add_option("--set", a->sets, "share, kv, switches: which points")->delimiter(',')->capture_default_str();
  app.add_option("--option", a->options, "KEY=VALUE: an option of the task; may be repeated")->allow_extra_args(false);
  app.add_option("--setting", a->settings, "KEY=VALUE: of the points (see --keys); may be repeated")->allow_extra_args(false);
  app.add_option("--out", a->out, "folder for report.html, sweep.json, share.svg and kv.svg (default: runs/sweep)")->type_name("DIR");
  app.add_option("--tokenizer", a->model.tokenizer, "tokeniser file or folder, or 'byte' (default: the model's own)")->type_name("PATH");
  app.add_option("--precision", a->model.precision, "of activations")->check(CLI::IsMember({"float32", "bfloat16"}))->capture_default_str();
  app.add_option("--device", a->model.device, "where the models run: cpu, cuda or cuda:N")->capture_default_str();
  app.add_flag("--keys", a->keys, "print the settings of the points");
  app.callback([a] {
    if (!a->keys && (a->task.empty() || a->models.empty())) fail("oryx sweep wants a task and a model's folder, as in: oryx sweep recall runs/demo/recall");
    sweep(*a);
  });
});

}  // namespace
}  // namespace oryx::cli
