"""Numbers of PTX types in numpy: what register bits mean, and every way to round.

A register is an array of unsigned integers of its width, predicates are booleans; its shape is [warps, 32] or anything
that broadcasts to it. `typed` gives the numbers that the bits mean, `stored` the bits of numbers. Rounding goes by way
of `odd`: float64 rounded to odd, from which one more rounding, in any direction, to any type of 50 bits or fewer is
exact (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd",
2008).
"""

from fractions import Fraction

import numpy as np

from .parse import WIDTH

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}  # those that numpy has
# Types of floating point: bits of the mantissa behind the point, least exponent of a normal number, largest number.
FORMATS = {
    "f32": (23, -126, float(np.finfo(np.float32).max)),
    "f16": (10, -14, 65504.0),
    "bf16": (7, -126, float.fromhex("0x1.fep127")),
    "tf32": (10, -126, float.fromhex("0x1.ffcp127")),
    "e4m3": (3, -6, 448.0),
    "e5m2": (2, -14, 57344.0),
}
ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}  # to an integer


def is_float(kind: str) -> bool:
    """Whether a type (of one number) is floating point."""
    return kind in FORMATS or kind == "f64"


def half_to_float(bits: np.ndarray, kind: str) -> np.ndarray:
    """uint16 of "bf16" or "f16" -> float32."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def halves(words: np.ndarray, kind: str) -> np.ndarray:
    """uint32 [...] -> float32 [..., 2], the lower half first."""
    pair = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)
    return half_to_float(pair, kind)


def from_halves(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 [..., 2] -> uint32 [...], rounded to nearest even."""
    bits = np.ascontiguousarray(stored(values, kind))
    return bits.view(np.uint32)[..., 0]


def eighth_to_float(bits: np.ndarray, kind: str) -> np.ndarray:
    """uint8 of "e4m3" or "e5m2" -> float32."""
    return _EIGHTHS[kind][bits]


def typed(bits: np.ndarray, kind: str) -> np.ndarray:
    """The numbers that bits mean in a PTX type; bfloat16 as float32."""
    if kind in FLOATS:
        return bits.view(FLOATS[kind])
    if kind == "bf16":
        return half_to_float(bits, kind)
    if kind[0] == "s":
        return bits.view(SIGNED[WIDTH[kind]])
    return bits


def stored(values: np.ndarray, kind: str) -> np.ndarray:
    """The bits of numbers in a PTX type. Floating point is rounded to nearest even."""
    if kind == "bf16":
        return float_to_bf16(np.asarray(values, np.float32))
    if kind in FLOATS:
        values = np.asarray(values, FLOATS[kind])
    return np.ascontiguousarray(values).view(UNSIGNED[WIDTH[kind]])


def float_to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> bits, to nearest even; every NaN is 0x7FFF, as in hardware."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def flush(x: np.ndarray) -> np.ndarray:
    """float32 with numbers below the least normal one as zeros of their sign (`.ftz`)."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


# Sums and products that round once ------------------------------------------------------------------------------------


def odd(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """value + error rounded to odd, for float64 with value the nearest one and error what it lacks."""
    bits = np.ascontiguousarray(value).view(np.int64)
    inexact = (error != 0) & np.isfinite(value) & (bits & 1 == 0)
    away = (error > 0) == (value > 0)  # from zero, which no inexact sum comes out as
    return np.where(inexact, (bits + np.where(away, 1, -1)).view(np.float64), value)


def _lost(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """What their sum `total` lacks of a + b (Knuth)."""
    part = total - a
    return (a - (total - part)) + (b - part)


def odd_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b of float64, rounded to odd."""
    total = a + b
    return odd(total, np.where(np.isfinite(total), _lost(a, b, total), 0))


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once to nearest even.

    The product is exact in float64. Rounding the sum twice is wrong only where float64 comes out half way between two
    float32 numbers, or below the normal ones: there it is done again by way of `odd`.
    """
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    doubtful = (total.view(np.int64) & 0x1FFFFFFF == 0x10000000) | (np.abs(total) < 2.0**-125)
    result = total.astype(np.float32)
    if doubtful.any():
        product, c = np.broadcast_to(product, total.shape)[doubtful], np.broadcast_to(c, total.shape)[doubtful]
        result[doubtful] = odd_sum(product, c).astype(np.float32)
    return result


def fused_double(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float64, rounded once to nearest even.

    The product is `upper + lower` exactly (Dekker); the sum of three numbers is rounded by way of `odd` (Boldo and
    Melquiond). Numbers so large or small that parts of them would be lost are done as fractions.
    """
    a, b, c = np.broadcast_arrays(a, b, c)
    upper = a * b
    (a1, a2), (b1, b2) = _parts(a), _parts(b)
    lower = ((a1 * b1 - upper) + a1 * b2 + a2 * b1) + a2 * b2
    rest = c + lower
    total = upper + rest
    result = total + odd_sum(_lost(c, lower, rest), _lost(upper, rest, total))
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    simple = ~finite | (a == 0) | (b == 0)  # no sum, but perhaps a zero with a sign
    result = np.where(simple, upper + c, result)
    sizes = [(np.abs(x) > 2.0**-300) & (np.abs(x) < 2.0**300) for x in (a, b, c)]
    odd = ~simple & ~(sizes[0] & sizes[1] & (sizes[2] | (c == 0)))
    for place in zip(*np.nonzero(odd), strict=True):
        exact = Fraction(float(a[place])) * Fraction(float(b[place])) + Fraction(float(c[place]))
        try:
            result[place] = float(exact)
        except OverflowError:
            result[place] = np.inf if exact > 0 else -np.inf
    return result


