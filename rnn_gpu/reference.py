"""The oracle: every recurrence as a plain loop over time, which all other code is compared with.

Written to be read. Any floating dtype (the tests use float64), any device, torch alone. Nothing is written
in place and no branch depends on data, so autograd differentiates the forward any number of times and
torch.func transforms it; the library's second derivatives and forward mode run the loop forward (`recurrence`).
What is derived by hand (`STEPS_BACKWARD`, `recurrence_backward`, `weight_gradients`) and what is there to compare with
(`previous_states`, `layer`) serves documentation and tests alone: the kernels' backward has the same equations.

Glossary, for every shape in this file:

    T  time steps                 B  batch rows
    I  input size                 H  hidden size
    G  gates of the cell: LSTM 4 (i, f, g, o), GRU 3 (r, z, n), RNN 1
    N  weight sets (directions); every function here serves one, so N appears in no shape

Cells by name: "lstm", "gru", "rnn_tanh", "rnn_relu". Gates lie side by side in the last dimension, in the
order above, as in torch.nn's weights; taken apart they are a tuple of G tensors [B, H].

The carry is what a unit keeps for itself from step to step, beside the h that all units read: c for the LSTM,
its own h for the GRU. The RNN keeps nothing; its carry is h, and is not read.

Order of the file: the equations of one step, forward and backward; the loops over time.

Source of the forward equations: the documentation of torch.nn.LSTM, torch.nn.GRU and torch.nn.RNN, in
whose notation they are written (* is the element-wise product). The backward equations are the chain rule
applied to them, where d_v means the derivative of the loss by v.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}

Gates = tuple[Tensor, ...]


# ---- Equations: one step forward -----------------------------------------------------------------
#
# step(x_gates, h_gates, carry) -> (h, carry, saved)
#
#   x_gates  G of [B, H]  input side of the gate sums: W_ih x_t + b_ih, and what of b_hh may be added to it
#   h_gates  G of [B, H]  hidden side: W_hh h_(t-1), for the GRU's n gate with b_hn
#   carry    [B, H]       of step t-1; the one returned is of step t
#   h        [B, H]       h_t
#   saved    of [B, H]    what the step backward needs


def lstm_step(x_gates: Gates, h_gates: Gates, carry: Tensor) -> tuple[Tensor, Tensor, Gates]:
    """One step of the LSTM; carry is c, saved is (i, f, g, o). All [B, H], one floating dtype.

    i_t = sigmoid(W_ii x_t + b_ii + W_hi h_(t-1) + b_hi)
    f_t = sigmoid(W_if x_t + b_if + W_hf h_(t-1) + b_hf)
    g_t = tanh(W_ig x_t + b_ig + W_hg h_(t-1) + b_hg)
    o_t = sigmoid(W_io x_t + b_io + W_ho h_(t-1) + b_ho)
    c_t = f_t * c_(t-1) + i_t * g_t
    h_t = o_t * tanh(c_t)                                                  (torch.nn.LSTM)
    """
    i = torch.sigmoid(x_gates[0] + h_gates[0])
    f = torch.sigmoid(x_gates[1] + h_gates[1])
    g = torch.tanh(x_gates[2] + h_gates[2])
    o = torch.sigmoid(x_gates[3] + h_gates[3])
    c = f * carry + i * g
    return o * torch.tanh(c), c, (i, f, g, o)


def gru_step(x_gates: Gates, h_gates: Gates, carry: Tensor) -> tuple[Tensor, Tensor, Gates]:
    """One step of the GRU; carry is h, saved is (r, z, n, q). All [B, H], one floating dtype.

    r_t = sigmoid(W_ir x_t + b_ir + W_hr h_(t-1) + b_hr)
    z_t = sigmoid(W_iz x_t + b_iz + W_hz h_(t-1) + b_hz)
    q_t = W_hn h_(t-1) + b_hn
    n_t = tanh(W_in x_t + b_in + r_t * q_t)
    h_t = (1 - z_t) * n_t + z_t * h_(t-1)                                  (torch.nn.GRU, q_t named here)
    """
    r = torch.sigmoid(x_gates[0] + h_gates[0])
    z = torch.sigmoid(x_gates[1] + h_gates[1])
    q = h_gates[2]
    n = torch.tanh(x_gates[2] + r * q)
    h = (1 - z) * n + z * carry
    return h, h, (r, z, n, q)


def rnn_tanh_step(x_gates: Gates, h_gates: Gates, carry: Tensor) -> tuple[Tensor, Tensor, Gates]:
    """One step of the RNN with tanh; carry is not read, saved is (h,). All [B, H], one floating dtype.

    h_t = tanh(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh)                      (torch.nn.RNN)
    """
    h = torch.tanh(x_gates[0] + h_gates[0])
    return h, h, (h,)


def rnn_relu_step(x_gates: Gates, h_gates: Gates, carry: Tensor) -> tuple[Tensor, Tensor, Gates]:
    """One step of the RNN with ReLU; carry is not read, saved is (h,). All [B, H], one floating dtype.

    h_t = relu(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh)                      (torch.nn.RNN)
    """
    h = torch.relu(x_gates[0] + h_gates[0])
    return h, h, (h,)


STEPS = {"lstm": lstm_step, "gru": gru_step, "rnn_tanh": rnn_tanh_step, "rnn_relu": rnn_relu_step}


# ---- Equations: one step backward ----------------------------------------------------------------
#
# step_backward(d_h, d_carry, saved, carry_before, carry_after) -> (d_hidden, d_input, d_carry_before)
#
#   d_h             [B, H]       by h_t: of the output, and through W_hh of the step after
#   d_carry         [B, H]       by the carry of step t, from the step after
#   saved           of [B, H]    what the step forward saved
#   carry_before    [B, H]       carry of step t-1
#   carry_after     [B, H]       carry of step t
#   d_hidden        G of [B, H]  by h_gates
#   d_input         G of [B, H]  by x_gates
#   d_carry_before  [B, H]       by the carry of step t-1, without the way through W_hh
#
# sigmoid' = s (1 - s) and tanh' = 1 - t^2, in the value of the function.


def lstm_step_backward(
    d_h: Tensor, d_carry: Tensor, saved: Gates, carry_before: Tensor, carry_after: Tensor
) -> tuple[Gates, Gates, Tensor]:
    """One step of the LSTM backwards; the carry is c. d_i .. d_o are by the gate sums. All [B, H].

    d_o = d_h * tanh(c_t) * o_t (1 - o_t)
    d_c_t = d_carry + d_h * o_t * (1 - tanh(c_t)^2)
    d_i = d_c_t * g_t * i_t (1 - i_t)
    d_f = d_c_t * c_(t-1) * f_t (1 - f_t)
    d_g = d_c_t * i_t * (1 - g_t^2)
    d_c_(t-1) = d_c_t * f_t                                                (chain rule on lstm_step)

    Both sides of the gate sums have the same gradient: d_hidden is d_input.
    """
    i, f, g, o = saved
    tanh_c = torch.tanh(carry_after)
    d_o = d_h * tanh_c * o * (1 - o)
    d_c = d_carry + d_h * o * (1 - tanh_c * tanh_c)
    d_i = d_c * g * i * (1 - i)
    d_f = d_c * carry_before * f * (1 - f)
    d_g = d_c * i * (1 - g * g)
    d_gates = (d_i, d_f, d_g, d_o)
    return d_gates, d_gates, d_c * f


def gru_step_backward(
    d_h: Tensor, d_carry: Tensor, saved: Gates, carry_before: Tensor, carry_after: Tensor
) -> tuple[Gates, Gates, Tensor]:
    """One step of the GRU backwards; the carry is h, so d_h and d_carry are by the same value. All [B, H].

    d_h_t = d_h + d_carry
    d_z = d_h_t * (h_(t-1) - n_t) * z_t (1 - z_t)
    d_n = d_h_t * (1 - z_t) * (1 - n_t^2)
    d_q = r_t * d_n
    d_r = d_n * q_t * r_t (1 - r_t)
    d_h_(t-1) = d_h_t * z_t                                                (chain rule on gru_step)

    The n gate has two gradients: d_n on the input side, d_q on the hidden side, where r_t stands in between.
    """
    r, z, n, q = saved
    d_h = d_h + d_carry
    d_z = d_h * (carry_before - n) * z * (1 - z)
    d_n = d_h * (1 - z) * (1 - n * n)
    d_r = d_n * q * r * (1 - r)
    return (d_r, d_z, r * d_n), (d_r, d_z, d_n), d_h * z


def rnn_tanh_step_backward(
    d_h: Tensor, d_carry: Tensor, saved: Gates, carry_before: Tensor, carry_after: Tensor
) -> tuple[Gates, Gates, Tensor]:
    """One step of the RNN with tanh backwards; no carry was read, so its gradient is zero. All [B, H].

    d_a = d_h * (1 - h_t^2), where h_t = tanh(a)                           (chain rule on rnn_tanh_step)
    """
    (h,) = saved
    d_gates = (d_h * (1 - h * h),)
    return d_gates, d_gates, torch.zeros_like(d_carry)


def rnn_relu_step_backward(
    d_h: Tensor, d_carry: Tensor, saved: Gates, carry_before: Tensor, carry_after: Tensor
) -> tuple[Gates, Gates, Tensor]:
    """One step of the RNN with ReLU backwards; no carry was read, so its gradient is zero. All [B, H].

    d_a = 0 if h_t <= 0 else d_h, where h_t = relu(a)                      (chain rule on rnn_relu_step)

    Asking for h_t <= 0, as PyTorch does, lets the gradient through where h_t is NaN.
    """
    (h,) = saved
    d_gates = (torch.where(h <= 0, 0, d_h),)
    return d_gates, d_gates, torch.zeros_like(d_carry)


STEPS_BACKWARD = {
    "lstm": lstm_step_backward,
    "gru": gru_step_backward,
    "rnn_tanh": rnn_tanh_step_backward,
    "rnn_relu": rnn_relu_step_backward,
}


# ---- What the loops share ------------------------------------------------------------------------


def time_order(steps: int, reverse: bool) -> range:
    """Indices of time in the direction of flow."""
    return range(steps - 1, -1, -1) if reverse else range(steps)


def hidden_gates(cell: str, h: Tensor, weight_hh: Tensor, bias_hn: Tensor | None) -> Gates:
    """Hidden side of the gate sums: W_hh h, and b_hn on the n gate of the GRU.

    h [B, H], weight_hh [G*H, H], bias_hn [H] or None -> G of [B, H].
    """
    gates = (h @ weight_hh.T).chunk(GATES[cell], dim=-1)
    if bias_hn is not None:
        gates = (*gates[:2], gates[2] + bias_hn)
    return gates


def previous_states(y: Tensor, h0: Tensor, reverse: bool = False) -> Tensor:
    """The h each step started from: y one step later in the direction of flow, h0 for the first.

    y [T, B, H], h0 [B, H] -> h_prev [T, B, H], in the order of time. Without lengths and resets.
    """
    return torch.cat([y[1:], h0[None]]) if reverse else torch.cat([h0[None], y[:-1]])


def fold_biases(cell: str, bias_ih: Tensor | None, bias_hh: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Split a layer's biases into what x_part takes and what must stay on the hidden side.

    bias_ih, bias_hh [G*H] or None -> bias of x_part [G*H] or None, bias_hn [H] or None.
    Only the GRU's n gate keeps its hidden bias apart, because r multiplies it.
    """
    bias_hn = None
    if cell == "gru" and bias_hh is not None:
        bias_hr, bias_hz, bias_hn = bias_hh.chunk(3)
        bias_hh = torch.cat([bias_hr, bias_hz, torch.zeros_like(bias_hn)])
    if bias_ih is None or bias_hh is None:
        return (bias_hh if bias_ih is None else bias_ih), bias_hn
    return bias_ih + bias_hh, bias_hn


