// One request to an OpenAI-compatible server, and when its answer came.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "oryx/common/json.h"
#include "oryx/serve/http_client.h"

namespace oryx {

// The data of server-sent events, out of pieces that end anywhere.
class EventReader {
 public:
  // -> what the lines "data: ..." that are whole now hold.
  std::vector<std::string> add(std::string_view piece);

 private:
  std::string line_;
};

struct Exchange {
  double sent = -1, first = -1, last = -1;  // seconds on the caller's clock: the request, and the first and the last piece of text; -1: not yet
  std::vector<double> gaps;                 // seconds between pieces of text
  int64_t pieces = 0;
  int64_t prompt_tokens = -1, new_tokens = -1;  // as the server counts them; -1: it did not say
  bool done = false;                        // the answer came to its end
  std::string error = {};                   // why it did not

  int64_t written() const { return new_tokens >= 0 ? new_tokens : pieces; }
  double first_seconds() const { return first - sent; }
  double total_seconds() const { return last - sent; }
  // Seconds a token behind the first one, by the server's count of them; of a single token 0.
  double token_seconds() const { return written() > 1 ? (last - first) / static_cast<double>(written() - 1) : 0; }
};

// Asks, with "stream": true in the body, and reads the answer. `now` is the clock. What goes wrong is said in Exchange::error.
Exchange exchange(serve::HttpClient& client, const std::string& path, const Json& body, const std::function<double()>& now);

}  // namespace oryx
