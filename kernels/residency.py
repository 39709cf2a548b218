"""What a program can keep on the chip: the ways to tile a problem, and how many chunks of its weights each leaves in
registers and in shared memory without spilling. Pure Python: needs no GPU and no Triton.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .devices import Device
from .spec import CELLS, chunk_width, padded

# A thread has 255 registers, and what does not fit spills to memory in every step. Words of 32 bits that a thread may
# spend on weights, polled state and accumulators, forward and backward; the rest goes to the input part on its way, the
# equations and the addresses. Found by compiling for sm_80 to sm_120 with Triton 3.6 and 3.7 (perf/resources.py, which
# repeats it): on sm_90 the LSTM with 1536 units and 8 rows forward would take 248 and spills a few; backward there are
# more tensors to address, and the factors wait in registers.
THREAD_WORDS = {False: 247, True: 222}
# Fewer but for sm_90 and sm_100: elsewhere fewer addresses stand in the registers that all threads of a warp share.
ADDRESS_WORDS = 19
# Fewer where sequences are packed, end early or start anew: more masks, and a source of the state for each row.
RAGGED_WORDS = 24
# Fewer backward, for each (row, unit) pair of a thread, where some of the last program's units do not exist: a mask
# beside each of the many tensors.
MASKED_UNITS_WORDS = 12
# Fewer in a stack: a second source of the state and of the input, and the way round them for the layer that has none.
# (Times 3 in tf32, whose rounded copies of both sources the compiler makes early.)
LAYERED_WORDS = {False: 16, True: 8}
# What each further (row, unit) pair of a thread takes of them: its input part of this step and the next, its carry, its
# offsets.
PAIR_WORDS = {False: 23, True: 16}
# And what a pair takes for each value that its cell has beyond those of the built-in cells, which these were counted
# with: further states, further values saved, parameters. With three of them (sLSTM, peepholes) the backward with 1024
# units took 255 and 251 registers on sm_90 before these were left free; with 8 words a tf32 one spilled 6.
BEYOND_WORDS = {False: 3, True: 9}
# And for each gate beyond four: with 8 words backward five of them spilled 45 (1024 units, sm_90).
GATE_WORDS = {False: 3, True: 16}
# Weights that come from elsewhere than registers pass through some: the compiler fetches as many ahead as it believes
# to have room for.
PASSING_WORDS = {False: 32, True: 48}
# And more where some are read again in every step, and so pass in a loop of their own. (Backward 32 would keep tiles of
# 16 rows out, in tf32 from 768 units on, which read them half as often. They spill some; by the clock and the bytes
# their step is the shorter one.)
STREAMED_WORDS = {False: 16, True: 24}
# Rounding to tf32 makes copies of the polled state, and the compiler makes them early.
ROUNDING_WORDS = {False: 24, True: 40}
# Words of polled state that a thread may hold backward on tiles of 16 rows, or four in turn, of all slots and tiles:
# the compiler keeps them however the slots are parted among waits. With more, a thread spilled 400 bytes and more on
# sm_90 (up to 1,800 instructions a step); with 128 and fewer 100 to 270.
WIDE_STATE_WORDS = 128
# (row, unit) pairs of a thread, all slices together. With more, the words above no longer add up.
PAIRS = 4
# Bytes of K that a row has in the part of a chunk that is one warp's: 16 words (tiles.py).
CHUNK_ROW_BYTES = 64
# Rows of a weight tile, the narrower side of a matrix instruction, and rows of the batch, the other one.
TILE_ROWS, TILE_BATCH = 16, 8
# Shared memory of a program beside its weights and the sums of its warps, at most: the tests of the waits, gaps.
SPARE_BYTES = 1024
# What a program may own: units; rows of a tile and slices, from the shortest step on.
UNITS = (8, 16, 32, 64)
ROWS_AND_SLICES = ((8, 1), (8, 2), (8, 4), (16, 1), (16, 2))
# Tiles polled in a step where a program works through several slices of rows: Triton's time to compile grows with their
# cube.
POLLED_TILES = 48
POLL_CYCLES = 260  # from a poll that hits the second-level cache to its words: 138 ns, measured on an H200
SHARED_BYTES_PER_CYCLE = 128  # what one multiprocessor reads from its shared memory


@dataclass(frozen=True)
class Problem:
    """One pass of a recurrence on a device: what a plan is made for. The names are those of `plan`."""

    cell: str
    hidden_size: int
    batch_size: int
    sets: int
    dtype: str
    device: Device
    backward: bool = False
    precision: str | None = None
    ragged: bool = False
    layers: int = 1

    @property
    def sources(self) -> int:
        """States that a program awaits in a step: its own, and in a stack another layer's."""
        return 2 if self.layers > 1 else 1

    @property
    def gates(self) -> int:
        """G; also the slots that are awaited backwards."""
        return CELLS[self.cell].gates

    @property
    def size(self) -> int:
        """HS."""
        return padded(self.hidden_size, self.dtype)


