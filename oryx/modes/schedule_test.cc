#include "oryx/modes/schedule.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

#include "oryx/common/error.h"
#include "oryx/common/random.h"

namespace oryx {
namespace {

using ::testing::HasSubstr;
using Spans = std::vector<ModeSpan>;

const std::vector<std::string> kMixers = {"gated_delta_net", "attention", "sliding_window"};

Schedule parse(std::string_view text) { return Schedule::parse(text, kMixers); }

Spans resolve(std::string_view text, int64_t prompt, int64_t total = -1) {
  return parse(text).resolve({.prompt_length = prompt}, 0, total < 0 ? prompt : total);
}

std::string error_of(std::string_view text) {
  try {
    parse(text);
  } catch (const Error& e) {
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
    return e.what();
  }
  return "no error";
}

TEST(Schedule, ExamplesOfTheDocumentation) {
  EXPECT_EQ(resolve("attention", 100), (Spans{{0, 100, 1}}));
  EXPECT_EQ(resolve("gated_delta_net,attention@-256:", 1000, 1010), (Spans{{0, 744, 0}, {744, 1010, 1}}));
  EXPECT_EQ(resolve("gated_delta_net,attention@90%:100%", 1000, 1010),
            (Spans{{0, 900, 0}, {900, 1000, 1}, {1000, 1010, 0}}));
  EXPECT_EQ(resolve("attention@prompt,gated_delta_net@gen", 10, 15), (Spans{{0, 10, 1}, {10, 15, 0}}));
}

TEST(Schedule, BoundsAreCutToTheDocument) {
  EXPECT_EQ(resolve("attention@-256:", 100), (Spans{{0, 100, 1}}));
  EXPECT_EQ(resolve("attention@50:5000", 100), (Spans{{0, 50, 0}, {50, 100, 1}}));
  EXPECT_EQ(resolve("attention@500:", 100), (Spans{{0, 100, 0}}));
  EXPECT_EQ(resolve("attention@500:", 100, 600), (Spans{{0, 500, 0}, {500, 600, 1}}));
  EXPECT_EQ(resolve("attention@:-10", 100), (Spans{{0, 90, 1}, {90, 100, 0}}));
  EXPECT_EQ(resolve("attention@:-10", 5), (Spans{{0, 5, 0}}));
  EXPECT_EQ(resolve("attention@-20:-10", 100), (Spans{{0, 80, 0}, {80, 90, 1}, {90, 100, 0}}));
  EXPECT_EQ(resolve("attention@60:-60", 100), (Spans{{0, 100, 0}}));  // empty in this document
  EXPECT_EQ(resolve("attention@:", 3), (Spans{{0, 3, 1}}));
  EXPECT_EQ(resolve("attention", 0), Spans{});
}

TEST(Schedule, PercentagesRoundDown) {
  EXPECT_EQ(resolve("attention@33%:50%", 10), (Spans{{0, 3, 0}, {3, 5, 1}, {5, 10, 0}}));
  EXPECT_EQ(resolve("attention@10%:", 5), (Spans{{0, 5, 1}}));
  EXPECT_EQ(resolve("attention@:100%", 7, 9), (Spans{{0, 7, 1}, {7, 9, 0}}));
  EXPECT_EQ(resolve("attention@:99%", 2000000000), (Spans{{0, 1980000000, 1}, {1980000000, 2000000000, 0}}));
}

TEST(Schedule, LaterEntriesOverrideAndNeighboursMerge) {
  EXPECT_EQ(resolve("attention,linear@10:20,sliding_window@15:30", 40),
            (Spans{{0, 10, 1}, {10, 15, 0}, {15, 30, 2}, {30, 40, 1}}));
  EXPECT_EQ(resolve("attention@0:10,attention@10:20", 20), (Spans{{0, 20, 1}}));
  EXPECT_EQ(resolve("attention@5:10,linear", 20), (Spans{{0, 20, 0}}));
}

TEST(Schedule, LinearIsTheFirstMixer) {
  EXPECT_EQ(Schedule::parse("attention,linear@gen", {"mamba2", "attention"}).resolve({.prompt_length = 2}, 0, 4),
            (Spans{{0, 2, 1}, {2, 4, 0}}));
  EXPECT_EQ(parse("linear").text(), "linear");
}

TEST(Schedule, CanonicalTextReadsBack) {
  for (const char* text : {"attention", "gated_delta_net,attention@-256:", "attention@90%:100%,linear@gen",
                           "attention@:,linear@:5,attention@3:", "attention@prompt",
                           "random(attention=0.25;chunk=256;seed=7)", "attention,periodic(linear=5;every=9)@-90:-1"}) {
    EXPECT_EQ(parse(text).text(), text);
  }
  EXPECT_EQ(parse(" attention @ 3 : 5 , random( attention = .5 ; chunk = 4 ) @ gen ").text(),
            "attention@3:5,random(attention=.5;chunk=4)@gen");
}

TEST(Schedule, ErrorsShowPositionFoundAndExpected) {
  EXPECT_EQ(error_of("gated_delta_net,atention@-256:"),
            "schedule 'gated_delta_net,atention@-256:': position 17: found 'atention', expected a mixer "
            "(gated_delta_net, attention, "
            "sliding_window) or a policy (last(...), oracle(...), part(...), periodic(...), random(...), router(...), surprise(...)). Did you mean 'attention'?");
  EXPECT_THAT(error_of(""), HasSubstr("schedule '': position 1: found the end, expected a mixer ("));
  EXPECT_THAT(error_of("linear,\xd0\x98x"), HasSubstr("found '\xd0\x98', expected a mixer")) << "a sign of two bytes, whole";
  EXPECT_THAT(error_of("attention,"), HasSubstr("position 11: found the end, expected a mixer"));
  EXPECT_THAT(error_of("random"), HasSubstr("position 1: found 'random', expected a mixer"));
  EXPECT_THAT(error_of("attention attention"),
              HasSubstr("position 11: found 'attention', expected '@', ',' or the end"));
  EXPECT_THAT(error_of("attention@"), HasSubstr("position 11: found the end, expected a range"));
  EXPECT_THAT(error_of("attention@promt"),
              HasSubstr("found 'promt', expected a range: BEGIN:END (either may be missing), prompt or gen. "
                        "Did you mean 'prompt'?"));
  EXPECT_THAT(error_of("attention@5"), HasSubstr("position 12: found the end, expected ':'"));
  EXPECT_THAT(error_of("attention@5:3"),
              HasSubstr("position 11: found '5', expected a range whose begin lies before its end"));
  EXPECT_THAT(error_of("attention@-3:-5"), HasSubstr("a range whose begin lies before its end"));
  EXPECT_THAT(error_of("attention@50%:50%"), HasSubstr("a range whose begin lies before its end"));
  EXPECT_THAT(error_of("attention@:101%"),
              HasSubstr("position 12: found '101', expected a percentage from 0% to 100%"));
  EXPECT_THAT(error_of("attention@-5%:"), HasSubstr("a percentage from 0% to 100%"));
  EXPECT_THAT(error_of("attention@2.5:"), HasSubstr("position 11: found '2.5', expected a whole number"));
  EXPECT_THAT(error_of("attention@-0:"), HasSubstr("expected a number other than -0"));
  EXPECT_THAT(error_of("attention@-:"), HasSubstr("expected a whole number"));
  EXPECT_THAT(error_of("attention@99999999999999999999:"), HasSubstr("at most 12 digits"));
  EXPECT_THAT(error_of("attention@1:2:3"), HasSubstr("position 14: found ':', expected ',' or the end"));
}

TEST(Schedule, ErrorsOfPolicies) {
  EXPECT_THAT(error_of("randon(attention=1)"),
              HasSubstr("found 'randon', expected a policy: last, oracle, part, periodic, random, router, surprise. Did you mean 'random'?"));
  EXPECT_THAT(error_of("random()"), HasSubstr("position 8: found ')', expected key=value"));
  EXPECT_THAT(error_of("random(attention)"), HasSubstr("position 17: found ')', expected '='"));
  EXPECT_THAT(error_of("random(attention=)"), HasSubstr("position 18: found ')', expected a value for 'attention'"));
  EXPECT_THAT(error_of("random(attention=0.5"), HasSubstr("found the end, expected ';' or ')'"));
  EXPECT_THAT(error_of("random(attention=0.5;chunks=3)"),
              HasSubstr("position 22: found 'chunks', expected one of the keys chunk, seed, gated_delta_net, "
                        "attention, sliding_window. "
                        "Did you mean 'chunk'?"));
  EXPECT_THAT(error_of("random(atention=0.5)"), HasSubstr("Did you mean 'attention'?"));
  EXPECT_THAT(error_of("random(attention=1.5)"),
              HasSubstr("position 18: found '1.5', expected a number from 0 to 1 for 'attention'"));
  EXPECT_THAT(error_of("random(attention=nan)"), HasSubstr("expected a number from 0 to 1"));
  EXPECT_THAT(error_of("random(attention=-0.1)"), HasSubstr("expected a number from 0 to 1"));
  EXPECT_THAT(error_of("random(attention=0.6;sliding_window=0.6)"), HasSubstr("expected shares of at most 1 together"));
  EXPECT_THAT(error_of("random(chunk=4)"), HasSubstr("a mixer's share"));
  EXPECT_THAT(error_of("random(attention=0.5;chunk=0)"), HasSubstr("a whole number of at least 1 for 'chunk'"));
  EXPECT_THAT(error_of("random(attention=0.5;chunk=4;chunk=4)"), HasSubstr("each key once"));
  EXPECT_THAT(error_of("periodic(attention=5)"), HasSubstr("a mixer's tokens and a period"));
  EXPECT_THAT(error_of("periodic(attention=5;every=4)"), HasSubstr("mixers' tokens that fit into 'every'"));
}

TEST(Schedule, ALayerWithNothingToChooseTakesNamesOfOthers) {
  const std::vector<std::string> only = {"mamba2"};
  EXPECT_EQ(Schedule::parse("attention,mamba2@3:", only, kMixers).resolve({.prompt_length = 5}), (Spans{{0, 5, 0}}));
  EXPECT_EQ(Schedule::parse("random(attention=0.5;chunk=1)", only, kMixers).resolve({.prompt_length = 5}),
            (Spans{{0, 5, 0}}));
  EXPECT_THROW(Schedule::parse("atention", only, kMixers), Error);
  EXPECT_THROW(Schedule::parse("attention", only), Error);
}

TEST(Schedule, Periodic) {
  EXPECT_EQ(resolve("periodic(attention=2;every=5)", 11),
            (Spans{{0, 2, 1}, {2, 5, 0}, {5, 7, 1}, {7, 10, 0}, {10, 11, 1}}));
  EXPECT_EQ(resolve("sliding_window,periodic(attention=1;linear=1;every=4;offset=3)", 9),
            (Spans{{0, 3, 2}, {3, 4, 1}, {4, 5, 0}, {5, 7, 2}, {7, 8, 1}, {8, 9, 0}}));
  EXPECT_EQ(resolve("periodic(attention=3;every=3)", 100), (Spans{{0, 100, 1}}));
}

// ---- properties, over schedules drawn from the grammar

std::string random_bound(CounterRng& r) {
  switch (r.below(4)) {
    case 0:
      return "";
    case 1:
      return std::to_string(r.below(80));
    case 2:
      return "-" + std::to_string(1 + r.below(80));
    default:
      return std::to_string(r.below(101)) + "%";
  }
}

std::string random_entry(CounterRng& r) {
  const char* kWhat[] = {"gated_delta_net",
                         "attention",
                         "sliding_window",
                         "linear",
                         "random(attention=0.4;chunk=3)",
                         "random(attention=0.3;sliding_window=0.3;chunk=7;seed=5)",
                         "periodic(attention=2;sliding_window=1;every=6)"};
  const std::string what = kWhat[r.below(std::size(kWhat))];
  const uint64_t kind = r.below(6);
  if (kind == 0) return what;
  if (kind == 1) return what + "@prompt";
  if (kind == 2) return what + "@gen";
  return what + "@" + random_bound(r) + ":" + random_bound(r);
}

// Calls f with schedules and contexts; the few texts with a reversed range are refused and skipped.
void for_random_schedules(
    const std::function<void(const Schedule&, const ModeContext&, int64_t total, CounterRng&)>& f) {
  int run = 0;
  for (uint32_t i = 0; i < 600; ++i) {
    CounterRng r(99, i);
    std::string text = random_entry(r);
    for (uint64_t n = r.below(4); n > 0; --n) text += "," + random_entry(r);
    const auto prompt = static_cast<int64_t>(r.below(100));
    const ModeContext context{prompt, r.next64(), r.below(1000), r.next64()};
    try {
      const Schedule s = parse(text);
      SCOPED_TRACE(text);
      f(s, context, prompt + static_cast<int64_t>(r.below(40)), r);
      ++run;
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), HasSubstr("a range whose begin lies before its end"));
    }
  }
  EXPECT_GT(run, 450);
}

