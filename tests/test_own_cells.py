"""Layers of cells that PyTorch does not have, by their description alone: on the kernels, and by their step."""

import copy
import dataclasses
import functools
import importlib
import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import rnn_gpu
from rnn_gpu import cell_check, settings, zoo
from rnn_gpu.kernels.spec import CELLS, Cell
from tests.interpreter import concurrent_programs
from tests.layers import BACKEND, INTERPRETED, ON_BOTH_BACKENDS
from tests.tolerances import assert_close_to_oracle, assert_same_mathematics

pytestmark = ON_BOTH_BACKENDS

every_layer = pytest.mark.parametrize("layer", zoo.ZOO, ids=lambda layer: layer.__name__)
on_the_kernels = pytest.mark.skipif(not INTERPRETED, reason="about the kernels; on torch the oracle is what runs")
on_torch = pytest.mark.skipif(INTERPRETED, reason="about PyTorch's side alone")


def states_of(layer, batch: int, dtype=torch.float64) -> tuple:
    """Random initial states; a normaliser is positive."""
    sets = layer.num_layers * (2 if layer.bidirectional else 1)
    names = ("h", *layer.cell.states)
    drawn = [torch.randn(sets, batch, layer.hidden_size, dtype=torch.float64) for _ in names]
    return tuple(state.abs() + 0.5 if name == "n" else state for name, state in zip(names, drawn, strict=True))


def outcome(layer, input, states, backend: str, **masks) -> dict[str, torch.Tensor]:
    """Output, final states and every gradient."""
    leaves = [one.clone().requires_grad_() for one in (input, *states)]
    with rnn_gpu.backend(backend):
        output, final = layer(leaves[0], tuple(leaves[1:]) if len(states) > 1 else leaves[1], **masks)
    results = [output, *(final if isinstance(final, tuple) else (final,))]
    loss = sum(
        (result.to(torch.float64) * torch.linspace(-1, 1, result.numel()).view_as(result)).sum() for result in results
    )
    named = dict(layer.named_parameters())
    gradients = torch.autograd.grad(loss, [*leaves, *named.values()])
    names = ["output", *(f"state {i}" for i in range(len(states)))]
    names += [f"d {name}" for name in ("input", *(f"state {i}" for i in range(len(states))), *named)]
    return dict(zip(names, (one.detach() for one in (*results, *gradients)), strict=True))


CASES = [
    # hidden size, batch, T, type, options, masks, exchange
    (20, 3, 4, torch.float32, {}, False, True),
    (33, 5, 3, torch.float32, dict(bidirectional=True), True, True),
    (9, 2, 3, torch.float32, dict(bidirectional=True, memory="lean", bias=False), True, False),
    (40, 9, 2, torch.bfloat16, dict(num_layers=2, memory="lean"), False, True),
    (7, 3, 3, torch.float16, dict(batch_first=True), False, False),
]