@dataclass(frozen=True)
class Tiling:
    """How a program cuts its part of a problem, as in Plan. chunks: all there are of K, wherever their weights are."""

    units: int
    rows: int
    slices: int
    warps: int
    chunks: int
    gates_per_tile: int

    @property
    def pairs(self) -> int:
        """(row, unit) pairs of a thread, all slices together."""
        return max(1, self.units * self.rows // (self.warps * 32)) * self.slices


@dataclass(frozen=True)
class Residency:
    """Where the weights of a tiling are, in chunks, the waits of a tile, and the shared memory it all takes."""

    waits: int
    registers: int
    shared: int
    shared_bytes: int


def tilings(problem: Problem) -> Iterator[Tiling]:
    """The ways to cut a problem that its kernel can be compiled for, whether or not they fit."""
    for warps, units in itertools.product(_warps(problem), UNITS):
        chunks = problem.sources * -(-problem.size // chunk_width(warps, problem.dtype))
        per_tile = _gates_per_tile(problem, units)
        if (1 if problem.backward else per_tile) * units < TILE_ROWS:
            continue
        for rows, slices in ROWS_AND_SLICES:
            if slices == 1 or chunks * slices * (problem.gates if problem.backward else 1) <= POLLED_TILES:
                yield Tiling(units, rows, slices, warps, chunks, per_tile)


def _warps(problem: Problem) -> tuple[int, ...]:
    """The numbers of warps that may serve a problem: 4 where half the chunks are enough, 8 where they are not, and both
    between. With 4 there are fewer partial sums to add, and no thread without a (row, unit) pair; but a thread then
    holds twice the weights.
    """
    size, width = problem.sources * problem.size, chunk_width(8, problem.dtype)
    if size <= width:
        return (4,)
    return (4, 8) if size <= 2 * width and problem.precision != "ieee" else (8,)


def _gates_per_tile(problem: Problem, units: int) -> int:
    """Gates that share a tile of weights forward."""
    if problem.layers > 1 and CELLS[problem.cell].apart:  # one by one: those apart have two sums each
        return 1
    if problem.gates % 2 == 0 and units < 64:  # fewer exchanges through shared memory
        return 2 if problem.gates % 4 else 4
    # Of 64 units one gate alone, or a chunk would take half the registers. But two (of the GRU) where the rows of the
    # input are not aligned, which takes registers of its own, and with 8 units, where two fill the rows of a tile.
    unaligned = problem.hidden_size % 64 != 0 and problem.precision != "ieee"
    if problem.gates % 2 and problem.gates > 1 and (units < TILE_ROWS or (units == 64 and unaligned)):
        return 2
    return 1


def tile_gates(gates: int, backward: bool, cut: Any) -> int:
    """Gates in the weights of a chunk, those that only fill the last tile included. cut: a Tiling, or a Plan."""
    return gates if backward else -(-gates // cut.gates_per_tile) * cut.gates_per_tile


def _waits(problem: Problem) -> tuple[int, ...]:
    """Into how many waits the slots of a tile may be parted (kernels/backward.py), best first: each further one costs
    the latency of a poll.
    """
    if not problem.backward or problem.gates == 1:
        return (1,)
    # Operands of full float32 products take more registers than words.
    parts = (1, 2, 4, problem.gates) if problem.gates > 4 else (1, 2, problem.gates)
    return (problem.gates,) if problem.precision == "ieee" else parts


def residency(problem: Problem, tiling: Tiling) -> Residency | None:
    """The number of waits that keeps most weights on the chip, and of equals the one that takes least for waits and for
    weights in shared memory; None where each would spill.
    """
    if tiling.pairs > PAIRS:
        return None
    if problem.precision == "ieee" and problem.backward and problem.gates >= 4 and tiling.warps == 4:
        # A thread has the operands of twice as many scalar products as with 8 warps: on sm_86 and sm_100 some spill.
        if tiling.rows * tiling.slices > TILE_BATCH:
            return None

    bytes_ = chunk_bytes(problem.gates, problem.backward, tiling)

    def cycles(r: Residency) -> float:
        return r.waits * POLL_CYCLES + r.shared * bytes_ / SHARED_BYTES_PER_CYCLE

    found = [_most_on_chip(problem, tiling, waits) for waits in _waits(problem)]
    found = [r for r in found if r is not None]
    # With 4 warps all in registers, or 8 are better; nor does the compiler pass the weights of both sources of a stack
    # by the slots of more rows without spilling.
    wide = problem.layers > 1 and problem.backward and tiling.rows * tiling.slices > TILE_BATCH
    if tiling.warps < max(_warps(problem)) or (wide and problem.precision != "ieee"):
        found = [r for r in found if r.registers == tiling.chunks]
    if problem.layers > 1 and problem.precision != "ieee":  # weights read again in every step are better read once
        found = [r for r in found if r.registers + r.shared == tiling.chunks]
    return max(found, key=lambda r: (r.registers + r.shared, -cycles(r)), default=None)


def _most_on_chip(problem: Problem, tiling: Tiling, waits: int) -> Residency | None:
    """As many weights in registers as do not spill, of the others as many in shared memory as fit; None: it spills."""
    scratch, kind = _scratch_bytes(problem, tiling), (problem.gates, problem.backward)
    slots = -(-problem.gates // waits) if problem.backward else 1  # awaited at the same time
    each = chunk_bytes(*kind, tiling)
    if scratch > problem.device.shared_memory:
        return None
    fitting = (problem.device.shared_memory - scratch) // each
    words = tile_gates(*kind, tiling) * tiling.units // 2  # of a chunk of weights, a thread
    room = _room_words(problem, tiling)
    # Possible whatever the sum says: what passes takes its turn.
    smallest = slots * tiling.slices * tiling.rows == TILE_BATCH
    most = tiling.chunks
    if problem.precision == "ieee":  # operands of scalar products are spread in yet another way: none is kept
        fitting = most = 0
    for registers in range(most, -1, -1):
        shared = min(tiling.chunks - registers, fitting)
        if most and _wide_state(problem, tiling, registers + shared) > WIDE_STATE_WORDS:
            continue
        needed = registers * words + _passing_words(problem, tiling, slots, registers, shared)
        if needed <= room or (registers == 0 and smallest):
            return Residency(waits, registers, shared, scratch + shared * each)
    return None


def _wide_state(problem: Problem, tiling: Tiling, held: int) -> int:
    """Words of the state of `held` chunks, of all slots and tiles, backward on tiles of 16 rows or four in turn; 0
    elsewhere.
    """
    if not problem.backward or problem.gates == 1 or (tiling.rows == TILE_BATCH and tiling.slices < 4):
        return 0
    return held * problem.gates * tiling.slices * tiling.rows // 2


def chunk_bytes(gates: int, backward: bool, cut: Any) -> int:
    """Bytes of a program's weights in a chunk. cut: a Tiling, or a Plan."""
    return cut.warps * tile_gates(gates, backward, cut) * cut.units * CHUNK_ROW_BYTES


def _room_words(problem: Problem, tiling: Tiling) -> int:
    """Words a thread has for weights, polled state and accumulators."""
    room = THREAD_WORDS[problem.backward] - PAIR_WORDS[problem.backward] * (tiling.pairs - 1)
    addresses = 0 if 90 <= problem.device.arch < 120 else ADDRESS_WORDS
    masked = MASKED_UNITS_WORDS * tiling.pairs if problem.backward and problem.hidden_size % tiling.units != 0 else 0
    beyond = beyond_words(problem) * tiling.pairs
    layered = LAYERED_WORDS[problem.backward] * (3 if problem.precision == "tf32" else 1) if problem.layers > 1 else 0
    if problem.layers > 1 and problem.ragged:  # sums of the second source apart, for resets and dropout
        layered += (1 if problem.backward else _sums(problem)) * tiling.units * tiling.rows // 32
    return room - addresses - masked - beyond - layered - (RAGGED_WORDS if problem.ragged else 0)


def beyond_words(problem: Problem) -> int:
    """Words that a (row, unit) pair takes for what its cell has beyond the built-in ones."""
    values, gates = CELLS[problem.cell].beyond, max(problem.gates - 4, 0)
    return BEYOND_WORDS[problem.backward] * values + GATE_WORDS[problem.backward] * gates


def _passing_words(problem: Problem, tiling: Tiling, slots: int, registers: int, shared: int) -> int:
    """Words a thread needs in a step beside the weights that stay in registers."""
    backward, units, rows = problem.backward, tiling.units, tiling.rows
    # Its warp's sums, the backward two of each, and then as many words of those of all warps.
    accumulators = 2 * (2 if backward else _sums(problem)) * units * rows // 32
    state = tiling.chunks * slots * rows // 2  # polled at the same time, in a stack of both sources
    held = registers + shared
    if held == tiling.chunks:
        needed = state + accumulators
    else:  # the held weights need their state at once, the others each chunk's in turn
        # Of one tile and slot, though a turn has all of them: what is more spills, and the step is the shorter one.
        one_chunk = (units if backward else tiling.gates_per_tile * units) // 2 + rows // 2
        needed = max(state, -(-state * held // tiling.chunks) + accumulators, accumulators + one_chunk)
        needed += STREAMED_WORDS[backward]
    needed += PASSING_WORDS[backward] if registers < tiling.chunks else 0
    return needed + (ROUNDING_WORDS[backward] if problem.precision == "tf32" else 0)


def _sums(problem: Problem) -> int:
    """Tiles of sums that go over the warps at the same time, as tiles.side_by_side makes them."""
    if problem.backward:  # of both sources of a stack, where a part is masked
        return 2 if problem.layers > 1 and problem.ragged else 1
    apart = CELLS[problem.cell].apart if problem.layers > 1 else 0
    return 1 << (problem.gates + apart - 1).bit_length()


def _scratch_bytes(problem: Problem, tiling: Tiling) -> int:
    """Shared memory of a program beside its weights."""
    scratch = tiling.warps * _sums(problem) * tiling.units * tiling.rows * 4
    if problem.precision == "ieee":  # operands pass through it chunk by chunk: a state, and weights (tiles_at_once)
        one_by_one = 1 if problem.backward else tiling.gates_per_tile
        gates = one_by_one if tiling.units == 64 else tile_gates(problem.gates, problem.backward, tiling)
        scratch = max(scratch, tiling.warps * CHUNK_ROW_BYTES * (gates * tiling.units + tiling.rows))
    return scratch + SPARE_BYTES
