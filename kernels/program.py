"""What one program owns and how it goes through time: the part that the forward and the backward loop share.

A launch has unit slices x batch slices x weight sets programs. A program owns UB hidden units of one weight set and
SLICES x NB rows of the batch, which it works through in SLICES sub-slices within a step. `Sizes` says how the problem
was cut, `Program` which part is this program's, a `Place` which rows and units one sub-slice has, a `Moment` which step
it is.

Every buffer is [rows, N, width]: a row for each row of the batch at each step (or for the batch once), in it the N
weight sets, in each of them the values of all units. `entry` makes the addresses in them. The layers of a stack are
weight sets with buffers [rows, 1, width] of their own, layer after layer: `of_layer`.

What is optional costs nothing where it is absent: a helper then returns True or False, a constant, and the compiler
drops the mask or the choice that it was for.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .spec import stacked
from .tiles import chunk_values, chunk_words, lone_rows, lone_shape, lone_units, vector_rows, vector_words, wide

# Steps from a prefetch into the second-level cache to the use: 3 to 5 microseconds, several times what memory takes.
PREFETCHED = tl.constexpr(4)


class Sizes(NamedTuple):
    """All that is known when a kernel is compiled; `C`, for constants, in the kernels."""

    G: Any  # gates of the cell
    E: Any  # values that a unit publishes in a step: 1 forward (h), backward the slots of the cell (cells.py)
    STATES: Any  # states of a unit beside h
    CARRIED: Any  # values that it keeps from step to step: those, or its own h, or none
    SAVED: Any  # values saved where x stood
    FURTHER: Any  # values saved beside
    PLANES: Any  # values of a unit in aux: states, or (backward) h, and those
    PARAMETERS: Any  # weights that a unit has beside the matrices
    QUIET: Any  # backward: where all is zero, the cell makes zeros
    H: Any  # hidden units
    HS: Any  # H padded to whole 16-byte loads
    N: Any  # weight sets side by side in a row: directions of a layer, members of an ensemble
    REVERSED: Any  # which of them run backwards in time: 0 none, 1 all, 2 every second one
    UB: Any  # units of a program
    NB: Any  # rows of a sub-slice
    SLICES: Any  # sub-slices of a program
    S: Any  # warps of a program; also the number of ways in which K, the units summed over, is split (not alone)
    K: Any  # values of K in a warp's part of a chunk (tiles.py)
    WIDE: Any  # whether operands of the matrix instruction are wide (tiles.py)
    CHUNKS: Any  # chunks of K
    STEP: Any  # 32-bit words from chunk to chunk of a state
    WORDS: Any  # 32-bit words of HS values
    REGISTERS: Any  # chunks whose weights stay in registers
    HELD: Any  # those and the chunks whose weights stay in shared memory; the rest is read again in every step
    PER: Any  # gates that share a tile of weights
    BACKWARD: Any  # whether it is the backward
    WAITS: Any  # waits of a tile in a step: backward the slots are awaited in so many parts
    AT_ONCE: Any  # what a wait misses is read again at once (exchange.py): weights elsewhere leave registers no room
    DTYPE: Any  # type of weights, input part, outputs and all that is exchanged
    BITS: Any  # the integer type of that width
    PRECISION: Any  # of products of float32: "tf32" or "ieee"; None for other types
    ALONE: Any  # one program holds all units: nothing is exchanged
    SHAPE: Any  # of a sub-slice's tiles: rows x units, or, alone, a lone tile (tiles.py)
    STACK: Any  # states that a lone program multiplies at once
    APART: Any  # of so many of the last gates, what the layer below adds stays apart from what the own state adds
    LAYERED: Any  # the sets of the launch are layers of a stack: a step has a second source
    OTHER: Any  # REGISTERS and HELD of that source's weights


stack = triton.constexpr_function(stacked)


@triton.constexpr_function
def sizes(
    G, STATES, CARRIED, SAVES, PARAMETERS, H, HS, N, REVERSED, UB, NB, SLICES, S, REGISTERS, SHARED, DTYPE, BITS,
    PRECISION, ALONE, E=1, READS_H=False, QUIET=True, PER=1, BACKWARD=False, WAITS=1, LAYERED=False,
    APART=0,
):  # fmt: skip
    """`Sizes` from the compile-time arguments of a kernel. (All is computed here, because Triton's cache of compiled
    kernels sees this function change, and not the class.)

    LAYERED: the sets of the launch are layers of a stack. REGISTERS and SHARED then count the chunks of both sources,
    its own state's first.
    """
    K = chunk_values(DTYPE)
    CHUNKS, HELD = -(-HS // (S * K)), REGISTERS + SHARED
    known = Sizes(
        G=G, E=E, STATES=STATES, CARRIED=CARRIED, SAVED=min(SAVES, G), FURTHER=max(SAVES - G, 0),
        PLANES=STATES + max(SAVES - G, 0) + int(READS_H), PARAMETERS=PARAMETERS, QUIET=QUIET, H=H, HS=HS, N=N,
        REVERSED=REVERSED, UB=UB, NB=NB, SLICES=SLICES, S=S, K=K, WIDE=wide(DTYPE, NB), CHUNKS=CHUNKS,
        STEP=S * chunk_words(), WORDS=HS * DTYPE.primitive_bitwidth // 32, REGISTERS=min(REGISTERS, CHUNKS),
        HELD=min(HELD, CHUNKS), PER=PER, BACKWARD=BACKWARD, WAITS=WAITS,
        AT_ONCE=REGISTERS < (2 if LAYERED else 1) * CHUNKS, DTYPE=DTYPE, BITS=BITS, PRECISION=PRECISION, ALONE=ALONE,
        SHAPE=lone_shape(S, UB, NB) if ALONE else (NB, UB), STACK=stack(G, BACKWARD, PRECISION),
        APART=APART if LAYERED else 0, LAYERED=LAYERED, OTHER=(max(REGISTERS - CHUNKS, 0), max(HELD - CHUNKS, 0)),
    )  # fmt: skip
    return known if triton.knobs.runtime.interpret else Sizes(*(tl.constexpr(value) for value in known))


@triton.constexpr_function
def other_source(C):
    """The same for the second source of a step in a stack."""
    known = Sizes(*C)
    registers, held = getattr(known.OTHER, "value", known.OTHER)
    known = known._replace(REGISTERS=registers, HELD=held)
    return known if triton.knobs.runtime.interpret else Sizes(*(tl.constexpr(value) for value in known))


class Program(NamedTuple):
    """What is one program's own."""

    n: Any  # its weight set
    reverse: Any  # whether that set runs backwards in time
    first: Any  # its first row of the batch, int64
    last: Any  # the last row of the batch that exists, counted from `first`
    unit: Any  # its first unit
    one: Any  # 1, but the compiler cannot know it: it unrolls no loop with such a stride
    top: Any  # the last weight set; of a stack the layer that feeds no other one


