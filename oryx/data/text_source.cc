#include "oryx/data/text_source.h"

#include <fnmatch.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "oryx/common/error.h"
#include "oryx/common/utf8.h"

namespace oryx {

namespace fs = std::filesystem;

namespace {

constexpr size_t kRead = 1 << 20;

bool contains(const std::vector<std::string>& list, const std::string& x) {
  return std::find(list.begin(), list.end(), x) != list.end();
}

bool any_matches(const std::vector<std::string>& patterns, const std::string& name) {
  return std::any_of(patterns.begin(), patterns.end(), [&](const auto& p) { return matches_pattern(name, p); });
}

std::string known_endings(const TextSourceOptions& options) {
  std::string out;
  for (const auto& e : options.extensions) out += fmt::format("{}{}", out.empty() ? "" : ", ", e);
  return out + " (each may be followed by .zst)";
}

void walk(const fs::path& folder, const std::string& prefix, const TextSourceOptions& options,
          std::vector<TextFile>& files) {
  std::error_code error;
  fs::directory_iterator entries(folder, error);
  if (error) fail("{}: cannot read the folder: {}", folder.string(), error.message());
  for (const auto& entry : entries) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with('.')) continue;
    // A link to a folder is not followed: it may lead back up.
    if (entry.is_directory(error) && !entry.is_symlink(error)) {
      walk(entry.path(), prefix + name + "/", options, files);
    } else if (entry.is_regular_file(error) && contains(options.extensions, text_ending(name))) {
      files.push_back({entry.path(), prefix + name, entry.file_size()});
    }
  }
}

}  // namespace

std::string text_ending(const fs::path& path) { return (path.extension() == ".zst" ? path.stem() : path).extension().string(); }

bool matches_pattern(const std::string& name, const std::string& pattern) {
  const std::string last = name.substr(name.rfind('/') + 1);
  return fnmatch(pattern.c_str(), name.c_str(), 0) == 0 || fnmatch(pattern.c_str(), last.c_str(), 0) == 0;
}

std::vector<TextFile> list_text_files(const fs::path& path, const TextSourceOptions& options) {
  std::error_code error;
  const auto status = fs::status(path, error);
  if (!fs::exists(status)) fail("{}: no such file or folder", path.string());
  if (!fs::is_directory(status)) {
    if (!contains(options.extensions, text_ending(path))) {
      fail("{}: not a text file by its name; expected {}", path.string(), known_endings(options));
    }
    return {{path, path.filename().string(), fs::file_size(path)}};
  }
  std::vector<TextFile> files;
  walk(path, "", options, files);
  if (files.empty()) fail("{}: no text files in this folder; expected {}", path.string(), known_endings(options));
  std::erase_if(files, [&](const TextFile& f) {
    return any_matches(options.exclude, f.name) || (!options.include.empty() && !any_matches(options.include, f.name));
  });
  if (files.empty()) fail("{}: the include and exclude patterns leave no text file", path.string());
  std::sort(files.begin(), files.end(), [](const TextFile& a, const TextFile& b) { return a.name < b.name; });
  return files;
}

// Cuts one file into documents: a buffer that holds what was read and not yet given out.
class TextSource::Reader {
 public:
  Reader(const TextFile& file, size_t piece)
      : path_(file.path.string()),
        json_(text_ending(file.path) == ".jsonl"),
        piece_(piece),
        stream_(open_stream(file.path)) {}

  // False at the file's end. `text` may be empty.
  bool next(std::string& text, uint64_t& line) {
    if (!begun_) pass_mark();
    return json_ ? next_json(text, line) : next_piece(text, line);
  }
  uint64_t consumed() const { return stream_->consumed(); }

 private:
  bool fill() {
    if (end_) return false;
    buffer_.erase(0, begin_);
    begin_ = 0;
    const size_t old = buffer_.size();
    buffer_.resize(old + kRead);
    const size_t n = stream_->read(buffer_.data() + old, kRead);
    buffer_.resize(old + n);
    end_ = n == 0;
    return !end_;
  }

  // A byte-order mark, which some editors put in front of UTF-8, is no part of the text.
  void pass_mark() {
    constexpr std::string_view kMark = "\xEF\xBB\xBF";
    begun_ = true;
    while (rest().size() < kMark.size() && fill()) {
    }
    if (rest().starts_with(kMark)) take(kMark.size());
  }

  std::string_view rest() const { return std::string_view(buffer_).substr(begin_); }

