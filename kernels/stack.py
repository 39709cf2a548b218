"""The launchers of a stack: its layers as a wavefront in one persistent launch, forward and backward.

Layer n is a step behind the layer that feeds it, and all of them are done after T + L - 1 steps. Between two layers no
input part, and no gradient of an input, is ever written. T steps, B rows of the batch, R rows of all
steps, L layers, G gates, H hidden units, HS = padded H, E slots.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch, prepare
from .buffers import aligned, all_dense, dense, part_of, within
from .layer import of_backward
from .plan import Plan
from .rows import Passed, Rows
from .spec import CELLS


class Begun(NamedTuple):
    """What stands ready before the first layer's input product and the recurrence: y, all of its buffer [L, B+R+B, HS],
    as words; weight_hh, weight_ih [L, G*H, HS], of the input's weights all but the first layer's; bias [L, G*H] with
    all biases but bias_hn [L, A*H] (GRU: n's), or None; fed, all of its buffer [L-1, B+R+B, HS], as words, or None
    without dropout.
    """

    y: Tensor
    weight_hh: Tensor
    weight_ih: Tensor
    bias: Tensor | None
    bias_hn: Tensor | None
    fed: Tensor | None


def _with_dropout(given: dict[str, Any], passed: Passed | None) -> None:
    """Put in what both kernels take for dropout between the layers."""
    if passed is not None:
        given["passed"], given["scale"] = aligned(passed.mask).view(torch.int8), passed.scale


def _weights_fed(weights: Sequence[Tensor], first: int) -> list[Tensor]:
    """Weights of layers fed by others, of all but the one numbered `first`, which has its neighbour's in its place."""
    neighbour = weights[1] if first == 0 else weights[-2]
    return [aligned(neighbour if n == first else weight) for n, weight in enumerate(weights)]


def begin(
    plan: Plan, rows: Rows, count: int, h0: Tensor | None, weight_ih: Sequence[Tensor], weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor] | None, bias_hh: Sequence[Tensor] | None, dropout: bool = False, y: Tensor | None = None,
) -> Begun:  # fmt: skip
    """Make the buffers of a forward and what must stand in them; count: R. h0 [L, B, H], None for zeros; weights and
    biases of each layer. dropout: whether there is any between the layers. y: its buffer, of words, or a new one.
    """
    cell, (layers, hidden_size) = CELLS[plan.cell], (plan.layers, plan.hidden_size)
    size, width, batch = plan.padded_size, cell.gates * hidden_size, rows.batch
    like = weight_hh[0]
    y = _new(like, (layers, batch + count + batch, plan.row_words), torch.int32) if y is None else y
    recurrent, other = (_new(like, (layers, width, size)) for _ in range(2))
    bias = None if bias_ih is None else _new(like, (layers, width))
    apart = cell.apart * hidden_size if bias is not None else 0
    bias_hn = _new(like, (layers, apart)) if apart else None
    jobs = count * plan.row_words, batch * size, 0 if bias is None else width, width * size
    programs = launch.programs_for(*jobs)
    of_layers, weights, h0 = [aligned(one) for one in weight_hh], _weights_fed([like, *weight_ih[1:]], 0), dense(h0)
    bias_ih, bias_hh = all_dense(bias_ih), all_dense(bias_hh)
    for n in range(layers):
        biases = (None, None) if bias_ih is None or bias_hh is None else (bias_ih[n], bias_hh[n])
        launch.prepare_buffers(
            prepare.prepare_forward,
            (cell.gates, hidden_size, size, 1, cell.apart, plan.dtype, prepare.BLOCK, size),
            like.device,
            sum(programs) + programs[3],
            (
                y[n], _from(h0, n), biases[0], None, biases[1], None, _from(bias, n), _from(bias_hn, n), of_layers[n],
                None, recurrent[n], weights[n], None, other[n], count, batch, hidden_size, *programs,
            ),
        )  # fmt: skip
    fed = None
    if dropout:
        fed = y.new_full((layers - 1, *y.shape[1:]), -1)
        fed[:, :batch].zero_()
    return Begun(y, recurrent, other, bias, bias_hn, fed)


