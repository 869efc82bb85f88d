// torchrun's own table, which holds its MASTER_PORT: by way of it rank 0 names a port of its own.
#pragma once

#include <cstdint>

#include "oryx/parallel/place.h"

namespace oryx {

// Rank 0 lays `port` down; the others wait for it, and get it. Throws Error.
uint16_t share_port_by_torch(const Place& place, uint16_t port, int seconds);

}  // namespace oryx
