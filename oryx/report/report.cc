#include "oryx/report/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>

#include "oryx/common/file.h"
#include "oryx/report/markup.h"

namespace oryx {

namespace {

constexpr const char* kStyle =
    ":root{color-scheme:light dark;--ink:#1c1e21;--soft:#5f646b;--line:#d9dce0;--back:#fff;--shade:#f5f6f7}"
    "@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#a0a6ae;--line:#3a4048;--back:#16181b;--shade:#"
    "20242a}}"
    "body{margin:0 auto;max-width:820px;padding:24px 20px 48px;background:var(--back);color:var(--ink);font:15px/1.5 "
    "system-ui,sans-serif}"
    "h1{font-size:26px;line-height:1.2;margin:8px 0 16px}h2{font-size:19px;margin:32px 0 8px}p{margin:8px "
    "0;max-width:70ch}"
    ".wide{overflow-x:auto;margin:12px 0}table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "caption{text-align:left;color:var(--soft);padding-bottom:4px}th,td{padding:4px 14px 4px "
    "0;text-align:left;border-bottom:1px solid var(--line)}"
    "th{font-weight:600}.number{text-align:right}pre{background:var(--shade);padding:10px "
    "12px;overflow-x:auto;font-size:13px}"
    "figure{margin:16px 0}";

// "0.995", "-3", "12.5 %", "1.2e-3", "41 MiB", "3.1x": begins with a digit, perhaps behind a sign.
bool is_number(const std::string& cell) {
  const size_t first = cell.find_first_not_of("+-~<>≤≥ ");
  return first != std::string::npos && cell[first] >= '0' && cell[first] <= '9';
}

bool is_number_column(const std::vector<std::vector<std::string>>& rows, size_t column) {
  const bool all = std::all_of(rows.begin(), rows.end(), [&](const auto& r) {
    return r[column].empty() || r[column] == "-" || is_number(r[column]);
  });
  return all && std::any_of(rows.begin(), rows.end(), [&](const auto& r) { return is_number(r[column]); });
}

}  // namespace

Report::Report(std::string title) : title_(std::move(title)) {}

void Report::heading(std::string_view text) { body_ += fmt::format("<h2>{}</h2>\n", escape_markup(text)); }

void Report::text(std::string_view paragraph) { body_ += fmt::format("<p>{}</p>\n", escape_markup(paragraph)); }

void Report::code(std::string_view text) { body_ += fmt::format("<pre>{}</pre>\n", escape_markup(text)); }

void Report::table(const std::vector<std::string>& headers, const std::vector<std::vector<std::string>>& rows,
                   std::string_view caption) {
  for (const auto& row : rows) {
    if (row.size() != headers.size()) throw std::logic_error("Report::table: a row of another length than the headers");
  }
  std::vector<const char*> style;
  for (size_t i = 0; i < headers.size(); ++i) style.push_back(is_number_column(rows, i) ? " class=\"number\"" : "");
  const auto line = [&](const std::vector<std::string>& cells, const char* tag) {
    body_ += "<tr>";
    for (size_t i = 0; i < cells.size(); ++i)
      body_ += fmt::format("<{}{}>{}</{}>", tag, style[i], escape_markup(cells[i]), tag);
    body_ += "</tr>\n";
  };
  body_ += "<div class=\"wide\"><table>\n";
  if (!caption.empty()) body_ += fmt::format("<caption>{}</caption>\n", escape_markup(caption));
  body_ += "<thead>";
  line(headers, "th");
  body_ += "</thead><tbody>\n";
  for (const auto& row : rows) line(row, "td");
  body_ += "</tbody></table></div>\n";
}

void Report::chart(const Chart& chart) { body_ += "<figure>" + chart_element(chart) + "</figure>\n"; }

std::string Report::html() const {
  const std::string title = escape_markup(title_);
  return fmt::format(
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" "
      "content=\"width=device-width, "
      "initial-scale=1\">\n<title>{}</title>\n<style>{}{}</style>\n</head>\n<body>\n<h1>{}</h1>\n{}</body>\n</html>\n",
      title, kStyle, chart_style(), title, body_);
}

void Report::write(const std::filesystem::path& path) const { write_file(path, html()); }

}  // namespace oryx
