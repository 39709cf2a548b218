"""Registers moved, taken apart and put together, and numbers of one type as those of another. (PTX ISA 9.7.9.1 to
9.7.9.21)
"""

import numpy as np

from .decode import Decoder, Instruction, instruction
from .floating import DIRECTED, NAN
from .operands import extended
from .parse import WIDTH, Statement, split
from .values import (
    FLOATS,
    ROUNDINGS,
    SIGNED,
    UNSIGNED,
    eighth_to_float,
    float_to_bf16,
    flush,
    halves,
    is_float,
    odd_sum,
    rounded,
    to_eighth,
    typed,
)  # fmt: skip


@instruction("mov")
def mov(d: Decoder, s: Statement) -> Instruction:
    """9.7.9.1, 9.7.9.2: a register; several narrow ones as a wide one, `{a, b}`; or a wide one as several. 10.23:
    %clock, which has gone on whenever it is read.
    """
    target, source = s.operands
    width = WIDTH[s.op[-1]]
    if source == "%clock":
        return d.value(target, lambda _: d.clock())
    if source.startswith("{"):
        return _pack(d, target, split(source[1:-1]), width)
    if target.startswith("{"):
        return _unpack(d, split(target[1:-1]), source, width)
    slot = d.source(source, width)
    return d.value(target, lambda f: f[slot])


def _pack(d: Decoder, target: str, parts: list[str], width: int) -> Instruction:
    part, whole = width // len(parts), UNSIGNED[width]
    slots = [d.source(text, part) for text in parts]
    shifts = [whole(8 * part * i) for i in range(len(parts))]

    def pack(f):
        found = f[slots[0]].astype(whole)
        for slot, shift in zip(slots[1:], shifts[1:]):
            found = found | f[slot].astype(whole) << shift
        return found

    return d.value(target, pack)


