// Files that are whole or absent: written to a temporary name, fsynced, renamed, the folder fsynced. Errors are oryx::Error with the path.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace oryx {

// Writes a file under a temporary name next to `path`; commit() makes it appear whole. Without commit() the temporary
// file is removed by the destructor and `path` is as it was.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  void write(const void* data, size_t size);
  void write(std::string_view text) { write(text.data(), text.size()); }
  // Overwrites bytes already written (a header whose content is known last).
  void write_at(uint64_t offset, const void* data, size_t size);
  uint64_t size() const { return size_; }
  // An error before the rename leaves `path` as it was. One behind it (the folder could not be synced) leaves the new file there, whole; it may
  // be gone again after a power cut.
  void commit();

 private:
  friend void commit_together(std::span<AtomicFile* const> files);
  void flush();
  void finish();   // all bytes are on disk and the file is closed
  void publish();  // rename

  std::filesystem::path path_, temporary_;
  std::string buffer_;
  uint64_t size_ = 0;
  int fd_ = -1;
};

// Makes files of one folder appear together. On an error none of them does and what stood under their names stands there again. The last one
// is the seal: it is absent while the others change, so that a process killed in between leaves no mixture that looks whole.
void commit_together(std::span<AtomicFile* const> files);

// A file that is read from front to end.
class InputFile {
 public:
  explicit InputFile(const std::filesystem::path& path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  // Fills `out` unless the file ends before. Throws Error also when a regular file ends before the size that it had when it was opened.
  size_t read(char* out, size_t size);
  uint64_t consumed() const { return consumed_; }
  uint64_t size() const { return size_; }  // 0 where the system does not know it
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  uint64_t size_ = 0, consumed_ = 0;
  int fd_ = -1;
};

// A read-only map of a whole file. An empty file maps to an empty span.
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// For what is written at the end of long work: throws now if `path` cannot be written then (no such folder, no right to write there, a folder or a device of that
// name).
void check_output(const std::filesystem::path& path);

std::string read_file(const std::filesystem::path& path);
void write_file(const std::filesystem::path& path, std::string_view text);  // atomic
// Appends `text` and a newline. On an error the file is as long as it was. Half a line that a killed process left is closed by a newline first.
void append_line(const std::filesystem::path& path, std::string_view text);
// Renames a file or folder, replacing a file or an empty folder of that name.
void rename_path(const std::filesystem::path& from, const std::filesystem::path& to);
// A link that appears at once or not at all, also where one stood before.
void replace_link(const std::filesystem::path& link, const std::filesystem::path& target);
void sync_file(const std::filesystem::path& path);
void sync_folder(const std::filesystem::path& folder);
// Creates `folder` and its parents, on disk too; an error says which could not be made.
void make_folders(const std::filesystem::path& folder);
// Removes what a killed process left of files that it was writing to `folder`: temporary names of a plain `name`.
void remove_temporaries(const std::filesystem::path& folder, std::string_view name);

// Bytes of memory this process can still take: the smaller of what the system and its control group leave.
uint64_t available_memory();
// Throws Error ("WHAT takes 3.00 GiB, but only 1.00 GiB of memory are free") when they are fewer. Before an allocation that the system might grant and not be able to keep.
void expect_memory(double bytes, std::string_view what);

}  // namespace oryx
