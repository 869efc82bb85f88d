// Line and scatter charts as SVG, without scripts or anything from elsewhere; they follow the reader's light or dark
// setting.
//
// Points that are not finite (or not above 0 on a log axis) are left out, break the line, and are counted in a note
// below the chart. The same chart gives the same bytes.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace oryx {

struct Series {
  std::string name;
  std::vector<std::pair<double, double>> points = {};  // (x, y), in the order in which the line visits them
  bool line = true;                               // false: a scatter of points
};

struct Chart {
  std::string title = {}, x_label = {}, y_label = {};
  std::vector<Series> series = {};
  bool log_x = false, log_y = false;
  std::optional<double> y_low = {}, y_high = {};  // default: from the points
  std::vector<double> x_ticks = {};               // values to mark on the x axis; default: round numbers
  int width = 760, height = 400;
};

// A file of its own.
std::string chart_svg(const Chart& chart);
// Without the style sheet, for a document that holds chart_style() once.
std::string chart_element(const Chart& chart);
std::string chart_style();

}  // namespace oryx
