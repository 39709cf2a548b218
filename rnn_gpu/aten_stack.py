"""A whole stack on PyTorch's CPU kernels as one light operator, for torch.compile.

What surrounds an operator in a compiled graph costs as much as a small layer. So a stack without masks and options, in
a graph without transforms, is one operator that takes the weights as they lie and is registered with no wrapper; the
LSTM calls oneDNN's layer and its backward themselves, as ATen does, with no autograd between. Everything else goes
layer by layer (aten.py).

T steps, B rows, L layers, D directions, I input features, H hidden units, P the size of a projected state (H where
there is no projection).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import aten, inductor, onnx
from .call import Call
from .kernels.spec import CELLS
from .library import fake, operator, without_autocast
from .rows import Rows
from .second_order import second_gradients

# cell, biases, L, D, T: what both operators are told of a stack
HOW = "str cell, bool biases, int layers, int directions, SymInt time"
GIVEN = f"Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, {HOW}"


def serves(call: Call, rows: Rows, input: Tensor, between: float) -> bool:
    """Whether a call on the route "opaque" is one of this file's. between: dropout between layers, 0 for one layer."""
    dense = rows.lengths is None and rows.resets is None and rows.offsets is None
    known = dense and call.cell in aten.FUNCTION and not call.beyond_aten and between == 0
    return known and input.device.type == "cpu" and not call.functional and not aten.exporting()


@torch.compiler.allow_in_graph
def stack(h0, c0, cell, biases, layers, directions, time, trained, input, *weights):
    """input [T*B, I], h0 [L*D, B, P] and c0 [L*D, B, H] or both None for zeros, weights in torch.nn's order.

    trained: a backward may follow. -> y [T*B, D*P], h_n, c_n, which is empty for cells without c.
    """
    how = cell, biases, layers, directions, time
    if torch._C._are_functorch_transforms_active():  # a transform inside the graph
        return _by_layers((input, h0, c0, *weights), how, "opaque", trained)
    if not trained:
        return aten_stack(input, h0, c0, weights, *how, False)[:3]
    return Stack.apply(*how, input, h0, c0, *weights)[:3]


