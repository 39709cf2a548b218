"""Shared memory, and what checks each access to it: it must be written before it is read, with a barrier between two
threads that touch the same bytes.
"""

from collections.abc import Callable

import numpy as np

from .shadow import VECTOR, Lanes, Shadow, check_lost, differ_in_rounding, elements_of, name_of
from .values import UNSIGNED

IN_FLIGHT = (1 << 31) - 1  # in place of a key: an asynchronous copy that nobody has waited for


class SharedMemory:
    """The shared memory of all programs, side by side."""

    def __init__(self, size: int, programs: int, grain: int, fine: bool, races: bool, products: bool):
        self.size, self.races, self.grain = size, races, grain
        self.room = -(-size // 16) * 16
        self.data = np.zeros(self.room * programs, np.uint8)
        self.shadow = Shadow(self.room * programs, grain, fine) if races else None
        self.atomics: Shadow | None = None  # whose atomics, as readers, once there was one
        # Where several warps stored the same: the key of the last one. Until a barrier others must neither read it nor
        # store another value.
        self.several: np.ndarray | None = None
        self.changes = 0  # counts atomics that changed something
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
                run.fail_beside(why, self, lanes, places, flying, wrote=True, foreign=None)
            odd |= self._stored_by_several(places, lanes)
            if odd.any():
                why = f"race: {name_of(keys[odd][0])} wrote this shared memory, and no barrier since"
                run.fail_beside(why, self, lanes, places, odd, wrote=True)
            self._check_atomics(run, lanes, places)
            self.shadow.note_read(places, lanes)
            run.note(self, lanes, offset, size, False)
        return elements_of(self.data.view(VECTOR[size])[offset // size], width, count)

    def store(self, run, lanes: Lanes, values: np.ndarray, in_flight: bool = False) -> None:
        """Values [lanes, count]. in_flight: they arrive later, only shadows change now."""
        width = values.itemsize
        size = width * values.shape[1]
        offset = self._offset(run, lanes, size, "store")
        if self.races:
            shadow = self.shadow
            places = shadow.places(offset, size)
            again = None if in_flight else lambda: self._same(offset, values, places)
            self._check_write(run, lanes, places, again)
            self._check_atomics(run, lanes, places)
            run.note(self, lanes, offset, size, True)
            lost = shadow.note_write(places, lanes)
            if in_flight:
                shadow.written[places] = IN_FLIGHT
            if self.unfenced is not None:
                self.unfenced[places] = True
        self._put(offset, values)
        if self.races and lost is not None:
            keys = shadow.written[places]
            if not in_flight:  # one store of several warps
                other = lost & self._other_warp(keys, lanes) & self._same(offset, values, places)
                self._note_several(places, lanes, other)
                lost &= ~other
            check_lost(run, lanes, lost, keys, values, self._get(offset, values), "shared memory", rounding=True)
            if lost.any():  # any of them may be the last
                order = run.random.permutation(offset.size)
                self._put(offset[order], values[order])

    def _same(self, offset: np.ndarray, values: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Which of the places [lanes, grains] have these very values, but for rounding."""
        there = self._get(offset, values)
        same = np.ascontiguousarray(there).view(np.uint8) == np.ascontiguousarray(values).view(np.uint8)
        same = same.reshape(*places.shape, -1).all(2)
        if not same.all():
            same |= np.repeat(differ_in_rounding(values, there), places.shape[1] // values.shape[1], 1)
        return same

    @staticmethod
    def _other_warp(keys: np.ndarray, lanes: Lanes) -> np.ndarray:
        return (keys != IN_FLIGHT) & ((keys ^ lanes.key[:, None]) & 0x3E0 != 0)

    def _note_several(self, places: np.ndarray, lanes: Lanes, where: np.ndarray) -> None:
        if where.any():
            if self.several is None:
                self.several = np.zeros_like(self.shadow.written)
            self.several[places[where]] = np.broadcast_to(lanes.key[:, None], places.shape)[where]

    def _stored_by_several(self, places: np.ndarray, lanes: Lanes) -> np.ndarray | bool:
        """Where they did since the last barrier of the program."""
        return False if self.several is None else self.several[places] >= (lanes.key & ~np.int32(1023))[:, None]

    def _check_write(self, run, lanes: Lanes, places: np.ndarray, again: Callable | None = None) -> None:
        """again(): where a store leaves what is there. Several warps may store the same, as Triton makes them where a
        tile has fewer elements than its program threads.
        """
        keys, odd = self.shadow.writers_at_odds(places, lanes)
        several = self._stored_by_several(places, lanes)
        odd |= several
        if again is not None and odd.any():
            harmless = odd & again() & (several | self._other_warp(keys, lanes))
            self._note_several(places, lanes, harmless)
            odd &= ~harmless
        if odd.any():
            text = "race: another thread wrote this shared memory, and no barrier since"
            run.fail_beside(text, self, lanes, places, odd, wrote=True)
        odd = self.shadow.readers_at_odds(places, lanes)
        if odd.any():
            text = "race: another thread has read this shared memory, and no barrier since"
            run.fail_beside(text, self, lanes, places, odd, wrote=False)
        if self.held is not None and (used := self.held[places] > 0).any():
            run.fail_at(
                "a store to shared memory that a product reads which was not waited for", lanes.which[used.any(1)]
            )

    def _check_atomics(self, run, lanes: Lanes, places: np.ndarray) -> None:
        if self.atomics is not None and (odd := self.atomics.readers_at_odds(places, lanes)).any():
            why = "race: an atomic of another thread changed this shared memory, and no barrier since"
            run.fail_beside(why, self, lanes, places, odd, wrote=True)

    def atomic(self, run, lanes: Lanes, width: int, function) -> np.ndarray:
        """As in global memory. Atomics are no race among themselves, only with plain loads and stores."""
        offset = self._offset(run, lanes, width, "atomic")
        if self.races:
            places = self.shadow.places(offset, width)
            if not self.shadow.written[places].all():
                unwritten = (self.shadow.written[places] == 0).any(1)
                run.fail_at("shared memory is read before it is written", lanes.which[unwritten])
            self._check_write(run, lanes, places)
            run.note(self, lanes, offset, width, True)
            if self.unfenced is not None:
                self.unfenced[places] = True
            self.atomics = self.atomics or Shadow(self.data.size, self.shadow.grain, self.shadow.fine)
            self.atomics.note_read(places, lanes)
        old, view, at = np.zeros(offset.size, UNSIGNED[width]), self.data.view(UNSIGNED[width]), offset // width
        for i in run.random.permutation(offset.size):
            old[i] = view[at[i]]
            view[at[i]] = function(i, old[i])
        self.changes += bool((view[at] != old).any())
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
        return elements_of(self.data.view(VECTOR[size])[offset // size], values.itemsize, values.shape[1])
