"""The latest accesses of memory, as far as there is room for them: so that a Fault can name the other one of a race."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from .shadow import Lanes

ROOM = 1 << 20  # lanes that are remembered


@dataclass
class Access:
    """One instruction's, by all its lanes."""

    memory: Any  # a segment, or shared memory
    at: int  # the number of the instruction
    writes: bool
    lanes: Lanes
    offset: np.ndarray  # where each lane begins, [lanes]
    size: int


class Recent:
    """What the latest instructions accessed."""

    def __init__(self):
        self.accesses: deque[Access] = deque()
        self.count = 0

    def note(self, *access) -> None:
        """An access, as the fields of `Access`."""
        self.accesses.append(Access(*access))
        self.count += access[4].size
        while self.count > ROOM and len(self.accesses) > 1:
            self.count -= self.accesses.popleft().offset.size

    def find(self, memory, grain: int, place: int, who: tuple[int, int], writes: bool, foreign: bool | None):
        """The latest access of a place by another than `who` (program, thread), of another program or of its own, or by
        anybody (None) -> (program, thread, number of the instruction), or None.
        """
        for access in reversed(self.accesses):
            if access.memory is not memory or access.writes != writes:
                continue
            first = access.offset // grain
            here = (first <= place) & (place < first + max(1, access.size // grain))
            program, thread = access.lanes.program, access.lanes.fine & 1023
            if foreign is not None:
                here &= program != who[0] if foreign else (program == who[0]) & (thread != who[1])
            if here.any():
                i = np.flatnonzero(here)[-1]
                return int(program[i]), int(thread[i]), access.at
        return None
