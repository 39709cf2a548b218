"""A stack on the kernels as one operator, for compiled and exported graphs: its layers side by side, in groups, or one
after another, as only the sizes of a call can tell. So the body chooses, and the graph is the same for all sizes.

The products are in the body, too: outside, the gate gradients of all layers would have to be there at the same time
where the layers run one after another. What is drawn at random is not: the operators are given the mask of dropout
between the layers. T steps, B rows of the batch, R rows of all steps, I input features, L layers, G gates, H hidden
units, HS = padded H.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import aten, backends, inductor
from .autograd import gradients_by_set, run_directly
from .call import Call, Inputs, in_turn
from .kernels.buffers import dense
from .kernels.rows import Passed
from .kernels.spec import CELLS, known, padded
from .library import fake, no_derivative, operator, without_autocast, without_tangents
from .many_gradients import for_each_gradient
from .operators import backward_directly
from .rows import Rows
from .second_order import second_gradients
from .wavefront import below, frozen_layers, gradients, groups, run


class Group(NamedTuple):
    """Layers first, first + 1, ..., last - 1 of a stack: those of one launch, or all below a gradient."""

    first: int
    last: int

    @property
    def size(self) -> int:
        """How many layers."""
        return self.last - self.first

    def of(self, tensors):
        """Those of its layers, of what there is of each; None of None."""
        return None if tensors is None else tensors[self.first : self.last]


class How(NamedTuple):
    """All that the operators are told beside tensors with gradients: where rows lie (`Rows`), dropout (`Passed`, its
    mask drawn outside), and what is the same for all calls (`Call`).
    """

    lengths: Tensor | None
    offsets: Tensor | None
    resets: Tensor | None
    mask: Tensor | None
    time: int
    p: float
    cell: str
    biases: bool
    saving: str
    max_programs: int
    alone: bool

    @property
    def passed(self) -> Passed | None:
        """Dropout between the layers."""
        return None if self.mask is None else Passed(self.mask, self.p)

    def within(self, group: Group) -> "How":
        """The same for a group of the layers alone."""
        return self._replace(mask=None if self.mask is None else self.mask[group.first : group.last - 1])


COUNT, MASKS = len(How._fields), 4  # the first are tensors
HOW = (
    "Tensor? lengths, Tensor? offsets, Tensor? resets, Tensor? mask, SymInt time, float p, str cell, bool biases, "
    "str saving, int max_programs, bool alone"
)
GIVEN = f"Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, {HOW}"
KEPT = "Tensor y, Tensor gates, Tensor aux"


def serves(call: Call, layers: int, dropout: float) -> bool:
    """Whether a call is one of this file's. dropout: between the layers."""
    together = layers > 1 and call.sets == 1 and call.heads == 1 and CELLS[call.cell].side_by_side
    in_a_graph = call.route == "kernels" and not call.functional  # no transform knows the operator of a stack
    drawn = dropout < 1  # of 1 draws no random numbers
    return in_a_graph and together and drawn and not call.projected and not call.beyond_aten


