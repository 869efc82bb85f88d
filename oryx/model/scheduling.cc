#include "oryx/model/scheduling.h"

#include <algorithm>

namespace oryx {

namespace {

std::shared_ptr<const Routing> route_layer(const Schedule& schedule, const std::vector<ModePiece>& pieces, int64_t rows, int64_t tokens) {
  std::vector<RoutedSpan> spans;
  for (const auto& p : pieces) {
    const auto shift = static_cast<int32_t>(p.column - p.start);
    for (const ModeSpan& s : schedule.resolve(p.context, p.start, p.start + p.length)) {
      spans.push_back({static_cast<int32_t>(p.row), s.begin + shift, s.end + shift, s.mixer});
    }
  }
  std::sort(spans.begin(), spans.end(), [](const auto& a, const auto& b) { return std::pair(a.row, a.begin) < std::pair(b.row, b.begin); });
  return std::make_shared<Routing>(rows, tokens, schedule.mixers(), std::move(spans));
}

}  // namespace

ModelSchedule::ModelSchedule(const ModelConfig& config, const std::string& text, const OpenHead& open) : text_(text.empty() ? "linear" : text) {
  std::vector<std::vector<std::string>> mixers;
  for (int64_t i = 0; i < config.num_layers; ++i) mixers.push_back(config.mixers_of(i));
  if (text_.find('{') != std::string::npos) {
    schedules_ = parse_layer_schedules(Json(text_), mixers, open);
    for (size_t i = 0; i < schedules_.size(); ++i) layers_.push_back(i);
    return;
  }
  const bool one_first = std::all_of(mixers.begin(), mixers.end(), [&](const auto& m) { return m.front() == mixers.front().front(); });
  if (one_first) {
    schedules_.push_back(Schedule::parse(text_, config.mixers(), {}, open));
    return;
  }
  // Layers of one kind share a schedule, and with it the routing's token sets.
  std::vector<std::vector<std::string>> kinds;
  for (const auto& m : mixers) {
    const auto at = static_cast<size_t>(std::find(kinds.begin(), kinds.end(), m) - kinds.begin());
    if (at == kinds.size()) {
      kinds.push_back(m);
      schedules_.push_back(Schedule::parse(text_, m, config.mixers(), open));
    }
    layers_.push_back(at);
  }
}

std::vector<std::shared_ptr<const Routing>> ModelSchedule::route(const std::vector<ModePiece>& pieces, int64_t rows, int64_t tokens) const {
  std::vector<std::shared_ptr<const Routing>> routings;
  for (const auto& schedule : schedules_) routings.push_back(route_layer(schedule, pieces, rows, tokens));
  if (layers_.empty()) return routings;
  std::vector<std::shared_ptr<const Routing>> out;
  for (const size_t i : layers_) out.push_back(routings[i]);
  return out;
}

std::vector<std::string> ModelSchedule::united(std::vector<std::string> (Schedule::*of)() const) const {
  std::vector<std::string> all;
  for (const auto& s : schedules_) {
    for (const auto& need : (s.*of)()) {
      if (std::find(all.begin(), all.end(), need) == all.end()) all.push_back(need);
    }
  }
  return all;
}

std::vector<std::string> ModelSchedule::needs() const { return united(&Schedule::needs); }
std::vector<std::string> ModelSchedule::prompt_needs() const { return united(&Schedule::prompt_needs); }

std::map<std::string, std::shared_ptr<const GainHead>> ModelSchedule::gain_heads() const {
  std::map<std::string, std::shared_ptr<const GainHead>> all;
  for (const auto& s : schedules_) all.merge(s.gain_heads());
  return all;
}

bool ModelSchedule::is_random() const {
  return std::any_of(schedules_.begin(), schedules_.end(), [](const auto& s) { return s.is_random(); });
}

}  // namespace oryx
