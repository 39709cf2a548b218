"""Calls that are like one before (rnn_gpu/ready.py): the same results by the short way, and nothing that has changed
since is overlooked.
"""

import contextlib
import copy
import pickle

import pytest
import torch
from torch.nn.utils import parametrize

from tests.layers import INTERPRETED, draw, outcome, pair, same
from tests.tolerances import assert_close_to_oracle

if not INTERPRETED:
    pytest.skip(
        "needs TRITON_INTERPRET=1, set before Python starts: about calls on the kernels", allow_module_level=True
    )

import rnn_gpu
from rnn_gpu import ready

pytestmark = [pytest.mark.interpreted]

LAYERS = {
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", dict(batch_first=True)),
    "RNN": ("RNN", dict(bias=False)),
    "both ways": ("LSTM", dict(bidirectional=True, batch_first=True)),
    "stack": ("GRU", dict(num_layers=2, bidirectional=True)),
}


@pytest.fixture(autouse=True)
def on_the_kernels(monkeypatch):
    """Products in full, to be compared with PyTorch's on a CPU."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    with rnn_gpu.backend("triton"):
        yield


@contextlib.contextmanager
def the_long_way_closed(monkeypatch):
    """Within this context a call that is looked at as if there had been none before is an error."""
    with monkeypatch.context() as patch:
        patch.setattr(rnn_gpu.base._Layer, "_forward_rows", None)
        yield


def layer_and_input(name="LSTM", **options):
    """A layer that has been called in training and in inference, and the input of those calls."""
    torch.manual_seed(0)
    layer, input = getattr(rnn_gpu, name)(5, 7, **options), torch.randn(3, 2, 5)
    layer(input)
    with torch.no_grad():
        layer(input)
    return layer, input


@pytest.mark.covering("name", "with_states")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("with_states", [False, True], ids=["zeros", "states"])
def test_the_short_way_gives_the_same(name, with_states, monkeypatch):
    """Catches: states, biases or directions in another order, results laid out otherwise, gradients that go missing."""
    kind, options = LAYERS[name]
    ours, oracle = pair(kind, 5, 7, **options)
    input, states = draw(ours, 3, 2)
    states = states if with_states else None
    first = outcome(ours, input, states, "triton")
    with the_long_way_closed(monkeypatch):
        again = outcome(ours, input, states, "triton")
        longer, _ = draw(ours, 5, 2)  # any number of steps
        outcome(ours, longer, states, "triton")
    assert all(torch.equal(again[key], first[key]) and again[key].shape == first[key].shape for key in first)
    expected, peer = outcome(oracle, input, states, "torch"), outcome(same(ours, torch.float32), input, states, "torch")
    for key, value in expected.items():
        assert_close_to_oracle(again[key], value, peer[key], key)


def test_inference_goes_the_short_way_too(monkeypatch):
    """Catches: a call without gradients that is taken for one with, and keeps what nobody needs."""
    layer, input = layer_and_input()
    with torch.no_grad():
        expected = layer(input)
        with the_long_way_closed(monkeypatch):
            found = layer(input)
    assert not found[0].requires_grad and torch.equal(found[0], expected[0])
    assert layer(input)[0].requires_grad
    layer.requires_grad_(False)
    assert not layer(input)[0].requires_grad
    assert layer(input.requires_grad_())[0].requires_grad


CHANGES = {
    "a new weight": lambda layer: setattr(layer, "weight_ih_l0", torch.nn.Parameter(torch.ones(28, 5))),
    "a weight written into": lambda layer: layer.weight_hh_l0.data.fill_(0.5),
    "a weight with other memory": lambda layer: setattr(layer.bias_ih_l0, "data", torch.ones(28)),
    "a weight put into the list by hand": lambda layer: layer._flat_weights.__setitem__(1, torch.ones(28, 7)),
    "a weight in the dictionary": lambda layer: layer._parameters.update(bias_hh_l0=torch.nn.Parameter(torch.ones(28))),
    "zoneout": lambda layer: setattr(layer.eval(), "zoneout", 0.5),
    "dropped weights": lambda layer: setattr(layer, "weight_dropout", 1.0),
    "a parametrization": lambda layer: parametrize.register_parametrization(layer, "weight_hh_l0", Doubled()),
    "batch first": lambda layer: setattr(layer, "batch_first", True),
}


class ByClass(rnn_gpu.GRU):
    """Options that are nobody's attribute."""

    rate = 0.0

    @property
    def zoneout(self):
        return self.rate


def test_options_by_a_class_are_seen(monkeypatch):
    """Catches: a schedule written as a property that holds from the first call on."""
    layer, input = ByClass(5, 7).eval(), torch.randn(3, 2, 5)
    before = layer(input)[0]
    monkeypatch.setattr(ByClass, "rate", 0.5)
    after = layer(input)[0]
    assert torch.equal(after, copy.deepcopy(layer)(input)[0]) and not torch.equal(after, before)


