"""The equations of the cells: pure functions on tiles, one for each direction of flow.

A tile is [NB, UB] float32: NB rows of the batch by UB hidden units of one program (or any other arrangement of them:
the equations act on each element alone). Everything a cell needs arrives as arguments and leaves as results; loads,
stores and the loop over time are in forward.py and backward.py, and serve every cell. The notation is that of the
torch.nn documentation; docs/equations.md derives the backward.

A product and a sum that belong together are written as one `fma`: the compiler would fuse them on a GPU, and so the
interpreter rounds alike. Errors in units in the last place are those measured in the interpreter (every 512th float32,
tests/test_accuracy.py), where `exp2` and `reciprocal` round correctly; on a GPU each adds up to 2 and 1 of its own.

The functions of a cell, as spec.Cell describes them; docs/cells.md shows how to write a cell of one's own.

    forward   (x, r, carry)             -> h, carry, saved
    factors   (saved, before, after)    -> all that the backward needs and that no neighbour must be awaited for
    backward  (factors, dh, dcarry)     -> gradients at the gate sums ("slots"), dcarry of the step before

x: G tiles, the input's part of each gate with its biases. r: G tiles, the hidden state's part. carry: what the cell
keeps from step to step besides the published h; before, after: the same of the step before and of this step, as far as
the backward has it. dh: gradient of h from the outputs and from the later step. All are tuples of tiles, but h and dh.
A gradient's slots are published for the neighbours; the first G of them are at the hidden side of the gate sums, the
last G at the input side.
"""

import triton
import triton.language as tl


@triton.jit
def reciprocal(x):
    """1 / x for x >= 1; where that is smaller than a normal number (x > 2^126), 0.

    One instruction, within 1 unit in the last place. `/` compiles to five, four of which only scale numbers beyond
    2^126, and they stand between two others that wait for them: a step's critical path has two reciprocals.
    """
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def minus(c, a, b):
    """c - a * b, rounded once. (-1.0 * a costs nothing; -a is 0 - a to the compiler, which keeps it.)"""
    return tl.fma(-1.0 * a, b, c)


@triton.jit
def with_sign_of(x, y):
    """y >= 0, or NaN, with the sign bit of x."""
    bits = (x.to(tl.int32, bitcast=True) & -2147483648) | y.to(tl.int32, bitcast=True)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); for x > 0 as 1 - exp(-x) / (1 + exp(-x)), because the first form rounds away of an open gate
    what its gradient is made of: 1 + exp(-x) has steps of 2^-23.

    Within 1.1 units in the last place for x > 0. For x < 0 the argument of exp2 is rounded, and the relative error
    grows with |x|: 3.2 units at -2, 9 at -8, 16 at -20 (PyTorch on a CPU: 2). A correction would cost 3 to 4
    instructions a gate, and what so nearly closed a gate lets through is small beside what other units do.
    """
    e = tl.exp2(-1.4426950408889634 * x)
    p = reciprocal(1.0 + e)
    return tl.where(e < 1.0, minus(1.0, e, p), p)


@triton.jit
def tanh(x):
    """For |x| < 0.65 a polynomial, fitted to a relative error of 2^-27; else 1 - 2 / (1 + exp(2 |x|)) with x's sign.

    Within 1.7 units in the last place, 0.5 beyond |x| = 4 (PyTorch on a CPU: 0.6). The exponential form cancels where
    x is small; the polynomial is known before it, so a longer one costs no time. Of |x|, because for x < 0 the sum
    1 + exp(2 x) would lose what makes the difference from -1. The sign is set last, so that -0 gives -0.
    """
    z = x * x
    series = tl.fma(z, tl.fma(z, tl.fma(z, tl.fma(z, -0.0055151637, 0.02046942), -0.053688023), 0.1333083), -0.3333326)
    near = tl.fma(x * z, series, x)
    far = tl.fma(reciprocal(1.0 + tl.exp2(2.885390081777927 * tl.abs(x))), -2.0, 1.0)
    return with_sign_of(x, tl.where(z < 0.4225, near, far))


@triton.jit
def lstm_forward(x, r, carry):
    """i, f, o = sigmoid, g = tanh of the gate sums; c' = f * c + i * g; h' = o * tanh(c'). Carry: c."""
    i, f = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1])
    g, o = tanh(x[2] + r[2]), sigmoid(x[3] + r[3])
    c = tl.fma(f, carry[0], i * g)
    return o * tanh(c), (c,), (i, f, g, o)


@triton.jit
def lstm_factors(saved, before, after):
    """Derivatives of c' by the gate sums i, f, g and of h' by o and by c', and f."""
    i, f, g, o = saved
    t = tanh(after[0])
    return (
        g * minus(i, i, i),
        before[0] * minus(f, f, f),
        i * minus(1.0, g, g),
        t * minus(o, o, o),
        o * minus(1.0, t, t),
        f,
    )


@triton.jit
def lstm_backward(factors, dh, dcarry):
    """dc = dcarry + dh * o * (1 - tanh(c')^2); slots i, f, g from dc, o from dh; dcarry of before: dc * f."""
    ki, kf, kg, ko, kc, f = factors
    dc = tl.fma(dh, kc, dcarry[0])
    return (dc * ki, dc * kf, dc * kg, dh * ko), (dc * f,)


@triton.jit
def gru_forward(x, r, carry):
    """r, z = sigmoid; n = tanh(x_n + r * q) with q the hidden part of n; h' = (1 - z) * n + z * h. Carry: h.

    Of n, the last to be known, one instruction makes h'; and a gate z near 1 keeps h without an error of n's size.
    """
    reset, z = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1])
    n = tanh(tl.fma(reset, r[2], x[2]))
    h = tl.fma(1.0 - z, n, z * carry[0])
    return h, (h,), (reset, z, n, r[2])


@triton.jit
def gru_factors(saved, before, after):
    """Derivatives of h' by the sum of n and of z, of the sum of n by that of r, and r, z."""
    r, z, n, q = saved
    return (1.0 - z) * minus(1.0, n, n), (before[0] - n) * minus(z, z, z), q * minus(r, r, r), r, z


@triton.jit
def gru_backward(factors, dh, dcarry):
    """Slots: n at the hidden side, r, z, n at the input side; dcarry of before: the direct path, dh * z."""
    kn, kz, kr, r, z = factors
    dh += dcarry[0]
    dn = dh * kn
    return (dn * r, dn * kr, dh * kz, dn), (dh * z,)


@triton.jit
def rnn_tanh_forward(x, r, carry):
    """h' = tanh(x + r). No carry; the backward needs h' alone, which is the output."""
    return tanh(x[0] + r[0]), (), ()


@triton.jit
def rnn_tanh_factors(saved, before, after):
    """1 - h'^2, the derivative of h' by its sum."""
    return (minus(1.0, after[0], after[0]),)


@triton.jit
def rnn_tanh_backward(factors, dh, dcarry):
    """One slot: dh * (1 - h'^2)."""
    return (dh * factors[0],), ()


@triton.jit
def rnn_relu_forward(x, r, carry):
    """h' = relu(x + r), NaN for NaN."""
    s = x[0] + r[0]
    return tl.where(s <= 0.0, 0.0, s), (), ()


@triton.jit
def rnn_relu_factors(saved, before, after):
    """Where nothing flows: h' <= 0."""
    return (after[0] <= 0.0,)


@triton.jit
def rnn_relu_backward(factors, dh, dcarry):
    """One slot: dh, or 0 where h' <= 0, whatever dh is: 0 * NaN would be NaN, and torch.nn has 0 there."""
    return (tl.where(factors[0], 0.0, dh),), ()
