"""Operand layouts: from a coalesced load to the tensor core, with nothing in between.

A step of the recurrence multiplies a slice of the recurrent weight, which never changes, by the hidden
state, which is new in every step. Both should reach the tensor core straight from the registers that a
16-byte load filled: no shared memory, no conversion, no barrier. Four ideas make that possible
(a lone program, which holds all units, splits units in place of K: see lone_shape and what follows it).

1. K (the hidden units that are summed over) is split over the S warps of a program by the leading axis of a
   three-dimensional `tl.dot`; a warp multiplies its own K and nobody else's.
2. K is cut into chunks of S x WORDS words of 32 bits: chunk i, warp s, word w stands at memory word
   (i*S + s)*WORDS + w. Four neighbouring lanes load 16 bytes each of one row, eight rows a warp.
3. A matrix instruction wants the same 32 x 8 fragment with K spread over the lanes in another order. But K is
   only summed over, so any order will do as long as weight and state agree: both are PERMUTED alike, and
   the layout of the load is the layout of the operand. The weight therefore stays in registers for all steps.
4. Every warp ends with a partial sum of all gates. `over_warps` adds them by halving the leading axis with
   `tl.split`, which compiles to one exchange through shared memory, and leaves each (row, unit) pair with all its
   gates in one thread: the equations run once and nothing is converted again.

The order in which the compiler spreads equally strided axes over lanes, warps and registers differs between releases of
Triton, and so does the width of the operand it infers; LAYOUT names the variant. A wrong one gives right results,
slowly, so tests count the machine instructions of a step (tests/test_resources.py).

Sizes, all powers of two unless said otherwise: S warps; UB units a program; NB rows of the batch a tile; CHUNKS
chunks of K (any number); PER gates that share one weight tile of M = PER*UB rows.
"""

import triton
import triton.language as tl

WORDS = 16  # 32-bit words of K a chunk and warp: 4 lanes x 16 bytes
_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
LAYOUT = tl.constexpr(36 if _VERSION <= (3, 6) else 37 if _VERSION <= (3, 7) else 38 if _VERSION <= (3, 8) else 39)


@triton.constexpr_function
def chunk_words():
    """Words of K in a warp's part of a chunk."""
    return WORDS


@triton.constexpr_function
def chunk_values(dtype):
    """Values of K in a warp's part of a chunk: 32 of 16 bits, 16 of 32 bits."""
    return WORDS * 32 // dtype.primitive_bitwidth


@triton.constexpr_function
def axes(RANK):
    """The order of the axes of a tile that is loaded. Here they are named from registers over warps to the lowest
    lanes; of equally strided axes the compiler gives those to the last, or to the first. Its own inverse.
    """
    return tuple(range(RANK - 2, -1, -1)) + (RANK - 1,) if LAYOUT.value == 36 else tuple(range(RANK))


@triton.jit
def in_order(x, RANK: tl.constexpr):
    """A tile as it is loaded -> its axes as they are named, or back."""
    return x.permute(() + axes(RANK))


@triton.jit
def along(n: tl.constexpr, AXIS: tl.constexpr, RANK: tl.constexpr):
    """0..n-1 along one axis of a tile that is loaded."""
    i = tl.arange(0, n)
    for axis in tl.static_range(RANK):
        if axis != axes(RANK)[AXIS]:
            i = tl.expand_dims(i, axis)
    return i


# A chunk tile has the axes tile of 8 rows, warp, the 8 rows of a matrix instruction, K.