TEST(ScheduleProperty, CoversEveryTokenOnceInMergedSpans) {
  for_random_schedules([](const Schedule& s, const ModeContext& context, int64_t total, CounterRng&) {
    int32_t at = 0, mixer = -1;
    for (const ModeSpan& span : s.resolve(context, 0, total)) {
      EXPECT_EQ(span.begin, at);
      EXPECT_LT(span.begin, span.end);
      EXPECT_NE(span.mixer, mixer);
      at = span.end;
      mixer = span.mixer;
    }
    EXPECT_EQ(at, total);
  });
}

TEST(ScheduleProperty, AnySplitGivesTheSameMixers) {
  for_random_schedules([](const Schedule& s, const ModeContext& context, int64_t total, CounterRng& r) {
    std::vector<int32_t> whole, pieces;
    for (const ModeSpan& span : s.resolve(context, 0, total))
      whole.insert(whole.end(), span.end - span.begin, span.mixer);
    for (int64_t begin = 0; begin < total;) {
      const int64_t end = std::min(total, begin + static_cast<int64_t>(1 + r.below(20)));
      for (const ModeSpan& span : s.resolve(context, begin, end)) {
        EXPECT_GE(span.begin, begin);
        EXPECT_LE(span.end, end);
        pieces.insert(pieces.end(), span.end - span.begin, span.mixer);
      }
      begin = end;
    }
    EXPECT_EQ(whole, pieces);
    for (int64_t i = 0; i < total; ++i) EXPECT_EQ(s.mixer_at(context, i), whole[static_cast<size_t>(i)]);
  });
}

