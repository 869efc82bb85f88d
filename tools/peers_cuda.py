#!/usr/bin/env python3
"""Operators bound by memory, the linear cross-entropy and AdamW beside public kernels, in turns in one process.

    python3 tools/peers_cuda.py build/cuda/liboryx.so [--only conv,norm,gated,rope,swiglu,adamw,loss,attention] [--peers compile,fla,causal_conv1d]

Needs a Python with a full torch 2.11 and a GPU. Peers: torch.compile and torch's own kernels (nothing to install); `pip install flash-linear-attention==0.6.0`;
`pip install causal-conv1d==1.7.0` (compiled). One line a form: microseconds, the rate of its bytes (every input read once, every output written once) and how that compares with
a copy of 512 MiB. The forms of a row take turns, repetition by repetition: medians of CUDA-event times, 256 MB overwritten (the L2) before each, launches queued behind a sleep.
"differs": norm of the difference of the outputs over their norm. Inputs are bfloat16; weights of norms float32 for ours, bfloat16 for peers. Backward includes weights' gradients.
"""
import argparse
import statistics
import sys

import torch
import torch._functorch.config
import torch.nn.functional as F

from cuda_harness import BF, DEV, card, chosen, copy_rate, error, first_line, public, versions

O = torch.ops.oryx
SLEEP = 16_000_000  # cycles: the peers' launches take the host longer than ours
PEERS = dict(compile=None, fla="fla-core", causal_conv1d="causal-conv1d")
flushed = []


def turns(forms, reps=20):
    """Median milliseconds of each function, called in turns."""
    if not flushed:
        flushed.append(torch.empty(256 << 20, dtype=torch.uint8, device=DEV))
    for f in forms.values():
        for _ in range(3):
            f()
    events = {name: [] for name in forms}
    torch.cuda.synchronize()
    for _ in range(reps):
        for name, f in forms.items():
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flushed[0].zero_()
            torch.cuda._sleep(SLEEP)
            a.record()
            f()
            b.record()
            events[name].append((a, b))
        torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def randn(*shape, scale=1.0):
    return (torch.randn(*shape, device=DEV) * scale).to(BF)


class Rows:
    """Prints rows; a form that fails says so in a line and the others go on."""

    def __init__(self, peers):
        self.peers, self.failed = peers, False
        self.copy = max(copy_rate(512 << 20) for _ in range(3))  # one reading of several was a tenth low

    def use(self, peer, module, name):
        """A public function, or None where its package is not asked for."""
        return public(PEERS[peer], module, name) if peer in self.peers else None

    def compiled(self, f):
        return torch.compile(f, dynamic=False) if "compile" in self.peers else None

    def row(self, name, nbytes, forms, flops=0):
        """forms: name to a function that returns its output first, or None."""
        good, first = {}, None
        for form, f in forms.items():
            if f is None:
                continue
            try:
                y = f()
                y = y[0] if isinstance(y, (tuple, list)) else y
                first = y if first is None else first
                good[form] = (f, error(y.flatten(), first.flatten()) if y is not None else 0.0)
            except Exception as e:  # noqa: BLE001  # a peer's refusal is a row of its own
                self.failed = True
                print(f"{name}: {form} failed: {first_line(e)[:200]}", flush=True)
        for form, ms in turns({k: f for k, (f, _) in good.items()}).items():
            rate = f"{flops / ms / 1e9:.0f} TFLOP/s" if flops else f"{nbytes / ms / 1e9:.2f} TB/s, {100 * nbytes / ms / 1e9 / self.copy:.1f}% of the copy"
            print(f"{name + ': ' + form:72s} {ms * 1e3:9.1f} us  {rate}, differs {good[form][1]:.1e}", flush=True)

    def pair(self, name, ours, peers, sizes, backward):
        """Forward and backward rows. ours: forward and backward; peers: name to (function of no arguments, leaves); sizes: bytes of the two passes."""
        with torch.no_grad():
            self.row(name + " forward", sizes[0], dict(Oryx=ours[0], **{k: v and v[0] for k, v in peers.items()}))
        forms = dict(Oryx=ours[1])
        for k, v in peers.items():
            if v is None:
                continue
            try:
                y = v[0]()
                y = y if isinstance(y, torch.Tensor) else y[0]
                forms[k] = lambda y=y, leaves=v[1]: torch.autograd.grad(y, leaves, backward, retain_graph=True)
            except Exception as e:  # noqa: BLE001
                self.failed = True
                print(f"{name}: {k} failed: {first_line(e)[:200]}", flush=True)
        self.row(name + " backward", sizes[1], forms)


def leaf(*tensors):
    """The same memory for every form of a row: part of it outlives the 256 MB in the L2, so that who reads what the form before read is up to 5% faster."""
    return [t.detach().requires_grad_() for t in tensors]


