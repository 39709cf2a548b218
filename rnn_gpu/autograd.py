"""The autograd Functions of a layer with all its directions: by the operators, and for eager calls by the launchers.

The recurrence alone is opaque; the products before and after it are plain torch (around.py). T steps, B rows of the
batch, R rows of all steps, N weight sets, G gates, K states beside h, H hidden units.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .around import add_start, cells_of, gates_again, input_part, products_by_set
from .call import COUNT, MASKS, Call, Inputs, Weights, by_kind, by_sets, stacked, taken
from .kernels.spec import CELLS
from .library import autocasts
from .many_gradients import Linear, for_each_gradient, in_a_batch, transformed
from .operators import backward_directly, launchers, plan_of, recurrence, recurrence_backward
from .products import input_product
from .rows import Rows
from .second_order import AgainByReference


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
        x_part, bias_hn = input_part(inputs, rows, call)
        how = time, call.cell, call.reversed_sets, *call.limits, call.saving, *call.kernel_rates
        results = recurrence(x_part, weight_hh, bias_hn, h0, c0, parameters, *rows[2:], *how)
        y, h_n, c_n, gates, aux, carries = results
        cells = cells_of(carries if carries.numel() else aux, y, rows, call) if call.cells else y.new_empty(0)
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


def layer_gradients(
    call: Call, need: Sequence[bool], d_y, d_h_n, d_c_n, d_cells, *arguments
) -> tuple[Tensor | None, ...]:
    """The gradients of a layer's inputs, None where not needed. arguments: inputs, rows, y, gates, aux, carries."""
    inputs, rows = taken(arguments)
    d_outputs, saved = (d_y, d_h_n, d_c_n, d_cells), arguments[-4:]
    found = gradients_by_set(backward_by_operator, call, Inputs(*need), d_outputs, inputs, rows, saved)
    return tuple(torch.stack(one) if isinstance(one, list | tuple) else one for one in found)


def gradients_by_set(
    backward: Callable, call: Call, need: Inputs, d_outputs: tuple, inputs: Inputs, rows: Rows, saved: tuple
) -> tuple[Tensor | list[Tensor] | None, ...]:
    """The gradients of a layer's inputs, those of weights and biases as a list with one for each set, None where not
    needed: the recurrence backwards, then products with its gate gradients.

    backward: `recurrence_backward` of what a call has, by the operator or directly. saved: y, gates, aux, carries, for
    the operator empty where nothing was saved, else None.
    """
    y, gates, aux, carries = saved
    if CELLS[call.cell].saves and (gates is None or gates.numel() == 0) and y.numel() > 0:
        gates, aux = gates_again(inputs, rows, call, y, aux, carries)
    states = inputs.h0, inputs.c0, inputs.parameters
    found = backward(call, d_outputs, inputs.weight_hh, states, rows, (y, gates, aux, carries))
    return products_by_set(call, need, d_outputs[1], inputs, rows, y, *found)


def backward_by_operator(call: Call, d_outputs: tuple, weight_hh: Weights, states: tuple, rows: Rows, saved: tuple):
    """The recurrence backwards as `recurrence_backward`."""
    y, *left = saved
    how = rows.time, call.cell, call.reversed_sets, *call.limits, call.clip, *call.kernel_rates
    return recurrence_backward(*d_outputs, weight_hh, *left, y, *states, *rows[2:], *how)


class LayerBackward(AgainByReference):
    """`layer_gradients`, differentiable again: through the readable loop of reference.py, which is slow and right."""

    @staticmethod
    def forward(*arguments):
        """See `layer_gradients`. No view: users change gradients in place, which is an error for a view from here."""
        found = layer_gradients(*arguments)
        return tuple(one.clone() if one is not None and one._is_view() else one for one in found)


# The eager way --------------------------------------------------------------------------------------------------------


