"""Gradients as autograd's users meet them: eval mode, twice, checkpoints, hooks, frozen parts, lean memory."""

import contextlib
import dataclasses
import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import rnn_gpu
from rnn_gpu import around, autograd, operators, products, settings, wavefront
from rnn_gpu.call import PLAIN, Call, Inputs
from rnn_gpu.kernels.spec import CELLS
from rnn_gpu.rows import Rows
from tests.layers import BACKEND, INTERPRETED, ON_BOTH_BACKENDS, STATES, outcome, pair, same
from tests.tolerances import assert_close_to_oracle, assert_same_mathematics

pytestmark = ON_BOTH_BACKENDS

NAMES = ("LSTM", "GRU", "RNN")
TIME, BATCH = 5, 3
on_the_kernels = pytest.mark.skipif(not INTERPRETED, reason="about the kernels: runs with TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def one_backend(monkeypatch):
    """The backend of this run, several programs, full products."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    with rnn_gpu.backend(BACKEND), settings.always_exchange():
        yield


def gradients(layer, input, create_graph=False):
    """Of a loss in output and final states, by the input and the parameters."""
    output, states = layer(input)
    states = states if isinstance(states, tuple) else (states,)
    loss = output.pow(2).sum() + sum(state.sin().sum() for state in states)
    return torch.autograd.grad(loss, [input, *layer.parameters()], create_graph=create_graph)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize("name", NAMES)
def test_backward_in_eval_mode(name):
    """Catches: a forward in eval mode that keeps nothing for a backward."""
    layer, input = getattr(rnn_gpu, name)(3, 20), leaf(TIME, BATCH, 3)
    expected = gradients(layer.train(), input)
    for actual, e in zip(gradients(layer.eval(), input), expected, strict=True):
        assert torch.equal(actual, e)


@on_the_kernels
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("LSTM", {}), ("GRU", {"bidirectional": True}), ("LSTM", {"heads": 2}), ("LSTM", {"num_layers": 2}),
        ("LSTM", {"proj_size": 5}),
    ],
)  # fmt: skip
def test_selective_checkpoints(name, kwargs, compiled):
    """Catches: an operator that writes into what another one gave, which a checkpoint that keeps results gives again
    without that: gate sums taken for gates, in silence; or an error that says so.
    """
    layer, input = getattr(rnn_gpu, name)(3, 20, **kwargs), leaf(TIME, BATCH, 3)
    (expected,) = torch.autograd.grad(layer(input)[0].sum(), input)
    called = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    run = lambda input: called(input)[0]
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    for kept in (lambda *_, **__: CheckpointPolicy.MUST_SAVE, [torch.ops.rnn_gpu.recurrence.default], products):
        contexts = lambda kept=kept: create_selective_checkpoint_contexts(kept)
        found = torch.autograd.grad(checkpoint(run, input, use_reentrant=False, context_fn=contexts).sum(), input)
        torch.testing.assert_close(found[0], expected)


@on_the_kernels
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_a_gradient_inside_a_selective_checkpoint(name):
    """Catches: gates that lean memory makes again over what another operator gave, which a checkpoint that keeps them
    gives again without that: gate sums taken for gates, in silence.
    """
    layer, input = getattr(rnn_gpu, name)(3, 20, memory="lean"), leaf(TIME, BATCH, 3)

    def run(input):
        return torch.autograd.grad(layer(input)[0].square().sum(), input)[0] * input

    (expected,) = torch.autograd.grad(run(input).sum(), input)
    contexts = lambda: create_selective_checkpoint_contexts([torch.ops.rnn_gpu.saved_again.default])
    (found,) = torch.autograd.grad(checkpoint(run, input, use_reentrant=False, context_fn=contexts).sum(), input)
    torch.testing.assert_close(found, expected)


@on_the_kernels
def test_a_mode_that_looks_on_leaves_a_stack_as_it_is():
    """Catches: other launches, and other bits, because somebody counts operators."""
    layer, input, seen = rnn_gpu.LSTM(3, 20, 2), torch.randn(TIME, BATCH, 3), []

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    expected = layer(input)[0]
    with Looking():
        assert torch.equal(layer(input)[0], expected)
    assert "rnn_gpu.kernel_stack.default" in seen


@pytest.mark.parametrize(("name", "layers"), [("GRU", 1), ("LSTM", 2)])
def test_third_derivatives(name, layers):
    """Catches: a backward that is differentiated with no gradient at all of the layer's results."""
    layer, input = getattr(rnn_gpu, name)(3, 4, layers), leaf(4, 2, 3)

    def third(layer):
        (first,) = torch.autograd.grad(layer(input)[0].sin().sum(), input, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), input, create_graph=True)
        return torch.autograd.grad(second.pow(2).sum(), input)[0]

    torch.testing.assert_close(third(layer), third(same(layer, torch.float32)))


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masks"])
@pytest.mark.parametrize("name", NAMES)
def test_double_backward_in_float64(name, masked):
    """Catches: a wrong second derivative of the operators for PyTorch's kernels. float64: those alone."""
    if INTERPRETED:
        pytest.skip(
            "the kernels do not compute in float64; tests/test_layers_interpreted.py has their second derivative"
        )
    layer = getattr(rnn_gpu, name)(2, 3, bidirectional=True).double()
    kwargs = {"lengths": torch.tensor([2, 3, 0]), "resets": torch.rand(3, 3) < 0.3} if masked else {}
    input = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)

    def opaque(input, *parameters):
        """The layer as torch.func and compilers see it."""
        run = lambda x: torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,), kwargs)[0]
        return torch.func.vmap(run)(input.unsqueeze(0))[0]

    names, parameters = zip(*layer.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(opaque, (input, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(opaque, (input, *parameters), fast_mode=True)
    run = lambda input: layer(input, **kwargs)[0]
    assert torch.autograd.gradcheck(run, (input,)) and torch.autograd.gradgradcheck(run, (input,))


@pytest.mark.covering()
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_penalty_trains(name):
    """Catches: a penalty on the gradient, as in a Wasserstein critic, that does not reach the parameters."""
    torch.manual_seed(0)
    layer, head = getattr(rnn_gpu, name)(3, 16), torch.nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.02)
    penalties = []
    for _ in range(12):
        input = leaf(TIME, 4, 3)
        (gradient,) = torch.autograd.grad(head(layer(input)[0][-1]).sum(), input, create_graph=True)
        penalty = (gradient.transpose(0, 1).flatten(1).norm(dim=1) - 1).pow(2).mean()
        penalties.append(penalty.item())
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
    assert penalties[-1] < 0.5 * penalties[0]


@on_the_kernels
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_contiguous_and_may_be_changed_in_place(name, monkeypatch):
    """Catches: gradients that are views of something larger, which code before the layer, or after it, cannot use."""
    monkeypatch.setattr(products, "WORTH", 0)
    layer, input = getattr(rnn_gpu, name)(3, 5), leaf(TIME, BATCH, 3)
    states = tuple(leaf(1, BATCH, 5) for _ in range(STATES[name]))
    seen = []
    for create_graph in (False, True):
        given = input.sin()
        given.register_hook(lambda gradient: seen.append(gradient.is_contiguous()))
        output, _ = layer(given, states if len(states) > 1 else states[0])
        for gradient in torch.autograd.grad(output.sum(), [input, *states], create_graph=create_graph):
            gradient.mul_(2)
    assert seen == [True, True]


@on_the_kernels
def test_a_backward_keeps_to_the_precision_of_its_forward(monkeypatch):
    """Catches: a backward planned by a switch that has changed, for groups of layers that have no such plan."""
    planned = []
    made = operators.plan_of
    for module in (operators, autograd, wavefront):
        monkeypatch.setattr(module, "plan_of", lambda *a: planned.append(found := made(*a)) or found)
    layer = rnn_gpu.LSTM(3, 5, num_layers=2)
    for _ in range(2):  # the second call is like the first
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")
        output, _ = layer(torch.randn(TIME, BATCH, 3))
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
        output.sum().backward()
    assert {(plan.backward, plan.precision) for plan in planned} == {(False, "tf32"), (True, "tf32")}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    """Catches: a forward that differs when it is run again, or that saves what a checkpoint cannot make again."""
    layer, input = rnn_gpu.GRU(3, 20), leaf(TIME, BATCH, 3)
    run = lambda x: checkpoint(lambda x: layer(x)[0], x, use_reentrant=use_reentrant)
    expected = torch.autograd.grad(layer(input)[0].pow(2).sum(), input)[0]
    actual = torch.autograd.grad(run(input).pow(2).sum(), input)[0] if not use_reentrant else backward(run, input)
    assert torch.equal(actual, expected)


def backward(run, input):
    """The gradient by backward(), which alone serves the older kind of checkpoint."""
    input = input.detach().requires_grad_()
    run(input).pow(2).sum().backward()
    return input.grad


def test_retained_graphs_accumulation_and_hooks():
    """Catches: saved tensors freed or changed by a first backward, gradients that replace instead of adding."""
    layer, input = rnn_gpu.LSTM(3, 20), leaf(TIME, BATCH, 3)
    seen = []
    layer.register_full_backward_hook(lambda module, given, made: seen.append(made[0].shape))
    layer.weight_hh_l0.register_hook(lambda gradient: 2 * gradient)
    loss = layer(input)[0].pow(2).sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in layer.parameters()]
    loss.backward()
    for parameter, first in zip(layer.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * first)
    assert seen == [torch.Size([TIME, BATCH, 20])] * 2
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_anomaly_mode_names_what_made_a_nan():
    """Catches: a backward that anomaly mode cannot follow."""
    layer = rnn_gpu.RNN(3, 20, nonlinearity="relu")
    anomaly = torch.autograd.set_detect_anomaly(True, check_nan=True)
    named = pytest.warns(UserWarning, match="Error detected")
    with anomaly, named, pytest.raises(RuntimeError, match="nan"):
        output, _ = layer(leaf(TIME, BATCH, 3))
        (output * torch.full_like(output, torch.nan)).sum().backward()


def test_an_input_changed_in_place_is_caught():
    """Catches: gradients computed from an input that is no longer what the forward saw."""
    layer, base = rnn_gpu.GRU(3, 20), leaf(TIME, BATCH, 3)
    input = base * 1
    output, _ = layer(input)
    input.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@on_the_kernels
def test_what_is_frozen_costs_no_product(monkeypatch):
    """Catches: products for gradients that nobody asked for."""
    asked = []
    made = autograd.gradients_by_set
    monkeypatch.setattr(autograd, "gradients_by_set", lambda *a: asked.append(found := made(*a)) or found)
    layer = rnn_gpu.LSTM(3, 20)
    layer.weight_ih_l0.requires_grad_(False)
    layer(torch.randn(TIME, BATCH, 3))[0].sum().backward()
    (found,) = asked
    present = {name for name, g in zip(Inputs._fields, found, strict=True) if g is not None}
    assert present == {"weight_hh", "bias_ih", "bias_hh"}


@pytest.mark.covering()
@pytest.mark.parametrize("name", NAMES)
def test_deterministic_algorithms_raise_nothing_and_change_nothing(name):
    """Catches: an operation that is not the same to the last bit from run to run, or that PyTorch knows as such."""
    layer, input = getattr(rnn_gpu, name)(3, 20, bidirectional=True), leaf(TIME, BATCH, 3)
    expected = gradients(layer, input)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            assert all(map(torch.equal, gradients(layer, input), expected))
            layer(input, lengths=torch.tensor([1, 5, 3]), resets=torch.rand(TIME, BATCH) < 0.3)[0].sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


# ---- Lean memory -----------------------------------------------------------------------------------------------------


@pytest.mark.covering(("name", "kwargs"), "dtype")
@on_the_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, kwargs", [(n, {"bidirectional": True, "num_layers": 2}) for n in NAMES] + [
    ("LSTM", {"proj_size": 3}), ("GRU", {"bias": False}), ("LSTM", {"batch_first": True})
])  # fmt: skip
def test_lean_memory_gives_the_same_gradients(name, kwargs, dtype):
    """Catches: gates made again from the wrong states, rows or biases."""
    layer, oracle = pair(name, 4, 20, dtype=dtype, **kwargs)
    input = torch.randn(*((BATCH, TIME) if layer.batch_first else (TIME, BATCH)), 4)
    expected, peer = outcome(oracle, input.to(dtype), None, "torch"), outcome(same(layer, dtype), input, None, "torch")
    with rnn_gpu.memory("lean"):
        actual = outcome(layer, input, None, "triton")
    for key, value in expected.items():
        assert_close_to_oracle(actual[key], value, peer[key], key)


