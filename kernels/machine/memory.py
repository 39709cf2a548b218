"""Memory as PTX's model allows it to be (PTX ISA 8), and what checks each access.

Global memory. What a program stores is seen by itself at once, by others late, element by element, in any order
(`commit` makes some of it visible); an aligned element is never torn, a vector is. A fence, or a release, of a thread
makes visible what it has stored itself, and what a barrier ordered before: no more of its program. A weak load (plain,
`.ca`, `.cg`, `.nc`) of what another program writes in the launch is a fault, whichever comes first: it may be served
from a cache for ever. A strong one (volatile, relaxed, acquire) is not. Threads that hand data on by release and
acquire are known (`Order`), and what is ordered so may be loaded plainly.

Within a program. Two threads may touch the same bytes, one of them writing, only with a barrier between them:
`bar.sync` for threads of different warps, that or `bar.warp.sync` for lanes of one warp. Shared memory must be written
before it is read.

How it is found out: beside each memory lie shadows, one number for each `grain` of bytes, that say who wrote and who
read there last. A thread is known by its key, `barriers * 1024 + thread`, barriers of its program so far: a key from
before the last barrier is smaller than any from after it. Of many readers the first and the last thread are enough,
because a writer is at odds with one of them if with any; where warps have barriers of their own, the two that read last
of all are kept besides.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .parse import Fault
from .values import SIGNED, UNSIGNED

SEGMENT = 40  # bits of an address within an allocation
VECTOR = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16", 32: "V32"}  # types that move so many bytes at once
MANY = 1 << 30  # in place of a program's number: several
IN_FLIGHT = (1 << 31) - 1  # in place of a key: an asynchronous copy that nobody has waited for


@dataclass
class Lanes:
    """The lanes that execute an access, side by side."""

    which: np.ndarray  # their numbers, 32 * row of the run + lane
    address: np.ndarray
    program: np.ndarray  # 1, 2, ...
    key: np.ndarray  # int32, barriers of the program * 1024 + thread
    fine: np.ndarray  # int64, barriers << 30 | barriers of the warp << 10 | thread

    def threads(self) -> tuple[list[int], list[int]]:
        """Their programs and fine keys."""
        return self.program.tolist(), self.fine.tolist()

    def some(self, chosen: np.ndarray) -> "Lanes":
        """A part of them."""
        return Lanes(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    def elements(self, width: int, count: int) -> "Lanes":
        """One for each element of their vectors."""
        each = self.some(np.repeat(np.arange(self.which.size), count))
        each.address = each.address + width * np.tile(np.arange(count), self.which.size)
        return each


class Shadow:
    """Who wrote and who read each grain of memory last. 0: nobody.

    fine: whether a kernel has bar.warp.sync; the arrays that know of it are not kept for nothing.
    """

    def __init__(self, size: int, grain: int, fine: bool):
        self.grain, self.fine = grain, fine
        count = -(-size // grain)
        self.written, self.last, self.first = (np.zeros(count, np.int32) for _ in range(3))
        if fine:
            self.written_fine, self.last_fine, self.first_fine = (np.zeros(count, np.int64) for _ in range(3))

    def places(self, offset: np.ndarray, size: int) -> np.ndarray:
        """[lanes, grains of an access]."""
        first = offset // self.grain
        count = max(1, size // self.grain)
        return first[:, None] if count == 1 else first[:, None] + np.arange(count)

    @staticmethod
    def _late(keys: np.ndarray, lanes: Lanes) -> np.ndarray:
        """Which keys are of another thread, and since the last barrier of the program."""
        key = lanes.key[:, None]
        return (keys >= (key & ~np.int32(1023))) & ((keys ^ key) & 1023 != 0)

    @staticmethod
    def _late_in_warp(fine: np.ndarray, lanes: Lanes) -> np.ndarray:
        """Which fine keys are of another lane of the warp, and since its last barrier."""
        key = lanes.fine[:, None]
        return (fine >= (key & ~np.int64(1023))) & ((fine ^ key) & 1023 != 0) & ((fine ^ key) & 0x3E0 == 0)

    def writers_at_odds(self, places: np.ndarray, lanes: Lanes) -> tuple[np.ndarray, np.ndarray]:
        """Who wrote the places last, and where that is another thread that no barrier separates from the lane."""
        keys = self.written[places]
        odd = self._late(keys, lanes)
        if self.fine and odd.any():
            other_warp = (keys ^ lanes.key[:, None]) & 0x3E0 != 0
            odd &= other_warp | self._late_in_warp(self.written_fine[places], lanes)
        return keys, odd

    def last_writer(self, places: np.ndarray) -> np.ndarray:
        """Fine keys."""
        return self.written_fine[places] if self.fine else _fine(self.written[places])

    def last_readers(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fine keys of the last one, and of the first one since the same barrier."""
        last = self.last_fine[places] if self.fine else _fine(self.last[places])
        latest = _fine(self.last[places])  # the last of all threads since the last barrier of all
        return np.where((latest ^ last) & 0x3E0 == 0, last, latest), _fine(self.first[places] ^ 1023)

    def readers_at_odds(self, places: np.ndarray, lanes: Lanes) -> np.ndarray:
        """Which places another thread has read that no barrier separates from the lane."""
        last, first = self.last[places], self.first[places] ^ 1023
        odd_last, odd_first = self._late(last, lanes), self._late(first, lanes)
        if self.fine and (odd_last.any() or odd_first.any()):
            key = lanes.key[:, None]
            odd_last &= (last ^ key) & 0x3E0 != 0
            odd_first &= (first ^ key) & 0x3E0 != 0
            for fine in (self.last_fine[places], self.first_fine[places] ^ 1023):
                odd_last |= self._late_in_warp(fine, lanes)
        return odd_last | odd_first

    def note_read(self, places: np.ndarray, lanes: Lanes) -> None:
        """Keep the first and the last reader."""
        arrays = [(self.last, self.first, lanes.key)]
        if self.fine:
            arrays.append((self.last_fine, self.first_fine, lanes.fine))
        at = places.ravel()
        for last, first, keys in arrays:  # of equal places in one assignment the last one stays
            key = np.broadcast_to(keys[:, None], places.shape).ravel()
            last[at] = np.maximum(last[at], key)
            back, mirrored = at[::-1], (key ^ 1023)[::-1]
            first[back] = np.maximum(first[back], mirrored)

    def note_write(self, places: np.ndarray, lanes: Lanes) -> np.ndarray | None:
        """Keep the writer -> which lanes of this very store lost a place to another one; None: none did."""
        self.written[places] = lanes.key[:, None]
        if self.fine:
            self.written_fine[places] = lanes.fine[:, None]
        lost = self.written[places] != lanes.key[:, None]
        return lost if lost.any() else None


