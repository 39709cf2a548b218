"""What a call asks of the device: nothing that copies to or from the host or waits, and few kernels.

Without a GPU: `tests/device_work.py` says how.
"""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence

pytest.importorskip("triton")

import rnn_gpu
from perf import overhead
from rnn_gpu import rows
from rnn_gpu.rows import Rows, packed_rows
from tests import problems
from tests.device_work import DEVICE, autocast, pretending

pytestmark = [pytest.mark.compiled]

T, B, I, H = 6, 5, 12, 40

LAYERS = {
    "LSTM": dict(),
    "GRU": dict(),
    "RNN": dict(),
    "LSTM, both directions, 2 layers": dict(bidirectional=True, num_layers=2, dropout=0.5),
    "GRU, both directions, 2 layers": dict(bidirectional=True, num_layers=2),
    "LSTM, projected": dict(proj_size=8),
    "LSTM, no biases": dict(bias=False),
    "LSTM, odd size": dict(hidden_size=37),
    "LSTM, alone": dict(hidden_size=16),
    "LSTM, 4 layers": dict(hidden_size=256, num_layers=4),
    "GRU, 3 layers": dict(hidden_size=256, num_layers=3),
}


def made(name: str, **options) -> torch.nn.Module:
    options = dict(input_size=I, hidden_size=H, device=DEVICE, dtype=torch.bfloat16) | LAYERS[name] | options
    return getattr(rnn_gpu, name.split(",")[0])(**options)


BATCH_SIZES = torch.tensor([5, 4, 3, 2, 1, 1])


def call(layer, kind: str, states: bool):
    """A call of a layer with every kind of input -> outputs and final states, flat."""
    dtype = layer.weight_ih_l0.dtype
    shape = (int(BATCH_SIZES.sum()),) if kind == "packed" else (T, B)
    input = torch.empty(*shape, layer.input_size, device=DEVICE, dtype=dtype, requires_grad=True)
    masks = {}
    if kind == "packed":
        input = PackedSequence(input, BATCH_SIZES)
    if kind == "lengths":
        masks = dict(lengths=torch.empty(B, device=DEVICE, dtype=torch.int64))
    if kind == "resets":
        masks = dict(resets=torch.empty(T, B, device=DEVICE, dtype=torch.bool))
    hx = None
    if states:
        sets = layer.num_layers * (2 if layer.bidirectional else 1)
        hx = [
            torch.empty(sets, B, size, device=DEVICE, dtype=dtype, requires_grad=True)
            for size in (layer.proj_size or layer.hidden_size, layer.hidden_size)
        ]
        hx = tuple(hx) if layer.mode == "LSTM" else hx[0]
    output, final = layer(input, hx, **masks)
    output = output.data if kind == "packed" else output
    return output, *(final if isinstance(final, tuple) else (final,))


def backward(outputs) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", ["dense", "lengths", "resets", "packed"])
@pytest.mark.parametrize("states", [False, True], ids=["", "states"])
@pytest.mark.parametrize("memory", ["full", "lean"])
def test_nothing_is_copied_or_waited_for(name, kind, states, memory, monkeypatch):
    """Catches: an index made of a Python list (a copy in each call, and no CUDA graph), a scalar read back, a host
    tensor where one of the device should be.
    """
    layer = made(name)
    rows = packed_rows(BATCH_SIZES, B, int(BATCH_SIZES.sum()), DEVICE)  # made once, and kept
    known = *layer.parameters(), rows.lengths, rows.offsets
    with pretending(monkeypatch, known), rnn_gpu.memory(memory):
        backward(call(layer, kind, states))
        with torch.no_grad():
            call(layer, kind, states)


