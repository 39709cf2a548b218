"""What the lanes of a warp do together: shuffles, votes, reductions, and products of matrices. (PTX ISA 9.7.9, 9.7.13,
9.7.14)

All of them are `together`: run.py calls them when all 32 lanes of a warp are there, and a warp whose lanes never
meet is a Fault. A fragment is the part of a matrix that a lane holds; lane = 4 * group + member.
"""

import re

import numpy as np

from .decode import Decoder, Instruction, instruction
from .parse import Statement, split
from .values import eighth_to_float, from_halves, halves

LANES = np.arange(32)


def whole(x: np.ndarray, run) -> np.ndarray:
    """A register for every lane, [warps, 32]."""
    return np.broadcast_to(x, (run.warps, 32))


def together(d: Decoder, members: str, action) -> Instruction:
    """What all lanes do: `members`, the operand that names those which take part, must have all bits set."""
    named = d.source(members, 4)

    def checked(run, mask):
        if not (run.frame[named] == np.uint32(0xFFFFFFFF)).all():
            run.fail("a mask of some lanes only, which this machine does not know", mask)
        action(run, mask)

    return d.act(checked, together=True)


@instruction("shfl", "sync up down bfly idx")
def shfl(d: Decoder, s: Statement) -> Instruction:
    """9.7.9.6: the value of another lane; its own, and a false predicate, where that lane is outside of the segment."""
    kind = s.one_of("up", "down", "bfly", "idx")
    names = [name.strip() for name in s.operands[0].split("|")]
    source, lane, clamp = (d.source(text, 4) for text in s.operands[1:4])
    targets = [d.target(name) for name in names]

    def shuffle(run, mask):
        x, n, c = (whole(run.frame[i], run).astype(np.int64) for i in (source, lane, clamp))
        n, segment, last = n & 31, (c >> 8) & 31, c & 31
        least = LANES & segment
        most = least | (last & ~segment)
        j = {"idx": least | (n & ~segment), "bfly": LANES ^ n, "up": LANES - n, "down": LANES + n}[kind]
        inside = j >= most if kind == "up" else j <= most
        found = np.take_along_axis(x, np.where(inside, j, LANES) & 31, 1).astype(np.uint32)
        for target, value in zip(targets, (found, inside)):
            run.put(target, value, mask)

    return together(d, s.operands[4], shuffle)


@instruction("vote", "sync all any uni ballot")
def vote(d: Decoder, s: Statement) -> Instruction:
    """9.7.13.9."""
    what = s.one_of("all", "any", "uni", "ballot")
    source, flipped = d.source(s.operands[1].lstrip("!"), 0), s.operands[1].startswith("!")
    target = d.target(s.operands[0])

    def count(run, mask):
        p = whole(run.frame[source], run) ^ flipped
        every, some = p.all(1, keepdims=True), p.any(1, keepdims=True)
        if what == "ballot":
            found = (p.astype(np.uint32) << LANES.astype(np.uint32)).sum(1, keepdims=True, dtype=np.uint32)
        else:
            found = {"all": every, "any": some, "uni": every | ~some}[what]
        run.put(target, found, mask)

    return together(d, s.operands[2], count)


@instruction("elect", "sync")
def elect(d: Decoder, s: Statement) -> Instruction:
    """9.7.13.15: one lane of the warp, here the first."""
    targets = [d.target(name.strip()) for name in s.operands[0].split("|")]

    def choose(run, mask):
        run.put(targets[0], np.zeros((1, 1), np.uint32), mask)
        run.put(targets[1], (LANES == 0)[None], mask)

    return together(d, s.operands[1], choose)


