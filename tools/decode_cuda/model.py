"""The whole step of one sequence, by the persistent kernel."""
import ctypes as C

import torch

from common import BF, COPY, DEV, F32, F64, args, expect, lib, median_ms, ok, report, rope_table, stream


class Layer(C.Structure):
    _fields_ = [(n, C.c_void_p) for n in ("w_in w_beta_decay w_out w_gate_up w_down norm1 norm2 k_conv v_conv A_log dt_bias o_norm k_tail v_tail S keys values g_rows beta_rows mode_rows").split()]


class Step(C.Structure):
    _fields_ = [("layers", C.c_void_p), ("maps", C.c_void_p), ("num_layers", C.c_int32), ("vocab_size", C.c_int32), ("capacity", C.c_int64)] + [
        (n, C.c_void_p) for n in "embed head final_norm rope token position modes feed_back id_rows stretches".split()] + [("first", C.c_int64), ("window", C.c_int64)] + [
        (n, C.c_void_p) for n in "below likeliest logits workspace".split()] + [
        (n, C.c_float) for n in "norm_eps head_norm_eps attention_scale".split()]


lib.oryx_decode_workspace.restype = C.c_int64


def fragments(w):  # [R / 16, C / 16, 256]
    R, K = w.shape
    return w.view(R // 16, 2, 8, K // 16, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6).reshape(R // 16, K // 16, 256)


def row_pieces(w):  # as cuda/decode_step.h says
    R, K = w.shape
    return w.view(R // 4, 4, K // 64, 2, 2, 2, 4, 2).permute(0, 2, 4, 1, 6, 5, 3, 7).reshape(R // 4, -1)


def side_by_side(pieces, starts, counts):  # the first piece of each multiprocessor, the second of each, ...
    return pieces[torch.tensor([s + i for i in range(max(counts)) for s, n in zip(starts, counts) if i < n], device=pieces.device)]


def in_pieces(w, H):
    each = row_pieces(w).view(-1, H * 8, 4, 4 * w.shape[1])
    return each.transpose(1, 2).contiguous()


def gate_up_pieces(w, H):
    tiles = w.shape[0] // 32
    begins = [tiles * i // H for i in range(H + 1)]
    counts = [begins[i + 1] - begins[i] for i in range(H) for _ in range(8)]
    return side_by_side(row_pieces(w), [8 * begins[i] + r * (begins[i + 1] - begins[i]) for i in range(H) for r in range(8)], counts)


def column_pieces(w, H):
    tiles = fragments(w).view(8, 8, 2, -1, 256)  # [multiprocessor][warp][16 rows][tile]
    T = tiles.shape[3]
    begins = [T * i // H for i in range(H + 1)]
    pairs = T // H // 2
    out = [tiles[:, :, :, begins[i] + 2 * k:begins[i] + 2 * k + 2].flatten() for k in range(pairs) for i in range(H)]
    for i in range(H):
        rest = tiles[:, :, :, begins[i] + 2 * pairs:begins[i + 1]]
        n = rest.shape[3] // 2 * 2
        out.append(torch.cat([rest[:, :, :, :n].reshape(8, 8, 2, n // 2, 2, 256).permute(0, 3, 1, 2, 4, 5).reshape(8, -1), rest[:, :, :, n:].reshape(8, -1)], 1).flatten())
    return torch.cat(out)


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
        self.head = row_pieces(self.embed)
        self.packed = [dict(w_in=in_pieces(d["w_in"], H), w_gate_up=gate_up_pieces(d["w_gate_up"], H), w_out=column_pieces(d["w_out"], H), w_down=column_pieces(d["w_down"], H)) for d in self.layers]
        self.rope = rope_table(capacity, 128)
        i32 = lambda v: torch.tensor(v, dtype=torch.int32, device=DEV)
        self.token, self.position, self.modes, self.feed, self.likeliest = i32([5]), i32([0]), torch.zeros(L, dtype=torch.uint8, device=DEV), i32([0]), i32([0])
        self.ids = torch.zeros(capacity, dtype=torch.int32, device=DEV)
        self.logits = torch.empty(vocab, device=DEV)
        self.below = torch.full((1,), vocab, dtype=torch.int32, device=DEV)
        self.work = torch.zeros(lib.oryx_decode_workspace(D, L), dtype=torch.uint8, device=DEV)
        table = (Layer * L)(*[Layer(*[{**d, **w}[f].data_ptr() for f, _ in Layer._fields_]) for d, w in zip(self.layers, self.packed)])
        self.table = torch.frombuffer(bytearray(bytes(table)), dtype=torch.uint8).to(DEV)
        maps = C.create_string_buffer(256 * L)
        ok(lib.oryx_decode_maps(table, L, D, C.c_int64(capacity), maps))
        self.maps = torch.frombuffer(bytearray(maps.raw), dtype=torch.uint8).to(DEV)
        self.step = Step(self.table.data_ptr(), self.maps.data_ptr(), L, vocab, capacity, *[t.data_ptr() for t in (self.embed, self.head, self.final_norm, self.rope, self.token, self.position, self.modes, self.feed,
                         self.ids)], None, 0, 0, *[t.data_ptr() for t in (self.below, self.likeliest, self.logits, self.work)], 1e-6, 1e-6, 128**-0.5)

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


def check():
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
        expect(good, "token, position, modes")
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
    expect(all(torch.equal(a, b) for a, b in zip(*outs)), "the same bits in the second run")


def times():
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
