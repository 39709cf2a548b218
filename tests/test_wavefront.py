"""Stacks whose layers run side by side in one launch: kernels and layers around them, in Triton's interpreter or on
the machine for PTX, against torch.nn in float64.

    TRITON_INTERPRET=1 pytest tests/test_wavefront.py
    RNN_GPU_TEST_MACHINE=1 pytest tests/test_wavefront.py
"""

import contextlib
import copy
import dataclasses
import itertools
import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from tests.interpreter import INTERPRETED, ON_MACHINE, concurrent_programs

if not INTERPRETED and not ON_MACHINE:
    pytest.skip("needs TRITON_INTERPRET=1 or RNN_GPU_TEST_MACHINE=1, set before Python starts", allow_module_level=True)

import rnn_gpu
import rnn_gpu.zoo
from rnn_gpu import backends, settings, stack_operators, wavefront
from rnn_gpu.call import Call
from rnn_gpu.kernels import launch, stack
from rnn_gpu.kernels.plan import DEVICES, plan
from rnn_gpu.kernels.rows import Rows
from rnn_gpu.kernels.spec import CELLS, chunk_width, padded
from tests.layers import assert_saved_tensors_may_be_strided, by_rounded_loops, draw, outcome, pair, same
from tests.problems import Poison, changed
from tests.sequences import as_hx, as_tuple, one_at_a_time, states_of
from tests.sequences import outcome as outcome_of_run
from tests.tolerances import assert_close_to_oracle

pytestmark = [pytest.mark.interpreted]

NAMES = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", dict(nonlinearity="relu")),
}
SLOW = pytest.mark.slow
KINDS = ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.float16, None), (torch.bfloat16, None))


def sample(cases, *often) -> list:
    """The cases, all but some of them marked slow."""
    return [case if case in often else pytest.param(*case, marks=SLOW) for case in cases]


