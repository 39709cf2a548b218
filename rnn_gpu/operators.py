"""The one door between torch and the kernels: opaque operators for the recurrence, autograd Functions around them.

A Function stands for one layer with all its directions. The recurrence alone is opaque; the products before and after
it are plain torch. T steps, B rows of the batch, R rows of all steps (T * B, or fewer where sequences are packed), I
input features, N weight sets (directions), G gates, A of them apart, K states beside h, H hidden units, E slots a unit
(kernels/spec.py).

Where rows lie is said by four arguments everywhere: time (T), lengths, offsets, resets, as in `kernels.rows.Rows`.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, inductor, reference
from .call import COUNT, MASKS, Call, Inputs, Weights, taken
from .kernels.plan import Plan
from .kernels.spec import CELLS, known, padded
from .many_gradients import for_each_gradient, in_a_batch
from .products import (
    beside_zeros,
    full_product,
    input_product,
    is_large,
    of_weight,
    to_multiply,
    with_gaps,
    with_room,
    without_gaps,
)
from .rows import Rows, first_rows, past_the_end, rows_before, rows_of_batch, starts_anew
from .second_order import save_for_second, second_backward

# What a forward keeps for its backward: nothing; the outputs and states, from which the backward makes the gates again
# by one product ("lean"); or the gates too, in the memory of the input part ("full").
SAVING = ("nothing", "lean", "full")


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


@torch.library.custom_op("rnn_gpu::recurrence", mutates_args=("x_part",))
def recurrence(
    x_part: Tensor,
    weight_hh: Tensor,
    bias_hn: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    parameters: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    dropped: Tensor | None,
    kept_h: Tensor | None,
    kept_c: Tensor | None,
    time: int,
    cell: str,
    reversed_sets: int,
    max_programs: int,
    alone: bool,
    saving: str,
    rate_h: float | None,
    rate_c: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The recurrence forward, for all steps and sets.

    x_part [R, N, G*H]: the input's part of the gates with every bias but bias_hn; becomes the gates if `saving` is
    "full".
    weight_hh [N, G*H, H]; bias_hn [N, A*H], hidden biases of gates apart (GRU: of n), or None; h0 [N, B, H]; c0 [N, B,
    K*H], the states beside h (LSTM: c), or None.
    lengths int32 [B], offsets int64 [T+1], resets int8 [T, B], dropped float32 [N, B, H], kept_h and kept_c int8 [R, N,
    H] (`Rows`): each may be None. rate_h, rate_c: what stays of h and of the states in every step where there is no
    mask, or None. reversed_sets: 0 no set runs backwards in time, 1 all, 2 every second one. max_programs, alone: what
    a plan may use, see `backends.limits`. saving: see SAVING.
    -> y [R, N, H]; h_n [N, B, H]; c_n [N, B, K*H], empty for cells without states; aux, what the backward needs
    besides; and what else, see `Cell.keeps_carries`, [R, N, ...], else empty.
    """
    from .kernels import layer

    batch, sets = h0.shape[1], x_part.shape[1]
    rows = Rows(time, batch, lengths, offsets, resets, dropped, kept_h, kept_c)
    call = Call(cell, sets, reversed_sets, saving=saving, limits=(max_programs, alone))
    plan = plan_of(call, weight_hh.shape[-1], x_part, batch, False, rows.ragged)
    how = dict(parameters=parameters, rates=(rate_h, rate_c))
    results = layer.forward(plan, x_part, weight_hh, bias_hn, h0, c0, rows, reversed_sets, saving, **how)
    return tuple(x_part.new_empty(0) if one is None else one for one in results)


@recurrence.register_fake
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
    aux = x_part.new_empty(0)
    if spec.keeps_aux(saving):
        exact = torch.float32 if spec.states else x_part.dtype
        aux = x_part.new_empty((count, sets, spec.planes * size), dtype=exact)
    carries = x_part.new_empty(0)
    if spec.keeps_carries(saving, kept_c is not None or rate_c is not None, rate_h):
        width, exact = (len(spec.states), torch.float32) if spec.states else (1, x_part.dtype)
        carries = x_part.new_empty((count, sets, width * size), dtype=exact)
    return y, h_n, c_n, aux, carries