def conv(r):
    B, T, D = 4, 8192, 2048
    x, dy, w = randn(B, T, D), randn(B, T, D), randn(D, 4)
    U = x.nbytes
    theirs, fla = r.use("causal_conv1d", "causal_conv1d", "causal_conv1d_fn"), r.use("fla", "fla.modules.causal_conv1d", "causal_conv1d")
    xt, wt = leaf(x, w)
    r.pair(f"short convolution, width 4 + SiLU, {B}x{T}x{D}",
           (lambda: O.short_conv(x, w, None, None, None, True), lambda: O.short_conv_backward(dy, None, x, w, None, None, None, True)),
           {"causal_conv1d": theirs and (lambda: theirs(xt.transpose(1, 2), wt, activation="silu").transpose(1, 2), (xt, wt)),
            "fla (Triton)": fla and (lambda: fla(xt, wt, activation="silu", backend="triton"), (xt, wt))}, (2 * U, 3 * U), dy)


def norm(r):
    for D in (768, 2048):
        n = 32768
        x, s, dy, w = randn(n, D), randn(n, D), randn(n, D), torch.ones(D, device=DEV)
        fla, plain = r.use("fla", "fla.modules.norm.layernorm", "rms_norm"), r.compiled(lambda x, w: F.rms_norm(x, w.shape, w, 1e-5))
        added = r.compiled(lambda x, s, w: (F.rms_norm(t := x + s, w.shape, w, 1e-5), t))
        xt, st, wt = leaf(x, s, w.to(BF))
        U, rstd = x.nbytes, O._rms_norm(x, w, 1e-5, False)[1]
        r.pair(f"RMSNorm {n}x{D}", (lambda: O._rms_norm(x, w, 1e-5, False), lambda: O._rms_norm_backward(dy, x, w, rstd, None, False)),  # noqa: B023
               {"torch.compile": plain and (lambda: plain(xt, wt), (xt, wt)), "fla": fla and (lambda: fla(xt, wt, None), (xt, wt))}, (2 * U, 3 * U), dy)  # noqa: B023
        with torch.no_grad():
            r.row(f"RMSNorm + residual {n}x{D} forward", 4 * U, {"Oryx": lambda: O._add_rms_norm(x, s, w, 1e-5), "torch.compile": added and (lambda: added(xt, st, wt)),  # noqa: B023
                                                                "fla": fla and (lambda: fla(xt, wt, None, residual=st, prenorm=True))})  # noqa: B023


def gated(r):
    n = 32768 * 16
    o, g, dy, w = randn(n, 128), randn(n, 128), randn(n, 128), torch.ones(128, device=DEV)
    fla = r.use("fla", "fla.modules.norm.fused_norm_gate", "rms_norm_gated")
    plain = r.compiled(lambda o, g, w: F.rms_norm(o, w.shape, w, 1e-6) * F.silu(g))
    ot, gt, wt = leaf(o, g, w.to(BF))
    U, rstd = o.nbytes, O._gated_rms_norm(o, g, w, 1e-6, False, 1)[1]
    r.pair(f"gated RMSNorm {n}x128", (lambda: O._gated_rms_norm(o, g, w, 1e-6, False, 1), lambda: O._gated_rms_norm_backward(dy, o, g, w, rstd, False, 1)),
           {"torch.compile": plain and (lambda: plain(ot, gt, wt), (ot, gt, wt)), "fla": fla and (lambda: fla(ot, gt, wt, None), (ot, gt, wt))}, (3 * U, 5 * U), dy)


def rope(r):
    B, T = 4, 8192
    for H, K in ((16, 128), (12, 64)):
        x = randn(B, T, H, K)
        positions = torch.arange(T, device=DEV, dtype=torch.int32).expand(B, T).contiguous()
        angle = torch.arange(T, device=DEV)[:, None] / 10000 ** (torch.arange(0, K, 2, device=DEV) / K)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]

        def turn(x, cos, sin):
            a, b = x.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
        plain = r.compiled(turn)
        with torch.no_grad():
            r.row(f"RoPE {B}x{T}x{H}x{K}", 2 * x.nbytes, {"Oryx (makes its angles)": lambda: O.rope(x, positions, 10000.0, 0),  # noqa: B023
                                                         "torch.compile (float32 angles given)": plain and (lambda: plain(x, cos, sin))})  # noqa: B023


def swiglu(r):
    n, D = 32768, 5632
    a, b, dy = randn(n, D), randn(n, D), randn(n, D)
    fla, plain = r.use("fla", "fla.modules.activations", "swiglu"), r.compiled(lambda a, b: F.silu(a) * b)
    at, bt = leaf(a, b)
    U = a.nbytes
    r.pair(f"SwiGLU {n}x{D}", (lambda: O._swiglu(a, b), lambda: O._swiglu_backward(dy, a, b)),
           {"torch.compile": plain and (lambda: plain(at, bt), (at, bt)), "fla": fla and (lambda: fla(at, bt), (at, bt))}, (3 * U, 5 * U), dy)


