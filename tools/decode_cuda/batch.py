"""A step of several sequences: the program's chain of kernels."""
import ctypes as C

import torch

from attention import Attention
from common import BF, COPY, DEV, F32, args, expect, lib, median_ms, ok, p, report, rope_table, stream
from model import Model, fragments


class Places(C.Structure):  # all null: row n is sequence n
    _fields_ = [(n, C.c_void_p) for n in "active places blocks".split()] + [(n, C.c_int64) for n in "page most_blocks lasting".split()]


class Embed(C.Structure):
    _fields_ = ([(n, C.c_void_p) for n in "embed tokens weight x out squares".split()] + [(n, C.c_int64) for n in "N D".split()] + [("tiles", C.c_int32), ("likeliest", C.c_void_p), ("places", Places)])


class Mix(C.Structure):
    _fields_ = ([(n, C.c_void_p) for n in "projected narrow k_conv v_conv A_log dt_bias o_norm k_tail v_tail S keys values g_rows beta_rows mode_rows".split()] +
                [(n, C.c_int64) for n in "key_sequence value_sequence g_sequence beta_sequence mode_sequence".split()] + [(n, C.c_void_p) for n in "positions modes out".split()] +
                [(n, C.c_int64) for n in "N H row capacity".split()] + [("tiles", C.c_int32), ("head_norm_eps", C.c_float), ("places", Places)])


class Finish(C.Structure):
    _fields_ = ([(n, C.c_void_p) for n in "logits below likeliest tokens feed_back positions lengths id_rows".split()] + [(n, C.c_int64) for n in "vocab id_sequence capacity N".split()] + [("places", Places)])


class Product(C.Structure):
    _fields_ = ([(n, C.c_void_p) for n in "weight x squares out".split()] + [(n, C.c_int64) for n in "N rows K".split()] + [("form", C.c_int32), ("eps", C.c_float), ("needed", C.c_void_p), ("optional", C.c_int64)] +
                [(n, C.c_void_p) for n in "narrow_weight narrow_out".split()] + [(n, C.c_int64) for n in "narrow_rows narrow".split()] + [(n, C.c_void_p) for n in "sum norm_weight sum_squares".split()])


ROWS, RESIDUAL, SWIGLU = range(3)  # forms
lib.oryx_product_tiles.restype = C.c_int64


def pack_weight(w):  # as cuda/decode_product.h says
    return fragments(w).contiguous()


