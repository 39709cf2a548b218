"""LSTMCell, GRUCell and RNNCell: one step of a recurrent layer, on PyTorch's own kernels.

They are torch.nn's cells under the names of this library and nothing else, so that a program can import all its
recurrent modules from one place: one step has no loop that a persistent kernel could keep on the chip, and PyTorch
already runs it as two products and one fused kernel. Where a cell is called in a loop whose inputs are all known, the
layer of the same name runs the whole loop in one launch.
"""

import torch

from .quantization import NotQuantized


class LSTMCell(NotQuantized, torch.nn.LSTMCell):
    """One step of an LSTM: `torch.nn.LSTMCell`, on PyTorch's own kernels whatever the backend.

    LSTMCell(input_size, hidden_size, bias=True, device=None, dtype=None)

    >>> cell = LSTMCell(10, 20)
    >>> h, c = cell(torch.randn(3, 10))
    >>> h, c = cell(torch.randn(3, 10), (h, c))
    >>> h.shape
    torch.Size([3, 20])
    """


class GRUCell(NotQuantized, torch.nn.GRUCell):
    """One step of a GRU: `torch.nn.GRUCell`, on PyTorch's own kernels whatever the backend.

    GRUCell(input_size, hidden_size, bias=True, device=None, dtype=None)

    >>> cell = GRUCell(10, 20)
    >>> h = cell(torch.randn(3, 10))
    >>> h = cell(torch.randn(3, 10), h)
    >>> h.shape
    torch.Size([3, 20])
    """


class RNNCell(NotQuantized, torch.nn.RNNCell):
    """One step of an Elman network: `torch.nn.RNNCell`, on PyTorch's own kernels whatever the backend.

    RNNCell(input_size, hidden_size, bias=True, nonlinearity="tanh", device=None, dtype=None)

    >>> cell = RNNCell(10, 20, nonlinearity="relu")
    >>> h = cell(torch.randn(3, 10))
    >>> h = cell(torch.randn(3, 10), h)
    >>> h.shape
    torch.Size([3, 20])
    """
