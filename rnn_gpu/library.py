"""Operators that PyTorch calls with no Python of its own in between: `torch.library.custom_op` wraps a body in checks
and in autograd that ours do not need, and which take longer than a step of a small layer.
"""

import functools
from collections.abc import Callable, Iterable

import torch
from torch.autograd import forward_ad

_library = torch.library.Library("rnn_gpu", "FRAGMENT")
BODIES: dict[torch._ops.OpOverload, Callable] = {}  # of each, for who wants to see what is within


def operator(name: str, schema: str) -> Callable[[Callable], torch._ops.OpOverload]:
    """Make an operator of its body, for every device, which neither changes its arguments nor returns one of them, nor
    memory of theirs. PyTorch calls it where gradients are wanted, too: it is differentiable itself, or `no_derivative`.
    """

    def make(body: Callable) -> torch._ops.OpOverload:
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, body, "CompositeExplicitAutograd")
        made = getattr(torch.ops.rnn_gpu, name).default
        BODIES[made] = body
        return made

    return make


def operator_of(name: str) -> Callable[[Callable], torch._ops.OpOverload]:
    """`operator` with the schema that the types of the body's arguments say; integers may be symbols."""
    return lambda body: operator(name, torch.library.infer_schema(body, mutates_args=()))(body)


def fake(name: str) -> Callable[[Callable], Callable]:
    """Say what an operator's results look like."""
    return torch.library.register_fake(f"rnn_gpu::{name}", lib=_library)


def no_derivative(name: str, words: str) -> None:
    """Let a backward through an operator raise a RuntimeError: without this PyTorch leaves its gradients out."""

    def refuse(ctx, *gradients):
        raise RuntimeError(words)

    torch.library.register_autograd(f"rnn_gpu::{name}", refuse, lib=_library)


def without_tangents(body: Callable) -> Callable:
    """The same; NotImplementedError in forward mode, where kernels would leave the derivative out."""

    @functools.wraps(body)
    def run(*arguments):
        if forward_ad._current_level >= 0:
            for one in arguments:
                if isinstance(one, torch.Tensor) and forward_ad.unpack_dual(one).tangent is not None:
                    raise NotImplementedError(
                        "rnn_gpu: the kernels have no derivative in forward mode within a compiled graph: call the "
                        "layer without torch.compile (docs/limits.md)"
                    )
        return body(*arguments)

    return run


def autocasts(arguments: Iterable[object]) -> str | None:
    """The kind of device of the tensors among the arguments, where autocast is on for it; else None."""
    device = next((one.device.type for one in arguments if isinstance(one, torch.Tensor)), None)
    return device if device is not None and torch.is_autocast_enabled(device) else None


def without_autocast(body: Callable) -> Callable:
    """The same with autocast off: everything has its type already."""

    @functools.wraps(body)
    def run(*arguments):
        if torch._C._is_any_autocast_enabled() and (device := autocasts(arguments)):
            with torch.autocast(device, enabled=False):
                return body(*arguments)
        return body(*arguments)

    return run
