"""The gradient on its way back through time: how much of a loss reaches the hidden state of every step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from . import distributed
from .base import _Layer
from .convert import OURS, class_after


@dataclass(frozen=True)
class GradientFlow:
    """What `gradient_flow` found, for L layers, D directions, T steps and B rows, in float32 at least.

    norms: [L, D, T], the norm of the loss's gradient by h_t, over all rows and units.
    rows: [L, D, T, B], the same of each row, over its units: norms is the root of the sum of their squares.
    """

    norms: Tensor
    rows: Tensor

    def plot(self, ax: Any = None) -> Any:
        """Draw the norms over the steps, one line for each layer and direction, the norm on a logarithmic axis.

        ax: matplotlib axes to draw into; None: those of a new pyplot figure. -> the axes. ImportError where matplotlib
        is not installed. A norm of zero, beyond what a float can hold or behind a reset, leaves a gap.
        """
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError:
                raise ImportError("GradientFlow.plot needs matplotlib: pip install matplotlib") from None
            ax = pyplot.figure(layout="constrained").subplots()
        layers, directions, steps = self.norms.shape
        for layer, of_layer in enumerate(self.norms.cpu().double()):
            for way, norms in zip(("", " backwards"), of_layer, strict=False):
                style = "--" if way else "-"
                ax.plot(range(steps), norms.numpy(), style, color=f"C{layer}", label=f"layer {layer}{way}")
        ax.set_yscale("log", nonpositive="mask")
        ax.set(xlabel="step", ylabel="norm of the gradient by h")
        if layers * directions > 1:
            ax.legend()
        return ax


def gradient_flow(
    layer: RNNBase,
    input: Tensor | PackedSequence,
    hx: Any = None,
    *,
    loss: Callable[..., Tensor] | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    resets: Tensor | None = None,
) -> GradientFlow:
    """How large the gradient of a loss is at the hidden state of every step: where it vanishes, and where it explodes.

    layer: an LSTM, GRU or RNN, of this library or of torch.nn. input, hx, lengths, resets: as the layer takes them.
    loss: a function of output and final states, loss(output, h_n), for the LSTM loss(output, (h_n, c_n)), that gives
    one number; it may hold the rest of a model. None: the sum of the last layer's final states, which depend on the
    last step of each row and direction alone, so that the norms show how far back it still remembers.

    The gradient at step t is the whole of it, dL/dh_t: of the output at t and through all later steps (reverse
    directions: earlier ones). Past a row's end it is zero. With proj_size h is the projected state.

    Computed by autograd through a plain loop over time, in the layer's dtype and whatever the backend, with dropout
    where the layer is in training; no parameter's `grad` changes. TypeError for other modules, RuntimeError for a loss
    that is not one number or does not depend on the layer; else the layer's own errors.

    >>> layer = torch.nn.RNN(3, 8)
    >>> flow = gradient_flow(layer, torch.randn(50, 4, 3))
    >>> flow.norms.shape, flow.rows.shape
    (torch.Size([1, 1, 50]), torch.Size([1, 1, 50, 4]))
    >>> bool(flow.norms[0, 0, 0] < flow.norms[0, 0, -1])  # PyTorch's initial weights forget
    True
    """
    cls = type(layer) if isinstance(layer, _Layer) else class_after(layer, OURS)
    if cls is None or not issubclass(cls, _Layer):
        raise TypeError(f"gradient_flow expects an LSTM, GRU or RNN layer, got: {type(layer).__name__}")
    if distributed.is_dtensor(input):
        raise TypeError("gradient_flow expects plain tensors, got a DTensor")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss should be a function of output and final states, got: {type(loss).__name__}")
    states: list[tuple[int, Tensor]] = []

    def watch(t: int, h: Tensor) -> Tensor:
        states.append((t, h if h.requires_grad else h.requires_grad_()))
        return h

    watched: Any = object.__new__(cls)
    watched.__dict__ = layer.__dict__ | {"_watch": watch}
    masks = {name: mask for name, mask in (("lengths", lengths), ("resets", resets)) if mask is not None}
    with torch.inference_mode(False), torch.enable_grad():
        masks = {name: _ordinary(mask) for name, mask in masks.items()}
        results = watched(_ordinary(input), _ordinary(hx), **masks)
        if loss is None:
            h_n = results[1][0] if isinstance(results[1], tuple) else results[1]
            value = h_n[-2 if layer.bidirectional else -1 :].sum()
        else:
            value = loss(*results[:2])
        _check_loss(value)
        found = torch.autograd.grad(value, [h for _, h in states], allow_unused=True)
    sets = layer.num_layers * (2 if layer.bidirectional else 1)
    steps = len(states) // sets
    wide = torch.promote_types(states[0][1].dtype, torch.float32)
    rows = torch.zeros(sets, steps, states[0][1].shape[0], dtype=wide, device=states[0][1].device)
    for i, ((t, _), gradient) in enumerate(zip(states, found, strict=True)):
        if gradient is not None:
            rows[i // steps, t] = torch.linalg.vector_norm(gradient, dim=1, dtype=wide)
    rows = rows.view(layer.num_layers, sets // layer.num_layers, steps, -1)
    if isinstance(input, PackedSequence) and input.unsorted_indices is not None:
        rows = rows[..., input.unsorted_indices]
    return GradientFlow(torch.linalg.vector_norm(rows, dim=-1), rows)


def _ordinary(given: Any) -> Any:
    """The same tensors, those made under inference_mode as copies that autograd takes."""
    if isinstance(given, PackedSequence):
        return PackedSequence(*map(_ordinary, given))
    if isinstance(given, tuple | list):
        return tuple(map(_ordinary, given))
    return given.clone() if isinstance(given, Tensor) and given.is_inference() else given


def _check_loss(value: object) -> None:
    """RuntimeError for a loss that has no gradient by the states."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise RuntimeError(f"Expected loss to give one number, got {got}")
    if not value.requires_grad:
        raise RuntimeError("Expected a loss that depends on what the layer returned")
