"""Products of matrices by a warp. (PTX ISA 9.7.14)

A fragment is the part of a matrix that a lane holds; lane = 4 * group + member.
"""

import re

import numpy as np

from .decode import Decoder, Instruction, instruction
from .floating import quiet
from .parse import Statement, split
from .values import UNSIGNED, eighth_to_float, from_halves, fused_double, halves


def whole(x: np.ndarray, run) -> np.ndarray:
    """A register for every lane, [warps, 32]."""
    return np.broadcast_to(x, (run.warps, 32))


def fragments(words: list[np.ndarray], run) -> np.ndarray:
    """Registers -> [warps, words, 8 groups, 4 members]."""
    return np.stack([whole(word, run) for word in words], 1).reshape(run.warps, len(words), 8, 4)


def elements(words: np.ndarray, kind: str) -> np.ndarray:
    """uint32 [...] -> its numbers, [..., 1, 2 or 4], the lowest first."""
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    if kind in ("f16", "bf16"):
        return halves(words, kind)
    if kind == "f64":
        return words.view(np.float64)[..., None]
    each = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    if kind in ("e4m3", "e5m2"):
        return eighth_to_float(each, kind)
    return each.view(np.int8) if kind == "s8" else each


def left(words: np.ndarray, kind: str) -> np.ndarray:
    """Fragments of A [warps, words, 8, 4] -> [warps, 16, k]: word i has rows from 8 * (i % 2) on, and the columns after
    its member in the half i // 2. One word: [warps, 8, 4].
    """
    x = elements(words, kind)
    warps, count, _, _, width = x.shape
    if count == 1:
        return x.reshape(warps, 8, 4)
    x = x.reshape(warps, count // 2, 2, 8, 4, width).transpose(0, 2, 3, 1, 4, 5)
    return x.reshape(warps, 16, count // 2 * 4 * width)


def right(words: np.ndarray, kind: str) -> np.ndarray:
    """Fragments of B [warps, words, 8, 4] -> [warps, k, 8]: the group is the column."""
    x = elements(words, kind)
    warps, count, _, _, width = x.shape
    return x.transpose(0, 1, 3, 4, 2).reshape(warps, count * 4 * width, 8)


SUMS = {"f32": np.float32, "f16": np.float32, "f64": np.float64, "s32": np.int32}  # what C and D are computed as


def accumulator(words: np.ndarray, kind: str) -> np.ndarray:
    """Fragments of C [warps, words, 8, 4] -> [warps, 8 or 16, 8]: two neighbours of a row, then two of the row 8
    below.
    """
    if kind == "f16":
        return halves(words, "f16").reshape(words.shape[0], 16, 8)
    warps, count, _, _ = words.shape
    x = words.view(SUMS[kind]).reshape(warps, count // 2, 2, 8, 4).transpose(0, 1, 3, 4, 2)
    return x.reshape(warps, 4 * count, 8)


def results(product: np.ndarray, kind: str) -> np.ndarray:
    """[warps, 8 or 16, 8] -> fragments of D, [warps, words, 32]."""
    warps, rows, _ = product.shape
    x = product.reshape(warps, rows // 8, 8, 4, 2)
    if kind == "f16":
        return from_halves(x.astype(np.float32), "f16").reshape(warps, 2, 32)
    x = np.ascontiguousarray(x.astype(SUMS[kind]).transpose(0, 1, 4, 2, 3))
    return x.view(UNSIGNED[x.itemsize]).reshape(warps, rows // 4, 32)


def multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray, kind: str, saturates: bool = False) -> np.ndarray:
    """a @ b + c: of integers exactly, and wrapped or cut off; of float64 as fused products, one after the other; else
    summed in float64 and rounded once.
    """
    if kind == "s32":
        total = a.astype(np.int64) @ b.astype(np.int64) + c
        limits = np.iinfo(np.int32)
        return (np.clip(total, limits.min, limits.max) if saturates else total).astype(np.int32)
    if kind == "f64":
        for i in range(a.shape[2]):
            c = fused_double(*np.broadcast_arrays(a[:, :, i, None], b[:, None, i], c))
        return quiet(c, "f64")
    product = a.astype(np.float64) @ b.astype(np.float64) + c
    product = product.astype(np.float32)
    return np.where(np.isnan(product), np.uint32(0x7FFFFFFF).view(np.float32), product)


# What products there are: shapes, and bytes of an element.
FORMS = {"tf32": 4, "f16": 2, "bf16": 2, "s8": 1, "u8": 1, "e4m3": 1, "e5m2": 1, "f64": 8}


@instruction("mma", "sync aligned m8n8k4 m16n8k4 m16n8k8 m16n8k16 m16n8k32 row col satfinite e4m3 e5m2 kind::f8f6f4")
def mma(d: Decoder, s: Statement) -> Instruction:
    """9.7.14.5: D = A B + C of 16 x 8 x k: tf32 (whose low 13 bits are ignored), f16, bf16, e4m3, e5m2, s8, u8, f64;
    of f64 8 x 8 x 4, too.
    """
    rows, k = map(int, re.search(r"m(\d+)n8k(\d+)", ".".join(s.op)).groups())
    d_kind, a_kind, b_kind, c_kind = s.op[-4:]
    width = FORMS[a_kind]
    fits = {"f64": ("f64",), "s8": ("s32",), "u8": ("s32",)}.get(a_kind, ("f32", "f16"))
    if d_kind != c_kind or d_kind not in fits or not s.has("row") or (s.has("satfinite") and d_kind != "s32"):
        raise ValueError("this product")
    targets, *sources = (split(text[1:-1]) for text in s.operands)
    word, count = max(4, width), rows * k * width // 32  # bytes of a register, and of A in a lane
    if [len(x) for x in sources] != [count // word, 8 * count // rows // word, rows // (8 if c_kind == "f16" else 4)]:
        raise ValueError("fragments of another size")
    a, b, c = ([d.source(text, word) for text in texts] for texts in sources)
    slots = [d.target(text) for text in targets]

    def product(run, mask):
        x, y, z = (fragments([run.frame[i] for i in words], run) for words in (a, b, c))
        x, y, z = left(x, a_kind), right(y, b_kind), accumulator(z, c_kind)
        found = results(multiply(x, y, z, d_kind, s.has("satfinite")), d_kind)
        for i, slot in enumerate(slots):
            run.put(slot, found[:, i], mask)

    return d.act(product, together=True)
