// oryx eval TASK MODEL: the tasks of oryx/eval/, each a subcommand with its own options.
#include "oryx/cli/command.h"
#include "oryx/cli/model_folder.h"
#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/interrupt.h"
#include "oryx/eval/task.h"

namespace oryx::cli {

namespace {

struct Options {
  std::string task;
  ModelArguments model;
  std::vector<std::string> schedules;
  std::string json;
  std::unique_ptr<EvalTask> evaluation;
  std::vector<std::string> overrides;  // key=value
};

std::string option_name(std::string key) {
  std::replace(key.begin(), key.end(), '_', '-');
  return "--" + key;
}

// A list may be written without its brackets.
std::string as_override(const Fields::Field& field, const std::string& value) {
  // Lists of strings are read without them anyway, and without quotes.
  const bool list = field.type.starts_with("list") && field.form != detail::TextForm::kStringList && !value.starts_with('[');
  return field.key + "=" + (list ? "[" + value + "]" : value);
}

void add_task_options(CLI::App& app, const std::shared_ptr<Options>& o) {
  const Fields fields = fields_of(*o->evaluation);
  for (const Fields::Field& field : fields.all()) {
    const std::string value = field.get().dump();
    app.add_option_function<std::string>(
           option_name(field.key), [o, field](const std::string& v) { o->overrides.push_back(as_override(field, v)); }, field.help)
        ->type_name(field.type)
        ->default_str(value == "\"\"" ? "" : value)
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  }
}

void check_output(const std::string& path) {
  // Found out before the work, not after it.
  const auto folder = std::filesystem::absolute(path).parent_path();
  if (!std::filesystem::is_directory(folder)) fail("{}: cannot write, there is no folder {}", path, folder.string());
}

void run(Options& o) {
  if (!o.json.empty()) check_output(o.json);
  Fields fields = fields_of(*o.evaluation);
  for (const auto& v : o.overrides) fields.override_with(v);
  o.evaluation->validate();
  const LoadedModel loaded = load(o.model);
  catch_interrupts();
  const EvalTable table = o.evaluation->run({*loaded.model, loaded.tokenizer.get(), loaded.name}, o.schedules);
  check_finite(table);
  write(format_table(table));
  flush();
  if (o.json.empty()) return;
  const Json report = {{"task", o.task}, {"model", loaded.name}, {"precision", o.model.precision}, {"options", fields.dump()}, {"rows", table.rows}};
  write_file(o.json, report.dump(2) + "\n");
}

ORYX_COMMAND(eval, "measure a model: perplexity, recall, needle, language-model tasks, retrieval", [](CLI::App& app) {
  app.require_subcommand(1);
  for (const EvalTaskKind& kind : eval_tasks()) {
    CLI::App& task = *app.add_subcommand(kind.name, kind.summary);
    auto o = std::make_shared<Options>();
    o->task = kind.name;
    o->evaluation = kind.make();
    o->model.add_to(task);
    task.add_option("--schedule", o->schedules, "which mixer processes which token (docs/modes.md); may be repeated (default: a list)")
        ->allow_extra_args(false);
    task.add_option("--json", o->json, "write the results there too")->type_name("FILE");
    add_task_options(task, o);
    task.callback([o] { run(*o); });
  }
});

}  // namespace
}  // namespace oryx::cli
