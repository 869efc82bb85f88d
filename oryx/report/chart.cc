#include "oryx/report/chart.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "oryx/report/axis.h"
#include "oryx/report/markup.h"

namespace oryx {

namespace {

constexpr size_t kColours = 8;
constexpr size_t kMarkersUpTo = 60;   // points of a line; a longer line shows none
constexpr size_t kTooltips = 300;     // of a longer line: that many points answer the mouse
constexpr size_t kLinePoints = 2000;  // a longer line is drawn by the extremes of its parts
constexpr double kCharacter = 6.7;    // mean width of the labels' letters

double text_width(std::string_view text) {
  const auto letters =
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
  return kCharacter * static_cast<double>(letters);
}

using Point = std::pair<double, double>;

struct Extent {
  double low = std::numeric_limits<double>::infinity(), high = -low;
  void add(double v) {
    low = std::min(low, v);
    high = std::max(high, v);
  }
};

bool drawable(double v, bool log) { return std::isfinite(v) && (!log || v > 0); }

class Drawing {
 public:
  explicit Drawing(const Chart& chart) : chart_(chart) {}

  std::string element(const std::string& style) {
    count_points();
    layout();
    body_ += axes();
    for (size_t i = 0; i < chart_.series.size(); ++i) draw(chart_.series[i], i);
    const std::string label = escape_markup(chart_.title.empty() ? "chart" : chart_.title);
    return fmt::format(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"chart\" viewBox=\"0 0 {} {:.0f}\" width=\"{}\" role=\"img\" "
        "aria-label=\"{}\">{}\n{}</svg>\n",
        chart_.width, total_height_, chart_.width, label, style, body_);
  }

 private:
  void count_points() {
    for (const Series& s : chart_.series) {
      size_t left_out = 0;
      for (const auto& [x, y] : s.points) {
        if (drawable(x, chart_.log_x) && drawable(y, chart_.log_y)) {
          x_.add(x);
          y_.add(y);
        } else {
          ++left_out;
        }
      }
      if (left_out == 0) continue;
      const char* why = chart_.log_x || chart_.log_y ? "not finite or not above 0" : "not finite";
      notes_.push_back(fmt::format("{} of {} points of “{}” {} {} and not drawn", left_out, s.points.size(), s.name,
                                   left_out == 1 ? "is" : "are", why));
    }
    empty_ = x_.low > x_.high;
    if (empty_) {
      notes_.emplace_back("no points");
      x_ = y_ = {1, 2};
    }
    if (chart_.y_low && drawable(*chart_.y_low, chart_.log_y)) y_.low = std::min(*chart_.y_low, y_.high);
    if (chart_.y_high && drawable(*chart_.y_high, chart_.log_y)) y_.high = std::max(*chart_.y_high, y_.low);
  }

  // Room for what stands around the plot.
  void layout() {
    x_axis_ = Axis(x_.low, x_.high, chart_.log_x, false);
    if (!chart_.x_ticks.empty()) x_axis_.ticks_at(chart_.x_ticks);
    y_axis_ = Axis(y_.low, y_.high, chart_.log_y, true);
    double widest = 0;
    for (const Tick& t : y_axis_.ticks()) widest = std::max(widest, text_width(t.label));
    left_ = 16 + widest + (chart_.y_label.empty() ? 0 : 20);
    right_ = chart_.width - 24;
    top_ = 16;
    if (!chart_.title.empty()) {
      top_ += 14;
      body_ += fmt::format("<text class=\"title\" x=\"{:.1f}\" y=\"{:.1f}\">{}</text>\n", left_, top_ - 4,
                           escape_markup(chart_.title));
      top_ += 10;
    }
    if (chart_.series.size() > 1) legend();
    bottom_ = std::max(top_ + 60, static_cast<double>(chart_.height) - (chart_.x_label.empty() ? 28 : 48));
    total_height_ = bottom_ + (chart_.x_label.empty() ? 28 : 48);
    for (const auto& note : notes_) {
      body_ += fmt::format("<text class=\"note\" x=\"{:.1f}\" y=\"{:.1f}\">{}</text>\n", left_, total_height_ + 8,
                           escape_markup(note));
      total_height_ += 18;
    }
  }