def run_directly(
    inputs: Inputs, rows: Rows, call: Call, h_n: Tensor | None = None, c_n: Tensor | None = None,
    y: Tensor | None = None, gates: Tensor | None = None, aux: Tensor | None = None,
):  # fmt: skip
    """One layer forward, all directions -> y [R, N*H], or [R, N, H] where it has gaps, h_n and c_n [N, B, H], gates [R,
    N*G*H], aux, carries. inputs: weights and biases as one tensor of each set. y: a buffer for it; h_n, c_n, gates,
    aux: where to write those; or new tensors.
    """
    layer = launchers()
    input, weight_ih, weight_hh, bias_ih, bias_hh, _, start, h0, c0, parameters = inputs
    plan = plan_of(call, weight_hh[0].shape[1], input, rows.batch, False, rows.ragged)
    begun = layer.begin(plan, rows, input.shape[0], layer.sent(h0, rows), weight_hh, weight_ih, bias_ih, bias_hh, y)
    gates = input_product(input, begun.weight_ih, begun.bias, gates)
    if start is not None:
        add_start(gates.unflatten(1, (call.sets, -1)), start, rows, call)
    how = call.reversed_sets, call.saving, h_n, c_n, parameters, call.kernel_rates, True, aux
    y, h_n, c_n, aux, carries = layer.go_on(plan, begun, gates, h0, c0, rows, *how)
    return y, h_n, c_n, gates, aux, carries


@functools.cache
def _wanted(needed: tuple[bool, ...], sets: int) -> Inputs:
    """Of which of a layer's inputs a gradient is needed, from the same of what `EagerLayer` takes after its rows."""
    by_input, start, h0, c0, parameters, *weights = needed
    kinds = [kind is not None and any(kind) for kind in by_kind(weights, sets)]
    return Inputs(by_input, *kinds, False, start, h0, c0, parameters)


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
        kept = gates if call.keeps_gates else None
        ctx.save_for_backward(*rows[2:], y, kept, aux, carries, input, start, h0, c0, parameters, *weights)
        ctx.call, ctx.sizes = call, rows[:2]
        ctx.set_materialize_grads(False)
        return y, h_n, c_n, cells

    @staticmethod
    def backward(ctx, *d_outputs):
        """The gradients that are needed; differentiable themselves where a graph of the backward is made."""
        if torch._C._is_any_autocast_enabled() and (device := autocasts(d_outputs)):  # the forward knew none
            with torch.autocast(device, enabled=False):
                return EagerLayer.backward(ctx, *d_outputs)
        own = MASKS + 9
        *masks, y, gates, aux, carries, input, start, h0, c0, parameters = (kept := ctx.saved_tensors)[:own]
        call, rows, weights = ctx.call, Rows(*ctx.sizes, *masks), by_kind(kept[own:], ctx.call.sets)
        need, y = _wanted(ctx.needs_input_grad[2:], call.sets), by_sets(y, call.sets)
        if torch.is_grad_enabled() or transformed() or in_a_batch(d_outputs):
            kinds = [None if kind is None else stacked(kind) for kind in weights]
            h0 = y.new_zeros(call.sets, rows.batch, y.shape[2]) if h0 is None else h0
            if c0 is None and CELLS[call.cell].states:
                c0 = y.new_zeros(call.sets, rows.batch, len(CELLS[call.cell].states) * y.shape[2])
            gradients = LayerBackward.apply if torch.is_grad_enabled() else layer_gradients
            states = start, h0, c0, parameters
            saved = y, *(y.new_empty(0) if one is None else one for one in (gates, aux, carries))
            rest = *kinds, None, *states, *rows, *saved
            run = lambda d_y, *d: gradients(call, need, by_sets(d_y, call.sets), *d, input, *rest)
            if transformed() and not torch.is_grad_enabled():
                run = functools.partial(Linear.apply, run, call.clip)
            found = for_each_gradient(run, d_outputs)
        else:
            inputs = Inputs(input, *weights, None, start, h0, c0, parameters)
            found = gradients_by_set(backward_directly, call, need, d_outputs, inputs, rows, (y, gates, aux, carries))
        d_input, *d_kinds, _, d_start, d_h0, d_c0, d_parameters = found
        count = (len(kept) - own) // call.sets
        d_weights = [None if d is None else d[n] for d in d_kinds[:count] for n in range(call.sets)]
        return None, None, d_input, d_start, d_h0, d_c0, d_parameters, *d_weights
