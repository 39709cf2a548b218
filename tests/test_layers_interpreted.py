"""The layers on the real Triton kernels, in Triton's interpreter, against torch.nn in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence

import rnn_gpu
from rnn_gpu import autotuning, backends, measured, operators, products
from rnn_gpu.settings import always_exchange
from tests import contract
from tests.interpreter import concurrent_programs
from tests.layers import STATES, assert_saved_tensors_may_be_strided, draw, outcome, pair, same
from tests.tolerances import assert_close_to_oracle

pytestmark = pytest.mark.interpreted

NAMES = tuple(STATES)


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    """Compare with full products; tf32 has its own tests (tests/test_kernels.py)."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")


def assert_like_torch_nn(ours, oracle, time, batch, states=True, exchange=True, dtype=torch.float32):
    """The error rule for outputs, final states and every gradient, torch.nn in the same dtype as peer."""
    input, hx = draw(ours, time, batch)
    input, hx = input.to(dtype), tuple(s.to(dtype) for s in hx) if states else None
    expected = outcome(oracle, input, hx, "torch")
    peer = outcome(same(ours, dtype), input, hx, "torch")
    if exchange:
        with always_exchange():
            actual = outcome(ours, input, hx, "triton")
    else:
        actual = outcome(ours, input, hx, "triton")
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].shape == value.shape, key
        assert_close_to_oracle(actual[key], value, peer[key], key)


@pytest.mark.covering(("name", "kwargs"), "exchange")
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "alone"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"bidirectional": True},
        {"num_layers": 2, "bias": False},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_float32(name, kwargs, exchange):
    """Catches: wrong results or gradients of any tensor, in every arrangement of layers and directions."""
    assert_like_torch_nn(*pair(name, 5, 20, **kwargs), time=4, batch=3, exchange=exchange)


@pytest.mark.covering("name", "dtype")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bits(name, dtype, monkeypatch):
    """Catches: a product, carry or gradient that loses more than torch.nn does in the same type; columns of wider rows
    that come out, or are added.
    """
    monkeypatch.setattr(products, "WORTH", 0)  # as of large products, whose rows begin at multiples of 16 bytes
    ours, oracle = pair(name, 6, 33, dtype=dtype, bidirectional=True)
    assert_like_torch_nn(ours, oracle, time=5, batch=4, dtype=dtype)


def test_relu():
    """Catches: the tanh cell in place of the relu cell."""
    assert_like_torch_nn(*pair("RNN", 5, 20, nonlinearity="relu", bidirectional=True), time=4, batch=3)


@pytest.mark.parametrize("name", NAMES)
def test_unbatched_and_without_states(name):
    """Catches: a batch dimension that is not added or removed again, and initial states that are not zero."""
    assert_like_torch_nn(*pair(name, 5, 9), time=3, batch=None)
    assert_like_torch_nn(*pair(name, 5, 9, batch_first=True), time=3, batch=None, states=False)
    assert_like_torch_nn(*pair(name, 5, 9), time=3, batch=2, states=False)


@settings(deadline=None, max_examples=8, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(NAMES),
    input_size=st.integers(1, 9),
    hidden_size=st.integers(1, 50),
    num_layers=st.integers(1, 2),
    time=st.integers(1, 5),
    batch=st.integers(1, 19),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
    bias=st.booleans(),
    states=st.booleans(),
    exchange=st.booleans(),
    schedule=st.integers(0, 1000),
    torn=st.booleans(),
)
def test_any_shape(
    name,
    input_size,
    hidden_size,
    num_layers,
    time,
    batch,
    bidirectional,
    batch_first,
    bias,
    states,
    exchange,
    schedule,
    torn,
):
    """Catches: a shape, a mixture of options or a schedule nobody thought of."""
    layers = pair(
        name,
        input_size,
        hidden_size,
        num_layers=num_layers,
        bias=bias,
        batch_first=batch_first,
        bidirectional=bidirectional,
    )
    with concurrent_programs(schedule, torn=torn):
        assert_like_torch_nn(*layers, time=time, batch=batch, states=states, exchange=exchange)


