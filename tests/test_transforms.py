"""torch.func: vmap, grad, ensembles, forward mode, derivatives of derivatives, on PyTorch's kernels and on ours."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence

import rnn_gpu
from rnn_gpu import settings
from tests.layers import BACKEND, ON_BOTH_BACKENDS, same

pytestmark = ON_BOTH_BACKENDS

LAYERS = [("LSTM", {"bidirectional": True, "num_layers": 2}), ("LSTM", {"proj_size": 2}), ("GRU", {}), ("RNN", {})]
every_layer = pytest.mark.parametrize("name, kwargs", LAYERS, ids=["LSTM-stack", "LSTM-projected", "GRU", "RNN"])
COUNT, TIME, BATCH = 4, 5, 2


@pytest.fixture(autouse=True)
def one_backend(monkeypatch):
    """The backend of this run, several programs, full products."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    with rnn_gpu.backend(BACKEND), settings.always_exchange():
        yield


def loss(parameters, layer, input):
    """A loss that depends on every parameter."""
    return functional_call(layer, parameters, (input,))[0].pow(2).sum()


def expected_gradients(layer, input):
    """The same loss's gradients, by torch.nn."""
    peer = same(layer, torch.float32)
    return torch.autograd.grad(peer(input)[0].pow(2).sum(), list(peer.parameters()))


@every_layer
def test_vmap_over_inputs(name, kwargs):
    """Catches: rows of the batch and mapped rows that change places, masks that are not mapped along."""
    layer = getattr(rnn_gpu, name)(3, 5, **kwargs)
    inputs, lengths = torch.randn(COUNT, TIME, BATCH, 3), torch.randint(0, TIME + 1, (COUNT, BATCH))
    resets = torch.rand(TIME, BATCH, COUNT) < 0.3
    peer = same(layer, torch.float32)
    torch.testing.assert_close(vmap(lambda x: layer(x)[0])(inputs), torch.stack([peer(x)[0] for x in inputs]))
    run = lambda x, l, r: layer(x, lengths=l, resets=r)[0]
    actual = vmap(run, in_dims=(0, 0, 2))(inputs, lengths, resets)
    expected = [run(*one) for one in zip(inputs, lengths, resets.movedim(2, 0), strict=True)]
    torch.testing.assert_close(actual, torch.stack(expected))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_masks_that_lie_in_another_way(name, batch):
    """Catches: masks that are one for all mapped problems, or mapped along their last dimension, read as if they lay
    one after another: other steps of other rows, in silence.
    """
    layer, inputs = getattr(rnn_gpu, name)(3, 5), torch.randn(COUNT, TIME, batch, 3)
    parameters = {key: torch.stack([value * (v + 1) for v in range(COUNT)]) for key, value in layer.named_parameters()}
    lengths, resets = torch.randint(1, TIME + 1, (batch, COUNT)), torch.rand(TIME, batch, COUNT) < 0.4
    run = lambda p, x, l, r: functional_call(layer, p, (x,), dict(lengths=l, resets=r))[0]
    for of_weights, of_masks in ((None, None), (None, -1), (0, None), (0, -1)):
        weights = parameters if of_weights == 0 else dict(layer.named_parameters())
        masks = (lengths, resets) if of_masks == -1 else (lengths[:, 0], resets[..., 0])
        found = vmap(run, (of_weights, 0, of_masks, of_masks))(weights, inputs, *masks)
        for v in range(COUNT):
            mine = {key: value[v] if of_weights == 0 else value for key, value in weights.items()}
            mask = [one[..., v] if of_masks == -1 else one for one in masks]
            torch.testing.assert_close(found[v], run(mine, inputs[v], *mask))


