// What others make of a model's parameters and share, such as weights packed for a device: made once, and anew when a parameter was written, moved or replaced since. Its version says so (at::Tensor::_version):
// who writes a parameter by its pointer bumps it. What was made stays as long as the model; who holds it already does not see later writes.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>

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
    if (e.made == nullptr || !(e.of == now)) {
      e.made.reset();  // before memory is taken for the new one
      e.made = std::make_shared<const T>(make());
      e.of = std::move(now);
    }
    return std::static_pointer_cast<const T>(e.made);
  }

 private:
  // Where a parameter stands, and how often it was written. Memory that was given back and taken again has another storage, even where it stands at the same address.
  struct Written {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    const void* at;
    int64_t times;
    bool operator==(const Written& o) const { return storage._unsafe_get_target() == o.storage._unsafe_get_target() && at == o.at && times == o.times; }
  };
  struct Entry {
    std::shared_ptr<const void> made;
    std::vector<Written> of;
  };
  static std::vector<Written> written(const std::vector<at::Tensor>& parameters) {
    std::vector<Written> out;
    for (const at::Tensor& p : parameters) out.push_back({p.storage().getWeakStorageImpl(), p.const_data_ptr(), p._version()});
    return out;
  }

  std::mutex mutex_;
  std::map<std::pair<std::type_index, int>, Entry> entries_;
};

}  // namespace oryx
