"""What the host must know about each cell: sizes and names, no device code (cells.py has the equations)."""

import os
from dataclasses import dataclass
from typing import TypeVar

Text = TypeVar("Text", bound=str)


@dataclass(frozen=True)
class Cell:
    """A recurrent cell.

    gates: G, the tiles of the input's and of the hidden state's part.
    slots: E, the gradients a unit publishes backwards; the first G are at the hidden side of the gate sums, in the
        order `slot_order` of the gates, the last G at the input side, in the order of the gates.
    carry: what stays in registers from step to step besides h: "c" (LSTM, float32), "h" (GRU: its own h) or None.
    saves_gates: the backward needs the gates; otherwise the output y is enough.
    aux: what else it needs: "c" (float32), "q" (the hidden part of the GRU's n), or "y".
    """

    name: str
    gates: int
    slots: int
    slot_order: tuple
    carry: str | None
    saves_gates: bool
    aux: str
    mode: str  # name of the torch.nn layer's mode

    @property
    def bias_apart(self) -> bool:
        """Whether the hidden bias of the last gate must be added to the hidden state's part (GRU: before r)."""
        return self.aux == "q"

    def keeps_aux(self, saving: str) -> bool:
        """Whether a forward that saves "nothing", "lean" or "full" writes aux beside y."""
        return self.aux != "y" and (saving == "full" or (saving == "lean" and self.aux == "c"))


CELLS = {
    cell.name: cell
    for cell in (
        Cell("lstm", 4, 4, (0, 1, 2, 3), "c", True, "c", "LSTM"),
        # The hidden side wants (r * dn, dr, dz), the input side (dr, dz, dn): four slots in this order hold both as
        # neighbours.
        Cell("gru", 3, 4, (2, 0, 1), "h", True, "q", "GRU"),
        Cell("rnn_tanh", 1, 1, (0,), None, False, "y", "RNN_TANH"),
        Cell("rnn_relu", 1, 1, (0,), None, False, "y", "RNN_RELU"),
    )
}

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
