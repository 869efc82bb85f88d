// Policies: named rules that assign mixers to tokens, for what ranges cannot say. One file each in
// oryx/modes/policies/, which registers itself with ORYX_MODE_POLICY. Their spans must not depend on how a document is
// split into pieces.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "oryx/modes/schedule.h"

namespace oryx {

class ModePolicy {
 public:
  virtual ~ModePolicy() = default;
  // Appends spans within [begin, end), in order and disjoint. Tokens left out stay with the schedule's earlier entries.
  virtual void assign(const ModeContext& context, int64_t begin, int64_t end, std::vector<ModeSpan>& spans) const = 0;
  virtual bool is_random() const { return false; }
  // What ModeContext::facts must hold: "surprise", "part:NAME", "router:FILE", "oracle". A policy that finds it missing ends in an Error that says so.
  virtual std::vector<std::string> needs() const { return {}; }
  // What predicts the gains of "router:FILE"; null where it needs none.
  virtual std::shared_ptr<const GainHead> gain_head() const { return nullptr; }
};

// "key=value" pairs of a policy as they stand in the schedule's text. Every key must be asked for; what is wrong ends
// in the schedule's one-line error at its position.
class PolicyArguments {
 public:
  struct Argument {
    std::string key, value;
    size_t key_position, value_position;
    bool used = false;
  };
  // How the parser reports: position in the text, what was expected there, names that may have been meant.
  using Fail = void (*)(std::string_view text, size_t position, const std::string& expected,
                        const std::vector<std::string>& candidates);

  PolicyArguments(std::string_view text, size_t position, std::vector<Argument> arguments,
                  const std::vector<std::string>& mixers, const std::vector<std::string>& elsewhere, Fail fail, const OpenHead& open)
      : text_(text),
        position_(position),
        arguments_(std::move(arguments)),
        mixers_(mixers),
        elsewhere_(elsewhere),
        fail_(fail),
        open_(open) {}

  std::optional<int64_t> integer(std::string_view key, int64_t least);
  std::optional<std::string> text(std::string_view key);
  // Every key that is a mixer's name, with its value from least to most.
  std::vector<std::pair<int32_t, double>> numbers_by_mixer(double least, double most);
  std::vector<std::pair<int32_t, int64_t>> integers_by_mixer(int64_t least);
  std::vector<std::pair<int32_t, std::string>> names_by_mixer();
  // What a file holds that the policy names.
  std::shared_ptr<const GainHead> head(const std::string& file) const;
  // Ends in an error unless every key was asked for.
  void finish();
  // An error about the policy as a whole.
  [[noreturn]] void refuse(const std::string& expected) const;

 private:
  [[noreturn]] void refuse_at(size_t position, const std::string& expected,
                              const std::vector<std::string>& candidates = {}) const;
  int64_t integer_of(const Argument& argument, int64_t least) const;

  std::string text_;
  size_t position_;
  std::vector<Argument> arguments_;
  const std::vector<std::string>&mixers_, &elsewhere_;
  Fail fail_;
  const OpenHead& open_;
  std::vector<std::string> known_;
};

// The round(share * length) of the first `length` tokens with the largest scores, ascending; of equal scores the earlier tokens.
std::vector<int64_t> highest_share(const std::vector<float>& scores, int64_t length, double share);

// Appends token t to rising spans, as part of the last one where it goes on.
void add_token(int64_t t, int32_t mixer, std::vector<ModeSpan>& spans);

using MakePolicy = std::unique_ptr<ModePolicy> (*)(PolicyArguments& arguments);

struct PolicyRegistration {
  PolicyRegistration(const char* name, MakePolicy make);
};

// Null when there is none of that name.
MakePolicy find_policy(std::string_view name);
std::vector<std::string> policy_names();  // sorted

// The mixer's index, by name or `linear`; of a name in `elsewhere` 0; -1 when unknown.
int32_t find_mixer(std::string_view name, const std::vector<std::string>& mixers,
                   const std::vector<std::string>& elsewhere);

}  // namespace oryx

#define ORYX_MODE_POLICY(name, make) static const ::oryx::PolicyRegistration oryx_mode_policy_##name(#name, make)