@pytest.fixture(autouse=True)
def full_float32_and_waits_end_soon(monkeypatch):
    """Compare with full products, unless a test says otherwise; a wait that cannot end fails within seconds."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    monkeypatch.setattr(launch, "WAIT_LIMIT", 20_000)
    launch.status_word(torch.device("cpu")).zero_()


@pytest.fixture
def together(monkeypatch):
    """All layers of a stack in one launch, whatever the plan would choose -> a function that cuts it otherwise."""
    cut, of_one = {}, wavefront._plan

    def groups(call, hidden_size, like, rows, layers, dropout, frozen=0):
        can = call.route == "direct" and dropout < 1 and call.sets == 1 and call.saving != "lean"
        return (layers,) if can else (1,) * layers

    def planned(call, weight_hh, like, rows, drops, backward):
        if len(weight_hh) == 1:
            return of_one(call, weight_hh, like, rows, drops, backward)
        return cut_plan(call, weight_hh[0].shape[1], like.dtype, rows, backward, len(weight_hh), **cut)

    for module in ("functional", "stack_operators"):
        monkeypatch.setattr(f"rnn_gpu.{module}.groups", groups)
    monkeypatch.setattr(wavefront, "_plan", planned)
    return cut.update


@pytest.fixture
def launches(monkeypatch):
    """(layers, whether backward) of every launch."""
    seen, run = [], launch.run

    def counted(plan, *rest):
        seen.append((plan.layers, plan.backward))
        run(plan, *rest)

    monkeypatch.setattr(launch, "run", counted)
    return seen


@pytest.fixture
def compiler():
    """One that counts what it compiles."""
    return CompileCounterWithBackend("aot_eager")


def cut_plan(call, hidden_size, dtype, rows, backward, layers, waits=None, registers=None, shared=None, **changes):
    """The planner's plan with changes; registers, shared: chunks of both sources, as far as there are so many."""
    name, precision = str(dtype).removeprefix("torch."), backends.precision_of(str(dtype).removeprefix("torch."))
    p = plan(
        call.cell, hidden_size, rows.batch, 1, name, DEVICES["h200"], backward, precision, ragged=rows.ragged,
        layers=layers,
    )  # fmt: skip
    assert not isinstance(p, str), p
    if CELLS[call.cell].apart and "units" in changes:
        changes |= dict(units=max(changes["units"], 16), gates_per_tile=1)
    p = changed(p, **changes)
    chunks = 2 * -(-padded(hidden_size, name) // chunk_width(p.warps, name))
    registers = min(p.registers if registers is None else registers, chunks)
    shared = min(p.shared if shared is None else shared, chunks - registers)
    p = dataclasses.replace(p, registers=registers, shared=shared, streamed=chunks - registers - shared)
    if waits is not None and backward and CELLS[p.cell].gates > 1:
        p = dataclasses.replace(p, waits=waits)
    return p


def stacked(cell, hidden_size, layers, dtype=torch.float32, **options):
    name, more = NAMES[cell]
    return pair(name, 5, hidden_size, num_layers=layers, dtype=dtype, **more, **options)


def assert_right(layers, time, batch, dtype=torch.float32, states=True, precision=None):
    """The error rule for outputs, final states of all layers and every gradient."""
    ours, oracle = layers
    input, hx = draw(ours, time, batch)
    input, hx = input.to(dtype), tuple(s.to(dtype) for s in hx) if states else None
    expected = outcome(oracle, input, hx, "torch")
    peer = same(ours, dtype)
    peer = outcome(by_rounded_loops(peer) if precision == "tf32" else peer, input, hx, "torch")
    actual = outcome(ours, input, hx, "triton")
    for key, value in expected.items():
        assert_close_to_oracle(actual[key], value, peer[key], key)
    return actual


# ---- Right results ---------------------------------------------------------------------------------------------------


def covering_sample() -> list:
    """Every cell x type; sizes, numbers of layers and steps (fewer than layers, too), ways to cut, dealt over them."""
    draw = random.Random("a sample of stacks")
    cuts = [
        dict(units=16),
        dict(units=32, slices=2),
        dict(units=16, registers=0, shared=0),
        dict(units=16, registers=1, shared=1),
        dict(units=8, slices=1),
        dict(units=16, warps=4, registers=2, shared=1, waits=2),
    ]
    cases = []
    for cell in NAMES:
        for dtype, precision in KINDS:
            cut = cuts[len(cases) % len(cuts)]
            size, batch = draw.choice((7, 20, 33, 40)), draw.choice((1, 5, 11))
            layers, time = ((2, 3), (3, 2), (4, 1), (3, 5))[len(cases) % 4]
            if cut.get("warps"):
                size = 150
            name = f"{cell}-H{size}-B{batch}-T{time}-L{layers}-{str(dtype)[6:]}-{precision}"
            often = [] if (len(cases) + 2) % 4 == len(cases) // 4 else [SLOW]  # each cell, each type once
            problem = cell, size, batch, time, layers, dtype, precision, cut, len(cases)
            cases.append(pytest.param(*problem, id=name, marks=often))
    return cases


@pytest.mark.parametrize(
    ("cell", "size", "batch", "time", "layers", "dtype", "precision", "cut", "seed"), covering_sample()
)
def test_a_stack_in_one_launch_is_right(
    cell, size, batch, time, layers, dtype, precision, cut, seed, together, monkeypatch
):
    """Catches: a wrong layer, step, weight or slot at either source, more layers than steps, an odd size, a chunk of
    weights that is left out or taken for the other source's.
    """
    if precision:
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", precision)
    together(cut)
    with concurrent_programs(seed, torn=seed % 3 == 0):
        assert_right(stacked(cell, size, layers, dtype), time, batch, dtype, precision=precision)


@pytest.mark.parametrize("cell", [pytest.param("lstm", marks=SLOW), "gru"])
def test_several_launches_without_biases_and_states_are_right(cell, together):
    """Catches: rows of a later launch done as those of the first, biases states read where there are none."""
    together(dict(units=16, slices=1, batch_slices=1))
    with concurrent_programs(5):
        assert_right(stacked(cell, 7, 2, bias=False), 2, 19, states=False)


@pytest.mark.parametrize("cell", ["gru", *(pytest.param(cell, marks=SLOW) for cell in ("lstm", "rnn_tanh"))])
def test_inference_gives_the_same(cell, together):
    """Catches: results that depend on what is kept."""
    layers = stacked(cell, 20, 3)
    with concurrent_programs(6):
        actual = assert_right(layers, 4, 3)
        input, hx = draw(layers[0], 4, 3)
        with torch.no_grad(), rnn_gpu.backend("triton"):
            output, final = layers[0](input, as_hx(hx))
    assert torch.equal(output, actual["output"])
    for index, state in enumerate(as_tuple(final)):
        assert torch.equal(state, actual[f"final{index}"])


def test_with_lean_memory_layers_run_one_after_another(monkeypatch):
    """Catches: a backward that makes the gates of all layers again at once, which took more than was ever saved."""
    ours, _ = stacked("gru", 20, 3)
    launches = []
    run = stack.forward
    monkeypatch.setattr(stack, "forward", lambda *a: launches.append(a) or run(*a))
    input, _ = draw(ours, 3, 2)
    with concurrent_programs(7), rnn_gpu.backend("triton"), settings.always_exchange():
        ours(input)
        assert len(launches) == 1
        ours.memory = "lean"
        ours(input)
        assert len(launches) == 1
        with torch.no_grad():
            ours(input)
        assert len(launches) == 2
    assert "one after another" in rnn_gpu.explain(ours, 2, "H200")


LENGTHS = [4, 5, 0, 1, 5, 2, 3]


@pytest.mark.parametrize(
    ("cell", "kind", "how"),
    sample(
        itertools.product(["lstm", "gru", "rnn_tanh"], ["lengths", "packed", "resets"], ["eager", "compiled"]),
        ("lstm", "packed", "eager"), ("gru", "resets", "eager"), ("rnn_tanh", "lengths", "eager"),
        ("lstm", "resets", "compiled"), ("gru", "packed", "compiled"), ("rnn_tanh", "lengths", "compiled"),
    ),
)  # fmt: skip
def test_rows_that_end_early_or_start_anew(cell, kind, how, together, monkeypatch):
    """Catches: a layer that waits for a row another one has no place for, padding that reaches the layer above, a reset
    that cuts off what comes from the layer below too, or not its own state; masks that the operator of a stack does not
    hand on.
    """
    together(dict(units=16))
    ours, oracle = stacked(cell, 20, 3)
    if how == "compiled":
        monkeypatch.setattr(stack_operators, "groups", lambda *_: (1, 2))
        ours.compile(fullgraph=True, backend="aot_eager")
    time, batch = 5, len(LENGTHS)
    input = torch.randn(time, batch, 5, generator=torch.Generator().manual_seed(5))
    if kind == "resets":  # the oracle cuts one layer into pieces: so layer upon layer
        resets = torch.rand(time, batch, generator=torch.Generator().manual_seed(6)) < 0.3

        def run(layer, input, states):
            output, hx = layer(input, as_hx(states), resets=resets)
            return output, *as_tuple(hx)

        def oracle_run(layer, input, states):
            finals = []
            for n in range(3):
                one = type(layer)(input.shape[2], 20).to(input.dtype)
                weights = {
                    f"{name}_l0": getattr(layer, f"{name}_l{n}")
                    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                }
                one_layer = lambda x, hx, one=one, weights=weights: torch.func.functional_call(one, weights, (x, hx))
                one_layer.proj_size, one_layer.hidden_size, one_layer.bidirectional = 0, 20, False
                input, *final = one_at_a_time(one_layer, input, [s[n : n + 1] for s in states], [time] * batch, resets)
                finals.append(final)
            return input, *(torch.cat(parts) for parts in zip(*finals, strict=True))
    elif kind == "lengths":

        def run(layer, input, states):
            output, hx = layer(input, as_hx(states), lengths=torch.tensor(LENGTHS))
            return output, *as_tuple(hx)

        def oracle_run(layer, input, states):
            return one_at_a_time(layer, input, states, LENGTHS)
    else:
        lengths = torch.tensor([max(length, 1) for length in LENGTHS])

        def run(layer, input, states):
            output, hx = layer(pack_padded_sequence(input, lengths, enforce_sorted=False), as_hx(states))
            return output.data, *as_tuple(hx)

        oracle_run = run
    states = states_of(ours, batch, torch.float32)
    expected = outcome_of_run(oracle_run, oracle, input.double(), states)
    peer = outcome_of_run(oracle_run, same(ours, torch.float32), input, states)
    with concurrent_programs(7, torn=True):
        actual = outcome_of_run(run, ours, input, states, "triton")
    for index, (a, e, p) in enumerate(zip(actual, expected, peer, strict=True)):
        assert_close_to_oracle(a, e, p, f"result {index}")


@pytest.mark.parametrize(
    ("cell", "kind", "how"),
    sample(
        itertools.product(["lstm", "gru", "rnn_tanh"], ["dense", "packed"], ["eager", (3,), (1, 2), (2, 1)]),
        ("lstm", "packed", "eager"), ("rnn_tanh", "dense", (3,)), ("gru", "packed", (1, 2)),
    ),
)  # fmt: skip
def test_dropout_between_the_layers(cell, kind, how, together, launches, compiler, monkeypatch):
    """Catches: a mask drawn otherwise than one after another would, masks of another layer or step, forgotten where the
    gradient passes or where a layer's input is multiplied with its gradients; a state that waits for a row of nobody.
    In a graph: the same, whatever the groups; a mask that is drawn again, or applied twice between two groups.
    """
    together(dict(units=16))
    ours, oracle = stacked(cell, 20, 3, dropout=0.4)
    sizes = (3,) if how == "eager" else how
    if how != "eager":
        monkeypatch.setattr(stack_operators, "groups", lambda *_: sizes)
        ours.compile(fullgraph=True, backend=compiler)
    lengths = torch.tensor([4, 1, 3, 4, 2])
    input, states = torch.randn(4, 5, 5), states_of(ours, 5, torch.float32)

    def run(layer, input, states):
        torch.manual_seed(7)
        if kind == "packed":
            output, hx = layer(pack_padded_sequence(input, lengths, enforce_sorted=False), as_hx(states))
            return output.data, *as_tuple(hx)
        output, hx = layer(input, as_hx(states))
        return output, *as_tuple(hx)

    expected = outcome_of_run(run, oracle, input.double(), states)
    peer = same(ours, torch.float32)
    peer.dropout = 0.4
    peer = outcome_of_run(run, peer, input, states)
    with concurrent_programs(11, torn=True):
        actual = outcome_of_run(run, ours, input, states, "triton")
    assert launches == [*((n, False) for n in sizes), *((n, True) for n in reversed(sizes))]
    for index, (a, e, p) in enumerate(zip(actual, expected, peer, strict=True)):
        assert_close_to_oracle(a, e, p, f"result {index}")
    with concurrent_programs(12), torch.no_grad(), rnn_gpu.backend("triton"):
        assert torch.equal(run(ours, input, states)[0].flatten(0, -2), actual[0].flatten(0, -2))


@pytest.mark.parametrize("name", [pytest.param("MGU", marks=SLOW), "SLSTM"])
def test_cells_of_another_shape_are_right(name, together):
    """Catches: sums of gates apart, states or planes counted as the LSTM's or the GRU's."""
    together(dict(units=16))
    torch.manual_seed(0)
    ours = getattr(rnn_gpu.zoo, name)(5, 20, num_layers=3)
    oracle, (input, _) = copy.deepcopy(ours).double(), draw(ours, 3, 5)
    expected, peer = outcome(oracle, input, None, "torch"), outcome(ours, input, None, "torch")
    with concurrent_programs(8):
        actual = outcome(ours, input, None, "triton")
    for key, value in expected.items():
        assert_close_to_oracle(actual[key], value, peer[key], key)


# ---- Schedules, waits, memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "dtype"), [("lstm", torch.bfloat16), pytest.param("gru", torch.float16, marks=SLOW)]
)  # fmt: skip
def test_every_schedule_gives_the_same_bits(cell, dtype, together):
    """Catches: a layer that uses what the one below has not finished, in some order of events."""
    together(dict(units=16))
    ours, _ = stacked(cell, 20, 3, dtype)
    input, hx = draw(ours, 2, 3)
    expected = None
    for seed in range(4):
        with concurrent_programs(seed, torn=seed % 2 == 1):
            found = outcome(ours, input.to(dtype), hx, "triton")
        expected = expected or found
        assert all(torch.equal(found[key], expected[key]) for key in found), f"under seed {seed}"


