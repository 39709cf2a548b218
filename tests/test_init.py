"""rnn_gpu.init: what the initial values are, of layers and cells, this library's and torch.nn's."""

import math

import pytest
import torch

import rnn_gpu
from rnn_gpu import init

MODULES = torch.nn, rnn_gpu
LAYERS = [(module, name, {}) for module in MODULES for name in ("LSTM", "GRU", "RNN")]
LAYERS += [(module, "LSTM", {"proj_size": 3}) for module in MODULES]
CELLS = [(module, f"{name}Cell", {}) for module in MODULES for name in ("LSTM", "GRU", "RNN")]


def made(module, name: str, options: dict, **more):
    """A layer of two layers and both directions, or a cell; H 6."""
    more |= {} if name.endswith("Cell") else {"num_layers": 2, "bidirectional": True}
    return getattr(module, name)(4, 6, **options, **more)


def named(layer, kind: str) -> list[torch.Tensor]:
    return [parameter.detach() for name, parameter in layer.named_parameters() if name.startswith(kind)]


def ids(case) -> str:
    module, name, options = case
    return f"{module.__name__}.{name}{'-projected' if options else ''}"


@pytest.mark.parametrize("case", LAYERS + CELLS, ids=ids)
def test_recurrent_weights_are_orthogonal_gate_by_gate(case):
    """Catches: one matrix of all gates, a set that was left out, other parameters changed, another generator."""
    layer, again = made(*case), made(*case)
    again.load_state_dict(layer.state_dict())
    others = [parameter.clone() for kind in ("weight_ih", "bias") for parameter in named(layer, kind)]
    assert init.orthogonal_(layer, 2.0, generator=torch.Generator().manual_seed(1)) is layer
    blocks = [block for weight in named(layer, "weight_hh") for block in weight.split(6)] + named(layer, "weight_hr")
    assert len(blocks) == {"LSTM": 4, "GRU": 3, "RNN": 1}[case[1].removesuffix("Cell")] * (
        1 if case[1].endswith("Cell") else 4
    ) + len(named(layer, "weight_hr"))
    for block in blocks:
        product = block.T @ block if block.shape[0] >= block.shape[1] else block @ block.T
        torch.testing.assert_close(product, 4 * torch.eye(len(product)), atol=1e-5, rtol=0)
    assert not any(torch.equal(a, b) for i, a in enumerate(blocks) for b in blocks[:i])
    after = [parameter for kind in ("weight_ih", "bias") for parameter in named(layer, kind)]
    assert all(torch.equal(a, b) for a, b in zip(others, after, strict=True))
    init.orthogonal_(again, 2.0, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("case", [c for c in LAYERS + CELLS if c[1].startswith("LSTM")], ids=ids)
def test_forget_biases_sum_to_one(case):
    """Catches: 1 in each of both biases, another gate, a set left out."""
    layer = made(*case)
    before = [torch.stack(pair) for pair in zip(named(layer, "bias_ih"), named(layer, "bias_hh"), strict=True)]
    assert init.unit_forget_bias_(layer) is layer
    after = [torch.stack(pair) for pair in zip(named(layer, "bias_ih"), named(layer, "bias_hh"), strict=True)]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new.sum(0)[6:12], torch.ones(6))
        assert torch.equal(new[:, :6], old[:, :6]) and torch.equal(new[:, 12:], old[:, 12:])


