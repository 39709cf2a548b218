"""Sequences as they come: packed input, projection, lengths and resets, on every backend, against torch.nn in
float64.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnn_gpu
from rnn_gpu import base
from rnn_gpu.settings import always_exchange
from tests.interpreter import concurrent_programs
from tests.layers import BACKEND, INTERPRETED, ON_BOTH_BACKENDS, pair, same
from tests.sequences import as_hx, as_tuple, one_at_a_time, outcome, states_of
from tests.tolerances import assert_close_to_oracle

NAMES = ("LSTM", "GRU", "RNN")
LENGTHS = [3, 5, 0, 1, 4, 5, 2]
TIME = 5

pytestmark = ON_BOTH_BACKENDS


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    """Compare with full products."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")


def draw(layer, batch, time=TIME):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(time, batch, layer.input_size, generator=generator)


def compare(run, oracle_run, layers, input, dtype=torch.float32, exchange=True):
    """The error rule, torch.nn in the same dtype as peer."""
    layer, oracle = layers
    states = states_of(layer, input.shape[1], dtype)
    input = input.to(dtype)
    expected = outcome(oracle_run, oracle, input.double(), states)
    peer = outcome(oracle_run, same(layer, dtype), input, states)
    if exchange:
        with always_exchange():
            actual = outcome(run, layer, input, states, BACKEND)
    else:
        actual = outcome(run, layer, input, states, BACKEND)
    for index, (a, e, p) in enumerate(zip(actual, expected, peer, strict=True)):
        assert a.shape == e.shape
        assert_close_to_oracle(a, e, p, f"result {index}")


def packed_run(lengths, enforce_sorted=False):
    def run(layer, input, states):
        packed = pack_padded_sequence(input, lengths, enforce_sorted=enforce_sorted)
        output, hx = layer(packed, as_hx(states))
        assert isinstance(output, PackedSequence)
        return output.data, *as_tuple(hx)

    return run


def lengths_run(lengths, **kwargs):
    def run(layer, input, states):
        output, hx = layer(input, as_hx(states), lengths=torch.tensor(lengths), **kwargs)
        return output, *as_tuple(hx)

    return run


