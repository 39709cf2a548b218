"""The one door between torch and the kernels: opaque operators for the recurrence, and the autograd Function around them.

A Function stands for one layer with all its directions. The recurrence alone is opaque; the products before and after it are plain torch.
T steps, B rows, I input features, N weight sets (directions), G gates, H hidden units, E slots a unit (kernels/spec.py).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends
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
    -> d_gates [T, B, N, E, H]: gradients of the gate sums by slot; d_carry_0 [N, B, H] float32, empty for cells without a
    carry: LSTM the gradient of c0, GRU what of h0's gradient does not pass through the gates.
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
    """One layer, all directions: (input, weights, biases, h0, c0) -> (y, h_n, c_n), and what the backward needs.

    input [T, B, I]; weight_ih [N, G*H, I]; weight_hh [N, G*H, H]; bias_ih, bias_hh [N, G*H] or None; h0 [N, B, H]; c0 [N, B, H] or None.
    -> y [T, B, N, H], h_n [N, B, H], c_n [N, B, H] (empty for cells without c), gates [T, B, N, G*H] and aux, not differentiable.
    """

    @staticmethod
    def forward(input, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, cell, reversed_sets, save):
        """The input product, then the recurrence."""
        sets, rows, input_size = weight_ih.shape
        time, batch, _ = input.shape
        hidden_size = weight_hh.shape[-1]
        bias, bias_hn = None, None
        if bias_ih is not None:
            bias = bias_ih + bias_hh
            if cell == "gru":  # n's hidden bias stands inside the product with r
                bias_hn = bias_hh[:, 2 * hidden_size :]
                bias[:, 2 * hidden_size :] = bias_ih[:, 2 * hidden_size :]
            bias = bias.flatten()
        x_part = torch.nn.functional.linear(input, weight_ih.reshape(sets * rows, input_size), bias)
        gates = x_part.view(time, batch, sets, rows)
        y, c_n, aux = recurrence(gates, weight_hh, bias_hn, h0, c0, cell, reversed_sets, save)
        ends = [y[0 if runs_backwards(reversed_sets, n) else -1, :, n] for n in range(sets)]
        return y, torch.stack(ends), c_n.to(y.dtype), gates, aux

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Save what the backward needs."""
        input, weight_ih, weight_hh, bias_ih, _, h0, c0, ctx.cell, ctx.reversed_sets, _ = inputs
        y, _, _, gates, aux = output
        ctx.has_bias = bias_ih is not None
        ctx.save_for_backward(input, weight_ih, weight_hh, h0, c0, y, gates, aux)
        ctx.mark_non_differentiable(gates, aux)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, d_h_n, d_c_n, _gates, _aux):
        """The recurrence backwards, then the products with its gradients at the gate sums; none that is not needed."""
        input, weight_ih, weight_hh, h0, c0, y, gates, aux = ctx.saved_tensors
        need = dict(zip(("input", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "h0", "c0"), ctx.needs_input_grad, strict=False))
        cell = CELLS[ctx.cell]
        d_gates, d_carry_0 = recurrence_backward(
            d_y, d_h_n, d_c_n, weight_hh, gates, aux, y, h0, c0, ctx.cell, ctx.reversed_sets
        )
        sets, rows, hidden_size = weight_hh.shape
        gradient = dict.fromkeys(need)
        collected = {name: [] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "h0")}
        to_gates = torch.tensor(cell.slot_order).argsort().tolist()  # position of each gate among the hidden slots
        flat_input = input.flatten(0, 1)
        for n in range(sets):
            slots = d_gates[:, :, n].flatten(2)  # [T, B, E*H], no copy where H needs no padding
            hidden, inner = slots[..., :rows], slots[..., slots.shape[-1] - rows :]
            flat_inner = inner.flatten(0, 1)
            if need["input"]:
                part = flat_inner @ weight_ih[n] if n == 0 else torch.addmm(part, flat_inner, weight_ih[n])
                gradient["input"] = part.view_as(input)
            if need["weight_ih"]:
                collected["weight_ih"].append(flat_inner.t() @ flat_input)
            if ctx.has_bias and need["bias_ih"]:
                collected["bias_ih"].append(flat_inner.sum(0))
            backwards = runs_backwards(ctx.reversed_sets, n)
            first = hidden[-1 if backwards else 0]
            if need["weight_hh"]:
                later, before = (hidden[:-1], y[1:, :, n]) if backwards else (hidden[1:], y[:-1, :, n])
                product = torch.addmm(first.t() @ h0[n], later.flatten(0, 1).t(), before.flatten(0, 1))
                collected["weight_hh"].append(_by_gate(product, to_gates))
            if ctx.has_bias and need["bias_hh"]:
                collected["bias_hh"].append(_by_gate(hidden.flatten(0, 1).sum(0), to_gates))
            if need["h0"]:
                by_slot = _by_gate(weight_hh[n], cell.slot_order)
                collected["h0"].append(first @ by_slot)
        gradient |= {name: torch.stack(parts) for name, parts in collected.items() if parts}
        if need["h0"] and cell.carry == "h":
            gradient["h0"] = (gradient["h0"] + d_carry_0).to(h0.dtype)
        if need["c0"] and cell.carry == "c":
            gradient["c0"] = d_carry_0.to(c0.dtype)
        return *gradient.values(), None, None, None


def _by_gate(rows: Tensor, order) -> Tensor:
    """Rows [G*H, ...] with their G parts in another order; as they are where it is the same."""
    if list(order) == sorted(order):
        return rows
    parts = rows.chunk(len(order))
    return torch.cat([parts[position] for position in order])
