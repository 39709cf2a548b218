"""Local memory: what a thread has for itself, such as an array whose index is no constant. It must be written before it
is read, and nobody else sees it. (PTX ISA 5.1.5)
"""

import numpy as np

from .shadow import VECTOR, Lanes, elements_of

BASE = 1 << 20  # the address where each thread's own begins: of 32 bits, and none of shared memory


class LocalMemory:
    """The local memory of all threads, side by side."""

    def __init__(self, size: int, threads: int):
        self.size, self.room = size, -(-size // 16) * 16
        self.data = np.zeros(self.room * threads, np.uint8)
        self.written = np.zeros(self.data.size, bool)

    def _bytes(self, run, lanes: Lanes, size: int, what: str) -> np.ndarray:
        """[lanes, bytes of an access], from the beginning of `data`; faults where it is not within the thread's own."""
        at = lanes.address - BASE
        if (at % size).any():
            run.fail_at(f"a misaligned {what} of {size} bytes", lanes.which[at % size != 0])
        if (outside := (at < 0) | (at + size > self.size)).any():
            why = f"a {what} at byte {at[outside][0]} of {self.size} bytes of local memory"
            run.fail_at(why, lanes.which[outside])
        thread = run.rows[lanes.which >> 5] * 32 + (lanes.which & 31)
        return (at + thread * self.room)[:, None] + np.arange(size)

    def load(self, run, lanes: Lanes, width: int, count: int) -> np.ndarray:
        """-> [lanes, count]."""
        places = self._bytes(run, lanes, width * count, "load")
        if not (written := self.written[places].all(1)).all():
            run.fail_at("local memory is read before it is written", lanes.which[~written])
        return elements_of(self.data[places].view(VECTOR[width * count])[:, 0], width, count)

    def store(self, run, lanes: Lanes, values: np.ndarray) -> None:
        """Values [lanes, count]."""
        places = self._bytes(run, lanes, values.itemsize * values.shape[1], "store")
        self.data[places], self.written[places] = np.ascontiguousarray(values).view(np.uint8), True
