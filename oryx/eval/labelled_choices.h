// The form that ARC and OpenBookQA have: {"choices": {"text": [...], "label": ["A", ...]}, "answerKey": "B"}.
#pragma once

#include "oryx/eval/choice.h"

namespace oryx {

// `context` before each of the example's choices.
inline ChoiceItem labelled_choices(const Example& e, const std::string& context) {
  const Example choices = e.object("choices");
  ChoiceItem item{{}, choices.texts("text"), 0};
  const auto labels = choices.texts("label");
  const std::string key = stripped(e.text("answerKey"));
  const auto at = std::find(labels.begin(), labels.end(), key);
  if (labels.size() != item.choices.size() || at == labels.end()) {
    fail("{}: the answer '{}' is none of the labels {} of {} choices", e.where(), key, fmt::join(labels, ", "), item.choices.size());
  }
  item.gold = at - labels.begin();
  for (const auto& choice : item.choices) item.requests.emplace_back(context, " " + choice);
  return item;
}

}  // namespace oryx
