#include "oryx/demo/text_demo.h"

#include <algorithm>
#include <chrono>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/data/dataset.h"
#include "oryx/data/sentencepiece.h"
#include "oryx/generate/generator.h"
#include "oryx/model/checkpoint.h"
#include "oryx/train/train_step.h"
#include "oryx/train/trainer.h"

namespace oryx {

namespace {

namespace fs = std::filesystem;

constexpr int64_t kProbeSteps = 4;

// Text as people keep it: data files by their endings, or prose and sources.
std::vector<TextFile> find_text(const std::string& path) {
  TextSourceOptions o;
  o.extensions = {".txt", ".jsonl", ".md", ".rst", ".cc", ".h", ".cpp", ".hpp", ".c", ".py", ".sh", ".cmake"};
  o.exclude = {"build/*", "runs/*"};
  return list_text_files(path, o);
}

TrainOptions train_options(const TextDemoOptions& o, int64_t vocab) {
  TrainOptions t;
  t.preset = "tiny";
  t.model = preset("tiny");
  t.model.vocab_size = (vocab + 63) / 64 * 64;
  t.data = (o.out / "data").string();
  t.out = (o.out / "run").string();
  t.seed = o.seed;
  t.batch_size = 4;
  t.seq_len = 256;
  t.chunk = 64;
  t.lr = 3e-3;
  t.validate_tokens = 20000;
  t.log_every = 5;
  t.keep_checkpoints = 1;
  return t;
}

// How many steps fit into the time: a few are made with a model that is thrown away.
int64_t steps_that_fit(const TrainOptions& t, double seconds) {
  LanguageModel model(t.model);
  model.initialize(0);
  model.requires_grad(true);
  Optimizer optimizer(model, {});
  TrainTask task = text_task(t);
  const ModelSchedule schedule(t.model, t.training_schedule());
  double best = 1e9;
  for (int64_t i = 0; i < kProbeSteps; ++i) {
    const auto start = std::chrono::steady_clock::now();
    train_step(model, optimizer, *task.source, schedule, 0, 0, i, {});
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return static_cast<int64_t>(std::clamp(seconds / best, 20.0, 5000.0));
}

// The demo makes its folder anew each time, so it must be the demo's: made by it, or empty.
void check_claim(const fs::path& folder) {
  const fs::path mark = folder / ".oryx-demo";
  if (fs::exists(folder) && !fs::exists(mark) && !(fs::is_directory(folder) && fs::is_empty(folder))) {
    fail("{}: exists and was not made by the demo, which would overwrite it; name another folder with --out", folder.string());
  }
}

void claim(const fs::path& folder) {
  check_claim(folder);
  make_folders(folder);
  write_file(folder / ".oryx-demo", "made by oryx demo, which overwrites this folder\n");
}

std::string first_words(const Dataset& data, size_t tokens) {
  std::vector<int64_t> wide(std::min<uint64_t>(tokens + 1, data.valid->document_size(0)));
  data.valid->read(data.valid->document_begin(0), wide);
  const std::vector<int32_t> ids(wide.begin(), wide.end());
  return data.tokenizer->decode(ids);
}

}  // namespace

void check_text_demo(const TextDemoOptions& o) {
  (void)find_text(o.text);
  check_claim(o.out);
  if (!(o.seconds > 0)) fail("training time of the text part is {} s, expected more than 0", o.seconds);
}

TextDemoResult run_text_demo(const TextDemoOptions& o) {
  TextDemoResult result;
  check_text_demo(o);
  const auto files = find_text(o.text);
  claim(o.out);
  std::shared_ptr<Tokenizer> tokenizer;
  {
    TextSource source(files);
    tokenizer = train_sentencepiece(source, {.vocab_size = o.vocab_size, .sample_bytes = uint64_t{8} << 20});
  }
  DatasetOptions dataset;
  dataset.valid = 0.05;
  dataset.overwrite = true;
  build_dataset(files, *tokenizer, o.out / "data", dataset);
  const Dataset data = open_dataset(o.out / "data");
  result.documents = static_cast<int64_t>(data.info.train.documents + data.info.valid.documents);
  result.train_tokens = static_cast<int64_t>(data.info.train.tokens);

  TrainOptions t = train_options(o, tokenizer->vocab_size());
  t.steps = steps_that_fit(t, o.seconds);
  t.warmup_steps = std::min<int64_t>(50, t.steps / 10);
  t.validate_every = 0;  // at the end only
  t.save_every = t.steps;
  fs::remove_all(t.out);
  TrainTask task = text_task(t);
  const TrainSummary summary = train(t, task);
  if (summary.interrupted) throw Interrupted("interrupted; what was trained so far is in " + t.out);
  result.steps = summary.step;
  result.parameters = count_parameters(t.model);
  for (const auto& row : summary.validation) result.perplexity.emplace_back(row["schedule"].get<std::string>(), row["perplexity"].get<double>());

  const auto model = load_model(fs::path(t.out) / "model");
  result.prompt = first_words(data, 24);
  const auto ids = tokenizer->encode_prompt(result.prompt);
  for (const char* schedule : {"linear", "attention", "linear,attention@-16:"}) {
    GenerateOptions g;
    g.max_new_tokens = o.sample_tokens;
    g.eos_id = tokenizer->eos_id();
    g.vocab_size = tokenizer->vocab_size();
    g.sampling.temperature = 0.7;
    g.sampling.top_p = 0.9;
    g.sampling.seed = o.seed;
    const Generated out = generate(*model, ModelSchedule(model->config(), schedule), ids, g);
    result.samples.emplace_back(schedule, tokenizer->decode(out.ids));
  }
  return result;
}

}  // namespace oryx