@on_the_kernels
@every_layer
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"H{case[0]}-{str(case[3])[6:]}-{case[4]}-{case[6]}")
def test_the_kernels_are_right(layer, case, monkeypatch, seed):
    """Catches: a wrong equation, slot, state, parameter or mask of a cell, in the loop forward or backward."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    assert_right(layer, case, seed)


def assert_right(layer, case, seed):
    """Results and gradients of the kernels against the step in float64."""
    size, batch, time, dtype, options, masked, exchange = case
    ours = layer(5, size, **options).to(dtype)
    oracle = copy.deepcopy(ours).double()
    shape = (batch, time) if ours.batch_first else (time, batch)
    input, states = torch.randn(*shape, 5, dtype=dtype), [state.to(dtype) for state in states_of(ours, batch)]
    masks = dict(lengths=torch.arange(batch) % (time + 1), resets=torch.rand(*shape) < 0.3) if masked else {}
    expected = outcome(oracle, input.double(), [state.double() for state in states], "torch", **masks)
    peer = outcome(ours, input, states, "torch", **masks)
    with concurrent_programs(seed, torn=True) if not exchange else concurrent_programs(seed):
        if exchange:
            with settings.always_exchange():
                actual = outcome(ours, input, states, "triton", **masks)
        else:
            actual = outcome(ours, input, states, "triton", **masks)
    for name, value in expected.items():
        assert_close_to_oracle(actual[name], value, peer[name], name)


@on_the_kernels
@pytest.mark.parametrize(
    "gates, case",
    [
        pytest.param(gates, case, marks=[] if (gates, number) in ((5, 0), (8, 0), (None, 2)) else pytest.mark.slow)
        for gates in (5, 6, 7, 8, None)
        for number, case in enumerate(CASES)
    ],
)
def test_more_gates_than_the_built_in_cells_have(gates, case, monkeypatch, seed):
    """Catches: gates beyond four that change places between the tiles of weights, sums or slots, or are left out."""
    from tests import wide_cells

    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    assert_right(rnn_gpu.layer(wide_cells.MULTIPLICATIVE if gates is None else wide_cells.wide(gates)), case, seed)


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("arch, device", [(80, "a100"), (90, "h200")])
@pytest.mark.parametrize("name", ["PeepholeLSTM", "SLSTM", 5, 6, 8, None])
def test_values_beyond_those_of_the_built_in_cells_do_not_spill(name, arch, device):
    """Catches: states, parameters or gates of a cell that the plan leaves no registers for."""
    from rnn_gpu.kernels.compiled import compile_plan
    from rnn_gpu.kernels.plan import DEVICES, plan
    from rnn_gpu.kernels.spec import register
    from tests import wide_cells

    wide = lambda gates: wide_cells.MULTIPLICATIVE if gates is None else wide_cells.wide(gates)
    cell = getattr(zoo, name).mode if isinstance(name, str) else register(wide(name))
    for size, backward in itertools.product((64, 512, 1024), (False, True)):
        p = plan(cell, size, 16, 1, "bfloat16", DEVICES[device], backward)
        assert compile_plan(p, arch).spills == 0, str(p)


@on_torch
def test_more_gates_than_the_kernels_have_room_for():
    """Catches: nine gates that a kernel would take for sixteen, or that no layer would take."""
    from tests import wide_cells

    ours = rnn_gpu.layer(dataclasses.replace(wide_cells.wide(8), gate_names=tuple("abcdefghi"), saves=9))(3, 4)
    assert ours(torch.randn(2, 1, 3))[0].shape == (2, 1, 4)
    assert "has 9 gates, the kernels have room for 8" in rnn_gpu.explain(ours, 16)


@every_layer
def test_packed_rows_are_those_of_lengths(layer):
    """Catches: states that packed rows permute wrong, or a carry that goes on past a row's end."""
    ours, lengths = layer(3, 8, bidirectional=True), [2, 4, 1]
    input = torch.randn(4, 3, 3)
    states = [state.float() for state in states_of(ours, 3)]
    hx = tuple(states) if len(states) > 1 else states[0]
    with rnn_gpu.backend(BACKEND), torch.no_grad():
        padded, final = ours(input, hx, lengths=lengths)
        packed, final_packed = ours(pack_sequence([input[:n, b] for b, n in enumerate(lengths)], False), hx)
    spread, _ = torch.nn.utils.rnn.pad_packed_sequence(packed)
    torch.testing.assert_close(spread, padded)
    torch.testing.assert_close(final_packed, final)