@pytest.mark.parametrize("cell", ["gru", *(pytest.param(cell, marks=SLOW) for cell in ("lstm", "rnn_tanh"))])
def test_uninitialised_memory_never_reaches_a_result(cell, together, monkeypatch):
    """Catches: reading what nobody wrote, above all the input weight that the first layer does not have."""
    together(dict(units=16, slices=2))
    layers = stacked(cell, 7, 3, torch.bfloat16)
    with monkeypatch.context() as patch, concurrent_programs(6):
        poison = Poison(patch)
        assert_right(layers, 2, 9, torch.bfloat16)
    assert len(poison.given) > 5, "the launchers make their buffers in another way now: poison that instead"


def test_a_missing_program_of_a_layer_below_is_an_error_that_names_the_launch(together, monkeypatch):
    """Catches: a hang of the layers above where a layer cannot run, and of those that wait for nobody."""
    together(dict(units=16))
    monkeypatch.setattr(launch, "WAIT_LIMIT", 100)
    ours, _ = stacked("lstm", 20, 3)
    missing = dict(seed=14, leave_out=lambda name, index: name == "forward" and index == (0, 0, 0))
    told = pytest.raises(RuntimeError, match="lstm forward, T 3, B 5")
    with concurrent_programs(**missing), rnn_gpu.backend("triton"), torch.no_grad(), told as error:
        ours(torch.randn(3, 5, 5))
    assert "2 unit slices" in str(error.value)
    launch.check("cpu")