  void legend() {
    double x = left_;
    for (size_t i = 0; i < chart_.series.size(); ++i) {
      const double width = 30 + text_width(chart_.series[i].name) + 18;
      if (x + width > right_ + 18 && x > left_) {
        x = left_;
        top_ += 20;
      }
      const double y = top_ + 4;
      if (chart_.series[i].line) {
        body_ += fmt::format("<path class=\"line s{}\" d=\"M{:.1f} {:.1f}h22\"/>\n", i % kColours, x, y);
      }
      body_ += marker(x + 11, y, i, "");
      body_ += fmt::format("<text class=\"label\" x=\"{:.1f}\" y=\"{:.1f}\">{}</text>\n", x + 30, y + 4,
                           escape_markup(chart_.series[i].name));
      x += width;
    }
    top_ += 24;
  }

  double to_x(double v) const { return left_ + x_axis_.place(v) * (right_ - left_); }
  double to_y(double v) const { return bottom_ - y_axis_.place(v) * (bottom_ - top_); }

  std::string axes() const {
    std::string out = empty_ ? "" : ticks();
    out += fmt::format("<path class=\"axis\" d=\"M{:.1f} {:.1f}V{:.1f}H{:.1f}\"/>\n", left_, top_, bottom_, right_);
    if (!chart_.x_label.empty()) {
      out += fmt::format("<text class=\"label\" text-anchor=\"middle\" x=\"{:.1f}\" y=\"{:.1f}\">{}</text>\n",
                         (left_ + right_) / 2, bottom_ + 38, escape_markup(chart_.x_label));
    }
    if (!chart_.y_label.empty()) {
      const double y = (top_ + bottom_) / 2;
      out += fmt::format(
          "<text class=\"label\" text-anchor=\"middle\" transform=\"translate(14 {:.1f}) rotate(-90)\">{}</text>\n", y,
          escape_markup(chart_.y_label));
    }
    return out;
  }

  std::string ticks() const {
    std::string out;
    for (const Tick& t : y_axis_.ticks()) {
      out += fmt::format("<path class=\"grid\" d=\"M{:.1f} {:.1f}H{:.1f}\"/>", left_, to_y(t.value), right_);
      out += fmt::format("<text class=\"tick\" text-anchor=\"end\" x=\"{:.1f}\" y=\"{:.1f}\">{}</text>\n", left_ - 6,
                         to_y(t.value) + 4, t.label);
    }
    double last_end = -1e9;  // labels that would touch are left out, their marks stay
    for (const Tick& t : x_axis_.ticks()) {
      out += fmt::format("<path class=\"grid\" d=\"M{:.1f} {:.1f}V{:.1f}\"/>", to_x(t.value), top_, bottom_ + 4);
      const double half = text_width(t.label) / 2;
      if (to_x(t.value) - half < last_end + 6) continue;
      last_end = to_x(t.value) + half;
      out += fmt::format("<text class=\"tick\" text-anchor=\"middle\" x=\"{:.1f}\" y=\"{:.1f}\">{}</text>\n",
                         to_x(t.value), bottom_ + 18, t.label);
    }
    return out;
  }

  // Each series has a shape of its own too, for readers who cannot tell the colours apart; where colours come round again, they meet another shape.
  static std::string marker(double x, double y, size_t series, const std::string& tooltip) {
    const char* shapes[] = {"m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0", "m-3.2 -3.2h6.4v6.4h-6.4z",
                            "m0 -4.2l4 7h-8z", "m0 -4.6l4.6 4.6l-4.6 4.6l-4.6 -4.6z"};
    const std::string title = tooltip.empty() ? "" : "<title>" + tooltip + "</title>";
    return fmt::format("<path class=\"mark s{}\" d=\"M{:.1f} {:.1f}{}\">{}</path>\n", series % kColours, x, y,
                       shapes[(series + series / kColours) % std::size(shapes)], title);
  }

  bool inside(const Point& p) const { return x_axis_.shows(p.first) && y_axis_.shows(p.second); }

  std::string tooltip(const Series& s, const Point& p) const {
    return escape_markup(fmt::format("{}: {:.6g}, {:.6g}", s.name, p.first, p.second));
  }

