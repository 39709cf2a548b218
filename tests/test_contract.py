"""The contract of torch.nn's recurrent layers on PyTorch's own kernels: machinery, errors, cells, and the way to
rnn_gpu and back.
"""

import collections
import copy
import dataclasses
import doctest
import gc
import inspect
import pickle
import re
import types
import warnings
import weakref
from unittest import mock

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize

import rnn_gpu
import rnn_gpu.cells
import rnn_gpu.convert
from rnn_gpu import hidden
from tests import contract
from tests.contract import (
    CELLS,
    NAMES,
    Half,
    assert_error_sample,
    assert_sample,
    error_samples,
    samples,
)

every_layer = pytest.mark.parametrize("name", NAMES)
every_cell = pytest.mark.parametrize("name", CELLS)
every_class = pytest.mark.parametrize("name", [*NAMES, *CELLS])


class TestMachinery(contract.Machinery):
    backend = "auto"


class TestErrors(contract.Errors):
    backend = "auto"


# ---- PyTorch's own samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_class
def test_samples_of_pytorch(name, dtype, training):
    """Catches: a difference from torch.nn, to the bit, or from PyTorch's reference, on PyTorch's own samples."""
    found = samples(name, dtype, training, packed=True)
    assert len(found) >= 2
    for sample in found:
        assert_sample(name, sample, dtype, training, "auto")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_class
def test_error_samples_of_pytorch(name, dtype, training):
    """Catches: another exception than PyTorch's own samples ask for."""
    found = error_samples(name, dtype, training)
    assert len(found) >= 4
    for error in found:
        assert_error_sample(name, error, dtype, training, "auto")


# ---- Constructors and packed input -----------------------------------------------------------------------------------

# Arguments that torch.nn refuses, for a layer and for a cell; those of other classes stand in test_layers.py.
BAD_LAYERS = [
    ((3, -1), {}),
    ((-1, 3), {}),
    ((3, 4, -1), {}),
    ((3, "4"), {}),
    ((3, None), {}),
    ((3, 4), {"dropout": -0.1}),
    ((3, 4), {"dropout": False}),
    ((3, 4), {"dropout": "half"}),
    ((3, 4), {"bias": 0}),
    ((3, 4), {"bias": None}),
    ((3, 4), {"batch_first": "yes"}),
    ((3, 4), {"device": "no such device"}),
    ((3, 4), {"dtype": torch.int64}),
    ((3,), {}),
    ((), {}),
]
BAD_CELLS = [((3,), {}), ((3, -1), {}), ((3.0, 4), {}), ((3, 4), {"dtype": torch.int64}), ((3, 4), {"num_layers": 2})]


def error_of(call, *args, **kwargs) -> Exception:
    """The exception that a call raises."""
    with pytest.raises(Exception) as raised:
        call(*args, **kwargs)
    return raised.value


@pytest.mark.parametrize(
    "name, args, kwargs",
    [
        *[(name, *bad) for name in NAMES for bad in BAD_LAYERS],
        *[(name, *bad) for name in CELLS for bad in BAD_CELLS],
    ],
)
def test_bad_constructor_arguments_raise_as_in_torch_nn(name, args, kwargs):
    """Catches: another exception type or text than torch.nn's, or none."""
    theirs, ours = error_of(getattr(torch.nn, name), *args, **kwargs), error_of(getattr(rnn_gpu, name), *args, **kwargs)
    assert type(ours) is type(theirs)
    # an argument that is missing is missed by the layer itself, and not by its base
    assert str(ours).replace(f"{name}.__init__", "RNNBase.__init__") == str(theirs).replace(
        f"{name}.__init__", "RNNBase.__init__"
    )


@every_layer
def test_warnings_of_the_constructor(name):
    """Catches: the loss of the warning about dropout on one layer, another text, or another warning."""
    texts = []
    for library in (torch.nn, rnn_gpu):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            getattr(library, name)(3, 4, dropout=0.5)
            getattr(library, name)(3, 4, num_layers=2, dropout=0.5)
        assert [w.category for w in seen] == [UserWarning]
        texts.append(str(seen[0].message))
    assert texts[0] == texts[1]


