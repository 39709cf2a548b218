"""The layers as drop-ins for torch.nn on PyTorch's own kernels: constructors, parameters, results, errors, backends,
explain.
"""

import asyncio
import contextlib
import copy
import inspect
import io
import json
import operator
import os
import pickle
import pydoc
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import rnn_gpu
from rnn_gpu import backends, settings
from rnn_gpu.__main__ import main
from rnn_gpu.dtypes import dtype_name, dtype_of
from rnn_gpu.kernels import cudnn, machine
from rnn_gpu.kernels import plan as planning
from rnn_gpu.kernels.devices import DEVICES, TOO_OLD, named
from tests.layers import STATES, draw, outcome, pair, same

NAMES = tuple(STATES)
SHAPES = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bias": False},
    {"num_layers": 2, "batch_first": True, "bidirectional": True, "bias": False},
]


@pytest.mark.parametrize("kwargs", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_equal_to_torch_nn_on_the_cpu(name, kwargs):
    """Catches: any difference, to the bit, from torch.nn where torch.nn's own kernels run; an override that changes
    results.
    """
    ours, _ = pair(name, 5, 7, **kwargs)
    theirs = same(ours, torch.float32)
    input, states = draw(ours, 4, 3)
    for given in (None, states):
        mine, other = (outcome(layer, input, given, "auto") for layer in (ours, theirs))
        assert mine.keys() == other.keys()
        for key, value in other.items():
            assert torch.equal(mine[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_gives_the_same_weights_and_state_dicts_go_both_ways(name):
    """Catches: parameters of another order, name, shape or initialisation, and state dicts that only load one way."""
    kwargs = {"num_layers": 2, "bidirectional": True}
    torch.manual_seed(3)
    ours = getattr(rnn_gpu, name)(4, 6, **kwargs)
    torch.manual_seed(3)
    theirs = getattr(torch.nn, name)(4, 6, **kwargs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    getattr(torch.nn, name)(4, 6, **kwargs).load_state_dict(ours.state_dict())
    getattr(rnn_gpu, name)(4, 6, **kwargs).load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize(
    "name, args, kwargs",
    [
        *[(name, (3, 0), {}) for name in NAMES],
        *[(name, (0, 3), {}) for name in NAMES],
        *[(name, (3, 4, 0), {}) for name in NAMES],
        *[(name, (3.0, 4), {}) for name in NAMES],
        *[(name, (3, 4), {"dropout": 1.5}) for name in NAMES],
        *[(name, (3, 4), {"dropout": True}) for name in NAMES],
        *[(name, (3, 4), {"bias": 1}) for name in NAMES],
        *[(name, (3, 4), {"batch_first": 0}) for name in NAMES],
        *[(name, (3, 4), {"proj_size": size}) for name in ("GRU", "RNN") for size in (2, 0, None)],
        ("LSTM", (3, 4), {"proj_size": 4}),
        ("LSTM", (3, 4), {"proj_size": -1}),
        ("RNN", (3, 4), {"nonlinearity": "sigmoid"}),
        ("RNN", (3, 4, 1, "elu"), {}),
        *[(name, (3, 4), {"no_such_argument": 1}) for name in NAMES],
    ],
)
def test_bad_constructor_arguments_raise_as_in_torch_nn(name, args, kwargs):
    """Catches: another exception type or another text than torch.nn's, or none."""
    with pytest.raises(Exception) as theirs:
        getattr(torch.nn, name)(*args, **kwargs)
    with pytest.raises(type(theirs.value)) as ours:
        getattr(rnn_gpu, name)(*args, **kwargs)
    if not isinstance(theirs.value, TypeError) or "unexpected keyword" not in str(theirs.value):
        assert str(ours.value) == str(theirs.value)


class Held:
    """No tensor, but what PyTorch's functions take for one: it holds a tensor and notes who asked for it."""

    asked: ClassVar[list[str]] = []

    def __init__(self, tensor):
        self.tensor = tensor

    def __getattr__(self, name):
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        cls.asked.append(function.__name__)
        return function(*(one.tensor if isinstance(one, cls) else one for one in args), **(kwargs or {}))


@pytest.mark.parametrize("name", (*NAMES, "LSTMCell", "GRUCell", "RNNCell"))
def test_what_has_a_torch_function_is_served_as_by_torch_nn(name):
    """Catches: input that stands for a tensor refused by its type, though PyTorch's function takes it; and taken where
    PyTorch's function does not do what is asked for.
    """
    torch.manual_seed(0)
    theirs, input = getattr(torch.nn, name)(3, 4), Held(torch.randn(5, 1, 3) if name in NAMES else torch.randn(5, 3))
    ours = getattr(rnn_gpu, name)(3, 4)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for layer in (theirs, ours):
        Held.asked.clear()
        results.append((tree_leaves(layer(input)), [*Held.asked]))
    assert results[0][1] == results[1][1] != []
    assert all(map(torch.equal, results[1][0], results[0][0]))
    if name in NAMES:
        dropping = getattr(rnn_gpu, name)(3, 4, weight_dropout=0.5)
        for layer, kwargs in ((ours, {"lengths": [5]}), (ours, {"resets": torch.ones(5, 1).bool()}), (dropping, {})):
            with pytest.raises(TypeError, match="should be a tensor or a PackedSequence, got: Held"):
                layer(input, **kwargs)
        with rnn_gpu.backend("triton"), pytest.raises(TypeError, match="got: Held"):
            ours(input)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_of_a_call_raise_as_in_torch_nn(name):
    """Catches: errors that name a class of which no user knows."""
    input, errors = torch.randn(2, 1, 3), []
    for cls in (getattr(torch.nn, name), getattr(rnn_gpu, name)):
        for made in (cls, type("Derived", (cls,), {})):
            for args, kwargs in [((), {}), ((input, None, 2), {}), ((input,), {"length": 2})]:
                with pytest.raises(TypeError) as error:
                    made(3, 4)(*args, **kwargs)
                errors.append(str(error.value))
    assert errors[: len(errors) // 2] == errors[len(errors) // 2 :]
    with pytest.raises(TypeError, match=rf"^{name}\.__init__\(\) got an unexpected keyword argument 'length'"):
        made(3, 4, length=2)


def test_rnn_takes_the_nonlinearity_fourth_by_position():
    """Catches: a shifted positional argument, which would read bias as the nonlinearity or the reverse."""
    layer = rnn_gpu.RNN(3, 4, 2, "relu", False)
    assert (layer.nonlinearity, layer.mode, layer.bias, layer.num_layers) == ("relu", "RNN_RELU", False, 2)


def test_dropout_on_one_layer_warns():
    """Catches: the loss of torch.nn's warning."""
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        rnn_gpu.LSTM(3, 4, dropout=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_packed_input_and_projection_go_to_torch(name, monkeypatch):
    """Catches: a packed input or a projection that the wrapper does not hand on untouched on the CPU."""
    kwargs = {"proj_size": 3} if name == "LSTM" else {}
    torch.manual_seed(0)
    ours = getattr(rnn_gpu, name)(5, 7, **kwargs)
    theirs = getattr(torch.nn, name)(5, 7, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 5) for n in (2, 4, 3)], enforce_sorted=False)
    handed, forward = [], type(theirs).forward
    monkeypatch.setattr(type(theirs), "forward", lambda self, *given: handed.append(given) or forward(self, *given))
    mine = ours(packed)
    assert len(handed) == 1 and handed[0][0] is packed
    other = theirs(packed)
    assert torch.equal(mine[0].data, other[0].data)
    for a, b in zip(*(s if isinstance(s, tuple) else (s,) for s in (mine[1], other[1])), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(name):
    """Catches: a layer that cannot be copied, pickled, or used from its copy."""
    layer = getattr(rnn_gpu, name)(3, 4)
    input = torch.randn(2, 1, 3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(input)[0], layer(input)[0])


@pytest.mark.parametrize("name", (*NAMES, "LSTMCell", "GRUCell", "RNNCell", "zoo.MGU", "zoo.PeepholeLSTM"))
def test_whole_layers_are_loaded_as_weights_only(name):
    """Catches: torch.load, as it is called by default, that refuses the library's own classes."""
    layer, file = operator.attrgetter(name)(rnn_gpu)(3, 4), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded) is type(layer)
    torch.testing.assert_close(loaded(torch.ones(2, 3)), layer(torch.ones(2, 3)), rtol=0, atol=0)


def test_arguments_of_forward_are_named_as_in_torch_nn():
    """Catches: calls by keyword, `layer(input=..., hx=...)`, that stop working."""
    assert list(inspect.signature(rnn_gpu.LSTM.forward).parameters) == ["self", "input", "hx", "lengths", "resets"]


def test_backend_context():
    """Catches: a setting that leaks out of its context, also by an exception, or an unknown name taken silently."""
    before = rnn_gpu.current_backend()
    with rnn_gpu.backend("torch"):
        assert rnn_gpu.current_backend() == "torch"
        with pytest.raises(RuntimeError), rnn_gpu.backend("auto"):
            raise RuntimeError
        assert rnn_gpu.current_backend() == "torch"
    assert rnn_gpu.current_backend() == before
    with pytest.raises(ValueError, match="Unknown backend 'cuda'"), rnn_gpu.backend("cuda"):
        pass


SETTINGS = {
    rnn_gpu.backend: ("torch", settings.current_backend),
    rnn_gpu.memory: ("lean", settings.current_memory),
    rnn_gpu.max_programs: (3, lambda: settings._max_programs),
}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.__name__)
def test_settings_are_setters_contexts_and_decorators(setting):
    """Catches: `rnn_gpu.backend("torch")` in a notebook that does nothing, a decorator that holds beyond its function,
    or not in a generator or a coroutine, or while those wait, a context inside torch.compile that breaks the graph.
    """
    value, now = SETTINGS[setting]
    before = now()

    @setting(value)
    def decorated():
        return now()

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x):
        with setting(value):
            return x + (1 if now() == value else 0)

    @setting(value)
    def generator():
        """Three pieces: after a value, after an error, after its end is asked for."""
        seen = [now()]
        try:
            seen.append((yield seen[0]))
            yield now()
        except KeyError:
            yield now()
        finally:
            seen.append(now())
            steps.extend(seen)

    @setting(value)
    async def coroutine():
        seen = now()
        await asyncio.sleep(0)
        return seen, now()

    async def beside():
        return (await asyncio.gather(coroutine(), others()))[0]

    async def others():
        assert now() == before
        await asyncio.sleep(0)
        assert now() == before

    steps, pieces = [], generator()
    assert next(pieces) == value and now() == before
    assert pieces.send(7) == value and now() == before
    assert pieces.throw(KeyError) == value and now() == before
    pieces.close()
    assert steps == [value, 7, value] and now() == before
    assert asyncio.run(beside()) == (value, value) and now() == before
    assert now() == before and decorated() == value and now() == before
    with pytest.raises(RuntimeError, match="cannot decorate classes and asynchronous generators"):
        setting(value)(type)
    assert repr(setting(before)) == f"rnn_gpu.{setting.__name__}({before!r})"  # what a notebook shows of that line
    assert compiled(torch.zeros(1)).item() == 1 and now() == before
    try:
        setting(value)
        assert now() == value
        with setting(before):
            assert now() == before
        assert now() == value
    finally:
        setting(before)
    assert now() == before


def test_wrong_settings_are_refused():
    """Catches: a setting that is cut to an integer, or that says only at the next call what is wrong with it."""
    for wrong, error in ((2.5, TypeError), ("3", TypeError), (0, ValueError), (-1, ValueError)):
        with pytest.raises(error, match="max_programs should be"):
            rnn_gpu.max_programs(wrong)
    with pytest.raises(ValueError, match="Unknown memory setting 'leen'"):
        rnn_gpu.memory("leen")
    assert settings._max_programs is None and settings.current_memory() == "full"


def test_help_of_the_package_names_all_that_is_for_users():
    """Catches: a public name that help(rnn_gpu) does not say the purpose of."""
    assert set(rnn_gpu.__all__) - {"CellError", "GradientFlow", "current_backend", "current_memory"} == set(
        re.findall(r"\w+", " ".join(re.findall(r"^(\w.*?)  ", rnn_gpu.__doc__, re.MULTILINE)))
    )


def test_a_shell_completes_what_is_for_users():
    """Catches: files of the package, or what a public module imports, among the names that `rnn_gpu.<TAB>` offers; one
    that is not there.
    """
    assert dir(rnn_gpu) == sorted([*rnn_gpu.__all__, "__version__"])
    assert dir(rnn_gpu.zoo) == sorted(layer.__name__ for layer in rnn_gpu.zoo.ZOO)
    assert dir(rnn_gpu.init) == ["chrono_", "orthogonal_", "unit_forget_bias_"]
    for module in (rnn_gpu, rnn_gpu.zoo, rnn_gpu.init, machine):
        assert all(hasattr(module, name) for name in dir(module)) and set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("name", NAMES)
def test_help_is_of_the_layer_itself(name):
    """Catches: help(rnn_gpu.LSTM) that hides the arguments, or prints torch.nn's whole text or nn.Module's."""
    layer = getattr(rnn_gpu, name)
    ours, theirs = inspect.signature(layer).parameters, documented_arguments(getattr(torch.nn, name))
    assert list(ours)[: len(theirs)] == theirs and "memory" in ours
    first_screen = pydoc.render_doc(layer, renderer=pydoc.plaintext)[:2600]
    for word in (*theirs[:-2], "lengths", "resets", "memory", "[T, B, I]", "[L*D, B, H]", "tanh", ">>>", "limits.md"):
        assert word in first_screen or word.removesuffix("s") in first_screen, word
    whole = pydoc.render_doc(layer, renderer=pydoc.plaintext)
    assert "Initialize internal Module state" not in whole
    assert getattr(torch.nn, name).__doc__.strip().splitlines()[0] not in whole


def documented_arguments(layer) -> list[str]:
    """The names of the arguments of one of torch.nn's layers, whose constructor shows none."""
    options = ["bias", "batch_first", "dropout", "bidirectional"]
    first = ["input_size", "hidden_size", "num_layers"]
    own = {"LSTM": (options, ["proj_size"]), "GRU": (options, []), "RNN": (["nonlinearity", *options], [])}
    before, after = own[layer.__name__]
    return [*first, *before, *after, "device", "dtype"]


def test_positional_arguments_are_torch_nns():
    """Catches: an argument by position that means another one than in torch.nn."""
    for name, arguments in (
        ("LSTM", (3, 4, 2, False, True, 0.25, True, 2)),
        ("GRU", (3, 4, 2, False, True, 0.25, True)),
        ("RNN", (3, 4, 2, "relu", False, True, 0.25, True)),
    ):
        ours, theirs = (getattr(library, name)(*arguments) for library in (rnn_gpu, torch.nn))
        assert repr(ours) == repr(theirs) and ours.mode == theirs.mode
        more = getattr(rnn_gpu, name)(*arguments, "meta", torch.float64)
        assert more.weight_hh_l0.is_meta and more.weight_hh_l0.dtype == torch.float64


@pytest.mark.compiled  # with TRITON_INTERPRET=1 the kernels take CPU tensors
def test_triton_on_cpu_tensors_raises_and_says_why():
    """Catches: a silent fall-back where the user asked for the kernels."""
    with rnn_gpu.backend("triton"), pytest.raises(RuntimeError, match=r"the input is on cpu.*TRITON_INTERPRET=1"):
        rnn_gpu.LSTM(3, 4)(torch.randn(2, 1, 3))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["h200", "h100", "a100", "rtx3090", "rtx4090", "rtx5090", "b200"])
def test_explain_says_what_and_why(name, device):
    """Catches: an explanation without the plan, the reason or the estimate, or one that fails for a known device."""
    text = rnn_gpu.explain(getattr(rnn_gpu, name)(512, 512, dtype=torch.bfloat16), 16, device)
    for word in ("backend 'auto' takes", "forward:", "backward:", "programs", "estimated", "us a step", "cuDNN"):
        assert word in text


def test_explain_names_the_reason_for_torch():
    """Catches: a fall-back whose reason the user never sees; wrong arguments accepted."""
    assert "float64" in rnn_gpu.explain(rnn_gpu.LSTM(8, 8).double(), 4, "h200")
    with pytest.raises(ValueError, match="CUDA device or a GPU it knows"):
        rnn_gpu.explain(rnn_gpu.LSTM(8, 8), 4, "cpu")
    with pytest.raises(ValueError, match="Unknown device 'gtx 970'"):
        rnn_gpu.explain(rnn_gpu.LSTM(8, 8), 4, "gtx 970")
    for batch_size in (0, -4):
        with pytest.raises(ValueError, match="batch_size should be a positive number"):
            rnn_gpu.explain(rnn_gpu.LSTM(8, 8), batch_size, "h200")
    for batch_size, got in ((16.5, "16.5"), ("16", "'16'"), (None, "None"), (torch.zeros(5, 2, 8), "Tensor")):
        with pytest.raises(TypeError, match=f"batch_size should be an integer, got: {got}$"):
            rnn_gpu.explain(rnn_gpu.LSTM(8, 8), batch_size, "h200")
    with pytest.raises(TypeError, match=r"argument 'dtype' must be torch\.dtype, not int"):
        rnn_gpu.explain(rnn_gpu.LSTM(8, 8), 4, "h200", dtype=16)
    with pytest.raises(ValueError, match="Unknown precision 'tf16'"):
        rnn_gpu.explain(rnn_gpu.LSTM(8, 8), 4, "h200", precision="tf16")
    for unknown in ("tf16", "", "torch", "nn"):
        with pytest.raises(ValueError, match=f"Unknown dtype '{unknown}'. Select a torch.dtype or one of 'float32'"):
            rnn_gpu.explain(rnn_gpu.LSTM(8, 8), 4, "h200", unknown)
    with pytest.raises(ValueError, match="dtype should be a floating point type"):
        rnn_gpu.explain(rnn_gpu.LSTM(8, 8), 4, "h200", "int32")
    for wrong in (dict(training="no"), dict(ragged=1), dict(training=None)):
        with pytest.raises(TypeError, match=r"explain\(\): argument '(training|ragged)' must be bool, not "):
            rnn_gpu.explain(rnn_gpu.LSTM(8, 8), 4, "h200", **wrong)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"accelerator|is not available"):  # no list of names
            rnn_gpu.explain(rnn_gpu.LSTM(8, 8), 4, 3)
    cell = rnn_gpu.LSTMCell(3, 4), "cells run on PyTorch's own kernels"
    for nothing, words in ((torch.nn.Linear(3, 4), "Linear"), (torch.nn.LSTM, "got: type"), (3, "got: int"), cell):
        with pytest.raises(TypeError, match=words):
            rnn_gpu.explain(nothing, 4)


