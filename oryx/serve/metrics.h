// What a server counts, and its text form for Prometheus.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace oryx::serve {

// Seconds, in buckets that double from 0.5 ms to 131 s.
struct Histogram {
  static constexpr int kBuckets = 19;
  std::array<int64_t, kBuckets + 1> counts{};  // the last: beyond all bounds
  double sum = 0;
  int64_t total = 0;

  static double bound(int i) { return 0.0005 * static_cast<double>(int64_t{1} << i); }
  void add(double seconds);
};

struct EngineStats {
  int64_t queued = 0, running = 0;  // now
  int64_t accepted = 0, refused = 0;
  int64_t finished = 0, cancelled = 0, failed = 0;
  int64_t tokens_read = 0, tokens_reused = 0, tokens_written = 0;
  int64_t tokens_ahead = 0;  // of prompts, in linear mode, for routers that want to know them first
  int64_t prefix_hits = 0, prefix_misses = 0, prefixes = 0;  // of admitted requests; states kept now
  int64_t passes = 0, decode_passes = 0, decode_rows = 0;    // through the model; sequences of decoding passes
  // Bytes now: recurrent states and convolution tails of requests, the same of kept prefixes, pages of keys and values
  // (shared ones once), the limit.
  int64_t recurrent_bytes = 0, prefix_bytes = 0, row_bytes = 0, budget_bytes = 0;
  Histogram queue_time, first_token, between_tokens;
  int64_t used_bytes() const { return recurrent_bytes + prefix_bytes + row_bytes; }
};

// Prometheus' text format (version 0.0.4).
std::string prometheus_text(const EngineStats& stats);

}  // namespace oryx::serve
