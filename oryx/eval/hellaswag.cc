// HellaSwag (Zellers et al. 2019, arXiv 1905.07830): how a scene goes on. Examples: {"activity_label", "ctx", "endings", "label"}, or with "ctx_a" and
// "ctx_b" as the original has them, in DATA/hellaswag. The harness's hellaswag.
#include <cctype>

#include "oryx/eval/choice.h"

namespace oryx {

namespace {

// What the harness cleans away: the marks of WikiHow, [title] and the like; then each pair of spaces once.
std::string preprocess(std::string text) {
  text = stripped(text);
  const auto replace = [&](std::string_view from, std::string_view to) {
    for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size()) text.replace(at, from.size(), to);
  };
  replace(" [title]", ". ");
  // \[.*?\] of Python: the nearest closing bracket, on the same line.
  for (size_t open = text.find('['); open != std::string::npos; open = text.find('[', open)) {
    const size_t close = text.find(']', open), line = text.find('\n', open);
    if (close == std::string::npos || line < close) {
      ++open;
    } else {
      text.erase(open, close - open + 1);
    }
  }
  replace("  ", " ");
  return text;
}

// Python's str.capitalize, for ASCII.
std::string capitalized(std::string text) {
  for (size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i == 0 ? std::toupper(static_cast<unsigned char>(text[i])) : std::tolower(static_cast<unsigned char>(text[i])));
  return text;
}

class HellaSwag : public ChoiceTask {
 public:
  ChoiceItem item(const Example& e) const override {
    const bool original = e.has("ctx_b");
    const std::string context = original ? e.text("ctx_a") + " " + capitalized(e.text("ctx_b")) : e.text("ctx");
    const std::string query = preprocess(e.text("activity_label") + ": " + context);
    ChoiceItem item;
    item.gold = e.integer("label");
    for (const auto& ending : e.texts("endings")) {
      item.choices.push_back(preprocess(ending));
      item.requests.emplace_back(query, " " + item.choices.back());
    }
    return item;
  }

 protected:
  std::string folder() const override { return "hellaswag"; }
};

ORYX_EVAL_TASK(hellaswag, "how a scene goes on (HellaSwag)", HellaSwag);

}  // namespace
}  // namespace oryx
