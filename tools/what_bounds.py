#!/usr/bin/env python3
"""What bounds each CUDA kernel, in Nsight Compute's words: one line a kernel, over a training step or decoding as users run it.

    python3 tools/what_bounds.py --oryx build/cuda/oryx [--only gdn,mamba2,decode] [--limit SECONDS] [--csv DIR]      (ncu in the PATH, a GPU whose counters may be read)

Each case is one `oryx bench` command with few layers of the real shapes, under ncu; only kernels of this project are profiled, each launch by itself with cold caches, at the clocks
as found (times differ from those of the benchmark pages; shares are what to read). Launches of one kernel with the same grid are averaged. Columns: share of the DRAM's peak
rate, of the tensor units' cycles, of the issue slots, of the peaks of L1 with shared memory and of L2; warps that are resident, of those that fit; registers a thread; the reason
for which a warp waits most. Verdict: what is at 75% of its peak or more; "nearly" from 60%; else the wait.
"""
import argparse
import csv
import functools
import json
import os
import re
import subprocess
import sys
import tempfile

CASES = {
    "gdn": ["bench", "step", {"preset": "1.4b-oryx-gdn", "model": {"num_layers": 1, "intermediate_size": 4992, "tie_word_embeddings": False}}, "--schedule",
            "random(attention=0.25;chunk=256)", "--batch", "2", "--seq", "8192", "--no-cuda-graph", "--warmup", "0", "--repeat", "1"],
    "mamba2": ["bench", "step", {"preset": "1.4b-mamba2", "model": {"num_layers": 1}}, "--schedule", "linear", "--batch", "2", "--seq", "8192", "--no-cuda-graph", "--warmup", "0",
               "--repeat", "1"],
    "decode": ["bench", "decode", {"preset": "1.4b", "model": {"num_layers": 2}}, "--contexts", "4096", "--tokens", "4"],
    "decode64": ["bench", "decode", {"preset": "1.4b", "model": {"num_layers": 2}}, "--contexts", "1024", "--tokens", "4", "--batch", "64"],
    "grouped": ["bench", "step", {"preset": "1.4b-oryx-gdn", "model": {"num_layers": 1, "num_kv_heads": 4, "intermediate_size": 4992, "tie_word_embeddings": False}}, "--schedule",
                "random(attention=0.25;chunk=256)", "--batch", "2", "--seq", "8192", "--no-cuda-graph", "--warmup", "0", "--repeat", "1"],
    "prefill": ["bench", "prefill", {"preset": "1.4b", "model": {"num_layers": 2}}, "--lengths", "16384", "--shares", "10", "--piece", "8192", "--repeat", "1"],
    "decode-130m": ["bench", "decode", "130m", "--contexts", "1024", "--tokens", "4", "--schedule", "linear"],
    "decode-130m-attention": ["bench", "decode", "130m", "--contexts", "4096", "--tokens", "4", "--schedule", "attention"],
    "decode-130m-mamba2": ["bench", "decode", "130m-mamba2", "--contexts", "1024", "--tokens", "4"],
    "decode-130m-kda": ["bench", "decode", "130m-kda", "--contexts", "1024", "--tokens", "4"],
    "decode-attention": ["bench", "decode", {"preset": "1.4b", "model": {"num_layers": 2}}, "--contexts", "32768", "--tokens", "4", "--schedule", "attention"],
}
SHARES = {
    "DRAM": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor units": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "issue slots": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "L1 and shared": "l1tex__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
}
TIME, REGISTERS, WARPS = "gpu__time_duration.sum", "launch__registers_per_thread", "sm__warps_active.avg.pct_of_peak_sustained_active"
WAITS = {w: f"smsp__average_warps_issue_stalled_{w}_per_issue_active.ratio" for w in
         "long_scoreboard short_scoreboard wait barrier math_pipe_throttle mio_throttle lg_throttle membar sleeping gmma not_selected".split()}
WORDS = dict(long_scoreboard="loads from memory", short_scoreboard="loads from shared memory", wait="fixed latencies", barrier="barriers", math_pipe_throttle="arithmetic units",
             mio_throttle="the shared memory's queue", lg_throttle="the queue of loads", membar="fences", sleeping="sleep (polling)", gmma="products of the tensor units", not_selected="other warps")
MICRO = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0, "msecond": 1e3, "ms": 1e3, "second": 1e6, "s": 1e6}


def short(name):
    """oryx::gated_delta_cuda::<unnamed>::recurrence_kernel<128, false>(...) -> gated_delta: recurrence_kernel<128, false>; ncu drops some of the namespaces."""
    name = re.sub(r"\(anonymous namespace\)::|<?unnamed>::|\boryx::|^void ", "", name)
    head, depth = "", 0
    for c in name:  # up to the argument list
        if c == "(" and depth == 0:
            break
        depth += (c == "<") - (c == ">")
        head += c
    room, _, kernel = head.replace("__nv_bfloat16", "bf16").replace("(bool)", "").replace("(int)", "").rpartition("::")
    room = room.removeprefix("ops").removeprefix("::").removesuffix("_cuda").removesuffix("cuda")
    return f"{room}: {kernel}" if room else kernel


