"""A recurrent cell of one's own: described, checked and trained, in one file.

    python examples/own_cell.py           trains for some seconds, on a GPU or a CPU
    python examples/own_cell.py --check   proves the equations first; no GPU needed, a minute or two
    python examples/own_cell.py --quick   some steps of training, to see that it runs
    python -m rnn_gpu.check_cell examples/own_cell.py

The cell is the "update gate" RNN (UGRNN; Collins, Sohl-Dickstein and Sussillo, "Capacity and trainability in recurrent
neural networks", 2017): u = sigmoid(x_u + r_u), n = tanh(x_n + r_n), h' = u * h + (1 - u) * n. It learns to say, at
every step, the parity of the signs that it has seen. The exit status is 1 when it does not learn.
"""

import argparse
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: idle threads must sleep

import torch
import triton

import rnn_gpu
from rnn_gpu.kernels.cells import sigmoid, tanh  # the library's own: exact near 0 and 1


def step(x, r, carry):
    """One step in plain torch: what the cell means."""
    u, n = torch.sigmoid(x[0] + r[0]), torch.tanh(x[1] + r[1])
    h = u * carry[0] + (1 - u) * n
    return h, (h,)


@triton.jit
def forward(x, r, carry):
    """The same on tiles in float32; u and n are saved for the backward."""
    u, n = sigmoid(x[0] + r[0]), tanh(x[1] + r[1])
    h = u * carry[0] + (1.0 - u) * n
    return h, (h,), (u, n)


@triton.jit
def factors(saved, before, after):
    """All of the backward that needs no gradient: derivatives of h' by the two sums, and by h."""
    u, n = saved
    return (before[0] - n) * u * (1.0 - u), (1.0 - u) * (1.0 - n * n), u


@triton.jit
def backward(factors, dh, dcarry):
    """Gradients at the sums of u and n, and of h before; dcarry is a part of the gradient of h."""
    du, dn, keeps = factors
    dh += dcarry[0]
    return (dh * du, dh * dn), (dh * keeps,)


CELL = rnn_gpu.Cell(
    "UGRNN", ("u", "n"), step, carries_h=True, saves=2, forward=forward, factors=factors, backward=backward
)
UGRNN = rnn_gpu.layer(CELL)


def train(steps: int, device: str) -> float:
    """Train on parity -> the share of right answers in the last steps."""
    torch.manual_seed(0)
    ugrnn, head = UGRNN(1, 32, device=device), torch.nn.Linear(32, 2, device=device)
    optimizer = torch.optim.Adam([*ugrnn.parameters(), *head.parameters()], lr=0.02)
    right = []
    for i in range(steps):
        signs = torch.randint(2, (8, 64, 1), device=device)
        parity = signs.cumsum(0)[..., 0] % 2
        output, _ = ugrnn(2.0 * signs - 1)
        scores = head(output)
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), parity.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append((scores.argmax(-1) == parity).float().mean().item())
        if i % 25 == 0:
            print(f"step {i:3d}: loss {loss.item():.3f}, {right[-1]:.0%} right")
    return sum(right[-20:]) / len(right[-20:])


def main() -> int:
    """0 if it learned."""
    parser = argparse.ArgumentParser(description="A cell of one's own.")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args()
    if chosen.check:
        print(rnn_gpu.check_cell(CELL))
    share = train(5 if chosen.quick else 150, chosen.device)
    print(f"{share:.0%} of the answers right at the end; guessing has 50%{' (not judged)' if chosen.quick else ''}")
    return 0 if chosen.quick or share > 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