@on_torch
@every_layer
def test_the_step_and_the_layer_have_right_derivatives(layer):
    """Catches: a step that autograd cannot follow once or twice, through the layer and all its parameters."""
    ours = layer(1, 2).double()
    states = states_of(ours, 1)

    def run(input, *states_and_parameters):
        given = dict(zip(dict(ours.named_parameters()), states_and_parameters[len(states) :], strict=True))
        hx = states_and_parameters[: len(states)]
        output, final = torch.func.functional_call(ours, given, (input, hx if len(hx) > 1 else hx[0]))
        return output, *(final if isinstance(final, tuple) else (final,))

    leaves = [torch.randn(2, 1, 1, dtype=torch.float64), *states, *(p.detach() for p in ours.parameters())]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@every_layer
def test_compiled_and_mapped(layer, monkeypatch):
    """Catches: a route of torch.compile or torch.func that does not know the cell's states or parameters."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    ours, input = layer(3, 8), torch.randn(4, 2, 3)
    with rnn_gpu.backend(BACKEND):
        expected, final = ours(input)
        right = torch.autograd.grad(expected.square().sum(), list(ours.parameters()))
        output, again = torch.compile(ours, fullgraph=True, backend="aot_eager")(input)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(again, final)
        found = torch.autograd.grad(output.square().sum(), list(ours.parameters()))
        torch.testing.assert_close(found, right)
        weights = {name: weight.detach() for name, weight in ours.named_parameters()}
        loss = lambda weights, row: torch.func.functional_call(ours, weights, (row.unsqueeze(1),))[0].square().sum()
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(weights, input)
        torch.testing.assert_close(tuple(one.sum(0) for one in each.values()), right, rtol=1e-4, atol=1e-5)


@on_torch
@every_layer
def test_as_a_module(layer, tmp_path):
    """Catches: a state dict, a pickle, a copy or a repr that is not a layer's of torch.nn."""
    ours = layer(3, 4, num_layers=2, bidirectional=True, batch_first=True)
    gates = ours.cell.gates
    assert ours.weight_ih_l1_reverse.shape == (gates * 4, 8) and ours.bias_hh_l0.shape == (gates * 4,)
    kinds = {name.rpartition("_l")[0] for name in ours.state_dict()} - {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}
    assert {kind.removesuffix("_l0") for kind in kinds} <= {*ours.cell.parameters} | {""} or kinds == set()
    input = torch.randn(2, 5, 3)
    expected = ours(input)
    for other in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(other) is layer
        torch.testing.assert_close(other(input), expected, rtol=0, atol=0)
    fresh = layer(3, 4, num_layers=2, bidirectional=True, batch_first=True)
    fresh.load_state_dict(ours.state_dict())
    torch.testing.assert_close(fresh(input), expected, rtol=0, atol=0)
    assert repr(ours) == f"{layer.__name__}(3, 4, num_layers=2, batch_first=True, bidirectional=True)"


def halving_step(x, r, carry):
    """A cell without Triton functions, whose class has another name than itself."""
    h = (torch.tanh(x[0] + r[0]) + carry[0]) / 2
    return h, (h,)


Renamed = rnn_gpu.layer(Cell("halving", ("a",), halving_step, carries_h=True))


@on_torch
def test_a_cell_without_triton_functions():
    """Catches: a step alone that is no layer; backend "triton" and `explain` that do not say why; a pickle that fails
    where the class has another name than its cell.
    """
    ours = Renamed(3, 4)
    input = torch.randn(5, 2, 3)
    output, h_n = ours(input)
    assert output.shape == (5, 2, 4) and torch.equal(output[-1], h_n[0])
    torch.testing.assert_close(pickle.loads(pickle.dumps(ours))(input)[0], output)
    assert "halving has no Triton functions" in rnn_gpu.explain(ours, 16)
    assert "PyTorch has no such layer" in rnn_gpu.explain(zoo.MGU(512, 512), 16)
    assert rnn_gpu.replace_rnns(torch.nn.Sequential(ours))[0] is ours
    with pytest.warns(UserWarning, match=r"torch\.nn does not have: 0 \(halving\)"):
        assert rnn_gpu.restore_rnns(torch.nn.Sequential(ours))[0] is ours