@pytest.mark.parametrize("name, layers", [("GRU", 1), ("LSTM", 2)])
def test_gradients_that_are_mapped_or_have_tangents(name, layers):
    """Catches: a backward by the launchers that takes a dual tensor for a plain one, whose derivative is then missing
    without a word, or that raises under vmap.
    """
    layer, input = getattr(rnn_gpu, name)(3, 5, layers), torch.randn(TIME, BATCH, 3, requires_grad=True)
    given, along = torch.randn(2, COUNT, TIME, BATCH, 5)

    def pulled(layer):
        output = layer(input)[0]
        leaves = input, *layer.parameters()
        return lambda d: torch.autograd.grad(output, leaves, d, retain_graph=True)

    back, peer = pulled(layer), pulled(same(layer, torch.float32))
    for actual, expected in zip(vmap(back)(given), zip(*map(peer, given), strict=True), strict=True):
        torch.testing.assert_close(actual, torch.stack(expected))
    if BACKEND == "torch" and name == "LSTM":  # oneDNN's has no forward mode, and says so
        return
    with forward_ad.dual_level():
        found = [forward_ad.unpack_dual(d) for d in back(forward_ad.make_dual(given[0], along[0]))]
    for (primal, tangent), d, expected in zip(found, peer(given[0]), peer(along[0]), strict=True):
        torch.testing.assert_close(primal, d)
        torch.testing.assert_close(tangent, expected)
    one, d, along = torch.tensor(1.0), given[0], along[0]
    again = lambda s: torch.func.jvp(lambda d: back(d)[0], (d,), (s * along,))[1]  # linear in s
    torch.testing.assert_close(torch.func.jvp(again, (one,), (one,))[1], peer(along)[0])
    for none, expected in zip(vmap(back)(given[:0]), peer(d), strict=True):
        assert none.shape == (0, *expected.shape)
    if BACKEND == "torch":
        return
    compiled = pulled(torch.compile(layer, backend="aot_eager"))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        compiled(forward_ad.make_dual(d, along))


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_tangents_of_compiled_layers(name):
    """Catches: a graph made of a plain call, or for one with a tangent, whose result has none, without a word."""
    layer, (input, along) = getattr(rnn_gpu, name)(3, 5).requires_grad_(False), torch.randn(2, TIME, BATCH, 3)
    compiled = torch.compile(layer, backend="aot_eager")
    plain = compiled(input)[0]
    with forward_ad.dual_level():
        output, tangent = forward_ad.unpack_dual(compiled(forward_ad.make_dual(input, along))[0])
    _, expected = torch.func.jvp(lambda x: layer(x)[0], (input,), (along,))
    torch.testing.assert_close(output, plain)
    torch.testing.assert_close(tangent, expected)


def test_vmap_over_states_alone():
    """Catches: an input that is the same for all and is taken for a mapped one."""
    layer, input, states = rnn_gpu.GRU(3, 5), torch.randn(TIME, BATCH, 3), torch.randn(COUNT, 1, BATCH, 5)
    expected = torch.stack([layer(input, h)[0] for h in states])
    torch.testing.assert_close(vmap(lambda h: layer(input, h)[0])(states), expected)


@every_layer
def test_gradients_for_each_sample(name, kwargs):
    """Catches: gradients of shared weights that are summed over the mapped problems."""
    layer, inputs = getattr(rnn_gpu, name)(3, 5, **kwargs), torch.randn(COUNT, TIME, BATCH, 3)
    parameters = dict(layer.named_parameters())
    for actual, expected in zip(
        grad(loss)(parameters, layer, inputs[0]).values(), expected_gradients(layer, inputs[0]), strict=True
    ):
        torch.testing.assert_close(actual, expected)
    found = vmap(grad(loss), in_dims=(None, None, 0))(parameters, layer, inputs)
    for v in range(COUNT):
        for actual, expected in zip(found.values(), expected_gradients(layer, inputs[v]), strict=True):
            torch.testing.assert_close(actual[v], expected)


@pytest.mark.covering("name", "cap")
@every_layer
@pytest.mark.parametrize("cap", [None, 2], ids=["one launch", "several launches"])
def test_ensembles(name, kwargs, cap):
    """Catches: members that see each other's weights, an ensemble too large for one launch."""
    members = [getattr(rnn_gpu, name)(3, 20, **kwargs) for _ in range(3)]
    parameters, _ = stack_module_state(members)
    inputs = torch.randn(3, TIME, BATCH, 3)
    with rnn_gpu.max_programs(cap and 2 * cap * (2 if "bidirectional" in kwargs else 1)):
        outputs = vmap(lambda p, x: functional_call(members[0], p, (x,))[0])(parameters, inputs)
        found = vmap(grad(loss), in_dims=(0, None, 0))(parameters, members[0], inputs)
        stacked = torch.autograd.grad(outputs.pow(2).sum(), list(parameters.values()))
    for v, member in enumerate(members):
        torch.testing.assert_close(outputs[v], same(member, torch.float32)(inputs[v])[0])
        expected = expected_gradients(member, inputs[v])
        for a, b, e in zip(found.values(), stacked, expected, strict=True):
            torch.testing.assert_close(a[v], e)
            torch.testing.assert_close(b[v], e)


@pytest.mark.covering("name")
@pytest.mark.covering("name")
@every_layer
def test_ensembles_with_masks_of_their_own(name, kwargs):
    """Catches: a member that gets the lengths or the resets of another."""
    members = [getattr(rnn_gpu, name)(3, 20, **kwargs) for _ in range(2)]
    parameters, _ = stack_module_state(members)
    inputs, lengths = torch.randn(2, TIME, BATCH, 3), torch.tensor([[5, 1], [0, 3]])
    resets = torch.rand(2, TIME, BATCH) < 0.4

    def sum_of_squares(parameters, input, lengths, resets):
        return functional_call(members[0], parameters, (input,), dict(lengths=lengths, resets=resets))[0].pow(2).sum()

    found = vmap(grad(sum_of_squares))(parameters, inputs, lengths, resets)
    sums = vmap(sum_of_squares)(parameters, inputs, lengths, resets)
    stacked = torch.autograd.grad(sums.sum(), list(parameters.values()))
    for v, member in enumerate(members):
        expected = member(inputs[v], lengths=lengths[v], resets=resets[v])[0].pow(2).sum()
        torch.testing.assert_close(sums[v], expected)
        for a, b, e in zip(
            found.values(), stacked, torch.autograd.grad(expected, list(member.parameters())), strict=True
        ):
            torch.testing.assert_close(a[v], e)
            torch.testing.assert_close(b[v], e)


