"""Places of global memory that nobody may write: while an asynchronous copy reads them, until its group has been waited
for; and for the whole launch what `ld.global.nc` reads, which takes it for constant. (PTX ISA 9.7.9.8, 9.7.9.25)
"""

import numpy as np

from .segment import Segment
from .shadow import Lanes

CONSTANT = 1 << 24  # what a place has that `ld.global.nc` has read, and one for each copy


def _of(segment: Segment) -> np.ndarray:
    if segment.reserved is None:
        segment.reserved = np.zeros(segment.shadow.written.size, np.int32)
    return segment.reserved


def load_constant(run, segment: Segment, lanes: Lanes, places: np.ndarray) -> None:
    """`ld.global.nc` of places [lanes, grains]."""
    written = segment.shadow.written[places] != 0
    if written.any():
        text = f"ld.global.nc of {segment.name}, which this launch writes"
        run.fail_beside(text, segment, lanes, places, written, wrote=True, foreign=None)
    _of(segment)[places] |= CONSTANT


def hold(segment: Segment, places: np.ndarray) -> None:
    """A copy begins to read places [lanes, grains]."""
    np.add.at(_of(segment), places, 1)


def let_go(segment: Segment, places: np.ndarray) -> None:
    """It has been waited for."""
    np.subtract.at(_of(segment), places, 1)


def check_write(run, segment: Segment, lanes: Lanes, places: np.ndarray, what: str) -> None:
    """A store or an atomic."""
    if segment.reserved is None:
        return
    for odd, why in (
        (segment.reserved[places] & (CONSTANT - 1) > 0, "that an asynchronous copy reads which was not waited for"),
        (segment.reserved[places] & CONSTANT > 0, "that ld.global.nc reads in this launch"),
    ):
        if odd.any():
            run.fail_beside(f"{what} {segment.name} {why}", segment, lanes, places, odd, wrote=False, foreign=None)
