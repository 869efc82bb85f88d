#include "tests/support/faults.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cerrno>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/file_operations.h"
#include "tests/support/folder.h"

namespace oryx::test {

namespace fs = std::filesystem;

namespace {

struct Plan {
  Fault fault;
  int left;  // calls of the kind until it fires
  bool fired = false;
  bool full = false;
};
Plan plan;
FileOperations real;

bool fires(Fault kind) {
  if (plan.fault != kind || --plan.left != 0) return false;
  plan.fired = true;
  return true;
}

int failed(int code) {
  errno = code;
  return -1;
}

ssize_t read_faulty(int fd, void* data, size_t size) {
  if (fires(Fault::kRead)) return failed(EIO);
  if (fires(Fault::kInterrupted)) return failed(EINTR);
  if (size > 1 && fires(Fault::kShortRead)) return real.read(fd, data, 1);
  if (fires(Fault::kEarlyEnd)) return 0;
  return real.read(fd, data, size);
}

// `size` as the plan cuts it; -1: the call fails.
ssize_t allowed(size_t size) {
  if (plan.full) return failed(ENOSPC);
  if (fires(Fault::kWrite)) return failed(EIO);
  if (fires(Fault::kInterrupted)) return failed(EINTR);
  if (size > 1 && fires(Fault::kShortWrite)) return static_cast<ssize_t>(size / 2);
  if (fires(Fault::kNoSpace)) {
    plan.full = true;
    return size > 1 ? static_cast<ssize_t>(size / 2) : failed(ENOSPC);
  }
  return static_cast<ssize_t>(size);
}

ssize_t write_faulty(int fd, const void* data, size_t size) {
  const ssize_t n = allowed(size);
  return n < 0 ? n : real.write(fd, data, static_cast<size_t>(n));
}

ssize_t write_at_faulty(int fd, const void* data, size_t size, off_t offset) {
  const ssize_t n = allowed(size);
  return n < 0 ? n : real.write_at(fd, data, static_cast<size_t>(n), offset);
}

// A descriptor that has gone through the last error is closed all the same, as Linux does.
int close_faulty(int fd) {
  const int rc = real.close(fd);
  return fires(Fault::kClose) ? failed(EIO) : rc;
}

void expect_one_line(const std::string& message, const std::string& folder) {
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  EXPECT_NE(message.find(folder), std::string::npos) << "no path in: " << message;
  EXPECT_NE(message.find(": "), std::string::npos) << message;
}

// False when the fault was not met.
bool try_one(const FaultTrial& trial, Fault fault, int nth) {
  const TemporaryFolder clean_folder, folder;
  trial.prepare(clean_folder.path());
  trial.prepare(folder.path());
  const Tree before = tree_of(folder.path());
  std::string error;
  bool fired = false;
  {
    const FaultInjector injector(fault, nth);
    try {
      trial.run(folder.path());
    } catch (const Error& e) {
      error = e.what();
    }
    fired = injector.fired();
  }
  if (!fired) {
    EXPECT_EQ(error, "");
    return false;
  }
  trial.run(clean_folder.path());
  const Tree clean = tree_of(clean_folder.path());
  if (error.empty()) {
    EXPECT_EQ(tree_of(folder.path()), clean) << "went by without an error, but left something else";
  } else {
    expect_one_line(error, folder.path().string());
    if (trial.after_error) {
      trial.after_error(folder.path(), before, clean);
    } else {
      const Tree after = tree_of(folder.path());
      EXPECT_TRUE(after == before || after == clean) << error;
    }
  }
  // What a failed append did not add is added by the call after it: the outcome is that of one clean run.
  if (!error.empty()) trial.run(folder.path());
  if (!trial.after_error) {
    EXPECT_EQ(tree_of(folder.path()), clean) << "the call after '" << error << "'";
  }
  return true;
}

}  // namespace

const char* name_of(Fault fault) {
  static constexpr const char* kNames[] = {"open",  "create",      "read",     "short read", "early end", "interrupted", "write",      "short write",
                                           "no space", "map", "sync", "close", "rename", "link", "make folder"};
  return kNames[static_cast<int>(fault)];
}

FaultInjector::FaultInjector(Fault fault, int nth) {
  plan = {fault, nth};
  real = file_operations;
  file_operations.open = [](const char* path, int flags, mode_t mode) { return fires(Fault::kOpen) ? failed(EACCES) : real.open(path, flags, mode); };
  file_operations.create_temporary = [](char* pattern) { return fires(Fault::kCreate) ? failed(EROFS) : real.create_temporary(pattern); };
  file_operations.read = read_faulty;
  file_operations.write = write_faulty;
  file_operations.write_at = write_at_faulty;
  file_operations.map = [](size_t size, int fd) {
    if (!fires(Fault::kMap)) return real.map(size, fd);
    errno = ENOMEM;
    return MAP_FAILED;
  };
  file_operations.sync = [](int) { return fires(Fault::kSync) ? failed(EIO) : 0; };
  file_operations.close = close_faulty;
  file_operations.rename = [](const char* from, const char* to) { return fires(Fault::kRename) ? failed(EIO) : real.rename(from, to); };
  file_operations.link = [](const char* target, const char* name) { return fires(Fault::kLink) ? failed(ENOSPC) : real.link(target, name); };
  file_operations.make_folder = [](const char* path, mode_t mode) { return fires(Fault::kMakeFolder) ? failed(ENOSPC) : real.make_folder(path, mode); };
}

FaultInjector::~FaultInjector() { file_operations = real; }

bool FaultInjector::fired() const { return plan.fired; }

Tree tree_of(const fs::path& folder) {
  Tree tree;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    const std::string name = fs::relative(entry.path(), folder).string();
    if (entry.is_symlink()) {
      tree[name] = "-> " + fs::read_symlink(entry.path()).string();
    } else if (entry.is_directory()) {
      tree[name + "/"];
    } else {
      tree[name] = read_file(entry.path());
    }
  }
  return tree;
}

int try_all_faults(const FaultTrial& trial) {
  constexpr int kMost = 1000;
  int met = 0;
  for (int f = 0; f <= static_cast<int>(kLastFault); ++f) {
    int n = 1;
    for (; n < kMost; ++n) {
      SCOPED_TRACE(std::string(name_of(static_cast<Fault>(f))) + ", call " + std::to_string(n));
      if (!try_one(trial, static_cast<Fault>(f), n)) break;
      ++met;
    }
    EXPECT_LT(n, kMost) << name_of(static_cast<Fault>(f));
  }
  return met;
}

}  // namespace oryx::test