@triton.jit
def this_program(begin, B, C: tl.constexpr):
    """The `Program` that runs this. begin: the first row of the launch."""
    n = tl.program_id(2)
    first = begin.to(tl.int64) + tl.program_id(1) * (C.SLICES * C.NB)
    return Program(
        n=n,
        reverse=(n & 1) == 1 if C.REVERSED == 2 else C.REVERSED == 1,
        first=first,
        last=(B - 1 - first).to(tl.int32),
        unit=tl.program_id(0) * C.UB,
        one=tl.where(B > 0, 1, 2),
        top=tl.num_programs(2) - 1,
    )


@triton.jit
def of_layer(p, me, rows, WIDTH: tl.constexpr, C: tl.constexpr):
    """A buffer [L, rows, 1, WIDTH] of a stack, from the program's layer on; any other one as it is."""
    return p + me.n.to(tl.int64) * rows * WIDTH if C.LAYERED else p


class Place(NamedTuple):
    """The rows and units of one sub-slice, [NB, 1] and [1, UB] (alone: along a lone tile), and the tile that it polls.

    A spare row, past the last one of the batch, stands at the last one, so that no load needs a mask for it.
    """

    row: Any  # rows of the batch
    at: Any  # where they lie within a step: rows from the program's first one on, times N, plus its weight set
    units: Any  # units of the layer
    exists: Any  # which units are below H; True where all are
    own: Any  # what of the tile this program may write: no spare row, no unit past the padding
    length: Any  # steps of each row; T where all rows have all
    polled: Any  # the vectors to poll (tiles.py), chunk 0 of them, in words from the program's first row of a step
    polled_length: Any  # steps of their rows