def test_nan_goes_to_the_layers_above_and_to_no_other_row(together):
    """Catches: a NaN that looks unwritten, or is lost between two layers."""
    together(dict(units=16))
    ours, _ = stacked("gru", 7, 3)
    input = torch.randn(4, 3, 5)
    input[1, 2] = torch.nan
    with concurrent_programs(9), rnn_gpu.backend("triton"), torch.no_grad():
        output, _ = ours(input)
    assert output.isnan().any(2).tolist() == [[False] * 3] + [[False, False, True]] * 3


# ---- The layers around it --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_double_backward(dropout, together):
    """Catches: a gradient penalty that leaves out a layer, or a derivative by another layer's tensors or mask."""
    layer, oracle = stacked("lstm", 9, 2, dropout=dropout)
    input, hx = draw(layer, 3, 2)

    def penalty(module, input, hx, backend):
        torch.manual_seed(7)
        leaves = [tensor.clone().requires_grad_() for tensor in (input, *hx)]
        with rnn_gpu.backend(backend):
            output, final = module(leaves[0], as_hx(tuple(leaves[1:])))
        loss = output.pow(2).sum() + sum(state.sum() for state in as_tuple(final))
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), [*leaves, *module.parameters()])

    expected, peer = penalty(oracle, input.double(), [s.double() for s in hx], "torch"), same(layer, torch.float32)
    peer.dropout = dropout
    peer = penalty(peer, input, hx, "torch")
    for a, e, p in zip(penalty(layer, input, hx, "triton"), expected, peer, strict=True):
        assert_close_to_oracle(a, e, p)


