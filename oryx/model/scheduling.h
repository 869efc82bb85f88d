// From schedules to a batch's routing.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "oryx/model/config.h"
#include "oryx/model/routing.h"
#include "oryx/modes/layer_schedules.h"
#include "oryx/modes/span_table.h"

namespace oryx {

// A parsed schedule of a model: one for all layers, or one a layer.
class ModelSchedule {
 public:
  // `text` as in docs/modes.md, or the JSON form with one schedule a layer. "" is `linear`. Throws Error. `linear`, and what a
  // schedule leaves open, is each layer's own first mixer; so is a mixer that some other layer has and this one lacks. `open`: Schedule::parse.
  ModelSchedule(const ModelConfig& config, const std::string& text, const OpenHead& open = {});

  const std::string& text() const { return text_; }
  // Routings for ModelInput::routing: where each piece of a document stands in the [rows, tokens] batch is in `pieces`, which must
  // cover it.
  std::vector<std::shared_ptr<const Routing>> route(const std::vector<ModePiece>& pieces, int64_t rows, int64_t tokens) const;
  // True when the same document may be routed otherwise for another (seed, step, sequence).
  bool is_random() const;
  // What ModeContext::facts must hold (Schedule::needs).
  std::vector<std::string> needs() const;
  // Those of them that are about tokens of a prompt (Schedule::prompt_needs).
  std::vector<std::string> prompt_needs() const;
  // The heads of its routers, by need (Schedule::gain_heads).
  std::map<std::string, std::shared_ptr<const GainHead>> gain_heads() const;

 private:
  std::vector<std::string> united(std::vector<std::string> (Schedule::*of)() const) const;

  std::string text_;
  std::vector<Schedule> schedules_;  // distinct ones
  std::vector<size_t> layers_;       // layer -> its schedule; empty: all take the only one
};

}  // namespace oryx
