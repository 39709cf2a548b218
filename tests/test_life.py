"""What happens to a layer over its life: hypothesis draws trainings, changes and calls in any order, and the same
happens to a layer of torch.nn with the same weights.

Catches: a call that remembers what has changed since (rnn_gpu/ready.py, the operators' plans), a gradient of weights as
they were, a weight that is no longer the layer's, modes that leave something behind.
"""

import contextlib
import copy
import io

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnn_gpu
from rnn_gpu.settings import always_exchange
from tests.layers import BACKEND, ON_BOTH_BACKENDS

pytestmark = ON_BOTH_BACKENDS

KINDS = {  # of a layer, few: a kernel is compiled for each
    "LSTM": ("LSTM", {}),
    "LSTM, batch first, both ways": ("LSTM", dict(batch_first=True, bidirectional=True)),
    "GRU, two layers": ("GRU", dict(num_layers=2)),
    "RNN without biases": ("RNN", dict(bias=False)),
}
INPUT, HIDDEN = 3, 5
times, batches = st.integers(1, 3), st.integers(1, 2)


class Doubled(torch.nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


class Life(RuleBasedStateMachine):
    """A layer and its peer."""

    def __init__(self):
        super().__init__()
        self.around = contextlib.ExitStack()

    @initialize(kind=st.sampled_from(list(KINDS)), seed=st.integers(0, 99))
    def begin(self, kind, seed):
        torch.manual_seed(seed)
        name, options = KINDS[kind]
        self.peer = getattr(torch.nn, name)(INPUT, HIDDEN, **options)
        self.layer = getattr(rnn_gpu, name)(INPUT, HIDDEN, **options)
        self.layer.load_state_dict(self.peer.state_dict())
        self.around.enter_context(rnn_gpu.backend(BACKEND))
        self.around.enter_context(always_exchange())
        self.around.enter_context(rnn_gpu.max_programs(None))
        self.around.callback(
            setattr, torch.backends.cudnn.rnn, "fp32_precision", torch.backends.cudnn.rnn.fp32_precision
        )
        torch.backends.cudnn.rnn.fp32_precision = "ieee"
        torch._dynamo.reset()

    def teardown(self):
        self.around.close()

    @property
    def both(self):
        return self.layer, self.peer

    def drawn(self, time, batch, with_states):
        """An input and states, the same for both."""
        layer = self.peer
        shape = (batch, time, INPUT) if layer.batch_first else (time, batch, INPUT)
        sets = layer.num_layers * (2 if layer.bidirectional else 1)
        count = 2 if layer.mode == "LSTM" else 1
        states = tuple(torch.randn(sets, batch, HIDDEN) for _ in range(count))
        return torch.randn(shape), (states if count > 1 else states[0]) if with_states else None

    @rule(time=times, batch=batches, with_states=st.booleans(), mode=st.sampled_from(["no_grad", "inference_mode"]))
    def infer(self, time, batch, with_states, mode):
        input, hx = self.drawn(time, batch, with_states)
        with getattr(torch, mode)():
            self.layer(input, hx)
            torch.testing.assert_close(self.layer(input, hx), self.peer(input, hx))

    @rule(time=times, batch=batches, with_states=st.booleans(), of_input=st.booleans())
    def train(self, time, batch, with_states, of_input):
        """A step of training, with gradients that accumulate over two backwards."""
        input, hx = self.drawn(time, batch, with_states)
        leaves = [input.clone().requires_grad_(of_input) for _ in self.both]
        outputs = [layer(leaf, hx)[0] for layer, leaf in zip(self.both, leaves, strict=True)]
        torch.testing.assert_close(*outputs)
        if outputs[1].requires_grad:
            gradient = torch.randn_like(outputs[1])
            for output in outputs:
                output.backward(gradient, retain_graph=True)
                output.backward(gradient)
        assert outputs[0].requires_grad == outputs[1].requires_grad
        self.compare(*(leaf.grad for leaf in leaves))
        for ours, theirs in zip(self.layer.parameters(), self.peer.parameters(), strict=True):
            self.compare(ours.grad, theirs.grad)
            if theirs.grad is not None:
                with torch.no_grad():
                    theirs -= 0.1 * theirs.grad
                    ours.copy_(theirs)
                ours.grad = theirs.grad = None

    @staticmethod
    def compare(ours, theirs):
        """Of two gradients."""
        if theirs is None or ours is None:
            assert theirs is ours
        else:
            torch.testing.assert_close(ours, theirs)

    @rule(lengths=st.lists(times, min_size=1, max_size=2))
    def pack(self, lengths):
        input, hx = self.drawn(max(lengths), len(lengths), True)
        packed = pack_padded_sequence(input, lengths, self.peer.batch_first, enforce_sorted=False)
        (ours, states), (theirs, expected) = self.layer(packed, hx), self.peer(packed, hx)
        torch.testing.assert_close(pad_packed_sequence(ours), pad_packed_sequence(theirs))
        torch.testing.assert_close(states, expected)

    @rule(lengths=st.lists(st.integers(0, 3), min_size=1, max_size=2).filter(any))
    def pad(self, lengths):
        """With lengths, of which torch.nn takes none of zero."""
        input, _ = self.drawn(max(lengths), len(lengths), False)
        output, states = self.layer(input, lengths=lengths)
        rows = [row for row, length in enumerate(lengths) if length]
        some, first = [lengths[row] for row in rows], self.peer.batch_first
        packed = pack_padded_sequence(input[rows] if first else input[:, rows], some, first, enforce_sorted=False)
        expected, final = self.peer(packed)
        expected, _ = pad_packed_sequence(expected, first)
        torch.testing.assert_close(output[rows] if first else output[:, rows], expected)
        h, expected = (states[0], final[0]) if isinstance(final, tuple) else (states, final)
        torch.testing.assert_close(h[:, rows], expected)

    @rule(time=times, grads=st.booleans())
    def compile(self, time, grads):
        """A graph of before may serve, or not."""
        input, hx = self.drawn(time, 2, grads)
        with torch.set_grad_enabled(grads):
            output, expected = torch.compile(self.layer, backend="eager")(input, hx)[0], self.peer(input, hx)[0]
        torch.testing.assert_close(output, expected)
        if expected.requires_grad:
            leaves = [[one for one in layer.parameters() if one.requires_grad] for layer in self.both]
            found = [torch.autograd.grad(o.sum(), of) for o, of in zip((output, expected), leaves, strict=True)]
            torch.testing.assert_close(*found)

    @rule(which=st.integers(0, 3), way=st.sampled_from(["in place", "data", "new", "frozen", "thawed"]))
    def change(self, which, way):
        """A weight."""
        names = [name for name, _ in self.peer.named_parameters()]
        name = names[which % len(names)]
        if "parametrizations" in name:
            return
        value = torch.randn_like(getattr(self.peer, name))
        for layer in self.both:
            weight = getattr(layer, name)
            if way == "in place":
                with torch.no_grad():
                    weight.copy_(value)
            elif way == "data":
                weight.data = value.clone()
            elif way == "new":
                setattr(layer, name, torch.nn.Parameter(value.clone()))
            else:
                weight.requires_grad_(way == "thawed")

    @rule(way=st.sampled_from(["copied", "saved", "loaded", "assigned", "evaluated", "trained", "cast", "flattened"]))
    def live(self, way):
        if way in ("loaded", "assigned"):
            state = {name: torch.randn_like(value) for name, value in self.peer.state_dict().items()}
            for layer in self.both:
                layer.load_state_dict({name: one.clone() for name, one in state.items()}, assign=way == "assigned")
        elif way == "evaluated" or way == "trained":
            for layer in self.both:
                layer.train(way == "trained")
        elif way == "cast":
            for layer in self.both:
                layer.double().float()
        elif way == "flattened":
            for layer in self.both:
                layer.flatten_parameters()
        elif parametrize.is_parametrized(self.peer):
            return  # torch.nn cannot be copied then
        elif way == "copied":
            self.layer, self.peer = copy.deepcopy(self.layer), copy.deepcopy(self.peer)
        else:
            file = io.BytesIO()
            torch.save(self.layer, file)
            file.seek(0)
            self.layer = torch.load(file, weights_only=False)

    @rule()
    def parametrized(self):
        name = "weight_hh_l0"
        for layer in self.both:
            if parametrize.is_parametrized(layer):
                parametrize.remove_parametrizations(layer, name, leave_parametrized=False)
            else:
                parametrize.register_parametrization(layer, name, Doubled())

    @rule(time=times)
    def call_with_other_weights(self, time):
        """By torch.func, and what comes of it leaves the layer's own alone."""
        if parametrize.is_parametrized(self.peer):
            return
        input, _ = self.drawn(time, 2, False)
        others = {name: torch.randn_like(one) for name, one in self.peer.named_parameters()}
        with torch.no_grad():
            for _ in range(2):  # the second is remembered
                self.layer(input)
            expected = functional_call(self.peer, others, (input,))
            torch.testing.assert_close(functional_call(self.layer, others, (input,)), expected)
            torch.testing.assert_close(self.layer(input), self.peer(input))

    @rule(memory=st.sampled_from(["full", "lean", None]), programs=st.sampled_from([None, 8]))
    def set(self, memory, programs):
        """What belongs to this library alone, and changes no result."""
        self.layer.memory = memory
        rnn_gpu.max_programs(programs)


class TestLife(Life.TestCase):
    settings = settings(
        max_examples=8, stateful_step_count=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


@pytest.mark.slow
class TestLongLife(Life.TestCase):
    settings = settings(
        max_examples=150,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
