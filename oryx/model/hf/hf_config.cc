#include "oryx/model/hf/hf_config.h"

#include "oryx/common/error.h"
#include "oryx/common/utf8.h"

namespace oryx {

HfConfig::HfConfig(Json json, std::string source) : json_(std::move(json)), source_(std::move(source)) {
  if (!json_.is_object()) fail("{}: is {}, expected an object", source_, describe_json(json_));
  ignore({"architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache", "initializer_range",
          "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "output_router_logits",
          "router_aux_loss_coef", "_attn_implementation", "auto_map"});
}

const Json* HfConfig::find(const std::string& key) {
  taken_.insert(key);
  return has(key) ? &json_.at(key) : nullptr;
}

const Json& HfConfig::required(const std::string& key, const std::string& type) {
  const Json* found = find(key);
  if (found == nullptr) fail("{}: the key '{}' is missing, expected {}", source_, key, type);
  return *found;
}

void HfConfig::refuse(const std::string& key, const std::string& supported) const {
  fail("{}: {} is {}, supported: {}", source_, key, json_.contains(key) ? describe_json(json_.at(key)) : "missing", supported);
}

int64_t HfConfig::integer(const std::string& key, std::optional<int64_t> standard) {
  if (standard && find(key) == nullptr) return *standard;
  const Json& value = required(key, "a whole number");
  // Beyond 2^31 no size of a model is meant, and products of two stay within 64 bits.
  if (!value.is_number_integer() || value.get<double>() < 0 || value.get<double>() > 2147483647.0) refuse(key, "a whole number from 0 to 2147483647");
  return value.get<int64_t>();
}

double HfConfig::number(const std::string& key, std::optional<double> standard) {
  if (standard && find(key) == nullptr) return *standard;
  const Json& value = required(key, "a number");
  if (!value.is_number()) refuse(key, "a number");
  return value.get<double>();
}

bool HfConfig::flag(const std::string& key, std::optional<bool> standard) {
  if (standard && find(key) == nullptr) return *standard;
  const Json& value = required(key, "true or false");
  if (!value.is_boolean()) refuse(key, "true or false");
  return value.get<bool>();
}

std::string HfConfig::text(const std::string& key, std::optional<std::string> standard) {
  if (standard && find(key) == nullptr) return *standard;
  const Json& value = required(key, "a string");
  if (!value.is_string()) refuse(key, "a string");
  return value.get<std::string>();
}

std::vector<std::string> HfConfig::texts(const std::string& key) {
  std::vector<std::string> out;
  const Json& list = required(key, "a list of strings");
  if (!list.is_array()) refuse(key, "a list of strings");
  for (const Json& value : list) {
    if (!value.is_string()) refuse(key, "a list of strings");
    out.push_back(value.get<std::string>());
  }
  return out;
}

std::vector<int64_t> HfConfig::integers(const std::string& key) {
  std::vector<int64_t> out;
  const Json& list = required(key, "a list of whole numbers");
  if (!list.is_array()) refuse(key, "a list of whole numbers");
  for (const Json& value : list) {
    if (!value.is_number_integer()) refuse(key, "a list of whole numbers");
    out.push_back(value.get<int64_t>());
  }
  return out;
}

void HfConfig::expect(const std::string& key, const Json& value) {
  const Json* found = find(key);
  if (found != nullptr && *found != value) refuse(key, value.dump());
}

void HfConfig::finish() const {
  for (const auto& [key, value] : json_.items()) {
    const bool nothing = value.is_null() || value == false || value == 0 || value.empty() || value == "";
    if (taken_.count(key) > 0 || nothing) continue;
    fail("{}: the key '{}' is {}, which is not known to leave the model as it is; remove the key if it does", source_, shown(key), describe_json(value));
  }
}

namespace {

void expect_plain(const HfConfig& c, const std::string& key, const Json& object) {
  for (const char* name : {"rope_type", "type"}) {
    if (object.contains(name) && object.at(name) != "default") c.refuse(key, "rope_type \"default\"");
  }
}

}  // namespace

HfRope read_rope(HfConfig& c, double standard_theta, double standard_factor) {
  HfRope rope;
  rope.partial_factor = c.number("partial_rotary_factor", standard_factor);
  rope.theta = c.number("rope_theta", standard_theta);
  c.ignore({"rope_scaling", "rope_parameters"});
  if (c.has("rope_scaling")) {
    if (!c.json().at("rope_scaling").is_object()) c.refuse("rope_scaling", "an object");
    expect_plain(c, "rope_scaling", c.json().at("rope_scaling"));
  }
  if (c.has("rope_parameters")) {
    const Json& p = c.json().at("rope_parameters");
    if (!p.is_object()) c.refuse("rope_parameters", "an object");
    expect_plain(c, "rope_parameters", p);
    HfConfig inner(p, c.source() + ": rope_parameters");
    inner.ignore({"rope_type", "type"});
    // A null base is how a model without rotation says so.
    rope.theta = p.contains("rope_theta") && p.at("rope_theta").is_null() ? 0 : inner.number("rope_theta", rope.theta);
    rope.partial_factor = inner.number("partial_rotary_factor", rope.partial_factor);
    inner.ignore({"rope_theta"});
    inner.finish();
  }
  if (rope.theta < 0 || !(rope.partial_factor > 0 && rope.partial_factor <= 1)) {
    fail("{}: the rotary embedding has base {} and partial_rotary_factor {}, supported: a base above 0 and a factor in (0, 1]", c.source(),
         rope.theta, rope.partial_factor);
  }
  return rope;
}

}  // namespace oryx
