"""Checks and times the Hopper kernels of the gated delta rule (oryx/ops/gated_delta/cuda) without the rest of the library.

    nvcc -std=c++20 -I. -shared -Xcompiler -fPIC -gencode=arch=compute_90a,code=sm_90a -O3 -I. oryx/ops/gated_delta/cuda/*.cu -o gated_delta.so
    python3 tools/gated_delta_cuda.py ./gated_delta.so [--peers flash_qla,fla] [--profile] [--times-only]

The program's own library (build/cuda/liboryx.so) holds the same kernels and serves as well.
--peers times public kernels in turns with ours at each shape, so that ratios are of one run: `pip install flash-linear-attention==0.6.0 flash-qla==0.1.3` (the
first with tilelang, which compiles kernels when they are first called: minutes, unless TILELANG_CACHE_DIR and TRITON_CACHE_DIR name filled caches).
Needs torch with CUDA on an H100 or H200. The check compares with the recurrence in float64 and its gradients by autograd (norm of the
difference over norm, limit 1e-2, gradients 2e-2; outputs poisoned with NaN, every case run twice for equal bits) and exits 1 when a case fails. Times are medians of CUDA-event times over
random data; before each repetition 256 MB are overwritten (the L2) and the GPU sleeps, so that launches are queued.
"""
import argparse
import ctypes
import os
import sys

import torch
import torch.nn.functional as F

from cuda_harness import BF, DEV, P, Verdicts, bench, card, chosen, copy_rate, error, first_line, public, scratch, versions
from delta_rule import call, reference

SLEEP = 16_000_000  # the peers' launches take the host longer
POINTERS = "q k v g beta initial_state cu_seqlens wanted o final_state saved".split()
GRADIENTS = "d_o d_final_state d_q d_k d_v d_g d_beta d_initial_state".split()
SIZES = "B T N Hq Hk Hv D segments rows".split()


class Arguments(ctypes.Structure):  # struct OryxGatedDelta
    _fields_ = [(n, P) for n in POINTERS] + [(n, ctypes.c_int32) for n in SIZES] + [("scale", ctypes.c_float), ("l2_eps", ctypes.c_float)]


class Gradients(ctypes.Structure):  # struct OryxGatedDeltaGradients
    _fields_ = [(n, P) for n in GRADIENTS]


def load(path):
    lib = ctypes.CDLL(path)
    for name in ("workspace", "saved", "backward_workspace"):
        f = getattr(lib, "oryx_gated_delta_" + name)
        f.restype, f.argtypes = ctypes.c_size_t, [P]
    lib.oryx_gated_delta_forward.argtypes = [P, P, P]
    lib.oryx_gated_delta_backward.argtypes = [P, P, P, P]
    return lib


def prepare(lib, q, k, v, g, beta, init=None, cu=None, wanted=None, up=None, final=True, segments=0, rows=0, poison=True):
    """Functions that run the forward and backward passes, and their outputs. up: gradients of o and of the final state (or None)."""
    B, T, Hq, D = q.shape
    Hk, Hv = k.shape[2], v.shape[2]
    Hs = max(Hk, Hv)
    N = B if cu is None else len(cu) - 1
    o = torch.empty(B, T, max(Hq, Hs), D, dtype=BF, device=DEV)
    S = torch.empty(N, Hs, D, D, device=DEV) if final else None
    d = [*(torch.empty_like(x) for x in (q, k, v, g, beta)), None if init is None else torch.empty_like(init)] if up else []
    if poison:
        for x in [o, S, *d]:
            if x is not None:
                x.fill_(float("nan"))
    tensors = [q, k, v, g, beta, init, cu, wanted, o, S, None]
    size = (B, T, N, Hq, Hk, Hv, D, segments, rows, 0.0, 1e-6)
    a = Arguments(*[None if x is None else x.data_ptr() for x in tensors], *size)
    if up:
        tensors[-1] = scratch(lib.oryx_gated_delta_saved(ctypes.byref(a)), poison)
        a.saved = tensors[-1].data_ptr()
    tensors.append(scratch(lib.oryx_gated_delta_workspace(ctypes.byref(a)), poison))

    def forward():
        rc = lib.oryx_gated_delta_forward(ctypes.byref(a), tensors[-1].data_ptr(), torch.cuda.current_stream().cuda_stream)
        if rc:
            raise RuntimeError(f"cudaError_t {rc}")
    if not up:
        return forward, None, o, S, d
    work = scratch(lib.oryx_gated_delta_backward_workspace(ctypes.byref(a)), poison)
    b = Gradients(*[None if x is None else x.data_ptr() for x in [*up, *d]])

    def backward():
        rc = lib.oryx_gated_delta_backward(ctypes.byref(a), ctypes.byref(b), work.data_ptr(), torch.cuda.current_stream().cuda_stream)
        if rc:
            raise RuntimeError(f"cudaError_t {rc}")
    return forward, backward, o, S, d


