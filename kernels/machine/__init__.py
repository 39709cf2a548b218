"""A machine for PTX: compiled Triton kernels run on a CPU, instruction by instruction, against chance.

    with on_machine(arch=90, seed=3):
        kernel[grid](...)              # or anything above it: a layer, a training step, on CPU tensors

Triton's interpreter runs the program that was written. What the compiler made of it, inline assembly, layouts, shared
memory, barriers, and what the programs of a launch see of each other's stores, it cannot show. This runs the very PTX
that a GPU of architecture `arch` would be given: every program, warp and lane, under random schedules, with stores that
arrive late and in any order. A `Fault` tells of races, addresses out of bounds or misaligned, barriers that some miss,
plain loads of what others write and waits that never end; it names program, warp, lanes, instruction, the line of
Python that it came from, and the seed that repeats it.

    parse.py, decode.py, code.py, values.py   PTX text -> statements -> closures over registers; types and rounding
    hollow.py   bits that nothing wrote
    arithmetic.py, floating.py, bits.py, comparison.py, conversion.py, operands.py   instructions of one lane
    lanes.py, products.py, warpgroup.py, access.py, control.py   of a warp, of four, on memory, branches and barriers
    memory.py, segment.py, shared.py, local.py, copies.py   memory, late stores and copies
    early.py   what strong accesses may still find
    shadow.py, crowd.py, races.py, order.py, reserved.py, recent.py   what is a race, and with whom
    launch.py, run.py, services.py, schedule.py   warps that step together, against chance
    library.py   `on_machine`: Triton's launches on this machine

What it does not model: time, machine code (ptxas may reorder what PTX leaves open), caches beyond what races.py says,
textures, tensor memory and bulk copies, clusters. An instruction that is not known is a Fault that names it, never a
guess. Nothing heavy is imported before the first use, and importing this package does not need Triton.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from ..devices import DEVICES
from .parse import Fault

__all__ = ["Fault", "on_machine", "running"]


def __dir__() -> list[str]:
    """What is there for users."""
    return __all__


_open: list = []  # contexts of `on_machine`, the innermost last


def running() -> bool:
    """Whether launches run on the machine now."""
    return bool(_open)


@contextlib.contextmanager
def on_machine(arch: int = 90, seed: int = 0, edit=None, tensors=(), **schedule: Any) -> Iterator[list]:
    """Within this context every launch of a compiled Triton kernel runs on the machine, on CPU tensors -> a list that
    each launch appends its (name of the kernel, `schedule.Counts`) to.

    arch: the architecture that kernels are compiled for, one of those that `devices.DEVICES` have. seed: draws the
    schedules; successive launches of one context get different ones, the same ones each time. edit: a function PTX ->
    PTX, to plant a mistake. tensors: those that kernels reach by pointers in memory alone. schedule: further fields of
    `schedule.Schedule`. RuntimeError where kernels are interpreted (TRITON_INTERPRET=1).
    """
    known = sorted({device.arch for device in DEVICES.values()})
    if arch not in known:
        *most, last = known
        raise ValueError(f"expected arch to be {', '.join(map(str, most))} or {last}, but got {arch!r}")
    from .library import Launches

    launches = Launches(arch, seed, edit, tensors, schedule)
    with launches.instead_of_a_gpu():
        _open.append(launches)
        try:
            yield launches.log
        finally:
            _open.remove(launches)
