// What a request's body may hold, and text up to a stop string.
#include "oryx/serve/completion.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "oryx/model/test_support.h"
#include "oryx/serve/text.h"

namespace oryx::serve {
namespace {

using ::testing::HasSubstr;

class CompletionBody : public ::testing::Test {
 protected:
  CompletionBody() : tokenizer_(make_byte_tokenizer()) {
    ModelConfig c = test::small({{"gated_delta_net", "attention"}});
    c.vocab_size = tokenizer_->vocab_size();
    model_ = std::make_unique<LanguageModel>(c);
  }
  Completion parse(const std::string& body, Endpoint endpoint = Endpoint::kText) const {
    return parse_completion(body, *model_, *tokenizer_,
                            {"tiny", "attention@prompt,linear@gen", ChatTemplate("{role}: {content};\\n")}, endpoint);
  }
  void refuses(const std::string& body, const char* line, int status = 400, Endpoint endpoint = Endpoint::kText) const {
    try {
      parse(body, endpoint);
      ADD_FAILURE() << body;
    } catch (const ApiError& e) {
      EXPECT_EQ(e.status(), status) << body;
      EXPECT_THAT(e.what(), HasSubstr(line)) << body;
      EXPECT_EQ(e.json()["error"]["message"], e.what());
      EXPECT_EQ(e.json()["error"]["type"], "invalid_request_error");
    }
  }

  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<LanguageModel> model_;
};

TEST_F(CompletionBody, IsRead) {
  const Completion c = parse(
      R"({"model": "tiny", "prompt": "ab", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "seed": 3, "stop": "x", "stream": true,
    "stream_options": {"include_usage": true}, "schedule": "linear,attention@-2:", "user": "me", "n": 1, "logprobs": null, "logit_bias": {}, "frequency_penalty": 0.0})");
  EXPECT_EQ(c.prompts.at(0), (std::vector<int32_t>{256, 'a', 'b'}));
  EXPECT_EQ(c.schedule->text(), "linear,attention@-2:");
  EXPECT_EQ(c.max_tokens, 7);
  EXPECT_EQ(c.sampling.seed, 3);
  EXPECT_EQ(c.sampling.top_k, 4);
  EXPECT_EQ(c.stops, std::vector<std::string>{"x"});
  EXPECT_TRUE(c.stream && c.include_usage);
  const Completion least = parse(R"({"prompt": [1, 2], "stop": ["a", "b"], "seed": null})");
  EXPECT_EQ(least.prompts.at(0), (std::vector<int32_t>{1, 2}));
  using Prompts = std::vector<std::vector<int32_t>>;
  EXPECT_EQ(parse(R"({"prompt": ["a", "bc"], "n": 2})").prompts, (Prompts{{256, 'a'}, {256, 'b', 'c'}}));
  EXPECT_EQ(parse(R"({"prompt": [[1, 2], [3]]})").prompts, (Prompts{{1, 2}, {3}}));
  EXPECT_EQ(parse(R"({"prompt": ["a", "b"], "n": 3})").answers(), 6);
  EXPECT_EQ(parse(R"({"prompt": ["a", "b"], "n": 3})").prompt_of(2), (std::vector<int32_t>{256, 'a'}));
  EXPECT_EQ(parse(R"({"prompt": [[1], [2]], "n": 3})").prompt_of(3), std::vector<int32_t>{2});
  EXPECT_EQ(least.schedule->text(), "attention@prompt,linear@gen");
  EXPECT_EQ(least.sampling.temperature, 1);
  EXPECT_EQ(least.max_tokens, 16);
  EXPECT_EQ(least.n, 1);
  EXPECT_EQ(least.top_logprobs, -1);
  EXPECT_EQ(least.framed, 0u);
  const Completion scored = parse(R"({"prompt": "ab", "n": 3, "best_of": 3, "logprobs": 0, "echo": true, "max_tokens": 0})");
  EXPECT_EQ(scored.n, 3);
  EXPECT_EQ(scored.top_logprobs, 0);
  EXPECT_TRUE(scored.echo);
  EXPECT_EQ(scored.framed, 1u);
  EXPECT_EQ(scored.max_tokens, 0);
  EXPECT_EQ(parse(R"({"prompt": "ab", "logprobs": 5})").top_logprobs, 5);
  EXPECT_EQ(parse(R"({"messages": [{"role": "user", "content": "a"}], "logprobs": true, "top_logprobs": 2})", Endpoint::kChat).top_logprobs, 2);
  EXPECT_EQ(parse(R"({"messages": [{"role": "user", "content": "a"}], "logprobs": true})", Endpoint::kChat).top_logprobs, 0);
}

TEST(ServeChat, ATemplateIsOneMessage) {
  const ChatTemplate chatml("chatml");
  EXPECT_EQ(chatml.prompt({{"system", "Be {role}."}, {"user", "Hi"}}),
            "<|im_start|>system\nBe {role}.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(chatml.stop(), "<|im_end|>");
  EXPECT_EQ(ChatTemplate("llama3").stop(), "<|eot_id|>");
  const ChatTemplate lines("{role}: {content}\\n");
  EXPECT_EQ(lines.prompt({{"user", "a\\nb"}}), "user: a\\nb\nassistant: ");  // a message is taken as it is
  EXPECT_EQ(lines.stop(), "\n");
  EXPECT_EQ(ChatTemplate("{role}>{content}").stop(), "");
  EXPECT_FALSE(ChatTemplate().on());
  for (const char* text : {"", "{content}", "{role}", "{content} {role}", "{role}{role}{content}", "{% for m in messages %}"})
    EXPECT_THROW(ChatTemplate{text}, Error) << text;
}

TEST_F(CompletionBody, ChatsAreRead) {
  const auto text = [&](const char* body) {
    const Completion c = parse(body, Endpoint::kChat);
    return tokenizer_->decode(c.prompts.at(0));
  };
  EXPECT_EQ(text(R"({"messages": [{"role": "user", "content": "ab"}]})"), "user: ab;\nassistant: ");
  EXPECT_EQ(text(R"({"messages": [{"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, {"role": "user", "content": ""}]})"),
            "system: ab;\nuser: ;\nassistant: ");
  const Completion c = parse(R"({"messages": [{"role": "user", "content": "ab"}], "stop": "x", "max_completion_tokens": 7, "logprobs": false})", Endpoint::kChat);
  EXPECT_EQ(c.stops, (std::vector<std::string>{"x", ";"}));
  EXPECT_EQ(c.max_tokens, 7);
  EXPECT_EQ(parse(R"({"messages": [{"role": "user", "content": "ab"}]})", Endpoint::kChat).max_tokens, 512);
  const auto bad = [&](const char* body, const char* line) { refuses(body, line, 400, Endpoint::kChat); };
  bad(R"({"prompt": "a"})", "unknown field 'prompt'");
  bad(R"({"messages": "a"})", "messages is \"a\" (a string), expected a list of messages");
  bad(R"({"messages": []})", "expected a list of messages");
  bad(R"({"messages": [{"role": "tool", "content": "a"}]})", "messages[0].role is \"tool\" (a string), expected system, user or assistant");
  bad(R"({"messages": [{"role": "user"}]})", "messages[0].content is missing");
  bad(R"({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})", "expected a text, or a list of parts of type text");
  bad(R"({"messages": [{"role": "user", "content": "a", "nmae": "b"}]})", "unknown field 'nmae'");
  bad(R"({"messages": [{"role": "user", "content": "a"}], "tools": [1]})", "tools is");
  bad(R"({"messages": [{"role": "user", "content": "a"}], "logprobs": 3})", "logprobs is 3, expected true or false");
  bad(R"({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 3})", "top_logprobs is 3, which wants logprobs to be true");
  bad(R"({"messages": [{"role": "user", "content": "a"}], "logprobs": true, "top_logprobs": 21})", "top_logprobs is 21, expected 0 to 20");
  bad(R"({"messages": [{"role": "user", "content": "a"}], "echo": true})", "unknown field 'echo'");
  try {
    parse_completion(R"({"messages": []})", *model_, *tokenizer_, {"tiny", "linear"}, Endpoint::kChat);
    ADD_FAILURE();
  } catch (const ApiError& e) {
    EXPECT_THAT(e.what(), HasSubstr("this server has no chat template; start it with --chat-template"));
  }
}

