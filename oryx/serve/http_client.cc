#include "oryx/serve/http_client.h"

#include <fmt/format.h>
#include <httplib.h>

#include <cmath>
#include <stdexcept>

#include "oryx/common/error.h"

namespace oryx::serve {

namespace {

// "http://host:port" and the path behind it, without a slash at its end or a last /v1.
std::pair<std::string, std::string> host_and_path(const std::string& url) {
  std::string text = url.find("://") == std::string::npos ? "http://" + url : url;
  while (text.ends_with('/')) text.pop_back();
  const size_t scheme = text.find("://") + 3, path = text.find('/', scheme);
  const std::string host = text.substr(0, path);
  const bool known = host.starts_with("http://") || host.starts_with("https://");
  if (!known || host.size() <= scheme) fail("'{}' is no server's address; expected one like http://127.0.0.1:8080", url);
  std::string rest = path == std::string::npos ? "" : text.substr(path);
  if (rest.ends_with("/v1")) rest.resize(rest.size() - 3);
  return {host, rest};
}

std::string say(httplib::Error error) {
  switch (error) {
    case httplib::Error::Connection: return "cannot connect";
    case httplib::Error::ConnectionTimeout: return "no connection in time";
    case httplib::Error::Read: return "the connection broke off, or nothing came in time";
    case httplib::Error::Write: return "the connection broke off while the request was sent";
    case httplib::Error::Canceled: return "given up";
    case httplib::Error::SSLConnection: return "no TLS there (a plain server's address begins with http://)";
    default: return httplib::to_string(error);
  }
}

}  // namespace

struct HttpClient::Impl {
  std::string prefix;
  httplib::Client client;
  httplib::Headers headers;
  Impl(const std::pair<std::string, std::string>& where, const std::string& key, double timeout) : prefix(where.second), client(where.first) {
    // httplib takes what it cannot read as an address for one that does not answer.
    if (!client.is_valid()) fail("'{}' is no server's address; expected one like http://127.0.0.1:8080", where.first);
    const auto seconds = static_cast<time_t>(timeout);
    client.set_connection_timeout(std::min<time_t>(30, seconds + 1));
    client.set_read_timeout(seconds, static_cast<time_t>(1e6 * (timeout - std::floor(timeout))));
    client.set_write_timeout(30);
    client.set_tcp_nodelay(true);
    if (!key.empty()) headers.emplace("Authorization", "Bearer " + key);
  }
};

HttpClient::HttpClient(const std::string& url, const std::string& key, double timeout) {
  try {
    impl_ = std::make_unique<Impl>(host_and_path(url), key, timeout);
  } catch (const std::invalid_argument& e) {  // of httplib, built without TLS
    fail("{}: {}", url, e.what());
  }
}
HttpClient::~HttpClient() = default;

HttpClient::Reply HttpClient::get(const std::string& path) {
  const auto r = impl_->client.Get(impl_->prefix + path, impl_->headers);
  if (!r) return {.failure = say(r.error())};
  return {.status = r->status, .body = r->body};
}

HttpClient::Reply HttpClient::post(const std::string& path, const std::string& json, const OnPiece& on_piece) {
  httplib::Request request;
  request.method = "POST";
  request.path = impl_->prefix + path;
  request.headers = impl_->headers;
  request.headers.emplace("Content-Type", "application/json");
  request.body = json;
  Reply reply;
  request.response_handler = [&](const httplib::Response& response) {
    reply.status = response.status;
    return true;
  };
  request.content_receiver = [&](const char* data, size_t size, uint64_t, uint64_t) {
    if (reply.status == 200 && on_piece) return on_piece(std::string_view(data, size));
    reply.body.append(data, size);
    return true;
  };
  httplib::Response response;
  httplib::Error error = httplib::Error::Success;
  if (!impl_->client.send(request, response, error)) reply.failure = say(error);
  return reply;
}

void HttpClient::stop() { impl_->client.stop(); }

}  // namespace oryx::serve