@on_the_kernels
@pytest.mark.parametrize("name", NAMES)
def test_lean_memory_with_masks(name):
    """Catches: gates made again without the masks: of the first step after a reset, of a reversed row's own end."""
    layer = getattr(rnn_gpu, name)(4, 20, bidirectional=True)
    input, masks = leaf(6, 4, 4), {"lengths": torch.tensor([6, 0, 3, 1]), "resets": torch.rand(6, 4) < 0.4}
    results = {}
    for setting in ("full", "lean"):
        with rnn_gpu.memory(setting):
            output, _ = layer(input, **masks)
        results[setting] = torch.autograd.grad(output.pow(2).sum(), [input, *layer.parameters()])
    for lean, full in zip(results["lean"], results["full"], strict=True):
        torch.testing.assert_close(lean, full)


@pytest.mark.parametrize("apart", [0, 1, 3])
def test_biases_of_gates_apart_have_gradients_of_their_own(apart, monkeypatch):
    """Catches: the hidden bias of a cell given the input's gradient, where all gates are apart or in another order."""
    cell = dataclasses.replace(CELLS["gru"], apart=apart)
    monkeypatch.setattr(around, "CELLS", CELLS | {"gru": cell})
    count, size, rows = 6, 5, Rows(3, 2)
    d_gates = torch.randn(count, 2, cell.slots, size, dtype=torch.float64)
    wanted = Inputs(*[name.startswith("bias") for name in Inputs._fields])
    y = torch.zeros(count, 2, size, dtype=torch.float64)
    found = around.products_by_set(
        Call("gru", 2, 2), wanted, None, Inputs(*[None] * len(Inputs._fields)), rows, y, d_gates, None, None, None
    )
    found = dict(zip(Inputs._fields, found, strict=True))
    of_slot, order = d_gates.sum(0), [*range(3 - apart, 3), *range(3 - apart)]
    for n in range(2):
        hidden, inner = of_slot[n, :3], of_slot[n, cell.slots - 3 :]
        by_gate = torch.stack([hidden[order.index(gate)] for gate in range(3)])
        assert_same_mathematics(found["bias_hh"][n], by_gate.flatten(), "bias_hh")
        assert_same_mathematics(found["bias_ih"][n], inner.flatten(), "bias_ih")