@torch.library.custom_op("rnn_gpu::recurrence_functional", mutates_args=())
def recurrence_functional(
    x_part: Tensor,
    weight_hh: Tensor,
    bias_hn: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    parameters: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    dropped: Tensor | None,
    kept_h: Tensor | None,
    kept_c: Tensor | None,
    time: int,
    cell: str,
    reversed_sets: int,
    max_programs: int,
    alone: bool,
    saving: str,
    rate_h: float | None,
    rate_c: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`recurrence` for torch.func, which cannot write into a tensor that it maps over: x_part stays.

    -> what `recurrence` gives, and the gates [R, N, G*H].
    """
    gates = x_part.clone(memory_format=torch.contiguous_format)
    results = recurrence(
        gates, weight_hh, bias_hn, h0, c0, parameters, lengths, offsets, resets, dropped, kept_h, kept_c, time, cell,
        reversed_sets, max_programs, alone, saving, rate_h, rate_c,
    )  # fmt: skip
    return *results, gates


@recurrence_functional.register_fake
def _(x_part, *arguments):
    gates = torch.empty_like(x_part, memory_format=torch.contiguous_format)
    return *recurrence(gates, *arguments), gates


@torch.library.custom_op("rnn_gpu::recurrence_backward", mutates_args=())
def recurrence_backward(
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    d_cells: Tensor | None,
    weight_hh: Tensor,
    gates: Tensor,
    aux: Tensor,
    carries: Tensor,
    y: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    parameters: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    dropped: Tensor | None,
    kept_h: Tensor | None,
    kept_c: Tensor | None,
    time: int,
    cell: str,
    reversed_sets: int,
    max_programs: int,
    alone: bool,
    clip: float | None,
    rate_h: float | None,
    rate_c: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The recurrence backward, for all steps and sets.

    d_y [R, N, H], d_h_n [N, B, H] and d_c_n [N, B, K*H], d_cells [R, N, K*H], by the states of every step: gradients,
    None for zero. clip: what the gradient of h is brought within at every step, -clip..clip, or None. The rest as
    `recurrence` took and left it.
    -> d_gates [R, N, E, H]: gradients of the gate sums by slot; d_carry_0, empty for cells that carry nothing: of c0,
    [N, B, K*H], where there are states; where h is carried (GRU), in float32, what of h0's gradient does not pass
    through the gates; d_parameters [N, B, P*H] in float32, each row's part, empty where there are none; d_kept_0 [N, B,
    H] in float32, where a part of h is kept and not carried, what of h0's gradient comes that way, else empty.
    """
    batch = y.shape[0] // time if offsets is None else lengths.shape[0]
    rows = Rows(time, batch, lengths, offsets, resets, dropped, kept_h, kept_c)
    kept = None if rate_h is None and rate_c is None else (rate_h or 0.0, rate_c or 0.0)
    call = Call(cell, y.shape[1], reversed_sets, limits=(max_programs, alone), clip=clip, zoneout=kept)
    d_outputs, states, saved = (d_y, d_h_n, d_c_n, d_cells), (h0, c0, parameters), (y, gates, aux, carries)
    d_gates, *others = backward_directly(call, d_outputs, weight_hh, states, rows, saved)
    return d_gates, *(y.new_empty(0) if one is None else one for one in others)


@recurrence_backward.register_fake
def _(
    d_y,
    d_h_n,
    d_c_n,
    d_cells,
    weight_hh,
    gates,
    aux,
    carries,
    y,
    h0,
    c0,
    parameters,
    lengths,
    offsets,
    resets,
    dropped,
    kept_h,
    kept_c,
    time,
    cell,
    reversed_sets,
    max_programs,
    alone,
    clip,
    rate_h,
    rate_c,
):
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


class Layer(torch.autograd.Function):
    """One layer, all directions: (call, *inputs, *rows) -> (y, h_n, c_n, cells), and what the backward needs.

    inputs, rows: `call.Inputs` without weight_hr, and `Rows`.
    -> y [R, N, H], h_n [N, B, H], c_n [N, B, K*H] (empty for cells without states), the states of every step [R, N,
    K*H] (empty where call.cells is not set), gates [R, N, G*H], aux and carries, which are not differentiable.
    """

    generate_vmap_rule = True

    @staticmethod  # each argument by name: torch.compile takes the first of a forward(*arguments) for ctx
    def forward(
        call, input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, start, h0, c0, parameters, time, batch,
        lengths, offsets, resets, dropped, kept_h, kept_c,
    ):  # fmt: skip
        """The input product, then the recurrence."""
        inputs = Inputs(input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, start, h0, c0, parameters)
        rows = Rows(time, batch, lengths, offsets, resets, dropped, kept_h, kept_c)
        gates, bias_hn = input_part(inputs, rows, call)
        how = time, call.cell, call.reversed_sets, *call.limits, call.saving, *call.kernel_rates
        if call.functional:
            *results, gates = recurrence_functional(gates, weight_hh, bias_hn, h0, c0, parameters, *rows[2:], *how)
        else:
            results = recurrence(gates, weight_hh, bias_hn, h0, c0, parameters, *rows[2:], *how)
        y, h_n, c_n, aux, carries = results
        cells = cells_of(carries if carries.numel() else aux, y, rows, call) if call.cells else y.new_empty(0)
        if not (call.saving == "full" and CELLS[call.cell].saves):
            gates = gates.new_empty(0)
        return y, h_n, c_n, cells, gates, aux, carries

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Save what the backward needs."""
        ctx.call, *tensors = inputs
        given, rows = taken(tensors)
        y, *_, gates, aux, carries = output
        ctx.save_for_backward(*given, *rows[2:], y, gates, aux, carries)
        ctx.sizes = rows[:2]
        ctx.mark_non_differentiable(gates, aux, carries)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, d_y, d_h_n, d_c_n, d_cells, *_kept):
        """The gradients that are needed; differentiable themselves where a graph of the backward is made."""
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint makes them again, and each once
        inputs, (*masks, y, gates, aux, carries) = saved[:COUNT], saved[COUNT:]
        gradients = LayerBackward.apply if torch.is_grad_enabled() else layer_gradients
        need = ctx.needs_input_grad[1 : 1 + COUNT]
        run = lambda *d: gradients(ctx.call, need, *d, *inputs, *ctx.sizes, *masks, y, gates, aux, carries)
        found = for_each_gradient(run, (d_y, d_h_n, d_c_n, d_cells if ctx.call.cells else None))
        return None, *found, *[None] * len(Rows._fields)


def cells_of(aux: Tensor, y: Tensor, rows: Rows, call: Call) -> Tensor:
    """The states of every step [R, N, K*H] in y's type, in memory of their own, zeros past a row's end, from what the
    forward has kept of them, [R, N, K*HS] and whatever behind.
    """
    count, size = len(CELLS[call.cell].states), padded(y.shape[2], backends.name_of(y.dtype))
    states = aux[..., : count * size].unflatten(-1, (count, size))[..., : y.shape[2]]
    cells = y.new_empty(*y.shape[:2], count * y.shape[2])
    cells.unflatten(-1, (count, -1)).copy_(states)
    if rows.lengths is not None and rows.offsets is None:
        cells = cells.masked_fill_(past_the_end(rows).flatten()[:, None, None], 0)
    return cells


def input_part(inputs: Inputs, rows: Rows, call: Call) -> tuple[Tensor, Tensor | None]:
    """The input's part of the gates [R, N, G*H] with every bias but that of gates apart, and that [N, A*H] or None."""
    weight_ih = inputs.weight_ih if isinstance(inputs.weight_ih, Tensor) else stacked(inputs.weight_ih)
    bias, bias_hn = None, None
    if inputs.bias_ih is not None:
        pairs = zip(inputs.bias_ih, inputs.bias_hh, strict=True)
        bias, bias_hn = zip(*(reference.fold_biases(call.cell, *pair) for pair in pairs), strict=True)
        bias, bias_hn = torch.cat(bias), None if bias_hn[0] is None else torch.stack(bias_hn)
    gates = torch.nn.functional.linear(inputs.input, weight_ih.flatten(0, 1), bias)
    gates = gates.view(-1, *weight_ih.shape[:2])
    if inputs.start is not None:
        if call.functional:  # where start is mapped by vmap and the gates are not, they could not be written into
            gates = gates + torch.zeros_like(inputs.start[0]).sum(0)
        add_start(gates, inputs.start, rows, call)
    return gates, bias_hn


def add_start(gates: Tensor, start: Tensor, rows: Rows, call: Call) -> None:
    """Add start [N, B, G*H] to the gate sums [R, N, G*H] of each row's first step, in place."""
    for n in range(start.shape[0]):
        gates[first_rows(rows, gates.shape[0], call.backwards(n)), n] += start[n]


def gates_again(
    inputs: Inputs, rows: Rows, call: Call, y: Tensor, aux: Tensor, carries: Tensor
) -> tuple[Tensor, Tensor]:
    """gates [R, N, G*H] and aux as a forward with saving "full" leaves them, from outputs and states: lean memory."""
    batch_row = None if rows.dropped is None else rows_of_batch(rows, y.shape[0])
    sums, bias_hn = input_part(inputs, rows, call)
    cell, (count, sets, hidden_size), batch = CELLS[call.cell], y.shape, rows.batch
    split = (cell.gates - cell.apart) * hidden_size  # before it the gates whose sums are x + r
    apart = y.new_empty(count, sets, cell.apart * hidden_size) if cell.apart else None
    places = None
    if cell.carried:  # as of rows that start anew: padding too has a place, where nothing is read
        places = torch.full((count, sets), -1 - batch, dtype=torch.int64, device=y.device)
    before, after = rows_before(rows, count), slice(batch, count)
    row = torch.arange(max(count, batch), device=y.device)
    for n in range(sets):
        later, earlier = (before, after) if call.backwards(n) else (after, before)
        first = first_rows(rows, count, call.backwards(n))
        state = torch.zeros_like(y[:, n])
        state[later] = y[earlier, n]
        if inputs.h0 is not None:
            state[first] = inputs.h0[n]
        if places is not None:
            places[later, n] = row[:count][earlier]
            places[first, n] = -1 - row[:batch]
        if rows.resets is not None:
            anew = starts_anew(rows.resets, slice(None))
            state = state.masked_fill(anew, 0)
            if places is not None:
                places[:, n] = places[:, n].masked_fill(anew.squeeze(1), -1 - batch)
        if batch_row is not None:
            state = (state * rows.dropped[n][batch_row]).to(state.dtype)
        weight = inputs.weight_hh[n]
        if split:
            sums[:, n, :split] = torch.addmm(sums[:, n, :split], state, weight[:split].t())
        if apart is not None:
            apart[:, n] = torch.nn.functional.linear(state, weight[split:], None if bias_hn is None else bias_hn[n])
    states = carries if carries.numel() else aux
    made = saved_again(sums, apart, y, states, inputs.h0, inputs.c0, inputs.parameters, places, batch, call.cell)
    return sums, made if made.dim() > 1 else aux


@torch.library.custom_op("rnn_gpu::saved_again", mutates_args=("sums",))
def saved_again(
    sums: Tensor,
    apart: Tensor | None,
    y: Tensor,
    aux: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    parameters: Tensor | None,
    places: Tensor | None,
    batch: int,
    cell: str,
) -> Tensor:
    """The gate sums [R, N, G*H] become what the forward saved, see `layer.saved_again`. -> aux, or empty where that
    has been kept.
    """
    from .kernels import layer

    made = layer.saved_again(cell, sums, apart, y, aux, h0, c0, places, batch, parameters)
    return y.new_empty(0) if made is None else made


@saved_again.register_fake
def _(sums, apart, y, aux, h0, c0, parameters, places, batch, cell):
    inductor.fall_back()
    spec, (count, sets, hidden_size) = CELLS[cell], y.shape
    if spec.further and not spec.states:
        return y.new_empty(count, sets, spec.planes * padded(hidden_size, backends.name_of(y.dtype)))
    return y.new_empty(0)


def layer_gradients(
    call: Call, need: Sequence[bool], d_y, d_h_n, d_c_n, d_cells, *arguments
) -> tuple[Tensor | None, ...]:
    """The gradients of a layer's inputs, None where not needed. arguments: inputs, rows, y, gates, aux, carries."""
    inputs, rows = taken(arguments)
    saved = arguments[-4:]
    found = gradients_by_set(backward_by_operator, call, need, (d_y, d_h_n, d_c_n, d_cells), inputs, rows, saved)
    return tuple(torch.stack(one) if isinstance(one, list) else one for one in found)


def gradients_by_set(
    backward: Callable, call: Call, need: Sequence[bool], d_outputs: tuple, inputs: Inputs, rows: Rows, saved: tuple
) -> tuple[Tensor | list[Tensor] | None, ...]:
    """The gradients of a layer's inputs, those of weights and biases as a list with one for each set, None where not
    needed: the recurrence backwards, then products with its gate gradients.

    backward: `recurrence_backward` of what a call has, by the operator or directly. saved: y, gates, aux, carries.
    """
    y, gates, aux, carries = saved
    if CELLS[call.cell].saves and gates.numel() == 0 < y.numel():
        gates, aux = gates_again(inputs, rows, call, y, aux, carries)
    states = inputs.h0, inputs.c0, inputs.parameters
    found = backward(call, d_outputs, inputs.weight_hh, states, rows, (y, gates, aux, carries))
    return products_by_set(call, Inputs(*need), d_outputs[1], inputs, rows, y, *found)


def backward_by_operator(call: Call, d_outputs: tuple, weight_hh: Weights, states: tuple, rows: Rows, saved: tuple):
    """The recurrence backwards as `recurrence_backward`."""
    y, *left = saved
    how = rows.time, call.cell, call.reversed_sets, *call.limits, call.clip, *call.kernel_rates
    return recurrence_backward(*d_outputs, weight_hh, *left, y, *states, *rows[2:], *how)


def backward_directly(call: Call, d_outputs: tuple, weight_hh: Weights, states: tuple, rows: Rows, saved: tuple):
    """The same by the launcher."""
    from .kernels import layer

    (*of_results, d_cells), (y, gates, aux, carries), (h0, c0, parameters) = d_outputs, saved, states
    plan = plan_of(call, y.shape[2], y, rows.batch, True, rows.ragged)
    gates = gates if CELLS[call.cell].saves else None
    how = rows, call.reversed_sets, d_cells, call.clip, parameters, call.kernel_rates, carries
    return layer.backward(plan, *of_results, weight_hh, gates, aux, y, h0, c0, *how)


def products_by_set(
    call: Call, wanted: Inputs, d_h_n: Tensor | None, inputs: Inputs, rows: Rows, y: Tensor, d_gates: Tensor,
    d_carry_0: Tensor | None, d_parameters: Tensor | None, d_kept_0: Tensor | None,
) -> tuple[Tensor | list[Tensor] | None, ...]:  # fmt: skip
    """The same from what the recurrence backwards gave, as layer.backward does; y [R, N, H]."""
    cell, h0, lengths, resets = CELLS[call.cell], inputs.h0, rows.lengths, rows.resets
    (count, sets, size), gates = y.shape, cell.gates
    plain, of_slots = directly((y, d_gates)), d_gates
    # Else a compiler may lay them out in another way, and pads products itself. Small ones are as a graph has them.
    if plain and is_large(y.numel(), gates * size):
        d_gates, y = with_gaps(d_gates), y if rows.dropped is not None else with_gaps(y)
    wide, width = d_gates.shape[3], y.shape[2]  # H or HS: rows of a gate, and columns of y
    of_set = (lambda tensor, n: tensor.flatten(1)) if sets == 1 else (lambda tensor, n: tensor[:, n].flatten(1))
    by_gate = cell.slot_of_gate
    before, after = rows_before(rows, count), slice(rows.batch, count)
    batch_row = None if rows.dropped is None else rows_of_batch(rows, count)
    found = {key: None for key in Inputs._fields}
    for key in ("weight_ih", "weight_hh", "start", "h0"):
        found[key] = [] if getattr(wanted, key) else None
    if wanted.input or wanted.weight_ih:
        x, columns = inputs.input, inputs.input.shape[1]
        x = to_multiply(x, gates * size) if plain else x
    for n in range(sets):
        hidden = inner = slots = of_set(d_gates, n)  # [R, E*HS]
        if cell.slots > gates:
            hidden, inner = slots[:, : gates * wide], slots[:, slots.shape[-1] - gates * wide :]
        first = d_first = state = None
        if wanted.start or wanted.h0 or (wanted.weight_hh and h0 is not None):
            first = first_rows(rows, count, call.backwards(n))
            d_first, state = hidden[first], None if h0 is None else h0[n]
            if lengths is not None and state is not None:  # a row without a step has gradients of zero: times NaN, NaN
                state = state.masked_fill((lengths == 0).unsqueeze(1), 0)
            if resets is not None:  # nothing of before reaches a step whose row starts anew
                anew = starts_anew(resets, first)
                d_first, state = d_first.masked_fill(anew, 0), None if state is None else state.masked_fill(anew, 0)
            if rows.dropped is not None and state is not None:
                state = (state * rows.dropped[n]).to(state.dtype)
        if wanted.input:
            weight = with_room(inputs.weight_ih[n], gates, wide, x.shape[1])
            found["input"] = inner @ weight if n == 0 else torch.addmm(found["input"], inner, weight)
        if wanted.weight_ih:
            found["weight_ih"].append(of_weight(inner.t() @ x, gates, size, columns))
        if wanted.weight_hh:
            later, earlier = (before, after) if call.backwards(n) else (after, before)
            d_later, h_earlier = hidden[later], of_set(y, n)[earlier]
            if resets is not None:
                anew = starts_anew(resets, later)
                d_later, h_earlier = d_later.masked_fill(anew, 0), h_earlier.masked_fill(anew, 0)
            if batch_row is not None:
                h_earlier = (h_earlier * rows.dropped[n][batch_row[later]]).to(y.dtype)
            if state is None:
                product = d_later.t() @ h_earlier
            else:
                product = torch.addmm(d_first.t() @ beside_zeros(state, width), d_later.t(), h_earlier)
            found["weight_hh"].append(_reordered(of_weight(product, gates, size, size), by_gate))
        if wanted.start:
            found["start"].append(without_gaps(inner[first], 1, gates, size))
        if wanted.h0:
            d_first = without_gaps(d_first, 1, gates, size)
            # In full: one step's product, whose error in tf32 no sum over steps makes small.
            d_h0 = full_product(d_first, _reordered(inputs.weight_hh[n], cell.slot_order))
            d_h0 = d_h0 if rows.dropped is None else (d_h0 * rows.dropped[n]).to(h0.dtype)
            d_h0 = (d_h0 + d_carry_0[n]).to(h0.dtype) if cell.carries_h else d_h0
            if d_kept_0 is not None and d_kept_0.numel():
                d_h0 = (d_h0 + d_kept_0[n]).to(h0.dtype)
            if lengths is not None and d_h_n is not None:  # an empty sequence ends in the state it began with
                d_h0 = torch.where((lengths == 0).unsqueeze(1), d_h_n[n], d_h0)
            found["h0"].append(d_h0)
    if wanted.bias_ih or wanted.bias_hh:
        summed = of_slots.sum(0).flatten(1)  # [N, E*H], all slots of both biases at once
        inner = summed[:, summed.shape[1] - gates * size :]
        if wanted.bias_hh:  # memory of its own: gradients are changed in place
            pieces = [summed[:, piece.start * size : piece.stop * size] for piece in pieces_of(by_gate)]
            found["bias_hh"] = [*(torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0].clone())]
        if wanted.bias_ih:
            found["bias_ih"] = [*inner]
    if wanted.input and found["input"].shape[1] > columns:
        found["input"] = found["input"][:, :columns].contiguous()
    for key in ("start", "h0"):
        found[key] = None if found[key] is None else torch.stack(found[key]) if sets > 1 else found[key][0].unsqueeze(0)
    if wanted.c0 and cell.states:
        found["c0"] = d_carry_0
    if wanted.parameters:
        found["parameters"] = d_parameters.sum(1).to(y.dtype)
    return tuple(found.values())


