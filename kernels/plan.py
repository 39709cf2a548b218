"""The plan: how a recurrence is cut into programs. Pure Python: needs no GPU and no Triton.

`plan()` enumerates the ways that fit the device and takes the one whose predicted step is the shortest. The times come
from a model whose constants stand below: fitted to what an H200 took. `cudnn_microseconds` says the same of what `auto`
would use instead.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from typing import NamedTuple

from .spec import CELLS, DTYPES, chunk_width, itemsize, padded, stacked


@dataclass(frozen=True)
class Device:
    """What the plan must know of a GPU. arch: compute capability * 10; shared_memory: bytes a program may use."""

    name: str
    arch: int
    multiprocessors: int
    shared_memory: int
    gigahertz: float
    l2_bytes: int
    memory_gigabytes_per_second: float


# Multiprocessors, shared memory and caches as the vendor publishes them; clocks and bandwidths as they are sustained,
# some 10 % below what is published.
DEVICES = {
    "h200": Device("NVIDIA H200", 90, 132, 232448, 1.8, 60 << 20, 3900),
    "h100": Device("NVIDIA H100", 90, 132, 232448, 1.8, 50 << 20, 2600),
    "h100pcie": Device("NVIDIA H100 PCIe", 90, 114, 232448, 1.6, 50 << 20, 1800),
    "a100": Device("NVIDIA A100", 80, 108, 166912, 1.4, 40 << 20, 1800),
    "b200": Device("NVIDIA B200", 100, 148, 232448, 1.9, 126 << 20, 7000),
    "a10": Device("NVIDIA A10", 86, 72, 101376, 1.6, 6 << 20, 540),
    "a10g": Device("NVIDIA A10G", 86, 80, 101376, 1.6, 6 << 20, 540),
    "a6000": Device("NVIDIA RTX A6000", 86, 84, 101376, 1.7, 6 << 20, 690),
    "l4": Device("NVIDIA L4", 89, 58, 101376, 1.9, 48 << 20, 270),
    "l40s": Device("NVIDIA L40S", 89, 142, 101376, 2.4, 96 << 20, 780),
    "rtx3080": Device("NVIDIA RTX 3080", 86, 68, 101376, 1.7, 5 << 20, 690),
    "rtx3090": Device("NVIDIA RTX 3090", 86, 82, 101376, 1.7, 6 << 20, 850),
    "rtx4080": Device("NVIDIA RTX 4080", 89, 76, 101376, 2.5, 64 << 20, 650),
    "rtx4090": Device("NVIDIA RTX 4090", 89, 128, 101376, 2.5, 72 << 20, 950),
    "rtx5080": Device("NVIDIA RTX 5080", 120, 84, 101376, 2.6, 64 << 20, 860),
    "rtx5090": Device("NVIDIA RTX 5090", 120, 170, 101376, 2.4, 96 << 20, 1650),
}
# Known by name, so that the answer can be that they are too old.
TOO_OLD = {
    "t4": Device("NVIDIA T4", 75, 40, 65536, 1.5, 4 << 20, 270),
    "v100": Device("NVIDIA V100", 70, 80, 98304, 1.5, 6 << 20, 800),
}
# What a name may go on with and still mean the same GPU: "A100-SXM4-80GB", "H100 80GB HBM3". (Not "Ti", "Laptop", ...)
SAME_GPU = re.compile(r"sxm[0-9]*|pcie|hbm[0-9]*e?|[0-9]+gb")


def named(name: str) -> Device | None:
    """The GPU that a name means, as people or PyTorch write it: "H200", "NVIDIA H100 80GB HBM3", "rtx 4090", "3090".
    None where it means none that is known here.
    """
    vendor = ("nvidia", "geforce", "tesla", "gpu")
    words = [word for word in re.findall("[a-z0-9]+", name.lower()) if word not in vendor]
    for count in range(len(words), 0, -1):
        joined = "".join(words[:count])
        for key in (joined, f"rtx{joined}", joined.removeprefix("rtx")):
            found = DEVICES.get(key) or TOO_OLD.get(key)
            if found is not None:
                return found if all(map(SAME_GPU.fullmatch, words[count:])) else None
    return None


@dataclass(frozen=True)
class Plan:
    """How one pass (forward or backward) of a recurrence runs.

    units, rows, slices: hidden units a program owns, rows of its tile, and tiles it works through in turn within a
    step.
    warps: also the number of ways K is split, but for a lone program. registers, shared, streamed: chunks of K whose
    weights stay in registers, in shared memory, or are read again in every step. waits: parts in which the backward
    awaits the slots of a tile.
    alone: one program holds all units, no exchange.
    unit_slices x batch_slices x sets x layers programs in a launch; launches one after another for the whole batch.
    shared_bytes: estimate of the shared memory of a program. microseconds: predicted time of a step of all launches.
    measured: when this plan was found to be the fastest of some, "" where the model chose it.
    layers: of a stack, that run side by side, each a step behind the one below; chunks are then those of both weights
    of a layer, the recurrent one's first.
    """

    cell: str
    hidden_size: int
    batch_size: int
    sets: int
    dtype: str
    backward: bool
    precision: str | None
    alone: bool
    units: int
    rows: int
    slices: int
    warps: int
    registers: int
    shared: int
    streamed: int
    waits: int
    gates_per_tile: int
    unit_slices: int
    batch_slices: int
    launches: int
    shared_bytes: int
    microseconds: float
    reason: str
    measured: str = ""
    layers: int = 1

    @property
    def layered(self) -> bool:
        """Whether it is one for several layers: the kernel is the same for any number."""
        return self.layers > 1

    @property
    def programs(self) -> int:
        """Programs of a launch."""
        return self.unit_slices * self.batch_slices * self.sets * self.layers

    def __str__(self) -> str:
        """The plan in one line."""
        of_sets = f"{self.layers} layers" if self.layered else f"{self.sets} sets"
        where = f"{self.registers} chunks of weights in registers, {self.shared} in shared memory"
        weights = f"{where}, {self.streamed} read every step"
        if self.alone:
            weights = f"all weights in {'shared memory' if self.shared else 'registers'}, no exchange"
        return (
            f"{self.unit_slices} unit slices of {self.units} x {self.batch_slices} batch slices of {self.slices} x "
            f"{self.rows} rows x {of_sets} = {self.programs} programs of {self.warps} warps, {self.launches} "
            f"launch(es); {weights}{f'; measured {self.measured}' if self.measured else ''}"
        )


# Residency. A thread has 255 registers, and what does not fit spills to memory in every step. Words of 32 bits that a
# thread may spend on weights, polled state and accumulators, forward and backward; the rest goes to the input part on
# its way, the equations and the addresses. Found by compiling for sm_80 to sm_120 with Triton 3.6 and 3.7
# (perf/resources.py, which repeats it): on sm_90 the LSTM with 1536 units and 8 rows forward would take 248 and
# spills a few; backward there are more tensors to address, and the factors wait in registers.
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
# And more where some are read again in every step, and so pass in a loop of their own.
STREAMED_WORDS = {False: 16, True: 32}
# Rounding to tf32 makes copies of the polled state, and the compiler makes them early.
ROUNDING_WORDS = {False: 24, True: 40}
# Words of polled state that a thread may hold backward on tiles of 16 rows, or four in turn, of all slots and tiles:
# the compiler keeps them however the slots are parted among waits. With more, a thread spilled 400 bytes and more on
# sm_90 (up to 1,800 instructions a step); with 128 and fewer some 100.
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
# One program that holds all units has TILE_BATCH rows: twice the rows take nearly twice the instructions, and registers
# that the LSTM does not have. Words of weights a thread: beside 128 there is room for all else (compiled as above).
ALONE_WORDS = 128
# Fewer for the LSTM's backward where rows are ragged and H is odd: no two units share an address, and some words spill.
UNALIGNED_WORDS = 16
# Programs along the second and the third axis of a CUDA grid: batch slices and sets.
GRID_PROGRAMS = 65535
# Its warps at the most: with 16, a thread would have 128 registers.
ALONE_WARPS = 8
# Units of a warp: the rows of a matrix instruction. Full float32 products are made of scalar ones: the more warps, the
# shorter. Their operands go through shared memory and into registers for all of K, and spill with more units.
ALONE_WARP_UNITS, ALONE_WARP_UNITS_IEEE = TILE_ROWS, 8
ALONE_IEEE_UNITS = 32

# Time: microseconds of a step. The first block is fitted to what an H200 took on 2026-11-27 for 65 passes of layers
# whose weights stay in registers, T 1024, H 128 to 1024, all types (the core grid in perf/results, commit dd67452;
# `perf.tune --check --recorded` repeats it): half of them within 4 % forward and 6 % backward, all within a fifth. From
# the time of a call were taken off large products (below), 5 us, and in training 40 us, the gates' gradients written
# once and read once, and what inference took. One tile takes TILE, more with 8 warps (twice the partial sums, and
# latencies in series), and a part for each matrix instruction of a warp, backward also for each vector that a thread
# polls. From its publish to the neighbours' next step it takes EXCHANGE, more for the bytes that all programs poll in a
# step (MEGABYTE), and, forward, for each of the programs, of which the latest counts (LATE). That may hide behind other
# tiles, TRAVEL never does. Not explained: weights in shared memory beside several tiles or 16 rows take up to a quarter
# more, in 16 bits at 1536 units backward half as much again, and in tf32 at 768 backward twice as much: they spill.
FORWARD_TILE, BACKWARD_TILE = 0.364, 0.154
FORWARD_EIGHT_WARPS, BACKWARD_EIGHT_WARPS = 0.415, 0.245
FORWARD_MATRIX, BACKWARD_MATRIX = 0.00825, 0.0061
BACKWARD_VECTOR = 0.0639
FORWARD_EXCHANGE, BACKWARD_EXCHANGE = 0.015, 0.214
FORWARD_MEGABYTE, BACKWARD_MEGABYTE = 0.166, 0.144
FORWARD_LATE = 0.00225
FORWARD_TRAVEL, BACKWARD_TRAVEL = 0.34, 0.093
AS_GOOD = 1.03  # times the best: what the model cannot tell apart
# A lone program: its instructions by the formula below, and this for each (cycles an instruction and warp of a
# multiprocessor, dependences included). LSTM, H 128, 16 bits, as above: 1.33 us forward, 3.02 backward; what exchanges
# its state took 0.9 and 1.09 there, in tf32.
FORWARD_ALONE_CYCLES, BACKWARD_ALONE_CYCLES = 0.82, 1.87
ALONE_UNITS = 64  # up to so many units one program is taken: it needs no other, and nobody has timed either way there
L2_BYTES_PER_MICROSECOND = 10e6  # all multiprocessors together; published 7.5 to 10 TB/s
POLL_CYCLES = 260  # from a poll that hits the second-level cache to its words: 138 ns, measured on an H200
SHARED_BYTES_PER_CYCLE = 128  # what one multiprocessor reads from its shared memory
ISSUE_CYCLES = 0.45  # cycles a scalar product of full float32 takes, for each warp of a multiprocessor: estimated
CLOCK = 1.8  # gigahertz of the H200 that was measured: other devices take longer or shorter by their clock

# cuDNN, measured on the same H200 (cuDNN 9.19): a step of a layer with I = H, its products included. Without a
# persistent kernel it launches several kernels a step, and that is what it takes, until the arithmetic takes longer.
# Forward and backward, and for each unit. (In bfloat16 the host sets the time: by the faster of two days' hosts, 22
# cases up to 1536 units. On the other day a step took a fifth longer.)
CUDNN_STEP = {
    "bfloat16": ((12.7, 0.0011), (18.1, 0.0038)),
    "float16": ((5.9, 0.0022), (10.3, 0.0022)),
    "float32": ((9.0, 0.009), (18.0, 0.009)),
}
CUDNN_WORK = (8.4, 12.6)  # for each 1e9 operations of the recurrent product
CUDNN_SMALL = (2.1, 2.3)  # its persistent kernel for few units
# float16, one direction, B 16: units, forward, backward. (B 64 has no such kernel beyond 128 units.)
CUDNN_PERSISTENT = (
    (128, 1.76, 2.15), (256, 1.83, 3.83), (512, 1.81, 4.01), (768, 2.08, 4.47), (1024, 2.15, 5.41)
)  # fmt: skip
PERSISTENT_BATCH = 63
# What a call of a layer takes the host more than one of torch.nn's, in inference and forward and backward (T 2,
# 2026-11-27, float32: 18 to 84 and 243 to 300); nothing in bfloat16, whose weights PyTorch gathers anew for cuDNN at
# every call.
CALL_MORE = {"float32": (60.0, 270.0), "float16": (60.0, 270.0), "bfloat16": (0.0, 0.0)}
# Of large products, a microsecond, in tf32 and 16 bits: what layers took beyond their recurrences, on the same H200.
PRODUCT_OPERATIONS = {"float32": 400e6, "float16": 800e6, "bfloat16": 800e6}


# What the plans of one problem differ in.
CUT = ("alone", "units", "rows", "slices", "warps", "registers", "shared", "waits")


class Measured(NamedTuple):
    """What was measured of a problem: the fastest plan's values of CUT, and when."""

    cut: tuple[int, ...]
    when: str