@on_torch
@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (dict(name="no name"), ValueError, "name should be a name"),
        (dict(gate_names="ab"), TypeError, "gate_names should be a tuple"),
        (dict(states=("c", "c")), ValueError, "no name twice"),
        (dict(step=None), TypeError, "step should be a function"),
        (dict(apart=3), ValueError, "apart should be a number of gates"),
        (dict(states=("c",), carries_h=True), ValueError, "not both"),
        (dict(forward="a:b"), ValueError, "missing: factors, backward"),
        (dict(forward="a.b"), TypeError, "forward should be a Triton function, or 'module:name', got: 'a.b'"),
        (dict(parameters=("weight_hh",)), ValueError, "names of a layer's other weights, got: 'weight_hh'"),
        (dict(parameters=("p", "bias_ih_2")), ValueError, "names of a layer's other weights, got: 'bias_ih_2'"),
    ],
    ids=str,
)
def test_descriptions_that_are_none(wrong, error, words):
    """Catches: a description of no cell that is found out inside a kernel, or never."""
    with pytest.raises(error, match=words):
        Cell(**(dict(name="a", gate_names=("a", "b"), step=halving_step) | wrong))


@on_torch
def test_a_wrong_step_is_named_when_a_layer_is_made():
    """Catches: errors of PyTorch's deep inside the first call, which say nothing of the step; a step that is called
    before what it uses is there.
    """
    made = lambda step, **description: rnn_gpu.layer(Cell("wrong", ("a",), step, **description))
    for step, description, words in [
        (lambda x, r, carry: x[0] + r[0], {}, r"returns Tensor, expected \(h, carry\)"),
        (lambda x, r, carry: (x[0] + r[0], ()), dict(states=("c",)), "returns 0 values to carry, expected 1"),
        (lambda x, r, carry: (x[0].sum(1), ()), {}, r"h is \[2\] torch.float64, expected the shape and type"),
        (lambda x, r: (x[0], ()), {}, "TypeError: .* takes 2 positional arguments"),
    ]:
        layer = made(step, **description)
        with pytest.raises(ValueError, match=f"step of wrong: {words}"):
            layer(3, 4)
    later = made(lambda x, r, carry: (helper(x[0] + r[0]), ()))
    helper = torch.tanh
    assert later(3, 4)(torch.randn(2, 1, 3))[0].shape == (2, 1, 4)


@on_torch
def test_names_that_are_taken():
    """Catches: a second cell of a name that runs the first one's equations, in a notebook whose line is run again."""
    first = rnn_gpu.layer(Cell("taken", ("a",), lambda x, r, carry: (x[0] + r[0], ())))
    second = rnn_gpu.layer(Cell("taken", ("a",), lambda x, r, carry: (x[0] - r[0], ())))
    assert first.mode != second.mode and CELLS[first.mode] is first.cell and CELLS[second.mode] is second.cell
    ones = lambda layer: layer(torch.ones(2, 1, 1))[0]
    one, two = first(1, 1), second(1, 1)
    two.load_state_dict(one.state_dict())
    assert not torch.equal(ones(one), ones(two))


@on_torch
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN_TANH", "lstm"])
def test_a_cell_called_as_a_built_in_one(name):
    """Catches: a user's equations that become the built-in cell's by their name, or an initialisation of its gates."""
    carries = dict(states=("c",)) if name.lower() == "lstm" else dict(carries_h=True)
    gates = ("i", "f", "g", "o")[: 4 if name.lower() == "lstm" else 3 if name == "GRU" else 1]
    ours = rnn_gpu.layer(Cell(name, gates, lambda x, r, carry: (x[0] + 0 * r[0], carry), **carries))(2, 2)
    input = torch.randn(3, 1, 2)
    expected = (input @ ours.weight_ih_l0.T + ours.bias_ih_l0 + ours.bias_hh_l0)[..., :2]
    torch.testing.assert_close(ours(input)[0], expected)
    assert repr(ours) == f"{name}(2, 2)"
    for initialise in (rnn_gpu.init.unit_forget_bias_, lambda layer: rnn_gpu.init.chrono_(layer, 10)):
        with pytest.raises(TypeError, match="expects an LSTM"):
            initialise(ours)


