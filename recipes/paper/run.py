#!/usr/bin/env python3
"""The project's experiments: data, training, evaluation and timings of the models of models.json, in one command.

    run.py --text TEXT --tasks TASKS --work runs/paper --devices cuda:0,cuda:1 --seeds 0,1 --set core --tokens 80e6

TEXT holds training text (train*.jsonl, also .zst or .xz) and valid.jsonl and test.jsonl; TASKS holds lm_tasks/ and retrieval/. Seed i trains on device i (modulo their
number), one model after the other, in the order of the set; a trained model is evaluated by plan.json while the next one trains. What is done is not done again: the same
command goes on, and a run that fails does not stop the others. WORK/results/MODEL-seedN/ gets config.json, metrics.jsonl, inspect.json and a file a task; WORK/results.tar.xz all of them.
Then tables.py WORK/results makes the pages of docs/results. Needs `oryx` in PATH and Python's standard library.
"""
import argparse, glob, json, lzma, os, queue, shutil, signal, subprocess, sys, tarfile, threading, time

HERE = os.path.dirname(os.path.abspath(__file__))
START = time.time()
LOCK = threading.Lock()


def say(*words):
    with LOCK:
        print("%6.1f s " % (time.time() - START), *words, flush=True)


class Deadline(Exception):
    pass


RUNNING = set()


def call(command, log, deadline, device=None, progress=None):
    """Runs a command with its output in `log`; raises on failure and at the deadline (the command is asked to stop first)."""
    env = dict(os.environ)
    if device is not None and device.startswith("cuda:"):
        env["CUDA_VISIBLE_DEVICES"] = device[5:]
    env.setdefault("OMP_NUM_THREADS", "4")
    with open(log, "a") as f:
        f.write("\n$ " + " ".join(command) + "\n")
        f.flush()
        p = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=env)
        RUNNING.add(p)
        last = time.time()
        try:
            while p.poll() is None:
                time.sleep(0.1)
                if time.time() > deadline:
                    p.send_signal(signal.SIGINT)
                    try:
                        p.wait(8)
                    except subprocess.TimeoutExpired:
                        p.kill()
                    raise Deadline()
                if progress and time.time() - last > 8:
                    last = time.time()
                    progress()
        finally:
            RUNNING.discard(p)
    if p.returncode != 0:
        tail = open(log, errors="replace").read()[-600:].strip().replace("\r", "\n").split("\n")[-1]
        raise RuntimeError("%s: exit %d: %s" % (command[:3], p.returncode, tail))


def metrics(run):
    try:
        return [json.loads(line) for line in open(os.path.join(run, "metrics.jsonl"))]
    except OSError:
        return []


