"""On a GPU: the layers inside torch.compile, CUDA graphs, torch.func and autograd."""

import gc
import itertools

import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnn_gpu
from rnn_gpu import products
from tests.layers import same
from tests.tolerances import assert_close_to_oracle

pytestmark = [pytest.mark.gpu, pytest.mark.compiled]

NAMES = ("LSTM", "GRU", "RNN")
TIME, BATCH, INPUT, HIDDEN = 12, 8, 32, 256


@pytest.fixture(autouse=True)
def on_the_kernels():
    """Backend "triton", and no wait that did not end."""
    with rnn_gpu.backend("triton"):
        yield
    rnn_gpu.check()


def made(name, dtype=torch.bfloat16, **kwargs):
    """A layer and an input on the GPU."""
    layer = getattr(rnn_gpu, name)(INPUT, HIDDEN, **kwargs).to("cuda", dtype)
    return layer, torch.randn(TIME, BATCH, INPUT, device="cuda", dtype=dtype)


def trained(run, layer, input, **masks):
    """Outputs and the gradients of input and parameters."""
    input = input.detach().requires_grad_()
    output, _ = run(input, **masks)
    return [output.detach(), *torch.autograd.grad(output.float().pow(2).sum(), [input, *layer.parameters()])]


def assert_equal(actual, expected):
    """To the last bit: the same kernels with the same plan."""
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_call_is_few_kernels_on_the_device(name):
    """Catches: what PyTorch starts on a GPU and no count without one shows: at most 3 in inference, 12 both ways."""
    layer, input = made(name)

    def kernels(call) -> list[str]:
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(acc_events=True) as found:
            call()
            torch.cuda.synchronize()
        names = [e.name for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return [one for one in names if "splitkreduce" not in one.lower()]  # cuBLAS' second half of a product

    def inference():
        with torch.no_grad():
            layer(input)

    output, _ = layer(input.requires_grad_())
    gradient, leaves = torch.ones_like(output), [input, *layer.parameters()]
    both = kernels(lambda: torch.autograd.grad(layer(input)[0], leaves, gradient))
    assert len(few := kernels(inference)) <= 3, few
    assert len(both) <= 12, both


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("name, kwargs", [
    ("LSTM", {"bidirectional": True, "num_layers": 2}), ("GRU", {}), ("RNN", {}),
    ("GRU", {"num_layers": 3}),
])  # fmt: skip
def test_compile(name, kwargs, mode):
    """Catches: a graph break, a launch that is replayed without its fill."""
    layer, input = made(name, **kwargs)
    run = torch.compile(layer, fullgraph=True, mode=mode)
    for scale in (1, 2, 1, 3):
        expected = trained(layer, layer, scale * input)
        torch.compiler.cudagraph_mark_step_begin()
        for actual, e in zip(trained(run, layer, scale * input), expected, strict=True):
            torch.testing.assert_close(actual, e)  # inductor may round the products around the loop otherwise


def test_dropout_in_a_graph_that_is_replayed():
    """Catches: the masks of the capture in every replay."""
    layer, input = made("LSTM", num_layers=3, dropout=0.5)
    run = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    found = []
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        found.append([one.clone() for one in trained(run, layer, input)])
    for first, second in itertools.combinations(found, 2):
        assert not torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


def test_compile_with_masks():
    """Catches: masks that are copied to the host, which a graph cannot hold."""
    layer, input = made("GRU", bidirectional=True)
    run = torch.compile(layer, fullgraph=True)
    for _ in range(2):
        masks = {
            "lengths": torch.randint(0, TIME + 1, (BATCH,), device="cuda"),
            "resets": torch.rand(TIME, BATCH, device="cuda") < 0.2,
        }
        for actual, expected in zip(
            trained(run, layer, input, **masks), trained(layer, layer, input, **masks), strict=True
        ):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_graphed_callables(name):
    """Catches: a forward or backward that cannot be captured, or that replays with what the capture left behind."""
    layer, input = made(name)
    expected = trained(layer, layer, 2 * input)
    sample = input.detach().clone().requires_grad_()
    graphed = torch.cuda.make_graphed_callables(layer, (sample,))
    for scale in (1, 2, 3, 2):
        found = trained(graphed, layer, scale * input)
        if scale == 2:
            assert_equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_in_a_cuda_graph(name):
    """Catches: a step captured whole, forward and backward, that differs from one that was not."""
    layer, input = made(name)
    static = input.detach().clone().requires_grad_()

    def step():
        return torch.autograd.grad(layer(static)[0].float().pow(2).sum(), [static, *layer.parameters()])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for scale in (1, 2, 1):
        with torch.no_grad():
            static.copy_(scale * input)
        graph.replay()
        assert_equal([g.clone() for g in found], trained(layer, layer, scale * input)[1:])


def test_packed_input_in_a_cuda_graph():
    """Catches: rows given back with the PackedSequence that they were made of, which every replay reads."""
    layer, input = made("GRU", bidirectional=True)
    static, lengths = input.detach().clone(), torch.arange(TIME, TIME - BATCH, -1)
    padded = lambda packed: pad_packed_sequence(packed)[0]

    def captured():
        packed = pack_padded_sequence(static, lengths)
        data = packed.data.clone()
        packed = PackedSequence(data, packed.batch_sizes)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            layer(packed)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            output, _ = layer(packed)
        return graph, data, output.data

    graph, data, output = captured()
    gc.collect()
    others = [torch.full((n,), -1, dtype=torch.int32, device="cuda") for n in range(1, 200)]  # whoever had their memory
    for scale in (1, 2):
        packed = pack_padded_sequence(scale * input, lengths)
        data.copy_(packed.data)
        graph.replay()
        with torch.no_grad():
            expected = padded(layer(packed)[0])
        assert torch.equal(padded(PackedSequence(output, packed.batch_sizes)), expected)
    del others


def test_a_backward_within_autocast():
    """Catches: gradients of a float32 layer that autocast makes of half the digits, in the engine's own threads."""
    layer, input = made("LSTM", torch.float32)
    expected = trained(layer, layer, input)
    input = input.detach().requires_grad_()
    total = layer(input)[0].float().pow(2).sum()
    with torch.autocast("cuda", torch.bfloat16):
        found = torch.autograd.grad(total, [input, *layer.parameters()])
    assert_equal(found, expected[1:])


def test_an_ensemble_in_one_launch():
    """Catches: members that see each other's weights on real hardware."""
    members = [made("LSTM")[0] for _ in range(2)]
    parameters, _ = stack_module_state(members)
    inputs = torch.randn(2, TIME, BATCH, INPUT, device="cuda", dtype=torch.bfloat16)
    loss = lambda p, x: functional_call(members[0], p, (x,))[0].float().pow(2).sum()
    outputs = vmap(lambda p, x: functional_call(members[0], p, (x,))[0])(parameters, inputs)
    gradients = vmap(grad(loss))(parameters, inputs)
    for v, member in enumerate(members):
        peer = trained(member, member, inputs[v])  # whose input product cuBLAS may round in another way
        exact = same(member.cpu(), torch.float64)
        with rnn_gpu.backend("torch"):
            expected = trained(exact, exact, inputs[v].cpu().double())
        actual = [outputs[v], *(gradient[v] for gradient in gradients.values())]
        for a, e, p in zip(actual, [expected[0], *expected[2:]], [peer[0], *peer[2:]], strict=True):
            assert_close_to_oracle(a.cpu(), e, p.cpu())


@pytest.mark.parametrize("name", NAMES)
def test_double_backward(name):
    """Catches: a second derivative that is wrong where the kernels made the first."""
    layer, input = made(name, torch.float32)
    exact = same(layer.cpu(), torch.float64)
    peer = same(layer, torch.float32)
    layer.cuda()

    def second(module, input, backend):
        input = input.detach().requires_grad_()
        with rnn_gpu.backend(backend):
            (first,) = torch.autograd.grad(module(input)[0].pow(2).sum(), input, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), [input, *module.parameters()])

    torch.backends.cudnn.rnn.fp32_precision, before = "ieee", torch.backends.cudnn.rnn.fp32_precision
    try:
        actual = second(layer, input, "triton")
    finally:
        torch.backends.cudnn.rnn.fp32_precision = before
    expected, peers = second(exact, input.cpu().double(), "torch"), second(peer, input.cpu(), "torch")
    for a, e, p in zip(actual, expected, peers, strict=True):
        assert_close_to_oracle(a.cpu(), e, p)