MODULE = """
import rnn_gpu{imported}
def helper(x):
    return {sign}x
def step(x, r, carry):
    h = helper(x[0] + r[0])
    return h, (h,)
MGU = rnn_gpu.layer(rnn_gpu.Cell("MGU", ("f",), step, carries_h=True))
"""


@on_torch
def test_an_exported_program_finds_its_cell_or_says_so(tmp_path):
    """Catches: a program that takes another cell of the same name in another process, or that does not find its own
    there; an error that does not say what to import.
    """
    here = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(tmp_path)])})
    for name, text in [("mine", dict(imported="", sign="-")), ("other", dict(imported=".zoo", sign="+"))]:
        (tmp_path / f"{name}.py").write_text(MODULE.format(**text))
    save = "import torch, mine; torch.manual_seed(0); layer = mine.MGU(1, 2); x = torch.ones(2, 1, 1); "
    save += "program = torch.export.export(layer.eval(), (x,)); torch.export.save(program, 'cell.pt2'); "
    save += "torch.save(layer(x)[0], 'expected.pt'); print(layer.mode)"
    load = "import torch, rnn_gpu, {}; x = torch.ones(2, 1, 1); program = torch.export.load('cell.pt2').module()\n"
    load += "try: print(torch.equal(program(x)[0], torch.load('expected.pt')))\n"
    load += "except RuntimeError as error: print(error)"
    run = lambda code: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, **here)
    name = run(save).stdout.strip()
    assert run(load.format("mine")).stdout.strip() == "True"
    assert f"no cell {name!r} is known here: import the module that defines it" in run(load.format("other")).stdout


@on_torch
def test_the_fingerprint_is_of_what_is_computed():
    """Catches: a fingerprint that another text of the same step changes, or that a number around it does not."""

    def made(factor, name="made"):
        def step(x, r, carry):
            return factor * (x[0] + r[0]), carry

        return Cell(name, ("a",), step, states=("c",))

    def step(x, r, carry):
        """The same, and a comment."""
        return factor * (x[0] + r[0]), carry  # here

    factor = 2.0
    again = dataclasses.replace(made(2.0), step=step)
    assert made(2.0).fingerprint == made(2.0, "other").fingerprint == again.fingerprint
    assert made(2.0).fingerprint != made(3.0).fingerprint
    assert made(2.0).fingerprint != dataclasses.replace(made(2.0), states=("d",)).fingerprint


@every_layer
def test_gates_far_closed_from_the_first_step(layer, monkeypatch):
    """Catches: 0/0 in a state without history (sLSTM: the input gate's exponential, where nothing else was before), at
    the first step and after a reset; and a wrong gradient there.
    """
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    for dtype, closed in ((torch.float32, -110.0), (torch.float16, -20.0)):
        ours = layer(3, 4).to(dtype)
        with torch.no_grad():
            ours.bias_ih_l0[:4] = closed
        oracle, input = copy.deepcopy(ours).double(), torch.randn(4, 2, 3, dtype=dtype)
        masks = dict(resets=torch.tensor([[False, False], [False, False], [True, False], [False, True]]))
        given = [torch.zeros(1, 2, 4, dtype=dtype) for _ in ("h", *ours.cell.states)]
        expected = outcome(oracle, input.double(), [one.double() for one in given], "torch", **masks)
        peer = outcome(ours, input, given, "torch", **masks)
        actual = outcome(ours, input, given, BACKEND, **masks)
        for name, value in expected.items():
            assert peer[name].isfinite().all(), name
            assert_close_to_oracle(actual[name], value, peer[name], name)