def cut(p: Plan) -> tuple[int, ...]:
    """A plan's values of CUT."""
    return tuple(int(getattr(p, name)) for name in CUT)


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


def plan(
    cell: str,
    hidden_size: int,
    batch_size: int,
    sets: int,
    dtype: str,
    device: Device,
    backward: bool = False,
    precision: str | None = None,
    max_programs: int | None = None,
    allow_alone: bool = True,
    ragged: bool = False,
    measured: Measured | None = None,
    layers: int = 1,
) -> Plan | str:
    """The best plan that fits, or a sentence that says why there is none.

    sets: weight sets that run side by side (directions). precision: "tf32" or "ieee" for float32. max_programs: the
    user's cap on programs that must run at the same time; fewer than the multiprocessors leave room for collectives.
    allow_alone=False: exchange even where one program could hold all units (for tests). ragged: sequences are packed,
    end early or start anew. measured: what to take in place of the model's choice, if it is one of `every_plan`.
    layers: of a stack, one direction, that run side by side; they always exchange.
    """
    found = every_plan(
        cell, hidden_size, batch_size, sets, dtype, device, backward, precision, max_programs, allow_alone, ragged,
        layers,
    )  # fmt: skip
    if isinstance(found, str):
        return found
    if measured is not None:
        for p in found:
            if cut(p) == measured.cut:
                return replace(p, measured=measured.when)
    if found[0].alone and found[0].units <= ALONE_UNITS:
        return found[0]
    return preferred([(p, p.microseconds) for p in found])


