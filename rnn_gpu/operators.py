"""The door between torch and the kernels of a layer: plans as a call asks for them, and opaque operators for the
recurrence and for gates that are made again, for graphs and transforms. (Eager calls go to the launchers, autograd.py;
stacks have operators of their own, stack_operators.py.)

T steps, B rows of the batch, R rows of all steps (T * B, or fewer where sequences are packed), N weight sets
(directions), G gates, A of them apart, K states beside h, H hidden units, E slots a unit (kernels/spec.py).

Where rows lie, and what is drawn for a layer, is said by the tensors of `kernels.rows.Rows` and time (T), everywhere.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from . import backends, inductor
from .call import Call, Weights
from .kernels.buffers import aligned
from .kernels.plan import Plan
from .kernels.spec import CELLS, known, padded
from .library import fake, no_derivative, operator_of, without_tangents
from .rows import Rows


@functools.cache
def launchers() -> Any:
    """kernels/layer.py, which needs Triton; an import statement in a function takes as long as a small product."""
    from .kernels import layer

    return layer


# Plans, and the groups of a stack's layers (wavefront.py), by all that they depend on, in the terms of a call:
# backends.py takes longer to look for the same.
remembered: dict[tuple, Any] = {}


def plan_of(
    call: Call, hidden_size: int, like: Tensor, batch: int, backward: bool, ragged: bool, layers: int = 1
) -> Plan:
    """The plan of one pass, of so many layers side by side; RuntimeError where there is none."""
    precision = call.precision
    if precision is None and like.dtype == torch.float32:
        precision = backends.precision_of("float32")
    place = hidden_size, like.dtype, like.device, batch, call.sets, ragged, layers
    key: tuple = call.cell, backward, call.limits, precision, *place
    if not backward:
        key = *key, call.saving
    plan = remembered.get(key)
    if plan is None:
        cell = known(call.cell)
        name, device = backends.name_of(like.dtype), backends.device_of(like.device)
        problem = call.cell, hidden_size, batch, call.sets, name, device, backward, ragged
        plan = backends.plan_for(*problem, call.limits, precision, call.saving, layers)
        if isinstance(plan, str):
            raise RuntimeError(f"rnn_gpu: no plan for {cell.name}: {plan}")
        if like.device.index is not None or like.device.type != "cuda":
            remembered[key] = plan
    return plan


def plan_anew() -> None:
    """Forget plans and groups: something else has been measured."""
    remembered.clear()


def _of_rows(mask: Tensor | None) -> Tensor | None:
    """A tensor that says where rows lie as the kernels take it. One of many that vmap maps may begin anywhere."""
    return None if mask is None else aligned(mask)


@operator_of("recurrence")
@without_tangents
def recurrence(
    x_part: Tensor, weight_hh: Tensor, bias_hn: Tensor | None, h0: Tensor, c0: Tensor | None, parameters: Tensor | None,
    lengths: Tensor | None, offsets: Tensor | None, resets: Tensor | None, dropped: Tensor | None,
    kept_h: Tensor | None, kept_c: Tensor | None, time: int, cell: str, reversed_sets: int, max_programs: int,
    alone: bool, saving: str, rate_h: float | None, rate_c: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The recurrence forward, for all steps and sets. It writes into nothing that it is given: neither may a tensor
    that torch.func maps over be written into, nor what a selective checkpoint gives again without what came after.

    x_part [R, N, G*H]: the input's part of the gates with every bias but bias_hn.
    weight_hh [N, G*H, H]; bias_hn [N, A*H], hidden biases of gates apart (GRU: of n), or None; h0 [N, B, H]; c0 [N, B,
    K*H], the states beside h (LSTM: c), or None.
    lengths int32 [B], offsets int64 [T+1], resets int8 [T, B], dropped float32 [N, B, H], kept_h and kept_c int8 [R, N,
    H] (`Rows`): each may be None. rate_h, rate_c: what stays of h and of the states in every step where there is no
    mask, or None. reversed_sets: 0 no set runs backwards in time, 1 all, 2 every second one. max_programs, alone: what
    a plan may use, see `settings.limits`. saving: see `Call`.
    -> y [R, N, H]; h_n [N, B, H]; c_n [N, B, K*H], empty for cells without states; the gates [R, N, G*H] if `saving`
    is "full" and the cell needs them, else empty; aux, what the backward needs besides; and what else, see
    `Cell.keeps_carries`, [R, N, ...], else empty.
    """
    batch, sets = h0.shape[1], x_part.shape[1]
    rows = Rows(time, batch, *map(_of_rows, (lengths, offsets, resets)), dropped, kept_h, kept_c)
    call = Call(cell, sets, reversed_sets, saving=saving, limits=(max_programs, alone))
    plan = plan_of(call, weight_hh.shape[-1], x_part, batch, False, rows.ragged)
    x_part = aligned(x_part)
    gates = None
    if call.keeps_gates:  # the kernel writes none past a row's end, and whoever looks at results finds no NaN there
        padded_rows = lengths is not None and offsets is None
        gates = torch.zeros_like(x_part) if padded_rows else torch.empty_like(x_part)
    how = dict(parameters=parameters, rates=(rate_h, rate_c), gates=gates)
    found = launchers().forward(plan, x_part, weight_hh, bias_hn, h0, c0, rows, reversed_sets, saving, **how)
    y, h_n, c_n, *kept = found
    return y, h_n, *(x_part.new_empty(0) if one is None else one for one in (c_n, gates, *kept))