def inputs(B, T, Hq, Hk, Hv, decay=1.0, D=128):
    def r(*s):
        return torch.randn(*s, device=DEV)
    Hs = max(Hk, Hv)
    return [*(r(B, T, h, D).to(BF) for h in (Hq, Hk, Hv)), -F.softplus(r(B, T, Hs) - 3.0) * decay, torch.sigmoid(r(B, T, Hs))]


def check(lib):
    verdict = Verdicts()

    def one(name, x, up=(True, True), **kw):
        """Forward alone, then forward and backward; up: whether o and the final state have a gradient."""
        B, T, Hs = x[3].shape
        D = x[0].shape[3]
        N = B if kw.get("cu") is None else len(kw["cu"]) - 1
        shapes = ((B, T, max(x[0].shape[2], Hs), D), BF), ((N, Hs, D, D), torch.float32)
        up = [torch.randn(s, device=DEV).to(t) if u else None for (s, t), u in zip(shapes, up)]
        r = reference(*x, **{a: b for a, b in kw.items() if a in ("init", "cu", "wanted")}, up=up)
        plain, a, b = call(prepare, lib, *x, **kw), call(prepare, lib, *x, up=up, **kw), call(prepare, lib, *x, up=up, **kw)
        names = "o S dq dk dv dg db dS0".split()
        # Where everything decays within a token dg is nothing but rounding: it counts from 1e-3 on.
        e = {n: error(y, z, 1e-3 * z.numel()**0.5 if n == "dg" else 1e-30) for n, y, z in zip(names, a, r) if y is not None}
        same = all(y is None or torch.equal(y, z) for y, z in zip(a, b)) and error(plain[0], a[0]) < 1e-5 and error(plain[1], a[1]) < 1e-5
        ok = all(v < (1e-2 if n in ("o", "S") else 2e-2) for n, v in e.items())
        verdict(name, ok and same, " ".join(f"{n} {v:.1e}" for n, v in e.items()) + ("" if same else " bits differ"))

    def state(n, D=128):
        return torch.randn(n, 2, D, D, device=DEV)
    for T in (64, 1, 63, 65, 200, 600):
        one(f"T{T}", inputs(2, T, 2, 2, 2))
    for rows in (64, 128):
        one(f"rows {rows}", inputs(2, 200, 2, 2, 2), rows=rows)
    one("initial state", inputs(2, 130, 2, 2, 2), init=state(2))
    one("no gradient of the final state", inputs(2, 130, 2, 2, 2), up=(True, False))
    for s in (2, 3, 4, 8):
        one(f"{s} segments", inputs(2, 600, 2, 2, 2, 0.1), segments=s, rows=64 * (1 + s % 2), init=state(2))
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
    one("packed, 64 wide", inputs(1, sum(lens), 4, 2, 2, D=64), cu=cu, init=state(len(lens), 64))
    for s in (1, 4):
        one(f"64 wide, {s} segments", inputs(2, 500, 2, 2, 2, D=64), init=state(2, 64), segments=s)
    one("wanted", x, cu=cu, init=init, wanted=(torch.rand(1, sum(lens), device=DEV) > 0.6).to(torch.uint8))
    decays = dict(zero=lambda g: g * 0, strong=lambda g: g * 1e4, huge=lambda g: torch.where(torch.rand_like(g) < 0.1, -1e9, g),
                  infinite=lambda g: torch.where(torch.rand_like(g) < 0.1, float("-inf"), g))
    for name, f in decays.items():
        x = inputs(2, 333, 2, 2, 2)
        x[3] = f(x[3])
        one(f"decay {name}", x, init=state(2))
        one(f"decay {name}, 2 segments", x, segments=2, init=state(2))
    x = inputs(2, 150, 2, 2, 2)
    x[4] = torch.where(torch.rand_like(x[4]) < 0.3, 0.0, x[4] * 2)
    one("write strength from 0 to 2", x, init=state(2))
    x = inputs(2, 100, 2, 2, 2)
    up = [torch.randn(2, 100, 2, 128, device=DEV).to(BF), torch.randn(2, 2, 128, 128, device=DEV)]
    for t in [*x, *up]:
        t[1] = float("nan")
    found, expected = call(prepare, lib, *x, up=up), reference(*[t[:1] for t in x], up=[t[:1] for t in up])
    verdict("a neighbour of NaN", all(error(a[:1], b) < 2e-2 for a, b in zip(found, expected) if a is not None))
    x = inputs(2, 100, 2, 2, 2)
    x[3][0, 50, 0] = float("nan")
    o, S = call(prepare, lib, *x)
    verdict("NaN in, NaN out", bool(torch.isnan(o[0, 50:, 0]).all() and torch.isnan(S[0, 0]).all()))
    return verdict.close()


