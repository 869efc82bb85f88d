"""Checks and times the Hopper kernels of SSD (oryx/ops/ssd/cuda) without the rest of the library.

    nvcc -std=c++20 -shared -Xcompiler -fPIC -gencode=arch=compute_90a,code=sm_90a -O3 -I. oryx/ops/ssd/cuda/*.cu -o ssd.so
    python3 tools/ssd_cuda.py ./ssd.so [--small] [--no-times] [--times-only] [--peers mamba_ssm]

--peers times a public kernel in turns with ours at each shape, so that ratios are of one run: mamba_chunk_scan_combined (chunk 256) of mamba_ssm 2.3.2.post1, whose Triton
part is enough: where its compiled extension is missing, an empty module selective_scan_cuda on PYTHONPATH stands in for what Mamba-2 never calls.

Needs torch with CUDA on an H100 or H200. The check compares with the quadratic form in float64 and its gradients by autograd (norm of the
difference over norm, limit 1e-2 for values and 2e-2 for gradients, outputs poisoned with NaN, every case run twice for equal bits) and exits 1
when a case fails.

The gradients of dt_bias and A_log are sums over all tokens, and such a sum may be a hundredth of its terms: then the rounding of the terms, which does not
cancel, is large beside it. The formula in float64 with nothing rounded but what the kernels keep in bfloat16 (`by_chunks`) is off by more than 2e-2 of A_log's
sum in one of 75 draws at 130 tokens. These two are therefore measured against the sum of their terms' magnitudes (limit 2e-2), and A_log's, which no other output
shows token by token, is also held to that formula: to 1e-3 of the magnitudes, over many draws.

Times are medians of CUDA-event times over random data; before each repetition 256 MB are overwritten (the L2) and the GPU
sleeps, so that launches are queued.
"""
import argparse
import ctypes
import sys

import torch
import torch.nn.functional as F

from cuda_harness import BF, DEV, P, Verdicts, bench, card, chosen, copy_rate, launch, public, scratch, versions

SLEEP = 16_000_000  # the peer's launches take the host longer
INPUTS = "q k v dt_raw dt_bias A_log D".split()
SIZES = "B T N Hq Hk Hv K V segments".split()


class Arguments(ctypes.Structure):  # struct OryxSsd
    _fields_ = [(n, P) for n in INPUTS + "initial_state cu_seqlens wanted o final_state".split()] + [(n, ctypes.c_int32) for n in SIZES]


class Gradients(ctypes.Structure):  # struct OryxSsdGradients
    _fields_ = [(n, P) for n in ["d_o", "d_final_state"] + ["d_" + n for n in INPUTS] + ["d_initial_state"]]


def load(path):
    lib = ctypes.CDLL(path)
    for name in ("oryx_ssd_workspace", "oryx_ssd_backward_workspace"):
        if hasattr(lib, name):
            getattr(lib, name).restype = ctypes.c_size_t
            getattr(lib, name).argtypes = [P]
    lib.oryx_ssd_forward.argtypes = [P, P, P]
    if hasattr(lib, "oryx_ssd_backward"):
        lib.oryx_ssd_backward.argtypes = [P, P, P, P]
    return lib


def empty(*shape, dtype=torch.float32, poison=True):
    x = torch.empty(*shape, dtype=dtype, device=DEV)
    return x.fill_(float("nan")) if poison else x


def arguments(x, init, cu, wanted, o, S, segments):
    q, k, v = x[:3]
    N = q.shape[0] if cu is None else len(cu) - 1
    tensors = [*x, init, cu, wanted, o, S]
    a = Arguments(*[None if t is None else t.data_ptr() for t in tensors], *q.shape[:2], N, q.shape[2], k.shape[2], v.shape[2], q.shape[3],
                  v.shape[3], segments)
    a.tensors = tensors
    return a


def heads(x):
    Hq, Hk, Hv = (t.shape[2] for t in x[:3])
    return max(Hk, Hv), max(Hq, Hk, Hv)


def prepare(lib, x, init=None, cu=None, wanted=None, segments=0, final=True, poison=True):
    """A function that runs the forward pass, and its outputs."""
    B, T, _, K = x[0].shape
    V = x[2].shape[3]
    Hs, Ho = heads(x)
    N = B if cu is None else len(cu) - 1
    o = empty(B, T, Ho, V, dtype=BF, poison=poison)
    S = empty(N, Hs, V, K, poison=poison) if final else None
    a = arguments(x, init, cu, wanted, o, S, segments)
    work = scratch(lib.oryx_ssd_workspace(ctypes.byref(a)), poison)
    return lambda: launch(lib.oryx_ssd_forward, ctypes.byref(a), work.data_ptr()), [o, S]