@triton.jit
def place_of(me, j: tl.constexpr, T, lengths, C: tl.constexpr):
    """The `Place` of sub-slice j."""
    if C.ALONE:
        b, units = j * C.NB + lone_rows(C.NB), lone_units(C.S, C.UB // C.S)
    else:
        b, units = j * C.NB + tl.arange(0, C.NB)[:, None], me.unit + tl.arange(0, C.UB)[None, :]
    inside = tl.minimum(b, me.last)
    polled = tl.minimum(j * C.NB + vector_rows(C.NB), me.last)
    column = 0 if C.LAYERED else me.n  # of its set in a row
    return Place(
        row=me.first + inside,
        at=inside * C.N + column,
        units=units,
        exists=True if C.H % C.UB == 0 else units < C.H,
        own=(b <= me.last) & (units < C.HS),
        length=T if lengths is None else tl.load(lengths + me.first + inside),
        polled=(polled * C.N + column) * (C.E * C.WORDS) + vector_words(C.S),
        polled_length=T if lengths is None else tl.load(lengths + me.first + polled),
    )


# Time -----------------------------------------------------------------------------------------------------------------


class Moment(NamedTuple):
    """A step, and where its rows lie."""

    t: Any  # the step, 0..T-1
    row: Any  # the program's first row at that step, of the R rows of all steps, int64


@triton.jit
def rows_before(t, B, offsets):
    """Rows of all steps before t."""
    if offsets is None:
        return t.to(tl.int64) * B
    else:
        return tl.load(offsets + t)


@triton.jit
def walk(me, T, B, lengths, offsets, C: tl.constexpr):
    """-> the number of a program's steps, 1 or -1: from step to step, and the first `Moment`. The backward goes against
    the direction of the set. Packed rows are sorted, longest first: no row of the program has more steps than its
    first.
    """
    steps = T if offsets is None else tl.load(lengths + me.first)
    ahead = tl.where(me.reverse, 1, -1) if C.BACKWARD else tl.where(me.reverse, -1, 1)
    t = tl.where(ahead < 0, steps - 1, 0)
    return steps, ahead, Moment(t=t, row=rows_before(t, B, offsets) + me.first)


@triton.jit
def rows_between(now, t, steps, B, offsets):
    """Rows from a `Moment` to step t, which is `steps` further on (negative: back). Where there is no such step, some
    number.
    """
    if offsets is None:
        return steps * B.to(tl.int64)
    else:
        return tl.load(offsets + t) - tl.load(offsets + now.t)


@triton.jit
def moved(now, steps, exists, B, offsets):
    """The `Moment` `steps` further on (negative: back). Where it does not `exist`, the step is the same and the row one
    that nobody must use: a number that grows by the same amount in every step takes fewer instructions.
    """
    t = now.t + tl.where(exists, steps, 0)
    return Moment(t=t, row=now.row + rows_between(now, t, steps, B, offsets))


@triton.jit
def moment_after(now, steps, exists, B, offsets):
    """The same `Moment`, but all of the present one where it does not exist: what is loaded ahead of the last step is
    there, and nobody uses it.
    """
    then = moved(now, steps, exists, B, offsets)
    return Moment(t=then.t, row=tl.where(exists, then.row, now.row))


# Rows that end early or start anew ------------------------------------------------------------------------------------


@triton.jit
def within(t, length, lengths):
    """Which rows have a step t; True where all rows have all steps."""
    return True if lengths is None else t < length


@triton.jit
def is_end(t, place, me):
    """Which rows have their last step, in the direction of their set, at t."""
    return t == tl.where(me.reverse, 0, place.length - 1)


@triton.jit
def has_room(place, active, offsets):
    """What of a tile has a place in memory: a packed row has none where it is not `active`."""
    return place.own if offsets is None else place.own & active


@triton.jit
def cleared(x, active, place, C: tl.constexpr):
    """x with zeros where a row is not `active`, and in what is multiplied beside the H units: the padding of a row,
    which the neighbours read, or all further units of a lone program (backward `through_gates_alone` has seen to them,
    if the cell makes zeros of zeros).
    """
    END: tl.constexpr = (C.H if C.BACKWARD and C.QUIET else C.UB) if C.ALONE else C.HS
    return tl.where(active if C.H == END else place.exists & active, x, 0.0)


@triton.jit
def load_passed(passed, now, me, place, mask, C: tl.constexpr):
    """Which units the layer above sees, as a tuple with a tile of ones and zeros; an empty one where it sees all."""
    if passed is None:
        return ()
    else:
        return (load_or_zero(passed, now.row, place, mask & (me.n < me.top), C.H, C),)


@triton.jit
def starts_anew(resets, t, exists, place, B):
    """Which rows have their state zeroed before step t; False where no row ever has. exists: whether there is such a
    step.
    """
    if resets is None:
        return False
    else:
        return tl.load(resets + t.to(tl.int64) * B + place.row, mask=exists, other=0) != 0


@triton.jit
def source(p, row, fallback, place, exists, t, lengths, C: tl.constexpr):
    """Pointers to the tile that a place polls: at `row`, where step t begins, if it `exists`, or, for rows whose
    sequence has no such step, at `fallback`, rows that were filled before the launch.
    """
    there = p + row * (C.N * C.E * C.WORDS) + place.polled
    if lengths is None:
        return there
    else:
        filled = p + fallback * (C.N * C.E * C.WORDS) + place.polled
        return tl.where(exists & (t < place.polled_length), there, filled)


# Loads and stores of a tile -------------------------------------------------------------------------------------------


@triton.jit
def entry(p, row, place, WIDTH: tl.constexpr, C: tl.constexpr):
    """Pointers to a place's units, in a buffer [rows, N, WIDTH]; row: the program's first one."""
    return p + row * (C.N * WIDTH) + (place.at * WIDTH + place.units)


@triton.jit
def load_or_zero(p, row, place, mask, WIDTH: tl.constexpr, C: tl.constexpr):
    """A tile of a buffer [rows, N, WIDTH] in float32; zeros where the mask is false, or p None."""
    if p is None:
        return tl.zeros(C.SHAPE, tl.float32)
    else:
        return tl.load(entry(p, row, place, WIDTH, C), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_gates(p, mask, COUNT: tl.constexpr, C: tl.constexpr):
    """COUNT tiles, H values apart, of which p points to the first, as stored; zeros where the mask is false."""
    x = ()
    for g in tl.static_range(COUNT):
        x = x + (tl.load(p + g * C.H, mask=mask, other=0.0),)
    return x


@triton.jit
def save(p, row, place, x, mask, WIDTH: tl.constexpr, C: tl.constexpr):
    """Store a tile in a buffer [rows, N, WIDTH], if there is one, in the buffer's type."""
    if p is not None:
        tl.store(entry(p, row, place, WIDTH, C), x, mask=mask)


@triton.jit
def load_planes(p, row, place, mask, FIRST: tl.constexpr, END: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr):
    """The tiles FIRST to END of a buffer [rows, N, WIDTH] with HS values each, in float32; zeros where the mask is
    false.
    """
    x = ()
    for i in tl.static_range(FIRST, END):
        x = x + (load_or_zero(p + i * C.HS, row, place, mask, WIDTH, C),)
    return x


# States before the first and after the last step, as torch has them: [N, B, H]; several side by side ------------------


@triton.jit
def state_entry(p, me, place, B, COUNT: tl.constexpr, C: tl.constexpr):
    """Pointers to a place's units in the first of COUNT states."""
    return p + (me.n.to(tl.int64) * B + place.row) * (COUNT * C.H) + place.units


@triton.jit
def load_states(p, me, place, B, COUNT: tl.constexpr, C: tl.constexpr):
    """The tiles of COUNT states in float32; zeros where p is None, and where there is no unit."""
    x = ()
    for i in tl.static_range(COUNT):
        if p is None:
            x = x + (tl.zeros(C.SHAPE, tl.float32),)
        else:
            there = state_entry(p, me, place, B, COUNT, C) + i * C.H
            x = x + (tl.load(there, mask=place.exists, other=0.0).to(tl.float32),)
    return x


@triton.jit
def save_states(p, me, place, tiles, B, COUNT: tl.constexpr, C: tl.constexpr):
    """Store the tiles of COUNT states, if there are any, in their type."""
    if p is not None:
        for i in tl.static_range(COUNT):
            there = state_entry(p, me, place, B, COUNT, C) + i * C.H
            tl.store(there, tiles[i], mask=place.own & place.exists)


@triton.jit
def load_parameters(p, me, place, C: tl.constexpr):
    """The parameters of a place's units, [N, PARAMETERS, H], in float32."""
    x = ()
    for i in tl.static_range(C.PARAMETERS):
        there = p + (me.n * C.PARAMETERS + i) * C.H + place.units
        x = x + (tl.load(there, mask=place.exists, other=0.0).to(tl.float32),)
    return x


# What stays of a state from step to step ----------------------------------------------------------------------------


@triton.jit
def part_kept(mask, rate, row, place, there, C: tl.constexpr):
    """What stays of a unit's value of the step before: a tile of the mask int8 [R, N, H], or a rate, 0 to 1."""
    return rate if mask is None else tl.load(entry(mask, row, place, C.H, C), mask=there, other=0)


@triton.jit
def chosen(part, old, new):
    """`old` where a mask is set and `new` where it is not, whatever the other is; of a rate the mixture."""
    if part.dtype.is_int():
        x = tl.where(part != 0, old, new)
    else:
        x = part * old + (1.0 - part) * new
    return x


@triton.jit
def mixed(part, new, old):
    """The tiles `new`, but for the part that stays of `old`."""
    x = ()
    for i in tl.static_range(len(new)):
        x = x + (chosen(part, old[i], new[i]),)
    return x


@triton.jit
def parted(part, tiles):
    """The gradient of `mixed` by `old`, and that by `new`."""
    by_old, by_new = (), ()
    for i in tl.static_range(len(tiles)):
        by_old = by_old + (chosen(part, tiles[i], 0.0),)
        by_new = by_new + (chosen(part, 0.0, tiles[i]),)
    return by_old, by_new


@triton.jit
def as_float(tiles):
    """The tiles in float32."""
    x = ()
    for i in tl.static_range(len(tiles)):
        x = x + (tiles[i].to(tl.float32),)
    return x


@triton.jit
def zero_where(mask, tiles):
    """The tiles with zeros where the mask is set."""
    x = ()
    for i in tl.static_range(len(tiles)):
        x = x + (tl.where(mask, 0.0, tiles[i]),)
    return x


@triton.jit
def either(mask, new, old):
    """The tiles `new` where the mask is set, else those of `old`."""
    x = ()
    for i in tl.static_range(len(new)):
        x = x + (tl.where(mask, new[i], old[i]),)
    return x
