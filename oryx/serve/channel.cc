#include "oryx/serve/channel.h"

#include <algorithm>
#include <chrono>

namespace oryx::serve {

namespace {

constexpr auto kMoment = std::chrono::milliseconds(50);  // between looks at what does not wake: a gone client

}  // namespace

Channel::Channel(const Tokenizer& tokenizer, const Completion& request) : prompts_(request.prompts.size()), unseen_(request.framed) {
  for (int64_t i = 0; i < request.answers(); ++i)
    answers_.emplace_back(TextStream(tokenizer, request.prompt_of(i), request.stops), static_cast<size_t>(i / request.n));
  if (!request.echo) return;
  for (size_t p = 0; p < prompts_.size(); ++p) {
    StreamDecoder decoder(tokenizer);
    for (const int32_t id : request.prompts[p]) {
      prompts_[p].offsets.push_back(prompts_[p].characters);
      const std::string piece = decoder.add(id);
      prompts_[p].characters += count_characters(piece);
      prompts_[p].text += piece;
    }
  }
}

// The prompt's text comes with what follows it, or with the end.
void Channel::echo(Answer& a) {
  if (std::exchange(a.echoed, true)) return;
  a.pieces = prompts_[a.prompt].text;
  a.shown = prompts_[a.prompt].characters;
}

void Channel::show(Answer& a, const std::string& piece) {
  echo(a);
  a.pieces += piece;
  a.shown += count_characters(piece);
}

bool Channel::add(size_t i, int32_t id) {
  Answer& a = answers_[i];
  const std::string piece = a.text.add(id);
  const std::lock_guard lock(mutex_);
  show(a, piece);
  begun_ = true;
  wake_.notify_all();
  return !a.text.stopped();
}

void Channel::score(size_t i, TokenScores scores) {
  Answer& a = answers_[i];
  const std::lock_guard lock(mutex_);
  const Prompt& prompt = prompts_[a.prompt];
  if (a.prompt_tokens < prompt.offsets.size()) {
    const size_t at = a.prompt_tokens++;
    if (at >= unseen_) a.tokens.push_back({std::move(scores), prompt.offsets[at]});
    return;
  }
  a.tokens.push_back({std::move(scores), prompt.characters + a.text.characters()});
}

void Channel::end(size_t i, const Ended& ended) {
  Answer& a = answers_[i];
  const std::string piece = a.text.finish();
  const std::lock_guard lock(mutex_);
  show(a, piece);
  // What begins behind a stop string is not of the text; other tokens without text are.
  if (a.text.stopped()) std::erase_if(a.tokens, [&](const ShownToken& t) { return t.offset >= a.shown; });
  a.ended = ended;
  wake_.notify_all();
}

std::vector<Channel::News> Channel::take() {
  std::unique_lock lock(mutex_);
  wake_.wait_for(lock, kMoment, [this] {
    return std::any_of(answers_.begin(), answers_.end(), [](const Answer& a) { return !a.pieces.empty() || (a.ended.has_value() && !a.told); });
  });
  std::vector<News> all;
  for (Answer& a : answers_) {
    News news;
    news.text = std::exchange(a.pieces, "");
    news.over = a.ended.has_value() && !std::exchange(a.told, true);
    while (!a.tokens.empty() && a.echoed && (a.tokens.front().offset < a.shown || a.ended.has_value())) {
      news.tokens.push_back(std::move(a.tokens.front()));
      a.tokens.pop_front();
    }
    all.push_back(std::move(news));
  }
  return all;
}

void Channel::wait_for_begin() {
  std::unique_lock lock(mutex_);
  wake_.wait(lock, [this] { return begun_ || ended_or_failed(); });
}

bool Channel::wait_for_end() {
  std::unique_lock lock(mutex_);
  return wake_.wait_for(lock, kMoment, [this] { return ended_or_failed(); });
}

bool Channel::ended_or_failed() const {
  const bool all = std::all_of(answers_.begin(), answers_.end(), [](const Answer& a) { return a.ended.has_value(); });
  return all || std::any_of(answers_.begin(), answers_.end(), [](const Answer& a) { return a.ended.has_value() && failed(*a.ended); });
}

Ended Channel::ended(size_t i) const {
  const std::lock_guard lock(mutex_);
  return *answers_[i].ended;
}

bool Channel::is_over(size_t i) const {
  const std::lock_guard lock(mutex_);
  return answers_[i].ended.has_value();
}

bool Channel::all_over() const {
  const std::lock_guard lock(mutex_);
  return std::all_of(answers_.begin(), answers_.end(), [](const Answer& a) { return a.ended.has_value(); });
}

}  // namespace oryx::serve
