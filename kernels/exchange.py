"""Publish and await: how the programs of a group pass a state on, with the data as its own flag.

Before a launch every element that will be exchanged holds one NaN bit pattern, all ones, that no result has. A program
publishes by storing its values; a reader polls its whole tile until no all-ones element is left. An element is either
unwritten or final, so no order between elements matters: there is no counter, no fence, no barrier, nothing to reset.

* Stores go past the first-level cache (`.cg`), polls are volatile. Stores are not ordered among each other, so every
  tile is tested in full and nothing follows from what was stored last.
* A result that came out as all ones becomes another NaN just before it is published: diverged training ends in NaN,
  not in a wait.
* Every wait is bounded. Past the bound the program waits no more for the rest of the launch; what it read stays NaN,
  a status word is set, and the host raises (launch.py).
"""

import triton
import triton.language as tl


@triton.jit
def either(a, b):
    """a | b."""
    return a | b


@triton.jit
def poll(p, inside, SLOTS: tl.constexpr, SLOT: tl.constexpr, CHUNKS: tl.constexpr, STEP: tl.constexpr):
    """SLOTS x CHUNKS tiles of 32-bit words, SLOT and STEP words apart; `inside` masks the last chunk, None where all
    of it exists.
    """
    words = ()
    for slot in tl.static_range(SLOTS):
        for i in tl.static_range(CHUNKS):
            if i == CHUNKS - 1 and inside is not None:
                words = words + (tl.load(p + slot * SLOT + i * STEP, mask=inside, other=0, volatile=True),)
            else:
                words = words + (tl.load(p + slot * SLOT + i * STEP, volatile=True),)
    return words


@triton.jit
def poll_again(p, inside, i, CHUNKS: tl.constexpr, STEP: tl.constexpr):
    """Tile i of those that `poll` reads: for one that was found written and not kept."""
    if inside is None:
        words = tl.load(p + i * STEP, volatile=True)
    else:
        words = tl.load(p + i * STEP, mask=inside | (i < CHUNKS - 1), other=0, volatile=True)
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
def until_written(
    words, p, inside, SLOTS: tl.constexpr, SLOT: tl.constexpr, CHUNKS: tl.constexpr, STEP: tl.constexpr,
    ALL_KEPT: tl.constexpr, BITS: tl.constexpr, limit,
):  # fmt: skip
    """Poll again, `limit` times at most, until every element of `words` is written -> words, 1 if it gave up.

    ALL_KEPT: every word is used afterwards. The compiler fails on a tile that a `while` tests and nobody uses after
    it, so where some are only tested, the test has a copy in the loop.
    """
    polls = 0
    if ALL_KEPT:
        while (unwritten(words, BITS) != 0) & (polls < limit):
            words = poll(p, inside, SLOTS, SLOT, CHUNKS, STEP)
            polls += 1
    else:
        found = unwritten(words, BITS)
        while (found != 0) & (polls < limit):
            words = poll(p, inside, SLOTS, SLOT, CHUNKS, STEP)
            found = unwritten(words, BITS)
            polls += 1
    return words, (polls >= limit).to(tl.int32)


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
