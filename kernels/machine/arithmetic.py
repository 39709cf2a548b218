"""Sums, products, quotients, signs, the least and the greatest: of integers here, of floating point by way of
floating.py. (PTX ISA 9.7.1, 9.7.3)
"""

import operator
from collections.abc import Callable

import numpy as np

from .decode import Decoder, Instruction, instruction
from .floating import floating, fma
from .operands import bits, of
from .parse import CARRY, WIDTH, Statement
from .values import SIGNED, UNSIGNED, is_float, odd_sum


def _numbers(kind: str) -> bool:
    return is_float(kind.removesuffix("x2"))


@instruction("add sub", "rn rz rm rp ftz sat lo")
def add(d: Decoder, s: Statement) -> Instruction:
    """9.7.1.1, 9.7.3.3: d = a + b or a - b, of pairs of 16 bits, too; mixed precision 9.7.5."""
    minus, kind = s.op[0] == "sub", s.op[-1]
    if kind in ("s16x2", "u16x2"):
        return _pairs(d, s, operator.sub if minus else operator.add)
    if _numbers(kind):
        return floating(d, s, operator.sub if minus else operator.add, lambda a, b: odd_sum(a, -b if minus else b))
    function = operator.sub if minus else operator.add
    if s.has("sat"):
        limits = np.iinfo(np.int32)
        wide = lambda a, b: np.clip(function(a.astype(np.int64), b.astype(np.int64)), limits.min, limits.max)
        return of(d, s, lambda a, b: wide(a, b).astype(np.int32), "s32", "s32", result="s32")
    return of(d, s, function, *[bits(kind)] * 2, result=bits(kind))


@instruction("mul", "rn rz rm rp ftz sat lo hi wide")
def mul(d: Decoder, s: Statement) -> Instruction:
    """9.7.1.3, 9.7.3.5: a product; of integers its lower or its upper half, or all of it."""
    kind = s.op[-1]
    if _numbers(kind):
        return floating(d, s, operator.mul, operator.mul)
    if s.has("wide", "hi"):
        return _wide(d, s, lambda product: product)
    return of(d, s, operator.mul, *[bits(kind)] * 2, result=bits(kind))


@instruction("mad madc", "lo hi wide rn ftz cc")
def mad(d: Decoder, s: Statement) -> Instruction:
    """9.7.1.4: a * b + c; of floating point it is fma (9.7.3.7). 9.7.2.5, 9.7.2.6: with a carry, in or out."""
    kind = s.op[-1]
    if s.has("cc", "madc"):
        return _carried(d, s)
    if _numbers(kind):
        return fma(d, s)
    if s.has("wide", "hi"):
        return _wide(d, s, operator.add)
    return of(d, s, lambda a, b, c: a * b + c, *[bits(kind)] * 3, result=bits(kind))


def _wide(d: Decoder, s: Statement, function: Callable) -> Instruction:
    """function of the whole product of two integers, and of what is added; `.hi`: of its upper half."""
    kind, width = s.op[-1], WIDTH[s.op[-1]]
    if s.has("hi"):
        rest = [kind] * (len(s.operands) - 3)
        upper = lambda a, b: ((a.astype(object) * b.astype(object)) >> (8 * width)).astype(a.dtype)
        if width < 8:
            big = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * width]
            upper = lambda a, b: ((a.astype(big) * b.astype(big)) >> big(8 * width)).astype(a.dtype)
        return of(d, s, lambda a, b, *c: function(upper(a, b), *c), kind, kind, *rest, result=kind)
    double = f"{kind[0]}{16 * width}"
    big, rest = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * width], [double] * (len(s.operands) - 3)
    return of(d, s, lambda a, b, *c: function(a.astype(big) * b.astype(big), *c), kind, kind, *rest, result=double)


def _carried(d: Decoder, s: Statement) -> Instruction:
    if s.op[-1] != "u32":
        raise ValueError(f"carries of {s.op[-1]}")
    a, b, c = d.sources(s.operands[1:], *["u32"] * 3)
    given = d.source(CARRY, 0) if s.op[0] == "madc" else d.constant(0, 0)
    target, carry, upper = d.target(s.operands[0]), d.target(CARRY if s.has("cc") else "_"), s.has("hi")

    def act(run, mask):
        x, y, z, more = (run.frame[i].astype(np.uint64) for i in (a, b, c, given))
        total = ((x * y) >> np.uint64(32) if upper else (x * y) & np.uint64(0xFFFFFFFF)) + z + more
        run.put(target, total.astype(np.uint32), mask)
        run.put(carry, total >> np.uint64(32) > 0, mask)

    return d.act(act)


