#include "oryx/parallel/rendezvous.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>

#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "oryx/common/error.h"

namespace oryx {

struct Rendezvous::Table {
  Table(const std::string& address, const c10d::TCPStoreOptions& options, std::string prefix)
      : store(address, options), prefix(std::move(prefix)), timeout(options.timeout) {}
  c10d::TCPStore store;
  std::string prefix;
  std::chrono::milliseconds timeout;
};

namespace {

// libtorch says in many lines that a port is in use, and on standard error before it throws.
void check_port_is_free(uint16_t port) {
  const int probe = ::socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (probe < 0) return;  // no IPv6 here: the store says what is wrong
  const int on = 1, off = 0;
  ::setsockopt(probe, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  ::setsockopt(probe, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
  sockaddr_in6 address{};
  address.sin6_family = AF_INET6;
  address.sin6_port = htons(port);
  const bool taken = ::bind(probe, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 && (errno == EADDRINUSE || errno == EACCES);
  const int code = errno;
  ::close(probe);
  if (taken) fail("MASTER_PORT {}: {}; choose another port, the same for all processes", port, std::strerror(code));
}

c10d::TCPStoreOptions store_options(uint16_t port, bool server, int64_t seconds) {
  c10d::TCPStoreOptions o;
  o.port = port;
  o.isServer = server;
  o.waitWorkers = false;
  o.timeout = std::chrono::seconds(seconds);
  return o;
}

}  // namespace

Rendezvous::Rendezvous() : table_(std::make_unique<Table>("127.0.0.1", store_options(0, true, 300), "oryx/")) {}

Rendezvous::Rendezvous(const Place& place, int64_t seconds) {
  const bool server = place.rank == 0 && !place.store_is_elsewhere;
  if (server) check_port_is_free(place.port);
  try {
    table_ = std::make_unique<Table>(place.address, store_options(place.port, server, seconds), "oryx/" + place.attempt + "/");
  } catch (const std::exception&) {
    fail("rank {} of {} found nobody at MASTER_ADDR {} port {} within {} s; is rank 0 running there, and is the port open?", place.rank, place.size, place.address, place.port, seconds);
  }
}

Rendezvous::~Rendezvous() = default;

uint16_t Rendezvous::port() const { return table_->store.getPort(); }

void Rendezvous::put(const std::string& key, const std::string& value) {
  table_->store.set(table_->prefix + key, std::vector<uint8_t>(value.begin(), value.end()));
}

std::string Rendezvous::take(const std::string& key, const std::string& what) {
  try {
    table_->store.wait({table_->prefix + key}, table_->timeout);
    const auto bytes = table_->store.get(table_->prefix + key);
    return {bytes.begin(), bytes.end()};
  } catch (const std::exception&) {
    fail("{} did not come within {} s; were all processes started, with the same WORLD_SIZE, MASTER_ADDR and MASTER_PORT?", what,
         std::chrono::duration_cast<std::chrono::seconds>(table_->timeout).count());
  }
}

}  // namespace oryx