TEST(ScheduleProperty, ALaterEntryDecidesWhereItReaches) {
  for_random_schedules([](const Schedule& s, const ModeContext& context, int64_t total, CounterRng&) {
    const Schedule more = parse(s.text() + ",sliding_window@20:30");
    for (int64_t i = 0; i < total; ++i) {
      const int32_t expected = i >= 20 && i < 30 ? 2 : s.mixer_at(context, i);
      EXPECT_EQ(more.mixer_at(context, i), expected);
    }
  });
}

TEST(ScheduleProperty, TextReadsBackAsTheSameSchedule) {
  for_random_schedules([](const Schedule& s, const ModeContext& context, int64_t total, CounterRng&) {
    const Schedule again = parse(s.text());
    EXPECT_EQ(again.text(), s.text());
    EXPECT_EQ(again.resolve(context, 0, total), s.resolve(context, 0, total));
  });
}

TEST(ScheduleProperty, RangesAgreeWithTheirDefinition) {
  struct Entry {
    int mixer, begin_kind, begin, end_kind, end;
  };
  const auto text_of = [](int kind, int n) {
    return kind == 0   ? ""
           : kind == 1 ? std::to_string(n)
           : kind == 2 ? "-" + std::to_string(n)
                       : std::to_string(n) + "%";
  };
  for (uint32_t i = 0; i < 400; ++i) {
    CounterRng r(5, i);
    const int prompt = static_cast<int>(r.below(120)), total = prompt + static_cast<int>(r.below(30));
    std::vector<Entry> entries;
    std::string text;
    for (uint64_t n = 1 + r.below(5); n > 0; --n) {
      Entry e{static_cast<int>(r.below(3)), static_cast<int>(r.below(4)), static_cast<int>(1 + r.below(100)), 0, 0};
      e.end_kind = static_cast<int>((e.begin_kind + r.below(3) + 1) % 4);  // another kind: never refused as reversed
      e.end = static_cast<int>(1 + r.below(100));
      entries.push_back(e);
      text += fmt::format("{}{}@{}:{}", text.empty() ? "" : ",", kMixers[static_cast<size_t>(e.mixer)],
                          text_of(e.begin_kind, e.begin), text_of(e.end_kind, e.end));
    }
    SCOPED_TRACE(fmt::format("{} prompt {} total {}", text, prompt, total));
    const auto position = [&](int kind, int n, int open) {
      return kind == 0 ? open : kind == 1 ? n : kind == 2 ? prompt - n : prompt * n / 100;
    };
    std::vector<int> expected(static_cast<size_t>(total), 0), found;
    for (const Entry& e : entries) {
      for (int t = 0; t < total; ++t) {
        const bool inside = t >= position(e.begin_kind, e.begin, 0) && t < position(e.end_kind, e.end, total);
        if (inside) expected[static_cast<size_t>(t)] = e.mixer;
      }
    }
    for (const ModeSpan& s : resolve(text, prompt, total)) found.insert(found.end(), s.end - s.begin, s.mixer);
    EXPECT_EQ(found, expected);
  }
}

