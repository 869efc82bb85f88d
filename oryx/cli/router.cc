// oryx router: trains what the policy `router` goes by, and shows it.
#include <memory>

#include "oryx/cli/command.h"
#include "oryx/cli/model_folder.h"
#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/options.h"
#include "oryx/common/progress.h"
#include "oryx/common/utf8.h"
#include "oryx/eval/eval_text.h"
#include "oryx/router/train.h"

namespace oryx::cli {

namespace {

struct RouterTrainArguments {
  ModelArguments model;
  std::string data, out, json;
  std::vector<std::string> recall, overrides;
  int64_t seq_len = 1024;
  bool keys = false;
};

struct RecallTexts {
  RecallOptions task;
  void describe(Fields& f) {
    f.add("pairs", task.pairs, "key-value pairs", at_least(1));
    f.add("queries", task.queries, "keys asked for at the end", at_least(1));
    f.add("length", task.length, "tokens, filled up with noise; 0: no noise", at_least(0));
    f.add("key_symbols", task.key_symbols, "distinct keys", at_least(1));
    f.add("value_symbols", task.value_symbols, "distinct values", at_least(2));
    f.add("filler_symbols", task.filler_symbols, "distinct noise tokens", at_least(0));
  }
  void validate() const { check(task); }
};

std::unique_ptr<GainSource> router_texts(const RouterTrainArguments& a, const LoadedModel& loaded, const RouterOptions& o) {
  const auto seed = static_cast<uint64_t>(o.seed);
  if (!a.recall.empty()) {
    RecallTexts texts;
    read_options(texts, Json::object(), "--recall", a.recall);
    if (texts.task.vocab_size() > loaded.model->config().vocab_size) {
      fail("--recall: its symbols need a vocabulary of {}, the model's is {}", texts.task.vocab_size(), loaded.model->config().vocab_size);
    }
    return std::make_unique<RecallGains>(texts.task, seed ^ 0x726f75746572);  // sequences that neither training nor evaluation draws
  }
  const EvalText text = open_text({*loaded.model, loaded.tokenizer.get(), loaded.name}, a.data, 0, /*training=*/true);
  return std::make_unique<DocumentGains>(text.tokens, a.seq_len, seed);
}

std::string router_line(double share, double router, double oracle) { return fmt::format("  {:>5g}% {:>13.1f}% {:>13.1f}%\n", 100 * share, 100 * router, 100 * oracle); }

void print_fit(const RouterFit& fit, const GainData& data) {
  print("held out: {} tokens of {} texts, {} of them asked for; linear mode {:.4f} nats, attention {:.4f} less\n", fit.held_tokens, data.texts, data.asked, data.linear_nats, fit.mean_gain);
  print("predicted and measured gains: correlation {:.3f}, of ranks {:.3f}; best of the epochs: {}\n", fit.correlation, fit.rank_correlation, fit.best_epoch);
  if (fit.flips) print("gains of {} tokens alone in attention: correlation {:.3f} with those measured, whose mean is {:.2f} of theirs\n", fit.flipped, *fit.flips, fit.flips_ratio);
  print("  tokens  gain: router        oracle\n");
  for (size_t i = 0; i < fit.shares.size(); ++i) write(router_line(fit.shares[i], fit.captured[i], fit.possible[i]));
}

void train_router(const RouterTrainArguments& a) {
  if (a.keys) return print("{}", options_table<RouterOptions>());
  if (a.model.folder.empty()) fail("oryx router train wants a model's folder, as in: oryx router train runs/tiny --data runs/data --out router.safetensors");
  if (a.data.empty() == a.recall.empty()) fail("oryx router train wants either --data, text, or --recall, the task's options");
  if (a.out.empty()) fail("oryx router train wants a file to write: --out FILE");
  if (a.seq_len < 1) fail("--seq-len is {}, expected 1 or more", a.seq_len);
  RouterOptions o;
  read_options(o, Json::object(), "options", a.overrides);
  check_output(a.out);
  if (!a.json.empty()) check_output(a.json);
  catch_interrupts();
  const LoadedModel loaded = load(a.model);
  if (!has_attention_choice(loaded.model->config())) fail("{}: its layers leave no choice between attention and something else, so there is nothing to route", loaded.name);
  const auto source = router_texts(a, loaded, o);
  ProgressBar measuring("measuring", o.tokens, "tokens");
  const GainData data = collect_gains(*loaded.model, *source, o, [&](int64_t tokens) { measuring.update(tokens); });
  measuring.finish();
  std::unique_ptr<ProgressBar> fitting;
  auto [head, fit] = fit_router(*loaded.model, data, o, [&](int64_t step, int64_t of, double held) {
    if (!fitting) fitting = std::make_unique<ProgressBar>("fitting", of, "steps");
    fitting->update(step, fmt::format("held-out {:.4f}", held));
  });
  if (fitting) fitting->finish();
  head.notes["data"] = a.data.empty() ? fmt::format("recall {}", fmt::join(a.recall, " ")) : std::filesystem::path(a.data).filename().string();
  head.notes["options"] = dump_options(o);
  head.notes["fit"] = fit.json().dump();
  save_head(head, a.out);
  print_fit(fit, data);
  print("router: {} ({}), as in --schedule \"linear,router(attention=0.1;file={})\"\n", a.out, human_bytes(static_cast<double>(std::filesystem::file_size(a.out))), a.out);
  if (a.json.empty()) return;
  Json report = fit.json();
  report["model"] = loaded.name;
  report["linear_nats"] = data.linear_nats;
  report["options"] = Json::parse(dump_options(o));
  write_file(a.json, report.dump(2) + "\n");
}

void show_router(const std::string& file) {
  const auto head = load_head(file);
  print("model      {}\nreads      {}\nfeatures   {}, {} hidden units\n", shown(head->model), head->reads_hidden ? "the hidden state before a token, and tokens" : "tokens alone", head->features(),
        head->width());
  for (const double share : {0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75}) print("{:>5g}%     of tokens: predicted gain above {:.4f} nats\n", 100 * share, head->threshold(share));
  for (const auto& [key, value] : head->notes) print("{:<10} {}\n", shown(key, 40), shown(value, 2000));
}

ORYX_COMMAND(router, "train what says which tokens attention is worth: the policy router of schedules", [](CLI::App& app) {
  app.require_subcommand(1);
  auto a = std::make_shared<RouterTrainArguments>();
  CLI::App* training = app.add_subcommand("train", "measure what attention gains at each token of a text, and learn to predict it");
  training->add_option("MODEL", a->model.folder, "folder of a model, or of a training run");
  training->add_option("options", a->overrides, "key=value: options (see --keys)");
  training->add_option("--data", a->data, "a data set (its training part), a .tok file, or text: a file or a folder")->type_name("PATH");
  training->add_option("--recall", a->recall, "instead of text, sequences of associative recall: pairs=60,queries=12,...")->delimiter(',')->allow_extra_args(false);
  training->add_option("--seq-len", a->seq_len, "tokens of a window of text at most")->type_name("N")->check(integer())->capture_default_str();
  training->add_option("--out", a->out, "the router's file")->type_name("FILE");
  training->add_option("--json", a->json, "write how well it does there")->type_name("FILE");
  training->add_option("--tokenizer", a->model.tokenizer, "tokeniser file or folder, or 'byte' (default: the model's own)")->type_name("PATH");
  training->add_option("--precision", a->model.precision, "of activations")->check(CLI::IsMember({"float32", "bfloat16"}))->capture_default_str();
  training->add_option("--device", a->model.device, "where the model runs: cpu, cuda or cuda:N")->capture_default_str();
  training->add_flag("--keys", a->keys, "print the options");
  training->callback([a] { train_router(*a); });

  auto file = std::make_shared<std::string>();
  CLI::App* showing = app.add_subcommand("show", "print what a router's file holds");
  showing->add_option("FILE", *file, "the router's file")->required();
  showing->callback([file] { show_router(*file); });
});

}  // namespace
}  // namespace oryx::cli
