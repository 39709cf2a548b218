"""Layers with several heads: torch.nn's layers with block-diagonal recurrent weights, whatever runs them."""

import copy
import io
import pickle

import pytest
import torch
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnn_gpu
from rnn_gpu import settings, zoo
from rnn_gpu.heads import into_sets, out_of_sets, whole
from tests.layers import INTERPRETED, ON_BOTH_BACKENDS, block_diagonal, exchanging_in_full
from tests.test_options import BOTH, MASKS, STACK, assert_as_by_hand
from tests.tolerances import assert_close_to_oracle, assert_same_mathematics

pytestmark = ON_BOTH_BACKENDS
slow = [pytest.mark.slow] if INTERPRETED else []  # on the kernels
on_torch = pytest.mark.skipif(INTERPRETED, reason="about PyTorch's side alone")


@pytest.fixture(autouse=True)
def one_backend():
    """See `exchanging_in_full`."""
    with exchanging_in_full():
        yield


def wholes(layer, dtype=None) -> dict[str, torch.Tensor]:
    """The weights that torch.nn's layer of the same equations has, differentiable by those of `layer`."""
    named = {name: weight.to(dtype or weight.dtype) for name, weight in layer.named_parameters()}
    return {k: block_diagonal(w, layer.heads) if k.startswith("weight_hh") else w for k, w in named.items()}


def outcome(layer, weights, run, input, states) -> dict[str, torch.Tensor]:
    """The results of run(weights, input, states) and their gradients by the parameters of `layer`, input and states."""
    leaves = [one.clone().requires_grad_() for one in (input, *states)]
    output, final = run(weights, leaves[0], tuple(leaves[1:]) if len(states) > 1 else leaves[1])
    results = [output, *(final if isinstance(final, tuple) else (final,))]
    loss = sum((r.double() * torch.linspace(-1, 1, r.numel()).view_as(r)).sum() for r in results)
    found = torch.autograd.grad(loss, [*leaves, *layer.parameters()])
    results = {f"result {i}": result.detach() for i, result in enumerate(results)}
    names = ("input", *(f"state {i}" for i in range(len(states))), *dict(layer.named_parameters()))
    return results | {f"gradient of {name}": d for name, d in zip(names, found, strict=True)}


@pytest.mark.parametrize(
    "name, heads, kwargs, dtype",
    [
        ("GRU", 2, {"bidirectional": True, "batch_first": True}, torch.float32),
        *(
            pytest.param(*case, marks=slow)
            for case in (
                ("LSTM", 3, STACK, torch.float32),
                ("RNN", 4, {"num_layers": 2, "nonlinearity": "relu", "memory": "lean"}, torch.float32),
                ("LSTM", 2, {"bias": False, "memory": "lean", "bidirectional": True}, torch.float32),
                ("GRU", 4, {"memory": "lean"}, torch.bfloat16),
                ("RNN", 1, {}, torch.float32),
            )
        ),
    ],
    ids=str,
)
def test_heads_are_blocks_of_torch_nns_weights(name, heads, kwargs, dtype):
    """Catches: heads, gates, states or directions that change places, there or on the way back; a gradient of another
    block; a layer without heads that is none of torch.nn's.
    """
    layer = getattr(rnn_gpu, name)(3, 12, heads=heads, **kwargs).to(dtype)
    theirs = getattr(torch.nn, name)(3, 12, **{key: value for key, value in kwargs.items() if key != "memory"})
    input = torch.randn(2, 3, 3, dtype=dtype)
    states = torch.randn(2 if name == "LSTM" else 1, theirs.num_layers * (1 + theirs.bidirectional), 12)
    states = states.to(dtype).unsqueeze(2).expand(-1, -1, 2 if layer.batch_first else 3, -1)
    oracle = lambda weights, x, hx: functional_call(theirs, weights, (x, hx))
    expected, peer = (
        outcome(layer, wholes(layer, kind), oracle, input.to(kind), states.to(kind)) for kind in (torch.float64, dtype)
    )
    for alone in (False, True):
        settings._allow_alone = alone  # the fixture sets it back
        actual = outcome(layer, None, lambda _, x, hx: layer(x, hx), input, states)
        for key, value in actual.items():
            assert_close_to_oracle(value, expected[key].double(), peer[key], key)