no_derivative(
    "recurrence",
    "Trying to backward through rnn_gpu.recurrence, which an exported program holds without its backward: train the "
    "module that was exported (docs/limits.md).",
)


@fake("recurrence")
def _(
    x_part, weight_hh, bias_hn, h0, c0, parameters, lengths, offsets, resets, dropped, kept_h, kept_c, time, cell,
    reversed_sets, max_programs, alone, saving, rate_h, rate_c,
):  # fmt: skip
    inductor.fall_back()
    (count, sets, _), hidden_size, batch = x_part.shape, weight_hh.shape[-1], h0.shape[1]
    size = padded(hidden_size, backends.name_of(x_part.dtype))
    spec = known(cell)
    if dropped is None:
        y = x_part.new_empty((count + 2 * batch, sets, size))[batch : batch + count, :, :hidden_size]
    else:
        y = x_part.new_empty((count, sets, size))[:, :, :hidden_size]
    h_n = x_part.new_empty((sets, batch, hidden_size))
    c_n = x_part.new_empty((sets, batch, len(spec.states) * hidden_size) if spec.states else 0)
    gates = x_part.new_empty(x_part.shape if saving == "full" and spec.saves else 0)
    aux = x_part.new_empty(0)
    if spec.keeps_aux(saving):
        exact = torch.float32 if spec.states else x_part.dtype
        aux = x_part.new_empty((count, sets, spec.planes * size), dtype=exact)
    carries = x_part.new_empty(0)
    if spec.keeps_carries(saving, kept_c is not None or rate_c is not None, rate_h):
        width, exact = (len(spec.states), torch.float32) if spec.states else (1, x_part.dtype)
        carries = x_part.new_empty((count, sets, width * size), dtype=exact)
    return y, h_n, c_n, gates, aux, carries


