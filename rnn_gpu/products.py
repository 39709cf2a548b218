"""The large products before and after the recurrence, as the tensor cores like them; and products of float32 in full,
where PyTorch's switches round the operands of products to tf32.

R rows of all steps, I input features, G gates or slots, H hidden units.
"""

import math

import torch
from torch import Tensor

from . import backends
from .kernels.buffers import lies_within
from .kernels.spec import padded
from .many_gradients import for_each_gradient

# cuBLAS's fast kernels want rows that begin at multiples of 16 bytes: the likely reason why an LSTM with I = H = 650 in
# bfloat16, 65,536 rows, took an H200 6 to 7 ms more than between 512 and 768 units, with two generations of kernels
# alike. By their bytes, copies with wider rows take a twentieth of that. Multiply-adds from which on they are made: an
# estimate, that they save some ten times what two more launches take. None of it has been timed.
WORTH = 1 << 31


def _wide(size: int, dtype: torch.dtype) -> int:
    """Columns of rows that begin at multiples of 16 bytes."""
    return padded(size, backends.name_of(dtype))


def beside_zeros(matrix: Tensor, width: int) -> Tensor:
    """[..., size] with zeros up to `width` columns; as it is where it has them."""
    missing = width - matrix.shape[-1]
    return torch.nn.functional.pad(matrix, (0, missing)) if missing else matrix


def is_large(values: int, size: int) -> bool:
    """Whether the product of a matrix of so many values with one of `size` columns is worth a copy."""
    return values * size >= WORTH


def to_multiply(x: Tensor, size: int) -> Tensor:
    """x [R, I], with zeros beside it where a product with [I, size] is large and its rows begin anywhere."""
    return beside_zeros(x, _wide(x.shape[1], x.dtype)) if is_large(x.numel(), size) else x


def input_product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x [R, I] @ weight.T + bias [G*H]; out: where to write it, or a new tensor."""
    if is_large(x.numel(), weight.shape[0]):
        x = to_multiply(x, weight.shape[0])
    if weight.shape[1] != x.shape[1]:
        weight = beside_zeros(weight, x.shape[1])
    if out is None:
        return torch.nn.functional.linear(x, weight, bias)
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def with_gaps(rows: Tensor) -> Tensor:
    """[..., H] of a buffer of the kernels, whose rows begin at multiples of 16 bytes, with the zeros between them.
    As it is where rows lie in another way.
    """
    width = _wide(rows.shape[-1], rows.dtype)
    if width == rows.shape[-1]:
        return rows
    shape = *rows.shape[:-1], width
    room = rows.untyped_storage().nbytes() // rows.itemsize - rows.storage_offset()
    lie_so = lies_within(rows, shape) and room >= math.prod(shape)
    return rows.as_strided(shape, (*rows.stride()[:-1], 1)) if lie_so else rows


def without_gaps(tensor: Tensor, dim: int, parts: int, size: int) -> Tensor:
    """A dimension of `parts` with gaps after each as one of parts * size; as it is where there are none."""
    if tensor.shape[dim] == parts * size:
        return tensor
    return tensor.unflatten(dim, (parts, -1)).narrow(dim + 1, 0, size).flatten(dim, dim + 1)


def with_room(weight: Tensor, gates: int, rows: int, columns: int) -> Tensor:
    """weight [G*H, I] with so many rows of each gate and so many columns, zeros in the new ones."""
    if weight.shape == (gates * rows, columns):
        return weight
    further = 0, columns - weight.shape[1], 0, rows - weight.shape[0] // gates
    return torch.nn.functional.pad(weight.unflatten(0, (gates, -1)), further).flatten(0, 1)


def of_weight(product: Tensor, gates: int, size: int, columns: int) -> Tensor:
    """A weight's gradient [G*H, columns], contiguous, from a product with gaps after each gate and each row."""
    if product.shape == (gates * size, columns):
        return product
    return without_gaps(product[:, :columns], 0, gates, size).contiguous()


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
