// oryx eval TASK MODEL: the tasks of oryx/eval/, each a subcommand with its own options.
#include <chrono>

#include "oryx/cli/command.h"
#include "oryx/cli/model_folder.h"
#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/log.h"
#include "oryx/eval/task.h"

namespace oryx::cli {

namespace {

struct EvalArguments {
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

void add_task_options(CLI::App& app, const std::shared_ptr<EvalArguments>& o) {
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

void run_task(EvalArguments& o) {
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

// ---- a suite: many tasks on one model, which is loaded once

struct SuiteArguments {
  ModelArguments model;
  std::string plan, out;
};

struct SuiteRun {
  std::string name, task;
  std::vector<std::string> schedules;  // for models that have a choice; others run in their own modes
  std::unique_ptr<EvalTask> evaluation;
};

std::unique_ptr<EvalTask> make_task(const std::string& name, const std::string& where) {
  std::vector<std::string> known;
  for (const EvalTaskKind& kind : eval_tasks()) {
    if (kind.name == name) return kind.make();
    known.push_back(kind.name);
  }
  fail("{}: unknown task '{}', known: {}{}", where, name, fmt::join(known, ", "), did_you_mean(name, known));
}

std::vector<SuiteRun> read_plan(const std::string& path) {
  const Json plan = read_json_file(path);
  if (!plan.is_array() || plan.empty()) fail("{}: {}, expected a list of objects {{\"name\", \"task\", \"options\", \"schedules\"}}", path, describe_json(plan));
  std::vector<SuiteRun> runs;
  for (size_t i = 0; i < plan.size(); ++i) {
    const std::string where = fmt::format("{}[{}]", path, i);
    SuiteRun run;
    Json options = Json::object();
    Fields fields;
    fields.add("name", run.name, "of the result's file");
    fields.add("task", run.task, "what `oryx eval` calls it");
    fields.add("options", options, "the task's");
    fields.add("schedules", run.schedules, "for models that have a choice");
    fields.read(plan[i], where);
    if (run.name.empty() || run.name.find_first_of("/\\") != std::string::npos) fail("{}: the name '{}' is none of a file", where, run.name);
    if (std::any_of(runs.begin(), runs.end(), [&](const SuiteRun& r) { return r.name == run.name; })) fail("{}: the name '{}' stands twice", where, run.name);
    run.evaluation = make_task(run.task, where);
    fields_of(*run.evaluation).read(options, where + ".options");
    run.evaluation->validate();
    runs.push_back(std::move(run));
  }
  return runs;
}

void run_suite(SuiteArguments& o) {
  std::vector<SuiteRun> runs = read_plan(o.plan);
  make_folders(o.out);
  const LoadedModel loaded = load(o.model);
  const bool choice = has_attention_choice(loaded.model->config());
  catch_interrupts();
  std::vector<std::string> failed;
  for (SuiteRun& run : runs) {
    const auto path = std::filesystem::path(o.out) / (run.name + ".json");
    if (std::filesystem::exists(path)) {
      log::info("{}: is there", path.string());
      continue;
    }
    const auto start = std::chrono::steady_clock::now();
    try {
      const EvalTable table = run.evaluation->run({*loaded.model, loaded.tokenizer.get(), loaded.name}, choice ? run.schedules : std::vector<std::string>{});
      check_finite(table);
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      write(fmt::format("{} ({:.1f} s)\n{}\n", run.name, seconds, format_table(table)));
      flush();
      const Json report = {{"task", run.task}, {"model", loaded.name}, {"precision", o.model.precision}, {"options", fields_of(*run.evaluation).dump()},
                           {"rows", table.rows}, {"seconds", seconds}};
      write_file(path, report.dump(2) + "\n");
    } catch (const Interrupted&) {
      throw;
    } catch (const std::exception& e) {
      // The others' results are worth having. The first line: libtorch appends a stack.
      log::warn("{}: {}", run.name, std::string_view(e.what()).substr(0, std::string_view(e.what()).find('\n')));
      failed.push_back(run.name);
    }
  }
  if (!failed.empty()) fail("{} of {} tasks failed: {}", failed.size(), runs.size(), fmt::join(failed, ", "));
}

void add_suite(CLI::App& app) {
  CLI::App& suite = *app.add_subcommand("suite", "many tasks on one model, as a file lists them; what is there already is not run again");
  auto o = std::make_shared<SuiteArguments>();
  o->model.add_to(suite);
  suite.add_option("--plan", o->plan, "JSON: a list of {\"name\", \"task\", \"options\": {...}, \"schedules\": [...]} (schedules: where the model has a choice)")->required()->type_name("FILE");
  suite.add_option("--out", o->out, "folder for NAME.json of each, as --json writes them")->required()->type_name("DIR");
  suite.callback([o] { run_suite(*o); });
}

ORYX_COMMAND(eval, "measure a model: perplexity, recall, needle, language-model tasks, retrieval", [](CLI::App& app) {
  app.require_subcommand(1);
  for (const EvalTaskKind& kind : eval_tasks()) {
    CLI::App& task = *app.add_subcommand(kind.name, kind.summary);
    auto o = std::make_shared<EvalArguments>();
    o->task = kind.name;
    o->evaluation = kind.make();
    o->model.add_to(task);
    task.add_option("--schedule", o->schedules, "which mixer processes which token (docs/modes.md); may be repeated (default: a list)")
        ->allow_extra_args(false);
    task.add_option("--json", o->json, "write the results there too")->type_name("FILE");
    add_task_options(task, o);
    task.callback([o] { run_task(*o); });
  }
  add_suite(app);
});

}  // namespace
}  // namespace oryx::cli
