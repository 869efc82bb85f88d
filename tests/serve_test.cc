// `oryx serve` as its clients see it: raw HTTP from Python's standard library, on a port that is free.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <future>

#include "oryx/common/file.h"
#include "tests/support/byte_model.h"
#include "tests/support/folder.h"
#include "tests/support/paths.h"
#include "tests/support/program.h"

namespace oryx::test {
namespace {

using ::testing::HasSubstr;

// What every script begins with: start(...) -> a server, whose port is known when it listens.
constexpr const char* kClient = R"py(
import atexit, concurrent.futures, http.client, json, re, signal, socket, subprocess, sys, threading, time
program, model = sys.argv[1:3]
class Server:
    def __init__(self, *options):
        command = [program, "serve", model, "--tokenizer", "byte", "--threads", "1", "--port", "0", "--state-budget", "64MiB", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        atexit.register(self.process.kill)
        line = self.process.stderr.readline()
        found = re.search(r"http://127.0.0.1:(\d+)", line)
        assert found, line + self.process.stderr.read()
        self.port = int(found.group(1))
    def ask(self, method, path, body=None, headers={}):
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=100)
        c.request(method, path, body if body is None or isinstance(body, (str, bytes)) else json.dumps(body), headers)
        r = c.getresponse()
        text = r.read().decode()
        c.close()  # a stop waits for a second for the next request of one that is kept
        return r, text
    def complete(self, **body):
        r, text = self.ask("POST", "/v1/completions", body)
        return r.status, json.loads(text)
    def stream(self, **body):  # -> the connection, its response: events are read by events()
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=100)
        c.request("POST", "/v1/completions", json.dumps(dict(body, stream=True)))
        return c, c.getresponse()
    def metric(self, name):
        return float(re.search("^" + re.escape(name) + " (.*)$", self.ask("GET", "/metrics")[1], re.M).group(1))
    def wait_for(self, name, value):  # at most a minute: what does not come says what there is, and does not hold up the suite
        end = time.monotonic() + 60
        while self.metric(name) != value:
            assert time.monotonic() < end, (name, value, self.ask("GET", "/metrics")[1])
            time.sleep(0.01)
    def stop(self, *signals):
        for s in signals or [signal.SIGINT]: self.process.send_signal(s)
        return self.process.wait(), self.process.stderr.read()
def events(response):
    while True:
        line = response.readline().decode().strip()
        if not line: continue
        assert line.startswith("data: "), line
        if line == "data: [DONE]": return
        yield json.loads(line[6:])
)py";

class Serve : public ::testing::Test {
 protected:
  Serve() { save_byte_model(folder_ / "tiny"); }
  std::string path(const std::string& name) const { return (folder_ / name).string(); }

  // A script that says "ok" at its end.
  void passes(const std::string& script) const {
    const auto r = run_command({"python3", "-c", std::string(kClient) + script, program_path(), path("tiny")});
    EXPECT_EQ(r.exit_code, 0) << r.err;
    EXPECT_EQ(r.out, "ok\n") << r.err;
  }

  TemporaryFolder folder_;
};

