"""A stack of recurrent layers: layers x directions, dropout between layers, projection; in one of five ways."""

import torch
from torch import Tensor
from torch.nn import functional

from . import aten, backends, onnx
from .kernels.spec import CELLS
from .operators import Layer
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


def _stacked(tensors: list[Tensor]) -> Tensor:
    """The weights of all directions as one tensor, without a copy where there is one direction."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def recurrent_stack(
    cell: str,
    input: Tensor,
    h0: Tensor,
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
    H] (projected: [L*D, B, P]); c0 [L*D, B, H] for the LSTM, else None; weights in the order of torch.nn: for each
    layer and direction weight_ih, weight_hh and, if `bias`, bias_ih, bias_hh, and, if `with_projection`, weight_hr. All
    of one dtype: float32, float16 or bfloat16 on the kernels, any floating one elsewhere. route: one of ROUTES. memory:
    "full" or "lean", what the kernels save for the backward (operators.SAVING).
    -> output [R, D*H] (projected: [R, D*P]), h_n like h0, c_n like c0.
    """
    directions = 2 if bidirectional else 1
    reversed_sets = 2 if bidirectional else 0
    each = (4 if bias else 2) + with_projection
    differentiated = torch.is_grad_enabled() and any(
        t.requires_grad for t in (input, h0, *weights, *([] if c0 is None else [c0]))
    )
    saving = memory if differentiated else "nothing"
    if backends.transforming():  # which may differentiate what does not look so here, and cannot make the gates again
        saving = "full"
    h_n, c_n = [], []
    for layer in range(num_layers):
        sets = slice(layer * directions, (layer + 1) * directions)
        mine = weights[sets.start * each : sets.stop * each]
        stacked = [_stacked(mine[i::each]) for i in range(each)]
        weight_hr = stacked.pop() if with_projection else None
        weight_ih, weight_hh, bias_ih, bias_hh = stacked + [None] * (4 - len(stacked))
        states = h0[sets], None if c0 is None else c0[sets]
        if route == "kernels":
            y, h, c = _on_the_kernels(
                cell, input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, *states, rows, reversed_sets, saving
            )
        else:
            tensors = input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, *states
            place = rows.lengths, rows.offsets, rows.resets, rows.time
            y, h, c = LAYER[route](*tensors, *place, cell, reversed_sets)
        input = y.flatten(1)
        h_n.append(h)
        c_n.append(c)
        if dropout > 0 and training and layer + 1 < num_layers:
            input = functional.dropout(input, dropout)
    return input.contiguous(), torch.cat(h_n), torch.cat(c_n) if CELLS[cell].carry == "c" else None


def _on_the_kernels(
    cell, input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0, rows: Rows, reversed_sets: int, saving: str
):
    """One layer on the persistent kernels, which know no projection."""
    start, h = None, h0
    if weight_hr is not None:
        weight_hh, start, h = combined(weight_hh, weight_hr, h0, rows, input.shape[0], reversed_sets)
    tensors = input, weight_ih, weight_hh, bias_ih, bias_hh, start, h, c0, rows.lengths, rows.offsets, rows.resets
    how = backends.transforming(), backends.limits(), saving, rows.time, cell, reversed_sets
    y, h_n, c_n, _, _ = Layer.apply(*tensors, *how)
    if weight_hr is not None:
        y, h_n = projected(y, h_n, weight_hr, h0, rows)
    return y, h_n, c_n
