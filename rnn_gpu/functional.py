"""A stack of recurrent layers: layers x directions, dropout between layers; each layer on the route of its call."""

import torch
from torch import Tensor
from torch.nn import functional

from . import aten, aten_stack, onnx, stack_operators
from .autograd import EagerLayer, Layer, run_directly
from .call import Call, Inputs, by_sets, in_turn, stacked
from .heads import by_heads
from .kernels.rows import Passed
from .kernels.spec import CELLS
from .projection import combined, projected
from .rows import Rows
from .second_order import reference_layer
from .wavefront import drawn_between, frozen_layers, groups, side_by_side


def recurrent_stack(
    call: Call, rows: Rows, input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor], dropout: float,
    passed: Passed | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Run the layers that `weights` are of.

    input [R, I]; h0 [L*D, B, H] (projected: [L*D, B, P]), c0 [L*D, B, K*H] for cells with states, else None, or both
    None for zeros; weights in the order of torch.nn: for each layer and direction weight_ih, weight_hh and, if
    call.biases, bias_ih, bias_hh, if call.projected, weight_hr, and the cell's parameters. All of one dtype: float32,
    float16 or bfloat16 on the kernels, any floating one elsewhere. dropout: between layers; passed: the same, drawn
    before.
    -> output [R, D*H] (projected: [R, D*P]), h_n like h0, c_n like c0, and, if call.cells, c of every step of the last
    layer [R, D*H], else None.
    """
    own = len(CELLS[call.cell].parameters)
    each = 2 + 2 * call.biases + call.projected + own  # weights of a layer and direction
    count = len(weights) // each
    # One layer, asked for first: in a call of few steps what is below takes longer than they do.
    if call.route == "direct" and count == call.sets and not own and not call.projected:
        inputs = Inputs(input, *in_turn(weights, each), None, None, h0, c0)
        y, h_n, c_n, cells = _directly(inputs, drawn(call, rows, input, weights[1]), call)
        return y.flatten(1).contiguous(), h_n, c_n, cells.flatten(1) if call.cells else None
    if call.route in ("opaque", "kernels"):
        results = _as_one_operator(call, rows, input, h0, c0, weights, dropout, count)
        if results is not None:
            return results
    if h0 is None and call.route != "direct":
        h0, c0 = zero_states(call, rows, input, weights, count)
    # Where nothing is differentiated, the kernels write the final states of all layers into one tensor.
    finals = None
    plain = not call.projected and not call.beyond_aten
    if call.route == "direct" and call.saving == "nothing" and plain and count > call.sets:
        finals = final_states(call, rows, input, weights, count)
    h_n, c_n, cells, first, frozen = [], [], None, 0, 0
    if call.route == "direct" and call.saving != "nothing" and not call.beyond_aten:
        frozen = frozen_layers((input, h0, c0), weights, each * call.sets)
    for layers in groups(call, weights[1].shape[1], input, rows, count // call.sets, dropout, frozen):
        sets = slice(first, first + layers * call.sets)
        of_group = call._replace(saving="nothing") if sets.stop <= frozen * call.sets else call
        mine = weights[first * each : sets.stop * each]
        first = sets.stop
        kinds = [mine[i::each] for i in range(each)]  # of each kind of weight, those of all directions
        parameters = None
        if own:  # [N, P*H]
            kinds, parameters = kinds[:-own], stacked([torch.cat(of_set) for of_set in zip(*kinds[-own:], strict=True)])
        if call.route != "direct":
            kinds = [stacked(kind) for kind in kinds]
        weight_hr = kinds.pop() if call.projected else None
        states = h0, c0
        # A slice of all would cost its gradient a copy; but Dynamo takes no tensor twice, as h0 and c0.
        if count > len(kinds[0]) or call.route != "direct":
            states = [None if state is None else state[sets] for state in states]
        inputs = Inputs(input, *kinds, *[None] * (4 - len(kinds)), weight_hr, None, *states, parameters)
        places = [None if of_all is None else of_all[sets] for of_all in finals or (None, None)]
        if layers > 1:
            y, h, c = side_by_side(inputs, rows, of_group, dropout, *places)
        elif finals is None:
            of_layer = of_group if sets.stop == count else of_group._replace(cells=False)
            y, h, c, cells = ROUTES[call.route](inputs, drawn(call, rows, input, mine[1]), of_layer)
        else:
            y, h, c, *_ = run_directly(inputs, rows, call, *places)
        h_n.append(h)
        c_n.append(c)
        input = y.flatten(1)
        if passed is not None and sets.stop < count:
            input = passed.on(sets.stop - 1, input)
        elif dropout > 0 and sets.stop < count:
            input = functional.dropout(input, dropout)
    if finals is not None:
        return input.contiguous(), *finals, None
    together = lambda parts: parts[0] if len(parts) == 1 else torch.cat(parts)
    cells = cells.flatten(1) if call.cells else None
    return input.contiguous(), together(h_n), together(c_n) if CELLS[call.cell].states else None, cells


def _as_one_operator(
    call: Call, rows: Rows, input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor], dropout: float,
    count: int,
) -> tuple[Tensor, Tensor, Tensor | None, None] | None:  # fmt: skip
    """`recurrent_stack` in a graph where all layers are one operator; None where none serves them. count: L*D."""
    layers = count // call.sets
    c0 = c0.view_as(c0) if c0 is not None and c0 is h0 else c0  # Dynamo takes no tensor twice
    if call.route == "opaque" and aten_stack.serves(call, rows, input, dropout if layers > 1 else 0.0):
        how = call.cell, call.biases, layers, call.sets, rows.time, call.saving != "nothing"
        y, h_n, c_n = aten_stack.stack(h0, c0, *how, input, *weights)
    elif stack_operators.serves(call, layers, dropout):
        mask = drawn_between(input, weights[1].shape[1], count, dropout)
        how = *rows[2:5], mask, rows.time, dropout, call.cell, call.biases, call.saving, *call.limits
        y, h_n, c_n = stack_operators.stack(h0, c0, *how, input, *weights)
    else:
        return None
    return y, h_n, c_n if CELLS[call.cell].states else None, None


def drawn(call: Call, rows: Rows, input: Tensor, weight_hh: Tensor) -> Rows:
    """The rows of a layer with masks of its own for recurrent dropout and zoneout, in training. weight_hh [G*H, H]."""
    if not call.training or (call.zoneout is None and call.recurrent_dropout == 0):
        return rows
    size, sets = weight_hh.shape[1] * call.heads, call.sets
    if call.recurrent_dropout > 0:
        wide = torch.promote_types(input.dtype, torch.float32)
        ones = torch.ones(sets, rows.batch, size, dtype=wide, device=input.device)
        rows = rows._replace(dropped=functional.dropout(ones, call.recurrent_dropout))
    for name, p in zip(("kept_h", "kept_c"), call.zoneout or (0.0, 0.0), strict=True):
        if p > 0:
            kept = torch.rand(input.shape[0], sets, size, dtype=torch.float32, device=input.device) < p
            rows = rows._replace(**{name: kept.to(torch.int8)})
    return rows


def final_states(
    call: Call, rows: Rows, input: Tensor, weights: list[Tensor], count: int
) -> tuple[Tensor, Tensor | None]:
    """h_n and c_n, None for cells without states, of as many layers and directions, to be written."""
    size, states = weights[1].shape[1], len(CELLS[call.cell].states)
    new = lambda width: input.new_empty(count, rows.batch, width)
    return new(size), new(states * size) if states else None


def zero_states(
    call: Call, rows: Rows, input: Tensor, weights: list[Tensor], count: int
) -> tuple[Tensor, Tensor | None]:
    """h0 and c0, None for cells without states, of zeros, for as many layers and directions."""
    cell, (gates_size, state_size) = CELLS[call.cell], weights[1].shape
    h0 = input.new_zeros(count, rows.batch, state_size * call.heads)
    if not cell.states:
        return h0, None
    return h0, input.new_zeros(count, rows.batch, gates_size // cell.gates * len(cell.states))


def _without_projection(layer):
    """A route that knows no projection, as one that does."""

    def route(inputs: Inputs, rows: Rows, call: Call):
        weight_hr, h0 = inputs.weight_hr, inputs.h0
        if weight_hr is None:
            return layer(inputs, rows, call)
        if not isinstance(weight_hr, Tensor):  # one tensor of each set
            weight_hr = stacked(weight_hr)
            whole = combined(inputs._replace(weight_hr=weight_hr, weight_hh=stacked(inputs.weight_hh)), rows, call)
            whole = whole._replace(weight_hh=whole.weight_hh.unbind())
        else:
            whole = combined(inputs, rows, call)
        y, h_n, c_n, cells = layer(whole, rows, call)
        return *projected(by_sets(y, call.sets), h_n, weight_hr, h0, rows), c_n, cells

    return route


def _directly(inputs: Inputs, rows: Rows, call: Call):
    """By the launchers, in an eager call."""
    if call.saving == "nothing":
        return *run_directly(inputs, rows, call)[:3], None
    weights = [weight for kind in inputs[1:5] if kind is not None for weight in kind]
    return EagerLayer.apply(call, rows, inputs.input, *inputs[6:], *weights)


# In a graph of torch.compile the Functions stand as they are: one that it has looked into gives its backward an input
# as it is then, whatever has been written into it since, where autograd raises. All arguments in a row, because Dynamo
# takes no tuple with names that was made from another, before PyTorch 2.13.
@torch.compiler.allow_in_graph
def _apply(*arguments):
    count = len(Inputs._fields) + len(Rows._fields)
    call = Call(*arguments[count:])
    if torch._C._are_functorch_transforms_active():  # inside the graph, where base.py does not ask, which has no guard
        call = call._replace(functional=True, saving="full")
    function = Layer if call.route == "kernels" else aten.AtenLayer
    return function.apply(call, *arguments[:count])[:4]


def _in_a_graph(inputs: Inputs, rows: Rows, call: Call):
    """By the operators around the launchers, or by PyTorch's own kernels behind one operator, as compilers and
    transforms want it.
    """
    return _apply(*inputs, *rows, *call)


# How a layer is computed: by the persistent kernels, called directly or as operators; by PyTorch's own; by PyTorch's
# own behind one opaque operator, for torch.compile, torch.export and torch.func; by the readable loops of reference.py,
# for forward-mode differentiation and for what PyTorch's own does not know; in an ONNX export, by ONNX's own operators.
# (inputs, rows, call) -> y [R, N, P] or [R, N*P], h_n [N, B, P], c_n [N, B, H], c of every step [R, N, H] or whatever
# else if that is not asked for; weights as one tensor [N, ...], but for "direct" as one of each set.
ROUTES = {
    "direct": _without_projection(_directly),
    "kernels": by_heads(_without_projection(_in_a_graph)),
    "aten": lambda inputs, rows, call: (*aten.layer(inputs, rows, call), None),
    "opaque": _in_a_graph,
    "reference": reference_layer,
    "onnx": lambda inputs, rows, call: (*onnx.layer(inputs, rows, call), None),
}
