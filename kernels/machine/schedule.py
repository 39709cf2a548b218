"""`Machine`: a kernel that runs on a CPU against chance. `Launch`: one run of it; `Run`: some warps that step together.

Warps of a launch are rows, program after program. Those that stand at the same instruction step as one: a register is
an array [warps, 32], an instruction one operation of numpy. The schedule draws which programs may run, picks one place
among those where their warps stand, and lets all of them there go on, or only some: to the next access of global memory
that others can notice, and past it as often as not; to a barrier that waits for others; to a branch where they part.
What a program stores becomes visible a little at a time, between two such draws.

Lanes of a warp may part, too. Then each has a place of its own, those at one place go on to the next branch or label,
mostly the ones that are furthest behind, and what a whole warp does waits until all lanes are there.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from .decode import ACT, BARRIER, BRANCH, EXIT, SPECIAL, VALUE, Code
from .memory import GlobalMemory, Lanes, Segment, SharedMemory
from .parse import Fault
from .values import UNSIGNED
from .warpgroup import Outstanding

READY, WAITING, DONE = range(3)
NOWHERE = 1 << 30  # the place of a lane that has ended
LANES = np.arange(32)


@dataclass
class Counts:
    """What a launch did."""

    instructions: int = 0  # of warps
    steps: int = 0  # operations that did them
    most: int = 0  # instructions of one warp
    polls: int = 0  # strong loads of global memory and atomics, of warps
    barriers: int = 0  # of programs
    prefetched: int = 0  # lanes that asked for a prefetch
    prefetched_outside: int = 0  # lanes whose prefetch was of no allocation
    draws: int = 0  # of the schedule


@dataclass(frozen=True)
class Schedule:
    """How a launch is run. Equal ones give equal launches.

    launch: its number in a context, drawn with together with the seed. delay: the chance of a stored element to become
    visible at each draw. slow: numbers of programs that run, and whose stores arrive, a hundredth as often. stop: the
    chance to stop before an access of global memory that others can notice. part: the chance that only some of the
    warps that stand together go on. budget: instructions that a warp may take. patience: draws for which all warps may
    only wait, with nothing under way. races: whether to look for races. leave_out: indices (x, y, z) of programs that
    never run, or a function of the kernel's name and the index.
    """

    seed: int = 0
    launch: int = 1
    delay: float = 0.3
    slow: tuple[int, ...] = ()
    stop: float = 0.1
    part: float = 0.2
    budget: int = 2_000_000
    patience: int = 20_000
    races: bool = True
    leave_out: tuple | Callable = ()

    def __str__(self) -> str:
        """What must be given to see a launch again."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        number = given.pop("launch", 1)
        return ", ".join([f"launch {number}", *(f"{name}={value}" for name, value in ({"seed": 0} | given).items())])

    def absent(self, kernel: str, index: tuple[int, int, int]) -> bool:
        """Whether a program is left out."""
        if callable(self.leave_out):
            return self.leave_out(kernel, index)
        return index in {(*i, 0, 0)[:3] if isinstance(i, tuple) else (i, 0, 0) for i in self.leave_out}


class Machine:
    """A kernel: its PTX, the warps of a program, and the bytes of shared memory that a program has."""

    def __init__(self, ptx: str, warps: int, shared: int):
        self.code, self.warps, self.shared = Code(ptx), warps, shared
        self._writable = self.code.writable()

    def run(self, grid, arguments, names=None, meant=(), schedule: Schedule = Schedule()) -> Counts:
        """Launch it on torch CPU tensors (in place) and numbers, in the order of its parameters; those missing at the
        end are 0.

        names: of the arguments, for messages. meant: (name, on which of its elements races are meant, or None).
        """
        grid = (*grid, 1, 1)[:3]
        launch = Launch(self, grid, schedule)
        parameters = list(self.code.kernel.parameters)
        known: dict[int, Segment] = {}
        for i, value in enumerate(arguments):
            name = names[i] if names else f"argument {i}"
            if not hasattr(value, "untyped_storage"):
                bits = np.float32(value).view(np.uint32) if isinstance(value, float) else value or 0
                launch.arguments.append(int(bits))
                continue
            data = _storage(value)
            if data.ctypes.data not in known:
                known[data.ctypes.data] = launch.memory.add(data, name)
            segment = known[data.ctypes.data]
            offset = value.storage_offset() * value.element_size()
            if parameters[i] in self._writable and segment.shadow is None:
                segment.prepare(launch.fine)
            for argument, elements in meant:
                if argument == name and elements is not None:
                    segment.excuse(offset, np.repeat(elements, value.element_size()))
            launch.arguments.append(segment.base + offset)
        launch.arguments += [0] * (len(parameters) - len(launch.arguments))
        with np.errstate(all="ignore"):
            launch.run()
        return launch.counts


