"""DTensor input: every process runs the layer on its part of the batch, on whichever backend.

The rows of a batch do not meet in a recurrent layer, so no operator has to know of DTensors. Weights are gathered
whole before the layer, and their gradients summed after it, by DTensor's own redistribution. (A sharding registered
for the operators could not do as much: they see the rows of all steps one after another, and those of a part of the
batch are no contiguous part of them.)
"""

import sys

import torch
from torch import Tensor

from . import versions


def is_dtensor(value) -> bool:
    """Whether it is a DTensor. Does not import torch.distributed.tensor, which takes half a second: where nobody has,
    there is none.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


# Whether the gradient of `DTensor.to_local` is laid out by a guess (seen in PyTorch 2.11, no more in 2.13).
GUESSES_STRIDES = versions.minor(torch.__version__) < (2, 13)


class _OwnRows(torch.autograd.Function):
    """`DTensor.to_local` for parts that need not be of one size: with strides guessed from a part's, a gradient
    seems to have another layout than its tensor, and is accumulated wrong.
    """

    @staticmethod
    def forward(ctx, tensor):
        ctx.whole = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()
        local = tensor.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx, gradient):
        mesh, placements, shape, stride = ctx.whole
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(gradient.contiguous(), mesh, placements, shape=shape, stride=stride)


def _own_rows(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process has."""
    return _OwnRows.apply(tensor) if GUESSES_STRIDES else tensor.to_local()


def _placed(what: str, tensor: Tensor, mesh, placements) -> Tensor:
    """The DTensor brought to these placements; its gradient comes back placed as it is. RuntimeError where it is no
    DTensor on this mesh.
    """
    if not is_dtensor(tensor):
        raise RuntimeError(
            f"input is a DTensor and {what} is not: distribute it too (torch.distributed.tensor.distribute_module "
            "for a layer, distribute_tensor for a tensor)"
        )
    if tensor.device_mesh != mesh:
        raise RuntimeError(f"input is on {mesh} and {what} on {tensor.device_mesh}")
    return tensor.redistribute(placements=placements)


def forward(layer, input: Tensor, hx, lengths: Tensor | None, resets: Tensor | None):
    """`layer(input, hx, lengths=lengths, resets=resets)` where all of them are DTensors on one mesh.

    Where the input is sharded over its batch, a process runs the layer on its own rows; an input placed in any other
    way is gathered first, and so are the weights. States, lengths and resets are brought to the rows of the input.
    -> output and final states, DTensors sharded over the batch where the input is, else replicated.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, batched, batch_dim = input.device_mesh, input.dim() == 3, 0 if layer.batch_first else 1
    split = [batched and placement == Shard(batch_dim) for placement in input.placements]

    def by_rows(dim: int) -> list:
        return [Shard(dim) if one else Replicate() for one in split]

    def own_rows(what: str, tensor: Tensor | None, dim: int) -> Tensor | None:
        return None if tensor is None else _own_rows(_placed(what, tensor, mesh, by_rows(dim)))

    def all_rows(tensor: Tensor, dim: int) -> Tensor:
        tensor, shape = tensor.contiguous(), list(tensor.shape)
        if batched:
            shape[dim] = input.shape[batch_dim]
        like = torch.empty(shape, device="meta")  # told, because parts need not be of one size
        return DTensor.from_local(tensor, mesh, by_rows(dim), shape=like.shape, stride=like.stride())

    # a process has what its own rows add to a weight's gradient
    added = [Partial() if one else Replicate() for one in split]
    weights = [
        _placed(name, weight, mesh, [Replicate()] * mesh.ndim).to_local(grad_placements=added)
        for name, weight in [(name, getattr(layer, name)) for name in layer._flat_weights_names]
    ]
    one_state = hx is None or isinstance(hx, Tensor)
    states = [own_rows("hx", state, 1) for state in ([hx] if one_state else hx)]
    output, final, *cells = type(layer).forward(
        layer.with_weights(weights),
        own_rows("input", input, batch_dim),
        states[0] if one_state else tuple(states),
        lengths=own_rows("lengths", lengths, 0),
        resets=own_rows("resets", resets, batch_dim),
    )
    final = all_rows(final, 1) if isinstance(final, Tensor) else tuple(all_rows(state, 1) for state in final)
    return all_rows(output, batch_dim), final, *(all_rows(one, batch_dim) for one in cells)
