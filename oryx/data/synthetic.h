// Synthetic tasks. Every example is a function of (seed, index): resumed and split runs draw the same.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "oryx/data/tokenizer.h"

namespace oryx {

// Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): key-value pairs, then some of the keys again,
// each of which asks for its value.
//
//   k1 v1 k2 v2 ... kP vP   k7 v7 k2 v2 ... (queries)        targets only at the queries' keys: the value that follows
//
// With length > 2 * (pairs + queries), filler tokens stand between the pairs and before the queries; the queries are
// the last 2 * queries tokens always. Ids: keys [0, key_symbols), values after them, filler symbols after those.
struct RecallOptions {
  int64_t pairs = 16;   // keys of one sequence are distinct: at most key_symbols
  int64_t queries = 4;  // distinct keys among them as long as queries <= pairs, then the round begins again
  int64_t length = 0;   // tokens; 0: 2 * (pairs + queries)
  int64_t key_symbols = 64, value_symbols = 64, filler_symbols = 16;

  int64_t tokens() const { return length > 0 ? length : 2 * (pairs + queries); }
  int64_t vocab_size() const { return key_symbols + value_symbols + filler_symbols; }
  // Share of the tokens that are a query's key: what a schedule must put into attention at least.
  double query_share() const { return static_cast<double>(queries) / static_cast<double>(tokens()); }
};

// Throws Error on counts that do not fit together.
void check(const RecallOptions& options);

struct RecallExample {
  std::vector<int64_t> ids, targets;     // [T]; targets kIgnoreTarget but at the queries
  std::vector<int32_t> query_positions;  // [Q], rising: the queries' keys
};
RecallExample recall_example(const RecallOptions& options, uint64_t seed, uint64_t index);

struct RecallBatch {
  at::Tensor input_ids, targets;  // [B, T] int64
  at::Tensor query_positions;     // [B, Q] int32
};
// Examples first_index to first_index + batch_size - 1.
RecallBatch recall_batch(const RecallOptions& options, uint64_t seed, uint64_t first_index, int64_t batch_size);

// Needle in a haystack: a sentence hidden in a long text, and a question about it at the end (the single-needle tasks
// of RULER, Hsieh et al. 2024, arXiv 2404.06654).
enum class NeedleKind {
  noise,         // hay of a few sentences over and over; a number is asked for
  essay_number,  // hay from given documents; a number is asked for
  essay_word,    // hay from given documents; a word of 8 hexadecimal digits is asked for
};
NeedleKind parse_needle_kind(const std::string& name);  // "noise", "essay_number", "essay_word"; throws Error
std::string to_string(NeedleKind kind);

struct NeedleExample {
  std::vector<int32_t> ids;                  // bos, hay with the needle, question: the prompt
  std::vector<int32_t> answer_ids;           // what should follow
  std::string needle, question, answer;      // the answer without the space before it
  int64_t needle_begin = 0, needle_end = 0;  // tokens of the prompt
};

class NeedleTask {
 public:
  // `documents`: hay for the essay kinds (ignored for noise), used end to end and over again when they are too short.
  // Throws Error when an essay kind gets no text. The tokeniser must outlive the task.
  NeedleTask(const Tokenizer& tokenizer, NeedleKind kind, const std::vector<std::string>& documents = {});

  // A prompt of at most `length` tokens, short of it by less than one sentence of hay; `depth` in [0, 1] is the share
  // of the hay before the needle, which stands between two sentences. Throws Error when needle and question alone are
  // longer than `length`.
  NeedleExample example(int64_t length, double depth, uint64_t seed, uint64_t index) const;

 private:
  const Tokenizer& tokenizer_;
  NeedleKind kind_;
  std::vector<std::vector<int32_t>> sentences_;
};

}  // namespace oryx