@triton.jit
def chunk_rows(ROWS: tl.constexpr):
    """The row numbers 0..ROWS-1 along the two row axes of a chunk tile."""
    return along(ROWS // 8, 0, 4) * 8 + along(8, 2, 4)


@triton.jit
def chunk_columns(S: tl.constexpr, N: tl.constexpr):
    """The N columns (values of K, or words) of each warp's part of chunk 0; chunk i lies i*S*N further on."""
    return along(S, 1, 4) * N + along(N, 3, 4)


@triton.constexpr_function
def wide(dtype, NB):
    """Whether the compiler makes operands of NB rows that went through `tl.join` twice as wide: 4 values of 16 bits, 2
    of 32.
    """
    return LAYOUT.value <= 37 or (LAYOUT.value == 38 and dtype.primitive_bitwidth == 16 and NB == 8)


@triton.jit
def permuted(x, S: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):
    """[S, ROWS, K] with K in the order of memory -> K in the order of the matrix instruction. WIDE: see `wide`; weight
    and state must agree, and lone tiles are not.
    """
    if K == 16 and not WIDE:  # 32-bit values: lane, pair, half -> pair, half, lane
        x = x.reshape(S, ROWS, 4, 2, 2).permute(0, 1, 3, 4, 2)
    elif K == 16:
        x = x.reshape(S, ROWS, 4, 2, 2).permute(0, 1, 3, 2, 4)
    elif not WIDE:
        x = x.reshape(S, ROWS, 4, 2, 2, 2).permute(0, 1, 3, 4, 2, 5)
    else:
        x = x.reshape(S, ROWS, 4, 2, 2, 2).permute(0, 1, 4, 2, 3, 5)
    return x.reshape(S, ROWS, K)


@triton.jit
def operand(x, S: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):
    """A chunk tile, its axes in order -> operand [S, ROWS, K]. Moves nothing: only names change."""
    x = x.reshape(ROWS // 8, S, 8, K).permute(1, 0, 2, 3)
    return permuted(x.reshape(S, ROWS, K), S, ROWS, K, WIDE)


# The exchanged state is polled in vectors: 16 bytes of a row, four of them a warp and chunk. A tile of pointers to
# vectors has the axes tile of 8 rows, warp, row, lane; their words side by side make a chunk tile of it.


@triton.jit
def vector_rows(ROWS: tl.constexpr):
    """The row numbers 0..ROWS-1 along the two row axes of a tile of vectors."""
    return tl.arange(0, ROWS // 8)[:, None, None, None] * 8 + tl.arange(0, 8)[None, None, :, None]


@triton.jit
def vector_words(S: tl.constexpr):
    """The first words of the vectors of chunk 0."""
    return tl.arange(0, S)[None, :, None, None] * chunk_words() + tl.arange(0, 4)[None, None, None, :] * 4


@triton.jit
def joined_words(w0, w1, w2, w3):
    """The words of a tile of vectors, each a tile -> a chunk tile. Moves nothing: they are one thread's."""
    x = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return x.reshape(x.shape[0], x.shape[1], x.shape[2], chunk_words())


@triton.jit
def values(words, DTYPE: tl.constexpr):
    """32-bit words [..., n] as loaded -> the values they hold: [..., n] of 32 bits, or [..., n, 2] of 16 bits."""
    if DTYPE.primitive_bitwidth == 32:
        return words.to(DTYPE, bitcast=True)
    else:
        low, high = words.to(tl.int16), (words >> 16).to(tl.int16)
        return tl.join(low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True))


@triton.constexpr_function
def power_of_two(n):
    """The least power of two that is n or more."""
    return 1 << (n - 1).bit_length()


@triton.jit
def over_warps(x, S: tl.constexpr, GP: tl.constexpr, UB: tl.constexpr, NB: tl.constexpr):
    """Partial sums [S, GP, UB, NB] of the warps -> GP sums [NB, UB] as a tuple, those of a (row, unit) pair in one
    thread. GP: 1, 2, 4 or 8.
    """
    LEVELS: tl.constexpr = (S > 1) + (S > 2) + (S > 4) + (S > 8)
    x = x.permute(0, 1, 3, 2)
    for level in tl.static_range(LEVELS):
        even, odd = tl.split(x.reshape(S >> (level + 1), 2, GP, NB, UB).permute(0, 2, 3, 4, 1))
        x = even + odd
    if GP == 8:
        even, odd = tl.split(x.reshape(2, 2, 2, NB, UB).permute(3, 4, 0, 1, 2))
        s04, s26 = tl.split(even)
        s15, s37 = tl.split(odd)
        s0, s4 = tl.split(s04)
        s2, s6 = tl.split(s26)
        s1, s5 = tl.split(s15)
        s3, s7 = tl.split(s37)
        return s0, s1, s2, s3, s4, s5, s6, s7
    elif GP == 4:
        even, odd = tl.split(x.reshape(2, 2, NB, UB).permute(2, 3, 0, 1))
        s0, s2 = tl.split(even)
        s1, s3 = tl.split(odd)
        return s0, s1, s2, s3
    elif GP == 2:
        return tl.split(x.reshape(2, NB, UB).permute(1, 2, 0))
    else:
        return (x.reshape(NB, UB),)


@triton.jit
def side_by_side(parts, COUNT: tl.constexpr, S: tl.constexpr, PER: tl.constexpr, UB: tl.constexpr, NB: tl.constexpr):
    """COUNT tiles [S, PER*UB, NB] of PER gates each -> [S, GP, UB, NB] with all gates, GP a power of two."""
    if COUNT == 1:
        x = parts[0].reshape(S, PER, UB, NB)
    elif COUNT == 2:  # gate = PER * part + which
        x = tl.join(parts[0], parts[1]).reshape(S, PER, UB, NB, 2).permute(0, 4, 1, 2, 3).reshape(S, 2 * PER, UB, NB)
    elif COUNT <= 4:
        last = parts[0] * 0.0 if COUNT == 3 else parts[3]
        x = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], last))
        if PER == 1:
            x = x.reshape(S, UB, NB, 4).permute(0, 3, 1, 2)
        else:
            x = x.reshape(S, PER, UB, NB, 4).permute(0, 4, 1, 2, 3).reshape(S, 4 * PER, UB, NB)
    else:  # of one gate each
        for _ in tl.static_range(COUNT, 8):
            parts = parts + (parts[0] * 0.0,)
        even = tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6]))
        odd = tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7]))
        x = tl.join(even, odd).reshape(S, UB, NB, 8).permute(0, 3, 1, 2)
    return x