# The kernels of a call, dense and with no states given: in inference, and forward and backward. In inference what
# prepares the buffers, the input product and the recurrence; forward and backward besides what prepares the backward's
# buffers and the recurrence backwards, products for the gradients of the input and of both weights, a sum for the
# biases, and one copy, for two biases of one gradient. A second direction adds its three products, and the GRU, whose
# slots stand in another order, one for each recurrent weight. A stack that is trained puts final states together,
# and side by side copies its output out of those of all layers.
MOST = {
    "LSTM": (3, 10),
    "GRU": (3, 11),
    "RNN": (3, 10),
    "LSTM, no biases": (3, 8),
    "LSTM, alone": (3, 10),
    "LSTM, odd size": (4, 12),  # the output is no view of what the kernels wrote
    "GRU, both directions, 2 layers": (6, 31),
    "LSTM, both directions, 2 layers": (9, 32),  # with three kernels for dropout, and one for its gradient
    "LSTM, projected": (6, 20),  # three products forward, and their gradients
    "LSTM, 4 layers": (7, 29),  # side by side; one after another they take 12 and 42
    "GRU, 3 layers": (6, 26),
}


@pytest.mark.parametrize("name", MOST)
def test_a_call_is_few_kernels(name, monkeypatch):
    """Catches: a cast, a fill, a copy or a sum that comes back into every call."""
    layer = made(name)
    with pretending(monkeypatch, layer.parameters()) as work, torch.no_grad():
        call(layer, "dense", False)
    inference = dict(work.kernels)
    with pretending(monkeypatch, layer.parameters()) as work:
        output, *_ = call(layer, "dense", False)
        output.backward(torch.empty_like(output))
    found = sum(inference.values()), work.total
    assert all(count <= most for count, most in zip(found, MOST[name], strict=True)), (
        f"{inference}; {dict(work.kernels)}"
    )


def test_gradients_that_nobody_needs_cost_nothing(monkeypatch):
    """Catches: products for frozen weights, states or inputs; a gradient that is copied before it becomes `.grad`."""
    layer = made("LSTM")
    for parameter in layer.parameters():
        parameter.requires_grad_(parameter is layer.bias_hh_l0)
    with pretending(monkeypatch, layer.parameters()) as work:
        input = torch.empty(T, B, I, device=DEVICE, dtype=torch.bfloat16)
        output, _ = layer(input)
        forward = work.total
        output.backward(torch.empty_like(output))
    assert work.total - forward <= 4, dict(work.kernels)  # prepared, backwards, a sum, a copy


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_what_the_tests_run_on_a_gpu_waits_for_nothing(cell, monkeypatch):
    """Catches: launchers, or tests of ours around them, that look at a result: no CUDA graph holds them, and streams
    that a test means to run at the same time run one after another.
    """
    problem = problems.Problem(cell, 40, 5, 6, torch.bfloat16, sets=2, reversed_sets=2, device=str(DEVICE))
    given, both = problems.data(problem), problems.plans(problem)
    monkeypatch.setattr(problems, "unlike_last", [])
    with pretending(monkeypatch, [one for one in vars(given).values() if one is not None]):
        found = problems.run(problem, both, given)
    assert found["y"].shape == (6, 5, 2, 40) and len(problems.unlike_last) == 2