def test_types_have_one_set_of_names():
    """Catches: a name of a type that `explain` or one of the commands takes, and another does not."""
    names = {torch.float32: "float32 fp32 float", torch.float16: "float16 fp16 half", torch.bfloat16: "bfloat16 bf16"}
    for dtype, known in names.items():
        for name in known.split():
            for written in (name, f"torch.{name}", name.upper()):
                assert dtype_of(written) is dtype_of(dtype) is dtype
                assert dtype_name(written) == str(dtype).removeprefix("torch.")
    assert dtype_of("double") is torch.float64 and dtype_name("tf16") == "tf16"
    layer = rnn_gpu.LSTM(8, 8)
    assert rnn_gpu.explain(layer, 4, "h200", "bf16") == rnn_gpu.explain(layer, 4, "h200", torch.bfloat16)
    for path in (Path(rnn_gpu.__file__).parents[1] / "perf").glob("*.py"):
        for options in re.findall(r"""\("-*dtype",.*""", path.read_text("utf-8")):
            assert "type=dtype_name, choices=DTYPES" in options, path


def test_explain_names_the_cells_of_a_model():
    """Catches: a part of a model that is passed over in silence; a line about cells where there are none."""
    cells = {"step": rnn_gpu.GRUCell(3, 4), "more": torch.nn.ModuleList([torch.nn.LSTMCell(3, 4)])}
    layer = {"encoder": rnn_gpu.GRU(3, 64), "own": rnn_gpu.zoo.MGU(3, 64)}
    lines = rnn_gpu.explain(torch.nn.ModuleDict(layer | cells), 4, "h200").splitlines()
    words = "cells, a step a call, on PyTorch's own kernels whatever the backend"
    assert [line for line in lines if "Cell" in line] == [f"step (GRUCell), more.0 (LSTMCell): {words}"]
    assert words not in rnn_gpu.explain(torch.nn.ModuleDict(layer), 4, "h200")
    many = torch.nn.ModuleDict(layer | {f"c{i}": torch.nn.RNNCell(3, 4) for i in range(7)})
    assert f"c3 (RNNCell) and 3 more: {words}" in rnn_gpu.explain(many, 4, "h200")


