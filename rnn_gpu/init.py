"""Initial values that help recurrent layers to remember: of layers and cells, these and torch.nn's.

Each function changes parameters in place, of all layers and directions, and returns the module. generator: where random
numbers come from, on the device of the parameters; None: torch's own. TypeError for modules that a function is not for,
ValueError for modules without what it sets. Build and initialise, then move on (docs/moving.md).
"""

from collections.abc import Iterator
from numbers import Real
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils import parametrize

from .backends import heads_of

Module = TypeVar("Module", bound=torch.nn.Module)

__all__ = ["chrono_", "orthogonal_", "unit_forget_bias_"]


def __dir__() -> list[str]:
    """What is there for users."""
    return __all__


@torch.no_grad()
def orthogonal_(layer: Module, gain: float = 1.0, *, generator: torch.Generator | None = None) -> Module:
    """Make the recurrent weights orthogonal, gate by gate: each [H, H] of `weight_hh` a random orthogonal matrix times
    gain; of several heads each block [H/heads, H/heads].

    layer: an LSTM, GRU or RNN, or a cell. An orthogonal matrix keeps the length of what it is multiplied with, so that
    neither states nor gradients vanish or explode by it. One such matrix of all gates together, [G*H, H], would not do:
    its gates, multiplied alone, shrink. With proj_size each [H, P], and `weight_hr` [P, H], have orthonormal columns or
    rows. Source: Saxe, McClelland and Ganguli 2014, "Exact solutions to the nonlinear dynamics of learning in deep
    linear neural networks"; for recurrent layers Henaff, Szlam and LeCun 2016, "Recurrent orthogonal networks and
    long-memory tasks", and, with the identity for the matrix, Le, Jaitly and Hinton 2015.

    >>> weight = orthogonal_(torch.nn.GRU(3, 4)).weight_hh_l0[4:8]
    >>> torch.allclose(weight @ weight.T, torch.eye(4), atol=1e-5)
    True
    """
    _check(layer, "orthogonal_", RNNBase, RNNCellBase)
    if not isinstance(gain, Real):
        raise ValueError(f"gain should be a number, got: {gain!r}")
    for name in _names(layer, "weight_hh", "weight_hr"):
        old = _parameter(layer, name)
        units = _hidden_size(layer) // heads_of(layer)  # of a head
        blocks = old.chunk(1 if name.startswith("weight_hr") else old.shape[0] // units)
        new = [torch.empty_like(block, dtype=_exact(block.dtype)) for block in blocks]  # no QR in 16 bits
        for block in new:
            torch.nn.init.orthogonal_(block, gain, generator)
        _set(layer, name, torch.cat(new))
    return layer


@torch.no_grad()
def unit_forget_bias_(layer: Module) -> Module:
    """Make the forget gate's bias of an LSTM 1, so that it begins open and its cells remember.

    layer: an LSTM or an LSTMCell. The gate has two biases that are added: b_if becomes 1 and b_hf 0. Source: Gers,
    Schmidhuber and Cummins 2000, "Learning to forget"; Jozefowicz, Zaremba and Sutskever 2015, "An empirical
    exploration of recurrent network architectures".

    >>> layer = unit_forget_bias_(torch.nn.LSTM(3, 2))
    >>> (layer.bias_ih_l0 + layer.bias_hh_l0)[2:4].tolist()
    [1.0, 1.0]
    """
    if not _is_lstm(layer):
        raise TypeError(f"unit_forget_bias_ expects an LSTM or LSTMCell, got: {type(layer).__name__}")
    for names in _bias_names(layer, "unit_forget_bias_"):
        _set_gate(layer, names, 1, 1.0)
    return layer


@torch.no_grad()
def chrono_(
    layer: Module, longest: float, shortest: float = 1.0, *, generator: torch.Generator | None = None
) -> Module:
    """Chrono initialisation: let each unit begin with a memory of its own, up to `longest` steps.

    layer: an LSTM or GRU, or a cell of either. Draws u from the uniform distribution U(shortest, longest - 1) for each
    unit. LSTM: the forget gate's bias becomes log u and the input gate's -log u. GRU: the update gate's becomes log u
    (in torch.nn's convention z near 1 keeps the state). Other biases stay; of the two biases that are added, that of
    the input (b_ih) gets the value and that of the state (b_hh) 0. A gate with the bias log u is u / (1 + u): what it
    keeps fades with a time constant of 1 + u steps. longest: of the dependencies that are expected, in steps, 1 +
    shortest at least (ValueError). Source: Tallec and Ollivier 2018, "Can recurrent neural networks warp time?",
    where shortest is 1.

    >>> layer = chrono_(torch.nn.LSTM(3, 2), longest=1000)
    >>> forget, input = layer.bias_ih_l0[2:4], layer.bias_ih_l0[0:2]
    >>> torch.equal(forget, -input) and bool((forget >= 0).all() and (forget.exp() <= 1000).all())
    True
    """
    lstm = _is_lstm(layer)
    if not lstm and not _is_gru(layer):
        raise TypeError(f"chrono_ expects an LSTM, GRU, LSTMCell or GRUCell, got: {type(layer).__name__}")
    if not (isinstance(shortest, Real) and 0 < shortest < float("inf")):
        raise ValueError(f"shortest should be a positive number of steps, got: {shortest!r}")
    if not (isinstance(longest, Real) and shortest + 1 <= longest < float("inf")):
        least = f"at least shortest + 1 = {shortest + 1}"
        raise ValueError(f"longest should be a number of steps, {least}, got: {longest!r}")
    for names in _bias_names(layer, "chrono_"):
        of_unit = _parameter(layer, names[0])[: _hidden_size(layer)]
        u = torch.empty_like(of_unit, dtype=_exact(of_unit.dtype)).uniform_(shortest, longest - 1, generator=generator)
        _set_gate(layer, names, 1, u.log())  # f of i, f, g, o; z of r, z, n
        if lstm:
            _set_gate(layer, names, 0, -u.log())
    return layer


# What layers and cells have in common -----------------------------------------------------------------------------


def _check(layer: object, caller: str, *kinds: type) -> None:
    """TypeError for what is no recurrent module."""
    if not isinstance(layer, kinds):
        raise TypeError(f"{caller} expects an LSTM, GRU or RNN layer, or a cell, got: {type(layer).__name__}")


def _is_lstm(layer: object) -> bool:
    return isinstance(layer, torch.nn.LSTMCell) or (isinstance(layer, RNNBase) and layer.mode == "LSTM")


def _is_gru(layer: object) -> bool:
    return isinstance(layer, torch.nn.GRUCell) or (isinstance(layer, RNNBase) and layer.mode == "GRU")


def _names(layer: torch.nn.Module, *kinds: str) -> Iterator[str]:
    """The names of a layer's weights, or a cell's, of these kinds: "weight_hh", ..."""
    if isinstance(layer, RNNBase):
        names = [name for of_layer in layer._all_weights for name in of_layer]
    else:
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    return (name for name in names if name.startswith(kinds))


def _bias_names(layer: torch.nn.Module, caller: str) -> list[tuple[str, str]]:
    """The names of bias_ih and bias_hh, of each layer and direction. ValueError where there are none."""
    if not layer.bias:
        raise ValueError(f"{caller} sets biases, and this {type(layer).__name__} was made with bias=False")
    return list(zip(_names(layer, "bias_ih"), _names(layer, "bias_hh"), strict=True))


def _parameter(layer: torch.nn.Module, name: str) -> Tensor:
    """A parameter, or what a parametrization makes of its own. ValueError for what something else makes anew in each
    forward, such as torch.nn.utils.weight_norm.
    """
    if name not in layer._parameters and not parametrize.is_parametrized(layer, name):
        raise ValueError(f"{name} of this {type(layer).__name__} is no parameter: initialise before it is replaced")
    found: Tensor = getattr(layer, name)
    return found


def _set(layer: torch.nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter a value; a parametrization finds its own for it (its right_inverse)."""
    if parametrize.is_parametrized(layer, name):
        setattr(layer, name, value.to(_parameter(layer, name).dtype))
    else:
        _parameter(layer, name).copy_(value)


def _set_gate(layer: torch.nn.Module, names: tuple[str, str], gate: int, value: Tensor | float) -> None:
    """Make the sum of both biases of a gate `value`: that of the first name, and zero of the second."""
    size = _hidden_size(layer)
    for name, of_gate in zip(names, (value, 0.0), strict=True):
        bias = _parameter(layer, name).clone()
        bias[gate * size : (gate + 1) * size] = of_gate
        _set(layer, name, bias)


def _hidden_size(layer: torch.nn.Module) -> int:
    assert isinstance(layer, RNNBase | RNNCellBase)
    return layer.hidden_size


def _exact(dtype: torch.dtype) -> torch.dtype:
    """What random numbers are drawn and matrices are made in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
