"""The plan: how a recurrence is cut into programs. Pure Python: needs no GPU and no Triton.

`plan()` enumerates the ways that fit the device and takes the one whose predicted step is the shortest. The times come
from a model whose constants stand below, each with its reason; none of them has been measured by this project yet, so a
prediction ranks plans and is no promise. `cudnn_microseconds` is the same kind of estimate for what `auto` would use
instead.
"""

from dataclasses import dataclass, replace
from functools import cache

from .spec import CELLS, DTYPES, chunk_width, itemsize, padded


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


DEVICES = {
    "h200": Device("NVIDIA H200", 90, 132, 232448, 1.8, 60 << 20, 3900),
    "h100": Device("NVIDIA H100", 90, 132, 232448, 1.8, 50 << 20, 2600),
    "a100": Device("NVIDIA A100", 80, 108, 166912, 1.4, 40 << 20, 1800),
    "rtx3090": Device("NVIDIA RTX 3090", 86, 82, 101376, 1.7, 6 << 20, 850),
    "rtx4090": Device("NVIDIA RTX 4090", 89, 128, 101376, 2.5, 72 << 20, 950),
    "rtx5090": Device("NVIDIA RTX 5090", 120, 170, 101376, 2.4, 96 << 20, 1650),
    "b200": Device("NVIDIA B200", 100, 148, 232448, 1.9, 126 << 20, 7000),
}


