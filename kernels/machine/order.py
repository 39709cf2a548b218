"""What threads know of each other's accesses by release and acquire, between programs. (PTX ISA 8.8 to 8.10)"""

from dataclasses import dataclass, field

import numpy as np

MANY = 1 << 30  # in place of a program's number: several


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
        self.renewed: set[int] = set()  # addresses where what was before the latest store had been released, too
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
            self.renew(address)
            self.released.pop(address, None)
            if address in self.pending:
                self.released[address] = self.pending.pop(address)

    def renew(self, address: int) -> None:
        """There is a new value at an address."""
        (self.renewed.add if address in self.released else self.renewed.discard)(address)

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

    def over(self, program: int, thread: int, crowd: dict[int, tuple[int, int, int]]) -> bool:
        """Whether a thread knows that the accesses of all other programs of a crowd are over."""
        knows = self.known(program, thread)
        return all(p == program or any(known.covers(p, *access) for known in knows) for p, access in crowd.items())

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
