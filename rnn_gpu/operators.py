"""The one door between torch and the kernels: opaque operators for the recurrence, and the autograd Function around
them.

A Function stands for one layer with all its directions. The recurrence alone is opaque; the products before and after
it are plain torch. T steps, B rows, I input features, N weight sets (directions), G gates, H hidden units, E slots a
unit (kernels/spec.py).
"""

import torch
from torch import Tensor

from . import backends, reference
from .kernels.spec import CELLS, padded


def _plan(cell: str, hidden_size: int, like: Tensor, batch: int, sets: int, backward: bool):
    found = backends.plan_for(
        cell, hidden_size, batch, sets, backends.name_of(like.dtype), backends.device_of(like.device), backward
    )
    if isinstance(found, str):
        raise RuntimeError(f"rnn_gpu: no plan for {cell}: {found}")
    return found


def _aux_shape(cell: str, time: int, batch: int, sets: int, hidden_size: int, dtype: torch.dtype, save: bool) -> tuple:
    if not save or CELLS[cell].aux == "y":
        return (0,), dtype
    shape = time, batch, sets, padded(hidden_size, backends.name_of(dtype))
    return shape, torch.float32 if CELLS[cell].aux == "c" else dtype


@torch.library.custom_op("rnn_gpu::recurrence", mutates_args=("x_part",))
def recurrence(
    x_part: Tensor,
    weight_hh: Tensor,
    bias_hn: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    cell: str,
    reversed_sets: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence forward, for all steps and sets.

    x_part [T, B, N, G*H]: the input's part of the gates with every bias but bias_hn; becomes the gates if `save`.
    weight_hh [N, G*H, H]; bias_hn [N, H] (GRU: hidden bias of n) or None; h0 [N, B, H]; c0 [N, B, H] (LSTM) or None.
    reversed_sets: 0 no set runs backwards in time, 1 all, 2 every second one. save: the backward will follow.
    -> y [T, B, N, H]; c_n [N, B, H] float32, empty for cells without c; aux, what the backward needs besides.
    """
    from .kernels import launch

    hidden_size = weight_hh.shape[-1]
    plan = _plan(cell, hidden_size, x_part, x_part.shape[1], x_part.shape[2], backward=False)
    y, c_n, aux = launch.forward(plan, x_part, weight_hh, bias_hn, h0, c0, reversed_sets, save)
    return y, x_part.new_empty(0) if c_n is None else c_n, x_part.new_empty(0) if aux is None else aux


@recurrence.register_fake
def _(x_part, weight_hh, bias_hn, h0, c0, cell, reversed_sets, save):
    time, batch, sets, _ = x_part.shape
    hidden_size = weight_hh.shape[-1]
    size = padded(hidden_size, backends.name_of(x_part.dtype))
    y = x_part.new_empty((time + 2, batch, sets, size))[1:-1, ..., :hidden_size]
    c_n = x_part.new_empty(0)
    if CELLS[cell].carry == "c":
        c_n = x_part.new_empty((batch, sets, size), dtype=torch.float32)[..., :hidden_size].transpose(0, 1)
    shape, dtype = _aux_shape(cell, time, batch, sets, hidden_size, x_part.dtype, save)
    return y, c_n, x_part.new_empty(shape, dtype=dtype)


@torch.library.custom_op("rnn_gpu::recurrence_backward", mutates_args=())
def recurrence_backward(
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    weight_hh: Tensor,
    gates: Tensor,
    aux: Tensor,
    y: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    cell: str,
    reversed_sets: int,
) -> tuple[Tensor, Tensor]:
    """The recurrence backward, for all steps and sets.

    d_y [T, B, N, H], d_h_n and d_c_n [N, B, H]: gradients, None for zero. The rest as `recurrence` took and left it.
    -> d_gates [T, B, N, E, H]: gradients of the gate sums by slot; d_carry_0 [N, B, H] float32, empty for cells
    without a carry: LSTM the gradient of c0, GRU what of h0's gradient does not pass through the gates.
    """
    from .kernels import launch

    spec = CELLS[cell]
    plan = _plan(cell, weight_hh.shape[-1], y, y.shape[1], y.shape[2], backward=True)
    d_gates, d_carry_0 = launch.backward(
        plan, d_y, d_h_n, d_c_n, weight_hh, gates if spec.saves_gates else None, aux, y, h0, c0, reversed_sets
    )
    return d_gates, y.new_empty(0, dtype=torch.float32) if d_carry_0 is None else d_carry_0


@recurrence_backward.register_fake
def _(d_y, d_h_n, d_c_n, weight_hh, gates, aux, y, h0, c0, cell, reversed_sets):
    time, batch, sets, hidden_size = y.shape
    size = padded(hidden_size, backends.name_of(y.dtype))
    d_gates = y.new_empty((time + 2, batch, sets, CELLS[cell].slots, size))[1:-1, ..., :hidden_size]
    if CELLS[cell].carry is None:
        return d_gates, y.new_empty(0, dtype=torch.float32)
    return d_gates, y.new_empty((batch, sets, size), dtype=torch.float32)[..., :hidden_size].transpose(0, 1)


def runs_backwards(reversed_sets: int, n: int) -> bool:
    """Whether set n runs backwards in time."""
    return reversed_sets == 1 or (reversed_sets == 2 and n % 2 == 1)


class Layer(torch.autograd.Function):
    """One layer, all directions: (input, weights, biases, states) -> (y, h_n, c_n), and what the backward needs.

    input [T, B, I]; weight_ih [N, G*H, I]; weight_hh [N, G*H, H]; bias_ih, bias_hh [N, G*H] or None; h0 [N, B, H];
    c0 [N, B, H] or None. -> y [T, B, N, H], h_n [N, B, H], c_n [N, B, H] (empty for cells without c), gates
    [T, B, N, G*H] and aux, which are not differentiable.
    """

    @staticmethod
    def forward(input, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, cell, reversed_sets, save):
        """The input product, then the recurrence."""
        sets, rows, input_size = weight_ih.shape
        time, batch, _ = input.shape
        bias, bias_hn = None, None
        if bias_ih is not None:
            bias = bias_ih + bias_hh
            if cell == "gru":  # the hidden bias of n stands inside the product with r
                n_gate = slice(2 * weight_hh.shape[-1], None)
                bias_hn = bias_hh[:, n_gate]
                bias[:, n_gate] = bias_ih[:, n_gate]
            bias = bias.flatten()
        gates = torch.nn.functional.linear(input, weight_ih.reshape(sets * rows, input_size), bias)
        gates = gates.view(time, batch, sets, rows)
        y, c_n, aux = recurrence(gates, weight_hh, bias_hn, h0, c0, cell, reversed_sets, save)
        if not (save and CELLS[cell].saves_gates):
            gates = gates.new_empty(0)
        ends = [y[0 if runs_backwards(reversed_sets, n) else -1, :, n] for n in range(sets)]
        return y, torch.stack(ends), c_n.to(y.dtype), gates, aux

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Save what the backward needs."""
        *tensors, ctx.cell, ctx.reversed_sets, _ = inputs
        y, _, _, gates, aux = output
        ctx.save_for_backward(*tensors, y, gates, aux)
        ctx.mark_non_differentiable(gates, aux)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, d_y, d_h_n, d_c_n, _gates, _aux):
        """The gradients that are needed; differentiable themselves where a graph of the backward is made."""
        gradients = LayerBackward.apply if torch.is_grad_enabled() else layer_gradients
        need = ctx.needs_input_grad[: len(LAYER_INPUTS)]
        found = gradients(d_y, d_h_n, d_c_n, *ctx.saved_tensors, ctx.cell, ctx.reversed_sets, need)
        return *found, None, None, None


