"""A layer by the readable loops of reference.py, and through them the derivative of a layer's backward.

No fused kernel has a second derivative of its own: a backward that is differentiated again goes through these loops,
which are slow and right, and can be differentiated any number of times. So does forward-mode differentiation.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .kernels.spec import runs_backwards
from .projection import combined, projected
from .rows import Rows, first_rows

Results = tuple[Tensor, Tensor, Tensor | None]


def reference_layer(
    input, weight_ih, weight_hh, bias_ih, bias_hh, start, h0, c0, lengths, offsets, resets, time, cell, reversed_sets
) -> Results:
    """Outputs y [R, N, H], h_n and c_n [N, B, H] of `operators.Layer`, by the loop of reference.py."""
    batch, place = h0.shape[1], None
    if offsets is not None:  # packed: spread over [T, B], and gathered again below
        sizes = offsets[1:] - offsets[:-1]
        step = torch.repeat_interleave(torch.arange(time, device=input.device), sizes, output_size=input.shape[0])
        place = step * batch + torch.arange(input.shape[0], device=input.device) - offsets[step]
    results = []
    for n in range(weight_ih.shape[0]):
        biases = (None, None) if bias_ih is None else (bias_ih[n], bias_hh[n])
        bias, bias_hn = reference.fold_biases(cell, *biases)
        x_part = torch.nn.functional.linear(input, weight_ih[n], bias)
        backwards = runs_backwards(reversed_sets, n)
        if start is not None:
            index = first_rows(batch, lengths, offsets, input.shape[0], backwards)
            index = torch.arange(input.shape[0], device=input.device)[index]
            x_part = x_part.index_add(0, index, start[n])
        if place is not None:
            x_part = x_part.new_zeros(time * batch, x_part.shape[1]).index_copy(0, place, x_part)
        x_part = x_part.view(time, batch, x_part.shape[-1])
        states = h0[n], None if c0 is None else c0[n]
        masks = dict(lengths=lengths, resets=None if resets is None else resets.bool())
        y, h_n, c_n = reference.recurrence(cell, x_part, weight_hh[n], bias_hn, *states, reverse=backwards, **masks)
        y = y.flatten(0, 1)
        results.append((y if place is None else y[place], h_n, c_n))
    y, h_n, c_n = zip(*results, strict=True)
    return torch.stack(y, 1), torch.stack(h_n), None if c0 is None else torch.stack(c_n)


def projected_reference_layer(
    input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0, lengths, offsets, resets, time, cell,
    reversed_sets,
) -> Results:  # fmt: skip
    """The same with the arguments and results of `aten.layer`: weight_hr [N, P, H] or None, h0 [N, B, P]."""
    start, state, weight = None, h0, weight_hh
    rows = Rows(time, h0.shape[1], lengths, offsets, resets)
    if weight_hr is not None:
        weight, start, state = combined(weight_hh, weight_hr, h0, rows, input.shape[0], reversed_sets)
    tensors = input, weight_ih, weight, bias_ih, bias_hh, start, state, c0
    y, h_n, c_n = reference_layer(*tensors, lengths, offsets, resets, time, cell, reversed_sets)
    if weight_hr is not None:
        y, h_n = projected(y, h_n, weight_hr, h0, rows)
    return y, h_n, c_n


def second_gradients(
    outputs: Callable[..., tuple[Tensor | None, ...]],
    d_outputs: tuple[Tensor | None, ...],
    inputs: tuple[Tensor | None, ...],
    need: tuple[bool, ...],
    d_gradients: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """Differentiate the gradients of `outputs` by everything they depend on.

    outputs: inputs -> results; d_outputs: gradients of the results, None for zero; need: which inputs' gradients were
    made; d_gradients: gradients of those, None for zero. -> gradients of d_outputs and of inputs, None where those are
    None. Computed in float32 at least.
    """
    given = (*d_outputs, *inputs)
    present = [i for i, t in enumerate(given) if t is not None]
    used = [k for k, (n, d) in enumerate(zip(need, d_gradients, strict=True)) if n and d is not None]
    if not used:
        return [None] * len(given)

    def gradients(*values):
        values = dict(zip(present, values, strict=True))
        values = [values.get(i) for i in range(len(given))]
        ds, leaves = values[: len(d_outputs)], values[len(d_outputs) :]

        def results(*wanted):
            every = list(leaves)
            for k, leaf in zip(used, wanted, strict=True):
                every[k] = leaf
            return tuple(r for r, d in zip(outputs(every), ds, strict=True) if d is not None)

        _, pull = torch.func.vjp(results, *(leaves[k] for k in used))
        return pull(tuple(d for d in ds if d is not None))

    widened = lambda tensor: tensor if tensor.dtype == torch.float64 else tensor.float()
    _, pull = torch.func.vjp(gradients, *(widened(given[i]) for i in present))
    found = pull(tuple(widened(d_gradients[k]) for k in used))
    found = dict(zip(present, found, strict=True))
    return [None if t is None else found[i].to(t.dtype) for i, t in enumerate(given)]


def save_for_second(ctx, inputs: tuple) -> None:
    """Save of a backward Function's arguments what its own derivative needs.

    inputs: d_y, d_h_n, d_c_n, the layer's eight inputs, the three tensors that say where rows lie; whatever else;
    time, cell, reversed_sets, need.
    """
    ctx.save_for_backward(*inputs[:14])
    ctx.time, ctx.cell, ctx.reversed_sets, ctx.need = inputs[-4:]
    ctx.rest = len(inputs) - 11
    ctx.set_materialize_grads(False)


def second_backward(ctx, layer: Callable[..., Results], d_gradients: tuple) -> tuple[Tensor | None, ...]:
    """The backward of a Function that was prepared with `save_for_second`; layer: one of the two above."""
    tensors, rows = ctx.saved_tensors[:11], ctx.saved_tensors[11:]
    run = lambda inputs: layer(*inputs, *rows, ctx.time, ctx.cell, ctx.reversed_sets)
    return *second_gradients(run, tensors[:3], tensors[3:], ctx.need, d_gradients), *[None] * ctx.rest