PEERS = dict(flash_qla=("flash-qla", "flash_qla"), fla=("fla-core", "fla.ops.gated_delta_rule"))


def peer(name):
    """A public implementation of the operator as q, k, v, g, beta -> o, and the package whose version says which."""
    package, module = PEERS[name]
    if name == "fla":
        os.environ["FLA_FLASH_QLA"] = "0"  # its own kernels: otherwise it hands some calls to FlashQLA where that is installed
    op = public(package, module, "chunk_gated_delta_rule")
    return lambda *x: op(*x)[0], package


def times(lib, ops, profile):
    """Ours, each peer and ours again, in turns at each shape, so that a ratio is of one run on one card in one state. Returns whether a peer failed."""
    failed = False
    copy = copy_rate(2 << 30)
    print(card(), versions(package for _, package in ops.values()), flush=True)
    print(f"copy {copy:.3f} TB/s (floor: q, k, v, o once; backward: q, k, v, do, dq, dk, dv once); milliseconds, forward, saving (that of training) / backward")
    for B, T in ((4, 8192), (1, 32768), (8, 2048)):
        for decay in (1.0, 1e-3):
            x = inputs(B, T, 16, 16, 16, decay)
            up = [torch.randn(B, T, 16, 128, device=DEV).to(BF), None]
            one = B * T * 16 * 256 / copy / 1e9
            plain, _, o, _, _ = prepare(lib, *x, final=False, poison=False)
            saving, backward, _, _, d = prepare(lib, *x, up=up, final=False, poison=False)

            def ours():
                return ", saving ".join(f"{bench(f, 20, sleep=SLEEP):.4f}" for f in (plain, saving)) + f" / {bench(backward, 20, sleep=SLEEP):.4f}"  # noqa: B023
            print(f"B{B} T{T} H16, decay x {decay:g}: floor {4 * one:.4f} / {7 * one:.4f}, ours {ours()}", flush=True)
            if profile and decay == 1.0:
                print("\n".join(f"    {ms:.4f} {name}" for name, ms in kernels(lambda: (saving(), backward()))), flush=True)  # noqa: B023
            q, k = (F.normalize(t.float(), dim=-1).to(BF) for t in x[:2])  # ours normalises within the time given
            leaves = [t.detach().requires_grad_() for t in (q, k, x[2], x[3], x[4].to(BF))]
            for name, (op, _) in ops.items():
                try:
                    with torch.no_grad():
                        ms = bench(lambda: op(*leaves), 20, sleep=SLEEP)  # noqa: B023
                    out = op(*leaves)
                    back = bench(lambda: torch.autograd.grad(out, leaves, up[0], retain_graph=True), 20, sleep=SLEEP)  # noqa: B023
                    dv = torch.autograd.grad(out, leaves, up[0])[2]
                    plain(), saving(), backward()
                    print(f"    {name} {ms:.4f} / {back:.4f} (differs from ours by {error(o, out):.1e}, dv {error(d[2], dv):.1e})", flush=True)
                    del out, dv
                except Exception as e:  # noqa: BLE001  # a peer's refusal is a row of its own
                    failed = True
                    print(f"    {name} failed: {first_line(e)[:300]}", flush=True)
            if ops:
                print(f"    ours again {ours()}; {card().split(': ')[1]}", flush=True)
    return failed


def kernels(fn):
    """Mean milliseconds of each kernel that fn launches, in order of their first launch."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record
    with record(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(5):
            fn()
        torch.cuda.synchronize()
    events, total = sorted((e for e in p.events() if "oryx" in e.name), key=lambda e: e.time_range.start), {}
    for i, e in enumerate(events[:len(events) // 5]):
        total[i] = e.name.replace("oryx::gated_delta_cuda::(anonymous namespace)::", "").split("(")[0].removeprefix("void ")
    n = len(total)
    return [(name, sum(e.device_time for e in events[i::n]) / 5000) for i, name in total.items()]


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("library")
    p.add_argument("--peers", default="")
    p.add_argument("--profile", action="store_true", help="each kernel's share")
    p.add_argument("--times-only", action="store_true")
    args = p.parse_args()
    public_ops = {name: peer(name) for name in chosen(args.peers, PEERS)}
    library = load(args.library)
    bad = 0 if args.times_only else check(library)
    sys.exit(times(library, public_ops, args.profile) or bad)