def test_options_that_a_compiled_function_sets_are_seen():
    """Catches: dropout in eval mode, because torch.compile sets attributes without a word."""
    layer, input = rnn_gpu.GRU(5, 7, num_layers=2, dropout=0.9), torch.randn(3, 2, 5)

    def in_eval_mode(input):
        layer.eval()
        return layer(input)[0]

    compiled = torch.compile(in_eval_mode, backend="eager")
    compiled(input)
    layer.train()
    layer(input)
    expected = compiled(input)
    assert torch.equal(layer(input)[0], layer(input)[0]) and torch.equal(layer(input)[0], expected)


def test_what_changes_during_a_call_is_not_taken_for_its_beginning():
    """Catches: a call in training mode that is remembered as one in eval mode, since another thread has switched."""
    layer, input = rnn_gpu.GRU(5, 7, num_layers=2, dropout=0.9), torch.randn(3, 2, 5)

    def pack(tensor):
        layer.eval()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(input)
    assert torch.equal(layer(input)[0], layer(input)[0])


def test_an_opposite_view_has_the_values_that_it_shows():
    """Catches: `imag` of a conjugate as a state or a weight, read as the opposite of what it shows."""
    layer, input = layer_and_input("GRU")
    state = torch.randn(1, 2, 7)
    opposite = torch.complex(torch.zeros_like(state), -state).conj().imag
    assert opposite.is_neg() and torch.equal(opposite, state)
    assert torch.equal(layer(input, opposite)[0], layer(input, state)[0])
    other = copy.deepcopy(layer)
    layer.weight_hh_l0.data = torch.complex(torch.zeros(21, 7), -layer.weight_hh_l0.data).conj().imag
    assert torch.equal(layer(input)[0], other(input)[0])


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_what_has_changed_since_is_seen(change):
    """Catches: results of the weights and options of an earlier call."""
    layer, input = layer_and_input()
    fresh = copy.deepcopy(layer)
    assert fresh._known_calls is None
    change(layer)
    change(fresh)
    before = layer_and_input()[0](input)[0]
    found, expected = layer(input)[0], fresh(input)[0]
    assert torch.equal(found, expected) and not torch.equal(found, before)


def test_options_of_the_backward_are_seen():
    """Catches: a limit of the gradient that was set after the first call."""
    layer, input = layer_and_input()
    input = input.requires_grad_()
    gradients = []
    for clip in (None, 1e-3, None):
        layer.clip = clip
        gradients.append(torch.autograd.grad(layer(input)[0].sum(), input)[0])
    assert torch.equal(gradients[0], gradients[2]) and not torch.equal(gradients[0], gradients[1])


def test_settings_and_modes_are_seen(monkeypatch):
    """Catches: a backend, a precision, autocast or a transform that was chosen after the first call."""
    layer, input = layer_and_input()
    asked = []
    long_way = rnn_gpu.base._Layer._forward_rows
    monkeypatch.setattr(rnn_gpu.base._Layer, "_forward_rows", lambda self, *a: asked.append(True) or long_way(self, *a))
    layer(input)
    assert not asked
    with rnn_gpu.backend("torch"):
        layer(input)
    assert not asked  # torch.nn's own forward
    for setting in (rnn_gpu.memory("lean"), rnn_gpu.max_programs(100)):
        with setting:
            layer(input)
        assert len(asked) == 1 and asked.pop()
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")
    layer(input)
    assert len(asked) == 1 and asked.pop()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(input)[0].dtype == torch.bfloat16
    assert len(asked) == 1 and asked.pop()
    torch.func.vmap(lambda x: layer(x)[0])(input.unsqueeze(0))
    torch.func.functional_call(layer, {"bias_ih_l0": torch.ones(28)}, (input,))
    assert len(asked) == 2


WRONG = {
    "features": (torch.zeros(3, 2, 4), None),
    "type": (torch.zeros(3, 2, 5, dtype=torch.float64), None),
    "steps": (torch.zeros(0, 2, 5), None),
    "one state": (torch.zeros(3, 2, 5), torch.zeros(1, 2, 7)),
    "three states": (torch.zeros(3, 2, 5), (torch.zeros(1, 2, 7),) * 3),
    "rows of a state": (torch.zeros(3, 2, 5), (torch.zeros(1, 3, 7),) * 2),
    "type of a state": (torch.zeros(3, 2, 5), (torch.zeros(1, 2, 7, dtype=torch.float16),) * 2),
    "no states": (torch.zeros(3, 2, 5), (1, 2)),
}