# All arguments in a row, as functional._apply has them.
@torch.compiler.allow_in_graph
def stack(
    h0, c0, lengths, offsets, resets, mask, time, p, cell, biases, saving, max_programs, alone, input, *weights
):  # fmt: skip
    """input [R, I]; h0 [L, B, H] and c0 [L, B, K*H], or None for zeros; weights in torch.nn's order; the rest: How.
    -> y [R, H] of the last layer, h_n, c_n, which is empty for cells without states. Layers below all that need a
    gradient are an operator of their own, which keeps nothing.
    """
    saving = "nothing" if aten.exporting() else saving
    how = How(lengths, offsets, resets, mask, time, p, cell, biases, saving, max_programs, alone)
    if torch._C._are_functorch_transforms_active():  # a transform inside the graph
        return _by_layers((input, h0, c0, *weights), how, "kernels")
    each = 4 if biases else 2
    frozen = len(weights) // each if saving == "nothing" else frozen_layers((input, h0, c0), weights, each)
    if frozen == 0:
        return Stack.apply(*how, input, h0, c0, *weights)[:3]
    lower, upper = Group(0, frozen), Group(frozen, len(weights) // each)
    nothing = how.within(lower)._replace(saving="nothing")
    results = kernel_stack(input, lower.of(h0), lower.of(c0), weights[: frozen * each], *nothing)[:3]
    if upper.size == 0:
        return results
    seen = results[0] if how.passed is None else how.passed.on(frozen - 1, results[0])
    given = seen, upper.of(h0), upper.of(c0), *weights[frozen * each :]
    y, *final = Stack.apply(*how.within(upper), *given)[:3]
    return y, *(torch.cat(both) for both in zip(results[1:], final, strict=True))


def _by_layers(leaves: Sequence[Tensor | None], how: How, route: str) -> tuple[Tensor, ...]:
    """The same layer by layer, as transforms know it."""
    from .functional import recurrent_stack

    (input, h0, c0, *weights), (call, rows) = leaves, _taken(leaves[0], how)
    call = call._replace(route=route, functional=True)
    y, h_n, c_n, _ = recurrent_stack(call, rows, input, h0, c0, weights, 0.0, how.passed)
    return y, h_n, h_n.new_empty(0) if c_n is None else c_n


def _taken(input: Tensor, how: How) -> tuple[Call, Rows]:
    """What the operators are told, as it is in a call on the route "direct"."""
    batch = input.shape[0] // how.time if how.lengths is None else how.lengths.shape[0]
    limits = how.max_programs, how.alone
    call = Call(how.cell, 1, 0, how.biases, route="direct", saving=how.saving, limits=limits)
    return call, Rows(how.time, batch, *map(dense, how[: MASKS - 1]))


# ---- The operators ---------------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """What all layers leave for the backward, None where that is nothing: y's buffer [L, B+R+B, HS], gates [L, R, G*H],
    aux [L, R, planes*HS], B+R+B rows from layer to layer.
    """

    y: Tensor | None = None
    gates: Tensor | None = None
    aux: Tensor | None = None


def _groups(call: Call, weight_hh: Sequence[Tensor], rows: Rows, p: float) -> list[Group]:
    """As an eager call has them that trains all its layers, or none. p: of dropout between them."""
    sizes = groups(call, weight_hh[0].shape[1], weight_hh[0], rows, len(weight_hh), p)
    ends = itertools.accumulate(sizes)
    return [Group(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _in_a_row(group: Group, by_kind: Sequence) -> list:
    """Of a group's layers, what is there of each kind, one kind after another."""
    return [one for kind in by_kind if kind is not None for one in group.of(kind)]


def _buffers(input: Tensor, weights: Sequence[Tensor], call: Call, rows: Rows) -> tuple[Tensor, Tensor | None, Kept]:
    """h_n [L, B, H], c_n [L, B, K*H] or None, and what is kept, all to be written."""
    spec, (count, _), size = known(call.cell), input.shape, weights[1].shape[1]
    layers, wide = len(weights) // (4 if call.biases else 2), padded(size, backends.name_of(input.dtype))
    h_n = input.new_empty(layers, rows.batch, size)
    c_n = input.new_empty(layers, rows.batch, len(spec.states) * size) if spec.states else None
    if call.saving == "nothing":
        return h_n, c_n, Kept()
    span, gates, aux = count + 2 * rows.batch, None, None
    if call.keeps_gates:
        gates = input.new_empty(layers, count, spec.gates * size)
    if spec.keeps_aux(call.saving):
        exact = torch.float32 if spec.states else input.dtype
        aux = input.new_empty(layers, span, spec.planes * wide, dtype=exact)[:, :count]
    return h_n, c_n, Kept(input.new_empty(layers, span, wide), gates, aux)


def _results(y: Tensor, h_n: Tensor, c_n: Tensor | None, kept: Kept, batch: int) -> tuple[Tensor, ...]:
    """What the operator gives."""
    (count, size), empty = y.shape, lambda one: y.new_empty(0) if one is None else one
    ys = y.new_empty(0) if kept.y is None else kept.y[:, batch : batch + count, :size]
    return y, h_n, empty(c_n), ys, empty(kept.gates), empty(kept.aux)


@operator("kernel_stack", f"({GIVEN}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
@without_tangents
@without_autocast
def kernel_stack(input, h0, c0, weights, *how):
    """See `stack`; besides, each empty where it is not kept: y [L, R, H] of all layers, gates [L, R, G*H], aux."""
    how = How(*how)
    call, rows = _taken(input, how)
    h_n, c_n, kept = _buffers(input, weights, call, rows)
    by_kind, y = in_turn(weights, 4 if call.biases else 2), input
    for group in _groups(call, by_kind[1], rows, how.p):
        y = y if group.first == 0 or how.passed is None else how.passed.on(group.first - 1, y)
        inputs = Inputs(y, *map(group.of, by_kind), None, None, group.of(h0), group.of(c0))
        buffer, gates, aux = map(group.of, kept)
        buffer = buffer if buffer is None else buffer.view(torch.int32)
        to = None if gates is None or gates.data_ptr() % 16 > 0 else gates  # where a kernel can write it
        if group.size > 1:
            states = group.of(h_n), group.of(c_n)
            y, _, _, made, _ = run(inputs, rows, call, how.within(group).passed, *states, buffer, to, aux)
            y = y[-1]
        else:
            of_one = _one_set(buffer), None if to is None else to[0], _one_set(aux)
            y, _, _, made, *_ = run_directly(inputs, rows, call, group.of(h_n), group.of(c_n), *of_one)
            y = y.flatten(1)
        if gates is not to:
            gates.copy_(made.view(gates.shape))
    return _results(y.clone(memory_format=torch.contiguous_format), h_n, c_n, kept, rows.batch)


def _one_set(of_layer: Tensor | None) -> Tensor | None:
    """What there is of one layer, [1, R, ...], as of one weight set, [R, 1, ...]."""
    return None if of_layer is None else of_layer.transpose(0, 1)


@operator(
    "kernel_stack_backward",
    f"(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, {GIVEN}, {KEPT}, bool[] need) -> Tensor[]",
)
@without_tangents
@without_autocast
def kernel_stack_backward(d_y, d_h_n, d_c_n, input, h0, c0, weights, *rest):
    """The gradients of input, h0, c0 and weights that `need` says, from what the forward has kept."""
    how, (y, gates, aux, need) = How(*rest[:COUNT]), rest[COUNT:]
    call, rows = _taken(input, how)
    (by_input, by_h0, by_c0, *by_weight), each = need, 4 if call.biases else 2
    by_kind, wanted = in_turn(weights, each), in_turn(by_weight, each)
    gates = gates if call.keeps_gates else None
    aux = aux if CELLS[call.cell].keeps_aux(call.saving) else None
    d_weights, d_states = [None] * len(weights), []
    for group in reversed(_groups(call, by_kind[1], rows, how.p)):
        first = group.first
        further = by_input or (first > 0 and (by_h0 or by_c0 or any(by_weight[: first * each])))
        seen, states = below(first, input, y, how.passed), (group.of(h0), group.of(c0))
        d_outputs, kept = (d_y, group.of(d_h_n), group.of(d_c_n)), [group.of(one) for one in (y, gates, aux)]
        if group.size > 1:
            needed, given = (further, by_h0, by_c0, *_in_a_row(group, wanted)), _in_a_row(group, by_kind)
            passed = how.within(group).passed
            d_y, *found = gradients(call, rows, passed, needed, d_outputs, *kept, seen, *states, *given)
        else:
            needed = further, *(kind is not None and kind[first] for kind in wanted)
            needed = Inputs(*needed, False, False, by_h0, by_c0, False)
            inputs, empty = Inputs(seen, *map(group.of, by_kind), None, None, *states), y.new_empty(0)
            saved = *(empty if one is None else _one_set(one) for one in kept), empty
            of_layer = gradients_by_set(backward_directly, call, needed, (*d_outputs, None), inputs, rows, saved)
            d_y, *of_kinds, _, _, d_h0, d_c0, _ = of_layer
            found = [d_h0, d_c0, *(d if d is None else d[0] for d in of_kinds)]
        d_states.insert(0, found[:2])
        for kind in range(each):
            d_weights[first * each + kind : group.last * each : each] = found[2 + kind * group.size :][: group.size]
        if not further:
            break
        d_y = d_y if first == 0 or how.passed is None else how.passed.on(first - 1, d_y)
    d_h0, d_c0 = (torch.cat(parts) if parts[0] is not None else None for parts in zip(*d_states, strict=True))
    return [_whole(d) for d, n in zip((d_y, d_h0, d_c0, *d_weights), need, strict=True) if n]


def _whole(tensor: Tensor) -> Tensor:
    """Contiguous, at the beginning of its memory."""
    return tensor.contiguous() if tensor.storage_offset() == 0 else tensor.clone(memory_format=torch.contiguous_format)


no_derivative(
    "kernel_stack",
    "Trying to backward through rnn_gpu.kernel_stack, which an exported program holds without its backward: train the "
    "module that was exported (docs/limits.md).",
)


@fake("kernel_stack")
def _(input, h0, c0, weights, *how):
    inductor.fall_back()
    call, rows = _taken(input, How(*how))
    y = input.new_empty(input.shape[0], weights[1].shape[1])
    return _results(y, *_buffers(input, weights, call, rows), rows.batch)


@fake("kernel_stack_backward")
def _(d_y, d_h_n, d_c_n, input, h0, c0, weights, *rest):
    return [t.new_empty(t.shape) for t, n in zip((input, h0, c0, *weights), rest[-1], strict=True) if n]


# ---- With gradients --------------------------------------------------------------------------------------------------


class Stack(torch.autograd.Function):
    """The operators, differentiable twice: (*how, input, h0, c0, *weights) -> y, h_n, c_n, and what is kept."""

    @staticmethod
    def forward(
        lengths, offsets, resets, mask, time, p, cell, biases, saving, max_programs, alone, input, h0, c0, *weights
    ):  # fmt: skip
        """See `stack`."""
        how = lengths, offsets, resets, mask, time, p, cell, biases, saving, max_programs, alone
        return kernel_stack(input, h0, c0, weights, *how)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Save what the backward needs, and the output, which knows whether a user has changed it in place."""
        ctx.how = inputs[MASKS:COUNT]
        ctx.save_for_backward(*inputs[:MASKS], *output[3:], output[0], *inputs[COUNT:])
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, d_y, d_h_n, d_c_n, *_kept):
        """The gradients that are needed; differentiable themselves where a graph of the backward is made."""
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint makes them again, and each once
        masks, kept, given = saved[:MASKS], saved[MASKS : MASKS + 3], saved[MASKS + 4 :]
        how, need = How(*masks, *ctx.how), ctx.needs_input_grad[COUNT:]
        function = StackBackward.apply if torch.is_grad_enabled() else _gradients
        run = lambda *d: function(need, *how, *kept, *d, *given)
        found = for_each_gradient(run, (d_y, d_h_n, d_c_n if CELLS[how.cell].states else None))
        return *[None] * COUNT, *found


def _gradients(need, *arguments) -> tuple[Tensor | None, ...]:
    """Of input, h0, c0 and weights, None where not needed. arguments: How, what was kept, gradients, inputs."""
    how, kept, gradients = arguments[:COUNT], arguments[COUNT : COUNT + 3], arguments[COUNT + 3 : COUNT + 6]
    input, h0, c0, *weights = arguments[COUNT + 6 :]
    found = iter(kernel_stack_backward(*gradients, input, h0, c0, weights, *how, *kept, list(need)))
    return tuple(next(found) if n else None for n in need)


class StackBackward(torch.autograd.Function):
    """`_gradients`, differentiable again: through the readable loop of reference.py, which is slow and right."""

    @staticmethod
    def forward(*arguments):
        """See `_gradients`."""
        return _gradients(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Save gradients and inputs; the reference makes the rest again."""
        ctx.need, ctx.how = inputs[0], inputs[1 + MASKS : 1 + COUNT]
        ctx.save_for_backward(*inputs[1 : 1 + MASKS], *inputs[4 + COUNT :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *d_gradients):
        """Differentiate the gradients of the reference by everything they depend on."""
        masks, tensors = ctx.saved_tensors[:MASKS], ctx.saved_tensors[MASKS:]
        run = lambda leaves: _by_layers(leaves, How(*masks, *ctx.how), "reference")
        found = second_gradients(run, tensors[:3], tensors[3:], ctx.need, d_gradients)
        return *[None] * (4 + COUNT), *found