@functools.cache
def pieces_of(order: tuple[int, ...]) -> tuple[slice, ...]:
    """An order as slices, as few as will do. An index made of a Python list would be copied to the device each time."""
    begins = [i for i in range(len(order)) if i == 0 or order[i] != order[i - 1] + 1] + [len(order)]
    return tuple(slice(order[begin], order[begin] + end - begin) for begin, end in itertools.pairwise(begins))


def _reordered(rows: Tensor, order: tuple[int, ...]) -> Tensor:
    """Rows [G*H, ...] with their G parts in another order; as they are where it is the same."""
    pieces, size = pieces_of(order), rows.shape[0] // len(order)
    if len(pieces) == 1:
        return rows
    return torch.cat([rows[piece.start * size : piece.stop * size] for piece in pieces])


class LayerBackward(torch.autograd.Function):
    """`layer_gradients`, differentiable again: through the readable loop of reference.py, which is slow and right."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        """See `layer_gradients`. No view: users change gradients in place, which is an error for a view from here."""
        found = layer_gradients(*arguments)
        return tuple(one.clone() if one is not None and one._is_view() else one for one in found)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Save gradients and inputs; the reference makes the rest again."""
        save_for_second(ctx, inputs)

    @staticmethod
    def backward(ctx, *d_gradients):
        """Differentiate the gradients of the reference by everything they depend on."""
        return second_backward(ctx, d_gradients)


