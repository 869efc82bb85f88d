#!/usr/bin/env python3
"""Every operator on CUDA against float64 on the CPU, then timings against the bandwidth of a copy.

python3 tools/check_cuda.py build/cuda/liboryx.so [--quick]     (a Python with a full torch 2.11, on a machine with a GPU; exit code 1 on a failure)

--quick leaves the timings out; public kernels beside these are tools/peers_cuda.py's. Times are medians of CUDA-event times over random data; before each call
256 MB are overwritten (the L2) and the GPU sleeps, so that the host has queued all launches.
"""
import torch, sys, time, traceback, math
torch.ops.load_library(sys.argv[1])
O = torch.ops.oryx
dev = 'cuda'
torch.manual_seed(int(time.time()))
import os
PACKED = True
bad = 0
worst = {}

def rel(a, r):
    a = a.detach().double().cpu()
    r = r.detach().double()
    if a.shape != r.shape:
        return float('inf')
    if not torch.isfinite(a).all():
        return float('nan')
    return ((a - r).norm() / r.norm().clamp_min(0.001)).item() if r.numel() else 0.0
LIM = {torch.float32: (2e-05, 5e-05), torch.bfloat16: (0.01, 0.02), torch.float64: (1e-10, 1e-10)}

def poison():
    for n in (1 << 20, 1 << 24):
        x = torch.full((n,), float('nan'), device=dev)
        del x

def check(name, fn, tensors, dtype, fixed=(), wide=None):
    """fn(list of tensors) -> list of outputs. tensors: float64 CPU; None allowed; index in `wide` keeps float32 under bf16."""
    global bad
    try:
        ref_in, dev_in = ([], [])
        for i, t in enumerate(tensors):
            if t is None:
                ref_in.append(None)
                dev_in.append(None)
                continue
            dt = torch.float32 if dtype == torch.bfloat16 and wide and (i in wide) else dtype
            low = t.detach().to(dt)
            ref_in.append(low.double().clone().requires_grad_())
            dev_in.append(low.to(dev).requires_grad_())
        refs = [o for o in fn(ref_in, 'cpu') if o.is_floating_point()]
        poison()
        outs = [o for o in fn(dev_in, dev) if o.is_floating_point()]
        e = max((rel(a, r) for a, r in zip(outs, refs)))
        gs = [torch.randn_like(r) for r in refs]
        use = [i for i, r in enumerate(refs) if r.requires_grad]
        torch.autograd.backward([refs[i] for i in use], [gs[i].to(outs[i].dtype).double() for i in use])
        poison()
        torch.autograd.backward([outs[i] for i in use], [gs[i].to(outs[i].dtype).to(dev) for i in use])
        g = max([rel(a.grad, r.grad) for a, r in zip(dev_in, ref_in) if r is not None and r.grad is not None] + [0.0])
        torch.cuda.synchronize()
        ok = e <= LIM[dtype][0] and g <= LIM[dtype][1]
        key = name.split()[0] + ' ' + str(dtype)[6:]
        w = worst.get(key, (0, 0, 0))
        worst[key] = (max(w[0], e), max(w[1], g), w[2] + 1)
        if not ok:
            bad += 1
            print('BAD', name, dtype, f'value {e:.2e} grad {g:.2e}', [None if t is None else tuple(t.shape) for t in tensors])
    except Exception as x:
        bad += 1
        print('EXC', name, dtype, str(x).split('\n')[0][:300])
