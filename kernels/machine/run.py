"""`Run`: some warps that step together, from one place to their next stop.

That is, as often as not, an access of global memory that others can notice; a barrier that waits for others; a branch
where they part. Lanes of a warp may part, too. Then each has a place of its own, those at one place go on to the next
branch or label, mostly the ones that are furthest behind, and what a whole warp does waits until all lanes are there.
"""

import numpy as np

from .decode import ACT, BARRIER, BRANCH, EXIT, VALUE
from .services import LANES, Services
from .shadow import Lanes

READY, WAITING, DONE = range(3)
NOWHERE = 1 << 30  # the place of a lane that has ended


class Run(Services):
    """Some warps (`rows`) on their way from one place to the next stop.

    frame: registers as far as they are known, each broadcasting to [warps, 32]; those that were written go back to the
    launch when the run ends, if anything reads them later.
    """

    def __init__(self, launch, rows: np.ndarray):
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
                if x.careful:
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
        for slot in x.hollow:
            lanes = self.active if slot == x.guard else mask
            if lanes is None or lanes.any():
                self.fail(f"{self._name(slot)} is read, and nothing has written it", lanes)
        for slot in x.doubts:
            odd = np.ones((self.warps, 32), bool) if slot not in written else ~written[slot][self.rows]
            lanes = self.active if slot == x.guard else mask
            if x.unless >= 0 and slot in x.junk:
                odd = odd & self.frame[x.unless]
            if (odd if lanes is None else odd & lanes).any():
                who = odd if lanes is None else odd & lanes
                self.fail(f"{self._name(slot)} is read, and nothing has written it", who)
        for slot in x.settles:
            known = written.setdefault(slot, np.zeros((self.launch.status.size, 32), bool))
            known[self.rows] |= True if self.active is None else self.active

    def _name(self, slot: int) -> str:
        """A register, for messages."""
        return list(self.code.kernel.registers)[slot]

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
            self.fail_at(
                f"no end after {launch.schedule.budget} instructions of a warp (budget)", 32 * np.flatnonzero(over)[:1]
            )

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
        launch.ordered[released] = launch.memory.version
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