@pytest.mark.covering(("name", "kwargs"), "exchange")
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "alone"])
@pytest.mark.parametrize("kwargs", [{}, {"bidirectional": True, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_packed(name, kwargs, exchange):
    """Catches: a row read from another step's place, states in another order than the user's, a direction that starts
    wrong.
    """
    layers = pair(name, 4, 20, **kwargs)
    lengths = torch.tensor([3, 5, 1, 1, 4, 5, 2])
    compare(packed_run(lengths), packed_run(lengths), layers, draw(layers[0], 7), exchange=exchange)


def test_packed_sorted_many_rows():
    """Catches: batch slices that end early and leave others waiting or their rows unwritten."""
    layers = pair("GRU", 4, 20, bidirectional=True)
    lengths = torch.tensor([5] * 3 + [4] * 9 + [2] * 8 + [1] * 15)
    run = packed_run(lengths, enforce_sorted=True)
    compare(run, run, layers, draw(layers[0], len(lengths)))


@pytest.mark.parametrize("name", NAMES)
def test_packed_without_states(name):
    """Catches: initial states of zero in the wrong shape for packed input."""
    layer, oracle = pair(name, 4, 9, bidirectional=True)
    packed = pack_padded_sequence(draw(layer, 3), torch.tensor([2, 5, 3]), enforce_sorted=False)
    with rnn_gpu.backend(BACKEND):
        output, _ = layer(packed)
    expected, _ = oracle(PackedSequence(packed.data.double(), *packed[1:]))
    peer, _ = same(layer, torch.float32)(packed)
    assert_close_to_oracle(output.data, expected.data, peer.data)
    assert torch.equal(output.batch_sizes, packed.batch_sizes)
    assert torch.equal(output.sorted_indices, packed.sorted_indices)


@pytest.mark.covering(("name", "kwargs"), "exchange")
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "alone"])
@pytest.mark.parametrize("kwargs", [{}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_lengths(name, kwargs, exchange):
    """Catches: padding that reaches a result or a gradient, a final state not at the row's end, an empty row that
    fails.
    """
    layers = pair(name, 4, 20, **kwargs)

    def oracle_run(layer, input, states):
        return one_at_a_time(layer, input, states, LENGTHS)

    compare(lengths_run(LENGTHS), oracle_run, layers, draw(layers[0], len(LENGTHS)), exchange=exchange)


@pytest.mark.parametrize("name", NAMES)
def test_lengths_in_a_stack_equal_packed(name):
    """Catches: a second layer or direction that sees the first one's padding."""
    layer, _ = pair(name, 4, 12, num_layers=2, bidirectional=True, batch_first=True)
    input, lengths = draw(layer, 4).transpose(0, 1), torch.tensor([3, 5, 1, 4])
    with rnn_gpu.backend(BACKEND):
        output, hx = layer(input, lengths=lengths)
        packed, packed_hx = layer(pack_padded_sequence(input, lengths, batch_first=True, enforce_sorted=False))
    padded, _ = pad_packed_sequence(packed, batch_first=True, total_length=TIME)
    torch.testing.assert_close(output, padded)
    for a, b in zip(as_tuple(hx), as_tuple(packed_hx), strict=True):
        torch.testing.assert_close(a, b)


def test_padding_may_hold_nan():
    """Catches: a NaN in the padding that reaches a result, a final state or a gradient."""
    layer, _ = pair("LSTM", 4, 12, bidirectional=True)
    input, lengths = draw(layer, 7), torch.tensor(LENGTHS)
    dirty = input.clone()
    dirty[torch.arange(TIME)[:, None] >= lengths] = torch.nan
    with rnn_gpu.backend(BACKEND):
        clean = layer(input, lengths=lengths)
        output, hx = layer(dirty, lengths=lengths)
    assert torch.equal(output, clean[0]) and all(map(torch.equal, hx, clean[1]))
    output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_lengths_beyond_the_steps_are_clamped(monkeypatch):
    """Catches: where nobody looks at lengths, as on a GPU, a final state never written because no step is the row's
    last.
    """
    monkeypatch.setattr(base, "_check_range", lambda lengths, time: None)
    layer, _ = pair("GRU", 4, 12)
    input = draw(layer, 3)
    with rnn_gpu.backend(BACKEND):
        output, h_n = layer(input, lengths=torch.tensor([TIME, 99, -3]))
        whole, last = layer(input)
    torch.testing.assert_close((output[:, :2], h_n[:, :2]), (whole[:, :2], last[:, :2]))
    assert not output[:, 2].any() and not h_n[:, 2].any()


def test_lengths_beyond_the_steps_are_refused_where_it_costs_nothing():
    """Catches: a length that cannot be meant, on the CPU or in a list, taken for another one in silence."""
    layer, input = rnn_gpu.GRU(3, 4), torch.randn(5, 2, 3)
    with rnn_gpu.backend(BACKEND):
        for lengths, found in (([5, 6], 6), ([-1, 2], -1)):
            for given in (lengths, torch.tensor(lengths), torch.tensor(lengths, dtype=torch.int8)):
                with pytest.raises(RuntimeError, match=f"Expected lengths between 0 and 5, got {found}"):
                    layer(input, lengths=given)


def test_lengths_as_a_list():
    """Catches: lengths that pack_padded_sequence takes and a layer does not, and a list that is cut to integers."""
    layer, input = rnn_gpu.GRU(3, 4), torch.randn(5, 2, 3)
    with rnn_gpu.backend(BACKEND):
        expected = layer(input, lengths=torch.tensor([5, 2]))
        for lengths in ([5, 2], (5, 2), torch.tensor([5, 2]).numpy(), [torch.tensor(5), 2]):
            torch.testing.assert_close(layer(input, lengths=lengths), expected, rtol=0, atol=0)
        for lengths in ([5.0, 2], [True, False], "52", 5, [[5], [2]], {5, 2}, {5: 0, 2: 0}):
            with pytest.raises(TypeError, match="lengths should be a tensor or a list of integers, got: "):
                layer(input, lengths=lengths)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_empty_sequences_is_differentiable(name):
    """Catches: final states without a gradient where no row has a step, on one of the backends."""
    layer = getattr(rnn_gpu, name)(3, 4)
    with rnn_gpu.backend(BACKEND):
        _, hx = layer(torch.randn(5, 2, 3), lengths=[0, 0])
        sum(state.sum() for state in as_tuple(hx)).backward()
    assert not any(parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "alone"])
@pytest.mark.parametrize("name", NAMES)
def test_resets(name, exchange):
    """Catches: a state or a gradient that passes a reset, also at the first step, and one that is cut without a
    reset.
    """
    layers = pair(name, 4, 20)
    generator = torch.Generator().manual_seed(6)
    resets = torch.rand(TIME, 7, generator=generator) < 0.35
    resets[0, :2] = True

    def run(layer, input, states):
        output, hx = layer(input, as_hx(states), resets=resets)
        return output, *as_tuple(hx)

    def oracle_run(layer, input, states):
        return one_at_a_time(layer, input, states, [TIME] * 7, resets)

    compare(run, oracle_run, layers, draw(layers[0], 7), exchange=exchange)


@pytest.mark.parametrize("name", NAMES)
def test_resets_both_directions_and_lengths(name):
    """Catches: a reset taken in the wrong direction of time, or one that touches a row past its end."""
    layer, _ = pair(name, 4, 12, bidirectional=True)
    resets = torch.rand(TIME, 7, generator=torch.Generator().manual_seed(7)) < 0.35
    input, lengths = draw(layer, 7), torch.tensor(LENGTHS)
    states = states_of(layer, 7, torch.float32)

    def run(layer, input, states):
        output, hx = layer(input, as_hx(states), lengths=lengths, resets=resets)
        return output, *as_tuple(hx)

    actual = outcome(run, layer, input, states, BACKEND)
    peer = outcome(run, layer, input, states, "torch")
    expected = outcome(run, layer.double(), input, states, "torch")
    for a, e, p in zip(actual, expected, peer, strict=True):
        assert_close_to_oracle(a, e, p)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "alone"])
