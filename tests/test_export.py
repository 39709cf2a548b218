"""torch.export and ONNX: programs that run without this library's Python, for any number of steps and rows."""

import io
import logging
import re
import warnings

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import rnn_gpu
from rnn_gpu import aten

STACK = {"bidirectional": True, "num_layers": 2}
LAYERS = [("LSTM", STACK), ("LSTM", {"proj_size": 2, "batch_first": True}), ("GRU", {"bias": False}), ("RNN", STACK)]
LAYERS += [("GRU", {"num_layers": 2})]
TIME, BATCH = torch.export.Dim("T", min=1), torch.export.Dim("B", min=1)


def sample(layer, time, batch):
    """Random input, and how many steps and rows of it may change."""
    shape, dims = ((batch, time), {0: BATCH, 1: TIME}) if layer.batch_first else ((time, batch), {0: TIME, 1: BATCH})
    return torch.randn(*shape, layer.input_size), dims


def flat(results):
    output, states = results
    return [output, *(states if isinstance(states, tuple) else (states,))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("name, kwargs", LAYERS)
def test_exported_programs_run_at_other_sizes_and_after_loading(name, kwargs, strict, tmp_path):
    """Catches: a loop over time unrolled for one T, as torch.nn's layers export, or a program that cannot be saved."""
    layer = getattr(rnn_gpu, name)(3, 5, **kwargs)
    input, dims = sample(layer, 5, 2)
    program = torch.export.export(layer, (input,), dynamic_shapes={"input": dims}, strict=strict)
    torch.export.save(program, tmp_path / "layer.pt2")
    for loaded in (program, torch.export.load(tmp_path / "layer.pt2")):
        input, _ = sample(layer, 9, 4)
        for actual, expected in zip(flat(loaded.module()(input)), flat(layer(input)), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("library", [torch.nn, rnn_gpu])
def test_the_warning_of_an_export_is_pytorchs_and_harmless(library):
    """Catches: another warning than docs/compiling.md names, or one that torch.nn's layers no longer have; weights that
    the program has twice, or that the layer has lost.
    """
    layer, input = library.LSTM(3, 5).eval(), torch.randn(4, 2, 3)
    before, weights = layer(input)[0], [id(weight) for weight in layer._flat_weights]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", UserWarning)
        program = torch.export.export(layer, (input,))
    seen = [str(one.message) for one in seen if one.category is UserWarning]
    assert len(seen) == 1 and re.match(r"The tensor attributes .*_flat_weights.* were assigned during export", seen[0])
    assert set(program.state_dict) == set(layer.state_dict()) and not program.constants
    assert [id(weight) for weight in layer._flat_weights] == weights and torch.equal(layer(input)[0], before)


def test_lengths_and_resets_are_exported():
    """Catches: a mask that becomes a constant of the program."""
    layer = rnn_gpu.GRU(3, 5, bidirectional=True)

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, input, lengths, resets):
            return self.layer(input, lengths=lengths, resets=resets)

    dims = {0: TIME, 1: BATCH}
    given = lambda time, batch: (torch.randn(time, batch, 3), torch.arange(batch), torch.rand(time, batch) < 0.3)
    program = torch.export.export(Masked(), given(5, 2), dynamic_shapes=(dims, {0: BATCH}, dims))
    arguments = given(7, 4)
    for actual, expected in zip(program.module()(*arguments), Masked()(*arguments), strict=True):
        torch.testing.assert_close(actual, expected)


class Model(torch.nn.Module):
    """A layer inside a model, with lengths if there are any."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.head = torch.nn.Linear((layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1), 2)

    def forward(self, input, lengths=None, hx=None):
        """-> [..., 2] and the final states."""
        output, states = self.layer(input, hx, lengths=lengths)
        return self.head(output), states


def onnx_program(model, *arguments, dynamic_shapes=None):
    """The ONNX program of a model, made as a user makes it."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    return torch.onnx.export(model, arguments, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, kwargs, masked",
    [(*layer, False) for layer in LAYERS]
    + [("LSTM", STACK, True), ("GRU", {}, True), ("RNN", {"nonlinearity": "relu"}, True)],
)
def test_onnx_holds_its_own_operators_which_onnxruntime_runs(name, kwargs, masked, tmp_path):
    """Catches: gates in the wrong order, a reset on the wrong side of the product, sizes fixed by the export."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Model(getattr(rnn_gpu, name)(3, 5, **kwargs)).eval()
    input, dims = sample(model.layer, 5, 2)
    arguments, shapes = ((input, torch.tensor([3, 5])), (dims, {0: BATCH})) if masked else ((input,), (dims,))
    program = onnx_program(model, *arguments, dynamic_shapes=shapes)
    nodes = [node.op_type for node in program.model.graph]
    assert nodes.count(name) == model.layer.num_layers and not any(node.domain for node in program.model.graph)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    arguments = (sample(model.layer, 9, 4)[0], *([torch.tensor([9, 0, 4, 1])] if masked else []))
    feeds = {i.name: value.numpy() for i, value in zip(session.get_inputs(), arguments, strict=True)}
    for actual, expected in zip(session.run(None, feeds), flat(model(*arguments)), strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), expected.detach())


def test_onnx_says_what_it_cannot_hold():
    """Catches: an ONNX program that leaves out resets, or the initial state of a projected layer."""

    class Resets(Model):
        def forward(self, input):
            return self.layer(input, resets=torch.ones(input.shape[:2], dtype=torch.bool))

    projected = Model(rnn_gpu.LSTM(3, 5, proj_size=2))
    states = torch.zeros(1, 2, 2), torch.zeros(1, 2, 5)
    for model, arguments, said in (
        (Resets(rnn_gpu.GRU(3, 5)), (), "no resets"),
        (projected, (None, states), "no projection"),
    ):
        with pytest.warns(UserWarning, match=said), pytest.raises(torch.onnx.OnnxExporterError) as raised:
            onnx_program(model, torch.randn(5, 2, 3), *arguments)
        assert said in str(raised.value)
    program = torch.export.export(Model(rnn_gpu.GRU(3, 5)).eval(), (torch.randn(5, 2, 3),))
    said = "from a model, not from a program"
    with pytest.warns(UserWarning, match=said), pytest.raises(torch.onnx.OnnxExporterError, match=said):
        torch.onnx.export(program, dynamo=True, verbose=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_refuses_options_that_change_the_forward_alone(dynamo, tmp_path):
    """Catches: a layer refused for a limit of its gradients; one exported as if it were torch.nn's, which it is not."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, input = Model(rnn_gpu.GRU(3, 5, clip=1.0, recurrent_dropout=0.5)).eval(), torch.randn(5, 2, 3)
    torch.onnx.export(model, (input,), file := tmp_path / "model.onnx", dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(file)
    (name,) = (one.name for one in session.get_inputs())
    found = session.run(None, {name: input.numpy()})
    torch.testing.assert_close(torch.from_numpy(found[0]), model(input)[0].detach(), rtol=1e-5, atol=1e-5)
    model.layer.zoneout = 0.1
    with pytest.raises(RuntimeError, match=r"zoneout=0\.1, clip=1\.0.*set the others to their defaults"):
        torch.onnx.export(model, (input,), io.BytesIO(), dynamo=dynamo, verbose=False)


@pytest.mark.filterwarnings("ignore")
def test_the_old_onnx_exporter():
    """Catches: a program that is wrong for another T and B than it was made with, or lengths that end in words which
    do not say what to do.
    """
    onnxruntime = pytest.importorskip("onnxruntime")
    model, file = Model(rnn_gpu.LSTM(3, 5, bidirectional=True)).eval(), io.BytesIO()
    names = {"input_names": ["x"], "dynamic_axes": {"x": {0: "time", 1: "batch"}}, "dynamo": False}
    torch.onnx.export(model, (torch.randn(5, 2, 3),), file, **names)
    other = torch.randn(7, 3, 3)
    found = onnxruntime.InferenceSession(file.getvalue()).run(None, {"x": other.numpy()})
    torch.testing.assert_close(torch.from_numpy(found[0]), model(other)[0], rtol=1e-5, atol=1e-5)
    torch.onnx.export(model.layer, (torch.randn(5, 2, 3),), io.BytesIO(), dynamo=False)  # which fills in defaults

    class Lengths(Model):
        def forward(self, input):
            return self.layer(input, lengths=[5, 2])

    with pytest.raises(RuntimeError, match=r"cannot export lengths and resets: use dynamo=True \(docs/limits.md\)"):
        torch.onnx.export(Lengths(rnn_gpu.GRU(3, 5)), (torch.randn(5, 2, 3),), io.BytesIO(), dynamo=False)


def test_packed_input_needs_no_export():
    """Catches: a layer that after an export takes another way than before."""
    layer = rnn_gpu.GRU(3, 5)
    packed = pack_padded_sequence(torch.randn(4, 2, 3), torch.tensor([4, 2]))
    before = layer(packed)[1]
    torch.export.export(layer, (torch.randn(4, 2, 3),))
    assert torch.equal(layer(packed)[1], before)


def test_an_exported_program_in_inference_mode():
    """Catches: a program that keeps something for a backward it does not have, which inference mode refuses."""
    layer, input = rnn_gpu.GRU(4, 6), torch.randn(5, 3, 4)
    program = torch.export.export(layer, (input,)).module()
    with torch.inference_mode():
        torch.testing.assert_close(program(input)[0], layer(input)[0])
    assert not aten._kept