# The eager way --------------------------------------------------------------------------------------------------------

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


def run_directly(
    inputs: Inputs, rows: Rows, call: Call, h_n: Tensor | None = None, c_n: Tensor | None = None,
    y: Tensor | None = None, gates: Tensor | None = None, aux: Tensor | None = None,
):  # fmt: skip
    """One layer forward, all directions -> y [R, N*H], or [R, N, H] where it has gaps, h_n and c_n [N, B, H], gates [R,
    N*G*H], aux, carries. inputs: weights and biases as one tensor of each set. y: a buffer for it; h_n, c_n, gates,
    aux: where to write those; or new tensors.
    """
    from .kernels import layer

    input, weight_hh = inputs.input, inputs.weight_hh
    plan = plan_of(call, weight_hh[0].shape[1], input, rows.batch, False, rows.ragged)
    weights, sent = (weight_hh, inputs.weight_ih, inputs.bias_ih, inputs.bias_hh), layer.sent(inputs.h0, rows)
    begun = layer.begin(plan, rows, input.shape[0], sent, *weights, y=y)
    gates = input_product(input, begun.weight_ih, begun.bias, gates)
    if inputs.start is not None:
        add_start(gates.unflatten(1, (call.sets, -1)), inputs.start, rows, call)
    states, how = (inputs.h0, inputs.c0), (call.reversed_sets, call.saving)
    more = inputs.parameters, call.kernel_rates
    how = *how, h_n, c_n, *more
    y, h_n, c_n, *kept = layer.go_on(plan, begun, gates, *states, rows, *how, flat=True, aux=aux)
    return y, h_n, c_n, gates, *kept