@pytest.mark.parametrize("name", NAMES)
def test_empty_batch(name):
    """Catches: a failure, or gradients that are not zero, where a batch happens to be empty."""
    layer = getattr(rnn_gpu, name)(3, 4, bidirectional=True)
    input = torch.randn(5, 0, 3, requires_grad=True)
    with rnn_gpu.backend("triton"):
        output, _ = layer(input)
    output.sum().backward()
    assert output.shape == (5, 0, 8) and input.grad.shape == input.shape
    assert all(not p.grad.any() for p in layer.parameters())


def bad_calls(name):
    """Inputs and states that torch.nn refuses."""
    zeros = torch.zeros
    states = lambda *shape: (zeros(*shape), zeros(*shape)) if name == "LSTM" else zeros(*shape)
    yield zeros(0, 2, 3), None
    yield zeros(3), None
    yield zeros(2, 2, 2, 3), None
    yield zeros(4, 2, 5), None
    yield zeros(4, 2, 3, dtype=torch.float16), None
    yield zeros(4, 2, 3), states(1, 7, 6)
    yield zeros(4, 2, 3), states(2, 2, 6)
    yield zeros(4, 2, 3), states(1, 2, 5)
    yield zeros(4, 2, 3), states(1, 6)
    yield zeros(4, 3), states(1, 2, 6)


@pytest.mark.parametrize("index", range(10))
@pytest.mark.parametrize("name", NAMES)
def test_bad_calls_raise_as_in_torch_nn(name, index):
    """Catches: another exception type or text than torch.nn's, or a call that goes through."""
    input, hx = list(bad_calls(name))[index]
    with pytest.raises(Exception) as theirs:
        getattr(torch.nn, name)(3, 6)(input, hx)
    with rnn_gpu.backend("triton"), pytest.raises(type(theirs.value)) as ours:
        getattr(rnn_gpu, name)(3, 6)(input, hx)
    assert str(ours.value) == str(theirs.value)


def test_what_the_kernels_cannot_do_raises_and_names_it():
    """Catches: a silent fall-back under backend "triton"."""
    with rnn_gpu.backend("triton"), pytest.raises(RuntimeError, match="float64"):
        rnn_gpu.GRU(5, 6).double()(torch.randn(3, 2, 5).double())


def test_output_changed_in_place_is_caught():
    """Catches: gradients computed from an output that the user has overwritten."""
    layer = rnn_gpu.LSTM(3, 8)
    with rnn_gpu.backend("triton"):
        output, _ = layer(torch.randn(4, 2, 3))
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_final_state_does_not_share_memory_with_the_output():
    """Catches: a user's change of h_n that reaches the output."""
    with rnn_gpu.backend("triton"), torch.no_grad():
        output, h_n = rnn_gpu.GRU(3, 8)(torch.randn(4, 2, 3))
    last = output[-1].clone()
    h_n.zero_()
    assert torch.equal(output[-1], last) and output.is_contiguous()


@pytest.mark.parametrize("name", NAMES)
def test_inference_equals_training(name):
    """Catches: a result that depends on whether gradients are recorded."""
    layer = getattr(rnn_gpu, name)(3, 20, num_layers=2)
    input = torch.randn(4, 2, 3)
    with rnn_gpu.backend("triton"):
        trained, _ = layer(input)
        with torch.no_grad():
            inferred, _ = layer(input)
    assert torch.equal(trained, inferred)


def test_frozen_weights_get_no_gradient():
    """Catches: a gradient for a parameter that asked for none, or none for those that did."""
    layer, oracle = pair("LSTM", 3, 9)
    for module in (layer, oracle):
        module.weight_ih_l0.requires_grad_(False)
    input, _ = draw(layer, 4, 2)
    with rnn_gpu.backend("triton"):
        layer(input)[0].sum().backward()
    oracle(input.double())[0].sum().backward()
    assert layer.weight_ih_l0.grad is None
    peer = same(layer, torch.float32)
    peer(input)[0].sum().backward()
    assert_close_to_oracle(layer.weight_hh_l0.grad, oracle.weight_hh_l0.grad, peer.weight_hh_l0.grad)


