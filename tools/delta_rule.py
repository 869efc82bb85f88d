"""What the tools of the gated delta rule and of Kimi Delta Attention share: the recurrence in float64, one call of both passes."""
import torch


def call(prepare, lib, *x, **kw):
    """prepare(lib, inputs ...) -> what launches the forward pass, what launches the backward pass or None, o, the state and the gradients."""
    forward, backward, o, S, d = prepare(lib, *x, **kw)
    forward()
    if backward:
        backward()
    torch.cuda.synchronize()
    return [o, S, *d]


def reference(q, k, v, g, beta, init=None, cu=None, wanted=None, up=None):
    """The recurrence, token by token, in float64: o, the final state and, given their gradients, those of the inputs. g: a log decay of each head [B, T, H] or of each key channel [B, T, H, K]."""
    if up:
        x = [None if t is None else t.double().requires_grad_() for t in (q, k, v, g, beta, init)]
        o, S = reference(*x, cu, wanted)
        given = [t for t in x if t is not None]
        loss = (o * up[0].double()).sum() + (0 if up[1] is None else (S * up[1].double()).sum())
        return [o.detach(), S.detach(), *torch.autograd.grad(loss, given)] + [None] * (6 - len(given))
    B, T, Hq, K = q.shape
    Hk, Hv = k.shape[2], v.shape[2]
    Hs = max(Hk, Hv)
    Ho = max(Hq, Hs)
    N = B if cu is None else len(cu) - 1

    def normalise(x):
        return x * (x.square().sum(-1, True) + 1e-6).rsqrt()
    q = normalise(q.double()).repeat_interleave(Ho // Hq, 2) * K**-0.5
    k = normalise(k.double()).repeat_interleave(Hs // Hk, 2)
    v, g, beta = v.double().repeat_interleave(Hs // Hv, 2), g.double(), beta.double()
    S0 = torch.zeros(N, Hs, K, K, dtype=torch.float64, device=q.device) if init is None else init.double()

    def recur(q, k, v, g, b, S):
        o = [q[:, :0, :1, :1].expand(-1, -1, Ho, K)]
        a = g.exp() if g.dim() == 4 else g.exp()[..., None]
        for t in range(q.shape[1]):
            S = S * a[:, t, :, None]
            r = v[:, t] - (S @ k[:, t][..., None])[..., 0]
            S = S + (b[:, t][..., None] * r)[..., None] * k[:, t][..., None, :]
            o.append((S.repeat_interleave(Ho // Hs, 1) @ q[:, t][..., None])[:, None, ..., 0])
        return torch.cat(o, 1), S
    if cu is None:
        o, S = recur(q, k, v, g, beta, S0)
    else:
        c, parts = cu.tolist(), []
        for n in range(N):
            s = slice(c[n], c[n + 1])
            parts.append(recur(q[:, s], k[:, s], v[:, s], g[:, s], beta[:, s], S0[n:n + 1]))
        o, S = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 0)
    if wanted is not None:
        o = o * (wanted != 0)[..., None, None]
    return o, S
