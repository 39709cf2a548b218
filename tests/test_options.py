"""What the layers can do beyond torch.nn's: dropout of recurrent weights; on torch, and on the kernels."""

import copy
import io
import pickle

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import dropout
from torch.nn.utils.rnn import pack_padded_sequence

import rnn_gpu
from rnn_gpu import backends
from tests.layers import BACKEND, ON_BOTH_BACKENDS, pair
from tests.tolerances import assert_close_to_oracle

pytestmark = ON_BOTH_BACKENDS

STACK = {"bidirectional": True, "num_layers": 2}
NAMES = "LSTM", "GRU", "RNN"


@pytest.fixture(autouse=True)
def one_backend(tf32):
    """The backend of this run, several programs, and products in full, to be compared with PyTorch's on a CPU."""
    torch._dynamo.reset()
    tf32("ieee")
    with rnn_gpu.backend(BACKEND), backends.always_exchange():
        yield
    torch._dynamo.reset()


def with_gradients(run, weights, input) -> dict[str, torch.Tensor]:
    """The results of run(input), and the gradients of a fixed loss by its input and by the weights, by name."""
    input = input.detach().requires_grad_()
    output, states = run(input)
    results = [output, *(states if isinstance(states, tuple) else (states,))]
    generator = torch.Generator().manual_seed(5)
    gradients = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    found = torch.autograd.grad(results, [input, *weights.values()], gradients)
    results = {f"result {i}": result.detach() for i, result in enumerate(results)}
    return results | {f"gradient of {k}": d for k, d in zip(("input", *weights), found, strict=True)}


# ---- weight_dropout --------------------------------------------------------------------------------------------------


def dropped(layer, seed: int, p: float) -> dict[str, torch.Tensor]:
    """The masks that a forward after torch.manual_seed(seed) draws, times 1/(1-p)."""
    torch.manual_seed(seed)
    ones = [(name, torch.ones_like(w)) for name, w in layer.named_parameters() if "weight_hh" in name]
    return {name: dropout(one, p) for name, one in ones}


@pytest.mark.parametrize(
    "name, kwargs", [("LSTM", {"proj_size": 3}), ("LSTM", STACK), ("GRU", STACK), ("RNN", {})], ids=str
)
def test_weight_dropout_is_dropout_of_recurrent_weights(name, kwargs):
    """Catches: other weights dropped, a mask without its scale, one that the gradient does not pass, one in eval."""
    layer, oracle = pair(name, 3, 12, **kwargs, seed=1)
    layer.weight_dropout = 0.4
    _, peer = pair(name, 3, 12, **kwargs, seed=1)
    peer = peer.float()
    input, masks = torch.randn(4, 3, 3), dropped(layer, 7, 0.4)
    torch.manual_seed(7)
    actual = with_gradients(layer, dict(layer.named_parameters()), input)

    def by_hand(other, dtype):
        parameters = dict(other.named_parameters())
        weights = {k: w * masks[k].to(dtype) if k in masks else w for k, w in parameters.items()}
        return with_gradients(lambda x: functional_call(other, weights, (x,)), parameters, input.to(dtype))

    expected, floats = by_hand(oracle, torch.float64), by_hand(peer, torch.float32)
    for key, value in actual.items():
        assert_close_to_oracle(value, expected[key], floats[key], key)
    layer.eval()
    torch.testing.assert_close(layer(input)[0], functional_call(peer, {}, (input,))[0])


@pytest.mark.parametrize("name", NAMES)
def test_weight_dropout_with_masks_packed_and_compiled(name):
    """Catches: a route on which the weights stay whole, or that breaks the graph; another mask in the backward."""
    layer, other = getattr(rnn_gpu, name)(3, 12, weight_dropout=0.5), getattr(rnn_gpu, name)(3, 12)
    other.load_state_dict(layer.state_dict())
    masks = dropped(layer, 3, 0.5)
    weights = {k: w * masks[k] if k in masks else w for k, w in other.named_parameters()}
    whole = functional_call(other, weights, (input := torch.randn(4, 3, 3),))[0]
    lengths = torch.tensor([4, 2, 1])
    valid = (torch.arange(4).unsqueeze(1) < lengths).unsqueeze(2)
    packed = pack_padded_sequence(input, lengths)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    runs = (
        (lambda: layer(input)[0], whole),
        (lambda: layer(input, lengths=lengths)[0], whole * valid),
        (lambda: layer(packed)[0].data, pack_padded_sequence(whole, lengths).data),
        (lambda: compiled(input)[0], whole),
    )
    for run, expected in runs:
        torch.manual_seed(3)
        actual = run()
        torch.testing.assert_close(actual, expected)
        of_weight = torch.autograd.grad(actual.sum(), layer.weight_hh_l0)[0]
        assert bool((of_weight[masks["weight_hh_l0"] == 0] == 0).all()) and bool(of_weight.any())


def test_weight_dropout_draws_from_its_distribution():
    """Catches: a rate that is not p, the same mask in every forward, rates 0 and 1."""
    layer = rnn_gpu.LSTM(2, 64, weight_dropout=0.3)
    first, second = (layer._dropped(layer._weights())[1] for _ in range(2))
    kept = first != 0
    assert abs(kept.float().mean() - 0.7) < 6 * (0.3 * 0.7 / kept.numel()) ** 0.5
    torch.testing.assert_close(first[kept], layer.weight_hh_l0.detach()[kept] / 0.7)
    assert not torch.equal(kept, second != 0)
    layer.weight_dropout = 1.0
    _, weight_hh, *_ = layer._dropped(layer._weights())
    assert not weight_hh.any()


# ---- All options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_options_are_kept_and_shown(name):
    """Catches: an option lost by pickle or deepcopy, shown where it was not given, or in the state dict."""
    options = {"weight_dropout": 0.25}
    layer, plain = getattr(rnn_gpu, name)(3, 4, **options), getattr(rnn_gpu, name)(3, 4)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=True)
    for one in (layer, *copies):
        assert all(getattr(one, option) == value for option, value in options.items())
        assert all(f"{option}={value}" in repr(one) for option, value in options.items())
    assert not any(option in repr(plain) for option in options)
    assert layer.state_dict().keys() == getattr(torch.nn, name)(3, 4).state_dict().keys()


def test_layers_with_options_are_not_restored():
    """Catches: a layer of torch.nn's that computes something else than the layer it was."""
    model = torch.nn.ModuleDict({"plain": rnn_gpu.GRU(3, 4), "dropped": rnn_gpu.GRU(3, 4, weight_dropout=0.5)})
    with pytest.warns(UserWarning, match=r"whose options torch.nn does not know: dropped \(weight_dropout=0.5\)"):
        rnn_gpu.restore_rnns(model)
    assert type(model["plain"]) is torch.nn.GRU and type(model["dropped"]) is rnn_gpu.GRU
    assert rnn_gpu.replace_rnns(model)["plain"].weight_dropout == 0


@pytest.mark.parametrize("wrong", [-0.1, 1.5, True, "0.5", None])
def test_wrong_probabilities(wrong):
    """Catches: a value that is no probability, found only in the first forward, or never."""
    for name in NAMES:
        with pytest.raises(ValueError, match=r"weight_dropout should be a number in range \[0, 1\] representing"):
            getattr(rnn_gpu, name)(3, 4, weight_dropout=wrong)
