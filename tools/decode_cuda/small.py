"""Steps of 5 and of 64 sequences and of one, two layers at small shapes, and little else on the device: what compute-sanitizer gets through in seconds (docs/cuda.md). That values are right
is the other parts' business; here they are finite."""
import torch

from batch import Batch
from common import BF, DEV, F32, expect, rope_table
from model import Model


class Layers:  # what Batch takes of a Model, without the persistent kernel's form of the weights
    def __init__(self, L, capacity, D=256, H=2, Fw=256, vocab=512):
        self.L, self.capacity, self.D, self.H, self.F = L, capacity, D, H, Fw
        n = lambda *s, std=0.02, dt=BF: torch.empty(*s, device=DEV, dtype=dt).normal_(0, std)
        self.layers = [dict(w_in=n(5 * D, D), w_beta_decay=n(2 * H, D, dt=F32), w_out=n(D, D), w_gate_up=n(2 * Fw, D), w_down=n(D, Fw), norm1=1 + n(D, dt=F32), norm2=1 + n(D, dt=F32),
                            k_conv=n(D, 4, dt=F32), v_conv=n(D, 4, dt=F32), A_log=torch.rand(H, device=DEV), dt_bias=n(H, dt=F32) - 4, o_norm=1 + n(128, dt=F32)) for _ in range(L)]
        self.embed, self.final_norm = n(vocab, D, std=1), 1 + n(D, dt=F32)
        self.rope = rope_table(capacity, 128)


def check():
    capacity = 200
    for N in (5, 64):
        b = Batch(Layers(2, capacity), N, capacity)
        for s in b.state:
            s["mode_rows"].zero_()
        b.positions.copy_(torch.tensor([37 * i % capacity for i in range(N)], dtype=torch.int32))
        b.lengths.copy_(b.positions + 1)
        b.modes.copy_(torch.randint(0, 2, (2, N), dtype=torch.uint8))
        for _ in range(2):
            b.run()
        torch.cuda.synchronize()
        expect(bool(b.logits.isfinite().all()), f"{N} sequences")
    m = Model(2, capacity, vocab=4096)
    for position, modes in ((0, [0, 1]), (130, [1, 0]), (199, [1, 1])):
        m.position.fill_(position)
        m.modes.copy_(torch.tensor(modes, dtype=torch.uint8))
        m.run()
        torch.cuda.synchronize()
        expect(bool(m.logits.isfinite().all()), f"one sequence at {position}")


def times():
    pass
