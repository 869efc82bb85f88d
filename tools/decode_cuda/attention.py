"""Decode attention over cached keys before RoPE."""
import ctypes as C

import torch

from common import BF, DEV, F32, F64, expect, lib, median_ms, ok, p, report, rope_table, show, spread, stream


class Attention(C.Structure):
    _fields_ = [(n, C.c_void_p) for n in "q keys values o lengths blocks wanted rope".split()] + [
        (n, C.c_int64) for n in ("N Hq Hk K V capacity page most_blocks lasting key_row key_token key_head value_row value_token value_head window first reach rotated q_row").split()] + [
        ("scale", C.c_float), ("gate", C.c_void_p), ("head_norm", C.c_void_p), ("gate_row", C.c_int64), ("head_norm_eps", C.c_float), ("o_tiles", C.c_int32), ("q_norm", C.c_void_p), ("k_norm", C.c_void_p), ("norm_eps", C.c_float), ("norm_together", C.c_int32), ("steps", C.c_int64), ("step_wanted", C.c_void_p), ("new_keys", C.c_void_p), ("new_values", C.c_void_p)]


lib.oryx_decode_attention_workspace.restype = lib.oryx_decode_attention_general_workspace.restype = C.c_int64


class Problem:
    def __init__(self, lengths, capacity, Hq, Hk, K, V, dtype=BF, page=0, wanted=None, window=0, first=0, reach=0, norm=None, rotated=None):
        N = len(lengths)
        self.q = torch.randn(N, Hq, K, device=DEV).to(dtype)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEV)
        self.rotated = K if rotated is None else rotated
        self.rope = rope_table(capacity, self.rotated) if self.rotated else None
        self.wanted = None if wanted is None else torch.tensor(wanted, dtype=torch.uint8, device=DEV)
        self.blocks, self.page, self.window, self.first, self.reach, self.capacity, self.norm = None, page, window, first, reach, capacity, norm
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
                           self.blocks.shape[1] if page else 0, 0, *s(self.k), *s(self.v), window, first, reach, self.rotated, Hq * K, K**-0.5, None, None, 0, 0, 0, None, None, 0, 0)
        if norm:  # "head" or "together"
            self.q_norm, self.k_norm = (1 + 0.3 * torch.randn(K if norm == "head" else h * K, device=DEV) for h in (Hq, Hk))
            self.a.q_norm, self.a.k_norm, self.a.norm_eps, self.a.norm_together = p(self.q_norm), p(self.k_norm), 1e-6, int(norm == "together")
        self.fast = bool(lib.oryx_decode_attention_supports(C.byref(self.a))) and dtype == BF
        self.work = torch.empty((lib.oryx_decode_attention_workspace if self.fast else lib.oryx_decode_attention_general_workspace)(C.byref(self.a)), dtype=torch.uint8, device=DEV)

    def run(self):
        if self.fast:
            ok(lib.oryx_decode_attention(C.byref(self.a), p(self.work), stream()))
        else:
            ok(lib.oryx_decode_attention_general(C.byref(self.a), int(self.q.dtype == BF), p(self.work), stream()))

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
            at = torch.arange(length, device=DEV)
            seen = torch.ones_like(at, dtype=torch.bool) if not self.window else (at >= length - self.window) | (at < self.first)
            at = at[seen & (at >= length - self.reach)] if self.reach else at[seen]
            q, k, v = self.q[n].double()[None], k[at].double(), v[at].double()
            if self.norm:
                def normed(x, w):
                    y = x if self.norm == "head" else x.flatten(1)
                    return (y * w.double() * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6)).view(x.shape)
                q, k = normed(q, self.q_norm), normed(k, self.k_norm)
            k, v = spread(k, Hq), spread(v, Hq)
            if self.rope is not None:
                w = 10000.0 ** (-torch.arange(0, self.rotated, 2, dtype=F64, device=DEV) / self.rotated)

                def turn(x, pos):
                    a = pos[:, None, None] * w
                    r, h = self.rotated, self.rotated // 2
                    lo, hi = x[..., :h], x[..., h:r]
                    return torch.cat([lo * a.cos() - hi * a.sin(), hi * a.cos() + lo * a.sin(), x[..., r:]], -1)
                k = turn(k, at.to(F64))
                q = turn(q, torch.tensor([length - 1.0], device=DEV, dtype=F64))
            s = torch.einsum("hk,jhk->hj", q[0], k) * K**-0.5
            out[n] = torch.einsum("hj,jhv->hv", s.softmax(-1), v)
        return out


