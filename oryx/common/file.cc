#include "oryx/common/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <fstream>
#include <utility>
#include <vector>

#include "oryx/common/error.h"
#include "oryx/common/file_operations.h"
#include "oryx/common/progress.h"

namespace oryx {

namespace fs = std::filesystem;

namespace {

constexpr size_t kBuffer = 1 << 20;
constexpr std::string_view kAside = ".old";

// What new files may not allow, asked for when the library is loaded: to ask is to set it, which is not for several threads.
const mode_t kMask = [] {
  const mode_t mask = ::umask(0);
  ::umask(mask);
  return mask;
}();

void write_fully(int fd, const char* data, size_t size, const fs::path& path) {
  while (size > 0) {
    const ssize_t n = file_operations.write(fd, data, size);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_errno(path.string(), "write");
    data += n;
    size -= static_cast<size_t>(n);
  }
}

// Closes on the way out, keeping errno: for descriptors whose close() says nothing of interest.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    const int code = errno;
    if (fd_ >= 0) file_operations.close(fd_);
    errno = code;
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

int open_path(const fs::path& path, int flags) {
  const int fd = file_operations.open(path.c_str(), flags | O_CLOEXEC, 0644);
  if (fd < 0) fail_errno(path.string(), "open");
  return fd;
}

// Of those who make files of one folder appear together, in whatever process, one at a time: the others wait. The lock is of the folder itself, so that it
// leaves no file, and falls with its holder. Where the file system has no locks nobody waits.
class FolderLock {
 public:
  explicit FolderLock(const fs::path& folder) : folder_(open_path(folder.empty() ? fs::path(".") : folder, O_RDONLY | O_DIRECTORY)) {
    while (::flock(folder_.get(), LOCK_EX) != 0 && errno == EINTR) {
    }
  }

 private:
  Descriptor folder_;
};

// What stands under the name of a file that is written is replaced: that must not be a device, such as /dev/stdout, or a pipe.
void check_name(const fs::path& path) {
  std::error_code ignored;
  const fs::file_status there = fs::status(path, ignored);
  if (fs::is_directory(there)) fail("{}: is a folder, expected a file name", path.string());
  const std::string name = fs::absolute(path, ignored).lexically_normal().string();
  const bool device = name.starts_with("/proc/") || (name.starts_with("/dev/") && !name.starts_with("/dev/shm/"));  // also where /dev/stdout is a file
  if (device || (fs::exists(there) && !fs::is_regular_file(there))) fail("{}: is a device or a pipe, expected the name of a file to write or replace", path.string());
}

struct stat regular_status(int fd, const fs::path& path) {
  struct stat st {};
  if (file_operations.status(fd, &st) != 0) fail_errno(path.string(), "stat");
  if (S_ISDIR(st.st_mode)) fail("{}: is a folder, expected a file", path.string());
  return st;
}

}  // namespace

AtomicFile::AtomicFile(fs::path path) : path_(std::move(path)) {
  check_name(path_);
  std::string name = (path_.parent_path() / fmt::format(".{}.XXXXXX", path_.filename().string())).string();
  fd_ = file_operations.create_temporary(name.data());
  if (fd_ < 0) fail_errno(path_.string(), "create");
  ::fchmod(fd_, 0666 & ~kMask);  // as open() would; mkstemp() gives 0600
  temporary_ = name;
}

void check_output(const fs::path& path) {
  std::error_code ignored;
  const fs::path folder = fs::absolute(path).parent_path();
  if (!fs::is_directory(folder, ignored)) fail("{}: cannot write, there is no folder {}", path.string(), folder.string());
  check_name(path);
  if (::access(folder.c_str(), W_OK) != 0) fail_errno(path.string(), "write into its folder");
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) file_operations.close(fd_);
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
  const auto* p = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t n = file_operations.write_at(fd_, p, size, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_errno(path_.string(), "write");
    p += n;
    offset += static_cast<uint64_t>(n);
    size -= static_cast<size_t>(n);
  }
}

void AtomicFile::flush() {
  write_fully(fd_, buffer_.data(), buffer_.size(), path_);
  buffer_.clear();
}

void AtomicFile::finish() {
  flush();
  if (file_operations.sync(fd_) != 0) fail_errno(path_.string(), "sync to disk");
  if (file_operations.close(std::exchange(fd_, -1)) != 0) fail_errno(path_.string(), "close");
}

void AtomicFile::publish() {
  if (file_operations.rename(temporary_.c_str(), path_.c_str()) != 0) fail_errno(path_.string(), "rename into place");
  temporary_.clear();
}

void AtomicFile::commit() {
  finish();
  publish();
  sync_folder(path_.parent_path());
}

void commit_together(std::span<AtomicFile* const> files) {
  for (AtomicFile* f : files) f->finish();
  // What fails for want of space has failed by now; only names change below.
  const FolderLock lock(files.back()->path_.parent_path());
  std::vector<std::pair<fs::path, fs::path>> asides;  // where it stood, where it is
  std::vector<fs::path> published;
  try {
    for (auto f = files.rbegin(); f != files.rend(); ++f) {
      if (!fs::exists(fs::symlink_status((*f)->path_))) continue;
      const fs::path aside = (*f)->temporary_.string() + std::string(kAside);
      rename_path((*f)->path_, aside);
      asides.emplace_back((*f)->path_, aside);
    }
    for (AtomicFile* f : files) {
      f->publish();
      published.push_back(f->path_);
    }
    sync_folder(files.back()->path_.parent_path());
  } catch (...) {
    for (const auto& path : published) ::unlink(path.c_str());
    for (const auto& [path, aside] : asides) file_operations.rename(aside.c_str(), path.c_str());
    throw;
  }
  for (const auto& [path, aside] : asides) ::unlink(aside.c_str());
}