// ---- random assignment

double share_of(const Schedule& s, int32_t mixer, int64_t tokens, uint64_t sequences) {
  int64_t count = 0;
  for (uint64_t i = 0; i < sequences; ++i) {
    for (const ModeSpan& span : s.resolve({.prompt_length = tokens, .seed = 3, .step = i / 10, .sequence = i % 10})) {
      if (span.mixer == mixer) count += span.end - span.begin;
    }
  }
  return static_cast<double>(count) / static_cast<double>(tokens * static_cast<int64_t>(sequences));
}

TEST(RandomPolicy, SharesAreWhatWasAsked) {
  // 20,000 chunks: four standard deviations of a share are under 0.014.
  const Schedule s = parse("random(attention=0.25;sliding_window=0.1;chunk=16)");
  EXPECT_NEAR(share_of(s, 1, 1600, 200), 0.25, 0.014);
  EXPECT_NEAR(share_of(s, 2, 1600, 200), 0.10, 0.014);
  EXPECT_EQ(share_of(parse("random(attention=1;chunk=16)"), 1, 1600, 20), 1.0);
  EXPECT_EQ(share_of(parse("random(attention=0;chunk=16)"), 1, 1600, 20), 0.0);
}

TEST(RandomPolicy, ChunksAreIndependent) {
  // Of neighbouring chunks both are attention with probability 1/4 when each is with 1/2.
  const Schedule s = parse("random(attention=0.5;chunk=1)");
  int both = 0, first = 0;
  for (int64_t i = 0; i < 20000; ++i) {
    const bool a = s.mixer_at({.prompt_length = 1}, i) == 1, b = s.mixer_at({.prompt_length = 1}, i + 1) == 1;
    first += a;
    both += a && b;
  }
  EXPECT_NEAR(first / 20000.0, 0.5, 0.015);
  EXPECT_NEAR(both / 20000.0, 0.25, 0.015);
}

