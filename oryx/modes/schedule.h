// Mode schedules: which mixer processes which token.
//
//     schedule := entry { "," entry }             later entries override earlier ones
//     entry    := mixer [ "@" range ] | policy [ "@" range ]
//     range    := [ bound ] ":" [ bound ] | "prompt" | "gen"
//     bound    := INT (token of the document; negative: counted from the prompt's end) | INT "%" (of the prompt,
//     rounded down) policy   := NAME "(" key "=" value { ";" key "=" value } ")"
//
//     gated_delta_net,attention@-256:       linear, the prompt's last 256 tokens in attention, and what follows
//     attention@prompt,linear@gen           read the prompt in attention, generate in the first mixer
//     random(attention=0.25;chunk=256)      see policy.h
//
// A document's tokens are counted from its own start. Tokens that no entry covers are the first mixer's; `linear` is
// another name of it. A range that reaches past the document is cut; one that is open to the right runs on into
// generation.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace oryx {

struct GainHead;
class ModePolicy;
// A file's name, as it stands in a schedule -> what it holds. Throws Error.
using OpenHead = std::function<std::shared_ptr<const GainHead>(const std::string& file)>;

// Tokens [begin, end) of a document in one mixer: an index into the mixers that the schedule was parsed for.
struct ModeSpan {
  int32_t begin, end, mixer;
  bool operator==(const ModeSpan&) const = default;
};

// What policies made of facts so far, so that it is not made anew for every token. What stands here follows from the facts alone: a copy begins without it.
class PolicyNotes {
 public:
  struct Note {
    virtual ~Note() = default;
  };
  PolicyNotes() = default;
  PolicyNotes(const PolicyNotes&) {}
  PolicyNotes& operator=(const PolicyNotes&) {
    notes_.clear();
    return *this;
  }
  // The note of that name, which make() -> std::unique_ptr<Note> makes where there is none. Of one thread at a time, as the facts are.
  template <class Make>
  Note& of(const std::string& name, Make make) const {
    auto& note = notes_[name];
    if (note == nullptr) note = make();
    return *note;
  }

 private:
  mutable std::map<std::string, std::unique_ptr<Note>> notes_;
};

// What is known of a document's tokens, for policies that decide by it (ModePolicy::needs). Whoever runs the document gathers it first.
struct TokenFacts {
  // Named parts of the prompt, as ascending ranges [begin, end): "question", "needle".
  std::map<std::string, std::vector<std::pair<int64_t, int64_t>>> parts;
  // Of each token, how badly a linear mixer's state predicts its value (oryx/model/surprise.h); empty: not known.
  std::vector<float> surprise;
  // By what asks for it ("router:FILE", "oracle"): of each token, how many nats attention takes, or is predicted to take, off the loss of the prediction made at it. NaN: not
  // predicted, a router leaves the token alone. They may grow, but what stands there stays.
  std::map<std::string, std::vector<float>> gains;
  // What of the text was given and not written, as ascending ranges; empty: the first ModeContext::prompt_length tokens. There are several where a text was left and gone on with.
  std::vector<std::pair<int64_t, int64_t>> prompts;
  PolicyNotes notes;
};

// What a schedule is resolved for: one document of one training step or request.
struct ModeContext {
  int64_t prompt_length = 0;  // tokens; the whole document where nothing is generated
  uint64_t seed = 0;          // of the run: random draws are a function of (seed, step, sequence, chunk)
  uint64_t step = 0;
  uint64_t sequence = 0;  // tells the documents of a step apart, on all ranks
  std::shared_ptr<const TokenFacts> facts = {};  // null: nothing is known
};

class Schedule {
 public:
  // `mixers` are the layer's, the first one is `linear`. Errors (oryx::Error, one line) name the text, the position,
  // what was found and what was expected. Names in `elsewhere` are known too but stand for the first mixer here (a
  // layer that has nothing to choose from).
  // `open` hands out the heads that policies name by their files; empty: load_head (gain_head.h).
  static Schedule parse(std::string_view text, const std::vector<std::string>& mixers,
                        const std::vector<std::string>& elsewhere = {}, const OpenHead& open = {});

  // In canonical form: parse(text()) is the same schedule.
  std::string text() const;
  const std::vector<std::string>& mixers() const { return mixers_; }

  // Spans that cover tokens [begin, end) exactly, in order, neighbours in different mixers. Any split of a document
  // into pieces gives the same mixer for every token; `end` may lie beyond the prompt as far as generation goes. 0 <=
  // begin <= end < 2^31.
  std::vector<ModeSpan> resolve(const ModeContext& context, int64_t begin, int64_t end) const;
  // The whole document where nothing is generated.
  std::vector<ModeSpan> resolve(const ModeContext& context) const { return resolve(context, 0, context.prompt_length); }

  int32_t mixer_at(const ModeContext& context, int64_t position) const;

  // What TokenFacts must hold for it to be resolved: "surprise", "part:question"; sorted, each once.
  std::vector<std::string> needs() const;

  // The heads that predict the gains of its needs "router:FILE", each need once.
  std::map<std::string, std::shared_ptr<const GainHead>> gain_heads() const;

  // Those of its needs that are about tokens of a prompt: not those of policies whose ranges all begin behind it (`@gen`).
  std::vector<std::string> prompt_needs() const;

  // Whether another context could give other spans for the same prompt length (a policy draws at random).
  bool is_random() const;

 private:
  friend class ScheduleParser;

  struct Bound {
    enum class Kind { kToken, kBeforePromptEnd, kPercent } kind;
    int64_t value;
    int64_t position(int64_t prompt_length) const;
    std::string text() const;
  };
  struct Range {
    enum class Kind { kBounds, kPrompt, kGenerated } kind = Kind::kBounds;
    std::optional<Bound> begin, end;  // of kBounds; absent: open
  };
  struct Entry {
    std::string name;
    int32_t mixer = 0;                         // unless there is a policy
    std::shared_ptr<const ModePolicy> policy;  // or null
    std::string policy_text;                   // "random(attention=0.25)"
    std::optional<Range> range;
  };

  static constexpr int64_t kOpen = std::numeric_limits<int64_t>::max();
  static std::pair<int64_t, int64_t> absolute(const std::optional<Range>& range, int64_t prompt_length);
  static std::string text_of(const Range& range);
  static bool is_behind_prompt(const std::optional<Range>& range);

  std::vector<std::string> mixers_;
  std::vector<Entry> entries_;
};

}  // namespace oryx
