"""One-token steps of the recurrences."""
import ctypes as C
import os
import sys

import torch

from common import BF, DEV, F32, F64, args, lib, median_ms, ok, p, report, show, spread, stream


def gdn_step(q, k, v, g, beta, S, o, scale=None):
    N, Hq, K = q.shape
    Hk, Hv, V = k.shape[1], v.shape[1], v.shape[2]
    ok(lib.oryx_gated_delta_step(p(q), p(k), p(v), p(g), p(beta), p(S), p(o), int(q.dtype == BF), *map(C.c_int64, (N, Hq, Hk, Hv, K, V, S.stride(0), S.stride(1))),
                                 C.c_float(scale or K**-0.5), C.c_float(1e-6), stream()))


def ssd_step(q, k, v, dt, bias, A, D, S, o):
    N, Hq, K = q.shape
    Hk, Hv, V = k.shape[1], v.shape[1], v.shape[2]
    ok(lib.oryx_ssd_step(p(q), p(k), p(v), p(dt), p(bias), p(A), p(D), p(S), p(o), int(q.dtype == BF), *map(C.c_int64, (N, Hq, Hk, Hv, K, V, S.stride(0), S.stride(1))), stream()))


def check():
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


sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from cuda_harness import chosen, public  # noqa: E402

PEERS = dict(fla=("fla-core", "fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule"),
             mamba_ssm=("mamba-ssm", "mamba_ssm.ops.triton.selective_state_update", "selective_state_update"))
public_steps = {name: public(*PEERS[name]) for name in chosen(args.peers, PEERS)}


def peer(rule, x, states):
    """The public step over the same states: its name and a function of a state's number, or None where --peers does not name its package. Ours normalises queries and
    keys within its time, fla's gets them so; fla's makes a new state, ours and mamba_ssm's change the one they are given."""
    q, k, v, g, A = x
    step = public_steps.get(dict(gdn="fla", ssd="mamba_ssm")[rule])
    if step is None:
        return None
    if rule == "gdn":
        unit = [torch.nn.functional.normalize(t.float(), dim=-1).to(BF)[:, None] for t in (q, k)]
        return "fla fused_recurrent_gated_delta_rule", lambda i: step(*unit, v[:, None], g[:, None], g.abs().to(BF)[:, None], initial_state=states[i], output_final_state=True)
    H, V, K = v.shape[1], v.shape[2], q.shape[2]
    wide = [g.to(BF)[:, :, None].expand(-1, -1, V), -A.exp()[:, None, None].expand(H, V, K), A[:, None].expand(H, V), A[:, None].expand(H, V)]
    return "mamba_ssm selective_state_update", lambda i: step(states[i], v, wide[0], wide[1], k, q, D=wide[2], dt_bias=wide[3], dt_softplus=True)


def graph_ms(f, n):
    """Milliseconds of one of n calls of f captured in a CUDA graph, as many steps follow one another."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            f(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [f(i) for i in range(n)]  # what a peer allocates stays until all have run
    del kept
    return median_ms(graph.replay, flush=False) / n


def times():
    for rule, N, Hq, Hk, Hv, K, V in (("gdn", 64, 16, 16, 16, 128, 128), ("gdn", 1, 16, 16, 16, 128, 128), ("ssd", 64, 1, 1, 32, 128, 64), ("ssd", 64, 16, 16, 16, 128, 128)):
        Hs = max(Hk, Hv)
        q, k, v = (torch.randn(N, h, d, device=DEV).to(BF) for h, d in ((Hq, K), (Hk, K), (Hv, V)))
        # over rotating states: where they are small, more than the L2 holds
        states, o = [torch.randn(N, Hs, V, K, device=DEV) for _ in range(8 if N > 1 else 128)], torch.empty(N, max(Hq, Hs), V, device=DEV, dtype=BF)
        g = -torch.rand(N, Hs, device=DEV)
        A = torch.rand(Hs, device=DEV)
        f = (lambda i: gdn_step(q, k, v, g, g.abs(), states[i], o)) if rule == "gdn" else (lambda i: ssd_step(q, k, v, g, A, A, A, states[i], o))  # noqa: B023
        nbytes = 2 * states[0].numel() * 4 + 2 * (q.numel() + k.numel() + v.numel() + o.numel())
        name = f"{rule} step B{N} H{Hs} K{K} V{V}"
        show(name, graph_ms(f, len(states)), nbytes)
        other = peer(rule, (q, k, v, g, A), states)
        if other:
            with torch.no_grad():
                show(f"  {other[0]}", graph_ms(other[1], len(states)), nbytes)
            show(f"  {name} again", graph_ms(f, len(states)), nbytes)
