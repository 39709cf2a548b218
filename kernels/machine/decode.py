"""From statements to instructions: closures over a frame, a list of arrays with a place for each register.

What an instruction does stands in the files that code.py imports, each function under the name of its instruction:
`@instruction("add", "rn ftz")` registers one and names the modifiers it knows, types aside. Whatever is not registered,
or has a modifier that is not named, is a Fault when the kernel is decoded, not when it runs.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .local import BASE
from .parse import WIDTH, Fault, Kernel, Statement
from .segment import base_of
from .values import UNSIGNED

# Registers that a lane has from the start, all of 32 bits. (PTX ISA 10)
SPECIAL = (
    "%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x",
    "%nctaid.y", "%nctaid.z", "%laneid", "%warpid",
)  # fmt: skip
CYCLES = 100  # between two looks at %clock
# What an instruction is to the loop of run.py.
VALUE, ACT, BRANCH, BARRIER, EXIT = range(5)


@dataclass(slots=True)
class Instruction:
    """A decoded instruction.

    VALUE: action(frame) -> the new contents of register `target`. ACT: action(run, mask) does all itself; mask [warps,
    32] says which lanes execute it, None: all. BRANCH: `target` is the number of an instruction.
    """

    statement: Statement
    kind: int
    action: Callable | None = None
    target: int = -1
    guard: int = -1  # the predicate's register
    reads: tuple[int, ...] = ()  # the guard among them
    writes: tuple[int, ...] = ()
    together: bool = False  # all lanes of a warp must execute it together
    asks: bool = False  # what it reads from memory may have come from another program just now
    tells: bool = False  # writes memory that others may ask for
    fences: bool = False  # makes strong accesses before and behind acquire and release
    holds: frozenset[int] = frozenset()  # registers that nothing else may touch until they have been waited for
    touches: tuple[int, ...] = ()  # registers of its own that another instruction `holds`
    doubts: tuple[int, ...] = ()  # registers that it reads, and on some way to it nothing writes
    settles: tuple[int, ...] = ()  # such registers that it writes
    hollow: tuple[int, ...] = ()  # registers with bits that nothing ever writes, and it looks at (hollow.py)
    careful: bool = False  # whether there are any of these three
    junk: frozenset[int] = frozenset()  # registers that it may read though nothing wrote them
    unless: int = -1  # a predicate's register: only where it is false
    spins: bool = False  # a branch back to polls or atomics, over no store: the loop of a wait


HANDLERS: dict[str, tuple[Callable, frozenset]] = {}


def instruction(names: str, modifiers: str = ""):
    """Register a function (decoder, statement) -> Instruction for these names."""

    def register(function):
        for name in names.split():
            HANDLERS[name] = function, frozenset(modifiers.split())
        return function

    return register


# What this machine does not model, by what stands in an instruction.
BEYOND = {
    r"cvta\.local": "generic addresses of local memory, as of device_print",
    r"\bcall\b|printf|[aA]ssert": "calls, as of device_print and device_assert",
    r"cluster": "clusters",
    r"tcgen05": "tensor memory",
    r"mbarrier|\.bulk|tensormap": "mbarrier, bulk copies and tensor descriptors",
}


def _beyond(s: Statement) -> str:
    return next((what for pattern, what in BEYOND.items() if re.search(pattern, s.text)), "")


class Decoder:
    """Operands of the statements of a kernel as places in a frame: registers first, then what is special, then
    constants.
    """

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.slots = {name: i for i, name in enumerate([*kernel.registers, *SPECIAL])}
        self.widths = [*kernel.registers.values(), *(4 for _ in SPECIAL)]
        self.variables = len(self.widths)
        self.arrays = {"global_smem": 0} | {name: BASE + at for name, (at, _) in kernel.local.items()}
        self.arrays |= {name: base_of(i) for i, name in enumerate(kernel.data)}
        self.constants: list[np.ndarray] = []
        self.statement: Statement | None = None  # the one in hand
        self._known: dict[tuple, int] = {}
        self._reads: list[int] = []
        self._writes: list[int] = []
        self._clock = itertools.count(step=CYCLES)

    def clock(self) -> np.ndarray:
        """Cycles, which go on as often as somebody looks: what a pause takes, and no time of anything else."""
        return np.full((1, 1), next(self._clock) & 0xFFFFFFFF, np.uint32)

    def decode(self, s: Statement) -> Instruction:
        """One statement."""
        handler, modifiers = HANDLERS.get(s.op[0], (None, frozenset()))
        strange = [part for part in s.op[1:] if part not in modifiers and part not in WIDTH]
        if handler is None or strange:
            what = _beyond(s) or ("" if handler is None else ".".join(strange))
            what = f" ({what})" if what else ""
            raise Fault(f"an instruction that this machine does not know{what}: {s.text}{s.origin}")
        self.statement, self._reads, self._writes = s, [], []
        try:
            found = handler(self, s)
            if s.guard is not None:
                found.guard = self.source(s.guard, 0)
        except (KeyError, IndexError, ValueError, StopIteration) as error:
            named = isinstance(error, (KeyError, ValueError)) and error.args
            what = _beyond(s) or (error.args[0] if named else "")
            what = f" ({what})" if what else ""
            raise Fault(f"operands that this machine does not know{what}: {s.text}{s.origin}") from error
        found.reads, found.writes = tuple(self._reads), tuple(self._writes)
        return found

    # Operands: each becomes a place in the frame.

    def constant(self, value: int, width: int) -> int:
        """A number for all lanes."""
        key = value, width
        if key not in self._known:
            kind = bool if width == 0 else UNSIGNED[width]
            self._known[key] = self.variables + len(self.constants)
            self.constants.append(np.full((1, 1), value, kind))
        return self._known[key]

    def source(self, text: str, width: int) -> int:
        """A register or a number that is read as `width` bytes."""
        if text in self.slots:
            slot = self.slots[text]
            self._reads.append(slot)
            return slot
        if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}|0[dD][0-9A-Fa-f]{16}", text):
            return self.constant(int(text[2:], 16), 4 if text[1] in "fF" else 8)
        if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|0[bB][01]+|\d+)U?", text):
            value = int(text.rstrip("U"), 0)
            return self.constant(bool(value) if width == 0 else value & ((1 << 8 * width) - 1), width)
        if text in self.arrays:
            return self.constant(self.arrays[text], width)
        raise KeyError(text)

    def sources(self, texts, *kinds: str) -> list[int]:
        """Operands of these types."""
        return [self.source(text, WIDTH[kind]) for text, kind in zip(texts, kinds, strict=True)]

    def target(self, text: str) -> int:
        """A register that is written; "_", the sink: -1."""
        if text == "_":
            return -1
        slot = self.slots[text]
        self._writes.append(slot)
        return slot

    def address(self, text: str) -> tuple[int, int]:
        """`[%r1 + 16]` -> a register (or a constant), and what is added to it."""
        found = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\s*\w+))?\s*\]", text)
        if found is None:
            raise ValueError(text)
        return self.source(found[1], 8), int(found[2] or "0", 0)

    # What the functions of the other files return.

    def value(self, target: str, action: Callable) -> Instruction:
        """One register as a function of the frame."""
        return Instruction(self.statement, VALUE, action, self.target(target))

    def act(self, action: Callable, **what) -> Instruction:
        """Anything else."""
        return Instruction(self.statement, ACT, action, **what)