LAYER_INPUTS = (
    "input",
    "weight_ih",
    "weight_hh",
    "bias_ih",
    "bias_hh",
    "h0",
    "c0",
)  # the tensors of Layer.forward, in order


def layer_gradients(
    d_y, d_h_n, d_c_n, input, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, y, gates, aux, name, reversed_sets, need
) -> tuple[Tensor | None, ...]:
    """The gradients of LAYER_INPUTS, None where not needed: the recurrence backwards, then products with its gate
    gradients.
    """
    cell, need = CELLS[name], dict(zip(LAYER_INPUTS, need, strict=True))
    d_gates, d_carry_0 = recurrence_backward(d_y, d_h_n, d_c_n, weight_hh, gates, aux, y, h0, c0, name, reversed_sets)
    sets, rows, _ = weight_hh.shape
    by_gate = [
        cell.slot_order.index(gate) for gate in range(cell.gates)
    ]  # where each gate stands among the hidden slots
    d_input = None
    collected = {name: [] for name in LAYER_INPUTS}
    for n in range(sets):
        slots = d_gates[:, :, n].flatten(2)  # [T, B, E*H]; a copy only where H is padded
        hidden, inner = slots[..., :rows], slots[..., slots.shape[-1] - rows :].flatten(0, 1)
        backwards = runs_backwards(reversed_sets, n)
        first = hidden[-1 if backwards else 0]
        if need["input"]:
            d_input = inner @ weight_ih[n] if n == 0 else torch.addmm(d_input, inner, weight_ih[n])
        if need["weight_ih"]:
            collected["weight_ih"].append(inner.t() @ input.flatten(0, 1))
        if need["weight_hh"]:
            later, before = (hidden[:-1], y[1:, :, n]) if backwards else (hidden[1:], y[:-1, :, n])
            product = torch.addmm(first.t() @ h0[n], later.flatten(0, 1).t(), before.flatten(0, 1))
            collected["weight_hh"].append(_reordered(product, by_gate))
        if need["bias_ih"]:
            collected["bias_ih"].append(inner.sum(0))
        if need["bias_hh"]:
            collected["bias_hh"].append(_reordered(hidden.flatten(0, 1).sum(0), by_gate))
        if need["h0"]:
            collected["h0"].append(first @ _reordered(weight_hh[n], cell.slot_order))
    found = {name: torch.stack(parts) if parts else None for name, parts in collected.items()}
    if need["input"]:
        found["input"] = d_input.view_as(input)
    if need["h0"] and cell.carry == "h":
        found["h0"] = (found["h0"] + d_carry_0).to(h0.dtype)
    if need["c0"] and cell.carry == "c":
        found["c0"] = d_carry_0.to(c0.dtype)
    return tuple(found.values())


