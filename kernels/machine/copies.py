"""Asynchronous copies from global to shared memory. They may read and write at any time until their group has been
waited for: so nobody may write what they read, nor touch what they write, until then. (PTX ISA 9.7.9.25.3)

Groups are counted by warp: PTX counts them by thread, so a wait of some lanes alone is refused.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Part:
    """What lanes of one warp copy at once, or read for it: which lanes, their addresses, bytes of each."""

    lanes: np.ndarray
    address: np.ndarray
    size: int

    def of(self, run, row: int):
        """The lanes as memory wants them now, in a row of a run."""
        address, mask = np.zeros((run.warps, 32), np.int64), np.zeros((run.warps, 32), bool)
        address[row, self.lanes], mask[row, self.lanes] = self.address, True
        return run.lanes(address, mask)


@dataclass
class Group:
    """Copies of a warp that are waited for together: to shared memory, and from memory that the launch writes."""

    to: list[Part]
    source: list[Part]


def _groups(run, row: int) -> list[Group]:
    return run.launch.copies.setdefault(row, [Group([], [])])


def begin(run, address, values, mask, source, wanted) -> None:
    """A copy of values [warps, 32, words] to shared memory, from `source` in the lanes that want it."""
    lanes = run.lanes(address, mask)
    values = values.reshape(32 * run.warps, -1)[lanes.which]
    run.launch.shared.store(run, lanes, values, in_flight=True)
    size = values.itemsize * values.shape[1]
    read = run.lanes(source, wanted)
    held = run.launch.memory.hold(run, read, size)
    for i, row in enumerate(run.rows.tolist()):
        group = _groups(run, row)[-1]
        parts = [(group.to, lanes), (group.source, read)] if held else [(group.to, lanes)]
        for where, some in parts:
            mine = some.which // 32 == i
            if mine.any():
                where.append(Part(some.which[mine] % 32, some.address[mine], size))


def commit(run) -> None:
    """The copies since the last group are a group."""
    for row in run.rows.tolist():
        _groups(run, row).append(Group([], []))


def wait(run, left: int) -> None:
    """Until all groups but the latest `left` have arrived."""
    for i, row in enumerate(run.rows.tolist()):
        groups = _groups(run, row)
        while len(groups) - 1 > left:
            group = groups.pop(0)
            for part in group.to:
                run.launch.shared.land(part.of(run, i), part.size)
            for part in group.source:
                run.launch.memory.let_go(run, part.of(run, i), part.size)
