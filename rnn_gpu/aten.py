"""PyTorch's own kernels (ATen: cuDNN, oneDNN) for one layer, and the same as one opaque operator.

`layer` is differentiable and serves sequences as they come: rows that end early or start anew are cut into stretches
without either, which ATen takes as one packed batch. `AtenLayer` hides it from compilers and torch.func: `aten::lstm`
itself is unrolled over time by torch.compile and torch.export, fails there in float32 training, and has no vmap rule.

Shapes as in operators.py, and P, the size of a projected state: H where there is no projection.
"""

import functools
import itertools
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import inductor, onnx, versions
from .call import COUNT, HOW, TENSORS, Call, Inputs, for_operator, taken, taken_by_operator
from .kernels.spec import CELLS, known
from .library import fake, operator
from .many_gradients import for_each_gradient
from .rows import Rows
from .second_order import AgainByReference, reference_layer

FUNCTION = {"lstm": torch.lstm, "gru": torch.gru, "rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}

# cuDNN warns of weights that lie apart, which nobody can mend here. One filter, of this module alone: to set it for a
# call and take it back would make every warning that Python shows once come again, in all threads.
warnings.filterwarnings(
    "ignore", message="RNN module weights are not part of single contiguous chunk", module=__name__.replace(".", r"\.")
)


def layer(inputs: Inputs, rows: Rows, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer, all directions, on ATen; a cell that PyTorch does not have by the loop of reference.py. Without
    `start`, which is for the kernels.

    -> y [R, N, P], h_n [N, B, P], c_n [N, B, H] or None. On a GPU masks are copied to the host.
    """
    if call.cell not in FUNCTION:
        with torch.autocast(inputs.input.device.type, enabled=False):
            return reference_layer(inputs, rows, call)[:3]
    input, sets, cell, dense = inputs.input, call.sets, call.cell, rows.lengths is None and rows.resets is None
    kinds = [weight for weight in inputs[1:6] if weight is not None]
    weights = [[weight[n] for weight in kinds] for n in range(sets)]
    has_biases = inputs.bias_ih is not None
    states = tuple(state for state in (inputs.h0, inputs.c0) if state is not None)
    with torch.autocast(input.device.type, enabled=False):  # everything has its type already
        if dense and call.reversed_sets != 1:
            steps = input.view(rows.time, rows.batch, input.shape[-1])
            y, *final = _call(cell, steps, None, states, weights, has_biases)
            y = y.view(rows.time * rows.batch, sets, states[0].shape[-1])
        elif rows.offsets is not None and rows.resets is None and call.reversed_sets != 1:
            sizes = (rows.offsets[1:] - rows.offsets[:-1]).cpu()
            y, *final = _call(cell, input, sizes, states, weights, has_biases)
            y = y.view(input.shape[0], sets, states[0].shape[-1])
        else:
            found = []
            for n in range(sets):
                cut = _stretches(*rows[:5], call.backwards(n))
                found.append(_by_stretches(cell, input, [state[n] for state in states], weights[n], has_biases, *cut))
            y, *final = (torch.stack(parts, 1 if i == 0 else 0) for i, parts in enumerate(zip(*found, strict=True)))
    return y, final[0], final[1] if len(final) == 2 else None


def _call(cell, input, batch_sizes, states, weights, has_biases):
    """ATen's function for one layer, dense (batch_sizes None) or packed -> output, h_n and, for the LSTM, c_n."""
    flat = [weight for one in weights for weight in one]
    state = states if cell == "lstm" else states[0]
    training = torch.is_grad_enabled()  # in eval mode too: cuDNN then keeps what a backward needs
    how = has_biases, 1, 0.0, training, len(weights) == 2
    if batch_sizes is None:
        return FUNCTION[cell](input, state, flat, *how, False)
    return FUNCTION[cell](input, batch_sizes, state, flat, *how)


def _by_stretches(cell, input, states, weights, has_biases, rows, sizes, owner, begins, last, empty):
    """One direction over the stretches that `_stretches` found, as packed input -> y [R, P], h_n and c_n [B, ...]."""
    starts = tuple(torch.where(begins, state[owner], 0).unsqueeze(0) for state in states)
    if len(rows) == 0:  # no step of any row: an empty batch, so that gradients are zeros and not None
        y, *_ = _call(cell, input[:0].unsqueeze(0), None, starts, [weights], has_biases)
        zero = y.sum()
        return input.new_zeros(input.shape[0], y.shape[-1]) + zero, *(state + zero for state in states)
    y, *final = _call(cell, input[rows], sizes, starts, [weights], has_biases)
    y = y.new_zeros(input.shape[0], y.shape[-1]).index_copy(0, rows, y)
    return y, *(torch.where(empty, state, end[0][last]) for state, end in zip(states, final, strict=True))


def _stretches(time, batch, lengths, offsets, resets, backwards):
    """Cut the rows where they start anew, and lay the stretches out as packed input, in the direction of flow.

    -> rows [R'], where each packed row lies in the input; batch sizes on the host; and of each stretch, longest first:
    owner, its row of the batch; begins [S, 1], whether it goes on from the initial state. Of each row of the batch: its
    last stretch; empty [B, 1], whether it has none.
    """
    device = next(t for t in (lengths, resets) if t is not None).device
    lengths = torch.full((batch,), time, device=device) if lengths is None else lengths.long()
    flow = torch.arange(time, device=device).unsqueeze(1).expand(time, batch)  # steps in the direction of flow
    moment = (lengths - 1 - flow).clamp(min=0) if backwards else flow
    anew = torch.zeros_like(flow, dtype=torch.bool) if resets is None else resets.bool().gather(0, moment)
    active = (flow < lengths).t()  # from here on [B, T]: a row's steps one after another
    starts = (active & (anew | (flow == 0)).t())[active]
    stretch = starts.cumsum(0) - 1  # of every active step
    first = starts.nonzero().squeeze(1)
    position = torch.arange(len(stretch), device=device) - first[stretch]
    order = torch.bincount(stretch, minlength=len(first)).argsort(descending=True, stable=True)
    rank = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=device))
    packed = (position * len(first) + rank[stretch]).argsort()
    row = torch.arange(batch, device=device).expand(time, batch)
    place = moment * batch + row if offsets is None else offsets[moment] + row
    owner = row.t()[active][first]
    last = (torch.bincount(owner, minlength=batch).cumsum(0) - 1).clamp(min=0)
    begins = ~(anew.t()[active][first] | (flow.t()[active][first] > 0))
    return (
        place.t()[active][packed],
        torch.bincount(position, minlength=1).cpu(),
        owner[order],
        begins[order].unsqueeze(1),
        rank[last] if len(rank) else last,
        (lengths == 0).unsqueeze(1),
    )