@every_class
def test_signatures_and_repr(name):
    """Catches: an argument of forward with another name, and a repr that says other things."""
    ours, theirs = getattr(rnn_gpu, name), getattr(torch.nn, name)
    assert list(inspect.signature(ours.forward).parameters)[:3] == ["self", "input", "hx"]
    for kwargs in ({}, {"bias": False}, *([{"nonlinearity": "relu"}] if name.startswith("RNN") else [])):
        assert repr(ours(3, 4, **kwargs)) == repr(theirs(3, 4, **kwargs))
        assert list(ours(3, 4, **kwargs).state_dict()) == list(theirs(3, 4, **kwargs).state_dict())


def packed_sequence(features: int, dtype=torch.float32):
    """Sequences of lengths 2, 4 and 3, unsorted."""
    sequences = [torch.ones(n, features, dtype=dtype) for n in (2, 4, 3)]
    return torch.nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)


@every_layer
@pytest.mark.parametrize("what", ["feature size", "type", "state of another batch", "state of another rank", "rank"])
def test_bad_packed_calls_raise_as_in_torch_nn(name, what):
    """Catches: another exception type or text than torch.nn's for packed input."""
    state = lambda *shape: (torch.zeros(*shape), torch.zeros(*shape)) if name == "LSTM" else torch.zeros(*shape)
    input, hx = {
        "feature size": (packed_sequence(7), None),
        "type": (packed_sequence(3, torch.float64), None),
        "state of another batch": (packed_sequence(3), state(1, 2, 6)),
        "state of another rank": (packed_sequence(3), state(1, 6)),
        "rank": (torch.nn.utils.rnn.pack_sequence([torch.zeros(2, 3, 3)]), None),
    }[what]
    theirs = error_of(getattr(torch.nn, name)(3, 6), input, hx)
    ours = error_of(getattr(rnn_gpu, name)(3, 6), input, hx)
    assert type(ours) is type(theirs)
    assert str(ours) == str(theirs)


# ---- Cells -----------------------------------------------------------------------------------------------------------


@every_cell
def test_cells_are_those_of_torch_nn(name):
    """Catches: a cell that isinstance checks, optimizers of types or torch.jit do not take for torch.nn's, or that
    computes otherwise.
    """
    torch.manual_seed(0)
    ours = getattr(rnn_gpu, name)(3, 5)
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(3, 5)
    assert isinstance(ours, getattr(torch.nn, name)) and ours.__doc__ != theirs.__doc__
    input = torch.randn(2, 3)
    hx = torch.randn(2, 2, 5).unbind() if name == "LSTMCell" else torch.randn(2, 5)
    for args in ((input,), (input, hx), (input[0],)):
        a, b = (contract.tensors(cell(*args)) for cell in (ours, theirs))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.jit.script(ours)):
        assert torch.equal(contract.tensors(other(input))[0], contract.tensors(ours(input))[0])


BAD_CELL_CALLS = {
    "input 0-D": ((), (2, 5)),
    "input 3-D": ((1, 2, 3), (2, 5)),
    "hidden 0-D": ((2, 3), ()),
    "hidden 3-D": ((2, 3), (1, 2, 5)),
    "input size": ((2, 7), (2, 5)),
    "input size, unbatched": ((7,), (5,)),
    "hidden size": ((2, 3), (2, 6)),
    "batch": ((2, 3), (4, 5)),
    "hidden 1-D": ((2, 3), (5,)),
    "no hidden, input size": ((2, 7), None),
}


