"""Cells with more gates than the built-in ones, for tests: each gate has another part in h, so that none can take the
place of another. The Triton functions of `wide` serve any number of gates.
"""
# ruff: noqa: RUF005 (Triton's language joins tuples with +)

import torch
import triton
import triton.language as tl

from rnn_gpu.kernels.cells import minus, sigmoid, tanh
from rnn_gpu.kernels.spec import Cell


def wide_step(x, r, carry):
    """h = the sum over the G gates of g/G tanh(x_g + r_g), g from 1."""
    gates = len(x)
    h = sum((g + 1) / gates * torch.tanh(x[g] + r[g]) for g in range(gates))
    return h, ()


@triton.jit
def wide_forward(x, r, carry):
    """Saved: the tanh of each gate."""
    saved = ()
    h = tl.zeros_like(x[0])
    for g in tl.static_range(len(x)):
        t = tanh(x[g] + r[g])
        saved = saved + (t,)
        h += (g + 1) / len(x) * t
    return h, (), saved


@triton.jit
def wide_factors(saved, before, after):
    """Derivatives of h by the sum of each gate."""
    factors = ()
    for g in tl.static_range(len(saved)):
        factors = factors + ((g + 1) / len(saved) * minus(1.0, saved[g], saved[g]),)
    return factors


@triton.jit
def wide_backward(factors, dh, dcarry):
    """A slot for each."""
    slots = ()
    for g in tl.static_range(len(factors)):
        slots = slots + (dh * factors[g],)
    return slots, ()


def multiplicative_step(x, r, carry):
    """An LSTM whose input has a gate z of its own behind the product: five gates, the last apart, and a state."""
    i, f, o, z = (torch.sigmoid(x[g] + r[g]) for g in range(4))
    c = f * carry[0] + i * torch.tanh(x[4] + z * r[4])
    return o * torch.tanh(c), (c,)


@triton.jit
def multiplicative_forward(x, r, carry):
    """Saved: i, f, o, z, g, and the hidden part of g."""
    i, f, o, z = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1]), sigmoid(x[2] + r[2]), sigmoid(x[3] + r[3])
    g = tanh(x[4] + z * r[4])
    c = f * carry[0] + i * g
    return o * tanh(c), (c,), (i, f, o, z, g, r[4])


@triton.jit
def multiplicative_factors(saved, before, after):
    """Derivatives of c by the sums of i, f, g, of that of g by z's, of h by o's and by c; z; f."""
    i, f, o, z, g, q = saved
    t = tanh(after[0])
    return (
        g * minus(i, i, i), before[0] * minus(f, f, f), i * minus(1.0, g, g), q * minus(z, z, z), t * minus(o, o, o),
        o * minus(1.0, t, t), z, f,
    )  # fmt: skip


@triton.jit
def multiplicative_backward(factors, dh, dcarry):
    """Slots: g at the hidden side, i, f, o, z, g at the input side."""
    ki, kf, kg, kz, ko, kc, z, f = factors
    dc = dcarry[0] + dh * kc
    dg = dc * kg
    return (dg * z, dc * ki, dc * kf, dh * ko, dg * kz, dg), (dc * f,)


def wide(gates: int) -> Cell:
    """The cell of so many gates."""
    names = tuple(f"g{g}" for g in range(gates))
    functions = dict(forward=wide_forward, factors=wide_factors, backward=wide_backward)
    return Cell(f"wide_{gates}", names, wide_step, saves=gates, **functions)


MULTIPLICATIVE = Cell(
    "multiplicative", ("i", "f", "o", "z", "g"), multiplicative_step, states=("c",), apart=1, saves=6, quiet=True,
    forward=multiplicative_forward, factors=multiplicative_factors, backward=multiplicative_backward,
)  # fmt: skip