@pytest.mark.parametrize(
    ("name", "near"),
    {"rtx 4070 tie": "RTX 4070 Ti", "H20O": "H200", "5090ti": "RTX 5090", "V10O": "V100", "X": "H200"}.items(),
)
def test_an_unknown_gpu_is_told_the_nearest(name, near, capsys):
    """Catches: eighty names where four would do; the one that was meant left out; a list that is nowhere."""
    with pytest.raises(ValueError, match=f"Unknown device '{name}'.*'{near}'") as raised:
        rnn_gpu.explain(rnn_gpu.LSTM(8, 8), 4, name)
    assert len(str(raised.value)) < 320
    command = re.search(r"`python -m rnn_gpu ([^`]*)` lists all", str(raised.value)).group(1)
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    listed = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and len(listed) == len(DEVICES) + len(TOO_OLD)
    for line, gpu in zip(listed, (*DEVICES.values(), *TOO_OLD.values()), strict=True):
        assert named(line.partition(" compute")[0]) == gpu and f"{gpu.multiprocessors} multi" in line
        assert ("too old" in line) == (gpu.arch < 80)


def test_the_command_explains_a_layer(capsys):
    """Catches: a command that explains another layer than its arguments say; an error that is no line of help."""
    options = "--layers 2 --bidirectional --batch-size 4 --input-size 8 --dtype bf16 --ragged --inference"
    assert main(["explain", "GRU", "300", "--device", "RTX 3060", *options.split()]) == 0
    gru = rnn_gpu.GRU(8, 300, 2, bidirectional=True, dtype=torch.bfloat16)
    assert capsys.readouterr().out == rnn_gpu.explain(gru, 4, "3060", ragged=True, training=False) + "\n"
    assert main(["explain", "lstm", "24", "--precision", "ieee"]) == 0
    assert capsys.readouterr().out == rnn_gpu.explain(rnn_gpu.LSTM(24, 24), 16, precision="ieee") + "\n"
    for wrong, words in (
        ("lstm 0 --input-size 3", "argument hidden_size: should be a positive number, got: 0"),
        ("lstm 4 --device X", "Unknown device 'X'"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["explain", *wrong.split()])
        assert ended.value.code == 2 and f"error: {words}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("H200", "NVIDIA H200"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA RTX 4090"),
        ("rtx 3090", "NVIDIA RTX 3090"),
        ("5080", "NVIDIA RTX 5080"),
        ("NVIDIA RTX A6000", "NVIDIA RTX A6000"),
        ("A10", "NVIDIA A10"),
        ("NVIDIA L4", "NVIDIA L4"),
        ("l40s", "NVIDIA L40S"),
        ("GB200", "NVIDIA GB200"),
        ("NVIDIA GH200 480GB", "NVIDIA GH200"),
        ("4070 ti", "NVIDIA RTX 4070 Ti"),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", "NVIDIA RTX 5090 Laptop"),
        ("RTX 3080 12 GB", "NVIDIA RTX 3080 12GB"),
        ("NVIDIA RTX 6000 Ada Generation", "NVIDIA RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "NVIDIA RTX PRO 6000 Max-Q"),
    ],
)
def test_explain_knows_gpus_by_the_names_people_write(name, gpu):
    """Catches: a GPU that PyTorch or a vendor writes in another way and that is not known, or taken for another."""
    assert f"on {gpu} (" in rnn_gpu.explain(rnn_gpu.LSTM(8, 8), 4, name)


