"""Publish and await: how the programs of a group pass a state on, with the data as its own flag.

Before a launch every element that will be exchanged holds one NaN bit pattern, all ones, that no result has. A program
publishes by storing its values; a reader polls until no all-ones element is left. An element is either unwritten or
final, so no order between elements matters: there is no counter, no fence, no barrier, nothing to reset.

* Every thread waits for its own words, those that it will multiply, and for nobody else's: no reduction and no barrier
  stand in a wait, and only vectors in which something is missing are read again. That is what plain PTX is for here
  (`await_assembly`): Triton has no loop of a single thread.
* What is looked for too early is more than a look in vain: it is traffic that holds up what the others publish. Where
  a program has nothing else to do meanwhile, a wait therefore begins with a pause (plan.py).
* Stores go past the first-level cache (`.cg`), polls are relaxed loads at the scope of the GPU. Stores are not ordered
  among each other, so every word is tested and nothing follows from what was stored last.
* A result that came out as all ones becomes another NaN just before it is published (not alone: nobody waits for it):
  diverged training ends in NaN, not in a wait.
* Every wait is bounded. Past the bound the words stay NaN, the status word is set, and the host raises (launch.py).
  Every wait that lasts looks at that word too: after one has given up, no other goes on for long.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .program import entry
from .tiles import joined_words

LOOK_EVERY = tl.constexpr(64)  # polls between two looks at the status word, which lies in the memory of the host


class Bound(NamedTuple):
    """Where waits end."""

    limit: Any  # polls after the first
    status: Any  # the status word: not zero once a wait has given up
    launch: Any  # what it becomes then: the number of the launch


@triton.constexpr_function
def await_assembly(SLOTS, CHUNKS, STEP, WORDS, PARTIAL, HALVES, PACK, PAUSES, AT_ONCE):
    """PTX: read a thread's vectors of 16 bytes, SLOTS x CHUNKS for each of PACK tiles of rows, and again those in which
    an element is unwritten, until none is or the `Bound` is reached.

    Operands, each for PACK tiles: the 4 words of each vector; where the first vector is, how many words of its row
    there are from there on, status, limit and number of the launch, and if it PAUSES, for how many cycles. PARTIAL:
    vectors of the last chunk may lie past the end of a row, and are zero and not awaited: what lies there is the next
    row's. AT_ONCE: what is missing is read again as soon as it is known to be, and not when all are known: that takes
    fewer registers and more traffic.

    Where a wait gives up, unwritten words of 32 bits become the quiet NaN, because rounding to tf32 would make zeros of
    them. (Two halves of 16 bits are a NaN each as they are.)
    """
    count = SLOTS * CHUNKS * PACK
    address, room, status, limit, launch = [4 * count + i * PACK for i in range(5)]
    head = ["{", ".reg .b32 found, t, left;", ".reg .pred some, q;", f"mov.b32 left, ${limit};"]
    read, test, lost, pause = [], ["setp.ne.b32 some, 0, 0;"], [], []
    if PAUSES:
        head += [".reg .b32 begun;", "mov.u32 begun, %clock;"]
        pause += ["PAUSE:", "mov.u32 t, %clock;", "sub.u32 t, t, begun;", f"setp.lt.u32 q, t, ${launch + PACK};"]
        pause += ["@q bra PAUSE;"]
    for v in range(count):
        slot, chunk, tile = v // (CHUNKS * PACK), v // PACK % CHUNKS, v % PACK
        words = [f"${(v // PACK * 4 + k) * PACK + tile}" for k in range(4)]
        head += [f".reg .pred p{v};"]
        if PARTIAL and chunk == CHUNKS - 1:
            head += [f"mov.b32 {word}, 0;" for word in words]
            head += [f"setp.gt.s32 p{v}, ${room + tile}, {chunk * STEP};"]
        else:
            head += [f"setp.eq.b32 p{v}, 0, 0;"]
        at = f"${address + tile}+{4 * (slot * WORDS + chunk * STEP)}"
        read += [f"@p{v} ld.relaxed.gpu.global.v4.b32 {{{', '.join(words)}}}, [{at}];"]
        test += ["mov.b32 found, 0;"]
        for word in words:  # the exact test for a zero (half) word, on the complement
            test += [f"sub.s32 t, {-0x10002 if HALVES else -2}, {word};"]
            test += [f"and.b32 t, t, {word};", "or.b32 found, found, t;"]
            lost += [] if HALVES else [f"setp.eq.b32 q, {word}, -1;", f"@q mov.b32 {word}, 0x7FC00000;"]
        test += [f"and.b32 found, found, {'0x80008000' if HALVES else '0x80000000'};"]
        test += [f"setp.ne.b32 p{v}, found, 0;", f"or.pred some, some, p{v};", *(read[-1:] if AT_ONCE else [])]
    again = ["@!some bra DONE;", "sub.s32 left, left, 1;", "setp.lt.s32 q, left, 0;", "@q bra LOST;"]
    again += [f"and.b32 t, left, {LOOK_EVERY.value - 1};", "setp.ne.b32 q, t, 0;", "@q bra AGAIN;"]
    again += [f"ld.volatile.global.b32 t, [${status}];", "setp.eq.b32 q, t, 0;", "@q bra AGAIN;"]
    told = ["LOST:", f"st.volatile.global.b32 [${status}], ${launch};"]
    first = [*read, "AGAIN:"] if AT_ONCE else ["AGAIN:", *read]
    return "\n".join([*head, *pause, *first, *test, *again, *told, *lost, "DONE:", "}"])


@triton.constexpr_function
def await_constraints(VECTORS, PACK, PAUSES):
    """The operands of `await_assembly`: words, which no operand's register may serve for, and the others."""
    others = "lrlrrr" if PAUSES else "lrlrr"
    return ",".join(["=&r"] * (4 * VECTORS * PACK) + [kind for kind in others for _ in range(PACK)])


