"""The oracle: every recurrence as a plain loop over time, which all other code is compared with.

Written to be read. Any floating dtype (the tests use float64), any device, torch alone. Nothing is written
in place and no branch depends on data, so autograd differentiates the forward any number of times and
torch.func transforms it; the library's second derivatives and forward mode run the loop forward (`recurrence`), and so
does a cell that has no kernels and that PyTorch does not know.
What goes backwards step by step (`recurrence_backward`) and what is there to compare with (`layer`) serves
documentation and tests alone: the kernels' backward has the same order.

Glossary, for every shape in this file:

    T  time steps                 B  batch rows
    I  input size                 H  hidden size
    G  gates of the cell          A  gates apart         K  states beside h         P  parameters (kernels/spec.py)
    N  weight sets (directions); every function here serves one, so N appears in no shape

Cells by their name in `CELLS`; the step of each is its own (equations.py has those of the built-in cells). Gates lie
side by side in the last dimension, in the order of the cell; taken apart they are a tuple of G tensors [B, H]. So do
states: c [B, K*H].

The carry is what a unit keeps for itself from step to step, beside the h that all units read: its states (LSTM: c),
its own h (GRU), or nothing (RNN).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .kernels.spec import CELLS, Cell

Gates = tuple[Tensor, ...]


# ---- What the loops share ------------------------------------------------------------------------


def time_order(steps: int, reverse: bool) -> range:
    """Indices of time in the direction of flow."""
    return range(steps - 1, -1, -1) if reverse else range(steps)


def hidden_gates(cell: str, h: Tensor, weight_hh: Tensor, bias_hn: Tensor | None) -> Gates:
    """Hidden side of the gate sums: W_hh h, and the biases of the gates apart (GRU: b_hn).

    h [B, H], weight_hh [G*H, H], bias_hn [A*H] or None -> G of [B, H].
    """
    spec = CELLS[cell]
    gates = (h @ weight_hh.T).chunk(spec.gates, dim=-1)
    if bias_hn is None:
        return gates
    first = spec.gates - spec.apart
    biases = bias_hn.chunk(spec.apart)
    return (*gates[:first], *(gate + bias for gate, bias in zip(gates[first:], biases, strict=True)))


def step(cell: Cell, x: Gates, r: Gates, carry: Gates, parameters: Gates = ()) -> tuple[Tensor, Gates]:
    """One step of a cell -> h, carry."""
    return cell.step(x, r, carry, parameters) if cell.parameters else cell.step(x, r, carry)


def check_step(cell: Cell) -> None:
    """ValueError where a cell's step raises, or gives no (h, carry) of the shape and type of its gates."""
    zeros = lambda *shape: tuple(torch.zeros(*shape, dtype=torch.float64, device="cpu"))
    given, wrong = [zeros(n, 2, 3) for n in (cell.gates, cell.gates, cell.carried)], f"step of {cell.name}:"
    try:
        results = step(cell, *given, zeros(len(cell.parameters), 3))
    except Exception as error:  # of whatever kind: the step is a user's
        raise ValueError(f"{wrong} {type(error).__name__}: {error}") from error
    if not (isinstance(results, tuple) and len(results) == 2 and isinstance(results[1], tuple)):
        raise ValueError(f"{wrong} returns {type(results).__name__}, expected (h, carry) with carry a tuple")
    h, carry = results
    if len(carry) != cell.carried:
        raise ValueError(f"{wrong} returns {len(carry)} values to carry, expected {cell.carried}")
    for what, one in zip(("h", *(cell.states or "h")), (h, *carry), strict=False):
        if not isinstance(one, Tensor) or one.shape != (2, 3) or one.dtype != torch.float64:
            got = f"{list(one.shape)} {one.dtype}" if isinstance(one, Tensor) else type(one).__name__
            raise ValueError(f"{wrong} {what} is {got}, expected the shape and type of the gates")


def carry_from(cell: Cell, h: Tensor, c: Tensor | None) -> Gates:
    """What a unit carries, from its states: h [B, H], c [B, K*H] -> of [B, H]."""
    return c.chunk(len(cell.states), -1) if cell.states else (h,) if cell.carries_h else ()