@pytest.mark.parametrize("name", ["RTX 4090 Max-Q", "RTX 4090 Ti", "A1000", "RTX 6000", "H2", "gtx 970", "sm_89", ""])
def test_explain_does_not_take_one_gpu_for_another(name):
    """Catches: a GPU with other multiprocessors planned for as the one whose name its own begins with; an error that
    leaves a user without a way on.
    """
    with pytest.raises(
        ValueError, match=f"Unknown device {name!r}. Select a torch device or a GPU that is known by name, such as"
    ) as e:
        rnn_gpu.explain(rnn_gpu.LSTM(8, 8), 4, name)
    assert "give a GPU's compute capability and size: 'sm_89, 24 multiprocessors'" in str(e.value)


def test_explain_takes_a_gpu_by_its_sizes():
    """Catches: sizes that are read as others; a GPU of the same sizes that is planned for in another way."""
    layer = rnn_gpu.LSTM(8, 512)
    text = rnn_gpu.explain(layer, 16, "sm_89, 128 multiprocessors")
    assert text.startswith("on a GPU of compute capability 8.9 (128 multiprocessors, 99 KiB of shared memory each)")
    assert text.partition("\n")[2] == rnn_gpu.explain(layer, 16, "RTX 4090").partition("\n")[2]
    for name in ("compute capability 8.9, 128 SMs", "SM_89: 128 multiprocessors"):
        assert rnn_gpu.explain(layer, 16, name) == text
    assert "(7 multiprocessors, 227 KiB" in rnn_gpu.explain(layer, 16, "sm_110, 7 multiprocessors")