def test_what_autograd_is_asked_for_is_what_it_gives(together):
    """Catches: an output changed in place before its backward, gradients of frozen weights, gradients of the final
    states alone, many gradients at once.
    """
    layer, oracle = stacked("gru", 16, 3)
    input, _ = draw(layer, 3, 2)
    with rnn_gpu.backend("triton"):
        output, _ = layer(input)
        output.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
        layer.zero_grad()
        layer.weight_hh_l1.requires_grad_(False)
        _, h_n = layer(input)
        h_n[0].sum().backward()
        leaf = input.clone().requires_grad_()
        output, _ = layer(leaf)
        chosen = torch.randn(2, *output.shape)
        (batched,) = torch.autograd.grad(output, leaf, chosen, is_grads_batched=True, retain_graph=True)
        single = [torch.autograd.grad(output, leaf, one, retain_graph=True)[0] for one in chosen]
    assert torch.equal(batched, torch.stack(single))
    assert layer.weight_hh_l1.grad is None and not layer.weight_ih_l2.grad.any()
    oracle(input.double())[1][0].sum().backward()
    peer = same(layer, torch.float32)
    peer(input)[1][0].sum().backward()
    assert_close_to_oracle(layer.weight_ih_l0.grad, oracle.weight_ih_l0.grad, peer.weight_ih_l0.grad)


class GivesNothing(torch.autograd.Function):
    """A loss that has no gradient to give."""

    @staticmethod
    def forward(ctx, output):
        return output.sum()

    @staticmethod
    def backward(ctx, d_loss):
        return None


def test_a_graph_of_the_backward_counts_every_path_once(together):
    """Catches: a first derivative that is another one where its graph is asked for, because a state is made from
    another one; an output that keeps the memory of all layers; a backward that is given nothing.
    """
    layer, _ = stacked("lstm", 16, 2)
    input, (start, _) = draw(layer, 3, 2)
    found = []
    for create_graph in (False, True):
        leaf = start.clone().requires_grad_()
        with rnn_gpu.backend("triton"):
            output, _ = layer(input, (leaf, leaf))
        found += torch.autograd.grad(output.sum(), leaf, create_graph=create_graph)
    torch.testing.assert_close(*found)
    assert output.untyped_storage().nbytes() == output.nbytes
    (nothing,) = torch.autograd.grad(GivesNothing.apply(output), leaf, create_graph=True, allow_unused=True)
    assert nothing is None or not nothing.any()


@pytest.mark.parametrize(
    ("cell", "how"), [("lstm", "eager"), ("gru", "compiled"), pytest.param("gru", "eager", marks=SLOW)]
)
def test_frozen_layers_keep_nothing_and_have_no_backward(cell, how, together, launches, monkeypatch):
    """Catches: gates that are saved, or a launch that walks backwards, for layers below all that need a gradient;
    gradients of the layers above that miss what these gave,
    or dropout between them.
    """
    together(dict(units=16))
    monkeypatch.setattr("rnn_gpu.functional.groups", lambda *_: (2, 2))
    saving, forward = [], stack.forward
    monkeypatch.setattr(stack, "forward", lambda *given: (saving.append(given[6]), forward(*given))[1])
    layer, oracle = stacked(cell, 20, 4)
    peer, (input, hx) = same(layer, torch.float32), draw(layer, 3, 2)
    for one in (layer, oracle, peer):
        one.dropout = 0.4
        for name, weight in one.named_parameters():
            weight.requires_grad_(name.endswith(("l2", "l3")))
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if how == "compiled" else layer

    def found(module, input, hx):
        torch.manual_seed(7)
        output, final = module(input, as_hx(hx))
        trained = [weight for weight in layer_of[module].parameters() if weight.requires_grad]
        loss = output.pow(2).sum() + sum(state.sum() for state in as_tuple(final))
        return [output, *as_tuple(final), *torch.autograd.grad(loss, trained)]

    layer_of = {run: layer, oracle: oracle, peer: peer}
    with rnn_gpu.backend("triton"):
        actual = found(run, input, hx)
    assert saving == ["nothing", "full"] and launches == [(2, False), (2, False), (2, True)]
    expected = found(oracle, input.double(), [state.double() for state in hx])
    for a, e, p in zip(actual, expected, found(peer, input, hx), strict=True):
        assert_close_to_oracle(a, e, p)