def _new(like: Tensor, size: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Memory beside a tensor, of its type unless another is given."""
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device)


def _from(tensor: Tensor | None, n: int) -> Tensor | None:
    """A tensor from layer n on."""
    return None if tensor is None else tensor[n:]


def forward(
    plan: Plan, begun: Begun, x_part: Tensor, h0: Tensor | None, c0: Tensor | None, rows: Rows, saving: str,
    h_n: Tensor | None = None, c_n: Tensor | None = None, passed: Passed | None = None, gates: Tensor | None = None,
    aux: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """All steps of all layers forward, after `begin`.

    x_part [R, G*H]: the first layer's, biases included; it stays as it is. h0, c0 [L, B, H], None for zeros. saving:
    "nothing", "lean" or "full", as layer.forward has it. h_n, c_n, gates, aux: where to write those, or new tensors.
    passed: dropout, as `begin` was told.
    -> y [L, R, H], h_n [L, B, H], c_n [L, B, H] or None, gates [L, R, G*H] or None, aux [L, R, HS] or None; the kernels
    have layers of y and aux R + 2B rows apart.
    """
    assert rows.time > 0 and x_part.is_contiguous()
    cell, (layers, hidden_size), y = CELLS[plan.cell], (plan.layers, plan.hidden_size), begun.y
    (count, width), batch, size, dtype = x_part.shape, rows.batch, plan.padded_size, x_part.dtype
    h_n = _new(x_part, (layers, batch, hidden_size)) if h_n is None else h_n
    if c_n is None and cell.states:
        c_n = _new(x_part, (layers, batch, len(cell.states) * hidden_size))
    if saving == "full" and cell.saves and gates is None:
        gates = _new(x_part, (layers, count, width))
    if cell.keeps_aux(saving) and aux is None:
        exact = torch.float32 if cell.states else dtype
        aux = _new(x_part, (*y.shape[:2], cell.planes * size), dtype=exact)[:, :count]
    given = launch.FORWARD | dict(
        x_part=x_part,
        weight=begun.weight_hh,
        weight_below=begun.weight_ih,
        bias=begun.bias_hn,
        biases=begun.bias,
        y=y,
        fed=begun.fed,
        carry_0=dense(c0 if cell.states else h0 if cell.carries_h else None),
        gates=gates,
        aux=aux,
        carry_n=c_n,
        h_n=h_n,
    )
    _with_dropout(given, passed)
    launch.run(plan, x_part.device, rows, 0, given)
    shape, stride = (layers, count, hidden_size), ((count + 2 * batch) * size, size, 1)
    return part_of(y, dtype, batch * size, shape, stride), h_n, c_n, gates, aux


def backward(
    plan: Plan, d_y: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None, weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor], gates: Tensor | None, aux: Tensor | None, y: Tensor, h0: Tensor | None,
    c0: Tensor | None, rows: Rows, passed: Passed | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """All steps of all layers backward.

    d_y [R, H], of the last layer's outputs, d_h_n and d_c_n [L, B, H], each None for zero; weights of each layer;
    gates, aux and y as `forward` left them; h0, c0 [L, B, H] or None for zeros; passed: as `forward` took it.
    -> d_gates [L, R, E, H], the gradients of the gate sums in the order of the cell's slots, and d_carry_0 [L, B, H],
    as layer.backward has it.
    """
    cell, (layers, count, hidden_size) = CELLS[plan.cell], y.shape
    batch, size = rows.batch, plan.padded_size
    if batch * cell.slots * size * y.element_size() >> 2 > 0x7FFFFFFF:  # words; backward.py counts them in 32 bits
        raise RuntimeError(f"rnn_gpu: the gradients of one step of {batch} rows take more than 8 GB: split the batch")
    d_gates = _new(y, (layers, batch + count + batch, cell.slots, plan.row_words), torch.int32)
    transposed = _new(y, (2, layers, size, cell.gates, size))
    state_0 = history_0 = None
    span = layers, count + 2 * batch  # of y and aux, as `forward` leaves them
    y = within(y, (*span, size)) if cell.reads_h or cell.carries_h else y
    aux = y if cell.reads_h else within(aux, (*span, aux.shape[2])) if cell.planes else None
    history = aux if cell.states else y if cell.carries_h else None
    planes = cell.planes if cell.states else 1  # of a unit in `history`
    if history is not None:
        state_0 = dense(c0 if cell.states else h0)
        history_0 = _new(history, (layers, batch, planes * size))
    words = cell.slots * plan.row_words  # of a row
    jobs = count * words, batch * words, 0 if history_0 is None else batch * planes * size
    programs = launch.programs_for(*jobs)
    tiles = 2 * cell.gates * (-(-size // prepare.TILE)) ** 2  # of both weights of a layer, that are transposed
    of_layers, weights = [aligned(one) for one in weight_hh], _weights_fed([*weight_ih[1:], weight_hh[0]], layers - 1)
    for n in range(layers):
        launch.prepare_buffers(
            prepare.prepare_backward,
            (
                cell.gates, cell.slots, cell.carried, planes, hidden_size, size, 1, cell.slot_order[0], 0, plan.dtype,
                prepare.BLOCK, prepare.TILE, plan.precision,
            ),
            y.device,
            sum(programs) + tiles,
            (
                d_gates[n], _from(state_0, n), _from(history_0, n), of_layers[n], weights[n], transposed[0, n], count,
                batch, *programs, layers * size,
            ),
        )  # fmt: skip
    given = launch.BACKWARD | dict(
        weight=transposed[0], weight_above=transposed[1], history=history, history_0=history_0
    )
    _with_dropout(given, passed)
    d_carry_0 = of_backward(given, cell, y, (layers, batch), (d_y, d_h_n, d_c_n), gates, aux, d_gates, h0, c0)
    launch.run(plan, y.device, rows, 0, given)
    width = cell.slots * size
    shape, stride = (layers, count, cell.slots, hidden_size), ((count + 2 * batch) * width, width, size, 1)
    return part_of(d_gates, y.dtype, batch * width, shape, stride), d_carry_0
