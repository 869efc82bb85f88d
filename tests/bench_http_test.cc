// `oryx bench http` against a server of ours, and against one that does what others may do.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/folder.h"
#include "tests/support/paths.h"
#include "tests/support/program.h"

namespace oryx::test {
namespace {

// What every script begins with: bench(...) -> the finished program; Fake: a server whose answers a script decides, an event each.
constexpr const char* kBench = R"py(
import concurrent.futures, http.server, json, re, signal, socket, subprocess, sys, threading, time
program, folder = sys.argv[1:3]
def bench(port, *options, begin=False):
    p = subprocess.Popen([program, "bench", "http", f"http://127.0.0.1:{port}", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if begin: return p
    p.out, p.err = p.communicate()
    return p
class Fake:
    # answer(body) -> (status, events); an event is a text, an object, or a number of seconds to wait
    def __init__(self, answer, models={"data": [{"id": "fake"}]}):
        fake = self
        self.bodies = []
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def log_message(self, *words): pass
            def reply(self, status, text):
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())
            def do_GET(self):
                if self.path == "/api/v1/models" or self.path == "/v1/models": return self.reply(200, json.dumps(models))
                self.reply(404, "no")
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.bodies.append((self.path, dict(self.headers), body))
                status, events = answer(body)
                if status != 200: return self.reply(status, events)
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for event in events:
                    if isinstance(event, (int, float)):
                        time.sleep(event)
                        continue
                    data = ("data: " + (event if isinstance(event, str) else json.dumps(event)) + "\r\n\r\n").encode()
                    for piece in (data[:9], data[9:]):  # events come in pieces that end anywhere
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                        self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
def text(t): return {"choices": [{"index": 0, "text": t}]}
def usage(prompt, tokens): return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": tokens}}
)py";

class BenchHttp : public ::testing::Test {
 protected:
  void passes(const std::string& script) const {
    const auto r = run_command({"python3", "-c", std::string(kBench) + script, program_path(), folder_.path().string()});
    EXPECT_EQ(r.exit_code, 0) << r.err;
    EXPECT_EQ(r.out, "ok\n") << r.err;
  }
  TemporaryFolder folder_;
};

TEST_F(BenchHttp, MeasuresOurServer) {
  passes(R"py(
server = subprocess.Popen([program, "serve", "tiny", "--random-weights", "--tokenizer", "byte", "--threads", "1", "--port", "0", "--state-budget", "64MiB"], stderr=subprocess.PIPE, text=True)
try:
    port = re.search(r"127.0.0.1:(\d+)", server.stderr.readline()).group(1)
    out = folder + "/rows.json"
    r = bench(port, "--schedule", "linear", "--schedule", "attention", "--concurrency", "1,3", "--requests", "4", "--prompt-least", "20", "--prompt-most", "40", "--shared", "10", "--new-tokens", "6",
              "--warmup", "1", "--goodput", "ttft:60000,e2e:60000", "--json", out, "--charts", folder + "/chart")
    assert r.returncode == 0, r.err
    rows = json.load(open(out))["rows"]
    assert [(row["schedule"], row["concurrency"]) for row in rows] == [("linear", 1), ("linear", 3), ("attention", 1), ("attention", 3)], rows
    for row in rows:
        assert row["completed"] == 4 and row["failed"] == 0 and row["new_tokens"] == 6 and 30 <= row["prompt_tokens"] <= 50, row
        assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p90"] <= row["ttft_ms_p99"] <= row["e2e_ms_p99"], row
        assert row["tpot_ms_p50"] > 0 and row["state_bytes"] >= 0 and 0 < row["in_flight"] <= row["concurrency"] * 1.001, row
        assert abs(row["goodput"] - row["requests_per_second"]) < 1e-9, row
    for i in (1, 2, 3): assert open(f"{folder}/chart-{i}.svg").read().startswith("<svg")
    r = bench(port, "--rate", "20,50", "--seconds", "0.1", "--prompts", "text", "--prompt-least", "8", "--prompt-most", "8", "--new-tokens", "4", "--new-most", "6", "--json", out)
    assert r.returncode == 0 and "arrivals/s" in r.out, (r.out, r.err)
    rows = json.load(open(out))["rows"]
    assert [row["completed"] for row in rows] == [2, 5] and all(4 <= row["new_tokens"] <= 6 for row in rows), rows
    r = bench(port, "--schedule", "atention", "--rate", "50", "--requests", "2")
    assert r.returncode == 1 and "400: " in r.err and "attention" in r.err and r.err.count("\n") == 1, r.err
finally:
    server.send_signal(signal.SIGINT)
    server.wait()
print("ok")
)py");
}

TEST_F(BenchHttp, ReadsWhatOthersSend) {
  passes(R"py(
# A server with a path, chats, a first event without text, no count of tokens, and answers of three pieces, 30 ms apart.
def chat(body): return 200, [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}, 0.03, *[e for t in "abc" for e in ({"choices": [{"delta": {"content": t}}]}, 0.03)], "[DONE]"]
s = Fake(chat)
out = folder + "/rows.json"
r = bench(f"{s.port}/api/v1/", "--chat", "--prompts", "text", "--key", "secret", "--concurrency", "2", "--requests", "4", "--warmup", "0", "--new-tokens", "3", "--no-ignore-eos",
          "--body", '{"top_k": 7}', "--json", out)
assert r.returncode == 0, r.err
row = json.load(open(out))["rows"][0]
assert row["completed"] == 4 and row["new_tokens"] == 3 and "state_bytes" not in row, row
assert row["ttft_ms_p50"] >= 30 and row["e2e_ms_p50"] >= 90, row  # the server's sleep, at least
assert abs(row["ttft_ms_mean"] + 2 * row["tpot_ms_mean"] - row["e2e_ms_mean"]) < 1e-6 and abs(row["itl_ms_mean"] - row["tpot_ms_mean"]) < 1e-6, row
path, headers, body = s.bodies[0]
assert path == "/api/v1/chat/completions" and headers["Authorization"] == "Bearer secret" and body["top_k"] == 7 and body["model"] == "fake", s.bodies[0]
assert "ignore_eos" not in body and "schedule" not in body and body["stream"] and len(body["messages"][0]["content"].split()) == 512, body

# The server's own count; some requests fail and are counted as such.
n = [0]
def flaky(body):
    n[0] += 1
    if n[0] % 2: return 200, [text("a"), text("b"), usage(9, 7), "[DONE]"]
    return 429, json.dumps({"error": {"message": "full"}})
r = bench(Fake(flaky).port, "--rate", "200", "--requests", "6", "--warmup", "0", "--json", out)
assert r.returncode == 0 and "warning: 3 of 6 requests failed; the first: 429: full" in r.err, r.err
row = json.load(open(out))["rows"][0]
assert (row["completed"], row["failed"], row["new_tokens"], row["prompt_tokens"]) == (3, 3, 7, 9), row

# What ends in one line; side by side.
pool, waiting = concurrent.futures.ThreadPoolExecutor(4), []
def refused(*words): waiting.append(pool.submit(check, *words))
def check(expected, port, *options):
    r = bench(port, "--requests", "2", "--warmup", "0", *(options or ("--rate", "100")))
    assert r.returncode == 1 and expected in r.err and r.err.count("\n") == 1 and r.out == "", (expected, r.err, r.out)
refused("no request was answered; the first error: 500: broken", Fake(lambda body: (500, "broken")).port)
refused("the first error: the answer ended without [DONE]", Fake(lambda body: (200, [text("a")])).port)
refused("the first error: an event is no JSON object: oops", Fake(lambda body: (200, [text("a"), "oops"])).port)
refused("the first error: the model is gone", Fake(lambda body: (200, [text("a"), {"error": {"message": "the model is gone"}}])).port)
refused("the first error: the answer has no text", Fake(lambda body: (200, ["[DONE]"])).port)
refused("names no model (status 200); name it with --model", Fake(chat, models=[]).port)
refused("cannot connect; is a server there?", 1)
refused("expected --rate (arrivals a second) or --concurrency", s.port, "--rate", "1", "--concurrency", "1")
refused("--goodput 'itl:3': expected ttft:MS, tpot:MS or e2e:MS", s.port, "--rate", "1", "--goodput", "itl:3")
refused("--body '[]': expected a JSON object", s.port, "--rate", "1", "--body", "[]")
refused("1000000000000 requests of a row are too many, expected 1000000 at most", s.port, "--rate", "1e6", "--seconds", "1e6")
asked = len(s.bodies)
for option in ("--model", "--schedule", "--name"): refused(option + ": expected UTF-8", s.port, "--concurrency", "2", option, b"\xff")
rows = json.load(open(out))
def written(name, **values):
    path = f"{folder}/{name}.json"
    json.dump({**rows, "rows": [{**rows["rows"][0], **values}]}, open(path, "w"))
    return path
refused("a row's 'line' is 7", s.port, "--rate", "1", "--with", written("line", line=7))
refused("a row's 'rate' is \"x\"", s.port, "--rate", "1", "--with", written("rate", rate="x"))
refused("its rows go by rate, these by concurrency", s.port, "--concurrency", "1", "--with", out)
for w in waiting: w.result()
assert len(s.bodies) == asked

# A later row that fails leaves those before it.
def picky(body): return (400, json.dumps({"error": {"message": "no such schedule"}})) if body["schedule"] == "b" else (200, [text("a"), usage(1, 1), "[DONE]"])
for warmup in "0", "1":
    r = bench(Fake(picky).port, "--schedule", "a", "--schedule", "b", "--concurrency", "1,2", "--requests", "2", "--warmup", warmup, "--json", out)
    assert r.returncode == 1 and "400: no such schedule" in r.err and r.err.count("\n") == 1 and len(re.findall(r"^a +[12] +2 ", r.out, re.M)) == 2, (r.out, r.err)
    assert [row["concurrency"] for row in json.load(open(out))["rows"]] == [1, 2]
print("ok")
)py");
}

TEST_F(BenchHttp, CtrlCPrintsWhatCame) {
  passes(R"py(
n = [0]
def slow(body):
    n[0] += 1
    return 200, [text("a"), usage(1, 1), "[DONE]"] if n[0] <= 3 else [text("a"), 1000]
p = bench(Fake(slow).port, "--concurrency", "2", "--requests", "10", "--warmup", "0", begin=True)
while n[0] < 5: time.sleep(0.01)
p.send_signal(signal.SIGINT)
out, err = p.communicate()
assert p.returncode == 130 and "interrupted: the last row holds what had been answered" in out and re.search(r"^2 +3 ", out, re.M), (p.returncode, out, err)

# Before any row: a server that accepts and is silent, and one that is so from the warm-up request on.
silent = socket.create_server(("127.0.0.1", 0))
asked = threading.Event()
def quiet(body):
    asked.set()
    return 200, [1000]
def accepted(): return silent.accept()
for port, wait in ((silent.getsockname()[1], accepted), (Fake(quiet).port, asked.wait)):
    p = bench(port, "--concurrency", "1", "--requests", "2", "--warmup", "1", begin=True)
    held = wait()
    time.sleep(0.1)  # into the request
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=30)
    assert p.returncode == 130 and out == "" and "interrupted" in err and err.count("\n") == 1, (p.returncode, out, err)
print("ok")
)py");
}

}  // namespace
}  // namespace oryx::test