@instruction("redux", "sync add min max and or xor abs NaN")
def redux(d: Decoder, s: Statement) -> Instruction:
    """9.7.13.12: a reduction of integers, or the least or greatest float, for all lanes."""
    what, kind = s.one_of("add", "min", "max", "and", "or", "xor"), s.op[-1]
    source, target = d.source(s.operands[1], 4), d.target(s.operands[0])
    if kind == "f32":
        fold = {"min": np.minimum if s.has("NaN") else np.fmin, "max": np.maximum if s.has("NaN") else np.fmax}[what]
    else:
        fold = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                "xor": np.bitwise_xor}[what]  # fmt: skip
    as_type = {"f": np.float32, "s": np.int32}.get(kind[0], np.uint32)

    def reduce(run, mask):
        x = np.ascontiguousarray(whole(run.frame[source], run)).view(as_type)
        x = np.abs(x) if s.has("abs") else x
        found = fold.reduce(x, 1, keepdims=True, dtype=x.dtype).view(np.uint32)
        if kind == "f32":
            found = np.where(np.isnan(found.view(np.float32)), np.uint32(0x7FFFFFFF), found)
        run.put(target, found, mask)

    return together(d, s.operands[2], reduce)


# Products of matrices -------------------------------------------------------------------------------------------------


def fragments(words: list[np.ndarray], run) -> np.ndarray:
    """Registers -> [warps, words, 8 groups, 4 members]."""
    return np.stack([whole(word, run) for word in words], 1).reshape(run.warps, len(words), 8, 4)


def elements(words: np.ndarray, kind: str) -> np.ndarray:
    """uint32 [...] -> its numbers, [..., 1, 2 or 4], the lowest first."""
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    if kind in ("f16", "bf16"):
        return halves(words, kind)
    each = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    if kind in ("e4m3", "e5m2"):
        return eighth_to_float(each, kind)
    return each.view(np.int8) if kind == "s8" else each


