"""A call that is like one before: what that one decided is found again by one look-up.

Before a launch there is much to decide and to check: backend, route, plans, sizes, types, devices. In an eager call of
few steps that takes longer than the steps. A layer therefore keeps, by all that the decisions depend on, how its plain
calls went: dense input, no masks, no options beyond torch.nn's, on the kernels, called directly. What another call may
find changed since is asked anew: settings, modes of PyTorch, and the weights themselves.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules.rnn import RNNBase

from . import backends, measured
from .call import Call
from .functional import recurrent_stack
from .kernels.rows import Rows

MOST = 256  # calls that a layer remembers: of as many batch sizes


class Ready(NamedTuple):
    """How a call goes. shapes: of the weights, in torch.nn's order. dropout: between layers. least_time: T from which
    on it goes this way.
    """

    call: Call
    shapes: tuple[torch.Size, ...]
    dropout: float
    least_time: int


def nobody_looks_on() -> bool:
    """Whether an eager call is a plain one: nobody compiles, transforms, traces, casts or differentiates forwards."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and not torch._C._is_any_autocast_enabled()
        and forward_ad._current_level < 0
    )


def _key(input: Tensor, batch: int, needs: bool) -> Hashable:
    """All that decides beside the layer itself, its weights and T."""
    dtype = input.dtype
    exact = backends.precision_of("float32") if dtype == torch.float32 else None
    return batch, input.shape[-1], dtype, input.device, needs, torch.is_grad_enabled(), exact, backends.in_force()


def remember(layer: Any, input: Tensor, rows: Rows, weights: list[Tensor], call: Call, dropout: float) -> None:
    """Keep how a call went, if it was one that `again` knows. input: [R, I]."""
    if call.route != "direct" or call.beyond_aten or call.projected or call.heads > 1 or call.watch is not None:
        return
    if any(mask is not None for mask in rows[2:]) or rows.batch == 0 or not nobody_looks_on():
        return
    if layer._torch_class is None:  # a cell of its own, with other states and parameters
        return
    # A sub-class may want to look at every call.
    checks = RNNBase.check_input, layer._torch_class.check_forward_args
    if weights is not layer._flat_weights or checks != (type(layer).check_input, type(layer).check_forward_args):
        return
    known: dict[Hashable, Ready] = layer.__dict__.setdefault("_ready", {})
    if len(known) >= MOST:
        known.clear()
    key = _key(input, rows.batch, call.saving != "nothing")
    least_time = 1
    if backends.current_backend() == "auto":
        least_time = backends.choose(layer, input, rows.batch, input.dtype).least_time
    known[key] = Ready(call, tuple(weight.shape for weight in weights), dropout, least_time)


def again(layer: Any, input: Any, hx: Any) -> Any:
    """The results of a call that is like one before; or None, and nothing is known of it."""
    if type(input) is not Tensor or layer._watch is not None or measured.automatic or not nobody_looks_on():
        return None
    shape, weights, own = input.shape, layer._flat_weights, layer._parameters
    if len(shape) != 3:
        return None
    time, batch = (shape[1], shape[0]) if layer.batch_first else shape[:2]
    dtype, device = input.dtype, input.device
    states: tuple[Tensor, ...] = ()
    if hx is not None:
        states = hx if layer._states > 1 else (hx,)
        size = layer.num_layers * (2 if layer.bidirectional else 1), batch, layer.hidden_size
        if type(states) is not tuple or len(states) != layer._states:
            return None
        for one in states:
            if type(one) is not Tensor or one.shape != size or one.dtype != dtype or one.device != device:
                return None
    needs = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in (input, *states, *weights)])
    ready = layer._ready.get(_key(input, batch, needs))
    if ready is None or time < ready.least_time:
        return None
    for name, weight, size in zip(layer._flat_weights_names, weights, ready.shapes, strict=True):
        if own.get(name) is not weight or type(weight) is not torch.nn.Parameter or weight.shape != size:
            return None
        if weight.dtype != dtype or weight.device != device:
            return None
    h0, c0 = states if len(states) > 1 else (*states, None) if states else (None, None)
    input = (input.transpose(0, 1) if layer.batch_first else input).flatten(0, 1)
    output, h_n, c_n, _ = recurrent_stack(ready.call, Rows(time, batch), input, h0, c0, weights, ready.dropout)
    output = output.view(time, batch, -1)
    return output.transpose(0, 1) if layer.batch_first else output, h_n if c_n is None else (h_n, c_n)
