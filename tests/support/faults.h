// Makes the n-th call of a kind through oryx::file_operations fail, as a full or broken disk would.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <string>

namespace oryx::test {

enum class Fault {
  kOpen,         // EACCES
  kCreate,       // of a temporary file: EROFS
  kRead,         // EIO
  kShortRead,    // one byte; no error: more calls give the rest
  kEarlyEnd,     // the file ends before the size it had
  kInterrupted,  // EINTR at a read or write; no error
  kWrite,        // EIO
  kShortWrite,   // half; no error
  kNoSpace,      // half of a write, and ENOSPC from then on
  kMap,          // ENOMEM
  kSync,         // EIO
  kClose,        // EIO, of a file that is closed nevertheless
  kRename,       // EIO
  kLink,         // ENOSPC
  kMakeFolder,   // ENOSPC
};
inline constexpr Fault kLastFault = Fault::kMakeFolder;

const char* name_of(Fault fault);

// Until it goes. Syncs that do not fail do nothing, so that many faults are tried in a short time. One at a time; not for several threads.
class FaultInjector {
 public:
  FaultInjector(Fault fault, int nth);
  ~FaultInjector();
  FaultInjector(const FaultInjector&) = delete;
  FaultInjector& operator=(const FaultInjector&) = delete;
  bool fired() const;
};

// What stands in a folder: path -> content, "-> target" of links. Empty folders count with a trailing slash.
using Tree = std::map<std::string, std::string>;
Tree tree_of(const std::filesystem::path& folder);

struct FaultTrial {
  std::function<void(const std::filesystem::path& folder)> prepare;  // what stood there before; may do nothing
  std::function<void(const std::filesystem::path& folder)> run;
  // Called when `run` gave an error; by default the folder must be as it was, or as a clean run leaves it.
  std::function<void(const std::filesystem::path& folder, const Tree& before, const Tree& clean)> after_error = {};
};

// For each kind of fault and n = 1, 2, ... until `run` goes by without meeting it: `run` must throw one line of oryx::Error, or do its work all
// the same; nothing half-written may be left; and `run` again must give what a clean run gives. Returns how many faults were met.
int try_all_faults(const FaultTrial& trial);

}  // namespace oryx::test
