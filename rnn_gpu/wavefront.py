"""A stack whose layers run side by side in one launch: layer n a step behind layer n - 1. Graphs: stack_operators.py.

T steps, B rows of the batch, R rows of all steps, L layers, G gates, H hidden units, E slots a unit (kernels/spec.py).
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, settings
from .around import products_by_set
from .autograd import EagerLayer
from .call import Call, Inputs, by_kind
from .kernels.plan import Plan
from .kernels.rows import Passed
from .kernels.spec import padded
from .library import autocasts
from .many_gradients import Linear, for_each_gradient, transformed
from .operators import plan_of, remembered
from .products import input_product
from .rows import Rows


def frozen_layers(given: Sequence[Tensor | None], weights: Sequence[Tensor], each: int) -> int:
    """How many layers of a stack, from the first one on, have no gradient to make. given: input and states; each:
    weights of a layer.
    """
    if any(one is not None and one.requires_grad for one in given):
        return 0
    return next((i for i, weight in enumerate(weights) if weight.requires_grad), len(weights)) // each


def groups(
    call: Call, hidden_size: int, like: Tensor, rows: Rows, layers: int, dropout: float, frozen: int = 0
) -> tuple[int, ...]:
    """How many layers of a stack each launch takes, from the first layer on: 1 where a layer runs by itself. The first
    `frozen` layers have groups of their own, without a backward, where that is estimated to be no slower.
    """
    # Lean memory makes gates again, layer by layer: those of all layers at once would take more than was saved.
    together = call.route == "direct" and call.sets == 1 and call.heads == 1 and call.saving != "lean"
    if layers == 1 or not together or call.projected or call.beyond_aten or dropout >= 1:
        return (1,) * layers  # dropout of 1 draws no random numbers
    precision = backends.precision_of("float32") if like.dtype == torch.float32 else None
    how = "groups", call.cell, call.limits, call.saving, settings.side_by_side(), precision
    key = *how, hidden_size, like.dtype, like.device, rows.batch, rows.ragged, dropout > 0, layers, frozen
    found = remembered.get(key)
    if found is None:
        problem = call.cell, hidden_size, rows.batch, 1, backends.name_of(like.dtype)
        device, training = backends.device_of(like.device), call.saving != "nothing"
        kept = dict(saving=call.saving, drops=dropout > 0)
        whole = _plans(problem, device, training, rows.ragged, layers, call.limits, **kept)
        if 0 < frozen < layers:
            parts = [
                _plans(problem, device, training, rows.ragged, count, call.limits, **kept)
                for count in (frozen, layers - frozen)
            ]
            whole = min(sum(parts, ()), whole, key=lambda plans: backends.step_microseconds(plans, frozen, device))
        found = tuple(passes[0].layers for passes in whole)
        if like.device.index is not None or like.device.type != "cuda":
            remembered[key] = found
    return found


def _plans(problem: backends.Sizes, *how, **kept) -> tuple[tuple[Plan, ...], ...]:
    """`backends.groups_for`; RuntimeError where there is no plan."""
    plans = backends.groups_for(problem, *how, **kept)
    if isinstance(plans, str):
        raise RuntimeError(f"rnn_gpu: no plan for {problem[0]}: {plans}")
    return plans


def side_by_side(
    inputs: Inputs, rows: Rows, call: Call, dropout: float = 0.0, h_n: Tensor | None = None, c_n: Tensor | None = None
):
    """Several layers in one launch -> y [R, H] of the last one, h_n and c_n [L, B, H]. inputs: weights and biases as
    one tensor of each layer, h0 and c0 [L, B, H]. dropout: between them. h_n, c_n: where to write those, or new
    tensors.
    """
    mask = drawn_between(inputs.input, inputs.weight_hh[0].shape[1], len(inputs.weight_hh), dropout)
    passed = None if mask is None else Passed(mask, dropout)
    if call.saving == "nothing":
        y, h_n, c_n, *_ = run(inputs, rows, call, passed, h_n, c_n)
        return y[-1].clone(), h_n, c_n  # a copy, so that the other layers' memory is free again
    weights = [weight for kind in inputs[1:5] if kind is not None for weight in kind]
    return EagerStack.apply(call, rows, passed, inputs.input, inputs.h0, inputs.c0, *weights)


def drawn_between(input: Tensor, hidden_size: int, layers: int, dropout: float) -> Tensor | None:
    """The mask of `Passed`, None without dropout, by the random numbers that functional.dropout takes between layers
    one after another: in eager mode, and as a part of a graph.
    """
    if dropout == 0:
        return None
    # As the output of a layer lies (kernels/layer.py): the stream on a GPU depends on it.
    ones = input.new_ones((input.shape[0], padded(hidden_size, backends.name_of(input.dtype))))[:, :hidden_size]
    return torch.stack([torch.native_dropout(ones, dropout, True)[1] for _ in range(layers - 1)])


def run(
    inputs: Inputs, rows: Rows, call: Call, passed: Passed | None = None, h_n: Tensor | None = None,
    c_n: Tensor | None = None, y: Tensor | None = None, gates: Tensor | None = None, aux: Tensor | None = None,
):  # fmt: skip
    """The same, all that kernels/stack.py gives: y [L, R, H], h_n, c_n, gates [L, R, G*H] and aux [L, R, HS]. passed:
    dropout. y: a buffer for it; gates, aux: where to write those; or new tensors.
    """
    from .kernels import stack

    weights = inputs.weight_ih, inputs.weight_hh, inputs.bias_ih, inputs.bias_hh
    plan = _plan(call, inputs.weight_hh, inputs.input, rows, passed is not None, False)
    begun = stack.begin(plan, rows, inputs.input.shape[0], inputs.h0, *weights, passed is not None, y)
    bias = None if begun.bias is None else begun.bias[0]
    x_part = input_product(inputs.input, inputs.weight_ih[0], bias)
    return stack.forward(plan, begun, x_part, inputs.h0, inputs.c0, rows, call.saving, h_n, c_n, passed, gates, aux)


def _plan(call: Call, weight_hh: Sequence[Tensor], like: Tensor, rows: Rows, drops: bool, backward: bool) -> Plan:
    """The plan of one pass of so many layers; drops: with dropout between them."""
    return plan_of(call, weight_hh[0].shape[1], like, rows.batch, backward, rows.ragged or drops, len(weight_hh))


class EagerStack(torch.autograd.Function):
    """`EagerLayer` for several layers: (call, rows, passed, input, h0, c0, *weights) -> (y [R, H], h_n, c_n). weights:
    weight_ih of each layer, then weight_hh and, if there are biases, bias_ih and bias_hh.
    """

    @staticmethod
    def forward(ctx, call: Call, rows: Rows, passed: Passed | None, input, h0, c0, *weights):
        """The first layer's input product, then the recurrence of all."""
        inputs = Inputs(input, *_by_kind(weights, call), None, None, h0, c0)
        y, h_n, c_n, gates, aux = run(inputs, rows, call, passed)
        output = y[-1].clone()  # whoever keeps it does not keep the other layers' outputs
        mask, ctx.p = (None, 0.0) if passed is None else passed
        # The output knows whether a user has changed it in place, which is an error as it is for a layer alone.
        ctx.save_for_backward(*rows[2:5], output, y, gates, aux, mask, input, h0, c0, *weights)
        ctx.call, ctx.sizes = call, rows[:2]
        ctx.set_materialize_grads(False)
        return output, h_n, c_n

    @staticmethod
    def backward(ctx, *d_outputs):
        """The gradients that are needed; layer by layer where a graph of the backward is made, since a layer alone has
        derivatives of its backward.
        """
        if torch._C._is_any_autocast_enabled() and (device := autocasts(d_outputs)):  # the forward knew none
            with torch.autocast(device, enabled=False):
                return EagerStack.backward(ctx, *d_outputs)
        *masks, _, y, gates, aux, mask, input, h0, c0 = (kept := ctx.saved_tensors)[:11]
        given, passed = (input, h0, c0, *kept[11:]), None if mask is None else Passed(mask, ctx.p)
        how = ctx.call, Rows(*ctx.sizes, *masks), passed, ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            run = lambda *d: _gradients_by_autograd(*how, d, *given)
        else:
            run = lambda *d: gradients(*how, d, y, gates, aux, *given)
        if transformed() and not torch.is_grad_enabled():
            run = functools.partial(Linear.apply, run, None)
        return None, None, None, *for_each_gradient(run, d_outputs)


