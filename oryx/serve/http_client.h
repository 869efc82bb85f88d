// A client of servers over HTTP: one request, whose answer is handed over as it comes. With http.cc it is all that knows the HTTP library.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace oryx::serve {

class HttpClient {
 public:
  // "http://127.0.0.1:8080", with a path before /v1 where a server has one ("https://host/api"); "http://" may be left out. `key` goes along as a bearer token. `timeout`: seconds in
  // which nothing comes. Throws Error for what is no such address.
  HttpClient(const std::string& url, const std::string& key, double timeout);
  ~HttpClient();

  struct Reply {
    int status = 0;           // 0: none came
    std::string body = {};    // of an error, or without on_piece
    std::string failure = {};  // why the answer did not come, or not to its end: "cannot connect"
    bool ok() const { return failure.empty() && status == 200; }
  };
  // `path` from /v1 on. on_piece gets the body of an answer with status 200 piece by piece; false ends it.
  using OnPiece = std::function<bool(std::string_view)>;
  Reply get(const std::string& path);
  Reply post(const std::string& path, const std::string& json, const OnPiece& on_piece);
  // From another thread: what runs ends soon, without an answer.
  void stop();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace oryx::serve
