"""Who wrote and who read each place of memory last: what races are found by.

Two threads of a program may touch the same bytes, one of them writing, only with a barrier between them: `bar.sync` for
threads of different warps, that or `bar.warp.sync` for lanes of one warp.

Beside each memory lies a shadow, with one number for each `grain` of bytes. A thread is known by its key, `barriers *
1024 + thread`, barriers of its program so far: a key from before the last barrier is smaller than any from after it. Of
many readers the first and the last thread are enough, because a writer is at odds with one of them if with any; where
warps have barriers of their own, the two that read last of all are kept besides.
"""

from dataclasses import dataclass

import numpy as np

from .values import UNSIGNED, typed

VECTOR = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16", 32: "V32"}  # types that move so many bytes at once


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


def keys_at_odds(fine: np.ndarray, lanes: Lanes) -> np.ndarray:
    """Which fine keys [lanes, grains] are of another thread that no barrier separates from the lane."""
    key = lanes.fine[:, None]
    since = np.where((fine ^ key) & 0x3E0 == 0, key & ~np.int64(1023), key >> 30 << 30)
    return (fine >= since) & ((fine ^ key) & 1023 != 0)


def elements_of(raw: np.ndarray, width: int, count: int) -> np.ndarray:
    """Vectors [lanes] -> their elements [lanes, count]."""
    return np.ascontiguousarray(raw).view(UNSIGNED[width]).reshape(raw.shape[0], count)


def name_of(key: int) -> str:
    """The thread of a key, for messages."""
    return f"warp {(int(key) & 1023) // 32}, lane {int(key) & 31}"


def differ_in_rounding(values: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Where values [lanes, count] of one store are as good as equal: taken for float32 or float64 of a common size, by
    a 65,536th of themselves, or by what is rounded off of the largest beside them. Small integers are no such numbers,
    and of two numbers of 16 bits in a word the first must be equal, and the second of a size.
    """
    if values.itemsize < 4:
        return np.zeros(values.shape, bool)
    a, b = (typed(np.ascontiguousarray(x), f"f{8 * x.itemsize}").astype(np.float64) for x in (values, found))
    size = np.nan_to_num(np.maximum(abs(a), abs(b)), nan=0.0, posinf=0.0)
    largest = size.max(0)
    return (abs(a - b) <= np.maximum(size / 2**16, largest / 2**21)) & (1e-20 < largest) & (largest < 1e20)


def check_lost(run, lanes: Lanes, lost, keys, values, found, name: str, rounding: bool = False) -> None:
    """Two threads of one store at one place: of other warps a race; of one warp it must be the same value, or one that
    differs in rounding alone.
    """
    other = lost & ((keys ^ lanes.key[:, None]) & 0x3E0 != 0)
    if other.any():
        run.fail_at(f"race: two warps write the same of {name}", lanes.which[other.any(1)])
    unequal = values != found
    if rounding and unequal.any():
        unequal &= ~differ_in_rounding(values, found)
    unequal = lost.any(1) & unequal.any(1)
    if unequal.any():
        run.fail_at(f"race: lanes of a warp write other values to the same place of {name}", lanes.which[unequal])
