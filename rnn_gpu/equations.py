"""The built-in cells: one step of each in plain torch, and what kernels and layers must know of it.

Nothing here is special about them but that PyTorch has them too (`mode`): a cell of a user's own is described in the
same way (docs/cells.md). Their Triton functions are in kernels/cells.py.

Source of the equations: the documentation of torch.nn.LSTM, torch.nn.GRU and torch.nn.RNN, in whose notation they are
written (* is the element-wise product). docs/equations.md derives the backward.

    step(x, r, carry) -> (h, carry)

    x      G of [B, H]  input side of the gate sums: W_ih x_t + b_ih, and what of b_hh may be added to it
    r      G of [B, H]  hidden side: W_hh h_(t-1), for the GRU's n gate with b_hn
    carry  of [B, H]    of step t-1: (c,), (h,) or (); the one returned is of step t
    h      [B, H]       h_t
"""

import torch
from torch import Tensor

from .kernels.spec import CELLS, Cell

Tensors = tuple[Tensor, ...]


def lstm_step(x: Tensors, r: Tensors, carry: Tensors) -> tuple[Tensor, Tensors]:
    """One step of the LSTM; the carry is c. All [B, H], one floating dtype.

    i_t = sigmoid(W_ii x_t + b_ii + W_hi h_(t-1) + b_hi)
    f_t = sigmoid(W_if x_t + b_if + W_hf h_(t-1) + b_hf)
    g_t = tanh(W_ig x_t + b_ig + W_hg h_(t-1) + b_hg)
    o_t = sigmoid(W_io x_t + b_io + W_ho h_(t-1) + b_ho)
    c_t = f_t * c_(t-1) + i_t * g_t
    h_t = o_t * tanh(c_t)                                                  (torch.nn.LSTM)
    """
    i = torch.sigmoid(x[0] + r[0])
    f = torch.sigmoid(x[1] + r[1])
    g = torch.tanh(x[2] + r[2])
    o = torch.sigmoid(x[3] + r[3])
    c = f * carry[0] + i * g
    return o * torch.tanh(c), (c,)


def gru_step(x: Tensors, r: Tensors, carry: Tensors) -> tuple[Tensor, Tensors]:
    """One step of the GRU; the carry is h. All [B, H], one floating dtype.

    r_t = sigmoid(W_ir x_t + b_ir + W_hr h_(t-1) + b_hr)
    z_t = sigmoid(W_iz x_t + b_iz + W_hz h_(t-1) + b_hz)
    n_t = tanh(W_in x_t + b_in + r_t * (W_hn h_(t-1) + b_hn))
    h_t = (1 - z_t) * n_t + z_t * h_(t-1)                                  (torch.nn.GRU)
    """
    reset = torch.sigmoid(x[0] + r[0])
    z = torch.sigmoid(x[1] + r[1])
    n = torch.tanh(x[2] + reset * r[2])
    h = (1 - z) * n + z * carry[0]
    return h, (h,)


def rnn_tanh_step(x: Tensors, r: Tensors, carry: Tensors) -> tuple[Tensor, Tensors]:
    """One step of the RNN with tanh, which carries nothing. All [B, H], one floating dtype.

    h_t = tanh(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh)                      (torch.nn.RNN)
    """
    return torch.tanh(x[0] + r[0]), ()


def rnn_relu_step(x: Tensors, r: Tensors, carry: Tensors) -> tuple[Tensor, Tensors]:
    """One step of the RNN with ReLU, which carries nothing. All [B, H], one floating dtype.

    h_t = relu(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh)                      (torch.nn.RNN)
    """
    return torch.relu(x[0] + r[0]), ()


def _in_triton(name: str) -> dict[str, str]:
    return {which: f"{__package__}.kernels.cells:{name}_{which}" for which in ("forward", "factors", "backward")}


LSTM = Cell(
    "lstm", ("i", "f", "g", "o"), lstm_step, states=("c",), saves=4, quiet=True, mode="LSTM", **_in_triton("lstm")
)
GRU = Cell(
    "gru", ("r", "z", "n"), gru_step, carries_h=True, apart=1, saves=4, quiet=True, mode="GRU", **_in_triton("gru")
)
RNN_TANH = Cell("rnn_tanh", ("h",), rnn_tanh_step, reads_h=True, quiet=True, mode="RNN_TANH", **_in_triton("rnn_tanh"))
RNN_RELU = Cell("rnn_relu", ("h",), rnn_relu_step, reads_h=True, quiet=True, mode="RNN_RELU", **_in_triton("rnn_relu"))

CELLS.update({cell.name: cell for cell in (LSTM, GRU, RNN_TANH, RNN_RELU)})
BUILT_IN = tuple(CELLS)
CELL_OF_MODE = {CELLS[name].mode: name for name in BUILT_IN}
