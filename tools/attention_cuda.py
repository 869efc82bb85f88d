"""Checks and times the Hopper kernels of span attention (oryx/ops/span_attention/cuda) without the rest of the library, against cuDNN.

    nvcc -std=c++20 -shared -Xcompiler -fPIC -gencode=arch=compute_90a,code=sm_90a -O3 -I. oryx/ops/span_attention/cuda/*.cu -o attention.so
    python3 tools/attention_cuda.py ./attention.so [--quick] [--no-times]

Needs torch with CUDA on an H100 or H200. The check compares with the formula in float64 (norm of the difference over norm, limits 1e-2 for values and
2e-2 for gradients, outputs and scratch poisoned with NaN, every case run twice for equal bits) and exits 1 when a case fails. Times (cuda_harness.py)
cover planning, the kernels, and zeroing the rows outside spans.
"""
import argparse
import ctypes
import sys

import torch

from cuda_harness import BF, DEV, P, Verdicts, bench, error, launch, scratch

I64 = ctypes.c_int64
POINTERS = "q k v o_in d_o o lse dq dk dv spans cu_q cu_k key_lengths".split()
SIZES = "B Tq Tk Hq Hk D n_spans N window processors".split()


class FarKeys(ctypes.Structure):  # struct OryxFarKeys
    _fields_ = [("k", P), ("v", P), ("k_stride", I64 * 3), ("v_stride", I64 * 3), ("keys", ctypes.c_int32)]


class Arguments(ctypes.Structure):  # struct OryxSpanAttention
    _fields_ = ([(n, P) for n in POINTERS] + [(n, I64 * 3) for n in ("q_stride", "k_stride", "v_stride")]
                + [(n, ctypes.c_int32) for n in SIZES] + [("scale", ctypes.c_float), ("first", FarKeys), ("between", FarKeys), ("positions", P), ("seen", P)]
                + [(n, ctypes.c_int32) for n in ("far_window", "reach")])


def load(path):
    lib = ctypes.CDLL(path)
    for name in ("plan_bytes", "forward_bytes", "backward_bytes"):
        f = getattr(lib, "oryx_span_attention_" + name)
        f.restype, f.argtypes = ctypes.c_size_t, [P]
    lib.oryx_span_attention_slots.restype, lib.oryx_span_attention_slots.argtypes = I64, [P]
    lib.oryx_span_attention_plan.argtypes = [P, P, P]
    lib.oryx_span_attention_forward.argtypes = lib.oryx_span_attention_backward.argtypes = [P, P, P, P]
    return lib


class Case:
    """One call of the operator: plan(), forward() and backward() on the current stream; every output and scratch poisoned. far: see far_case()."""

    def __init__(self, lib, q, k, v, spans=None, cu=None, cuk=None, lengths=None, window=0, d_o=None, poison=True, far=None):
        B, Tq, Hq, D = q.shape
        self.lib, self.kept = lib, [q, k, v, spans, cu, cuk, lengths, d_o]
        ints = [None if t is None else torch.tensor(t, dtype=torch.int32, device=DEV) for t in (spans, cu, cuk, lengths)]
        self.o = torch.empty(B, Tq, Hq, D, dtype=BF, device=DEV)
        self.grads = [torch.empty(t.shape, dtype=BF, device=DEV) for t in (q, k, v)]
        a = Arguments(*[None] * len(POINTERS))
        a.B, a.Tq, a.Tk, a.Hq, a.Hk, a.D, a.n_spans = B, Tq, k.shape[1], Hq, k.shape[2], D, 0 if spans is None else len(spans)
        a.N, a.window, a.scale = B if cu is None else len(cu) - 1, window, D**-0.5
        a.processors = torch.cuda.get_device_properties(0).multi_processor_count
        for name, t in zip(("spans", "cu_q", "cu_k", "key_lengths"), ints):
            setattr(a, name, None if t is None else t.data_ptr())
        for name, t in (("q", q), ("k", k), ("v", v)):
            setattr(a, name, t.data_ptr())
            setattr(a, name + "_stride", (I64 * 3)(*t.stride()[:3]))
        if far is not None:
            self.kept.append(far)
            for name in ("first", "between"):
                if name not in far:
                    continue
                key, value = far[name]
                f = getattr(a, name)
                f.k, f.v, f.keys = key.data_ptr(), value.data_ptr(), key.shape[1]
                f.k_stride, f.v_stride = (I64 * 3)(*key.stride()[:3]), (I64 * 3)(*value.stride()[:3])
            a.positions, a.seen = far["positions"].data_ptr(), far["seen"].data_ptr() if "seen" in far else None
            a.far_window, a.reach = window, far["reach"]
        a.o = a.o_in = self.o.data_ptr()
        a.dq, a.dk, a.dv = (t.data_ptr() for t in self.grads)
        a.d_o = None if d_o is None else d_o.data_ptr()
        self.slots = lib.oryx_span_attention_slots(ctypes.byref(a))
        self.lse = torch.empty(Hq, self.slots, device=DEV)
        a.lse = self.lse.data_ptr()
        self.a = a
        sizes = [getattr(lib, f"oryx_span_attention_{n}_bytes")(ctypes.byref(a)) for n in ("plan", "forward", "backward")]
        self.memory = [scratch(n, poison) for n in sizes]
        self.kept += ints
        if poison:
            for t in (self.o, self.lse, *self.grads):
                t.fill_(float("nan"))
            if cuk is not None or lengths is not None:  # keys of no sequence: the caller's zeros
                for t in self.grads[1:]:
                    t.zero_()

    def call(self, name, *memory):
        launch(getattr(self.lib, "oryx_span_attention_" + name), ctypes.byref(self.a), *memory)

    def plan(self):
        self.call("plan", self.memory[0].data_ptr())

    def forward(self):
        self.plan()
        self.call("forward", self.memory[0].data_ptr(), self.memory[1].data_ptr())

    def backward(self):
        self.call("backward", self.memory[0].data_ptr(), self.memory[2].data_ptr())


