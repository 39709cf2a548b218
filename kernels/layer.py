"""The launchers of a layer, all its directions: from tensors to one persistent launch, forward and backward.

Buffers are allocated here in the layouts that forward.py and backward.py describe, and given back as views in the
layouts of torch. T steps, B rows of the batch, R rows of all steps, N weight sets, G gates, H hidden units, HS =
padded H, E slots, A gates apart, K states beside h, P parameters (spec.Cell).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import again, launch, prepare
from .buffers import aligned, all_dense, dense, part_of, within
from .plan import Plan
from .rows import Rows
from .spec import CELLS, Cell, padded

Rates = tuple[float | None, float | None]  # what stays of h and of the states in every step; None for nothing
NO_RATES: Rates = (None, None)


class Begun(NamedTuple):
    """What stands ready before the input product and the recurrence.

    y: all of its buffer [B + R + B, N, HS], as words. weight_hh [N, G*H, HS]. For the input product, where the weights
    of each set were given: weight_ih [N*G*H, I] and, where there are biases, bias [N*G*H], all but bias_hn [N, A*H]
    (GRU: n's).
    """

    y: Tensor
    weight_hh: Tensor
    weight_ih: Tensor | None
    bias: Tensor | None
    bias_hn: Tensor | None


def begin(
    plan: Plan, rows: Rows, count: int, h0: Tensor | None, weight_hh: Sequence[Tensor],
    weight_ih: Sequence[Tensor] | None = None, bias_ih: Sequence[Tensor] | None = None,
    bias_hh: Sequence[Tensor] | None = None, y: Tensor | None = None,
) -> Begun:  # fmt: skip
    """Make the buffers of a forward and what must stand in them; count: R. h0 [N, B, H], None for zeros.

    weight_hh: of each set [G*H, H], or all of them [N, G*H, H]. The rest: of each set, one or two, for the eager way,
    where this makes one tensor of both and one bias of two. y: its buffer, of words, or a new one.
    """
    cell, sets, hidden_size, size, batch = CELLS[plan.cell], plan.sets, plan.hidden_size, plan.padded_size, rows.batch
    width, like = cell.gates * hidden_size, weight_hh[0]
    device, dtype = like.device, like.dtype
    if y is None:
        y = torch.empty((batch + count + batch, sets, plan.row_words), dtype=torch.int32, device=device)
    bias = bias_hn = input_weight = None
    if bias_ih is not None:
        apart = sets * cell.apart * hidden_size
        bias = torch.empty((sets * width + apart,), dtype=dtype, device=device)
        if apart:
            bias, bias_hn = bias[:-apart], bias[-apart:].view(sets, -1)
        bias_ih, bias_hh = all_dense(bias_ih), all_dense(bias_hh)
    both = weight_ih is not None and len(weight_ih) == 2
    if both:
        input_weight = torch.empty((2 * width, weight_ih[0].shape[1]), dtype=dtype, device=device)
    recurrent, copied = whole(weight_hh, size), None
    if recurrent is None:
        recurrent = copied = torch.empty((sets, width, size), dtype=dtype, device=device)
    programs = launch.programs_for(
        0 if plan.alone else count * sets * plan.row_words,
        batch * sets * size,
        0 if bias is None else sets * width,
        0 if copied is None else copied.numel(),
        0 if input_weight is None else input_weight.numel(),
    )
    launch.prepare_buffers(
        prepare.prepare_forward,
        (cell.gates, hidden_size, size, sets, cell.apart, plan.dtype, prepare.BLOCK, None),
        device,
        sum(programs),
        (
            y, dense(h0), *_two(bias_ih), *_two(bias_hh), bias, bias_hn,
            *_two(None if copied is None else [aligned(weight) for weight in weight_hh]), copied,
            *_two([aligned(weight) for weight in weight_ih] if both else None), input_weight, count, batch,
            weight_ih[0].shape[1] if both else 0, *programs[:4],
        ),
    )  # fmt: skip
    if not both and weight_ih is not None:
        (input_weight,) = weight_ih
    return Begun(y, recurrent, input_weight, bias, bias_hn)


def _two(tensors: Sequence[Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """The tensors of two sets, None where there is none."""
    if tensors is None:
        return None, None
    return tensors[0], tensors[1] if len(tensors) > 1 else None


def whole(weights: Sequence[Tensor], size: int) -> Tensor | None:
    """Weights of all sets [N, rows, size], or of one [rows, size], as the kernels take them, where they lie so; else
    None, and a job of one or two sets copies them. (More than two are padded by torch.)
    """
    if not isinstance(weights, Tensor):
        if len(weights) > 1:
            return None
        (weights,) = weights
    width = weights.shape[-1]
    if width != size and weights.dim() == 3 and len(weights) > 2:
        weights, width = torch.nn.functional.pad(weights, (0, size - width)), size
    return aligned(weights) if width == size else None


def forward(
    plan: Plan, x_part: Tensor, weight_hh: Tensor, bias_hn: Tensor | None, h0: Tensor | None, c0: Tensor | None,
    rows: Rows, reversed_sets: int, saving: str, c_n: Tensor | None = None, parameters: Tensor | None = None,
    rates: Rates = NO_RATES, gates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """All steps forward.

    x_part [R, N, G*H]: contiguous; the gates are saved over it, or into `gates`, if `saving` is "full" (and the cell
    needs them). saving: "nothing", "lean" (aux alone, where there are states) or "full".
    weight_hh [N, G*H, H], bias_hn [N, A*H] or None, h0 [N, B, H] and c0 [N, B, K*H] or None; reversed_sets: 0 none of
    the sets runs backwards in time, 1 all, 2 every second one. parameters [N, P*H] or None.
    c_n: where to write it, or a new tensor. rates: what stays of h and of the states in every step, where `rows` has no
    masks; None for nothing.
    -> y [R, N, H], h_n [N, B, H], c_n [N, B, K*H] or None, aux [R, N, planes * HS] or None, and the carries [R, N, K *
    HS] or None: see `Cell.keeps_carries`.
    """
    begun = begin(plan, rows, x_part.shape[0], sent(h0, rows), weight_hh)
    if bias_hn is not None:
        begun = begun._replace(bias_hn=aligned(bias_hn))
    how = dict(c_n=c_n, parameters=parameters, rates=rates, gates=gates)
    return go_on(plan, begun, x_part, h0, c0, rows, reversed_sets, saving, **how)


def sent(h0: Tensor | None, rows: Rows) -> Tensor | None:
    """What of the initial state the recurrent product sees."""
    return h0 if h0 is None or rows.dropped is None else (h0 * rows.dropped).to(h0.dtype)


def _of_options(given: dict[str, Any], rows: Rows, rates: Rates) -> bool:
    """Put in what both kernels take for recurrent dropout and zoneout -> whether a part of the states is kept."""
    if rates == NO_RATES and rows.dropped is rows.kept_h is rows.kept_c is None:
        return False
    masks = rows.dropped, rows.kept_h, rows.kept_c
    given["rate_h"], given["rate_c"] = rates
    given["dropped"], given["kept_h"], given["kept_c"] = [None if mask is None else aligned(mask) for mask in masks]
    return rows.kept_c is not None or rates[1] is not None


def go_on(
    plan: Plan, begun: Begun, x_part: Tensor, h0: Tensor | None, c0: Tensor | None, rows: Rows, reversed_sets: int,
    saving: str, h_n: Tensor | None = None, c_n: Tensor | None = None, parameters: Tensor | None = None,
    rates: Rates = NO_RATES, flat: bool = False, aux: Tensor | None = None,
    gates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """`forward` after `begin`, when the input product is there, [R, ...]. h_n, c_n, aux: where to write those, or new
    tensors; gates: or over x_part. flat: y as [R, N*H], where it lies so.
    """
    assert rows.time > 0 and x_part.is_contiguous()
    cell, sets, hidden_size, size, y = CELLS[plan.cell], plan.sets, plan.hidden_size, plan.padded_size, begun.y
    dtype, device, batch, count, given = x_part.dtype, x_part.device, rows.batch, x_part.shape[0], launch.FORWARD.copy()
    mixed, shown, carries = _of_options(given, rows, rates), None, None
    if saving != "nothing":
        if aux is None and cell.keeps_aux(saving):
            exact = torch.float32 if cell.states else dtype
            aux = torch.empty((count, sets, cell.planes * size), dtype=exact, device=device)
        if cell.keeps_carries(saving, mixed, rates[0]):
            width, exact = (len(cell.states), torch.float32) if cell.states else (1, dtype)
            given["carries"] = carries = torch.empty((count, sets, width * size), dtype=exact, device=device)
    if rows.dropped is not None:  # what is sent to the neighbours is not what is shown
        given["shown"] = shown = torch.empty((count, sets, size), dtype=dtype, device=device)
        given["h_0"] = dense(h0)
    if h_n is None:
        h_n = torch.empty((sets, batch, hidden_size), dtype=dtype, device=device)
    if c_n is None and cell.states:
        c_n = torch.empty((sets, batch, len(cell.states) * hidden_size), dtype=dtype, device=device)
    given["x_part"], given["weight"], given["bias"], given["y"] = x_part, begun.weight_hh, begun.bias_hn, y
    given["carry_0"] = dense(c0 if cell.states else h0 if cell.carries_h else None)
    given["parameters"] = None if parameters is None else aligned(parameters)
    given["gates"] = (x_part if gates is None else gates) if saving == "full" and cell.saves else None
    given["aux"], given["carry_n"], given["h_n"] = aux, c_n, h_n
    launch.run(plan, device, rows, reversed_sets, given)
    begins, buffer = (batch * sets * size, y) if shown is None else (0, shown)
    if flat and (sets == 1 or size == hidden_size):
        y = part_of(buffer, dtype, begins, (count, sets * hidden_size), (sets * size, 1))
    else:
        y = part_of(buffer, dtype, begins, (count, sets, hidden_size), (sets * size, size, 1))
    return y, h_n, c_n, aux, carries


def backward(
    plan: Plan, d_y: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None, weight_hh: Sequence[Tensor],
    gates: Tensor | None, aux: Tensor | None, y: Tensor, h0: Tensor | None, c0: Tensor | None, rows: Rows,
    reversed_sets: int, d_cells: Tensor | None = None, clip: float | None = None, parameters: Tensor | None = None,
    rates: Rates = NO_RATES, carries: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """All steps backward.

    d_y [R, N, H], d_h_n [N, B, H] and d_c_n [N, B, K*H], each None for zero; weight_hh of each set [G*H, H], or all of
    them [N, G*H, H]; gates [R, N, G*H], aux and y as `forward` left them; h0 [N, B, H] and c0 [N, B, K*H], each None
    for zeros. d_cells [R, N, K*H]: by the states of every step (LSTM: c), or None. clip: limit of h's gradient at every
    step, or None. parameters [N, P*H] or None. rates, carries: as `forward` took and left them.
    -> d_gates [R, N, E, H], the gradients of the gate sums in the order of the cell's slots; d_carry_0: of c0 where
    there are states, [N, B, K*H]; where the cell carries h (GRU), in float32, what of h0's does not pass through the
    gates; None where that state is; d_parameters [N, B, P*H] in float32, each row's part, or None; d_kept_0
    [N, B, H] in float32, where a part of h is kept (zoneout), what of h0's gradient comes that way; where the cell
    carries h None: it is in d_carry_0.
    """
    cell, size, (count, sets, hidden_size) = CELLS[plan.cell], plan.padded_size, y.shape
    dtype, device, batch, given = y.dtype, y.device, rows.batch, launch.BACKWARD.copy()
    words = sets * cell.slots * plan.row_words  # of a row
    if batch * words > 0x7FFFFFFF:  # backward.py counts them in 32 bits
        raise RuntimeError(f"rnn_gpu: the gradients of one step of {batch} rows take more than 8 GB: split the batch")
    if cell.planes > 0 and (aux is None or aux.numel() == 0) and y.numel() > 0:
        raise RuntimeError("rnn_gpu: a backward was asked for, and the forward kept nothing for one")
    d_gates = torch.empty((batch + count + batch, sets, cell.slots, plan.row_words), dtype=torch.int32, device=device)
    given["weight"] = weight = torch.empty((sets, size, cell.gates, size), dtype=dtype, device=device)
    mixed = _of_options(given, rows, rates)
    wide = count, sets, size
    if cell.reads_h:
        aux = within(y, wide) if rates[0] is None else aligned(carries)
    else:
        aux = None if aux is None or cell.planes == 0 else aligned(aux)
    states = aligned(carries) if cell.states and mixed else aux
    history = states if cell.states else within(y, wide) if cell.carries_h else None
    planes = history.shape[-1] // size if cell.states else 1  # of a unit in `history`
    state_0 = history_0 = None
    if history is not None:
        state_0 = dense(c0 if cell.states else h0)
        history_0 = torch.empty((batch, sets, planes * size), dtype=history.dtype, device=device)
    programs = launch.programs_for(
        0 if plan.alone else count * words, batch * words, 0 if history is None else batch * sets * planes * size
    )
    weight_hh = [aligned(one) for one in weight_hh]
    for first in range(0, sets, 2):
        of_two = weight_hh[first : first + 2]
        tiles = len(of_two) * cell.gates * (-(-size // prepare.TILE)) ** 2
        launch.prepare_buffers(
            prepare.prepare_backward,
            (
                cell.gates, cell.slots, cell.carried, planes, hidden_size, size, sets, *[cell.slot_order[0]] * 2,
                plan.dtype, prepare.BLOCK, prepare.TILE, plan.precision,
            ),
            device,
            sum(programs) + tiles,
            (
                d_gates, state_0, history_0, *_two(of_two), weight[first:] if first else weight, count, batch,
                *programs, size,
            ),
        )  # fmt: skip
        programs = 0, 0, 0  # of further sets the weights alone
    d_parameters = d_kept_0 = None
    if cell.parameters:
        width = len(cell.parameters) * hidden_size
        given["d_parameters"] = d_parameters = torch.empty((batch, sets, width), dtype=torch.float32, device=device)
        given["parameters"] = aligned(parameters)
    if not cell.carries_h and (rows.kept_h is not None or rates[0] is not None):
        given["d_kept_0"] = d_kept_0 = torch.empty((batch, sets, hidden_size), dtype=torch.float32, device=device)
    given["history"], given["history_0"] = history, history_0
    given["d_carry"] = None if d_cells is None else aligned(d_cells)
    given["clip"] = None if clip is None else float(clip)
    d_carry_0 = of_backward(given, cell, y, (batch, sets), (d_y, d_h_n, d_c_n), gates, aux, d_gates, h0, c0)
    launch.run(plan, device, rows, reversed_sets, given)
    by_sets = [None if one is None else one.transpose(0, 1) for one in (d_carry_0, d_parameters, d_kept_0)]
    width = cell.slots * size
    place = batch * sets * width, (count, sets, cell.slots, hidden_size), (sets * width, width, size, 1)
    return part_of(d_gates, dtype, *place), *by_sets


def of_backward(
    given: dict[str, Any], cell: Cell, y: Tensor, sizes: tuple[int, int], d_outputs: Sequence[Tensor | None],
    gates: Tensor | None, aux: Tensor | None, d_gates: Tensor, h0: Tensor | None, c0: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """Put in what the backward of a layer and that of a stack take alike -> d_carry_0, where the gradient of the
    initial carry is to be written, [*sizes, K*H], where there is one.
    """
    d_y, d_h_n, d_c_n = d_outputs
    d_carry_0 = None
    if (c0 if cell.states else h0 if cell.carries_h else None) is not None:
        exact = y.dtype if cell.states else torch.float32
        d_carry_0 = torch.empty((*sizes, cell.carried * y.shape[2]), dtype=exact, device=y.device)
    given["d_y"] = None if d_y is None else aligned(d_y)
    given["d_h_n"], given["d_carry_n"] = dense(d_h_n), dense(d_c_n) if cell.states else None
    given["gates"] = None if gates is None else aligned(gates)
    given["aux"], given["d_gates"], given["d_carry_0"] = aux, d_gates, d_carry_0
    return d_carry_0


def saved_again(
    cell: str, sums: Tensor, gates: Tensor, apart: Tensor | None, y: Tensor, aux: Tensor | None, h0: Tensor | None,
    c0: Tensor | None, places: Tensor | None, batch: int, parameters: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """What a forward with saving "full" leaves for its backward, made again from the gate sums.

    sums [R, N, G*H]: of each gate, but the input's part alone of those apart; gates: to be written, sums itself or
    another tensor like it; apart [R, N, A*H]: the hidden part of
    these. y, aux, h0, c0, parameters: as `backward` takes them. places int64 [R, N]: as again.py has them, for cells
    that carry something. batch: B.
    -> aux with the values that the cell saves beyond the gates, where the forward has not kept it with the states.
    """
    (count, sets, hidden_size), spec, name = y.shape, CELLS[cell], str(y.dtype).removeprefix("torch.")
    size = padded(hidden_size, name)
    made = y.new_zeros(count, sets, spec.planes * size) if spec.further and not spec.states else None
    wide = count, sets, size
    history, state_0 = (aux, c0) if spec.states else (within(y, wide), h0) if spec.carries_h else (None, None)
    launch.prepare_buffers(
        again.again,
        (
            spec.function("forward"), spec.gates, spec.apart, spec.carried, len(spec.parameters), spec.saves,
            spec.planes, history.shape[-1] if spec.states else size, hidden_size, size, sets, name, prepare.BLOCK // 4,
        ),
        y.device,
        -(-y.numel() // (prepare.BLOCK // 4)),
        (
            sums, gates, apart, None if parameters is None else aligned(parameters), history, dense(state_0), places,
            made, count, batch,
        ),
    )  # fmt: skip
    return made
