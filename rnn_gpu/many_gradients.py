"""Backwards that are asked for more than a gradient: for many at once, by `is_grads_batched` and `vectorize` of
torch.autograd, or of an eager call by vmap; or for a derivative, where what they are given has tangents.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

CLIPPED = "rnn_gpu: gradients of a layer with clip= are no function's gradients, and have no derivative of their own"

MOST_LEVELS = 64  # as PyTorch has them
_stands_for_many = torch._C._functorch.is_legacy_batchedtensor


def in_a_batch(gradients: Iterable[Tensor | None]) -> bool:
    """Whether one of them stands for many gradients."""
    return any(one is not None and _stands_for_many(one) for one in gradients)


def for_each_gradient(run: Callable[..., tuple[Tensor | None, ...]], d_outputs: tuple) -> tuple[Tensor | None, ...]:
    """run(*d_outputs), a backward; where these stand for many gradients, once for each.

    Those are tensors that hide a dimension, and that few operations know.
    """
    if torch.compiler.is_compiling() or not in_a_batch(d_outputs):
        return run(*d_outputs)
    level = _level(next(d for d in d_outputs if d is not None and _stands_for_many(d)))
    shown = [torch._remove_batch_dim(d, level, 1, 0) if in_a_batch((d,)) else None for d in d_outputs]
    count = next(len(one) for one in shown if one is not None)
    pairs = list(zip(d_outputs, shown, strict=True))
    found = [run(*(d if one is None else one[i] for d, one in pairs)) for i in range(count)]
    hidden = lambda parts: None if parts[0] is None else torch._add_batch_dim(torch.stack(parts), 0, level)
    return tuple(map(hidden, zip(*found, strict=True)))


def _level(gradient: Tensor) -> int:
    """The innermost level at which a gradient stands for many. PyTorch keeps the one in force for each thread, and on a
    GPU backwards run in the engine's own: so by the tensor, which at any other level is as large as is asked for.
    """
    size = lambda level, asked: torch._remove_batch_dim(gradient, level, asked, 0).shape[0]
    return next(level for level in range(MOST_LEVELS - 1, 0, -1) if size(level, 1) == size(level, 2))


def transformed() -> bool:
    """Whether gradients may be mapped by vmap, or have tangents: no launcher sees that, and would leave them out."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


class Linear(torch.autograd.Function):
    """(run, clip, *d_outputs) -> run(*d_outputs), a backward by the launchers, for vmap and forward mode: linear in the
    gradients, but where it clips them.
    """

    @staticmethod
    def forward(run, clip, *d_outputs):
        """Under no transform."""
        return run(*d_outputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep what runs."""
        ctx.run, ctx.clip = inputs[:2]
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(info, in_dims, run, clip, *d_outputs):
        """One after another."""
        pairs = list(zip(d_outputs, in_dims[2:], strict=True))
        if info.batch_size == 0:  # as one of zeros, whose results are left out
            none = (d if dim is None else torch.zeros_like(d.sum(dim)) for d, dim in pairs)
            found = Linear.apply(run, clip, *none)
            return tuple(None if one is None else one.unsqueeze(0)[:0] for one in found), (0,) * len(found)
        of = lambda i: (d if dim is None else d.select(dim, i) for d, dim in pairs)
        found = [Linear.apply(run, clip, *of(i)) for i in range(info.batch_size)]
        found = [None if parts[0] is None else torch.stack(parts) for parts in zip(*found, strict=True)]
        return tuple(found), tuple(None if one is None else 0 for one in found)

    @staticmethod
    def jvp(ctx, _run, _clip, *tangents):
        """The same of the tangents."""
        if ctx.clip is not None:
            raise RuntimeError(CLIPPED)
        return Linear.apply(ctx.run, ctx.clip, *tangents)  # which may have tangents of their own
