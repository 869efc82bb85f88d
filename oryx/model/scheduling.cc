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

ModelSchedule::ModelSchedule(const ModelConfig& config, const std::string& text) : text_(text.empty() ? "linear" : text) {
  if (text_.find('{') == std::string::npos) {
    layers_.push_back(Schedule::parse(text_, config.mixers()));
    return;
  }
  std::vector<std::vector<std::string>> mixers;
  for (int64_t i = 0; i < config.num_layers; ++i) mixers.push_back(config.mixers_of(i));
  layers_ = parse_layer_schedules(Json(text_), mixers);
}

std::vector<std::shared_ptr<const Routing>> ModelSchedule::route(const std::vector<ModePiece>& pieces, int64_t rows, int64_t tokens) const {
  std::vector<std::shared_ptr<const Routing>> out;
  for (const auto& schedule : layers_) out.push_back(route_layer(schedule, pieces, rows, tokens));
  return out;
}

bool ModelSchedule::is_random() const {
  return std::any_of(layers_.begin(), layers_.end(), [](const auto& s) { return s.is_random(); });
}

}  // namespace oryx
