#include "oryx/serve/chat.h"

#include "oryx/common/error.h"
#include "oryx/common/utf8.h"

namespace oryx::serve {

namespace {

constexpr const char *kRole = "{role}", *kContent = "{content}";

std::string with_line_ends(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool line_end = text.compare(i, 2, "\\n") == 0;
    out += line_end ? '\n' : text[i];
    i += line_end ? 1 : 0;
  }
  return out;
}

}  // namespace

ChatTemplate::ChatTemplate(const std::string& name_or_text) {
  std::string text = with_line_ends(name_or_text);
  if (text == "chatml") text = "<|im_start|>{role}\n{content}<|im_end|>\n";
  if (text == "llama3") text = "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>";
  const size_t role = text.find(kRole), content = text.find(kContent);
  const auto once = [&](const char* field, size_t at) { return at != std::string::npos && text.find(field, at + 1) == std::string::npos; };
  if (!once(kRole, role) || !once(kContent, content) || content < role)
    fail("chat template '{}': expected chatml, llama3, or a message's text with {{role}} and behind it {{content}}, once each, "
         "as in '{{role}}: {{content}}\\n'",
         shown(name_or_text));
  before_role_ = text.substr(0, role);
  between_ = text.substr(role + std::string(kRole).size(), content - role - std::string(kRole).size());
  behind_ = text.substr(content + std::string(kContent).size());
}

std::string ChatTemplate::prompt(const std::vector<ChatMessage>& messages) const {
  std::string all;
  for (const ChatMessage& m : messages) all += before_role_ + m.role + between_ + m.content + behind_;
  return all + before_role_ + "assistant" + between_;
}

std::string ChatTemplate::stop() const {
  const size_t last = behind_.find_last_not_of(" \n");
  return last == std::string::npos ? behind_ : behind_.substr(0, last + 1);
}

}  // namespace oryx::serve