def left(words: np.ndarray, kind: str) -> np.ndarray:
    """Fragments of A [warps, words, 8, 4] -> [warps, 16, k]: word i has rows from 8 * (i % 2) on, and the columns after
    its member in the half i // 2.
    """
    x = elements(words, kind)
    warps, count, _, _, width = x.shape
    x = x.reshape(warps, count // 2, 2, 8, 4, width).transpose(0, 2, 3, 1, 4, 5)
    return x.reshape(warps, 16, count // 2 * 4 * width)


def right(words: np.ndarray, kind: str) -> np.ndarray:
    """Fragments of B [warps, words, 8, 4] -> [warps, k, 8]: the group is the column."""
    x = elements(words, kind)
    warps, count, _, _, width = x.shape
    return x.transpose(0, 1, 3, 4, 2).reshape(warps, count * 4 * width, 8)


def accumulator(words: np.ndarray, kind: str) -> np.ndarray:
    """Fragments of C [warps, words, 8, 4] -> [warps, 16, 8]: two neighbours of a row, then two of the row 8 below."""
    x = halves(words, "f16") if kind == "f16" else words.view(np.int32 if kind == "s32" else np.float32)
    warps = x.shape[0]
    if kind != "f16":
        x = x.reshape(warps, 2, 2, 8, 4).transpose(0, 1, 3, 4, 2)
    return x.reshape(warps, 16, 8)


def results(product: np.ndarray, kind: str) -> np.ndarray:
    """[warps, 16, 8] -> fragments of D, [warps, words, 32]."""
    warps = product.shape[0]
    x = product.reshape(warps, 2, 8, 4, 2)
    if kind == "f16":
        return from_halves(x.astype(np.float32), "f16").reshape(warps, 2, 32)
    x = x.astype(np.int32 if kind == "s32" else np.float32).transpose(0, 1, 4, 2, 3)
    return np.ascontiguousarray(x).view(np.uint32).reshape(warps, 4, 32)


def multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray, kind: str) -> np.ndarray:
    """a @ b + c, summed in float64 and rounded once (integers: exactly)."""
    if kind == "s32":
        return (a.astype(np.int64) @ b.astype(np.int64) + c).astype(np.int32)
    product = a.astype(np.float64) @ b.astype(np.float64) + c
    product = product.astype(np.float32)
    return np.where(np.isnan(product), np.uint32(0x7FFFFFFF).view(np.float32), product)


@instruction("mma", "sync aligned m16n8k4 m16n8k8 m16n8k16 m16n8k32 row col satfinite e4m3 e5m2 kind::f8f6f4")
def mma(d: Decoder, s: Statement) -> Instruction:
    """9.7.14.5: D = A B + C of 16 x 8 x k: tf32 (whose low 13 bits are ignored), f16, bf16, e4m3, e5m2, s8, u8."""
    k = int(re.search(r"m16n8k(\d+)", ".".join(s.op))[1])
    d_kind, a_kind, b_kind, c_kind = s.op[-4:]
    width = {"tf32": 4, "f16": 2, "bf16": 2, "s8": 1, "u8": 1, "e4m3": 1, "e5m2": 1}[a_kind]
    if d_kind != c_kind or d_kind not in ("f32", "f16", "s32") or s.has("satfinite") or not s.has("row"):
        raise ValueError("this product")
    targets, *sources = (split(text[1:-1]) for text in s.operands)
    if [len(x) for x in sources] != [16 * k * width // 128, 8 * k * width // 128, 2 if c_kind == "f16" else 4]:
        raise ValueError("fragments of another size")
    a, b, c = ([d.source(text, 4) for text in texts] for texts in sources)
    slots = [d.target(text) for text in targets]

    def product(run, mask):
        x, y, z = (fragments([run.frame[i] for i in words], run) for words in (a, b, c))
        found = multiply(left(x, a_kind), right(y, b_kind), accumulator(z, c_kind), d_kind)
        for i, slot in enumerate(slots):
            run.put(slot, results(found, d_kind)[:, i], mask)

    return d.act(product, together=True)


def _matrices(s: Statement) -> int:
    """How many matrices of 8 x 8 numbers of 16 bits."""
    if not s.has("m8n8") or s.op[-1] != "b16":
        raise ValueError("another shape")
    return int(s.one_of("x1", "x2", "x4")[1])


@instruction("ldmatrix", "sync aligned m8n8 x1 x2 x4 trans shared")
def ldmatrix(d: Decoder, s: Statement) -> Instruction:
    """9.7.14.5.15: lane 8j + i has the address of row i of matrix j; each lane gets two neighbours of row `group`."""
    count = _matrices(s)
    base, offset = d.address(s.operands[1])
    targets = [d.target(text) for text in split(s.operands[0][1:-1])]

    def load(run, mask):
        given = None if count == 4 else np.broadcast_to(LANES < 8 * count, (run.warps, 32))
        rows = run.load("shared", run.address(base, offset), 4, 4, given)[:, : 8 * count]
        x = np.ascontiguousarray(rows).view(np.uint16).reshape(run.warps, count, 8, 8)
        x = x.swapaxes(2, 3) if s.has("trans") else x
        words = np.ascontiguousarray(x).view(np.uint32).reshape(run.warps, count, 32)
        for j, target in enumerate(targets):
            run.put(target, words[:, j], mask)

    return d.act(load, together=True)


@instruction("stmatrix", "sync aligned m8n8 x1 x2 x4 trans shared")
def stmatrix(d: Decoder, s: Statement) -> Instruction:
    """9.7.14.5.16: the contrary of ldmatrix."""
    count = _matrices(s)
    base, offset = d.address(s.operands[0])
    sources = [d.source(text, 4) for text in split(s.operands[1][1:-1])]

    def store(run, mask):
        words = np.stack([whole(run.frame[i], run) for i in sources], 1)
        x = np.ascontiguousarray(words).view(np.uint16).reshape(run.warps, count, 8, 8)
        x = np.ascontiguousarray(x.swapaxes(2, 3) if s.has("trans") else x)
        rows = np.zeros((run.warps, 32, 4), np.uint32)
        rows[:, : 8 * count] = x.view(np.uint32).reshape(run.warps, 8 * count, 4)
        given = None if count == 4 else np.broadcast_to(LANES < 8 * count, (run.warps, 32))
        run.store("shared", run.address(base, offset), rows, given)

    return d.act(store, together=True)