R = lambda *s: torch.randn(*s, dtype=torch.float64)
for dt in (torch.float32, torch.bfloat16, torch.float64):
    for sh in ((3, 17), (2, 63, 768), (5, 128), (7, 2048), (3, 5440), (2, 8192), (4, 100, 96), (2, 9001), (300, 64), (1, 3)):
        check('swiglu', lambda a, d: [O.swiglu(a[0], a[1])], [R(*sh), R(*sh)], dt)
        check('rms_norm', lambda a, d: [O.rms_norm(a[0], a[1], 1e-06, False)], [R(*sh), R(sh[-1])], dt, wide={1})
        check('rms_norm_zero', lambda a, d: [O.rms_norm(a[0], a[1], 1e-06, True)], [R(*sh), R(sh[-1])], dt, wide={1})
        check('add_rms_norm', lambda a, d: list(O.add_rms_norm(a[0], a[1], a[2], 1e-06)), [R(*sh), R(*sh), R(sh[-1])], dt, wide={2})
        for first in (False, True):
            check('gated_rms_norm', lambda a, d: [O.gated_rms_norm(a[0], a[1], a[2], 1e-06, first, 1)], [R(*sh), R(*sh), R(sh[-1])], dt, wide={2})
        if sh[-1] % 4 == 0:
            check('gated_groups', lambda a, d: [O.gated_rms_norm(a[0], a[1], a[2], 1e-06, True, 4)], [R(*sh), R(*sh), R(sh[-1])], dt, wide={2})
    for B, T, C, w in ((2, 63, 48, 4), (1, 1, 8, 4), (3, 100, 7, 3), (2, 1000, 64, 4), (1, 5, 16, 8), (2, 33, 24, 1), (1, 129, 520, 4)):
        for silu in (False, True):
            for st in (False, True):
                check('short_conv', lambda a, d: list(O.short_conv(a[0], a[1], a[2], a[3], None, silu)), [R(B, T, C), R(C, w), R(C) if st else None, R(B, C, w - 1) if st else None], dt, wide={1, 2})
        if T > 4 and PACKED:
            cu = torch.tensor([0, 2, 2, 4, T], dtype=torch.int32)
            check('short_conv_packed', lambda a, d: list(O.short_conv(a[0], a[1], None, a[2], cu.to(d), True)), [R(1, T, C), R(C, w), R(4, C, w - 1)], dt, wide={1})
    for B, T, H, d_, rot in ((2, 63, 3, 64, 0), (1, 1, 1, 128, 0), (2, 100, 4, 96, 32), (1, 33, 2, 10, 6), (1, 1000, 2, 64, 0)):
        pos = torch.randint(0, 200000, (B, T), dtype=torch.int32)
        check('rope', lambda a, d: [O.rope(a[0], pos.to(d), 10000.0, rot)], [R(B, T, H, d_)], dt)
        check('rope_view', lambda a, d: [O.rope(a[0].transpose(1, 2), pos.to(d), 10000.0, rot)], [R(B, H, T, d_)], dt)
    if dt != torch.bfloat16:
        LIM[torch.float32] = (0.0001, 0.001)
    for B, T, Hq, Hk, Hv, K, V in ((2, 100, 2, 2, 2, 16, 32), (1, 63, 4, 2, 2, 32, 16), (1, 1, 2, 2, 2, 8, 8), (1, 200, 2, 1, 2, 16, 16)):
        Hs = max(Hk, Hv)
        g = -R(B, T, Hs).abs() * 0.3
        beta = torch.rand(B, T, Hs, dtype=torch.float64)
        check('gated_delta', lambda a, d: list(O.gated_delta_rule(*a[:5], a[5], None, None, None, 1e-06)), [R(B, T, Hq, K), R(B, T, Hk, K), R(B, T, Hv, V), g, beta, R(B, Hs, V, K)], dt, wide={3, 4, 5})
        sp = torch.tensor([[0, T // 3, T]], dtype=torch.int32)
        cu = torch.tensor([0, T // 2, T], dtype=torch.int32)
        if B == 1:
            check('gated_delta_packed', lambda a, d: list(O.gated_delta_rule(*a[:5], None, cu.to(d), sp.to(d), None, 1e-06)), [R(B, T, Hq, K), R(B, T, Hk, K), R(B, T, Hv, V), g, beta], dt, wide={3, 4})
        check('ssd', lambda a, d: list(O.ssd(*a[:7], a[7], None, sp.to(d))), [R(B, T, Hq, K), R(B, T, Hk, K), R(B, T, Hv, V), R(B, T, Hs), R(Hs), R(Hs), R(Hs), R(B, Hs, V, K)], dt, wide={3, 4, 5, 6, 7})
        Hkv = min(Hk, Hq)
        check('span_attention', lambda a, d: [O.span_attention(*a, sp.to(d), None, None, None, 0, None)], [R(B, T, Hq, K), R(B, T, Hkv, K), R(B, T, Hkv, V)], dt)
        if B == 1:
            check('span_attention_window', lambda a, d: [O.span_attention(*a, None, cu.to(d), None, None, 7, None)], [R(B, T, Hq, K), R(B, T, Hkv, K), R(B, T, Hkv, V)], dt)
    for N, D, C in ((77, 32, 101), (1, 8, 2), (300, 64, 5003), (64, 40, 40001), (33, 24, 131080)):
        tg = torch.randint(0, C, (N,))
        tg[5:40:7] = -100
        check('cross_entropy', lambda a, d: list(O.cross_entropy(a[0], tg.to(d), -100, 0.001))[:1], [R(N, C)], dt)
        check('linear_cross_entropy', lambda a, d: list(O.linear_cross_entropy(a[0], a[1], tg.to(d), -100, 0.001))[:1], [R(N, D), R(C, D) / D ** 0.5], dt)
        check('linear_cross_entropy', lambda a, d: list(O.linear_cross_entropy(a[0], a[1], tg, -100, 0.0))[:1], [R(N, D), R(C, D) / D ** 0.5], dt)
    LIM[torch.float32] = (2e-05, 5e-05)
for dt in (torch.float32, torch.bfloat16):
    x, w, s = (R(3, 40).to(dt), R(40, 4).to(dt), R(3, 40, 3).to(dt))
    s1, s2 = (s.clone(), s.to(dev))
    y1 = O.short_conv_step(x, w, None, s1, True)
    y2 = O.short_conv_step(x.to(dev), w.to(dev), None, s2, True)
    e = max(rel(y2, y1.double()), rel(s2, s1.double()))
    print('short_conv_step', dt, f'{e:.1e}')
    bad += not e < LIM[dt][0]
    q, k, v, g, b, S = (R(3, 4, 16).to(dt), R(3, 2, 16).to(dt), R(3, 2, 8).to(dt), -R(3, 2).abs().float(), torch.rand(3, 2), R(3, 2, 8, 16).float())
    S1, S2 = (S.clone(), S.to(dev))
    y1 = O.gated_delta_step(q, k, v, g, b, S1, None, 1e-06)
    y2 = O.gated_delta_step(*[t.to(dev) for t in (q, k, v, g, b)], S2, None, 1e-06)
    e = max(rel(y2, y1.double()), rel(S2, S1.double()))
    print('gated_delta_step', dt, f'{e:.1e}')
    bad += not e < LIM[dt][0]
    S1, S2 = (S.clone(), S.to(dev))
    args = (q, k, v, R(3, 2).float(), R(2).float(), R(2).float(), R(2).float())
    y1 = O.ssd_step(*args, S1)
    y2 = O.ssd_step(*[t.to(dev) for t in args], S2)
    e = max(rel(y2, y1.double()), rel(S2, S1.double()))
    print('ssd_step', dt, f'{e:.1e}')
    bad += not e < LIM[dt][0]
ns = [1, 7, 4097, 100000, 8192 * 3 + 5] + [33] * 450
ps = [[R(n).float() for n in ns] for _ in range(4)]
ps[3] = [t.abs() for t in ps[3]]
dv = [[t.to(dev) for t in l] for l in ps]
O.adamw_step(ps[0], ps[1], ps[2], ps[3], 3, 0.01, 0.9, 0.95, 1e-08, 0.1, 0.5)
O.adamw_step(dv[0], dv[1], dv[2], dv[3], 3, 0.01, 0.9, 0.95, 1e-08, 0.1, 0.5)
e = max((rel(a, r.double()) for l, m in zip(dv, ps) for a, r in zip(l, m)))
print('adamw', f'{e:.1e}')
bad += not e < 1e-06
n1, n2 = (O.global_norm(ps[1]), O.global_norm(dv[1]))
print('global_norm', abs(n1 - n2) / n1)
bad += not abs(n1 - n2) / n1 < 1e-06
for k in sorted(worst):
    print(f'{k:34s} value {worst[k][0]:.1e}  grad {worst[k][1]:.1e}  cases {worst[k][2]}')
def same_bits(name, fn):
    """fn() -> tensors; the same from run to run."""
    global bad
    poison()
    first = [t.clone() for t in fn()]
    poison()
    equal = all(torch.equal(a, b) for a, b in zip(first, fn()))
    bad += not equal
    print(f'{name}: the same bits twice: {equal}')

def graph_of_cross_entropy():
    """Captured, replayed with other targets, and with one that is no class."""
    global bad
    h, w = torch.randn(512, 64, device=dev).bfloat16().requires_grad_(), torch.randn(5003, 64, device=dev).bfloat16().requires_grad_()
    t = torch.randint(0, 5003, (512,), device=dev)
    step = lambda: O.linear_cross_entropy(h, w, t, -100, 0.0001)[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step().backward()
    torch.cuda.current_stream().wait_stream(side)
    h.grad = w.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
        loss.backward()
    t.copy_(torch.randint(0, 5003, (512,), device=dev))
    graph.replay()
    found = [loss.detach().clone(), h.grad.clone(), w.grad.clone()]
    h.grad = w.grad = None
    again = step()
    again.backward()
    equal = all(torch.equal(a, b) for a, b in zip(found, [again.detach(), h.grad, w.grad]))
    t[7] = 5003
    graph.replay()
    loud = math.isnan(loss.item())
    refused = False
    try:
        step()
    except RuntimeError as e:
        refused = 'target 5003 at row 7' in str(e)
    bad += not (equal and loud and refused)
    print(f'linear_cross_entropy in a graph: replay {equal}, bad target NaN {loud}; outside of one refused {refused}')
graph_of_cross_entropy()
h_, w_, t_ = torch.randn(700, 256, device=dev).bfloat16().requires_grad_(), torch.randn(9001, 256, device=dev).bfloat16().requires_grad_(), torch.randint(0, 9001, (700,))

def linear_step():
    h_.grad = w_.grad = None
    loss = O.linear_cross_entropy(h_, w_, t_, -100, 0.0)[0]
    loss.backward()
    return [loss.detach(), h_.grad, w_.grad]
same_bits('linear_cross_entropy', linear_step)
x_, dy_, w4_ = torch.randn(2, 777, 512, device=dev).bfloat16(), torch.randn(2, 777, 512, device=dev).bfloat16(), torch.randn(512, 4, device=dev)
same_bits('short_conv backward', lambda: [t for t in O.short_conv_backward(dy_, None, x_, w4_, None, None, None, True) if t is not None and t.numel()])
r_ = O._rms_norm(x_, torch.ones(512, device=dev), 1e-06, False)[1]
same_bits('rms_norm backward', lambda: list(O._rms_norm_backward(dy_, x_, torch.ones(512, device=dev), r_, None, False)))
print('FAILURES', bad)
if '--quick' in sys.argv:
    sys.exit(1 if bad else 0)
flush = torch.empty(256 << 20, dtype=torch.uint8, device=dev)

def med(fn, n):
    for i in range(3):
        fn(i % n)
    ts = []
    for r in range(21):
        a, b = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        flush.zero_()
        torch.cuda._sleep(4000000)
        a.record()
        fn(r % n)
        b.record()
        ts.append((a, b))
    torch.cuda.synchronize()
    ts = sorted(a.elapsed_time(b) for a, b in ts)
    return ts[10]
print(torch.cuda.get_device_name(), torch.__version__)
bf = torch.bfloat16
src = torch.randn(1 << 29, device=dev).to(bf)
dst = torch.empty_like(src)
t = med(lambda i: dst.copy_(src), 1)
BW = 2 * src.nbytes / t / 1000000000.0
print(f'copy of {src.nbytes >> 20} MiB {BW:.2f} TB/s')
src2 = src[:1 << 26]
d2 = [torch.empty_like(src2) for _ in range(4)]
for elements in (32768 * 768, 1 << 26):
    t = med(lambda i: d2[i][:elements].copy_(src[i * (1 << 26):i * (1 << 26) + elements]), 4)
    print(f'copy of {2 * elements / 1e6:.0f} MB {4 * elements / t / 1000000000.0:.2f} TB/s, {1000 * t:.1f} us')
del src, dst, src2, d2

def line(name, t, nbytes):
    print(f'{name:44s} {t * 1000.0:8.1f} us  {nbytes / t / 1000000000.0:5.2f} TB/s  {100 * nbytes / t / 1000000000.0 / BW:5.1f}% of copy')
n, D = (2, 2048)
rows = 32768

def sets(*shapes):
    return [[torch.randn(*s, device=dev, dtype=torch.float32).to(bf) for s in shapes] for _ in range(n)]
try:
    for D in (768, 2048, 5120):
        s = sets((rows, D), (rows, D), (rows, D))
        w = torch.randn(D, device=dev)
        U = rows * D * 2
        line(f'rms_norm {rows}x{D} forward', med(lambda i: O._rms_norm(s[i][0], w, 1e-06, False), n), 2 * U)
        line(f'add_rms_norm {rows}x{D} forward', med(lambda i: O._add_rms_norm(s[i][0], s[i][1], w, 1e-06), n), 4 * U)
        rs = O._rms_norm(s[0][0], w, 1e-06, False)[1]
        line(f'rms_norm {rows}x{D} backward', med(lambda i: O._rms_norm_backward(s[i][0], s[i][1], w, rs, None, False), n), 3 * U)
        line(f'add_rms_norm {rows}x{D} backward', med(lambda i: O._rms_norm_backward(s[i][0], s[i][1], w, rs, s[i][2], False), n), 4 * U)
        del s
    for V in (64, 128):
        r = rows * 2048 // V
        s = sets((r, V), (r, V), (r, V))
        w = torch.randn(V, device=dev)
        U = r * V * 2
        line(f'gated_rms_norm {r}x{V} forward', med(lambda i: O._gated_rms_norm(s[i][0], s[i][1], w, 1e-06, False, 1), n), 3 * U + 4 * r)
        rs = O._gated_rms_norm(s[0][0], s[0][1], w, 1e-06, False, 1)[1]
        line(f'gated_rms_norm {r}x{V} backward', med(lambda i: O._gated_rms_norm_backward(s[i][0], s[i][1], s[i][2], w, rs, False, 1), n), 5 * U + 4 * r)
        del s
    s = sets((rows, 5440), (rows, 5440), (rows, 5440))
    U = rows * 5440 * 2
    line(f'swiglu {rows}x5440 forward', med(lambda i: O._swiglu(s[i][0], s[i][1]), n), 3 * U)
    line(f'swiglu {rows}x5440 backward', med(lambda i: O._swiglu_backward(s[i][0], s[i][1], s[i][2]), n), 5 * U)
    del s
    for H, K in ((16, 128), (12, 64)):
        s = sets((4, 8192, H, K))
        pos = torch.arange(8192, device=dev, dtype=torch.int32).expand(4, 8192).contiguous()
        line(f'rope 4x8192x{H}x{K}', med(lambda i: O.rope(s[i][0], pos, 10000.0, 0), n), 2 * 4 * 8192 * H * K * 2)
        del s
    s = sets((4, 8192, 2048), (4, 8192, 2048))
    w = torch.randn(2048, 4, device=dev)
    U = 4 * 8192 * 2048 * 2
    for wd in (w, w.to(bf)):
        line('short_conv w4 silu 4x8192x2048 forward', med(lambda i: O.short_conv(s[i][0], wd, None, None, None, True), n), 2 * U)
        line('short_conv w4 silu 4x8192x2048 backward', med(lambda i: O.short_conv_backward(s[i][1], None, s[i][0], wd, None, None, None, True), n), 3 * U)
    del s
    N, V = 16384, 32000
    h, w = torch.randn(N, 2048, device=dev).to(bf).requires_grad_(), (torch.randn(V, 2048, device=dev) * 0.02).to(bf).requires_grad_()
    t = torch.randint(0, V, (N,))

    def step(f, targets):
        h.grad = w.grad = None
        f(h, w, targets).backward()
    def report(name, f, targets):
        step(f, targets)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(f, targets)
        peak = torch.cuda.max_memory_allocated() - before
        ms = med(lambda i: step(f, targets), 1)
        print(f'{name:60s} {ms:7.3f} ms {6.0 * N * 2048 * V / ms / 1e9:5.0f} TFLOP/s, {peak / 2 ** 30:.2f} GiB above its inputs and gradients')
    report(f'linear_cross_entropy {N}x2048x{V} forward + backward', lambda a, b, c: O.linear_cross_entropy(a, b, c, -100, 0.0)[0], t)
    for V in (32000, 50304, 128256):
        lg = torch.randn(4096, V, device=dev).to(bf)
        tg = torch.randint(0, V, (4096,))
        line(f'cross_entropy 4096x{V} forward', med(lambda i: O._cross_entropy(lg, tg, -100, 0.0), 1), lg.nbytes)
        one = torch.ones((), device=dev)
        stats = O._cross_entropy(lg, tg, -100, 0.0)[2:]
        line(f'cross_entropy 4096x{V} backward', med(lambda i: O._cross_entropy_backward(one, lg, tg, *stats, -100, 0.0), 1), 2 * lg.nbytes)
    del h, w, lg
    sh = [(32000, 2048)] + [(2048, 2048)] * 100 + [(5440, 2048)] * 60 + [(2048,)] * 100
    P, G, M, Vv = [[torch.rand(*x, device=dev) for x in sh] for _ in range(4)]
    N = sum((p.numel() for p in P))
    line(f'adamw {N / 1000000.0:.0f}M, f32 gradients', med(lambda i: O.adamw_step(P, G, M, Vv, 5, 0.0001, 0.9, 0.95, 1e-08, 0.1, 1.0), 1), 28 * N)
    line(f'global_norm {N / 1000000.0:.0f}M', med(lambda i: O.global_norm(G), 1), 4 * N)
except Exception:
    traceback.print_exc()
sys.exit(1 if bad else 0)