def sequences(B, Tq, Tk, cu, cuk, lengths):
    if cu is not None:
        cuk = cuk or cu
        return [(0, cu[n], cu[n + 1], cuk[n], cuk[n + 1]) for n in range(len(cu) - 1)]
    return [(b, 0, Tq, 0, Tk if lengths is None else lengths[b]) for b in range(B)]


def reference(q, k, v, spans=None, cu=None, cuk=None, lengths=None, window=0, d_o=None):
    """The formula in float64; values, and gradients where d_o is given."""
    B, Tq, Hq, D = q.shape
    g = Hq // k.shape[2]
    x = [t.double().requires_grad_(d_o is not None) for t in (q, k, v)]
    o = torch.zeros(q.shape, dtype=torch.float64, device=DEV)
    wanted = torch.ones(B, Tq, dtype=torch.bool, device=DEV)
    if spans is not None:
        wanted[:] = False
        for b, s, e in spans:
            wanted[b, s:e] = True
    for b, q0, q1, k0, k1 in sequences(B, Tq, k.shape[1], cu, cuk, lengths):
        if q1 == q0:
            continue
        qs, ks, vs = x[0][b, q0:q1], x[1][b, k0:k1].repeat_interleave(g, 1), x[2][b, k0:k1].repeat_interleave(g, 1)
        i = torch.arange(q1 - q0, device=DEV)[:, None] + (k1 - k0) - (q1 - q0)
        j = torch.arange(k1 - k0, device=DEV)[None]
        seen = (j <= i) & (j > i - window if window else j <= i)
        s = torch.einsum("qhd,khd->hqk", qs, ks) * D**-0.5
        y = torch.einsum("hqk,khd->qhd", s.masked_fill(~seen, float("-inf")).softmax(-1), vs)
        o = o.index_put((torch.tensor(b, device=DEV), torch.arange(q0, q1, device=DEV)), y * wanted[b, q0:q1, None, None])
    if d_o is None:
        return [o]
    o.backward(d_o.double())
    return [o.detach(), *(t.grad if t.grad is not None else torch.zeros_like(t) for t in x)]


def random(*shape):
    return torch.randn(*shape, device=DEV).to(BF)


