"""An allocation of global memory: its data, what is stored and not visible yet, and who was there last."""

import numpy as np

from .crowd import Crowds
from .shadow import VECTOR, Lanes, Shadow
from .values import SIGNED

SEGMENT, FIRST = 40, 1 << 15  # bits of an address within an allocation; the number of the first one, past the host's


def base_of(number: int) -> int:
    """The address of an allocation."""
    return (FIRST + number) << SEGMENT


class Segment:
    """One allocation of global memory."""

    def __init__(self, base: int, data: np.ndarray, name: str, grain: int):
        self.base, self.data, self.name, self.grain = base, data, name, grain
        self.size = data.size
        self.writable = False  # whether an instruction of the kernel can write to it
        self.polled = False  # whether one reads it strongly
        self.meant: np.ndarray | None = None  # on which grains races are meant
        self.shadow: Shadow | None = None
        self.reserved: np.ndarray | None = None  # what nobody may write (reserved.py), once there was some

    def prepare(self, fine: bool) -> None:
        """Make the shadows of memory that is written."""
        self.writable, self.shadow = True, Shadow(self.size, self.grain, fine)
        count = self.shadow.written.size
        self.program, self.last, self.first, self.clock, self.read_clock = (np.zeros(count, np.int32) for _ in range(5))
        # The last store that was not strong for all programs: by which one, which thread (a fine key) and when.
        self.plain, self.plain_clock = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self.plain_key = np.zeros(count, np.int64)
        # Whether that one was strong for its own program, whether all loads since the last store were, and whether any
        # access was.
        self.own_store, self.own_loads, self.owned = np.zeros(count, bool), np.zeros(count, bool), False
        room = -(-self.size // 32) * 32
        self.writers, self.readers = Crowds(), Crowds()  # where `program` is MANY, or `first` another one than `last`
        self.late = np.zeros(room, np.uint8)  # values stored and not visible yet
        self.owner = np.zeros(room // self.grain, SIGNED[self.grain])  # by which program, 0 none; < 0: others saw it
        self.before = np.zeros(room, np.uint8)  # values that the latest visible ones took the place of
        self.replaced = np.zeros(room // self.grain, np.uint8)  # where no other program has seen it yet (early.SEEN)
        self.landed = np.zeros(count, np.int32)  # when
        # Who made the latest value: the program, the thread (a fine key), and when. An atomic that leaves a place as it
        # is has made none.
        self.maker, self.made, self.maker_key = (
            np.zeros(count, np.int32),
            np.zeros(count, np.int32),
            np.zeros(count, int),
        )

    def note_maker(self, lanes: Lanes, places: np.ndarray, time: int) -> None:
        """These lanes have made new values at their places [lanes, grains]."""
        self.maker[places], self.made[places] = lanes.program[:, None], time
        self.maker_key[places] = lanes.fine[:, None]

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


def from_host(segments: list[Segment], address: np.ndarray) -> np.ndarray:
    """Addresses of the host within allocations as those of the launch; others stay as they are."""
    begins = np.array([segment.data.ctypes.data for segment in segments])
    order = np.argsort(begins)
    found = order[np.maximum(np.searchsorted(begins[order], address, "right") - 1, 0)]
    offset = address - begins[found]
    inside = (offset >= 0) & (offset < np.array([segment.size for segment in segments])[found])
    return np.where(inside, np.array([segment.base for segment in segments])[found] + offset, address)