def every_plan(
    cell: str,
    hidden_size: int,
    batch_size: int,
    sets: int,
    dtype: str,
    device: Device,
    backward: bool = False,
    precision: str | None = None,
    max_programs: int | None = None,
    allow_alone: bool = True,
    ragged: bool = False,
    layers: int = 1,
) -> list[Plan] | str:
    """All plans that fit, one program alone first, or why there is none. Arguments as of `plan`."""
    if dtype not in DTYPES:
        return f"the kernels compute in {', '.join(DTYPES)}, not in {dtype}"
    if device.arch < 80:
        return f"the kernels need compute capability 8.0 or later, {device.name} has {device.arch / 10}"
    if layers > 1 and not CELLS[cell].side_by_side:
        return f"{layers} layers of {hidden_size} hidden units: programs of {cell} serve one layer at a time"
    resident = min(max_programs or device.multiprocessors, device.multiprocessors)
    precision = (precision or "tf32") if dtype == "float32" else None
    problem = Problem(cell, hidden_size, max(batch_size, 1), sets, dtype, device, backward, precision, ragged, layers)
    alone = alone_plan(problem) if allow_alone and layers == 1 else None
    found = [] if alone is None else [alone]
    found += [with_batch(p, device, resident) for p in exchanging_plans(problem, resident)]
    if not found:
        what = f"{hidden_size} hidden units in {f'{layers} layers' if layers > 1 else f'{sets} set(s)'}"
        return f"{what} need more than the {resident} programs that can run at the same time"
    return found


