"""Places of global memory that several programs have accessed: who all of them are. (A shadow remembers one.)"""

import numpy as np


class Crowds:
    """For each such place the accesses of each program since the last store that all of them are before.

    An access is the fine keys of the last thread, and of the first one since the same barrier, and when
    (`order.Known.covers`).
    """

    def __init__(self):
        self.at: dict[int, dict[int, tuple[int, int, int]]] = {}

    def join(self, where: np.ndarray, places: np.ndarray, before: tuple, now: tuple) -> None:
        """At the places [lanes, grains] that are chosen, those who access them now are there, beside the ones before,
        which matter where nobody was yet; both (program, last, first, time), all [lanes, grains]; program 0: none.
        """
        listed = [[x[where].tolist() for x in np.broadcast_arrays(places, *access)] for access in (before, now)]
        earlier, later = (zip(*columns, strict=True) for columns in listed)
        for (place, other, *then), (_, program, *access) in zip(earlier, later, strict=True):
            crowd = self.at.setdefault(place, {})
            if not crowd and other:
                crowd[other] = tuple(then)
            crowd[program] = _joined(crowd[program], access) if program in crowd else tuple(access)

    def forget(self, places: np.ndarray) -> None:
        """Nobody is there."""
        for place in places.ravel().tolist() if self.at else ():
            self.at.pop(place, None)


def _joined(a, b) -> tuple[int, int, int]:
    """Two accesses of a program as one."""
    later = max(a[0] >> 30, b[0] >> 30)
    return max(a[0], b[0]), min(x[1] for x in (a, b) if x[0] >> 30 == later), max(a[2], b[2])
