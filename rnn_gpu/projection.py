"""A projected LSTM as one without projection.

With m = o * tanh(c) and h = W_hr m, the recurrence on m has the weight W_hh W_hr, and the initial h enters the gate
sums of each row's first step alone. N weight sets, B rows, H hidden units, P projected ones.
"""

import torch
from torch import Tensor

from .call import Call, Inputs
from .products import full_product
from .rows import Rows, first_rows, past_the_end, starts_anew


def combined(inputs: Inputs, rows: Rows, call: Call) -> Inputs:
    """The layer with its projection taken into the recurrent weight: no weight_hr, the recurrent weight on m [N, G*H,
    H], start [N, B, G*H], which is added to the gate sums of each row's first step, and for h0 m before the first step,
    zeros [N, B, H]; start and h0 None where h0 was. inputs: weights as one tensor [N, ...].
    """
    weight_hh, weight_hr, h0 = inputs.weight_hh, inputs.weight_hr, inputs.h0
    whole = inputs._replace(weight_hh=weight_hh @ weight_hr, weight_hr=None)
    if h0 is None:
        return whole
    # A row that has no step, or starts anew at once, knows no initial state: cleared before the product, because zero
    # gradients times a NaN would reach the weight.
    if rows.lengths is not None:
        h0 = h0.masked_fill((rows.lengths == 0).unsqueeze(1), 0)
    if rows.resets is not None:
        count = inputs.input.shape[0]
        first = [first_rows(rows, count, call.backwards(n)) for n in range(h0.shape[0])]
        h0 = h0.masked_fill(torch.stack([starts_anew(rows.resets, one) for one in first]), 0)
    # In full, and its gradients: one step's product, as is that of h0's gradient in a layer without projection.
    start = full_product(h0, weight_hh.transpose(1, 2))
    return whole._replace(start=start, h0=h0.new_zeros(*h0.shape[:2], weight_hr.shape[-1]))


def projected(y: Tensor, h_n: Tensor, weight_hr: Tensor, h0: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
    """m of all rows [R, N, H] and the last ones [N, B, H] -> y [R, N, P], h_n [N, B, P]."""
    weight = weight_hr.transpose(1, 2)
    y, last = (y.transpose(0, 1) @ weight).transpose(0, 1), h_n @ weight
    if rows.lengths is not None:  # an empty sequence ends in the state it began with
        empty = (rows.lengths == 0).unsqueeze(1)
        last = last.masked_fill(empty, 0) if h0 is None else torch.where(empty, h0, last)
        if rows.offsets is None:  # whatever gradient stands in the padding, it is of a zero and not of the product
            y = y.masked_fill(past_the_end(rows).flatten()[:, None, None], 0)
    return y, last
