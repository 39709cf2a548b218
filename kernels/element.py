"""The functions of a cell on single elements, with no loop and nothing rounded in between: for `check_cell`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import concurrent_programs
from .spec import Cell


@triton.jit
def _rows(p, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    x = ()
    for i in tl.static_range(COUNT):
        x = x + (tl.load(p + i * BLOCK + tl.arange(0, BLOCK)),)
    return x


@triton.jit
def _put(p, first: tl.constexpr, tiles, BLOCK: tl.constexpr):
    for i in tl.static_range(len(tiles)):
        tl.store(p + (first + i) * BLOCK + tl.arange(0, BLOCK), tiles[i])


@triton.jit
def element(
    x, r, carry, p, dh, dcarry, ahead, back, FORWARD: tl.constexpr, FACTORS: tl.constexpr, CELL: tl.constexpr,
    G: tl.constexpr, E: tl.constexpr, CARRIED: tl.constexpr, STATES: tl.constexpr, PARAMETERS: tl.constexpr,
    SAVES: tl.constexpr, READS_H: tl.constexpr, QUIET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ahead: becomes h and the carry; back: slots, the carry's gradient of before, the parameters'. QUIET: all that the
    forward saves is taken as zero.
    """
    before = _rows(carry, CARRIED, BLOCK)
    if PARAMETERS > 0:
        of_unit = _rows(p, PARAMETERS, BLOCK)
        h, kept, saved = FORWARD(_rows(x, G, BLOCK), _rows(r, G, BLOCK), before, of_unit)
    else:
        h, kept, saved = FORWARD(_rows(x, G, BLOCK), _rows(r, G, BLOCK), before)
    tl.static_assert(len(saved) == SAVES, "forward gives another number of values for the backward than `saves` says")
    _put(ahead, 0, (h,), BLOCK)
    _put(ahead, 1, kept, BLOCK)
    after = ()
    for i in tl.static_range(STATES):
        after = after + (tl.zeros((BLOCK,), tl.float32) if QUIET else kept[i],)
    if READS_H:
        after = (tl.zeros((BLOCK,), tl.float32) if QUIET else h,)
    values = ()
    for i in tl.static_range(len(saved)):
        values = values + (tl.zeros((BLOCK,), tl.float32) if QUIET else saved[i],)
    if PARAMETERS > 0:
        factors = FACTORS(values, before, after, of_unit)
        slots, kept, of_step = CELL(factors, _rows(dh, 1, BLOCK)[0], _rows(dcarry, CARRIED, BLOCK))
        _put(back, E + CARRIED, of_step, BLOCK)
    else:
        factors = FACTORS(values, before, after)
        slots, kept = CELL(factors, _rows(dh, 1, BLOCK)[0], _rows(dcarry, CARRIED, BLOCK))
    _put(back, 0, slots, BLOCK)
    _put(back, E, kept, BLOCK)


def elements(cell: Cell, x, r, carry, p, d_h: Tensor, d_carry: Tensor, saved: float | None = None):
    """The results of a cell's Triton functions for tuples of [n], in float32 and in the interpreter: h and the carry;
    slots; gradients of the carry before; of the parameters. saved: 0.0, to take all that is saved as zero.
    """
    count = d_h.numel()
    stack = lambda part: torch.stack([*part]).float().contiguous() if len(part) else torch.zeros(1, count)
    ahead = torch.full((1 + cell.carried, count), torch.nan)
    back = torch.full((cell.slots + cell.carried + len(cell.parameters), count), torch.nan)
    with concurrent_programs():  # which knows inline assembly
        element[(1,)](
            stack(x), stack(r), stack(carry), stack(p), d_h.float().contiguous(), stack(d_carry), ahead, back,
            cell.function("forward"), cell.function("factors"), cell.function("backward"), cell.gates, cell.slots,
            cell.carried, len(cell.states), len(cell.parameters), cell.saves, cell.reads_h, saved is not None, count,
        )  # fmt: skip
    first = cell.slots + cell.carried
    return ahead, back[: cell.slots], back[cell.slots : first], back[first:]
