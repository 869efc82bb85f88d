// One process among those that train together, as launchers describe it in the environment.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace oryx {

struct Place {
  int64_t rank = 0, size = 1;              // among all processes
  int64_t local_rank = 0, local_size = 1;  // among those of this host
  std::string address = "127.0.0.1";       // where the processes find one another: rank 0 listens there ...
  uint16_t port = 0;
  bool store_is_elsewhere = false;  // ... unless the launcher does
  std::string attempt;              // set apart from an earlier attempt by the same launcher
};

// RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them (LOCAL_RANK and LOCAL_WORLD_SIZE too; without them all processes are on one host). Nothing where
// WORLD_SIZE is not set. Throws Error naming the variable that is missing or wrong.
std::optional<Place> place_from_environment();

}  // namespace oryx
