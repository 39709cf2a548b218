"""Cells that PyTorch does not have, each described as a user's own would be (docs/cells.md), with its source.

>>> import torch
>>> from rnn_gpu.zoo import MGU
>>> output, h_n = MGU(10, 20)(torch.randn(5, 3, 10))

docs/equations.md has the equations and derives what goes backwards. Here is the step of each in plain torch; the Triton
functions are in kernels/zoo.py.
"""

from typing import Any

import torch
from torch import Tensor

from .equations import Tensors
from .kernels.spec import Cell
from .own import layer

__all__ = ["MGU", "SLSTM", "CoupledLSTM", "LightGRU", "PeepholeLSTM"]


def __dir__() -> list[str]:
    """The layers, and not what they are made of."""
    return __all__


def _in_triton(name: str) -> dict[str, Any]:
    return {which: f"{__package__}.kernels.zoo:{name}_{which}" for which in ("forward", "factors", "backward")}


def peephole_step(x: Tensors, r: Tensors, carry: Tensors, p: Tensors) -> tuple[Tensor, Tensors]:
    """One step of the LSTM with peepholes: the gates see c, i and f that of before, o the new one.

    Source: Gers, Schraudolph and Schmidhuber, "Learning precise timing with LSTM recurrent networks", JMLR 3, 2002; as
    ONNX's LSTM has them (input P, with its gates i, o, f).
    """
    (c,), (p_i, p_f, p_o) = carry, p
    i = torch.sigmoid(x[0] + r[0] + p_i * c)
    f = torch.sigmoid(x[1] + r[1] + p_f * c)
    g = torch.tanh(x[2] + r[2])
    c = f * c + i * g
    o = torch.sigmoid(x[3] + r[3] + p_o * c)
    return o * torch.tanh(c), (c,)


def coupled_step(x: Tensors, r: Tensors, carry: Tensors) -> tuple[Tensor, Tensors]:
    """One step of the LSTM with coupled input and forget gate, i = 1 - f: three gates in place of four.

    Source: Greff et al., "LSTM: a search space odyssey", IEEE TNNLS 28, 2017 (CIFG), without peepholes.
    """
    f = torch.sigmoid(x[0] + r[0])
    g = torch.tanh(x[1] + r[1])
    o = torch.sigmoid(x[2] + r[2])
    c = f * carry[0] + (1 - f) * g
    return o * torch.tanh(c), (c,)


def minimal_step(x: Tensors, r: Tensors, carry: Tensors) -> tuple[Tensor, Tensors]:
    """One step of the minimal gated unit: one gate that forgets and resets.

    Source: Zhou et al., "Minimal gated unit for recurrent neural networks", IJAC 13, 2016; but the gate stands behind
    the product with h, as PyTorch's GRU has it, and not before: one exchange a step.
    """
    f = torch.sigmoid(x[0] + r[0])
    n = torch.tanh(x[1] + f * r[1])
    h = (1 - f) * carry[0] + f * n
    return h, (h,)


def light_step(x: Tensors, r: Tensors, carry: Tensors) -> tuple[Tensor, Tensors]:
    """One step of the light GRU: no reset gate, ReLU for tanh.

    Source: Ravanelli et al., "Light gated recurrent units for speech recognition", IEEE TETCI 2, 2018; without its
    batch normalisation of the input's part, which is no part of the recurrence: normalise the input of the layer.
    """
    z = torch.sigmoid(x[0] + r[0])
    n = torch.relu(x[1] + r[1])
    h = z * carry[0] + (1 - z) * n
    return h, (h,)


def exponential_step(x: Tensors, r: Tensors, carry: Tensors) -> tuple[Tensor, Tensors]:
    """One step of the sLSTM: an exponential input gate, a normaliser n, a stabiliser m.

    Source: Beck et al., "xLSTM: extended long short-term memory", 2024, equations 8 to 17, the forget gate a sigmoid.
    c and n are those of the paper times exp(-m); h does not depend on m. n = 0 is a unit without history, of whatever
    m: its m is the input's, or exp(i - m) could be 0 and h = 0/0. There f may be more than 1, within 16 bits' range.
    """
    c, n, m = carry
    i, log_f = x[0] + r[0], torch.nn.functional.logsigmoid(x[1] + r[1])
    z, o = torch.tanh(x[2] + r[2]), torch.sigmoid(x[3] + r[3])
    kept = log_f + m
    m = torch.where((kept >= i) & (n != 0), kept, i)
    i, f = torch.exp(i - m), torch.exp((kept - m).clamp(max=MOST))
    c, n = f * c + i * z, f * n + i
    return o * (c / n), (c, n, m)


MOST = 10.0  # logarithm of f of a unit without history
PEEPHOLES = ("peephole_i", "peephole_f", "peephole_o")
PeepholeLSTM = layer(
    Cell(
        "PeepholeLSTM", ("i", "f", "g", "o"), peephole_step, states=("c",), saves=4, parameters=PEEPHOLES, quiet=True,
        **_in_triton("peephole"),
    )
)  # fmt: skip
CoupledLSTM = layer(
    Cell("CoupledLSTM", ("f", "g", "o"), coupled_step, states=("c",), saves=3, quiet=True, **_in_triton("coupled"))
)
MGU = layer(
    Cell("MGU", ("f", "n"), minimal_step, carries_h=True, apart=1, saves=3, quiet=True, **_in_triton("minimal"))
)
LightGRU = layer(Cell("LightGRU", ("z", "n"), light_step, carries_h=True, saves=2, quiet=True, **_in_triton("light")))
SLSTM = layer(
    Cell(
        "SLSTM", ("i", "f", "z", "o"), exponential_step, states=("c", "n", "m"), saves=5, **_in_triton("exponential")
    )
)  # fmt: skip

ZOO = (PeepholeLSTM, CoupledLSTM, MGU, LightGRU, SLSTM)
