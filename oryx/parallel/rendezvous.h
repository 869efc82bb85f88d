// Where processes that start together find one another: each says where it listens, and learns where the next one does.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>

#include "oryx/parallel/place.h"
#include "oryx/parallel/sockets.h"

namespace oryx {

// Answers all processes when the last one has come. In a launcher, or in rank 0.
class Rendezvous {
 public:
  // Of `size` processes, of this host alone, at a port that the system chooses.
  explicit Rendezvous(int64_t size) : Rendezvous(size, 0, "port", true) {}
  // port 0: one that the system chooses. what: how a port that is taken is named. Throws Error.
  Rendezvous(int64_t size, uint16_t port, const std::string& what, bool this_host_alone);
  ~Rendezvous();
  Rendezvous(const Rendezvous&) = delete;
  Rendezvous& operator=(const Rendezvous&) = delete;
  uint16_t port() const { return port_; }

 private:
  void serve();

  int64_t size_;
  uint16_t port_;
  Socket listener_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

struct Neighbour {
  std::string host;
  uint16_t port = 0;
};
// The place where rank + 1 listens, for a process that listens at own_port. Returns when all have come. Throws Error, after `seconds` where they have not.
Neighbour find_next(const Place& place, uint16_t own_port, int seconds = 300);

}  // namespace oryx