@dataclass(frozen=True)
class Plan:
    """How one pass (forward or backward) of a recurrence runs.

    units, rows, slices: hidden units a program owns, rows of its tile, and tiles it works through in turn within a
    step.
    warps: also the number of ways K is split. registers, shared, streamed: chunks of K whose weights stay in registers,
    in shared memory, or are read again in every step. order: see kernels/backward.py. alone: one program holds all
    units, no exchange.
    unit_slices x batch_slices x sets programs in a launch; launches one after another for the whole batch.
    shared_bytes: estimate of the shared memory of a program. microseconds: predicted time of a step of all launches.
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
    order: int
    gates_per_tile: int
    unit_slices: int
    batch_slices: int
    launches: int
    shared_bytes: int
    microseconds: float
    reason: str

    @property
    def programs(self) -> int:
        """Programs of a launch."""
        return self.unit_slices * self.batch_slices * self.sets

    def __str__(self) -> str:
        """The plan in one line."""
        where = f"{self.registers} chunks of weights in registers, {self.shared} in shared memory"
        weights = f"{where}, {self.streamed} read every step"
        if self.alone:
            weights = "all weights in shared memory, no exchange"
        return (
            f"{self.unit_slices} unit slices of {self.units} x {self.batch_slices} batch slices of {self.slices} x "
            f"{self.rows} rows x {self.sets} sets = {self.programs} programs of {self.warps} warps, {self.launches} "
            f"launch(es); {weights}"
        )


# Residency. A thread has 255 registers, and what does not fit spills to memory in every step. Words of 32 bits that a
# thread may spend on weights, polled state and accumulators, forward and backward; the rest goes to the input part on
# its way, the equations and the addresses. Found by compiling for sm_80 to sm_120 with Triton 3.6 and 3.7
# (perf/resources.py, which repeats it): the LSTM with 1536 units forward takes all 248 of sm_90; backward there are
# more tensors to address, and the factors wait in registers.
THREAD_WORDS = {False: 248, True: 224}
# Fewer before sm_90, where fewer addresses stand in the registers that all threads of a warp share.
OLDER_ADDRESS_WORDS = 16
# Fewer where sequences are packed, end early or start anew: more masks, and a source of the state for each row.
RAGGED_WORDS = 24
# What each further (row, unit) pair of a thread takes of them: its input part of this step and the next, its carry, its
# offsets.
PAIR_WORDS = {False: 24, True: 16}
# Weights that come from elsewhere than registers pass through some: the compiler fetches as many ahead as it believes
# to have room for.
PASSING_WORDS = {False: 32, True: 48}
# Rounding to tf32 makes copies of the polled state, and the compiler makes them early.
ROUNDING_WORDS = 24
# (row, unit) pairs of a thread, all slices together. With more, the words above no longer add up.
PAIRS = 4
# Accumulators a thread where one program of so many warps holds all units: beside them stand the gates of as many
# (row, unit) pairs, and with 4 warps more of the weights on their way.
ALONE_ACCUMULATORS = {4: 16, 8: 32}
# Full float32 products are made of scalar ones, each operand copied through shared memory and into registers for all of
# K.
ALONE_IEEE_UNITS = 32
# Tiles polled in a step where a program works through several slices of rows: Triton's time to compile grows with their
# cube.
POLLED_TILES = 48
EXCHANGE_MICROSECONDS = 0.7  # publish, reach L2, be polled, at about 130 programs; published: 0.6 to 0.9
L2_BYTES_PER_MICROSECOND = 7.5e6  # all multiprocessors together; published 7.5 to 10 TB/s
POLL_BYTES_PER_CYCLE = 64  # what one multiprocessor takes in from L2
POLLS = 1.5  # times a tile is read on the average: one poll in two comes too early
SHARED_BYTES_PER_CYCLE = 128  # what one multiprocessor reads from its shared memory
ISSUE_CYCLES = 0.45  # cycles an instruction and warp of a multiprocessor, 4 schedulers, dependences included: estimated
CUDNN_STEP_MICROSECONDS = 5.0  # two launches a step or more
CUDNN_PERSISTENT_MICROSECONDS = 1.9  # float16 where cuDNN has a persistent kernel; published, H100, H 768, B 16


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
) -> Plan | str:
    """The best plan that fits, or a sentence that says why there is none.

    sets: weight sets that run side by side (directions). precision: "tf32" or "ieee" for float32. max_programs: the
    user's cap on programs that must run at the same time; fewer than the multiprocessors leave room for collectives.
    allow_alone=False: exchange even where one program could hold all units (for tests). ragged: sequences are packed,
    end early or start anew.
    """
    if dtype not in DTYPES:
        return f"the kernels compute in {', '.join(DTYPES)}, not in {dtype}"
    if device.arch < 80:
        return f"the kernels need compute capability 8.0 or later, {device.name} has {device.arch / 10}"
    resident = min(max_programs or device.multiprocessors, device.multiprocessors)
    precision = (precision or "tf32") if dtype == "float32" else None
    problem = (cell, hidden_size, max(batch_size, 1), sets, dtype, device, backward, precision)
    found = list(_alone(*problem)) if allow_alone else []
    if not found:
        found = [p for p in _exchanging(*problem, ragged) if p.unit_slices * sets <= resident]
        found = [_with_batch(p, device, resident) for p in found]
    if not found:
        what = f"{hidden_size} hidden units in {sets} set(s)"
        return f"{what} need more than the {resident} programs that can run at the same time"
    return min(found, key=lambda p: (p.microseconds, p.programs))


def _alone(cell, hidden_size, batch_size, sets, dtype, device, backward, precision):
    """Plans in which one program holds all units, and batch slices share nothing: any number of programs will do."""
    gates, bytes_ = CELLS[cell].gates, itemsize(dtype)
    units = max(16, 1 << (hidden_size - 1).bit_length())
    warps = 8 if units >= 128 else 4
    for rows in (8, 16, 32):
        weights = gates * units * units * bytes_
        # Beside the weights: the sums on their way to the layout of the loads and, backward, the state of all gates on
        # its way to the product.
        scratch = units * rows * 4 + (gates if backward else 1) * units * max(rows, 16) * bytes_
        accumulators = gates * units * rows // (warps * 32)
        if weights + scratch > device.shared_memory or accumulators > ALONE_ACCUMULATORS[warps]:
            continue
        if precision == "ieee" and units > ALONE_IEEE_UNITS:
            continue
        programs = -(-batch_size // rows)
        waves = -(-programs * sets // device.multiprocessors)
        instructions = 200 + 60 * gates * units * rows / (warps * 32) / 4
        cycles = weights / SHARED_BYTES_PER_CYCLE + instructions * warps * ISSUE_CYCLES
        yield Plan(
            cell, hidden_size, batch_size, sets, dtype, backward, precision, True, units, rows, 1, warps, 0, 0, 0, 0, 1,
            1, programs, 1, weights + scratch, waves * cycles / device.gigahertz / 1e3,
            "one program holds all hidden units: nothing to exchange",
        )  # fmt: skip


def _exchanging(cell, hidden_size, batch_size, sets, dtype, device, backward, precision, ragged):
    """Plans that cut the hidden units into slices, without the batch: rows, slices, weights and where they stay."""
    spec = CELLS[cell]
    size = padded(hidden_size, dtype)
    # Half the warps where half the chunks are enough: fewer partial sums to add, and no thread without a (row, unit)
    # pair.
    warps = 4 if size <= chunk_width(8, dtype) else 8
    chunks = -(-size // chunk_width(warps, dtype))
    for units in (8, 16, 32, 64):
        if units == 8 and (backward or spec.gates == 1):  # a tile of weights has 16 rows at least
            continue
        # Gates that share a tile of weights: those that fill the 16 rows of a matrix instruction, and all four of the
        # LSTM (fewer exchanges through shared memory), but one of 64 units, or a chunk would take half the registers;
        # and two of the GRU where the rows of its input are not aligned either, which takes registers of its own.
        per_tile = spec.gates if spec.gates == 4 and units < 64 else 1
        if spec.gates == 3 and (units == 8 or (units == 64 and hidden_size % 64 != 0 and precision != "ieee")):
            per_tile = 2
        for rows, slices in ((8, 1), (8, 2), (8, 4), (16, 1), (16, 2)):
            if slices > 1 and chunks * slices * (spec.gates if backward else 1) > POLLED_TILES:
                continue
            found = _residency(
                spec.gates, per_tile, units, rows, slices, warps, chunks, device, backward, precision, ragged
            )
            if found is None:
                continue
            order, registers, shared, shared_bytes = found
            yield Plan(
                cell, hidden_size, batch_size, sets, dtype, backward, precision, False, units, rows, slices, warps,
                registers, shared, chunks - registers - shared, order, per_tile,
                -(-size // units), 0, 0, shared_bytes, 0.0, "",
            )  # fmt: skip


def _residency(gates, per_tile, units, rows, slices, warps, chunks, device, backward, precision, ragged):
    """Order of the waits, chunks of weights in registers and in shared memory, bytes of it all; None: it would spill.

    The order that keeps most weights on the chip; where two are equal, all in registers; then the first of the list:
    fewer waits, or waits that overlap. Order 3, whose waits do not, is taken for more weights on the chip alone.
    """
    tile_gates = gates if backward else -(-gates // per_tile) * per_tile
    words = tile_gates * units // 2  # of a chunk of weights, a thread: a chunk has 16 words a row and warp
    chunk_bytes = warps * tile_gates * units * 64
    sums = 1 if backward or gates == 1 else 4  # tiles, as tiles.side_by_side makes them
    # A thread holds its warp's sums, the backward two of each, and then as many words of those of all warps.
    accumulators = 2 * (2 if backward else sums) * units * rows // 32
    pairs = max(1, units * rows // (warps * 32)) * slices
    room = THREAD_WORDS[backward] - PAIR_WORDS[backward] * (pairs - 1)
    room -= (OLDER_ADDRESS_WORDS if device.arch < 90 else 0) + (RAGGED_WORDS if ragged else 0)
    scratch = warps * sums * units * rows * 4 + 1024
    if pairs > PAIRS:
        return None
    if precision == "ieee":  # an operand passes through shared memory chunk by chunk, of all gates that share a tile
        scratch = max(scratch, warps * 64 * ((1 if backward else per_tile) * units + rows) + 1024)
    best, most = None, (-1, False)
    for order, slots in ((2, gates), (1, 2), (3, 1)) if backward and gates > 1 else ((0, 1),):
        state = chunks * slots * rows // 2  # polled words in a thread at the same time
        for registers in range(0 if precision == "ieee" else chunks, -1, -1):
            fitting = 0 if precision == "ieee" else max(0, device.shared_memory - scratch) // chunk_bytes
            shared = min(chunks - registers, fitting)
            held = registers + shared
            if held == chunks:
                needed = state + accumulators
            else:  # only the held weights need their state kept, the others read it again, chunk by chunk
                one_chunk = (units if backward else per_tile * units) // 2 + rows // 2
                needed = max(state, -(-state * held // chunks) + accumulators, accumulators + one_chunk)
            needed += PASSING_WORDS[backward] if registers < chunks else 0
            needed += ROUNDING_WORDS if precision == "tf32" else 0
            simplest = registers == 0 and slots * slices * rows == 8  # always possible: what passes takes its turn
            if registers * words + needed <= room or simplest:
                value = held, registers == chunks and order != 3
                if value > most:
                    best, most = (order, registers, shared, scratch + shared * chunk_bytes), value
                break
    return best


def _with_batch(p: Plan, device: Device, resident: int) -> Plan:
    """The plan with its batch slices, launches, predicted time and reason."""
    spec, bytes_ = CELLS[p.cell], itemsize(p.dtype)
    wanted = -(-p.batch_size // (p.rows * p.slices))
    batch_slices = min(wanted, resident // (p.unit_slices * p.sets))
    launches = -(-wanted // batch_slices)
    batch_slices = -(-wanted // launches)  # even launches
    programs = p.unit_slices * batch_slices * p.sets
    polled = p.rows * padded(p.hidden_size, p.dtype) * bytes_ * (spec.gates if p.backward else 1)
    chunk_bytes = p.warps * spec.gates * p.units * 64
    chunks = p.registers + p.shared + p.streamed
    instructions = 30 * spec.gates * p.units // 16 + chunks * (2 if p.backward else 1) * (4 + spec.gates * p.units // 8)
    instructions = 150 + instructions * p.rows // 8
    if p.precision == "ieee":
        instructions += chunks * spec.gates * p.units * p.rows // 2
    tile = instructions * p.warps * ISSUE_CYCLES / device.gigahertz / 1e3
    tile += p.shared * chunk_bytes / SHARED_BYTES_PER_CYCLE / device.gigahertz / 1e3
    streamed = p.streamed * chunk_bytes * programs / p.slices  # a tile's weights stay in the first-level cache at best
    l2 = streamed <= device.l2_bytes
    rate = L2_BYTES_PER_MICROSECOND if l2 else device.memory_gigabytes_per_second * 1e3
    tile += p.streamed * chunk_bytes * programs / rate
    poll = POLLS * max(
        polled * programs / L2_BYTES_PER_MICROSECOND, polled / POLL_BYTES_PER_CYCLE / device.gigahertz / 1e3
    )
    # The exchange of one tile hides behind the work on the others.
    step = max(EXCHANGE_MICROSECONDS + poll + tile, p.slices * (poll + tile))
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
    return replace(p, batch_slices=batch_slices, launches=launches, microseconds=launches * step, reason=reason)


def cudnn_microseconds(p: Plan, device: Device) -> float:
    """Estimated time of a step (recurrence alone) with cuDNN as PyTorch drives it, for the problem of a plan."""
    spec, bytes_ = CELLS[p.cell], itemsize(p.dtype)
    weights = spec.gates * p.hidden_size * p.hidden_size * bytes_ * p.sets
    l2 = weights <= device.l2_bytes
    memory = weights / (L2_BYTES_PER_MICROSECOND if l2 else device.memory_gigabytes_per_second * 1e3)
    flops = 2 * spec.gates * p.hidden_size**2 * p.batch_size * p.sets
    per_cycle = 1024 if p.dtype != "float32" else 512 if p.precision == "tf32" else 256
    products = max(memory, flops / (device.multiprocessors * device.gigahertz * per_cycle) / 1e3)
    small = p.hidden_size <= ((256 if p.backward else 384) if spec.gates == 1 else (128 if p.backward else 192))
    static = p.dtype == "float16" and spec.gates != 3 and p.sets == 1
    static = static and p.hidden_size <= 1024 and p.hidden_size % 128 == 0
    static = static and p.batch_size % 8 == 0 and p.batch_size <= 128
    return products + (CUDNN_PERSISTENT_MICROSECONDS if small or static else CUDNN_STEP_MICROSECONDS)


@cache
def cached_plan(*args, **kwargs) -> Plan | str:
    """`plan`, remembered: it is asked for at every call of a layer."""
    return plan(*args, **kwargs)