def test_rows_of_packed_input_are_made_anew_where_the_batch_sizes_change():
    """Catches: rows that are kept for other batch sizes, or taken for those of another batch, or of other data."""
    sizes, device = torch.tensor([3, 2, 1]), torch.device("cpu")
    first = packed_rows(sizes, 3, 6, device)
    assert packed_rows(sizes, 3, 6, device) is first
    for batch, count in ((4, 6), (3, 5)):
        with pytest.raises(RuntimeError, match="Expected"):
            packed_rows(sizes, batch, count, device)
    sizes[2] = 2
    second = packed_rows(sizes, 3, 7, device)
    assert second.lengths.tolist() == [3, 3, 1] and second.offsets.tolist() == [0, 3, 5, 7]
    sizes.numpy()[1:] = 3, 1  # of which the tensor's version says nothing
    third = packed_rows(sizes, 3, 7, device)
    assert third.lengths.tolist() == [3, 2, 2]
    with FakeTensorMode(allow_non_fake_inputs=True):  # which would give sizes without values
        assert packed_rows(sizes, 3, 7, device) is third


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_rows_of_packed_input_live_as_long_as_a_graph(captured, monkeypatch):
    """Catches: rows that a CUDA graph reads at every replay, given back when the batch sizes change or are gone."""
    made = lambda sizes, batch, count, device: Rows(len(sizes), batch, sizes.clone(), sizes.clone())
    monkeypatch.setattr(rows, "_packed_rows", made)
    monkeypatch.setattr(rows, "_in_graphs", {})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    sizes, device = torch.tensor([3, 2, 1]), torch.device("cuda", 0)
    read = weakref.ref(packed_rows(sizes, 3, 6, device).lengths)
    if captured:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=2))
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            assert packed_rows(sizes, 3, 6, device).lengths is read()
    sizes.fill_(2)
    packed_rows(sizes, 3, 6, device)
    del sizes
    gc.collect()
    assert (read() is not None) == captured


def test_who_does_not_hold_memory_of_the_host_is_waited_for(monkeypatch):
    """Catches: lengths that a device which is none of CUDA's copies later than they are given back."""
    to, asked = torch.Tensor.to, []
    see = lambda tensor, *given, **how: (asked.append(how.get("non_blocking", False)), to(tensor, *given, **how))[1]
    monkeypatch.setattr(torch.Tensor, "to", see)
    packed_rows(torch.tensor([3, 2, 1]), 3, 6, DEVICE)
    assert asked == [False, False]


@pytest.mark.parametrize("name", ["LSTM", "GRU, both directions, 2 layers", "LSTM, projected"])
def test_nothing_is_copied_or_waited_for_under_autocast(name, monkeypatch):
    """Catches: the same where weights and input are cast first."""
    layer = made(name, dtype=torch.float32)
    autocast(monkeypatch, torch.bfloat16)
    with pretending(monkeypatch, layer.parameters()):
        backward(call(layer, "dense", True))


@pytest.mark.parametrize("masks", ["dense", "lengths"])
@pytest.mark.parametrize("ensemble", [False, True], ids=["rows", "sets"])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_nothing_is_copied_or_waited_for_under_vmap(name, ensemble, masks, monkeypatch):
    """Catches: the same in the rules that fold problems into one launch."""
    layer = made(name)
    weights = {key: value.detach() for key, value in layer.named_parameters()}
    if ensemble:
        weights = {key: torch.stack([value] * 3) for key, value in weights.items()}
    input = torch.empty(3, T, B, I, device=DEVICE, dtype=torch.bfloat16)
    lengths = torch.empty(B, device=DEVICE, dtype=torch.int64) if masks == "lengths" else None

    def loss(weights, input):
        return torch.func.functional_call(layer, weights, (input,), dict(lengths=lengths))[0].float().sum()

    with pretending(monkeypatch, [*weights.values(), input, *([] if lengths is None else [lengths])]):
        torch.func.vmap(torch.func.grad(loss), in_dims=(0 if ensemble else None, 0))(weights, input)


# Functions of ours in a call of two steps, inference and training, by hidden layers and directions. What a call costs
# the host is mostly made of those; before 55d9412 they were 54 and 136, 106 and 295.
FUNCTIONS = {"one layer": ({}, 45, 92), "both directions, 2 layers": (dict(num_layers=2, bidirectional=True), 88, 203)}


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("what", FUNCTIONS)
def test_a_call_is_few_functions(cell, what):
    """Catches: work on the host that creeps into every call, which no clock on a shared machine would show."""
    options, *most = FUNCTIONS[what]
    for trained, limit in zip((False, True), most, strict=True):
        call = overhead.host(cell, 64, 1, trained, **options)["rnn_gpu, no launches"]
        with torch.set_grad_enabled(trained), overhead.launches_left_out():
            for _ in range(3):  # the first decide how a call goes
                call()
            assert overhead.functions_of_ours(call) <= limit
