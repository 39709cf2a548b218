"""torch.compile of the layers, with the kernels or PyTorch's own behind an operator in the graph: no break, no compile
for every size.
"""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import rnn_gpu
from rnn_gpu import aten, aten_stack
from tests.layers import INTERPRETED, ON_BOTH_BACKENDS, exchanging_in_full

pytestmark = ON_BOTH_BACKENDS

STACK = {"bidirectional": True, "num_layers": 2}


@pytest.fixture(autouse=True)
def one_backend():
    """The backend of this run, several programs, and nothing compiled before."""
    with exchanging_in_full():
        yield


def results(run, layer, *arguments):
    """What run returns, and the gradients of its first input and of the parameters."""
    input = arguments[0].detach().requires_grad_()
    output, states = run(input, *arguments[1:])
    states = states if isinstance(states, tuple) else (states,)
    loss = output.pow(2).sum() + sum(state.sum() for state in states)
    return [output, *states, *torch.autograd.grad(loss, [input, *layer.parameters()])]


def assert_same(run, compiled, layer, *arguments):
    for actual, expected in zip(results(compiled, layer, *arguments), results(run, layer, *arguments), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.covering("mask")
@pytest.mark.parametrize(
    "name, kwargs, mask",
    [
        ("LSTM", {}, None),
        ("LSTM", {"proj_size": 3}, None),
        ("LSTM", STACK, "lengths"),
        ("GRU", STACK, None),
        ("GRU", {}, "resets"),
        ("GRU", {"num_layers": 3}, "lengths"),
        ("RNN", {}, "lengths"),
    ],
)
def test_one_graph_for_every_size(name, kwargs, mask):
    """Catches: a graph break, a compile for each new T or B, results or gradients that differ from those without
    compile.
    """
    layer = getattr(rnn_gpu, name)(4, 12, **kwargs)

    def run(input, given=None):
        return layer(input, **({} if mask is None else {mask: given}))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    compiles = []
    for time, batch in ((5, 3), (7, 4), (6, 2)):
        given = {"lengths": torch.arange(batch) + 1, "resets": torch.rand(time, batch) < 0.3}.get(mask)
        arguments = (torch.randn(time, batch, 4), *([] if mask is None else [given]))
        assert_same(run, compiled, layer, *arguments)
        compiles.append(counter.frame_count)
    assert compiles == compiles[:1] * 3, "compiled again for another size"


def test_lengths_in_a_list():
    """Catches: lengths that are constants of the graph, which is then compiled anew for every other list."""
    layer, input = rnn_gpu.GRU(4, 12), torch.randn(5, 3, 4)
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda lengths: layer(input, lengths=lengths)[0], fullgraph=True, backend=count)
    for lengths in ([5, 2, 3], [3, 3, 4], [0, 1, 5], [2, 5, 5]):
        torch.testing.assert_close(compiled(lengths), layer(input, lengths=lengths)[0])
    assert count.frame_count == 2


@pytest.mark.parametrize("name, kwargs, enforce_sorted", [("LSTM", STACK, False), ("GRU", {}, True)])
def test_packed_sequence_made_outside_the_graph(name, kwargs, enforce_sorted):
    """Catches: a size that depends on the values of batch_sizes, which no graph can hold; batch sizes of other rows
    than there are, read past their end.
    """
    layer = getattr(rnn_gpu, name)(4, 12, **kwargs)

    def run(*packed):
        output, states = layer(PackedSequence(*packed))
        return output.data, states

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for lengths in ([5, 3, 2], [4, 4, 1]):
        packed = pack_padded_sequence(torch.randn(5, 3, 4), torch.tensor(lengths), enforce_sorted=enforce_sorted)
        assert_same(run, compiled, layer, *packed)
    data, batch_sizes, *indices = packed
    for wrong, text in (((data[:-1], batch_sizes), "as many rows"), ((data, batch_sizes.flip(0)), "never increase")):
        with pytest.raises(RuntimeError, match=text):
            compiled(*wrong, *indices)


