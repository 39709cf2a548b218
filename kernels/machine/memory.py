"""Global memory as PTX's model allows it to be. (PTX ISA 8)

What a thread stores is seen by itself at once, by others of its program behind a barrier, or when the first of them
happens to see it; by other programs late, element by element, in any order (`commit` makes some of it visible). An
aligned element is never torn, a vector is. A fence, or a release, of a thread makes visible what it has stored itself,
and what a barrier ordered before: no more of its program. In scope `cta` it does so for its program alone.
"""

from collections.abc import Callable

import numpy as np

from . import early, reserved
from .early import SEEN, UNSEEN
from .order import Order
from .parse import Fault
from .races import Races, reach_of
from .segment import FIRST, SEGMENT, Segment, base_of, from_host
from .shadow import VECTOR, Lanes, check_lost, elements_of
from .values import SIGNED, UNSIGNED


class GlobalMemory:
    """All allocations of a launch."""

    def __init__(self, grain: int, programs: int, races: bool):
        self.grain, self.programs = grain, programs
        self.segments: list[Segment] = []
        self.order = Order(programs)
        self.races = Races(self.order) if races else None
        # segment, offsets, width, who stored, which of these each offset is of, whether a part is visible
        self.pending: list[tuple] = []
        self.version = 0  # counts what became visible
        self.behind: set[int] = set()  # lanes of the load in hand that found what was there before the latest store
        if programs >= 1 << (8 * grain - 1):
            raise Fault(f"{programs} programs are too many for a kernel that stores {grain} bytes")

    def add(self, data: np.ndarray, name: str) -> Segment:
        """An allocation."""
        self.segments.append(Segment(base_of(len(self.segments)), data, name, self.grain))
        return self.segments[-1]

    def place(self, address: int) -> str:
        """An address that was accessed, for messages."""
        if address >> SEGMENT < FIRST:
            address = int(from_host(self.segments, np.array([address]))[0])
        segment = self.segments[(address >> SEGMENT) - FIRST]
        return f"{segment.name}, byte {address - segment.base} of {segment.size}"

    def parts(self, run, lanes: Lanes, size: int, what: str):
        """(segment, its lanes, offsets, which of all lanes) for each segment that is touched."""
        at = lanes.address
        if (at % size).any():
            run.fail_at(f"a misaligned {what} of {size} bytes", lanes.which[at % size != 0])
        number = (at >> SEGMENT) - FIRST
        least = int(number.min())
        if least < 0 and self.segments:  # pointers that memory holds are those of the host
            at = lanes.address = from_host(self.segments, at)
            number = (at >> SEGMENT) - FIRST
            least = int(number.min())
        one = least == number.max()
        for n in [least] if one else np.unique(number).tolist():
            here = slice(None) if one else number == n
            if not 0 <= n < len(self.segments):
                hint = " (`tensors` of on_machine: what memory points to)" if -FIRST < n < 0 else ""
                run.fail_at(f"a {what} outside of all allocations, at {int(at[here][0]):#x}{hint}", lanes.which[here])
            segment = self.segments[n]
            offset = at[here] - segment.base
            outside = offset + size > segment.size
            if outside.any():
                run.fail_at(
                    f"a {what} outside of {segment.name}, at byte {offset[outside][0]} of {segment.size}",
                    lanes.which[here][outside],
                )
            yield segment, lanes if one else lanes.some(here), offset, here

    def load(self, run, lanes: Lanes, width: int, count: int, order: str) -> np.ndarray:
        """-> [lanes, count]. order: `access.order_of`."""
        size, reach = width * count, reach_of(order)
        out, self.behind = np.empty((lanes.address.size, count), UNSIGNED[width]), set()
        for segment, some, offset, here in self.parts(run, lanes, size, "load"):
            raw = segment.view(size)[offset // size]
            if segment.shadow is not None:
                if self.races is not None and reach < 2:
                    places = segment.shadow.places(offset, size)
                    if order == "constant":
                        reserved.load_constant(run, segment, some, places)
                    self.races.check_load(run, segment, *segment.judged(some, places), reach)
                    run.note(segment, some, offset, size, False)
                if self.races is not None and reach == 2:
                    raw = early.load(self, run, segment, some, offset, size, raw)
                if self.pending:
                    raw = self._own(run, segment, some, offset, size, raw, reach)
            out[here] = elements_of(raw, width, count)
        return out

    def _own(self, run, segment: Segment, lanes: Lanes, offset, size: int, raw, reach: int) -> np.ndarray:
        """What a program has stored itself it sees, visible or not; but strong loads may miss what another thread has
        stored, with no barrier since, that nobody else of the program has seen.
        """
        owner = segment.owner
        if size < segment.grain:  # a part of what is stored at once
            late = segment.late.view(VECTOR[size])[offset // size]
            return np.where(abs(owner[offset // segment.grain]) == lanes.program, late, raw)
        grain = SIGNED[segment.grain]
        owners = elements_of(owner.view(VECTOR[size])[offset // size], segment.grain, size // segment.grain).view(grain)
        program = lanes.program[:, None].astype(grain)
        mine = abs(owners) == program
        if not mine.any():
            return raw
        if reach and (unseen := owners == program).any():
            places = segment.shadow.places(offset, size)
            unseen &= segment.shadow.writers_at_odds(places, lanes)[1]
            if unseen.any():
                if run.random.random() < run.launch.schedule.early:
                    mine &= ~unseen
                else:
                    owner[places[unseen]] = -np.broadcast_to(program, places.shape)[unseen]
        late = elements_of(segment.late.view(VECTOR[size])[offset // size], segment.grain, size // segment.grain)
        found = np.where(mine, late, elements_of(raw, segment.grain, size // segment.grain))
        return np.ascontiguousarray(found).view(VECTOR[size])[:, 0]

    def store(self, run, lanes: Lanes, values: np.ndarray, reach: int) -> None:
        """Values [lanes, count] -> pending."""
        count, width = values.shape[1], values.itemsize
        size = width * count
        for segment, some, offset, here in self.parts(run, lanes, size, "store"):
            self.prepare(run, segment, some)
            places = segment.shadow.places(offset, size)
            lost = None
            if self.races is not None:
                reserved.check_write(run, segment, some, places, "a store to")
                self.races.check_store(run, segment, *segment.judged(some, places), "a store to", reach)
                run.note(segment, some, offset, size, True)
                lost = self.races.note_store(run, segment, some, places, reach)
            data, late = segment.view(size), segment.late.view(VECTOR[size])
            at = offset // size
            if segment.owner[places].any():  # stores to one place keep their order
                before = elements_of(late[at], segment.grain, places.shape[1])
                waiting = segment.owner[places] != 0
                now = np.where(waiting, before, elements_of(data[at], segment.grain, places.shape[1]))
                data[at] = np.ascontiguousarray(now).view(VECTOR[size])[:, 0]
                self.order.land(some.address[waiting.any(1)])
                segment.replaced[places] = 0
            late[at] = np.ascontiguousarray(values[here]).view(VECTOR[size])[:, 0]
            segment.owner[places] = some.program[:, None]
            segment.note_maker(some, places, self.order.time)
            if lost is not None and reach < 1:
                there = elements_of(late[at], width, count)
                check_lost(run, some, lost, segment.shadow.written[places], values[here], there, segment.name)
            elements = offset[:, None] + width * np.arange(count)
            of = np.repeat(np.arange(offset.size), count)
            self.pending.append((segment, elements.ravel() // width, width, some, of, False))

    def hold(self, run, lanes: Lanes, size: int) -> bool:
        """An asynchronous copy reads so many bytes at these lanes' addresses -> whether it must `let_go` of some."""
        if self.races is None or not lanes.which.size or not any(segment.shadow for segment in self.segments):
            return False
        held = False
        for segment, _, offset, _ in self.parts(run, lanes, size, "copy"):
            if segment.shadow is not None:
                reserved.hold(segment, segment.shadow.places(offset, size))
                held = True
        return held

    def let_go(self, run, lanes: Lanes, size: int) -> None:
        """The copy has been waited for: until now it counts as a load."""
        for segment, some, offset, _ in self.parts(run, lanes, size, "copy"):
            if segment.shadow is not None:
                places = segment.shadow.places(offset, size)
                reserved.let_go(segment, places)
                self.races.check_load(run, segment, *segment.judged(some, places), 0)

    def prepare(self, run, segment: Segment, lanes: Lanes) -> None:
        """Before anything is written to a segment."""
        if not segment.writable:
            run.fail_at(f"a store to {segment.name}, which no address of this kernel's stores is made of", lanes.which)

    def commit(self, chance: np.ndarray, random) -> None:
        """Make each element that is pending visible with the chance of its program ([programs + 1])."""
        self._show(lambda lanes: chance[lanes.program], random)

    def share(self, lanes: Lanes) -> None:
        """Make what the threads of these lanes have stored visible in their programs."""
        for segment, at, width, by, of, _ in self.pending:
            covered = np.isin(by.program << 10 | by.fine & 1023, lanes.program << 10 | lanes.fine & 1023)[of]
            places = segment.shadow.places(at[covered] * width, width)
            segment.owner[places] = -abs(segment.owner[places])

    def fence(self, lanes: Lanes, random) -> None:
        """Make visible what the threads of these lanes have stored, and what barriers ordered before."""
        thread = lanes.fine & 1023
        barriers = np.zeros(self.programs + 1, np.int64)
        warps, threads = np.zeros((barriers.size, 32), np.int64), np.zeros((barriers.size, 1024), bool)
        barriers[lanes.program], warps[lanes.program, thread >> 5] = lanes.fine >> 30, lanes.fine >> 10
        threads[lanes.program, thread] = True

        def covered(lanes: Lanes) -> np.ndarray:
            program, fine, thread = lanes.program, lanes.fine, lanes.fine & 1023
            before = (fine >> 30 < barriers[program]) | (fine >> 10 < warps[program, thread >> 5])
            return (before | threads[program, thread]).astype(float)

        self._show(covered, random)

    def _show(self, chance_of: Callable[[Lanes], np.ndarray], random) -> None:
        """Make each element that is pending visible with the chance of the lane that stored it."""
        kept = []
        for segment, at, width, lanes, of, rest in self.pending:
            chance = chance_of(lanes)[of]
            now = random.random(at.size) < chance
            if rest and at.size <= 16 and now.any():  # the last of them together: a launch has thousands of such rests
                now = chance > 0
            if now.any():
                self.version += 1
                self._land(segment, at[now], width)
            if not now.all():
                left = ~now
                kept.append((segment, at[left], width, lanes, of[left], True))
        self.pending = kept

    def _land(self, segment: Segment, at: np.ndarray, width: int) -> None:
        places = segment.shadow.places(at * width, width)
        mine = segment.owner[places] != 0  # what has landed with a later store to the same place is over
        places, grain = places[mine], VECTOR[segment.grain]
        data, late = segment.view(segment.grain), segment.late.view(grain)
        if segment.polled:
            segment.before.view(grain)[places] = data[places]
            segment.landed[places] = self.version
            owner = segment.owner[places]
            latest = segment.maker[places] == abs(owner)  # no atomic has come before it meanwhile
            segment.replaced[places] = np.where(latest, np.where(owner > 0, UNSEEN, SEEN), 0)
        data[places] = late[places]
        self.order.land(segment.base + places * segment.grain)
        segment.owner[places] = 0

    def _land_before(self, run, segment: Segment, lanes: Lanes, places: np.ndarray, at: np.ndarray, width: int) -> None:
        """What is on its way to where atomics are has come; or it comes behind them, where nobody has seen it yet."""
        owner = segment.owner[places]
        unseen = ((owner > 0) & (owner != lanes.program[:, None])).all(1)
        if self.races is None or run.random.random() >= run.launch.schedule.early:
            unseen[:] = False
        if not unseen.all():
            self.version += 1
            self._land(segment, np.unique(at[~unseen]), width)

    def _order_atomic(self, order: str, thread: list[int], address: int) -> None:
        """What a thread gets to know by an atomic, and gives to know."""
        if order == "cta":
            return
        (self.order.acquire if order in ("acquire", "acq_rel") else self.order.read)(*thread, address)
        self.order.renew(address)
        (self.order.release if order in ("release", "acq_rel") else self.order.write)(*thread, address, pending=False)

    def atomic(self, run, lanes: Lanes, width: int, function, order: str) -> np.ndarray:
        """function(number of the lane, old) -> new for each lane in random order, on memory itself -> what was there
        before.
        """
        old, changed = np.zeros(lanes.address.size, UNSIGNED[width]), False
        numbers = run.random.permutation(old.size)
        lanes = lanes.some(numbers)
        for segment, some, offset, here in self.parts(run, lanes, width, "atomic"):
            self.prepare(run, segment, some)
            places = segment.shadow.places(offset, width)
            if segment.owner[places].any():
                self._land_before(run, segment, some, places, offset // width, width)
            may_miss = early.atomic(self, run, segment, some, places).tolist()
            data, before = segment.view(width), segment.before.view(UNSIGNED[width])
            seen, makers, unseen = np.ones(offset.size, bool), {}, {}  # by place: who made its value, and saw it alone
            each = numbers[here].tolist(), *some.threads(), some.address.tolist(), (offset // width).tolist()
            for i, (number, *thread, address, at) in enumerate(zip(*each, strict=True)):
                found = data[at]
                if may_miss[i] and at not in unseen and function(number, before[at]) == before[at]:
                    old[number], seen[i] = before[at], False
                    continue
                old[number], unseen[at] = found, None
                self._order_atomic(order, thread, address)
                data[at] = new = function(number, found)
                if new != found:
                    before[at], makers[at], unseen[at] = found, i, i
            segment.replaced[places[seen]] = 0
            if makers:
                changed, made = True, np.array([*makers.values()])
                segment.note_maker(some.some(made), places[made], self.order.time)
                alone = places[[i for i in unseen.values() if i is not None]]
                segment.replaced[alone], segment.landed[alone] = UNSEEN, self.version + 1
            if self.races is not None:
                reserved.check_write(run, segment, some, places, "an atomic on")
                self.races.check_store(run, segment, *segment.judged(some, places), "an atomic on", reach_of(order))
                run.note(segment, some, offset, width, True)
                self.races.note_store(run, segment, some, places, reach_of(order))
        self.order.time += 1
        self.version += bool(changed)  # one that leaves all as it is may be a poll
        return old