def test_frozen_layers_are_groups_of_their_own_where_that_is_no_slower():
    """Catches: a backward through frozen layers where it costs time; a launch more where it costs time."""
    call, rows, like = Call("lstm", 1, 0, route="direct", saving="full"), Rows(9, 16), torch.empty(0).bfloat16()
    chosen = lambda frozen: wavefront.groups(call, 512, like, rows, 8, 0.0, frozen)
    assert 7 in itertools.accumulate(chosen(7)) and 7 not in itertools.accumulate(chosen(0))
    assert chosen(1) == chosen(0)
    layer = rnn_gpu.LSTM(2, 3, num_layers=2).requires_grad_(False)
    weights = layer._flat_weights
    assert wavefront.frozen_layers((None,), weights, 4) == 2
    layer.bias_hh_l1.requires_grad_()
    assert wavefront.frozen_layers((None,), weights, 4) == 1
    assert wavefront.frozen_layers((torch.ones(1, requires_grad=True),), weights, 4) == 0


@pytest.mark.parametrize("layers", [1, 2])
def test_biases_may_lie_anyhow(layers, together):
    """Catches: a bias that is a column of something, or one number for all units, read as if it lay in a row."""
    layer, oracle = stacked("gru", 16, layers)
    for name in [name for name, _ in layer.named_parameters() if name.startswith("bias")]:
        bias = getattr(layer, name).detach()
        bias = torch.stack([bias, bias], 1)[:, 0] if "ih" in name else bias[:1].expand(len(bias))
        setattr(layer, name, torch.nn.Parameter(bias))
    oracle.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    input, hx = draw(layer, 3, 2)
    with torch.no_grad():
        with rnn_gpu.backend("triton"):
            output = layer(input, as_hx(hx))[0]
        expected = oracle(input.double(), as_hx([state.double() for state in hx]))[0]
        assert_close_to_oracle(output, expected, same(layer, torch.float32)(input, as_hx(hx))[0])


@pytest.mark.slow
def test_saved_tensors_may_come_back_in_other_strides(together):
    """Catches: a saved tensor handed to the kernel as it lies, after hooks that store it otherwise."""
    for cell in ("lstm", "gru", "rnn_tanh"):
        assert_saved_tensors_may_be_strided(*stacked(cell, 16, 2))


def test_the_plan_chooses_groups_and_a_setting_takes_them_back(launches, monkeypatch):
    """Catches: groups that are never, or always, taken, and results that depend on them beyond rounding."""
    layer, oracle = stacked("lstm", 20, 3)
    input, _ = draw(layer, 2, 3)
    expected = oracle(input.double())[0]
    with rnn_gpu.backend("triton"), settings.always_exchange(), torch.no_grad():
        one, _ = layer(input)
        with rnn_gpu.max_programs(2):  # too few for three layers
            two, _ = layer(input)
        with settings.layer_by_layer():
            three, _ = layer(input)
        with monkeypatch.context() as patch:
            patch.setattr("rnn_gpu.functional.groups", lambda *_: (2, 1))
            four, _ = layer(input)
    assert [layers for layers, _ in launches] == [3, 1, 1, 1, 1, 1, 1, 2, 1]
    peer = same(layer, torch.float32)(input)[0].detach()
    for output in (one, two, three, four):
        assert_close_to_oracle(output, expected, peer)


