"""Checks and times the Hopper kernels of Kimi Delta Attention (oryx/ops/kda/cuda) without the rest of the library.

    nvcc -std=c++20 -I. -shared -Xcompiler -fPIC -gencode=arch=compute_90a,code=sm_90a -O3 oryx/ops/kda/cuda/kda_*.cu oryx/ops/gated_delta/cuda/*.cu -o kda.so
    python3 tools/kda_cuda.py ./kda.so [--peers fla] [--times-only] [--profile]

The program's own library (build/cuda/liboryx.so) holds the same kernels and serves as well.
--peers times public kernels in turns with ours at each shape, so that ratios are of one run: `pip install flash-linear-attention==0.6.0`.
Needs torch with CUDA on an H100 or H200. The check compares with the recurrence in float64 and its gradients by autograd (norm of the difference over norm, limit 1e-2, gradients
2e-2; outputs and scratch poisoned with NaN, every case run twice for equal bits) and exits 1 when a case fails. Times are medians of CUDA-event times over random data; before each
repetition 256 MB are overwritten (the L2) and the GPU sleeps, so that launches are queued.
"""
import argparse
import ctypes
import sys

import torch
import torch.nn.functional as F

from cuda_harness import BF, DEV, P, Verdicts, bench, card, chosen, copy_rate, error, first_line, public, scratch, versions
from delta_rule import call, reference

SLEEP = 16_000_000  # the peers' launches take the host longer
POINTERS = "q k v g beta initial_state cu_seqlens wanted o final_state saved".split()
GRADIENTS = "d_o d_final_state d_q d_k d_v d_g d_beta d_initial_state".split()
SIZES = "B T N Hq Hk Hv D rows".split()


class Arguments(ctypes.Structure):  # struct OryxKda
    _fields_ = [(n, P) for n in POINTERS] + [(n, ctypes.c_int32) for n in SIZES] + [("scale", ctypes.c_float), ("l2_eps", ctypes.c_float)]


class Gradients(ctypes.Structure):  # struct OryxKdaGradients
    _fields_ = [(n, P) for n in GRADIENTS]


def load(path):
    lib = ctypes.CDLL(path)
    for name in ("workspace", "saved", "backward_workspace"):
        f = getattr(lib, "oryx_kda_" + name)
        f.restype, f.argtypes = ctypes.c_size_t, [P]
    lib.oryx_kda_forward.argtypes = [P, P, P]
    lib.oryx_kda_backward.argtypes = [P, P, P, P]
    return lib


def prepare(lib, q, k, v, g, beta, init=None, cu=None, wanted=None, up=None, final=True, rows=0, poison=True):
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
    a = Arguments(*[None if x is None else x.data_ptr() for x in tensors], B, T, N, Hq, Hk, Hv, D, rows, 0.0, 1e-6)
    if up:
        tensors[-1] = scratch(lib.oryx_kda_saved(ctypes.byref(a)), poison)
        a.saved = tensors[-1].data_ptr()
    tensors.append(scratch(lib.oryx_kda_workspace(ctypes.byref(a)), poison))

    def run(f, *x):
        rc = f(*x, torch.cuda.current_stream().cuda_stream)
        if rc:
            raise RuntimeError(f"cudaError_t {rc}")
    forward = lambda: run(lib.oryx_kda_forward, ctypes.byref(a), tensors[-1].data_ptr())  # noqa: E731
    if not up:
        return forward, None, o, S, d
    work = scratch(lib.oryx_kda_backward_workspace(ctypes.byref(a)), poison)
    b = Gradients(*[None if x is None else x.data_ptr() for x in [*up, *d]])
    return forward, lambda: run(lib.oryx_kda_backward, ctypes.byref(a), ctypes.byref(b), work.data_ptr()), o, S, d


