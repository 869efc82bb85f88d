#include "oryx/mixers/mixer.h"

#include <map>

#include "oryx/common/error.h"

namespace oryx {

namespace {
// Filled by static initialisers, read-only afterwards.
std::map<std::string, detail::MixerFactory>& registry() {
  static std::map<std::string, detail::MixerFactory> r;
  return r;
}
}  // namespace

bool detail::register_mixer(const std::string& name, MixerFactory factory) { return registry().emplace(name, factory).second; }

std::vector<std::string> mixer_names() {
  std::vector<std::string> names;
  for (const auto& [name, factory] : registry()) names.push_back(name);
  return names;
}

std::unique_ptr<Mixer> make_mixer(const std::string& name, const LayerConfig& config) {
  const auto it = registry().find(name);
  if (it == registry().end()) fail("unknown mixer '{}', known: {}{}", name, fmt::join(mixer_names(), ", "), did_you_mean(name, mixer_names()));
  return it->second(config);
}

const at::Tensor& ParameterMap::at(const std::string& name) const {
  const auto it = map_.find(name);
  TORCH_CHECK(it != map_.end(), "no parameter ", name);
  return it->second;
}

}  // namespace oryx
