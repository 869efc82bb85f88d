#include "oryx/report/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <limits>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/report/axis.h"
#include "oryx/report/markup.h"

namespace oryx {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

std::vector<std::string> labels(const Axis& axis) {
  std::vector<std::string> out;
  for (const Tick& t : axis.ticks()) out.push_back(t.label);
  return out;
}

TEST(Markup, EscapesWhatMarkupWouldTake) {
  EXPECT_EQ(escape_markup("<b>&\"'\x01\xff\n"), "&lt;b&gt;&amp;&quot;&#39;??\n");
  EXPECT_EQ(escape_markup("é ≤ 3"), "é ≤ 3");
}

TEST(Markup, ShortNumbers) {
  EXPECT_EQ(short_number(0.25), "0.25");
  EXPECT_EQ(short_number(-0.0), "0");
  EXPECT_EQ(short_number(20000), "20k");
  EXPECT_EQ(short_number(1.5e6), "1.5M");
  EXPECT_EQ(short_number(3e-5), "3e-05");
}

TEST(Axis, LinearTicksAreRound) {
  EXPECT_EQ(labels(Axis(0.03, 0.97, false, true)), (std::vector<std::string>{"0", "0.2", "0.4", "0.6", "0.8", "1"}));
  EXPECT_EQ(labels(Axis(0, 1000, false, false)), (std::vector<std::string>{"0", "200", "400", "600", "800", "1000"}));
  EXPECT_EQ(labels(Axis(-3, 3, false, true)), (std::vector<std::string>{"-3", "-2", "-1", "0", "1", "2", "3"}));
}

TEST(Axis, LogTicks) {
  EXPECT_EQ(labels(Axis(1, 100, true, false)), (std::vector<std::string>{"1", "2", "5", "10", "20", "50", "100"}));
  EXPECT_EQ(labels(Axis(30, 700, true, true)), (std::vector<std::string>{"20", "50", "100", "200", "500", "1000"}));
  EXPECT_LE(labels(Axis(1e-30, 1e30, true, true)).size(), 10u);
  EXPECT_NEAR(Axis(1, 100, true, false).place(10), 0.5, 1e-12);
}

TEST(Axis, DegenerateRangesKeepTheValueInside) {
  for (const double v : {0.0, 5.0, -2.0, 1e300, 1e-300}) {
    const Axis a(v, v, false, true);
    EXPECT_GE(a.place(v), 0) << v;
    EXPECT_LE(a.place(v), 1) << v;
  }
  for (const bool log : {false, true}) {
    const Axis wide(log ? 1e-308 : -1.7e308, 1.7e308, log, true);
    EXPECT_TRUE(std::isfinite(wide.place(1)));
    EXPECT_LT(wide.ticks().size(), 20u);
  }
  const Axis narrow(1, std::nextafter(1, 2), false, true);
  EXPECT_LT(narrow.ticks().size(), 20u);
  EXPECT_TRUE(std::isfinite(Axis(3, 3, true, true).place(3)));
}

Chart example() {
  return {.title = "Recall <& more>",
          .x_label = "share",
          .y_label = "correct",
          .series = {{"a\"b", {{0, 0.5}, {0.5, 0.7}, {1, 0.9}}, true}, {"points", {{0.2, 0.3}, {0.4, 0.1}}, false}}};
}

TEST(Chart, HoldsSeriesMarksTooltipsAndEscapes) {
  const std::string svg = chart_svg(example());
  EXPECT_THAT(svg, StartsWith("<svg xmlns=\"http://www.w3.org/2000/svg\""));
  EXPECT_THAT(svg, HasSubstr("Recall &lt;&amp; more&gt;"));
  EXPECT_THAT(svg, HasSubstr("<title>a&quot;b: 0.5, 0.7</title>"));
  EXPECT_EQ(count(svg, "<title>"), 5u);
  EXPECT_EQ(count(svg, "class=\"line s0\""), 2u);  // the legend's and the line
  EXPECT_EQ(count(svg, "class=\"line s1\""), 0u);  // a scatter
  EXPECT_THAT(svg, Not(HasSubstr("nan")));
}

TEST(Chart, PlacesPointsBetweenTheAxes) {
  Chart c;
  c.series = {{"s", {{0, 0}, {10, 1}}, true}};
  const std::string svg = chart_element(c);
  // The line goes from the lower left to the upper right corner of the plot, which the axis line draws.
  const size_t axis = svg.find("class=\"axis\" d=\"M");
  double left = 0, top = 0, bottom = 0, right = 0, x0 = 0, y0 = 0, x1 = 0, y1 = 0;
  ASSERT_EQ(std::sscanf(svg.c_str() + axis, "class=\"axis\" d=\"M%lf %lfV%lfH%lf", &left, &top, &bottom, &right), 4);
  const size_t line = svg.find("class=\"line s0\" d=\"M");
  ASSERT_EQ(std::sscanf(svg.c_str() + line, "class=\"line s0\" d=\"M%lf %lfL%lf %lf", &x0, &y0, &x1, &y1), 4);
  EXPECT_EQ((std::vector<double>{x0, y0, x1, y1}), (std::vector<double>{left, bottom, right, top}));
}

TEST(Chart, TicksStandWhereTheyAreAskedFor) {
  Chart c;
  c.log_x = true;
  c.x_ticks = {512, 1024, 16384, kNan};
  c.series = {{"s", {{1024, 1}, {16384, 2}}, true}};
  const std::string svg = chart_element(c);
  EXPECT_THAT(svg, HasSubstr(">1024</text>"));
  EXPECT_THAT(svg, HasSubstr(">16384</text>"));
  EXPECT_THAT(svg, Not(HasSubstr(">512</text>")));   // left of the points
  EXPECT_THAT(svg, Not(HasSubstr(">2000</text>")));  // a round number
}

// Eight colours and four shapes: the ninth series has the first one's colour and another shape.
TEST(Chart, SeriesBeyondTheColoursCanStillBeTold) {
  Chart c;
  for (int i = 0; i < 9; ++i) c.series.push_back({fmt::format("s{}", i), {{i, i}}, false});
  const std::string svg = chart_element(c);
  const auto shape_of_last = [&](const std::string& tooltip) {
    const size_t title = svg.find("<title>" + tooltip), from = svg.rfind('m', svg.rfind('"', title));
    return svg.substr(from, title - from);
  };
  EXPECT_NE(shape_of_last("s0:"), shape_of_last("s8:"));
}

TEST(Chart, PointsThatAreNotFiniteAreLeftOutAndSaid) {
  Chart c;
  c.series = {{"loss", {{0, 3}, {1, 2.5}, {2, kNan}, {3, 2}, {4, kInf}, {5, 1}, {kNan, 1}}, true}};
  const std::string svg = chart_svg(c);
  EXPECT_THAT(svg, HasSubstr("3 of 7 points of “loss” are not finite and not drawn"));
  EXPECT_EQ(count(svg, "<title>"), 4u);
  EXPECT_EQ(count(svg, "class=\"line s0\""), 1u);  // only 0-1: the other runs are single points
  EXPECT_THAT(svg, Not(HasSubstr("nan")));
  EXPECT_THAT(svg, Not(HasSubstr("inf")));
}

TEST(Chart, LogAxesLeaveOutWhatIsNotPositive) {
  Chart c;
  c.log_y = true;
  c.series = {{"p", {{0, 0}, {1, 1}, {2, 100}, {3, -5}}, true}};
  const std::string svg = chart_svg(c);
  EXPECT_THAT(svg, HasSubstr("2 of 4 points of “p” are not finite or not above 0 and not drawn"));
  EXPECT_THAT(svg, Not(HasSubstr("nan")));
}

TEST(Chart, WithoutPointsSaysSo) {
  EXPECT_THAT(chart_svg({}), HasSubstr(">no points</text>"));
  Chart c;
  c.log_x = c.log_y = true;
  c.series = {{"n", {{kNan, kNan}}, true}};
  EXPECT_THAT(chart_svg(c), HasSubstr(">no points</text>"));
}

TEST(Chart, LongLinesStaySmallAndKeepTheirPeak) {
  Chart c;
  c.series = {{"long", {}, true}};
  for (int i = 0; i < 100000; ++i) c.series[0].points.emplace_back(i, i == 54321 ? 10 : 0);
  const std::string svg = chart_element(c);
  EXPECT_LT(svg.size(), 200000u);
  const size_t axis = svg.find("class=\"axis\" d=\"M");
  double left = 0, top = 0;
  ASSERT_EQ(std::sscanf(svg.c_str() + axis, "class=\"axis\" d=\"M%lf %lf", &left, &top), 2);
  const size_t line = svg.find("class=\"line s0\"");
  EXPECT_NE(svg.find(fmt::format(" {:.1f}L", top), line), std::string::npos);
}

TEST(Report, HoldsEverythingAndNothingFromElsewhere) {
  Report r("A <title>");
  r.heading("H & h");
  r.text("text <script>alert(1)</script>");
  r.code("a  <  b");
  r.table({"mode", "correct"}, {{"<linear>", "0.5"}, {"attention", "-"}}, "cap & tion");
  r.chart(example());
  const std::string html = r.html();
  EXPECT_THAT(html, StartsWith("<!doctype html>"));
  EXPECT_THAT(html, HasSubstr("<title>A &lt;title&gt;</title>"));
  EXPECT_THAT(html, HasSubstr("<h2>H &amp; h</h2>"));
  EXPECT_THAT(html, HasSubstr("<p>text &lt;script&gt;alert(1)&lt;/script&gt;</p>"));
  EXPECT_THAT(html, HasSubstr("<pre>a  &lt;  b</pre>"));
  EXPECT_THAT(html, HasSubstr("<td>&lt;linear&gt;</td><td class=\"number\">0.5</td>"));
  EXPECT_THAT(html, HasSubstr("<caption>cap &amp; tion</caption>"));
  EXPECT_THAT(html, Not(HasSubstr("<script")));
  for (const char* outside : {"src=", "href=", "url(", "@import"}) EXPECT_THAT(html, Not(HasSubstr(outside)));
  EXPECT_EQ(count(html, "http"), count(html, "http://www.w3.org/2000/svg"));
}

TEST(Report, SameCallsSameBytes) {
  const auto make = [] {
    Report r("x");
    r.table({"a"}, {{"1"}});
    r.chart(example());
    return r.html();
  };
  EXPECT_EQ(make(), make());
}

TEST(Report, RaggedTablesAreRefused) { EXPECT_THROW(Report("x").table({"a", "b"}, {{"1"}}), std::logic_error); }

TEST(Report, WritesTheFileOrFails) {
  std::string folder = testing::TempDir() + "report_test.XXXXXX";
  ASSERT_NE(::mkdtemp(folder.data()), nullptr);
  Report r("x");
  r.text("t");
  r.write(folder + "/r.html");
  EXPECT_EQ(read_file(folder + "/r.html"), r.html());
  EXPECT_THROW(r.write(folder + "/missing/r.html"), Error);
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace oryx
