"""A stack of recurrent layers: layers x directions, dropout between layers, projection; on the kernels or the
reference.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import backends
from .kernels.spec import CELLS
from .operators import Layer, first_rows, reference_layer, runs_backwards


class Rows(NamedTuple):
    """Where the rows of the steps lie; the tensors on the device of the input (see `kernels.launch.Rows`).

    time: T. batch: B. lengths: int32 [B], within 0..T, or None where every row has all steps. offsets: int64 [T+1]
    where sequences are packed, longest first, else None. resets: int8 [T, B], not zero where a row starts anew, or
    None.
    """

    time: int
    batch: int
    lengths: Tensor | None = None
    offsets: Tensor | None = None
    resets: Tensor | None = None


def packed_rows(batch_sizes: Tensor, batch: int, device: torch.device) -> Rows:
    """The rows of a PackedSequence of `batch` sequences, from its batch_sizes [T] on the CPU."""
    offsets = functional.pad(batch_sizes.cumsum(0), (1, 0))
    lengths = (batch_sizes.unsqueeze(1) > torch.arange(batch)).sum(0, dtype=torch.int32)
    return Rows(len(batch_sizes), batch, lengths.to(device, non_blocking=True), offsets.to(device, non_blocking=True))


def _stacked(tensors: list[Tensor]) -> Tensor:
    """The weights of all directions as one tensor, without a copy where there is one direction."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _project(rows: Tensor, weight_hr: Tensor) -> Tensor:
    """[..., N, M, H] by weight_hr [N, P, H] -> [..., N, M, P]."""
    return rows @ weight_hr.transpose(-1, -2)


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
    projected: bool = False,
    kernels: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run `num_layers` layers of `cell` ("lstm", "gru", "rnn_tanh", "rnn_relu").

    input [R, I], the rows of all steps one after another: R = T * B, or fewer where sequences are packed; h0 [L*D, B,
    H] (projected: [L*D, B, P]); c0 [L*D, B, H] for the LSTM, else None; weights in the order of torch.nn: for each
    layer and direction weight_ih, weight_hh and, if `bias`, bias_ih, bias_hh, and, if `projected`, weight_hr. All of
    one dtype: float32, float16 or bfloat16 on the kernels; kernels=False runs the readable loop of reference.py, in
    any dtype.
    -> output [R, D*H] (projected: [R, D*P]), h_n like h0, c_n like c0.
    """
    directions = 2 if bidirectional else 1
    reversed_sets = 2 if bidirectional else 0
    each = (4 if bias else 2) + projected
    save = torch.is_grad_enabled() and any(
        t.requires_grad for t in (input, h0, *weights, *([] if c0 is None else [c0]))
    )
    place = rows.lengths, rows.offsets, rows.resets
    h_n, c_n = [], []
    for layer in range(num_layers):
        sets = slice(layer * directions, (layer + 1) * directions)
        mine = weights[sets.start * each : sets.stop * each]
        stacked = [_stacked(mine[i::each]) for i in range(each)]
        weight_hr = stacked.pop() if projected else None
        weight_ih, weight_hh, bias_ih, bias_hh = stacked + [None] * (4 - len(stacked))
        h, c, start = h0[sets], None if c0 is None else c0[sets], None
        if projected:
            # With m = o * tanh(c) and h = W_hr m, the recurrence on m has the weight W_hh W_hr; h0 enters the first
            # step alone.
            start = _without_resets(h @ weight_hh.transpose(1, 2), rows, input.shape[0], reversed_sets)
            weight_hh, h = weight_hh @ weight_hr, h.new_zeros(directions, rows.batch, weight_hr.shape[-1])
        tensors = (input, weight_ih, weight_hh, bias_ih, bias_hh, start, h, c)
        if kernels:
            y, h, c, _, _ = Layer.apply(*tensors, *place, rows.time, cell, reversed_sets, backends.limits(), save)
        else:
            y, h, c = reference_layer(tensors, place, rows.time, cell, reversed_sets)
        if projected:
            y = _project(y.transpose(0, 1), weight_hr).transpose(0, 1)
            h = _project(h, weight_hr)
            if rows.lengths is not None:  # an empty sequence ends in the state it began with
                h = torch.where((rows.lengths == 0).unsqueeze(1), h0[sets], h)
        input = y.flatten(1)
        h_n.append(h)
        c_n.append(c)
        if dropout > 0 and training and layer + 1 < num_layers:
            input = functional.dropout(input, dropout)
    return input.contiguous(), torch.cat(h_n), torch.cat(c_n) if CELLS[cell].carry == "c" else None


def _without_resets(start: Tensor, rows: Rows, count: int, reversed_sets: int) -> Tensor:
    """start [N, B, G*H] with zeros for rows whose first step starts anew."""
    if rows.resets is None:
        return start
    resets = rows.resets.bool().flatten()
    backwards = [runs_backwards(reversed_sets, n) for n in range(start.shape[0])]
    anew = [resets[first_rows(rows.batch, rows.lengths, rows.offsets, count, back)] for back in backwards]
    return start.masked_fill(torch.stack(anew).unsqueeze(2), 0)