@pytest.mark.parametrize("name", NAMES)
def test_products_of_odd_sizes(name, monkeypatch):
    """Catches: columns of wider rows that are not zeros as cuBLAS reads them, or that come out."""
    monkeypatch.setattr(products, "WORTH", 0)
    layer = getattr(rnn_gpu, name)(30, 65, num_layers=2, bidirectional=True).to("cuda", torch.bfloat16)
    peer, exact = same(layer, torch.bfloat16).cuda(), same(layer, torch.float64)
    input = torch.randn(TIME, BATCH, 30, device="cuda", dtype=torch.bfloat16)
    expected, peers = trained(exact, exact, input.cpu().double()), trained(peer, peer, input)
    for a, e, p in zip(trained(layer, layer, input), expected, peers, strict=True):
        assert_close_to_oracle(a.cpu(), e, p.cpu())


@pytest.mark.parametrize("name", NAMES)
def test_backward_in_eval_mode_on_cudnn_too(name):
    """Catches: cuDNN's refusal of a backward after a forward in eval mode."""
    layer, input = made(name, torch.float32)
    with rnn_gpu.backend("torch"):
        expected = trained(layer.train(), layer, input)
        for actual, e in zip(trained(layer.eval(), layer, input), expected, strict=True):
            torch.testing.assert_close(actual, e)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_lean_memory_takes_less_at_its_peak(name):
    """Catches: a lean forward that keeps the gates alive after all.

    Both peaks hold one layer's gates and their gradients. With four layers, and a loss of its own temporaries in both,
    that left 0.762 on an H200; eight layers and a given gradient show what is kept.
    """
    peaks = {}
    for setting in ("full", "lean"):
        layer = getattr(rnn_gpu, name)(HIDDEN, HIDDEN, num_layers=8, memory=setting).to("cuda", torch.bfloat16)
        input = torch.randn(500, 32, HIDDEN, device="cuda", dtype=torch.bfloat16)
        d_output = torch.randn_like(input)
        for _ in range(2):  # the second time nothing is compiled or allocated for good
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            output, _ = layer(input)
            gradients = torch.autograd.grad(output, list(layer.parameters()), d_output)
            peaks[setting] = torch.cuda.max_memory_allocated() - before
            del output, gradients
    assert peaks["lean"] < 0.75 * peaks["full"]


def test_deterministic_algorithms():
    """Catches: an operation that PyTorch knows as not deterministic on a GPU."""
    layer, input = made("GRU", bidirectional=True)
    masks = {"lengths": torch.arange(BATCH, device="cuda"), "resets": torch.rand(TIME, BATCH, device="cuda") < 0.2}
    torch.use_deterministic_algorithms(True)
    try:
        first = trained(layer, layer, input, **masks)
        assert_equal(trained(layer, layer, input, **masks), first)
    finally:
        torch.use_deterministic_algorithms(False)
