"""Races in global memory, between programs and within one.

A weak load (plain, `.ca`, `.cg`, `.nc`) of what another program writes in the launch is a fault, whichever comes first:
it may be served from a cache for ever. A strong one (volatile, relaxed, acquire) is not. Threads that hand data on by
release and acquire are known (order.py), and what is ordered so may be loaded plainly. An access in scope `cta` is
strong for its own program, and weak for all others.
"""

import numpy as np

from .crowd import Crowds
from .order import MANY, Order
from .segment import Segment
from .shadow import Lanes, keys_at_odds, name_of


def reach_of(order: str) -> int:
    """How far an access is strong (`access.order_of`): 0 nowhere, 1 in its program, 2 everywhere."""
    return {"": 0, "constant": 0, "cta": 1}.get(order, 2)


# A release covers what its own thread has done, and what barriers ordered before it.
UNORDERED = "no release behind it (a barrier between, if by another thread) that an acquire has seen orders it"


class Races:
    """Looks at each access to a segment, and remembers it in the segment."""

    def __init__(self, order: Order):
        self.order = order

    def unordered(self, lanes: Lanes, places: np.ndarray, foreign: np.ndarray, other, last, first, time) -> np.ndarray:
        """The `foreign` among the accesses at these places, all [lanes, grains], that are not known to be over."""
        if not foreign.any():
            return foreign
        some = [np.broadcast_to(x[:, None], places.shape)[foreign] for x in (lanes.program, lanes.fine)]
        found = foreign.copy()
        found[foreign] = self.order.unordered(some, *(x[foreign] for x in (other, last, first, time)))
        return found

    def _among(
        self, crowds: Crowds, lanes: Lanes, places: np.ndarray, found: np.ndarray, many: np.ndarray
    ) -> np.ndarray:
        """What is left of `found` where many programs were, when the lane knows of each of them."""
        if self.order.acquired:
            for i, j in zip(*np.nonzero(found & many), strict=True):
                crowd = crowds.at[int(places[i, j])]
                found[i, j] = not self.order.over(int(lanes.program[i]), int(lanes.fine[i]), crowd)
        return found

    def _other_writers(self, segment: Segment, lanes: Lanes, places: np.ndarray) -> np.ndarray:
        """Where another program has written last, and the lane does not know that to be over."""
        writer = segment.program[places]
        foreign = (writer != 0) & (writer != lanes.program[:, None])
        if not foreign.any():
            return foreign
        last = segment.shadow.last_writer(places)
        found = self.unordered(lanes, places, foreign, writer, last, last, segment.clock[places])
        return self._among(segment.writers, lanes, places, found, writer == MANY)

    def _other_readers(self, segment: Segment, lanes: Lanes, places: np.ndarray) -> np.ndarray:
        """The same where one has loaded plainly since the last store."""
        program, last, first = lanes.program[:, None], segment.last[places], segment.first[places]
        first = np.where(first > 0, MANY - first, 0)
        foreign = (last != 0) & ((last != program) | (first != program))
        if not foreign.any():
            return foreign
        reader, keys = np.where(last != first, MANY, last), segment.shadow.last_readers(places)
        found = self.unordered(lanes, places, foreign, reader, *keys, segment.read_clock[places])
        return self._among(segment.readers, lanes, places, found, reader == MANY)

    def _plain_writers(self, segment: Segment, lanes: Lanes, places: np.ndarray) -> np.ndarray:
        """Where another program has written last of those whose stores were not strong for all, and the lane does not
        know that to be over.
        """
        writer, last = segment.plain[places], segment.plain_key[places]
        foreign = (writer != 0) & (writer != lanes.program[:, None])
        return self.unordered(lanes, places, foreign, writer, last, last, segment.plain_clock[places])

    def check_load(self, run, segment: Segment, lanes: Lanes, places: np.ndarray, reach: int) -> None:
        """A load of places [lanes, grains] that is not strong for all programs."""
        program = lanes.program[:, None]
        writer = segment.program[places]
        foreign = self._other_writers(segment, lanes, places)
        if foreign.any():
            who = _program(run, writer[foreign][0])
            what = "a load in scope cta" if reach else "a plain load"
            text = f"{what} of {segment.name}, which {who} in this launch; {UNORDERED}"
            run.fail_beside(text, segment, lanes, places, foreign, wrote=True, foreign=True)
        keys, odd = segment.shadow.writers_at_odds(places, lanes)
        odd &= writer == program
        if odd.any() and not reach:
            text = f"race: {name_of(keys[odd][0])} wrote this of {segment.name}, and no barrier since"
            run.fail_beside(text, segment, lanes, places, odd, wrote=True)
        shadow = segment.shadow
        if self.order.acquired:  # readers that are known to be over are none
            earlier = segment.last[places]
            over = (earlier != 0) & (earlier != program) & ~self._other_readers(segment, lanes, places)
            for readers in (segment.last, segment.first, shadow.last, shadow.first):
                readers[places[over]] = 0
            segment.readers.forget(places[over])
        segment.owned |= reach == 1
        if segment.owned:
            segment.own_loads[places] = (reach == 1) & (segment.own_loads[places] | (segment.last[places] == 0))
        before = segment.last[places]
        before = before, *shadow.last_readers(places), segment.read_clock[places]
        shadow.note_read(places, lanes)
        number = np.broadcast_to(program, places.shape).ravel()
        at = places.ravel()
        segment.last[at] = np.maximum(segment.last[at], number)
        segment.read_clock[at] = self.order.time
        at, mirrored = at[::-1], MANY - number[::-1]
        segment.first[at] = np.maximum(segment.first[at], mirrored)
        several = segment.last[places] != MANY - segment.first[places]
        if several.any():
            fine = lanes.fine[:, None]
            segment.readers.join(several, places, before, (program, fine, fine, np.array(self.order.time)))

    def check_store(self, run, segment: Segment, lanes: Lanes, places: np.ndarray, what: str, reach: int) -> None:
        """Strong ones may race with one another, and with nothing else. (A strong load may race with a plain store.)"""
        program, writer, last = lanes.program[:, None], segment.program[places], segment.last[places]
        shadow = segment.shadow
        foreign = (self._plain_writers if reach == 2 else self._other_writers)(segment, lanes, places)
        if foreign.any():
            who = _program(run, (segment.plain[places] if reach == 2 else writer)[foreign][0])
            how = "in scope cta" if segment.own_store[places][foreign][0] else "plainly"
            how = how if reach == 2 else "too"
            text = f"{what} {segment.name}, which {who} {how}; {UNORDERED}"
            run.fail_beside(text, segment, lanes, places, foreign, wrote=True, foreign=True)
        foreign = self._other_readers(segment, lanes, places)
        if foreign.any():
            how = "in scope cta" if segment.own_loads[places][foreign][0] else "plainly"
            text = f"{what} {segment.name} that another program has loaded {how}; {UNORDERED}"
            run.fail_beside(text, segment, lanes, places, foreign, wrote=False, foreign=True)
        wrote = (writer == program) & shadow.writers_at_odds(places, lanes)[1]
        reads = (last == program) & shadow.readers_at_odds(places, lanes)
        if reach:
            plain = (segment.plain[places] == program) & ~segment.own_store[places]
            wrote = plain & keys_at_odds(segment.plain_key[places], lanes)
            reads &= ~segment.own_loads[places]
        for odd, did in ((wrote, "wrote"), (reads, "has read")):
            if np.any(odd):
                text = f"race: another thread {did} this of {segment.name}, and no barrier since"
                run.fail_beside(text, segment, lanes, places, odd, wrote=did == "wrote")

    def note_store(self, run, segment: Segment, lanes: Lanes, places: np.ndarray, reach: int) -> np.ndarray | None:
        """Remember a store -> which of its places [lanes, grains] another lane of it has, as `Shadow.note_write`."""
        program = lanes.program[:, None]
        shadow, time, strong = segment.shadow, np.array(self.order.time), reach == 2
        several = self._other_writers(segment, lanes, places) if strong else np.zeros(places.shape, bool)
        before = segment.program[places], segment.clock[places]
        segment.program[places] = program
        several |= strong & (segment.program[places] != program)  # in this very instruction
        if np.any(several):
            segment.program[places[several]] = MANY
            several, last, fine = segment.program[places] == MANY, shadow.last_writer(places), lanes.fine[:, None]
            segment.writers.join(several, places, (before[0], last, last, before[1]), (program, fine, fine, time))
            segment.writers.forget(places[~several])
        else:
            segment.writers.forget(places)
        segment.clock[places] = time
        if not strong:
            segment.plain[places], segment.plain_key[places] = program, lanes.fine[:, None]
            segment.plain_clock[places] = time
            segment.owned |= reach == 1
            if segment.owned:
                segment.own_store[places] = reach == 1
        if not strong:  # whoever is ordered behind this store is so behind those loads
            segment.readers.forget(places)
            for readers in (segment.last, segment.first, shadow.last, shadow.first):
                readers[places] = 0
        judged = True if segment.meant is None else ~segment.meant[places]
        lost = (segment.program[places] != program) & judged
        if lost.any() and not strong:
            who = _program(run, segment.program[places][lost][0])
            text = f"a store to {segment.name}, which {who} too"
            run.fail_beside(text, segment, lanes, places, lost, wrote=True, foreign=True)
        lost = shadow.note_write(places, lanes)
        return None if lost is None else lost & judged


def _program(run, number: int) -> str:
    return "several programs write" if number == MANY else f"program {run.launch.index[int(number) - 1]} writes"
