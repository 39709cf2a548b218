"""The memory of the kernels: how it is made and given back as tensors, and how tensors are taken, or copied into it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def part_of(buffer: Tensor, dtype: torch.dtype, begin: int, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Elements of a buffer, from number `begin` on, as a tensor of its own: autograd then treats it as a result, which
    users may change in place, and not as a view.
    """
    words = buffer if buffer.dtype == dtype else buffer.view(dtype)
    return words.as_strided(size, stride, words.storage_offset() + begin).data


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, on a 16-byte boundary: for another address Triton compiles narrower loads in another layout."""
    tensor = tensor.contiguous().resolve_neg()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def dense(tensor: Tensor | None) -> Tensor | None:
    """Contiguous, with the values that it shows (`imag` of a conjugate is a view of the opposite ones)."""
    return None if tensor is None else tensor.contiguous().resolve_neg()


def all_dense(tensors: Sequence[Tensor] | None) -> list[Tensor] | None:
    """Each contiguous: a bias may be a column, or one number for all units."""
    return None if tensors is None else [dense(tensor) for tensor in tensors]


def lies_within(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Whether a tensor lies as the first elements of each dimension of a contiguous one of this shape do."""
    apart = 1
    for size, stride, room in zip(reversed(tensor.shape), reversed(tensor.stride()), reversed(shape), strict=True):
        if size > 1 and stride != apart:  # of a dimension of one, the stride says nothing
            return tensor.numel() == 0
        apart *= room
    return True


def within(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor that `lies_within` this shape, on a 16-byte boundary: as a kernel has left it; or a copy, in zeros."""
    if lies_within(tensor, shape) and tensor.data_ptr() % 16 == 0:
        return tensor
    copy = tensor.new_zeros(shape)[tuple(map(slice, tensor.shape))]
    return copy.copy_(tensor)