def _unpack(d: Decoder, targets: list[str], source: str, width: int) -> Instruction:
    slot, kind = d.source(source, width), UNSIGNED[width // len(targets)]
    shifts = [UNSIGNED[width](8 * width // len(targets) * i) for i in range(len(targets))]
    slots = [d.target(name) for name in targets]

    def unpack(run, mask):
        x = run.frame[slot]
        for target, shift in zip(slots, shifts):
            run.put(target, (x >> shift).astype(kind), mask)

    return d.act(unpack)


@instruction("cvta", "to global shared")
def cvta(d: Decoder, s: Statement) -> Instruction:
    """9.7.9.20: addresses of all spaces are their own generic addresses here."""
    return mov(d, s)


@instruction("cvt", "rn rna rz rm rp rni rzi rmi rpi ftz sat satfinite relu")
def cvt(d: Decoder, s: Statement) -> Instruction:
    """9.7.9.21."""
    to, kind = s.op[-2:]
    if to in ("f16x2", "bf16x2", "e4m3x2", "e5m2x2") or kind in ("e4m3x2", "e5m2x2"):
        return _cvt_pair(d, s, to, kind)
    if s.has("satfinite") and to != "tf32":
        raise ValueError("satfinite")
    # a register may be wider than the type that is read from it or written to it
    source, target = d.source(s.operands[1], WIDTH[kind]), d.target(s.operands[0])
    holder, wide = UNSIGNED[WIDTH[kind]], d.widths[target]
    convert = _converter(s, to, kind)

    def run(f):
        result = convert(typed(f[source].astype(holder, copy=False), kind))
        return extended(result, to, wide)

    return Instruction(s, 0, run, target)


def _converter(s: Statement, to: str, kind: str):
    """A function: numbers of `kind` -> bits of `to`, as wide as it."""
    mode = s.one_of("rna", *DIRECTED) or "rn"
    whole = ROUNDINGS.get(s.one_of(*ROUNDINGS))
    if to == "f64" and kind in ("s64", "u64") and mode != "rn":
        raise ValueError("64-bit integers as float64 in this rounding")
    if not is_float(to):
        return lambda x: _to_integer(x, kind, to, whole, s)
    if (to, kind, s.op[1]) == ("bf16", "f32", "rn") and len(s.op) == 4:
        return float_to_bf16

    def to_float(x):
        if s.has("ftz") and kind == "f32":
            x = flush(x)
        if whole is not None:
            x = whole(x)
        if mode == "rn" and to in FLOATS and not s.has("sat", "relu", "satfinite"):
            y = x.astype(FLOATS[to])
        else:
            if x.dtype.itemsize == 8 and x.dtype.kind in "iu":  # more digits than float64 has: rounded to odd
                upper, lower = x >> x.dtype.type(32), x & x.dtype.type(0xFFFFFFFF)
                y = odd_sum(np.ldexp(upper.astype(np.float64), 32), lower.astype(np.float64))
            else:
                y = x.astype(np.float64)
            if s.has("sat"):
                y = np.fmin(np.fmax(y, 0), 1)
            if s.has("relu"):
                y = np.where(y <= 0, 0.0, y)
            if to != "f64":
                y = rounded(y, to, mode, s.has("satfinite"))
        if s.has("ftz") and to == "f32":
            y = flush(y.astype(np.float32))
        return _bits(y, to)

    return to_float


def _bits(y: np.ndarray, to: str) -> np.ndarray:
    """The bits of numbers that the type can hold."""
    if to in ("bf16", "tf32"):
        found = np.ascontiguousarray(y, np.float32).view(np.uint32)
        found = (found >> np.uint32(16)).astype(np.uint16) if to == "bf16" else found
    else:
        found = np.ascontiguousarray(y, FLOATS[to]).view(UNSIGNED[WIDTH[to]])
    bad = y != y
    return np.where(bad, found.dtype.type(NAN["f32" if to == "tf32" else to]), found) if bad.any() else found


def _to_integer(x: np.ndarray, kind: str, to: str, whole, s: Statement) -> np.ndarray:
    """Of floating point: rounded, NaN is 0, what is too large the nearest there is. Of integers: the lower bits."""
    signed = to[0] == "s"
    info = np.iinfo((SIGNED if signed else UNSIGNED)[WIDTH[to]])
    if is_float(kind):
        if s.has("ftz") and kind == "f32":
            x = flush(x)
        x = whole(np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf))
        inside = np.where((x > info.min) & (x < float(info.max)), x, 0).astype(info.dtype)
        x = np.where(
            x >= float(info.max), info.dtype.type(info.max), np.where(x <= info.min, info.dtype.type(info.min), inside)
        )
    elif s.has("sat"):
        least, most = max(info.min, np.iinfo(x.dtype).min), min(info.max, np.iinfo(x.dtype).max)
        x = np.clip(x, x.dtype.type(least), x.dtype.type(most))
    return np.ascontiguousarray(x.astype(info.dtype)).view(UNSIGNED[WIDTH[to]])


def _cvt_pair(d: Decoder, s: Statement, to: str, kind: str) -> Instruction:
    """Two numbers in one register; of two operands the first one becomes the upper half."""
    mode = s.one_of("rna", *DIRECTED) or "rn"
    narrow = to.removesuffix("x2")
    if kind in ("e4m3x2", "e5m2x2"):
        if to != "f16x2":
            raise ValueError("of 8 bits only to f16x2")
        (source,) = d.sources(s.operands[1:], kind)

        def widen(f):
            pair = np.ascontiguousarray(f[source]).view(np.uint8).reshape(*f[source].shape, 2)
            values = _relu(eighth_to_float(pair, kind[:-2]), s)
            return np.ascontiguousarray(_bits(values, "f16")).view(np.uint32)[..., 0]

        return d.value(s.operands[0], widen)
    if kind == "f16x2":
        (source,) = d.sources(s.operands[1:], kind)
        values = lambda f: halves(f[source], "f16")
    else:
        high, low = d.sources(s.operands[1:], kind, kind)
        values = lambda f: np.stack(np.broadcast_arrays(f[low].view(np.float32), f[high].view(np.float32)), -1)

    def narrowed(f):
        x = _relu(values(f).astype(np.float64), s)
        if narrow in ("e4m3", "e5m2"):
            return np.ascontiguousarray(to_eighth(x, narrow)).view(np.uint16)[..., 0]
        return np.ascontiguousarray(_bits(rounded(x, narrow, mode, s.has("satfinite")), narrow)).view(np.uint32)[..., 0]

    def quick(f):  # rounding to nearest, without float64
        x = values(f)
        return np.ascontiguousarray(float_to_bf16(x) if narrow == "bf16" else _bits(x.astype(np.float16), "f16")).view(
            np.uint32
        )[..., 0]

    plain = narrow in ("f16", "bf16") and mode == "rn" and not s.has("relu", "satfinite", "sat")
    found = d.value(s.operands[0], quick if plain else narrowed)
    if kind != "f16x2" and high != low:  # of one number Triton makes a pair whose upper half it does not use
        found.junk = frozenset({high})
    return found


def _relu(x: np.ndarray, s: Statement) -> np.ndarray:
    return np.where(x <= 0, x.dtype.type(0), x) if s.has("relu") else x
