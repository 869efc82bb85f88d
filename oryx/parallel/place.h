// One process among those that train together, as launchers describe it in the environment.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace oryx {

struct Place {
  int64_t rank = 0, size = 1;              // among all processes
  int64_t local_rank = 0, local_size = 1;  // among those of this host
  std::string address = "127.0.0.1";       // where the processes find one another
  uint16_t port = 0;
  enum class Meeting { kInRank0, kInLauncher, kByTorchrun };  // who listens there: torchrun's table does, where rank 0 then says where else
  Meeting meeting = Meeting::kInRank0;
  std::string attempt;  // set apart from an earlier attempt by the same launcher
};

// Set by a launcher of ours: "FD PID", where a process says errors, and who its launcher is.
constexpr const char* kLauncherVariable = "ORYX_LAUNCHER";

// RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them (LOCAL_RANK and LOCAL_WORLD_SIZE too; without them all processes are on one host). Nothing where
// WORLD_SIZE is not set. Throws Error naming the variable that is missing or wrong.
std::optional<Place> place_from_environment();

}  // namespace oryx