@pytest.mark.parametrize("kwargs", [{}, {"bidirectional": True, "num_layers": 2, "bias": False}], ids=str)
def test_projection(kwargs, exchange):
    """Catches: a combined weight whose gradients or whose first step go wrong."""
    torch.manual_seed(0)
    layer = rnn_gpu.LSTM(4, 20, proj_size=7, **kwargs)
    oracle = torch.nn.LSTM(4, 20, proj_size=7, **kwargs).double()
    peer = torch.nn.LSTM(4, 20, proj_size=7, **kwargs)
    oracle.load_state_dict({key: value.double() for key, value in layer.state_dict().items()})
    peer.load_state_dict(layer.state_dict())
    input, states = draw(layer, 3), states_of(layer, 3, torch.float32)

    def run(layer, input, states):
        output, hx = layer(input, hx=as_hx(states))
        return output, *hx

    def run_exchange(layer, input, states):
        if not exchange:
            return run(layer, input, states)
        with always_exchange():
            return run(layer, input, states)

    expected, peers = outcome(run, oracle, input, states), outcome(run, peer, input, states)
    for a, e, p in zip(outcome(run_exchange, layer, input, states, BACKEND), expected, peers, strict=True):
        assert_close_to_oracle(a, e, p)


def test_projection_of_packed_and_masked():
    """Catches: a projection that forgets where rows lie, or the h0 of an empty row or of one that starts anew."""
    torch.manual_seed(0)
    layer = rnn_gpu.LSTM(4, 20, proj_size=7, bidirectional=True)
    oracle = torch.nn.LSTM(4, 20, proj_size=7, bidirectional=True).double()
    peer = torch.nn.LSTM(4, 20, proj_size=7, bidirectional=True)
    oracle.load_state_dict({key: value.double() for key, value in layer.state_dict().items()})
    peer.load_state_dict(layer.state_dict())
    input = draw(layer, 7)
    states = states_of(layer, 7, torch.float32)
    run = packed_run(torch.tensor([3, 5, 1, 1, 4, 5, 2]))
    expected, peers = outcome(run, oracle, input, states), outcome(run, peer, input, states)
    for a, e, p in zip(outcome(run, layer, input, states, BACKEND), expected, peers, strict=True):
        assert_close_to_oracle(a, e, p)

    def cut(layer, input, states):
        return one_at_a_time(layer, input, states, LENGTHS)

    expected, peers = outcome(cut, oracle, input, states), outcome(cut, peer, input, states)
    for a, e, p in zip(outcome(lengths_run(LENGTHS), layer, input, states, BACKEND), expected, peers, strict=True):
        assert_close_to_oracle(a, e, p)


