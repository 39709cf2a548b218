"""LSTM, GRU and RNN: torch.nn's layers under their own names and rules, with the time loop in one persistent kernel.

They derive from torch.nn's own `RNNBase`, so parameters, names, initialisation, state dicts and repr are PyTorch's.
Not from `torch.nn.LSTM` itself: `torch.compile` breaks the graph at that. Each class names the torch.nn class whose
forward serves the "torch" backend.
"""

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from . import backends
from .functional import recurrent_stack


class _Layer(RNNBase):
    """What the three layers share: the choice of the backend, and torch.nn's checks in torch.nn's words."""

    def forward(self, input, hx=None):
        """As torch.nn: input [T, B, I], [B, T, I] if batch_first, [T, I] unbatched, or a PackedSequence; hx: initial
        states.

        -> output [T, B, D*H] (or as the input is laid out) and final states [L*D, B, H]. Errors are those of torch.nn.
        """
        packed = isinstance(input, PackedSequence)
        data = input.data if packed else input
        dtype = self._compute_dtype(data)
        batch_size = 1 if packed or data.dim() != 3 else data.size(0 if self.batch_first else 1)
        if backends.choose(self, data, batch_size, dtype, packed).name == "torch":
            return self.torch_class.forward(self, input, hx)
        return self._forward_kernels(input, hx, dtype)

    def _compute_dtype(self, input: Tensor) -> torch.dtype:
        device = input.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype

    def _forward_kernels(self, input: Tensor, hx, dtype: torch.dtype):
        self._update_flat_weights()
        name = self.torch_class.__name__
        if input.dim() not in (2, 3):
            tensor = " tensor" if name == "RNN" else ""
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D{tensor} instead")
        batched = input.dim() == 3
        if not batched:
            input = input.unsqueeze(0 if self.batch_first else 1)
        states = self._initial_states(input, hx, batched)
        self.check_forward_args(input, states if len(states) == 2 else states[0], None)
        input = input.transpose(0, 1) if self.batch_first else input
        if input.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        h0, c0 = (state.to(dtype) for state in states) if len(states) == 2 else (states[0].to(dtype), None)
        weights = [weight.to(dtype) for weight in self._flat_weights]
        self._check_devices(input, states)
        output, h_n, c_n = recurrent_stack(
            backends.CELL_OF_MODE[self.mode],
            input.to(dtype),
            h0,
            c0,
            weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
        )
        output = output.transpose(0, 1) if self.batch_first else output
        if not batched:
            output = output.squeeze(0 if self.batch_first else 1)
            h_n, c_n = h_n.squeeze(1), None if c_n is None else c_n.squeeze(1)
        return output, h_n if c_n is None else (h_n, c_n)

    def _initial_states(self, input: Tensor, hx, batched: bool) -> tuple[Tensor, ...]:
        """The initial states [L*D, B, H] as a tuple: zeros where the user gave none."""
        lstm = self.mode == "LSTM"
        if hx is None:
            zeros = input.new_zeros(self.get_expected_hidden_size(input, None))
            return (zeros, zeros) if lstm else (zeros,)
        states = tuple(hx) if lstm else (hx,)
        rank, kind = (3, "batched 3-D") if batched else (2, "unbatched 2-D")
        if any(state.dim() != rank for state in states):
            if lstm:
                got = ", ".join(f"{state.dim()}-D" for state in states)
                raise RuntimeError(f"For {kind} input, hx and cx should also be {rank}-D but got ({got}) tensors")
            raise RuntimeError(f"For {kind} input, hx should also be {rank}-D but got {hx.dim()}-D tensor")
        return states if batched else tuple(state.unsqueeze(1) for state in states)

    def _check_devices(self, input: Tensor, states: tuple[Tensor, ...]) -> None:
        for what, tensor in [("hidden", state) for state in states] + [("parameter", w) for w in self._flat_weights]:
            if tensor.device != input.device:
                raise RuntimeError(
                    f"Input and {what} tensors are not at the same device, found input tensor at {input.device} "
                    f"and {what} tensor at {tensor.device}"
                )


class LSTM(_Layer):
    """Long short-term memory: `torch.nn.LSTM`, same arguments, parameters, results and errors.

    LSTM(input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0, bidirectional=False,
    proj_size=0, device=None, dtype=None)

    >>> layer = LSTM(10, 20, num_layers=2)
    >>> output, (h_n, c_n) = layer(torch.randn(5, 3, 10))
    """

    torch_class = torch.nn.LSTM
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args
    permute_hidden = torch.nn.LSTM.permute_hidden

    def __init__(self, *args, **kwargs):
        super().__init__("LSTM", *args, **kwargs)


class GRU(_Layer):
    """Gated recurrent unit, reset after the product: `torch.nn.GRU`, same arguments, parameters, results and errors.

    GRU(input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0, bidirectional=False,
    device=None, dtype=None)

    >>> layer = GRU(10, 20)
    >>> output, h_n = layer(torch.randn(5, 3, 10))
    """

    torch_class = torch.nn.GRU

    def __init__(self, *args, **kwargs):
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)


class RNN(_Layer):
    """Elman network, tanh or relu: `torch.nn.RNN`, same arguments, parameters, results and errors.

    RNN(input_size, hidden_size, num_layers=1, nonlinearity="tanh", bias=True, batch_first=False, dropout=0.0,
    bidirectional=False, device=None, dtype=None)

    >>> layer = RNN(10, 20, nonlinearity="relu")
    >>> output, h_n = layer(torch.randn(5, 3, 10))
    """

    torch_class = torch.nn.RNN

    def __init__(self, *args, **kwargs):
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            self.nonlinearity, args = args[3], (*args[:3], *args[4:])
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)
