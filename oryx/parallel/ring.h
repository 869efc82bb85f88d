// Processes in a ring over TCP: each sends to the next and receives from the one before. Moves tensors of the CPU and the short messages of all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "oryx/common/error.h"
#include "oryx/parallel/place.h"
#include "oryx/parallel/sockets.h"

namespace oryx {

// A neighbour has closed its connection: its process has ended, for a reason that it gives itself.
class PeerLost : public Error {
 public:
  using Error::Error;
};

class Ring {
 public:
  // Every rank calls it; returns when all have joined. Throws Error.
  explicit Ring(const Place& place);
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  int64_t rank() const { return rank_; }
  int64_t size() const { return size_; }

  // All ranks call the same functions in the same order. Each throws PeerLost where a neighbour is gone.

  // base: size() parts of `bytes` each, of which the own one is filled; afterwards all are.
  void all_gather(void* base, size_t bytes);
  // base: size() parts of `count` values; afterwards the own part holds the sum over the ranks, the others are undefined. Part r is added up in the order of ranks r + 1, r + 2 ...
  // r: the same bits at every call.
  template <typename T>
  void reduce_scatter(T* base, size_t count);
  // What every rank says, by rank.
  std::vector<std::string> gather(const std::string& own);

 private:
  // Sends and receives at the same time.
  void exchange(const void* out, size_t out_bytes, void* in, size_t in_bytes);
  int64_t wrapped(int64_t rank) const { return ((rank % size_) + size_) % size_; }

  int64_t rank_, size_;
  Socket next_, previous_;
  std::vector<char> received_;
};

}  // namespace oryx
