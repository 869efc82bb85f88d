// Reading the config.json of a published Hugging Face checkpoint: every key is taken, known to leave the numbers alone, or refused.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "oryx/common/json.h"

namespace oryx {

// Errors are oryx::Error that name the file, the key, what was found and what is supported. A key that is absent or null has its default.
class HfConfig {
 public:
  HfConfig(Json json, std::string source);

  const std::string& source() const { return source_; }
  const Json& json() const { return json_; }
  bool has(const std::string& key) const { return json_.contains(key) && !json_.at(key).is_null(); }

  // Without a default the key must be there.
  int64_t integer(const std::string& key, std::optional<int64_t> standard = {});
  double number(const std::string& key, std::optional<double> standard = {});
  bool flag(const std::string& key, std::optional<bool> standard = {});
  std::string text(const std::string& key, std::optional<std::string> standard = {});
  std::vector<std::string> texts(const std::string& key);
  std::vector<int64_t> integers(const std::string& key);

  // The key may be absent, null, or this value: the only one supported.
  void expect(const std::string& key, const Json& value);
  // Keys that do not change what the model computes.
  void ignore(std::initializer_list<const char*> keys) { taken_.insert(keys.begin(), keys.end()); }
  // Throws for a key that nothing has taken, unless it is empty (null, false, 0, "", [], {}).
  void finish() const;

  // Throws "SOURCE: KEY is FOUND, supported: SUPPORTED".
  [[noreturn]] void refuse(const std::string& key, const std::string& supported) const;

 private:
  const Json* find(const std::string& key);  // null: absent or null
  const Json& required(const std::string& key, const std::string& type);

  Json json_;
  std::string source_;
  std::set<std::string> taken_;
};

struct HfRope {
  double theta = 0;           // 0: no rotation
  double partial_factor = 1;  // share of a head's dimensions that is rotated
};

// rope_parameters (transformers 5), or rope_theta, rope_scaling and partial_rotary_factor beside each other (4). Only the plain rotary embedding.
HfRope read_rope(HfConfig& config, double standard_theta, double standard_factor = 1);

}  // namespace oryx