def _parts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The upper and the lower half of the digits of float64 (Veltkamp)."""
    scaled = x * 134217729.0
    upper = scaled - (scaled - x)
    return upper, x - upper


def rounded(x: np.ndarray, kind: str, mode: str, saturate: bool = False) -> np.ndarray:
    """float64 (exact, or rounded to odd) -> the nearest numbers of a type, as float64.

    mode: rn nearest even, rna nearest, ties away from zero, rz to zero, rm down, rp up. saturate: what is too large
    becomes the largest number, not infinity (`.satfinite`).
    """
    mantissa, least, largest = FORMATS[kind]
    _, exponent = np.frexp(np.where(np.isfinite(x), x, 1))
    scale = np.maximum(exponent - 1, least) - mantissa  # of the last place
    scaled = np.ldexp(x, -scale)
    rounding = {"rn": np.rint, "rz": np.trunc, "rm": np.floor, "rp": np.ceil,
                "rna": lambda v: np.copysign(np.floor(np.abs(v) + 0.5), v)}[mode]  # fmt: skip
    result = np.copysign(np.ldexp(rounding(scaled), scale), x)
    over = np.abs(result) > largest
    to_largest = saturate | (mode == "rz") | ((mode == "rm") & (x > 0)) | ((mode == "rp") & (x < 0))
    limit = np.where(to_largest & (np.isfinite(x) | saturate), largest, np.inf)
    return np.where(np.isnan(x), x, np.where(over, np.copysign(limit, x), result))


def to_eighth(x: np.ndarray, kind: str) -> np.ndarray:
    """float64 -> bits of e4m3 or e5m2, saturated to the largest number; NaN is 0x7F."""
    values = np.abs(rounded(x, kind, "rn", saturate=True))
    table = _EIGHTHS[kind][:0x7F].astype(np.float64)
    table = table[np.isfinite(table)]
    bits = np.searchsorted(table, np.where(np.isnan(values), 0, values)).astype(np.uint8)
    return np.where(np.isnan(x), np.uint8(0x7F), bits | (np.signbit(x).astype(np.uint8) << np.uint8(7)))


def _eighths(kind: str) -> np.ndarray:
    """The numbers of all 256 patterns of an 8-bit type."""
    mantissa, least, _ = FORMATS[kind]
    code = np.arange(256)
    exponent, fraction = (code & 0x7F) >> mantissa, code & ((1 << mantissa) - 1)
    value = np.where(exponent == 0, np.ldexp(fraction * 1.0, least - mantissa),
                     np.ldexp(1 + fraction / (1 << mantissa), exponent + least - 1))  # fmt: skip
    if kind == "e4m3":
        value[code & 0x7F == 0x7F] = np.nan
    else:
        value[(exponent == 31) & (fraction == 0)] = np.inf
        value[(exponent == 31) & (fraction > 0)] = np.nan
    return np.copysign(value, np.where(code & 0x80, -1.0, 1.0)).astype(np.float32)


_EIGHTHS = {kind: _eighths(kind) for kind in ("e4m3", "e5m2")}