def _storage(tensor) -> np.ndarray:
    """The bytes of a tensor's storage."""
    import torch

    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


class Launch:
    """One launch: where each warp stands, what it has in its registers, memory."""

    def __init__(self, machine: Machine, grid: tuple[int, int, int], schedule: Schedule):
        code, self.warps = machine.code, machine.warps
        self.code, self.schedule, self.grid = code, schedule, grid
        self.index = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        self.random, self.counts, self.arguments = np.random.default_rng((schedule.launch, schedule.seed)), Counts(), []
        self.fences = any(x.fences for x in code.code)
        self.fine = any(s.has("warp") and s.op[0] in ("bar", "barrier") for s in code.kernel.statements)
        programs = len(self.index)
        rows = programs * self.warps
        self.memory = GlobalMemory(code.grain["global"], programs, schedule.races)
        products = any(x.holds for x in code.code)
        self.shared = SharedMemory(machine.shared, programs, code.grain["shared"], self.fine, schedule.races, products)
        self.program = np.repeat(np.arange(programs), self.warps)
        self.thread = np.tile(32 * np.arange(self.warps), programs)[:, None] + LANES
        self.at, self.status = np.zeros(rows, np.int64), np.zeros(rows, np.int8)
        self.parted, self.lane_at = np.zeros(rows, bool), np.zeros((rows, 32), np.int64)
        self.count, self.seen = np.zeros(rows, np.int64), np.full(rows, -1, np.int64)
        self.barriers, self.warp_barriers = np.ones(programs, np.int64), np.zeros(rows, np.int64)
        self.arrived = np.zeros(programs, np.int64)
        self.registers: list[np.ndarray | None] = [None] * len(code.widths)
        self._junk: dict[int, np.ndarray] = {}
        self.written: dict[int, np.ndarray] = {}  # which lanes have, of registers that instructions doubt
        self._set_special()
        self.copies: dict[int, list] = {}  # row -> groups of asynchronous copies, the open one last
        self.products: dict[int, Outstanding] = {}  # row -> products that it has not waited for
        together = np.array([x.together for x in code.code] + [False])
        self.together = lambda at: together[np.minimum(at, len(together) - 1)]
        absent = np.array([schedule.absent(code.kernel.name, index) for index in self.index])
        self.status[absent[self.program]] = DONE
        self.absent = absent
        slow = np.isin(np.arange(programs), schedule.slow)
        self.pace = np.where(slow, 0.01, 1.0)
        self.chance = np.concatenate([[1.0], schedule.delay * self.pace])

    def _set_special(self) -> None:
        index = np.array(self.index, np.uint32)[self.program]
        values = {f"%ctaid.{c}": index[:, i : i + 1] for i, c in enumerate("xyz")}
        values |= {f"%nctaid.{c}": self.grid[i] for i, c in enumerate("xyz")}
        values |= {
            "%tid.x": self.thread,
            "%tid.y": 0,
            "%tid.z": 0,
            "%ntid.x": 32 * self.warps,
            "%ntid.y": 1,
            "%ntid.z": 1,
            "%laneid": self.thread % 32,
            "%warpid": self.thread // 32,
        }
        rows = len(self.program)
        for name in SPECIAL:
            value = np.asarray(values[name], np.uint32)
            width = value.shape[1] if value.ndim else 1
            self.registers[self.code.special[name]] = np.array(np.broadcast_to(value, (rows, width)))

    def junk(self, width: int) -> np.ndarray:
        """What is in a register of so many bytes that nobody wrote."""
        if width not in self._junk:
            random = np.random.default_rng((self.schedule.launch, self.schedule.seed, width))
            bits = random.integers(0, 1 << 64, (self.status.size, 32), np.uint64)
            self._junk[width] = bits.astype(UNSIGNED[width]) if width else bits & np.uint64(1) == 1
        return self._junk[width]

    def run(self) -> None:
        """Until all programs have ended."""
        idle = 0
        while (ready := np.flatnonzero(self.status == READY)).size:
            self.counts.draws += 1
            rows = self._draw(ready)
            before = self.memory.version, self.counts.barriers, ready.size
            Run(self, rows).go()
            if self.memory.pending:
                self.memory.commit(self.chance, self.random)
            now = self.memory.version, self.counts.barriers, int((self.status == READY).sum())
            idle = idle + 1 if now == before and not self.memory.pending else 0
            if idle > self.schedule.patience:
                raise Fault(
                    self.message("all warps wait for what nobody writes any more", rows[0], None, int(self.at[rows[0]]))
                )
        if (self.status == WAITING).any():
            row = int(np.flatnonzero(self.status == WAITING)[0])
            raise Fault(
                self.message("a barrier that some warps of the program never reach", row, None, int(self.at[row]) - 1)
            )
        self.memory.commit(np.ones(len(self.index) + 1), self.random)
        self.counts.most = int(self.count.max(initial=0))

    def _draw(self, ready: np.ndarray) -> np.ndarray:
        """Warps that go on together; mostly such as do more than wait for news that there is not."""
        random = self.random
        fresh = ready[self.seen[ready] != self.memory.version]
        if fresh.size and random.random() < 0.98:
            ready = fresh
        part = 1.0 if random.random() < 0.5 else random.uniform(0.05, 1.0)
        chosen = random.random(len(self.index)) < part * self.pace
        some = ready[chosen[self.program[ready]]]
        if not some.size:
            pace = self.pace[self.program[ready]]
            fast = ready[pace == pace.max()]
            some = fast if random.random() < 0.99 else ready
        # a place where many stand, or where those stand who are furthest behind
        leader = some[random.integers(some.size)] if random.random() < 0.5 else some[np.argmin(self.count[some])]
        some = some[(self.at[some] == self.at[leader]) & (self.parted[some] == self.parted[leader])]
        if self.warps > 1 and some.size > 1 and random.random() < self.schedule.part:  # warps of a program part, too
            ahead = random.random(some.size) < random.uniform(0.05, 1.0)
            some = some[ahead] if ahead.any() else some
        return some

    def settle(self, rows: np.ndarray) -> None:
        """Decide for warps whose lanes have parted where each goes on: together, where all lanes are at one place."""
        at = self.lane_at[rows]
        alive = at < NOWHERE
        joined = alive.all(1) & (at == at[:, :1]).all(1)
        free = np.where(alive & ~self.together(at), at, NOWHERE)
        behind, ahead = free.min(1), np.where(free < NOWHERE, free, -1).max(1)
        self.at[rows] = np.where(joined, at[:, 0], np.where(self.random.random(rows.size) < 0.2, ahead, behind))
        self.parted[rows] = ~joined
        over = ~alive.any(1)
        self.status[rows[over]] = DONE
        stuck = ~joined & ~over & (behind == NOWHERE)
        if stuck.any():
            i = int(np.flatnonzero(stuck)[0])
            place = int(at[i][alive[i]].min())
            lanes = np.flatnonzero(at[i] == place)
            raise Fault(self.message("only some lanes reach what a whole warp does", int(rows[i]), lanes, place))

    def message(self, text: str, row: int, lanes, at: int) -> str:
        """Text of a Fault: where it happened, and how to see it again."""
        s = self.code.code[min(at, len(self.code.code) - 1)].statement
        program, warp = self.index[self.program[row]], row % self.warps
        where = f"program {program}, warp {warp}" + ("" if lanes is None else f", lanes {_ranges(lanes)}")
        return f"{text}\n  {where}: {s.text}\n  from {s.where}\n  kernel {self.code.kernel.name}, {self.schedule}"


