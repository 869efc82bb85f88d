#include "oryx/parallel/place.h"

#include <charconv>
#include <cstdlib>
#include <string_view>

#include "oryx/common/error.h"

namespace oryx {

namespace {

std::optional<std::string> variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::nullopt : std::optional<std::string>(value);
}

// `fallback` where the variable is not set; without one it must be.
int64_t integer_variable(const char* name, int64_t least, int64_t most, std::optional<int64_t> fallback = {}) {
  const auto text = variable(name);
  if (!text && fallback) return *fallback;
  if (!text) fail("WORLD_SIZE is set but {} is not; a launcher sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process (docs/training.md), `oryx train --processes N` does so itself", name);
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), value);
  if (error != std::errc() || end != text->data() + text->size() || value < least || value > most) {
    fail("{} is '{}', expected an integer from {} to {}", name, *text, least, most);
  }
  return value;
}

}  // namespace

std::optional<Place> place_from_environment() {
  if (!variable("WORLD_SIZE")) return {};
  Place p;
  p.size = integer_variable("WORLD_SIZE", 1, 1 << 16);
  p.rank = integer_variable("RANK", 0, p.size - 1, p.size == 1 ? std::optional<int64_t>(0) : std::nullopt);
  p.local_size = integer_variable("LOCAL_WORLD_SIZE", 1, p.size, p.size);
  p.local_rank = integer_variable("LOCAL_RANK", 0, p.local_size - 1, p.rank < p.local_size ? p.rank : 0);
  if (p.size == 1) return p;
  p.port = static_cast<uint16_t>(integer_variable("MASTER_PORT", 1, 65535));
  const auto address = variable("MASTER_ADDR");
  if (!address || address->empty()) fail("WORLD_SIZE is {} but MASTER_ADDR is not set; expected the name or address of the host of rank 0", p.size);
  p.address = *address;
  if (variable(kLauncherVariable)) p.meeting = Place::Meeting::kInLauncher;
  else if (variable("TORCHELASTIC_USE_AGENT_STORE").value_or("") == "True") p.meeting = Place::Meeting::kByTorchrun;
  p.attempt = variable("TORCHELASTIC_RUN_ID").value_or("") + "/" + variable("TORCHELASTIC_RESTART_COUNT").value_or("0");
  return p;
}

}  // namespace oryx
