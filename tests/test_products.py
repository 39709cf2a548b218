"""Rows in wider memory, and the matrices of large products with rows that begin at multiples of 16 bytes."""

import pytest
import torch

from rnn_gpu import products
from rnn_gpu.kernels.buffers import lies_within, within
from tests.tolerances import assert_same_mathematics


def test_what_lies_within_wider_memory():
    """Catches: a stride that counts where there is one element, or none where there are more; a copy without need, or
    none off a 16-byte boundary.
    """
    buffer = torch.arange(80.0).view(2, 5, 8)
    one = buffer.as_strided((1, 3, 5), (7, 8, 1))
    inside = [buffer, buffer[:, 1:4, :5], buffer[1:], buffer[:, :1], buffer[:, :3, :1], one, one[:, ::2, :0]]
    apart = [buffer[:, ::2], buffer[..., ::2], buffer[..., :1].expand(2, 5, 8), buffer.transpose(0, 1)[:2, :, :3]]
    apart += [buffer[:, :3].contiguous(), buffer[..., :5].contiguous()]
    for tensor in (*inside, *apart):
        so, found = any(tensor is one for one in inside), within(tensor, buffer.shape)
        assert lies_within(tensor, buffer.shape) is so and lies_within(tensor, tensor.shape) is tensor.is_contiguous()
        assert lies_within(found, buffer.shape) and torch.equal(found, tensor) and (found is tensor) is so
    moved = within(buffer[..., 1:5], buffer.shape)
    assert moved.data_ptr() % 16 == 0 and torch.equal(moved, buffer[..., 1:5])


def rows_apart(count: int, size: int, width: int, behind: int) -> torch.Tensor:
    """[count, 2, size] with `width` from one to the next, and so many values behind the last."""
    buffer = torch.arange(count * 2 * width - (width - size) + behind, dtype=torch.bfloat16)
    return buffer.as_strided((count, 2, size), (2 * width, width, 1))


@pytest.mark.parametrize(
    ("size", "width", "behind", "wide"),
    [(5, 8, 3, True), (5, 8, 2, False), (5, 16, 11, False), (8, 8, 8, False)],
)
def test_gaps_are_taken_where_they_are(size, width, behind, wide):
    """Catches: a view of other rows as gaps, and one past the end of the memory."""
    rows = rows_apart(3, size, width, behind)
    found = products.with_gaps(rows)
    assert found.shape == ((3, 2, width) if wide else rows.shape)
    assert found.data_ptr() == rows.data_ptr() and torch.equal(found[..., :size], rows)


@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("worth", [0, 1 << 40])
def test_the_input_product(worth, has_bias, out, monkeypatch):
    """Catches: columns beside the input's that are not zeros, a bias or a place that is forgotten."""
    monkeypatch.setattr(products, "WORTH", worth)
    x, weight, bias, place = (torch.randn(size, dtype=torch.float64) for size in ((4, 3), (6, 3), 6, (4, 6)))
    bias, place = bias if has_bias else None, place if out else None
    found = products.input_product(x, weight, bias, place)
    assert_same_mathematics(found, torch.nn.functional.linear(x, weight, bias), "product")
    assert place is None or found is place
    assert (products.to_multiply(x, 6) is x) == (worth > 0)


def test_a_weight_with_room_and_without():
    """Catches: rows or columns of one gate that end up in another's."""
    weight = torch.randn(6, 3)
    wide = products.with_room(weight, 2, 4, 5)
    assert wide.shape == (8, 5) and wide.count_nonzero() == 18
    assert torch.equal(products.of_weight(wide, 2, 3, 3), weight) and products.of_weight(weight, 2, 3, 3) is weight
    assert torch.equal(products.without_gaps(wide.t(), 1, 2, 3)[:3], weight.t())
