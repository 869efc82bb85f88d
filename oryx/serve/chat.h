// Conversations as text: what POST /v1/chat/completions hands to the model. A template is one message, with its role
// and its content; templates that are programs (Jinja) are not run.
#pragma once

#include <string>
#include <vector>

namespace oryx::serve {

struct ChatMessage {
  std::string role, content;
};

class ChatTemplate {
 public:
  ChatTemplate() = default;  // none: chats are not served
  // "chatml", "llama3", or a text with {role} and {content}, in this order, once each; "\n" as two characters is a line's
  // end. Throws Error.
  explicit ChatTemplate(const std::string& text);

  bool on() const { return !before_role_.empty() || !between_.empty() || !behind_.empty(); }
  // All messages, and the answer's beginning: the template of role "assistant" up to its content.
  std::string prompt(const std::vector<ChatMessage>& messages) const;
  // What ends an answer: what follows the content in the template. Empty: nothing but an end of text does.
  std::string stop() const;

 private:
  std::string before_role_, between_, behind_;
};

}  // namespace oryx::serve
