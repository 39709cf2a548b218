"""Faults that users of recurrent layers have reported anywhere, each with the right value; on both backends.

A report of one of our layers becomes a test of its whole kind here.
"""

import threading
import warnings

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnn_gpu
from rnn_gpu import settings
from rnn_gpu.many_gradients import for_each_gradient
from tests.layers import BACKEND, INTERPRETED, ON_BOTH_BACKENDS, same

pytestmark = ON_BOTH_BACKENDS

LAYERS = [("LSTM", {"bidirectional": True}), ("LSTM", {"proj_size": 3}), ("GRU", {"num_layers": 2}), ("RNN", {})]
every_layer = pytest.mark.parametrize("name, kwargs", LAYERS, ids=["LSTM-both-ways", "LSTM-projected", "GRU-2", "RNN"])
TIME, BATCH, INPUT, HIDDEN = 5, 3, 4, 6


@pytest.fixture(autouse=True)
def one_backend(monkeypatch):
    """The backend of this run, several programs, full products."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    with rnn_gpu.backend(BACKEND), settings.always_exchange():
        yield


def layer_of(name, **kwargs):
    return getattr(rnn_gpu, name)(INPUT, HIDDEN, **kwargs)


def zero_states(layer, batch=BATCH, **sizes):
    """Initial states of zeros, the tuple of an LSTM or one tensor; sizes: other `layers` or `units`."""
    sets = sizes.get("layers", layer.num_layers * (2 if layer.bidirectional else 1))
    h0 = torch.zeros(sets, batch, sizes.get("units", layer.proj_size or layer.hidden_size))
    return (h0, torch.zeros(sets, batch, layer.hidden_size)) if layer.mode == "LSTM" else h0


def packed(lengths=(5, 4, 2)):
    """Packed input of random rows, sorted or not."""
    lengths = torch.tensor(lengths)
    return pack_padded_sequence(torch.randn(TIME, len(lengths), INPUT), lengths, enforce_sorted=False)


def already_sorted():
    """Packed input that says nothing of an order."""
    return pack_padded_sequence(torch.randn(TIME, 3, INPUT), torch.tensor([5, 4, 2]))


# ---- Gradients in batches --------------------------------------------------------------------------------------------


@every_layer
def test_gradients_in_batches(name, kwargs):
    """Catches: torch.autograd.grad(is_grads_batched=True) that raises, or gives another gradient than one by one."""
    layer, input = layer_of(name, **kwargs), torch.randn(TIME, BATCH, INPUT, requires_grad=True)
    output = layer(input)[0]
    wanted, d_outputs = [input, *layer.parameters()], torch.randn(3, *output.shape)
    found = torch.autograd.grad(output, wanted, d_outputs, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(output, wanted, one, retain_graph=True) for one in d_outputs]
    for actual, one_by_one in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(actual, torch.stack(one_by_one))


def test_gradients_in_batches_in_a_thread_of_the_engine():
    """Catches: a level asked of the thread, which on a GPU is the engine's own, where nobody maps anything."""
    found = []

    def elsewhere(d):
        run = lambda: found.extend(for_each_gradient(lambda d, _: (d.sum(0), None), (d, None)))
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return found[0]

    d = torch.randn(3, 4, 2)
    assert torch.equal(torch._vmap_internals._vmap(elsewhere)(d), d.sum(1)) and found[1] is None


@pytest.mark.parametrize("mask", ["lengths", "resets", "packed"])
def test_gradients_in_batches_of_ragged_rows(mask):
    """Catches: the same where rows end early or start anew."""
    layer = layer_of("LSTM")
    input = packed() if mask == "packed" else torch.randn(TIME, BATCH, INPUT)
    masks = {"lengths": torch.tensor([5, 0, 2]), "resets": torch.rand(TIME, BATCH) < 0.4}
    output = layer(input, **({mask: masks[mask]} if mask in masks else {}))[0]
    output = output.data if mask == "packed" else output
    wanted, d_outputs = list(layer.parameters()), torch.randn(2, *output.shape)
    found = torch.autograd.grad(output, wanted, d_outputs, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(output, wanted, one, retain_graph=True) for one in d_outputs]
    for actual, one_by_one in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(actual, torch.stack(one_by_one))


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_a_penalty_on_gradients_in_batches(name):
    """Catches: gradients in batches that lose their own graph in silence: a penalty on them then adds nothing."""
    ours, found = layer_of(name), []
    input, d_outputs = torch.randn(3, 2, INPUT), torch.randn(2, 3, 2, HIDDEN)
    for layer in (ours, same(ours, torch.float32)):
        x = input.clone().requires_grad_()
        output = layer(x)[0]
        (gradients,) = torch.autograd.grad(output, x, d_outputs, is_grads_batched=True, create_graph=True)
        assert gradients.requires_grad
        loss = output.sum() + 100 * gradients.square().sum()
        found.append(torch.autograd.grad(loss, list(layer.parameters())))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@every_layer
