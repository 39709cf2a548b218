"""Where the rows of the steps lie: dense, packed, with lengths and resets.

T steps, B rows of the batch, R rows of all steps one after another: step t has the rows from t * B on (dense) or from
offsets[t] on (packed, longest first), R = T * B or fewer.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


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


def first_rows(batch: int, lengths: Tensor | None, offsets: Tensor | None, count: int, backwards: bool):
    """Where the B rows of each sequence's first step in the direction of flow lie among all R: a slice or an index."""
    if not backwards:
        return slice(0, batch)
    if lengths is None:
        return slice(count - batch, count)
    last = (lengths - 1).clamp(min=0).long()
    row = torch.arange(batch, device=lengths.device)
    return row + (last * batch if offsets is None else offsets[last])


def rows_before(batch: int, offsets: Tensor | None, count: int):
    """For the rows from B on, where the rows of the same sequences one step before lie: a slice, or an index of R -
    B.
    """
    if offsets is None:
        return slice(0, count - batch)
    sizes = offsets[1:] - offsets[:-1]  # a row of step t stands as many rows later as step t - 1 has
    sizes_before = torch.repeat_interleave(sizes[:-1], sizes[1:], output_size=count - batch)
    return torch.arange(batch, count, device=offsets.device) - sizes_before


def starts_anew(resets: Tensor | None, rows) -> Tensor | None:
    """bool [len(rows), 1], whether the given rows of dense input start anew; None where nothing does."""
    return None if resets is None else resets.bool().flatten()[rows].unsqueeze(1)