def preferred(timed: list[tuple[Plan, float]]) -> Plan:
    """Of plans and what is predicted of them the one to take: of those that are as good as the best, one program alone,
    which waits for nobody, or the one that does least in turn, because that a wait hides behind other tiles is only the
    model's word.
    """
    least = min(us for _, us in timed)
    equal = [(p, us) for p, us in timed if us <= AS_GOOD * least]
    return min(equal, key=lambda pair: (not pair[0].alone, pair[0].slices, pair[1], pair[0].programs))[0]


def _plan_of(problem: Problem, **chosen) -> Plan:
    """A plan for a problem."""
    names = ("cell", "hidden_size", "batch_size", "sets", "dtype", "backward", "precision", "layers")
    return Plan(**{name: getattr(problem, name) for name in names}, **chosen)


def alone_plan(problem: Problem) -> Plan | None:
    """The plan in which one program holds all units, if there is one: batch slices share nothing, and need not run at
    the same time. Its chunks of weights are those of one warp, which multiplies all of K.
    """
    device, gates, bytes_ = problem.device, problem.gates, itemsize(problem.dtype)
    ieee, rows = problem.precision == "ieee", TILE_BATCH
    units = max(CHUNK_ROW_BYTES // bytes_, 1 << (problem.hidden_size - 1).bit_length())
    if (ieee and units > ALONE_IEEE_UNITS) or problem.sets > GRID_PROGRAMS:
        return None
    warps = min(units // (ALONE_WARP_UNITS_IEEE if ieee else ALONE_WARP_UNITS), ALONE_WARPS)
    stack = stacked(gates, problem.backward, problem.precision)
    weights = max(gates, stack) * units * units * bytes_
    shared = stack * warps * units * rows * bytes_ + (weights if ieee else 0) + SPARE_BYTES  # the state, for each warp
    unaligned = problem.ragged and problem.backward and gates >= 4 and problem.hidden_size % 2 == 1
    beyond = 2 * _beyond_words(problem) if problem.backward else 0  # 64 units compile, with 3 values
    words = ALONE_WORDS - beyond - (UNALIGNED_WORDS if unaligned else 0)
    if weights // 4 // (warps * 32) > words or shared > device.shared_memory:
        return None
    chunks = units * bytes_ // CHUNK_ROW_BYTES
    programs = -(-problem.batch_size // rows)
    launches = -(-programs // GRID_PROGRAMS)
    instructions = 60 + (18 * gates + (gates * units if ieee else chunks)) * units * rows // (warps * 32)
    cycles = BACKWARD_ALONE_CYCLES if problem.backward else FORWARD_ALONE_CYCLES
    # A multiprocessor has four schedulers, and takes several programs as well as one.
    in_turn = max(4, warps * -(-programs * problem.sets // device.multiprocessors))
    return _plan_of(
        problem, alone=True, units=units, rows=rows, slices=1, warps=warps, registers=0 if ieee else chunks,
        shared=chunks if ieee else 0, streamed=0, waits=1, gates_per_tile=1, unit_slices=1,
        batch_slices=-(-programs // launches), launches=launches, shared_bytes=shared,
        microseconds=instructions * in_turn * cycles / device.gigahertz / 1e3,
        reason="one program holds all hidden units: nothing to exchange",
    )  # fmt: skip


def exchanging_plans(problem: Problem, resident: int) -> Iterator[Plan]:
    """Plans that cut the hidden units into slices, for one slice of the batch, of at most `resident` programs.

    They do not look at the batch: `with_batch` completes them.
    """
    for tiling in _tilings(problem):
        unit_slices = -(-problem.size // tiling.units)
        fits = unit_slices * problem.sets * problem.layers <= resident
        found = _residency(problem, tiling) if fits else None
        if found is not None:
            yield _plan_of(
                problem, alone=False, units=tiling.units, rows=tiling.rows, slices=tiling.slices, warps=tiling.warps,
                registers=found.registers, shared=found.shared,
                streamed=tiling.chunks - found.registers - found.shared, waits=found.waits,
                gates_per_tile=tiling.gates_per_tile, unit_slices=unit_slices, batch_slices=0, launches=0,
                shared_bytes=found.shared_bytes, microseconds=0.0, reason="",
            )  # fmt: skip


def _tilings(problem: Problem) -> Iterator[Tiling]:
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


def _tile_gates(problem: Problem, tiling: Tiling) -> int:
    """Gates in the weights of a chunk, those that only fill the last tile included."""
    per_tile = 1 if problem.backward else tiling.gates_per_tile
    return -(-problem.gates // per_tile) * per_tile


def _waits(problem: Problem) -> tuple[int, ...]:
    """Into how many waits the slots of a tile may be parted (kernels/backward.py), best first: each further one costs
    the latency of a poll.
    """
    if not problem.backward or problem.gates == 1:
        return (1,)
    # Operands of full float32 products take more registers than words.
    parts = (1, 2, 4, problem.gates) if problem.gates > 4 else (1, 2, problem.gates)
    return (problem.gates,) if problem.precision == "ieee" else parts


def _residency(problem: Problem, tiling: Tiling) -> Residency | None:
    """The number of waits that keeps most weights on the chip, and of equals the one that takes least for waits and for
    weights in shared memory; None where each would spill.
    """
    if tiling.pairs > PAIRS:
        return None
    if problem.precision == "ieee" and problem.backward and problem.gates >= 4 and tiling.warps == 4:
        # A thread has the operands of twice as many scalar products as with 8 warps: on sm_86 and sm_100 some spill.
        if tiling.rows * tiling.slices > TILE_BATCH:
            return None

    def cycles(r: Residency) -> float:
        return r.waits * POLL_CYCLES + r.shared * _chunk_bytes(problem, tiling) / SHARED_BYTES_PER_CYCLE

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
    tile_gates, scratch = _tile_gates(problem, tiling), _scratch_bytes(problem, tiling)
    slots = -(-problem.gates // waits) if problem.backward else 1  # awaited at the same time
    chunk_bytes = _chunk_bytes(problem, tiling)
    fitting = max(0, problem.device.shared_memory - scratch) // chunk_bytes
    words = tile_gates * tiling.units // 2  # of a chunk of weights, a thread
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
            return Residency(waits, registers, shared, scratch + shared * chunk_bytes)
    return None


def _wide_state(problem: Problem, tiling: Tiling, held: int) -> int:
    """Words of the state of `held` chunks, of all slots and tiles, backward on tiles of 16 rows or four in turn; 0
    elsewhere.
    """
    if not problem.backward or problem.gates == 1 or (tiling.rows == TILE_BATCH and tiling.slices < 4):
        return 0
    return held * problem.gates * tiling.slices * tiling.rows // 2


def _chunk_bytes(problem: Problem, tiling: Tiling) -> int:
    """Bytes of the weights of a chunk."""
    return tiling.warps * _tile_gates(problem, tiling) * tiling.units * CHUNK_ROW_BYTES


def _room_words(problem: Problem, tiling: Tiling) -> int:
    """Words a thread has for weights, polled state and accumulators."""
    room = THREAD_WORDS[problem.backward] - PAIR_WORDS[problem.backward] * (tiling.pairs - 1)
    addresses = 0 if 90 <= problem.device.arch < 120 else ADDRESS_WORDS
    masked = MASKED_UNITS_WORDS * tiling.pairs if problem.backward and problem.hidden_size % tiling.units != 0 else 0
    beyond = _beyond_words(problem) * tiling.pairs
    layered = LAYERED_WORDS[problem.backward] * (3 if problem.precision == "tf32" else 1) if problem.layers > 1 else 0
    if problem.layers > 1 and problem.ragged:  # sums of the second source apart, for resets and dropout
        layered += (1 if problem.backward else _sums(problem)) * tiling.units * tiling.rows // 32
    return room - addresses - masked - beyond - layered - (RAGGED_WORDS if problem.ragged else 0)


def _beyond_words(problem: Problem) -> int:
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
    else:  # only the held weights need their state kept, the others read it again, chunk by chunk
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
    if problem.precision == "ieee":  # an operand passes through it chunk by chunk, of all gates that share a tile
        per_tile = 1 if problem.backward else tiling.gates_per_tile
        scratch = max(scratch, tiling.warps * CHUNK_ROW_BYTES * (per_tile * tiling.units + tiling.rows))
    return scratch + SPARE_BYTES


def with_batch(p: Plan, device: Device, resident: int) -> Plan:
    """A plan of `exchanging_plans` with its batch slices, launches, predicted time and reason."""
    chunks = p.registers + p.shared + p.streamed
    wanted = -(-p.batch_size // (p.rows * p.slices))
    launches = -(-wanted // (resident // (p.unit_slices * p.sets * p.layers)))
    p = replace(p, batch_slices=-(-wanted // launches), launches=launches)  # even launches
    if p.precision == "ieee":
        reason = "full float32 products go without tensor cores: all weights are read again in every step"
    elif p.streamed:
        reason = f"weights do not all fit on the chip: {p.streamed} of {chunks} chunks are read again in every step"
    elif p.shared:
        reason = "all weights stay on the chip, part of them in shared memory"
    else:
        reason = "all weights stay in registers"
    if launches > 1:
        reason += f"; the batch takes {launches} launches one after another"
    return replace(p, microseconds=launches * _step_microseconds(p, device), reason=reason)


def _tile_microseconds(p: Plan, device: Device) -> float:
    """What the work on one tile takes in a step, from its words to its publish."""
    gates, chunks = CELLS[p.cell].gates, p.registers + p.shared + p.streamed
    tile_gates = gates if p.backward else -(-gates // p.gates_per_tile) * p.gates_per_tile
    matrices = 2 * chunks * (tile_gates * p.units // TILE_ROWS) * (p.rows // TILE_BATCH)
    if p.backward:
        tile = BACKWARD_TILE + BACKWARD_MATRIX * matrices + BACKWARD_VECTOR * chunks * gates * (p.rows // TILE_BATCH)
        tile += BACKWARD_EIGHT_WARPS * (p.warps > 4)
        tile += (p.waits - 1) * POLL_CYCLES / CLOCK / 1e3
    else:
        tile = FORWARD_TILE + FORWARD_MATRIX * matrices + FORWARD_EIGHT_WARPS * (p.warps > 4)
    # A stack's further wait, for what has been there for a step. Neither it nor its product hides behind the way of the
    # own state: counted in full, two layers are within 3 % of what an H200 took.
    tile += p.layered * p.waits * POLL_CYCLES / CLOCK / 1e3
    if p.precision == "ieee":
        tile += chunks * gates * p.units * p.rows / 2 * p.warps * ISSUE_CYCLES / CLOCK / 1e3
    chunk_bytes = p.warps * tile_gates * p.units * CHUNK_ROW_BYTES
    tile += p.shared * chunk_bytes / SHARED_BYTES_PER_CYCLE / CLOCK / 1e3
    streamed = p.streamed * chunk_bytes * p.programs
    in_l2 = streamed / p.slices <= device.l2_bytes  # a tile's weights stay in the first-level cache at best
    memory = L2_BYTES_PER_MICROSECOND if in_l2 else device.memory_gigabytes_per_second * 1e3
    return tile * CLOCK / device.gigahertz + streamed / memory


def _step_microseconds(p: Plan, device: Device) -> float:
    """Predicted time of a step of one launch."""
    slots = CELLS[p.cell].gates if p.backward else 1
    tile = _tile_microseconds(p, device)
    polled = p.slices * p.rows * padded(p.hidden_size, p.dtype) * itemsize(p.dtype) * slots * p.programs / 1e6
    if p.backward:
        exchange, travel = BACKWARD_EXCHANGE + BACKWARD_MEGABYTE * polled, BACKWARD_TRAVEL
    else:
        exchange, travel = FORWARD_EXCHANGE + FORWARD_MEGABYTE * polled, FORWARD_TRAVEL
        exchange += FORWARD_LATE * p.programs
    # The exchange of one tile hides behind the work on the others, and tiles in turn take each its time.
    return max(tile + exchange, p.slices * tile) + travel


def cudnn_microseconds(p: Plan, device: Device, layers: int = 1) -> float:
    """Estimated time of a step of the recurrence with cuDNN as PyTorch drives it, for the problem of a plan in a module
    of so many layers: what was measured of a layer, less its large products.
    """
    spec, bytes_ = CELLS[p.cell], itemsize(p.dtype)
    product = 2e-9 * spec.gates * p.hidden_size**2 * p.batch_size * p.sets  # 1e9 operations
    small = p.hidden_size <= ((256 if p.backward else 384) if spec.gates == 1 else (128 if p.backward else 192))
    small = small and p.dtype != "bfloat16" and p.sets == layers == 1
    static = p.dtype == "float16" and spec.gates != 3 and p.sets == layers == 1 and p.batch_size % 8 == 0
    static = static and p.hidden_size <= 1024 and p.hidden_size % 128 == 0 and p.batch_size <= PERSISTENT_BATCH
    if static:
        took = next(times[p.backward] for units, *times in CUDNN_PERSISTENT if units >= p.hidden_size)
    elif small:
        took = CUDNN_SMALL[p.backward]
    else:
        weights = spec.gates * p.hidden_size**2 * bytes_ * p.sets
        memory = 0.0 if weights <= device.l2_bytes else weights / device.memory_gigabytes_per_second / 1e3
        step, unit = CUDNN_STEP[p.dtype][p.backward]
        took = max((step + unit * p.hidden_size) * p.sets, CUDNN_WORK[p.backward] * product, memory)
    return max(took - (3 if p.backward else 1) * product_microseconds(p, device), took / 2)


def product_microseconds(p: Plan, device: Device) -> float:
    """What one large product with I = H takes of a step: the input's, for all layers of a plan."""
    share = min(device.multiprocessors * device.gigahertz / (132 * CLOCK), 1.0)
    operations = 2 * CELLS[p.cell].gates * p.hidden_size**2 * p.batch_size * p.sets
    return operations / PRODUCT_OPERATIONS[p.dtype] / share


def least_time(saved: float, dtype: str, training: bool) -> int:
    """T from which on a layer, or layers side by side, of which a step takes so many microseconds less than with cuDNN,
    are done sooner as a call.
    """
    return max(1, ceil(CALL_MORE[dtype][training] / max(saved, 1e-6)))


@cache
def cached_plan(*args, **kwargs) -> Plan | str:
    """`plan`, remembered: it is asked for at every call of a layer."""
    return plan(*args, **kwargs)


def in_groups(
    layers: int,
    passes: tuple[bool, ...],
    plan_of: Callable[[int, bool], Plan | str],
    device: Device,
    measured: tuple[int, ...] = (),
) -> tuple[tuple[Plan, ...], ...] | str:
    """How the layers of a stack are best put into launches: of each group of neighbours, from the first layer on, the
    plans of its passes; or why not even one layer has any.

    passes: for each whether it is the backward. plan_of: the plan of so many layers and a pass. A group has no pass
    that is slower than its layers one after another. It takes T steps and one more for each further layer, which is not
    counted, and makes an input part, and its gradient, for its first layer alone. measured: the sizes of groups to take
    in place of the model's choice, where each of them has plans.
    """
    if sum(measured) == layers and min(measured) > 0:
        chosen = [tuple(plan_of(size, backward) for backward in passes) for size in measured]
        if all(isinstance(p, Plan) for group in chosen for p in group):
            return tuple(chosen)
    plans: dict[int, tuple[Plan, ...]] = {}
    costs: dict[int, float] = {}
    alone: list[float] = []
    for size in range(1, layers + 1):
        found = [plan_of(size, backward) for backward in passes]
        missing = next((reason for reason in found if isinstance(reason, str)), None)
        if missing and size == 1:
            return missing
        if missing:  # nor do more layers fit
            break
        times = [p.microseconds + product_microseconds(p, device) for p in found]
        alone = times if size == 1 else alone
        if all(us <= size * one for us, one in zip(times, alone, strict=True)):
            plans[size], costs[size] = tuple(found), sum(times)
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]  # of the first 0, 1, ... layers
    for count in range(1, layers + 1):
        ways = (
            (best[count - size][0] + costs[size], (*best[count - size][1], size)) for size in plans if size <= count
        )
        best.append(min(ways, key=lambda way: (way[0], len(way[1]))))
    return tuple(plans[size] for size in best[layers][1])
