"""The oracle itself: right by finite differences, equal to torch.nn, and its hand-derived backward exact.

Everything is float64 on the CPU. What passes here is what kernels are compared with.
"""

import pytest
import torch
from torch import Tensor

from rnn_gpu import reference
from rnn_gpu.equations import BUILT_IN
from rnn_gpu.kernels.spec import CELLS
from tests.tolerances import assert_close_to_oracle, assert_same_mathematics, relative_error

every_cell = pytest.mark.parametrize("cell", BUILT_IN)
both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
seeded = pytest.mark.parametrize("seed", [0], ids="seed{}".format)


class Draw:
    """Random float64 tensors from one seed; small, because saturated gates lose digits in 1 - tanh^2."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 0.5, grad: bool = True) -> Tensor:
        values = scale * torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return values.requires_grad_(grad)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)


def recurrence_inputs(draw: Draw, cell: str, steps: int, batch: int, hidden_size: int) -> tuple[Tensor | None, ...]:
    """x_part, weight_hh, bias_hn, h0, c0; None where the cell has none."""
    gates = CELLS[cell].gates
    return (
        draw(steps, batch, gates * hidden_size),
        draw(gates * hidden_size, hidden_size, scale=hidden_size**-0.5),
        draw(hidden_size) if cell == "gru" else None,
        draw(batch, hidden_size),
        draw(batch, hidden_size) if cell == "lstm" else None,
    )


def present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def assert_all_same(actual, expected, names: str) -> None:
    """Compare two rows of tensors by name; None only where both have None."""
    for name, a, e in zip(names.split(), actual, expected, strict=True):
        assert (a is None) == (e is None), f"{name}: only one side has it"
        if e is not None:
            assert_same_mathematics(a, e, name)


def gradients(outputs, inputs, d_outputs) -> list[Tensor | None]:
    """Gradients by autograd for each input; None for inputs that are None."""
    found = iter(torch.autograd.grad(present(*outputs), present(*inputs), present(*d_outputs)))
    return [None if tensor is None else next(found) for tensor in inputs]


# ---- The loop is differentiable, and autograd's derivatives of it are right ----------------------


def differentiable_recurrence(cell: str, reverse: bool, inputs):
    """recurrence as a function of its present tensors, with its present results: what gradcheck wants."""

    def function(*tensors):
        given = iter(tensors)
        arguments = [None if tensor is None else next(given) for tensor in inputs]
        return tuple(present(*reference.recurrence(cell, *arguments, reverse)))

    return function, present(*inputs)


@every_cell
@both_directions
@seeded
def test_gradcheck(cell, reverse, seed):
    """Catches an equation autograd cannot follow (in place, detached), or a result that misses an input."""
    inputs = recurrence_inputs(Draw(seed), cell, steps=3, batch=2, hidden_size=3)
    assert torch.autograd.gradcheck(*differentiable_recurrence(cell, reverse, inputs))


@every_cell
@both_directions
@seeded
def test_gradgradcheck(cell, reverse, seed):
    """Catches a step that differentiates once only; the library's double backward runs this loop."""
    inputs = recurrence_inputs(Draw(seed), cell, steps=2, batch=2, hidden_size=2)
    assert torch.autograd.gradgradcheck(*differentiable_recurrence(cell, reverse, inputs))


@every_cell
@both_directions
@seeded
def test_function_transforms(cell, reverse, seed):
    """Catches in-place writes and branches on data, which vmap refuses, and state kept between calls."""
    draw = Draw(seed)
    members = [recurrence_inputs(draw, cell, steps=3, batch=2, hidden_size=2) for _ in range(2)]
    stacked = [None if tensors[0] is None else torch.stack(tensors).detach() for tensors in zip(*members, strict=True)]
    lengths, resets = torch.tensor([3, 1]), draw.integers(2, 3, 2).bool()

    def loss(x_part, weight_hh, bias_hn, h0, c0):
        results = reference.recurrence(
            cell, x_part, weight_hh, bias_hn, h0, c0, reverse, lengths=lengths, resets=resets
        )
        return sum(result.square().sum() for result in present(*results))

    in_dims = tuple(None if tensor is None else 0 for tensor in stacked)
    actual = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 3)), in_dims=in_dims)(*stacked)
    for index, inputs in enumerate(members):
        expected = torch.autograd.grad(loss(*inputs), [inputs[0], inputs[1], inputs[3]])
        assert_all_same([tensor[index] for tensor in actual], expected, "d_x_part d_weight_hh d_h0")
    assert all(tensor._version == 0 for inputs in members for tensor in present(*inputs))


