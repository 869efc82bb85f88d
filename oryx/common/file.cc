#include "oryx/common/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <fstream>
#include <utility>

#include "oryx/common/error.h"

namespace oryx {

namespace fs = std::filesystem;

namespace {

constexpr size_t kBuffer = 1 << 20;

void write_fully(int fd, const char* data, size_t size, const fs::path& path) {
  while (size > 0) {
    const ssize_t n = ::write(fd, data, size);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_errno(path.string(), "write");
    data += n;
    size -= static_cast<size_t>(n);
  }
}

}  // namespace

AtomicFile::AtomicFile(fs::path path) : path_(std::move(path)) {
  std::string name = (path_.parent_path() / fmt::format(".{}.XXXXXX", path_.filename().string())).string();
  fd_ = ::mkstemp(name.data());
  if (fd_ < 0) fail_errno(path_.string(), "create");
  ::fchmod(fd_, 0644);
  temporary_ = name;
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::write(const void* data, size_t size) {
  size_ += size;
  if (buffer_.size() + size <= kBuffer) {
    buffer_.append(static_cast<const char*>(data), size);
    return;
  }
  flush();
  if (size < kBuffer) {
    buffer_.append(static_cast<const char*>(data), size);
  } else {
    write_fully(fd_, static_cast<const char*>(data), size, path_);
  }
}

void AtomicFile::write_at(uint64_t offset, const void* data, size_t size) {
  flush();
  const ssize_t n = ::pwrite(fd_, data, size, static_cast<off_t>(offset));
  if (n != static_cast<ssize_t>(size)) fail_errno(path_.string(), "write");
}

void AtomicFile::flush() {
  write_fully(fd_, buffer_.data(), buffer_.size(), path_);
  buffer_.clear();
}

void AtomicFile::commit() {
  flush();
  if (::fsync(fd_) != 0) fail_errno(path_.string(), "sync to disk");
  if (::close(std::exchange(fd_, -1)) != 0) fail_errno(path_.string(), "close");
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail_errno(path_.string(), "rename into place");
  temporary_.clear();
  sync_folder(path_.parent_path());
}

MappedFile::MappedFile(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail_errno(path.string(), "open");
  struct stat st {};
  if (::fstat(fd, &st) != 0 || S_ISDIR(st.st_mode)) {
    const bool folder = S_ISDIR(st.st_mode);
    ::close(fd);
    if (folder) fail("{}: is a folder, expected a file", path.string());
    fail_errno(path.string(), "stat");
  }
  size_ = static_cast<size_t>(st.st_size);
  if (size_ > 0) {
    void* p = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) {
      ::close(fd);
      fail_errno(path.string(), "map");
    }
    data_ = static_cast<const std::byte*>(p);
  }
  ::close(fd);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

std::string read_file(const fs::path& path) {
  if (fs::is_directory(path)) fail("{}: is a folder, expected a file", path.string());
  std::ifstream in(path, std::ios::binary);
  if (!in) fail_errno(path.string(), "open");
  std::string text((std::istreambuf_iterator<char>(in)), {});
  if (in.bad()) fail("{}: cannot read", path.string());
  return text;
}

void write_file(const fs::path& path, std::string_view text) {
  AtomicFile f(path);
  f.write(text);
  f.commit();
}

void sync_folder(const fs::path& folder) {
  const std::string name = folder.empty() ? "." : folder.string();
  const int fd = ::open(name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) fail_errno(name, "open");
  const int rc = ::fsync(fd);
  ::close(fd);
  // Some file systems do not sync folders; the rename itself is still atomic there.
  if (rc != 0 && errno != EINVAL && errno != ENOTSUP) fail_errno(name, "sync to disk");
}

void make_folders(const fs::path& folder) {
  std::error_code error;
  fs::create_directories(folder, error);
  if (error) fail("{}: cannot create the folder: {}", folder.string(), error.message());
}

uint64_t available_memory() {
  uint64_t available = UINT64_MAX;
  std::ifstream meminfo("/proc/meminfo");
  for (std::string line; std::getline(meminfo, line);) {
    unsigned long long kib = 0;
    if (std::sscanf(line.c_str(), "MemAvailable: %llu kB", &kib) == 1) available = kib * 1024;
  }
  std::ifstream limit_file("/sys/fs/cgroup/memory.max"), used_file("/sys/fs/cgroup/memory.current"), parts("/sys/fs/cgroup/memory.stat");
  uint64_t limit = 0, used = 0, cached = 0, bytes = 0;
  if (!(limit_file >> limit && used_file >> used)) return available;
  // Cached file pages are counted as used but given up when memory is asked for.
  for (std::string part; parts >> part >> bytes;) {
    if (part == "inactive_file" || part == "active_file") cached += bytes;
  }
  used -= std::min(used, cached);
  return std::min(available, limit > used ? limit - used : 0);
}

}  // namespace oryx
