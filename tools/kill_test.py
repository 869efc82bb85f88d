#!/usr/bin/env python3
"""Kills a training run that saves after every step at random moments (SIGKILL), resumes it, and compares the end with a run never killed.

    tools/kill_test.py [--program build/cpu/oryx] [--kills 50] [--steps 40] [--seed 1] [--folder DIR]

After every kill each checkpoint in the run folder must be whole; each resume must find one; parameters, moments, trainer.json and the metrics'
losses must be those of the run that was not killed, bit for bit. A run that reaches its end is compared and a new one is started, until there
were enough kills. Exit code 0: all of it held. Set OMP_NUM_THREADS: bit-for-bit holds for one number of threads.
"""
import argparse
import json
import pathlib
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

OPTIONS = ["preset=tiny", "model.num_layers=1", "model.hidden_size=32", "model.head_dim=8", "model.intermediate_size=48", "seq_len=32",
           "batch_size=2", "chunk=8", "warmup_steps=2", "save_every=1", "log_every=1", "validate_every=0", "keep_checkpoints=2"]
FILES = ["config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.model", "trainer.json"]


def fail(message):
    sys.exit(f"kill_test: FAILED: {message}")


def run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        fail(f"{' '.join(command)}: exit code {result.returncode}: {result.stderr.strip()}")


def check_safetensors(path):
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    end = max((e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"), default=0)
    if size != 8 + length + end:
        fail(f"{path}: {size} bytes, its header says {8 + length + end}")


def check_whole(folder):
    """Every folder under a checkpoint's own name is whole. Returns their number."""
    checkpoints = [p for p in (folder / "checkpoints").glob("step-*") if p.suffix != ".partial"]
    for checkpoint in checkpoints:
        for name in FILES:
            if not (checkpoint / name).is_file():
                fail(f"{checkpoint}: lacks {name}")
        for name in ("model.safetensors", "optimizer.safetensors"):
            check_safetensors(checkpoint / name)
        if json.loads((checkpoint / "trainer.json").read_text())["step"] != int(checkpoint.name[len("step-"):]):
            fail(f"{checkpoint}: trainer.json is of another step")
    link = folder / "model"
    if link.is_symlink() and not (link / "trainer.json").is_file():
        fail(f"{link}: points to no checkpoint")
    return len(checkpoints)


def outcome(folder):
    """What must be the same: the last checkpoint's bytes, and the metrics but for the clock."""
    last = folder / "model"
    files = {name: (last / name).read_bytes() for name in FILES}
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in metrics:
        line.pop("tokens_per_second", None)
    return {"checkpoint": last.resolve().name, "files": files, "metrics": metrics, "entries": sorted(p.name for p in folder.iterdir())}


def compare(expected, found, folder):
    for key, value in expected.items():
        if found[key] != value:
            names = [n for n in FILES if found["files"][n] != expected["files"][n]] if key == "files" else found[key]
            fail(f"{folder}: {key} differ from the run that was not killed: {names}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="build/cpu/oryx")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", help="where to work, kept afterwards (default: a temporary folder)")
    a = parser.parse_args()
    work = pathlib.Path(a.folder or tempfile.mkdtemp(prefix="oryx-kill-"))
    work.mkdir(parents=True, exist_ok=True)
    draw = random.Random(a.seed)
    (work / "text.jsonl").write_text("".join(json.dumps({"text": f"Document {i} says that the state is {i * i}. " * 8}) + "\n" for i in range(60)))
    run([a.program, "data", "build", str(work / "text.jsonl"), "--tokenizer", "byte", "--out", str(work / "data"), "--valid", "0.1", "--overwrite"])

    def command(out):
        return [a.program, "train", *OPTIONS, f"steps={a.steps}", f"data={work / 'data'}", f"out={out}"]

    start = time.monotonic()
    run(command(work / "whole"))
    seconds = time.monotonic() - start
    expected = outcome(work / "whole")

    kills = resumes = finished = before_first = 0
    code = -signal.SIGKILL
    while kills < a.kills or code == -signal.SIGKILL:  # the last run that was killed is resumed to its end, too
        folder = work / f"killed-{finished}"
        resumes += bool(list((folder / "checkpoints").glob("step-*[0-9]")))
        process = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            # Enough kills behind: this one may end.
            process.wait(timeout=None if kills >= a.kills else draw.uniform(0, 0.7 * seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        code, errors = process.wait(), process.stderr.read()
        found = check_whole(folder) if folder.exists() else 0
        if code == -signal.SIGKILL:
            kills += 1
            before_first += found == 0
            continue
        if code != 0:
            fail(f"after {kills} kills: exit code {code}: {errors.strip()}")
        compare(expected, outcome(folder), folder)
        finished += 1
    print(f"{kills} kills, {before_first} of them before a first checkpoint; {resumes} starts found a checkpoint; {finished} runs of {a.steps} steps "
          f"reached their end, each bit-identical to the run that was not killed")
    if not a.folder:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
