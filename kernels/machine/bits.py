"""Logic, shifts, fields and counts of bits. (PTX ISA 9.7.1, 9.7.8, 9.7.9.7)"""

import operator
from collections.abc import Callable

import numpy as np

from .decode import Decoder, Instruction, instruction
from .operands import bits, of
from .parse import WIDTH, Statement
from .values import SIGNED, UNSIGNED


@instruction("and or xor")
def logic(d: Decoder, s: Statement) -> Instruction:
    """9.7.8.1 to 9.7.8.3."""
    function = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[s.op[0]]
    return of(d, s, function, *[bits(s.op[-1])] * 2, result=bits(s.op[-1]))


@instruction("not")
def invert(d: Decoder, s: Statement) -> Instruction:
    """9.7.8.4."""
    return of(d, s, operator.invert, bits(s.op[-1]), result=bits(s.op[-1]))


@instruction("shl")
def shl(d: Decoder, s: Statement) -> Instruction:
    """9.7.8.7: by the width or more, zeros."""
    kind, width = bits(s.op[-1]), 8 * WIDTH[s.op[-1]]
    return of(d, s, lambda a, n: _shifted(np.left_shift, a, n, width), kind, "u32", result=kind)


@instruction("shr")
def shr(d: Decoder, s: Statement) -> Instruction:
    """9.7.8.8: by the width or more, zeros, or copies of the sign."""
    kind = s.op[-1]
    if kind[0] == "s":
        last = np.uint32(8 * WIDTH[kind] - 1)
        return of(d, s, lambda a, n: a >> np.minimum(n, last).astype(a.dtype), kind, "u32", result=kind)
    return of(d, s, lambda a, n: _shifted(np.right_shift, a, n, 8 * WIDTH[kind]), bits(kind), "u32", result=bits(kind))


def _shifted(function: Callable, a: np.ndarray, n: np.ndarray, width: int) -> np.ndarray:
    result = function(a, np.minimum(n, np.uint32(width - 1)).astype(a.dtype))
    over = n >= width
    return np.where(over, a.dtype.type(0), result) if over.any() else result


@instruction("shf", "l r wrap clamp")
def funnel(d: Decoder, s: Statement) -> Instruction:
    """9.7.8.6: the 64 bits b:a shifted left (the upper half of it) or right (the lower half)."""
    left, clamp = s.has("l"), s.has("clamp")

    def shift(a, b, n):
        n = (np.minimum(n, np.uint32(32)) if clamp else n & np.uint32(31)).astype(np.uint64)
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        both = (both << n) >> np.uint64(32) if left else both >> n
        return both.astype(np.uint32)

    return of(d, s, shift, "b32", "b32", "u32", result="b32")


@instruction("bfe")
def bfe(d: Decoder, s: Statement) -> Instruction:
    """9.7.1.19: `length` bits from `position` on, with the sign of the last one that there is."""
    kind, width = s.op[-1], 8 * WIDTH[s.op[-1]]

    def extract(a, position, length):
        position, length = (x.astype(np.int64) & 255 for x in (position, length))
        a = a.astype(object)  # exact, of any length
        part = (a >> position) & ((1 << length.astype(object)) - 1)
        if kind[0] == "s":
            last = np.minimum(position + length - 1, width - 1)
            sign = (length > 0) & ((a >> np.maximum(last, 0).astype(object)) & 1 == 1)
            here = np.clip(width - position, 0, length)
            part = (part & ((1 << here.astype(object)) - 1)) - np.where(sign, 1 << here.astype(object), 0)
        return part.astype(SIGNED[width // 8] if kind[0] == "s" else UNSIGNED[width // 8])

    def quick(a, position, length):
        if width == 32 and (position < 32).all() and (length < 32).all() and (length > 0).all():
            if (position + length <= 32).all():
                word = a.dtype.type
                return (a << (np.uint32(32) - position - length).astype(word)) >> (np.uint32(32) - length).astype(word)
        return extract(a, position, length)

    return of(d, s, quick, kind, "u32", "u32", result=kind)


@instruction("bfi")
def bfi(d: Decoder, s: Statement) -> Instruction:
    """9.7.1.20: `length` bits of a put into b from `position` on."""
    kind, width = bits(s.op[-1]), 8 * WIDTH[s.op[-1]]

    def insert(a, b, position, length):
        a, b, position, length = (x.astype(object) for x in (a, b, position & np.uint32(255), length & np.uint32(255)))
        mask = (((1 << length) - 1) << position) & ((1 << width) - 1)
        return ((b & ~mask) | ((a << position) & mask)).astype(UNSIGNED[width // 8])

    return of(d, s, insert, kind, kind, "u32", "u32", result=kind)


@instruction("popc clz brev")
def count(d: Decoder, s: Statement) -> Instruction:
    """9.7.1.14, 9.7.1.15, 9.7.1.18: bits that are set, zeros in front, the order of bits turned round."""
    kind, width = s.op[-1], 8 * WIDTH[s.op[-1]]

    def spread(a):  # [..., width], the lowest bit first
        places = np.arange(width, dtype=a.dtype)
        return (np.broadcast_to(a, np.broadcast_shapes(a.shape))[..., None] >> places) & a.dtype.type(1)

    def turned(a):
        places = np.arange(width - 1, -1, -1, dtype=a.dtype)
        return (spread(a) << places).sum(-1, dtype=a.dtype)

    function, result = {
        "popc": (lambda a: spread(a).sum(-1, dtype=np.uint32), "u32"),
        "clz": (lambda a: (np.cumsum(spread(a)[..., ::-1], -1) == 0).sum(-1, dtype=np.uint32), "u32"),
        "brev": (turned, kind),
    }[s.op[0]]
    return of(d, s, function, kind, result=result)


@instruction("lop3")
def lop3(d: Decoder, s: Statement) -> Instruction:
    """9.7.8.5: any function of three bits, by its table."""
    table = int(s.operands[4], 0)
    a, b, c = d.sources(s.operands[1:4], "b32", "b32", "b32")

    def look_up(f):
        x, y, z = f[a], f[b], f[c]
        found = np.zeros((1, 1), np.uint32)
        for i in range(8):
            if table >> i & 1:
                found = found | ((x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z))
        return found

    return d.value(s.operands[0], look_up)


@instruction("prmt")
def prmt(d: Decoder, s: Statement) -> Instruction:
    """9.7.9.7: four bytes among the eight of a and b; bit 3 of a choice takes the sign of the byte for all bits."""

    def permute(a, b, choice):
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        found = np.uint32(0)
        for i in range(4):
            pick = (choice >> np.uint32(4 * i)) & np.uint32(15)
            byte = ((both >> (np.uint64(8) * (pick & np.uint32(7)).astype(np.uint64))) & np.uint64(255)).astype(
                np.uint32
            )
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            found = found | np.where(pick & np.uint32(8), sign, byte) << np.uint32(8 * i)
        return found

    return of(d, s, permute, "b32", "b32", "b32", result="b32")