# ---- As an opaque operator -------------------------------------------------------------------------------------------


# What a forward keeps for its backward, such as autograd's (inputs, results), by a number. The number stands in a
# tensor that whoever may ask for the backward saves beside the inputs; when its memory goes, so does what is kept here,
# by the weak reference beside it.
_kept: dict[int, tuple[Any, weakref.ref]] = {}
_numbers = itertools.count(1)


def kept(what: Any) -> Tensor:
    """The tensor, int64 [1], that stands for it."""
    number = next(_numbers)
    token = torch.full((1,), number, dtype=torch.int64, device="cpu")
    _kept[number] = what, weakref.ref(token.untyped_storage(), functools.partial(_kept.pop, number))
    return token


def taken_back(token: Tensor) -> Any:
    """What it stands for, which is then kept no more: autograd frees what it has used as it goes, and memory that was
    used a moment ago is fast. None where it stands for nothing, or was asked before; the forward has to run again then.
    """
    return _kept.pop(token.item(), (None,))[0] if token.numel() else None


def same_memory(given: Sequence[Tensor | None], leaves: Sequence[Tensor | None]) -> bool:
    """Whether tensors still are what the leaves of a graph were made from. A compiler may have taken the memory of an
    input that it makes again for the backward: then what was kept is lost.
    """
    return all(t is None or t.data_ptr() == leaf.data_ptr() for t, leaf in zip(given, leaves, strict=True))