def test_vectorized_jacobian(name, kwargs):
    """Catches: autograd.functional.jacobian(vectorize=True) that raises, or differs from the one that loops."""
    layer, input = layer_of(name, **kwargs), torch.randn(3, 1, INPUT)
    some = lambda x: layer(x)[0][::2, 0, :2]
    jacobian = lambda **how: torch.autograd.functional.jacobian(some, input, **how)
    torch.testing.assert_close(jacobian(vectorize=True), jacobian())


# ---- Weights that are not the layer's own ----------------------------------------------------------------------------


@every_layer
def test_compiled_gradient_of_a_functional_call(name, kwargs):
    """Catches: tensors of a transform that outlive it in the layer: compiling such a gradient raised."""
    layer, input = layer_of(name, **kwargs), torch.randn(TIME, BATCH, INPUT)
    given = {key: value.detach() * 0.9 for key, value in layer.named_parameters()}
    loss = lambda parameters: torch.func.functional_call(layer, parameters, (input,))[0].square().sum()
    expected = torch.func.grad(loss)(given)
    found = torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)(given)
    torch.testing.assert_close(found, expected)
    mine = dict(layer.named_parameters())
    assert all(any(weight is one for one in mine.values()) for weight in layer._flat_weights)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("how", ["one", "all", "new list"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_weights_put_in_by_hand(name, how, compiled):
    """Catches: tensors that a user puts into `_flat_weights` and that are ignored: torch.nn takes them until a weight
    is another tensor. Some layers drop out recurrent weights that way.
    """
    ours, input = layer_of(name), torch.randn(TIME, BATCH, INPUT)
    theirs = same(ours, torch.float32)
    halves = [weight.detach() / 2 for weight in ours.parameters()]
    for layer in (ours, theirs):
        layer(input)
        if how == "one":
            layer._flat_weights[1] = halves[1]
        elif how == "all":
            layer._flat_weights[:] = halves
        else:
            layer._flat_weights = list(halves)
    run = torch.compile(ours, backend="eager", fullgraph=True) if compiled else ours
    torch.testing.assert_close(run(input)[0], theirs(input)[0])
    for layer in (ours, theirs):
        layer.weight_ih_l0 = torch.nn.Parameter(layer.weight_ih_l0.detach() * 1.5)
    torch.testing.assert_close(ours(input)[0], theirs(input)[0])


# ---- States of packed input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_states_of_packed_input_have_their_sizes_when_compiled(name):
    """Catches: states of the wrong shape that a graph takes without a word: wrong outputs, or a crash."""
    layer = layer_of(name)
    run = torch.compile(layer, backend="eager", fullgraph=True)
    good = run(packed((4, 5, 2)), zero_states(layer))[0]
    assert good.data.shape == (11, HIDDEN)
    bad = [zero_states(layer, units=HIDDEN + 1), zero_states(layer, layers=2)]
    if name == "LSTM":
        bad += [(zero_states(layer)[0], zero_states(layer, 2)[1]), (zero_states(layer)[0], torch.zeros(1, BATCH, 2))]
    for input, states in [(make(), hx) for make in (packed, already_sorted) for hx in bad]:
        with pytest.raises(RuntimeError):
            layer(input, states)
        with pytest.raises((RuntimeError, torch._dynamo.exc.TorchRuntimeError, torch._dynamo.exc.Unsupported)):
            run(input, states)
    for states in (zero_states(layer, 2), zero_states(layer, 4)):
        with pytest.raises((RuntimeError, torch._dynamo.exc.TorchRuntimeError, torch._dynamo.exc.Unsupported)):
            run(packed((4, 5, 2)), states)
        with pytest.raises(RuntimeError, match="sequences that were packed"):
            run(already_sorted(), states)  # only the graph's own run can know


@pytest.mark.skipif(not INTERPRETED, reason="backend 'torch' is torch.nn's own forward, which cuts such states")
def test_states_of_too_many_sequences():
    """Catches: states of more sequences than were packed, of which those that are not asked for are dropped."""
    layer = layer_of("LSTM")
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 3, 6\), got \[1, 4, 6\]"):
        layer(packed((4, 5, 2)), zero_states(layer, 4))


def test_a_list_of_states():
    """Catches: a list in place of the tuple of states, which torch.nn takes, with packed input and compiled."""
    layer = layer_of("LSTM")
    for input in (packed((4, 5, 2)), already_sorted()):
        expected = layer(input, zero_states(layer))[0].data
        for run in (layer, torch.compile(layer, backend="eager", fullgraph=True)):
            torch.testing.assert_close(run(input, list(zero_states(layer)))[0].data, expected)


@pytest.mark.parametrize("before", ["inference_mode", "functional"])
def test_packed_input_again_after_other_modes(before):
    """Catches: what is remembered of packed input, and was made where no later call can use it."""
    layer, input = layer_of("GRU"), packed((4, 5, 2))
    loss = lambda: layer(input)[0].data.square().sum()
    expected = torch.autograd.grad(loss(), list(layer.parameters()))
    fresh = PackedSequence(input.data, input.batch_sizes.clone(), input.sorted_indices, input.unsorted_indices)
    loss = lambda parameters: torch.func.functional_call(layer, parameters, (fresh,))[0].data.square().sum()
    if before == "inference_mode":
        with torch.inference_mode():
            layer(fresh)
    else:
        torch.func.grad(loss)({key: value.detach() for key, value in layer.named_parameters()})
    found = torch.autograd.grad(layer(fresh)[0].data.square().sum(), list(layer.parameters()))
    for actual, value in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, value)


