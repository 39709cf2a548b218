"""Integers, floating point, logic, comparisons: instructions that make one register of others. (PTX ISA 9.7.1 to 9.7.8)

Each function finds its operands once and returns a closure over the frame. Numbers of 16 bits are computed in float32,
which is wide enough that rounding again changes nothing (sums, products, quotients, roots), and fused ones through
`odd_sum`. Where a result is NaN it is the one of hardware. Approximate functions (`.approx`) are rounded correctly.
"""

import operator
from collections.abc import Callable

import numpy as np

from .decode import Decoder, Instruction, instruction
from .parse import WIDTH, Statement
from .values import (
    FLOATS,
    SIGNED,
    UNSIGNED,
    flush,
    from_halves,
    fused,
    halves,
    is_float,
    odd_sum,
    rounded,
    stored,
    typed,
)  # fmt: skip

NAN = {"f32": 0x7FFFFFFF, "f64": 0x7FFFFFFFFFFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF}
DIRECTED = ("rz", "rm", "rp")


def of(d: Decoder, s: Statement, function: Callable, *kinds: str, result: str) -> Instruction:
    """result <- function of the operands as numbers of these types."""
    slots = d.sources(s.operands[1:], *kinds)
    raw = [kind == "pred" or (kind[0] in "bu" and kind != "bf16") for kind in kinds]
    raw_result = result == "pred" or (result[0] in "bu" and result != "bf16")
    if all(raw) and raw_result:
        if len(slots) == 1:
            (a,) = slots
            return d.value(s.operands[0], lambda f: function(f[a]))
        if len(slots) == 2:
            a, b = slots
            return d.value(s.operands[0], lambda f: function(f[a], f[b]))
        return d.value(s.operands[0], lambda f: function(*(f[i] for i in slots)))
    pairs = list(zip(slots, kinds))
    if raw_result:
        return d.value(s.operands[0], lambda f: function(*(typed(f[i], kind) for i, kind in pairs)))
    return d.value(s.operands[0], lambda f: stored(function(*(typed(f[i], kind) for i, kind in pairs)), result))


# Floating point -------------------------------------------------------------------------------------------------------


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


def _numbers(kind: str) -> bool:
    return is_float(kind.removesuffix("x2"))


@instruction("add sub", "rn rz rm rp ftz sat lo")
def add(d: Decoder, s: Statement) -> Instruction:
    """9.7.1.1, 9.7.3.3: d = a + b or a - b; mixed precision 9.7.5."""
    minus, kind = s.op[0] == "sub", s.op[-1]
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


@instruction("mad", "lo hi wide rn ftz")
def mad(d: Decoder, s: Statement) -> Instruction:
    """9.7.1.4: a * b + c; of floating point it is fma (9.7.3.7)."""
    kind = s.op[-1]
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


@instruction("fma", "rn rz rm rp ftz sat relu")
def fma(d: Decoder, s: Statement) -> Instruction:
    """9.7.3.7, 9.7.4.6: a * b + c, rounded once."""
    number = s.op[-1].removesuffix("x2")
    if number == "f64":
        raise ValueError("fused products of float64")
    odd = lambda a, b, c: odd_sum(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))
    if number in ("f16", "bf16") and s.op[-2] != "f32":
        once = lambda a, b, c: rounded(odd(a, b, c), number, "rn").astype(np.float32)
        return floating(d, s, once)
    return floating(d, s, fused, odd)


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


@instruction("min max", "ftz NaN")
def least(d: Decoder, s: Statement) -> Instruction:
    """9.7.1.12, 9.7.3.13: of a number and NaN the number, or with `.NaN` the NaN; -0 is less than 0."""
    smallest, kind = s.op[0] == "min", s.op[-1]
    if not _numbers(kind):
        return of(d, s, np.minimum if smallest else np.maximum, kind, kind, result=kind)
    choose = (np.minimum if smallest else np.maximum) if s.has("NaN") else (np.fmin if smallest else np.fmax)

    def signed_zeros(*x):
        found = choose(choose(x[0], x[1]), x[2]) if len(x) == 3 else choose(*x)
        zero = found == 0
        if zero.any():
            signs = [np.where(v == 0, np.signbit(v), not smallest) for v in np.broadcast_arrays(*x)]
            sign = np.logical_or.reduce(signs) if smallest else np.logical_and.reduce(signs)
            found = np.where(zero, np.where(sign, -0.0, 0.0).astype(found.dtype), found)
        return found

    return floating(d, s, signed_zeros)


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


# Bits -----------------------------------------------------------------------------------------------------------------


def bits(kind: str) -> str:
    """The type of bare bits as wide: for what does not depend on signs."""
    return "pred" if kind == "pred" else f"b{8 * WIDTH[kind]}"


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


# Choices and comparisons ----------------------------------------------------------------------------------------------


@instruction("selp")
def selp(d: Decoder, s: Statement) -> Instruction:
    """9.7.6.3: a where the predicate is true, else b."""
    kind = bits(s.op[-1])
    return of(d, s, lambda a, b, p: np.where(p, a, b), kind, kind, "pred", result=kind)


_COMPARE = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
}
_JOIN = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def comparison(name: str, floats: bool) -> Callable:
    """9.7.6.2: of NaN, ordered comparisons are false, those that end in u true."""
    if not floats:
        return _COMPARE[name]
    nan = lambda a, b: (a != a) | (b != b)
    if name in ("num", "nan"):
        return nan if name == "nan" else lambda a, b: ~nan(a, b)
    if name.endswith("u"):
        return lambda a, b: _COMPARE[name[:-1]](a, b) | nan(a, b)
    return (lambda a, b: (a != b) & ~nan(a, b)) if name == "ne" else _COMPARE[name]


@instruction("setp", "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz")
def setp(d: Decoder, s: Statement) -> Instruction:
    """9.7.6.2, 9.7.7.2: `p` or `p|q`: the comparison and its contrary, or of pairs the lower and the upper half."""
    kind = s.op[-1]
    compare = comparison(s.op[1], is_float(kind.removesuffix("x2")))
    if s.has("ftz"):
        plain = compare
        compare = lambda a, b: plain(flush(a), flush(b))
    join = _JOIN.get(s.one_of("and", "or", "xor"))
    names = [name.strip() for name in s.operands[0].split("|")]
    if len(names) == 1 and not kind.endswith("x2") and join is None:
        return of(d, s, compare, kind, kind, result="pred")
    a, b = d.sources(s.operands[1:3], kind, kind)
    other = d.source(s.operands[3].lstrip("!"), 0) if join else None
    flipped = join is not None and s.operands[3].startswith("!")
    targets = [d.target(name) for name in names]

    def both(run, mask):
        f = run.frame
        if kind.endswith("x2"):
            found = compare(halves(f[a], kind[:-2]), halves(f[b], kind[:-2]))
            found = found[..., 0], found[..., 1]
        else:
            found = compare(typed(f[a], kind), typed(f[b], kind))
            found = found, ~found
        for target, value in zip(targets, found):
            run.put(target, value if join is None else join(value, f[other] ^ flipped), mask)

    return d.act(both)