def far_case(lengths, counts, Hq, Hk, D, first, window, reach=0, between=0, packed=False, spans=None):
    """Arguments of Case for sequences of `lengths` tokens, whose last `counts` are queries: the window's keys, the first ones and `between` chosen ones, each seen for a
    while; and the formula's values over all keys in float64."""
    N, gen = len(lengths), torch.Generator().manual_seed(3)
    q, k, v = random(sum(counts), Hq, D), random(sum(lengths), Hk, D), random(sum(lengths), Hk, D)
    ends, starts = [sum(lengths[:n + 1]) for n in range(N)], [max(0, t - c - window + 1) for t, c in zip(lengths, counts)]
    held = [t - s for t, s in zip(lengths, starts)]
    last = [torch.full((N, max(held) + 5, Hk, D), float("nan"), device=DEV, dtype=BF) for _ in "kv"]
    firsts = [torch.zeros(N, first, Hk, D, device=DEV, dtype=BF) for _ in "kv"]
    chosen = [torch.ones(N, max(between, 1), Hk, D, device=DEV, dtype=BF) for _ in "kv"]
    seen, want = torch.zeros(N, (between + 127) // 128 * 128, 2, dtype=torch.int32), []
    for n, (length, count) in enumerate(zip(lengths, counts)):
        begin, picked = ends[n] - length, []
        if length > first:
            picked = (first + torch.randperm(length - first, generator=gen)[:between]).sort().values.tolist()
        for to, f, c, x in zip(last, firsts, chosen, (k, v)):
            to[n, :held[n]] = x[begin + starts[n]:begin + length]
            f[n, :min(first, length)] = x[begin:begin + min(first, length)]
            c[n, :len(picked)] = x[begin + torch.tensor(picked, dtype=torch.long, device=DEV)]
        t, s = torch.arange(length - count, length, device=DEV)[:, None], torch.arange(length, device=DEV)[None]
        mask = (s < first) | (s > t - window)
        for i, p in enumerate(picked):
            seen[n, i, 0] = p + window
            seen[n, i, 1] = 1 << 30 if i % 3 == 0 else p + window + int(torch.randint(0, 150, (1,), generator=gen))
            if reach:
                seen[n, i, 1] = min(int(seen[n, i, 1]), p + reach)
            mask[:, p] |= ((t >= seen[n, i, 0]) & (t < seen[n, i, 1]))[:, 0]
        mask &= s <= t
        if reach:
            mask &= s > t - reach
        x = [y[begin:begin + length].double().repeat_interleave(Hq // Hk, 1) for y in (k, v)]
        at = sum(counts[:n])
        score = torch.einsum("qhd,khd->hqk", q[at:at + count].double(), x[0]) * D**-0.5
        want.append(torch.einsum("hqk,khd->qhd", score.masked_fill(~mask, float("-inf")).softmax(-1), x[1]))
    B = 1 if packed else N
    want, positions = torch.cat(want).view(B, -1, Hq, D), torch.cat([torch.arange(t - c, t) for t, c in zip(lengths, counts)]).int().to(DEV).view(B, -1)
    if spans is not None:
        wanted = torch.zeros(B, want.shape[1], 1, 1, device=DEV)
        for b, s, e in spans:
            wanted[b, s:e] = 1
        want = want * wanted
    kw = dict(spans=spans, window=window, far=dict(positions=positions, reach=reach))
    if first:
        kw["far"]["first"] = firsts
    if between:
        kw["far"].update(between=chosen, seen=seen.to(DEV))
    if packed:
        kw.update(cu=[sum(counts[:n]) for n in range(N + 1)], cuk=[sum(held[:n]) for n in range(N + 1)])
        last = [torch.cat([x[n, :held[n]] for n in range(N)])[None] for x in last]
    else:
        kw["lengths"] = held
    return (q.view(B, -1, Hq, D), *last), kw, want


def check(lib, backward):
    verdict, limits = Verdicts(), dict(o=1e-2, dq=2e-2, dk=2e-2, dv=2e-2)

    def errors(found, want):
        # Gradients that cancel to nothing are held to a part of what was cancelled.
        return {n: error(f, w, 1e-3 * w.numel()**0.5) for n, f, w in zip(limits, found, want)}

    def one(name, B, T, Hq, Hk, D, Tk=None, **kw):
        Tk = Tk or T
        q, k, v, d_o = random(B, T, Hq, D), random(B, Tk, Hk, D), random(B, Tk, Hk, D), random(B, T, Hq, D)
        found = []
        for _ in range(2):
            c = Case(lib, q, k, v, d_o=d_o, **kw)
            c.forward()
            if backward:
                c.backward()
            torch.cuda.synchronize()
            found.append([c.o, *(c.grads if backward else [])])
        want = reference(q, k, v, d_o=d_o if backward else None, **kw)
        verdict.errors(name, errors(found[0], want), limits, all(torch.equal(x, y) for x, y in zip(*found)))

    def far(name, *shape, **more):
        inputs, kw, want = far_case(*shape, **more)
        found = []
        for _ in range(2):
            c = Case(lib, *inputs, **kw)
            c.forward()
            torch.cuda.synchronize()
            found.append(c.o)
        verdict.errors(name, errors(found[:1], [want]), limits, torch.equal(*found))
    for D in (128, 64):
        for T in (128, 1, 63, 100, 257, 1000):
            one(f"D{D} T{T}", 2, T, 2, 2, D)
        one(f"D{D} spans", 2, 1000, 2, 2, D, spans=[(0, 0, 256), (0, 300, 301), (1, 999, 1000), (0, 512, 768), (1, 5, 133)])
        one(f"D{D} single tokens", 1, 1000, 2, 2, D, spans=[(0, i, i + 1) for i in range(3, 1000, 7)])
        one(f"D{D} overlapping and empty spans", 1, 500, 2, 2, D, spans=[(0, 100, 300), (0, 50, 150), (0, 20, 20)])
        one(f"D{D} no spans at all", 1, 300, 2, 2, D, spans=[(0, 20, 20)])
        one(f"D{D} grouped heads", 2, 400, 8, 2, D, spans=[(0, 100, 300), (1, 0, 400)])
        one(f"D{D} grouped heads, long and short", 1, 9000, 4, 2, D, cu=[0, 100, 4300, 4300, 4301, 9000], spans=[(0, 50, 200), (0, 250, 8990)])
        one(f"D{D} window", 2, 700, 2, 1, D, window=100)
        one(f"D{D} window 1, spans", 1, 300, 2, 2, D, window=1, spans=[(0, 10, 290)])
        one(f"D{D} window 300, spans", 1, 1500, 2, 2, D, window=300, spans=[(0, i, i + 60) for i in range(0, 1400, 200)])
        one(f"D{D} past keys", 2, 200, 2, 2, D, Tk=777)
        one(f"D{D} packed", 1, 1030, 4, 2, D, cu=[0, 1, 65, 65, 400, 403, 1030])
        one(f"D{D} packed, window, spans", 1, 1030, 4, 2, D, cu=[0, 1, 65, 65, 400, 403, 1030], window=70, spans=[(0, 0, 300), (0, 390, 800)])
        one(f"D{D} packed, past keys", 1, 330, 2, 2, D, Tk=900, cu=[0, 100, 130, 330], cuk=[0, 300, 330, 850], spans=[(0, 20, 300)])
        one(f"D{D} key lengths", 2, 100, 2, 2, D, Tk=700, lengths=[100, 655])
        one(f"D{D} many keys, few queries", 1, 4096, 2, 1, D, spans=[(0, 4000, 4096)])
        # what no query sees may hold anything
        q, k, v = random(2, 50, 2, D), random(2, 600, 2, D), random(2, 600, 2, D)
        for t in (k, v):
            t[0, 300:] = float("nan")
            t[1, 413:] = float("nan")
        d_o = random(2, 50, 2, D)
        for name, *shape in (("first keys", [900, 777], [300, 300], 2, 2, D, 200, 130), ("first keys, one query", [900, 777], [1, 1], 4, 2, D, 64, 100),
                             ("first keys, short texts", [150, 90], [90, 90], 2, 2, D, 200, 20), ("first keys and many heads", [3000], [1000], 16, 4, D, 64, 1024)):
            far(f"D{D} {name}", *shape)
        far(f"D{D} first keys, packed, spans", [300, 1, 500, 64, 513], [200, 1, 0, 63, 300], 4, 2, D, 33, 50, packed=True, spans=[(0, 150, 260), (0, 400, 564)])
        far(f"D{D} first keys, reach", [600, 900], [550, 550], 2, 2, D, 140, 60, reach=170)
        far(f"D{D} keys between", [3000, 700], [640, 640], 4, 2, D, 10, 70, between=600)
        far(f"D{D} keys between, packed, spans", [500, 30, 2, 800], [100, 30, 0, 250], 2, 2, D, 0, 20, between=140, packed=True, spans=[(0, 0, 140), (0, 200, 380)])
        far(f"D{D} keys between, reach", [1500], [600], 2, 2, D, 9, 50, reach=300, between=300)
        c = Case(lib, q, k, v, lengths=[300, 413], d_o=d_o)
        c.forward()
        if backward:
            c.backward()
        torch.cuda.synchronize()
        want = reference(q, k, v, lengths=[300, 413], d_o=d_o if backward else None)
        verdict.errors(f"D{D} NaN beyond the keys in use", errors([c.o, *c.grads] if backward else [c.o], [torch.nan_to_num(w) for w in want]), limits)
    return verdict.close()


def chunks(B, T, share, size=256):
    gen = torch.Generator().manual_seed(1)
    spans = []
    for b in range(B):
        picked = torch.randperm(T // size, generator=gen)[:int(T // size * share)].sort().values
        spans += [(b, int(i) * size, int(i) * size + size) for i in picked]
    return spans


def area(spans, B, T):
    """Share of the full causal area that spans have."""
    return sum((s + 1 + e) * (e - s) / 2 for _, s, e in spans) / (B * T * (T + 1) / 2)


def times(lib, backward, shapes, only=()):
    aten = torch.ops.aten
    print(torch.cuda.get_device_name(), "times in ms; ratio: to full causal by cuDNN")
    for B, T, Hq, Hk, D in shapes:
        q, k, v, d_o = random(B, T, Hq, D), random(B, T, Hk, D), random(B, T, Hk, D), random(B, T, Hq, D)
        h = [t.transpose(1, 2) for t in (q, k, v, d_o)]

        def full():
            return aten._scaled_dot_product_cudnn_attention(*h[:3], None, True, 0.0, True, False)
        o, lse, _, _, mq, mk, seed, off, _ = full()
        base = [bench(full)]
        if backward:
            base.append(bench(lambda: aten._scaled_dot_product_cudnn_attention_backward(h[3], *h[:3], o, lse, seed, off, None, None, None, mq, mk, 0.0, True)))
        flops = 2 * B * Hq * T * T * D
        print(f"B{B} T{T} H{Hq}/{Hk} D{D} cuDNN " + ", ".join(f"{t:.3f} ({f * flops / t / 1e9:.0f} TFLOP/s)" for t, f in zip(base, (1, 2.5))), flush=True)
        docs = [0]
        gen = torch.Generator().manual_seed(2)
        while docs[-1] < B * T:
            docs.append(min(B * T, docs[-1] + int(torch.randint(1, 4096, (1,), generator=gen))))
        last = [(b, T - T // 10, T) for b in range(B)]
        rows = [("every query", {}, 1.0), ("25% in chunks of 256", dict(spans=chunks(B, T, 0.25)), area(chunks(B, T, 0.25), B, T)),
                ("last 10%", dict(spans=last), area(last, B, T)), ("10% in chunks of 256", dict(spans=chunks(B, T, 0.1)), area(chunks(B, T, 0.1), B, T)),
                ("packed documents", dict(cu=docs), sum((y - x) ** 2 for x, y in zip(docs, docs[1:])) / (B * T * T)),
                ("window 1024", dict(window=1024), (1024 * T - 1024 * 512) / (T * T / 2))]
        for name, kw, share in rows:
            if only and name not in only:
                continue
            x = [t.flatten(0, 1)[None] for t in (q, k, v, d_o)] if "cu" in kw else [q, k, v, d_o]
            c = Case(lib, *x[:3], d_o=x[3], poison=False, **kw)
            found = [bench(c.forward)] + ([bench(c.backward)] if backward else [])
            print(f"  {name}: area {share:.3f}; " + ", ".join(f"{t:.3f} = {t / b:.3f} ({share * f * flops / t / 1e9:.0f} TFLOP/s)" for t, b, f in zip(found, base, (1, 2.5)))
                  + f", plan {bench(c.plan):.3f}", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("library")
    p.add_argument("--quick", action="store_true", help="times at one shape")
    p.add_argument("--no-times", action="store_true")
    p.add_argument("--forward", action="store_true", help="the forward pass alone")
    args = p.parse_args()
    library = load(args.library)
    bad = check(library, not args.forward)
    if not args.no_times:
        all_shapes = [(4, 8192, 16, 16, 128), (1, 32768, 16, 16, 128), (8, 2048, 16, 16, 128), (4, 8192, 16, 4, 128), (4, 8192, 16, 16, 64)]
        times(library, not args.forward, all_shapes[:1] if args.quick else all_shapes)
    sys.exit(bad)