  void draw(const Series& s, size_t index) {
    if (s.line) {
      std::vector<Point> run;
      for (const Point& p : s.points) {
        if (inside(p)) {
          run.push_back(p);
        } else {
          line(run, index);
          run.clear();
        }
      }
      line(run, index);
    }
    const bool sparse = !s.line || s.points.size() <= kMarkersUpTo;
    const size_t stride = sparse ? 1 : (s.points.size() + kTooltips - 1) / kTooltips;
    for (size_t i = 0; i < s.points.size(); i += stride) {
      const Point& p = s.points[i];
      if (!inside(p)) continue;
      if (sparse) {
        body_ += marker(to_x(p.first), to_y(p.second), index, tooltip(s, p));
      } else {
        body_ += fmt::format("<circle class=\"hit\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"5\"><title>{}</title></circle>\n",
                             to_x(p.first), to_y(p.second), tooltip(s, p));
      }
    }
  }

  void line(const std::vector<Point>& run, size_t index) {
    if (run.size() < 2) return;
    std::string d;
    for (const Point& p : thinned(run))
      d += fmt::format("{}{:.1f} {:.1f}", d.empty() ? "M" : "L", to_x(p.first), to_y(p.second));
    body_ += fmt::format("<path class=\"line s{}\" d=\"{}\"/>\n", index % kColours, d);
  }

  // Of a long run the lowest and the highest point of each part, in their order: no peak is lost.
  static std::vector<Point> thinned(const std::vector<Point>& run) {
    if (run.size() <= kLinePoints) return run;
    constexpr size_t kParts = kLinePoints / 2;
    std::vector<Point> out = {run.front()};
    for (size_t part = 0; part < kParts; ++part) {
      const auto begin = run.begin() + static_cast<int64_t>(run.size() * part / kParts);
      const auto end = run.begin() + static_cast<int64_t>(run.size() * (part + 1) / kParts);
      const auto [low, high] =
          std::minmax_element(begin, end, [](const Point& a, const Point& b) { return a.second < b.second; });
      out.push_back(*std::min(low, high));
      if (low != high) out.push_back(*std::max(low, high));
    }
    out.push_back(run.back());
    return out;
  }

  const Chart& chart_;
  Extent x_, y_;
  Axis x_axis_{0, 1, false, false}, y_axis_{0, 1, false, false};
  std::vector<std::string> notes_;
  bool empty_ = false;
  double left_ = 0, right_ = 0, top_ = 0, bottom_ = 0, total_height_ = 0;
  std::string body_;
};

}  // namespace

std::string chart_style() {
  constexpr const char* kLight[kColours] = {"#1f6fd1", "#d4541b", "#1a8f5c", "#8e44c9",
                                            "#a67c00", "#c2347a", "#0f8b9d", "#6b6f76"};
  constexpr const char* kDark[kColours] = {"#6aa9ff", "#ff8f5c", "#4fc98e", "#c08af0",
                                           "#e0b13c", "#f07fb2", "#4cc7d8", "#a7adb7"};
  const auto colours = [](const char* const* palette) {
    std::string out;
    for (size_t i = 0; i < kColours; ++i) out += fmt::format(".chart .s{}{{--c:{}}}", i, palette[i]);
    return out;
  };
  return ".chart{max-width:100%;height:auto;font:12px "
         "system-ui,sans-serif;--ink:#1c1e21;--soft:#5f646b;--grid:#e3e5e8}" +
         colours(kLight) +
         ".chart text{fill:var(--ink)}.chart .title{font-size:15px;font-weight:600}.chart .tick,.chart "
         ".note{fill:var(--soft)}"
         ".chart .grid{stroke:var(--grid);fill:none}.chart .axis{stroke:var(--soft);fill:none}"
         ".chart .line{stroke:var(--c);stroke-width:1.8;fill:none;stroke-linejoin:round}.chart .mark{fill:var(--c)}"
         ".chart .hit{fill:transparent}"
         "@media(prefers-color-scheme:dark){.chart{--ink:#e6e8eb;--soft:#a0a6ae;--grid:#33383f}" +
         colours(kDark) + "}";
}

std::string chart_element(const Chart& chart) { return Drawing(chart).element(""); }

std::string chart_svg(const Chart& chart) {
  // A file of its own has no page behind it: it brings its background.
  return Drawing(chart).element(
      "<style>" + chart_style() +
      "svg{background:#fff}@media(prefers-color-scheme:dark){svg{background:#16181b}}</style>");
}

}  // namespace oryx
