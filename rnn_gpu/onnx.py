"""A layer as ONNX's own LSTM, GRU or RNN operator, for torch.onnx.export(dynamo=True).

Source: the ONNX operator specification. Its gates stand in another order than torch.nn's (LSTM i, o, f, c; GRU z, r,
h), and its GRU puts the reset gate after the product with linear_before_reset=1. T steps, B rows, D directions, G
gates.
"""

import warnings

import torch
from torch import Tensor

from .call import Call, Inputs
from .kernels.spec import CELLS
from .rows import Rows

OPERATOR = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}


def layer(inputs: Inputs, rows: Rows, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `aten.layer`. RuntimeError for what ONNX's operators do not know: resets, packed input.

    With a projection (weight_hr) the operator runs on the combined recurrent weight, and h0 must be zero.
    """
    refuse_masks(rows, call)
    input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, _, h0, c0, _ = inputs
    cell, time, lengths = call.cell, rows.time, rows.lengths
    directions, batch = h0.shape[0], h0.shape[1]
    if weight_hr is not None:
        weight_hh, h0 = weight_hh @ weight_hr, h0.new_zeros(directions, batch, weight_hr.shape[-1])
    hidden_size = h0.shape[-1]
    bias = None
    if bias_ih is not None:
        bias = torch.cat([_reordered(bias_ih, cell), _reordered(bias_hh, cell)], 1)
    given = [
        input.view(time, batch, input.shape[-1]),
        _reordered(weight_ih, cell),
        _reordered(weight_hh, cell),
        bias,
        lengths,
        h0,
    ]
    attributes = {"hidden_size": hidden_size, "direction": "bidirectional" if directions == 2 else "forward"}
    if cell == "gru":
        attributes["linear_before_reset"] = 1
    if OPERATOR[cell] == "RNN":
        attributes["activations"] = ["Relu" if cell == "rnn_relu" else "Tanh"] * directions
    states = [(directions, batch, hidden_size)] * (2 if c0 is not None else 1)
    y, h_n, *c_n = torch.onnx.ops.symbolic_multi_out(
        OPERATOR[cell],
        given if c0 is None else [*given, c0],
        attributes,
        dtypes=[input.dtype] * (1 + len(states)),
        shapes=[(time, directions, batch, hidden_size), *states],
        version=None,
    )
    y = y.permute(0, 2, 1, 3)
    if weight_hr is not None:
        y, h_n = (y.unsqueeze(-2) @ weight_hr.transpose(1, 2)).squeeze(-2), h_n @ weight_hr.transpose(1, 2)
    return y.flatten(0, 1), h_n, c_n[0] if c_n else None


NO_PROGRAM = "torch.onnx.export takes rnn_gpu's layers from a model, not from a program that torch.export has made"
NO_PROJECTION = "ONNX's LSTM has no projection: with proj_size, export without initial states (docs/limits.md)"


def refuse_masks(rows: Rows, call: Call) -> None:
    """RuntimeError for packed input and resets, which ONNX's operators do not know."""
    if rows.resets is not None:
        refuse(f"ONNX's {OPERATOR[call.cell]} has no resets: export the model without them (docs/limits.md)")
    if rows.offsets is not None:
        refuse(f"ONNX's {OPERATOR[call.cell]} has no packed input: give padded input and lengths (docs/limits.md)")


def refuse_operator(inputs: Inputs, rows: Rows, call: Call) -> None:
    """RuntimeError where the operator that stands for a layer meets an export to ONNX, which does not know it: in the
    second attempt, in which no layer can see that it is one, or in a program that torch.export has made.
    """
    refuse_masks(rows, call)
    refuse(NO_PROJECTION if inputs.weight_hr is not None else NO_PROGRAM)


def refuse(reason: str) -> None:
    """RuntimeError, and a warning before: torch.onnx.export catches the error, tries again in another way, and shows
    the user only what became of that.
    """
    warnings.warn(reason, stacklevel=2)
    raise RuntimeError(reason)


def _reordered(weight: Tensor, cell: str) -> Tensor:
    """[D, G*H, ...] with the gates in ONNX's order."""
    parts = weight.chunk(CELLS[cell].gates, 1)
    return torch.cat([parts[gate] for gate in ORDER[cell]], 1)