def test_transforms_inside_a_graph():
    """Catches: an operator that writes into what a transform inside the graph maps over, forward, or where the backward
    makes the gates again.
    """
    layer = rnn_gpu.GRU(3, 4, memory="lean")
    weights, input, lengths = dict(layer.named_parameters()), torch.randn(2, 2, 2, 3), torch.tensor([[2, 1], [0, 2]])
    loss = lambda weights, x, n: functional_call(layer, weights, (x,), {"lengths": n})[0].square().sum()
    run = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(weights, input, lengths)
    with rnn_gpu.backend("torch"):
        torch.testing.assert_close(found, run(weights, input, lengths))


def test_the_same_tensor_given_twice_and_inference():
    """Catches: Dynamo's refusal of one tensor as both states, and of a graph without gradients."""
    layer = rnn_gpu.LSTM(4, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    input, zeros = torch.randn(5, 3, 4), torch.zeros(1, 3, 12)
    torch.testing.assert_close(compiled(input, (zeros, zeros)), layer(input, (zeros, zeros)))
    with torch.no_grad():
        torch.testing.assert_close(compiled(input), layer(input))


def test_inductor():
    """Catches: a graph that only the simpler backends of torch.compile take, float32 training on the CPU for one."""
    layer = rnn_gpu.LSTM(4, 12, num_layers=2, dropout=0.0, batch_first=True)
    assert_same(layer, torch.compile(layer, fullgraph=True), layer, torch.randn(3, 5, 4))


def test_inductor_without_implicit_fallbacks():
    """Catches: an operator that inductor has to be told of, and is not ("missing lowering")."""
    import torch._inductor.config

    layer = rnn_gpu.GRU(4, 12)
    with torch._inductor.config.patch(implicit_fallbacks=False):
        assert_same(layer, torch.compile(layer, fullgraph=True), layer, torch.randn(5, 3, 4))


def test_a_graph_stays_small_whatever_the_number_of_steps():
    """Catches: a loop over time that is unrolled into the graph, which takes minutes to compile."""
    layer, sizes = rnn_gpu.GRU(4, 6), []

    def count(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    for time in (2, 300):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(layer, backend=count, fullgraph=True, dynamic=False)(torch.randn(time, 1, 4))
    assert sizes[0] == sizes[1]


TENSORS = ["input", "state", "weight", "output"]


@pytest.mark.filterwarnings("ignore:Error detected")
@pytest.mark.parametrize("written", TENSORS)
def test_what_is_written_into_before_the_backward(written):
    """Catches: gradients, in silence, with a tensor that the graph has changed since the layer's forward, where eager
    mode raises.
    """
    layer = rnn_gpu.LSTM(4, 12)
    input, h0, c0 = torch.randn(5, 3, 4), torch.randn(1, 3, 12), torch.randn(1, 3, 12)

    def run(input, h0, c0, write):
        input, h0, c0 = input + 1, h0 + 1, c0 + 1
        output, _ = layer(input, (h0, c0))
        if write:
            with torch.no_grad():
                [input, h0, layer.weight_hh_l0, output][TENSORS.index(written)].mul_(2)
        return output

    gradients = lambda run, write: torch.autograd.grad(run(input, h0, c0, write).sum(), layer.parameters())
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    right = gradients(run, False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(run, True)
    if written == "output" and not INTERPRETED:  # which is a copy of what PyTorch's kernels keep
        torch.testing.assert_close(gradients(compiled, True), right)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(compiled, True)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_one_graph_where_a_weight_is_new(name):
    """Catches: a compile for a second time, or guards that cannot be made, where a weight has been registered anew, as
    tools do that distribute or share weights.
    """
    layer = getattr(rnn_gpu, name)(4, 12)
    layer.register_parameter("weight_ih_l0", torch.nn.Parameter(torch.randn_like(layer.weight_ih_l0)))
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=count, fullgraph=True)
    for _ in range(3):
        compiled(torch.randn(5, 3, 4))
    assert count.frame_count == 1
    assert_same(layer, compiled, layer, torch.randn(5, 3, 4))


def test_autocast_inside_a_graph():
    """Catches: another type of results than without compile."""
    layer, input = rnn_gpu.GRU(4, 12), torch.randn(5, 3, 4)

    def run(input):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(input)

    for compiled, expected in zip(torch.compile(run, backend="aot_eager")(input), run(input), strict=True):
        assert compiled.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(compiled, expected)


@pytest.mark.skipif(not INTERPRETED, reason="about the kernels: runs with TRITON_INTERPRET=1")
def test_what_the_kernels_cannot_do_raises_under_compile_too():
    """Catches: a compiled graph that falls back silently under backend "triton"."""
    layer = rnn_gpu.GRU(4, 12).double()
    with pytest.raises(RuntimeError, match="float64"):
        torch.compile(layer, backend="aot_eager")(torch.randn(5, 3, 4).double())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_exported_stacks_run_at_other_sizes(strict, tmp_path):
    """Catches: layers side by side, or sizes, that are constants of a program; what is kept for a backward that it does
    not have; a program that cannot be saved.
    """
    layer = rnn_gpu.GRU(5, 20, num_layers=3)
    dims = {0: torch.export.Dim("T", min=1), 1: torch.export.Dim("B", min=1)}
    program = torch.export.export(layer, (torch.randn(3, 2, 5),), dynamic_shapes={"input": dims}, strict=strict)
    torch.export.save(program, tmp_path / "layer.pt2")
    operators = [node for node in program.graph.nodes if "rnn_gpu" in str(node.target)]
    # On PyTorch's kernels one a layer; in PyTorch 2.11, where an export is taken for a compiled graph, one a stack.
    assert len(operators) == 1 or (len(operators) == 3 and not INTERPRETED)
    input = torch.randn(4, 6, 5)
    for loaded in (program, torch.export.load(tmp_path / "layer.pt2")):
        for actual, expected in zip(loaded.module()(input), layer(input), strict=True):
            torch.testing.assert_close(actual, expected)


# ---- What a forward on PyTorch's kernels keeps for its backward ------------------------------------------------------

on_torch = pytest.mark.skipif(INTERPRETED, reason="about PyTorch's kernels: runs without TRITON_INTERPRET=1")


@pytest.fixture
def forwards(monkeypatch):
    """How often the forward of a stack, or of a layer with masks, has run: one entry for each."""
    seen = []

    def counted(run):
        return lambda *arguments: seen.append(1) or run(*arguments)

    for module, name in ((aten, "layer"), (aten_stack, "_forward")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return seen


@on_torch
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "name, kwargs, lengths, count",
    [("LSTM", STACK, None, 1), ("GRU", {"num_layers": 2}, None, 1), ("GRU", {"num_layers": 2}, [5, 0, 2], 2)],
)
def test_a_forward_runs_once_and_leaves_nothing(name, kwargs, lengths, count, backend, forwards):
    """Catches: a backward that runs the forward again, and what was kept for one that outlives it."""
    layer, input = getattr(rnn_gpu, name)(4, 12, **kwargs), torch.randn(5, 3, 4)
    masks = {} if lengths is None else {"lengths": torch.tensor(lengths)}
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for number in (1, 2, 3):
        results = compiled(input, **masks)
        assert len(aten._kept) == count
        results[0].sum().backward()
        assert len(forwards) == count * number and not aten._kept
    results = compiled(input, **masks)  # no backward
    assert len(aten._kept) == count
    del results
    assert not aten._kept
    with torch.no_grad():
        compiled(input, **masks)
    assert not aten._kept


@on_torch
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_backward_from_what_was_kept(backend):
    """Catches: gradients of a forward that wrote over what it had kept, of another forward, or of a second backward,
    which runs the forward again, inside autocast.
    """
    layer, inputs = rnn_gpu.LSTM(4, 12), torch.randn(2, 5, 3, 4)

    def run(input):  # a compiler takes the memory of a result that nobody else uses
        output, (h_n, c_n) = layer(input.sin())
        return ((output + 1) * 2).relu(), h_n + 1, c_n.exp()

    def gradients(run, input):
        results = run(input)
        loss = sum(result.square().sum() for result in results)
        first = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
        with torch.autocast("cpu", enabled=run is compiled):
            return first, torch.autograd.grad(loss, list(layer.parameters()))

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    expected = [gradients(run, input)[0] for input in inputs]
    for _ in range(2):
        for input, right in zip(inputs, expected, strict=True):
            for found in gradients(compiled, input):
                torch.testing.assert_close(found, right)
    first, second = compiled(inputs[0]), compiled(inputs[1])  # both alive
    for results, right in ((first, expected[0]), (second, expected[1])):
        loss = sum(result.square().sum() for result in results)
        torch.testing.assert_close(torch.autograd.grad(loss, list(layer.parameters())), right)


@on_torch
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_inputs_made_again_for_the_backward(name):
    """Catches: what was kept of an input whose memory the compiler has taken since: gradients of what is there now."""
    layer, always = getattr(rnn_gpu, name)(8, 8), CheckpointPolicy.MUST_SAVE
    ours = torch.ops.rnn_gpu.aten_stack
    policy = lambda ctx, op, *_, **__: always if op in (ours, ours.default) else CheckpointPolicy.MUST_RECOMPUTE
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def called(x):
        h0 = x[:1] * 3
        return layer(x * 2, (h0, x[1:2] * 3) if name == "LSTM" else h0)[0]

    def run(input, other):
        y = checkpoint(called, input, use_reentrant=False, context_fn=contexts)
        z = y.sum() + other
        w = torch.mm(z[0], z[1].t())
        v = [torch.sort((w.sum() + other[:i]) * 3, 0)[0] for i in (1, 6)]
        return y, w, *v, torch.sort((v[0] + 1) * 3, 1)[0]

    input, other = torch.randn(6, 4, 8), torch.randn(6, 4, 8)
    gradients = lambda run: torch.autograd.grad(run(input, other)[0].square().sum(), list(layer.parameters()))
    for actual, expected in zip(gradients(torch.compile(run, fullgraph=True)), gradients(run), strict=True):
        torch.testing.assert_close(actual, expected)


@on_torch
def test_a_backward_that_finds_nothing_kept(forwards):
    """Catches: tensors that were saved elsewhere and brought back, as for checkpoints, and then stand for nothing."""
    layer, input = rnn_gpu.GRU(4, 12), torch.randn(5, 3, 4)
    expected = torch.autograd.grad(layer(input)[0].square().sum(), list(layer.parameters()))
    compiled = torch.compile(layer, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.numpy().copy(), torch.from_numpy):
        loss = compiled(input)[0].square().sum()
    assert not aten._kept
    torch.testing.assert_close(torch.autograd.grad(loss, list(layer.parameters())), expected)
    assert len(forwards) == 2
    run = lambda input: checkpoint(layer, input, use_reentrant=False)[0].square().sum()
    loss = torch.compile(run, backend="aot_eager")(input)
    torch.testing.assert_close(torch.autograd.grad(loss, list(layer.parameters())), expected)


@on_torch
@pytest.mark.parametrize(
    "name, kwargs, given",
    [("LSTM", {}, False), ("LSTM", STACK, True), ("LSTM", {"proj_size": 3}, True), ("GRU", STACK, False)],
)
def test_a_stack_is_torch_nns_to_the_last_bit(name, kwargs, given):
    """Catches: other numbers than those of torch.nn's layer, or of its autograd, where oneDNN is called without it."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(4, 12, **kwargs)
    ours = getattr(rnn_gpu, name)(4, 12, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    states = ()
    if given:
        sets = theirs.num_layers * (2 if theirs.bidirectional else 1)
        states = [torch.randn(sets, 3, size) for size in (theirs.proj_size or 12, 12)[: 2 if name == "LSTM" else 1]]
        states = ((*states,) if name == "LSTM" else states[0],)
    for actual, expected in zip(
        results(torch.compile(ours, fullgraph=True, backend="aot_eager"), ours, input := torch.randn(5, 3, 4), *states),
        results(theirs, theirs, input, *states),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@on_torch
@pytest.mark.parametrize("name, kwargs", [("LSTM", {"num_layers": 2}), ("GRU", {"bidirectional": True})])
def test_a_stack_is_differentiable_twice(name, kwargs):
    """Catches: a second derivative that is wrong, or none, where a graph is made of the backward."""
    layer = getattr(rnn_gpu, name)(2, 3, dtype=torch.float64, **kwargs)
    sets = layer.num_layers * (2 if layer.bidirectional else 1)
    states = [torch.randn(sets, 2, 3, dtype=torch.float64) for _ in range(2 if name == "LSTM" else 1)]
    states = [*states, None][:2]

    def run(input, h0, *weights):
        how = name.lower(), True, layer.num_layers, 1 + layer.bidirectional, 3
        y, h_n, c_n, _ = aten_stack.Stack.apply(*how, input, h0, states[1], *weights)
        return y, h_n, c_n if name == "LSTM" else h_n

    leaves = [torch.randn(6, 2, dtype=torch.float64), states[0], *(w.detach() for w in layer._flat_weights)]
    assert torch.autograd.gradgradcheck(run, [leaf.requires_grad_() for leaf in leaves], fast_mode=True)


class Residual(torch.nn.Module):
    """A layer with a way round it; the gradient of its input where that is asked for."""

    def __init__(self, num_layers: int, derivative: bool):
        super().__init__()
        self.layer, self.derivative = rnn_gpu.GRU(4, 4, num_layers=num_layers), derivative

    def forward(self, input):
        if self.derivative:
            input = input.detach().requires_grad_()
            return torch.autograd.grad((self.layer(input)[0] + input).sum(), input)[0]
        return self.layer(input)[0] + input


@pytest.mark.skipif(not INTERPRETED, reason="about the kernels: runs with TRITON_INTERPRET=1")
@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_derivative_of_an_exported_program_is_an_error_or_right(num_layers):
    """Catches: gradients that lack the layer's part, in silence, because its operator has no backward of its own."""
    input = torch.randn(2, 3, 4, requires_grad=True)
    program = torch.export.export(Residual(num_layers, False), (input,)).module()
    with pytest.raises(RuntimeError, match="Trying to backward through rnn_gpu"):
        program(input).sum().backward()
    module = Residual(num_layers, True)
    try:
        found = torch.export.export(module, (input,)).module()(input)
    except RuntimeError:  # but with PyTorch 2.11, whose exports hold a stack's backward
        return
    torch.testing.assert_close(found, module(input))


@pytest.mark.parametrize("option", ["dropout", "zoneout", "recurrent_dropout", "weight_dropout"])
def test_an_option_that_changes_from_epoch_to_epoch(option):
    """Catches: an error, or a value of before, once Dynamo has the number as a symbol."""
    layer, input = rnn_gpu.LSTM(3, 5, 2), torch.randn(4, 2, 3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    seen = []
    for value in (0.0, 0.2, 0.3, 0.5):
        setattr(layer, option, value)
        for call in (compiled, layer):
            torch.manual_seed(0)
            seen.append(call(input)[0])
        torch.testing.assert_close(*seen[-2:])
        assert not any(torch.equal(seen[-1], earlier) for earlier in seen[:-2])