QUICK = ((0, "resets"),) if INTERPRETED else ((0, "resets"), (1, "lengths"))


@pytest.mark.parametrize(
    "name, kwargs, masks",
    [
        pytest.param(*case, masks, marks=[] if (number, masks) in QUICK else pytest.mark.slow)
        for number, case in enumerate(
            [
                ("GRU", BOTH | {"memory": "lean", "clip": 0.3}),
                ("LSTM", BOTH | STACK | {"return_cells": True}),
                ("RNN", BOTH | {"bidirectional": True}),
                ("LSTM", {"zoneout": (0.5, 0.2), "memory": "lean", "clip": 0.3}),
            ]
        )
        for masks in MASKS
    ],
)
def test_heads_with_masks_and_options(name, kwargs, masks):
    """Catches: a mask that is of another head, row or direction; an option that heads forget."""
    assert_as_by_hand(getattr(rnn_gpu, name)(3, 12, heads=3, **kwargs), masks)


@pytest.mark.parametrize("cls", [zoo.PeepholeLSTM, *(pytest.param(one, marks=slow) for one in (zoo.SLSTM, zoo.MGU))])
def test_heads_of_other_cells(cls):
    """Catches: states of several, or parameters of a unit, that go to another head."""
    layer, input = cls(3, 6, heads=3, bidirectional=True, memory="lean"), torch.randn(2, 3, 3)
    names = dict(layer.named_parameters())

    def expected(dtype):
        plain, weights = cls(3, 6, bidirectional=True, dtype=dtype), wholes(layer, dtype)
        with rnn_gpu.backend("torch"):
            output, states = functional_call(plain, weights, (input.to(dtype),), {"lengths": [2, 0, 1]})
        return [output, *(states if isinstance(states, tuple) else (states,))]

    def with_gradients(results):
        loss = sum((r.double() * torch.linspace(-1, 1, r.numel()).view_as(r)).sum() for r in results)
        return [*(r.detach() for r in results), *torch.autograd.grad(loss, list(layer.parameters()))]

    output, states = layer(input, lengths=[2, 0, 1])
    actual = with_gradients([output, *(states if isinstance(states, tuple) else (states,))])
    oracle, peer = with_gradients(expected(torch.float64)), with_gradients(expected(torch.float32))
    for i, (value, right, other) in enumerate(zip(actual, oracle, peer, strict=True)):
        assert_close_to_oracle(value, right.double(), other, f"result or gradient {i} of {list(names)}")


@pytest.mark.parametrize("stabilised", [True, pytest.param(False, marks=slow)])
def test_slstm_with_heads_is_that_of_the_paper(stabilised):
    """Catches: an sLSTM of several heads that is not the one of Beck et al. 2024 (equations 8 to 17, and R block-
    diagonal), followed here with and without its stabiliser; a head that sees another one.
    """
    heads, size = 3, 4
    layer = zoo.SLSTM(3, heads * size, heads=heads)
    layer = layer if INTERPRETED else layer.double()
    dtype = layer.weight_ih_l0.dtype
    input, h, c = torch.randn(6, 2, 3, dtype=dtype), *torch.randn(2, 1, 2, heads * size, dtype=dtype)
    n, m = torch.rand(1, 2, heads * size, dtype=dtype) + 0.5, torch.zeros(1, 2, heads * size, dtype=dtype)
    output, (_, c_n, n_n, m_n) = layer(input, (h, c, n, m))

    def paper(dtype):
        weights = {name: weight.detach().to(dtype) for name, weight in layer.named_parameters()}
        state = [one[0].to(dtype) for one in (h, c, n, m)]
        y = []
        for x in input.to(dtype):
            sums = x @ weights["weight_ih_l0"].T + weights["bias_ih_l0"] + weights["bias_hh_l0"]
            recurrent = weights["weight_hh_l0"].view(4, heads, size, size)  # of gate and head
            by_head = torch.einsum("bkj,gkij->bgki", state[0].view(2, heads, size), recurrent)
            i, f, z, o = (sums + by_head.reshape(2, -1)).chunk(4, 1)
            z, o, log_f = z.tanh(), o.sigmoid(), torch.nn.functional.logsigmoid(f)
            new = torch.maximum(log_f + state[3], i) if stabilised else torch.zeros_like(i)
            i, f = (i - new).exp(), (log_f + state[3] - new).exp()
            state = [None, f * state[1] + i * z, f * state[2] + i, new]
            state[0] = o * state[1] / state[2]
            y.append(state[0])
        scale = 1 if stabilised else (-m_n[0].detach().to(dtype)).exp()
        return torch.stack(y), state[1] * scale, state[2] * scale

    exact, peer = paper(torch.float64), paper(dtype)
    for name, value, right, other in zip("hcn", (output, c_n[0], n_n[0]), exact, peer, strict=True):
        if dtype == torch.float64:
            assert_same_mathematics(value.detach(), right, name)
        else:
            assert_close_to_oracle(value.detach(), right, other, name)