InputFile::InputFile(const fs::path& path) : path_(path.string()) {
  Descriptor fd(open_path(path, O_RDONLY));
  const struct stat st = regular_status(fd.get(), path);
  size_ = S_ISREG(st.st_mode) ? static_cast<uint64_t>(st.st_size) : 0;
  fd_ = fd.release();
}

InputFile::~InputFile() {
  if (fd_ >= 0) file_operations.close(fd_);
}

size_t InputFile::read(char* out, size_t size) {
  size_t done = 0;
  while (done < size) {
    const ssize_t n = file_operations.read(fd_, out + done, size - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_errno(path_, "read");
    if (n == 0) {
      if (consumed_ < size_) fail("{}: ends after {} of {} bytes; was it cut while it was read?", path_, consumed_, size_);
      break;
    }
    done += static_cast<size_t>(n);
    consumed_ += static_cast<uint64_t>(n);
  }
  return done;
}

MappedFile::MappedFile(const fs::path& path) {
  const Descriptor fd(open_path(path, O_RDONLY));
  const struct stat st = regular_status(fd.get(), path);
  if (!S_ISREG(st.st_mode)) fail("{}: is a pipe or a device, expected a file", path.string());
  if (st.st_size == 0) return;
  void* p = file_operations.map(static_cast<size_t>(st.st_size), fd.get());
  if (p == MAP_FAILED) fail_errno(path.string(), "map");
  size_ = static_cast<size_t>(st.st_size);
  data_ = static_cast<const std::byte*>(p);
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
  InputFile file(path);
  std::string text(file.size(), '\0');
  text.resize(file.read(text.data(), text.size()));
  // Files of the system (/proc) do not say their size, and a file may have grown.
  for (char more[4096]; const size_t n = file.read(more, sizeof more);) text.append(more, n);
  return text;
}

void write_file(const fs::path& path, std::string_view text) {
  AtomicFile f(path);
  f.write(text);
  f.commit();
}

void append_line(const fs::path& path, std::string_view text) {
  Descriptor fd(open_path(path, O_RDWR | O_CREAT | O_APPEND));
  const off_t size = regular_status(fd.get(), path).st_size;
  char last = '\n';
  if (size > 0 && ::pread(fd.get(), &last, 1, size - 1) != 1) fail_errno(path.string(), "read");
  const std::string line = fmt::format("{}{}\n", last == '\n' ? "" : "\n", text);
  try {
    write_fully(fd.get(), line.data(), line.size(), path);
  } catch (const Error&) {
    (void)file_operations.truncate(fd.get(), size);  // should that fail too, the next line begins on its own
    throw;
  }
  if (file_operations.close(fd.release()) != 0) fail_errno(path.string(), "close");
}

void rename_path(const fs::path& from, const fs::path& to) {
  if (file_operations.rename(from.c_str(), to.c_str()) != 0) fail_errno(to.string(), "rename into place");
}

void replace_link(const fs::path& link, const fs::path& target) {
  const fs::path temporary = link.string() + ".new";
  ::unlink(temporary.c_str());
  if (file_operations.link(target.c_str(), temporary.c_str()) == 0) {
    if (file_operations.rename(temporary.c_str(), link.c_str()) == 0) return;
    const int code = errno;
    ::unlink(temporary.c_str());
    errno = code;
  }
  fail_errno(link.string(), fmt::format("point it to {}", target.string()));
}

void sync_file(const fs::path& path) {
  const Descriptor fd(open_path(path, O_RDONLY));
  if (file_operations.sync(fd.get()) != 0) fail_errno(path.string(), "sync to disk");
}

void sync_folder(const fs::path& folder) {
  const fs::path name = folder.empty() ? "." : folder;
  const Descriptor fd(open_path(name, O_RDONLY | O_DIRECTORY));
  // Some file systems do not sync folders; the rename itself is still atomic there.
  if (file_operations.sync(fd.get()) != 0 && errno != EINVAL && errno != ENOTSUP) fail_errno(name.string(), "sync to disk");
}

void make_folders(const fs::path& folder) {
  std::error_code error;
  if (folder.empty() || fs::is_directory(folder, error)) return;
  if (fs::exists(folder, error)) fail("{}: is a file, expected a folder, or a name that is free", folder.string());
  if (!folder.has_filename()) return make_folders(folder.parent_path());  // "runs/a/"
  make_folders(folder.parent_path());
  if (file_operations.make_folder(folder.c_str(), 0777) != 0 && (errno != EEXIST || !fs::is_directory(folder, error))) {
    fail_errno(folder.string(), "create the folder");
  }
  sync_folder(folder.parent_path());
}

void remove_temporaries(const fs::path& folder, std::string_view name) {
  constexpr size_t kSuffix = 7;  // ".XXXXXX"
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    const std::string found = entry->path().filename().string();
    const size_t size = found.ends_with(kAside) ? found.size() - kAside.size() : found.size();
    if (size == 1 + name.size() + kSuffix && found[0] == '.' && found.compare(1, name.size(), name) == 0 && found[1 + name.size()] == '.') {
      ::unlink(entry->path().c_str());
    }
  }
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

void expect_memory(double bytes, std::string_view what) {
  const auto free = static_cast<double>(available_memory());
  if (bytes > free) fail("{} takes {}, but only {} of memory are free", what, human_bytes(bytes), human_bytes(free));
}

}  // namespace oryx