def inputs(B, T, Hq, Hk, Hv, decay=1.0, D=128):
    """Channels from ones that hardly decay to ones that decay a hundred times as fast as the middle."""
    def r(*s):
        return torch.randn(*s, device=DEV)
    Hs = max(Hk, Hv)
    spread = torch.pow(10, torch.linspace(-2, 2, D, device=DEV))
    return [*(r(B, T, h, D).to(BF) for h in (Hq, Hk, Hv)), -F.softplus(r(B, T, Hs, D) - 3.0) * decay * spread[torch.randperm(D, device=DEV)], torch.sigmoid(r(B, T, Hs))]


def check(lib, backward=True):
    verdict = Verdicts()

    def one(name, x, up=(True, True), **kw):
        """Forward alone, then forward and backward; up: whether o and the final state have a gradient."""
        B, T, Hs, _ = x[3].shape
        D = x[0].shape[3]
        N = B if kw.get("cu") is None else len(kw["cu"]) - 1
        shapes = ((B, T, max(x[0].shape[2], Hs), D), BF), ((N, Hs, D, D), torch.float32)
        up = [torch.randn(s, device=DEV).to(t) if u else None for (s, t), u in zip(shapes, up)] if backward else None
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
    one("64 wide", inputs(2, 300, 2, 2, 2, D=64), init=state(2, 64))
    one("Hv > Hk", inputs(2, 150, 2, 2, 4))
    one("Hq > Hs", inputs(2, 150, 8, 2, 2))
    one("Hq < Hs", inputs(2, 150, 2, 4, 4))
    one("Hk > Hv", inputs(1, 150, 4, 4, 2))
    lens = [1, 64, 130, 0, 5, 300, 128]
    cu = torch.tensor([0] + torch.tensor(lens).cumsum(0).tolist(), dtype=torch.int32, device=DEV)
    x = inputs(1, sum(lens), 2, 2, 2)
    init = state(len(lens))
    one("packed", x, cu=cu, init=init)
    one("packed, 64 wide", inputs(1, sum(lens), 4, 2, 2, D=64), cu=cu, init=state(len(lens), 64))
    one("wanted", x, cu=cu, init=init, wanted=(torch.rand(1, sum(lens), device=DEV) > 0.6).to(torch.uint8))
    decays = dict(zero=lambda g: g * 0, slow=lambda g: g * 1e-3, strong=lambda g: g * 1e4, huge=lambda g: torch.where(torch.rand_like(g) < 0.1, -1e9, g),
                  infinite=lambda g: torch.where(torch.rand_like(g) < 0.1, float("-inf"), g), stretch=lambda g: torch.cat([g[:, :90], g[:, 90:130] - 200, g[:, 130:]], 1))
    for name, f in decays.items():
        x = inputs(2, 333, 2, 2, 2)
        x[3] = f(x[3])
        one(f"decay {name}", x, init=state(2))
    x = inputs(2, 150, 2, 2, 2)
    x[4] = torch.where(torch.rand_like(x[4]) < 0.3, 0.0, x[4] * 2)
    one("write strength from 0 to 2", x, init=state(2))
    x = inputs(2, 100, 2, 2, 2)
    up = [torch.randn(2, 100, 2, 128, device=DEV).to(BF), torch.randn(2, 2, 128, 128, device=DEV)] if backward else None
    for t in [*x, *(up or [])]:
        t[1] = float("nan")
    found, expected = call(prepare, lib, *x, up=up), reference(*[t[:1] for t in x], up=[t[:1] for t in up] if up else None)
    e = [error(y[:1], z) for y, z in zip(found, expected) if y is not None]
    verdict("NaN in another row", all(v < 2e-2 for v in e), " ".join(f"{v:.1e}" for v in e))
    x = inputs(1, 0, 2, 2, 2)
    init = state(1)
    empty = call(prepare, lib, *x, init=init)
    verdict("no tokens", torch.equal(empty[1], init))
    x = inputs(2, 200, 2, 2, 2)
    forward, _, o, S, _ = prepare(lib, *x)
    forward()
    torch.cuda.synchronize()
    before = o.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    o.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    verdict("a captured graph gives the same bits", torch.equal(o, before))
    return verdict.close()


