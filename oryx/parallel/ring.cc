#include "oryx/parallel/ring.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "oryx/parallel/rendezvous.h"

namespace oryx {

namespace {

constexpr uint64_t kGreeting = 0x6f72797872696e67;  // "oryxring"
constexpr int kJoinMilliseconds = 300'000;

struct Addresses {
  addrinfo* list = nullptr;
  ~Addresses() {
    if (list != nullptr) ::freeaddrinfo(list);
  }
};

void look_up(const std::string& host, const std::string& port, int type, Addresses& found) {
  addrinfo hints{};
  hints.ai_socktype = type;
  if (const int code = ::getaddrinfo(host.c_str(), port.c_str(), &hints, &found.list); code != 0) fail("address '{}': {}", host, ::gai_strerror(code));
}

// The address of this host on the way to `host`: nothing is sent.
std::string own_address(const std::string& host, uint16_t port) {
  Addresses a;
  look_up(host, std::to_string(port), SOCK_DGRAM, a);
  for (const addrinfo* at = a.list; at != nullptr; at = at->ai_next) {
    const int s = ::socket(at->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (s < 0) continue;
    sockaddr_storage own{};
    socklen_t size = sizeof own;
    char name[NI_MAXHOST] = {};
    const bool known = ::connect(s, at->ai_addr, at->ai_addrlen) == 0 && ::getsockname(s, reinterpret_cast<sockaddr*>(&own), &size) == 0 &&
                       ::getnameinfo(reinterpret_cast<const sockaddr*>(&own), size, name, sizeof name, nullptr, 0, NI_NUMERICHOST) == 0;
    ::close(s);
    if (known) return name;
  }
  fail("MASTER_ADDR '{}': no way leads there from this host", host);
}

int listen_somewhere(uint16_t* port) {
  const int s = ::socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const bool six = s >= 0;
  const int socket = six ? s : ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (socket < 0) fail_errno("socket", "open");
  sockaddr_storage any{};
  any.ss_family = six ? AF_INET6 : AF_INET;
  socklen_t size = six ? sizeof(sockaddr_in6) : sizeof(sockaddr_in);
  const int off = 0;
  if (six) ::setsockopt(socket, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
  if (::bind(socket, reinterpret_cast<const sockaddr*>(&any), size) != 0 || ::listen(socket, 8) != 0 || ::getsockname(socket, reinterpret_cast<sockaddr*>(&any), &size) != 0) {
    ::close(socket);
    fail_errno("socket", "listen on");
  }
  *port = ntohs(six ? reinterpret_cast<sockaddr_in6&>(any).sin6_port : reinterpret_cast<sockaddr_in&>(any).sin_port);
  return socket;
}

int connect_to(const std::string& host, const std::string& port, int64_t rank) {
  Addresses a;
  look_up(host, port, SOCK_STREAM, a);
  for (const addrinfo* at = a.list; at != nullptr; at = at->ai_next) {
    const int s = ::socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (s < 0) continue;
    if (::connect(s, at->ai_addr, at->ai_addrlen) == 0) return s;
    ::close(s);
  }
  fail("rank {} at {} port {}: {}; processes must reach one another at any port", rank, host, port, std::strerror(errno));
}

void tune(int s) {
  const int on = 1, idle = 30, interval = 10, count = 6;  // a host that vanished is noticed after a minute and a half
  ::setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  ::setsockopt(s, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
  ::setsockopt(s, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
  ::setsockopt(s, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
  ::setsockopt(s, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof count);
}

struct Greeting {
  uint64_t word = 0;
  int64_t rank = -1, size = 0;
};

}  // namespace

Ring::Ring(const Place& place) : rank_(place.rank), size_(place.size) {
  if (size_ == 1) return;
  try {
    connect(place);
  } catch (...) {
    if (next_ >= 0) ::close(next_);
    if (previous_ >= 0) ::close(previous_);
    throw;
  }
}

Ring::~Ring() {
  if (next_ >= 0) ::close(next_);
  if (previous_ >= 0) ::close(previous_);
}

void Ring::connect(const Place& place) {
  Rendezvous table(place);
  struct Listener {
    uint16_t port = 0;
    int socket;
    Listener() : socket(listen_somewhere(&port)) {}
    ~Listener() { ::close(socket); }
  } listener;
  // The host of rank 0 has the name that all know it by; its own tables may lead it to 127.0.1.1.
  const std::string own = rank_ == 0 ? place.address : own_address(place.address, place.port);
  table.put(fmt::format("ring/{}", rank_), fmt::format("{} {}", listener.port, own));
  const int64_t next = wrapped(rank_ + 1);
  const std::string there = table.take(fmt::format("ring/{}", next), fmt::format("rank {} of {}", next, size_));
  const size_t space = there.find(' ');
  next_ = connect_to(there.substr(space + 1), there.substr(0, space), next);
  pollfd waiting{listener.socket, POLLIN, 0};
  while (previous_ < 0) {
    const int ready = ::poll(&waiting, 1, kJoinMilliseconds);
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) fail("rank {} of {} did not come within {} s", wrapped(rank_ - 1), size_, kJoinMilliseconds / 1000);
    previous_ = ::accept4(listener.socket, nullptr, nullptr, SOCK_CLOEXEC);
  }
  tune(next_), tune(previous_);
  Greeting mine{kGreeting, rank_, size_}, theirs;
  exchange(&mine, sizeof mine, &theirs, sizeof theirs);
  if (theirs.word != kGreeting || theirs.size != size_ || theirs.rank != wrapped(rank_ - 1)) {
    fail("rank {} of {} met rank {} of {} where rank {} was expected; have all processes the same WORLD_SIZE?", rank_, size_, theirs.rank, theirs.size, wrapped(rank_ - 1));
  }
  (void)gather("");  // the table stays open until all have read it
}

void Ring::exchange(const void* out, size_t out_bytes, void* in, size_t in_bytes) {
  const auto* source = static_cast<const char*>(out);
  auto* target = static_cast<char*>(in);
  const auto lost = [this](int64_t rank) {
    throw PeerLost(fmt::format("rank {} is gone: its process has ended, or its host cannot be reached; the run ends, go on from its last checkpoint", wrapped(rank)));
  };
  while (out_bytes > 0 || in_bytes > 0) {
    pollfd ends[2] = {{out_bytes > 0 ? next_ : -1, POLLOUT, 0}, {in_bytes > 0 ? previous_ : -1, POLLIN, 0}};
    if (::poll(ends, 2, -1) < 0) {
      if (errno == EINTR) continue;
      fail_errno("connection", "wait for");
    }
    if (ends[1].revents != 0) {
      const ssize_t n = ::recv(previous_, target, in_bytes, MSG_DONTWAIT);
      if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) lost(rank_ - 1);
      if (n > 0) target += n, in_bytes -= static_cast<size_t>(n);
    }
    if (ends[0].revents != 0) {
      const ssize_t n = ::send(next_, source, out_bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
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
  std::vector<char> texts(all * longest);
  std::copy(own.begin(), own.end(), texts.begin() + static_cast<std::ptrdiff_t>(mine * longest));
  if (longest > 0) all_gather(texts.data(), longest);
  std::vector<std::string> out;
  for (size_t r = 0; r < all; ++r) out.emplace_back(texts.data() + r * longest, lengths[r]);
  return out;
}

}  // namespace oryx
