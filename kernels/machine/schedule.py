"""How a launch is run, and what it did."""

from collections.abc import Callable
from dataclasses import dataclass, fields


@dataclass
class Counts:
    """What a launch did."""

    instructions: int = 0  # of warps
    steps: int = 0  # operations that did them
    most: int = 0  # instructions of one warp
    polls: int = 0  # strong loads of global memory and atomics, of warps
    barriers: int = 0  # of programs
    prefetched: int = 0  # lanes that asked for a prefetch
    prefetched_outside: int = 0  # lanes whose prefetch was of no allocation
    draws: int = 0  # of the schedule


@dataclass(frozen=True)
class Schedule:
    """How a launch is run. Equal ones give equal launches.

    launch: its number in a context, drawn with together with the seed. delay: the chance of a stored element to become
    visible at each draw. early: the chance that a strong load finds what was there before the latest store, or an
    atomic comes before it, where nothing orders them behind it. slow: numbers of programs that run, and whose stores
    arrive, a hundredth as often. stop: the chance to stop before an access of global memory that others can notice.
    part: the chance that only some of the warps that stand together go on. budget: instructions that a warp may take.
    patience: draws for which all warps may only wait, with nothing under way. races: whether to look for races.
    leave_out: indices (x, y, z) of programs that never run, or a function of the kernel's name and the index.
    """

    seed: int = 0
    launch: int = 1
    delay: float = 0.3
    slow: tuple[int, ...] = ()
    early: float = 0.2
    stop: float = 0.1
    part: float = 0.2
    budget: int = 2_000_000
    patience: int = 20_000
    races: bool = True
    leave_out: tuple | Callable = ()

    def __post_init__(self) -> None:
        """ValueError and TypeError for what is no chance, no number, no switch."""
        for name in ("delay", "early", "stop", "part"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} to be a chance between 0 and 1, but got {getattr(self, name)!r}")
        for name in ("budget", "patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} to be positive, but got {getattr(self, name)!r}")
        if not isinstance(self.races, bool):
            raise TypeError(f"expected races to be a bool, but got {self.races!r}")

    def __str__(self) -> str:
        """What must be given to see a launch again."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        number = given.pop("launch", 1)
        return ", ".join([f"launch {number}", *(f"{name}={value}" for name, value in ({"seed": 0} | given).items())])

    def absent(self, kernel: str, index: tuple[int, int, int]) -> bool:
        """Whether a program is left out."""
        if callable(self.leave_out):
            return self.leave_out(kernel, index)
        return index in {(*i, 0, 0)[:3] if isinstance(i, tuple) else (i, 0, 0) for i in self.leave_out}
