#include "oryx/common/file_operations.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

namespace oryx {

FileOperations file_operations = {
    .open = [](const char* path, int flags, mode_t mode) { return ::open(path, flags, mode); },
    .create_temporary = ::mkstemp,
    .status = [](int fd, struct stat* status) { return ::fstat(fd, status); },
    .read = ::read,
    .write = ::write,
    .write_at = [](int fd, const void* data, size_t size, off_t offset) { return ::pwrite(fd, data, size, offset); },
    .map = [](size_t size, int fd) { return ::mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0); },
    .truncate = [](int fd, off_t size) { return ::ftruncate(fd, size); },
    .sync = ::fsync,
    .close = ::close,
    .rename = ::rename,
    .link = ::symlink,
    .make_folder = ::mkdir,
};

}  // namespace oryx
