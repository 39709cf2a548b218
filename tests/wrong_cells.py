"""Mistakes planted in the Triton functions of cells, for tests/test_own_cells.py."""

import triton
import triton.language as tl

from rnn_gpu.kernels.cells import sigmoid, tanh
from rnn_gpu.kernels.zoo import peephole_backward


@triton.jit
def open_gate(x, r, carry):
    """CoupledLSTM: the input gate is f itself, not 1 - f."""
    f, g, o = sigmoid(x[0] + r[0]), tanh(x[1] + r[1]), sigmoid(x[2] + r[2])
    c = tl.fma(f, g, f * carry[0])
    return o * tanh(c), (c,), (f, g, o)


@triton.jit
def forgets_the_gate(factors, dh, dcarry):
    """MGU: f is seen by the new state alone, not by what it resets."""
    kn, kf, f = factors[0], factors[1], factors[3]
    dh += dcarry[0]
    dn = dh * kn
    return (dn * f, dh * kf, dn), (dh * (1.0 - f),)


@triton.jit
def keeps_too_much(factors, dh, dcarry):
    """LightGRU: all of dh goes back."""
    kz, kn = factors[0], factors[1]
    dh += dcarry[0]
    return (dh * kz, dh * kn), (dh,)


@triton.jit
def swapped_peepholes(factors, dh, dcarry):
    """PeepholeLSTM: the gradients of i's and f's peepholes stand for each other."""
    slots, kept, p = peephole_backward(factors, dh, dcarry)
    return slots, kept, (p[1], p[0], p[2])


@triton.jit
def no_function(x, r, carry):
    """LightGRU: calls what does not exist."""
    return missing(x[0] + r[0]), (carry[0],), (x[0], x[1])  # noqa: F821