@on_torch
def test_states_of_other_numbers_and_sizes():
    """Catches: states that are too few, too many or of another size, and go through."""
    layer, input, zeros = zoo.SLSTM(3, 4), torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
    with pytest.raises(TypeError, match="must be tuple of Tensors"):
        layer(input, zeros)
    with pytest.raises(TypeError, match="must be tuple of Tensors, not tuple of int"):
        layer(input, (zeros, zeros, zeros, 0))
    for wrong in (0, (zeros,)):
        with pytest.raises(TypeError, match=rf"MGU\(\): argument 'hx' must be Tensor, not {type(wrong).__name__}"):
            zoo.MGU(3, 4)(input, wrong)
    with pytest.raises(RuntimeError, match="SLSTM expects 4 hidden states"):
        layer(input, (zeros, zeros))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[2\] size"):
        layer(input, (zeros, zeros, zeros[:, :1], zeros))
    with pytest.raises(ValueError, match="Expected input to be 2D or 3D"):
        layer(input[0, 0])
    with pytest.raises(ValueError, match="dtype"):
        layer(input.double())


@pytest.mark.parametrize("layer", [zoo.PeepholeLSTM, zoo.SLSTM], ids=lambda layer: layer.__name__)
def test_the_states_of_every_step(layer, monkeypatch):
    """Catches: states that change places with another, with a direction or a step; a gradient that is not theirs."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    ours, count = layer(3, 7, bidirectional=True, return_cells=True), len(layer.cell.states)
    input, lengths, found = torch.randn(4, 3, 3), [4, 0, 2], []
    for backend in ("torch", BACKEND):
        with rnn_gpu.backend(backend), settings.always_exchange():
            output, (_, *states), *cells = ours(input, lengths=lengths)
        assert [tuple(one.shape) for one in cells] == [(4, 3, 14)] * count
        for state, of_steps in zip(states, cells, strict=True):
            assert torch.equal(of_steps[3, 0, :7], state[0, 0]) and torch.equal(of_steps[0, :, 7:], state[1])
            assert not of_steps[2:, 2].any() and torch.equal(of_steps[1, 2, :7], state[0, 2])
        loss = sum((one * torch.linspace(-1, 1, one.numel()).view_as(one)).sum() for one in (output, *cells))
        found.append([output, *cells, *torch.autograd.grad(loss, list(ours.parameters()))])
    torch.testing.assert_close(*found)
    with pytest.raises(ValueError, match="return_cells argument is only supported for LSTM and cells with states"):
        zoo.MGU(3, 4, return_cells=True)


@on_torch
def test_peepholes_are_those_of_onnx():
    """Catches: a peephole at another gate, or that sees another c, than ONNX's LSTM has it."""
    reference = pytest.importorskip("onnx.reference")
    from onnx import TensorProto, helper

    layer = zoo.PeepholeLSTM(3, 4)
    T, B, H, order = 5, 2, 4, (0, 3, 1, 2)  # ONNX has i, o, f, c
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_()

    def reordered(weight):
        return torch.cat([weight.chunk(4)[gate] for gate in order]).detach().numpy()[None]

    biases = np.concatenate([reordered(layer.bias_ih_l0), reordered(layer.bias_hh_l0)], 1)
    peepholes = torch.cat([layer.peephole_i_l0, layer.peephole_o_l0, layer.peephole_f_l0]).detach().numpy()[None]
    input, h, c = torch.randn(T, B, 3), torch.randn(1, B, H), torch.randn(1, B, H)
    given = dict(
        X=input.numpy(), W=reordered(layer.weight_ih_l0), R=reordered(layer.weight_hh_l0), B=biases,
        initial_h=h.numpy(), initial_c=c.numpy(), P=peepholes,
    )  # fmt: skip
    names = ["X", "W", "R", "B", "", "initial_h", "initial_c", "P"]
    node = helper.make_node("LSTM", names, ["Y", "Y_h", "Y_c"], hidden_size=H)
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in given.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("Y", "Y_h", "Y_c")]
    model = helper.make_model(helper.make_graph([node], "peepholes", infos, outputs))
    y, h_n, c_n = reference.ReferenceEvaluator(model).run(None, given)
    output, (ours_h, ours_c) = layer(input, (h, c))
    torch.testing.assert_close(output, torch.from_numpy(y)[:, 0])
    torch.testing.assert_close(ours_h, torch.from_numpy(h_n))
    torch.testing.assert_close(ours_c, torch.from_numpy(c_n))