@operator_of("recurrence_backward")
@without_tangents
def recurrence_backward(
    d_y: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None, d_cells: Tensor | None, weight_hh: Tensor,
    gates: Tensor, aux: Tensor, carries: Tensor, y: Tensor, h0: Tensor, c0: Tensor | None, parameters: Tensor | None,
    lengths: Tensor | None, offsets: Tensor | None, resets: Tensor | None, dropped: Tensor | None,
    kept_h: Tensor | None, kept_c: Tensor | None, time: int, cell: str, reversed_sets: int, max_programs: int,
    alone: bool, clip: float | None, rate_h: float | None, rate_c: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The recurrence backward, for all steps and sets.

    d_y [R, N, H], d_h_n [N, B, H] and d_c_n [N, B, K*H], d_cells [R, N, K*H], by the states of every step: gradients,
    None for zero. clip: what the gradient of h is brought within at every step, -clip..clip, or None. The rest as
    `recurrence` took and left it.
    -> d_gates [R, N, E, H]: gradients of the gate sums by slot; d_carry_0, empty for cells that carry nothing: of c0,
    [N, B, K*H], where there are states; where h is carried (GRU), in float32, what of h0's gradient does not pass
    through the gates; d_parameters [N, B, P*H] in float32, each row's part, empty where there are none; d_kept_0 [N, B,
    H] in float32, where a part of h is kept and not carried, what of h0's gradient comes that way, else empty.
    """
    rows = Rows(time, h0.shape[1], *map(_of_rows, (lengths, offsets, resets)), dropped, kept_h, kept_c)
    kept = None if rate_h is None and rate_c is None else (rate_h or 0.0, rate_c or 0.0)
    call = Call(cell, y.shape[1], reversed_sets, limits=(max_programs, alone), clip=clip, zoneout=kept)
    d_outputs, states, saved = (d_y, d_h_n, d_c_n, d_cells), (h0, c0, parameters), (y, gates, aux, carries)
    d_gates, *others = backward_directly(call, d_outputs, weight_hh, states, rows, saved)
    return d_gates, *(y.new_empty(0) if one is None else one for one in others)


@fake("recurrence_backward")
def _(
    d_y, d_h_n, d_c_n, d_cells, weight_hh, gates, aux, carries, y, h0, c0, parameters, lengths, offsets, resets,
    dropped, kept_h, kept_c, time, cell, reversed_sets, max_programs, alone, clip, rate_h, rate_c,
):  # fmt: skip
    (count, sets, hidden_size), batch = y.shape, h0.shape[1]
    size = padded(hidden_size, backends.name_of(y.dtype))
    spec = known(cell)
    d_gates = y.new_empty((count + 2 * batch, sets, spec.slots, size))
    d_gates = d_gates[batch : batch + count, ..., :hidden_size]

    def by_rows(count: int, dtype: torch.dtype) -> Tensor:
        if count == 0:
            return y.new_empty(0)
        return y.new_empty((batch, sets, count * hidden_size), dtype=dtype).transpose(0, 1)

    exact, keeps = y.dtype if spec.states else torch.float32, kept_h is not None or rate_h is not None
    d_kept_0 = by_rows(int(keeps and not spec.carries_h), torch.float32)
    return d_gates, by_rows(spec.carried, exact), by_rows(len(spec.parameters), torch.float32), d_kept_0


def backward_directly(call: Call, d_outputs: tuple, weight_hh: Weights, states: tuple, rows: Rows, saved: tuple):
    """The recurrence backwards by the launcher; arguments and results as of `recurrence_backward`."""
    (*of_results, d_cells), (y, gates, aux, carries), (h0, c0, parameters) = d_outputs, saved, states
    plan = plan_of(call, y.shape[2], y, rows.batch, True, rows.ragged)
    gates = gates if CELLS[call.cell].saves else None
    how = rows, call.reversed_sets, d_cells, call.clip, parameters, call.kernel_rates, carries
    return launchers().backward(plan, *of_results, weight_hh, gates, aux, y, h0, c0, *how)


@operator_of("saved_again")
def saved_again(
    sums: Tensor, apart: Tensor | None, y: Tensor, aux: Tensor, h0: Tensor | None, c0: Tensor | None,
    parameters: Tensor | None, places: Tensor | None, batch: int, cell: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the forward saved, made again from the gate sums [R, N, G*H], see `layer.saved_again`: gates [R, N, G*H],
    and aux, or empty where that has been kept.
    """
    gates = torch.empty_like(sums := aligned(sums))
    made = launchers().saved_again(cell, sums, gates, apart, y, aux, h0, c0, places, batch, parameters)
    return gates, y.new_empty(0) if made is None else made


@fake("saved_again")
def _(sums, apart, y, aux, h0, c0, parameters, places, batch, cell):
    inductor.fall_back()
    spec, (count, sets, hidden_size) = CELLS[cell], y.shape
    gates = sums.new_empty(sums.shape)
    if spec.further and not spec.states:
        return gates, y.new_empty(count, sets, spec.planes * padded(hidden_size, backends.name_of(y.dtype)))
    return gates, y.new_empty(0)
