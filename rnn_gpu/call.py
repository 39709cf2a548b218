"""What a call of a layer is, decided once where it begins (base.py) and handed on as three things: its tensors
(`Inputs`), where its rows lie (`Rows`), and everything else (`Call`). Each route takes all three.

T steps, B rows of the batch, R rows of all steps, I input features, N weight sets (directions), G gates, H hidden
units, P the size of a projected state (H where there is no projection).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .kernels.rows import Rows
from .kernels.spec import CELLS, runs_backwards

Weights = Tensor | Sequence[Tensor]  # one tensor [N, ...], or one of each set

# The schema of an operator that takes a layer's tensors, and where its rows lie (B is told by h0).
TENSORS = (
    "Tensor input, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? weight_hr, "
    "Tensor? start, Tensor h0, Tensor? c0, Tensor? parameters, Tensor? lengths, Tensor? offsets, Tensor? resets, "
    "Tensor? dropped, Tensor? kept_h, Tensor? kept_c, SymInt time"
)
# And of one that takes what else of a call it must know: `Call.how`.
HOW = "str cell, int reversed_sets, bool cells, float? clip, float[]? zoneout"


class Inputs(NamedTuple):
    """The tensors of a layer that have a gradient, all of one dtype."""

    input: Tensor  # [R, I]
    weight_ih: Weights  # [N, G*H, I]
    weight_hh: Weights  # [N, G*H, P]
    bias_ih: Weights | None  # [N, G*H]
    bias_hh: Weights | None
    weight_hr: Weights | None  # [N, P, H]: the projection of an LSTM; the kernels know none (projection.py)
    start: Tensor | None  # [N, B, G*H], added to the gate sums of each row's first step: for the kernels alone
    h0: Tensor | None  # [N, B, P]; None for zeros, but only where the launchers are called directly
    c0: Tensor | None  # [N, B, K*H], the states beside h (LSTM: c), or None; as h0
    parameters: Tensor | None = None  # [N, P*H], for cells that have some


class Call(NamedTuple):
    """Everything else: no tensor, the same for all layers of a stack, and constant in a graph."""

    cell: str  # its name in kernels.spec.CELLS
    sets: int  # N
    reversed_sets: int  # 0: no set runs backwards in time; 1: all; 2: every second one
    biases: bool = True
    projected: bool = False
    route: str = "kernels"  # functional.ROUTES
    # What a forward keeps for its backward: "nothing"; the outputs and states, from which the backward makes the gates
    # again by one product ("lean"); or the gates too ("full").
    saving: str = "nothing"
    limits: tuple[int, bool] = (0, True)  # of plans: settings.limits
    functional: bool = False  # for torch.func, which maps operators: each layer is one, and results are all it has
    cells: bool = False  # c of every step is a result, too
    clip: float | None = None  # most that the gradient of h may be at each step, by element
    zoneout: tuple[float, float] | None = None  # probabilities that h and the states are kept; in eval what stays
    recurrent_dropout: float = 0.0  # on h before the recurrent product
    training: bool = False
    heads: int = 1  # K: then weight_hh is [N, G*H, H/K] (heads.py); for the kernels alone
    watch: Callable[[int, Tensor], Tensor] | None = None  # on the route "reference": sees every h (reference.py)
    precision: str | None = None  # of float32 products when a direct call began; None: as PyTorch's switches say then

    @property
    def how(self) -> tuple:
        """The arguments of HOW."""
        return self.cell, self.reversed_sets, self.cells, self.clip, self.rates

    @property
    def rates(self) -> tuple[float, float] | None:
        """What stays of h and of the states in every step, for all units alike: zoneout in eval."""
        return None if self.training else self.zoneout

    @property
    def kernel_rates(self) -> tuple[float | None, float | None]:
        """The same as the kernels take it: None where nothing stays."""
        if self.zoneout is None:
            return None, None
        rate_h, rate_c = self.rates or (0.0, 0.0)
        return float(rate_h) or None, float(rate_c) or None  # a whole 1 would be compiled into the kernel

    @property
    def beyond_aten(self) -> bool:
        """Whether something is asked for that PyTorch's own kernels do not know."""
        return self.cells or self.clip is not None or self.zoneout is not None or self.recurrent_dropout > 0

    @property
    def keeps_gates(self) -> bool:
        """Whether the forward leaves the gates for a backward."""
        return self.saving == "full" and CELLS[self.cell].saves > 0

    def backwards(self, n: int) -> bool:
        """Whether set n runs backwards in time."""
        return runs_backwards(self.reversed_sets, n)


COUNT = len(Inputs._fields)
MASKS = len(Rows._fields) - 2  # the tensors among them


def taken(arguments: Sequence) -> tuple[Inputs, Rows]:
    """`*inputs, *rows`, as the autograd Functions take them, as what they are."""
    return Inputs(*arguments[:COUNT]), Rows(*arguments[COUNT : COUNT + len(Rows._fields)])


def taken_by_operator(arguments: Sequence) -> tuple[Inputs, Rows]:
    """The same of TENSORS."""
    inputs = Inputs(*arguments[:COUNT])
    *masks, time = arguments[COUNT : COUNT + MASKS + 1]
    assert inputs.h0 is not None
    return inputs, Rows(time, inputs.h0.shape[1], *masks)


def for_operator(inputs: Inputs, rows: Rows) -> tuple:
    """The arguments of TENSORS."""
    return *inputs, *rows[2:], rows.time


PLAIN = {Tensor, torch.nn.Parameter}


def directly(tensors: Sequence[Tensor]) -> bool:
    """Whether the launchers may be called without the operators around them: nobody compiles, exports, transforms,
    traces or looks on, and the tensors are plain ones.
    """
    return _nobody_traces() and PLAIN.issuperset(map(type, tensors))


def nobody_looks_on() -> bool:
    """Whether an eager call is a plain one: nobody compiles, transforms, traces, casts or differentiates forwards."""
    return _nobody_traces() and not torch._C._is_any_autocast_enabled() and forward_ad._current_level < 0


def _nobody_traces() -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def by_sets(rows: Tensor | None, sets: int) -> Tensor | None:
    """[R, N*H] as [R, N, H]; None, and what is so already, as it is."""
    return rows if rows is None or rows.dim() == 3 else rows.view(rows.shape[0], sets, rows.shape[1] // sets)


def by_kind(weights: Sequence, sets: int) -> list[Sequence | None]:
    """weight_ih, weight_hh, bias_ih and bias_hh of all sets or layers, a kind after another -> each kind's, or None."""
    kinds = [weights[first : first + sets] for first in range(0, len(weights), sets)]
    return kinds + [None] * (4 - len(kinds))


def in_turn(weights: Sequence, each: int) -> list[Sequence | None]:
    """The same from torch.nn's order: all weights of a layer and direction, `each` of them, then those of the next."""
    return [weights[i::each] for i in range(each)] + [None] * (4 - each)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The weights of all directions as one tensor, without a copy where there is one direction."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tuple(tensors))
