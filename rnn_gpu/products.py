"""Products of float32 in full, where PyTorch's switches round the operands of products to tf32."""

import torch
from torch import Tensor

from .many_gradients import for_each_gradient


def in_tf32(device: str) -> bool:
    """Whether PyTorch multiplies float32 matrices in tf32 on this kind of device."""
    return device == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"


@torch.compiler.allow_in_graph  # as one: a compiler that looks into it would differentiate its parts
def full_product(a: Tensor, b: Tensor) -> Tensor:
    """a [..., M, K] @ b [..., K, N] with errors of float32, as are those of its gradients: for small products, in tf32
    one of three times the K. Not for forward-mode differentiation.

    A float32 is the sum of what tf32 can hold of it, its first 11 bits, and of the rest, of which tf32 holds all that
    matters: a b = a1 b1 + a1 b2 + a2 b1, but for 2^-22 of it. An infinity may come out as NaN.
    """
    if a.dtype != torch.float32 or not in_tf32(a.device.type):
        return a @ b
    return FullProduct.apply(a, b)


class FullProduct(torch.autograd.Function):
    """See `full_product`."""

    @staticmethod
    def forward(a, b):
        """Three products as one."""
        (a1, a2), (b1, b2) = _in_two(a), _in_two(b)
        return torch.cat([a1, a1, a2], -1) @ torch.cat([b1, b2, b1], -2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Save both."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d_product):
        """The gradients that are needed."""
        (a, b), (by_a, by_b) = ctx.saved_tensors, ctx.needs_input_grad
        run = lambda d: (full_product(d, b.mT) if by_a else None, full_product(a.mT, d) if by_b else None)
        return for_each_gradient(run, (d_product,))

    @staticmethod
    def vmap(info, in_dims, *operands):
        """The mapped dimension first: PyTorch 2.11 cannot map a view in another type."""
        size = info.batch_size
        pairs = zip(operands, in_dims, strict=True)
        a, b = (t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in pairs)
        return full_product(a, b), 0


def _in_two(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as a sum: its first 11 bits, and the rest."""
    first = (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
    return first, x - first
