// oryx generate: text from a model, as it comes.
#include <unistd.h>

#include <iostream>
#include <iterator>

#include "oryx/cli/command.h"
#include "oryx/cli/model_folder.h"
#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/json.h"
#include "oryx/common/progress.h"
#include "oryx/common/utf8.h"
#include "oryx/generate/generator.h"
#include "oryx/model/state_file.h"

namespace oryx::cli {

namespace {

struct GenerateArguments {
  ModelArguments model;
  std::string prompt, prompt_file, schedule, kv = "keep";
  std::string session, save_session;
  bool has_prompt = false, json = false, stats = false;
  GenerateOptions generate;
};

// From files, the newline that ends the last line is not part of the prompt.
std::string without_last_newline(std::string text) {
  if (text.ends_with('\n')) text.pop_back();
  if (text.ends_with('\r')) text.pop_back();
  return text;
}

std::string utf8_prompt(std::string text, const std::string& source) {
  const size_t valid = scan_utf8(text).valid;
  if (valid == text.size()) return text;
  fail("{}: byte {} (0x{:02x}) is not UTF-8; convert it first (iconv -t UTF-8)", source, valid, static_cast<unsigned char>(text[valid]));
}

// With a session no prompt at all means to go on at once.
std::string read_prompt(const GenerateArguments& o) {
  if (o.has_prompt) return utf8_prompt(o.prompt, "--prompt");
  if (!o.prompt_file.empty()) return utf8_prompt(without_last_newline(read_file(o.prompt_file)), o.prompt_file);
  if (isatty(STDIN_FILENO) && !o.session.empty()) return "";
  if (isatty(STDIN_FILENO)) fail("no prompt; give --prompt TEXT or --prompt-file FILE, or write it to standard input");
  return utf8_prompt(without_last_newline({std::istreambuf_iterator<char>(std::cin), {}}), "standard input");
}

Json bytes_json(const StateBytes& b) {
  return {{"recurrent", b.recurrent}, {"tails", b.tails}, {"tokens", b.tokens}, {"total", b.total()}};
}

Json draft_json(const DraftStats& d) {
  return {{"drafted", d.drafted},   {"tested", d.tested},           {"accepted", d.accepted},           {"acceptance", d.acceptance()}, {"passes", d.passes},
          {"alone", d.alone},       {"tokens_a_pass", d.tokens_a_pass()}, {"draft_seconds", d.draft_seconds}, {"verify_seconds", d.verify_seconds}};
}

Json stats_json(const GenerateStats& s) {
  return {{"held_tokens", s.held_tokens},
          {"prompt_tokens", s.prompt_tokens},
          {"new_tokens", s.new_tokens},
          {"prefill_tokens_per_second", s.prefill_tokens_per_second()},
          {"decode_ms_per_token", s.decode_ms_per_token()},
          {"draft", draft_json(s.draft)},
          {"attention_share", s.attention_share},
          {"state_bytes", bytes_json(s.state)},
          {"predicted_state_bytes", bytes_json(s.predicted_state)},
          {"reserved_bytes", s.predicted.total()}};
}

void print_stats(const GenerateStats& s) {
  const auto bytes = [](int64_t n) { return human_bytes(static_cast<double>(n)); };
  if (s.held_tokens > 0) fmt::print(stderr, "session    {} tokens, not read again\n", s.held_tokens);
  fmt::print(stderr, "prompt     {} tokens, {} tokens/s\n", s.prompt_tokens, human_count(s.prefill_tokens_per_second()));
  fmt::print(stderr, "generated  {} tokens, {:.2f} ms a token\n", s.new_tokens, s.decode_ms_per_token());
  if (const DraftStats& d = s.draft; d.passes + d.alone > 0) {
    fmt::print(stderr, "drafts     {} tokens, {:.1f}% of those tested accepted; {} passes of {:.2f} tokens, {} tokens without a draft\n", d.drafted, 100 * d.acceptance(), d.passes,
               d.tokens_a_pass(), d.alone);
    const auto each = [](double seconds, int64_t count) { return count > 0 ? 1e3 * seconds / static_cast<double>(count) : 0; };
    fmt::print(stderr, "           {:.2f} ms a drafted token, {:.2f} ms a pass\n", each(d.draft_seconds, d.drafted), each(d.verify_seconds, d.passes));
  }
  fmt::print(stderr, "attention  {:.1f}% of tokens\n", 100 * s.attention_share);
  fmt::print(stderr, "state      {}: recurrent {}, convolution tails {}, keys and values {} (predicted {})\n", bytes(s.state.total()),
             bytes(s.state.recurrent), bytes(s.state.tails), bytes(s.state.tokens), bytes(s.predicted_state.total()));
  fmt::print(stderr, "memory     {} planned for prompt and {} (state {}, one pass {})\n", bytes(s.predicted.total()), "new tokens",
             bytes(s.predicted.state.total()), bytes(s.predicted.activations));
}

void generate_text(GenerateArguments o) {
  set_kv(o.generate.state, o.kv);
  o.generate.sampling.race |= o.generate.draft.on();
  const LoadedModel loaded = load(o.model);
  if (!loaded.tokenizer) fail("{}: has no tokeniser; give one with --tokenizer", loaded.name);
  const ModelSchedule schedule(loaded.model->config(), o.schedule);
  const std::string prompt = read_prompt(o);
  o.generate.eos_id = loaded.tokenizer->eos_id();
  o.generate.vocab_size = loaded.tokenizer->vocab_size();

  std::optional<State> held;
  if (!o.session.empty()) {
    held.emplace(load_state(*loaded.model, o.session, 0, &o.generate.from_end));
    if (held->sequences() != 1) fail("{}: holds {} sequences, expected one", o.session, held->sequences());
    o.generate.state = held->options();
    o.generate.from = &*held;
  }
  bool saved = false;
  if (!o.save_session.empty()) {
    check_output(o.save_session);  // said before the text is made, not after
    o.generate.at_end = [&](const State& state, const TextEnd& end) {
      save_state(*loaded.model, state, o.save_session, end);
      saved = true;
    };
  }

  catch_interrupts();
  StreamDecoder decoder(*loaded.tokenizer);
  std::string text;
  const auto show = [&](const std::string& piece) {
    text += piece;
    if (o.json || piece.empty()) return;
    write(piece);
    flush();
  };
  // The prompt's text goes through the decoder too, and before it the session's: what follows begins in the middle of a text.
  const std::vector<int32_t> ids = o.session.empty() ? loaded.tokenizer->encode_prompt(prompt) : loaded.tokenizer->encode(prompt);
  for (const int32_t id : o.generate.from_end.ids) decoder.add(id);
  for (const int32_t id : ids) decoder.add(id);
  const Generated out = [&] {
    try {
      return generate(*loaded.model, schedule, ids, o.generate, [&](int32_t id) {
        show(decoder.add(id));
        return true;
      });
    } catch (const Error&) {
      if (!o.json && !text.empty() && !text.ends_with('\n')) write("\n");  // its line is not the text's
      flush();
      throw;
    }
  }();
  // Half a character at the end of a session comes whole with what follows; an interrupt ends behind a whole one.
  if (!saved && out.stop != StopReason::kInterrupted) show(decoder.finish());
  if (o.json) {
    const Json json = {{"prompt", prompt}, {"text", text},       {"ids", out.ids}, {"stop", to_string(out.stop)},
                       {"schedule", schedule.text()}, {"kv", kv_text(o.generate.state)}, {"stats", stats_json(out.stats)}};
    write(json.dump(2) + "\n");
  } else if (!text.ends_with('\n')) {
    write("\n");
  }
  flush();
  if (o.stats) print_stats(out.stats);
  if (out.stop == StopReason::kInterrupted) {
    const std::string where = fmt::format("interrupted after {} tokens", out.ids.size());
    if (saved) throw Interrupted(fmt::format("{}, saved; go on with: oryx generate {} --session {} --prompt ''", where, o.model.folder, o.save_session));
    throw Interrupted(o.save_session.empty() ? where : "interrupted while the prompt was read, no session was saved");
  }
}

ORYX_COMMAND(generate, "go on with a text, token by token", [](CLI::App& app) {
  auto o = std::make_shared<GenerateArguments>();
  o->model.add_to(app);
  auto* prompt = app.add_option("--prompt", o->prompt, "the text to go on with (default: standard input)")->type_name("TEXT");
  app.add_option("--prompt-file", o->prompt_file, "a file that holds it")->type_name("FILE")->excludes(prompt);
  app.add_option("--schedule", o->schedule, "which mixer processes which token (docs/modes.md; default: linear)");
  app.add_option("--max-new-tokens", o->generate.max_new_tokens, "stop after so many")->type_name("N")->check(integer())->capture_default_str();
  app.add_option("--temperature", o->generate.sampling.temperature, "0: always the likeliest token")->capture_default_str();
  app.add_option("--top-k", o->generate.sampling.top_k, "draw from so many likeliest tokens (0: all)")->type_name("N")->check(integer())->capture_default_str();
  app.add_option("--top-p", o->generate.sampling.top_p, "draw from the fewest likeliest tokens with this probability together")->capture_default_str();
  app.add_option("--min-p", o->generate.sampling.min_p, "leave out tokens less likely than this times the likeliest")->capture_default_str();
  app.add_option("--seed", o->generate.sampling.seed, "of the draws, and of a random schedule")->type_name("N")->check(integer())->capture_default_str();
  app.add_flag("--race", o->generate.sampling.race, "draw by a race of all tokens, as drafted texts do: the same distribution, and drafts agree more often");
  app.add_option("--prefill-piece", o->generate.prefill_piece, "tokens of the prompt run at once at most: bounds memory (default: 1024, on a GPU 8192)")->type_name("N")->check(integer());
  auto* session = app.add_option("--session", o->session, "go on from a session that was saved: the prompt, which may be empty, comes behind what it holds")->type_name("FILE");
  app.add_option("--save-session", o->save_session, "save prompt and text there at the end, or at Ctrl-C, to go on from")->type_name("FILE");
  app.add_option("--kv", o->kv, "keys and values: keep, drop, bounded:F+W (those of the first F and the last W tokens), or rows chosen by a policy, as surprise:budget=256 (docs/state.md)")
      ->type_name("POLICY")->capture_default_str()->excludes(session);
  auto* draft = app.add_option("--draft", o->generate.draft.schedule, "draft tokens in these modes, as linear, and verify several in one pass of the schedule's: the same text, sooner where that one is slow")
      ->type_name("SCHEDULE");
  app.add_option("--draft-tokens", o->generate.draft.tokens, "draft so many for one pass at most (1 to 15)")->type_name("N")->check(integer())->capture_default_str()->needs(draft);
  app.add_flag("--draft-adapt,!--no-draft-adapt", o->generate.draft.adapt, "draft as many as pay by what was accepted and took so far (default), or always --draft-tokens")->needs(draft);
  app.add_flag("--fused,!--no-fused", o->generate.fused, "on a GPU, decode by one captured launch a token (default; docs/generation.md)");
  app.add_flag("--json", o->json, "print one JSON object at the end instead of the text");
  app.add_flag("--stats", o->stats, "print speed, share of attention and state bytes to standard error");
  app.callback([o, prompt, draft] {
    o->has_prompt = prompt->count() > 0;
    if (draft->count() > 0 && !o->generate.draft.on()) fail("--draft '': expected a schedule, as linear");
    generate_text(*o);
  });
});

}  // namespace
}  // namespace oryx::cli
