#include "tests/support/readers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "oryx/common/error.h"
#include "oryx/common/hash.h"
#include "oryx/common/options.h"
#include "oryx/data/sentencepiece.h"
#include "oryx/data/token_file.h"
#include "oryx/generate/session.h"
#include "oryx/io/safetensors.h"
#include "oryx/model/config.h"
#include "oryx/model/hf/convert.h"
#include "oryx/model/state_file.h"
#include "oryx/modes/layer_schedules.h"

namespace oryx::test {

namespace {

// Bytes as a file that no disk knows.
class MemoryFile {
 public:
  explicit MemoryFile(std::string_view bytes) : fd_(::memfd_create("foreign", 0)) {
    if (fd_ < 0) fail_errno("memfd", "create");
    if (::write(fd_, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size())) fail_errno("memfd", "write");
  }
  ~MemoryFile() { ::close(fd_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  std::string path() const { return "/proc/self/fd/" + std::to_string(fd_); }

 private:
  int fd_;
};

void read_safetensors(std::string_view bytes) {
  const MemoryFile file(bytes);
  const SafetensorsReader reader(file.path());
  for (const auto& [name, info] : reader.tensors()) reader.load(name);
}

void read_config(std::string_view bytes) {
  const MemoryFile file(bytes);
  const auto config = load_options<ModelConfig>(file.path());
  if (dump_options(config).empty()) throw std::logic_error("a config without text");
}

void read_hf_config(std::string_view bytes) {
  const MemoryFile file(bytes);
  if (read_published_config(file.path()).num_layers < 1) throw std::logic_error("a model without layers");
}

void read_schedule(std::string_view bytes) {
  const std::vector<std::vector<std::string>> layers(3, {"gated_delta_net", "attention"});
  ModeContext context;
  context.prompt_length = 1000;
  for (const Schedule& s : parse_layer_schedules(Json(std::string(bytes)), layers)) {
    const auto spans = s.resolve(context, 0, 1100);
    int32_t at = 0;
    for (const ModeSpan& span : spans) {
      if (span.begin != at || span.end <= at || span.mixer < 0 || span.mixer > 1) throw std::logic_error("spans do not cover the document");
      at = span.end;
    }
    if (at != 1100 || Schedule::parse(s.text(), layers[0]).text() != s.text()) throw std::logic_error("the text is not canonical");
  }
}

void use_tokenizer(const Tokenizer& tokenizer) {
  std::vector<int32_t> ids = tokenizer.encode("Größe 12\n\tof a \xE2\x96\x81 state");
  for (const int32_t id : ids) {
    if (id < 0 || id >= tokenizer.vocab_size()) throw std::logic_error("an id outside the vocabulary");
  }
  (void)tokenizer.decode(ids);
}

void read_tokenizer(std::string_view bytes) { use_tokenizer(*load_sentencepiece("foreign", std::string(bytes))); }

void read_tokenizer_json(std::string_view bytes) {
  const MemoryFile file(bytes);
  use_tokenizer(*load_tokenizer(file.path()));
}

void read_token_file(std::string_view bytes) {
  const MemoryFile file(bytes);
  TokenFile tokens(file.path());
  for (uint64_t i = 0; i < tokens.documents(); ++i) {
    std::vector<int64_t> document(std::min<uint64_t>(tokens.document_size(i), 1 << 12));
    tokens.read(tokens.document_begin(i), document);
  }
  tokens.verify();
}

void reseal_token_file(std::string& bytes) {
  TokenHeader h;
  if (bytes.size() < sizeof h) return;
  std::memcpy(&h, bytes.data(), sizeof h);
  const uint64_t payload = std::min<uint64_t>(h.payload_bytes, bytes.size() - sizeof h);
  const uint64_t tables = std::min<uint64_t>(sizeof h + (payload + 7) / 8 * 8, bytes.size());
  h.payload_checksum = fnv1a(bytes.data() + sizeof h, payload);
  h.tables_checksum = fnv1a(bytes.data() + tables, bytes.size() - tables);
  h.header_checksum = fnv1a(&h, sizeof h - 8);
  std::memcpy(bytes.data(), &h, sizeof h);
}

void read_session(std::string_view bytes) {
  static const std::string own = fingerprint(session_model());
  std::string patched(bytes);
  if (const size_t at = patched.find(kAnyFingerprint); at != std::string::npos) patched.replace(at, own.size(), own);
  const MemoryFile file(patched);
  TextEnd end;
  State state = load_state(session_model(), file.path(), int64_t{64} << 20, &end);
  // What was loaded can be used: gone back in, and gone on with.
  const int64_t length = state.lengths()[0];
  state.trim(0, state.reachable(0, length / 2), session_model());
  if (state.sequences() > 1) return;
  static const ModelSchedule schedule(session_model().config(), "linear");
  const SessionOptions room{.prompt_length = 0, .tokens = state.lengths()[0] + 2};
  Session session(session_model(), schedule, room, std::move(state), end.routers);
  session.extend(std::vector<int32_t>{1, 2});
}

}  // namespace

const LanguageModel& session_model() {
  static const auto model = [] {
    ModelConfig c;
    c.vocab_size = 16;
    c.num_layers = 2;
    c.layer.hidden_size = 8;
    c.layer.head_dim = 4;
    c.layer.intermediate_size = 8;
    c.layer_mixers = {{"gated_delta_net", "attention"}, {"mamba2"}};
    auto m = std::make_unique<LanguageModel>(c);
    m->initialize(1);
    return m;
  }();
  return *model;
}

const std::vector<ForeignReader>& foreign_readers() {
  static const std::vector<ForeignReader> all = {{"safetensors", read_safetensors},
                                                 {"config", read_config},
                                                 {"hf_config", read_hf_config},
                                                 {"schedule", read_schedule, /*whole=*/false},
                                                 {"tokenizer", read_tokenizer, /*whole=*/false},
                                                 {"tokenizer_json", read_tokenizer_json},
                                                 {"token_file", read_token_file, /*whole=*/true, reseal_token_file},
                                                 {"session", read_session}};
  return all;
}

}  // namespace oryx::test
