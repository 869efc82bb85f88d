#!/usr/bin/env python3
"""Compares a float32 CPU training step of transformers' LlamaForCausalLM with `oryx bench step 130m-transformer`.

    tools/peer_venv.sh && .deps/peer-venv/bin/python tools/compare_llama_step.py [--rounds 5] [--json FILE]

Same shape (hidden 768, 12 layers, 12 heads, feed-forward 2048, vocabulary 32000, tied), same libtorch version, same threads. A step is
forward, loss, backward, clip_grad_norm_(1.0) and AdamW; of torch's forms of AdamW and attention the fastest is taken. The two programs
take turns (never at once), so that what else the machine does falls on both; ratios are those of the medians, of elapsed time and of
the processor's time in all threads (which moves less on a busy machine).
"""
import argparse, json, os, statistics, subprocess, sys, tempfile, time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--oryx", default="build/cpu/oryx", help="the program")
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--batch", type=int, default=2)
parser.add_argument("--seq-len", type=int, default=512)
parser.add_argument("--rounds", type=int, default=5, help="turns of each program")
parser.add_argument("--tries", type=int, default=2, help="timed steps of each form of AdamW and attention")
parser.add_argument("--repeat", type=int, default=3, help="timed steps of a turn")
parser.add_argument("--forms", default="fused+sdpa,foreach+sdpa,loop+sdpa,fused+eager", help="of AdamW and attention to choose from")
parser.add_argument("--schedule", default="random(attention=0.25;chunk=64)", help="of the Oryx model that is timed as well")
parser.add_argument("--json", help="write the results there too")
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import torch  # noqa: E402: after OMP_NUM_THREADS
import transformers  # noqa: E402

SHAPE = dict(vocab_size=32000, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12,
             intermediate_size=2048, tie_word_embeddings=True, max_position_embeddings=4096, rms_norm_eps=1e-6)


class Peer:
    """One model with its optimiser; both attentions share the weights."""

    def __init__(self):
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SHAPE, use_cache=False, attn_implementation="sdpa")
        self.model = transformers.LlamaForCausalLM(config).float().train()
        self.parameters = list(self.model.parameters())
        self.optimizer = None

    def use(self, adamw, attention):
        self.model.set_attn_implementation(attention)
        options = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}[adamw]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, **options)

    def step(self):
        ids = torch.randint(0, SHAPE["vocab_size"], (args.batch, args.seq_len))
        begin, cpu_begin = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        loss.item()
        return 1e3 * (time.perf_counter() - begin), 1e3 * (time.process_time() - cpu_begin)

    def times(self, count, warmup=1):
        for _ in range(warmup):
            self.step()
        return [self.step() for _ in range(count)]


def oryx_times(preset, schedule, count):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "step.json")
        subprocess.run([args.oryx, "bench", "step", preset, "--batch", str(args.batch), "--seq-len", str(args.seq_len), "--schedule", schedule,
                        "--warmup", "1", "--repeat", str(count), "--threads", str(args.threads), "--json", path],
                       check=True, stdout=subprocess.DEVNULL)
        with open(path) as f:
            result = json.load(f)
    return result["rows"][0], result["machine"]


def main():
    peer = Peer()
    count = sum(p.numel() for p in {id(p): p for p in peer.parameters}.values())
    forms = {}
    for adamw, attention in (form.split("+") for form in args.forms.split(",")):
        peer.use(adamw, attention)
        forms[adamw, attention] = min(peer.times(args.tries))[0]
    best = min(forms, key=forms.get)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.threads} threads, load {os.getloadavg()[0]:.1f}")
    print("transformers, ms: " + ", ".join(f"{a} AdamW with {m} {t:.0f}" for (a, m), t in forms.items()) + f"; taken: {best[0]} with {best[1]}")
    peer.use(*best)

    times = {"transformers": [], "oryx transformer": [], "oryx 1:3": []}
    for turn in range(args.rounds):
        times["transformers"] += peer.times(args.repeat)
        for name, preset, schedule in [("oryx transformer", "130m-transformer", "linear"), ("oryx 1:3", "130m", args.schedule)]:
            row, machine = oryx_times(preset, schedule, args.repeat)
            if preset == "130m-transformer" and row["parameters"] != count:
                sys.exit(f"the models differ: {row['parameters']} parameters in 130m-transformer, {count} in transformers")
            times[name] += zip(row["all_ms"], row["all_cpu_ms"])
        turn_medians = {n: statistics.median(x[0] for x in t[-args.repeat:]) for n, t in times.items()}
        print(f"turn {turn + 1}: " + ", ".join(f"{n} {t:.0f} ms" for n, t in turn_medians.items()), flush=True)

    ratios = {}
    for i, kind in enumerate(["time", "processor time"]):
        medians = {n: statistics.median(x[i] for x in t) for n, t in times.items()}
        for name, t in times.items():
            print(f"{name:18} {kind}: median {medians[name]:8.1f} ms, least {min(x[i] for x in t):8.1f} ms")
        ratios[kind] = {"oryx transformer / transformers": medians["oryx transformer"] / medians["transformers"],
                        "oryx 1:3 / oryx transformer": medians["oryx 1:3"] / medians["oryx transformer"]}
        print(f"{kind}: " + ", ".join(f"{n} {r:.3f}" for n, r in ratios[kind].items()))
    print(f"{count} parameters in both transformers; load {os.getloadavg()[0]:.1f}")
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"machine": machine, "torch": torch.__version__, "transformers": transformers.__version__, "load": os.getloadavg(),
                       "parameters": count, "forms_ms": {f"{a} {m}": t for (a, m), t in forms.items()}, "taken": best, "times_ms": times,
                       "ratios": ratios}, f, indent=2)


if __name__ == "__main__":
    main()