class EagerLayer(torch.autograd.Function):
    """`Layer` for eager calls: (call, rows, input, start, h0, c0, parameters, *weights) -> (y [R, N*H], h_n, c_n,
    cells). weights: weight_ih of each direction, then weight_hh and, if there are biases, bias_ih and bias_hh.

    No `setup_context`: with it, every call would ask Python for the signature of `forward`.
    """

    @staticmethod
    def forward(ctx, call: Call, rows: Rows, input, start, h0, c0, parameters, *weights):
        """The input product, then the recurrence."""
        inputs = Inputs(input, *by_kind(weights, call.sets), None, start, h0, c0, parameters)
        y, h_n, c_n, gates, aux, carries = run_directly(inputs, rows, call)
        cells = None
        if call.cells:
            cells = cells_of(aux if carries is None else carries, by_sets(y, call.sets), rows, call)
        kept = gates if call.saving == "full" and CELLS[call.cell].saves else None
        ctx.save_for_backward(*rows[2:], y, kept, aux, carries, input, start, h0, c0, parameters, *weights)
        ctx.call, ctx.sizes = call, rows[:2]
        ctx.set_materialize_grads(False)
        return y, h_n, c_n, cells

    @staticmethod
    def backward(ctx, *d_outputs):
        """The gradients that are needed; differentiable themselves where a graph of the backward is made."""
        own = MASKS + 9
        *masks, y, gates, aux, carries, input, start, h0, c0, parameters = (kept := ctx.saved_tensors)[:own]
        call, rows, weights = ctx.call, Rows(*ctx.sizes, *masks), by_kind(kept[own:], ctx.call.sets)
        by_input, *by_state, by_parameters = ctx.needs_input_grad[2:7]
        by_weight = ctx.needs_input_grad[7:]
        need = by_input, *(kind is not None and any(kind) for kind in by_kind(by_weight, call.sets))
        need, y = (*need, False, *by_state, by_parameters), by_sets(y, call.sets)
        saved = y, *(y.new_empty(0) if one is None else one for one in (gates, aux, carries))
        if torch.is_grad_enabled() or any(map(in_a_batch, d_outputs)):
            kinds = [None if kind is None else stacked(kind) for kind in weights]
            h0 = y.new_zeros(call.sets, rows.batch, y.shape[2]) if h0 is None else h0
            if c0 is None and CELLS[call.cell].states:
                c0 = y.new_zeros(call.sets, rows.batch, len(CELLS[call.cell].states) * y.shape[2])
            gradients = LayerBackward.apply if torch.is_grad_enabled() else layer_gradients
            states = start, h0, c0, parameters
            rest = *kinds, None, *states, *rows, *saved
            run = lambda d_y, *d: gradients(call, need, by_sets(d_y, call.sets), *d, input, *rest)
            found = for_each_gradient(run, d_outputs)
        else:
            inputs = Inputs(input, *weights, None, start, h0, c0, parameters)
            found = gradients_by_set(backward_directly, call, need, d_outputs, inputs, rows, saved)
        d_input, *d_kinds, _, d_start, d_h0, d_c0, d_parameters = found
        count = len(by_weight) // call.sets
        d_weights = [None if d is None else d[n] for d in d_kinds[:count] for n in range(call.sets)]
        return None, None, d_input, d_start, d_h0, d_c0, d_parameters, *d_weights


def by_sets(rows: Tensor | None, sets: int) -> Tensor | None:
    """[R, N*H] as [R, N, H]; None, and what is so already, as it is."""
    return rows if rows is None or rows.dim() == 3 else rows.view(len(rows), sets, rows.shape[1] // sets)


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
