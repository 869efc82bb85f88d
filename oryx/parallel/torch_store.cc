#include "oryx/parallel/torch_store.h"

#include <chrono>

#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "oryx/common/error.h"

namespace oryx {

uint16_t share_port_by_torch(const Place& place, uint16_t port, int seconds) {
  const std::string key = "oryx/" + place.attempt + "/port";
  try {
    c10d::TCPStoreOptions o;
    o.port = place.port;
    o.waitWorkers = false;
    o.timeout = std::chrono::seconds(seconds);
    c10d::TCPStore store(place.address, o);
    if (place.rank == 0) {
      const std::string text = std::to_string(port);
      store.set(key, std::vector<uint8_t>(text.begin(), text.end()));
      return port;
    }
    store.wait({key}, o.timeout);
    const auto bytes = store.get(key);
    return static_cast<uint16_t>(std::stoi(std::string(bytes.begin(), bytes.end())));
  } catch (const std::exception&) {
    fail("rank {} of {} did not find rank 0 by way of torchrun's store at MASTER_ADDR {} port {} within {} s; is rank 0 running?", place.rank, place.size, place.address, place.port, seconds);
  }
}

}  // namespace oryx
