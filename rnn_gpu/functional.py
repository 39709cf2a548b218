"""A stack of recurrent layers: layers x directions, dropout between layers, projection; in one of five ways."""

import torch
from torch import Tensor
from torch.nn import functional

from . import aten, backends, onnx
from .kernels.spec import CELLS
from .operators import EagerLayer, Layer, Way, directly, run_directly, stacked
from .projection import combined, projected
from .rows import Rows
from .second_order import projected_reference_layer

# How a layer is computed: by the persistent kernels; by PyTorch's own; by PyTorch's own behind one opaque operator, for
# torch.compile, torch.export and torch.func; by the readable loops of reference.py, for forward-mode differentiation;
# in an ONNX export, by ONNX's own operators.
ROUTES = ("kernels", "aten", "opaque", "reference", "onnx")
LAYER = {
    "aten": aten.layer,
    "opaque": aten.AtenLayer.apply,
    "reference": projected_reference_layer,
    "onnx": onnx.layer,
}


def recurrent_stack(
    cell: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    rows: Rows,
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    with_projection: bool = False,
    route: str = "kernels",
    memory: str = "full",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run `num_layers` layers of `cell` ("lstm", "gru", "rnn_tanh", "rnn_relu").

    input [R, I], the rows of all steps one after another: R = T * B, or fewer where sequences are packed; h0 [L*D, B,
    H] (projected: [L*D, B, P]), c0 [L*D, B, H] for the LSTM, else None, or both None for zeros (on the kernels alone);
    weights in the order of torch.nn: for each
    layer and direction weight_ih, weight_hh and, if `bias`, bias_ih, bias_hh, and, if `with_projection`, weight_hr. All
    of one dtype: float32, float16 or bfloat16 on the kernels, any floating one elsewhere. route: one of ROUTES. memory:
    "full" or "lean", what the kernels save for the backward (operators.SAVING).
    -> output [R, D*H] (projected: [R, D*P]), h_n like h0, c_n like c0.
    """
    directions, reversed_sets = (2, 2) if bidirectional else (1, 0)
    each = (4 if bias else 2) + with_projection
    given = [input, *weights, *(state for state in (h0, c0) if state is not None)]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    saving = memory if differentiated else "nothing"
    if backends.transforming():  # which may differentiate what does not look so here, and cannot make the gates again
        saving = "full"
    plain = route == "kernels" and directly(given)
    way = Way(cell, directions, reversed_sets, bias, saving, backends.limits()) if plain else None
    if h0 is None and not plain:
        h0, c0 = zero_states(cell, input, weights, rows.batch, num_layers * directions, with_projection)
    h_n, c_n = [], []
    for layer in range(num_layers):
        sets = slice(layer * directions, (layer + 1) * directions)
        mine = weights[sets.start * each : sets.stop * each]
        kinds = [mine[i::each] for i in range(each)]  # of each kind of weight, those of all directions
        states = None if h0 is None else h0[sets], None if c0 is None else c0[sets]
        if plain:
            y, h, c = _directly(way, rows, input, *states, kinds, with_projection, differentiated)
        else:
            kinds = [stacked(kind) for kind in kinds]
            weight_hr = kinds.pop() if with_projection else None
            tensors = input, *kinds, *[None] * (4 - len(kinds)), weight_hr, *states
            if route == "kernels":
                y, h, c = _by_operators(cell, *tensors, rows, reversed_sets, saving)
            else:
                place = rows.lengths, rows.offsets, rows.resets, rows.time
                y, h, c = LAYER[route](*tensors, *place, cell, reversed_sets)
        input = y.flatten(1)
        h_n.append(h)
        c_n.append(c)
        if dropout > 0 and training and layer + 1 < num_layers:
            input = functional.dropout(input, dropout)
    if num_layers == 1:
        return input.contiguous(), h, c if CELLS[cell].carry == "c" else None
    return input.contiguous(), torch.cat(h_n), torch.cat(c_n) if CELLS[cell].carry == "c" else None


def zero_states(
    cell: str, input: Tensor, weights: list[Tensor], batch: int, sets: int, projection: bool
) -> tuple[Tensor, Tensor | None]:
    """h0 and, for the LSTM, c0 of zeros."""
    h0 = input.new_zeros(sets, batch, weights[1].shape[1])
    if CELLS[cell].carry != "c":
        return h0, None
    return h0, input.new_zeros(sets, batch, weights[1].shape[0] // CELLS[cell].gates) if projection else h0


def _directly(way, rows: Rows, input, h0, c0, kinds: list, with_projection: bool, differentiated: bool):
    """One layer on the persistent kernels, in an eager call."""
    start, h, weight_hr = None, h0, None
    if with_projection:
        weight_hr = stacked(kinds[-1])
        weight_hh, start, h = combined(stacked(kinds[1]), weight_hr, h0, rows, input.shape[0], way.reversed_sets)
        kinds = [kinds[0], [*weight_hh], *kinds[2:-1]]
    tensors = input, h, c0, start
    weights = [weight for kind in kinds for weight in kind]
    if differentiated:
        y, h_n, c_n = EagerLayer.apply(way, rows, *tensors, *weights)
    else:
        y, h_n, c_n, _, _ = run_directly(way, rows, *tensors, weights)
    if weight_hr is not None:
        y, h_n = projected(y, h_n, weight_hr, h0, rows)
    return y, h_n, c_n


def _by_operators(
    cell, input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0, rows: Rows, reversed_sets: int, saving: str
):
    """The same for compilers and transforms."""
    start, h = None, h0
    if weight_hr is not None:
        weight_hh, start, h = combined(weight_hh, weight_hr, h0, rows, input.shape[0], reversed_sets)
    tensors = input, weight_ih, weight_hh, bias_ih, bias_hh, start, h, c0, rows.lengths, rows.offsets, rows.resets
    how = backends.transforming(), backends.limits(), saving, rows.time, cell, reversed_sets
    y, h_n, c_n, _, _ = Layer.apply(*tensors, *how)
    if weight_hr is not None:
        y, h_n = projected(y, h_n, weight_hr, h0, rows)
    return y, h_n, c_n
