// oryx tokenizer train | encode | decode
#include <iostream>
#include <iterator>
#include <limits>
#include <optional>

#include "oryx/cli/command.h"
#include "oryx/cli/text_options.h"
#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/log.h"
#include "oryx/common/progress.h"
#include "oryx/data/sentencepiece.h"

namespace oryx::cli {

namespace {

struct TokenizerTrainArguments {
  std::string text, out;
  TextSourceOptions source;
  SentencePieceTraining training;
  double sample_mib = 32;
};

void train_tokenizer(TokenizerTrainArguments o) {
  const std::filesystem::path out = o.out;
  if (!out.has_parent_path() || std::filesystem::exists(out.parent_path())) check_output(out);  // else the folder is made
  if (!(o.sample_mib > 0 && o.sample_mib <= 1 << 20)) fail("--sample {}: expected MiB above 0", o.sample_mib);
  o.training.sample_bytes = static_cast<uint64_t>(o.sample_mib * (1 << 20)) + 1;
  catch_interrupts();
  TextSource source(list_text_files(o.text, o.source));
  const auto tokenizer = train_sentencepiece(source, o.training);
  if (out.has_parent_path()) make_folders(out.parent_path());
  tokenizer->save(out);
  print("{}: {} pieces, fingerprint {}\n", o.out, tokenizer->vocab_size(), fingerprint_text(tokenizer->fingerprint()));
}

struct TokenizerUseArguments {
  std::string file;
  std::vector<std::string> arguments;
  bool pieces = false;
};

std::string standard_input() { return {std::istreambuf_iterator<char>(std::cin), {}}; }

// "\n" and the like for what would break the line.
std::string visible(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) {
    if (c == '\n') {
      out += "\\n";
    } else if (c == '\t') {
      out += "\\t";
    } else if (static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) >= 0x7F) {
      out += bytes.size() == 1 ? fmt::format("\\x{:02x}", static_cast<unsigned char>(c)) : std::string(1, c);
    } else {
      out += c;
    }
  }
  return out;
}

void encode(const TokenizerUseArguments& o) {
  const auto tokenizer = load_tokenizer(o.file);
  const std::string text = o.arguments.empty() ? standard_input() : o.arguments[0];
  bool first = true;
  for (const int32_t id : tokenizer->encode(text)) {
    if (o.pieces) {
      print("{}\t{}\n", id, visible(tokenizer->token_bytes(id)));
    } else {
      print("{}{}", first ? "" : " ", id);
    }
    first = false;
  }
  if (!o.pieces) write("\n");
}

int32_t parse_id(const std::string& word) {
  size_t used = 0;
  long long value = -1;
  try {
    value = std::stoll(word, &used);
  } catch (const std::exception&) {
  }
  if (used != word.size() || value < 0 || value > std::numeric_limits<int32_t>::max())
    fail("'{}' is not a token id", word);
  return static_cast<int32_t>(value);
}

void decode(const TokenizerUseArguments& o) {
  const auto tokenizer = load_tokenizer(o.file);
  std::vector<std::string> words = o.arguments;
  if (words.empty()) words.assign(std::istream_iterator<std::string>(std::cin), {});
  std::vector<int32_t> ids;
  for (const auto& w : words) ids.push_back(parse_id(w));
  write(tokenizer->decode(ids));
}

ORYX_COMMAND(tokenizer, "train a tokeniser, or encode and decode with one", [](CLI::App& app) {
  app.require_subcommand(1);
  auto t = std::make_shared<TokenizerTrainArguments>();
  CLI::App* training = app.add_subcommand("train", "learn a SentencePiece BPE model from text");
  add_text_options(*training, t->text, t->source);
  training->add_option("--vocab-size", t->training.vocab_size, "pieces to learn (default: 32000)")->type_name("N")->check(integer());
  training->add_option("--out", t->out, "the model file to write")->required()->type_name("FILE");
  training->add_option("--sample", t->sample_mib, "MiB of text to learn from, drawn from all of it (default: 32)")
      ->type_name("MIB");
  training->add_option("--seed", t->training.seed, "of that draw (default: 1)")->type_name("N")->check(integer(0));
  training->callback([t] { train_tokenizer(*t); });

  auto e = std::make_shared<TokenizerUseArguments>();
  CLI::App* encoding = app.add_subcommand("encode", "print the token ids of a text");
  encoding->add_option("tokenizer", e->file, "a tokeniser file, a folder that holds one, or 'byte'")->required();
  encoding->add_option("text", e->arguments, "the text (default: standard input)")->expected(0, 1);
  encoding->add_flag("--pieces", e->pieces, "one token a line, with what it stands for");
  encoding->callback([e] { encode(*e); });

  auto d = std::make_shared<TokenizerUseArguments>();
  CLI::App* decoding = app.add_subcommand("decode", "print the text of token ids");
  decoding->add_option("tokenizer", d->file, "a tokeniser file, a folder that holds one, or 'byte'")->required();
  decoding->add_option("ids", d->arguments, "the ids (default: standard input)");
  decoding->callback([d] { decode(*d); });
});

}  // namespace

}  // namespace oryx::cli