@pytest.mark.parametrize("name", [pytest.param("LSTM", marks=slow), pytest.param("GRU", marks=pytest.mark.slow)])
@pytest.mark.parametrize("graph", [pytest.param(True, marks=pytest.mark.slow), False])
def test_compiled_exported_mapped_packed_and_differentiated_twice(name, graph):
    """Catches: a route that takes the heads' weights for whole ones, a graph that breaks, members that share what they
    should not, heads left out of the second derivative.
    """
    layer = getattr(rnn_gpu, name)(3, 8, heads=2, bidirectional=True)
    plain, input = getattr(torch.nn, name)(3, 8, bidirectional=True), torch.randn(4, 3, 3)
    parameters = dict(layer.named_parameters())
    loss = lambda run, x: run(x)[0].square().sum()
    oracle = lambda x: functional_call(plain, wholes(layer), (x,))
    right = torch.autograd.grad(loss(oracle, input), list(parameters.values()), create_graph=True)
    second = torch.autograd.grad(sum(d.square().sum() for d in right), list(parameters.values()))
    expected = oracle(input)[0].detach()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if graph else layer
    torch.testing.assert_close(run(input)[0].detach(), expected)
    torch.testing.assert_close(torch.autograd.grad(loss(run, input), list(parameters.values())), right)
    if graph:
        program = torch.export.export(layer, (input,)).module()
        torch.testing.assert_close(program(input)[0].detach(), expected)
        return
    first = torch.autograd.grad(loss(layer, input), list(parameters.values()), create_graph=True)
    found = torch.autograd.grad(sum(d.square().sum() for d in first), list(parameters.values()))
    torch.testing.assert_close(found, second, rtol=1e-4, atol=1e-5)
    of = lambda weights, row: functional_call(layer, weights, (row.unsqueeze(1),))[0].square().sum()
    each = torch.func.vmap(torch.func.grad(of), in_dims=(None, 1))(parameters, input)
    torch.testing.assert_close(tuple(one.sum(0) for one in each.values()), tuple(d.detach() for d in right))
    stacked = {name: torch.stack([weight, 2 * weight]) for name, weight in parameters.items()}
    ensemble = torch.func.vmap(lambda weights: functional_call(layer, weights, (input,))[0])(stacked)
    torch.testing.assert_close(ensemble[0].detach(), expected)
    lengths = torch.tensor([2, 4, 1])
    packed, _ = layer(pack_padded_sequence(input, lengths, enforce_sorted=False))
    torch.testing.assert_close(pad_packed_sequence(packed)[0], layer(input, lengths=lengths)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(input)[0].dtype == torch.bfloat16
    torch.testing.assert_close(layer(input[:, 1])[0].detach(), expected[:, 1])  # unbatched
    with torch.backends.mkldnn.flags(enabled=False):  # which has no forward mode
        of = [torch.func.jvp(lambda x, run=run: run(x)[0], (input,), (input,))[1] for run in (layer, oracle)]
    torch.testing.assert_close(*of)


def test_states_of_one_unit_a_head_are_contiguous():
    """Catches: final states of other strides than those of all other layers, which `view` refuses."""
    output, states = rnn_gpu.LSTM(3, 8, heads=8, bidirectional=True)(torch.randn(2, 3, 3))
    assert all(one.is_contiguous() for one in (output, *states))


@on_torch
def test_as_a_module():
    """Catches: heads lost by a copy, a pickle or the repr; a state dict of other shapes; heads that torch.nn's layer
    would not know, or that the initial values do not see.
    """
    layer = rnn_gpu.LSTM(3, 8, heads=2)
    assert {name: list(weight.shape) for name, weight in layer.state_dict().items()} == {
        "weight_ih_l0": [32, 3], "weight_hh_l0": [32, 4], "bias_ih_l0": [32], "bias_hh_l0": [32]
    }  # fmt: skip
    assert repr(layer) == "LSTM(3, 8, heads=2)" and repr(zoo.SLSTM(3, 8, heads=4)) == "SLSTM(3, 8, heads=4)"
    file, input = io.BytesIO(), torch.randn(5, 2, 3)
    torch.save(layer, file)
    file.seek(0)
    for one in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=True)):
        assert one.heads == 2
        torch.testing.assert_close(one(input), layer(input), rtol=0, atol=0)
    with pytest.warns(UserWarning, match=r"whose options torch.nn does not know: the model itself \(heads=2\)"):
        assert type(rnn_gpu.restore_rnns(layer)) is rnn_gpu.LSTM
    assert rnn_gpu.replace_rnns(torch.nn.LSTM(3, 8)).heads == 1
    for block in rnn_gpu.init.orthogonal_(layer).weight_hh_l0.split(4):
        torch.testing.assert_close(block @ block.T, torch.eye(4))
    assert "LSTM of 8 hidden units in 2 heads, 1 layer(s)" in rnn_gpu.explain(layer, 16)
    assert "of one of 2 heads" in rnn_gpu.explain(rnn_gpu.LSTM(8, 512, heads=2), 16, "h200")
    flow = rnn_gpu.gradient_flow(layer, input)
    assert flow.norms.shape == (1, 1, 5) and bool(flow.norms.isfinite().all())
    with torch.no_grad():
        layer(input)[0].zero_()