@on_torch
def test_the_stabiliser_changes_nothing():
    """Catches: an sLSTM that is not the paper's, whose equations without stabiliser are followed here."""
    layer = zoo.SLSTM(3, 4).double()
    input, (h, c, n, _) = torch.randn(6, 2, 3, dtype=torch.float64), states_of(layer, 2)
    output, (h_n, *_) = layer(input, (h, c, n, torch.zeros_like(c)))
    h, c, n = h[0], c[0], n[0]
    for t in range(6):
        sums = input[t] @ layer.weight_ih_l0.T + layer.bias_ih_l0 + h @ layer.weight_hh_l0.T + layer.bias_hh_l0
        i, f, z, o = sums.chunk(4, 1)
        i, f, z, o = i.exp(), f.sigmoid(), z.tanh(), o.sigmoid()
        c, n = f * c + i * z, f * n + i
        h = o * c / n
        assert_same_mathematics(output[t], h, f"step {t}")
    assert_same_mathematics(h_n[0], h)


# ---- check_cell ------------------------------------------------------------------------------------------------------


def found_in(cell: Cell) -> list[str]:
    """The errors of the elements' part of the check."""
    report = cell_check.Report(cell.name)
    cell_check._elementwise(cell, report)
    return report.errors


def planted(layer, **changes) -> Cell:
    return dataclasses.replace(layer.cell, **changes)


@pytest.mark.interpreter_only
@on_the_kernels
def test_planted_mistakes_are_named():
    """Catches: a check that lets a wrong equation through, or names another one."""
    from tests import wrong_cells as wrong

    assert not found_in(zoo.PeepholeLSTM.cell) and not found_in(zoo.SLSTM.cell)
    errors = found_in(planted(zoo.CoupledLSTM, forward=wrong.open_gate))
    assert errors[0].startswith("forward: carry c: error")
    (error,) = found_in(planted(zoo.MGU, backward=wrong.forgets_the_gate))
    assert error.startswith("slot 1 of backward: at gate f, by x and r: error")
    (error,) = found_in(planted(zoo.LightGRU, backward=wrong.keeps_too_much))
    assert error.startswith("backward: gradient of the carry h of before: error")
    errors = found_in(planted(zoo.PeepholeLSTM, backward=wrong.swapped_peepholes))
    assert errors[0].startswith("backward: gradient of the parameter peephole_i: error")
    (error,) = found_in(planted(zoo.MGU, apart=0))
    assert "gate n does more with r than to add it to x" in error
    (error,) = found_in(planted(zoo.SLSTM, quiet=True))
    assert error.startswith("quiet:")
    (error,) = found_in(planted(zoo.SLSTM, saves=zoo.SLSTM.cell.saves - 1))
    assert "another number of values for the backward than `saves` says" in error
    (error,) = found_in(planted(zoo.LightGRU, forward=wrong.no_function))
    assert error.startswith("the Triton functions: NameError")