class LayerBackward(torch.autograd.Function):
    """`layer_gradients`, differentiable again: through the readable loop of reference.py, which is slow and right."""

    @staticmethod
    def forward(*arguments):
        """See `layer_gradients`."""
        return layer_gradients(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Save gradients and inputs; the reference makes the rest again."""
        *tensors, ctx.cell, ctx.reversed_sets, ctx.need = inputs
        ctx.save_for_backward(*tensors[: 3 + len(LAYER_INPUTS)])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *d_gradients):
        """Differentiate the gradients of the reference by everything they depend on."""
        with torch.enable_grad():
            leaves = [None if t is None else _alias(t) for t in ctx.saved_tensors]
            d_outputs, inputs = leaves[:3], leaves[3:]
            outputs = _reference_layer(inputs, ctx.cell, ctx.reversed_sets)
            pairs = [(out, d) for out, d in zip(outputs, d_outputs, strict=True) if d is not None]
            wanted = [t for t, need in zip(inputs, ctx.need, strict=True) if need]
            first = torch.autograd.grad(
                [out for out, _ in pairs], wanted, [d for _, d in pairs], create_graph=True, allow_unused=True
            )
            second = [d for d, need in zip(d_gradients, ctx.need, strict=True) if need]
            pairs = [(g, d.float()) for g, d in zip(first, second, strict=True) if g is not None and d is not None]
            again = torch.autograd.grad(
                [g for g, _ in pairs],
                [t for t in leaves if t is not None],
                [d for _, d in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        found = iter(again)
        found = [None if t is None else next(found) for t in leaves]
        found = [None if g is None else g.to(t.dtype) for g, t in zip(found, ctx.saved_tensors, strict=True)]
        return *found, *[None] * 6


def _alias(tensor: Tensor) -> Tensor:
    """The tensor in float32 under a name of its own: differentiating by it stops here, though it may depend on
    another leaf.
    """
    if not tensor.requires_grad:
        return tensor.detach().float().requires_grad_()
    return tensor.float() if tensor.dtype != torch.float32 else tensor.view_as(tensor)


def _reference_layer(inputs, cell: str, reversed_sets: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Outputs y [T, B, N, H], h_n and c_n [N, B, H] of `Layer`, by the loop of reference.py."""
    input, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0 = inputs
    results = [
        reference.layer(
            cell,
            input,
            weight_ih[n],
            weight_hh[n],
            None if bias_ih is None else bias_ih[n],
            None if bias_hh is None else bias_hh[n],
            h0[n],
            None if c0 is None else c0[n],
            reverse=runs_backwards(reversed_sets, n),
        )
        for n in range(weight_ih.shape[0])
    ]
    y, h_n, c_n = zip(*results, strict=True)
    return torch.stack(y, 2), torch.stack(h_n), None if c0 is None else torch.stack(c_n)


def _reordered(rows: Tensor, order) -> Tensor:
    """Rows [G*H, ...] with their G parts in another order; as they are where it is the same."""
    if list(order) == sorted(order):
        return rows
    parts = rows.chunk(len(order))
    return torch.cat([parts[position] for position in order])
