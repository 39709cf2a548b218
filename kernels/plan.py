"""The plan: how a recurrence is cut into programs. Pure Python: needs no GPU and no Triton.

`plan()` enumerates the ways that fit the device (residency.py) and takes the one whose predicted step is the shortest.
The times come from a model whose constants stand below: fitted to what an H200 took. cudnn.py says the same of what
`auto` would use instead.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple

from .devices import DEVICES as DEVICES  # found here too
from .devices import Device
from .residency import (
    CHUNK_ROW_BYTES,
    POLL_CYCLES,
    SHARED_BYTES_PER_CYCLE,
    SPARE_BYTES,
    TILE_BATCH,
    TILE_ROWS,
    UNITS,
    Problem,
    Residency,
    Tiling,
    beyond_words,
    chunk_bytes,
    residency,
    tile_gates,
    tilings,
)
from .spec import CELLS, DTYPES, itemsize, padded, stacked


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
    of a layer, the recurrent one's first. pause: cycles from a wait's begin to its first look.
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
    pause: int = 0

    @cached_property
    def padded_size(self) -> int:
        """HS: units a row of every exchanged or saved buffer has room for."""
        return padded(self.hidden_size, self.dtype)

    @cached_property
    def row_words(self) -> int:
        """The same in words of 32 bits."""
        return self.padded_size * itemsize(self.dtype) // 4

    @property
    def paused(self) -> bool:
        """Whether waits begin with a pause: the kernel is the same for any length of it."""
        return self.pause > 0

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
            f"launch(es); {weights}{f'; {self.pause} cycles before a first look' if self.pause else ''}"
            f"{f'; measured {self.measured}' if self.measured else ''}"
        )


# One program that holds all units has TILE_BATCH rows: twice the rows take nearly twice the instructions, and registers
# that the LSTM does not have. Words of weights a thread: beside 128 there is room for all else (compiled as the words
# of residency.py were).
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
# Three corrections by 318 plans that an H200 timed on 2026-11-28 (commit 2cc106c). A forward tile of 16 rows takes
# longer, for each chunk, where all weights are in registers: 8 plans, by a median of 1.21 without it. Backward tiles in
# turn do, the more programs poll the same lines: 35 plans whose weights stay on the chip, 1.23. And two tiles in turn
# of 64 units backward whose weights do not: 6 plans took 2.7 to 7.6 times what they should. (Where weights are not all
# in registers, kernels have been compiled otherwise since.)
FORWARD_WIDE = 0.08
BACKWARD_IN_TURN = 0.025
BACKWARD_WIDE_STREAMED = 3.0
AS_GOOD = 1.03  # times the best: what the model cannot tell apart
# A lone program: its instructions by the formula below, and this for each (cycles an instruction and warp of a
# multiprocessor, dependences included). LSTM, H 128, 16 bits, as above: 1.33 us forward, 3.02 backward; what exchanges
# its state took 0.9 and 1.09 there, in tf32.
FORWARD_ALONE_CYCLES, BACKWARD_ALONE_CYCLES = 0.82, 1.87
ALONE_UNITS = 64  # up to so many units one program is taken: it needs no other, and nobody has timed either way there
# All multiprocessors together; published 7.5 to 10 TB/s. The least is what fitted plans of commit 7d9048c; with it the
# backward of H 2048, B 16, bfloat16, half of whose weights are read again, takes the 11.5 us of commit dd67452.
L2_BYTES_PER_MICROSECOND = 7.5e6
ISSUE_CYCLES = 0.45  # cycles a scalar product of full float32 takes, for each warp of a multiprocessor: estimated
CLOCK = 1.8  # gigahertz of the H200 that was measured: other devices take longer or shorter by their clock

# Cycles from the begin of a wait to its first look, from so many programs that exchange on: what arrives with the first
# look costs nobody a second one, and a look in vain is traffic that holds up what the others send. Chosen by what an
# H200 took with 0 to 800 in eight steps (2026-11-28, commit 3a3b8ba, perf/results), one tile a program, the three
# cells, 16 and 32 bits: these take up to 23 % off a forward step and up to 18 % off a backward one, least with 8
# programs (where two recordings contradict each other backward) and in float32 backward.
FORWARD_PAUSES = ((8, 100), (16, 200), (32, 300), (48, 400), (64, 500))
BACKWARD_PAUSES = ((16, 100), (32, 150), (48, 300), (64, 600))
# Then, from a tile's publish to the next step, what was fitted to them: microseconds, more for the bytes that all
# programs poll, and more for each program that exchanges with it. Of the 20 passes whose weights are all in registers
# half are within 5 %, all but one within 20 %. Not used where weights lie in shared memory: with 2048 units backward it
# would be 15 % too short, and few such plans were timed. (None: as without a pause, for perf/recorded.py.)
FORWARD_PAUSED, BACKWARD_PAUSED = (0.281, 0.0, 0.005), (0.314, 0.09, 0.0)

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


def plan(
    cell: str, hidden_size: int, batch_size: int, sets: int, dtype: str, device: Device, backward: bool = False,
    precision: str | None = None, max_programs: int | None = None, allow_alone: bool = True, ragged: bool = False,
    measured: Measured | None = None, layers: int = 1,
) -> Plan | str:  # fmt: skip
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
    cell: str, hidden_size: int, batch_size: int, sets: int, dtype: str, device: Device, backward: bool = False,
    precision: str | None = None, max_programs: int | None = None, allow_alone: bool = True, ragged: bool = False,
    layers: int = 1,
) -> list[Plan] | str:  # fmt: skip
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
    beyond = 2 * beyond_words(problem) if problem.backward else 0  # 64 units compile, with 3 values
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
    for tiling in tilings(problem):
        unit_slices = -(-problem.size // tiling.units)
        fits = unit_slices * problem.sets * problem.layers <= resident
        found = residency(problem, tiling) if fits else None
        if found is not None:
            yield _plan_of(
                problem, alone=False, units=tiling.units, rows=tiling.rows, slices=tiling.slices, warps=tiling.warps,
                registers=found.registers, shared=found.shared,
                streamed=tiling.chunks - found.registers - found.shared, waits=found.waits,
                gates_per_tile=tiling.gates_per_tile, unit_slices=unit_slices, batch_slices=0, launches=0,
                shared_bytes=found.shared_bytes, microseconds=0.0, reason="",
                pause=pause_of(problem, tiling, unit_slices, found),
            )  # fmt: skip


def pause_of(problem: Problem, tiling: Tiling, unit_slices: int, residency: Residency) -> int:
    """Cycles before the first look of a wait; none where other tiles or weights that are read in every step are pause
    enough; nor in a stack, where nobody has timed one.
    """
    if tiling.slices > 1 or problem.layers > 1 or residency.registers + residency.shared < tiling.chunks:
        return 0
    pauses = BACKWARD_PAUSES if problem.backward else FORWARD_PAUSES
    return max((pause for programs, pause in pauses if programs <= unit_slices), default=0)


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
    in_tiles = tile_gates(gates, p.backward, p)
    matrices = 2 * chunks * (in_tiles * p.units // TILE_ROWS) * (p.rows // TILE_BATCH)
    if p.backward:
        tile = BACKWARD_TILE + BACKWARD_MATRIX * matrices + BACKWARD_VECTOR * chunks * gates * (p.rows // TILE_BATCH)
        tile += BACKWARD_EIGHT_WARPS * (p.warps > 4)
        tile += (p.waits - 1) * POLL_CYCLES / CLOCK / 1e3
    else:
        tile = FORWARD_TILE + FORWARD_MATRIX * matrices + FORWARD_EIGHT_WARPS * (p.warps > 4)
        tile += FORWARD_WIDE * chunks * (p.registers == chunks and p.slices == 1 and p.rows > TILE_BATCH)
    # A stack's further wait, for what has been there for a step. Neither it nor its product hides behind the way of the
    # own state: counted in full, two layers are within 3 % of what an H200 took.
    tile += p.layered * p.waits * POLL_CYCLES / CLOCK / 1e3
    if p.precision == "ieee":
        tile += chunks * gates * p.units * p.rows / 2 * p.warps * ISSUE_CYCLES / CLOCK / 1e3
    tile += p.shared * chunk_bytes(gates, p.backward, p) / SHARED_BYTES_PER_CYCLE / CLOCK / 1e3
    streamed = p.streamed * chunk_bytes(gates, p.backward, p) * p.programs
    if p.backward and p.streamed and p.slices > 1 and p.units == max(UNITS):
        tile *= BACKWARD_WIDE_STREAMED
    in_l2 = streamed / p.slices <= device.l2_bytes  # a tile's weights stay in the first-level cache at best
    memory = L2_BYTES_PER_MICROSECOND if in_l2 else device.memory_gigabytes_per_second * 1e3
    return tile * CLOCK / device.gigahertz + streamed / memory


def _step_microseconds(p: Plan, device: Device) -> float:
    """Predicted time of a step of one launch."""
    gates = CELLS[p.cell].gates
    slots = gates if p.backward else 1
    tile = _tile_microseconds(p, device)
    polled = p.slices * p.rows * padded(p.hidden_size, p.dtype) * itemsize(p.dtype) * slots * p.programs / 1e6
    if p.backward:
        exchange, travel = BACKWARD_EXCHANGE + BACKWARD_MEGABYTE * polled, BACKWARD_TRAVEL
    else:
        exchange, travel = FORWARD_EXCHANGE + FORWARD_MEGABYTE * polled, FORWARD_TRAVEL
        exchange += FORWARD_LATE * p.programs
    # The exchange of one tile hides behind the work on the others, and tiles in turn take each its time. But what is
    # polled, and weights that each tile reads again, all come out of the second-level cache.
    again = p.slices * p.streamed * chunk_bytes(gates, p.backward, p) * p.programs
    traffic = (polled * 1e6 + again) / L2_BYTES_PER_MICROSECOND
    paused = BACKWARD_PAUSED if p.backward else FORWARD_PAUSED
    if p.pause and not p.shared and paused is not None:
        least, of_megabyte, of_program = paused
        return max(tile + least + of_megabyte * polled + of_program * p.unit_slices, traffic)
    in_turn = p.slices * tile + (BACKWARD_IN_TURN * p.unit_slices if p.backward and p.slices > 1 else 0.0)
    return max(tile + exchange, in_turn, traffic) + travel


def product_microseconds(p: Plan, device: Device) -> float:
    """What one large product with I = H takes of a step: the input's, for all layers of a plan."""
    share = min(device.multiprocessors * device.gigahertz / (132 * CLOCK), 1.0)
    operations = 2 * CELLS[p.cell].gates * p.hidden_size**2 * p.batch_size * p.sets
    return operations / PRODUCT_OPERATIONS[p.dtype] / share


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