@on_torch
def test_wrong_steps_are_named():
    """Catches: a step that returns something else, writes in place, or hides a gradient, and passes."""

    def of(step, **description) -> str:
        report = cell_check.Report("wrong")
        cell_check._check_step(Cell("wrong", ("a",), step, **description), report)
        return report.errors[0]

    assert "returns Tensor, expected (h, carry)" in of(lambda x, r, carry: x[0] + r[0])
    assert "returns 0 values to carry, expected 1" in of(lambda x, r, carry: (x[0] + r[0], ()), states=("c",))
    assert "h is [2]" in of(lambda x, r, carry: ((x[0] + r[0]).sum(1), ()))
    assert "its gradient differs" in of(lambda x, r, carry: (x[0] * r[0].detach(), ()))
    assert "TypeError" in of(lambda x, r: (x[0], ()))
    assert "depends on others" in of(lambda x, r, carry: (x[0] + r[0] - x[0].mean(0), ()))
    assert "should be (h,)" in of(lambda x, r, carry: (torch.tanh(x[0] + carry[0]), (carry[0] * 0.5,)), carries_h=True)
    with pytest.raises(rnn_gpu.CellError, match="its gradient differs"):
        rnn_gpu.check_cell(Cell("wrong", ("a",), lambda x, r, carry: (x[0] * r[0].detach(), ())))
    assert str(rnn_gpu.check_cell(Renamed)).endswith("halving is all right")
    for wrong, words in (("lstm", "str"), (rnn_gpu.LSTM, "the class LSTM"), (Renamed(3, 4), "halving")):
        with pytest.raises(TypeError, match=f"check_cell expects a Cell, or the class .*, got: {words} "):
            rnn_gpu.check_cell(wrong)
    with pytest.raises(TypeError, match=r"CellLayer has no cell: rnn_gpu\.layer\(cell\) makes"):
        rnn_gpu.CellLayer(3, 4)


@on_torch
def test_a_cell_of_a_notebook_is_written_down():
    """Catches: a function, an import or a number that the other process does not get."""
    source = cell_check._source(
        dataclasses.replace(zoo.MGU.cell, name="written", forward=None, factors=None, backward=None)
    )
    there: dict = {}
    exec(source, there)
    x = [torch.randn(2, 3) for _ in range(2)]
    expected = zoo.MGU.cell.step(x, x, x)
    torch.testing.assert_close(there["CELL"].step(x, x, x), expected)
    assert there["CELL"].apart == 1 and there["CELL"].name == "written"


@on_torch
def test_help_says_what_the_step_does():
    """Catches: a layer of the zoo whose help has neither what it is nor where it comes from; a partial's own text."""
    for cls in zoo.ZOO:
        first, said, *_ = cls.__doc__.split("\n\n")
        assert first.startswith(f"A layer of the cell {cls.__name__}: gates") and said.startswith("    One step of the")
        assert "Source: " in cls.__doc__ and "input [T, B, I]" in cls.__doc__
    step = functools.partial(lambda scale, x, r, carry: (scale * x[0] + r[0], ()), 2.0)
    assert "partial" not in rnn_gpu.layer(Cell("Partial", ("a",), step)).__doc__


@on_torch
def test_the_file_of_the_command():
    """Catches: a command that does not say what it misses; an import of its file, which would hide the function."""
    command = [sys.executable, "-m", "rnn_gpu.check_cell"]
    done = subprocess.run([*command, "no_such_cell.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "check_cell: error: no such file: no_such_cell.py" in done.stderr
    with pytest.raises(ImportError, match=r"check_cell is a function; .*python -m rnn_gpu.check_cell"):
        importlib.import_module("rnn_gpu.check_cell")
    assert callable(rnn_gpu.check_cell)


@pytest.mark.slow
@on_torch
@pytest.mark.parametrize("name", ["PeepholeLSTM", "SLSTM", "LightGRU"])
def test_the_command(name):
    """Catches: a part of the check that does not run, a plan that spills, an exit status that says otherwise."""
    done = subprocess.run(
        [sys.executable, "-m", "rnn_gpu.check_cell", f"rnn_gpu.zoo:{name}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and f"{name} is all right" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("in the loop") == 6 and done.stdout.count("no spills") == 12
