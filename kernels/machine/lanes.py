"""What the lanes of a warp do together: shuffles, votes, reductions, and matrices to and from shared memory. (PTX ISA
9.7.9, 9.7.13, 9.7.14; products: products.py)

All of them are `together`: run.py calls them when all 32 lanes of a warp are there, and a warp whose lanes never
meet is a Fault.
"""

import numpy as np

from .decode import Decoder, Instruction, instruction
from .parse import Statement, split
from .products import whole

LANES = np.arange(32)


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
