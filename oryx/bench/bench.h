// The benchmarks of `oryx bench`: how fast and how large a model is on the machine at hand. Random weights and random tokens: neither
// changes the time.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "oryx/common/json.h"
#include "oryx/eval/task.h"
#include "oryx/model/config.h"
#include "oryx/report/chart.h"

namespace oryx {

struct BenchResult {
  EvalTable table;
  Json options;
  std::string note = {};  // a line below the table
  std::vector<Chart> charts = {};  // for a report
  std::string error = {};  // why not all rows are there: said behind those that are, and the program's exit code is 1
};

struct BenchModel {
  std::string preset;  // or the path of a training config (.json), whose model it then is
  std::string precision = "float32";  // of activations: float32 or bfloat16; parameters are float32
  std::string device = "cpu";         // of bench_prefill and bench_decode: cpu, cuda or cuda:N
  ModelConfig config() const;
  at::ScalarType compute() const { return precision == "bfloat16" ? at::kBFloat16 : at::kFloat; }
};

struct StepBenchOptions {
  BenchModel model;
  std::vector<std::string> schedules = {"linear"};
  std::string device = "cpu";
  std::vector<int64_t> batch_sizes = {2}, seq_lens = {512};  // pairs: as many of one as of the other, or one of either for all
  int64_t warmup = 2, repeat = 5;
  bool checkpoint_layers = false;
  // On a GPU replay captured steps where they can be captured; where not given, where training does by itself. They are captured during the warm-up, if it has 2 steps or more.
  std::optional<bool> cuda_graph;
};
// A full training step: forward, loss, backward, clipping, AdamW. One row for each shape and schedule, of one and the same model, so that a mixture stands beside its parts: batch,
// seq_len, step_ms (median), min_ms, cpu_ms (of the processor, all threads), tokens_per_second, gflops (three times the forward's, over the median), peak_bytes (on a GPU of its
// memory), and every step's times in all_ms and all_cpu_ms. On a GPU the times are of the device, from the end of one step to the end of the next, and mfu is the share of
// kPeakFlops (oryx/model/device.h).
BenchResult bench_step(const StepBenchOptions& options);

struct ForwardBenchOptions {
  BenchModel model;
  std::string schedule = "linear";
  std::vector<int64_t> lengths = {1024, 4096, 16384, 65536};
  int64_t piece = 0;  // tokens of one pass, with a state, as generation reads a prompt; 0: one pass over all, without a state
  int64_t repeat = 1;
};
// A forward without gradients at each length. Rows: tokens, ms (median), memory_bytes (peak above what the process held before),
// state_bytes, and both per token relative to the first length (1 is proportional).
BenchResult bench_forward(const ForwardBenchOptions& options);

struct PrefillBenchOptions {
  BenchModel model;
  std::vector<int64_t> lengths = {2048, 8192};
  std::vector<int64_t> shares = {0, 5, 10, 25, 100};  // percent of the prompt's tokens that are read in attention
  std::string placement = "last";                     // where they are: last, the prompt's end; random, chunks of 256 tokens
  int64_t piece = 8192;                               // tokens of one pass
  std::string kv = "keep";                            // keys and values: keep, drop, bounded:F+W (StateOptions); drop takes shares of 0 only
  int64_t page_tokens = 1024;                         // StateOptions: on a GPU, small pages of a bounded state cost more launches than they save bytes
  int64_t repeat = 3;
  std::string name = {};                              // of this model, in the charts
  std::vector<std::string> with = {};                 // results of other calls (--json), whose lines join the charts
};
// A prompt read into a new state, piece by piece, as generation does. Rows: tokens, attention_share (of the tokens, as it came out), ms (median), tokens_per_second,
// peak_bytes (on a GPU all that tensors take, weights included; on a CPU what came on top of what was there) and state_bytes.
BenchResult bench_prefill(const PrefillBenchOptions& options);

struct DecodeBenchOptions {
  BenchModel model;
  std::string schedule = "linear";
  std::vector<int64_t> contexts = {512, 2048, 8192};
  int64_t tokens = 16;  // decoded at each context, the first of them not timed
  int64_t batch = 1;    // sequences side by side
  bool fused = true;    // on a GPU by one captured launch a token (oryx/generate/fused_decoder.h)
  std::string kv = "keep";  // keys and values that the state holds (set_kv)
};
// Token by token behind each of the contexts, whose rows are random. Rows: context, ms_per_token (the median; on a GPU the mean of tokens that follow one another without the
// host), relative to the first, bound_ms (weights, recurrent states read and written and, for tokens in attention, their rows, over the rate of a large copy on the device) and
// the share of it that was reached, predicted_bytes and measured_bytes of state (see StateBytes).
BenchResult bench_decode(const DecodeBenchOptions& options);

struct SpeculateBenchOptions {
  BenchModel model;
  std::string schedule = "attention";  // of the text
  std::string draft = "linear";
  std::vector<int64_t> contexts = {4096, 32768};
  int64_t tokens = 96;                        // of a run
  std::vector<int64_t> draft_tokens = {3, 7};
  std::vector<double> acceptance = {0.6, 0.8, 0.9, 1};  // the chance of each draft to be right, whatever the model says
  bool fused = true;
};
// Token by token through a DraftedSession, behind contexts whose rows are random, every pass with as many drafts. Rows: context, draft_tokens (0: the text's modes alone), wanted (the
// acceptance that was given) and acceptance (that came out), ms_per_token, all counted but the choice of the text's own tokens, speed (times that of the modes alone), tokens_a_pass, draft_ms (a
// drafted token), pass_ms and, on a GPU, device_ms (passes behind one another, without the host).
BenchResult bench_speculate(const SpeculateBenchOptions& options);

struct StateBenchOptions {
  BenchModel model;
  std::string schedule = "linear";
  std::vector<int64_t> contexts = {1024, 8192, 32768};
  std::vector<int64_t> checkpoint_every = {1024, 4096, 16384};  // tokens; the context is read in pieces of at most 1,024, at whose ends checkpoints stand
  bool keep_rows = false;
  int64_t repeat = 3;
};
// Going back, forking and resuming against reading the context again. Each context is read once for all its rows, with the closest checkpoints, and the trims,
// on forks of a state without a ring, are timed under ever fewer of them. Rows: context, action, checkpoint_every (null where it plays no part; 0: none), ms (median),
// rerun_ms (reading the context again), relative_time (rerun_ms over ms), scanned tokens (an upper bound), and bytes: state_bytes (recurrent, tails and
// rows), checkpoint_bytes, ring_bytes.
BenchResult bench_state(const StateBenchOptions& options);

struct ServeBenchOptions {
  BenchModel model;
  std::vector<std::string> schedules = {"linear"};  // of all requests; several with | between them: of the requests in turns
  std::vector<int64_t> running = {1, 8};  // requests side by side at most
  int64_t requests = 24;                  // 0: as many as run side by side
  double rate = 0;                        // arrivals a second, at random (exponential gaps); 0: all at once
  int64_t prompt_least = 64, prompt_most = 512;  // tokens of a prompt behind what it shares, drawn evenly
  std::vector<int64_t> prompts = {};      // in place of both: of each prompt; each a row
  int64_t shared = 256;                   // tokens that prompts of a group begin with; 0: none
  int64_t groups = 2;
  int64_t new_tokens = 32;
  double temperature = 0;                 // 0: greedy
  int64_t piece = 256, keep_every = 256;
  double gap_ms = 0;  // EngineOptions::gap_seconds
  int64_t state_budget = 0;
  std::string kv = "keep";
  bool fused = true, captured_pieces = true;
};
// Load on the serving engine (oryx/serve/engine.h), in this process and without HTTP. Every row serves the same requests with an engine of its own. Rows: schedule, running, prompt (where there are several),
// first_ms and first_p95_ms (from arrival to the first token), between_ms and between_p95_ms, read_per_second and written_per_second (tokens over the whole run), reused (share of
// the prompts' tokens that kept prefixes spared), batch (sequences of a decoding pass, mean), and the most bytes of states at once, by part: recurrent_bytes of requests,
// prefix_bytes (recurrent states of kept prefixes), row_bytes (keys and values of both); decode_per_second (tokens written a second while nothing was read); on a GPU also peak_bytes
// of its memory, and fused (whether texts were written by captured launches). There a request of each schedule runs before, unmeasured: a process's first pass is slow.
BenchResult bench_serve(const ServeBenchOptions& options);

struct HttpBenchOptions {
  std::string url;
  std::string model;                         // its name in requests; "": the first that GET /v1/models names
  std::string key;                           // a bearer token
  bool chat = false;                         // /v1/chat/completions in place of /v1/completions
  std::vector<std::string> schedules = {""};  // the field `schedule` of an Oryx server's requests; "": not sent
  std::vector<double> rates;                 // arrivals a second, at random (exponential gaps); each a row
  std::vector<int64_t> concurrency;          // or: requests in flight, the next one when one has ended; each a row
  int64_t requests = 64, warmup = 2;         // of a row; before the first row, unmeasured
  double seconds = 0;                        // above 0: in place of `requests`, as many as arrive in so long at the row's rate
  int64_t prompt_least = 512, prompt_most = 512;  // tokens of a prompt behind what it shares, drawn evenly
  int64_t shared = 0, groups = 1;            // tokens that prompts of a group begin with
  int64_t new_tokens = 64, new_most = 0;     // of an answer, drawn evenly up to new_most where that is given
  std::string prompts = "ids";               // ids: lists of token ids; text: that many common words, which are about as many tokens
  int64_t vocab = 256;                       // ids are drawn below it
  double temperature = 0;
  bool ignore_eos = true;                    // sends "ignore_eos": answers are as long as asked for (vLLM, SGLang, Oryx)
  std::string body;                          // a JSON object whose fields go into each request
  std::vector<std::string> goodput;          // limits in milliseconds: ttft:500, tpot:50, e2e:5000
  double timeout = 300;                      // seconds in which nothing comes of an answer
  std::string name = {};                     // of this server, in the charts
  std::vector<std::string> with = {};        // results of other calls (--json), whose lines join the charts
};
// Load on a server over HTTP with streamed answers: any that speaks OpenAI's completions or chats. Rows: schedule, rate or concurrency, requests, completed, failed, seconds (from the first
// request to the last answer), requests_per_second, tokens_per_second (written), prompt_tokens and new_tokens (mean, as the server counts); of ttft (to the first piece of text), tpot
// (between tokens, the mean of an answer), itl (between pieces of text, of all answers together) and e2e (to the last piece) *_ms_mean, _p50, _p90, _p99; in_flight (mean);
// goodput (answers a second within the limits) where there are limits; state_bytes (the most at once, sampled) of a server that says it in /metrics as ours does. Ctrl-C ends the row that
// runs: it counts what had come to its end. A row without any answer is an error: thrown when it is the first, else in BenchResult::error behind the rows before it.
BenchResult bench_http(const HttpBenchOptions& options);

struct AttentionBenchOptions {
  int64_t length = 8192, heads = 12, head_dim = 64;
  int64_t repeat = 3;
};
// The span attention operator alone, float32, no gradients. Rows: case (full causal, last 10% of the queries, a quarter of the 256-token
// chunks), ms (median), relative to full causal, and the attended area relative to full causal.
BenchResult bench_attention(const AttentionBenchOptions& options);

}  // namespace oryx
