// One request's answers between the thread that runs the model and the one that answers.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "oryx/data/tokenizer.h"
#include "oryx/serve/completion.h"
#include "oryx/serve/engine.h"
#include "oryx/serve/scores.h"
#include "oryx/serve/text.h"

namespace oryx::serve {

class Channel {
 public:
  // The tokeniser must outlive it. With echo a prompt's text stands at the head of each answer to it.
  Channel(const Tokenizer& tokenizer, const Completion& request);

  // What has come of one answer since it was taken last.
  struct News {
    std::string text;
    std::vector<ShownToken> tokens;  // whose text has begun
    bool over = false;               // said once
    bool empty() const { return text.empty() && tokens.empty() && !over; }
  };

  // Of the thread that runs the model: Request::on_token, on_scores and on_end of answer i.
  bool add(size_t i, int32_t id);
  void score(size_t i, TokenScores scores);
  void end(size_t i, const Ended& ended);

  // Waits a moment for news of any answer.
  std::vector<News> take();
  void wait_for_begin();
  // Waits a moment for the end of all answers, or of one that failed.
  bool wait_for_end();
  // Behind an answer's end.
  Ended ended(size_t i) const;
  bool is_over(size_t i) const;
  bool all_over() const;

 private:
  struct Answer {
    Answer(TextStream t, size_t p) : text(std::move(t)), prompt(p) {}
    TextStream text;  // of the thread that runs the model
    size_t prompt;    // which one it answers
    std::string pieces;
    std::deque<ShownToken> tokens;
    int64_t shown = 0;        // characters of the answer that were given out or stand in pieces
    size_t prompt_tokens = 0; // that were scored
    bool echoed = false, told = false;
    std::optional<Ended> ended;
  };
  void show(Answer& answer, const std::string& piece);
  void echo(Answer& answer);
  bool ended_or_failed() const;

  mutable std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Answer> answers_;
  struct Prompt {
    std::string text;
    int64_t characters = 0;
    std::vector<int64_t> offsets;  // of its tokens
  };
  std::vector<Prompt> prompts_;  // with what is echoed; empty ones without
  size_t unseen_ = 0;            // tokens at a prompt's head that the client did not write
  bool begun_ = false;
};

}  // namespace oryx::serve