def adamw(r):
    shapes = [(32000, 2048)] + [(2048, 2048)] * 50 + [(5632, 2048)] * 30 + [(2048,)] * 50
    p, g, m, v = ([torch.rand(*s, device=DEV) for s in shapes] for _ in range(4))
    steps = [torch.full((), 5.0, device=DEV) for _ in p]
    n = sum(t.numel() for t in p)
    forms = {"Oryx": lambda: O.adamw_step(p, g, m, v, 5, 1e-4, 0.9, 0.95, 1e-8, 0.1, 1.0),
             "torch fused": lambda: torch._fused_adamw_(p, g, m, v, [], steps, lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False)}
    r.row(f"AdamW, {n / 1e6:.0f}M float32 parameters in {len(p)} tensors", 28 * n, {k: (lambda f=f: (f(), None)[1]) for k, f in forms.items()})


def loss(r):
    donated, torch._functorch.config.donated_buffer = torch._functorch.config.donated_buffer, True  # each backward runs once here: the logits' memory may be used again
    n, D, V = 16384, 2048, 32000
    h, w = leaf(randn(n, D), randn(V, D, scale=0.02))
    host = torch.randint(0, V, (n,))
    t = host.to(DEV)
    plain = r.compiled(lambda h, w, t: F.cross_entropy((h @ w.t()).float(), t))
    make = r.use("fla", "fla.modules", "FusedLinearCrossEntropyLoss")
    fused = make and make(accumulate_grad_in_fp32=False)

    def step(f):
        def run():
            h.grad = w.grad = None
            f().backward()
            return h.grad
        return run
    forms = {"Oryx": step(lambda: O.linear_cross_entropy(h, w, host, -100, 0.0)[0]), "torch.compile, whole logits": plain and step(lambda: plain(h, w, t)),
             "fla, fused, bfloat16 weight gradient": fused and step(lambda: fused(h, t, w))}
    for name, f in forms.items():
        if f is None:
            continue
        try:
            f()
            h.grad = w.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            f()
            print(f"  {name}: {(torch.cuda.max_memory_allocated() - before) / 2**30:.2f} GiB above its inputs, gradients included", flush=True)
        except Exception:  # noqa: BLE001, S110  # the row says it
            pass
    r.row(f"linear cross-entropy, forward and gradients, {n}x{D}x{V}", 0, forms, 6.0 * n * D * V)
    torch._functorch.config.donated_buffer = donated


def attention(r):
    """Causal attention as training calls it, beside the kernels for spans over every query; both are ours to call, cuDNN's through libtorch."""
    aten = torch.ops.aten
    for B, T, H, D in ((4, 8192, 16, 128), (8, 8192, 6, 128)):
        q, k, v, d = (randn(B, T, H, D) for _ in range(4))
        h = [t.transpose(1, 2) for t in (q, k, v, d)]
        spans = torch.tensor([[b, 0, T] for b in range(B)], dtype=torch.int32, device=DEV)
        flops = 2.0 * B * H * T * T * D
        o, lse, _, _, mq, mk, seed, off, _ = aten._scaled_dot_product_cudnn_attention(*h[:3], None, True, 0.0, True, False)
        leaves = leaf(q, k, v)
        ours = O.span_attention(*leaves, spans, None, None, None, 0, None)
        with torch.no_grad():
            r.row(f"causal attention B{B} T{T} H{H} D{D} forward", 0, {"cuDNN": lambda: aten._scaled_dot_product_cudnn_attention(*h[:3], None, True, 0.0, True, False)[0].transpose(1, 2).contiguous(),  # noqa: B023
                  "kernels for spans, every query": lambda: O.span_attention(q, k, v, spans, None, None, None, 0, None)}, flops)  # noqa: B023
        r.row(f"causal attention B{B} T{T} H{H} D{D} backward", 0, {
            "cuDNN": lambda: aten._scaled_dot_product_cudnn_attention_backward(h[3], *h[:3], o, lse, seed, off, None, None, None, mq, mk, 0.0, True)[0].transpose(1, 2),  # noqa: B023
            "kernels for spans, every query": lambda: torch.autograd.grad(ours, leaves, d, retain_graph=True)}, 2.5 * flops)  # noqa: B023


PARTS = dict(conv=conv, norm=norm, gated=gated, rope=rope, swiglu=swiglu, adamw=adamw, loss=loss, attention=attention)


def main(arguments=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("library")
    p.add_argument("--only", default=",".join(PARTS))
    p.add_argument("--peers", default=",".join(PEERS))
    args = p.parse_args(arguments)
    parts, peers = args.only.split(","), chosen(args.peers, PEERS)
    for part in parts:
        if part not in PARTS:
            raise SystemExit(f"--only: found {part!r}, expected some of {', '.join(PARTS)}")
    torch.ops.load_library(args.library)
    torch._functorch.config.donated_buffer = False  # compiled backwards run many times on one graph
    torch.manual_seed(1)
    print(card(), versions([PEERS[x] for x in peers if PEERS[x]]), flush=True)
    rows = Rows(peers)
    print(f"copy of 512 MiB {rows.copy:.3f} TB/s", flush=True)
    for part in parts:
        PARTS[part](rows)
        torch.cuda.empty_cache()
    print(card().split(": ")[1], flush=True)
    return rows.failed


if __name__ == "__main__":
    sys.exit(main())