@pytest.mark.parametrize("given", WRONG.values(), ids=list(WRONG))
def test_wrong_input_raises_as_it_would_at_first(given):
    """Catches: a check that only the first call makes."""
    layer, _ = layer_and_input()
    errors = []
    for one in (layer, copy.deepcopy(layer)):
        with pytest.raises(Exception) as raised:
            one(*given)
        errors.append((type(raised.value), str(raised.value)))
    assert errors[0] == errors[1]


def test_a_weight_of_another_size_or_type_is_seen():
    """Catches: a launch over memory that is not there."""
    for change in (lambda w: w.data.new_zeros(8, 7), lambda w: w.data.double()):
        layer, input = layer_and_input("GRU")
        layer.weight_hh_l0.data = change(layer.weight_hh_l0)
        with pytest.raises(RuntimeError):
            layer(input)


def test_weights_that_are_not_those_of_the_attributes_are_refused():
    """Catches: attributes set after the first call, for which the layer has no weights, or others: a layer of another
    kind in silence, or memory read that is not there.
    """
    cases = [({"num_layers": 2}, 8), ({"bias": False}, 2), ({"bidirectional": True}, 8), ({"num_layers": 3}, 12)]
    for changes, count in cases:
        layer, input = layer_and_input("GRU")
        vars(layer).update(changes)
        with pytest.raises(RuntimeError, match=f"incorrect number of RNN parameters: expected {count}, got 4"):
            layer(input)
    layer, input = layer_and_input("GRU")
    layer(input)
    layer._flat_weights = layer._flat_weights[:2]
    with pytest.raises(RuntimeError, match="incorrect number of RNN parameters: expected 4, got 2"):
        layer(input)
    layer = rnn_gpu.GRU(5, 7, bidirectional=True)
    layer.bidirectional, layer.num_layers = False, 2  # as many weights of other sizes
    with pytest.raises(RuntimeError, match=r"Expected weight_ih_l0_reverse size \(21, 7\), got \[21, 5\]"):
        layer(input)
    layer, input = layer_and_input("GRU")
    layer.weight_hh_l0 = None
    with pytest.raises(TypeError, match="expected Tensor as element 1 in argument 2, but got NoneType"):
        layer(input)
    with pytest.raises(AttributeError, match="'str' object has no attribute 'dim'"):
        rnn_gpu.LSTM(5, 7)(input, "a")


def test_another_nonlinearity_is_seen():
    """Catches: a mode that was set after the first call, as torch.nn's RNN reads it at every call."""
    layer, input = layer_and_input("RNN")
    layer.mode = "RNN_RELU"
    assert torch.equal(layer(input)[0], copy.deepcopy(layer)(input)[0]) and layer(input)[0].min() == 0


def test_states_of_a_gru_are_no_tuple():
    """Catches: a tuple of one state, which torch.nn's GRU does not take, and would from the second call on."""
    layer, input = layer_and_input("GRU")
    state = torch.zeros(1, 2, 7)
    layer(input, state)
    with pytest.raises((TypeError, AttributeError, RuntimeError)):
        layer(input, (state,))


def test_copies_and_files_hold_nothing_of_it():
    """Catches: a model that cannot be saved after its first call, or that brings another process's decisions."""
    layer, input = layer_and_input()
    assert layer._known_calls
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert "_known_calls" not in other.__dict__
        assert torch.equal(other(input)[0], layer(input)[0])
    assert b"rnn_gpu" not in pickle.dumps(rnn_gpu.restore_rnns(layer))


def test_whoever_looks_at_every_call_is_asked():
    """Catches: an override of torch.nn's checks, by a class or of one layer, that is passed by."""
    seen = []
    layer = rnn_gpu.LSTM(5, 7)
    layer.check_hidden_size = lambda *a: seen.append(a)
    for _ in range(3):
        layer(torch.randn(3, 2, 5), (torch.zeros(1, 2, 7),) * 2)
    assert len(seen) == 6
    seen.clear()
    layer = rnn_gpu.LSTM(5, 7)
    layer(torch.randn(3, 2, 5))
    layer.check_input = lambda *a: seen.append(a)
    layer(torch.randn(3, 2, 5))
    assert len(seen) == 1
    seen.clear()

    class Looking(rnn_gpu.GRU):
        def check_input(self, input, batch_sizes):
            seen.append(input)
            return super().check_input(input, batch_sizes)

    layer = Looking(5, 7)
    for _ in range(3):
        layer(torch.randn(3, 2, 5))
    assert len(seen) == 3


def test_no_more_calls_are_remembered_than_are_worth_it(monkeypatch):
    """Catches: memory that grows with every new batch size."""
    monkeypatch.setattr(ready, "MOST", 2)
    layer, _ = layer_and_input()
    for batch in range(1, 6):
        layer(torch.randn(3, batch, 5))
        assert len(layer._known_calls) <= 2