@pytest.mark.parametrize("name", ["T4", "Tesla V100-SXM2-16GB", "GTX 1080 Ti", "Quadro RTX 6000", "sm_75, 4 SMs"])
def test_explain_says_that_a_gpu_is_too_old(name):
    """Catches: an unknown name where the answer is known."""
    text = rnn_gpu.explain(rnn_gpu.LSTM(8, 8), 4, name)
    assert (
        "takes torch: the kernels need compute capability 8.0 or later" in text and "would raise a RuntimeError" in text
    )


def test_explain_takes_models_inference_and_precisions():
    """Catches: a layer of a model that is left out, a backward planned for inference, tf32 told for full products."""
    model = torch.nn.ModuleDict({"a": rnn_gpu.LSTM(8, 300), "b": torch.nn.Sequential(torch.nn.GRU(8, 16).half())})
    text = rnn_gpu.explain(model, 4, "h200", training=False)
    assert "a: LSTM of 300" in text and "b.0: GRU of 16" in text and "float16, inference" in text
    assert text.count("  forward:") == 2 and "backward:" not in text
    full, tf32 = (rnn_gpu.explain(model["a"], 4, "h200", precision=p) for p in ("ieee", "tf32"))
    assert "float32 (ieee products), training" in full and "float32 (tf32 products), training" in tf32
    assert full.replace("ieee", "tf32") != tf32
    for options in ({"num_layers": 2, "bidirectional": True}, {"num_layers": 4}):
        assert ", for each layer" in rnn_gpu.explain(rnn_gpu.LSTM(256, 512, **options), 16, "h200")
    zoneout = rnn_gpu.explain(rnn_gpu.LSTM(256, 512, 2, zoneout=0.1), 16, "h200")
    assert "do not know zoneout=0.1" in zoneout and "one another: with zoneout=0.1 each" in zoneout.replace(
        "after ", ""
    )
    assert "us a step; cuDNN" not in zoneout


def test_explain_says_where_the_factors_of_a_projection_would_be_better():
    """Catches: a projected layer explained as a plain one; advice given where the product stays on the chip."""
    small = rnn_gpu.explain(rnn_gpu.LSTM(64, 256, proj_size=64, dtype=torch.bfloat16), 8, "h200")
    large = rnn_gpu.explain(rnn_gpu.LSTM(64, 4096, proj_size=64, dtype=torch.bfloat16), 8, "h200")
    assert "projection:" in small and "no extra exchange" in small
    assert "the factors would be better" in large


def test_works_without_triton():
    """Catches: an import of Triton on the way to `import rnn_gpu`, a layer on ATen, explain, or python -m rnn_gpu."""
    program = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Missing())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