def bytes_kept(run) -> int:
    """Bytes that the graph of a forward keeps beyond what was there before."""
    gc.collect()
    kept = {}
    before = set()
    for tensor in [one for one in gc.get_objects() if type(one) in PLAIN and one.device.type == "cpu"]:
        with contextlib.suppress(RuntimeError):  # one that a compiler has left, and that has no memory
            before.add(tensor.untyped_storage().data_ptr())
    pack = lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    del result
    return sum(t.untyped_storage().nbytes() for where, t in kept.items() if where not in before)


@on_the_kernels
@pytest.mark.parametrize("name, most", [("LSTM", 0.5), ("GRU", 0.35)])
def test_lean_memory_is_lean(name, most):
    """Catches: a lean forward that keeps the gates alive after all."""
    full, lean = (getattr(rnn_gpu, name)(8, 32, num_layers=3, memory=setting) for setting in ("full", "lean"))
    input = torch.randn(12, 4, 8)
    assert bytes_kept(lambda: lean(input)) < most * bytes_kept(lambda: full(input))


@on_the_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "full", "lean"), [("LSTM", 6, 2), ("GRU", 5, 1), ("RNN", 1, 1)])
def test_what_is_kept_is_what_the_page_on_limits_says(name, full, lean, dtype):
    """Catches: another tensor kept for the backward, or less, without the table of docs/limits.md."""
    time, batch, size = 40, 2, 16
    input = torch.randn(time, batch, size, dtype=dtype)
    for setting, values in (("full", full), ("lean", lean)):
        layer = getattr(rnn_gpu, name)(size, size, memory=setting, dtype=dtype)
        found = bytes_kept(lambda layer=layer: layer(input)) / (time * batch * size * dtype.itemsize)
        values += name == "LSTM" and dtype == torch.bfloat16  # c is in float32
        assert values <= found <= values + 4 / time, setting  # a state and a word at both ends