@triton.constexpr_function
def words_of(VECTORS):
    """The types of the words of so many vectors."""
    return (tl.int32,) * (4 * VECTORS)


@triton.jit
def await_vectors(
    p, room, SLOTS: tl.constexpr, CHUNKS: tl.constexpr, PARTIAL: tl.constexpr, pause, bound, USED: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Wait until CHUNKS chunks of SLOTS slots of a state are written -> their SLOTS x CHUNKS tiles of 32-bit words.

    p: pointers to vectors (tiles.py) of the first of them. room: words from there to the end of a row. PARTIAL: whether
    the last chunk may not be whole. pause: cycles before the first look, or None. USED: whether anything is made of the
    words.
    """
    VECTORS: tl.constexpr = SLOTS * CHUNKS
    PACK: tl.constexpr = C.NB // 8
    PAUSES: tl.constexpr = pause is not None
    operands = p, room, bound.status, bound.limit, bound.launch
    if PAUSES:
        operands = operands + (pause,)
    # Pure, or the compiler makes a copy for each use of the words; but a pure one that nobody uses it would drop.
    words = tl.inline_asm_elementwise(
        await_assembly(SLOTS, CHUNKS, C.STEP, C.WORDS, PARTIAL, C.BITS == tl.int16, PACK, PAUSES, C.AT_ONCE),
        await_constraints(VECTORS, PACK, PAUSES), operands, words_of(VECTORS), is_pure=USED, pack=PACK,
    )  # fmt: skip
    tiles = ()
    for i in tl.static_range(VECTORS):
        tiles = tiles + (joined_words(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]),)
    return tiles


@triton.constexpr_function
def prefetch_assembly(COUNT, STRIDE, PACK):
    """PTX: if the first of PACK flags is set, prefetch COUNT places, STRIDE bytes apart, the first of PACK pointers the
    first of them.
    """
    places = " ".join(f"@q prefetch.global.L2 [${PACK}+{i * STRIDE}];" for i in range(COUNT))
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(PACK))
    return f"{{ .reg .pred q; setp.ne.b32 q, ${2 * PACK}, 0; {places} {zeros} }}"


@triton.constexpr_function
def prefetch_constraints(PACK):
    """The operands of `prefetch_assembly`: results that nobody uses, pointers, flags."""
    return ",".join(["=r"] * PACK + ["l"] * PACK + ["r"] * PACK)


@triton.jit
def prefetch(p, COUNT: tl.constexpr, STRIDE: tl.constexpr, there, C: tl.constexpr):
    """Bring COUNT places, STRIDE values apart, from each of the pointers p on into the second-level cache, where
    `there` is true.
    """
    NEIGHBOURS: tl.constexpr = C.UB // C.S // 8 if C.ALONE else 1  # of a thread, in one line: one instruction
    BYTES: tl.constexpr = STRIDE * p.dtype.element_ty.primitive_bitwidth // 8
    tl.inline_asm_elementwise(
        prefetch_assembly(COUNT, BYTES, NEIGHBOURS), prefetch_constraints(NEIGHBOURS), [p, tl.where(there, 1, 0)],
        tl.int32, is_pure=False, pack=NEIGHBOURS,
    )  # fmt: skip


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