def check():
    cases = [
        ("16 heads", dict(lengths=[1, 5, 1000, 63, 4, 777], capacity=1003, Hq=16, Hk=16, K=128, V=128)),
        ("12 heads of 64", dict(lengths=[333, 64, 1], capacity=400, Hq=12, Hk=12, K=64, V=64)),
        ("one long", dict(lengths=[20000], capacity=20000, Hq=16, Hk=16, K=128, V=128)),
        ("groups of 2", dict(lengths=[300, 700], capacity=800, Hq=16, Hk=8, K=128, V=128)),
        ("groups of 4", dict(lengths=[3000, 17], capacity=3000, Hq=16, Hk=4, K=128, V=128)),
        ("groups of 8", dict(lengths=[301, 99], capacity=400, Hq=16, Hk=2, K=64, V=64)),
        ("24 heads", dict(lengths=[301, 99], capacity=400, Hq=24, Hk=24, K=128, V=128)),
        ("40 heads of 64", dict(lengths=[301, 99], capacity=400, Hq=40, Hk=40, K=64, V=64)),
        ("3 heads, 1 key head", dict(lengths=[301, 99], capacity=400, Hq=3, Hk=1, K=64, V=64)),
        ("K 40 V 24", dict(lengths=[301, 9], capacity=400, Hq=4, Hk=2, K=40, V=24, rotated=16)),
        ("pages of 32", dict(lengths=[301, 99, 32, 1], capacity=400, Hq=16, Hk=16, K=128, V=128, page=32)),
        ("pages of 3", dict(lengths=[301, 99], capacity=400, Hq=8, Hk=4, K=128, V=128, page=3)),
        ("window", dict(lengths=[301, 99, 5], capacity=400, Hq=16, Hk=16, K=128, V=128, window=50)),
        ("first and last tokens", dict(lengths=[301, 99, 5, 60], capacity=400, Hq=16, Hk=16, K=128, V=128, window=50, first=11)),
        ("first and last tokens, reach", dict(lengths=[301, 99, 5, 60], capacity=400, Hq=12, Hk=12, K=64, V=64, window=50, first=11, reach=57)),
        ("first and last tokens, pages of 32", dict(lengths=[301, 99, 5], capacity=400, Hq=16, Hk=2, K=128, V=128, window=77, first=35, page=32)),
        ("norms by head", dict(lengths=[301, 99, 5], capacity=400, Hq=16, Hk=2, K=256, V=256, rotated=64, norm="head", window=77, first=35)),
        ("norms over all heads", dict(lengths=[301, 99, 5], capacity=400, Hq=6, Hk=6, K=128, V=128, norm="together", page=16)),
        ("heads of 1,000", dict(lengths=[301, 9], capacity=400, Hq=4, Hk=2, K=1000, V=999, rotated=998)),
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
                expect(False, "the same bits in the second run")


def times():
    for B, T, Hq, Hk, page in ((8, 32768, 16, 16, 0), (64, 4096, 16, 16, 0), (8, 32768, 16, 16, 32), (64, 4096, 16, 16, 32), (64, 4096, 16, 4, 0), (64, 4096, 16, 2, 0), (1, 4096, 16, 16, 0), (1, 32768, 16, 16, 0)):
        x = Problem([T] * B, T, Hq, Hk, 128, 128, page=page)
        show(f"attention B{B} {T} tokens, {Hq}/{Hk} heads{f', pages of {page}' if page else ''}", median_ms(x.run, reps=12), 4 * B * T * Hk * 128 + 4 * x.q.numel())
        del x
    for name, B, T, case in (("Qwen3-Next", 1, 4096, dict(Hq=16, Hk=2, K=256, V=256, rotated=64, norm="head")), ("Qwen3-Next", 64, 4096, dict(Hq=16, Hk=2, K=256, V=256, rotated=64, norm="head")),
                             ("OLMo hybrid 7B", 1, 4096, dict(Hq=30, Hk=30, K=128, V=128, norm="together")), ("OLMo hybrid 7B", 8, 4096, dict(Hq=30, Hk=30, K=128, V=128, norm="together")),
                             ("4,096 + 64 of 32,768", 8, 32768, dict(Hq=16, Hk=16, K=128, V=128, window=4096, first=64, page=32))):
        x = Problem([T] * B, T, **case)
        seen = min(T, (case.get("window") or T) + case.get("first", 0))
        show(f"attention {name}, B{B} {T} tokens", median_ms(x.run, reps=12), 4 * B * seen * case["Hk"] * case["K"] + 4 * x.q.numel())
        del x
    x = Problem([4096] * 64, 4096, 16, 16, 128, 128, wanted=[0] * 64)
    print(f"  attention B64, none wanted: {1e3 * median_ms(x.run):.1f} us", flush=True)
