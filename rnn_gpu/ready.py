"""A call that is like one before: what that one decided is found again by one look-up.

Before a launch there is much to decide and to check: backend, route, plans, sizes, types, devices. In an eager call of
few steps that takes longer than the steps. A layer therefore keeps, by all that the decisions depend on, how its plain
calls went: dense input, no masks, on the kernels, called directly. All of that is asked anew at every call: the layer's
options, the settings in force, the modes of PyTorch, sizes, types and devices of the tensors, and the weights.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, measured
from .call import Call, nobody_looks_on
from .functional import recurrent_stack
from .kernels.rows import Rows

MOST = 256  # calls that a layer remembers: of as many batch sizes
# What of a layer a call depends on, beside its weights. Asked of the layer, and not noted where it is set: a class may
# have them as properties, and torch.compile sets them without a word.
options_of = operator.attrgetter(
    "mode", "training", "input_size", "hidden_size", "proj_size", "num_layers", "bias", "bidirectional",
    "dropout", "memory", "clip", "return_cells", "zoneout", "recurrent_dropout", "weight_dropout", "_watch",
)  # fmt: skip
facts_of = operator.attrgetter("shape", "dtype", "device")
PARAMETERS = {torch.nn.Parameter}
CHECKS = frozenset(  # torch.nn's
    ("check_input", "check_forward_args", "check_hidden_size", "get_expected_hidden_size", "get_expected_cell_size")
)


class Key(NamedTuple):
    """All that decides how a call goes beside T, the weights' sizes and that they are the layer's own. needs: whether
    there is a backward.
    """

    batch: int
    features: int
    dtype: torch.dtype
    device: torch.device
    needs: bool
    options: tuple[Any, ...]
    settings: tuple[Any, ...]


class Ready(NamedTuple):
    """How a call goes. facts: of the weights, in torch.nn's order. dropout: between layers. least_time: T from which
    on it goes this way.
    """

    call: Call
    facts: tuple[tuple[Any, ...], ...]
    dropout: float
    least_time: int


def _settings(dtype: torch.dtype) -> tuple[Any, ...]:
    exact = backends.precision_of("float32") if dtype == torch.float32 else None
    return torch.is_grad_enabled(), exact, backends.in_force()


def key_of(layer: Any, input: Any, hx: Any) -> Key | None:
    """The key of a call, or None for one that is not remembered: no plain tensors, states that torch.nn would refuse,
    somebody who looks on, a layer with checks of its own.
    """
    if type(input) is not Tensor or measured.automatic or not nobody_looks_on():
        return None
    shape, dtype, device = input.shape, input.dtype, input.device
    if len(shape) != 3 or 0 in shape or not CHECKS.isdisjoint(layer.__dict__):
        return None
    batch = shape[0] if layer.batch_first else shape[1]
    states: Sequence[Any] = ()
    if hx is not None:
        states = hx if layer._states > 1 else (hx,)
        size = layer.num_layers * (2 if layer.bidirectional else 1), batch, layer.hidden_size
        if type(states) is not tuple or len(states) != layer._states:
            return None
        for one in states:
            if type(one) is not Tensor or one.shape != size or one.dtype != dtype or one.device != device:
                return None
    tensors = input, *states, *layer._flat_weights
    needs = torch.is_grad_enabled() and any([one is not None and one.requires_grad for one in tensors])
    return Key(batch, shape[2], dtype, device, needs, options_of(layer), _settings(dtype))


def remember(layer: Any, key: Key, weights: list[Tensor], call: Call, dropout: float) -> None:
    """Keep how the call of a key went, if it was one that `again` knows; and if nobody has changed meanwhile what it
    depends on.
    """
    if call.route != "direct" or call.beyond_aten or call.projected or call.heads > 1:
        return
    if key[-2:] != (options_of(layer), _settings(key.dtype)) or key.needs != (call.saving != "nothing"):
        return
    if layer._torch_class is None or weights is not layer._flat_weights:  # a cell with other states; dropped weights
        return
    if any(getattr(type(layer), name, None) is not getattr(layer._torch_class, name, None) for name in CHECKS):
        return  # a sub-class may want to look at every call
    least_time = backends.choose(layer, weights[0], key.batch, key.dtype)
    if least_time is None:
        return
    known = layer.__dict__.setdefault("_known_calls", {})
    if len(known) >= MOST:
        known.clear()
    known[key] = Ready(call, tuple(map(facts_of, weights)), dropout, least_time)


def again(layer: Any, known: dict[Key, Ready], key: Key, input: Any, hx: Any) -> Any:
    """The results of a call that is like one of those known; or None: then it is looked at as if there were none."""
    ready = known.get(key)
    if ready is None:
        return None
    time, batch = (input.shape[1], key.batch) if layer.batch_first else (input.shape[0], key.batch)
    if time < ready.least_time:
        return None
    weights, names = layer._flat_weights, layer._flat_weights_names
    # Loops in C: asked weight by weight in Python, this takes as long as a step.
    if len(weights) != len(names) or not all(map(operator.is_, map(layer._parameters.get, names), weights)):
        return None
    if not PARAMETERS.issuperset(map(type, weights)) or tuple(map(facts_of, weights)) != ready.facts:
        return None
    h0, c0 = (None, None) if hx is None else hx if layer._states > 1 else (hx, None)
    input = (input.transpose(0, 1) if layer.batch_first else input).flatten(0, 1)
    output, h_n, c_n, _ = recurrent_stack(ready.call, Rows(time, batch), input, h0, c0, weights, ready.dropout)
    output = output.view(time, batch, -1)
    return output.transpose(0, 1) if layer.batch_first else output, h_n if c_n is None else (h_n, c_n)
