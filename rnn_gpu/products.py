"""Products of float32 in full, where PyTorch's switches round the operands of products to tf32."""

import torch
from torch import Tensor


@torch.compiler.assume_constant_result
def in_tf32(device: str) -> bool:
    """Whether PyTorch multiplies float32 matrices in tf32 on this kind of device."""
    return device == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"


def full_product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] with errors of float32, for small products: in tf32 it is one of three times the K.

    A float32 is the sum of what tf32 can hold of it, its first 11 bits, and of the rest, of which tf32 holds all that
    matters: a b = a1 b1 + a1 b2 + a2 b1, but for 2^-22 of it. An infinity may come out as NaN.
    """
    if a.dtype != torch.float32 or not in_tf32(a.device.type):
        return a @ b
    (a1, a2), (b1, b2) = _in_two(a), _in_two(b)
    return torch.cat([a1, a1, a2], 1) @ torch.cat([b1, b2, b1])


def _in_two(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as a sum: its first 11 bits, and the rest."""
    first = (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
    return first, x - first
