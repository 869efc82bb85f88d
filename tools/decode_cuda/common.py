"""What the checks and times of the decoding kernels share: the library, reports, times."""
import argparse
import ctypes as C
import time

import torch

ap = argparse.ArgumentParser(description="The decoding kernels alone, by ctypes.")
ap.add_argument("library")
ap.add_argument("--only", default="step,attention,model,batch", help="some of them")
ap.add_argument("--no-checks", action="store_true")
ap.add_argument("--no-times", action="store_true")
ap.add_argument("--peers", default="", help="fla,mamba_ssm: their one-token steps in turns with ours (pip install flash-linear-attention==0.6.0; mamba_ssm 2.3.2.post1, its Triton part)")
ap.add_argument("--layers", type=int, default=24)
args = ap.parse_args()
lib = C.CDLL(args.library)
DEV, BF, F32, F64 = "cuda", torch.bfloat16, torch.float32, torch.float64
SEED = int(time.time())
torch.manual_seed(SEED)
print("seed", SEED, torch.cuda.get_device_name(), torch.__version__, flush=True)
failures = []


def p(t):
    return C.c_void_p(t.data_ptr() if t is not None else 0)


def stream():
    return C.c_void_p(torch.cuda.current_stream().cuda_stream)


def ok(code):
    if code:
        raise RuntimeError(f"cudaError {code}")


def report(name, x, ref, limit):
    e = ((x.double() - ref.double()).norm() / ref.double().norm().clamp_min(1e-30)).item()
    good = e <= limit and x.shape == ref.shape
    if not good:
        failures.append(name)
    print(f"  {'ok  ' if good else 'FAIL'} {name}: {e:.2e}", flush=True)


def expect(good, name):
    if not good:
        failures.append(name)
    print(f"  {'ok  ' if good else 'FAIL'} {name}", flush=True)


SCRATCH = torch.empty(256 << 20, dtype=torch.uint8, device=DEV)


def median_ms(f, reps=20, flush=True):
    f()
    times = []
    for _ in range(reps):
        if flush:
            SCRATCH.zero_()
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(400_000)
        a.record()
        f()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b))
    return sorted(times)[len(times) // 2]


def copy_rate():
    x = torch.empty(1 << 30, dtype=torch.uint8, device=DEV)
    y = torch.empty_like(x)
    return 2 * x.numel() / median_ms(lambda: y.copy_(x), flush=False) / 1e9  # TB/s


COPY = None if args.no_times else copy_rate()  # of memory that nobody wrote, which initcheck would report
if COPY:
    print(f"copy {COPY:.3f} TB/s", flush=True)


def show(name, ms, nbytes):
    rate = nbytes / ms / 1e9
    print(f"  {name}: {ms * 1e3:.1f} us, {rate:.3f} TB/s, {100 * rate / COPY:.1f}% of the copy", flush=True)


def spread(x, heads):
    return x.repeat_interleave(heads // x.shape[1], 1)


def rope_table(n, width, theta=10000.0):
    w = theta ** (-torch.arange(0, width, 2, dtype=F64, device=DEV) / width)
    a = torch.arange(n, dtype=F64, device=DEV)[:, None] * w
    return torch.stack([a.cos(), a.sin()], 1).to(F32).contiguous()
