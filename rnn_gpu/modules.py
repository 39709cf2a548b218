"""LSTM, GRU and RNN: torch.nn's layers under their own names and rules, with the time loop in one persistent kernel.

Not derived from `torch.nn.LSTM` itself: `torch.compile` breaks the graph at that. Each class names the torch.nn class
whose forward serves the "torch" backend.
"""

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from .base import _Layer
from .options import LSTMOptions, Options, named, showing


@named
class LSTM(_Layer[tuple[Tensor, Tensor]]):
    """Long short-term memory: torch.nn.LSTM by another name, with the time loop in one persistent GPU kernel.

    Same arguments, parameters, state dict, results and errors. T steps, B rows, I = input_size, H = hidden_size,
    L = num_layers, D = 2 if bidirectional else 1; with proj_size, h has that many values in place of H.

        i, f, o = sigmoid(W_ii x + b_ii + W_hi h + b_hi), ...; g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        c = f * c + i * g;  h = o * tanh(c), with proj_size W_hr h

    layer(input, (h_0, c_0)=zeros, *, lengths=None, resets=None) -> output, (h_n, c_n)
        input [T, B, I] ([B, T, I] if batch_first, [T, I] unbatched, or a PackedSequence); output [T, B, D*H];
        states [L*D, B, H]; lengths: integers [B], steps of each row; resets: bools [T, B], true where a row starts anew

    num_layers: layers above each other. bias: with b_ih and b_hh. dropout: between layers, in training.
    memory: what training keeps on the kernels, "full" or "lean" (less, and a product more backward); None: as
    `rnn_gpu.memory` says at each call. Types: float32, float16, bfloat16 on the kernels, others on PyTorch's.

    heads: blocks along the diagonal of the recurrent weights: weight_hh_l0 is [G*H, H/heads].
    weight_dropout, recurrent_dropout: probability of a recurrent weight, or of a unit's h before the recurrent product,
    being zeroed, in training. zoneout: probability of a unit keeping its h, and its c, in a step; or (p_c, p_h). clip:
    at every step of the backward the gradient of h is brought within -clip..clip. return_cells: c of every step is a
    third result, [T, B, D*H] of the last layer. docs/training.md has all of them.

    More than torch.nn: lengths, resets, memory, derivatives of any order, torch.compile(fullgraph=True). Not as in
    torch.nn: isinstance(layer, torch.nn.LSTM) is False (`rnn_gpu.replace_rnns`); see docs/limits.md.

    >>> layer = LSTM(10, 20, num_layers=2)
    >>> output, (h_n, c_n) = layer(torch.randn(5, 3, 10), lengths=[5, 2, 4])
    >>> output.shape, h_n.shape
    (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    _torch_class = torch.nn.LSTM
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args
    permute_hidden = torch.nn.LSTM.permute_hidden

    @showing(LSTMOptions)
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[LSTMOptions],
    ) -> None:
        """Arguments and initialisation as torch.nn.LSTM; options: see the class."""
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size
        self._build("LSTM", sizes, device, dtype, options)


@named
class GRU(_Layer[Tensor]):
    """Gated recurrent unit: torch.nn.GRU by another name, with the time loop in one persistent GPU kernel.

    Same arguments, parameters, state dict, results and errors. T steps, B rows, I = input_size, H = hidden_size,
    L = num_layers, D = 2 if bidirectional else 1.

        r, z = sigmoid(W_ir x + b_ir + W_hr h + b_hr), ...; n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
        h = (1 - z) * n + z * h

    layer(input, h_0=zeros, *, lengths=None, resets=None) -> output, h_n
        input [T, B, I] ([B, T, I] if batch_first, [T, I] unbatched, or a PackedSequence); output [T, B, D*H];
        states [L*D, B, H]; lengths: integers [B], steps of each row; resets: bools [T, B], true where a row starts anew

    num_layers: layers above each other. bias: with b_ih and b_hh. dropout: between layers, in training.
    memory: what training keeps on the kernels, "full" or "lean" (less, and a product more backward); None: as
    `rnn_gpu.memory` says at each call. Types: float32, float16, bfloat16 on the kernels, others on PyTorch's.

    heads: blocks along the diagonal of the recurrent weights: weight_hh_l0 is [G*H, H/heads].
    weight_dropout, recurrent_dropout: probability of a recurrent weight, or of a unit's h before the recurrent product,
    being zeroed, in training. zoneout: probability of a unit keeping its h in a step. clip: at every step of the
    backward the gradient of h is brought within -clip..clip. docs/training.md has all of them.

    More than torch.nn: lengths, resets, memory, derivatives of any order, torch.compile(fullgraph=True). Not as in
    torch.nn: isinstance(layer, torch.nn.GRU) is False (`rnn_gpu.replace_rnns`); see docs/limits.md.

    >>> layer = GRU(10, 20)
    >>> output, h_n = layer(torch.randn(5, 3, 10), lengths=[5, 2, 4])
    >>> output.shape, h_n.shape
    (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """

    _torch_class = torch.nn.GRU

    @showing(Options)
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        """Arguments and initialisation as torch.nn.GRU; options: see the class."""
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        self._build("GRU", sizes, device, dtype, options)


@named
class RNN(_Layer[Tensor]):
    """Elman network: torch.nn.RNN by another name, with the time loop in one persistent GPU kernel.

    Same arguments, parameters, state dict, results and errors. T steps, B rows, I = input_size, H = hidden_size,
    L = num_layers, D = 2 if bidirectional else 1.

        h = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu with nonlinearity="relu"

    layer(input, h_0=zeros, *, lengths=None, resets=None) -> output, h_n
        input [T, B, I] ([B, T, I] if batch_first, [T, I] unbatched, or a PackedSequence); output [T, B, D*H];
        states [L*D, B, H]; lengths: integers [B], steps of each row; resets: bools [T, B], true where a row starts anew

    num_layers: layers above each other. bias: with b_ih and b_hh. dropout: between layers, in training.
    memory: without effect here, since the outputs are all that the backward needs. Types: float32, float16, bfloat16
    on the kernels, others on PyTorch's.

    heads: blocks along the diagonal of the recurrent weights: weight_hh_l0 is [G*H, H/heads].
    weight_dropout, recurrent_dropout: probability of a recurrent weight, or of a unit's h before the recurrent product,
    being zeroed, in training. zoneout: probability of a unit keeping its h in a step. clip: at every step of the
    backward the gradient of h is brought within -clip..clip. docs/training.md has all of them.

    More than torch.nn: lengths, resets, derivatives of any order, torch.compile(fullgraph=True). Not as in torch.nn:
    isinstance(layer, torch.nn.RNN) is False (`rnn_gpu.replace_rnns`); see docs/limits.md.

    >>> layer = RNN(10, 20, nonlinearity="relu")
    >>> output, h_n = layer(torch.randn(5, 3, 10), lengths=[5, 2, 4])
    >>> output.shape, h_n.shape
    (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """

    _torch_class = torch.nn.RNN

    @showing(Options)
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        """Arguments and initialisation as torch.nn.RNN; options: see the class."""
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        self._build(f"RNN_{nonlinearity.upper()}", sizes, device, dtype, options)
