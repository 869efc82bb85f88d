// What others make of a model's parameters and share, such as weights packed for a device: made once, and anew when a parameter was written or moved since. Its version says so (at::Tensor::_version):
// who writes a parameter by its pointer bumps it.
#pragma once

#include <ATen/ATen.h>

#include <map>
#include <memory>
#include <mutex>
#include <typeindex>
#include <utility>
#include <vector>

namespace oryx {

class Derived {
 public:
  // `make()` -> T, of these parameters; `kind` tells those of one type apart. Kept until the next one, beside whoever holds it. Thread-safe.
  template <typename T, typename Make>
  std::shared_ptr<const T> get(const std::vector<at::Tensor>& parameters, int kind, Make make) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Entry& e = entries_[{std::type_index(typeid(T)), kind}];
    std::vector<Written> now = written(parameters);
    if (e.made == nullptr || e.of != now) {
      e.made.reset();  // before memory is taken for the new one
      e.made = std::make_shared<const T>(make());
      e.of = std::move(now);
    }
    return std::static_pointer_cast<const T>(e.made);
  }

 private:
  using Written = std::pair<const void*, int64_t>;  // where a parameter stands, and how often it was written
  struct Entry {
    std::shared_ptr<const void> made;
    std::vector<Written> of;
  };
  static std::vector<Written> written(const std::vector<at::Tensor>& parameters) {
    std::vector<Written> out;
    for (const at::Tensor& p : parameters) out.emplace_back(p.const_data_ptr(), p._version());
    return out;
  }

  std::mutex mutex_;
  std::map<std::pair<std::type_index, int>, Entry> entries_;
};

}  // namespace oryx
