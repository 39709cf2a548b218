"""Publish and await: how the programs of a group pass a state on, with the data as its own flag.

Before a launch every element that will be exchanged holds one NaN bit pattern, all ones, that no result has. A program
publishes by storing its values; a reader polls its whole tile until no all-ones element is left. An element is either
unwritten or final, so no order between elements matters: there is no counter, no fence, no barrier, nothing to reset.

* Stores go past the first-level cache (`.cg`), polls are volatile. Stores are not ordered among each other, so every
  tile is tested in full and nothing follows from what was stored last.
* A result that came out as all ones becomes another NaN just before it is published (not alone: nobody waits for it):
  diverged training ends in NaN, not in a wait.
* Every wait is bounded. Past the bound the program waits no more for the rest of the launch; what it read stays NaN,
  a status word is set, and the host raises (launch.py).
"""

import triton
import triton.language as tl

from .program import entry
from .tiles import chunk_columns, chunk_words


@triton.jit
def either(a, b):
    """a | b."""
    return a | b


@triton.jit
def inside_last_chunk(C: tl.constexpr):
    """Which words of the last chunk exist."""
    return chunk_columns(C.S, chunk_words()) < C.WORDS - (C.CHUNKS - 1) * C.STEP


@triton.jit
def poll(p, SLOTS: tl.constexpr, C: tl.constexpr):
    """SLOTS x CHUNKS tiles of 32-bit words, read from p on: all of a state, or of some of a gradient's slots."""
    words = ()
    for slot in tl.static_range(SLOTS):
        for i in tl.static_range(C.CHUNKS):
            source = p + slot * C.WORDS + i * C.STEP
            if i == C.CHUNKS - 1 and C.WORDS % C.STEP != 0:
                words = words + (tl.load(source, mask=inside_last_chunk(C), other=0, volatile=True),)
            else:
                words = words + (tl.load(source, volatile=True),)
    return words


@triton.jit
def poll_again(p, i, C: tl.constexpr):
    """Tile i of a slot that `poll` reads: for one that was found written and not kept."""
    if C.WORDS % C.STEP == 0:
        words = tl.load(p + i * C.STEP, volatile=True)
    else:
        words = tl.load(p + i * C.STEP, mask=inside_last_chunk(C) | (i < C.CHUNKS - 1), other=0, volatile=True)
    return words


@triton.jit
def unwritten(words, BITS: tl.constexpr):
    """Not zero while some element of some word is all ones. For 16 bits: the exact test for a zero half word, on the
    complement.
    """
    ONE: tl.constexpr = 0x00010001 if BITS == tl.int16 else 1
    TOP: tl.constexpr = -2147450880 if BITS == tl.int16 else -2147483648  # 0x80008000, 0x80000000
    found = (~words[0] - ONE) & words[0]
    for i in tl.static_range(1, len(words)):
        found |= (~words[i] - ONE) & words[i]
    return tl.reduce(found, None, either) & TOP


@triton.jit
def until_written(words, p, limit, SLOTS: tl.constexpr, ALL_KEPT: tl.constexpr, C: tl.constexpr):
    """Poll again, `limit` times at most, until every element of `words`, as `poll` read them from p on, is written
    -> words, and the limit of the next wait: the same, or 0 if this one gave up.

    ALL_KEPT: every word is used afterwards. The compiler fails on a tile that a `while` tests and nobody uses after
    it, so where some are only tested, the test has a copy in the loop.
    """
    polls = 0
    if ALL_KEPT:
        while (unwritten(words, C.BITS) != 0) & (polls < limit):
            words = poll(p, SLOTS, C)
            polls += 1
    else:
        found = unwritten(words, C.BITS)
        while (found != 0) & (polls < limit):
            words = poll(p, SLOTS, C)
            found = unwritten(words, C.BITS)
            polls += 1
    return words, tl.where(polls < limit, limit, 0)


@triton.jit
def lost_as_nan(x, limit, C: tl.constexpr):
    """x, what came of an awaited state; NaN once a wait gave up. In all types but tf32 it is NaN by itself, because
    unwritten words are; rounding to tf32 makes zeros of them.
    """
    return tl.where(limit == 0, float("nan"), x) if C.PRECISION == "tf32" else x


@triton.jit
def publishable(x, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """Bits of a float32 tile in DTYPE, never all ones. In float32 every NaN becomes the quiet one, which rounding
    keeps a NaN.
    """
    if DTYPE == tl.float32:
        return tl.where(x != x, 0x7FC00000, x.to(BITS, bitcast=True))
    else:
        bits = x.to(DTYPE).to(BITS, bitcast=True)
        return tl.where(bits == -1, 0x7FFF, bits).to(BITS)


@triton.jit
def publish(p, row, place, slot: tl.constexpr, x, mask, C: tl.constexpr):
    """Publish a float32 tile as a slot of a buffer [rows, N, E*HS] -> what was published. Alone nobody polls it."""
    x = x.to(C.DTYPE) if C.ALONE else publishable(x, C.DTYPE, C.BITS).to(C.DTYPE, bitcast=True)
    tl.store(entry(p, row, place, C.E * C.HS, C) + slot * C.HS, x, mask=mask, cache_modifier=".cg")
    return x
