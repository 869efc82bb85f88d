// A report as one HTML file: headings, text, tables, charts. It needs nothing from elsewhere, no scripts, and can be
// sent by mail.
//
//     Report report("Recall");
//     report.text("Trained for 1,000 steps.");
//     report.table({"mode", "correct"}, {{"attention", "0.995"}, {"linear", "0.663"}});
//     report.chart({.title = "Recall", .x_label = "share of attention tokens", .y_label = "correct", .series =
//     {{"Oryx", points}}}); report.write("report.html");
//
// All text is plain and escaped here. The same calls give the same bytes: no times, no host names.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "oryx/report/chart.h"

namespace oryx {

class Report {
 public:
  explicit Report(std::string title);

  void heading(std::string_view text);
  void text(std::string_view paragraph);
  void code(std::string_view text);  // as it stands: a command, a sample
  // Columns of numbers are set to the right. Every row is as long as `headers`.
  void table(const std::vector<std::string>& headers, const std::vector<std::vector<std::string>>& rows,
             std::string_view caption = {});
  void chart(const Chart& chart);

  std::string html() const;
  void write(const std::filesystem::path& path) const;  // whole or not at all; oryx::Error

 private:
  std::string title_, body_;
};

}  // namespace oryx