def _ranges(numbers: np.ndarray) -> str:
    """0, 1, 2, 7 -> "0-2, 7"."""
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts if len(p))


class Run:
    """Some warps (`rows`) on their way from one place to the next stop.

    frame: registers as far as they are known, each broadcasting to [warps, 32]; those that were written go back to the
    launch when the run ends, if anything reads them later.
    """

    def __init__(self, launch: Launch, rows: np.ndarray):
        self.launch, self.rows, self.warps = launch, rows, rows.size
        self.code, self.random = launch.code, launch.random
        self.frame, self.written = launch.code.blank.copy(), set()
        self.all = rows.size == launch.status.size
        self.at = int(launch.at[rows[0]])
        self.active = launch.lane_at[rows] == self.at if launch.parted[rows[0]] else None
        self._lanes: Lanes | None = None

    # Registers

    def put(self, slot: int, value: np.ndarray, mask: np.ndarray | None) -> None:
        """Write a register in the lanes of a mask."""
        if slot >= 0:
            self.frame[slot] = value if mask is None else np.where(mask, value, self.frame[slot])
            self.written.add(slot)

    def _fetch(self, begin: int, end: int) -> None:
        """Bring what a straight line reads, or writes in some lanes only, into the frame."""
        for slot in self.code.needs(begin, end, self.active is not None):
            if self.frame[slot] is None:
                stored = self.launch.registers[slot]
                stored = self.launch.junk(self.code.widths[slot]) if stored is None else stored
                self.frame[slot] = stored if self.all else stored[self.rows]

    def _flush(self, live: int) -> None:
        """Give back what was written, of the registers that are still read."""
        registers = self.launch.registers
        for slot in self.written:
            if live >> slot & 1:
                value = self.frame[slot]
                if registers[slot] is None:
                    registers[slot] = self.launch.junk(self.code.widths[slot]).copy()
                if self.all:  # never in place: the frame may hold it as another register
                    registers[slot] = np.array(np.broadcast_to(value, (self.warps, 32)))
                else:
                    registers[slot][self.rows] = value

    # The loop

    def go(self) -> None:
        """Until a stop."""
        code, launch, at = self.code, self.launch, self.at
        steps = 0
        while True:
            end = code.ends[at]
            self._fetch(at, end)
            while at < end:
                x = code.code[at]
                if x.together and self.active is not None:
                    return self._stop(at, steps)
                if (x.asks or x.tells) and steps and self.random.random() < launch.schedule.stop:
                    return self._stop(at, steps)
                self.at = at
                mask = self._mask(x)
                if x.touches and launch.products:
                    self._leave_alone(x, mask)
                if x.doubts or x.settles:
                    self._settle(x, mask)
                steps += 1
                at += 1
                if x.kind == VALUE:
                    value = x.action(self.frame)
                    self.frame[x.target] = value if mask is None else np.where(mask, value, self.frame[x.target])
                    self.written.add(x.target)
                elif x.kind == ACT:
                    if x.together and mask is not None and not mask.all():
                        self.fail("only some lanes reach what a whole warp does", mask)
                    if mask is None or mask.any():
                        launch.counts.polls += self.warps if x.asks else 0
                        x.action(self, mask)
                elif x.kind == BRANCH:
                    taken = self._branch(x, mask, at, steps)
                    if taken is None:
                        return None
                    at = taken
                    break
                elif x.kind == BARRIER:
                    if mask is not None and not mask.all():
                        self.fail("a barrier that not all lanes of a warp reach", mask)
                    if not self._barrier(at):
                        return self._stop(at, steps)
                elif x.kind == EXIT:
                    return self._exit(mask, at, steps)
            if self.active is not None:
                return self._stop(at, steps)

    def _settle(self, x, mask: np.ndarray | None) -> None:
        """Fault where an instruction reads a register that no instruction which its lane came by writes."""
        written = self.launch.written
        for slot in x.doubts:
            odd = np.ones((self.warps, 32), bool) if slot not in written else ~written[slot][self.rows]
            lanes = self.active if slot == x.guard else mask
            if (odd if lanes is None else odd & lanes).any():
                name = list(self.code.kernel.registers)[slot]
                self.fail(f"{name} is read, and nothing has written it", odd if lanes is None else odd & lanes)
        for slot in x.settles:
            known = written.setdefault(slot, np.zeros((self.launch.status.size, 32), bool))
            known[self.rows] |= True if self.active is None else self.active

    def _mask(self, x) -> np.ndarray | None:
        """The lanes that execute an instruction, [warps, 32]; None: all."""
        if x.guard < 0:
            return self.active
        p = self.frame[x.guard]
        mask = ~p if x.statement.negated else p
        if self.active is not None:
            return mask & self.active
        return None if mask.all() else np.broadcast_to(mask, (self.warps, 32))

    def _count(self, steps: int) -> None:
        launch = self.launch
        launch.count[self.rows] += steps
        launch.counts.instructions += steps * self.warps
        launch.counts.steps += steps
        over = launch.count[self.rows] > launch.schedule.budget
        if over.any():
            self.fail_at(f"no end after {launch.schedule.budget} instructions", 32 * np.flatnonzero(over)[:1])

    def _stop(self, at: int, steps: int) -> None:
        """All go on at `at`, some other time."""
        self._count(steps)
        self._flush(self.code.live[at])
        self._go_on(self.rows, at, self.active)

    def _go_on(self, rows: np.ndarray, at: int, active: np.ndarray | None) -> None:
        launch = self.launch
        if active is None:
            launch.at[rows] = at
        else:
            launch.lane_at[rows] = np.where(active, at, launch.lane_at[rows])
            launch.settle(rows)

    def _branch(self, x, mask, following: int, steps: int) -> int | None:
        """-> where all go on; None where they part, or wait."""
        launch, rows = self.launch, self.rows
        if x.target < following and steps > launch.schedule.budget:  # a loop with no stop in it
            self._count(steps)
        every = mask is None or (mask.all() if self.active is None else (mask == self.active).all())
        if every or not mask.any():
            if x.spins and every:
                launch.seen[rows] = launch.memory.version
                return self._stop(x.target, steps)
            if x.spins:
                launch.seen[rows] = -1
            if self.active is not None:
                return self._stop(x.target if every else following, steps)
            return x.target if every else following
        self._count(steps)
        self._flush(self.code.live[x.target] | self.code.live[following])
        active = np.ones((self.warps, 32), bool) if self.active is None else self.active
        stay = active & ~mask
        some, others = mask.any(1), stay.any(1)
        if x.spins:
            launch.seen[rows] = np.where(some, launch.memory.version, -1)
        launch.lane_at[rows] = np.where(mask, x.target, np.where(stay, following, launch.lane_at[rows]))
        whole = (some != others) & (self.active is None)
        launch.at[rows[whole]] = np.where(some, x.target, following)[whole]
        if not whole.all():
            launch.settle(rows[~whole])
        return None

    def _barrier(self, following: int) -> bool:
        """-> whether all warps of the run, and with them whole programs, go on at once."""
        launch, rows = self.launch, self.rows
        launch.at[rows], launch.status[rows] = following, WAITING
        programs, arrived = np.unique(launch.program[rows], return_counts=True)
        launch.arrived[programs] += arrived
        full = programs[launch.arrived[programs] == launch.warps]
        launch.arrived[full] = 0
        launch.barriers[full] += 1
        launch.counts.barriers += full.size
        released = (full[:, None] * launch.warps + np.arange(launch.warps)).ravel()
        launch.status[released] = READY
        self._lanes = None
        return released.size == rows.size and full.size == programs.size

    def _exit(self, mask, following: int, steps: int) -> None:
        launch = self.launch
        if mask is None:
            self._count(steps)
            launch.status[self.rows] = DONE
            return
        active = np.ones((self.warps, 32), bool) if self.active is None else self.active
        self._count(steps)
        self._flush(self.code.live[following])
        launch.lane_at[self.rows] = np.where(
            mask, NOWHERE, np.where(active & ~mask, following, launch.lane_at[self.rows])
        )
        launch.settle(self.rows)

    # What instructions ask for

    def fail(self, text: str, mask: np.ndarray | None) -> None:
        """Raise a Fault of the lanes of a mask."""
        self.fail_at(text, np.arange(32 * self.warps) if mask is None else np.flatnonzero(mask))

    def fail_at(self, text: str, which: np.ndarray) -> None:
        """Raise a Fault of these lanes, 32 * row + lane; it tells of those of the first warp."""
        row = int(which[0]) // 32
        lanes = np.unique(which[which // 32 == row] % 32)
        raise Fault(self.launch.message(text, int(self.rows[row]), lanes, self.at))

    def address(self, base: int, offset: int) -> np.ndarray:
        """Addresses of all lanes, int64 [warps, 32]."""
        return np.broadcast_to(self.frame[base].astype(np.int64) + offset, (self.warps, 32))

    def lanes(self, address: np.ndarray, mask: np.ndarray | None) -> Lanes:
        """The lanes of a mask, with all that memory asks of them."""
        if self._lanes is None:
            launch, rows = self.launch, self.rows
            thread, barriers = launch.thread[rows], launch.barriers[launch.program[rows]][:, None]
            self._lanes = Lanes(
                np.arange(32 * self.warps), address.ravel(), (launch.program[rows] + 1).astype(np.int32).repeat(32),
                (barriers << 10 | thread).astype(np.int32).ravel(),
                (barriers << 30 | launch.warp_barriers[rows][:, None] << 10 | thread).ravel(),
            )  # fmt: skip
        known = self._lanes
        if mask is None:
            return Lanes(known.which, address.ravel(), known.program, known.key, known.fine)
        which = np.flatnonzero(mask)
        return Lanes(which, address.ravel()[which], known.program[which], known.key[which], known.fine[which])

    def load(self, space, address, width, count, mask, order="") -> np.ndarray:
        """-> [warps, 32, count]; zeros in lanes outside of the mask. order: `access.order_of`."""
        lanes = self.lanes(address, mask)
        if not lanes.which.size:
            return np.zeros((self.warps, 32, count), UNSIGNED[width])
        launch = self.launch
        if space == "shared":
            values = launch.shared.load(self, lanes, width, count)
        else:
            values = launch.memory.load(self, lanes, width, count, order != "")
            known = launch.memory.order
            if order == "acquire" or (order == "relaxed" and launch.fences and known.released):
                learn = known.acquire if order == "acquire" else known.read
                for thread in zip(*lanes.threads(), lanes.address.tolist(), strict=True):
                    learn(*thread)
        if mask is None:
            return values.reshape(self.warps, 32, count)
        out = np.zeros((32 * self.warps, count), UNSIGNED[width])
        out[lanes.which] = values
        return out.reshape(self.warps, 32, count)

    def store(self, space, address, values, mask, order="") -> None:
        """Values [warps, 32, count]."""
        lanes = self.lanes(address, mask)
        if not lanes.which.size:
            return
        values = values.reshape(32 * self.warps, -1)[lanes.which]
        if space == "shared":
            self.launch.shared.store(self, lanes, values)
            return
        memory, known = self.launch.memory, self.launch.memory.order
        memory.store(self, lanes, values, order != "")
        if order == "release" or (order == "relaxed" and self.launch.fences):
            tell = known.release if order == "release" else known.write
            for thread in zip(*lanes.threads(), lanes.address.tolist(), strict=True):
                tell(*thread, pending=True)
            known.time += 1

    def vector(self, slots: list[int], width: int) -> np.ndarray:
        """Registers side by side, [warps, 32, registers]."""
        found = [np.broadcast_to(self.frame[i].astype(UNSIGNED[width], copy=False), (self.warps, 32)) for i in slots]
        return np.stack(found, -1)

    def atomic(self, space, address, values, step, mask, order) -> np.ndarray:
        """Operands [warps, 32, count], each of their elements for itself -> what was there before, as many."""
        lanes, (*_, count), width = self.lanes(address, mask), values[0].shape, values[0].itemsize
        which = lanes.which
        if (odd := lanes.address % (count * width) != 0).any():
            self.fail_at(f"a misaligned atomic of {count * width} bytes", which[odd])
        change = step([v.reshape(-1, count)[which].ravel() for v in values])
        lanes = lanes.elements(width, count)
        if space == "shared":
            found = self.launch.shared.atomic(self, lanes, width, change)
        else:
            found = self.launch.memory.atomic(self, lanes, width, change, order)
        old = np.zeros((32 * self.warps, count), UNSIGNED[width])
        old[which] = found.reshape(-1, count)
        return old.reshape(self.warps, 32, count)

    def fence(self, mask: np.ndarray | None, acquires: bool, releases: bool) -> None:
        """Strong accesses before acquire, strong ones behind release, and what was stored becomes visible (`show`)."""
        order = self.launch.memory.order
        for thread in zip(*self.lanes(np.zeros((self.warps, 32), np.int64), mask).threads(), strict=True):
            if acquires:
                order.fence_reads(*thread)
            if releases:
                order.fence_writes(*thread)
        if releases:
            order.time += 1
            self.show(mask)

    def show(self, mask: np.ndarray | None) -> None:
        """What these threads have stored, and what barriers ordered before, becomes visible."""
        self.launch.memory.fence(self.lanes(np.zeros((self.warps, 32), np.int64), mask), self.random)

    def fence_proxy(self, mask: np.ndarray | None) -> None:
        """What these threads have written to shared memory, and what barriers ordered before, products may read."""
        self.launch.shared.fence_proxy(self.lanes(np.zeros((self.warps, 32), np.int64), mask))

    def warp_barrier(self) -> None:
        """What the lanes of these warps did before is ordered before what they do next."""
        self.launch.warp_barriers[self.rows] += 1
        self._lanes = None

    def outside(self, address: np.ndarray, mask: np.ndarray | None) -> int:
        """How many addresses are of no allocation."""
        at = self.lanes(address, mask).address
        segments = self.launch.memory.segments
        ends = np.array([0, *(s.base + s.size for s in segments)])
        number = at >> 40
        known = (number >= 1) & (number <= len(segments))
        return int((~known | (at >= ends[np.where(known, number, 0)])).sum())

    def begin_copy(self, address, values, mask) -> None:
        """An asynchronous copy to shared memory."""
        lanes = self.lanes(address, mask)
        values = values.reshape(32 * self.warps, -1)[lanes.which]
        self.launch.shared.store(self, lanes, values, in_flight=True)
        size = values.itemsize * values.shape[1]
        for i, row in enumerate(self.rows.tolist()):
            mine = lanes.which // 32 == i
            groups = self.launch.copies.setdefault(row, [[]])
            groups[-1].append((lanes.which[mine] % 32, lanes.address[mine], size))

    def commit_copies(self, mask) -> None:
        """The copies since the last group are a group."""
        for row in self.rows.tolist():
            self.launch.copies.setdefault(row, [[]]).append([])

    def wait_for_copies(self, left: int, mask) -> None:
        """Until all groups but the latest `left` have arrived."""
        for i, row in enumerate(self.rows.tolist()):
            groups = self.launch.copies.get(row, [[]])
            while len(groups) - 1 > left:
                for lane, address, size in groups.pop(0):
                    everywhere = np.zeros((self.warps, 32), np.int64)
                    mine = np.zeros((self.warps, 32), bool)
                    everywhere[i, lane], mine[i, lane] = address, True
                    self.launch.shared.land(self.lanes(everywhere, mine), size)

    def fence_products(self) -> None:
        """Accesses of registers before are ordered before products behind."""
        for row in self.rows.tolist():
            self.launch.products.setdefault(row, Outstanding()).used = {}

    def begin_product(self, accumulators: list[int], a: list[int], shape: str, addresses: list[np.ndarray]) -> None:
        """A product of four warps is on its way, with registers of each of these warps, and 16 bytes of shared memory
        at each of the addresses [warps, 32].
        """
        launch = self.launch
        for i, row in enumerate(self.rows.tolist()):
            known = launch.products.setdefault(row, Outstanding())
            if known.unfenced(accumulators, a, shape):
                self.fail_at(
                    "a product of four warps with no wgmma.fence since its registers were used", 32 * i + LANES
                )
            known.used |= dict.fromkeys(accumulators, shape)
            mine = np.unique(np.concatenate([address[i] for address in addresses]))
            places = launch.shared.hold(self, mine, int(launch.program[row]), 32 * i + LANES)
            known.groups[-1].append((frozenset((*accumulators, *a)), places))

    def commit_products(self) -> None:
        """The products since the last group are a group."""
        for row in self.rows.tolist():
            self.launch.products.setdefault(row, Outstanding()).groups.append([])

    def wait_for_products(self, left: int) -> None:
        """Until all groups but the latest `left` are over."""
        for row in self.rows.tolist():
            for places in self.launch.products.get(row, Outstanding()).wait(left):
                self.launch.shared.let_go(places)

    def _leave_alone(self, x, mask: np.ndarray | None) -> None:
        """Fault where an instruction touches a register of a product that is on its way."""
        for i, row in enumerate(self.rows.tolist()):
            known = self.launch.products.get(row)
            if known is None or not (mask is None or mask[i].any()):
                continue
            if not known.registers().isdisjoint(x.touches):
                self.fail_at("a register of a product that was not waited for", 32 * i + LANES)
            if known.used is not None:
                known.used |= dict.fromkeys(x.touches, "")