# A lone program holds all units, UB of them. The leading axis of its products is the warp, too, but a warp multiplies
# all of K with the weights of its own UW = UB/S units: nothing is summed over warps. The result leaves each thread UW/8
# units of NB/4 rows, with all their gates, and loads, equations and stores are made in just that layout. A lone tile
# has the axes row of a thread, warp, 8 lanes of units, 4 lanes of rows, unit of a thread; the units of a thread are
# neighbours in memory, because unit lane*(UW/8) + i stands in row i*8 + lane of its warp's weights. (Where H is no
# multiple of UW/8 the compiler wants another layout for some tensors, and converts: right, and slower.)


@triton.constexpr_function
def lone_shape(S, UB, NB):
    """The shape of a lone tile."""
    shape = NB // 4, S, 8, 4, UB // S // 8
    return tuple(shape[axis] for axis in axes(5))


@triton.jit
def lone_rows(NB: tl.constexpr):
    """The rows 0..NB-1 of a lone tile."""
    return along(NB // 4, 0, 5) * 4 + along(4, 3, 5)


@triton.jit
def lone_units(S: tl.constexpr, UW: tl.constexpr):
    """The units of a lone tile."""
    return along(S, 1, 5) * UW + along(8, 2, 5) * (UW // 8) + along(UW // 8, 4, 5)


@triton.jit
def lone_stack(tiles, STACK: tl.constexpr, S: tl.constexpr, UB: tl.constexpr, NB: tl.constexpr):
    """Lone tiles, and zeros up to STACK, along a new first axis, the other axes in order. Each thread keeps what it
    has, tile behind tile. (`tl.join` would make neighbours of the tiles, and no two units could be stored together.)
    """
    which = tl.arange(0, STACK)[:, None, None, None, None, None]
    x = in_order(tiles[0], 5).reshape(1, NB // 4, S, 8, 4, UB // S // 8)
    if STACK > 1:
        x = tl.where(which == 0, x, tl.zeros_like(x))
        for i in tl.static_range(1, len(tiles)):
            x = tl.where(which == i, in_order(tiles[i], 5).reshape(1, NB // 4, S, 8, 4, UB // S // 8), x)
    return x


@triton.jit
def lone_state(tiles, STACK: tl.constexpr, S: tl.constexpr, UB: tl.constexpr, NB: tl.constexpr, K: tl.constexpr):
    """Lone tiles, and zeros up to STACK -> operand [STACK*S, UB, NB], the same for every warp. All that a step takes
    through shared memory; in one piece, so that two barriers are enough.
    """
    x = lone_stack(tiles, STACK, S, UB, NB)
    x = x.reshape(STACK, NB // 8, 2, S, 8, 4, UB // S // 8).permute(0, 1, 5, 2, 3, 4, 6)
    x = permuted(x.reshape(STACK * NB, UB // K, K), STACK * NB, UB // K, K, False)
    return x.reshape(STACK, 1, NB, UB).broadcast_to(STACK, S, NB, UB).reshape(STACK * S, NB, UB).permute(0, 2, 1)


@triton.jit
def lone_result(x, STACK: tl.constexpr, S: tl.constexpr, UB: tl.constexpr, NB: tl.constexpr):
    """A product [STACK*S, UW, NB] -> lone tile, the sum of the STACK parts, which are in one thread."""
    x = tl.sum(x.reshape(STACK, S, UB // S, NB), 0) if STACK > 1 else x
    x = x.reshape(S, UB // S // 8, 8, NB // 8, 4, 2).permute(3, 5, 0, 2, 4, 1)
    return in_order(x.reshape(NB // 4, S, 8, 4, UB // S // 8), 5)


@triton.jit
def lone_weights(S: tl.constexpr, UB: tl.constexpr, K: tl.constexpr, STACK: tl.constexpr):
    """The numbers of weight, row and column in a tile of STACK weights [UB, UB]: chunk tiles, but a warp has rows of
    its own, and all chunks.
    """
    UW: tl.constexpr = UB // S
    unit = along(S, 3, 6) * UW + along(8, 4, 6) * (UW // 8) + along(UW // 8, 2, 6)
    return along(STACK, 0, 6), unit, along(UB // K, 1, 6) * K + along(K, 5, 6)


@triton.jit
def lone_operand(w, STACK: tl.constexpr, S: tl.constexpr, UB: tl.constexpr, K: tl.constexpr):
    """That tile, loaded -> operand [STACK*S, UW, UB]. Moves nothing: only names change."""
    PARTS: tl.constexpr = STACK * UB * (UB // K)
    w = in_order(w, 6).permute(0, 3, 2, 4, 1, 5).reshape(1, PARTS, K)
    return permuted(w, 1, PARTS, K, False).reshape(STACK * S, UB // S, UB)


@triton.jit
def rounded_to_tf32(words):
    """float32 bits -> values whose truncation to tf32, which is what the tensor core does, rounds to nearest.

    Only for bits that were published or lost (exchange.py): a NaN whose low bits are all set would become a zero.
    """
    return (words + 0x1000).to(tl.float32, bitcast=True)


@triton.jit
def to_tf32(x):
    """The same for any float32 values, NaN for every NaN: the one that CUDA's own arithmetic makes has all its low
    bits set.
    """
    return tl.where(x == x, rounded_to_tf32(x.to(tl.int32, bitcast=True)), x)


@triton.constexpr_function
def copy_assembly(NUMBER):
    """PTX: a move, of another text for each number."""
    return f"{{ .reg .b32 copy{NUMBER}; mov.b32 $0, $1; }}"


@triton.jit
def copies(words, NUMBER: tl.constexpr):
    """The words, as if they were others: Triton 3.8 would lay out anew, through shared memory, what a second product
    uses. The assembler drops the moves.
    """
    out = ()
    for i in tl.static_range(len(words)):
        out = out + (tl.inline_asm_elementwise(copy_assembly(NUMBER), "=r,r", [words[i]], tl.int32, True, 1),)
    return out


@triton.jit
def state_operand(words, C: tl.constexpr):
    """A chunk tile of the exchanged state, as polled -> operand [S, K, NB]."""
    x = rounded_to_tf32(words) if C.PRECISION == "tf32" else values(words, C.DTYPE)
    return operand(x, C.S, C.NB, C.K, C.WIDE).permute(0, 2, 1)