@pytest.mark.slow
@on_torch
def test_onnx_has_whole_weights():
    """Catches: an exported layer whose recurrent weights ONNX's operator takes for something else."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    layer, input = rnn_gpu.LSTM(3, 8, heads=2).eval(), torch.randn(5, 2, 3)
    program = torch.onnx.export(layer, (input,), dynamo=True, verbose=False)
    torch.testing.assert_close(program(input)[0], layer(input)[0].detach(), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="cannot export heads=2"):
        torch.onnx.export(layer, (input,), io.BytesIO(), dynamo=False)


@on_torch
def test_wrong_heads():
    """Catches: heads that do not divide the units, found inside a call; heads that are changed, or none."""
    for cls in (rnn_gpu.LSTM, rnn_gpu.GRU, rnn_gpu.RNN, zoo.SLSTM):
        with pytest.raises(ValueError, match="hidden_size must be divisible by heads, got: 8 and 3"):
            cls(3, 8, heads=3)
        for wrong in (0, -2):
            with pytest.raises(ValueError, match="heads must be greater than zero"):
                cls(3, 8, heads=wrong)
        with pytest.raises(TypeError, match="heads should be of type int, got: float"):
            cls(3, 8, heads=2.0)
        with pytest.raises(AttributeError, match="heads cannot be changed"):
            cls(3, 8).heads = 2
    with pytest.raises(ValueError, match="heads are not supported with proj_size"):
        rnn_gpu.LSTM(3, 8, proj_size=2, heads=2)


@on_torch
def test_the_ways_into_sets_and_back():
    """Catches: a way back that is not the way there; zeros that an infinite weight of another head turns into NaN."""
    state, rows = torch.randn(2, 3, 24), torch.randn(5, 2, 24)
    torch.testing.assert_close(out_of_sets(into_sets(state, 2, 0, 3, 4), 2, 0, 3, 4), state, rtol=0, atol=0)
    torch.testing.assert_close(out_of_sets(into_sets(rows, 2, 1, 3, 4), 2, 1, 3, 4), rows, rtol=0, atol=0)
    assert torch.equal(into_sets(state, 2, 0, 3, 4)[2, :, :4], state[0, :, 4:8])  # head 1, forward
    weight = torch.full((24, 4), torch.inf)
    assert torch.equal(whole(weight, 3), block_diagonal(weight, 3))
