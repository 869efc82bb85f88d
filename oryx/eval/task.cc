#include "oryx/eval/task.h"

#include <algorithm>
#include <cmath>

#include "oryx/common/error.h"
#include "oryx/common/progress.h"

namespace oryx {

namespace {

std::vector<EvalTaskKind>& registry() {
  static std::vector<EvalTaskKind> all;
  return all;
}

std::string cell(const EvalColumn& column, const Json& row) {
  const auto it = row.find(column.key);
  return it == row.end() || it->is_null() ? "-" : column.format(*it);
}

}  // namespace

CellFormat cell_text() {
  return [](const Json& j) { return j.is_string() ? j.get<std::string>() : j.dump(); };
}
CellFormat cell_fixed(int digits) {
  return [digits](const Json& j) { return fmt::format("{:.{}f}", j.get<double>(), digits); };
}
CellFormat cell_percent() {
  return [](const Json& j) { return fmt::format("{:.1f}%", 100 * j.get<double>()); };
}
CellFormat cell_count() {
  return [](const Json& j) { return human_count(j.get<double>()); };
}
CellFormat cell_bytes() {
  return [](const Json& j) { return human_bytes(j.get<double>()); };
}

std::vector<std::vector<std::string>> table_cells(const EvalTable& table) {
  std::vector<std::vector<std::string>> lines(1);
  for (const auto& c : table.columns) lines[0].push_back(c.title);
  for (const auto& row : table.rows) {
    auto& line = lines.emplace_back();
    for (const auto& c : table.columns) line.push_back(cell(c, row));
  }
  return lines;
}

std::string format_table(const EvalTable& table) {
  const auto lines = table_cells(table);
  std::string out;
  std::vector<size_t> widths(table.columns.size(), 0);
  for (const auto& line : lines) {
    for (size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], line[i].size());
  }
  for (const auto& line : lines) {
    for (size_t i = 0; i < line.size(); ++i) {
      // Names to the left, numbers to the right.
      out += i == 0 ? fmt::format("{:<{}}", line[i], widths[i]) : fmt::format("  {:>{}}", line[i], widths[i]);
    }
    out.erase(out.find_last_not_of(' ') + 1);
    out += '\n';
  }
  return out;
}

void check_finite(const EvalTable& table) {
  for (const auto& row : table.rows) {
    for (const auto& [key, value] : row.items()) {
      if (value.is_number_float() && !std::isfinite(value.get<double>())) fail("the result '{}' is {}; nothing is reported", key, value.get<double>());
    }
  }
}

std::vector<EvalTaskKind> eval_tasks() {
  auto all = registry();
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  return all;
}

EvalTaskRegistration::EvalTaskRegistration(const char* name, const char* summary, std::unique_ptr<EvalTask> (*make)()) {
  registry().push_back({name, summary, make});
}

bool has_attention_choice(const ModelConfig& config) {
  if (config.layer.combine == "mean") return false;
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const auto& mixers = config.mixers_of(i);
    if (std::find(mixers.begin() + 1, mixers.end(), "attention") != mixers.end()) return true;
  }
  return false;
}

std::vector<std::string> single_modes(const ModelConfig& config) {
  const auto mixers = config.mixers();
  bool choice = mixers.size() == 1;
  if (config.layer.combine != "mean") {
    for (int64_t i = 0; i < config.num_layers; ++i) choice |= config.mixers_of(i).size() > 1;
  }
  return choice ? mixers : std::vector<std::string>{"linear"};
}

}  // namespace oryx
