"""A projected LSTM as one without projection.

With m = o * tanh(c) and h = W_hr m, the recurrence on m has the weight W_hh W_hr, and the initial h enters the gate
sums of each row's first step alone. N weight sets, B rows, H hidden units, P projected ones.
"""

import torch
from torch import Tensor

from .kernels.spec import runs_backwards
from .rows import Rows, first_rows, starts_anew


def combined(
    weight_hh: Tensor, weight_hr: Tensor, h0: Tensor, rows: Rows, count: int, reversed_sets: int
) -> tuple[Tensor, Tensor, Tensor]:
    """weight_hh [N, G*H, P], weight_hr [N, P, H], h0 [N, B, P]; count: R.

    -> the recurrent weight on m [N, G*H, H], start [N, B, G*H], which is added to the gate sums of each row's first
    step, and m before the first step, zeros [N, B, H].
    """
    start = h0 @ weight_hh.transpose(1, 2)
    if rows.resets is not None:  # a row that starts anew at once knows no initial state
        backwards = [runs_backwards(reversed_sets, n) for n in range(start.shape[0])]
        first = [first_rows(rows.batch, rows.lengths, rows.offsets, count, back) for back in backwards]
        start = start.masked_fill(torch.stack([starts_anew(rows.resets, one) for one in first]), 0)
    return weight_hh @ weight_hr, start, h0.new_zeros(*h0.shape[:2], weight_hr.shape[-1])


def projected(y: Tensor, h_n: Tensor, weight_hr: Tensor, h0: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """m of all rows [R, N, H] and the last ones [N, B, H] -> y [R, N, P], h_n [N, B, P]."""
    weight = weight_hr.transpose(1, 2)
    y, h_n = (y.transpose(0, 1) @ weight).transpose(0, 1), h_n @ weight
    if lengths is not None:  # an empty sequence ends in the state it began with
        h_n = torch.where((lengths == 0).unsqueeze(1), h0, h_n)
    return y, h_n