@pytest.mark.covering("name", "dtype")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bits(name, dtype):
    """Catches: a mask or a packed row that is right in float32 words alone."""
    layer, oracle = pair(name, 4, 33, dtype=dtype, bidirectional=True)
    lengths = torch.tensor([3, 5, 1, 4])
    run = packed_run(lengths)
    compare(run, run, (layer, oracle), draw(layer, 4), dtype)


@settings(deadline=None, max_examples=8, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(NAMES),
    hidden_size=st.integers(2, 40),  # a gradient of one number may be a sum that cancels
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=18).filter(any),
    bidirectional=st.booleans(),
    exchange=st.booleans(),
    seed=st.integers(0, 1000),
    torn=st.booleans(),
)
def test_any_lengths(name, hidden_size, lengths, bidirectional, exchange, seed, torn):
    """Catches: a combination of lengths, slices and schedule nobody thought of."""
    layers = pair(name, 3, hidden_size, bidirectional=bidirectional)

    def oracle_run(layer, input, states):
        return one_at_a_time(layer, input, states, lengths)

    with concurrent_programs(seed, torn=torn) if INTERPRETED else torch.enable_grad():
        compare(lengths_run(lengths), oracle_run, layers, draw(layers[0], len(lengths), 6), exchange=exchange)


@pytest.mark.parametrize("packed", [True, False])
def test_double_backward(packed):
    """Catches: a second derivative that forgets the masks or where packed rows lie."""
    layer, oracle = pair("LSTM", 3, 9, bidirectional=True)
    input = draw(layer, 4)
    lengths = torch.tensor([3, 5, 1, 4])

    def penalty(module, input, backend, packed):
        input = input.clone().requires_grad_()
        with rnn_gpu.backend(backend):
            if packed:
                output = module(pack_padded_sequence(input, lengths, enforce_sorted=False))[0].data
            else:
                output, _ = module(input, lengths=lengths)
        (gradient,) = torch.autograd.grad(output.sum() + output.pow(2).sum(), input, create_graph=True)
        return torch.autograd.grad(gradient.pow(2).sum(), [input, *module.parameters()])

    expected = penalty(oracle, input.double(), "torch", True)
    peer = penalty(same(layer, torch.float32), input, "torch", True)
    for a, e, p in zip(penalty(layer, input, BACKEND, packed), expected, peer, strict=True):
        assert_close_to_oracle(a, e, p)


