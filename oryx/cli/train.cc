// oryx train: a run from a config file and overrides; the same command again resumes it.
#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "oryx/cli/command.h"
#include "oryx/common/error.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/log.h"
#include "oryx/common/progress.h"
#include "oryx/data/dataset.h"
#include "oryx/parallel/launcher.h"
#include "oryx/model/device.h"
#include "oryx/train/rank_batches.h"
#include "oryx/train/trainer.h"

namespace oryx {

namespace {

struct TrainArguments {
  std::string config, resume;
  std::vector<std::string> overrides;
  bool keys = false;
  int64_t processes = 0;  // 0: not said
};

TrainOptions resolve_options(const TrainArguments& a) {
  if (!a.resume.empty()) {
    if (!a.config.empty()) fail("--resume takes the run's own config: leave --config out");
    if (!RunFolder(a.resume).exists()) fail("{}: holds no training run (no config.json); expected the folder that a run was given as out=DIR", a.resume);
    for (const auto& v : a.overrides) {
      if (v.starts_with("out=")) fail("--resume {} goes on in that folder: leave {} out, or copy the folder and resume the copy", a.resume, v);
    }
    TrainOptions o = load_train_options(std::filesystem::path(a.resume) / "config.json", a.overrides);
    o.out = a.resume;  // the folder may have been moved since
    return o;
  }
  // The data set is needed for its vocabulary, so its key is looked up first.
  TrainOptions first = load_train_options(a.config, a.overrides);
  if (first.data.empty()) fail("data is not set, expected a data set folder: data=DIR (made by `oryx data build`)");
  if (first.out.empty()) fail("out is not set, expected a folder for the run: out=DIR");
  return load_train_options(a.config, a.overrides, open_dataset(first.data).info.vocab_size);
}

void refuse_another_run(const TrainOptions& options, bool resume) {
  const RunFolder run(options.out);
  std::error_code ignored;
  if (std::filesystem::exists(run.path() / "dataset.json", ignored)) fail("{}: is a data set; choose another folder for the run: out=DIR", options.out);
  if (resume || !run.exists()) return;
  TrainOptions there = load_train_options(run.path() / "config.json", {});
  if (dump_options(there) == dump_options(options)) return;
  fail("{}: holds a run with other options; continue that one with `oryx train --resume {}`, or choose another out=DIR", options.out, options.out);
}

// Starts the processes that train, each of which comes here again with its place in the environment.
void train_in_processes(const TrainArguments& a) {
  const TrainOptions options = resolve_options(a);
  refuse_another_run(options, !a.resume.empty());
  check_processes(options, a.processes);
  run_processes(a.processes, std::max<int64_t>(at::get_num_threads() / a.processes, 1));
}

void say_what_was_trained(const TrainOptions& options, const TrainSummary& s) {
  if (s.tokens == 0) {
    cli::print("{}: all {} steps are done already; more with: oryx train --resume {} steps=N\nmodel: {}/model\n", options.out, s.step, options.out, options.out);
    return;
  }
  cli::print("{} steps, {} tokens in {}, last loss {:.4f}\n", s.step, human_count(static_cast<double>(s.tokens)), human_seconds(s.seconds), s.last_loss);
  for (const auto& row : s.validation) {
    cli::print("held-out perplexity {:8.2f}  {}\n", row["perplexity"].get<double>(), row["schedule"].get<std::string>());
  }
  cli::print("model: {0}/model   report: {0}/report.html\n", options.out);
}

void train_text(const TrainArguments& a) {
  if (a.keys) {
    cli::write(train_options_table());
    return;
  }
  const bool launched = begin_launched_process();
  const std::optional<Place> place = place_from_environment();
  if (a.processes > 0 && place && !launched) {
    fail("--processes {} in a process that a launcher has started (WORLD_SIZE is {}); leave the option out, or start without the launcher", a.processes, place->size);
  }
  if (a.processes > 1 && !place) return train_in_processes(a);
  catch_interrupts();
  const TrainOptions options = resolve_options(a);
  const bool several = place && place->size > 1, first = !several || place->rank == 0;
  std::unique_ptr<ProcessGroup> group;
  if (several) {
    if (!first) log::say_nothing();
    (void)divide_batches(options.accumulate, options.batch_size, place->size);
    group = join_group(*place, parse_device(device_of_process(options.device, place->local_rank, place->local_size)));
    group->require_same(dump_options(options), "options");
  }
  if (first) refuse_another_run(options, !a.resume.empty());  // when all have met, so that nobody waits for a rank that was refused
  TrainTask task = text_task(options);
  const TrainSummary s = train(options, task, group.get());
  if (s.interrupted) {
    throw Interrupted(fmt::format("interrupted at step {} of {}, saved; go on with: oryx train --resume {}{}", s.step, options.steps, options.out,
                                  launched ? fmt::format(" --processes {}", place->size) : ""));
  }
  if (first) say_what_was_trained(options, s);
}

}  // namespace

ORYX_COMMAND(train, "train a model on a data set", [](CLI::App& app) {
  auto a = std::make_shared<TrainArguments>();
  app.add_option("overrides", a->overrides, "key=value: any key of the config file, e.g. data=DIR out=DIR preset=tiny steps=2000");
  app.add_option("--config", a->config, "JSON file with the options")->type_name("FILE");
  app.add_option("--resume", a->resume, "folder of a run to go on with, under its own config")->type_name("RUN");
  app.add_option_function<std::string>(
      "--device", [a](const std::string& v) { a->overrides.push_back("device=" + v); }, "the same as device=NAME: cpu, cuda or cuda:N");
  app.add_option("--processes", a->processes, "share each step's batches among so many processes of this host, on a GPU each (docs/training.md)")->check(cli::integer(1))->type_name("N");
  app.add_flag("--keys", a->keys, "print all options as a table");
  app.callback([a] { train_text(*a); });
});

}  // namespace oryx
