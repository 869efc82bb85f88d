// TCP connections of a few lines: opened, listened for, and moved bytes through.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace oryx {

// Closes its descriptor.
class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(other.release()) {}
  Socket& operator=(Socket&& other) noexcept;
  ~Socket();
  int get() const { return fd_; }
  int release();
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

// At `port` of every address of this host, or of 127.0.0.1 alone; 0: at one that the system chooses, which is laid down there. Throws Error with `what` in front where the port is taken.
Socket listen_at(uint16_t* port, const std::string& what, bool this_host_alone);
// Waits until somebody connects, at most so long; nothing where nobody does. peer: the address that they have here.
Socket accept_from(const Socket& listener, int milliseconds, std::string* peer = nullptr);
// Nothing where it cannot be reached now, with errno set. Throws Error for a name that is not known.
Socket connect_to(const std::string& host, uint16_t port);

// Whether there is something to read, or an end, within the time.
bool is_readable(const Socket& s, int milliseconds);
// All bytes, or false: the other end is closed, or was silent for so long. milliseconds -1: for ever.
bool send_all(const Socket& s, const void* data, size_t bytes, int milliseconds);
bool receive_all(const Socket& s, void* data, size_t bytes, int milliseconds);

}  // namespace oryx
