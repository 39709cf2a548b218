"""`Machine`: a kernel that runs on a CPU against chance. `Launch`: one run of it.

Warps of a launch are rows, program after program. Those that stand at the same instruction step as one: a register is
an array [warps, 32], an instruction one operation of numpy. The schedule draws which programs may run, picks one place
among those where their warps stand, and lets all of them there go on, or only some, to their next stop (run.py). What a
program stores becomes visible a little at a time, between two such draws.
"""

import numpy as np

from .code import Code
from .copies import Group
from .decode import SPECIAL
from .local import LocalMemory
from .memory import GlobalMemory
from .parse import Fault
from .recent import Recent
from .run import DONE, NOWHERE, READY, WAITING, Run
from .schedule import Counts, Schedule
from .segment import Segment
from .services import LANES
from .shared import SharedMemory
from .values import UNSIGNED
from .warpgroup import Meeting, Outstanding


class Machine:
    """A kernel: its PTX, the warps of a program, and the bytes of shared memory that a program has."""

    def __init__(self, ptx: str, warps: int, shared: int):
        self.code, self.warps, self.shared = Code(ptx), warps, shared
        self._written, self._polled = self.code.reached("tells"), self.code.reached("asks")

    def run(self, grid, arguments, names=None, meant=(), schedule: Schedule | None = None, pointed=()) -> Counts:
        """Launch it on torch CPU tensors (in place) and numbers, in the order of its parameters; those missing at the
        end are 0.

        names: of the arguments, for messages. meant: (name, on which of its elements races are meant, or None).
        pointed: further tensors, to which memory has pointers.
        """
        grid = (*grid, 1, 1)[:3]
        if 0 in grid:  # nothing is launched, as by Triton
            return Counts()
        launch = Launch(self, grid, schedule or Schedule())
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
            segment.polled |= parameters[i] in self._polled
            if parameters[i] in self._written and segment.shadow is None:
                segment.prepare(launch.fine)
            for argument, elements in meant:
                if argument == name and elements is not None:
                    segment.excuse(offset, np.repeat(elements, value.element_size()))
            launch.arguments.append(segment.base + offset)
        launch.arguments += [0] * (len(parameters) - len(launch.arguments))
        for i, value in enumerate(pointed):
            data = _storage(value)
            if data.size and data.ctypes.data not in known:
                known[data.ctypes.data] = segment = launch.memory.add(data, f"tensors[{i}]")
                segment.polled = True
                segment.prepare(launch.fine)
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
        self.recent = Recent()
        self.memory = GlobalMemory(code.grain["global"], programs, schedule.races)
        for name, data in code.kernel.data.items():
            self.memory.add(np.frombuffer(data, np.uint8), name)
        self.local = LocalMemory(sum(max(code.kernel.local.values(), default=(0, 0))), 32 * rows)
        products = any(x.holds for x in code.code)
        self.shared = SharedMemory(machine.shared, programs, code.grain["shared"], self.fine, schedule.races, products)
        self.program = np.repeat(np.arange(programs), self.warps)
        self.thread = np.tile(32 * np.arange(self.warps), programs)[:, None] + LANES
        self.at, self.status = np.zeros(rows, np.int64), np.zeros(rows, np.int8)
        self.parted, self.lane_at = np.zeros(rows, bool), np.zeros((rows, 32), np.int64)
        # The version of memory when a warp last ordered its loads of what its own program stores; at its last fence.sc.
        self.ordered, self.sequential = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self.count, self.seen = np.zeros(rows, np.int64), np.full(rows, -1, np.int64)
        # The last instruction of each warp that asked memory for what others write, -1 none, and the lanes' addresses.
        self.asked, self.asked_for = np.full(rows, -1), np.full((rows, 32), -1, np.int64)
        self.barriers, self.warp_barriers = np.ones(programs, np.int64), np.zeros(rows, np.int64)
        self.arrived = np.zeros(programs, np.int64)
        self.registers: list[np.ndarray | None] = [None] * len(code.widths)
        self._junk: dict[int, np.ndarray] = {}
        self.written: dict[int, np.ndarray] = {}  # which lanes have, of registers that instructions doubt
        self._set_special()
        self.copies: dict[int, list[Group]] = {}  # row -> groups of asynchronous copies, the open one last
        self.products: dict[int, Outstanding] = {}  # row -> products that it has not waited for
        self.meetings: dict[int, Meeting] = {}  # the first row of four warps -> products that not all have come to
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
            before = self._news()
            polls, others = self.counts.polls, (self.counts.barriers, ready.size)
            Run(self, rows).go()
            if self.memory.pending:
                self.memory.commit(self.chance, self.random)
            if self.memory.pending or self._news() != before:
                idle = 0
            elif self.counts.polls > polls or (self.counts.barriers, int((self.status == READY).sum())) == others:
                idle += 1  # a barrier behind a poll is no news: the loop of a wait may have one
            if idle > self.schedule.patience:
                self._give_up()
        if (self.status == WAITING).any():
            row = int(np.flatnonzero(self.status == WAITING)[0])
            raise Fault(
                self.message("a barrier that some warps of the program never reach", row, None, int(self.at[row]) - 1)
            )
        for row, meeting in self.meetings.items():
            if (missing := meeting.missing()) is not None:
                warp, came, at = missing
                what = f"a product of four warps that warp {(row + warp) % self.warps} did not come to"
                raise Fault(self.message(what, row + came, None, at))
        self.memory.commit(np.ones(len(self.index) + 1), self.random)
        self.counts.most = int(self.count.max(initial=0))

    def _give_up(self) -> None:
        """Fault of a wait without end: of the warp that has come the least far, which others may wait for."""
        ready = np.flatnonzero(self.status == READY)
        asked = np.flatnonzero((self.status != DONE) & (self.asked >= 0))  # at a barrier, too, in the loop of a wait
        asking = here if (here := asked[self.status[asked] == READY]).size else asked
        row = int((some := asking if asking.size else ready)[np.argmin(self.count[some])])
        what = f"all warps wait for what nobody writes any more (patience={self.schedule.patience})"
        if not asking.size:
            raise Fault(self.message(what, row, None, int(self.at[row])))
        lanes = np.flatnonzero(self.asked_for[row] >= 0)
        place = self.memory.place(int(self.asked_for[row, lanes[0]]))
        raise Fault(self.message(f"{what}: this one for {place}", row, lanes, int(self.asked[row])))

    def _news(self) -> tuple[int, int, int]:
        """What changes while anything goes on but waits."""
        return self.memory.version, self.shared.changes, int((self.status == DONE).sum())

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

    def message(self, text: str, row: int, lanes, at: int, other: tuple[int, int, int] | None = None) -> str:
        """Text of a Fault: where it happened, what the other one did (`Recent.find`), and how to see it again."""
        s = self.code.code[min(at, len(self.code.code) - 1)].statement
        program, warp = self.index[self.program[row]], row % self.warps
        where = f"program {program}, warp {warp}"
        if lanes is not None:
            where += f", lane{'s' if len(lanes) > 1 else ''} {_ranges(lanes)}"
        text = f"{text}\n  {where}: {s.text}{s.origin}"
        if other is not None:
            program, thread, at = other
            s = self.code.code[at].statement
            where = f"program {self.index[program - 1]}, warp {thread // 32}, lane {thread % 32}"
            text += f"\n  the other one: {where}: {s.text}{s.origin}"
        return f"{text}\n  kernel {self.code.kernel.name}, {self.schedule}"


def _ranges(numbers: np.ndarray) -> str:
    """0, 1, 2, 7 -> "0-2, 7"."""
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts if len(p))