@pytest.mark.parametrize("case", [c for c in LAYERS + CELLS if "RNN" not in c[1]], ids=ids)
def test_chrono_biases_follow_their_distribution(case):
    """Catches: the wrong gate or sign, the wrong range, the same draw for all sets, other biases changed."""
    module, name, options = case
    gates = 4 if name.startswith("LSTM") else 3
    more = {} if name.endswith("Cell") else {"num_layers": 2}
    layer = getattr(module, name)(1, 512, **options, **more)
    assert init.chrono_(layer, 101, 21, generator=torch.Generator().manual_seed(2)) is layer
    sums = [a + b for a, b in zip(named(layer, "bias_ih"), named(layer, "bias_hh"), strict=True)]
    for both in sums:
        of_gate = both.view(gates, 512)
        u = of_gate[1].exp()  # f of i, f, g, o; z of r, z, n
        assert u.min() >= 21 - 1e-3 and u.max() <= 100 + 1e-3
        # Mean and deviation of U(21, 100) over 512 draws: 6 standard errors.
        assert abs(u.mean() - 60.5) < 6 * 79 / math.sqrt(12 * 512) and abs(u.std() - 79 / math.sqrt(12)) < 3
        if gates == 4:
            assert torch.equal(of_gate[0], -of_gate[1])
        assert of_gate[2].abs().max() < 0.1
    assert len({both.sum().item() for both in sums}) == len(sums)


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_chrono_units_keep_what_they_hold(name):
    """Catches: a convention turned round: with u steps of memory a state of 1 is u / (1 + u) after a step."""
    cell = getattr(torch.nn, f"{name}Cell")(1, 64)
    init.chrono_(cell, 1000, 998)
    with torch.no_grad():
        for weight in (cell.weight_ih, cell.weight_hh):
            weight.zero_()
        one = torch.ones(1, 64)
        kept = cell(torch.zeros(1, 1), (one, one))[1] if name == "LSTM" else cell(torch.zeros(1, 1), one)
    assert (kept - 0.999).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    """Catches: a QR decomposition in 16 bits, which PyTorch lacks; values made in float32 for float64."""
    layer = rnn_gpu.LSTM(3, 8, dtype=dtype)
    init.chrono_(init.unit_forget_bias_(init.orthogonal_(layer)), 10)
    block = layer.weight_hh_l0.detach()[:8].double()
    error = torch.linalg.matrix_norm(block @ block.T - torch.eye(8, dtype=torch.float64))
    assert error < 16 * torch.finfo(dtype).eps


def test_parametrized_weights_take_their_new_value():
    """Catches: a value written into what is made anew at the next read."""
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.GRU(3, 5), "weight_hh_l0")
    init.orthogonal_(layer)
    block = layer.weight_hh_l0.detach()[:5]
    torch.testing.assert_close(block @ block.T, torch.eye(5), atol=1e-5, rtol=0)
    with pytest.warns(FutureWarning):
        old = torch.nn.utils.weight_norm(torch.nn.GRU(3, 5), "weight_hh_l0")
    with pytest.raises(ValueError, match="weight_hh_l0 of this GRU is no parameter"):
        init.orthogonal_(old)


def test_errors_say_what_is_wrong():
    """Catches: a module that is passed over in silence."""
    with pytest.raises(TypeError, match="orthogonal_ expects an LSTM, GRU or RNN layer, or a cell, got: Linear"):
        init.orthogonal_(torch.nn.Linear(3, 4))
    with pytest.raises(TypeError, match="unit_forget_bias_ expects an LSTM or LSTMCell, got: GRU"):
        init.unit_forget_bias_(torch.nn.GRU(3, 4))
    with pytest.raises(TypeError, match="chrono_ expects an LSTM, GRU, LSTMCell or GRUCell, got: RNNCell"):
        init.chrono_(torch.nn.RNNCell(3, 4), 10)
    for function in (init.unit_forget_bias_, lambda layer: init.chrono_(layer, 10)):
        with pytest.raises(ValueError, match="sets biases, and this LSTM was made with bias=False"):
            function(rnn_gpu.LSTM(3, 4, bias=False))
    with pytest.raises(ValueError, match=r"longest should be a number of steps, at least shortest \+ 1 = 2.0, got: 1"):
        init.chrono_(rnn_gpu.LSTM(3, 4), 1)
    with pytest.raises(ValueError, match="shortest should be a positive number of steps, got: 0"):
        init.chrono_(rnn_gpu.LSTM(3, 4), 10, 0)
    for wrong in (None, "10"):
        with pytest.raises(ValueError, match=f"longest should be a number of steps, .*, got: {wrong!r}"):
            init.chrono_(rnn_gpu.LSTM(3, 4), wrong)
        with pytest.raises(ValueError, match=f"gain should be a number, got: {wrong!r}"):
            init.orthogonal_(rnn_gpu.LSTM(3, 4), wrong)