def _with_autograd(inputs: Inputs, rows: Rows, call: Call, need: Sequence[bool]) -> tuple[Inputs, tuple]:
    """`layer` on copies of the inputs for autograd, those of `need` with a gradient -> them, and the results."""
    # An operator's body runs below autograd; this one needs it.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        leaves = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(inputs, need, strict=True)]
        return Inputs(*leaves), _computed(Inputs(*leaves), rows, call)


def _computed(inputs: Inputs, rows: Rows, call: Call) -> tuple[Tensor | None, ...]:
    """y, h_n, c_n and the cells: by ATen, or by the readable loop where ATen does not know what is asked for."""
    beyond = call.beyond_aten or any(mask is not None for mask in rows[5:])
    return reference_layer(inputs, rows, call) if beyond else (*layer(inputs, rows, call), None)


@operator("aten_layer", f"({TENSORS}, {HOW}, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
def aten_layer(*arguments):
    """`layer`, opaque, or where it cannot serve a call the readable loop; c_n is empty for cells without c, and c of
    every step [R, N, H] where it is not wanted.

    keep: a backward may follow. The last result then stands for what autograd has kept for it (int64 [1]; else empty).
    """
    *arguments, keep = arguments
    inputs, rows, call = _taken(arguments)
    if not _has_token(keep, inputs) or torch.is_inference_mode_enabled():
        call = call._replace(clip=None)  # which is for gradients alone
        y, h_n, c_n, cells = _computed(inputs, rows, call)
        c_n = y.new_empty(0) if c_n is None else _own(c_n, inputs.c0)
        results = y.contiguous(), _own(h_n, inputs.h0), c_n, y.new_empty(0) if cells is None else cells.contiguous()
        token = torch.zeros(int(_has_token(keep, inputs)), dtype=torch.int64, device="cpu")  # 0 stands for nothing
        return *results, token
    leaves, results = _with_autograd(inputs, rows, call, [t is not None for t in inputs])
    # Copies: a compiler that sees no further use of a result may write over it.
    copies = (inputs.input.new_empty(0) if r is None else r.detach().clone().contiguous() for r in results)
    return *copies, kept((leaves, results))


def _has_token(keep: bool, inputs: Inputs) -> bool:
    """Not on a GPU: a CUDA graph replays kernels, and no Python that would look for what was kept."""
    return keep and inputs.input.device.type == "cpu"


def _taken(arguments: Sequence) -> tuple[Inputs, Rows, Call]:
    """What both operators are given."""
    *tensors, cell, reversed_sets, cells, clip, rates = arguments
    inputs, rows = taken_by_operator(tensors)
    known(cell)
    return inputs, rows, Call(cell, inputs.h0.shape[0], reversed_sets, cells=cells, clip=clip, zoneout=rates)


def _own(state: Tensor, given: Tensor) -> Tensor:
    """A final state in memory of its own: an operator's result must not be one of its arguments."""
    return state.clone() if state is given else state.contiguous()


@fake("aten_layer")
def _(*arguments):
    *arguments, keep = arguments
    inputs, rows, call = _taken(arguments)
    inductor.fall_back()
    if torch.onnx.is_in_onnx_export():
        onnx.refuse_operator(inputs, rows, call)
    new, h0, c0 = inputs.input.new_empty, inputs.h0, inputs.c0
    return (
        new(inputs.input.shape[0], h0.shape[0], h0.shape[2]),
        torch.empty_like(h0, memory_format=torch.contiguous_format),
        new(0) if c0 is None else torch.empty_like(c0, memory_format=torch.contiguous_format),
        new(inputs.input.shape[0], h0.shape[0], c0.shape[2]) if call.cells else new(0),
        torch.empty(int(_has_token(keep, inputs)), dtype=torch.int64, device="cpu"),
    )


@operator(
    "aten_layer_backward",
    f"(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor? d_cells, {TENSORS}, {HOW}, bool[] need, "
    f"Tensor token) -> ({', '.join(['Tensor'] * COUNT)})",
)
def aten_layer_backward(d_y, d_h_n, d_c_n, d_cells, *arguments):
    """The gradients of a layer's inputs, empty where `need` says no: ATen's backward, from what the forward has kept,
    or else from the forward again.
    """
    *arguments, need, token = arguments
    given, rows, call = _taken(arguments)
    known = taken_back(token)
    leaves, results = known if known and same_memory(given, known[0]) else _with_autograd(given, rows, call, need)
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        d_results = d_y, d_h_n, d_c_n, d_cells
        pairs = [(r, d) for r, d in zip(results, d_results, strict=True) if d is not None and r.requires_grad]
        wanted = [leaf for leaf, n in zip(leaves, need, strict=True) if n]
        outputs, gradients = zip(*pairs, strict=True) if pairs else ((), ())
        found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True) if pairs else ())
    result = []
    for tensor, n in zip(given, need, strict=True):
        gradient = next(found, None) if n else None
        result.append(given.input.new_empty(0) if not n else _dense(gradient, tensor))
    return tuple(result)