def _by_kind(weights: Sequence, call: Call) -> list[Sequence | None]:
    """weight_ih, weight_hh, bias_ih, bias_hh of all layers, one kind after another -> those of each kind, or None."""
    return by_kind(weights, len(weights) // (4 if call.biases else 2))


def gradients(
    call: Call, rows: Rows, passed: Passed | None, need: Sequence[bool], d_outputs: tuple, y, gates, aux, input, h0, c0,
    *weights,
):  # fmt: skip
    """The gradients of input, h0, c0 and weights, None where not needed: the recurrence of all layers backwards, then
    the products of each.
    """
    from .kernels import stack

    kinds, (d_y, d_h_n, d_c_n) = _by_kind(weights, call), d_outputs
    by_input, by_h0, by_c0, *by_weight = need
    weight_ih, weight_hh = kinds[:2]
    plan = _plan(call, weight_hh, y, rows, passed is not None, True)
    d_gates, d_carry_0 = stack.backward(
        plan, d_y, d_h_n, d_c_n, weight_ih, weight_hh, gates, aux, y, h0, c0, rows, passed
    )  # fmt: skip
    found, needs = [], _by_kind(by_weight, call)
    for n in range(len(y)):
        one = Inputs(below(n, input, y, passed), *(_one(kind, n) for kind in (*kinds, None, None, h0, c0)))  # as a set
        needed = [kind is not None and kind[n] for kind in needs]
        wanted = Inputs(by_input and n == 0, *needed, False, False, by_h0, False)
        states = _one(d_h_n, n), _one(d_carry_0, n)
        of_recurrence = d_gates[n, :, None], states[1], None, None
        found.append(Inputs(*products_by_set(call, wanted, states[0], one, rows, y[n, :, None], *of_recurrence)))
    d_weights = [d if d is None else d[0] for kind in list(zip(*found, strict=True))[1:5] for d in kind]
    d_h0 = torch.cat([one.h0 for one in found]) if by_h0 else None
    return found[0].input, d_h0, d_carry_0 if by_c0 else None, *d_weights[: len(weights)]


def below(n: int, input: Tensor, y: Sequence[Tensor], passed: Passed | None) -> Tensor:
    """What layer n sees: the input, or the outputs [R, H] of the layer below. y: of all layers."""
    return input if n == 0 else y[n - 1] if passed is None else passed.on(n - 1, y[n - 1])


def _one(of_layers, n: int):
    """Of what there is of each layer, that of layer n, with the layers' axis; None of None."""
    return None if of_layers is None else of_layers[n : n + 1]


def _gradients_by_autograd(
    call: Call, rows: Rows, passed: Passed | None, need: Sequence[bool], d_outputs: tuple, input, h0, c0, *weights
):
    """The same as a graph: through the layers one after another, each made again."""
    # By views: a state or a weight may be made from another one, and what lies between is the graph outside.
    input, h0, c0, *weights = (t if t is None else t.view_as(t) for t in (input, h0, c0, *weights))
    kinds, y, finals = _by_kind(weights, call), input, []
    for n in range(len(kinds[1])):
        of_layer = [kind[n] for kind in kinds if kind is not None]
        y = y.flatten(1) if n == 0 or passed is None else passed.on(n - 1, y.flatten(1))
        y, *final, _ = EagerLayer.apply(call, rows, y, None, _one(h0, n), _one(c0, n), None, *of_layer)
        finals.append(final)
    finals = [None if kind[0] is None else torch.cat(kind) for kind in zip(*finals, strict=True)]
    pairs = zip((y.flatten(1), *finals), d_outputs, strict=True)
    pairs = [(output, d) for output, d in pairs if d is not None]
    if not pairs:
        return (None,) * len(need)
    outputs, given = zip(*pairs, strict=True)
    wanted = [tensor for tensor, needed in zip((input, h0, c0, *weights), need, strict=True) if needed]
    found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=True, allow_unused=True))
    return tuple(next(found) if needed else None for needed in need)