def read(text):
    """ncu's raw page as CSV -> (kernel, grid) to its launches, each a dict of floats; the row behind the head holds units."""
    rows = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    if len(rows) < 3:
        return {}
    head, units, kernels = rows[0], rows[1], {}
    for row in rows[2:]:
        cells = dict(zip(head, row))
        launch = {}
        for metric in [TIME, REGISTERS, WARPS, *SHARES.values(), *WAITS.values()]:
            try:
                launch[metric] = float(cells.get(metric, "").replace(",", ""))
            except ValueError:
                continue  # this chip has no such counter
        launch[TIME] *= MICRO.get(units[head.index(TIME)], 1.0)
        kernels.setdefault((short(cells["Kernel Name"]), cells.get("Grid Size", "")), []).append(launch)
    return kernels


def verdict(mean):
    shares = {n: mean[m] for n, m in SHARES.items() if m in mean}
    most = max(shares, key=shares.get)
    waits = {w: mean[m] for w, m in WAITS.items() if m in mean}
    wait = WORDS[max(waits, key=waits.get)] if waits else "?"
    if shares[most] >= 75:
        return most, wait
    return (f"nearly {most}" if shares[most] >= 60 else f"waits for {wait}"), wait


def table(name, kernels, least):
    """least: microseconds; launches shorter than that are left out."""
    print(f"\n### {name}\n\n| kernel | grid | launches | us | " + " | ".join(SHARES) + " | warps | registers | waits most for | bound by |\n|" + " --- |" * (8 + len(SHARES)))
    for (kernel, grid), launches in sorted(kernels.items(), key=lambda item: -sum(x[TIME] for x in item[1])):
        mean = {m: sum(x[m] for x in launches) / len(launches) for m in launches[0]}
        if mean[TIME] < least:
            continue
        bound, wait = verdict(mean)
        percent = " | ".join(f"{mean[m]:.0f}%" if m in mean else "" for m in SHARES.values())
        print(f"| `{kernel}` | {grid.replace(' ', '')} | {len(launches)} | {mean[TIME]:.1f} | {percent} | {mean.get(WARPS, 0):.0f}% | {mean.get(REGISTERS, 0):.0f} | {wait} | {bound} |")


@functools.cache
def known():
    """The counters that this chip has, of those that are wanted: ncu refuses the whole list for an unknown one."""
    wanted = [TIME, REGISTERS, WARPS, *SHARES.values(), *WAITS.values()]
    listed = subprocess.run(["ncu", "--query-metrics"], capture_output=True, text=True, check=False).stdout
    names = {line.split()[0] for line in listed.splitlines() if line.strip()}
    return [m for m in wanted if m.startswith("launch__") or m.split(".")[0] in names] or wanted


def run(case, arguments, args):
    with tempfile.TemporaryDirectory() as folder:
        config = os.path.join(folder, "model.json")
        command = [args.oryx]
        for a in arguments:
            if isinstance(a, dict):
                with open(config, "w") as f:
                    json.dump(a, f)
                a = config
            command.append(a)
        command += ["--dtype", "bfloat16", "--device", "cuda"]
        print(f"{case}: {' '.join(command)}", file=sys.stderr, flush=True)
        try:
            metrics = known()
            ncu = ["ncu", "--csv", "--page", "raw", "--clock-control", "none", "--metrics", ",".join(metrics), "--kernel-name-base", "demangled", "--kernel-name",
                   "regex:oryx::decode|step_kernel" if case.startswith("decode") else "regex:oryx::", "--launch-count", str(args.launches)]
            done = subprocess.run(ncu + command, capture_output=True, text=True, timeout=args.limit)
        except FileNotFoundError as e:
            sys.exit(f"what_bounds: {e.filename} was not found: ncu is part of the CUDA toolkit, --oryx names the program of a `cuda` build")
        except subprocess.TimeoutExpired:
            print(f"{case}: not done within {args.limit} s (--limit)", file=sys.stderr)
            return False
    if args.csv:
        os.makedirs(args.csv, exist_ok=True)
        with open(os.path.join(args.csv, case + ".csv"), "w") as f:
            f.write(done.stdout)
    kernels = read(done.stdout)
    if not kernels:
        print(f"{case}: no kernels profiled (exit {done.returncode}): " + " / ".join((done.stdout + done.stderr).strip().splitlines()[-3:]), file=sys.stderr)
        return False
    table(case, kernels, args.least)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oryx", default="oryx", help="the program of a `cuda` build")
    parser.add_argument("--only", default=",".join(CASES), help="some of them")
    parser.add_argument("--launches", type=int, default=120, help="profile at most so many kernels a case")
    parser.add_argument("--limit", type=float, default=120, help="seconds a case may take")
    parser.add_argument("--least", type=float, default=0, help="leave out kernels that take fewer microseconds")
    parser.add_argument("--csv", default="", help="keep ncu's raw pages in this folder")
    args = parser.parse_args()
    unknown = [c for c in args.only.split(",") if c not in CASES]
    if unknown:
        sys.exit(f"what_bounds: --only: '{unknown[0]}' is not a case (expected some of {', '.join(CASES)})")
    return 0 if all([run(c, CASES[c], args) for c in args.only.split(",")]) else 1


if __name__ == "__main__":
    sys.exit(main())