TEST(RandomPolicy, DrawsDependOnSeedStepSequenceAndNothingElse) {
  const Schedule s = parse("random(attention=0.5;chunk=4)");
  const ModeContext base{400, 1, 2, 3};
  const Spans spans = s.resolve(base);
  EXPECT_EQ(parse("random(attention=0.5;chunk=4)").resolve(base), spans);
  for (ModeContext other :
       {ModeContext{400, 2, 2, 3}, ModeContext{400, 1, 3, 3}, ModeContext{400, 1, 2, 4},
        ModeContext{400, 1, 2 + (uint64_t{1} << 32), 3}, ModeContext{400, 1, 2, 3 + (uint64_t{1} << 32)}}) {
    EXPECT_NE(s.resolve(other), spans);
  }
  const Schedule seeded = parse("random(attention=0.5;chunk=4;seed=1)");
  EXPECT_EQ(seeded.resolve({400, 77, 2, 3}), spans);
  EXPECT_TRUE(s.is_random());
  EXPECT_FALSE(parse("attention@5:").is_random());
}

// Known answer: a saved run must draw the same in every later version.
TEST(RandomPolicy, DrawsStayTheSame) {
  std::string modes;
  const Schedule s = parse("random(attention=0.25;chunk=1)");
  for (int64_t i = 0; i < 32; ++i)
    modes += static_cast<char>('0' + s.mixer_at({.prompt_length = 32, .seed = 7, .step = 11, .sequence = 13}, i));
  EXPECT_EQ(modes, "01000001010000000100010101100101");
}