# ---- The equations are torch.nn's ----------------------------------------------------------------


def torch_layer(cell: str, input_size: int, hidden_size: int, bias: bool, seed: int) -> torch.nn.Module:
    """The bidirectional torch.nn layer of this cell, float64, weights from the seed."""
    arguments = {"bias": bias, "bidirectional": True, "dtype": torch.float64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if cell == "lstm":
            return torch.nn.LSTM(input_size, hidden_size, **arguments)
        if cell == "gru":
            return torch.nn.GRU(input_size, hidden_size, **arguments)
        return torch.nn.RNN(input_size, hidden_size, nonlinearity=cell.removeprefix("rnn_"), **arguments)


def both_layers(cell: str, module: torch.nn.Module, input: Tensor, h0: Tensor, c0: Tensor | None, lengths=None):
    """What the bidirectional module returns, by two calls of reference.layer: output, h_n, c_n."""
    names = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    results = []
    for direction, suffix in enumerate(["", "_reverse"]):
        weights = [getattr(module, name + suffix, None) for name in names]
        states = [h0[direction], None if c0 is None else c0[direction]]
        results.append(reference.layer(cell, input, *weights, *states, reverse=direction == 1, lengths=lengths))
    ys, h_ns, c_ns = zip(*results, strict=True)
    return torch.cat(ys, dim=-1), torch.stack(h_ns), None if c0 is None else torch.stack(c_ns)


@every_cell
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@seeded
def test_equals_torch(cell, bias, seed):
    """Catches another order of gates, a misplaced bias, time run the wrong way; in results and gradients."""
    draw = Draw(seed)
    steps, batch, input_size, hidden_size = 5, 3, 4, 2
    module = torch_layer(cell, input_size, hidden_size, bias, seed)
    input, h0 = draw(steps, batch, input_size), draw(2, batch, hidden_size)
    c0 = draw(2, batch, hidden_size) if cell == "lstm" else None

    output, states = module(input, h0 if c0 is None else (h0, c0))
    expected = [output, *states] if cell == "lstm" else [output, states, None]
    actual = both_layers(cell, module, input, h0, c0)
    assert_all_same(actual, expected, "output h_n c_n")

    d_results = [None if result is None else draw(*result.shape, grad=False) for result in expected]
    parameters = dict(module.named_parameters())
    inputs = [input, h0, c0, *parameters.values()]
    assert_all_same(
        gradients(actual, inputs, d_results),
        gradients(expected, inputs, d_results),
        " ".join(["input", "h0", "c0", *parameters]),
    )


@every_cell
@seeded
def test_lengths_equal_packed_torch(cell, seed):
    """Catches a reading of lengths other than torch.nn's packed sequences, most of all in reverse."""
    draw = Draw(seed)
    steps, input_size, hidden_size, lengths = 5, 3, 2, torch.tensor([2, 5, 1, 4])
    module = torch_layer(cell, input_size, hidden_size, bias=True, seed=seed)
    input, h0 = draw(steps, len(lengths), input_size), draw(2, len(lengths), hidden_size)
    c0 = draw(2, len(lengths), hidden_size) if cell == "lstm" else None

    packed = torch.nn.utils.rnn.pack_padded_sequence(input, lengths, enforce_sorted=False)
    packed_output, states = module(packed, h0 if c0 is None else (h0, c0))
    output, _ = torch.nn.utils.rnn.pad_packed_sequence(packed_output)
    expected = [output, *states] if cell == "lstm" else [output, states, None]
    assert_all_same(both_layers(cell, module, input, h0, c0, lengths), expected, "output h_n c_n")


# ---- The backward derived by hand ----------------------------------------------------------------


@every_cell
@both_directions
@pytest.mark.parametrize("hidden_size", [1, 3, 7], ids="H{}".format)
@pytest.mark.parametrize("batch", [1, 2], ids="B{}".format)
@pytest.mark.parametrize("steps", [1, 2, 5], ids="T{}".format)
@seeded
def test_backward_equals_autograd(cell, reverse, hidden_size, batch, steps, seed):
    """Catches a wrong term in the backward equations, and what gets lost around them.

    Such as: the two sides of the GRU's n gate taken for one another, a state paired with the wrong step, the
    gradient of a final state dropped at either end of time.
    """
    draw = Draw(seed)
    gates, input_size = CELLS[cell].gates, 2
    _, weight_hh, _, h0, c0 = recurrence_inputs(draw, cell, steps, batch, hidden_size)
    input, weight_ih = draw(steps, batch, input_size), draw(gates * hidden_size, input_size)
    bias_ih, bias_hh = draw(gates * hidden_size), draw(gates * hidden_size)
    bias, bias_hn = reference.fold_biases(cell, bias_ih, bias_hh)
    x_part = input @ weight_ih.T + bias

    y, h_n, c_n = reference.recurrence(cell, x_part, weight_hh, bias_hn, h0, c0, reverse)
    d_y, d_h_n = draw(*y.shape, grad=False), draw(*h_n.shape, grad=False)
    d_c_n = draw(*c_n.shape, grad=False) if cell == "lstm" else None
    inputs = [x_part, h0, c0, input, weight_ih, weight_hh, bias_ih, bias_hh, bias_hn]
    expected = gradients([y, h_n, c_n], inputs, [d_y, d_h_n, d_c_n])

    with torch.no_grad():
        d_hidden, d_input, d_h0, d_c0 = reference.recurrence_backward(
            cell, x_part, weight_hh, bias_hn, h0, c0, y, d_y, d_h_n, d_c_n, reverse
        )
        h_prev = reference.previous_states(y, h0, reverse)
        by_step = [torch.einsum("tbg,tbk->gk", d, x) for d, x in ((d_input, input), (d_hidden, h_prev))]
        d_bias_ih, d_bias_hh = d_input.sum((0, 1)), d_hidden.sum((0, 1))
        d_bias_hn = d_bias_hh[-hidden_size:] if cell == "gru" else None
        actual = [d_input, d_h0, d_c0, d_input @ weight_ih, *by_step, d_bias_ih, d_bias_hh, d_bias_hn]
    names = "x_part h0 c0 input weight_ih weight_hh bias_ih bias_hh bias_hn"
    assert_all_same(actual, expected, names)
    assert cell == "gru" or torch.equal(d_hidden, d_input)


# ---- Lengths and resets --------------------------------------------------------------------------


@every_cell
@both_directions
@seeded
def test_lengths_equal_single_sequences(cell, reverse, seed):
    """Catches padding (NaN here) that leaks into results or gradients, and a wrong start or end of a row.

    Such as: a reverse direction that starts at T instead of the row's end, a row of length 0 that loses its
    state, a length past T that is taken at its word.
    """
    draw = Draw(seed)
    steps, input_size, hidden_size, lengths = 4, 2, 3, torch.tensor([2, 4, 0, 1, 7])
    batch, gates = len(lengths), CELLS[cell].gates
    _, weight_hh, _, h0, c0 = recurrence_inputs(draw, cell, steps, batch, hidden_size)
    weights = [
        draw(gates * hidden_size, input_size), weight_hh, draw(gates * hidden_size), draw(gates * hidden_size)
    ]  # fmt: skip
    past_end = torch.arange(steps)[:, None] >= lengths
    input = draw(steps, batch, input_size, grad=False).masked_fill(past_end[..., None], float("nan"))
    input.requires_grad_()

    actual = reference.layer(cell, input, *weights, h0, c0, reverse, lengths=lengths)
    y, h_n, c_n = (None if result is None else torch.zeros_like(result) for result in actual)
    for row, length in enumerate(lengths.clamp(max=steps).tolist()):
        one = slice(row, row + 1)
        row_h, row_c = h0[one], None if c0 is None else c0[one]
        if length:
            row_y, row_h, row_c = reference.layer(cell, input[:length, one], *weights, row_h, row_c, reverse)
            y = y.index_put((torch.arange(length), torch.tensor(row)), row_y[:, 0])
        h_n = h_n.index_put((torch.tensor([row]),), row_h)
        c_n = None if c_n is None else c_n.index_put((torch.tensor([row]),), row_c)
    assert_all_same(actual, [y, h_n, c_n], "y h_n c_n")

    d_results = [draw(*result.shape, grad=False) for result in present(*actual)]
    inputs = [input, *weights, h0, c0]
    assert_all_same(
        gradients(actual, inputs, d_results),
        gradients([y, h_n, c_n], inputs, d_results),
        "input weight_ih weight_hh bias_ih bias_hh h0 c0",
    )


@every_cell
@both_directions
@seeded
def test_resets_equal_cut_sequences(cell, reverse, seed):
    """Catches a reset a step late, one that goes by the order of time instead of flow, or spares c or h0."""
    draw = Draw(seed)
    steps, batch, hidden_size = 6, 3, 2
    x_part, weight_hh, bias_hn, h0, c0 = recurrence_inputs(draw, cell, steps, batch, hidden_size)
    resets = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1]], dtype=torch.bool)

    actual = reference.recurrence(cell, x_part, weight_hh, bias_hn, h0, c0, reverse, resets=resets)
    flow = list(reversed(range(steps))) if reverse else list(range(steps))
    rows = []
    for row in range(batch):
        one = slice(row, row + 1)
        h, c, y = h0[one], None if c0 is None else c0[one], {}
        for t in flow:  # one step at a time: a cut is nothing but zeros for the state
            if resets[t, row]:
                h, c = torch.zeros_like(h), None if c is None else torch.zeros_like(c)
            y[t], h, c = reference.recurrence(cell, x_part[t : t + 1, one], weight_hh, bias_hn, h, c)
        rows.append((torch.cat([y[t] for t in range(steps)]), h, c))
    ys, h_ns, c_ns = zip(*rows, strict=True)
    expected = [torch.cat(ys, dim=1), torch.cat(h_ns), torch.cat(c_ns) if cell == "lstm" else None]
    assert_all_same(actual, expected, "y h_n c_n")

    d_results = [draw(*result.shape, grad=False) for result in present(*actual)]
    inputs = [x_part, weight_hh, bias_hn, h0, c0]
    assert_all_same(
        gradients(actual, inputs, d_results),
        gradients(expected, inputs, d_results),
        "x_part weight_hh bias_hn h0 c0",
    )