def _by_layers(leaves: Sequence[Tensor | None], how: tuple, route: str, trained: bool = False) -> tuple[Tensor, ...]:
    """The same on another route, layer by layer."""
    from .functional import recurrent_stack

    (input, h0, c0, *weights), (cell, biases, layers, directions, time) = leaves, how
    projected = len(weights) > (2 + 2 * biases) * layers * directions
    saving = "full" if trained else "nothing"
    call = Call(cell, directions, 2 * (directions - 1), biases, projected, route, saving, functional=route == "opaque")
    rows = Rows(time, input.shape[0] // time)
    y, h_n, c_n, _ = recurrent_stack(call, rows, input, h0, c0, weights, 0.0)
    return y, h_n, h_n.new_empty(0) if c_n is None else c_n


# ---- The operators ---------------------------------------------------------------------------------------------------


def _zeros(input: Tensor, weights: Sequence[Tensor], how: tuple) -> tuple[Tensor, Tensor | None]:
    """h0 and c0."""
    cell, _, layers, directions, time = how
    batch, gates = input.shape[0] // time, CELLS[cell].gates
    h0 = input.new_zeros(layers * directions, batch, weights[1].shape[1])
    if not CELLS[cell].states:
        return h0, None
    return h0, input.new_zeros(layers * directions, batch, weights[1].shape[0] // gates)


def _by_onednn(input: Tensor, weights: Sequence[Tensor], how: tuple) -> bool:
    """Whether ATen would take oneDNN's LSTM."""
    cell, biases, layers, directions, _ = how
    return (
        cell == "lstm"
        and biases
        and len(weights) == 4 * layers * directions  # no projection
        and input.dtype == torch.float32
        and input.numel() > 0
        and torch._C._has_mkldnn
        and torch._C._get_mkldnn_enabled()
    )


LSTM = 2  # oneDNN's number for it
ONEDNN_BACKWARD = torch.ops.aten.mkldnn_rnn_layer_backward.default


def _of_set(states: Tensor | None, i: int, sets: int) -> Tensor | None:
    """Those of a layer and direction, [1, B, ...]."""
    if states is None or (sets == 1 and states.is_contiguous()):
        return states
    return states[i : i + 1].contiguous()


def _onednn(input, h0, c0, weights, how) -> tuple[Tensor, Tensor, Tensor, list]:
    """y [T, B, D*H], h_n, c_n, and of each layer and direction what its backward needs. h0, c0: None for zeros."""
    _, _, layers, directions, _ = how
    sets, size, saved = layers * directions, weights[1].shape[1], []
    states = (input.new_zeros(1, input.shape[1], size),) * 2 if h0 is None else None
    for i in range(sets):
        of_set = states or (_of_set(h0, i, sets), _of_set(c0, i, sets))
        four, reverse = weights[4 * i : 4 * i + 4], i % directions == 1
        found = torch.mkldnn_rnn_layer(input, *four, *of_set, reverse, [], LSTM, size, 1, True, False, False, True)
        saved.append((input, of_set, found))
        if directions == 1:
            input = found[0]
        elif reverse:
            input = torch.cat((saved[-2][2][0], found[0]), -1)
    # memory of their own: a compiler that sees no further use of a result may write over it
    if sets == 1:
        return found[0].clone(), found[1].clone(), found[2].clone(), saved
    y = input.clone() if directions == 1 else input
    return y, *(torch.cat([found[k] for *_, found in saved]) for k in (1, 2)), saved


def _onednn_backward(gradients, given, weights, how, saved, need) -> list[Tensor | None]:
    """The gradients of input, h0, c0 and weights. given: input and states, which a compiler may have made again."""
    _, _, layers, directions, _ = how
    (d_y, d_h_n, d_c_n), sets, size, found = gradients, layers * directions, weights[1].shape[1], [None] * len(saved)
    for i in reversed(range(sets)):
        input, states, (*results, workspace) = saved[i]
        input, reverse = given[0] if i < directions else input, i % directions == 1
        states = states if given[1] is None else [_of_set(state, i, sets) for state in given[1:]]
        d_own = d_y if directions == 1 or d_y is None else d_y[..., size:] if reverse else d_y[..., :size]
        d_own = d_own if d_own is None else d_own.contiguous()
        found[i] = ONEDNN_BACKWARD(
            input, *weights[4 * i : 4 * i + 4], *states, *results, d_own, _of_set(d_h_n, i, sets),
            _of_set(d_c_n, i, sets), reverse, LSTM, size, 1, True, True, False, [], False, workspace,
        )  # fmt: skip
        if directions == 1:
            d_y = found[i][0]
        elif not reverse:
            d_y = found[i][0] + found[i + 1][0]
    d_states = [None, None]
    if need[1] or need[2]:
        d_states = [torch.cat([one[k].view(1, -1, size) for one in found]) for k in (5, 6)]
    # of both biases it is one tensor, and gradients are changed in place
    d_weights = [d for one in found for d in (one[1], one[2], one[3], one[3].clone())]
    return [d_y, *d_states, *d_weights]


def _aten(input, h0, c0, weights, how, trained: bool) -> tuple[Tensor, ...]:
    """y [T, B, D*P], h_n and, for the LSTM, c_n by ATen's function."""
    cell, biases, layers, directions, _ = how
    states = (h0, c0) if c0 is not None else h0
    return aten.FUNCTION[cell](input, states, weights, biases, layers, 0.0, trained, directions == 2, False)


def _forward(given: tuple, how: tuple, trained: bool) -> tuple[Sequence[Tensor], object]:
    """Results, and what a backward needs, if one may follow."""
    input, h0, c0, *weights = given
    steps = input.view(how[-1], input.shape[0] // how[-1], input.shape[1])
    if trained and _by_onednn(input, weights, how):
        # below autograd, but not without gradients: then it leaves nothing for a backward
        with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad():
            *results, saved = _onednn(steps.contiguous(), h0, c0, weights, how)
        return results, saved
    if h0 is None:
        h0, c0 = _zeros(input, weights, how)
    if not trained:
        return _aten(steps, h0, c0, weights, how, False), None
    # An operator's body runs below autograd; this one needs it.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        leaves = [t if t is None else t.detach().requires_grad_() for t in (input, *given[1:3], *weights)]
        steps = leaves[0].view(steps.shape)
        states = (h0, c0) if leaves[1] is None else leaves[1:3]
        results = _aten(steps, *states, leaves[3:], how, True)
    return [r.detach().clone() for r in results], (leaves, results)


@operator("aten_stack", f"({GIVEN}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)")
@without_autocast
def aten_stack(input, h0, c0, weights, cell, biases, layers, directions, time, keep):
    """See `stack`; the last result stands for what is kept for a backward (aten.py), if one may follow."""
    how, kept = (cell, biases, layers, directions, time), keep and not torch.is_inference_mode_enabled()
    (y, h_n, *c_n), saved = _forward((input, h0, c0, *weights), how, kept)
    token = aten.kept(saved) if kept else torch.zeros(int(keep), dtype=torch.int64, device="cpu")
    return y.flatten(0, 1), h_n, c_n[0] if c_n else y.new_empty(0), token


@operator(
    "aten_stack_backward",
    f"(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, {GIVEN}, Tensor kept, bool[] need) -> Tensor[]",
)
@without_autocast
def aten_stack_backward(
    d_y, d_h_n, d_c_n, input, h0, c0, weights, cell, biases, layers, directions, time, kept, need
):  # fmt: skip
    """The gradients of input, h0, c0 and weights that `need` says, from what the forward has kept, or else from the
    forward again. What was kept is used up.
    """
    how, given = (cell, biases, layers, directions, time), (input, h0, c0, *weights)
    saved = aten.taken_back(kept)
    if saved is not None and isinstance(saved, tuple) and not aten.same_memory(given, saved[0]):
        saved = None
    if saved is None:
        saved = _forward(given, how, True)[1]
    d_y = None if d_y is None else d_y.view(time, -1, d_y.shape[-1])
    gradients = d_y, d_h_n, d_c_n if CELLS[cell].states else None
    if isinstance(saved, list):
        steps = input.view(time, -1, input.shape[1]).contiguous()
        found = _onednn_backward(gradients, (steps, h0, c0), weights, how, saved, need)
        found[0] = found[0].reshape(input.shape)
        return [d for d, n in zip(found, need, strict=True) if n]
    (leaves, results), wanted = saved, [i for i, n in enumerate(need) if n]
    pairs = [(r, d) for r, d in zip(results, gradients, strict=False) if d is not None]
    found = [None] * len(wanted)
    if pairs:
        outputs, d_outputs = zip(*pairs, strict=True)
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
            found = torch.autograd.grad(outputs, [leaves[i] for i in wanted], d_outputs, allow_unused=True)
    return [torch.zeros_like(given[i]) if d is None else d.contiguous() for i, d in zip(wanted, found, strict=True)]


@fake("aten_stack")
def _(input, h0, c0, weights, cell, biases, layers, directions, time, keep):
    inductor.fall_back()
    if torch.onnx.is_in_onnx_export():  # see `onnx.refuse_operator`
        onnx.refuse(onnx.NO_PROJECTION if len(weights) > (2 + 2 * biases) * layers * directions else onnx.NO_PROGRAM)
    how = cell, biases, layers, directions, time
    h_n, c_n = _zeros(input, weights, how)
    y = input.new_empty(input.shape[0], directions * h_n.shape[2])
    return y, h_n, y.new_empty(0) if c_n is None else c_n, torch.empty(int(keep), dtype=torch.int64, device="cpu")


@fake("aten_stack_backward")
def _(d_y, d_h_n, d_c_n, input, h0, c0, weights, cell, biases, layers, directions, time, kept, need):
    return [t.new_empty(t.shape) for t, n in zip((input, h0, c0, *weights), need, strict=True) if n]


# ---- With gradients --------------------------------------------------------------------------------------------------


class Stack(torch.autograd.Function):
    """The operators, differentiable twice: (*how, input, h0, c0, *weights) -> y, h_n, c_n, and what stands for what is
    kept.
    """

    @staticmethod
    def forward(cell, biases, layers, directions, time, input, h0, c0, *weights):
        """See `stack`."""
        return aten_stack(input, h0, c0, weights, cell, biases, layers, directions, time, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Save the inputs, and what stands for the rest."""
        ctx.how = inputs[:5]
        ctx.save_for_backward(*inputs[5:], output[3])
        ctx.mark_non_differentiable(output[3])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, d_y, d_h_n, d_c_n, _kept):
        """The gradients that are needed; differentiable themselves where a graph of the backward is made."""
        *given, kept = ctx.saved_tensors
        need, gradients = ctx.needs_input_grad[5:], (d_y, d_h_n, d_c_n if CELLS[ctx.how[0]].states else None)
        run = StackBackward.apply if torch.is_grad_enabled() else _gradients
        return *[None] * 5, *run(ctx.how, need, kept, *gradients, *given)


def _gradients(how, need, kept, d_y, d_h_n, d_c_n, input, h0, c0, *weights) -> tuple[Tensor | None, ...]:
    """Of input, h0, c0 and weights, None where not needed."""
    how = *how, kept, list(need)
    found = iter(aten_stack_backward(d_y, d_h_n, d_c_n, input, h0, c0, weights, *how))
    return tuple(next(found) if n else None for n in need)


class StackBackward(torch.autograd.Function):
    """`_gradients`, differentiable again: through the readable loop of reference.py, which is slow and right."""

    @staticmethod
    def forward(how, need, kept, d_y, d_h_n, d_c_n, input, h0, c0, *weights):
        """See `_gradients`."""
        return _gradients(how, need, kept, d_y, d_h_n, d_c_n, input, h0, c0, *weights)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Save gradients and inputs; the reference makes the rest again."""
        ctx.how, ctx.need, _, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *d_gradients):
        """Differentiate the gradients of the reference by everything they depend on."""
        tensors = ctx.saved_tensors
        run = lambda leaves: _by_layers(leaves, ctx.how, "reference")
        found = second_gradients(run, tensors[:3], tensors[3:], ctx.need, d_gradients)
        return None, None, None, *found