@instruction("div", "rn rz rm rp ftz approx full")
def div(d: Decoder, s: Statement) -> Instruction:
    """9.7.1.8, 9.7.3.8. What PTX leaves open, an integer divided by zero, is all ones."""
    kind = s.op[-1]
    if _numbers(kind):
        return floating(d, s, operator.truediv)
    return of(d, s, lambda a, b: np.where(b == 0, ~a.dtype.type(0), _quotient(a, b)), kind, kind, result=kind)


@instruction("rem")
def rem(d: Decoder, s: Statement) -> Instruction:
    """9.7.1.9: what division, rounded to zero, leaves."""
    kind = s.op[-1]
    return of(d, s, lambda a, b: np.where(b == 0, a, a - _quotient(a, b) * b), kind, kind, result=kind)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    b = np.where(b == 0, b.dtype.type(1), b)
    down = a // b
    return down + ((down * b != a) & ((a < 0) != (b < 0))).astype(a.dtype)


@instruction("neg", "ftz")
def neg(d: Decoder, s: Statement) -> Instruction:
    """9.7.1.11, 9.7.3.12."""
    return _by_sign(d, s, np.negative)


@instruction("abs", "ftz")
def absolute(d: Decoder, s: Statement) -> Instruction:
    """9.7.1.10, 9.7.3.11."""
    return _by_sign(d, s, np.abs)


def _by_sign(d: Decoder, s: Statement, function: Callable) -> Instruction:
    kind = s.op[-1]
    if _numbers(kind):
        return floating(d, s, function)
    return of(d, s, function, kind, result=kind)


def _pairs(d: Decoder, s: Statement, function: Callable) -> Instruction:
    """A function of the lower halves of two registers, and of the upper ones, as integers."""
    kind = SIGNED[2] if s.op[-1][0] == "s" else UNSIGNED[2]
    parted = lambda x: np.ascontiguousarray(x).view(kind).reshape(*x.shape, 2)
    joined = lambda x: np.ascontiguousarray(x).view(np.uint32)[..., 0]
    return of(d, s, lambda a, b: joined(function(parted(a), parted(b))), "b32", "b32", result="b32")


@instruction("min max", "ftz NaN xorsign abs")
def least(d: Decoder, s: Statement) -> Instruction:
    """9.7.1.12, 9.7.3.13: of a number and NaN the number, or with `.NaN` the NaN; -0 is less than 0. `.xorsign.abs`: of
    both without their signs, with the product's sign.
    """
    smallest, kind = s.op[0] == "min", s.op[-1]
    if kind in ("s16x2", "u16x2"):
        return _pairs(d, s, np.minimum if smallest else np.maximum)
    if not _numbers(kind):
        return of(d, s, np.minimum if smallest else np.maximum, kind, kind, result=kind)
    choose = (np.minimum if smallest else np.maximum) if s.has("NaN") else (np.fmin if smallest else np.fmax)

    if s.has("abs") != s.has("xorsign") or (s.has("abs") and len(s.operands) != 3):
        raise ValueError("abs or xorsign")

    def magnitudes(a, b):
        found = choose(np.abs(a), np.abs(b))
        return np.where(np.signbit(a) != np.signbit(b), -found, found)

    def signed_zeros(*x):
        found = choose(choose(x[0], x[1]), x[2]) if len(x) == 3 else choose(*x)
        zero = found == 0
        if zero.any():
            signs = [np.where(v == 0, np.signbit(v), not smallest) for v in np.broadcast_arrays(*x)]
            sign = np.logical_or.reduce(signs) if smallest else np.logical_and.reduce(signs)
            found = np.where(zero, np.where(sign, -0.0, 0.0).astype(found.dtype), found)
        return found

    return floating(d, s, magnitudes if s.has("xorsign") else signed_zeros)