@every_cell
@both_directions
@seeded
def test_resets_past_the_end_do_nothing(cell, reverse, seed):
    """Catches a reset in the padding that wipes a state to be kept: the final one, in reverse the first."""
    draw = Draw(seed)
    inputs = recurrence_inputs(draw, cell, steps=4, batch=3, hidden_size=2)
    lengths = torch.tensor([2, 4, 0])
    resets = torch.arange(4)[:, None] >= lengths
    expected = reference.recurrence(cell, *inputs, reverse, lengths=lengths)
    actual = reference.recurrence(cell, *inputs, reverse, lengths=lengths, resets=resets)
    assert_all_same(actual, expected, "y h_n c_n")


@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@seeded
def test_keeps_the_dtype(cell, dtype, seed):
    """Catches a mask or constant that promotes: in a low dtype the loop is a peer of the error rule."""
    draw = Draw(seed)
    lengths, resets = torch.tensor([2, 3], dtype=torch.int32), draw.integers(2, 3, 2).bool()
    inputs = [None if x is None else x.to(dtype) for x in recurrence_inputs(draw, cell, 3, 2, 4)]
    x_part, weight_hh, bias_hn, h0, c0 = inputs
    masked = reference.recurrence(cell, *inputs, lengths=lengths, resets=resets)
    y, h_n, c_n = reference.recurrence(cell, *inputs)
    backward = reference.recurrence_backward(cell, x_part, weight_hh, bias_hn, h0, c0, y, y, h_n, c_n)
    assert {result.dtype for result in present(*masked, y, h_n, c_n, *backward)} == {dtype}


