#include "oryx/parallel/ring.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>

#include "oryx/common/interrupt.h"
#include "oryx/parallel/rendezvous.h"

namespace oryx {

namespace {

constexpr uint64_t kGreeting = 0x6f72797872696e67;  // "oryxring"
constexpr std::chrono::seconds kJoin(300);
constexpr int kGreetingMilliseconds = 5'000;
constexpr uint64_t kLongestText = 64 << 20;

struct Greeting {
  uint64_t word = 0;
  int64_t rank = -1, size = 0;
};

}  // namespace

Ring::Ring(const Place& place) : rank_(place.rank), size_(place.size) {
  if (size_ == 1) return;
  uint16_t port = 0;
  const Socket listener = listen_at(&port, "a connection", place.meeting == Place::Meeting::kInLauncher);
  const Neighbour next = find_next(place, port);
  next_ = connect_to(next.host, next.port);
  if (!next_) fail("rank {} at {} port {}: {}; processes must reach one another at any port", wrapped(rank_ + 1), next.host, next.port, std::strerror(errno));
  const Greeting mine{kGreeting, rank_, size_};
  if (!send_all(next_, &mine, sizeof mine, kGreetingMilliseconds)) throw PeerLost(fmt::format("rank {} is gone: it came, but took no word", wrapped(rank_ + 1)));
  // Who connects and is not the one before is none of ours.
  const auto until = std::chrono::steady_clock::now() + kJoin;
  while (!previous_) {
    if (std::chrono::steady_clock::now() > until) fail("rank {} of {} did not come within {} s", wrapped(rank_ - 1), size_, kJoin.count());
    check_interrupt();
    Socket guest = accept_from(listener, 200);
    Greeting theirs;
    const bool known = guest && receive_all(guest, &theirs, sizeof theirs, kGreetingMilliseconds) && theirs.word == kGreeting && theirs.size == size_ && theirs.rank == wrapped(rank_ - 1);
    if (known) previous_ = std::move(guest);
  }
}

void Ring::exchange(const void* out, size_t out_bytes, void* in, size_t in_bytes) {
  const auto* source = static_cast<const char*>(out);
  auto* target = static_cast<char*>(in);
  const auto lost = [this](int64_t rank) {
    throw PeerLost(fmt::format("rank {} is gone: its process has ended, or its host cannot be reached; the run ends, go on from its last checkpoint", wrapped(rank)));
  };
  while (out_bytes > 0 || in_bytes > 0) {
    pollfd ends[2] = {{out_bytes > 0 ? next_.get() : -1, POLLOUT, 0}, {in_bytes > 0 ? previous_.get() : -1, POLLIN, 0}};
    if (::poll(ends, 2, -1) < 0) {
      if (errno == EINTR) continue;
      fail_errno("connection", "wait for");
    }
    if (ends[1].revents != 0) {
      const ssize_t n = ::recv(previous_.get(), target, in_bytes, MSG_DONTWAIT);
      if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) lost(rank_ - 1);
      if (n > 0) target += n, in_bytes -= static_cast<size_t>(n);
    }
    if (ends[0].revents != 0) {
      const ssize_t n = ::send(next_.get(), source, out_bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
      if (n < 0 && errno != EAGAIN && errno != EINTR) lost(rank_ + 1);
      if (n > 0) source += n, out_bytes -= static_cast<size_t>(n);
    }
  }
}

void Ring::all_gather(void* base, size_t bytes) {
  auto* const parts = static_cast<char*>(base);
  for (int64_t s = 0; s + 1 < size_; ++s) {
    exchange(parts + static_cast<size_t>(wrapped(rank_ - s)) * bytes, bytes, parts + static_cast<size_t>(wrapped(rank_ - s - 1)) * bytes, bytes);
  }
}

template <typename T>
void Ring::reduce_scatter(T* base, size_t count) {
  received_.resize(count * sizeof(T));
  for (int64_t s = 0; s + 1 < size_; ++s) {
    exchange(base + static_cast<size_t>(wrapped(rank_ - s - 1)) * count, count * sizeof(T), received_.data(), count * sizeof(T));
    T* const part = base + static_cast<size_t>(wrapped(rank_ - s - 2)) * count;
    const T* const theirs = reinterpret_cast<const T*>(received_.data());
    for (size_t i = 0; i < count; ++i) part[i] += theirs[i];
  }
}

template void Ring::reduce_scatter(float*, size_t);
template void Ring::reduce_scatter(double*, size_t);

std::vector<std::string> Ring::gather(const std::string& own) {
  const auto all = static_cast<size_t>(size_), mine = static_cast<size_t>(rank_);
  std::vector<uint64_t> lengths(all);
  lengths[mine] = own.size();
  all_gather(lengths.data(), sizeof(uint64_t));
  const size_t longest = *std::max_element(lengths.begin(), lengths.end());
  if (longest > kLongestText) fail("a rank sends a text of {} bytes; do all run the same version?", longest);
  std::vector<char> texts(all * longest);
  std::copy(own.begin(), own.end(), texts.begin() + static_cast<std::ptrdiff_t>(mine * longest));
  if (longest > 0) all_gather(texts.data(), longest);
  std::vector<std::string> out;
  for (size_t r = 0; r < all; ++r) out.emplace_back(texts.data() + r * longest, lengths[r]);
  return out;
}

}  // namespace oryx
