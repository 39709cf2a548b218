"""What a cell is: its description, from which layers, kernels, operators and the oracle come; and sizes that host and
device agree on. No device code: the built-in cells are in rnn_gpu/equations.py, their Triton functions in cells.py.
"""

import functools
import hashlib
import importlib
import os
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeVar

from .fingerprint import spelled

Text = TypeVar("Text", bound=str)
# A Triton function, or where it is to be imported from, as "module:name": so that a description needs no Triton.
Function = Any
FUNCTIONS = ("forward", "factors", "backward")  # of a cell, in Triton
MOST_GATES = 8  # that the kernels' tiles have room for
MATRICES = ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")  # a layer's weights, as torch.nn calls them


@dataclass(frozen=True)
class Cell:
    """A recurrent cell: all that a layer, its kernels and its oracle must know. docs/cells.md shows how to write one.

    A step has, for each unit, the sums of its gates in two parts: x from the input, with the biases, and r from the
    state h of the step before, `W_hh h`. From these and from what the unit carries it makes h.

    name: of the layer and its class. gate_names: in the order in which the gates lie in the weights [G*H, ...]. step:
    the equations in plain torch, any floating dtype, differentiable, nothing in place. x and r are tuples of G tensors
    [B, H], carry is a tuple:

        step(x, r, carry) -> h, carry

    states: names of the values a unit keeps beside h ("c" of the LSTM); each is a state of the layer, in float32
    within a launch. carries_h: what is kept is the unit's own h (GRU), and carry is (h,). apart: so many of the last
    gates do something else with r than to add it to x (GRU: 1, the reset gate stands before r of n): their hidden
    biases are part of r, and the gradients of x and r differ. saves: values that `forward` leaves for the backward in
    the type of the layer; the first G take the place of x. reads_h: the backward also reads h of its step (RNN); not
    with states or more than G values saved. parameters: names of weights [H] beside the matrices (peepholes),
    none of which begins as theirs do.

    forward, factors, backward: the equations as Triton functions on tiles in float32, or where to import them from
    ("module:name"). Without them the cell runs by its step, as a loop over time.

        forward(x, r, carry) -> h, carry, saved

        factors(saved, before, after) -> all of the backward that needs no neighbour

        backward(factors, dh, dcarry) -> slots, dcarry of the step before

    before: carry of the step before. after: the states after this one, or (h,) with reads_h. slots: gradients at the
    gate sums; at r of the gates apart, then of all other gates at both sides, then at x of those apart. With
    parameters, step, forward and factors take p, a tuple, last, and backward also returns their gradients.

    quiet: where everything is zero, the slots are: lone kernels then need no mask for units that do not exist. mode:
    the name of torch.nn's layer of the same equations, for the routes through PyTorch and ONNX; None: there is none.

    TypeError and ValueError for what no layer can be made of.
    """

    name: str
    gate_names: tuple[str, ...]
    step: Callable[..., Any]
    _: KW_ONLY
    states: tuple[str, ...] = ()
    carries_h: bool = False
    apart: int = 0
    saves: int = 0
    reads_h: bool = False
    parameters: tuple[str, ...] = ()
    forward: Function = None
    factors: Function = None
    backward: Function = None
    quiet: bool = False
    mode: str | None = None

    def __post_init__(self) -> None:
        """TypeError and ValueError for what no layer can be made of."""
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(f"name should be a name as Python has them, got: {self.name!r}")
        for what in ("gate_names", "states", "parameters"):
            names = getattr(self, what)
            if not isinstance(names, tuple) or not all(isinstance(name, str) and name.isidentifier() for name in names):
                raise TypeError(f"{what} should be a tuple of names, got: {names!r}")
            if len(set(names)) < len(names):
                raise ValueError(f"{what} should have no name twice, got: {names!r}")
        for name in self.parameters:
            if name.startswith(MATRICES):
                raise ValueError(f"parameters should not have the names of a layer's other weights, got: {name!r}")
        if not self.gate_names:
            raise ValueError("gate_names should name one gate at least")
        if not callable(self.step):
            raise TypeError(f"step should be a function, got: {self.step!r}")
        for what, most in (("apart", self.gates), ("saves", None)):
            value = getattr(self, what)
            if not isinstance(value, int) or value < 0 or (most is not None and value > most):
                raise ValueError(f"{what} should be a number of {'gates' if most else 'values'}, got: {value!r}")
        if self.states and self.carries_h:
            raise ValueError("a cell carries states of its own or its h, not both")
        if self.reads_h and (self.states or self.saves > self.gates):
            raise ValueError("reads_h is for cells without states that save no more values than gates: save h instead")
        given = [name for name in FUNCTIONS if getattr(self, name) is not None]
        for name in given:
            value = getattr(self, name)
            if not (callable(value) or hasattr(value, "fn") or (isinstance(value, str) and ":" in value)):
                raise TypeError(f"{name} should be a Triton function, or 'module:name', got: {value!r}")
        if given and len(given) < len(FUNCTIONS):
            missing = ", ".join(name for name in FUNCTIONS if name not in given)
            raise ValueError(f"a cell has all three of forward, factors and backward, or none; missing: {missing}")

    @functools.cached_property
    def gates(self) -> int:
        """G."""
        return len(self.gate_names)

    @functools.cached_property
    def slots(self) -> int:
        """E, the gradients a unit publishes backwards: the first G at the hidden side of the gate sums, in the order
        `slot_order` of the gates, the last G at the input side, in the order of the gates.
        """
        return self.gates + self.apart

    @functools.cached_property
    def slot_order(self) -> tuple[int, ...]:
        """The gates of the first G slots: those apart first, so that both sides are neighbours."""
        split = self.gates - self.apart
        return (*range(split, self.gates), *range(split))

    @functools.cached_property
    def slot_of_gate(self) -> tuple[int, ...]:
        """Where each gate stands among the first G slots."""
        return tuple(self.slot_order.index(gate) for gate in range(self.gates))

    @functools.cached_property
    def carried(self) -> int:
        """Values that a unit keeps in registers from step to step."""
        return len(self.states) + self.carries_h

    @functools.cached_property
    def further(self) -> int:
        """Values saved beyond the G that take the place of x."""
        return max(self.saves - self.gates, 0)

    @functools.cached_property
    def planes(self) -> int:
        """Values a unit has in `aux`, the buffer beside gates and outputs: its states, and what it saves `further`."""
        return len(self.states) + self.further

    @property
    def beyond(self) -> int:
        """Values of a unit in the backward beyond one state, or one saved further; the plan leaves registers free."""
        return max(self.planes - 1, 0) + len(self.parameters)

    @property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits of what it computes: of the step with all that it uses, and of what else a graph
        holds to. The same in every process; another way to compute it in Triton changes nothing.
        """
        sizes = self.gate_names, self.states, self.carries_h, self.apart, self.saves, self.reads_h, self.parameters
        return hashlib.sha256(f"{sizes}\n{spelled(self.step)}".encode()).hexdigest()[:8]

    def keeps_aux(self, saving: str) -> bool:
        """Whether a forward that saves "nothing", "lean" or "full" writes aux."""
        return (saving == "full" and self.planes > 0) or (saving == "lean" and len(self.states) > 0)

    @property
    def side_by_side(self) -> bool:
        """Whether the layers of a stack may run side by side: the gates apart have sums of their own for the input."""
        return not self.parameters and self.gates + self.apart <= MOST_GATES

    def function(self, which: str) -> Any:
        """A Triton function by its name in FUNCTIONS."""
        return imported(getattr(self, which))

    @property
    def without_kernels(self) -> str:
        """Why the kernels cannot run it, or ""."""
        if self.forward is None:
            return f"{self.name} has no Triton functions"
        if self.gates > MOST_GATES:
            return f"{self.name} has {self.gates} gates, the kernels have room for {MOST_GATES}"
        return ""

    def keeps_carries(self, saving: str, mixed: bool, rate_h: float | None) -> bool:
        """Whether such a forward writes, beside aux and y, the states of every step: where a part of them is kept from
        step to step (`mixed`), aux has those that the cell alone would carry. Or, for cells whose backward reads h, the
        h that the cell alone would have: where a part of every h stays (`rate_h`), y is not it.
        """
        return (mixed and bool(self.states) and saving != "nothing") or (
            self.reads_h and rate_h is not None and saving != "nothing"
        )


def imported(function: Function) -> Any:
    """What "module:name" says; anything else as it is."""
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


# Every cell that a layer was made of, by the name under which operators, plans and exported programs know it.
CELLS: dict[str, Cell] = {}


def register(cell: Cell) -> str:
    """Make a cell known -> the name it has in CELLS. A built-in one has its own. Any other has a fingerprint behind: a
    graph outlives the process, and must not run another cell of that name. And a number, where two differ in what no
    fingerprint sees.
    """
    if CELLS.get(cell.name) == cell:
        return cell.name
    name = first = f"{cell.name}_{cell.fingerprint}"
    count = 1
    while name in CELLS and CELLS[name] != cell:
        count += 1
        name = f"{first}_{count}"
    CELLS[name] = cell
    return name


def known(name: str) -> Cell:
    """The cell that a graph holds the name of; RuntimeError where it is not known, or no longer the same."""
    if name not in CELLS:
        raise RuntimeError(
            f"rnn_gpu: no cell {name!r} is known here: import the module that defines it, as it was when the program "
            f"was exported, before the program runs"
        )
    return CELLS[name]


# Releases of Triton that all kernels have been compiled and counted with, on sm_80 to sm_120.
TRITON_VERSIONS = ("3.6", "3.7", "3.8")

DTYPES = ("float32", "float16", "bfloat16")  # what the kernels compute in


def itemsize(dtype: str) -> int:
    """Bytes of a value."""
    return 4 if dtype == "float32" else 2


def padded(hidden_size: int, dtype: str) -> int:
    """HS: units a row of every exchanged or saved buffer has room for; whole 16-byte loads."""
    step = 16 // itemsize(dtype)
    return -(-hidden_size // step) * step


def chunk_width(warps: int, dtype: str) -> int:
    """Values of K in one chunk of all warps: 16 words of 32 bits a warp (tiles.py)."""
    return warps * 64 // itemsize(dtype)


def stacked(gates: int, backward: bool, precision: str | None) -> int:
    """States that a lone program multiplies at once. Backward the slots of all gates, and zeros up to a power of two:
    they take one way through shared memory. But one by one where products are scalar, because zeros cost as much there.
    """
    return 1 << (gates - 1).bit_length() if backward and precision != "ieee" else 1


def runs_backwards(reversed_sets: int, n: int) -> bool:
    """Whether weight set n runs backwards in time. reversed_sets: 0 none, 1 all, 2 every second one."""
    return reversed_sets == 1 or (reversed_sets == 2 and n % 2 == 1)


def integer_from_environment(
    name: str, default: int | None, largest: int | None = None, smallest: int = 1
) -> int | None:
    """The integer of an environment variable, `smallest` or more; ValueError that names it for anything else."""
    text = os.environ.get(name)
    if text is None:
        return default
    digits = text.strip()
    good = digits.isascii() and digits.isdigit()
    if not good or int(digits) < smallest or (largest is not None and int(digits) > largest):
        most = "" if largest is None else f", at most {largest}"
        hint = "" if good else " (digits alone: no comma, point, sign or exponent)"
        raise ValueError(
            f"the environment variable {name} should be an integer, at least {smallest}{most}, got: {text!r}{hint}"
        )
    return int(digits)


def choice_from_environment(name: str, choices: tuple[Text, ...]) -> Text:
    """The value of an environment variable, one of `choices`; the first where it is not set. ValueError that names it
    for anything else.
    """
    text = os.environ.get(name, choices[0])
    for choice in choices:
        if text == choice:
            return choice
    raise ValueError(f"the environment variable {name} should be one of {', '.join(choices)}, got: {text!r}")


# Polls before a wait becomes an error. A poll takes half a microsecond or more: this is 10 seconds at the least, far
# more than a neighbour can be late while the whole grid is resident, and short enough for a person to see an error
# instead of a hang. Read here, so that importing the package checks it.
WAIT_LIMIT = integer_from_environment("RNN_GPU_WAIT_LIMIT", 20_000_000, largest=(1 << 31) - 1)