class Experiment:
    def __init__(self, o):
        self.o = o
        self.models = json.load(open(o.models))
        self.deadline = START + o.seconds
        for d in ("logs", "configs", "runs", "results"):
            os.makedirs(os.path.join(o.work, d), exist_ok=True)
        self.failed, self.late = [], []

    def path(self, *parts):
        return os.path.join(self.o.work, *parts)

    def data(self):
        """The data set: TEXT's training files and retrieval documents of --retrieval of the bytes."""
        o = self.o
        if os.path.exists(self.path("data", "dataset.json")):
            return
        text = self.path("text")
        os.makedirs(text, exist_ok=True)
        files = []
        for p in sorted(glob.glob(os.path.join(o.text, "*.jsonl*"))):
            if p.endswith(".xz"):
                to = os.path.join(text, os.path.basename(p)[:-3])
                with lzma.open(p) as i, open(to, "wb") as f:
                    shutil.copyfileobj(i, f, 1 << 22)
            else:
                to = os.path.join(text, os.path.basename(p))
                if not os.path.exists(to):
                    os.symlink(os.path.abspath(p), to)
            files.append(to)
        say("text is there:", *[os.path.basename(f) for f in files])
        hay = [f for f in files if os.path.basename(f).startswith("train") and (f.endswith(".jsonl") or shutil.which("zstd"))]
        if o.hay:
            hay = [f for f in hay if o.hay in os.path.basename(f)]
        if o.retrieval_megabytes > 0:
            call([sys.executable, os.path.join(HERE, "retrieval_text.py"), *hay, "--out", text, "--megabytes", str(o.retrieval_megabytes), "--seed", "1"]
                 + ["--mix", o.mix],
                 self.path("logs", "data.log"), self.deadline)
            say("retrieval documents are there")
        tokenizer = o.tokenizer or self.path("tokenizer.model")
        if not os.path.exists(tokenizer):
            call(["oryx", "tokenizer", "train", text, "--exclude", "retrieval*", "--exclude", "valid*", "--exclude", "test*", "--vocab-size", "8192", "--sample", "8", "--out",
                  tokenizer], self.path("logs", "data.log"), self.deadline)
            say("tokeniser trained")
        env_threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())
        call(["oryx", "data", "build", text, "--exclude", "test*", "--valid-files", "valid*", "--tokenizer", tokenizer, "--out", self.path("data")],
             self.path("logs", "data.log"), self.deadline)
        os.environ.pop("OMP_NUM_THREADS")
        if env_threads:
            os.environ["OMP_NUM_THREADS"] = env_threads
        shutil.copy(self.path("data", "dataset.json"), self.path("results", "dataset.json"))
        say("data set:", json.load(open(self.path("data", "dataset.json")))["train"])

    def config(self, name, seed):
        o, m = self.o, self.models
        c = dict(m["training"])
        own = dict(m["models"][name])
        own["model"] = {**m["shape"], **own.get("model", {})}
        c.update(own)
        for override in o.override:
            key, value = override.split("=", 1)
            try:
                value = json.loads(value)
            except ValueError:
                pass
            group = c
            *outer, key = key.split(".")
            for k in outer:
                group = group.setdefault(k, {})
            group[key] = value
        per_step = c["batch_size"] * c["seq_len"] * c.get("accumulate", 1)
        c["steps"] = max(2, round(o.tokens / per_step))
        c["warmup_steps"] = min(c["warmup_steps"], c["steps"] // 4)
        c["validate_every"] = max(1, c["steps"] // 8)
        c["save_every"] = max(c["steps"] // 2, 200)
        c["seed"] = seed
        file = self.path("configs", "%s-seed%d.json" % (name, seed))
        json.dump(c, open(file, "w"), indent=1)
        return file, c["steps"]

    def train(self, name, seed, device):
        id = "%s-seed%d" % (name, seed)
        run, result = self.path("runs", id), self.path("results", id)
        os.makedirs(result, exist_ok=True)
        if not os.path.exists(os.path.join(result, "trained")):
            file, steps = self.config(name, seed)

            def progress():
                lines = [m for m in metrics(run) if m["kind"] == "train"]
                if lines:
                    say("train", id, "step %d of %d, loss %.3f, %.0f tokens/s" % (lines[-1]["step"], steps, lines[-1]["loss"], lines[-1]["tokens_per_second"]))

            begin = time.time()
            call(["oryx", "train", "--config", file, "data=" + self.path("data"), "out=" + run, "device=" + ("cuda" if device.startswith("cuda") else device)],
                 self.path("logs", "train-" + id + ".log"), self.deadline, device, progress)
            done = metrics(run)
            if not done or max(m["step"] for m in done) < steps:
                raise RuntimeError("ended at step %s of %d" % (max([m["step"] for m in done], default=None), steps))
            for f in ("config.json", "metrics.jsonl"):
                shutil.copy(os.path.join(run, f), os.path.join(result, f))
            with open(os.path.join(result, "inspect.json"), "w") as f:
                subprocess.run(["oryx", "inspect", run, "--json"], stdout=f, stderr=subprocess.DEVNULL)
            say("trained", id, "in %.1f s:" % (time.time() - begin), *["%s %.3f" % (m["schedule"], m["perplexity"]) for m in done if m["kind"] == "validation" and m["step"] == steps])
            open(os.path.join(result, "trained"), "w").write("%.1f\n" % (time.time() - begin))

    def evaluate(self, name, seed, device):
        id = "%s-seed%d" % (name, seed)
        result = self.path("results", id)
        plan = open(self.o.plan).read().replace("$TASKS", os.path.abspath(self.o.tasks)).replace("$TEXT", os.path.abspath(self.o.text))
        # A plan's entry may name the models that it is for.
        plan = json.dumps([{k: v for k, v in p.items() if k != "models"} for p in json.loads(plan)
                           if name in p.get("models", [name]) and (not self.o.only or p["name"] in self.o.only.split(","))])
        file = self.path("configs", "plan-%s.json" % id)
        open(file, "w").write(plan)
        if all(os.path.exists(os.path.join(result, p["name"] + ".json")) for p in json.loads(plan)):
            return
        begin = time.time()
        try:
            call(["oryx", "eval", "suite", self.path("runs", id), "--plan", file, "--out", result, "--precision", self.models["training"]["precision"], "--device",
                  "cuda" if device.startswith("cuda") else device], self.path("logs", "eval-" + id + ".log"), self.deadline, device, lambda: say("evaluating", id))
        finally:
            took = {p["name"]: round(json.load(open(os.path.join(result, p["name"] + ".json")))["seconds"], 1) for p in json.loads(plan)
                    if os.path.exists(os.path.join(result, p["name"] + ".json"))}
            say("evaluated", id, "in %.1f s:" % (time.time() - begin), took)

    def safely(self, what, *job):
        try:
            what(*job)
            return True
        except Deadline:
            say("out of time:", *job)
            self.late.append(job)
            return False
        except Exception as e:  # the others go on
            say("FAILED", *job, e)
        self.failed.append(job)
        return False

    def work(self, device, jobs):
        """Trains the jobs of one device, as many side by side as asked for; one more thread evaluates what is trained."""
        waiting, trained = queue.Queue(), queue.Queue()
        for job in jobs:
            waiting.put(job)

        def train():
            while True:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    return
                # What is cut off goes on from where it was, but starting costs some seconds.
                if time.time() + 15 > self.deadline:
                    say("no time for", *job)
                    self.late.append(job)
                elif self.safely(self.train, *job, device):
                    trained.put(job)

        def evaluate():
            while (job := trained.get()) is not None:
                self.safely(self.evaluate, *job, device)

        trainers = [threading.Thread(target=train) for _ in range(self.o.side_by_side)]
        evaluator = threading.Thread(target=evaluate)
        for t in [*trainers, evaluator]:
            t.start()
        for t in trainers:
            t.join()
        trained.put(None)
        evaluator.join()

    def bench(self):
        """Milliseconds of reading a prompt and of a decoded token, and bytes of state, of each model of the set, with nothing beside."""
        out = self.path("results", "bench")
        os.makedirs(out, exist_ok=True)
        device = self.o.devices.split(",")[0]
        where = "cuda" if device.startswith("cuda") else device
        for name in self.models["sets"]["core"]:
            file, _ = self.config(name, 0)
            shares = "0,10,25,100" if name.startswith("oryx") else "0"
            schedules = ["linear", "attention"] if name.startswith("oryx") else ["linear"]
            commands = [("prefill-" + name, ["oryx", "bench", "prefill", file, "--dtype", "bfloat16", "--device", where, "--lengths", self.o.bench_lengths, "--shares", shares,
                                             "--piece", "8192", "--repeat", "3"])]
            if name == "oryx-gdn":
                commands.append(("prefill-" + name + "-drop", commands[0][1][:commands[0][1].index("--shares")] + ["--shares", "0", "--kv", "drop", "--piece", "8192", "--repeat", "3"]))
            for s in schedules:
                fused = ["--fused"] if where == "cuda" else []
                commands.append(("decode-%s-%s" % (name, s), ["oryx", "bench", "decode", file, "--dtype", "bfloat16", "--device", where, "--schedule", s, "--contexts",
                                                              self.o.bench_lengths, "--tokens", "17", *fused]))
            for title, command in commands:
                to = os.path.join(out, title + ".json")
                if not os.path.exists(to):
                    self.safely(lambda *_: call([*command, "--json", to], self.path("logs", "bench.log"), self.deadline, device), "bench", title)
        say("timed")

    def weights(self, id):
        import torch
        raw = open(self.path("runs", id, "model", "model.safetensors"), "rb").read()
        size = int.from_bytes(raw[:8], "little")
        header, out, body = json.loads(raw[8:8 + size]), {}, bytearray()
        for name, t in header.items():
            if name == "__metadata__":
                continue
            begin, end = t["data_offsets"]
            x = torch.frombuffer(bytearray(raw[8 + size + begin:8 + size + end]), dtype=torch.float32).to(torch.bfloat16)
            data = x.view(torch.int16).numpy().tobytes()
            out[name] = {"dtype": "BF16", "shape": t["shape"], "data_offsets": [len(body), len(body) + len(data)]}
            body += data
        head = json.dumps(out).encode()
        head += b" " * (-len(head) % 8)
        whole = len(head).to_bytes(8, "little") + head + bytes(body)
        for k in range(0, len(whole), 15 << 20):
            open(self.path("%s.bf16.%d" % (id, k // (15 << 20))), "wb").write(whole[k:k + (15 << 20)])
        say("weights of", id, len(whole), "bytes")

    def collect(self):
        with tarfile.open(self.path("results.tar.xz"), "w:xz", preset=6) as t:
            t.add(self.path("results"), "results")
            t.add(self.path("logs"), "logs", filter=lambda i: i if i.size < 400000 else None)
        say("results in", self.path("results.tar.xz"), os.path.getsize(self.path("results.tar.xz")), "bytes")

    def run(self):
        o = self.o
        try:
            if not self.safely(lambda *_: self.data(), "data"):
                return 1
            names = [n for s in o.set.split(",") for n in (self.models["sets"][s] if s in self.models["sets"] else [s])]
            names = list(dict.fromkeys(names))
            devices = o.devices.split(",")
            seeds = [int(s) for s in o.seeds.split(",")]
            jobs = {d: [] for d in devices}
            for k, (name, seed) in enumerate([(n, s) for n in names for s in seeds]):
                jobs[devices[k % len(devices)]].append((name, seed))
            threads = [threading.Thread(target=self.work, args=(d, jobs[d])) for d in devices]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            if o.bench and not self.late:
                self.bench()
            for id in filter(None, o.weights.split(",") if not self.late else []):
                self.safely(lambda *_: self.weights(id), "weights", id)
        finally:
            self.collect()
        say("done; %d out of time, %d failed:" % (len(self.late), len(self.failed)), *self.late, *self.failed)
        return 1 if self.failed or self.late else 0


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--text", required=True)
    a.add_argument("--tasks", required=True)
    a.add_argument("--work", default="runs/paper")
    a.add_argument("--models", default=os.path.join(HERE, "models.json"))
    a.add_argument("--plan", default=os.path.join(HERE, "plan.json"))
    a.add_argument("--set", default="core", help="sets of models.json or single models, separated by commas")
    a.add_argument("--seeds", default="0,1")
    a.add_argument("--devices", default="cuda:0", help="cpu, or cuda:0,cuda:1")
    a.add_argument("--side-by-side", type=int, default=1, help="models that train on a device at a time: what small models leave of it, another takes")
    a.add_argument("--tokens", type=float, default=80e6, help="trained on, by each model")
    a.add_argument("--retrieval-megabytes", type=float, default=50, help="of documents by retrieval_text.py in the training text")
    a.add_argument("--mix", default="plain", help="kinds of retrieval documents, see retrieval_text.py: plain, dense (asks more often), questions (dense, and natural questions)")
    a.add_argument("--hay", default="", help="part of the names of the training files whose passages are hay")
    a.add_argument("--tokenizer", default="", help="default: one of 8192 pieces is trained on TEXT")
    a.add_argument("--override", action="append", default=[], help="key=value of every training config, model.KEY too")
    a.add_argument("--only", default="", help="tasks of the plan to run")
    a.add_argument("--weights", default="", help="runs whose weights are written as WORK/MODEL-seedN.bf16.0, .1, ...: one safetensors file in pieces of at most 15 MiB (needs torch)")
    a.add_argument("--bench", action="store_true", help="time the core models at the end")
    a.add_argument("--bench-lengths", default="2048,8192,32768,131072")
    a.add_argument("--seconds", type=float, default=1e9, help="stop and collect by then; the same command goes on")
    sys.exit(Experiment(a.parse_args()).run())


if __name__ == "__main__":
    main()