def test_dropout_between_layers():
    """Catches: dropout in eval mode, on the last layer, or at another rate."""
    layer = rnn_gpu.GRU(4, 16, num_layers=2, dropout=0.5)
    input = torch.randn(3, 4, 4)
    with rnn_gpu.backend("triton"), torch.no_grad():
        assert not torch.equal(layer(input)[0], layer(input)[0])
        layer.eval()
        assert torch.equal(layer(input)[0], layer(input)[0])
        layer.train().dropout = 1.0  # the second layer then sees zeros, and its output is not dropped
        output, _ = layer(input)
    assert output.abs().min() > 0 or output.any()
    with rnn_gpu.backend("torch"), torch.no_grad():
        expected, _ = layer(input)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("name", NAMES)
def test_double_backward(name):
    """Catches: a gradient penalty that silently leaves out the recurrence, or gets its second derivative wrong."""
    layer, oracle = pair(name, 3, 9, bidirectional=True)
    input, _ = draw(layer, 4, 2)

    def penalty(module, input, backend):
        input = input.clone().requires_grad_()
        with rnn_gpu.backend(backend):
            output, _ = module(input)
        (gradient,) = torch.autograd.grad(output.sum() + output.pow(2).sum(), input, create_graph=True)
        # no "norm - 1": near 1 that difference multiplies everybody's rounding errors, and norms compare nothing
        return torch.autograd.grad(gradient.pow(2).sum(), [input, *module.parameters()])

    expected = penalty(oracle, input.double(), "torch")
    peer = penalty(same(layer, torch.float32), input, "torch")
    for a, e, p in zip(penalty(layer, input, "triton"), expected, peer, strict=True):
        assert_close_to_oracle(a, e, p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    """Catches: results in another type than autocast's, or gradients of parameters in another type than theirs."""
    layer = rnn_gpu.LSTM(3, 8)
    with torch.autocast("cpu", dtype), rnn_gpu.backend("triton"):
        output, (h_n, c_n) = layer(torch.randn(4, 2, 3))
    assert output.dtype == h_n.dtype == c_n.dtype == dtype
    output.float().sum().backward()
    assert layer.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"memory": "lean"}, {"num_layers": 2}], ids=str)