def _fine(keys: np.ndarray) -> np.ndarray:
    """Keys as fine ones, before any barrier of a warp."""
    keys = keys.astype(np.int64)
    return keys >> 10 << 30 | keys & 1023


class SharedMemory:
    """The shared memory of all programs, side by side."""

    def __init__(self, size: int, programs: int, grain: int, fine: bool, races: bool, products: bool):
        self.size, self.races = size, races
        self.room = -(-size // 16) * 16
        self.data = np.zeros(self.room * programs, np.uint8)
        self.shadow = Shadow(self.room * programs, grain, fine) if races else None
        self.atomics: Shadow | None = None  # whose atomics, as readers, once there was one
        # Where products of four warps must not read yet, in a kernel that has some.
        self.unfenced = np.zeros(self.shadow.written.size, bool) if races and products else None
        self.held: np.ndarray | None = None  # how many products on their way read each grain, once there was one

    def hold(self, run, address: np.ndarray, program: int, which: np.ndarray) -> np.ndarray:
        """16 bytes at each address of a program are being read by a product of these lanes -> their places, for
        `let_go`.
        """
        if not self.races:
            return np.zeros(0, np.int64)
        if self.held is None:
            self.held = np.zeros(self.shadow.written.size, np.int32)
        places = self.shadow.places(address + program * self.room, 16).ravel()
        if self.unfenced is not None and self.unfenced[places].any():
            run.fail_at("a product reads shared memory that was written with no fence.proxy.async since", which)
        self.held[places] += 1
        return places

    def fence_proxy(self, lanes: Lanes) -> None:
        """What these threads have written, and what barriers ordered before, products may read."""
        if self.unfenced is None:
            return
        written, each = self.shadow.written, self.room // self.shadow.grain
        for program in np.unique(lanes.program).tolist():
            keys = lanes.key[lanes.program == program]
            part = slice((program - 1) * each, program * each)
            ordered = written[part] < (keys[0] & ~np.int32(1023))
            own = np.isin(written[part] & 1023, keys & 1023) & (written[part] != IN_FLIGHT)
            self.unfenced[part] &= ~(ordered | own)

    def let_go(self, places: np.ndarray) -> None:
        """They have been read."""
        if places.size:
            self.held[places] -= 1

    def _offset(self, run, lanes: Lanes, size: int, what: str) -> np.ndarray:
        """Bytes from the beginning of `data`; faults where an access is not within the program's own."""
        at = lanes.address
        if (at % size).any():
            run.fail_at(f"a misaligned {what} of {size} bytes", lanes.which[at % size != 0])
        outside = (at < 0) | (at + size > self.size)
        if outside.any():
            run.fail_at(
                f"a {what} at byte {at[outside][0]} of {self.size} bytes of shared memory", lanes.which[outside]
            )
        return at + (lanes.program - 1).astype(np.int64) * self.room

    def load(self, run, lanes: Lanes, width: int, count: int) -> np.ndarray:
        """-> [lanes, count]."""
        size = width * count
        offset = self._offset(run, lanes, size, "load")
        if self.races:
            places = self.shadow.places(offset, size)
            keys, odd = self.shadow.writers_at_odds(places, lanes)
            if not keys.all():
                run.fail_at("shared memory is read before it is written", lanes.which[(keys == 0).any(1)])
            if (flying := keys == IN_FLIGHT).any():
                why = "race: an asynchronous copy to this shared memory was not waited for"
                run.fail_at(why, lanes.which[flying.any(1)])
            if odd.any():
                why = f"race: {_thread(keys[odd][0])} wrote this shared memory, and no barrier since"
                run.fail_at(why, lanes.which[odd.any(1)])
            self._check_atomics(run, lanes, places)
            self.shadow.note_read(places, lanes)
        return _elements(self.data.view(VECTOR[size])[offset // size], width, count)

    def store(self, run, lanes: Lanes, values: np.ndarray, in_flight: bool = False) -> None:
        """Values [lanes, count]. in_flight: they arrive later, only shadows change now."""
        width = values.itemsize
        size = width * values.shape[1]
        offset = self._offset(run, lanes, size, "store")
        if self.races:
            shadow = self.shadow
            places = shadow.places(offset, size)
            self._check_write(run, lanes, places)
            self._check_atomics(run, lanes, places)
            lost = shadow.note_write(places, lanes)
            if in_flight:
                shadow.written[places] = IN_FLIGHT
            if self.unfenced is not None:
                self.unfenced[places] = True
        self._put(offset, values)
        if self.races and lost is not None:
            _check_lost(run, lanes, lost, shadow.written[places], values, self._get(offset, values), "shared memory")

    def _check_write(self, run, lanes: Lanes, places: np.ndarray) -> None:
        _, odd = self.shadow.writers_at_odds(places, lanes)
        if odd.any():
            run.fail_at("race: another thread wrote this shared memory, and no barrier since", lanes.which[odd.any(1)])
        odd = self.shadow.readers_at_odds(places, lanes)
        if odd.any():
            run.fail_at("race: another thread reads this shared memory, and no barrier since", lanes.which[odd.any(1)])
        if self.held is not None and (used := self.held[places] > 0).any():
            run.fail_at(
                "a store to shared memory that a product reads which was not waited for", lanes.which[used.any(1)]
            )

    def _check_atomics(self, run, lanes: Lanes, places: np.ndarray) -> None:
        if self.atomics is not None and (odd := self.atomics.readers_at_odds(places, lanes)).any():
            why = "race: an atomic of another thread changed this shared memory, and no barrier since"
            run.fail_at(why, lanes.which[odd.any(1)])

    def atomic(self, run, lanes: Lanes, width: int, function) -> np.ndarray:
        """As in global memory. Atomics are no race among themselves, only with plain loads and stores."""
        offset = self._offset(run, lanes, width, "atomic")
        if self.races:
            places = self.shadow.places(offset, width)
            if not self.shadow.written[places].all():
                unwritten = (self.shadow.written[places] == 0).any(1)
                run.fail_at("shared memory is read before it is written", lanes.which[unwritten])
            self._check_write(run, lanes, places)
            if self.unfenced is not None:
                self.unfenced[places] = True
            self.atomics = self.atomics or Shadow(self.data.size, self.shadow.grain, self.shadow.fine)
            self.atomics.note_read(places, lanes)
        old, view, at = np.zeros(offset.size, UNSIGNED[width]), self.data.view(UNSIGNED[width]), offset // width
        for i in run.random.permutation(offset.size):
            old[i] = view[at[i]]
            view[at[i]] = function(i, old[i])
        return old

    def land(self, lanes: Lanes, size: int) -> None:
        """An asynchronous copy of these lanes has been waited for."""
        if self.races:
            offset = lanes.address + (lanes.program - 1).astype(np.int64) * self.room
            self.shadow.written[self.shadow.places(offset, size)] = lanes.key[:, None]

    def _put(self, offset: np.ndarray, values: np.ndarray) -> None:
        size = values.itemsize * values.shape[1]
        self.data.view(VECTOR[size])[offset // size] = np.ascontiguousarray(values).view(VECTOR[size])[:, 0]

    def _get(self, offset: np.ndarray, values: np.ndarray) -> np.ndarray:
        size = values.itemsize * values.shape[1]
        return _elements(self.data.view(VECTOR[size])[offset // size], values.itemsize, values.shape[1])


class Segment:
    """One allocation of global memory."""

    def __init__(self, base: int, data: np.ndarray, name: str, grain: int):
        self.base, self.data, self.name, self.grain = base, data, name, grain
        self.size = data.size
        self.writable = False  # whether an instruction of the kernel can write to it
        self.meant: np.ndarray | None = None  # on which grains races are meant
        self.shadow: Shadow | None = None

    def prepare(self, fine: bool) -> None:
        """Make the shadows of memory that is written."""
        self.writable, self.shadow = True, Shadow(self.size, self.grain, fine)
        count = self.shadow.written.size
        self.program, self.last, self.first, self.clock, self.read_clock = (np.zeros(count, np.int32) for _ in range(5))
        room = -(-self.size // 32) * 32
        self.late = np.zeros(room, np.uint8)  # values stored and not visible yet
        self.owner = np.zeros(room // self.grain, SIGNED[self.grain])  # by which program, 0 none

    def excuse(self, offset: int, meant: np.ndarray) -> None:
        """On these bytes from an offset on, races are meant."""
        if self.meant is None:
            self.meant = np.zeros(-(-self.size // self.grain), bool)
        meant = np.pad(meant, (offset % self.grain, -(offset + meant.size) % self.grain), constant_values=False)
        self.meant[offset // self.grain :][: meant.size // self.grain] |= meant.reshape(-1, self.grain).all(1)

    def judged(self, lanes: Lanes, places: np.ndarray) -> tuple[Lanes, np.ndarray]:
        """The lanes whose accesses must be no race, and what of the places [lanes, grains] is theirs."""
        if self.meant is None:
            return lanes, places
        judged = ~self.meant[places].all(1)
        return lanes.some(judged), places[judged]

    def view(self, size: int) -> np.ndarray:
        """The data as elements of so many bytes."""
        return self.data[: self.size // size * size].view(VECTOR[size])


@dataclass
class Known:
    """Accesses that are known to be over: of programs those before one of their barriers, of warps (program, warp)
    those before one of theirs, too, of threads (program, thread) those up to a time of `Order`.
    """

    barriers: np.ndarray  # [programs + 1]
    warps: dict[tuple[int, int], int] = field(default_factory=dict)
    threads: dict[tuple[int, int], int] = field(default_factory=dict)

    def join(self, other: "Known") -> None:
        """Know what `other` does."""
        np.maximum(self.barriers, other.barriers, out=self.barriers)
        for mine, more in ((self.warps, other.warps), (self.threads, other.threads)):
            for key, value in more.items():
                mine[key] = max(mine.get(key, 0), value)

    def covers(self, program: int, last: int, first: int, time: int) -> bool:
        """Whether all accesses of a program up to the fine key `last` are among them; since the barrier before, they
        are of the threads from that of `first` to that of `last`, and not later than `time`.
        """
        if self.barriers[program] > last >> 30:
            return True
        thread, warp = last & 1023, (last & 1023) >> 5
        if (first & 1023) >> 5 == warp and self.warps.get((program, warp), 0) > last >> 10:
            return True
        return first & 1023 == thread and self.threads.get((program, thread), 0) >= time


class Order:
    """What threads know of those of other programs by release and acquire. Threads are given by their fine keys."""

    def __init__(self, programs: int):
        self.programs, self.time = programs, 1  # counts instructions that release, and fences
        self.released: dict[int, Known] = {}  # address -> what who acquires there gets to know
        self.pending: dict[int, Known] = {}  # the same of stores that are not visible yet
        self.acquired: dict[int, dict[int, Known]] = {}  # program -> fine key of a thread -> what it got to know
        self.fences: dict[tuple[int, int], tuple[int, int]] = {}  # (program, thread) -> fine key and time of its last
        self.seen: dict[tuple[int, int], Known] = {}  # (program, thread) -> what its next fence acquires

    def release(self, program: int, thread: int, address: int, pending: bool, time: int | None = None) -> None:
        """A thread releases at an address: what it knows, and what it and barriers before it have ordered. An atomic
        adds to what has been released there, a store, which is pending at first, takes its place.
        """
        there = self._nothing() if pending else self.released.setdefault(address, self._nothing())
        for known in self.known(program, thread):
            there.join(known)
        own = self._nothing()
        own.barriers[program] = thread >> 30
        own.warps[program, (thread & 1023) >> 5] = thread >> 10
        own.threads[program, thread & 1023] = self.time if time is None else time
        there.join(own)
        if pending:
            self.pending[address] = there

    def write(self, program: int, thread: int, address: int, pending: bool) -> None:
        """A thread writes strongly: releases what was before its last fence."""
        fence = self.fences.get((program, thread & 1023))
        if fence is not None:
            self.release(program, fence[0], address, pending, fence[1])

    def fence_writes(self, program: int, thread: int) -> None:
        """Strong writes of a thread behind this release what is before it."""
        self.fences[program, thread & 1023] = thread, self.time

    def read(self, program: int, thread: int, address: int) -> None:
        """A thread reads strongly: with a fence behind, that acquires."""
        if address in self.released:
            self.seen.setdefault((program, thread & 1023), self._nothing()).join(self.released[address])

    def fence_reads(self, program: int, thread: int) -> None:
        """What a thread has read strongly before this, it acquires."""
        if (program, thread & 1023) in self.seen:
            self._learn(program, thread, self.seen.pop((program, thread & 1023)))

    def land(self, addresses: np.ndarray) -> None:
        """Stores to these addresses become visible: those who acquire there get what they release, if anything."""
        if not (self.released or self.pending):
            return
        for address in (self.released.keys() | self.pending.keys()).intersection(addresses.tolist()):
            self.released.pop(address, None)
            if address in self.pending:
                self.released[address] = self.pending.pop(address)

    def acquire(self, program: int, thread: int, address: int) -> None:
        """A thread acquires at an address."""
        if address in self.released:
            self._learn(program, thread, self.released[address])

    def _learn(self, program: int, thread: int, known: Known) -> None:
        """Others of its program know of it behind their next barrier."""
        here = self.acquired.setdefault(program, {})
        for other in [other for other in here if 0 < other >> 30 < thread >> 30]:  # all of the program know it now
            here.setdefault(0, self._nothing()).join(here.pop(other))
        here.setdefault(thread, self._nothing()).join(known)

    def known(self, program: int, thread: int) -> list[Known]:
        """What a thread knows: what it, or others before a barrier, acquired."""
        return [
            known
            for other, known in self.acquired.get(program, {}).items()
            if other >> 30 < thread >> 30
            or (other & 1023 == thread & 1023)
            or ((other ^ thread) & 0x3E0 == 0 and other >> 10 < thread >> 10)
        ]

    def _nothing(self) -> Known:
        return Known(np.zeros(self.programs + 1, np.int64))

    def unordered(self, lanes: tuple[np.ndarray, np.ndarray], other, last, first, time) -> np.ndarray:
        """Which accesses of the programs `other` (`Known.covers`) the threads (program, fine key) cannot know to be
        over; all [n].
        """
        odd = np.ones(other.shape, bool)
        if not self.acquired:
            return odd
        knows: dict[tuple[int, int], list[Known]] = {}
        access = (*lanes, other, last, first, time)
        for i, (program, thread, o, *what) in enumerate(zip(*(a.tolist() for a in access), strict=True)):
            if (program, thread) not in knows:
                knows[program, thread] = self.known(program, thread)
            odd[i] = o == MANY or not any(known.covers(o, *what) for known in knows[program, thread])
        return odd


class GlobalMemory:
    """All allocations of a launch."""

    def __init__(self, grain: int, programs: int, races: bool):
        self.grain, self.races, self.programs = grain, races, programs
        self.segments: list[Segment] = []
        self.order = Order(programs)
        # segment, offsets, width, who stored, which of these each offset is of, whether a part is visible
        self.pending: list[tuple] = []
        self.version = 0  # counts what became visible
        if programs >= 1 << (8 * grain - 1):
            raise Fault(f"{programs} programs are too many for a kernel that stores {grain} bytes")

    def add(self, data: np.ndarray, name: str) -> Segment:
        """An allocation."""
        self.segments.append(Segment((len(self.segments) + 1) << SEGMENT, data, name, self.grain))
        return self.segments[-1]

    def parts(self, run, lanes: Lanes, size: int, what: str):
        """(segment, its lanes, offsets, which of all lanes) for each segment that is touched."""
        at = lanes.address
        if (at % size).any():
            run.fail_at(f"a misaligned {what} of {size} bytes", lanes.which[at % size != 0])
        number = at >> SEGMENT
        least = int(number.min())
        one = least == number.max()
        for n in [least] if one else np.unique(number).tolist():
            here = slice(None) if one else number == n
            if not 1 <= n <= len(self.segments):
                run.fail_at(f"a {what} outside of all allocations, at {int(at[here][0]):#x}", lanes.which[here])
            segment = self.segments[n - 1]
            offset = at[here] - segment.base
            outside = offset + size > segment.size
            if outside.any():
                run.fail_at(
                    f"a {what} outside of {segment.name}, at byte {offset[outside][0]} of {segment.size}",
                    lanes.which[here][outside],
                )
            yield segment, lanes if one else lanes.some(here), offset, here

    def load(self, run, lanes: Lanes, width: int, count: int, strong: bool) -> np.ndarray:
        """-> [lanes, count]."""
        size = width * count
        out = np.empty((lanes.address.size, count), UNSIGNED[width])
        for segment, some, offset, here in self.parts(run, lanes, size, "load"):
            raw = segment.view(size)[offset // size]
            if segment.shadow is not None:
                if self.races and not strong:
                    self._check_load(run, segment, *segment.judged(some, segment.shadow.places(offset, size)))
                owner = segment.owner
                if self.pending:
                    raw = self._own(segment, some, offset, size, raw, owner)
            out[here] = _elements(raw, width, count)
        return out

    def _own(self, segment: Segment, lanes: Lanes, offset, size: int, raw, owner) -> np.ndarray:
        """What a program has stored itself it sees, visible or not."""
        if size < segment.grain:  # a part of what is stored at once
            late = segment.late.view(VECTOR[size])[offset // size]
            return np.where(owner[offset // segment.grain] == lanes.program, late, raw)
        grain = SIGNED[segment.grain]
        owners = _elements(owner.view(VECTOR[size])[offset // size], segment.grain, size // segment.grain).view(grain)
        mine = owners == lanes.program[:, None].astype(grain)
        if not mine.any():
            return raw
        late = _elements(segment.late.view(VECTOR[size])[offset // size], segment.grain, size // segment.grain)
        found = np.where(mine, late, _elements(raw, segment.grain, size // segment.grain))
        return np.ascontiguousarray(found).view(VECTOR[size])[:, 0]

    def _unordered(self, lanes: Lanes, places: np.ndarray, foreign: np.ndarray, other, last, first, time) -> np.ndarray:
        """The `foreign` among the accesses at these places, all [lanes, grains], that are not known to be over."""
        if not foreign.any():
            return foreign
        some = [np.broadcast_to(x[:, None], places.shape)[foreign] for x in (lanes.program, lanes.fine)]
        found = foreign.copy()
        found[foreign] = self.order.unordered(some, *(x[foreign] for x in (other, last, first, time)))
        return found

    def _other_writers(self, segment: Segment, lanes: Lanes, places: np.ndarray) -> np.ndarray:
        """Where another program has written last, and the lane does not know that to be over."""
        writer = segment.program[places]
        foreign = (writer != 0) & (writer != lanes.program[:, None])
        if not foreign.any():
            return foreign
        last = segment.shadow.last_writer(places)
        return self._unordered(lanes, places, foreign, writer, last, last, segment.clock[places])

    def _other_readers(self, segment: Segment, lanes: Lanes, places: np.ndarray) -> np.ndarray:
        """The same where one has loaded plainly since the last store."""
        program, last, first = lanes.program[:, None], segment.last[places], segment.first[places]
        first = np.where(first > 0, MANY - first, 0)
        foreign = (last != 0) & ((last != program) | (first != program))
        if not foreign.any():
            return foreign
        reader = np.where(last != program, last, first)
        reader = np.where((last != first) & (last != program) & (first != program), MANY, reader)
        keys = segment.shadow.last_readers(places)
        return self._unordered(lanes, places, foreign, reader, *keys, segment.read_clock[places])

    def _check_load(self, run, segment: Segment, lanes: Lanes, places: np.ndarray) -> None:
        program = lanes.program[:, None]
        writer = segment.program[places]
        foreign = self._other_writers(segment, lanes, places)
        if foreign.any():
            who = _program(run, writer[foreign][0])
            run.fail_at(f"a plain load of {segment.name}, which {who} in this launch", lanes.which[foreign.any(1)])
        keys, odd = segment.shadow.writers_at_odds(places, lanes)
        odd &= writer == program
        if odd.any():
            run.fail_at(
                f"race: {_thread(keys[odd][0])} wrote this of {segment.name}, and no barrier since",
                lanes.which[odd.any(1)],
            )
        shadow = segment.shadow
        if self.order.acquired:  # readers that are known to be over are none
            earlier = segment.last[places]
            over = (earlier != 0) & (earlier != program) & ~self._other_readers(segment, lanes, places)
            for readers in (segment.last, segment.first, shadow.last, shadow.first):
                readers[places[over]] = 0
        shadow.note_read(places, lanes)
        number = np.broadcast_to(program, places.shape).ravel()
        at = places.ravel()
        segment.last[at] = np.maximum(segment.last[at], number)
        segment.read_clock[at] = self.order.time
        at, mirrored = at[::-1], MANY - number[::-1]
        segment.first[at] = np.maximum(segment.first[at], mirrored)

    def store(self, run, lanes: Lanes, values: np.ndarray, strong: bool) -> None:
        """Values [lanes, count] -> pending."""
        count, width = values.shape[1], values.itemsize
        size = width * count
        for segment, some, offset, here in self.parts(run, lanes, size, "store"):
            self.prepare(run, segment, some)
            places = segment.shadow.places(offset, size)
            lost = None
            if self.races:
                self._check_store(run, segment, *segment.judged(some, places), "a store to", strong)
                lost = self._note_store(run, segment, some, places, strong)
            data, late = segment.view(size), segment.late.view(VECTOR[size])
            at = offset // size
            if segment.owner[places].any():  # stores to one place keep their order
                before = _elements(late[at], segment.grain, places.shape[1])
                waiting = segment.owner[places] != 0
                now = np.where(waiting, before, _elements(data[at], segment.grain, places.shape[1]))
                data[at] = np.ascontiguousarray(now).view(VECTOR[size])[:, 0]
                self.order.land(some.address[waiting.any(1)])
            late[at] = np.ascontiguousarray(values[here]).view(VECTOR[size])[:, 0]
            segment.owner[places] = some.program[:, None]
            if lost is not None and not strong:
                there = _elements(late[at], width, count)
                _check_lost(run, some, lost, segment.shadow.written[places], values[here], there, segment.name)
            elements = offset[:, None] + width * np.arange(count)
            of = np.repeat(np.arange(offset.size), count)
            self.pending.append((segment, elements.ravel() // width, width, some, of, False))

    def prepare(self, run, segment: Segment, lanes: Lanes) -> None:
        """Before anything is written to a segment."""
        if not segment.writable:
            run.fail_at(f"a store to {segment.name}, which no address of this kernel's stores is made of", lanes.which)

    def _check_store(self, run, segment: Segment, lanes: Lanes, places: np.ndarray, what: str, strong: bool) -> None:
        """Strong ones may race with one another, and with what is stored plainly; nothing with a plain load."""
        program, writer, last = lanes.program[:, None], segment.program[places], segment.last[places]
        shadow = segment.shadow
        if not strong:
            foreign = self._other_writers(segment, lanes, places)
            if foreign.any():
                who = _program(run, writer[foreign][0])
                run.fail_at(f"{what} {segment.name}, which {who} too", lanes.which[foreign.any(1)])
        foreign = self._other_readers(segment, lanes, places)
        if foreign.any():
            run.fail_at(f"{what} {segment.name} that another program loads plainly", lanes.which[foreign.any(1)])
        wrote = False if strong else (writer == program) & shadow.writers_at_odds(places, lanes)[1]
        reads = (last == program) & shadow.readers_at_odds(places, lanes)
        for odd, did in ((wrote, "wrote"), (reads, "reads")):
            if np.any(odd):
                where = lanes.which[odd.any(1)]
                run.fail_at(f"race: another thread {did} this of {segment.name}, and no barrier since", where)

    def _note_store(self, run, segment: Segment, lanes: Lanes, places: np.ndarray, strong: bool) -> np.ndarray | None:
        program = lanes.program[:, None]
        several = strong and self._other_writers(segment, lanes, places)
        segment.program[places] = np.where(several, MANY, program)
        segment.clock[places] = self.order.time
        for readers in (segment.last, segment.first, segment.shadow.last, segment.shadow.first):
            readers[places] = 0  # whoever is ordered behind this store is so behind those loads
        judged = True if segment.meant is None else ~segment.meant[places]
        lost = (segment.program[places] != program) & judged
        if lost.any() and not strong:
            who = _program(run, segment.program[places][lost][0])
            run.fail_at(f"a store to {segment.name}, which {who} too", lanes.which[lost.any(1)])
        lost = segment.shadow.note_write(places, lanes)
        return None if lost is None else lost & judged

    def commit(self, chance: np.ndarray, random) -> None:
        """Make each element that is pending visible with the chance of its program ([programs + 1])."""
        self._show(lambda lanes: chance[lanes.program], random)

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
        mine = segment.owner[places[:, 0]] != 0  # what has landed with a later store to the same place is over
        at = at[mine]
        segment.view(width)[at] = segment.late.view(VECTOR[width])[at]
        self.order.land(segment.base + at * width)
        segment.owner[places[mine]] = 0

    def atomic(self, run, lanes: Lanes, width: int, function, order: str) -> np.ndarray:
        """function(number of the lane, old) -> new for each lane in random order, on memory itself -> what was there
        before.
        """
        old = np.zeros(lanes.address.size, UNSIGNED[width])
        for segment, some, offset, here in self.parts(run, lanes, width, "atomic"):
            self.prepare(run, segment, some)
            if segment.owner[segment.shadow.places(offset, width)].any():
                self.commit(np.ones(self.programs + 1), run.random)
            view = segment.view(width)
            numbers = np.arange(old.size)[here]
            programs, threads = some.threads()
            for i in run.random.permutation(numbers.size):
                thread, address, place = (programs[i], threads[i]), int(some.address[i]), int(offset[i]) // width
                old[numbers[i]] = view[place]
                if order in ("acquire", "acq_rel"):
                    self.order.acquire(*thread, address)
                elif order != "cta":
                    self.order.read(*thread, address)
                if order in ("release", "acq_rel"):
                    self.order.release(*thread, address, pending=False)
                elif order != "cta":
                    self.order.write(*thread, address, pending=False)
                view[place] = function(numbers[i], view[place])
            if self.races:
                places = segment.shadow.places(offset, width)
                self._check_store(run, segment, *segment.judged(some, places), "an atomic on", True)
                self._note_store(run, segment, some, places, True)
        self.order.time += 1
        self.version += 1
        return old


def _elements(raw: np.ndarray, width: int, count: int) -> np.ndarray:
    """Vectors [lanes] -> their elements [lanes, count]."""
    return np.ascontiguousarray(raw).view(UNSIGNED[width]).reshape(raw.shape[0], count)


def _thread(key: int) -> str:
    return f"warp {(int(key) & 1023) // 32}, lane {int(key) & 31}"


def _program(run, number: int) -> str:
    return "several programs write" if number == MANY else f"program {run.launch.index[int(number) - 1]} writes"


def _check_lost(run, lanes: Lanes, lost, keys, values, found, name: str) -> None:
    """Two threads of one store at one place: of other warps a race; of one warp it must be the same value."""
    other = lost & ((keys ^ lanes.key[:, None]) & 0x3E0 != 0)
    if other.any():
        run.fail_at(f"race: two warps write the same of {name}", lanes.which[other.any(1)])
    unequal = lost.any(1) & (values != found).any(1)
    if unequal.any():
        run.fail_at(f"race: lanes of a warp write other values to the same place of {name}", lanes.which[unequal])
