"""Floating point. (PTX ISA 9.7.3 to 9.7.5)

Numbers of 16 bits are computed in float32, which is wide enough that rounding again changes nothing (sums, products,
quotients, roots), and fused ones through `odd_sum`. Where a result is NaN it is the one of hardware. Approximate
functions (`.approx`) are rounded correctly.
"""

from collections.abc import Callable

import numpy as np

from .decode import Decoder, Instruction, instruction
from .operands import of
from .parse import Statement
from .values import FLOATS, UNSIGNED, flush, from_halves, fused, fused_double, halves, odd_sum, rounded

NAN = {"f32": 0x7FFFFFFF, "f64": 0x7FFFFFFFFFFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF}
DIRECTED = ("rz", "rm", "rp")


def quiet(x: np.ndarray, kind: str) -> np.ndarray:
    """Every NaN as the one that hardware makes."""
    bad = x != x
    if not bad.any():
        return x
    canonical = np.array(NAN["f32" if kind == "bf16" else kind], UNSIGNED[x.itemsize]).view(x.dtype)
    return np.where(bad, canonical, x)


def floating(d: Decoder, s: Statement, nearest: Callable, wide: Callable | None = None) -> Instruction:
    """An operation on floating-point numbers of one type, or on pairs of them in a register.

    nearest: on float32 or float64, rounded to nearest by numpy. wide: the same in float64, exact or rounded to odd, for
    the other directions of rounding.
    """
    kind, count = s.op[-1], len(s.operands) - 1
    pair = kind.endswith("x2")
    number = kind[:-2] if pair else kind
    mode = s.one_of(*DIRECTED)
    if mode and (wide is None or number != "f32"):
        raise ValueError(f"rounding {mode}")
    function = (
        (lambda *x: rounded(wide(*(v.astype(np.float64) for v in x)), "f32", mode).astype(np.float32))
        if mode
        else nearest
    )
    if s.has("ftz") and number == "f32":
        inner = function
        function = lambda *x: flush(inner(*map(flush, x)))
    limited = _limits(s, function)
    if s.op[-2] == "f32" and kind in ("f16", "bf16"):  # mixed: the last operand and the result are float32
        kinds = [kind] * (count - 1) + ["f32"]
        return of(d, s, lambda *x: quiet(limited(*(v.astype(np.float32) for v in x)), "f32"), *kinds, result="f32")
    if kind == "f32x2":
        slots = d.sources(s.operands[1:], *[kind] * count)
        return d.value(s.operands[0], lambda f: _joined(quiet(limited(*(_parted(f[i]) for i in slots)), "f32")))
    if pair:
        slots = d.sources(s.operands[1:], *[kind] * count)
        return d.value(
            s.operands[0], lambda f: from_halves(quiet(limited(*(halves(f[i], number) for i in slots)), "f32"), number)
        )
    if kind in ("f16", "bf16"):
        narrow = lambda *x: quiet(limited(*(v.astype(np.float32) for v in x)), "f32")
        if kind == "bf16":
            return of(d, s, narrow, *[kind] * count, result=kind)
        return of(d, s, lambda *x: quiet(narrow(*x).astype(np.float16), kind), *[kind] * count, result=kind)
    return of(d, s, lambda *x: quiet(limited(*x), kind), *[kind] * count, result=kind)


def _limits(s: Statement, function: Callable) -> Callable:
    if s.has("sat"):
        return lambda *x: np.fmin(np.fmax(function(*x), 0), 1).astype(x[0].dtype)  # NaN becomes 0
    if s.has("relu"):
        return lambda *x: (lambda y: np.where(y > 0, y, np.where(y != y, y, y.dtype.type(0))))(function(*x))
    return function


def _parted(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.float32).reshape(*x.shape, 2)


def _joined(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint64)[..., 0]


@instruction("fma", "rn rz rm rp ftz sat relu")
def fma(d: Decoder, s: Statement) -> Instruction:
    """9.7.3.7, 9.7.4.6: a * b + c, rounded once."""
    number = s.op[-1].removesuffix("x2")
    if number == "f64":
        return floating(d, s, fused_double)
    odd = lambda a, b, c: odd_sum(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))
    if number in ("f16", "bf16") and s.op[-2] != "f32":
        once = lambda a, b, c: rounded(odd(a, b, c), number, "rn").astype(np.float32)
        return floating(d, s, once)
    return floating(d, s, fused, odd)


@instruction("ex2 lg2 rcp sqrt rsqrt sin cos tanh", "approx ftz rn")
def function_of(d: Decoder, s: Statement) -> Instruction:
    """9.7.3.14 to 9.7.3.22, 9.7.4.8: computed in float64 and rounded to nearest."""
    inner = {
        "ex2": np.exp2,
        "lg2": np.log2,
        "rcp": lambda x: 1 / x,
        "sqrt": np.sqrt,
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "sin": np.sin,
        "cos": np.cos,
        "tanh": np.tanh,
    }[s.op[0]]
    if s.op[-1] == "f64":
        return floating(d, s, inner)
    return floating(d, s, lambda x: inner(x.astype(np.float64)).astype(np.float32))


@instruction("copysign")
def copysign(d: Decoder, s: Statement) -> Instruction:
    """9.7.3.2: the sign of a, the magnitude of b."""
    kind = s.op[-1]
    return of(d, s, lambda a, b: np.copysign(b, a), kind, kind, result=kind)


@instruction("testp", "finite infinite number notanumber normal subnormal")
def testp(d: Decoder, s: Statement) -> Instruction:
    """9.7.3.1."""
    kind = s.op[-1]
    tiny = np.finfo(FLOATS[kind]).tiny
    test = {
        "finite": np.isfinite, "infinite": np.isinf, "number": lambda x: x == x, "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny), "subnormal": lambda x: (x != 0) & (np.abs(x) < tiny),
    }[s.op[1]]  # fmt: skip
    return of(d, s, test, kind, result="pred")