def peer(name):
    """A function of normalised q, k and of v, g, beta that gives o."""
    chunk_kda = public("flash-linear-attention", "fla.ops.kda", "chunk_kda")
    return lambda q, k, v, g, beta: chunk_kda(q, k, v, g, beta)[0]


def times(lib, peers, backward=True, shapes=((4, 8192, 16, 128), (1, 32768, 16, 128), (8, 2048, 16, 128), (4, 8192, 12, 64))):
    copy = copy_rate()
    print(card())
    print(f"copy {copy:.2f} TB/s; floor: every input and output once", flush=True)
    for B, T, H, D in shapes:
        x = inputs(B, T, H, H, H, D=D)
        x[3] = -F.softplus(torch.randn(B, T, H, D, device=DEV) - 3.0)
        up = [torch.randn(B, T, H, D, device=DEV).to(BF), None]
        n = B * T * H
        floor = n * (8 * D + 4 * D + 4) / copy / 1e9
        floor_b = n * (2 * 7 * D + 8 * D + 8) / copy / 1e9
        forward, _, o, _, _ = prepare(lib, *x, final=False, poison=False)
        saving, back, _, _, _ = prepare(lib, *x, up=up, final=False, poison=False) if backward else (None,) * 5
        unit = [F.normalize(t.float(), dim=-1).to(BF) for t in x[:2]] + x[2:]

        def ours():
            line = f"forward {bench(forward, sleep=SLEEP):.3f}"
            if backward:
                line += f" saving {bench(saving, sleep=SLEEP):.3f} backward {bench(back, sleep=SLEEP):.3f}"
            return line
        print(f"B{B} T{T} H{H} K{D}: floor {floor:.3f} backward {floor_b:.3f}; ours {ours()}", flush=True)
        for name, f in peers.items():
            try:
                with torch.no_grad():
                    y = f(*unit)
                    line = f"    {name}: difference from ours {error(y, o):.1e}; forward {bench(lambda: f(*unit), sleep=SLEEP):.3f}"
                if backward:
                    leaves = [t.detach().clone().requires_grad_() for t in unit]
                    y = f(*leaves)
                    line += f" saving {bench(lambda: f(*leaves), sleep=SLEEP):.3f} backward {bench(lambda: torch.autograd.grad(y, leaves, up[0], retain_graph=True), sleep=SLEEP):.3f}"
                    del y
                print(line, flush=True)
            except Exception as e:  # noqa: BLE001
                print(f"    {name}: {first_line(e)}", flush=True)
        if peers:
            print(f"    ours again {ours()}", flush=True)
        del x, up, forward, saving, back, o, unit
        torch.cuda.empty_cache()


def profile(lib, backward=True, B=4, T=8192, H=16, D=128):
    x = inputs(B, T, H, H, H, D=D)
    up = [torch.randn(B, T, H, D, device=DEV).to(BF), None] if backward else None
    forward, back, *_ = prepare(lib, *x, up=up, final=False, poison=False)
    for _ in range(2):
        forward(), back() if back else None
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for _ in range(3):
            forward(), back() if back else None
        torch.cuda.synchronize()
    for e in sorted(p.key_averages(), key=lambda e: -e.device_time_total)[:12]:
        print(f"  {e.device_time_total / 3e3:8.3f} ms {e.count // 3}x {e.key[:90]}", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("library")
    p.add_argument("--peers", default="", help="of: fla")
    p.add_argument("--times-only", action="store_true")
    p.add_argument("--profile", action="store_true")
    p.add_argument("--no-backward", action="store_true")
    a = p.parse_args()
    names = chosen(a.peers, ("fla",))
    lib, backward = load(a.library), not a.no_backward
    torch.manual_seed(1)
    if names:
        print(versions(["torch", "triton", "flash-linear-attention"]), flush=True)
    failed = 0 if a.times_only else check(lib, backward)
    times(lib, {n: peer(n) for n in names}, backward)
    if a.profile:
        profile(lib, backward)
    return failed


if __name__ == "__main__":
    sys.exit(main())