TEST(LastPolicy, IsThePromptsEndAndNothingBehind) {
  EXPECT_EQ(parse("last(attention=3)").resolve({.prompt_length = 10}, 0, 14), (Spans{{0, 7, 0}, {7, 10, 1}, {10, 14, 0}}));
  EXPECT_EQ(parse("last(attention=3;sliding_window=2)").resolve({.prompt_length = 10}, 0, 12), (Spans{{0, 5, 0}, {5, 7, 2}, {7, 10, 1}, {10, 12, 0}}));
  EXPECT_EQ(parse("last(attention=30)").resolve({.prompt_length = 10}, 2, 12), (Spans{{2, 10, 1}, {10, 12, 0}}));
  EXPECT_THROW(parse("last(every=3)"), Error);
}

ModeContext with_facts(int64_t length, TokenFacts facts) {
  ModeContext c{.prompt_length = length};
  c.facts = std::make_shared<const TokenFacts>(std::move(facts));
  return c;
}

TEST(PartPolicy, IsWhatTheTaskNamed) {
  const Schedule s = parse("linear,part(attention=needle),sliding_window@gen");
  EXPECT_EQ(s.needs(), (std::vector<std::string>{"part:needle"}));
  TokenFacts facts;
  facts.parts = {{"needle", {{2, 4}, {6, 7}}}, {"question", {{8, 10}}}};
  const ModeContext context = with_facts(10, facts);
  EXPECT_EQ(s.resolve(context, 0, 12), (Spans{{0, 2, 0}, {2, 4, 1}, {4, 6, 0}, {6, 7, 1}, {7, 10, 0}, {10, 12, 2}}));
  EXPECT_EQ(s.resolve(context, 3, 7), (Spans{{3, 4, 1}, {4, 6, 0}, {6, 7, 1}})) << "any piece";
  EXPECT_TRUE(s.is_random()) << "another document of this length is another matter";
  for (const ModeContext& other : {ModeContext{.prompt_length = 10}, with_facts(10, {})}) {
    try {
      (void)s.resolve(other);
      ADD_FAILURE();
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), ::testing::HasSubstr("part 'needle' of the prompt is not known here; known: none"));
    }
  }
}

TEST(SurprisePolicy, TakesTheLargestScores) {
  const Schedule s = parse("surprise(attention=0.4)");
  EXPECT_EQ(s.needs(), (std::vector<std::string>{"surprise"}));
  TokenFacts facts;
  facts.surprise = {0.1F, 0.9F, 0.8F, 0.2F, 0.8F, 0.8F, 0.0F, 0.3F, 0.1F, 0.1F};
  EXPECT_EQ(s.resolve(with_facts(10, facts), 0, 12), (Spans{{0, 1, 0}, {1, 3, 1}, {3, 4, 0}, {4, 6, 1}, {6, 12, 0}}));
  EXPECT_EQ(s.resolve(with_facts(10, facts), 2, 5), (Spans{{2, 3, 1}, {3, 4, 0}, {4, 5, 1}}));
  EXPECT_EQ(parse("surprise(attention=0.2)").resolve(with_facts(10, facts)), (Spans{{0, 1, 0}, {1, 3, 1}, {3, 10, 0}})) << "of equals the earlier";
  EXPECT_EQ(parse("surprise(attention=0)").resolve(with_facts(10, facts)), (Spans{{0, 10, 0}}));
  EXPECT_EQ(parse("surprise(attention=1)").resolve(with_facts(10, facts)), (Spans{{0, 10, 1}}));
  EXPECT_THROW((void)s.resolve({.prompt_length = 10}), Error);
  EXPECT_THROW((void)s.resolve(with_facts(11, facts)), Error);
  EXPECT_THROW(parse("surprise(attention=1.5)"), Error);
}

TEST(RandomPolicy, HugeChunksDoNotOverflow) {
  const Schedule s = parse("random(attention=1;chunk=9223372036854775807)");
  EXPECT_EQ(s.resolve({.prompt_length = 2147483647}), (Spans{{0, 2147483647, 1}}));
  EXPECT_EQ(
      parse("periodic(attention=9223372036854775807;every=9223372036854775807;offset=3)").resolve({.prompt_length = 9}),
      (Spans{{0, 3, 0}, {3, 9, 1}}));
}

}  // namespace
}  // namespace oryx
