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

  void write(const void* data, size_t size);
  void write(std::string_view text) { write(text.data(), text.size()); }
  // Overwrites bytes already written (a header whose content is known last).
  void write_at(uint64_t offset, const void* data, size_t size);
  uint64_t size() const { return size_; }
  void commit();

 private:
  void flush();

  std::filesystem::path path_, temporary_;
  std::string buffer_;
  uint64_t size_ = 0;
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

std::string read_file(const std::filesystem::path& path);
void write_file(const std::filesystem::path& path, std::string_view text);  // atomic
void sync_folder(const std::filesystem::path& folder);
// Creates `folder` and its parents; an error says which could not be made.
void make_folders(const std::filesystem::path& folder);

// Bytes of memory this process can still take: the smaller of what the system and its control group leave.
uint64_t available_memory();

}  // namespace oryx
