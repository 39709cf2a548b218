"""The equations of the cells: pure functions on tiles, one for each direction of flow.

A tile is [NB, UB] float32: NB rows of the batch by UB hidden units of one program (or its transpose: the equations
act on each element alone). Everything a cell needs arrives as arguments and leaves as results; loads, stores and the
loop over time are in forward.py and backward.py, and serve every cell. The notation is that of the torch.nn
documentation; docs/equations.md derives the backward.

The README says what to add for a new cell.

    forward   (x, r, carry)                     -> h, carry, gates to save, aux to save
    factors   (gates, aux, previous)            -> all that the backward needs and that no neighbour must be awaited for
    backward  (factors, dh, dcarry)             -> gradient at each gate's sum ("slots"), dcarry of the step before

x: G tiles, the input's part of each gate with its biases. r: G tiles, the hidden state's part. carry: what the cell
keeps from step to step besides the published h. dh: gradient of h from the outputs and from the later step. A
gradient's slots are published for the neighbours; the first G of them are at the hidden side of the gate sums, the
last G at the input side.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def tanh(x):
    """tanh, accurate to about 2 units in the last place of float32, near 0 too, where the exponential form cancels."""
    z = x * x
    near = x + x * z * (-0.3333314 + z * (0.13325822 + z * (-0.053042207 + z * 0.017235477)))  # fitted, |x| < 0.5
    far = 1.0 - 2.0 / (1.0 + tl.exp2(2.885390081777927 * x))
    return tl.where(z < 0.25, near, far)


@triton.jit
def lstm_forward(x, r, carry):
    """i, f, o = sigmoid, g = tanh of the gate sums; c' = f * c + i * g; h' = o * tanh(c'). Carry and aux: c."""
    i, f = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1])
    g, o = tanh(x[2] + r[2]), sigmoid(x[3] + r[3])
    c = f * carry + i * g
    return o * tanh(c), c, (i, f, g, o), c


@triton.jit
def lstm_factors(gates, aux, previous):
    """Derivatives of c' by the gate sums i, f, g and of h' by o and by c', and f."""
    i, f, g, o = gates
    t = tanh(aux)
    return g * i * (1.0 - i), previous * f * (1.0 - f), i * (1.0 - g * g), t * o * (1.0 - o), o * (1.0 - t * t), f


@triton.jit
def lstm_backward(factors, dh, dcarry):
    """dc = dcarry + dh * o * (1 - tanh(c')^2); slots i, f, g from dc, o from dh; dcarry of before: dc * f."""
    ki, kf, kg, ko, kc, f = factors
    dc = dcarry + dh * kc
    return (dc * ki, dc * kf, dc * kg, dh * ko), dc * f


@triton.jit
def gru_forward(x, r, carry):
    """r, z = sigmoid; n = tanh(x_n + r * q) with q the hidden part of n; h' = n + z * (h - n). Carry: h. Aux: q."""
    reset, z = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1])
    n = tanh(x[2] + reset * r[2])
    h = n + z * (carry - n)
    return h, h, (reset, z, n), r[2]


@triton.jit
def gru_factors(gates, aux, previous):
    """Derivatives of h' by the sum of n and of z, of the sum of n by that of r, and r, z."""
    r, z, n = gates
    return (1.0 - z) * (1.0 - n * n), (previous - n) * z * (1.0 - z), aux * r * (1.0 - r), r, z


@triton.jit
def gru_backward(factors, dh, dcarry):
    """Slots: n at the hidden side, r, z, n at the input side; dcarry of before: the direct path, dh * z."""
    kn, kz, kr, r, z = factors
    dh += dcarry
    dn = dh * kn
    return (dn * r, dn * kr, dh * kz, dn), dh * z


@triton.jit
def rnn_tanh_forward(x, r, carry):
    """h' = tanh(x + r). No carry; the backward needs h' alone, which is the output."""
    return tanh(x[0] + r[0]), carry, (), carry


@triton.jit
def rnn_tanh_factors(gates, aux, previous):
    """1 - h'^2, the derivative of h' by its sum."""
    return (1.0 - aux * aux,)


@triton.jit
def rnn_tanh_backward(factors, dh, dcarry):
    """One slot: dh * (1 - h'^2)."""
    return (dh * factors[0],), dcarry


@triton.jit
def rnn_relu_forward(x, r, carry):
    """h' = relu(x + r), NaN for NaN."""
    s = x[0] + r[0]
    return tl.where(s <= 0.0, 0.0, s), carry, (), carry


@triton.jit
def rnn_relu_factors(gates, aux, previous):
    """Where nothing flows: h' <= 0."""
    return (aux <= 0.0,)


@triton.jit
def rnn_relu_backward(factors, dh, dcarry):
    """One slot: dh, or 0 where h' <= 0, whatever dh is: 0 * NaN would be NaN, and torch.nn has 0 there."""
    return (tl.where(factors[0], 0.0, dh),), dcarry
