// Several ranks as threads of one process: the same sockets as between processes.
#pragma once

#include <ATen/Parallel.h>

#include <exception>
#include <functional>
#include <thread>
#include <vector>

#include "oryx/parallel/process_group.h"
#include "oryx/parallel/rendezvous.h"

namespace oryx::test {

using JoinGroup = std::function<std::unique_ptr<ProcessGroup>(const Place&)>;

inline std::unique_ptr<ProcessGroup> join_on_cpu(const Place& place) { return join_group(place, at::kCPU); }
// Rank r on GPU r.
inline std::unique_ptr<ProcessGroup> join_on_gpus(const Place& place) { return join_group(place, at::Device(at::kCUDA, static_cast<at::DeviceIndex>(place.rank))); }

// Runs f on every rank, and throws what the lowest rank threw that did not merely lose another.
inline void for_ranks(int64_t size, const std::function<void(ProcessGroup&)>& f, const JoinGroup& join = join_on_cpu) {
  const Rendezvous meeting(size);
  std::vector<std::exception_ptr> causes(static_cast<size_t>(size)), consequences(static_cast<size_t>(size));
  std::vector<std::thread> threads;
  for (int64_t rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      at::set_num_threads(1);
      Place place;
      place.rank = place.local_rank = rank, place.size = place.local_size = size, place.port = meeting.port(), place.meeting = Place::Meeting::kInLauncher;
      try {
        const auto group = join(place);
        f(*group);
      } catch (const PeerLost&) {
        consequences[static_cast<size_t>(rank)] = std::current_exception();
      } catch (...) {
        causes[static_cast<size_t>(rank)] = std::current_exception();
      }
    });
  }
  for (auto& t : threads) t.join();
  for (const auto* list : {&causes, &consequences}) {
    for (const auto& e : *list) {
      if (e) std::rethrow_exception(e);
    }
  }
}

}  // namespace oryx::test
