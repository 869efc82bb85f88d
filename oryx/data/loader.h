// Training batches from a token file, in an order that depends on nothing but (seed, epoch), and evaluation windows.
//
// Training: the documents of an epoch in shuffled order, end to end, cut into rows of seq_len tokens. A document that a
// row's end cuts goes on in the next row as a fresh sequence; the cut costs no target: each token but a document's
// first is predicted exactly once an epoch. Epochs follow one another without a gap.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <vector>

#include "oryx/data/packing.h"
#include "oryx/data/token_file.h"

namespace oryx {

// A permutation of [0, n) without a table: a Feistel network over Philox, walked until it falls inside [0, n) (Black
// and Rogaway 2002, "Ciphers with arbitrary finite domains").
class Permutation {
 public:
  Permutation(uint64_t n, uint64_t seed, uint64_t epoch);
  uint64_t operator()(uint64_t i) const;

 private:
  uint64_t n_, seed_, epoch_;
  int half_bits_ = 0;
};

// Where the next row begins: part of a checkpoint. The same on every rank, and valid for any number of ranks and rows.
struct LoaderPosition {
  uint64_t epoch = 0;
  uint64_t document = 0;  // index into the epoch's order
  uint64_t offset = 0;    // tokens of that document already given out
  uint64_t data = 0;      // TokenFile::identity()
  uint64_t seed = 0;
  bool operator==(const LoaderPosition&) const = default;
};
void to_json(nlohmann::json& json, const LoaderPosition& position);
// Throws Error on missing or foreign fields.
void from_json(const nlohmann::json& json, LoaderPosition& position);

struct LoaderOptions {
  int64_t batch_size = 1;  // rows of this rank
  int64_t seq_len = 1024;  // tokens a row
  uint64_t seed = 0;
  // A global batch has world * batch_size rows; rank r takes rows r * batch_size and following.
  int rank = 0, world = 1;
};

class TrainLoader {
 public:
  // Throws Error on a file without tokens.
  TrainLoader(std::shared_ptr<const TokenFile> file, const LoaderOptions& options);

  Batch next();

  // Of the batch that next() gives next.
  const LoaderPosition& position() const { return position_; }
  // Throws Error when the position is of other data or another seed.
  void seek(const LoaderPosition& position);

 private:
  void next_row(BatchBuilder* builder);  // nullptr: passes over a row of another rank
  uint64_t advance(uint64_t tokens);

  std::shared_ptr<const TokenFile> file_;
  LoaderOptions options_;
  LoaderPosition position_;
  Permutation order_;
  std::vector<int64_t> buffer_;
};

struct EvalWindow {
  uint64_t document = 0, begin = 0;  // the window's first input: token `begin` of the document
};
struct EvalBatch : Batch {          // one row: input_ids [1, T]
  std::vector<EvalWindow> windows;  // sequence i is bounds[i] .. bounds[i + 1]
};

struct EvalOptions {
  int64_t seq_len = 1024;        // tokens of a window at most; document ends are never crossed
  int64_t tokens_per_batch = 0;  // windows are put together up to this many; 0: seq_len
  uint64_t max_tokens = 0;       // stops after the document that reaches it; 0: reads all
};

// The documents in order, each cut into windows of at most seq_len inputs: every token but a document's first is a
// target exactly once, seen from the window's beginning on.
class EvalReader {
 public:
  EvalReader(std::shared_ptr<const TokenFile> file, const EvalOptions& options);
  // The next batch, or nothing at the end.
  std::optional<EvalBatch> next();
  void rewind() { document_ = begin_ = given_ = 0; }

 private:
  bool at_end();

  std::shared_ptr<const TokenFile> file_;
  EvalOptions options_;
  uint64_t document_ = 0, begin_ = 0, given_ = 0;
  std::vector<int64_t> buffer_;
};

}  // namespace oryx
