"""Heads: recurrent weights of blocks along the diagonal, so that units of a head see those of the same head alone.

H hidden units in K heads of H/K each, in this order: head k has the units from k*H/K on. `weight_hh` [G*H, H/K] has
its rows as torch.nn has them, gate by gate; row g*H + u is gate g of unit u, and its columns are the units of u's
head. Everything else has the shape that it has without heads: the input's weights see no heads.

To the kernels heads are weight sets beside the directions (`by_heads`): set k*D + d is head k in direction d, so that
every second one runs backwards where there are two. PyTorch's own kernels know no such weight, and are given all of it
(`whole`), with the zeros; the gradient of that is the gradient of the blocks, by autograd.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .call import Call, Inputs
from .kernels.spec import CELLS
from .rows import Rows


def whole(weight_hh: Tensor, heads: int) -> Tensor:
    """weight_hh [G*H, H/K] with the zeros between its blocks: [G*H, H]."""
    own = torch.eye(heads, dtype=torch.bool, device=weight_hh.device).view(heads, 1, heads, 1)
    blocks = weight_hh.unflatten(0, (-1, heads, weight_hh.shape[1])).unsqueeze(-2)  # [G, K, H/K, 1, H/K]
    return torch.where(own, blocks, 0).flatten(3, 4).flatten(0, 2)


def by_heads(layer: Callable) -> Callable:
    """A route that knows no heads (`functional.ROUTES`), as one that does. Weights as one tensor [D, ...]."""

    def route(inputs: Inputs, rows: Rows, call: Call):
        if call.heads == 1:
            return layer(inputs, rows, call)
        heads, size = call.heads, inputs.weight_hh.shape[-1]

        def apart(tensor: Tensor | None, axis: int, sets: int = 0) -> Tensor | None:
            return None if tensor is None else into_sets(tensor, axis, sets, heads, size)

        weights = {name: apart(getattr(inputs, name), 1) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        states = dict(h0=apart(inputs.h0, 2), c0=apart(inputs.c0, 2), parameters=apart(inputs.parameters, 1))
        kept = {name: apart(getattr(rows, name), 2, 1) for name in ("kept_h", "kept_c")}
        rows = rows._replace(dropped=apart(rows.dropped, 2), **kept)
        of_heads = call._replace(sets=call.sets * heads, heads=1)
        y, h_n, c_n, cells = layer(inputs._replace(**weights, **states), rows, of_heads)
        c_n = out_of_sets(c_n, 2, 0, heads, size) if CELLS[call.cell].states else c_n
        cells = out_of_sets(cells, 2, 1, heads, size) if call.cells else cells
        return out_of_sets(y, 2, 1, heads, size), out_of_sets(h_n, 2, 0, heads, size), c_n, cells

    return route


def into_sets(tensor: Tensor, axis: int, sets: int, heads: int, size: int) -> Tensor:
    """The heads of an axis [X*H], X values of each unit side by side, taken into the axis `sets` before it, [D]: they
    become [X*H/K] and [K*D]. size: H/K.
    """
    tensor = tensor.unflatten(axis, (-1, heads, size)).movedim(axis + 1, sets)
    return tensor.flatten(axis + 1, axis + 2).flatten(sets, sets + 1)


def out_of_sets(tensor: Tensor, axis: int, sets: int, heads: int, size: int) -> Tensor:
    """The way back. Contiguous: with one unit a head nothing else would copy it."""
    tensor = tensor.unflatten(axis, (-1, size)).unflatten(sets, (heads, -1))
    return tensor.movedim(sets, axis + 1).flatten(axis, axis + 2).contiguous()
