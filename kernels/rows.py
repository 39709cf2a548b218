"""Where the rows of the steps lie, and dropout between layers: what host and kernels agree on."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Where the rows of the steps lie. R rows in all: R = T * B, or fewer where sequences are packed.

    time: T. batch: B. lengths: int32 [B], steps of each row, within 0..T, or None where all have T. offsets: int64
    [T+1], the first row of each step, where sequences are packed (longest first, as PackedSequence has them), else
    None. resets: int8 [T, B], not zero where a row's state starts anew, or None. On the device of the input.

    And of one layer, what is drawn for a forward of training, each None where nothing is. dropped: float32 [N, B, H],
    what h is multiplied with before the recurrent product, 0 or 1/(1-p). kept_h, kept_c: int8 [R, N, H], not zero where
    a unit keeps its h, or its c, in a step (zoneout).
    """

    time: int
    batch: int
    lengths: Tensor | None = None
    offsets: Tensor | None = None
    resets: Tensor | None = None
    dropped: Tensor | None = None
    kept_h: Tensor | None = None
    kept_c: Tensor | None = None

    @property
    def ragged(self) -> bool:
        """Whether rows end early or start anew: the plan leaves registers for the masks."""
        return self.lengths is not None or self.resets is not None


class Passed(NamedTuple):
    """Dropout between the layers of a stack. mask: bool [L-1, R, H], which units each sees of the one below, as many
    times as large as those are fewer. p: the probability that one is not seen, less than 1.
    """

    mask: Tensor
    p: float

    @property
    def scale(self) -> float:
        """How many times as large."""
        return 1 / (1 - self.p)

    def on(self, layer: int, rows: Tensor) -> Tensor:
        """What the next layer sees of a layer's rows [R, H]; or the gradients of those from the gradients of that."""
        return torch.ops.aten.native_dropout_backward(rows, self.mask[layer], self.scale)  # rows * mask * scale
