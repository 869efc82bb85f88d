#!/usr/bin/env python3
"""The decoding kernels alone, by ctypes: checks against float64, then times against the bandwidth of a copy.

    nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -shared -Xcompiler -fPIC -I. -o decode.so oryx/ops/gated_delta/cuda/gated_delta_step.cu \\
        oryx/ops/ssd/cuda/ssd_step.cu oryx/ops/decode_attention/cuda/*.cu oryx/generate/cuda/*.cu
    python3 tools/decode_cuda.py ./decode.so [--only step,attention,model,batch] [--no-times]      (a Python with a full torch, a GPU; exit code 1 on a failure)

Errors are norms of the difference over norms. Times are medians of CUDA events behind a sleep kernel, 256 MB overwritten before each repetition where inputs could
otherwise stay in L2. Rates count every input read once and every output written once.
"""
import argparse
import ctypes as C
import math
import sys
import time

import torch

ap = argparse.ArgumentParser()
ap.add_argument("library")
ap.add_argument("--only", default="step,attention,model,batch")
ap.add_argument("--no-times", action="store_true")
ap.add_argument("--layers", type=int, default=24)
args = ap.parse_args()
ONLY = args.only.split(",")
lib = C.CDLL(args.library)
DEV, BF, F32, F64 = "cuda", torch.bfloat16, torch.float32, torch.float64
SEED = int(time.time())
torch.manual_seed(SEED)
print("seed", SEED, torch.cuda.get_device_name(), torch.__version__, flush=True)
bad = 0


def p(t):
    return C.c_void_p(t.data_ptr() if t is not None else 0)


def stream():
    return C.c_void_p(torch.cuda.current_stream().cuda_stream)


def ok(code):
    if code:
        raise RuntimeError(f"cudaError {code}")


def report(name, x, ref, limit):
    global bad
    e = ((x.double() - ref.double()).norm() / ref.double().norm().clamp_min(1e-30)).item()
    good = e <= limit and x.shape == ref.shape
    bad += not good
    print(f"  {'ok  ' if good else 'FAIL'} {name}: {e:.2e}", flush=True)


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


COPY = copy_rate()
print(f"copy {COPY:.3f} TB/s", flush=True)


def show(name, ms, nbytes):
    rate = nbytes / ms / 1e9
    print(f"  {name}: {ms * 1e3:.1f} us, {rate:.3f} TB/s, {100 * rate / COPY:.1f}% of the copy", flush=True)


# ---- steps
def gdn_step(q, k, v, g, beta, S, o, scale=None):
    N, Hq, K = q.shape
    Hk, Hv, V = k.shape[1], v.shape[1], v.shape[2]
    ok(lib.oryx_gated_delta_step(p(q), p(k), p(v), p(g), p(beta), p(S), p(o), int(q.dtype == BF), *map(C.c_int64, (N, Hq, Hk, Hv, K, V, S.stride(0), S.stride(1))),
                                 C.c_float(scale or K**-0.5), C.c_float(1e-6), stream()))


def ssd_step(q, k, v, dt, bias, A, D, S, o):
    N, Hq, K = q.shape
    Hk, Hv, V = k.shape[1], v.shape[1], v.shape[2]
    ok(lib.oryx_ssd_step(p(q), p(k), p(v), p(dt), p(bias), p(A), p(D), p(S), p(o), int(q.dtype == BF), *map(C.c_int64, (N, Hq, Hk, Hv, K, V, S.stride(0), S.stride(1))), stream()))


