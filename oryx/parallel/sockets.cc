#include "oryx/parallel/sockets.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "oryx/common/error.h"

namespace oryx {

namespace {

struct Addresses {
  addrinfo* list = nullptr;
  ~Addresses() {
    if (list != nullptr) ::freeaddrinfo(list);
  }
};

// Small messages go at once, and a host that vanished is noticed after a minute and a half.
void tune_socket(int s) {
  const int on = 1, idle = 30, interval = 10, count = 6;
  ::setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  ::setsockopt(s, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
  ::setsockopt(s, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
  ::setsockopt(s, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
  ::setsockopt(s, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof count);
}

bool wait_for(int fd, short what, int milliseconds) {
  pollfd p{fd, what, 0};
  int ready = 0;
  do ready = ::poll(&p, 1, milliseconds);
  while (ready < 0 && errno == EINTR);
  return ready > 0;
}

template <typename Move>
bool move_all(int fd, short what, size_t bytes, int milliseconds, Move&& move) {
  for (size_t done = 0; done < bytes;) {
    if (!wait_for(fd, what, milliseconds)) return false;
    const ssize_t n = move(done, bytes - done);
    if (n > 0) done += static_cast<size_t>(n);
    else if (n == 0 || (errno != EAGAIN && errno != EINTR)) return false;
  }
  return true;
}

}  // namespace

Socket& Socket::operator=(Socket&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = other.release();
  }
  return *this;
}

Socket::~Socket() {
  if (fd_ >= 0) ::close(fd_);
}

int Socket::release() { return std::exchange(fd_, -1); }

Socket listen_at(uint16_t* port, const std::string& what, bool this_host_alone) {
  Socket s(this_host_alone ? -1 : ::socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const bool six = static_cast<bool>(s);
  if (!six) s = Socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!s) fail_errno(what, "open a socket for");
  const int on = 1, off = 0;
  ::setsockopt(s.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (six) ::setsockopt(s.get(), IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
  sockaddr_storage any{};
  auto& as_six = reinterpret_cast<sockaddr_in6&>(any);
  auto& as_four = reinterpret_cast<sockaddr_in&>(any);
  any.ss_family = six ? AF_INET6 : AF_INET;
  if (this_host_alone) as_four.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  (six ? as_six.sin6_port : as_four.sin_port) = htons(*port);
  socklen_t size = six ? sizeof as_six : sizeof as_four;
  if (::bind(s.get(), reinterpret_cast<const sockaddr*>(&any), size) != 0 || ::listen(s.get(), 1024) != 0 || ::getsockname(s.get(), reinterpret_cast<sockaddr*>(&any), &size) != 0) {
    fail("{}{}: {}; choose another port, the same for all processes", what, *port != 0 ? fmt::format(" {}", *port) : "", std::strerror(errno));
  }
  *port = ntohs(six ? as_six.sin6_port : as_four.sin_port);
  return s;
}

Socket accept_from(const Socket& listener, int milliseconds, std::string* peer) {
  if (!wait_for(listener.get(), POLLIN, milliseconds)) return {};
  sockaddr_storage from{};
  socklen_t size = sizeof from;
  Socket s(::accept4(listener.get(), reinterpret_cast<sockaddr*>(&from), &size, SOCK_CLOEXEC));
  if (!s) return s;
  tune_socket(s.get());
  char name[NI_MAXHOST] = {};
  if (peer != nullptr && ::getnameinfo(reinterpret_cast<const sockaddr*>(&from), size, name, sizeof name, nullptr, 0, NI_NUMERICHOST) == 0) {
    *peer = name;
    if (peer->starts_with("::ffff:")) *peer = peer->substr(7);  // an IPv4 address
  }
  return s;
}

Socket connect_to(const std::string& host, uint16_t port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  Addresses a;
  if (const int code = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &a.list); code != 0) fail("host '{}': {}", host, ::gai_strerror(code));
  for (const addrinfo* at = a.list; at != nullptr; at = at->ai_next) {
    Socket s(::socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!s || ::connect(s.get(), at->ai_addr, at->ai_addrlen) != 0) continue;
    tune_socket(s.get());
    return s;
  }
  return {};
}

bool is_readable(const Socket& s, int milliseconds) { return wait_for(s.get(), POLLIN, milliseconds); }

bool send_all(const Socket& s, const void* data, size_t bytes, int milliseconds) {
  return move_all(s.get(), POLLOUT, bytes, milliseconds, [&](size_t at, size_t n) { return ::send(s.get(), static_cast<const char*>(data) + at, n, MSG_DONTWAIT | MSG_NOSIGNAL); });
}

bool receive_all(const Socket& s, void* data, size_t bytes, int milliseconds) {
  return move_all(s.get(), POLLIN, bytes, milliseconds, [&](size_t at, size_t n) { return ::recv(s.get(), static_cast<char*>(data) + at, n, MSG_DONTWAIT); });
}

}  // namespace oryx
