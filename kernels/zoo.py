"""The equations of the cells of rnn_gpu/zoo.py, as cells.py has those of the built-in ones."""

import triton
import triton.language as tl

from .cells import minus, sigmoid, tanh


@triton.jit
def peephole_forward(x, r, carry, p):
    """i, f = sigmoid(.. + p c), g = tanh; c' = f * c + i * g; o = sigmoid(.. + p c'); h' = o * tanh(c')."""
    c = carry[0]
    i, f = sigmoid(tl.fma(p[0], c, x[0] + r[0])), sigmoid(tl.fma(p[1], c, x[1] + r[1]))
    g = tanh(x[2] + r[2])
    c = tl.fma(f, c, i * g)
    o = sigmoid(tl.fma(p[2], c, x[3] + r[3]))
    return o * tanh(c), (c,), (i, f, g, o)


@triton.jit
def peephole_factors(saved, before, after, p):
    """As the LSTM's, and p, c of before and after."""
    i, f, g, o = saved
    c, new = before[0], after[0]
    t = tanh(new)
    return (
        g * minus(i, i, i),
        c * minus(f, f, f),
        i * minus(1.0, g, g),
        t * minus(o, o, o),
        o * minus(1.0, t, t),
        f,
        p,
        c,
        new,
    )


@triton.jit
def peephole_backward(factors, dh, dcarry):
    """dc also gets what o has seen of it, that of before what i and f have."""
    ki, kf, kg, ko, kc, f, p, c, new = factors
    do = dh * ko
    dc = tl.fma(do, p[2], tl.fma(dh, kc, dcarry[0]))
    di, df = dc * ki, dc * kf
    return (di, df, dc * kg, do), (tl.fma(di, p[0], tl.fma(df, p[1], dc * f)),), (di * c, df * c, do * new)


@triton.jit
def coupled_forward(x, r, carry):
    """f, o = sigmoid, g = tanh; c' = f * c + (1 - f) * g; h' = o * tanh(c')."""
    f, g, o = sigmoid(x[0] + r[0]), tanh(x[1] + r[1]), sigmoid(x[2] + r[2])
    c = tl.fma(1.0 - f, g, f * carry[0])
    return o * tanh(c), (c,), (f, g, o)


@triton.jit
def coupled_factors(saved, before, after):
    """Derivatives of c' by the sums of f and g, of h' by o and by c', and f."""
    f, g, o = saved
    t = tanh(after[0])
    return (before[0] - g) * minus(f, f, f), (1.0 - f) * minus(1.0, g, g), t * minus(o, o, o), o * minus(1.0, t, t), f


@triton.jit
def coupled_backward(factors, dh, dcarry):
    """As the LSTM's, with one slot for both gates."""
    kf, kg, ko, kc, f = factors
    dc = tl.fma(dh, kc, dcarry[0])
    return (dc * kf, dc * kg, dh * ko), (dc * f,)


@triton.jit
def minimal_forward(x, r, carry):
    """f = sigmoid; n = tanh(x_n + f * q) with q the hidden part of n; h' = (1 - f) * h + f * n. Saved: f, n, q."""
    f = sigmoid(x[0] + r[0])
    n = tanh(tl.fma(f, r[1], x[1]))
    h = tl.fma(f, n, (1.0 - f) * carry[0])
    return h, (h,), (f, n, r[1])


@triton.jit
def minimal_factors(saved, before, after):
    """Derivatives of h' by the sum of n and directly by that of f, of the sum of n by that of f, and f."""
    f, n, q = saved
    d = minus(f, f, f)
    return f * minus(1.0, n, n), (n - before[0]) * d, q * d, f


@triton.jit
def minimal_backward(factors, dh, dcarry):
    """Slots: n at the hidden side, f, n at the input side; dcarry of before: dh * (1 - f)."""
    kn, kf, kq, f = factors
    dh += dcarry[0]
    dn = dh * kn
    return (dn * f, tl.fma(dn, kq, dh * kf), dn), (dh * (1.0 - f),)


@triton.jit
def light_forward(x, r, carry):
    """z = sigmoid, n = relu; h' = z * h + (1 - z) * n."""
    z, n = sigmoid(x[0] + r[0]), x[1] + r[1]
    n = tl.where(n <= 0.0, 0.0, n)
    h = tl.fma(1.0 - z, n, z * carry[0])
    return h, (h,), (z, n)


@triton.jit
def light_factors(saved, before, after):
    """Derivatives of h' by the sums of z and n, and z."""
    z, n = saved
    return (before[0] - n) * minus(z, z, z), tl.where(n <= 0.0, 0.0, 1.0 - z), z


@triton.jit
def light_backward(factors, dh, dcarry):
    """dcarry of before: dh * z."""
    kz, kn, z = factors
    dh += dcarry[0]
    return (dh * kz, dh * kn), (dh * z,)


@triton.jit
def exp(x):
    """e^x."""
    return tl.exp2(1.4426950408889634 * x)


@triton.jit
def exponential_forward(x, r, carry):
    """m' = max(log f + m, i~); i = exp(i~ - m'), f' = exp(log f + m - m'); c' = f' c + i z, n' = f' n + i;
    h' = o c' / n'.

    log f of a sigmoid f(a) is min(a, 0) - log(1 + exp(-|a|)). Saved: i, f', z, o and 1 - f. Where n = 0, there is no
    history: m' = i~, and f' is held to e^10.
    """
    c, n, m = carry
    a, b = x[1] + r[1], x[0] + r[0]
    z, o = tanh(x[2] + r[2]), sigmoid(x[3] + r[3])
    kept = tl.where(a < 0.0, a, 0.0) - tl.log(1.0 + exp(-1.0 * tl.abs(a))) + m
    m = tl.where((kept >= b) & (n != 0.0), kept, b)
    f = kept - m
    i, f = exp(b - m), exp(tl.where(f >= 10.0, 10.0, f))
    c, n = tl.fma(f, c, i * z), tl.fma(f, n, i)
    return o * (c / n), (c, n, m), (i, f, z, o, sigmoid(-1.0 * a))


@triton.jit
def exponential_factors(saved, before, after):
    """Derivatives of h' by c', by n', by the sum of o; of c' by i~, log f and z; of n' by i~ and log f; 1 - f; f'; and
    whether m' came from log f + m.
    """
    i, f, z, o, away = saved
    c, n = after[0], after[1]
    q = c / n
    source = tl.where((f >= i) & (before[1] != 0.0), 1.0, 0.0)
    return (
        o / n, -1.0 * o * q / n, q * minus(o, o, o), i * z, f * before[0], i * minus(1.0, z, z), i, f * before[1], away,
        f, source,
    )  # fmt: skip


@triton.jit
def exponential_backward(factors, dh, dcarry):
    """u, v: gradients by i~ and by log f with m' held. m' takes back what it stands for, and gives the rest to its
    source.
    """
    kc, kn, ko, ci, cf, cz, ni, nf, away, f, source = factors
    dc, dn = tl.fma(dh, kc, dcarry[0]), tl.fma(dh, kn, dcarry[1])
    u, v = tl.fma(dc, ci, dn * ni), tl.fma(dc, cf, dn * nf)
    kept = source > 0.0
    da, db = tl.where(kept, dcarry[2] - u, v), tl.where(kept, u, dcarry[2] - v)
    return (db, da * away, dc * cz, dh * ko), (dc * f, dn * f, da)