@pytest.mark.parametrize("what", BAD_CELL_CALLS)
@every_cell
def test_bad_calls_of_cells_raise_as_in_torch_nn(name, what):
    """Catches: another exception type or text than torch.nn's, or none."""
    input, hidden = BAD_CELL_CALLS[what]
    hx = None if hidden is None else torch.zeros(hidden)
    hx = (hx, hx) if name == "LSTMCell" and hx is not None else hx
    theirs = error_of(getattr(torch.nn, name)(3, 5), torch.zeros(input), hx)
    ours = error_of(getattr(rnn_gpu, name)(3, 5), torch.zeros(input), hx)
    assert type(ours) is type(theirs)
    assert str(ours) == str(theirs)


def test_unknown_nonlinearity_of_a_cell_raises_when_called():
    """Catches: torch.nn's late error moved or lost."""
    theirs, ours = (error_of(m.RNNCell(3, 5, nonlinearity="elu"), torch.zeros(2, 3)) for m in (torch.nn, rnn_gpu))
    assert (type(ours), str(ours)) == (type(theirs), str(theirs))


DOCUMENTED = (
    rnn_gpu, rnn_gpu.cells, rnn_gpu.convert, rnn_gpu.explanation, rnn_gpu.flow, rnn_gpu.init,
    rnn_gpu.modules, rnn_gpu.settings,
)  # fmt: skip


@pytest.mark.parametrize("module", DOCUMENTED, ids=lambda module: module.__name__)
def test_examples_in_docstrings(module):
    """Catches: an example that does not run as it stands."""
    failed, attempted = doctest.testmod(module, extraglobs={"torch": torch})
    assert not failed and attempted


# ---- replace_rnns and restore_rnns -----------------------------------------------------------------------------------


class Custom(torch.nn.LSTM):
    """A user's sub-class of torch.nn's LSTM."""


class CustomOurs(rnn_gpu.GRU):
    """A user's sub-class of our GRU."""


def model_of_everything() -> torch.nn.Module:
    """Every layer and cell of torch.nn, one of them twice, with buffers, hooks and plain modules around."""
    shared = torch.nn.GRU(3, 3, dropout=0.0)
    return torch.nn.ModuleDict(
        {
            "lstm": torch.nn.LSTM(3, 5, num_layers=2, dropout=0.25, bidirectional=True, proj_size=2),
            "stack": torch.nn.Sequential(torch.nn.Linear(3, 3), shared),
            "again": shared,
            "rnn": torch.nn.RNN(3, 4, nonlinearity="relu", bias=False, batch_first=True),
            "cells": torch.nn.ModuleList(getattr(torch.nn, name)(3, 4) for name in CELLS),
        }
    )


def test_replace_and_restore_everything():
    """Catches: a layer, a cell or a shared layer that is missed, a module that becomes another object, and any
    attribute, parameter, buffer, hook or name that changes, on the way there or back.
    """
    model = model_of_everything()
    model["lstm"].eval()
    model["rnn"].register_buffer("steps", torch.tensor(3))
    model["rnn"].note = "kept"
    model["lstm"].register_forward_hook(print)
    model["lstm"].register_state_dict_pre_hook(lambda *args: None)
    modules, text, attributes = dict(model.named_modules()), repr(model), {}
    for name, module in modules.items():
        attributes[name] = dict(vars(module))
    kinds = {name: type(module) for name, module in modules.items()}

    def unchanged():
        assert repr(model) == text
        for name, module in model.named_modules():
            assert module is modules[name]
            assert vars(module).keys() == attributes[name].keys()
            assert all(value is attributes[name][key] for key, value in vars(module).items())

    for _ in range(2):  # the second time nothing is left to do
        assert rnn_gpu.replace_rnns(model) is model
        unchanged()
        for name, module in model.named_modules():
            expected = getattr(rnn_gpu, kinds[name].__name__, kinds[name])
            assert type(module) is expected
    assert model["again"] is model["stack"][1]
    for _ in range(2):
        assert rnn_gpu.restore_rnns(model) is model
        unchanged()
        assert {name: type(module) for name, module in model.named_modules()} == kinds


