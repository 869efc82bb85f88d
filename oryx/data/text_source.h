// Text on disk as a stream of documents, read with bounded memory.
//
//   FILE.txt      one document (a longer one than kTextPiece is cut at a line's end into several)
//   FILE.jsonl    one JSON object a line, its document in the string field "text"; blank lines are skipped
//   FILE.*.zst    either of them, zstd-compressed
//   FOLDER        all of those below it, in the order of their paths; names that begin with a dot are passed over
//
// Everything must be UTF-8. Errors (oryx::Error) name the file and the byte or line; offsets in a .zst count
// decompressed bytes.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace oryx {

constexpr size_t kTextPiece = size_t{64} << 20;     // bytes: the longest document that a plain text file gives
constexpr size_t kLongestLine = size_t{256} << 20;  // bytes: a longer line of JSON is refused

struct TextSourceOptions {
  // Endings of the files taken from a folder, a trailing ".zst" apart. Anything but ".jsonl" is read as plain text.
  std::vector<std::string> extensions = {".txt", ".jsonl"};
  // Shell patterns on the path below the folder, or on the file name; an empty `include` takes all.
  std::vector<std::string> include = {}, exclude = {};
};

struct TextFile {
  std::filesystem::path path;
  std::string name;    // path below the folder given, or the file's name
  uint64_t bytes = 0;  // as stored
};

// The files that `path` (a folder or one file) stands for, sorted by name. Throws Error when there is none, or when a
// single file has a foreign ending.
std::vector<TextFile> list_text_files(const std::filesystem::path& path, const TextSourceOptions& options = {});

// The ending that decides how a file is read: ".jsonl" of "a.jsonl.zst".
std::string text_ending(const std::filesystem::path& path);

// True when `name` or its last component matches the shell pattern.
bool matches_pattern(const std::string& name, const std::string& pattern);

// Bytes of a file, decompressed when its name ends in .zst.
class ByteStream {
 public:
  virtual ~ByteStream() = default;
  // Up to `size` bytes; 0 at the end. Throws Error on a damaged or truncated file.
  virtual size_t read(char* out, size_t size) = 0;
  // Bytes taken from the file on disk so far.
  virtual uint64_t consumed() const = 0;
};
std::unique_ptr<ByteStream> open_stream(const std::filesystem::path& path);

struct Document {
  std::string text;   // UTF-8, not empty
  size_t file = 0;    // index into TextSource::files()
  uint64_t line = 0;  // of a .jsonl, from 1; of a text file: the number of the piece
};

class TextSource {
 public:
  // `piece` is for tests: where plain text is cut.
  explicit TextSource(std::vector<TextFile> files, size_t piece = kTextPiece);
  ~TextSource();

  // The next document, or false at the end. Empty documents are passed over and counted.
  bool next(Document& document);

  const std::vector<TextFile>& files() const { return files_; }
  uint64_t total_bytes() const;     // of all files, as stored
  uint64_t consumed_bytes() const;  // of those, read so far: for a progress bar
  uint64_t empty_documents() const { return empty_; }

 private:
  class Reader;
  std::vector<TextFile> files_;
  size_t piece_;
  std::unique_ptr<Reader> reader_;
  size_t file_ = 0;
  uint64_t done_bytes_ = 0, empty_ = 0;
};

}  // namespace oryx