TEST_F(CompletionBody, IsRefusedInOneLine) {
  refuses("", "the request's body: not valid JSON");
  refuses(R"({"prompt": )", "not valid JSON");
  refuses("[1]", "expected an object with a prompt");
  refuses("{}", "prompt is missing");
  refuses(R"({"promt": "a"})", "unknown field 'promt'. Did you mean 'prompt'?");
  refuses(R"({"prompt": "a", "tempreature": 1})", "Did you mean 'temperature'?");
  refuses(R"({"prompt": "a", "prompt": "b"})", "stands twice");
  refuses(R"({"prompt": 5})", "prompt is 5, expected a text, a list of token ids, or a list of texts or of such lists");
  refuses(R"({"prompt": []})", "expected a text, a list of token ids");
  refuses(R"({"prompt": ["a", 5]})", "prompt is 5, expected");
  refuses(R"({"prompt": [[1], "a"]})", "prompt is \"a\" (a string), expected");
  refuses(R"({"prompt": [1, "a"]})", "prompt is \"a\" (a string), expected");
  refuses(R"({"prompt": [[1], []]})", "expected a text");
  refuses(R"({"prompt": [[1], [257]]})", "token id 257 is outside");
  refuses(R"({"prompt": ["a", "b"], "n": 65})", "2 prompts with n 65 are 130 answers, expected at most 128");
  refuses(R"({"prompt": [257]})", "token id 257 is outside of the model's vocabulary of 257");
  refuses(R"({"prompt": [-1]})", "token id -1 is outside");
  refuses(R"({"prompt": [18446744073709551615]})", "is outside");
  refuses(R"({"prompt": "a", "max_tokens": 0})", "max_tokens is 0, expected an integer of at least 1 (0 with echo");
  refuses(R"({"prompt": "a", "max_tokens": "7"})", "max_tokens is \"7\" (a string)");
  refuses(R"({"prompt": "a", "max_tokens": 18446744073709551615})", "max_tokens is 18446744073709551615");
  refuses(R"({"prompt": "a", "temperature": -0.5})", "temperature is -0.5");
  refuses(R"({"prompt": "a", "top_p": 0})", "top_p is 0");
  refuses(R"({"prompt": "a", "stream": 1})", "stream is 1, expected true or false");
  refuses(R"({"prompt": "a", "stream_options": {"usage": true}})", "unknown field 'usage'");
  refuses(R"({"prompt": "a", "stop": ""})", "none empty");
  refuses(R"({"prompt": "a", "n": 0})", "n is 0, expected an integer of at least 1");
  refuses(R"({"prompt": "a", "n": 129})", "n is 129, expected 1 to 128");
  refuses(R"({"prompt": "a", "n": 2, "best_of": 3})", "best_of is 3, which is not served; expected n, 2, or nothing");
  refuses(R"({"prompt": "a", "logprobs": true})", "logprobs is true");
  refuses(R"({"prompt": "a", "logprobs": 21})", "logprobs is 21, expected 0 to 20");
  refuses(R"({"prompt": "a", "echo": 1})", "echo is 1, expected true or false");
  refuses(R"({"prompt": "a", "top_logprobs": 1})", "unknown field 'top_logprobs'");
  refuses(R"({"prompt": "a", "schedule": "atention"})", "Did you mean 'attention'?");
  refuses(R"({"prompt": "a", "schedule": "{"})", "schedule");
  refuses(R"({"prompt": "a", "model": "huge"})", "the model 'huge' is not served here; expected 'tiny'", 404);
}

TEST(ServeText, StopStringsAreNeverShown) {
  const auto tokenizer = make_byte_tokenizer();
  for (const std::string text : {"one two STOP three", "SSTSTOSTOP", "ends with ST", "no end", "STOP"}) {
    TextStream stream(*tokenizer, {}, {"STOP", "halt"});
    std::string shown_text;
    for (const char c : text) {
      if (!stream.stopped()) shown_text += stream.add(static_cast<uint8_t>(c));
      EXPECT_EQ(shown_text.find("STOP"), std::string::npos);
    }
    shown_text += stream.finish();
    EXPECT_EQ(shown_text, text.substr(0, text.find("STOP"))) << text;
    EXPECT_EQ(stream.stopped(), text.find("STOP") != std::string::npos);
  }
}

TEST(ServeText, GivesWholeCharacters) {
  const auto tokenizer = make_byte_tokenizer();
  const std::string text = "a\xc3\xa9\xe2\x82\xac";
  TextStream stream(*tokenizer, {}, {"\xe2\x82\xacX"});
  std::vector<std::string> pieces;
  for (const char c : text) pieces.push_back(stream.add(static_cast<uint8_t>(c)));
  EXPECT_EQ(pieces,
            (std::vector<std::string>{"a", "", "\xc3\xa9", "", "", ""}));  // the last one may begin a stop string
  EXPECT_EQ(stream.finish(), "\xe2\x82\xac");
}

TEST(ServeMetrics, AreCumulative) {
  EngineStats s;
  for (const double t : {0.0004, 0.002, 1000.0}) s.first_token.add(t);
  const std::string text = prometheus_text(s);
  EXPECT_THAT(text, HasSubstr("oryx_time_to_first_token_seconds_bucket{le=\"0.0005\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("oryx_time_to_first_token_seconds_bucket{le=\"0.002\"} 2\n"));
  EXPECT_THAT(text, HasSubstr("oryx_time_to_first_token_seconds_bucket{le=\"+Inf\"} 3\n"));
  EXPECT_THAT(text, HasSubstr("oryx_time_to_first_token_seconds_count 3\n"));
}

}  // namespace
}  // namespace oryx::serve