# ---- In compiled and exported graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "memory", "size", "dtype", "dropout"),
    [
        ("lstm", "full", 20, torch.float32, 0.0),
        ("gru", "lean", 20, torch.float32, 0.4),
        ("rnn_tanh", "full", 7, torch.float16, 0.0),
        *(pytest.param(cell, "lean", 7, torch.bfloat16, 0.0, marks=SLOW) for cell in ("lstm", "rnn_tanh")),
        *(pytest.param(cell, "full", 7, torch.float16, 0.4, marks=SLOW) for cell in ("lstm", "gru")),
    ],
)
def test_one_graph_whose_operator_chooses_the_groups(
    cell, memory, size, dtype, dropout, together, launches, compiler, monkeypatch
):
    """Catches: a graph that is compiled again because other layers run side by side, tensors of one group taken for
    another's, gates of an odd layer written where no kernel can; other results in inference.
    """
    together(dict(units=16))
    cut = {4: (2, 1), 5: (3,), 2: (1, 2), 6: (1, 1, 1)}  # of batches; first one that is no other size of the layer
    if memory == "lean":
        cut = dict.fromkeys(cut, (1, 1, 1))
    monkeypatch.setattr(stack_operators, "groups", lambda call, size, like, rows, layers, dropout: cut[rows.batch])
    ours, oracle = stacked(cell, size, 3, dtype, dropout=dropout)
    ours.memory = memory
    peer = same(ours, dtype)
    peer.dropout = dropout
    drawn = lambda run, *given: (torch.manual_seed(7), run(*given))[1]
    ours.compile(fullgraph=True, dynamic=True, backend=compiler)
    compiles = []
    for time, (batch, sizes) in enumerate(cut.items(), 2):
        with concurrent_programs(batch):
            launches.clear()
            input, hx = draw(peer, time, batch)
            input, hx = input.to(dtype), tuple(state.to(dtype) for state in hx)
            actual = drawn(outcome, ours, input, hx, "triton")
            assert launches == [*((n, False) for n in sizes), *((n, True) for n in reversed(sizes))]
        expected, rounded = (drawn(outcome, one, input, hx, "torch") for one in (oracle, peer))
        for key, value in expected.items():
            assert_close_to_oracle(actual[key], value, rounded[key], key)
        compiles.append(compiler.frame_count)
    assert compiles == compiles[:1] * 4, "compiled again for another size"
    with torch.no_grad(), rnn_gpu.backend("triton"), concurrent_programs(6):
        output, final = drawn(ours, input, as_hx(hx))
    assert torch.equal(output, actual["output"]) and torch.equal(as_tuple(final)[-1], actual[f"final{len(hx) - 1}"])


def test_a_graph_takes_the_groups_of_an_eager_call(launches, compiler):
    """Catches: layers that run side by side in eager mode alone, or where the plan takes them one by one; more than a
    launch forward and one backward because of dropout between them.
    """
    layer, _ = stacked("lstm", 20, 3, dropout=0.5)
    input, _ = draw(layer, 2, 3)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    with rnn_gpu.backend("triton"), settings.always_exchange():
        compiled(input)[0].sum().backward()
        assert launches == [(3, False), (3, True)]
        layer.eval()
        for most in (None, 2):
            with rnn_gpu.max_programs(most):
                found = []
                for run in (layer, compiled):
                    launches.clear()
                    output = run(input)[0]
                    output.sum().backward()
                    found.append((output, list(launches)))
            assert found[0][1] == found[1][1]
            torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == [(1, False)] * 3 + [(1, True)] * 3


def test_gradients_that_nobody_needs_are_not_made_in_a_graph(together, launches, compiler, monkeypatch):
    """Catches: a backward of groups below all that needs a gradient, one that stops too early."""
    together(dict(units=16))
    monkeypatch.setattr(stack_operators, "groups", lambda call, size, like, rows, layers, dropout: (1,) * layers)
    layer, oracle = stacked("gru", 20, 3)
    input, _ = draw(layer, 2, 3)
    layer.requires_grad_(False)
    wanted = layer.bias_hh_l1.requires_grad_()
    with rnn_gpu.backend("triton"):
        torch.compile(layer, fullgraph=True, backend=compiler)(input)[0].sum().backward()
    assert launches == [(1, False)] * 3 + [(1, True)] * 2
    oracle(input.double())[0].sum().backward()
    peer = same(layer, torch.float32)
    peer(input)[0].sum().backward()
    assert_close_to_oracle(wanted.grad, oracle.bias_hh_l1.grad, peer.bias_hh_l1.grad)
    assert all(p.grad is None for p in layer.parameters() if p is not wanted)