def test_a_backward_within_autocast(options):
    """Catches: gradients of a float32 layer that whoever asks for them within autocast gets from products in half the
    digits; cuDNN's backward, one operator that no autocast knows, gives them in full.
    """
    layer, input = rnn_gpu.LSTM(3, 8, **options), torch.randn(4, 2, 3, requires_grad=True)
    leaves = [input, *layer.parameters()]
    with rnn_gpu.backend("triton"):
        expected = torch.autograd.grad(layer(input)[0].sum(), leaves)
        total = layer(input)[0].sum()
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.autograd.grad(total, leaves)
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("cell, gates", [("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)])
def test_operators_keep_the_rules_of_torch_library(cell, gates):
    """Catches: a wrong fake (shape, stride, type), an undeclared mutation, an output that shares memory with an
    input.
    """
    T, B, N, H = 3, 2, 2, 9
    lstm, gru = cell == "lstm", cell == "gru"
    h0 = torch.randn(N, B, H)
    c0 = torch.randn(N, B, H) if lstm else None
    x_part, weight = torch.randn(T * B, N, gates * H), torch.randn(N, gates * H, H)
    bias = torch.randn(N, H) if gru else None
    for lengths in (None, torch.tensor([3, 1], dtype=torch.int32)):
        kept = (torch.rand(T * B, N, H) < 0.5).to(torch.int8)
        drawn = (None,) * 3 if lengths is None else (torch.rand(N, B, H), kept, kept if lstm else None)
        rows = None, lengths, None, None, *drawn, T, cell, 2, 0, True  # None: no parameters
        forward = (x_part, weight, bias, h0, c0, *rows, "full", None, None)
        torch.library.opcheck(torch.ops.rnn_gpu.recurrence.default, forward)
        y, h_n, _, gates, aux, carries = torch.ops.rnn_gpu.recurrence(*forward)
        d_c_n = torch.randn(N, B, H) if lstm else None
        d_cells = torch.randn_like(y) if lstm else None
        given = torch.randn_like(y), torch.randn_like(h_n), d_c_n, d_cells
        backward = (*given, weight, gates, aux, carries, y, h0, c0, *rows, 0.5, None, None)
        torch.library.opcheck(torch.ops.rnn_gpu.recurrence_backward.default, backward)


def test_program_cap_is_kept():
    """Catches: a plan that needs more programs at the same time than the user allows."""
    layer = rnn_gpu.LSTM(8, 64)
    with always_exchange(), rnn_gpu.max_programs(2), rnn_gpu.backend("triton"):
        with torch.no_grad():
            capped, _ = layer(torch.ones(2, 3, 8))
        wide = backends.plan_for("lstm", 64, 3, 1, "float32", backends.device_of("cpu"), False)
    assert wide.programs <= 2
    with rnn_gpu.backend("torch"), torch.no_grad():
        torch.testing.assert_close(capped, layer(torch.ones(2, 3, 8))[0])


def test_the_backward_keeps_to_the_limits_of_its_forward(monkeypatch):
    """Catches: a cap that holds in the forward alone, while collectives overlap with the backward."""
    from rnn_gpu.kernels import launch

    programs = []
    launched = launch.run
    monkeypatch.setattr(
        launch,
        "run",
        lambda plan, *rest: (programs.append(plan.programs), launched(plan, *rest)),
    )
    layer = rnn_gpu.GRU(8, 64)
    with always_exchange(), rnn_gpu.max_programs(2), rnn_gpu.backend("triton"):
        output, _ = layer(torch.ones(2, 3, 8))
    output.sum().backward()
    assert len(programs) == 2 and max(programs) <= 2


def test_saved_tensors_may_come_back_in_other_strides():
    """Catches: a saved tensor handed to the kernel as it lies, after hooks that store it otherwise."""
    assert_saved_tensors_may_be_strided(*pair("LSTM", 4, 16))


# ---- Measured choices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["dense", *(pytest.param(k, marks=pytest.mark.slow) for k in ("packed", "lengths, projected, two layers"))]
)
def test_autotune_runs_all_that_it_times_and_changes_nothing(kind, monkeypatch, tmp_path):
    """Catches: a plan or a route that cannot run; weights, gradients, hooks or random numbers that a measurement
    touches; and results that are wrong by the plan that was chosen.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotuning, "ROUNDS", 1)
    monkeypatch.setattr(autotuning, "FEW", 2)
    monkeypatch.setattr(backends, "triton_untested", lambda: None)
    two = "two" in kind
    layer = rnn_gpu.LSTM(3, 20, 1 + two, dropout=0.5 * two, proj_size=7 * ("projected" in kind))
    layer.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    input, lengths = torch.randn(2, 3, 3), [2, 0, 1] if "lengths" in kind else None
    given = pack_padded_sequence(input, [2, 1, 1]) if kind == "packed" else input
    before, numbers = [p.detach().clone() for p in layer.parameters()], torch.get_rng_state()
    seconds = iter(range(1, 1000))  # the first of what is timed is the fastest
    with always_exchange(), concurrent_programs(5):
        choice = autotuning.tune(layer, given, lengths, None, lambda call: (call(), next(seconds))[1])
        assert choice.name == "triton" and choice.measured and all(p.measured for p in choice.plans)
        assert torch.equal(torch.get_rng_state(), numbers)
        assert all(p.grad is None and torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True))
        layer._forward_hooks.clear()
        layer.eval()
        with rnn_gpu.backend("triton"):
            found = layer(given, lengths=lengths) if lengths else layer(given)
    with rnn_gpu.backend("torch"):
        expected = layer(given, lengths=lengths) if lengths else layer(given)
    torch.testing.assert_close(contract.tensors(found), contract.tensors(expected), atol=1e-5, rtol=1e-5)
    measured.forget()
    backends.choose_anew()
    operators.plan_anew()
