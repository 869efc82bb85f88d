"""Checks and times the Hopper kernels of the gated delta rule (oryx/ops/gated_delta/cuda) without the rest of the library.

    nvcc -std=c++20 -shared -Xcompiler -fPIC -gencode=arch=compute_90a,code=sm_90a -O3 -I. oryx/ops/gated_delta/cuda/*.cu -o gated_delta.so
    python3 tools/gated_delta_cuda.py ./gated_delta.so [--peers flash_qla,fla]

Needs torch with CUDA on an H100 or H200. The check compares with the recurrence in float64 (norm of the difference over norm, limit 1e-2,
outputs poisoned with NaN, every case run twice for equal bits) and exits 1 when a case fails. Times are medians of CUDA-event times over
random data; before each repetition 256 MB are overwritten (the L2) and the GPU sleeps, so that launches are queued.
"""
import argparse
import ctypes
import statistics
import sys

import torch
import torch.nn.functional as F

DEV, BF, P = "cuda", torch.bfloat16, ctypes.c_void_p
POINTERS = "q k v g beta initial_state cu_seqlens wanted o final_state".split()
SIZES = "B T N Hq Hk Hv segments rows".split()


class Arguments(ctypes.Structure):  # struct OryxGatedDelta
    _fields_ = [(n, P) for n in POINTERS] + [(n, ctypes.c_int32) for n in SIZES] + [("scale", ctypes.c_float), ("l2_eps", ctypes.c_float)]


def load(path):
    lib = ctypes.CDLL(path)
    lib.oryx_gated_delta_workspace.restype = ctypes.c_size_t
    lib.oryx_gated_delta_workspace.argtypes = [P]
    lib.oryx_gated_delta_forward.argtypes = [P, P, P]
    return lib


def prepare(lib, q, k, v, g, beta, init=None, cu=None, wanted=None, final=True, segments=0, rows=0, poison=True):
    """A function that runs the forward pass, and its outputs."""
    B, T, Hq, _ = q.shape
    Hk, Hv = k.shape[2], v.shape[2]
    Hs = max(Hk, Hv)
    N = B if cu is None else len(cu) - 1
    o = torch.empty(B, T, max(Hq, Hs), 128, dtype=BF, device=DEV)
    S = torch.empty(N, Hs, 128, 128, device=DEV) if final else None
    if poison:
        o.fill_(float("nan"))
        if final:
            S.fill_(float("nan"))
    tensors = [q, k, v, g, beta, init, cu, wanted, o, S]
    a = Arguments(*[None if x is None else x.data_ptr() for x in tensors], B, T, N, Hq, Hk, Hv, segments, rows, 0.0, 1e-6)
    scratch = torch.empty(max(16, lib.oryx_gated_delta_workspace(ctypes.byref(a))), dtype=torch.uint8, device=DEV)
    if poison:
        scratch.fill_(255)
    tensors.append(scratch)

    def run():
        rc = lib.oryx_gated_delta_forward(ctypes.byref(a), tensors[-1].data_ptr(), torch.cuda.current_stream().cuda_stream)
        if rc:
            raise RuntimeError(f"cudaError_t {rc}")
    return run, o, S


def call(lib, *x, **kw):
    run, o, S = prepare(lib, *x, **kw)
    run()
    torch.cuda.synchronize()
    return o, S


