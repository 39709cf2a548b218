"""What instructions ask of the warps that execute them (`Run`): memory, fences, copies, products, faults."""

import numpy as np

from .parse import Fault
from .races import reach_of
from .segment import FIRST, SEGMENT
from .shadow import Lanes
from .values import UNSIGNED
from .warpgroup import Meeting, Outstanding

LANES = np.arange(32)


class Services:
    """The part of a `Run` that instructions see, beside its frame; `Run` says what else it has."""

    def fail(self, text: str, mask: np.ndarray | None) -> None:
        """Raise a Fault of the lanes of a mask."""
        self.fail_at(text, np.arange(32 * self.warps) if mask is None else np.flatnonzero(mask))

    def fail_at(self, text: str, which: np.ndarray, other: tuple[int, int, int] | None = None) -> None:
        """Raise a Fault of these lanes, 32 * row + lane; it tells of those of the first warp. other: `Recent.find`."""
        row = int(which[0]) // 32
        lanes = np.unique(which[which // 32 == row] % 32)
        raise Fault(self.launch.message(text, int(self.rows[row]), lanes, self.at, other))

    def fail_beside(self, text, memory, lanes: Lanes, places, odd, wrote: bool, foreign: bool | None = False) -> None:
        """Raise one of the lanes at odds, [lanes, grains], at places of a memory, with what another thread, or one of
        another program (foreign), or anybody (None) wrote or read there.
        """
        lane, grain = np.argwhere(np.broadcast_to(odd, places.shape))[0]
        who = int(lanes.program[lane]), int(lanes.fine[lane]) & 1023
        other = self.launch.recent.find(memory, memory.grain, int(places[lane, grain]), who, wrote, foreign)
        self.fail_at(text, lanes.which[odd.any(1)], other)

    def note(self, memory, lanes: Lanes, offset: np.ndarray, size: int, writes: bool) -> None:
        """Remember an access, for that."""
        self.launch.recent.note(memory, self.at, writes, lanes, offset, size)

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

    def ask(self, address: np.ndarray, mask: np.ndarray | None) -> None:
        """Remember what these warps asked memory for, should they wait without end."""
        rows = self.rows
        if mask is not None:  # of warps that run together some may have no lane in it, and ask nothing
            some = mask.any(1)
            rows, address = rows[some], np.where(mask, address, -1)[some]
        self.launch.asked[rows], self.launch.asked_for[rows] = self.at, address

    def load(self, space, address, width, count, mask, order="") -> np.ndarray:
        """-> [warps, 32, count]; zeros in lanes outside of the mask. order: `access.order_of`."""
        lanes = self.lanes(address, mask)
        if not lanes.which.size:
            return np.zeros((self.warps, 32, count), UNSIGNED[width])
        launch = self.launch
        if space != "global":
            values = (launch.shared if space == "shared" else launch.local).load(self, lanes, width, count)
        else:
            values = launch.memory.load(self, lanes, width, count, order)
            known = launch.memory.order
            if order == "acquire" or (order == "relaxed" and launch.fences and known.released):
                learn = known.acquire if order == "acquire" else known.read
                behind = launch.memory.behind  # who found an older value acquires nothing of the latest
                for which, *thread in zip(lanes.which.tolist(), *lanes.threads(), lanes.address.tolist(), strict=True):
                    if which not in behind:
                        learn(*thread)
            if order == "acquire":
                launch.ordered[self.rows] = launch.memory.version
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
        if space != "global":
            (self.launch.shared if space == "shared" else self.launch.local).store(self, lanes, values)
            return
        memory, known = self.launch.memory, self.launch.memory.order
        memory.store(self, lanes, values, reach_of(order))
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
            if order in ("acquire", "acq_rel"):
                self.launch.ordered[self.rows] = self.launch.memory.version
        old = np.zeros((32 * self.warps, count), UNSIGNED[width])
        old[which] = found.reshape(-1, count)
        return old.reshape(self.warps, 32, count)

    def fence(self, mask: np.ndarray | None, acquires: bool, releases: bool, sequential: bool) -> None:
        """Strong accesses before acquire, strong ones behind release, and what was stored becomes visible (`show`);
        sequential: to all that is behind another such fence.
        """
        order = self.launch.memory.order
        for thread in zip(*self.lanes(np.zeros((self.warps, 32), np.int64), mask).threads(), strict=True):
            if acquires:
                order.fence_reads(*thread)
            if releases:
                order.fence_writes(*thread)
        if releases:
            order.time += 1
            self.show(mask)
        self.launch.ordered[self.rows] = self.launch.memory.version
        if sequential:
            self.launch.sequential[self.rows] = self.launch.memory.version

    def show(self, mask: np.ndarray | None) -> None:
        """What these threads have stored, and what barriers ordered before, becomes visible."""
        self.launch.memory.fence(self.lanes(np.zeros((self.warps, 32), np.int64), mask), self.random)

    def share(self, mask: np.ndarray | None) -> None:
        """What these threads have stored becomes visible in their programs."""
        self.launch.memory.share(self.lanes(np.zeros((self.warps, 32), np.int64), mask))

    def fence_own(self, mask: np.ndarray | None, acquires: bool, releases: bool) -> None:
        """A fence in scope `cta`."""
        if releases:
            self.share(mask)
        if acquires:
            self.launch.ordered[self.rows] = self.launch.memory.version

    def release(self, mask: np.ndarray | None, order: str) -> None:
        """The same before an access that releases, for whom it does."""
        (self.share if order == "cta" else self.show)(mask)

    def fence_proxy(self, mask: np.ndarray | None) -> None:
        """What these threads have written to shared memory, and what barriers ordered before, products may read."""
        self.launch.shared.fence_proxy(self.lanes(np.zeros((self.warps, 32), np.int64), mask))

    def warp_barrier(self) -> None:
        """What the lanes of these warps did before is ordered before what they do next."""
        self.launch.warp_barriers[self.rows] += 1
        self.launch.ordered[self.rows] = self.launch.memory.version
        self._lanes = None

    def outside(self, address: np.ndarray, mask: np.ndarray | None) -> int:
        """How many addresses are of no allocation."""
        at = self.lanes(address, mask).address
        segments = self.launch.memory.segments
        ends = np.array([s.base + s.size for s in segments])
        number = (at >> SEGMENT) - FIRST
        known = (number >= 0) & (number < len(segments))
        return int((~known | (at >= ends[np.where(known, number, 0)])).sum())

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
            self._meet(launch.meetings.setdefault(row - row % launch.warps % 4, Meeting()), row, 32 * i + LANES)
            mine = np.unique(np.concatenate([address[i] for address in addresses]))
            places = launch.shared.hold(self, mine, int(launch.program[row]), 32 * i + LANES)
            known.groups[-1].append((frozenset((*accumulators, *a)), places))

    def _meet(self, meeting: Meeting, row: int, which: np.ndarray) -> None:
        """A warp comes to a product of four."""
        launch, warp = self.launch, row % self.launch.warps
        other = meeting.come(warp % 4, (self.at, int(launch.barriers[launch.program[row]])))
        if other is not None:
            there = warp - warp % 4 + other
            self.fail_at(f"a product of four warps, while warp {there} came to another one, or behind a barrier", which)

    def commit_products(self) -> None:
        """The products since the last group are a group."""
        for row in self.rows.tolist():
            self.launch.products.setdefault(row, Outstanding()).groups.append([])

    def wait_for_products(self, left: int) -> None:
        """Until all groups but the latest `left` are over."""
        for row in self.rows.tolist():
            for places in self.launch.products.get(row, Outstanding()).wait(left):
                self.launch.shared.let_go(places)