@every_class
def test_replace_the_model_itself(name):
    """Catches: a model that is a layer and stays as it was, and results that change, to the bit."""
    layer, input = getattr(torch.nn, name)(3, 5), torch.randn(4, 3)
    expected = contract.tensors(layer(input))
    replaced = rnn_gpu.replace_rnns(layer)
    assert type(replaced) is getattr(rnn_gpu, name)
    assert all(torch.equal(a, b) for a, b in zip(contract.tensors(replaced(input)), expected, strict=True))
    restored = rnn_gpu.restore_rnns(replaced)
    assert type(restored) is getattr(torch.nn, name)
    assert all(torch.equal(a, b) for a, b in zip(contract.tensors(restored(input)), expected, strict=True))


def test_layers_built_with_rnn_gpu_become_those_of_torch_nn():
    """Catches: a way back only for layers that came from torch.nn."""
    for name in NAMES:
        layer, input = getattr(rnn_gpu, name)(3, 5, num_layers=2), torch.randn(4, 2, 3)
        expected, _ = layer(input)
        assert torch.equal(rnn_gpu.restore_rnns(layer)(input)[0], expected) and type(layer) is getattr(torch.nn, name)


def test_sub_classes_are_left_alone_and_named():
    """Catches: a sub-class whose own forward is replaced, one left alone silently, or a warning for other modules."""
    model = torch.nn.ModuleDict({"own": Custom(3, 4), "rest": torch.nn.ModuleList([torch.nn.GRU(3, 4)])})
    with pytest.warns(UserWarning, match=r"replace_rnns left sub-classes alone.*: own \(.*Custom\)$") as seen:
        rnn_gpu.replace_rnns(model)
    assert len(seen) == 1 and seen[0].filename == __file__
    assert type(model["own"]) is Custom and type(model["rest"][0]) is rnn_gpu.GRU
    with pytest.warns(UserWarning, match=r"the model itself \(.*Custom\)"):
        rnn_gpu.replace_rnns(Custom(3, 4))
    model = torch.nn.Sequential(CustomOurs(3, 4), rnn_gpu.LSTM(3, 4), Custom(3, 4))
    with pytest.warns(UserWarning, match=r"restore_rnns left sub-classes alone.*: 0 \(.*CustomOurs\)$"):
        rnn_gpu.restore_rnns(model)
    assert [type(m) for m in model] == [CustomOurs, torch.nn.LSTM, Custom]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rnn_gpu.replace_rnns(torch.nn.Sequential(CustomOurs(3, 4), rnn_gpu.LSTM(3, 4), torch.nn.Linear(3, 4)))


class ByHand(torch.nn.Module):
    """What bears the name of a layer, and is none."""


class MyLSTM(ByHand):
    pass


@pytest.mark.parametrize("swap", [rnn_gpu.replace_rnns, rnn_gpu.restore_rnns], ids=lambda swap: swap.__name__)
def test_a_model_with_nothing_to_change_is_told(swap):
    """Catches: a user who has asked for other layers and got none, in silence; a warning for a model that is done."""
    nothing = f"{swap.__name__} changed nothing: there is no LSTM, GRU, RNN or cell in "
    attention = torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.Sequential(torch.nn.Linear(4, 4)))
    scripted = torch.jit.script(torch.nn.Sequential(torch.nn.GRU(3, 4)))
    for model, rest in (
        (attention, "Sequential, which holds Embedding, Linear"),
        (torch.nn.Linear(3, 4), "Linear"),
        (torch.nn.Sequential(MyLSTM()), "Sequential; scripted, quantized or written in another way: 0 (MyLSTM)"),
        (scripted, "RecursiveScriptModule; scripted, quantized or written in another way: 0 (GRU)"),
    ):
        with pytest.warns(UserWarning) as seen:
            assert swap(model) is model
        assert [str(one.message) for one in seen] == [nothing + rest] and seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for done in (torch.nn.LSTM(3, 4), rnn_gpu.LSTM(3, 4), torch.nn.GRUCell(3, 4), rnn_gpu.GRUCell(3, 4)):
            swap(swap(done))


