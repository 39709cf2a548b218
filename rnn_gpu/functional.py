"""A stack of recurrent layers on the kernels: layers x directions, dropout between layers."""

import torch
from torch import Tensor

from .kernels.spec import CELLS
from .operators import Layer


def _stacked(tensors: list[Tensor]) -> Tensor:
    """The weights of all directions as one tensor, without a copy where there is one direction."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def recurrent_stack(
    cell: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run `num_layers` layers of `cell` ("lstm", "gru", "rnn_tanh", "rnn_relu") on the Triton kernels.

    input [T, B, I]; h0 [L*D, B, H]; c0 [L*D, B, H] for the LSTM, else None; weights in the order of torch.nn: for
    each layer and direction weight_ih, weight_hh and, if `bias`, bias_ih, bias_hh. All of one dtype: float32, float16
    or bfloat16.
    -> output [T, B, D*H], h_n [L*D, B, H], c_n [L*D, B, H] or None.
    """
    directions = 2 if bidirectional else 1
    each = 4 if bias else 2
    save = torch.is_grad_enabled() and any(
        t.requires_grad for t in (input, h0, *weights, *([] if c0 is None else [c0]))
    )
    h_n, c_n = [], []
    for layer in range(num_layers):
        sets = slice(layer * directions, (layer + 1) * directions)
        mine = weights[sets.start * each : sets.stop * each]
        stacked = [_stacked(mine[i::each]) for i in range(each)] + [None] * (4 - each)
        y, h, c, _, _ = Layer.apply(
            input, *stacked, h0[sets], None if c0 is None else c0[sets], cell, 2 if bidirectional else 0, save
        )
        input = y.flatten(2)
        h_n.append(h)
        c_n.append(c)
        if dropout > 0 and training and layer + 1 < num_layers:
            input = torch.nn.functional.dropout(input, dropout)
    return input.contiguous(), torch.cat(h_n), torch.cat(c_n) if CELLS[cell].carry == "c" else None