def test_memory_settings():
    """Catches: a setting that is ignored, kept after its context, or lost in a copy."""
    layer = rnn_gpu.LSTM(3, 4, memory="lean")
    assert layer.memory == "lean" and "memory=lean" in repr(layer) and "memory" not in repr(rnn_gpu.GRU(3, 4))
    assert rnn_gpu.restore_rnns(torch.nn.Sequential(layer))(torch.randn(2, 1, 3))[0].shape == (2, 1, 4)
    with rnn_gpu.memory("lean"):
        assert settings.current_memory() == "lean"
    assert settings.current_memory() == "full"
    for wrong in (lambda: rnn_gpu.GRU(3, 4, memory="none"), lambda: rnn_gpu.memory("none").__enter__()):
        with pytest.raises(ValueError, match="Select from 'full', 'lean'"):
            wrong()


# ---- The operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masks"])
@pytest.mark.parametrize("cell, gates", [("lstm", 4), ("gru", 3), ("rnn_tanh", 1)])
def test_operators_around_atens_kernels_keep_the_rules_of_torch_library(cell, gates, masked):
    """Catches: a wrong fake (shape, stride, type), an output that shares memory with an input."""
    T, B, N, H = 3, 2, 2, 5
    lengths, resets = (
        (torch.tensor([3, 1], dtype=torch.int32), torch.eye(3, 2).to(torch.int8)) if masked else (None,) * 2
    )
    weights = [torch.randn(N, gates * H, size) for size in (4, H)] + [torch.randn(N, gates * H) for _ in range(2)]
    states = torch.randn(N, B, H), torch.randn(N, B, H) if cell == "lstm" else None
    given = torch.randn(T * B, 4), *weights, None, None, *states, None, lengths, None, resets, *[None] * 3
    given = *given, T, cell, 2, False, None, None, False
    torch.library.opcheck(torch.ops.rnn_gpu.aten_layer.default, given)
    d_y, d_h_n, d_c_n, _, kept = torch.ops.rnn_gpu.aten_layer(*given)
    need = [t is not None for t in given[: len(Inputs._fields)]]
    backward = d_y, d_h_n, d_c_n if cell == "lstm" else None, None, *given[:-1], need, kept
    torch.library.opcheck(torch.ops.rnn_gpu.aten_layer_backward.default, backward)
    if masked:
        return
    # the same as the operator for a stack without masks
    of_sets = [kind[n] for n in range(N) for kind in weights]
    given = given[0], *states, of_sets, cell, True, 1, N, T, False
    torch.library.opcheck(torch.ops.rnn_gpu.aten_stack.default, given)
    y, h_n, c_n, kept = torch.ops.rnn_gpu.aten_stack(*given)
    torch.testing.assert_close((y.view(d_y.shape), h_n, c_n), (d_y, d_h_n, d_c_n))
    need = [True, *(state is not None for state in states), *[True] * len(of_sets)]
    backward = y, h_n, c_n if cell == "lstm" else None, *given[:-1], kept, need
    torch.library.opcheck(torch.ops.rnn_gpu.aten_stack_backward.default, backward)