def active_steps(lengths: Tensor, steps: int) -> Tensor:
    """lengths, int [B] -> bool [T, B], true within each row's sequence. Lengths act as if clamped to 0..T."""
    return torch.arange(steps, device=lengths.device)[:, None] < lengths


def choose(mask: Tensor | None, t: int, new: Tensor, old: Tensor | float) -> Tensor:
    """new [B, H] in the rows where mask [T, B] is true at t, else old; new in all rows if mask is None."""
    return new if mask is None else torch.where(mask[t].unsqueeze(-1), new, old)


def check_arguments(cell: str, bias_hn: Tensor | None, c0: Tensor | None) -> None:
    """Refuse what would otherwise be ignored: an oracle answers no other question than the one asked."""
    if cell not in GATES:
        raise ValueError(f"unknown cell {cell!r}, expected one of {', '.join(GATES)}")
    if (c0 is not None) != (cell == "lstm"):
        raise ValueError(f"c0 is for the lstm, which needs it; got cell {cell!r} and c0 {type(c0).__name__}")
    if bias_hn is not None and cell != "gru":
        raise ValueError(f"bias_hn is for the gru; got cell {cell!r}")


# ---- Loops over time: forward --------------------------------------------------------------------


def recurrence(
    cell: str,
    x_part: Tensor,
    weight_hh: Tensor,
    bias_hn: Tensor | None,
    h0: Tensor,
    c0: Tensor | None = None,
    reverse: bool = False,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    see: Callable[[int, Tensor], Tensor] | None = None,
    cells: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sequential part of one layer and direction: everything that needs the h of the step before.

    x_part     [T, B, G*H]  input product and every bias but the GRU's b_hn; T >= 1
    weight_hh  [G*H, H]
    bias_hn    [H]          hidden bias of the GRU's n gate; None for zeros, and for other cells
    h0         [B, H]
    c0         [B, H]       LSTM only, None for other cells
    reverse    time flows from T-1 to 0; y stays in the order of time
    lengths    int [B]      steps of each row. Past its end a row keeps its state and shows zeros in y, and
                            x_part there never matters, NaN included; reverse starts at the row's end
    resets     bool [T, B]  where true, h and c of the row are zeroed before step t, in the direction of
                            flow; past the row's end they do nothing
    see                     a function of t and h_t [B, H], called in the direction of flow, that gives what goes on
                            in place of h_t: a projection of it [B, P] (h0 and weight_hh have P, then), or itself
    cells                   a list that c of every step is appended to, as one tensor [T, B, H], zeros past a row's end

    Returns y [T, B, H], h_n [B, H], and c_n [B, H] for the LSTM, else None. One floating dtype throughout.
    """
    check_arguments(cell, bias_hn, c0)
    steps = x_part.shape[0]
    active = kept = None
    if lengths is not None:
        active = active_steps(lengths, steps)
        x_part = torch.where(active.unsqueeze(-1), x_part, 0)  # 0 * NaN would reach the gradients
    if resets is not None:
        kept = ~resets
    h, carry = h0, h0 if c0 is None else c0
    y: dict[int, Tensor] = {}
    c: dict[int, Tensor] = {}
    for t in time_order(steps, reverse):
        # Where nothing depends on a state, nothing may reach it either: 0 * NaN would.
        h_start, carry_start = (choose(active, t, choose(kept, t, state, 0), 0) for state in (h, carry))
        x_gates = x_part[t].chunk(GATES[cell], dim=-1)
        h_gates = hidden_gates(cell, h_start, weight_hh, bias_hn)
        h_new, carry_new, _ = STEPS[cell](x_gates, h_gates, carry_start)
        if see is not None:
            seen = see(t, h_new)
            h_new, carry_new = seen, (seen if carry_new is h_new else carry_new)
        y[t], c[t] = choose(active, t, h_new, 0), choose(active, t, carry_new, 0)
        h, carry = choose(active, t, h_new, h), choose(active, t, carry_new, carry)
    if cells is not None:
        cells.append(torch.stack([c[t] for t in range(steps)]))
    return torch.stack([y[t] for t in range(steps)]), h, (carry if cell == "lstm" else None)


def layer(
    cell: str,
    input: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor | None = None,
    reverse: bool = False,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer and direction of torch.nn.LSTM, GRU or RNN: the input product, then the recurrence.

    input             [T, B, I]
    weight_ih         [G*H, I]
    weight_hh         [G*H, H]
    bias_ih, bias_hh  [G*H] or None
    the rest          as in `recurrence`

    Returns y [T, B, H], h_n [B, H], and c_n [B, H] for the LSTM, else None. One floating dtype throughout.
    """
    if lengths is not None:  # else NaN in the padding would reach the gradient of weight_ih
        input = torch.where(active_steps(lengths, input.shape[0]).unsqueeze(-1), input, 0)
    bias, bias_hn = fold_biases(cell, bias_ih, bias_hh)
    x_part = input @ weight_ih.T
    if bias is not None:
        x_part = x_part + bias
    return recurrence(cell, x_part, weight_hh, bias_hn, h0, c0, reverse, lengths=lengths, resets=resets)


# ---- Loops over time: backward, derived by hand --------------------------------------------------


def recurrence_backward(
    cell: str,
    x_part: Tensor,
    weight_hh: Tensor,
    bias_hn: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    y: Tensor,
    d_y: Tensor,
    d_h_n: Tensor,
    d_c_n: Tensor | None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Backward of `recurrence`, as the kernels do it: rebuild gates and carries, then go backwards in time.

    x_part, weight_hh, bias_hn, h0, c0, reverse as in `recurrence`; y [T, B, H] its result;
    d_y [T, B, H], d_h_n [B, H] and, for the LSTM, d_c_n [B, H] (else None) the gradients of its results.

    d_h at step t is d_y[t] plus d_hidden @ weight_hh of the step after; for the last step this product is
    d_h_n. The product alone needs other units, the rest of a step is element-wise. No lengths, no resets.

    Returns
    d_hidden  [T, B, G*H]  by the hidden side of the gate sums; for the GRU d_r, d_z, r * d_n
    d_input   [T, B, G*H]  by the input side, so by x_part; for the GRU d_r, d_z, d_n; else equal to d_hidden
    d_h0      [B, H]
    d_c0      [B, H]       for the LSTM, else None

    `weight_gradients` makes the gradients of the weights of d_hidden and d_input.
    """
    check_arguments(cell, bias_hn, c0)
    order = time_order(x_part.shape[0], reverse)
    h_prev = previous_states(y, h0, reverse)

    saved: dict[int, Gates] = {}
    carry_before: dict[int, Tensor] = {}
    carry_after: dict[int, Tensor] = {}
    carry = h0 if c0 is None else c0
    for t in order:
        carry_before[t] = carry
        x_gates = x_part[t].chunk(GATES[cell], dim=-1)
        h_gates = hidden_gates(cell, h_prev[t], weight_hh, bias_hn)
        _, carry, saved[t] = STEPS[cell](x_gates, h_gates, carry)
        carry_after[t] = carry

    d_hidden: dict[int, Tensor] = {}
    d_input: dict[int, Tensor] = {}
    d_h, d_carry = d_h_n, torch.zeros_like(d_h_n) if d_c_n is None else d_c_n
    for t in reversed(order):
        d_h_gates, d_x_gates, d_carry = STEPS_BACKWARD[cell](
            d_y[t] + d_h, d_carry, saved[t], carry_before[t], carry_after[t]
        )
        d_hidden[t], d_input[t] = torch.cat(d_h_gates, dim=-1), torch.cat(d_x_gates, dim=-1)
        d_h = d_hidden[t] @ weight_hh

    # d_h came through weight_hh alone. The carry began as c0 in the LSTM, as h0 in all other cells.
    d_h0, d_c0 = (d_h, d_carry) if cell == "lstm" else (d_h + d_carry, None)
    times = range(x_part.shape[0])
    return torch.stack([d_hidden[t] for t in times]), torch.stack([d_input[t] for t in times]), d_h0, d_c0


class WeightGradients(NamedTuple):
    """Gradients of a layer's parameters; bias_hn, the n part of bias_hh, is None but for the GRU."""

    weight_ih: Tensor  # [G*H, I]
    weight_hh: Tensor  # [G*H, H]
    bias_ih: Tensor  # [G*H]
    bias_hh: Tensor  # [G*H]
    bias_hn: Tensor | None  # [H]


def weight_gradients(cell: str, d_hidden: Tensor, d_input: Tensor, h_prev: Tensor, input: Tensor) -> WeightGradients:
    """Gradients of a layer's parameters from those of its gate sums: products outside the loop over time.

    d_hidden, d_input [T, B, G*H] of `recurrence_backward`; h_prev [T, B, H] of `previous_states`;
    input [T, B, I].

    d_weight_ih = sum_t d_input[t].T @ input[t]        d_bias_ih = sum_tb d_input
    d_weight_hh = sum_t d_hidden[t].T @ h_prev[t]      d_bias_hh = sum_tb d_hidden, its n part is d_bias_hn

    The gradient of the input is d_input @ weight_ih.
    """
    d_hidden, d_input = d_hidden.flatten(0, 1), d_input.flatten(0, 1)
    d_bias_hh = d_hidden.sum(0)
    return WeightGradients(
        weight_ih=d_input.T @ input.flatten(0, 1),
        weight_hh=d_hidden.T @ h_prev.flatten(0, 1),
        bias_ih=d_input.sum(0),
        bias_hh=d_bias_hh,
        bias_hn=d_bias_hh.chunk(3)[2] if cell == "gru" else None,
    )