def test_layers_in_plain_lists_are_named():
    """Catches: a layer that no module knows, left behind in silence; a list of layers that the model has as well."""
    model = torch.nn.Sequential(ByHand(), torch.nn.LSTM(3, 4))
    model[0].layers, model.by_name, model[0].known = [torch.nn.LSTM(3, 4)], {"a": torch.nn.GRU(3, 4)}, (model[1],)
    with pytest.warns(
        UserWarning, match=r"no part of the model, .*: by_name\['a'\], 0\.layers\[0\]\. A torch.nn.ModuleList"
    ) as seen:
        rnn_gpu.replace_rnns(model)
    assert len(seen) == 1 and type(model[1]) is rnn_gpu.LSTM and type(model[0].layers[0]) is torch.nn.LSTM


@dataclasses.dataclass
class Parts:
    """Layers in a place that PyTorch does not look into."""

    reader: torch.nn.Module
    others: dict


def with_attribute(value, module=None) -> torch.nn.Module:
    """A module that holds something in a plain attribute."""
    module = ByHand() if module is None else module
    module.kept = value
    return module


NESTED = {  # what holds a layer, and the way to it
    "[0]": lambda one: [one, one],
    "['a'][1]": lambda one: {"a": [0, one]},
    "[0][0][3]['b']": lambda one: [({3: {"b": one}},)],
    "[...]": lambda one: {torch.zeros(2): one},
    "[1][...]": lambda one: collections.deque([None, {one}]),
    ".reader": lambda one: Parts(one, {}),
    "[0].others['x']": lambda one: [Parts(ByHand(), {"x": one})],
    ".cell": lambda one: types.SimpleNamespace(cell=one),
    "[0].1": lambda one: [torch.nn.Sequential(ByHand(), one)],
    "[0].kept['a']": lambda one: [with_attribute({"a": one})],
    "[1] and 2 more": lambda one: [[one, copy.deepcopy(one)], copy.deepcopy(one)],
}


@pytest.mark.parametrize("way", NESTED)
@pytest.mark.parametrize("swap", [rnn_gpu.replace_rnns, rnn_gpu.restore_rnns], ids=lambda swap: swap.__name__)
def test_layers_nested_in_plain_containers_are_named(way, swap):
    """Catches: a layer in a container that is not looked into; a name under which nobody finds it; one named twice; a
    layer that is as it should be and named all the same.
    """
    before, after = (torch.nn, rnn_gpu) if swap is rnn_gpu.replace_rnns else (rnn_gpu, torch.nn)
    model = torch.nn.Sequential(before.LSTM(3, 4))
    with pytest.warns(UserWarning, match=f"no part of the model, .*: {re.escape(f'0.kept{way}')}. A torch") as seen:
        model[0].kept = NESTED[way](before.GRUCell(3, 4))
        swap(model)
    assert len(seen) == 1 and type(model[0]) is after.LSTM
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model[0].kept = NESTED[way](after.GRUCell(3, 4))
        swap(model)