def reference(q, k, v, g, beta, init=None, cu=None, wanted=None):
    """The recurrence, token by token, in float64."""
    B, T, Hq, K = q.shape
    Hk, Hv = k.shape[2], v.shape[2]
    Hs = max(Hk, Hv)
    Ho = max(Hq, Hs)
    N = B if cu is None else len(cu) - 1

    def normalise(x):
        return x * (x.square().sum(-1, True) + 1e-6).rsqrt()
    q = normalise(q.double()).repeat_interleave(Ho // Hq, 2) * K**-0.5
    k = normalise(k.double()).repeat_interleave(Hs // Hk, 2)
    v, g, beta = v.double().repeat_interleave(Hs // Hv, 2), g.double(), beta.double()
    S0 = torch.zeros(N, Hs, 128, 128, dtype=torch.float64, device=DEV) if init is None else init.double()

    def recur(q, k, v, g, b, S):
        o = torch.empty_like(q)
        for t in range(q.shape[1]):
            S = S * g[:, t].exp()[..., None, None]
            r = v[:, t] - (S @ k[:, t][..., None])[..., 0]
            S = S + (b[:, t][..., None] * r)[..., None] * k[:, t][..., None, :]
            o[:, t] = (S.repeat_interleave(Ho // Hs, 1) @ q[:, t][..., None])[..., 0]
        return o, S
    if cu is None:
        o, S = recur(q, k, v, g, beta, S0)
    else:
        c, parts = cu.tolist(), []
        for n in range(N):
            s = slice(c[n], c[n + 1])
            parts.append(recur(q[:, s], k[:, s], v[:, s], g[:, s], beta[:, s], S0[n:n + 1]))
        o, S = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 0)
    if wanted is not None:
        o = o * (wanted != 0)[..., None, None]
    return o, S


def error(a, b):
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item() if torch.isfinite(a).all() else float("nan")


def inputs(B, T, Hq, Hk, Hv, decay=1.0):
    def r(*s):
        return torch.randn(*s, device=DEV)
    Hs = max(Hk, Hv)
    return [*(r(B, T, h, 128).to(BF) for h in (Hq, Hk, Hv)), -F.softplus(r(B, T, Hs) - 3.0) * decay, torch.sigmoid(r(B, T, Hs))]


def check(lib):
    failed = []

    def verdict(name, ok, text=""):
        if not ok:
            failed.append(name)
        print("ok  " if ok else "FAIL", name, text, flush=True)

    def one(name, x, **kw):
        o, S = call(lib, *x, **kw)
        ro, rs = reference(*x, **{a: b for a, b in kw.items() if a in ("init", "cu", "wanted")})
        o2, S2 = call(lib, *x, **kw)
        e, same = (error(o, ro), error(S, rs)), torch.equal(o, o2) and torch.equal(S, S2)
        verdict(name, max(e) < 1e-2 and e[0] == e[0] and same, f"o {e[0]:.2e} S {e[1]:.2e}{'' if same else ' bits differ'}")

    def state(n):
        return torch.randn(n, 2, 128, 128, device=DEV)
    for T in (64, 1, 63, 65, 200, 1000):
        one(f"T{T}", inputs(2, T, 2, 2, 2))
    for rows in (64, 128):
        one(f"rows {rows}", inputs(2, 200, 2, 2, 2), rows=rows)
    one("initial state", inputs(2, 130, 2, 2, 2), init=state(2))
    for s in (2, 3, 4, 5, 8):
        one(f"{s} segments", inputs(2, 1000, 2, 2, 2, 0.1), segments=s, rows=64 * (1 + s % 2), init=state(2))
    one("more segments than chunks", inputs(1, 70, 2, 2, 2), segments=3)
    one("Hv > Hk", inputs(2, 150, 2, 2, 4))
    one("Hq > Hs", inputs(2, 150, 8, 2, 2), segments=2)
    one("Hq < Hs", inputs(2, 150, 2, 4, 4))
    one("Hk > Hv", inputs(1, 150, 4, 4, 2), segments=3)
    lens = [1, 64, 130, 0, 5, 300, 128]
    cu = torch.tensor([0] + torch.tensor(lens).cumsum(0).tolist(), dtype=torch.int32, device=DEV)
    x = inputs(1, sum(lens), 2, 2, 2)
    init = state(len(lens))
    one("packed", x, cu=cu, init=init)
    one("packed, 3 segments", x, cu=cu, init=init, segments=3)
    one("wanted", x, cu=cu, init=init, wanted=(torch.rand(1, sum(lens), device=DEV) > 0.6).to(torch.uint8))
    decays = dict(zero=lambda g: g * 0, strong=lambda g: g * 1e4, huge=lambda g: torch.where(torch.rand_like(g) < 0.1, -1e9, g),
                  infinite=lambda g: torch.where(torch.rand_like(g) < 0.1, float("-inf"), g))
    for name, f in decays.items():
        x = inputs(2, 333, 2, 2, 2)
        x[3] = f(x[3])
        one(f"decay {name}", x, init=state(2))
        one(f"decay {name}, 2 segments", x, segments=2, init=state(2))
    x = inputs(2, 100, 2, 2, 2)
    for t in x:
        t[1] = float("nan")
    o, S = call(lib, *x)
    ro, rs = reference(*[t[:1] for t in x])
    verdict("a neighbour of NaN", error(o[:1], ro) < 1e-2 and error(S[:1], rs) < 1e-2)
    x = inputs(2, 100, 2, 2, 2)
    x[3][0, 50, 0] = float("nan")
    o, S = call(lib, *x)
    verdict("NaN in, NaN out", bool(torch.isnan(o[0, 50:, 0]).all() and torch.isnan(S[0, 0]).all()))
    return failed


def bench(fn, reps=20):
    for _ in range(3):
        fn()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEV)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(reps)]
    torch.cuda.synchronize()
    for a, b in events:
        flush.zero_()
        torch.cuda._sleep(16_000_000)
        a.record()
        fn()
        b.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in events)


def times(lib, peers):
    x = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device=DEV)
    y = torch.empty_like(x)
    copy = 2 * x.numel() / bench(lambda: y.copy_(x)) / 1e9
    del x, y
    print(f"{torch.cuda.get_device_name()}, copy {copy:.2f} TB/s (floor: q, k, v, o once)")
    for B, T in ((4, 8192), (1, 32768), (8, 2048)):
        for decay in (1.0, 1e-3):
            x = inputs(B, T, 16, 16, 16, decay)
            run, o, _ = prepare(lib, *x, final=False, poison=False)
            row = f"B{B} T{T} H16, decay x {decay:g}: floor {4 * B * T * 16 * 256 / copy / 1e9:.4f} ms, ours {bench(run):.4f}"
            q, k = (F.normalize(t.float(), dim=-1).to(BF) for t in x[:2])
            bb = x[4].to(BF)
            for peer in peers:
                if peer == "flash_qla":
                    from flash_qla import chunk_gated_delta_rule as op
                else:
                    import os
                    os.environ["FLA_FLASH_QLA"] = "0"
                    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as op
                with torch.no_grad():
                    ms = bench(lambda: op(q, k, x[2], x[3], bb))  # noqa: B023
                    run()
                    row += f", {peer} {ms:.4f} (differs by {error(o, op(q, k, x[2], x[3], bb)[0]):.1e})"
            print(row, flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("library")
    p.add_argument("--peers", default="")
    args = p.parse_args()
    library = load(args.library)
    bad = check(library)
    print("FAILED: " + ", ".join(bad) if bad else "all cases pass", flush=True)
    if bad:
        sys.exit(1)
    times(library, [x for x in args.peers.split(",") if x])