@every_layer
def test_an_empty_batch(name, kwargs):
    """Catches: a size inferred from no elements, which PyTorch refuses."""
    layer, input = getattr(rnn_gpu, name)(3, 5, **kwargs), torch.randn(TIME, 0, 3)
    parameters = dict(layer.named_parameters())
    assert all((gradient == 0).all() for gradient in grad(loss)(parameters, layer, input).values())
    run = lambda x: layer(x)[0]
    assert vmap(run)(torch.randn(COUNT, TIME, 0, 3)).shape == (COUNT, *run(input).shape)
    assert jvp(run, (input,), (input,))[1].shape == run(input).shape
    (first,) = torch.autograd.grad(run(x := input.requires_grad_()).sum(), x, create_graph=True)
    assert torch.autograd.grad(first.sum() + x.sum(), x)[0].shape == x.shape


@every_layer
def test_vmap_over_nothing(name, kwargs):
    """Catches: an error, or other shapes, where the mapped dimension has no elements."""
    layer, inputs = getattr(rnn_gpu, name)(3, 5, **kwargs), torch.randn(0, TIME, BATCH, 3)
    parameters = dict(layer.named_parameters())
    lengths = torch.zeros(0, BATCH, dtype=torch.int64)
    output, final = layer(torch.randn(TIME, BATCH, 3))
    for run, in_dims, given in (
        (layer, 0, (inputs,)),
        (lambda x, lengths: layer(x, lengths=lengths), 0, (inputs, lengths)),
        (lambda lengths: layer(torch.randn(TIME, BATCH, 3), lengths=lengths), 0, (lengths,)),
    ):
        found, found_final = vmap(run, in_dims, randomness="different")(*given)
        assert found.shape == (0, *output.shape)
        pairs = zip(found_final, final, strict=True) if name == "LSTM" else [(found_final, final)]
        assert all(one.shape == (0, *expected.shape) for one, expected in pairs)
    members = {key: value.new_zeros(0, *value.shape) for key, value in parameters.items()}
    for which, in_dims in ((parameters, (None, None, 0)), (members, (0, None, 0))):
        for key, gradient in vmap(grad(loss), in_dims)(which, layer, inputs).items():
            assert gradient.shape == (0, *parameters[key].shape)


def test_make_fx_with_symbols():
    """Catches: a choice between backends, or a plan, that is looked for by a symbol, which no dictionary takes."""
    layer, x = rnn_gpu.GRU(3, 5), torch.randn(TIME, BATCH, 3)
    parameters = dict(layer.named_parameters())
    run = lambda parameters, x: functional_call(layer, parameters, (x,))[0]
    graph = make_fx(run, tracing_mode="symbolic")(parameters, x)
    torch.testing.assert_close(graph(parameters, x), layer(x)[0])


@every_layer
def test_forward_mode_and_derivatives_of_derivatives(name, kwargs):
    """Catches: a derivative that stops at the operators, silently or with an error."""
    layer = getattr(rnn_gpu, name)(2, 3, **kwargs)
    peer, input, tangent = same(layer, torch.float32), torch.randn(3, 1, 2), torch.randn(3, 1, 2)
    run = lambda x: layer(x)[0]
    jacobian = torch.autograd.functional.jacobian(lambda x: peer(x)[0], input)
    _, along = jvp(run, (input,), (tangent,))
    torch.testing.assert_close(along, (jacobian * tangent).flatten(3).sum(3))
    torch.testing.assert_close(jacrev(run)(input), jacobian)
    torch.testing.assert_close(jacfwd(run)(input), jacobian)
    second = torch.autograd.functional.hessian(lambda x: peer(x)[0].pow(2).sum(), input)
    square = lambda x: run(x).pow(2).sum()
    torch.testing.assert_close(hessian(square)(input), second)
    torch.testing.assert_close(jacrev(jacrev(square))(input), second)
    third = jacrev(jacrev(jacrev(lambda x: run(x).pow(3).sum())))(input[:1])
    torch.testing.assert_close(third, jacfwd(jacrev(jacrev(lambda x: run(x).pow(3).sum())))(input[:1]))


def test_vmap_over_packed_sequences_is_refused():
    """Catches: mapped sequences that are mixed up; padded input with lengths is what maps."""
    layer, lengths = rnn_gpu.GRU(3, 5), torch.tensor([4, 2])
    run = lambda x: layer(pack_padded_sequence(x, lengths))[1]
    with pytest.raises(RuntimeError):
        vmap(run)(torch.randn(COUNT, 4, 2, 3))