def prepare_backward(lib, x, d_o, d_S=None, init=None, cu=None, wanted=None, segments=0, poison=True):
    """A function that runs the backward pass, and its outputs."""
    a = arguments(x, init, cu, wanted, None, None, segments)
    outs = [empty(*t.shape, dtype=t.dtype, poison=poison) for t in x] + ([empty(*init.shape, poison=poison)] if init is not None else [None])
    g = Gradients(*[None if t is None else t.data_ptr() for t in [d_o, d_S, *outs]])
    g.tensors = [d_o, d_S]
    work = scratch(lib.oryx_ssd_backward_workspace(ctypes.byref(a)), poison)
    return lambda: launch(lib.oryx_ssd_backward, ctypes.byref(a), ctypes.byref(g), work.data_ptr()), outs


def reference(x, init=None, cu=None, wanted=None):
    """Outputs and final states by the quadratic form, in float64, differentiable."""
    q, k, v, dt_raw, dt_bias, A_log, D = (t.double() for t in x)
    B, T = q.shape[:2]
    Hs, Ho = heads(x)

    def spread(t, h):  # [B, T, h', d] -> [B, h, T, d]
        return t.repeat_interleave(h // t.shape[2], 2).transpose(1, 2)
    q, k, v = spread(q, Ho), spread(spread(k, Hs).transpose(1, 2), Ho), spread(v, Hs)
    step = torch.logaddexp(dt_raw + dt_bias, torch.zeros((), dtype=torch.float64, device=DEV)).transpose(1, 2)  # [B, Hs, T]
    A = -A_log.exp()  # [Hs], or [B, T, Hs]: then its gradient is the terms
    rate = (step * (A[:, None] if A.dim() == 1 else A.transpose(1, 2))).clamp_min(-1000)

    def run(q, k, v, step, rate, S):
        T = q.shape[2]
        if T == 0:
            return v.new_zeros(q.shape[0], Ho, 0, v.shape[3]), S
        G = rate.cumsum(-1)
        L = (G[..., :, None] - G[..., None, :]).masked_fill(torch.ones(T, T, dtype=torch.bool, device=DEV).triu(1), float("-inf")).exp()
        u = step[..., None] * v
        r = Ho // Hs
        o = ((q @ k.transpose(-1, -2)) * L.repeat_interleave(r, 1)) @ u.repeat_interleave(r, 1)
        o = o + G.exp().repeat_interleave(r, 1)[..., None] * (q @ S.repeat_interleave(r, 1).transpose(-1, -2))
        o = o + (D[:, None, None] * v).repeat_interleave(r, 1)
        w = (G[..., -1:] - G).exp()[..., None] * u
        return o, G[..., -1].exp()[..., None, None] * S + w.transpose(-1, -2) @ k[:, ::r]
    if cu is None:
        S = init.double() if init is not None else q.new_zeros(B, Hs, v.shape[3], q.shape[3])
        o, S = run(q, k, v, step, rate, S)
    else:
        c, parts = cu.tolist(), []
        S = init.double() if init is not None else q.new_zeros(len(c) - 1, Hs, v.shape[3], q.shape[3])
        for n in range(len(c) - 1):
            s = slice(c[n], c[n + 1])
            parts.append(run(q[:, :, s], k[:, :, s], v[:, :, s], step[:, :, s], rate[:, :, s], S[n:n + 1]))
        o, S = torch.cat([p[0] for p in parts], 2), torch.cat([p[1] for p in parts], 0)
    o = o.transpose(1, 2)
    return (o if wanted is None else torch.where((wanted != 0)[..., None, None], o, 0)), S


def error(a, b, norm=None):
    """Norm of the difference over the norm of b, or over `norm`."""
    a, b = a.detach().double(), b.detach().double()
    if not torch.isfinite(a).all():
        return float("nan")
    n = b.norm().item() if norm is None else norm
    return (a - b).norm().item() / n if n > 1e-25 else (a - b).norm().item()


def inputs(B, T, Hq, Hk, Hv, K=128, V=128, decay=1.0):
    def r(*s):
        return torch.randn(*s, device=DEV)
    H = max(Hk, Hv)
    q, k = ((r(B, T, h, K) * K**-0.25).to(BF) for h in (Hq, Hk))
    # steps about 1e-3 .. 1e-1 and A in -1 .. -16, as models start
    bias = torch.log(torch.expm1(torch.exp(torch.rand(H, device=DEV) * 4.6 - 6.9)))
    return [q, k, r(B, T, Hv, V).to(BF), r(B, T, H), bias, torch.log(1 + 15 * torch.rand(H, device=DEV)) + (0 if decay == 1.0 else
            torch.log(torch.tensor(decay)).item()), r(H)]


class Check:
    def __init__(self, lib):
        self.lib, self.verdict, self.worst = lib, Verdicts(), {}

    def one(self, name, x, init=None, cu=None, wanted=None, segments=0):
        lib, kw = self.lib, dict(init=init, cu=cu, wanted=wanted, segments=segments)
        leaves = [t.double() for t in x] + ([init.double()] if init is not None else [])
        leaves[5] = leaves[5].expand(x[3].shape).clone()  # a leaf a token: the terms of the sum
        for t in leaves:
            t.requires_grad_(True)
        ro, rs = reference(leaves[:7], leaves[7] if init is not None else None, cu, wanted)
        errors, same = {}, True
        for again in range(2):
            run, (o, S) = prepare(lib, x, **kw)
            run()
            torch.cuda.synchronize()
            if again:
                same = same and torch.equal(o, o1) and torch.equal(S, S1)
            o1, S1 = o, S
        errors["o"], errors["S"] = error(o, ro), error(S, rs)
        ok = errors["o"] < 1e-2 and errors["S"] < 1e-2
        if hasattr(lib, "oryx_ssd_backward"):
            d_o, d_S = torch.randn_like(o), torch.randn_like(S)
            expected = torch.autograd.grad([ro, rs], leaves, [d_o.double(), d_S.double()])
            if wanted is not None:
                d_o[wanted == 0] = float("nan")
            for again in range(2):
                run, outs = prepare_backward(lib, x, d_o, d_S, **kw)
                run()
                torch.cuda.synchronize()
                if again:
                    same = same and all(a is None or torch.equal(a, b) for a, b in zip(outs, before))
                before = outs
            terms = dict(dt_bias=expected[3], A_log=expected[5])
            for n, a, b in zip(INPUTS + ["state"], outs, expected):
                if n in terms:
                    t = terms[n].flatten(0, 1)
                    errors["d_" + n] = error(a, t.sum(0), t.abs().sum(0).norm().item())
                else:
                    errors["d_" + n] = error(a, b)
                ok = ok and errors["d_" + n] < 2e-2
        for n, e in errors.items():
            if not e <= self.worst.get(n, 0):
                self.worst[n] = e
        self.verdict(name, ok and same, " ".join(f"{n} {e:.1e}" for n, e in errors.items()) + ("" if same else " BITS DIFFER"))


def by_chunks(x, init, d_o, d_S, rounded):
    """The terms of A_log's gradient, [B, Hs, T], in float64 as the kernels make them, where all have as many heads: chunk by chunk, from the state before it and the gradient of
    the state behind it. rounded: what becomes of the values that the kernels keep in bfloat16."""
    q, k, v, d_o = (t.double().transpose(1, 2) for t in (*x[:3], d_o))
    dt = torch.logaddexp(x[3].double() + x[4].double(), torch.zeros((), dtype=torch.float64, device=DEV)).transpose(1, 2)
    A = -x[5].double().exp()[:, None]
    parts = [slice(i, min(i + 64, q.shape[2])) for i in range(0, q.shape[2], 64)]
    S, dS, starts, ends, terms = init.double(), d_S.double(), [], [], []
    for s in parts:
        G = (dt[..., s] * A).cumsum(-1)
        starts.append(rounded(S))
        S = G[..., -1:, None].exp() * S + rounded(((G[..., -1:] - G).exp() * dt[..., s])[..., None] * v[:, :, s]).mT @ k[:, :, s]
    for s in reversed(parts):
        G = (dt[..., s] * A).cumsum(-1)
        ends.insert(0, rounded(dS))
        dS = G[..., -1:, None].exp() * dS + rounded(G.exp()[..., None] * d_o[:, :, s]).mT @ q[:, :, s]
    for s, S, dS in zip(parts, starts, ends):
        d, G = dt[..., s], (dt[..., s] * A).cumsum(-1)
        M = (G[..., :, None] - G[..., None, :]).tril().exp().tril() * (q[:, :, s] @ k[:, :, s].mT) * (d_o[:, :, s] @ v[:, :, s].mT) * d[..., None, :]
        rows = M.sum(-1) - M.sum(-2) + G.exp() * (q[:, :, s] * (d_o[:, :, s] @ S)).sum(-1)
        tail = (G[..., -1:] - G).exp() * d * (k[:, :, s] * (v[:, :, s] @ dS)).sum(-1)
        later = rows.flip(-1).cumsum(-1).flip(-1)
        terms.append(A * d * (later + tail.cumsum(-1) - tail + (G[..., -1].exp() * (S * dS).sum((-1, -2)))[..., None]))
    return torch.cat(terms, -1)


def check_sums(lib, verdict, draws):
    """A_log's gradient over many draws: how far it is from the exact one and from that of rounded states, over the magnitudes of the terms."""
    for K, V, T in ((64, 128, 130), (128, 64, 130), (64, 64, 63), (128, 128, 200)):
        worst, cancelled = [0.0, 0.0, 0.0], 1.0
        for _ in range(draws):
            x, init = inputs(2, T, 2, 2, 2, K, V), state(2, 2, V, K)
            d_o, d_S = torch.randn(2, T, 2, V, device=DEV).to(BF), torch.randn_like(init)
            run, outs = prepare_backward(lib, x, d_o, d_S, init)
            run()
            terms, sums = by_chunks(x, init, d_o, d_S, lambda t: t), by_chunks(x, init, d_o, d_S, lambda t: t.to(BF).double()).sum((0, 2))
            exact, norm = terms.sum((0, 2)), terms.abs().sum((0, 2)).norm().item()
            found = (error(outs[5], exact, norm), error(outs[5], sums, norm), error(outs[5], exact))
            worst = [max(a, b) for a, b in zip(worst, found)]
            cancelled = min(cancelled, exact.norm().item() / norm)
        verdict(f"A_log's sum, K{K} V{V} T{T}, {draws} draws", worst[0] < 2e-2 and worst[1] < 1e-3,
                f"{worst[0]:.1e}, from the rounded formula {worst[1]:.1e} (of the sum itself {worst[2]:.1e}; the sum is {cancelled:.1e} of its terms at least)")


def state(n, h=2, V=128, K=128):
    return torch.randn(n, h, V, K, device=DEV)


def check(lib, small):
    c = Check(lib)
    for T in (64, 1, 63, 100) if small else (64, 1, 63, 65, 128, 200, 1000):
        c.one(f"T{T}", inputs(2, T, 2, 2, 2))
    for K, V in ((128, 64), (64, 64), (64, 128)):
        for T in (130,) if small else (64, 130, 1000):
            c.one(f"K{K} V{V} T{T}", inputs(2, T, 2, 2, 2, K, V), init=state(2, 2, V, K))
    c.one("initial state", inputs(2, 130, 2, 2, 2), init=state(2))
    for s in (2,) if small else (2, 3, 5, 8):
        c.one(f"{s} segments", inputs(2, 300 if small else 1000, 2, 2, 2, decay=0.03), segments=s, init=state(2))
        c.one(f"{s} segments, K64 V64", inputs(2, 300 if small else 1000, 2, 2, 2, 64, 64, decay=0.03), segments=s)
    c.one("more segments than chunks", inputs(1, 70, 2, 2, 2), segments=3, init=state(1))
    c.one("one group", inputs(2, 150, 1, 1, 8, 128, 64), init=state(2, 8, 64))
    if not small:
        c.one("one group, 32 heads", inputs(2, 300, 1, 1, 32, 128, 64))
        c.one("two groups", inputs(1, 150, 2, 2, 8, 128, 64))
    c.one("Hq > Hs", inputs(2, 150, 8, 2, 2), segments=2, init=state(2))
    c.one("Hq < Hs", inputs(2, 150, 2, 4, 4))
    c.one("Hk > Hv", inputs(1, 150, 4, 4, 2), segments=3)
    c.one("Hq 6, Hk 2, Hv 1", inputs(1, 150, 6, 2, 1, 64, 64))
    c.one("Hq 1, Hk 4, Hv 2", inputs(1, 150, 1, 4, 2, 64, 64))
    lens = [1, 64, 70, 0, 5, 0] if small else [1, 64, 130, 0, 5, 300, 128, 0]
    cu = torch.tensor([0] + torch.tensor(lens).cumsum(0).tolist(), dtype=torch.int32, device=DEV)
    x, init = inputs(1, sum(lens), 2, 2, 2), state(len(lens))
    c.one("packed", x, cu=cu, init=init)
    c.one("packed, 3 segments", x, cu=cu, init=init, segments=3)
    some = (torch.rand(1, sum(lens), device=DEV) > 0.6).to(torch.uint8)
    c.one("wanted", x, cu=cu, init=init, wanted=some)
    c.one("nothing wanted", x, cu=cu, init=init, wanted=some * 0)
    x = inputs(2, 400, 1, 1, 4, 128, 64)
    chunks = (torch.rand(2, 7, device=DEV) > 0.7).repeat_interleave(64, 1)[:, :400].to(torch.uint8)
    c.one("wanted, one group", x, wanted=chunks)
    for name, f in dict(zero=lambda a: a * 0 - 60, strong=lambda a: a + 6, huge=lambda a: a * 0 + 20, infinite=lambda a: a * 0 + 100).items():
        x = inputs(2, 333, 2, 2, 2)
        x[5] = f(x[5])
        c.one(f"decay {name}", x, init=state(2))
    x = inputs(2, 333, 2, 2, 2)
    x[3] = torch.where(torch.rand_like(x[3]) < 0.1, x[3] + 60, x[3])
    c.one("some huge steps", x, init=state(2))
    x = inputs(2, 100, 2, 2, 2)
    for t in x[:4]:
        t[1] = float("nan")
    run, (o, S) = prepare(lib, x)
    run()
    ro, rs = reference([t[:1] for t in x[:4]] + x[4:])
    c.verdict("a neighbour of NaN", error(o[:1], ro) < 1e-2 and error(S[:1], rs) < 1e-2)
    x = inputs(2, 100, 2, 2, 2)
    x[3][0, 50, 0] = float("nan")
    run, (o, S) = prepare(lib, x)
    run()
    c.verdict("NaN in, NaN out", bool(torch.isnan(o[0, 50:, 0]).all() and torch.isnan(S[0, 0]).all()))
    if hasattr(lib, "oryx_ssd_backward"):
        check_sums(lib, c.verdict, 3 if small else 100)
    print("largest errors:", " ".join(f"{n} {e:.2e}" for n, e in c.worst.items()))
    return c.verdict.close()


SHAPES = [(B, T, *s) for s in ((1, 32, 128, 64), (16, 16, 128, 128)) for B, T in ((4, 8192), (1, 32768), (8, 2048))] + [(4, 8192, 12, 12, 64, 64)]


def times(lib, peers, shapes=SHAPES):
    """Ours, the peer and ours again, in turns at each shape, so that a ratio is of one run on one card in one state."""
    copy = copy_rate(2 << 30)
    print(card(), versions(["mamba-ssm"] if peers else []), flush=True)
    print(f"copy {copy:.3f} TB/s (floor: q, k, v, o once); milliseconds, forward / backward")
    for B, T, G, H, K, V in shapes:
        x = inputs(B, T, G, G, H, K, V)
        run, (o, _) = prepare(lib, x, final=False, poison=False)
        back, _ = prepare_backward(lib, x, torch.randn_like(o), poison=False) if hasattr(lib, "oryx_ssd_backward") else (None, None)

        def ours():
            return " / ".join(f"{bench(f, 20, sleep=SLEEP):.4f}" for f in (run, back) if f)  # noqa: B023
        print(f"B{B} T{T} H{H} P{V} N{K} groups {G}: floor {2 * B * T * 2 * (G * K + H * V) / copy / 1e9:.4f}, ours {ours()}", flush=True)
        if "mamba_ssm" in peers:
            op = peers["mamba_ssm"]
            y = [t.detach().requires_grad_(True) for t in (x[2], x[3], -x[5].exp(), x[1], x[0], x[6], x[4])]

            def peer():
                return op(*y[:5], 256, D=y[5], dt_bias=y[6], dt_softplus=True)  # noqa: B023
            with torch.no_grad():
                run()
                row = f"    mamba_ssm {bench(peer, 20, sleep=SLEEP):.4f}"
                differs = f" (differs from ours by {error(peer(), o):.1e})"
            out, d = peer(), torch.randn_like(o)
            print(row + f" / {bench(lambda: torch.autograd.grad(out, y, d, retain_graph=True), 20, sleep=SLEEP):.4f}" + differs, flush=True)  # noqa: B023
            del out
            print(f"    ours again {ours()}; {card().split(': ')[1]}", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("library")
    p.add_argument("--small", action="store_true", help="few small cases, for compute-sanitizer")
    p.add_argument("--no-times", action="store_true")
    p.add_argument("--times-only", action="store_true")
    p.add_argument("--peers", default="")
    args = p.parse_args()
    torch.manual_seed(1)
    public_ops = {name: public("mamba-ssm", "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined") for name in chosen(args.peers, ["mamba_ssm"])}
    library = load(args.library)
    bad = 0 if args.times_only else check(library, args.small)
    if not args.no_times:
        times(library, public_ops)
    sys.exit(bad)