def test_a_weight_that_is_missing():
    """Catches: an error that names nothing; torch.nn goes on with the tensor that it had."""
    ours, input = layer_of("RNN"), torch.randn(TIME, BATCH, INPUT)
    theirs = same(ours, torch.float32)
    for layer in (ours, theirs):
        layer(input)
        del layer.weight_hh_l0
    torch.testing.assert_close(ours(input)[0], theirs(input)[0])


# ---- Defaults of the process -----------------------------------------------------------------------------------------


def ways(layer):
    """Calls of a layer in all the ways in which input may come -> list of (input, masks)."""
    dense = torch.randn(TIME, BATCH, INPUT)
    lengths, resets = torch.tensor([5, 0, 2]), torch.rand(TIME, BATCH) < 0.4
    every = [(dense, {}), (dense, {"lengths": lengths}), (dense, {"resets": resets})]
    return [*every, (dense, {"lengths": lengths, "resets": resets}), (packed((4, 5, 2)), {}), (already_sorted(), {})]


def outputs_and_gradients(layer, input, masks):
    output = layer(input, **masks)[0]
    data = output.data if isinstance(output, PackedSequence) else output
    return data, *torch.autograd.grad(data.square().sum(), list(layer.parameters()))


@pytest.mark.covering("name", "memory")
@pytest.mark.parametrize("memory", ["full", "lean"])
@every_layer
def test_default_device_and_dtype(name, kwargs, memory):
    """Catches: a tensor that is made without a device or a type, and then has the process's default ones."""
    layer = layer_of(name, memory=memory, **kwargs)
    for input, masks in ways(layer):
        expected = outputs_and_gradients(layer, input, masks)
        default = torch.get_default_dtype()
        try:
            torch.set_default_device("meta")
            torch.set_default_dtype(torch.float64)
            found = outputs_and_gradients(layer, input, masks)
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(default)
        for actual, value in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, value, rtol=0, atol=0)


def test_warnings_that_come_once():
    """Catches: a call that makes a user's warning, which Python shows once, come again."""
    layer, lengths = layer_of("LSTM"), torch.tensor([5, 0, 2])

    def step():
        layer(torch.randn(TIME, BATCH, INPUT), lengths=lengths)
        warnings.warn("a user's own", stacklevel=1)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            step()
    assert len([one for one in seen if str(one.message) == "a user's own"]) == 1


# ---- Values that must not matter -------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["full", "lean"])
@every_layer
def test_states_of_rows_without_a_step(name, kwargs, memory):
    """Catches: 0 * NaN. A row of length 0, or one that starts anew at its first step, depends on no initial state, and
    gradients at padded steps are of zeros: none of them may reach a weight.
    """
    layer = layer_of(name, memory=memory, **kwargs)
    lengths, resets = torch.tensor([5, 0, 2]), torch.zeros(TIME, BATCH, dtype=torch.bool)
    resets[0, 2] = resets[1, 2] = True  # the first step of the last row, in both directions
    input, good = torch.randn(TIME, BATCH, INPUT), zero_states(layer)
    d_output = torch.randn(TIME, BATCH, layer(input)[0].shape[2])
    found = []
    for poison in (0.0, torch.nan):
        states = tuple(state.clone() for state in (good if isinstance(good, tuple) else (good,)))
        for state in states:
            state[:, 1:] = poison
        gradient = d_output.clone()
        for row, length in enumerate(lengths):
            gradient[length:, row] = poison
        output = layer(input, states if len(states) == 2 else states[0], lengths=lengths, resets=resets)[0]
        found.append((output.detach(), *torch.autograd.grad(output, list(layer.parameters()), gradient)))
    for actual, expected in zip(*found, strict=True):
        assert expected.isfinite().all() and torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_narrow_lengths(dtype):
    """Catches: lengths whose type cannot hold T."""
    layer, time = rnn_gpu.RNN(2, 3), {torch.uint8: 260, torch.int8: 130}.get(dtype, 9)
    input, lengths = torch.randn(time, BATCH, 2), [min(time, 100), 7, 0]
    expected = layer(input, lengths=torch.tensor(lengths))[0]
    assert torch.equal(layer(input, lengths=torch.tensor(lengths, dtype=dtype))[0], expected)
