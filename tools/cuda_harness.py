"""What the scripts that check and time CUDA kernels by ctypes share (attention_cuda.py, decode_cuda, gated_delta_cuda.py, kda_cuda.py, peers_cuda.py, ssd_cuda.py): errors, verdicts, times.

Errors are norms of the difference over norms, against float64. Times are medians of CUDA-event times: before each repetition 256 MB are overwritten (the L2) and the GPU
sleeps, so that what is timed has been queued when it begins.
"""
import ctypes
import importlib
import importlib.metadata
import statistics
import subprocess

import torch

DEV, BF, P = "cuda", torch.bfloat16, ctypes.c_void_p
_flushed = []


def error(found, expected, least=1e-30):
    """Norm of the difference over the norm of `expected` (at least `least`); NaN where anything found is not finite."""
    if found.shape != expected.shape:
        return float("inf")
    a, b = found.double(), expected.double()
    return ((a - b).norm() / b.norm().clamp_min(least)).item() if torch.isfinite(a).all() else float("nan")


class Verdicts:
    """Prints a line a case and remembers the failures."""

    def __init__(self):
        self.failed = []

    def __call__(self, name, ok, text=""):
        if not ok:
            self.failed.append(name)
        print("ok  " if ok else "FAIL", name, text, flush=True)

    def errors(self, name, found, limits, same=True):
        """found: name to error; limits: a number, or name to number. `same`: whether a second run gave the same bits."""
        limit = limits if isinstance(limits, dict) else dict.fromkeys(found, limits)
        ok = same and all(e < limit[n] for n, e in found.items())
        self(name, ok, " ".join(f"{n} {e:.1e}" for n, e in found.items()) + ("" if same else " bits differ"))

    def close(self):
        print("FAILED: " + ", ".join(self.failed) if self.failed else "all cases pass", flush=True)
        return 1 if self.failed else 0


def stream():
    return P(torch.cuda.current_stream().cuda_stream)


def launch(function, *arguments):
    """Calls a launcher that takes a stream last and returns a cudaError_t."""
    code = function(*arguments, stream())
    if code:
        raise RuntimeError(f"{function.__name__}: cudaError_t {code}")


def scratch(size, poison=True):
    x = torch.empty(max(16, size), dtype=torch.uint8, device=DEV)
    return x.fill_(255) if poison else x


def bench(fn, reps=15, warmup=3, flush=True, sleep=2_000_000):
    """Milliseconds. flush=False: for what cannot stay in the L2. sleep: cycles, longer than the launches of fn take the host."""
    for _ in range(warmup):
        fn()
    if flush and not _flushed:
        _flushed.append(torch.empty(256 << 20, dtype=torch.uint8, device=DEV))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(reps)]
    torch.cuda.synchronize()
    for a, b in events:
        if flush:
            _flushed[0].zero_()
        torch.cuda._sleep(sleep)
        a.record()
        fn()
        b.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in events)


def copy_rate(size=1 << 30):
    """Bytes read plus bytes written by a copy, in TB/s."""
    x = torch.randint(0, 255, (size,), dtype=torch.uint8, device=DEV)
    y = torch.empty_like(x)
    return 2 * size / bench(lambda: y.copy_(x), flush=False) / 1e9


def card():
    """One line on the card as it is now: with it a time can be told from one on a hotter or slower card."""
    try:
        found = subprocess.run(["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw", "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()
    except OSError:
        found = ""
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, driver, clocks, degrees, power: {found or 'nvidia-smi did not say'}"


def versions(packages):
    """Names and versions of the peers' packages; ends with one line where one is not installed."""
    try:
        return ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
    except importlib.metadata.PackageNotFoundError as e:
        raise SystemExit(f"--peers: {e.name} is not installed in this Python; the tool's head says how to get it") from None


def public(package, module, name):
    """What a public package's module calls `name`; ends with one line where the package, or something that it imports, is not installed."""
    versions([package])
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError) as e:
        raise SystemExit(f"--peers: {package} is installed but {module}.{name} does not load: {str(e).splitlines()[0]}; the tool's head says what it needs") from None


def chosen(text, known):
    """The names in an argument a,b,...; ends with one line where one is not known."""
    names = [x for x in text.split(",") if x]
    for name in names:
        if name not in known:
            raise SystemExit(f"--peers: found {name!r}, expected some of {', '.join(known)}")
    return names


def first_line(error):
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