def pack_narrow(w):  # float32 rows as two bfloat16 rows each that add up to them
    hi = w.to(BF)
    both = torch.stack([hi, (w - hi.float()).to(BF)], 1).flatten(0, 1)
    return pack_weight(torch.cat([both, torch.zeros(-both.shape[0] % 32, w.shape[1], device=DEV, dtype=BF)]))


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
        self.below = torch.full((N,), m.embed.shape[0], dtype=torch.int32, device=DEV)
        self.x = e(N, D, dt=F32)
        self.tiles = lib.oryx_product_tiles(C.c_int64(N))
        act = lambda k: torch.zeros(self.tiles * 8 * k, device=DEV, dtype=BF)
        self.u, self.y, self.mid, self.narrow, self.proj = act(D), act(D), act(Fw), e(N, 2 * H, dt=F32), e(N, 5 * D)
        self.squares = [torch.zeros(8 * self.tiles, (D // 32 + 3) // 4 * 4, device=DEV) for _ in range(2)]
        self.packed = [{k: pack_weight(d[k]) for k in ("w_in", "w_out", "w_gate_up", "w_down")} for d in m.layers]
        for d, w in zip(m.layers, self.packed):
            w["narrow"] = pack_narrow(d["w_beta_decay"])
        self.head = pack_weight(m.embed)
        self.logits = e(N, m.embed.shape[0])
        a = self.attention_arguments(0)
        self.work = torch.empty(lib.oryx_decode_attention_workspace(C.byref(a)), dtype=torch.uint8, device=DEV) if rows else None

    def finish(self):
        d = lambda t: t.data_ptr()
        a = Finish(d(self.logits), d(self.below), d(self.likeliest), d(self.tokens), d(self.feed), d(self.positions), d(self.lengths), d(self.ids), self.m.embed.shape[0], self.capacity, self.capacity, self.N)
        ok(lib.oryx_batch_finish(C.byref(a), stream()))

    def attention_arguments(self, l):
        s, m, N = self.state[l], self.m, self.N
        q, gate = self.proj[:, 4 * m.D:], self.proj[:, 2 * m.D:3 * m.D]
        st = lambda t: (t.stride(0), t.stride(1), t.stride(2)) if t is not None else (0, 0, 0)
        return Attention(p(q), p(s["keys"]), p(s["values"]), p(self.y), p(self.lengths), None, p(self.modes[l]), p(m.rope), N, m.H, m.H, 128, 128, self.capacity, 0, 0, 0, *st(s["keys"]), *st(s["values"]), 0, 0, 0, 128,
                         self.proj.stride(0), 128**-0.5, p(gate), p(m.layers[l]["o_norm"]), self.proj.stride(0), 1e-6, self.tiles)

    def product(self, w, x, out, rows, K, form=ROWS, squares=None, needed=None, narrow=None, norm=None, to=None):
        m = self.m
        a = Product(w.data_ptr(), x.data_ptr(), None if squares is None else squares.data_ptr(), out.data_ptr(), self.N, rows, K, form, 1e-6, p(needed), 4 * m.D,
                    None if narrow is None else narrow.data_ptr(), self.narrow.data_ptr(), 0 if narrow is None else narrow.numel() // K, 2 * m.H, self.x.data_ptr() if form == RESIDUAL else None,
                    None if norm is None else norm.data_ptr(), None if to is None else to.data_ptr())
        ok(lib.oryx_product(C.byref(a), stream()))

    # As the program does: without attention's query and kernels where nobody attends.
    def run(self, attention=True):
        m, N = self.m, self.N
        D, Fw = m.D, m.F
        row = (5 if attention else 4) * D
        first, second = self.squares
        a = Embed(m.embed.data_ptr(), self.tokens.data_ptr(), m.layers[0]["norm1"].data_ptr(), self.x.data_ptr(), self.u.data_ptr(), first.data_ptr(), N, D, self.tiles)
        ok(lib.oryx_batch_embed(C.byref(a), stream()))
        for l, (d, s, w) in enumerate(zip(m.layers, self.state, self.packed)):
            self.product(w["w_in"], self.u, self.proj, row, D, squares=first, needed=self.modes[l] if attention else None, narrow=w["narrow"])
            r = [s[k].data_ptr() if self.rows else None for k in ("keys", "values", "g_rows", "beta_rows", "mode_rows")] if self.rows else [None] * 5
            st = [s[k].stride(0) if self.rows else 0 for k in ("keys", "values", "g_rows", "beta_rows", "mode_rows")] if self.rows else [0] * 5
            a = Mix(self.proj.data_ptr(), self.narrow.data_ptr(), *[d[k].data_ptr() for k in ("k_conv", "v_conv", "A_log", "dt_bias", "o_norm")], s["k_tail"].data_ptr(), s["v_tail"].data_ptr(), s["S"].data_ptr(), *r, *st,
                    self.positions.data_ptr(), self.modes[l].data_ptr(), self.y.data_ptr(), N, m.H, row, self.capacity, self.tiles, 1e-6)
            ok(lib.oryx_batch_mix(C.byref(a), stream()))
            if self.rows and attention:
                ok(lib.oryx_decode_attention(C.byref(self.attention_arguments(l)), p(self.work), stream()))
            after = m.layers[l + 1]["norm1"] if l + 1 < m.L else m.final_norm
            self.product(w["w_out"], self.y, self.u, D, D, RESIDUAL, norm=d["norm2"], to=second)
            self.product(w["w_gate_up"], self.u, self.mid, 2 * Fw, D, SWIGLU, squares=second)
            self.product(w["w_down"], self.mid, self.u, D, Fw, RESIDUAL, norm=after, to=first)
        self.product(self.head, self.u, self.logits, m.embed.shape[0], D, squares=first)
        self.finish()


def check_one(N):
    name, m, capacity = f"batch of {N}", Model(3, 600), 600
    b = Batch(m, N, capacity)
    positions, modes = [(37 * i) % capacity for i in range(N)], torch.randint(0, 2, (m.L, N), dtype=torch.uint8)
    positions[-1] = capacity - 1
    b.tokens.copy_(torch.arange(N, dtype=torch.int32) * 7 + 3)
    b.modes.copy_(modes)
    names = ("k_tail", "v_tail", "S", "keys", "values", "g_rows", "beta_rows")
    before = [{k: s[k].clone() for k in names} for s in b.state]
    tokens, runs = b.tokens.tolist(), []
    for _ in range(2):
        for s, old in zip(b.state, before):
            for k in names:
                s[k].copy_(old[k])
        b.positions.copy_(torch.tensor(positions, dtype=torch.int32))
        b.lengths.copy_(b.positions + 1)
        for t in (b.logits, b.proj, b.x, b.narrow):
            t.fill_(float("nan"))
        b.run()
        torch.cuda.synchronize()
        runs.append([b.logits.clone()] + [s[k].clone() for s in b.state for k in names])
    expect(all(torch.equal(x, y) for x, y in zip(*runs)), f"{name}: the same bits in the second run")
    for n in sorted({0, N // 3, N // 2, N - 2, N - 1} & set(range(N))):
        state = [{k: s[k][n].clone() for k in names} for s in before]
        ref = m.reference(state, tokens[n], positions[n], modes[:, n].tolist())
        report(f"{name}, sequence {n} logits", b.logits[n], ref, 1.5e-2)
        for k in names:
            report(f"  {k}", torch.stack([s[k][n] for s in b.state]), torch.stack([s[k] for s in state]), 2e-2)
    good = b.positions.tolist() == [x + 1 for x in positions] and b.likeliest.tolist() == b.logits.float().argmax(-1).tolist()
    good = good and all([int(s["mode_rows"][n, positions[n]]) for s in b.state] == modes[:, n].tolist() for n in range(N))
    expect(good, "likeliest, positions, modes")


def check():
    for N in (5, 12, 20, 64):
        check_one(N)


def times():
    m = Model(args.layers, 64)
    for N, capacity in ((64, 64), (64, 4096), (32, 64), (16, 64), (8, 64), (8, 4096), (2, 64), (1, 64)):
        b = Batch(m, N, capacity if capacity < 4096 or N * capacity * args.layers * 8192 < 60e9 else 1024)
        m.rope = rope_table(b.capacity, 128)
        b.run()
        torch.cuda.synchronize()
        graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
        for attention, g in enumerate(graphs):
            with torch.cuda.graph(g):
                b.run(attention=bool(attention))
        for mode, g in ((0, graphs[0]), (1, graphs[1])):
            if mode == 1 and capacity == 64:
                continue
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
                    graphs[0].replay()
                torch.cuda.synchronize()
            print(prof.key_averages().table(sort_by="cuda_time_total", row_limit=16, max_name_column_width=60), flush=True)
        del g, graphs, b
        torch.cuda.empty_cache()  # the next batch lies in memory as if it were alone
