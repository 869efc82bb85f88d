// The system calls through which the library reads and writes files, in one table. Nothing but tests ever replaces an entry: they make the
// n-th call fail and look at what is left (tests/support/faults.h). No switch reaches it at run time.
#pragma once

#include <sys/stat.h>
#include <sys/types.h>

#include <cstddef>

namespace oryx {

// Each entry behaves as its namesake in POSIX: -1 (map: MAP_FAILED) and errno on failure.
struct FileOperations {
  int (*open)(const char* path, int flags, mode_t mode);
  int (*create_temporary)(char* pattern);  // mkstemp
  int (*status)(int fd, struct stat* status);
  ssize_t (*read)(int fd, void* data, size_t size);
  ssize_t (*write)(int fd, const void* data, size_t size);
  ssize_t (*write_at)(int fd, const void* data, size_t size, off_t offset);
  void* (*map)(size_t size, int fd);  // read-only, shared
  int (*truncate)(int fd, off_t size);
  int (*sync)(int fd);
  int (*close)(int fd);
  int (*rename)(const char* from, const char* to);
  int (*link)(const char* target, const char* name);  // symlink
  int (*make_folder)(const char* path, mode_t mode);
};

extern FileOperations file_operations;

}  // namespace oryx
