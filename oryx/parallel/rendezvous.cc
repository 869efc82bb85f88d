#include "oryx/parallel/rendezvous.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>

#include "oryx/common/error.h"
#include "oryx/common/interrupt.h"
#include "oryx/parallel/torch_store.h"

namespace oryx {

namespace {

constexpr uint64_t kWord = 0x6f7279786d656574;  // "oryxmeet"
constexpr int kPatience = 2'000;                // milliseconds, for a message that has begun

struct Arrival {
  uint64_t word = kWord;
  int64_t rank = 0, size = 0, port = 0;
};
// An answer: where the next one is; host empty: where the meeting is. Or what is wrong.
struct Answer {
  uint64_t word = kWord;
  int64_t port = 0;
  char host[64] = {}, error[192] = {};
};

void put_text(char* to, size_t room, const std::string& text) { std::memcpy(to, text.data(), std::min(room - 1, text.size())); }

bool is_this_host(const std::string& address) { return address.starts_with("127.") || address == "::1"; }

}  // namespace

Rendezvous::Rendezvous(int64_t size, uint16_t port, const std::string& what, bool this_host_alone)
    : size_(size), port_(port), listener_(listen_at(&port_, what, this_host_alone)), thread_([this] { serve(); }) {}

Rendezvous::~Rendezvous() {
  stop_ = true;
  thread_.join();
}

void Rendezvous::serve() {
  struct Guest {
    Socket socket;
    Arrival arrival;
    std::string host;
  };
  std::map<int64_t, Guest> guests;
  const auto tell_all = [&](const std::string& error) {
    for (auto& [rank, guest] : guests) {
      Answer answer;
      put_text(answer.error, sizeof answer.error, error);
      if (error.empty()) {
        const Guest& next = guests.at((rank + 1) % static_cast<int64_t>(guests.size()));
        answer.port = next.arrival.port;
        if (!is_this_host(next.host)) put_text(answer.host, sizeof answer.host, next.host);
      }
      (void)send_all(guest.socket, &answer, sizeof answer, kPatience);
    }
    guests.clear();
  };
  while (!stop_) {
    Guest guest;
    guest.socket = accept_from(listener_, 50, &guest.host);
    if (!guest.socket || !receive_all(guest.socket, &guest.arrival, sizeof guest.arrival, kPatience) || guest.arrival.word != kWord) continue;
    // Whoever reaches the port is heard, but what makes no sense harms only who said it.
    const Arrival a = guest.arrival;
    if (a.size != size_ || a.rank < 0 || a.rank >= size_ || a.port < 1 || a.port > 65535) {
      Answer answer;
      put_text(answer.error, sizeof answer.error, fmt::format("rank {} says that there are {} processes, where they meet there are {}; have all the same WORLD_SIZE?", a.rank, a.size, size_));
      (void)send_all(guest.socket, &answer, sizeof answer, kPatience);
      continue;
    }
    const bool twice = guests.count(a.rank) != 0;
    guests[twice ? -1 : a.rank] = std::move(guest);  // who is one too many is told so too
    if (twice) tell_all(fmt::format("two processes say that they are rank {} of {}; each needs a RANK of its own", a.rank, size_));
    else if (static_cast<int64_t>(guests.size()) == size_) tell_all("");
  }
}

Neighbour find_next(const Place& place, uint16_t own_port, int seconds) {
  std::unique_ptr<Rendezvous> own;
  const bool by_torchrun = place.meeting == Place::Meeting::kByTorchrun;
  if (place.rank == 0 && place.meeting != Place::Meeting::kInLauncher) own = std::make_unique<Rendezvous>(place.size, by_torchrun ? 0 : place.port, "MASTER_PORT", false);
  const uint16_t port = by_torchrun ? share_port_by_torch(place, own ? own->port() : 0, seconds) : place.port;
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  const auto left = [&] { return static_cast<int>(std::chrono::duration_cast<std::chrono::milliseconds>(until - std::chrono::steady_clock::now()).count()); };
  Socket s;
  while (!(s = connect_to(place.address, port))) {
    if (left() < 0) {
      fail("rank {} of {} found nobody at MASTER_ADDR {} port {} within {} s ({}); is rank 0 running there?", place.rank, place.size, place.address, place.port, seconds, std::strerror(errno));
    }
    check_interrupt();
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  const Arrival arrival{kWord, place.rank, place.size, own_port};
  Answer answer;
  const bool sent = send_all(s, &arrival, sizeof arrival, kPatience);
  while (sent && left() > 0 && !is_readable(s, 200)) check_interrupt();
  if (!sent || !receive_all(s, &answer, sizeof answer, kPatience) || answer.word != kWord) {
    fail("rank {} of {} got no answer at MASTER_ADDR {} port {} within {} s; were all processes started, and does nothing else listen there?", place.rank, place.size, place.address, place.port, seconds);
  }
  answer.host[sizeof answer.host - 1] = answer.error[sizeof answer.error - 1] = 0;
  if (answer.error[0] != 0) fail("{}", answer.error);
  // The meeting's answers are on their way to all: rank 0 leaves when its own has come, and its thread has sent the others first or will.
  return {answer.host[0] == 0 ? place.address : std::string(answer.host), static_cast<uint16_t>(answer.port)};
}

}  // namespace oryx
