"""Backwards that are asked for many gradients at once, by `torch.autograd.grad(is_grads_batched=True)` and
`jacobian(vectorize=True)`.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

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
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    shown = [torch._remove_batch_dim(d, level, 1, 0) if in_a_batch((d,)) else None for d in d_outputs]
    count = next(len(one) for one in shown if one is not None)
    pairs = list(zip(d_outputs, shown, strict=True))
    found = [run(*(d if one is None else one[i] for d, one in pairs)) for i in range(count)]
    hidden = lambda parts: None if parts[0] is None else torch._add_batch_dim(torch.stack(parts), 0, level)
    return tuple(map(hidden, zip(*found, strict=True)))