def split_parameters(cell: Cell, parameters: Tensor | None) -> Gates:
    """[P*H] -> P of [H]."""
    return () if parameters is None else parameters.chunk(len(cell.parameters), -1)


def previous_states(y: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    """The h each step started from: y one step later in the direction of flow, h0 for the first.

    y [T, B, H], h0 [B, H] -> h_prev [T, B, H], in the order of time. Without lengths and resets.
    """
    return torch.cat([y[1:], h0[None]]) if reverse else torch.cat([h0[None], y[:-1]])


def fold_biases(cell: str, bias_ih: Tensor | None, bias_hh: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Split a layer's biases into what x_part takes and what must stay on the hidden side.

    bias_ih, bias_hh [G*H] or None -> bias of x_part [G*H] or None, bias_hn [A*H] or None: the hidden biases of the
    gates apart (the GRU's n, because r multiplies it).
    """
    bias_hn, spec = None, CELLS[cell]
    if spec.apart and bias_hh is not None:
        split = len(bias_hh) // spec.gates * (spec.gates - spec.apart)
        bias_hh, bias_hn = bias_hh[:split], bias_hh[split:]
        bias_hh = torch.cat([bias_hh, torch.zeros_like(bias_hn)])
    if bias_ih is None or bias_hh is None:
        return (bias_hh if bias_ih is None else bias_ih), bias_hn
    return bias_ih + bias_hh, bias_hn


def active_steps(lengths: Tensor, steps: int) -> Tensor:
    """lengths, int [B] -> bool [T, B], true within each row's sequence. Lengths act as if clamped to 0..T."""
    return torch.arange(steps, device=lengths.device)[:, None] < lengths


def choose(mask: Tensor | None, t: int, new: Tensor, old: Tensor | float) -> Tensor:
    """new [B, H] in the rows where mask [T, B] is true at t, else old; new in all rows if mask is None."""
    return new if mask is None else torch.where(mask[t].unsqueeze(-1), new, old)


def mixed(kept: Tensor | float | None, t: int, new: Tensor, old: Tensor) -> Tensor:
    """new [B, H] but for what is kept of the old: all where kept [T, B, H] is true at t, or a part of all."""
    if kept is None:
        return new
    return torch.where(kept[t], old, new) if isinstance(kept, Tensor) else kept * old + (1 - kept) * new


def check_arguments(cell: str, bias_hn: Tensor | None, c0: Tensor | None) -> None:
    """Refuse what would otherwise be ignored: an oracle answers no other question than the one asked."""
    if cell not in CELLS:
        raise ValueError(f"unknown cell {cell!r}, expected one of {', '.join(CELLS)}")
    if (c0 is not None) != bool(CELLS[cell].states):
        raise ValueError(f"c0 is for cells with states, which need it; got cell {cell!r} and c0 {type(c0).__name__}")
    if bias_hn is not None and not CELLS[cell].apart:
        raise ValueError(f"bias_hn is for cells with gates apart; got cell {cell!r}")


# ---- Loops over time: forward --------------------------------------------------------------------


def recurrence(
    cell: str,
    x_part: Tensor,
    weight_hh: Tensor,
    bias_hn: Tensor | None,
    h0: Tensor,
    c0: Tensor | None = None,
    reverse: bool = False,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    see: Callable[[int, Tensor], Tensor] | None = None,
    cells: list[Tensor] | None = None,
    parameters: Tensor | None = None,
    dropped: Tensor | None = None,
    kept_h: Tensor | float | None = None,
    kept_c: Tensor | float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sequential part of one layer and direction: everything that needs the h of the step before.

    x_part     [T, B, G*H]  input product and every bias but those of gates apart; T >= 1
    weight_hh  [G*H, H]
    bias_hn    [A*H]        hidden biases of gates apart (GRU: of n); None for zeros, and for other cells
    h0         [B, H]
    c0         [B, K*H]     states beside h (LSTM: c), None for cells without
    reverse    time flows from T-1 to 0; y stays in the order of time
    lengths    int [B]      steps of each row. Past its end a row keeps its state and shows zeros in y, and
                            x_part there never matters, NaN included; reverse starts at the row's end
    resets     bool [T, B]  where true, h and all states of the row are zeroed before step t, in the direction of
                            flow; past the row's end they do nothing
    see                     a function of t and h_t [B, H], called in the direction of flow, that gives what goes on
                            in place of h_t: a projection of it [B, P] (h0 and weight_hh have P, then), or itself
    cells                   a list that the states of every step are appended to, as one tensor [T, B, K*H], zeros past
                            a row's end
    parameters [P*H]        for cells with parameters
    dropped    [B, H]       what h is multiplied with before the product with weight_hh (Gal and Ghahramani 2016)
    kept_h, kept_c          zoneout (Krueger et al. 2017): bool [T, B, H], where a unit keeps its h, or all its states,
                            of the step before; or a number, what stays of them everywhere; None for nothing

    Returns y [T, B, H], h_n [B, H], and c_n [B, K*H] or None. One floating dtype throughout.
    """
    check_arguments(cell, bias_hn, c0)
    spec, steps = CELLS[cell], x_part.shape[0]
    of_unit = split_parameters(spec, parameters)
    active = kept = None
    if lengths is not None:
        active = active_steps(lengths, steps)
        x_part = torch.where(active.unsqueeze(-1), x_part, 0)  # 0 * NaN would reach the gradients
    if resets is not None:
        kept = ~resets
    h, c = h0, c0
    y: dict[int, Tensor] = {}
    every: dict[int, Tensor] = {}
    for t in time_order(steps, reverse):
        # Where nothing depends on a state, nothing may reach it either: 0 * NaN would.
        h_start, c_start = (
            None if state is None else choose(active, t, choose(kept, t, state, 0), 0) for state in (h, c)
        )
        x_gates = x_part[t].chunk(spec.gates, dim=-1)
        h_sent = h_start if dropped is None else (h_start * dropped).to(h_start.dtype)
        h_gates, carry = hidden_gates(cell, h_sent, weight_hh, bias_hn), carry_from(spec, h_start, c_start)
        h_new, carry_new = step(spec, x_gates, h_gates, carry, of_unit)
        h_new = mixed(kept_h, t, h_new, h_start)
        if spec.states:
            carry_new = tuple(mixed(kept_c, t, *pair) for pair in zip(carry_new, carry, strict=True))
        if see is not None:
            h_new = see(t, h_new)
        y[t] = choose(active, t, h_new, 0)
        h = choose(active, t, h_new, h)
        if spec.states:
            c_new = carry_new[0] if len(carry_new) == 1 else torch.cat(carry_new, -1)
            every[t], c = choose(active, t, c_new, 0), choose(active, t, c_new, c)
    if cells is not None:
        cells.append(torch.stack([every[t] for t in range(steps)]))
    return torch.stack([y[t] for t in range(steps)]), h, c


def layer(
    cell: str,
    input: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor | None = None,
    reverse: bool = False,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    parameters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer and direction: the input product, then the recurrence.

    input             [T, B, I]
    weight_ih         [G*H, I]
    weight_hh         [G*H, H]
    bias_ih, bias_hh  [G*H] or None
    the rest          as in `recurrence`

    Returns y [T, B, H], h_n [B, H], and c_n [B, K*H] or None. One floating dtype throughout.
    """
    if lengths is not None:  # else NaN in the padding would reach the gradient of weight_ih
        input = torch.where(active_steps(lengths, input.shape[0]).unsqueeze(-1), input, 0)
    bias, bias_hn = fold_biases(cell, bias_ih, bias_hh)
    x_part = input @ weight_ih.T
    if bias is not None:
        x_part = x_part + bias
    return recurrence(
        cell, x_part, weight_hh, bias_hn, h0, c0, reverse, lengths=lengths, resets=resets, parameters=parameters
    )


# ---- Loops over time: backward -------------------------------------------------------------------


def recurrence_backward(
    cell: str,
    x_part: Tensor,
    weight_hh: Tensor,
    bias_hn: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    y: Tensor,
    d_y: Tensor,
    d_h_n: Tensor,
    d_c_n: Tensor | None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Backward of `recurrence`, as the kernels do it: every step forward, then backwards in time, step by step.

    x_part, weight_hh, bias_hn, h0, c0, reverse as in `recurrence`; y [T, B, H] its result;
    d_y [T, B, H], d_h_n [B, H] and, for cells with states, d_c_n [B, K*H] (else None) the gradients of its results.

    d_h at step t is d_y[t] plus d_hidden @ weight_hh of the step after; for the last step this product is
    d_h_n. The product alone needs other units, the rest of a step is element-wise. No lengths, no resets.

    Returns
    d_hidden  [T, B, G*H]  by the hidden side of the gate sums; for the GRU d_r, d_z, r * d_n
    d_input   [T, B, G*H]  by the input side, so by x_part; for the GRU d_r, d_z, d_n; else equal to d_hidden
    d_h0      [B, H]
    d_c0      [B, K*H]     or None

    Those of the weights are products outside the loop: d_weight_hh = sum_t d_hidden[t].T @ h_prev[t] with h_prev of
    `previous_states`, d_weight_ih = sum_t d_input[t].T @ input[t], and the biases' are the sums over t and rows.
    """
    check_arguments(cell, bias_hn, c0)
    spec, order = CELLS[cell], time_order(x_part.shape[0], reverse)
    h_prev = previous_states(y, h0, reverse)

    steps: dict[int, StepBackward] = {}
    carry = carry_from(spec, h0, c0)
    for t in order:
        x_gates = x_part[t].chunk(spec.gates, dim=-1)
        steps[t] = StepBackward(spec, x_gates, hidden_gates(cell, h_prev[t], weight_hh, bias_hn), carry)
        carry = steps[t].carry

    d_hidden: dict[int, Tensor] = {}
    d_input: dict[int, Tensor] = {}
    d_h, d_carry = d_h_n, tuple(torch.zeros_like(one) for one in carry)
    if d_c_n is not None:
        d_carry = carry_from(spec, d_h_n, d_c_n)
    for t in reversed(order):
        d_x_gates, d_h_gates, d_carry = steps[t].backward(d_y[t] + d_h, d_carry)
        d_hidden[t], d_input[t] = torch.cat(d_h_gates, dim=-1), torch.cat(d_x_gates, dim=-1)
        d_h = d_hidden[t] @ weight_hh

    # d_h came through weight_hh alone. What is carried began as the states, or as h0.
    d_h0 = d_h + d_carry[0] if spec.carries_h else d_h
    d_c0 = torch.cat(d_carry, -1) if spec.states else None
    times = range(x_part.shape[0])
    return torch.stack([d_hidden[t] for t in times]), torch.stack([d_input[t] for t in times]), d_h0, d_c0


class StepBackward:
    """One step, kept for its backward: x, r of [B, H], carry -> h, carry; gradients of those -> gradients of x, r and
    the carry of before, by autograd of the cell's step.
    """

    def __init__(self, cell: Cell, x: Gates, r: Gates, carry: Gates, parameters: Gates = ()):
        with torch.enable_grad():
            given = [tuple(one.detach().requires_grad_() for one in part) for part in (x, r, carry, parameters)]
            self.leaves = [one for part in given for one in part]
            self.h, self.carry = step(cell, *given)
        self.counts = [len(part) for part in given]

    def backward(self, d_h: Tensor, d_carry: Gates) -> list[Gates]:
        """Gradients of h and the carry -> those of x, r, the carry before (and the parameters, where there are any)."""
        found = torch.autograd.grad(
            [self.h, *self.carry], self.leaves, [d_h, *d_carry], allow_unused=True, materialize_grads=True
        )
        parts = torch.tensor(self.counts).cumsum(0).tolist()
        split = [tuple(found[end - count : end]) for count, end in zip(self.counts, parts, strict=True)]
        return split if self.counts[3] else split[:3]