import runpy, torch, rnn_gpu
output, _ = rnn_gpu.LSTM(3, 4)(torch.randn(2, 1, 3))
output.sum().backward()
print(rnn_gpu.explain(rnn_gpu.LSTM(3, 4), 2, "h200"))
rnn_gpu.check()
rnn_gpu.check("cpu")
try:
    rnn_gpu.check("H200")
except RuntimeError as error:
    print(error)
runpy.run_module("rnn_gpu", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Triton is not installed" in done.stdout and "Invalid device string: 'H200'" in done.stdout
    assert "one program holds all hidden units" in done.stdout  # explain plans all the same


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_a_gpu_that_is_not_there():
    """Catches: an AssertionError from the depths of PyTorch; a GPU that is planned for, and that nobody has named."""
    assert "on NVIDIA H200 (132" in (text := rnn_gpu.explain(rnn_gpu.LSTM(3, 4), 2))
    assert "which stands in for a GPU" in text and "stands in" not in rnn_gpu.explain(rnn_gpu.LSTM(3, 4), 2, "h200")
    for call in (rnn_gpu.check, lambda device: rnn_gpu.explain(rnn_gpu.LSTM(3, 4), 2, device)):
        with pytest.raises(RuntimeError, match="'cuda' is not available"):
            call("cuda")
    with pytest.raises(TypeError, match="check expects a device, got: LSTM"):
        rnn_gpu.check(rnn_gpu.LSTM(3, 4))


@pytest.mark.parametrize("device", ["H200", "", "cuda:-1", "cuda:x", -1, True, 1.0, [], "cpu", torch.device("cpu")])
def test_check_takes_what_torch_takes_for_a_device(device):
    """Catches: what is no device taken in silence; another type of error than torch.device's, or other words than its
    own for a string.
    """
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        words = re.escape(str(error)) if isinstance(error, RuntimeError) else "check expects a device, got: "
        with pytest.raises(type(error), match=words):
            rnn_gpu.check(device)
    else:
        assert rnn_gpu.check(device) is None


def test_environment_variables_are_checked_at_import():
    """Catches: a setting of nonsense that is taken for something, or found only when the first kernel runs."""
    wrong = {
        "RNN_GPU_AUTOTUNE": (["on", "2", ""], "should be an integer, at least 0, at most 1"),
        "RNN_GPU_ALONE": (["yes", "2", ""], "should be an integer, at least 0, at most 1"),
        "RNN_GPU_MAX_PROGRAMS": (["0", "2.5"], "should be an integer, at least 1"),
        "RNN_GPU_WAIT_LIMIT": (["1e6", "20,000,000", "-1"], "no comma, point, sign or exponent"),
        "RNN_GPU_BACKEND": (["cuda", ""], "should be one of auto, triton, torch"),
        "RNN_GPU_MEMORY": (["leen"], "should be one of full, lean"),
    }
    program = """
import importlib, json, os, sys
import rnn_gpu.settings, rnn_gpu.measured, rnn_gpu.kernels.spec as spec
for name, (values, words) in json.load(sys.stdin).items():
    for value in values:
        os.environ[name] = value
        try:
            importlib.reload(spec)
            importlib.reload(rnn_gpu.measured)
            importlib.reload(rnn_gpu.settings)
        except ValueError as error:
            assert str(error).startswith(f"the environment variable {name}") and words in str(error), str(error)
            assert repr(value) in str(error), str(error)
        else:
            raise SystemExit(f"{name}={value!r} was taken")
        del os.environ[name]
os.environ |= {"RNN_GPU_BACKEND": "torch", "RNN_GPU_MEMORY": "lean", "RNN_GPU_WAIT_LIMIT": "30000000"}
importlib.reload(spec)
importlib.reload(rnn_gpu.settings)
assert rnn_gpu.settings.current_backend() == "torch" and rnn_gpu.settings.current_memory() == "lean"
assert spec.WAIT_LIMIT == 30_000_000
"""
    environment = {name: value for name, value in os.environ.items() if name not in wrong}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, input=json.dumps(wrong), env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_unknown_environment_variables_are_named():
    """Catches: a misspelt variable that does nothing, in silence; a warning of those of the tests, or without cause."""
    program = "import sys, warnings; warnings.simplefilter('error'); import rnn_gpu"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RNN_GPU_")}
    for name, words in (("RNN_GPU_TEST_SEED", ""), ("RNN_GPU_BACKENDS", "variable RNN_GPU_BACKENDS does nothing")):
        more = {name: "1"}
        done = subprocess.run([sys.executable, "-c", program], env=clean | more, capture_output=True, text=True)
        assert (done.returncode == 0) == (not words) and words in done.stderr, done.stderr
    assert set(settings.VARIABLES) == set(re.findall(r"^    (RNN_GPU_\w+)", settings.__doc__, re.MULTILINE))


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_states_that_are_no_pair(batched, autocast):
    """Catches: an LSTM given another number of states that fails with other words than torch.nn's, or does not fail."""
    rows = (3,) if batched else ()
    state, input = torch.zeros(2, *rows, 4), torch.randn(5, *rows, 3)
    ours, theirs = (module.LSTM(3, 4, num_layers=2) for module in (rnn_gpu, torch.nn))
    lengths = torch.tensor([5, 4, 2] if batched else 5)
    wrong = (), (state,), [state], (state,) * 3, state, state[:1], state[0], torch.stack([state] * 3), 5

    def error(run) -> BaseException | None:
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                run()
        except (RuntimeError, IndexError, TypeError) as error:
            return error
        return None

    if autocast and error(lambda: theirs(input, (state, state))) is not None:
        pytest.skip("PyTorch has no LSTM under autocast on this CPU: oneDNN has none in bfloat16 without AVX-512")
    for given in (*wrong, torch.stack([state, state])):
        expected = error(lambda: theirs(input, given))  # noqa: B023
        assert not batched or expected is not None
        plain = error(lambda: ours(input, given))  # noqa: B023
        masked = error(lambda: ours(input, given, lengths=lengths))  # noqa: B023
        mapped = error(lambda: torch.func.vmap(lambda x: ours(x, given)[0])(input.unsqueeze(0)))  # noqa: B023
        assert type(plain) is type(masked) is type(mapped) is type(expected), given
        assert str(plain) == str(expected)
        if type(expected) is not TypeError:  # those list all signatures of ATen's function
            assert str(masked) == str(mapped) == str(expected)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_refuses_weights_of_two_types(name):
    """Catches: a float64 weight among float32 ones that is cast down under autocast."""
    layer, peer = getattr(rnn_gpu, name)(4, 8), getattr(torch.nn, name)(4, 8)
    for module in (layer, peer):
        module.weight_hh_l0 = torch.nn.Parameter(module.weight_hh_l0.double())
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
            module(torch.randn(3, 2, 4))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("input", [None, [1.0], "text"], ids=str)
def test_input_that_is_no_tensor(name, input):
    """Catches: another error than torch.nn's; the masks that torch.nn does not know do not change it."""
    with pytest.raises(AttributeError) as expected:
        getattr(torch.nn, name)(3, 4)(input)
    for masks in ({}, {"lengths": torch.tensor([1])}):
        with pytest.raises(AttributeError) as found:
            getattr(rnn_gpu, name)(3, 4)(input, **masks)
        assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
def test_masks_where_there_are_shapes_alone(name, fake):
    """Catches: shape inference that looks at the values of a mask."""
    mode = FakeTensorMode() if fake else contextlib.nullcontext()
    with mode, torch.device("cpu" if fake else "meta"):
        layer = getattr(rnn_gpu, name)(3, 4, bidirectional=True)
        input, lengths, resets = torch.randn(5, 2, 3), torch.tensor([5, 3]), torch.zeros(5, 2, dtype=torch.bool)
        for masks in (dict(lengths=lengths), dict(resets=resets), dict(lengths=lengths, resets=resets)):
            output, _ = layer(input, **masks)
            assert output.shape == (5, 2, 8)
            output.sum().backward()
            assert all(p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_gives_results_in_its_dtype(name, dtype):
    """Catches: results or states in another type than autocast's, as torch.nn gives, or none where ATen refuses
    float16.
    """
    layer = getattr(rnn_gpu, name)(4, 8, num_layers=2, bidirectional=True)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    for input in (torch.randn(3, 2, 4), packed):
        with torch.autocast("cpu", dtype):
            output, states = layer(input)
        output = output.data if input is packed else output
        assert {t.dtype for t in (output, *(states if isinstance(states, tuple) else (states,)))} == {dtype}
        layer.zero_grad()
        output.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
        with torch.no_grad():
            exact, _ = layer(input)
        torch.testing.assert_close(output.float(), exact.data if input is packed else exact, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_leaves_float64_alone(name):
    """Catches: a float64 layer that loses half its digits under autocast, or takes what torch.nn refuses there."""
    layer, peer = getattr(rnn_gpu, name)(4, 8).double(), getattr(torch.nn, name)(4, 8).double()
    peer.load_state_dict(layer.state_dict())
    input = torch.randn(3, 2, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        for masks in ({}, {"lengths": torch.tensor([3, 3])}):
            torch.testing.assert_close(layer(input, **masks), peer(input))
            with pytest.raises(RuntimeError):
                layer(input.float(), **masks)
            with pytest.raises(RuntimeError):
                layer.float()(input, **masks)
            with pytest.raises(RuntimeError):
                layer.float()(input.long(), **masks)
            layer.double()


def test_auto_plans_for_rows_that_end_early(monkeypatch):
    """Catches: "auto" that takes the kernels for ragged rows because dense ones would fit, and then fails."""
    dense = backends.kernels_for(rnn_gpu.LSTM(8, 8), 4, torch.float32, backends.device_of("h200"), True)
    refuse = lambda *problem, **precision: "no room for masks" if problem[-1] else dense.plans[0]
    monkeypatch.setattr(backends, "plan_for", refuse)
    assert rnn_gpu.explain(rnn_gpu.LSTM(8, 8), 4, "h200").count("no room") == 0
    assert "'auto' takes torch: no room for masks" in rnn_gpu.explain(rnn_gpu.LSTM(8, 8), 4, "h200", ragged=True)


def test_auto_leaves_calls_of_few_steps_to_pytorch(monkeypatch):
    """Catches: one step of a stream that takes the host several times as long as torch.nn's would; "triton", masks and
    options, which ask for the kernels, heeded only for long sequences.
    """
    monkeypatch.setattr(cudnn, "CALL_MORE", {"float32": (100.0, 400.0)})
    monkeypatch.setattr(backends, "device_of", lambda _: planning.DEVICES["h200"])
    monkeypatch.setattr(backends, "triton_missing", lambda: None)
    monkeypatch.setattr(backends, "triton_untested", lambda: None)
    monkeypatch.setattr(backends, "_chosen", {})
    layer, on_gpu = rnn_gpu.LSTM(64, 64), types.SimpleNamespace(device=torch.device("cuda:0"), is_cuda=True)
    routes = lambda layer, **how: [
        backends.route(layer, on_gpu, time, 16, torch.float32, False, **{"masked": False} | how)
        for time in (1, least - 1, least)
    ]
    for training in (False, True):
        choice = backends.kernels_for(layer, 16, torch.float32, planning.DEVICES["h200"], training)
        saved = sum(cudnn.cudnn_microseconds(p, planning.DEVICES["h200"]) - p.microseconds for p in choice.plans)
        least = choice.least_time
        assert (least - 1) * saved < cudnn.CALL_MORE["float32"][training] <= least * saved and least > 2
        with torch.set_grad_enabled(training):
            assert routes(layer) == ["torch.nn", "torch.nn", "kernels"]
            assert routes(layer, masked=True) == ["kernels"] * 3
            with rnn_gpu.backend("triton"):
                assert routes(layer) == ["kernels"] * 3
    assert f"for T below {least} it takes torch" in rnn_gpu.explain(layer, 16, "h200")
    together, alone = (
        backends.kernels_for(rnn_gpu.LSTM(256, 256, layers), 16, torch.float32, planning.DEVICES["h200"], True)
        for layers in (4, 1)
    )
    assert len(together.groups) == 1 and together.least_time < alone.least_time  # one launch saves the steps of four
    with_option = rnn_gpu.LSTM(64, 64, zoneout=0.1)
    assert backends.kernels_for(with_option, 16, torch.float32, planning.DEVICES["h200"], True).least_time == 1


@pytest.mark.parametrize("missing", ["", "clock_rate", "shared_memory_per_block_optin"])
@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "a new one"])
def test_a_gpu_is_planned_for_by_what_it_says_of_itself(name, missing, monkeypatch):
    """Catches: the sizes of the GPU that bears the name, or of none, in place of its own; no plan where it, or this
    PyTorch, does not say everything.
    """
    told = dict(name=name, major=9, minor=0, multi_processor_count=60, L2_cache_size=20 << 20, clock_rate=1_700_000)
    told |= dict(shared_memory_per_block_optin=200_000)
    if missing == "clock_rate":
        told["clock_rate"] = 0
    else:
        told.pop(missing, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(**told))
    backends._properties.cache_clear()
    try:
        found = backends.device_of("cuda:0")
    finally:
        backends._properties.cache_clear()
    assert (found.name, found.arch, found.multiprocessors, found.l2_bytes) == (name, 90, 60, 20 << 20)
    assert found.shared_memory == (planning.DEVICES["h100"].shared_memory if "shared" in missing else 200_000)
    assert found.gigahertz == 1.7 if missing != "clock_rate" else 1 < found.gigahertz < 3
    assert isinstance(planning.plan("lstm", 256, 16, 1, "bfloat16", found), planning.Plan)


def test_on_gpus_of_amd_pytorch_serves_the_layers(monkeypatch):
    """Catches: kernels of NVIDIA's instructions for a GPU that PyTorch calls "cuda", of compute capability 9.0, and
    that knows none of them.
    """
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(backends, "device_of", lambda _: planning.DEVICES["h200"])
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    monkeypatch.setattr(backends, "_chosen", {})
    layer, on_gpu = rnn_gpu.LSTM(8, 512), types.SimpleNamespace(device=torch.device("cuda:0"), is_cuda=True)
    route = lambda: backends.route(layer, on_gpu, 1000, 16, torch.float32, False, masked=False)
    backends.triton_missing.cache_clear()
    try:
        assert route() == "torch.nn"
        assert "AMD" in rnn_gpu.explain(layer, 4, "h200")
        with rnn_gpu.backend("triton"), pytest.raises(RuntimeError, match="the kernels are for NVIDIA GPUs"):
            route()
    finally:
        backends.triton_missing.cache_clear()


@pytest.mark.parametrize("serves, level", [(True, "INFO"), (False, "WARNING")])
def test_auto_says_once_that_it_falls_back(serves, level, monkeypatch, caplog):
    """Catches: a message for every call, or none; a choice of speed told as loudly as a failure."""
    monkeypatch.setattr(backends, "_logged", set())
    choice = backends.kernels_for(rnn_gpu.LSTM(8, 8), 4, torch.float32, backends.device_of("h200"), True)
    choice = choice._replace(name="torch", plans=choice.plans if serves else ())
    with caplog.at_level("INFO", logger="rnn_gpu"):
        for _ in range(3):
            backends._log_once(rnn_gpu.LSTM(8, 8), choice)
    assert [record.levelname for record in caplog.records] == [level]


def test_a_triton_that_nobody_has_tried_is_left_alone_and_named_once(monkeypatch, caplog):
    """Catches: kernels compiled by an unknown Triton unasked, in silence, or with a warning at every call."""
    module = pytest.importorskip("rnn_gpu.kernels.machine_code")
    backends.triton_untested.cache_clear()
    monkeypatch.setattr(module.triton, "__version__", "3.11.2")
    try:
        with caplog.at_level("INFO", logger="rnn_gpu"):
            for _ in range(2):
                assert "not with 3.11.2" in backends._why_not_compiled(
                    ("lstm", 256, 1, 1, "float32"), "cpu", -1, False, "auto"
                )
        assert backends._why_not_compiled(("lstm", 256, 1, 1, "float32"), "cpu", -1, False, "triton") == ""
        assert "asked for: its kernels" in str(rnn_gpu.explain(rnn_gpu.LSTM(8, 256), batch_size=4, device="h200"))
    finally:
        backends.triton_untested.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "3.6 to 3.8" in caplog.text and "3.11.2" in caplog.text


def test_the_choice_under_compile_compares_for_one_row(monkeypatch):
    """Catches: "auto" under torch.compile that never asks which backend is faster; "triton" that does."""
    problem = ("lstm", 256, 1, 1, "float32"), "cpu", -1, False
    monkeypatch.setattr(backends, "triton_missing", lambda: None)
    assert backends._why_not_compiled(*problem, "auto") == ""
    monkeypatch.setattr(cudnn, "cudnn_microseconds", lambda *_: 0.0)
    assert "cuDNN 0.0" in backends._why_not_compiled(*problem, "auto")
    assert backends._why_not_compiled(*problem, "triton") == ""
