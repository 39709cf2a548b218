"""Older values: what strong accesses may still find of a place after its latest store. (PTX ISA 8.9, 8.10)

A store that has become visible need not be seen by a thread that nothing orders behind it: no release that an acquire
has seen (order.py), no `fence.sc` on both sides. So it finds the value before, as long as nobody has seen the new one:
a load that is served ahead of earlier ones of its thread, two programs that each store and then miss the other's store
behind fences that are not `.sc`, and what a relaxed atomic has published. An atomic may come before the latest store,
too, if it leaves that value as it is.
"""

import numpy as np

from .segment import Segment
from .shadow import VECTOR, Lanes, elements_of, keys_at_odds

SEEN, UNSEEN = 1, 2  # whether another thread of the program may have seen what has become visible, or nobody


def missed(memory, run, segment: Segment, lanes: Lanes, places: np.ndarray) -> np.ndarray:
    """At which of the places [lanes, grains] the lanes may miss the latest store."""
    launch, order, state = run.launch, memory.order, segment.replaced[places]
    rows, landed = run.rows[lanes.which >> 5], segment.landed[places]
    found = (state != 0) & (segment.owner[places] == 0) & (landed > launch.sequential[rows][:, None])
    if not found.any():
        return found
    writer, key = segment.maker[places], segment.maker_key[places]
    own = found & (writer == lanes.program[:, None])
    if own.any():
        unseen = (state == UNSEEN) & (landed > launch.ordered[rows][:, None])
        found &= ~own | (unseen & keys_at_odds(key, lanes))
    if order.acquired:
        access = writer, key, key, segment.made[places]
        found = (found & own) | memory.races.unordered(lanes, places, found & ~own, *access)
    if order.renewed:  # where the value before was released, too, who finds it would have to acquire that
        found &= ~np.isin(lanes.address, list(order.renewed))[:, None]
    return found


def load(memory, run, segment: Segment, lanes: Lanes, offset, size: int, raw) -> np.ndarray:
    """What strong loads find: `raw`, or in part the values before. Who finds those is in `memory.behind`."""
    if size < segment.grain:  # a part of what is stored at once
        segment.replaced[offset // segment.grain] = 0
        return raw
    count, vector, at = size // segment.grain, VECTOR[size], offset // size
    replaced = segment.replaced.view(VECTOR[min(count, 8)])
    if count > 8:
        at = at[:, None] * (count // 8) + np.arange(count // 8)
    if run.random.random() >= run.launch.schedule.early or not replaced[at].any():
        replaced[at] = 0
        return raw
    places = segment.shadow.places(offset, size)
    early = missed(memory, run, segment, lanes, places)
    segment.replaced[places[~early]] = 0
    if not early.any():
        return raw
    memory.behind |= set(lanes.which[early.any(1)].tolist())
    before = elements_of(segment.before.view(vector)[offset // size], segment.grain, count)
    found = np.where(early, before, elements_of(raw, segment.grain, count))
    return np.ascontiguousarray(found).view(vector)[:, 0]


def atomic(memory, run, segment: Segment, lanes: Lanes, places: np.ndarray) -> np.ndarray:
    """Which atomics may come before the latest store."""
    if memory.races is None or run.random.random() >= run.launch.schedule.early or not segment.replaced[places].any():
        return np.zeros(lanes.which.size, bool)
    foreign = segment.maker[places] != lanes.program[:, None]
    return (missed(memory, run, segment, lanes, places) & foreign).all(1)
