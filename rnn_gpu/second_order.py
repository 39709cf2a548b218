"""A layer by the readable loops of reference.py, and through them the derivative of a layer's backward.

No fused kernel has a second derivative of its own: a backward that is differentiated again goes through these loops,
which are slow and right, and can be differentiated any number of times. So does forward-mode differentiation.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .call import COUNT, Call, Inputs, taken
from .many_gradients import CLIPPED
from .rows import Rows, first_rows

Results = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def reference_layer(inputs: Inputs, rows: Rows, call: Call) -> Results:
    """Outputs y [R, N, P], h_n [N, B, P], c_n [N, B, H] or None and, if call.cells, c of every step [R, N, H], else
    None, by the loop of reference.py.
    """
    input, (time, batch, lengths, offsets, resets, dropped, *kept), place = inputs.input, rows, None
    if offsets is not None:  # packed: spread over [T, B], and gathered again below
        sizes = offsets[1:] - offsets[:-1]
        step = torch.repeat_interleave(torch.arange(time, device=input.device), sizes, output_size=input.shape[0])
        place = step * batch + torch.arange(input.shape[0], device=input.device) - offsets[step]
    results = []
    for n in range(call.sets):
        biases = (None, None) if inputs.bias_ih is None else (inputs.bias_ih[n], inputs.bias_hh[n])
        bias, bias_hn = reference.fold_biases(call.cell, *biases)
        x_part = torch.nn.functional.linear(input, inputs.weight_ih[n], bias)
        if inputs.start is not None:
            index = first_rows(rows, input.shape[0], call.backwards(n))
            index = torch.arange(input.shape[0], device=input.device)[index]
            x_part = x_part.index_add(0, index, inputs.start[n])
        if place is not None:
            x_part = x_part.new_zeros(time * batch, x_part.shape[1]).index_copy(0, place, x_part)
        x_part = x_part.view(time, batch, x_part.shape[-1])
        states = inputs.h0[n], None if inputs.c0 is None else inputs.c0[n]
        masks = dict(lengths=lengths, resets=None if resets is None else resets.bool())
        masks["dropped"] = None if dropped is None else dropped[n]
        for name, mask, rate in zip(("kept_h", "kept_c"), kept, call.rates or (None, None), strict=True):
            if mask is not None:
                mask = mask[:, n].bool()
                if place is not None:
                    mask = mask.new_zeros(time * batch, mask.shape[1]).index_copy(0, place, mask)
                masks[name] = mask.view(time, batch, mask.shape[1])
            else:
                masks[name] = rate
        cells: list[Tensor] | None = [] if call.cells else None
        masks |= dict(parameters=None if inputs.parameters is None else inputs.parameters[n])
        y, h_n, c_n = reference.recurrence(
            call.cell, x_part, inputs.weight_hh[n], bias_hn, *states, reverse=call.backwards(n), **masks,
            cells=cells, see=_seen(call, None if inputs.weight_hr is None else inputs.weight_hr[n]),
        )  # fmt: skip
        by_rows = [one.flatten(0, 1) for one in (y, *(cells or ()))]
        y, *cells = by_rows if place is None else (one[place] for one in by_rows)
        results.append((y, h_n, c_n, *cells))
    y, h_n, c_n, *cells = zip(*results, strict=True)
    c_n = None if inputs.c0 is None else torch.stack(c_n)
    return torch.stack(y, 1), torch.stack(h_n), c_n, torch.stack(cells[0], 1) if cells else None


def _seen(call: Call, weight_hr: Tensor | None) -> Callable[[int, Tensor], Tensor] | None:
    """What becomes of each step's h before it goes on: its gradient is clipped, it is projected, and watched."""
    if weight_hr is None and call.clip is None:
        return call.watch

    def seen(t: int, h: Tensor) -> Tensor:
        h = h if call.clip is None else ClippedGradient.apply(h, call.clip)
        h = h if weight_hr is None else h @ weight_hr.T
        return h if call.watch is None else call.watch(t, h)

    return seen


class ClippedGradient(torch.autograd.Function):
    """(x, clip) -> x, whose gradient is brought within -clip..clip."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, clip):
        """x, as another tensor."""
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep the limit."""
        ctx.clip = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        """The gradient within the limits."""
        return Clamped.apply(gradient, ctx.clip), None

    @staticmethod
    def jvp(ctx, tangent, _):
        """As if it were not there."""
        return tangent.clone()


class Clamped(torch.autograd.Function):
    """(gradient, clip) -> gradient within -clip..clip, which nobody may differentiate: autograd would clip on its way
    back through the steps what belongs to the second derivative, and what comes out would be none.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient, clip):
        """NaN stays."""
        return gradient.clamp(-clip, clip)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Nothing to keep."""

    @staticmethod
    def backward(ctx, _):
        """RuntimeError."""
        raise RuntimeError(CLIPPED)

    @staticmethod
    def jvp(ctx, *_):
        """RuntimeError."""
        raise RuntimeError(CLIPPED)


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
    if not used or all(d is None for d in d_outputs):  # what was differentiated are zeros, whatever is given
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


class AgainByReference(torch.autograd.Function):
    """A backward that is differentiable again, through the readable loops of reference.py. Its forward has the
    arguments call, need; d_y, d_h_n, d_c_n, d_cells, inputs, rows; whatever else.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Save gradients and inputs; the reference makes the rest again."""
        ctx.call, ctx.need, *tensors = inputs
        given, rows = taken(tensors[4:])
        ctx.save_for_backward(*tensors[:4], *given, *rows[2:])
        ctx.sizes, ctx.rest = rows[:2], len(tensors) - 4 - COUNT
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *d_gradients):
        """Differentiate the gradients of the reference by everything they depend on."""
        if ctx.call.clip is not None:
            raise RuntimeError(CLIPPED)
        saved = ctx.saved_tensors
        d_outputs, inputs, masks = saved[:4], saved[4 : 4 + COUNT], saved[4 + COUNT :]
        run = lambda leaves: reference_layer(Inputs(*leaves), Rows(*ctx.sizes, *masks), ctx.call)
        found = second_gradients(run, d_outputs, inputs, ctx.need, d_gradients)
        return None, None, *found, *[None] * ctx.rest
