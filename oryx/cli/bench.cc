// oryx bench step|forward|prefill|decode|speculate|state|serve|http|attention: how fast and how large models are on this machine.
#include "oryx/bench/bench.h"

#include "oryx/bench/measure.h"
#include "oryx/cli/command.h"
#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/progress.h"
#include "oryx/report/report.h"

namespace oryx::cli {

namespace {

struct Outputs {
  std::string json, report, charts;
};

std::string machine_text(const Json& machine) {
  return fmt::format("{}, {} threads of {} cores, load {:.1f} at the start, libtorch {}", machine["processor"].get<std::string>(), machine["threads"].dump(),
                     machine["cores"].dump(), machine["load_average"].is_null() ? 0.0 : machine["load_average"].get<double>(),
                     machine["libtorch"].get<std::string>());
}

void write_report(const std::string& name, const BenchResult& result, const Json& machine, const std::string& path) {
  Report report("oryx bench " + name);
  report.text(machine_text(machine));
  report.code(result.options.dump());
  for (const Chart& chart : result.charts) report.chart(chart);
  const auto cells = table_cells(result.table);
  report.table(cells.front(), {cells.begin() + 1, cells.end()});
  report.write(path);
}

void report(const std::string& name, const BenchResult& result, const Json& machine, const Outputs& out) {
  check_finite(result.table);
  print("{}\n", machine_text(machine));
  write(format_table(result.table));
  if (!result.note.empty()) print("{}\n", result.note);
  flush();
  if (!out.report.empty()) write_report(name, result, machine, out.report);
  for (size_t i = 0; !out.charts.empty() && i < result.charts.size(); ++i) {
    write_file(fmt::format("{}-{}.svg", out.charts, i + 1), chart_svg(result.charts[i]));
  }
  if (out.json.empty()) return;
  const Json all = {{"benchmark", name}, {"machine", machine}, {"options", result.options}, {"rows", result.table.rows}};
  write_file(out.json, all.dump(2) + "\n");
}

// Adds --json, --report and what runs the benchmark.
template <class Options>
void finish(CLI::App& app, std::shared_ptr<Options> o, BenchResult (*bench)(const Options&)) {
  auto out = std::make_shared<Outputs>();
  app.add_option("--json", out->json, "write the results there too")->type_name("FILE");
  app.add_option("--report", out->report, "write the results there too, as HTML with charts where there are any")->type_name("FILE");
  app.add_option("--charts", out->charts, "write each of its charts to PREFIX-1.svg, PREFIX-2.svg ...")->type_name("PREFIX");
  app.callback([o, out, bench, name = app.get_name()] {
    // Found out before the work, not after it.
    for (const auto& path : {out->json, out->report, out->charts.empty() ? "" : out->charts + "-1.svg"}) {
      if (!path.empty()) check_output(path);
    }
    catch_interrupts();
    const Json machine = describe_machine();
    const BenchResult result = bench(*o);
    report(name, result, machine, *out);
    if (interrupted()) throw Interrupted("interrupted; what had been measured is above");
    if (!result.error.empty()) fail("{}", result.error);
  });
}

void add_model(CLI::App& app, BenchModel& model) {
  app.add_option("MODEL", model.preset, "SIZE or SIZE-VARIANT (130m, 130m-transformer), or a training config (configs/1.3b-gdn.json)")->required();
  app.add_option("--dtype,--precision", model.precision, "of activations")->check(CLI::IsMember({"float32", "bfloat16"}))->capture_default_str();
}

void add_model(CLI::App& app, BenchModel& model, std::string& schedule) {
  add_model(app, model);
  app.add_option("--schedule", schedule, "which mixer processes which token (docs/modes.md)")->capture_default_str();
}

CLI::Option* add_count(CLI::App& app, const char* name, int64_t& value, const char* help, int64_t least = 1) {
  return app.add_option(name, value, help)->check(CLI::Range(least, int64_t{1} << 30))->capture_default_str()->type_name("N");
}

// A list in ascending order, written 1024,4096.
void add_list(CLI::App& app, const char* name, std::vector<int64_t>& values, const char* help) {
  app.add_option(name, values, help)->delimiter(',')->check(CLI::Range(int64_t{1}, int64_t{1} << 30))->capture_default_str()->type_name("N,N,...");
}

ORYX_COMMAND(bench, "measure speed and memory on this machine", [](CLI::App& app) {
  app.require_subcommand(1);

  CLI::App& step = *app.add_subcommand("step", "time of a training step");
  auto s = std::make_shared<StepBenchOptions>();
  add_model(step, s->model);
  step.add_option("--schedule", s->schedules, "which mixer processes which token (docs/modes.md); several, each with its own --schedule: one after another with one model")
      ->capture_default_str()->expected(1)->allow_extra_args(false)->take_all()->type_name("TEXT");
  step.add_option("--device", s->device, "cpu, cuda or cuda:N")->capture_default_str();
  add_list(step, "--batch", s->batch_sizes, "rows; several (8,2) with as many lengths, or one");
  add_list(step, "--seq,--seq-len", s->seq_lens, "tokens of a row");
  step.add_flag("--checkpoint-layers", s->checkpoint_layers, "compute each layer's activations again in the backward pass");
  step.add_flag_function("--cuda-graph,!--no-cuda-graph", [s](int64_t count) { s->cuda_graph = count > 0; },
                         "on a GPU: captured steps wherever they can be; --no-cuda-graph: kernel by kernel; neither: as training does");
  add_count(step, "--repeat", s->repeat, "steps that are timed");
  add_count(step, "--warmup", s->warmup, "steps before them", 0);
  finish(step, s, bench_step);

  CLI::App& forward = *app.add_subcommand("forward", "time and memory of a forward pass against length");
  auto f = std::make_shared<ForwardBenchOptions>();
  add_model(forward, f->model, f->schedule);
  add_list(forward, "--lengths", f->lengths, "tokens");
  add_count(forward, "--piece", f->piece, "tokens of one pass, with a state, as generation reads a prompt; 0: one pass, no state", 0);
  add_count(forward, "--repeat", f->repeat, "passes at each length");
  finish(forward, f, bench_forward);

  CLI::App& prefill = *app.add_subcommand("prefill", "time and memory of reading a prompt against its share of tokens in attention");
  auto p = std::make_shared<PrefillBenchOptions>();
  prefill.add_option("MODEL", p->model.preset, "SIZE or SIZE-VARIANT (130m, 130m-mamba2), or a training config")->required();
  prefill.add_option("--dtype,--precision", p->model.precision, "of activations")->check(CLI::IsMember({"float32", "bfloat16"}))->capture_default_str();
  prefill.add_option("--device", p->model.device, "cpu, cuda or cuda:N")->capture_default_str();
  add_list(prefill, "--lengths", p->lengths, "tokens of the prompt");
  prefill.add_option("--shares", p->shares, "percent of its tokens in attention")
      ->delimiter(',')->check(CLI::Range(int64_t{0}, int64_t{100}))->capture_default_str()->type_name("N,N,...");
  prefill.add_option("--placement", p->placement, "where they are: the prompt's last tokens, or chunks of 256 drawn at random")
      ->check(CLI::IsMember({"last", "random"}))->capture_default_str();
  add_count(prefill, "--piece", p->piece, "tokens of one pass");
  prefill.add_option("--kv", p->kv, "keys and values: keep, drop, bounded:F+W (those of the first F and the last W tokens), or rows chosen by a policy, as surprise:budget=256 (docs/state.md)")->capture_default_str()->type_name("WHAT");
  add_count(prefill, "--page-tokens", p->page_tokens, "tokens of a page of keys and values");
  add_count(prefill, "--repeat", p->repeat, "passes at each length and share");
  prefill.add_option("--name", p->name, "of this model in the charts")->type_name("TEXT");
  prefill.add_option("--with", p->with, "what another call wrote with --json: its lines join the charts")->expected(1)->allow_extra_args(false)->take_all()->type_name("FILE");
  finish(prefill, p, bench_prefill);

  CLI::App& decode = *app.add_subcommand("decode", "time of one token and bytes of state against context");
  auto d = std::make_shared<DecodeBenchOptions>();
  add_model(decode, d->model, d->schedule);
  add_list(decode, "--contexts", d->contexts, "tokens before, ascending");
  add_count(decode, "--tokens", d->tokens, "decoded at each context, the first of them not timed", 2);
  add_count(decode, "--batch", d->batch, "sequences side by side");
  decode.add_option("--kv", d->kv, "keys and values: keep, drop, or bounded:F+W (docs/state.md)")->capture_default_str()->type_name("WHAT");
  decode.add_flag("--fused,!--no-fused", d->fused, "on a GPU, by one captured launch a token (default; docs/generation.md)");
  decode.add_option("--device", d->model.device, "cpu, cuda or cuda:N")->capture_default_str();
  finish(decode, d, bench_decode);

  CLI::App& speculate = *app.add_subcommand("speculate", "time of a token that is drafted in one mode and verified in another, by acceptance");
  auto g = std::make_shared<SpeculateBenchOptions>();
  add_model(speculate, g->model, g->schedule);
  speculate.add_option("--draft", g->draft, "modes of the drafts")->capture_default_str()->type_name("SCHEDULE");
  add_list(speculate, "--contexts", g->contexts, "tokens before, ascending");
  add_count(speculate, "--tokens", g->tokens, "of each run", 2);
  add_list(speculate, "--draft-tokens", g->draft_tokens, "drafted for a pass");
  speculate.add_option("--acceptance", g->acceptance, "the chance of a draft to be right, whatever the model says: weights are random")->delimiter(',')->capture_default_str()->type_name("X,X,...");
  speculate.add_flag("--fused,!--no-fused", g->fused, "on a GPU, by captured launches (default; docs/generation.md)");
  speculate.add_option("--device", g->model.device, "cpu, cuda or cuda:N")->capture_default_str();
  finish(speculate, g, bench_speculate);

  CLI::App& state = *app.add_subcommand("state", "trim, rejected draft, fork, save and load against reading the context again");
  auto t = std::make_shared<StateBenchOptions>();
  add_model(state, t->model, t->schedule);
  add_list(state, "--contexts", t->contexts, "tokens before, ascending");
  state.add_option("--checkpoint-every", t->checkpoint_every, "tokens between checkpoints; each context is timed with every one of them, and with none")
      ->delimiter(',')->check(CLI::Range(int64_t{0}, int64_t{1} << 30))->capture_default_str()->type_name("N,N,...");
  state.add_flag("--keep-rows", t->keep_rows, "keep rows also where no mixer looks back");
  add_count(state, "--repeat", t->repeat, "runs of each action");
  finish(state, t, bench_state);

  CLI::App& serve = *app.add_subcommand("serve", "load on the serving engine: time to the first token, between tokens, tokens a second, bytes of states");
  auto v = std::make_shared<ServeBenchOptions>();
  add_model(serve, v->model);
  serve.add_option("--device", v->model.device, "cpu, cuda or cuda:N")->capture_default_str();
  serve.add_option("--schedule", v->schedules, "modes of the requests (docs/modes.md), or several with | between them, of the requests in turns; several, each with its own --schedule: a row each")
      ->capture_default_str()->expected(1)->allow_extra_args(false)->take_all()->type_name("TEXT");
  add_list(serve, "--running", v->running, "requests side by side at most; each a row");
  add_count(serve, "--requests", v->requests, "requests; 0: as many as run side by side", 0);
  serve.add_option("--rate", v->rate, "arrivals a second, at random; 0: all at once")->check(CLI::Range(0.0, 1e6))->capture_default_str();
  add_count(serve, "--prompt-least", v->prompt_least, "tokens of a prompt at least, behind what it shares");
  add_count(serve, "--prompt-most", v->prompt_most, "and at most");
  add_count(serve, "--shared", v->shared, "tokens that the prompts of a group begin with; 0: none", 0);
  add_count(serve, "--groups", v->groups, "groups of prompts that begin alike");
  add_count(serve, "--new-tokens", v->new_tokens, "tokens of each answer");
  serve.add_option("--temperature", v->temperature, "of the answers; 0: greedy")->check(CLI::Range(0.0, 1e6))->capture_default_str();
  add_count(serve, "--piece", v->piece, "tokens of a prompt read at once");
  serve.add_option("--gap", v->gap_ms, "milliseconds that a running text may wait for a token while prompts are read; 0: one piece")->check(CLI::Range(0.0, 3.6e6))->capture_default_str()->type_name("MS");
  add_count(serve, "--keep-every", v->keep_every, "keep prefixes at multiples of so many tokens; 0: none", 0);
  serve.add_option("--state-budget", v->state_budget, "memory for states (default: a quarter of what is free)")->transform(CLI::AsSizeValue(false))->type_name("BYTES");
  serve.add_option("--kv", v->kv, "keys and values: keep, drop, or bounded:F+W (docs/state.md)")->capture_default_str()->type_name("POLICY");
  serve.add_flag("--fused,!--no-fused", v->fused, "on a GPU, write by captured launches (default; docs/serving.md)");
  serve.add_flag("--captured-pieces,!--no-captured-pieces", v->captured_pieces, "and read prompts in linear modes so too (default)");
  serve.add_option("--prompt", v->prompts, "in place of least and most: tokens of each prompt behind what it shares; each a row")->delimiter(',')->check(CLI::Range(int64_t{1}, int64_t{1} << 30))->type_name("N,N,...");
  finish(serve, v, bench_serve);

  CLI::App& http = *app.add_subcommand("http", "load on a server over HTTP with streamed answers, any that speaks OpenAI's API: time to the first token, between tokens, requests a second");
  auto h = std::make_shared<HttpBenchOptions>();
  http.add_option("URL", h->url, "the server, as http://127.0.0.1:8080")->required();
  http.add_option("--model", h->model, "its name in requests (default: the first of GET /v1/models)")->type_name("NAME");
  http.add_option("--key", h->key, "sent as a bearer token")->envname("OPENAI_API_KEY")->type_name("TEXT");
  http.add_flag("--chat", h->chat, "ask /v1/chat/completions in place of /v1/completions");
  http.add_option("--schedule", h->schedules, "modes of the requests, of an Oryx server (docs/modes.md); several, each with its own --schedule: rows of each")
      ->expected(1)->allow_extra_args(false)->take_all()->type_name("TEXT");
  http.add_option("--rate", h->rates, "arrivals a second, at random (Poisson); each a row")->delimiter(',')->check(CLI::Range(1e-6, 1e6))->type_name("X,X,...");
  http.add_option("--concurrency", h->concurrency, "or requests in flight, the next one when one has ended; each a row")->delimiter(',')->check(CLI::Range(1, 4096))->type_name("N,N,...");
  add_count(http, "--requests", h->requests, "requests of a row");
  http.add_option("--seconds", h->seconds, "with --rate, in place of --requests: as many as arrive in so long")->check(CLI::Range(0.0, 1e6))->type_name("S");
  add_count(http, "--warmup", h->warmup, "requests before, unmeasured", 0);
  add_count(http, "--prompt-least", h->prompt_least, "tokens of a prompt at least, behind what it shares");
  add_count(http, "--prompt-most", h->prompt_most, "and at most");
  add_count(http, "--shared", h->shared, "tokens that the prompts of a group begin with", 0);
  add_count(http, "--groups", h->groups, "groups of prompts that begin alike");
  add_count(http, "--new-tokens", h->new_tokens, "tokens of each answer");
  http.add_option("--new-most", h->new_most, "drawn evenly from --new-tokens up to it")->check(CLI::Range(int64_t{1}, int64_t{1} << 30))->type_name("N");
  http.add_option("--prompts", h->prompts, "ids: lists of token ids; text: as many common words")->check(CLI::IsMember({"ids", "text"}))->capture_default_str();
  add_count(http, "--vocab", h->vocab, "ids are drawn below it");
  http.add_option("--temperature", h->temperature, "of the answers; 0: greedy")->check(CLI::Range(0.0, 1e6))->capture_default_str();
  http.add_flag("--ignore-eos,!--no-ignore-eos", h->ignore_eos, "send \"ignore_eos\", so that answers are as long as asked for (default); servers that do not know the field may refuse it");
  http.add_option("--body", h->body, "fields that go into each request, as a JSON object")->type_name("JSON");
  http.add_option("--goodput", h->goodput, "count answers within limits, in milliseconds: ttft:500,tpot:50,e2e:5000")->delimiter(',')->type_name("WHAT:MS,...");
  http.add_option("--timeout", h->timeout, "seconds in which nothing comes of an answer: then it has failed")->check(CLI::Range(0.1, 86400.0))->capture_default_str()->type_name("S");
  http.add_option("--name", h->name, "of this server, in the charts")->type_name("TEXT");
  http.add_option("--with", h->with, "what another call wrote with --json: its lines join the charts")->expected(1)->allow_extra_args(false)->take_all()->type_name("FILE");
  finish(http, h, bench_http);

  CLI::App& attention = *app.add_subcommand("attention", "time of span attention against the attended area");
  auto a = std::make_shared<AttentionBenchOptions>();
  add_count(attention, "--length", a->length, "tokens", 2);
  add_count(attention, "--heads", a->heads, "heads");
  add_count(attention, "--head-dim", a->head_dim, "their width");
  add_count(attention, "--repeat", a->repeat, "runs of each case");
  finish(attention, a, bench_attention);
});

}  // namespace
}  // namespace oryx::cli