def test_bad_masks_are_refused():
    """Catches: a mask of the wrong shape or type that is broadcast or read as something else."""
    layer = rnn_gpu.GRU(3, 4)
    input, packed = torch.randn(5, 2, 3), pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 3]))
    cases = [
        (input, {"lengths": torch.tensor([1, 2, 3])}, RuntimeError, r"Expected lengths size \[2\], got \[3\]"),
        (input, {"lengths": torch.tensor([1.0, 2.0])}, TypeError, "lengths should be an integer tensor"),
        (input, {"lengths": torch.tensor([1, 2], dtype=torch.uint64)}, TypeError, "lengths should be an integer"),
        (input, {"lengths": torch.tensor([1j, 2j])}, TypeError, "lengths should be an integer tensor"),
        (input, {"lengths": [1, 2, 3]}, RuntimeError, r"Expected lengths size \[2\], got \[3\]"),
        (input, {"resets": [[True]]}, TypeError, "resets should be a tensor, got: list"),
        (input[:, 0], {"resets": torch.zeros(4, dtype=torch.bool)}, RuntimeError, r"resets size \[5\], got \[4\]"),
        (input[:, 0], {"lengths": torch.tensor([1, 2])}, RuntimeError, r"Expected lengths size \[1\], got \[2\]"),
        (input, {"resets": torch.zeros(2, 5, dtype=torch.bool)}, RuntimeError, r"Expected resets size \[5, 2\]"),
        (input, {"resets": torch.zeros(5, 2)}, TypeError, "resets should be a bool tensor"),
        (packed, {"lengths": torch.tensor([1, 2])}, ValueError, "got a PackedSequence"),
    ]
    for given_input, masks, error, text in cases:
        with rnn_gpu.backend(BACKEND), pytest.raises(error, match=text):
            layer(given_input, **masks)


@pytest.mark.skipif(not INTERPRETED, reason="backend 'torch' is torch.nn's own forward")
def test_bad_packed_sequences_are_refused():
    """Catches: memory read or written that is not there, or other numbers in silence, also after a call that was right;
    an empty last step, which torch.nn takes, refused.
    """
    layer, oracle = pair("GRU", 3, 4)
    data, sizes, order = torch.randn(6, 3), torch.tensor([3, 2, 1, 0]), torch.tensor([2, 0, 1])
    good = PackedSequence(data, sizes, order, order.argsort())
    rows, indices, falling = (
        "as many rows as batch_sizes sum up to, 6",
        "of the 3 sequences that were packed",
        "never increase",
    )
    cases = [
        ((data[:-2], sizes), rows),
        ((torch.cat([data, data]), sizes), rows),
        ((data, sizes.flip(0)), falling),
        ((data, torch.tensor([3, 2, 2, -1])), falling),
        ((data, sizes.int()), "1D of torch.int64"),
        ((data, sizes, order[:2], order[:2]), indices),
        ((data, sizes, order, order[:2]), indices),
        ((data, sizes, torch.arange(4), torch.arange(4)), indices),
    ]
    with rnn_gpu.backend(BACKEND):
        output, h_n = layer(good)
        for wrong, text in cases:
            with pytest.raises(RuntimeError, match=text):
                layer(PackedSequence(*wrong))
    expected, final = oracle(PackedSequence(data.double(), *good[1:]))
    torch.testing.assert_close((output.data, h_n), (expected.data.float(), final.float()))


@pytest.mark.parametrize("batch_first", [False, True])
def test_masks_of_an_unbatched_sequence(batch_first):
    """Catches: one sequence with lengths [] or [1] and resets [T] that is not treated as a batch of one."""
    layer = rnn_gpu.GRU(3, 12, bidirectional=True, batch_first=batch_first)
    input, resets = torch.randn(5, 3), torch.tensor([False, True, False, False, True])
    rows = 0 if batch_first else 1
    with rnn_gpu.backend(BACKEND):
        expected, _ = layer(input.unsqueeze(rows), lengths=torch.tensor([4]), resets=resets.unsqueeze(rows))
        for length in (torch.tensor(4), torch.tensor([4])):
            output, h_n = layer(input, lengths=length, resets=resets)
            torch.testing.assert_close(output, expected.squeeze(rows))
            assert h_n.shape == (2, 12)


def test_a_reset_shields_the_weights_from_a_nan_state():
    """Catches: 0 * NaN in a weight's gradient where a row starts anew from a broken state."""
    layer = rnn_gpu.GRU(3, 12)
    resets = torch.zeros(4, 2, dtype=torch.bool)
    resets[0] = True
    with rnn_gpu.backend(BACKEND):
        output, _ = layer(torch.randn(4, 2, 3), torch.full((1, 2, 12), torch.nan), resets=resets)
    output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
