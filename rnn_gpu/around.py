"""What stands around the recurrence of a layer, in plain torch: the input's part of the gates, or all gates made again,
and the gradients of its inputs from those of the gates.

T steps, B rows of the batch, R rows of all steps, I input features, N weight sets, G gates, A of them apart, K states
beside h, H hidden units, E slots a unit.
"""

import functools
import itertools

import torch
from torch import Tensor

from . import backends, operators, reference
from .call import Call, Inputs, directly, stacked
from .kernels.spec import CELLS, padded
from .products import (
    beside_zeros,
    full_product,
    is_large,
    of_weight,
    to_multiply,
    with_gaps,
    with_room,
    without_gaps,
)
from .rows import Rows, first_rows, past_the_end, rows_before, rows_of_batch, starts_anew


def input_part(inputs: Inputs, rows: Rows, call: Call) -> tuple[Tensor, Tensor | None]:
    """The input's part of the gates [R, N, G*H] with every bias but that of gates apart, and that [N, A*H] or None."""
    weight_ih = inputs.weight_ih if isinstance(inputs.weight_ih, Tensor) else stacked(inputs.weight_ih)
    bias, bias_hn = None, None
    if inputs.bias_ih is not None:
        pairs = zip(inputs.bias_ih, inputs.bias_hh, strict=True)
        bias, bias_hn = zip(*(reference.fold_biases(call.cell, *pair) for pair in pairs), strict=True)
        bias, bias_hn = torch.cat(bias), None if bias_hn[0] is None else torch.stack(bias_hn)
    gates = torch.nn.functional.linear(inputs.input, weight_ih.flatten(0, 1), bias)
    gates = gates.view(gates.shape[0], *weight_ih.shape[:2])
    if inputs.start is not None:
        if call.route == "direct":
            add_start(gates, inputs.start, rows, call)
        else:  # neither what vmap does not map nor what a mode keeps may be written into
            row, place = torch.arange(gates.shape[0], device=gates.device), torch.arange(call.sets, device=gates.device)
            first = [row[first_rows(rows, gates.shape[0], call.backwards(n))] for n in range(call.sets)]
            first = torch.stack(first), place.unsqueeze(1)
            gates = gates.index_put(first, gates[first] + inputs.start)
    return gates, bias_hn


def add_start(gates: Tensor, start: Tensor, rows: Rows, call: Call) -> None:
    """Add start [N, B, G*H] to the gate sums [R, N, G*H] of each row's first step, in place."""
    for n in range(start.shape[0]):
        gates[first_rows(rows, gates.shape[0], call.backwards(n)), n] += start[n]


def gates_again(
    inputs: Inputs, rows: Rows, call: Call, y: Tensor, aux: Tensor | None, carries: Tensor | None
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
    states = aux if carries is None or carries.numel() == 0 else carries
    states = y.new_empty(0) if states is None else states
    begin = inputs.h0, inputs.c0
    if directly((sums, y)):  # in place, which spares memory
        how = places, batch, inputs.parameters
        again = operators.launchers().saved_again(call.cell, sums, sums, apart, y, states, *begin, *how)
        return sums, aux if again is None else again
    how = inputs.parameters, places, batch, call.cell
    gates, again = operators.saved_again(sums, apart, y, states, *begin, *how)
    return gates, again if again.dim() > 1 else aux


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


def products_by_set(
    call: Call, wanted: Inputs, d_h_n: Tensor | None, inputs: Inputs, rows: Rows, y: Tensor, d_gates: Tensor,
    d_carry_0: Tensor | None, d_parameters: Tensor | None, d_kept_0: Tensor | None,
) -> tuple[Tensor | list[Tensor] | None, ...]:  # fmt: skip
    """The gradients that `wanted` says, as `gradients_by_set` has them, from what the recurrence backwards gave, as
    layer.backward does; y [R, N, H].
    """
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
    found = dict.fromkeys(Inputs._fields)
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
            found["bias_hh"] = (torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0].clone()).unbind()
        if wanted.bias_ih:
            found["bias_ih"] = inner.unbind()
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