  // The next line without its newline; false at the end.
  bool next_line(std::string_view& line) {
    size_t searched = 0;
    while (true) {
      const size_t newline = rest().find('\n', searched);
      if (newline != std::string_view::npos) {
        line = rest().substr(0, newline);
        taken_ = newline + 1;
        return true;
      }
      searched = rest().size();
      if (searched > kLongestLine) fail("{}:{}: line longer than {} bytes", path_, line_ + 1, kLongestLine);
      if (!fill()) break;
    }
    line = rest();
    taken_ = line.size();
    return !line.empty();
  }

  void check_utf8(std::string_view text) const {
    const size_t valid = scan_utf8(text).valid;
    if (valid == text.size()) return;
    const std::string where = json_ ? fmt::format("{}:{}", path_, line_) : path_;
    fail("{}: byte {} (0x{:02x}) is not UTF-8; convert the file first (iconv -t UTF-8)", where, offset_ + valid,
         static_cast<unsigned char>(text[valid]));
  }

  bool next_json(std::string& text, uint64_t& line_number) {
    std::string_view line;
    while (next_line(line)) {
      ++line_;
      check_utf8(line);
      const bool blank = line.find_first_not_of(" \t\r") == std::string_view::npos;
      if (!blank) text = parse(line);
      take(taken_);
      line_number = line_;
      if (!blank) return true;
    }
    return false;
  }

  std::string parse(std::string_view line) const {
    const auto where = [&] { return fmt::format("{}:{}", path_, line_); };
    // Objects nested without end would exhaust the parser's stack: documents need none.
    const auto depth = [&](int d, nlohmann::json::parse_event_t, nlohmann::json&) {
      if (d > 64) fail("{}: JSON nested deeper than 64 levels", where());
      return true;
    };
    nlohmann::json object;
    try {
      object = nlohmann::json::parse(line, depth);
    } catch (const nlohmann::json::exception& e) {
      // "[json.exception.parse_error.101] parse error at line 1, column 7: ...": the tail tells where.
      const std::string what = e.what();
      const size_t colon = what.find("column ");
      fail("{}: not JSON ({}); expected one object a line", where(),
           what.substr(colon == std::string::npos ? 0 : colon));
    }
    if (!object.is_object()) fail("{}: found a JSON {}, expected an object", where(), object.type_name());
    const auto field = object.find("text");
    if (field == object.end()) {
      std::string names;
      for (const auto& [name, _] : object.items()) names += (names.empty() ? "" : ", ") + name;
      fail("{}: no field \"text\" (found: {})", where(), names.empty() ? "none" : names.substr(0, 200));
    }
    if (!field->is_string()) fail("{}: field \"text\" is a {}, expected a string", where(), field->type_name());
    return std::move(field->get_ref<std::string&>());
  }

  bool next_piece(std::string& text, uint64_t& number) {
    while (rest().size() <= piece_ && fill()) {
    }
    if (rest().empty()) return false;
    size_t size = rest().size();
    if (size > piece_) {
      const size_t newline = rest().substr(0, piece_).rfind('\n');
      size = newline == std::string_view::npos ? cut_character(piece_) : newline + 1;
    }
    text.assign(rest().substr(0, size));
    check_utf8(text);
    take(size);
    number = ++line_;
    return true;
  }

  // The largest cut at or before `size` that does not split a character.
  size_t cut_character(size_t size) const {
    size_t cut = size;
    while (cut > size - 3 && cut > 1 && (static_cast<unsigned char>(rest()[cut]) & 0xC0) == 0x80) --cut;
    return cut;
  }

  void take(size_t size) {
    begin_ += size;
    offset_ += size;
  }

  std::string path_;
  bool json_;
  size_t piece_;
  std::unique_ptr<ByteStream> stream_;
  std::string buffer_;
  size_t begin_ = 0, taken_ = 0;
  uint64_t offset_ = 0, line_ = 0;  // of begin_ in the (decompressed) file; of the line or piece read last
  bool begun_ = false, end_ = false;
};

TextSource::TextSource(std::vector<TextFile> files, size_t piece) : files_(std::move(files)), piece_(piece) {}
TextSource::~TextSource() = default;

bool TextSource::next(Document& document) {
  while (file_ < files_.size()) {
    if (!reader_) reader_ = std::make_unique<Reader>(files_[file_], piece_);
    if (!reader_->next(document.text, document.line)) {
      reader_.reset();
      done_bytes_ += files_[file_++].bytes;
      continue;
    }
    document.file = file_;
    if (!document.text.empty()) return true;
    ++empty_;
  }
  return false;
}

uint64_t TextSource::total_bytes() const {
  uint64_t sum = 0;
  for (const auto& f : files_) sum += f.bytes;
  return sum;
}

uint64_t TextSource::consumed_bytes() const { return done_bytes_ + (reader_ ? reader_->consumed() : 0); }

}  // namespace oryx
