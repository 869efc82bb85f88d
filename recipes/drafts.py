#!/usr/bin/env python3
"""What share of drafts is accepted: texts written in attention and drafted in linear mode (docs/results/2026-11-26-speculative.md).

    recipes/drafts.py --text TEXT.jsonl[.zst] --out drafts.json MODEL...

Of each of --texts long documents the first tokens are a prompt, of each of --prompts tokens (about: by characters); --new tokens follow, greedy and sampled, each text with and without drafts, which must be the same.
"""
import argparse
import json
import subprocess
import sys
import tempfile

SAMPLING = {"greedy": [], "0.8, top-p 0.95": ["--temperature", "0.8", "--top-p", "0.95"], "1": ["--temperature", "1"]}


def documents(path):
    raw = subprocess.run(["zstd", "-dc", path], capture_output=True, check=True).stdout if path.endswith(".zst") else open(path, "rb").read()
    return [json.loads(line)["text"] for line in raw.decode().splitlines()]


def generate(model, prompt, options):
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(prompt)
        file.flush()
        return json.loads(subprocess.run(["oryx", "generate", model, "--prompt-file", file.name, "--schedule", "attention", "--json", *options], capture_output=True, text=True, check=True).stdout)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="+", metavar="MODEL")
    p.add_argument("--text", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--prompts", default="128,512,2048")
    p.add_argument("--texts", type=int, default=6)
    p.add_argument("--new", type=int, default=96)
    p.add_argument("--draft-tokens", default="4")
    a = p.parse_args()
    docs, rows = documents(a.text), []
    for model in a.models:
        for tokens in map(int, a.prompts.split(",")):
            characters = tokens * 4
            texts = [d for d in docs if len(d) > characters + 400][: a.texts]
            for name, sampling in SAMPLING.items():
                sums, prompts, same = {}, 0, 0
                for i, text in enumerate(texts):
                    options = ["--max-new-tokens", str(a.new), "--seed", str(i), *sampling]
                    drafted = generate(model, text[:characters], options + ["--draft", "linear", "--draft-tokens", a.draft_tokens, "--no-draft-adapt"])
                    same += generate(model, text[:characters], options + ["--race"])["ids"] == drafted["ids"]
                    prompts += drafted["stats"]["prompt_tokens"]
                    for key in ("drafted", "tested", "accepted", "passes"):
                        sums[key] = sums.get(key, 0) + drafted["stats"]["draft"][key]
                rows.append({"model": model, "prompt": prompts / max(1, len(texts)), "sampling": name, "texts": len(texts), "same": same, **sums})
                r = rows[-1]
                print(f"{model} | {r['prompt']:.0f} | {name} | {r['accepted'] / max(1, r['tested']):.3f} of {r['tested']} | {1 + r['accepted'] / max(1, r['passes']):.2f} tokens a pass | same {same} of {len(texts)}", flush=True)
                json.dump(rows, open(a.out, "w"), indent=1)
    return 0 if all(r["same"] == r["texts"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
