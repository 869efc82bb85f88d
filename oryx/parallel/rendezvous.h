// Where processes that start together find one another: a table of short texts, in memory of one process, reached over TCP. libtorch's TCPStore, so that torchrun's serves too.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "oryx/parallel/place.h"

namespace oryx {

class Rendezvous {
 public:
  // A table of this process's own, at a port of 127.0.0.1 that the system chooses: for a launcher.
  Rendezvous();
  // The table at place.address: rank 0 of a launcher that keeps none opens it. Throws Error, after `seconds` where nobody answers.
  explicit Rendezvous(const Place& place, int64_t seconds = 300);
  ~Rendezvous();
  Rendezvous(const Rendezvous&) = delete;
  Rendezvous& operator=(const Rendezvous&) = delete;

  uint16_t port() const;
  void put(const std::string& key, const std::string& value);
  // Waits for it. Throws Error when it does not come in time.
  std::string take(const std::string& key, const std::string& what);

 private:
  struct Table;
  std::unique_ptr<Table> table_;
};

}  // namespace oryx