def test_an_output_written_into_before_the_backward_of_a_graph(together, compiler):
    """Catches: gradients of an output that has been changed since, in silence."""
    layer, _ = stacked("lstm", 20, 2)

    def run(input):
        output, _ = layer(input)
        with torch.no_grad():
            output.mul_(2)
        return output

    with rnn_gpu.backend("triton"), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.compile(run, fullgraph=True, backend=compiler)(torch.randn(3, 2, 5))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_the_operators_of_a_stack_keep_the_rules_of_torch_library(cell, together):
    """Catches: a wrong fake (shape, stride, type), an output that shares memory with an input or another one."""
    together(dict(units=16))
    T, B, L, H, of_cell = 3, 2, 2, 9, CELLS[cell]
    h0, c0 = torch.randn(L, B, H), torch.randn(L, B, H) if of_cell.states else None
    of_layers = [[of_cell.gates * H, I] for I in (4, H)], [of_cell.gates * H, H], [of_cell.gates * H]
    weights = [torch.randn(*size) for first in of_layers[0] for size in (first, of_layers[1], *[of_layers[2]] * 2)]
    for lengths, saving in ((None, "full"), (torch.tensor([3, 1], dtype=torch.int32), "lean"), (None, "nothing")):
        mask = None if saving == "lean" else torch.rand(L - 1, T * B, H) < 0.5
        how = stack_operators.How(
            lengths, None, None, mask, T, 0.5, cell, biases=True, saving=saving, max_programs=0, alone=False
        )
        given = torch.randn(T * B, 4), h0, c0, weights, *how
        torch.library.opcheck(torch.ops.rnn_gpu.kernel_stack.default, given)
        if saving == "nothing":
            continue
        y, h_n, _, *kept = torch.ops.rnn_gpu.kernel_stack(*given)
        d_c_n, need = None if c0 is None else torch.randn(L, B, H), [True, True, c0 is not None, *[True] * len(weights)]
        backward = torch.randn_like(y), torch.randn_like(h_n), d_c_n, *given, *kept, need
        torch.library.opcheck(torch.ops.rnn_gpu.kernel_stack_backward.default, backward)


class LooksOn(TorchDispatchMode):
    """A mode that changes nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("cell", "dropout"), [("lstm", 0.0), ("gru", 0.5)])
def test_the_operators_are_differentiable_twice(cell, dropout, together):
    """Catches: a second derivative that is wrong, or none, or with another mask; gradients of many at once that are
    mixed up.
    """
    layer, oracle = stacked(cell, 9, 2, dropout=dropout)
    input, hx = draw(layer, 3, 2)
    masks = {} if dropout else dict(lengths=torch.tensor([3, 1]))  # with which the oracle takes one row at a time

    def penalty(module, input, hx, backend):
        torch.manual_seed(7)
        leaves = [tensor.clone().requires_grad_() for tensor in (input, *hx)]
        with rnn_gpu.backend(backend), LooksOn():
            if backend == "triton" or not masks:
                output, final = module(leaves[0], as_hx(tuple(leaves[1:])), **masks)
                final = as_tuple(final)
            else:
                output, *final = one_at_a_time(module, leaves[0], leaves[1:], **masks)
        loss = output.pow(2).sum() + sum(state.sum() for state in final)
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), [*leaves, *module.parameters()])

    expected, peer = penalty(oracle, input.double(), [s.double() for s in hx], "torch"), same(layer, torch.float32)
    peer.dropout = dropout
    peer = penalty(peer, input, hx, "torch")
    for a, e, p in zip(penalty(layer, input, hx, "triton"), expected, peer, strict=True):
        assert_close_to_oracle(a, e, p)
    leaf = input.clone().requires_grad_()
    with rnn_gpu.backend("triton"), LooksOn():
        output, _ = layer(leaf)
    chosen = torch.randn(2, *output.shape)
    (batched,) = torch.autograd.grad(output, leaf, chosen, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(output, leaf, one, retain_graph=True)[0] for one in chosen]
    assert torch.equal(batched, torch.stack(single))


def test_an_empty_batch(together):
    """Catches: what has no elements taken for what is not there."""
    layer, _ = stacked("gru", 9, 2)
    layer.memory = "lean"
    for mode in (contextlib.nullcontext(), LooksOn()):
        input = torch.randn(3, 0, 5, requires_grad=True)
        with rnn_gpu.backend("triton"), mode:
            output, _ = layer(input)
        assert all(not d.any() for d in torch.autograd.grad(output.sum(), [input, *layer.parameters()]))


def test_a_transform_inside_a_graph(compiler):
    """Catches: an operator that a transform does not know, gradients that stop at it, dropout by another mask."""
    layer, _ = stacked("gru", 9, 2, dropout=0.5)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters, input):
        return torch.func.functional_call(layer, parameters, (input,))[0].pow(2).sum()

    run = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="same")
    inputs = torch.randn(2, 3, 2, 5)
    with rnn_gpu.backend("triton"):
        torch.manual_seed(7)
        found = torch.compile(run, fullgraph=True, backend=compiler)(parameters, inputs)
        for v, input in enumerate(inputs):
            torch.manual_seed(7)
            expected = torch.autograd.grad(layer(input)[0].pow(2).sum(), list(layer.parameters()))
            for actual, right in zip(found.values(), expected, strict=True):
                torch.testing.assert_close(actual[v], right)