@every_cell
@both_directions
@seeded
def test_padding_of_x_part_never_matters(cell, reverse, seed):
    """Catches NaN in the padding of x_part that reaches a gradient as 0 * NaN, or a result."""
    draw = Draw(seed)
    _, *others = recurrence_inputs(draw, cell, steps=3, batch=2, hidden_size=2)
    lengths = torch.tensor([1, 3])
    x_part = draw(3, 2, CELLS[cell].gates * 2, grad=False)
    x_part[1:, 0] = float("nan")
    rows = []
    for padding in (float("nan"), 0.0):
        inputs = [x_part.nan_to_num(nan=padding).requires_grad_(), *others]
        results = reference.recurrence(cell, *inputs, reverse, lengths=lengths)
        rows.append([*results, *gradients(results, inputs, [None if r is None else r.detach() for r in results])])
    assert_all_same(*rows, "y h_n c_n d_x_part d_weight_hh d_bias_hn d_h0 d_c0")


# ---- What must be refused ------------------------------------------------------------------------


@seeded
def test_refuses_arguments_it_would_ignore(seed):
    """Catches an oracle that answers another question: no c0 for the LSTM, c0 or bias_hn for other cells."""
    draw = Draw(seed)
    for cell in BUILT_IN:
        x_part, weight_hh, bias_hn, h0, _ = recurrence_inputs(draw, cell, steps=1, batch=1, hidden_size=2)
        with pytest.raises(ValueError, match="c0 is for cells with states, which need it"):
            reference.recurrence(cell, x_part, weight_hh, bias_hn, h0, None if cell == "lstm" else h0)
    x_part, weight_hh, _, h0, _ = recurrence_inputs(draw, "rnn_tanh", steps=1, batch=1, hidden_size=2)
    with pytest.raises(ValueError, match="bias_hn is for cells with gates apart"):
        reference.recurrence("rnn_tanh", x_part, weight_hh, h0[0], h0)
    with pytest.raises(ValueError, match="unknown cell 'rnn'"):
        reference.recurrence("rnn", x_part, weight_hh, None, h0)


@seeded
def test_error_rule_refuses_what_it_must(seed):
    """Catches a rule that lets through other shapes, NaN, an infinite peer, any error at zero."""
    oracle = Draw(seed)(4, 3, grad=False)
    exact = oracle.float()
    assert_close_to_oracle(exact, oracle)
    assert_close_to_oracle(exact + 1e-3, oracle, peer=exact + 1e-3)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.full((2,), 1e-30), torch.zeros(2)) == float("inf")
    assert relative_error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0
    assert 0 < relative_error(exact, oracle) < 1e-7
    refused = [
        (exact[:1], oracle, None),
        (exact + 1e-3, oracle, exact),
        (exact + 1e-3, oracle, exact + 5e-4),
        (exact.masked_fill(oracle > 0.5, float("nan")), oracle, exact),
        (exact, oracle.masked_fill(oracle > 0.5, float("nan")), exact),
        (exact + 1, oracle, torch.full_like(exact, float("inf"))),
        (exact, oracle.float(), exact),
        (exact, oracle, exact.half()),
    ]
    assert (oracle > 0.5).any(), "the seed must leave an element for NaN"
    for actual, expected, peer in refused:
        with pytest.raises(AssertionError):
            assert_close_to_oracle(actual, expected, peer)
