#include "oryx/serve/metrics.h"

#include <fmt/format.h>

#include <initializer_list>
#include <utility>

namespace oryx::serve {

void Histogram::add(double seconds) {
  int i = 0;
  while (i < kBuckets && seconds > bound(i)) ++i;
  ++counts[static_cast<size_t>(i)];
  sum += seconds;
  ++total;
}

namespace {

void add_value(std::string& out, const char* kind, const char* name, const char* help, int64_t value) {
  out += fmt::format("# HELP oryx_{0} {1}\n# TYPE oryx_{0} {2}\noryx_{0} {3}\n", name, help, kind, value);
}

// One value for each value of `label`.
void add_values(std::string& out, const char* kind, const char* name, const char* help, const char* label,
                std::initializer_list<std::pair<const char*, int64_t>> values) {
  out += fmt::format("# HELP oryx_{0} {1}\n# TYPE oryx_{0} {2}\n", name, help, kind);
  for (const auto& [which, value] : values) out += fmt::format("oryx_{}{{{}=\"{}\"}} {}\n", name, label, which, value);
}

void add_histogram(std::string& out, const char* name, const char* help, const Histogram& h) {
  out += fmt::format("# HELP oryx_{0} {1}\n# TYPE oryx_{0} histogram\n", name, help);
  int64_t sum = 0;
  for (int i = 0; i < Histogram::kBuckets; ++i) {
    sum += h.counts[static_cast<size_t>(i)];
    out += fmt::format("oryx_{}_bucket{{le=\"{:g}\"}} {}\n", name, Histogram::bound(i), sum);
  }
  out +=
      fmt::format("oryx_{0}_bucket{{le=\"+Inf\"}} {1}\noryx_{0}_sum {2}\noryx_{0}_count {1}\n", name, h.total, h.sum);
}

}  // namespace

std::string prometheus_text(const EngineStats& s) {
  std::string out;
  add_value(out, "gauge", "requests_queued", "requests that wait for a place", s.queued);
  add_value(out, "gauge", "requests_running", "requests that are read or written", s.running);
  add_value(out, "counter", "requests_accepted_total", "requests that were taken in", s.accepted);
  add_value(out, "counter", "requests_refused_total", "requests that were not, for a full queue or what they ask",
            s.refused);
  add_values(out, "counter", "requests_total", "requests by how they ended", "end",
             {{"finished", s.finished}, {"cancelled", s.cancelled}, {"failed", s.failed}});
  add_value(out, "counter", "tokens_read_total", "prompt tokens that ran through the model", s.tokens_read);
  add_value(out, "counter", "tokens_ahead_total", "prompt tokens that ran once more before, for a router", s.tokens_ahead);
  add_value(out, "counter", "tokens_reused_total", "prompt tokens that a kept prefix spared", s.tokens_reused);
  add_value(out, "counter", "tokens_written_total", "tokens that were sampled", s.tokens_written);
  add_value(out, "counter", "prefix_hits_total", "requests that began at a kept prefix", s.prefix_hits);
  add_value(out, "counter", "prefix_misses_total", "requests that began from nothing", s.prefix_misses);
  add_value(out, "gauge", "prefixes", "states of prompts' beginnings that are kept", s.prefixes);
  add_value(out, "counter", "decode_passes_total", "passes of one token a sequence", s.decode_passes);
  add_value(out, "counter", "decode_rows_total", "sequences in them, summed", s.decode_rows);
  add_values(out, "gauge", "state_bytes", "bytes of states by part", "part",
             {{"recurrent", s.recurrent_bytes}, {"prefix_recurrent", s.prefix_bytes}, {"rows", s.row_bytes}});
  add_value(out, "gauge", "state_budget_bytes", "bytes that states may take", s.budget_bytes);
  add_histogram(out, "queue_seconds", "from a request's arrival to its first pass", s.queue_time);
  add_histogram(out, "time_to_first_token_seconds", "from a request's arrival to its first token", s.first_token);
  add_histogram(out, "time_between_tokens_seconds", "from a token of a request to its next one", s.between_tokens);
  return out;
}

}  // namespace oryx::serve