def _dense(gradient: Tensor | None, tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor).contiguous() if gradient is None else gradient.contiguous()


@fake("aten_layer_backward")
def _(d_y, d_h_n, d_c_n, d_cells, *arguments):
    *arguments, need, _kept = arguments
    given, *_ = _taken(arguments)
    return tuple(t.new_empty(t.shape) if n else given.input.new_empty(0) for t, n in zip(given, need, strict=True))


# Before PyTorch 2.13 every graph of torch.compile seems to be an export.
EXPORT_SHOWS = versions.minor(torch.__version__) >= (2, 13)


def exporting() -> bool:
    """Whether a program is made that has no backward, and may run elsewhere."""
    return EXPORT_SHOWS and torch.compiler.is_exporting()


def _may_be_kept(call: Call) -> bool:
    """Whether a backward may follow that looks for what was kept."""
    return call.saving != "nothing" and not call.functional and not exporting()


class AtenLayer(torch.autograd.Function):
    """`layer` for torch.compile, torch.export and torch.func: the operators above, differentiable twice. (call,
    *inputs, *rows) -> y, h_n, c_n and the cells, empty where there are none, and what stands for what is kept.
    """

    generate_vmap_rule = True

    @staticmethod  # each argument by name: torch.compile takes the first of a forward(*arguments) for ctx
    def forward(
        call, input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, start, h0, c0, parameters, time, batch,
        lengths, offsets, resets, dropped, kept_h, kept_c,
    ):  # fmt: skip
        """See `layer`."""
        return aten_layer(
            input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, start, h0, c0, parameters, lengths, offsets,
            resets, dropped, kept_h, kept_c, time, *call.how, _may_be_kept(call),
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Save the inputs, and what stands for the rest."""
        ctx.call, *tensors = inputs
        given, rows = taken(tensors)
        ctx.save_for_backward(*given, *rows[2:], output[4])
        ctx.mark_non_differentiable(output[4])
        ctx.sizes = rows[:2]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, d_y, d_h_n, d_c_n, d_cells, _kept):
        """The gradients that are needed; differentiable themselves where a graph of the backward is made."""
        gradients = AtenLayerBackward.apply if torch.is_grad_enabled() else aten_gradients
        need = list(ctx.needs_input_grad[1 : 1 + COUNT])
        d_c_n = d_c_n if CELLS[ctx.call.cell].states else None
        d_cells = d_cells if ctx.call.cells else None
        *saved, kept = ctx.saved_tensors
        inputs, masks = saved[:COUNT], saved[COUNT:]
        run = lambda *d: gradients(ctx.call, need, *d, *inputs, *ctx.sizes, *masks, kept)
        found = for_each_gradient(run, (d_y, d_h_n, d_c_n, d_cells))
        found = [gradient if n else None for gradient, n in zip(found, need, strict=True)]
        return None, *found, *[None] * len(Rows._fields)


def aten_gradients(call: Call, need: Sequence[bool], d_y, d_h_n, d_c_n, d_cells, *arguments) -> tuple[Tensor, ...]:
    """`aten_layer_backward` of inputs, rows, and what stands for the rest."""
    *arguments, kept = arguments
    tensors = for_operator(*taken(arguments))
    return aten_layer_backward(d_y, d_h_n, d_c_n, d_cells, *tensors, *call.how, list(need), kept)


class AtenLayerBackward(AgainByReference):
    """The backward of AtenLayer, differentiable again."""

    @staticmethod
    def forward(*arguments):
        """See `aten_gradients`."""
        return aten_gradients(*arguments)