TEST_F(Serve, AnswersAsGenerateDoes) {
  passes(R"py(
def generate(prompt, *options):
    words = [program, "generate", model, "--tokenizer", "byte", "--threads", "1", "--prompt", prompt, "--max-new-tokens", "12", "--prefill-piece", "32", "--json", *options]
    return json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
# What generate makes of it, two at a time, while the server starts.
prompt = "Once upon a time there was a model that was served. " * 2
schedules = ["linear", "attention", "attention@prompt,linear@gen", "linear,attention@-9:"]
pool = concurrent.futures.ThreadPoolExecutor(2)
greedy = pool.submit(generate, prompt)
wanted = [pool.submit(generate, prompt, "--temperature", "0.8", "--seed", str(i), "--schedule", t) for i, t in enumerate(schedules)]
s = Server("--piece", "32", "--keep-every", "32", "--chat-template", r"{role}:{content};\n")
r, text = s.ask("GET", "/health")
assert r.status == 200 and json.loads(text) == {"status": "ok"}
r, text = s.ask("GET", "/v1/models")
assert json.loads(text)["data"][0]["id"] == "tiny", text
greedy = greedy.result()["text"]
status, whole = s.complete(prompt=prompt, temperature=0, max_tokens=12)
choice = whole["choices"][0]
assert status == 200 and choice["text"] == greedy and choice["finish_reason"] == "length", (whole, greedy)
assert whole["usage"]["prompt_tokens"] == 105 and whole["usage"]["completion_tokens"] == 12 and whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, whole
# Again: from the kept prefix, streamed, and beside others in other modes.
answers = {}
def ask(i, schedule):
    c, r = s.stream(prompt=prompt, temperature=0.8, seed=i, max_tokens=12, schedule=schedule, stream_options={"include_usage": True}, model="tiny")
    answers[i] = list(events(r))
threads = [threading.Thread(target=ask, args=(i, t)) for i, t in enumerate(schedules)]
for t in threads: t.start()
for t in threads: t.join()
for i, schedule in enumerate(schedules):
    *chunks, last, usage = answers[i]
    want = wanted[i].result()["text"]
    assert "".join(c["choices"][0]["text"] for c in chunks) == want, (schedule, want, chunks)
    assert last["choices"][0]["finish_reason"] == "length" and usage["choices"] == [], answers[i]
    assert usage["usage"]["total_tokens"] == 117
assert answers[0][-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 96, answers[0][-1]
# Up to a stop string.
stop = greedy[4:6]
status, whole = s.complete(prompt=prompt, temperature=0, max_tokens=12, stop=[stop])
assert whole["choices"][0]["text"] == greedy[:greedy.index(stop)] and whole["choices"][0]["finish_reason"] == "stop", whole
# A chat is the completion of its text.
status, whole = s.complete(prompt="user:Hi there;\nassistant:", temperature=0, max_tokens=12)
chat = {"messages": [{"role": "user", "content": "Hi there"}], "temperature": 0, "max_tokens": 12}
r, text = s.ask("POST", "/v1/chat/completions", chat)
message = json.loads(text)["choices"][0]["message"]
assert json.loads(text)["object"] == "chat.completion" and message == {"role": "assistant", "content": whole["choices"][0]["text"]}, (text, whole)
c = http.client.HTTPConnection("127.0.0.1", s.port, timeout=100)
c.request("POST", "/v1/chat/completions", json.dumps(dict(chat, stream=True)))
first, *chunks, last = list(events(c.getresponse()))
assert first["object"] == "chat.completion.chunk" and first["choices"][0]["delta"] == {"role": "assistant", "content": ""}, first
assert "".join(x["choices"][0]["delta"]["content"] for x in chunks) == message["content"], chunks
assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "length", last
c.close()
status, error = s.complete(prompt=prompt, max_tokens=10000000)
assert status == 400 and "but the whole budget is 63.9 MiB" in error["error"]["message"], error
assert s.metric("oryx_tokens_reused_total") >= 192 and s.metric("oryx_requests_total{end=\"finished\"}") == 9
assert s.metric("oryx_time_to_first_token_seconds_count") == 9
code, err = s.stop()
assert code == 0 and err.endswith("stopped; every request was answered\n"), (code, err)
print("ok")
)py");
}

// Log-probabilities, several answers and an echo, whole and as they come.
TEST_F(Serve, ScoresAndChoicesAreOpenAis) {
  passes(R"py(
import math
s = Server("--piece", "16", "--keep-every", "16", "--max-running", "8", "--max-queue", "64", "--chat-template", r"{role}:{content};\n")
prompt = "Once upon a time there was"
plain = dict(prompt=prompt, temperature=0.9, seed=5, max_tokens=10)
status, base = s.complete(**plain)
assert base["choices"][0]["logprobs"] is None, base
status, scored = s.complete(logprobs=3, **plain)
choice = scored["choices"][0]; lp = choice["logprobs"]
assert status == 200 and choice["text"] == base["choices"][0]["text"], (scored, base)
assert len(lp["tokens"]) == len(lp["token_logprobs"]) == len(lp["top_logprobs"]) == len(lp["text_offset"]) == scored["usage"]["completion_tokens"], lp
assert all(x <= 0 for x in lp["token_logprobs"]) and all(len(t) <= 3 and max(t.values()) >= x - 1e-9 for t, x in zip(lp["top_logprobs"], lp["token_logprobs"])), lp
assert lp["text_offset"][0] == 0 and lp["text_offset"] == sorted(lp["text_offset"]), lp
# Three answers: each is what its own seed gives, and the prompt counts once.
status, three = s.complete(n=3, logprobs=0, **plain)
assert [c["index"] for c in three["choices"]] == [0, 1, 2] and three["usage"]["prompt_tokens"] == len(prompt) + 1, three
for i, c in enumerate(three["choices"]):
    status, one = s.complete(**dict(plain, seed=5 + i), logprobs=0)
    assert one["choices"][0]["text"] == c["text"] and one["choices"][0]["logprobs"] == c["logprobs"] and c["logprobs"]["top_logprobs"] is None, (one, c)
assert len({c["text"] for c in three["choices"]}) > 1, three
assert three["usage"]["completion_tokens"] == sum(len(c["logprobs"]["tokens"]) for c in three["choices"]), three
# As they come: the pieces of each answer, put together.
c, r = s.stream(n=3, logprobs=0, stream_options={"include_usage": True}, **plain)
*chunks, last = list(events(r))
assert last["choices"] == [] and last["usage"] == three["usage"] | {"prompt_tokens_details": last["usage"]["prompt_tokens_details"]}, last
for i, want in enumerate(three["choices"]):
    own = [x["choices"][0] for x in chunks if x["choices"][0]["index"] == i]
    assert "".join(x["text"] for x in own) == want["text"] and own[-1]["finish_reason"] == want["finish_reason"], (own, want)
    for key in ("tokens", "token_logprobs", "text_offset"):
        assert sum((x["logprobs"][key] for x in own if x["logprobs"]), []) == want["logprobs"][key], (own, want)
# An echo: the prompt's own tokens first, with what the model made of them; with max_tokens 0 they alone.
status, echoed = s.complete(echo=True, logprobs=2, **plain)
e = echoed["choices"][0]
assert e["text"] == prompt + base["choices"][0]["text"], e
n = len(prompt)
assert "".join(e["logprobs"]["tokens"][:n]) == prompt and e["logprobs"]["text_offset"][:n] == list(range(n)), e
assert e["logprobs"]["token_logprobs"][n:] == lp["token_logprobs"] and all(x < 0 for x in e["logprobs"]["token_logprobs"]), e
status, only = s.complete(**dict(plain, max_tokens=0, echo=True, logprobs=2))
o = only["choices"][0]
assert o["text"] == prompt and o["finish_reason"] == "length" and o["logprobs"]["token_logprobs"] == e["logprobs"]["token_logprobs"][:n] and only["usage"]["completion_tokens"] == 0, only
status, ids = s.complete(**dict(plain, prompt=list(prompt.encode()), max_tokens=0, echo=True, logprobs=0))
assert ids["choices"][0]["logprobs"]["token_logprobs"][0] is None and len(ids["choices"][0]["logprobs"]["tokens"]) == n, ids
status, silent = s.complete(**dict(plain, max_tokens=0, echo=True))
assert silent["choices"][0]["text"] == prompt and silent["choices"][0]["logprobs"] is None, silent
c, r = s.stream(echo=True, **plain)
assert "".join(x["choices"][0]["text"] for x in events(r)) == e["text"]
# Several prompts: the answers of each, one behind the other, as alone.
status, both = s.complete(**dict(plain, prompt=[prompt, "Another"], n=2, echo=True, logprobs=1, max_tokens=4))
assert [c["index"] for c in both["choices"]] == [0, 1, 2, 3] and both["usage"]["prompt_tokens"] == len(prompt) + 9, both
for i, c in enumerate(both["choices"]):
    status, one = s.complete(**dict(plain, prompt=[prompt, "Another"][i // 2], seed=5 + i % 2, echo=True, logprobs=1, max_tokens=4))
    assert dict(one["choices"][0], index=i) == c, (one, c)
# Up to one of several stop strings: no token of what was cut off.
text = base["choices"][0]["text"]
stop = next(text[k:k + 2] for k in range(3, len(text) - 1) if text.isascii() or "\ufffd" not in text[k:k + 2])
status, stopped = s.complete(stop=["never that", stop], logprobs=0, **plain)
x = stopped["choices"][0]
assert x["text"] == text[:text.index(stop)] and x["finish_reason"] == "stop" and all(at < max(1, len(x["text"])) for at in x["logprobs"]["text_offset"]), x
# A chat.
chat = {"messages": [{"role": "user", "content": "Hi there"}], "temperature": 0.9, "seed": 3, "max_tokens": 6, "logprobs": True, "top_logprobs": 2, "n": 2}
r, text = s.ask("POST", "/v1/chat/completions", chat)
answer = json.loads(text)
for c in answer["choices"]:
    content = c["logprobs"]["content"]
    assert all(len(t["top_logprobs"]) == 2 and t["logprob"] <= t["top_logprobs"][0]["logprob"] and isinstance(t["bytes"], list) for t in content), content
    assert bytes(sum((t["bytes"] for t in content), [])).decode(errors="replace") == c["message"]["content"], c
c = http.client.HTTPConnection("127.0.0.1", s.port, timeout=100)
c.request("POST", "/v1/chat/completions", json.dumps(dict(chat, stream=True)))
chunks = list(events(c.getresponse()))
for i, want in enumerate(answer["choices"]):
    own = [x["choices"][0] for x in chunks if x["choices"][0]["index"] == i]
    assert own[0]["delta"]["role"] == "assistant" and "".join(x["delta"].get("content", "") for x in own) == want["message"]["content"], own
    assert sum((x["logprobs"]["content"] for x in own if x["logprobs"]), []) == want["logprobs"]["content"], own
c.close()
# More answers than there can be places; a client that goes takes all of its answers along.
status, error = s.complete(n=100, **plain)
assert status == 400 and "100 answers are asked for, but this server runs 8 and lets 64 wait" in error["error"]["message"], error
c, r = s.stream(prompt="a", n=3, max_tokens=3000, temperature=0)
next(events(r))
before = s.metric('oryx_requests_total{end="cancelled"}')
r.close(); c.close()
s.wait_for('oryx_requests_total{end="cancelled"}', before + 3)
assert s.stop()[0] == 0
print("ok")
)py");
}

// Routers that the server was started with, by default and by request; no other file is opened.
TEST_F(Serve, RoutersDecideAsInGenerate) {
  passes(R"py(
import os
folder = os.path.dirname(model)
text = os.path.join(folder, "text.txt")
open(text, "w").write("".join(f"Line {i} of a text that says little, and says it {i * 7 % 10} times. " for i in range(30)))
files = {}
for reads in ("hidden", "tokens"):
    files[reads] = os.path.join(folder, reads)
    subprocess.run([program, "router", "train", model, "--tokenizer", "byte", "--threads", "1", "--data", text, "--seq-len", "100", "--out", files[reads], "tokens=700", "width=4", "epochs=1", "holdout=0.3", "reads=" + reads], check=True, capture_output=True)
prompt = "Line 3 of a text that says little, and says it more than once"
def generate(schedule, seed):
    words = [program, "generate", model, "--tokenizer", "byte", "--threads", "1", "--prompt", prompt, "--max-new-tokens", "12", "--prefill-piece", "32", "--temperature", "0.8", "--seed", str(seed), "--json", "--schedule", schedule]
    return json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
own = f"linear,router(attention=0.3;file={files['hidden']})"
s = Server("--piece", "32", "--keep-every", "32", "--schedule", own, "--router", "tokens=" + files["tokens"])
schedules = [None, "linear,router(attention=0.5;window=8;file=tokens)", f"linear,router(attention=0.2;causal=1;window=16;file={files['hidden']})@gen", "linear"]
pool = concurrent.futures.ThreadPoolExecutor(4)
answers = list(pool.map(lambda i: s.complete(prompt=prompt, temperature=0.8, seed=i, max_tokens=12, schedule=schedules[i]), range(len(schedules))))
for i, schedule in enumerate(schedules):
    want = generate(own if schedule is None else schedule.replace("file=tokens", "file=" + files["tokens"]), i)
    status, got = answers[i]
    assert status == 200 and got["choices"][0]["text"] == want["text"], (schedule, want, got)
    if got["usage"]["prompt_tokens_details"]["cached_tokens"] == 0:  # what another request has read does not count
        assert abs(got["oryx"]["attention_share"] - want["stats"]["attention_share"]) < 1e-6, (schedule, want["stats"], got["oryx"])
assert s.metric("oryx_tokens_ahead_total") == 62, s.metric("oryx_tokens_ahead_total")
for path in (text, "/etc/passwd", "router"):
    status, error = s.complete(prompt=prompt, schedule=f"linear,router(attention=0.1;file={path})")
    assert status == 400 and f"the router '{path}' is not served here; known: " in error["error"]["message"] and error["error"]["param"] == "schedule", error
status, error = s.complete(prompt=prompt, schedule="linear,surprise(attention=0.1)")
assert status == 400 and "which serving does not measure" in error["error"]["message"], error
assert s.stop()[0] == 0
for options, line in ((["--router", "a=" + text], "text.txt"), (["--router", "=x"], "expected FILE or NAME=FILE"), (["--router", files["tokens"], "--router", files["tokens"]], "two of that name")):
    r = subprocess.run([program, "serve", model, "--tokenizer", "byte", "--port", "0", *options], capture_output=True, text=True)
    assert r.returncode == 1 and line in r.stderr and r.stderr.count("\n") == 1, r
print("ok")
)py");
}

TEST_F(Serve, BadInputIsAnErrorObjectOfOneLine) {
  passes(R"py(
s = Server("--max-running", "1", "--max-queue", "0", "--kv", "bounded:16+64")
def refused(status, line, method="POST", path="/v1/completions", body=None):
    r, text = s.ask(method, path, body)
    error = json.loads(text)["error"]
    assert r.status == status and line in error["message"] and "\n" not in error["message"] and set(error) == {"message", "type", "param", "code"}, (r.status, text)
    return r, error
refused(400, "not valid JSON", body="{\"prompt\": ")
refused(400, "not valid JSON", body=b"{\"prompt\": \"\xff\"}")
refused(400, "expected an object", body="[]")
refused(400, "nested deeper", body="[" * 100000)
refused(400, "Did you mean 'temperature'?", body={"prompt": "a", "temprature": 1})
refused(400, "max_tokens is \"many\" (a string)", body={"prompt": "a", "max_tokens": "many"})
refused(400, "Did you mean 'attention'?", body={"prompt": "a", "schedule": "linear,atention@3:"})
refused(400, "token id 300 is outside", body={"prompt": [300]})  # of a vocabulary longer than the tokeniser's
refused(404, "is not served here", body={"prompt": "a", "model": "another"})
refused(404, "GET /v1/nothing is not served", "GET", "/v1/nothing")
# What is no HTTP at all, and half a request.
for junk in [b"\x00\x01\x02\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"]:
    with socket.create_connection(("127.0.0.1", s.port)) as c: c.sendall(junk)
# One runs, none may wait.
c, r = s.stream(prompt="a", max_tokens=30000, temperature=0)
next(events(r))
r2, error = refused(429, "try again later", body={"prompt": "b"})
assert r2.getheader("Retry-After") == "1" and error["type"] == "rate_limit_error"
# Its client goes: it is cancelled, and the place is free.
r.close(); c.close()
s.wait_for("oryx_requests_total{end=\"cancelled\"}", 1)
s.wait_for("oryx_requests_running", 0)
status, whole = s.complete(prompt="b", max_tokens=3)
assert status == 200 and whole["usage"]["completion_tokens"] >= 1, whole
# One that does not stream, too.
c = http.client.HTTPConnection("127.0.0.1", s.port)
c.request("POST", "/v1/completions", json.dumps({"prompt": "a", "max_tokens": 30000, "temperature": 0}))
s.wait_for("oryx_requests_running", 1)
c.close()
s.wait_for("oryx_requests_total{end=\"cancelled\"}", 2)
s.wait_for("oryx_state_bytes{part=\"recurrent\"}", 0)
# The port is taken.
other = subprocess.run([program, "serve", model, "--tokenizer", "byte", "--port", str(s.port)], capture_output=True, text=True)
assert other.returncode == 1 and re.fullmatch(r"oryx: error: cannot listen on 127\.0\.0\.1:\d+: .*; is another server there\?.*\n", other.stderr), other
assert s.stop(signal.SIGTERM)[0] == 0
print("ok")
)py");
}

TEST_F(Serve, CtrlCFinishesWhatRuns) {
  passes(R"py(
# A text that a busy machine has ended before anybody could look is written again, longer.
for tokens in (400, 4000, 40000):
    s = Server("--kv", "drop")
    c, r = s.stream(prompt="a", max_tokens=tokens, temperature=0)
    chunks = events(r)
    next(chunks)
    s.process.send_signal(signal.SIGINT)
    try:
        while s.ask("GET", "/health")[0].status != 503: time.sleep(0.01)
        status, error = s.complete(prompt="b")
        assert status == 503 and "stops" in error["error"]["message"], error
        seen = True
    except (ConnectionError, http.client.HTTPException): seen = False
    last = list(chunks)[-1]
    assert last["choices"][0]["finish_reason"] == "length", last
    code, err = s.process.wait(), s.process.stderr.read()
    assert code == 0 and "every request was answered" in err, (code, err)
    if seen: break
assert seen

s = Server("--grace", "0.1", "--kv", "drop")
c, r = s.stream(prompt="a", max_tokens=100000, temperature=0)
chunks = events(r)
next(chunks)
s.process.send_signal(signal.SIGINT)
last = list(chunks)[-1]
assert "cut off" in last["error"]["message"], last
code, err = s.process.wait(), s.process.stderr.read()
assert code == 130 and "1 requests were cut off" in err, (code, err)

s = Server("--grace", "1000", "--kv", "drop")
c, r = s.stream(prompt="a", max_tokens=100000, temperature=0)
next(events(r))
s.process.send_signal(signal.SIGINT)
while s.ask("GET", "/health")[0].status != 503: time.sleep(0.01)
s.process.send_signal(signal.SIGINT)
assert s.process.wait() == -signal.SIGINT
print("ok")
)py");
}

TEST_F(Serve, BadOptionsEndInOneLine) {
  std::vector<std::future<void>> lines;  // side by side
  const auto line = [&](const std::vector<std::string>& options, const char* text) {
    lines.push_back(std::async(std::launch::async, [this, options, text] {
      std::vector<std::string> words = {"serve", path("tiny"), "--tokenizer", "byte"};
      words.insert(words.end(), options.begin(), options.end());
      const auto r = run(words);
      EXPECT_EQ(r.exit_code, 1);
      EXPECT_THAT(r.err, HasSubstr(text));
      EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
    }));
  };
  line({"--schedule", "atention"}, "Did you mean 'attention'?");
  line({"--piece", "64", "--keep-every", "100"}, "keep_every is 100, expected 0 or a multiple of piece, 64");
  line({"--kv", "surprise:budget=8"}, "are not served");
  line({"--state-budget", "1KiB"}, "the budget of states is 1.00 KiB");
  line({"--port", "70000"}, "--port");
  line({"--chat-template", "{content}"}, "expected chatml, llama3, or a message's text with {role} and behind it {content}");
  line({"--host", "no.such.host.invalid", "--port", "0"}, "cannot listen on no.such.host.invalid");
}

}  // namespace
}  // namespace oryx::test
