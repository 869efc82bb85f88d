// oryx data build | inspect
#include <nlohmann/json.hpp>

#include "oryx/cli/command.h"
#include "oryx/cli/text_options.h"
#include "oryx/common/error.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/progress.h"
#include "oryx/data/dataset.h"

namespace oryx::cli {

namespace {

struct DataBuildArguments {
  std::string text, out, tokenizer;
  TextSourceOptions source;
  DatasetOptions dataset;
  bool compress = false;
};

void print_split(const char* name, const SplitInfo& s) {
  print("{:<6} {:>10} documents {:>14} tokens {:>10} of text, {:.2f} bytes a token\n", name, s.documents, s.tokens,
        human_bytes(static_cast<double>(s.bytes)),
        s.tokens ? static_cast<double>(s.bytes) / static_cast<double>(s.tokens) : 0);
}

void build_data(DataBuildArguments o) {
  catch_interrupts();
  if (o.compress) o.dataset.tokens.encoding = TokenEncoding::zstd;
  const auto tokenizer = load_tokenizer(o.tokenizer);
  const DatasetInfo info = build_dataset(list_text_files(o.text, o.source), *tokenizer, o.out, o.dataset);
  print_split("train", info.train);
  print_split("valid", info.valid);
}

struct DataInspectArguments {
  std::string path;
  bool json = false, verify = false;
};

nlohmann::ordered_json describe_token_file(const TokenFile& file) {
  const TokenHeader& h = file.header();
  uint64_t longest = 0;
  for (uint64_t i = 0; i < file.documents(); ++i) longest = std::max(longest, file.document_size(i));
  const uint64_t bytes = std::filesystem::file_size(file.path());
  return {{"file", file.path()},
          {"tokens", h.tokens},
          {"documents", h.documents},
          {"longest_document", longest},
          {"vocab_size", h.vocab_size},
          {"tokenizer", fingerprint_text(h.fingerprint)},
          {"dtype", h.token_bytes == 2 ? "uint16" : "uint32"},
          {"encoding", h.encoding == 0 ? "raw" : "zstd"},
          {"bytes", bytes}};
}

void inspect_token_file(const TokenFile& file, const DataInspectArguments& o) {
  if (o.verify) file.verify();
  const auto json = describe_token_file(file);
  if (o.json) return print("{}\n", json.dump());
  for (const auto& [key, value] : json.items()) {
    print("{:<17} {}\n", key, value.is_string() ? value.get<std::string>() : value.dump());
  }
  if (o.verify) print("{:<17} every token and checksum\n", "verified");
}

void inspect_data(const DataInspectArguments& o) {
  if (!std::filesystem::is_directory(o.path)) return inspect_token_file(TokenFile(o.path), o);
  const Dataset d = open_dataset(o.path);
  if (!o.json) {
    print_split("train", d.info.train);
    print_split("valid", d.info.valid);
    write("\n");
  }
  inspect_token_file(*d.train, o);
  if (!o.json) write("\n");
  inspect_token_file(*d.valid, o);
}

ORYX_COMMAND(data, "turn text into token files, or look into them", [](CLI::App& app) {
  app.require_subcommand(1);
  auto b = std::make_shared<DataBuildArguments>();
  CLI::App* building = app.add_subcommand("build", "tokenise a folder of text into a data set");
  add_text_options(*building, b->text, b->source);
  building->add_option("--tokenizer", b->tokenizer, "a tokeniser file, a folder that holds one, or 'byte'")->required();
  building->add_option("--out", b->out, "the folder to write")->required()->type_name("DIR");
  auto* share = building->add_option("--valid", b->dataset.valid, "share of documents held out (default: 0.01)")
                    ->type_name("SHARE");
  building->add_option("--valid-files", b->dataset.valid_files, "files that are the validation set (may be repeated)")
      ->type_name("PATTERN")
      ->allow_extra_args(false)
      ->excludes(share);
  building->add_option("--seed", b->dataset.seed, "of the choice of held-out documents (default: 0)")->type_name("N")->check(integer(0));
  building->add_flag("--compress", b->compress, "write zstd blocks instead of plain arrays");
  building->add_flag("--overwrite", b->dataset.overwrite, "replace a data set that is there already");
  building->callback([b] { build_data(*b); });

  auto i = std::make_shared<DataInspectArguments>();
  CLI::App* inspecting = app.add_subcommand("inspect", "print what a token file or a data set holds");
  inspecting->add_option("path", i->path, "a .tok file or a data set")->required();
  inspecting->add_flag("--verify", i->verify, "read every token and check the checksums");
  inspecting->add_flag("--json", i->json, "print one line of JSON for each file");
  inspecting->callback([i] { inspect_data(*i); });
});

}  // namespace

}  // namespace oryx::cli