def spread(x, heads):
    return x.repeat_interleave(heads // x.shape[1], 1)


def check_steps():
    for dtype, limit in ((BF, 1e-2), (F32, 2e-6)):
        for N, Hq, Hk, Hv, K, V in ((3, 2, 2, 2, 128, 128), (2, 2, 2, 4, 64, 100), (1, 4, 2, 2, 16, 1), (2, 2, 1, 2, 256, 63), (2, 4, 2, 2, 32, 40), (2, 3, 3, 3, 20, 33), (1, 1, 1, 1, 1, 1)):
            Hs = max(Hk, Hv)
            Ho = max(Hq, Hs)
            q, k, v = (torch.randn(N, h, d, device=DEV).to(dtype) for h, d in ((Hq, K), (Hk, K), (Hv, V)))
            S = torch.randn(N, Hs, V, K, device=DEV)
            name = f"{dtype} N{N} q{Hq} k{Hk} v{Hv} K{K} V{V}"
            for rule in ("gdn", "ssd"):
                got, o = S.clone(), torch.full((N, Ho, V), float("nan"), device=DEV, dtype=dtype)
                qd, kd, vd = spread(q.double(), Ho), spread(k.double(), Hs), spread(v.double(), Hs)
                if rule == "gdn":
                    g, b = -torch.rand(N, Hs, device=DEV) * 3, torch.rand(N, Hs, device=DEV)
                    gdn_step(q, k, v, g, b, got, o)
                    kd = kd / (kd.square().sum(-1, True) + 1e-6).sqrt()
                    qd = qd / (qd.square().sum(-1, True) + 1e-6).sqrt()
                    a = g.double().exp()[..., None]
                    w = b.double()[..., None] * (vd - a * torch.einsum("nhvk,nhk->nhv", S.double(), kd))
                    ref = a[..., None] * S.double() + w[..., None] * kd[:, :, None]
                    out = torch.einsum("nhvk,nhk->nhv", ref.repeat_interleave(Ho // Hs, 1), qd) * K**-0.5
                else:
                    dt, bias, A, D = torch.randn(N, Hs, device=DEV) * 3, torch.randn(Hs, device=DEV), torch.rand(Hs, device=DEV) * 2, torch.randn(Hs, device=DEV)
                    ssd_step(q, k, v, dt, bias, A, D, got, o)
                    step = torch.logaddexp(dt.double() + bias.double(), torch.zeros((), device=DEV, dtype=F64))
                    a = (-A.double().exp() * step).exp()
                    ref = a[..., None, None] * S.double() + (step[..., None] * vd)[..., None] * kd[:, :, None]
                    out = torch.einsum("nhvk,nhk->nhv", ref.repeat_interleave(Ho // Hs, 1), qd) + (D.double()[:, None] * vd).repeat_interleave(Ho // Hs, 1)
                report(f"{rule} {name} S", got, ref, 1e-5)
                report(f"{rule} {name} o", o, out, limit)


def time_steps():
    for rule, N, Hq, Hk, Hv, K, V in (("gdn", 64, 16, 16, 16, 128, 128), ("gdn", 1, 16, 16, 16, 128, 128), ("ssd", 64, 1, 1, 32, 128, 64), ("ssd", 64, 16, 16, 16, 128, 128)):
        Hs = max(Hk, Hv)
        q, k, v = (torch.randn(N, h, d, device=DEV).to(BF) for h, d in ((Hq, K), (Hk, K), (Hv, V)))
        states, o = [torch.randn(N, Hs, V, K, device=DEV) for _ in range(8)], torch.empty(N, max(Hq, Hs), V, device=DEV, dtype=BF)
        g = -torch.rand(N, Hs, device=DEV)
        A = torch.rand(Hs, device=DEV)
        f = (lambda S: gdn_step(q, k, v, g, g.abs(), S, o)) if rule == "gdn" else (lambda S: ssd_step(q, k, v, g, A, A, A, S, o))
        f(states[0])
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):  # over rotating states, as many steps follow one another
            for S in states:
                f(S)
        nbytes = 2 * states[0].numel() * 4 + 2 * (q.numel() + k.numel() + v.numel() + o.numel())
        show(f"{rule} step B{N} H{Hs} K{K} V{V}", median_ms(graph.replay, flush=False) / len(states), nbytes)


# ---- decode attention
class Attention(C.Structure):
    _fields_ = [(n, C.c_void_p) for n in "q keys values o lengths blocks wanted rope".split()] + [
        (n, C.c_int64) for n in ("N Hq Hk K V capacity page most_blocks key_row key_token key_head value_row value_token value_head window rotated q_row").split()] + [
        ("scale", C.c_float), ("gate", C.c_void_p), ("head_norm", C.c_void_p), ("gate_row", C.c_int64), ("head_norm_eps", C.c_float), ("o_tiles", C.c_int32)]


def rope_table(n, width, theta=10000.0):
    w = theta ** (-torch.arange(0, width, 2, dtype=F64, device=DEV) / width)
    a = torch.arange(n, dtype=F64, device=DEV)[:, None] * w
    return torch.stack([a.cos(), a.sin()], 1).to(F32).contiguous()


lib.oryx_decode_attention_workspace.restype = C.c_int64


class Problem:
    def __init__(self, lengths, capacity, Hq, Hk, K, V, dtype=BF, page=0, wanted=None, window=0, rotated=None, paste=True):
        N = len(lengths)
        self.q = torch.randn(N, Hq, K, device=DEV).to(dtype)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEV)
        self.rotated = K if rotated is None else rotated
        self.rope = rope_table(capacity, self.rotated) if self.rotated else None
        self.wanted = None if wanted is None else torch.tensor(wanted, dtype=torch.uint8, device=DEV)
        self.blocks, self.page, self.window, self.capacity = None, page, window, capacity
        if page:
            most = -(-capacity // page)
            self.blocks = torch.randperm(N * most + 3, device=DEV)[: N * most].view(N, most).to(torch.int32)
            shape = (N * most + 3, page)
        else:
            shape = (N, capacity)
        self.k, self.v = (torch.randn(*shape, Hk, d, device=DEV, dtype=dtype) for d in (K, V))
        self.o = torch.full((N, Hq, V), float("nan"), device=DEV, dtype=dtype)
        s = lambda t: (t.stride(0), t.stride(1), t.stride(2))
        self.a = Attention(p(self.q), p(self.k), p(self.v), p(self.o), p(self.lengths), p(self.blocks), p(self.wanted), p(self.rope), N, Hq, Hk, K, V, capacity, page,
                           self.blocks.shape[1] if page else 0, *s(self.k), *s(self.v), window, self.rotated, Hq * K, K**-0.5, None, None, 0, 0, 0)
        self.fast = bool(lib.oryx_decode_attention_supports(C.byref(self.a))) and dtype == BF
        self.work = torch.empty(lib.oryx_decode_attention_workspace(C.byref(self.a)) if self.fast else 1, dtype=torch.uint8, device=DEV)

    def run(self, plain=False):
        if self.fast and not plain:
            ok(lib.oryx_decode_attention(C.byref(self.a), p(self.work), stream()))
        else:
            ok(lib.oryx_decode_attention_plain(C.byref(self.a), int(self.q.dtype == BF), stream()))

    def reference(self):
        N, Hq, K = self.q.shape
        out = torch.zeros(self.o.shape, dtype=F64, device=DEV)
        for n in range(N):
            length = int(self.lengths[n])
            if self.wanted is not None and not int(self.wanted[n]) or length == 0:
                continue
            if self.page:
                k, v = (t[self.blocks[n].long()].flatten(0, 1) for t in (self.k, self.v))
            else:
                k, v = self.k[n], self.v[n]
            begin = max(0, length - self.window) if self.window else 0
            k, v = (spread(t[begin:length].double(), Hq) for t in (k, v))
            q = self.q[n].double()[None]
            if self.rope is not None:
                w = 10000.0 ** (-torch.arange(0, self.rotated, 2, dtype=F64, device=DEV) / self.rotated)

                def turn(x, pos):
                    a = pos[:, None, None] * w
                    r, h = self.rotated, self.rotated // 2
                    lo, hi = x[..., :h], x[..., h:r]
                    return torch.cat([lo * a.cos() - hi * a.sin(), hi * a.cos() + lo * a.sin(), x[..., r:]], -1)
                k = turn(k, torch.arange(begin, length, device=DEV, dtype=F64))
                q = turn(q, torch.tensor([length - 1.0], device=DEV, dtype=F64))
            s = torch.einsum("hk,jhk->hj", q[0], k) * K**-0.5
            out[n] = torch.einsum("hj,jhv->hv", s.softmax(-1), v)
        return out


def check_attention():
    cases = [
        ("16 heads", dict(lengths=[1, 5, 1000, 63, 4, 777], capacity=1003, Hq=16, Hk=16, K=128, V=128)),
        ("12 heads of 64", dict(lengths=[333, 64, 1], capacity=400, Hq=12, Hk=12, K=64, V=64)),
        ("one long", dict(lengths=[20000], capacity=20000, Hq=16, Hk=16, K=128, V=128)),
        ("groups of 2", dict(lengths=[300, 700], capacity=800, Hq=16, Hk=8, K=128, V=128)),
        ("groups of 4", dict(lengths=[3000, 17], capacity=3000, Hq=16, Hk=4, K=128, V=128)),
        ("groups of 8", dict(lengths=[301, 99], capacity=400, Hq=16, Hk=2, K=64, V=64)),
        ("24 heads", dict(lengths=[301, 99], capacity=400, Hq=24, Hk=24, K=128, V=128)),
        ("40 heads of 64", dict(lengths=[301, 99], capacity=400, Hq=40, Hk=40, K=64, V=64)),
        ("3 heads, 1 key head (plain)", dict(lengths=[301, 99], capacity=400, Hq=3, Hk=1, K=64, V=64)),
        ("K 40 V 24 (plain)", dict(lengths=[301, 9], capacity=400, Hq=4, Hk=2, K=40, V=24, rotated=16)),
        ("pages of 32", dict(lengths=[301, 99, 32, 1], capacity=400, Hq=16, Hk=16, K=128, V=128, page=32)),
        ("pages of 3", dict(lengths=[301, 99], capacity=400, Hq=8, Hk=4, K=128, V=128, page=3)),
        ("window", dict(lengths=[301, 99, 5], capacity=400, Hq=16, Hk=16, K=128, V=128, window=50)),
        ("wanted", dict(lengths=[301, 99, 5], capacity=400, Hq=16, Hk=16, K=128, V=128, wanted=[0, 1, 0])),
        ("none wanted", dict(lengths=[301, 99], capacity=400, Hq=16, Hk=16, K=128, V=128, wanted=[0, 0])),
        ("no rotation", dict(lengths=[301, 99], capacity=400, Hq=16, Hk=16, K=128, V=128, rotated=0)),
        ("200 sequences", dict(lengths=[(7 * i) % 90 + (i % 3 == 0) for i in range(200)], capacity=100, Hq=16, Hk=16, K=128, V=128)),
    ]
    for name, case in cases:
        for dtype, limit in ((BF, 1e-2), (F32, 1e-5)):
            x = Problem(dtype=dtype, **case)
            x.run()
            first = x.o.clone()
            report(f"attention {name} {dtype}{' fast' if x.fast else ''}", first, x.reference(), limit)
            x.o.fill_(float("nan"))
            x.run()
            if not torch.equal(x.o, first):
                global bad
                bad += 1
                print("  FAIL other bits in the second run")


def time_attention():
    for B, T, Hq, Hk, page in ((8, 32768, 16, 16, 0), (64, 4096, 16, 16, 0), (8, 32768, 16, 16, 32), (64, 4096, 16, 16, 32), (64, 4096, 16, 4, 0), (64, 4096, 16, 2, 0), (1, 4096, 16, 16, 0), (1, 32768, 16, 16, 0)):
        x = Problem([T] * B, T, Hq, Hk, 128, 128, page=page)
        show(f"attention B{B} {T} tokens, {Hq}/{Hk} heads{f', pages of {page}' if page else ''}", median_ms(x.run, reps=12), 4 * B * T * Hk * 128 + 4 * x.q.numel())
        del x
    x = Problem([4096] * 64, 4096, 16, 16, 128, 128, wanted=[0] * 64)
    print(f"  attention B64, none wanted: {1e3 * median_ms(x.run):.1f} us", flush=True)


# ---- the whole step
class Layer(C.Structure):
    _fields_ = [(n, C.c_void_p) for n in ("w_in w_beta_decay w_out w_gate_up w_down norm1 norm2 k_conv v_conv A_log dt_bias o_norm k_tail v_tail S keys values g_rows beta_rows mode_rows").split()]


class Step(C.Structure):
    _fields_ = [("layers", C.c_void_p), ("num_layers", C.c_int32), ("vocab_size", C.c_int32), ("below", C.c_int32), ("capacity", C.c_int64)] + [
        (n, C.c_void_p) for n in "embed head final_norm rope token position modes feed_back id_rows likeliest logits workspace".split()] + [
        (n, C.c_float) for n in "norm_eps head_norm_eps attention_scale".split()]


lib.oryx_decode_workspace.restype = C.c_int64


class Model:
    def __init__(self, L, capacity, D=2048, H=16, Fw=5440, vocab=32000):
        self.L, self.capacity, self.D, self.H, self.F = L, capacity, D, H, Fw
        n = lambda *s, std=0.02, dt=BF: torch.empty(*s, device=DEV, dtype=dt).normal_(0, std)
        self.layers = []
        for _ in range(L):
            self.layers.append(dict(
                w_in=n(5 * D, D), w_beta_decay=n(2 * H, D, dt=F32), w_out=n(D, D), w_gate_up=n(2 * Fw, D), w_down=n(D, Fw), norm1=1 + n(D, std=0.1, dt=F32), norm2=1 + n(D, std=0.1, dt=F32),
                k_conv=n(D, 4, std=0.5, dt=F32), v_conv=n(D, 4, std=0.5, dt=F32), A_log=torch.rand(H, device=DEV) * 2.5, dt_bias=n(H, std=1, dt=F32) - 4, o_norm=1 + n(128, std=0.1, dt=F32),
                k_tail=n(D, 3, std=1), v_tail=n(D, 3, std=1), S=n(H, 128, 128, std=0.1, dt=F32), keys=n(capacity, H, 128, std=1), values=n(capacity, H, 128, std=1),
                g_rows=torch.zeros(capacity, H, device=DEV), beta_rows=torch.zeros(capacity, H, device=DEV), mode_rows=torch.zeros(capacity, dtype=torch.int8, device=DEV)))
        self.embed, self.final_norm = n(vocab, D, std=1), 1 + n(D, std=0.1, dt=F32)
        self.rope = rope_table(capacity, 128)
        i32 = lambda v: torch.tensor(v, dtype=torch.int32, device=DEV)
        self.token, self.position, self.modes, self.feed, self.likeliest = i32([5]), i32([0]), torch.zeros(L, dtype=torch.uint8, device=DEV), i32([0]), i32([0])
        self.ids = torch.zeros(capacity, dtype=torch.int32, device=DEV)
        self.logits = torch.empty(vocab, device=DEV)
        self.work = torch.zeros(lib.oryx_decode_workspace(D, Fw), dtype=torch.uint8, device=DEV)
        table = (Layer * L)(*[Layer(*[d[f].data_ptr() for f, _ in Layer._fields_]) for d in self.layers])
        self.table = torch.frombuffer(bytearray(bytes(table)), dtype=torch.uint8).to(DEV)
        self.step = Step(self.table.data_ptr(), L, vocab, vocab, capacity, *[t.data_ptr() for t in (self.embed, self.embed, self.final_norm, self.rope, self.token, self.position, self.modes, self.feed,
                         self.ids, self.likeliest, self.logits, self.work)], 1e-6, 1e-6, 128**-0.5)

    def run(self):
        ok(lib.oryx_decode_step(C.byref(self.step), self.D, self.F, stream()))

    def copy(self):
        return [{k: d[k].clone() for k in ("k_tail", "v_tail", "S", "keys", "values", "g_rows", "beta_rows")} for d in self.layers]

    # Float64, with keys and values rounded as the state keeps them. Updates `state`.
    def reference(self, state, token, position, modes):
        D, H = self.D, self.H
        x = self.embed[token].double()
        norm = lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w.double()
        silu = torch.nn.functional.silu
        w = 10000.0 ** (-torch.arange(0, 128, 2, dtype=F64, device=DEV) / 128)

        def turn(x, pos):
            a = pos[:, None, None] * w
            lo, hi = x[..., :64], x[..., 64:]
            return torch.cat([lo * a.cos() - hi * a.sin(), hi * a.cos() + lo * a.sin()], -1)
        for d, s, mode in zip(self.layers, state, modes):
            u = norm(x, d["norm1"])
            pr = d["w_in"].double() @ u
            b, a = (d["w_beta_decay"].double() @ u).split(H)
            new = {}
            for name, raw in (("k", pr[:D]), ("v", pr[D:2 * D])):
                raw = raw.to(BF)
                window = torch.cat([s[name + "_tail"], raw[:, None]], 1)
                new[name] = silu((window.double() * d[name + "_conv"].double()).sum(1)).to(BF).view(H, 128)
                s[name + "_tail"].copy_(window[:, 1:])
            k, v = new["k"].double(), new["v"].double()
            s["keys"][position], s["values"][position] = new["k"], new["v"]
            q = pr[4 * D:5 * D] if mode else pr[3 * D:4 * D]
            q = q.view(H, 128)
            g = -d["A_log"].double().exp() * torch.logaddexp(a + d["dt_bias"].double(), torch.zeros((), device=DEV, dtype=F64))
            beta = b.sigmoid()
            s["g_rows"][position], s["beta_rows"][position] = g.float(), beta.float()
            kn = k / (k.square().sum(-1, True) + 1e-6).sqrt()
            S = s["S"].double()
            aa = g.exp()[:, None]
            delta = beta[:, None] * (v - aa * torch.einsum("hvk,hk->hv", S, kn))
            S = aa[..., None] * S + delta[..., None] * kn[:, None]
            s["S"].copy_(S.float())
            if mode:
                pos = torch.arange(position + 1, device=DEV, dtype=F64)
                kr, qr = turn(s["keys"][: position + 1].double(), pos), turn(q[None], pos[-1:])[0]
                sc = torch.einsum("hk,jhk->hj", qr, kr) * 128**-0.5
                o = torch.einsum("hj,jhv->hv", sc.softmax(-1), s["values"][: position + 1].double())
            else:
                qn = q / (q.square().sum(-1, True) + 1e-6).sqrt() * 128**-0.5
                o = torch.einsum("hvk,hk->hv", S, qn)
            gate = pr[2 * D:3 * D].view(H, 128)
            y = norm(o, d["o_norm"]) * silu(gate)
            x = x + d["w_out"].double() @ y.reshape(-1)
            h = norm(x, d["norm2"])
            gu = d["w_gate_up"].double() @ h
            x = x + d["w_down"].double() @ (silu(gu[0::2]) * gu[1::2])
        return self.embed.double() @ norm(x, self.final_norm)

    def bytes(self, mode, position):
        w = sum(d[k].numel() * d[k].element_size() for d in self.layers for k in ("w_beta_decay", "w_out", "w_gate_up", "w_down")) + self.L * 4 * self.D * self.D * 2
        w += self.embed.numel() * 2
        s = self.L * 2 * self.H * 128 * 128 * 4
        return w + s + (self.L * 4 * position * self.D if mode else 0)


def check_model():
    global bad
    m = Model(3, 1100)
    state = m.copy()
    m.feed.fill_(1)
    for position, modes in ((0, [0, 0, 0]), (1, [1, 1, 1]), (2, [1, 0, 1]), (37, [0, 1, 0]), (1000, [1, 1, 1]), (1001, [0, 0, 0]), (1002, [0, 1, 1]), (1099, [1, 1, 1])):
        m.position.fill_(position)
        m.modes.copy_(torch.tensor(modes, dtype=torch.uint8))
        token = int(m.token)
        for d in (m.logits, m.likeliest):
            d.fill_(-1)
        m.run()
        torch.cuda.synchronize()
        ref = m.reference(state, token, position, modes)
        report(f"step at {position} {modes} logits", m.logits, ref, 5e-3)
        for name in ("S", "k_tail", "v_tail"):
            report(f"  {name}", torch.stack([d[name] for d in m.layers]), torch.stack([s[name] for s in state]), 5e-3)
        for name in ("keys", "values", "g_rows", "beta_rows"):
            report(f"  {name}", torch.stack([d[name][position] for d in m.layers]), torch.stack([s[name][position] for s in state]), 5e-3)
        good = int(m.likeliest) == int(m.logits.argmax()) == int(m.token) and int(m.position) == position + 1 and int(m.ids[position]) == token
        good = good and [int(d["mode_rows"][position]) for d in m.layers] == modes
        bad += not good
        print("  ok   token, position, modes" if good else f"  FAIL token {int(m.token)} {int(m.logits.argmax())} position {int(m.position)}", flush=True)
        for d, s in zip(m.layers, state):  # go on from the same state, so that an error shows where it arises
            for name in s:
                s[name].copy_(d[name])
    # Same inputs, same bits.
    saved = m.copy()
    m.feed.fill_(0)
    outs = []
    for _ in range(2):
        for d, s in zip(m.layers, saved):
            for name in s:
                d[name].copy_(s[name])
        m.position.fill_(900)
        m.run()
        outs.append((m.logits.clone(), torch.stack([d["S"] for d in m.layers]).clone()))
    if not all(torch.equal(a, b) for a, b in zip(*outs)):
        bad += 1
        print("  FAIL other bits in the second run")


def time_model():
    capacity = 32768 + 64
    m = Model(args.layers, capacity)
    g = torch.cuda.CUDAGraph()
    m.run()
    torch.cuda.synchronize()
    with torch.cuda.graph(g):
        m.run()
    for mode, positions in ((0, (512, 4096, 32768)), (1, (512, 4096, 32768))):
        m.modes.fill_(mode)
        for position in positions:
            def one():
                g.replay()
            m.position.fill_(position)
            ms = median_ms(one, reps=20, flush=False)
            m.position.fill_(position)
            torch.cuda._sleep(400_000)
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            for _ in range(20):
                g.replay()
            b.record()
            b.synchronize()
            row = a.elapsed_time(b) / 20
            nbytes = m.bytes(mode, position)
            bound = nbytes / COPY / 1e9
            print(f"  step {'attention' if mode else 'linear'} at {position}: {ms:.4f} ms alone, {row:.4f} ms in a row, bound {bound:.4f} ms: {100 * bound / ms:.1f}%, {100 * bound / row:.1f}%", flush=True)


# ---- a batch: the same kernels as the program's, with torch's products between them
class Norm(C.Structure):
    _fields_ = [(n, C.c_void_p) for n in "x delta embed tokens sum weight out w_narrow narrow_out".split()] + [(n, C.c_int64) for n in "N D narrow".split()] + [("delta_parts", C.c_int32), ("tiles", C.c_int32), ("eps", C.c_float)]


class Mix(C.Structure):
    _fields_ = ([(n, C.c_void_p) for n in "projected narrow k_conv v_conv A_log dt_bias o_norm k_tail v_tail S keys values g_rows beta_rows mode_rows".split()] +
                [(n, C.c_int64) for n in "key_sequence value_sequence g_sequence beta_sequence mode_sequence".split()] + [(n, C.c_void_p) for n in "positions modes out".split()] +
                [(n, C.c_int64) for n in "N H row capacity".split()] + [("tiles", C.c_int32), ("head_norm_eps", C.c_float)])


class Product(C.Structure):
    _fields_ = [(n, C.c_void_p) for n in "weight x out".split()] + [(n, C.c_int64) for n in "N rows K".split()] + [("form", C.c_int32), ("splits", C.c_int32), ("needed", C.c_void_p), ("optional", C.c_int64)]


lib.oryx_product_tiles.restype = C.c_int64


def pack_weight(w):  # as cuda/decode_product.h says
    R, K = w.shape
    return w.view(R // 16, 2, 8, K // 16, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6).contiguous()


class Batch:
    def __init__(self, m, N, capacity, rows=True):
        self.m, self.N, self.capacity = m, N, capacity
        D, H, Fw, L = m.D, m.H, m.F, m.L
        e = lambda *s, dt=BF: torch.empty(*s, device=DEV, dtype=dt)
        n = lambda *s, std=1.0, dt=BF: e(*s, dt=dt).normal_(0, std)
        self.rows = rows
        self.state = [dict(k_tail=n(N, D, 3), v_tail=n(N, D, 3), S=n(N, H, 128, 128, std=0.1, dt=F32), keys=n(N, capacity, H, 128) if rows else None, values=n(N, capacity, H, 128) if rows else None,
                           g_rows=e(N, capacity, H, dt=F32).zero_(), beta_rows=e(N, capacity, H, dt=F32).zero_(), mode_rows=e(N, capacity, dt=torch.int8)) for _ in range(L)]
        i32 = lambda *s: torch.zeros(*s, dtype=torch.int32, device=DEV)
        self.tokens, self.positions, self.lengths, self.likeliest, self.feed, self.ids = i32(N), i32(N), i32(N), i32(N), i32(1), i32(N, capacity)
        self.modes = torch.zeros(L, N, dtype=torch.uint8, device=DEV)
        self.x = [e(N, D, dt=F32) for _ in range(2)]
        self.tiles = lib.oryx_product_tiles(C.c_int64(N))
        act = lambda k: torch.zeros(self.tiles * 8 * k, device=DEV, dtype=BF)
        self.u, self.y, self.mid, self.narrow, self.proj, self.delta = act(D), act(D), act(Fw), e(N, 2 * H, dt=F32), e(N, 5 * D), e(2, N, D, dt=F32)
        self.packed = [{k: pack_weight(d[k]) for k in ("w_in", "w_out", "w_gate_up", "w_down")} for d in m.layers]
        self.head = pack_weight(m.embed)
        self.logits = e(N, m.embed.shape[0])
        a = self.attention_arguments(0)
        self.work = torch.empty(lib.oryx_decode_attention_workspace(C.byref(a)), dtype=torch.uint8, device=DEV) if rows else None

    def attention_arguments(self, l):
        s, m, N = self.state[l], self.m, self.N
        q, gate = self.proj[:, 4 * m.D:], self.proj[:, 2 * m.D:3 * m.D]
        st = lambda t: (t.stride(0), t.stride(1), t.stride(2)) if t is not None else (0, 0, 0)
        return Attention(p(q), p(s["keys"]), p(s["values"]), p(self.y), p(self.lengths), None, p(self.modes[l]), p(m.rope), N, m.H, m.H, 128, 128, self.capacity, 0, 0, *st(s["keys"]), *st(s["values"]), 0, 128,
                         self.proj.stride(0), 128**-0.5, p(gate), p(m.layers[l]["o_norm"]), self.proj.stride(0), 1e-6, self.tiles)

    # x[i] (or the embedding) + delta -> x[to]
    def norm(self, i, to, delta, weight, narrow, out):
        m = self.m
        a = Norm(None if i is None else self.x[i].data_ptr(), None if delta is None else delta.data_ptr(), m.embed.data_ptr(), self.tokens.data_ptr(), self.x[to].data_ptr(), weight.data_ptr(), out.data_ptr(),
                 None if narrow is None else narrow.data_ptr(), self.narrow.data_ptr(), self.N, m.D, 2 * m.H, 2, self.tiles, 1e-6)
        ok(lib.oryx_batch_norm(C.byref(a), stream()))

    def product(self, w, x, out, rows, K, form=0, splits=1, needed=None):
        a = Product(w.data_ptr(), x.data_ptr(), out.data_ptr(), self.N, rows, K, form, splits, p(needed), 4 * self.m.D)
        ok(lib.oryx_product(C.byref(a), stream()))

    def run(self, only=None):
        m, N = self.m, self.N
        D, Fw = m.D, m.F
        for l, (d, s, w) in enumerate(zip(m.layers, self.state, self.packed)):
            self.norm(None if l == 0 else 1, 0, None if l == 0 else self.delta, d["norm1"], d["w_beta_decay"], self.u)
            self.product(w["w_in"], self.u, self.proj, 5 * D, D, needed=self.modes[l])
            r = [s[k].data_ptr() if self.rows else None for k in ("keys", "values", "g_rows", "beta_rows", "mode_rows")] if self.rows else [None] * 5
            st = [s[k].stride(0) if self.rows else 0 for k in ("keys", "values", "g_rows", "beta_rows", "mode_rows")] if self.rows else [0] * 5
            a = Mix(self.proj.data_ptr(), self.narrow.data_ptr(), *[d[k].data_ptr() for k in ("k_conv", "v_conv", "A_log", "dt_bias", "o_norm")], s["k_tail"].data_ptr(), s["v_tail"].data_ptr(), s["S"].data_ptr(), *r, *st,
                    self.positions.data_ptr(), self.modes[l].data_ptr(), self.y.data_ptr(), N, m.H, self.proj.stride(0), self.capacity, self.tiles, 1e-6)
            ok(lib.oryx_batch_mix(C.byref(a), stream()))
            if self.rows:
                ok(lib.oryx_decode_attention(C.byref(self.attention_arguments(l)), p(self.work), stream()))
            self.product(w["w_out"], self.y, self.delta, D, D, 1, 2)
            self.norm(0, 1, self.delta, d["norm2"], None, self.u)
            self.product(w["w_gate_up"], self.u, self.mid, 2 * Fw, D, 2)
            self.product(w["w_down"], self.mid, self.delta, D, Fw, 1, 2)
        self.norm(1, 0, self.delta, m.final_norm, None, self.u)
        self.product(self.head, self.u, self.logits, m.embed.shape[0], D)
        i64 = C.c_int64
        ok(lib.oryx_batch_finish(p(self.logits), i64(m.embed.shape[0]), i64(m.embed.shape[0]), p(self.likeliest), p(self.tokens), p(self.feed), p(self.positions), p(self.lengths), p(self.ids), i64(self.capacity),
                                 i64(self.capacity), i64(N), stream()))


def check_batch():
    global bad
    m, N = Model(3, 600), 5
    b = Batch(m, N, 600)
    positions, modes = [0, 17, 300, 599, 40], torch.tensor([[0, 1, 0, 1, 1], [1, 1, 0, 0, 1], [0, 1, 1, 1, 0]], dtype=torch.uint8)
    b.positions.copy_(torch.tensor(positions, dtype=torch.int32))
    b.lengths.copy_(b.positions + 1)
    b.tokens.copy_(torch.arange(N, dtype=torch.int32) * 7 + 3)
    b.modes.copy_(modes)
    names = ("k_tail", "v_tail", "S", "keys", "values", "g_rows", "beta_rows")
    before = [{k: s[k].clone() for k in names} for s in b.state]
    tokens = b.tokens.tolist()
    b.run()
    torch.cuda.synchronize()
    for n in range(N):
        state = [{k: s[k][n].clone() for k in names} for s in before]
        ref = m.reference(state, tokens[n], positions[n], modes[:, n].tolist())
        report(f"batch, sequence {n} logits", b.logits[n], ref, 1.5e-2)
        for k in names:
            report(f"  {k}", torch.stack([s[k][n] for s in b.state]), torch.stack([s[k] for s in state]), 2e-2)
    good = b.positions.tolist() == [x + 1 for x in positions] and b.likeliest.tolist() == b.logits.float().argmax(-1).tolist()
    good = good and all([int(s["mode_rows"][n, positions[n]]) for s in b.state] == modes[:, n].tolist() for n in range(N))
    bad += not good
    print("  ok   likeliest, positions, modes" if good else "  FAIL likeliest, positions or modes", flush=True)


def time_batch():
    m = Model(args.layers, 64)
    for N, capacity in ((64, 64), (64, 4096), (8, 4096), (1, 64)):
        b = Batch(m, N, capacity if capacity < 4096 or N * capacity * args.layers * 8192 < 60e9 else 1024)
        m.rope = rope_table(b.capacity, 128)
        b.run()
        torch.cuda.synchronize()
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g):
            b.run()
        for mode in (0, 1):
            b.modes.fill_(mode)

            def one():
                b.positions.fill_(b.capacity - 2)
                b.lengths.fill_(b.capacity - 1)
                g.replay()
            ms = median_ms(one, reps=10, flush=False)
            state = m.L * N * 2 * m.H * 128 * 128 * 4
            nbytes = m.bytes(0, 0) - m.L * 2 * m.H * 128 * 128 * 4 + state + (m.L * 4 * N * b.capacity * m.D if mode else 0)
            bound = nbytes / COPY / 1e9
            print(f"  batch {N} {'attention' if mode else 'linear'} at {b.capacity - 2}: {ms:.4f} ms, bound {bound:.4f} ms: {100 * bound / ms:.1f}%", flush=True)
        if N == 64 and capacity == 64:
            from torch.profiler import profile, ProfilerActivity
            b.modes.fill_(0)
            with profile(activities=[ProfilerActivity.CUDA]) as prof:
                for _ in range(3):
                    g.replay()
                torch.cuda.synchronize()
            print(prof.key_averages().table(sort_by="cuda_time_total", row_limit=16, max_name_column_width=60), flush=True)
        del g, b


if "step" in ONLY:
    check_steps()
if "attention" in ONLY:
    check_attention()
if "model" in ONLY:
    check_model()
if "batch" in ONLY:
    check_batch()
if not args.no_times:
    if "step" in ONLY:
        time_steps()
    if "attention" in ONLY:
        time_attention()
    if "model" in ONLY:
        time_model()
    if "batch" in ONLY:
        time_batch()
print("FAILED" if bad else "all good", bad)
sys.exit(1 if bad else 0)