def test_looking_for_hidden_layers_ends():
    """Catches: endless recursion where containers or modules hold themselves; a walk through all of a data set; a model
    around the one that is replaced, named as if it were inside.
    """
    model = torch.nn.Sequential(torch.nn.LSTM(3, 4))
    around = torch.nn.Sequential(model, torch.nn.GRU(3, 4))
    loop = [1]
    loop += [loop, {"again": loop}, ByHand()]
    loop[-1].kept = loop
    model.loop, model.parent, model[0].back = loop, [around], {"model": model}
    counted = Counted(range(10**6))
    model.numbers, model.rows = counted, [Counted([0, 1.5] * 500) for _ in range(10**4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rnn_gpu.replace_rnns(model)
    assert counted.looks <= hidden.MOST_LOOKS and sum(one.looks for one in model.rows) <= hidden.MOST_LOOKS
    loop[2]["deep"] = torch.nn.GRU(3, 4)
    with pytest.warns(UserWarning, match=r"model, .*: loop\[2\]\['deep'\]\."):
        rnn_gpu.replace_rnns(model)


class Lazy:
    """A field of a dataclass that is not there yet."""

    def __get__(self, one, owner):
        if one is None:
            raise AttributeError
        raise ValueError("not loaded")

    def __set__(self, one, value):
        pass


@dataclasses.dataclass
class Late:
    """With such a field."""

    field: int = Lazy()


@pytest.mark.parametrize(
    "raises",
    [
        lambda: Late(1),
        lambda: mock.Mock(spec=torch.nn.Module),
        lambda: torch.nn.Module.__new__(torch.nn.Linear),
        lambda: mock.Mock(__class__=mock.PropertyMock(side_effect=RuntimeError)),
    ],
    ids=["a field", "a mock", "a module without its parts", "a class"],
)
def test_what_raises_when_it_is_looked_at_hides_nothing(raises):
    """Catches: an error of what hangs on a model, after its layers have been exchanged; layers behind it, not named."""
    model = torch.nn.Sequential(torch.nn.LSTM(3, 4))
    model.kept = [raises(), raises(), [torch.nn.GRU(3, 4)]]
    with pytest.warns(UserWarning, match=r"model, .*: kept\[2\]\[0\]\."):
        rnn_gpu.replace_rnns(model)
    assert type(model[0]) is rnn_gpu.LSTM


def test_a_long_way_is_cut():
    """Catches: a warning of pages."""
    kept = torch.nn.GRU(3, 4)
    for _ in range(2000):
        kept = [kept]
    with pytest.warns(UserWarning, match=r": kept\[0\].*\.\.\..*\[0\]\. A torch") as seen:
        rnn_gpu.replace_rnns(with_attribute(kept))
    assert len(str(seen[0].message)) < 400


class Counted(list):
    """A list that counts how many of its items were taken."""

    looks = 0

    def __iter__(self):
        for one in super().__iter__():
            self.looks += 1
            yield one


def test_a_parametrized_sub_class_is_left_alone():
    """Catches: a user's sub-class that becomes a plain layer because parametrize gave it a class of its own."""
    layer = parametrizations.weight_norm(Custom(3, 4), "weight_hh_l0")
    with pytest.warns(UserWarning, match="ParametrizedCustom"):
        rnn_gpu.replace_rnns(layer)
    assert isinstance(layer, Custom)


@every_class
def test_parametrized_there_and_back(name):
    """Catches: a parametrization that does not survive the way there or back, or is evaluated by the wrong class."""
    layer, input = getattr(torch.nn, name)(3, 5), torch.randn(4, 3)
    weight = "weight_hh" if name in CELLS else "weight_hh_l0"
    parametrize.register_parametrization(layer, weight, Half())
    expected, kind = contract.tensors(layer(input)), type(layer).__name__
    for convert, library in ((rnn_gpu.replace_rnns, rnn_gpu), (rnn_gpu.restore_rnns, torch.nn)):
        assert convert(convert(layer)) is layer
        assert type(layer).__name__ == kind and type(layer).__bases__ == (getattr(library, name),)
        assert parametrize.type_before_parametrizations(layer) is getattr(library, name)
        assert all(torch.equal(a, b) for a, b in zip(contract.tensors(layer(input)), expected, strict=True))
        with pytest.raises(RuntimeError, match="only supported through state_dict"):
            pickle.dumps(layer)
    parametrize.remove_parametrizations(layer, weight)
    assert type(layer) is getattr(torch.nn, name)


def test_references_and_memory():
    """Catches: a weak reference to a layer, or a plain list that holds it, that is left with the old one, and a model
    that the conversion keeps alive.
    """
    model = torch.nn.Sequential(torch.nn.LSTM(3, 4))
    by_weakref, in_a_list = weakref.ref(model[0]), [model[0]]
    rnn_gpu.replace_rnns(model)
    assert by_weakref() is model[0] is in_a_list[0] and type(in_a_list[0]) is rnn_gpu.LSTM
    del model, in_a_list
    gc.collect()
    assert by_weakref() is None


# ---- docs/limits.md says so ------------------------------------------------------------------------------------------


def test_limit_isinstance():
    """Catches: a change of what docs/limits.md says about isinstance checks, or of the reason it gives: PyTorch's
    compiler refuses whatever is an instance of torch.nn.LSTM. (Where that has gone, let it be one.)
    """

    class Both(rnn_gpu.LSTM, torch.nn.LSTM):
        pass

    assert not isinstance(rnn_gpu.LSTM(3, 4), torch.nn.LSTM)
    assert isinstance(rnn_gpu.LSTM(3, 4), torch.nn.RNNBase)
    input = torch.randn(2, 1, 3)
    torch.compile(torch.nn.Sequential(rnn_gpu.LSTM(3, 4)), fullgraph=True, backend="eager")(input)
    both = rnn_gpu.LSTM(3, 4)
    both.__class__ = Both
    assert isinstance(both, torch.nn.LSTM)
    with pytest.raises(Exception, match="Attempted to wrap RNN, GRU, or LSTM"):
        torch.compile(torch.nn.Sequential(both), fullgraph=True, backend="eager")(input)


def test_limit_script_and_what_to_do_instead():
    """Catches: a change of what docs/limits.md says about torch.jit.script, or advice that does not work."""
    model = torch.nn.Sequential(rnn_gpu.LSTM(3, 4))
    with pytest.raises(RuntimeError, match=r"cannot compile rnn_gpu.LSTM: call rnn_gpu.restore_rnns\(model\) before"):
        torch.jit.script(model)
    input = torch.randn(2, 1, 3)
    expected, _ = model(input)
    assert torch.equal(torch.jit.script(rnn_gpu.restore_rnns(model))(input)[0], expected)


def test_limit_fx_and_what_to_do_instead():
    """Catches: a change of what docs/limits.md says about torch.fx, or advice that does not work."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), rnn_gpu.LSTM(3, 4))
    with pytest.raises(torch.fx.proxy.TraceError, match=r"rnn_gpu.LSTM: call rnn_gpu.restore_rnns\(model\) before"):
        torch.fx.symbolic_trace(model)
    input = torch.randn(2, 1, 3)
    expected, _ = model(input)
    traced = torch.fx.symbolic_trace(rnn_gpu.restore_rnns(model))
    assert torch.equal(rnn_gpu.replace_rnns(traced)(input)[0], expected)
    assert type(traced.get_submodule("1")) is rnn_gpu.LSTM


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_limit_quantize_dynamic_and_what_to_do_instead():
    """Catches: a layer that is passed by in silence, a change of what docs/limits.md says about quantize_dynamic, or
    advice that does not work.
    """
    quantize = torch.ao.quantization.quantize_dynamic
    for name, kinds in (("LSTM", {torch.nn.LSTM}), ("LSTMCell", {torch.nn.LSTMCell})):
        model = torch.nn.Sequential(getattr(rnn_gpu, name)(3, 4))
        with pytest.warns(UserWarning, match=rf"leaves rnn_gpu.{name} as it is: to quantize it, call rnn_gpu.restore"):
            passed_by = quantize(model, kinds)
        assert type(passed_by[0]) is getattr(rnn_gpu, name) and not hasattr(passed_by[0], "qconfig")
        quantized = quantize(rnn_gpu.restore_rnns(model), kinds)
        assert "quantized" in type(quantized[0]).__module__


@every_class
def test_meta_device(name):
    """Catches: shapes that cannot be computed without data, as tools that count operations or memory do."""
    input = torch.randn(2, 3, device="meta")
    found = [contract.tensors(getattr(m, name)(3, 4, device="meta")(input)) for m in (rnn_gpu, torch.nn)]
    assert all(a.shape == b.shape and a.is_meta for a, b in zip(*found, strict=True))
