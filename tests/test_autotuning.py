"""`rnn_gpu.autotune` with a clock of our own: what is chosen, kept, found again and refused. No GPU, and nothing is
timed: a timer of the tests says what each plan takes.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import rnn_gpu
from perf import benchmark, tune
from rnn_gpu import autotuning, backends, measured, operators, settings, wavefront
from rnn_gpu.kernels import plan as planning
from rnn_gpu.kernels.plan import DEVICES, Plan, cut
from rnn_gpu.rows import Rows

pytest.importorskip("triton")

DEVICE = DEVICES["h200"]  # what plans are made for where the input is on the CPU


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of the test's own, and a process that knows nothing yet."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def forget():
        measured.forget()
        autotuning._seen.clear()
        backends.choose_anew()
        operators.plan_anew()

    forget()
    yield tmp_path / "rnn_gpu"
    forget()


@pytest.fixture
def clock(monkeypatch):
    """What stands in for a GPU: plans take what `Clock.takes` says, PyTorch's own kernels `theirs`."""
    fake = Clock()
    monkeypatch.setattr(autotuning._Trial, "run", lambda trial, route: fake.run(trial, route))
    return fake


class Clock:
    """A timer, and calls that only note which plans they would run."""

    def __init__(self):
        self.theirs, self.favourites, self.timed, self.broken, self.last = 1e-3, {}, 0, set(), 0.0
        self.side_by_side = 1.0  # what layers in one launch take, times as long as one

    def run(self, trial, route):
        self.last = self.theirs
        if route == "kernels":
            self.last = sum(self.takes(p) for plans in self.groups(trial) for p in plans)

    def groups(self, trial):
        layer, saving = trial.layer, "full" if trial.wanted else "nothing"
        problem = backends._problem(layer, trial.batch, trial.dtype)
        how = bool(trial.wanted), trial.ragged, backends.together_of(layer, bool(trial.wanted))
        return backends.groups_for(problem, DEVICE, *how, saving=saving)

    def takes(self, p: Plan) -> float:
        if cut(p) in self.broken:
            raise RuntimeError("out of resources")
        took = 1e-4 if self.favourites.get(p.backward) == cut(p) else 2e-4
        return took * self.side_by_side if p.layered else took

    def __call__(self, call) -> float:
        call()
        self.timed += 1
        return self.last


def candidates(backward: bool, hidden_size=512, batch=16) -> list[Plan]:
    """Plans of the layer of these tests, the model's own choice first."""
    problem = "lstm", hidden_size, batch, 1, "float32", DEVICE, backward
    own = planning.plan(*problem, backends.precision_of("float32"))
    every = planning.every_plan(*problem, backends.precision_of("float32"))
    return sorted(every, key=lambda p: (cut(p) != cut(own), p.microseconds))


def tuned(clock, layer=None, batch=16, again=False, **masks):
    layer = layer or rnn_gpu.LSTM(8, 512)
    masks = {"lengths": None, "resets": None} | masks
    return autotuning.tune(layer, torch.randn(3, batch, 8), masks["lengths"], masks["resets"], clock, again)


# ---- What is chosen --------------------------------------------------------------------------------------------------


def test_plans_of_a_cell_of_ones_own(clock):
    """Catches: a cell that is compared with a layer that PyTorch does not have, or whose plans nobody takes."""
    layer = rnn_gpu.zoo.PeepholeLSTM(8, 512, heads=2)
    problem = layer.mode, 256, 16, 2, "float32", DEVICE, True
    every = planning.every_plan(*problem, backends.precision_of("float32"))
    assert not isinstance(every, str)
    clock.theirs, clock.favourites = 0.0, {}
    choice = tuned(clock, layer)
    assert choice.name == "triton" and "PyTorch has no such layer" in choice.reason
    assert all(p.measured and p.hidden_size == 256 for p in choice.plans)
    timed = clock.timed
    assert timed > 0 and tuned(clock, layer) == choice and clock.timed == timed


def test_the_fastest_plans_and_the_faster_backend_are_taken_and_say_so(clock):
    """Catches: times that nobody obeys; a choice that does not say that it was measured, and when."""
    clock.favourites = {backward: cut(candidates(backward)[1]) for backward in (False, True)}
    choice = tuned(clock)
    assert choice.name == "triton" and choice.measured
    for p in choice.plans:
        assert cut(p) == clock.favourites[p.backward] and p.measured == choice.measured
        assert f"measured {p.measured}" in str(p)
    assert re.search(r"measured 20\d\d-\d\d-\d\d \d\d:\d\d UTC: 66\.67 us a step forward and backward", choice.reason)
    assert "333.33" in choice.reason and choice.reason in repr(choice)
    text = rnn_gpu.explain(rnn_gpu.LSTM(8, 512), 16, "h200")
    assert choice.reason in text and text.count("fastest when it was measured") == 2
    assert "estimates of a model but where they are said to be measured" in text
    call = rnn_gpu.call.Call("lstm", 1, 0, saving="full", limits=settings.limits())
    for backward in (False, True):  # what a launch asks
        assert cut(operators.plan_of(call, 512, torch.zeros(1), 16, backward, False)) == clock.favourites[backward]


def test_cudnn_is_taken_where_it_is_faster(clock, monkeypatch):
    """Catches `auto` that goes on with its estimate, and "triton" that no longer means the kernels."""
    clock.theirs = 1e-5
    layer = rnn_gpu.LSTM(8, 512)
    assert tuned(clock, layer).name == "torch"
    data = torch.zeros(3, 16, 8)
    for wanted, name in (("auto", "torch"), ("triton", "triton")):
        assert backends._choose(wanted, layer, data, 16, torch.float32, True, False).name == name
    assert backends._choose("auto", layer, data, 17, torch.float32, True, False).measured == ""


def test_plans_that_fail_are_passed_over(clock):
    """Catches: one plan that does not compile ends the measurement; control: where none runs, that is an error."""
    clock.broken = {cut(candidates(False)[0])}
    clock.favourites = {False: cut(candidates(False)[1])}
    assert cut(tuned(clock).plans[0]) == clock.favourites[False]
    measured.forget()
    clock.broken = {cut(p) for p in candidates(False)}
    with pytest.raises(RuntimeError, match="out of resources"):
        tuned(clock, again=True)


def test_what_the_kernels_cannot_serve_is_not_timed(clock):
    """Catches: plans for float64."""
    choice = autotuning.tune(rnn_gpu.LSTM(8, 512).double(), torch.randn(3, 2, 8).double(), None, None, clock)
    assert choice.name == "torch" and "float64" in choice.reason and not clock.timed


def test_few_plans_are_timed_and_the_models_own_is_one(clock):
    """Catches a measurement that takes minutes, and one that leaves out what it replaces."""
    tuned(clock)
    found = [json.loads(path.read_text())["found"] for path in files()]
    timed = [one["timed"] for one in found if "timed" in one]
    assert len(timed) == 2 and all(1 <= len(one) <= autotuning.FEW for one in timed)
    for backward in (False, True):
        assert any(str(candidates(backward)[0]) in [row["plan"] for row in one] for one in timed)


def test_inference_and_training_are_measured_apart(clock):
    """Catches the times of a backward in an inference, and the contrary."""
    with torch.no_grad():
        choice = tuned(clock)
        assert [p.backward for p in choice.plans] == [False] and "backward" not in choice.reason
    seen = clock.timed
    assert len(tuned(clock).plans) == 2 and clock.timed > seen


@pytest.mark.parametrize("kind", ["time first", "batch first", "unbatched"])
def test_masks_are_cut_with_the_steps(kind, monkeypatch):
    """Catches: a long call that cannot be timed, since its lengths or resets are those of all steps, or cut by rows."""
    monkeypatch.setattr(autotuning, "STEPS", 4)
    shape, steps = {"time first": (6, 2), "batch first": (2, 6), "unbatched": (6,)}[kind], slice(4)
    layer, input = rnn_gpu.GRU(3, 5, batch_first=kind == "batch first"), torch.randn(*shape, 3)
    lengths, resets = [6, 3][: len(shape)], torch.rand(shape) > 0.5
    where = (slice(None), steps) if kind == "batch first" else (steps,)
    for given in (lengths, torch.tensor(lengths)):
        trial = autotuning._like(layer, input, given, resets)
        assert list(trial.lengths) == [4, *lengths[1:]] and torch.equal(trial.resets, resets[where])
        trial.layer.load_state_dict(layer.state_dict())
        found, _ = trial.layer(trial.input, lengths=trial.lengths, resets=trial.resets)
        expected, _ = layer(input[where], lengths=[4, *lengths[1:]], resets=resets[where])
        assert torch.equal(found, expected)


def test_a_frozen_layer_is_measured_in_inference(clock):
    """Catches a backward of what nothing is differentiated by, and times of a forward kept as those of a training."""
    choice = tuned(clock, rnn_gpu.LSTM(8, 512).requires_grad_(False))
    assert choice.measured and [p.backward for p in choice.plans] == [False]
    asked = rnn_gpu.LSTM(8, 512), 16, torch.float32, DEVICE
    assert backends.kernels_for(*asked, False) == choice and not backends.kernels_for(*asked, True).measured
    with torch.no_grad():
        seen = clock.timed
        assert tuned(clock) == choice and clock.timed == seen


def test_dropout_of_weights_is_timed_on_the_route_that_it_takes(clock, monkeypatch):
    """Catches: PyTorch's side timed without the masks, which its fused kernels never draw."""
    routes, run = [], clock.run
    monkeypatch.setattr(clock, "run", lambda trial, route: (routes.append((route, trial.layer)), run(trial, route)))
    layer = rnn_gpu.LSTM(8, 512, weight_dropout=0.5)
    for training, theirs in ((True, "aten"), (False, "torch.nn")):
        tuned(clock, layer.train(training))
        route, trial = routes[-1]
        assert route == theirs and trial.weight_dropout == 0.5 and trial.training == training
        assert backends.kernels_for(layer, 16, torch.float32, DEVICE, True).measured


def test_the_fastest_way_of_a_stack_is_taken(clock):
    """Catches: layers side by side where one after another was faster, and the contrary; a launch that asks for another
    way, or a plan of its own; training and inference in two ways, which would round in two ways.
    """
    layer, input = rnn_gpu.LSTM(8, 256, 4).bfloat16(), torch.randn(3, 16, 8).bfloat16()
    call = rnn_gpu.call.Call("lstm", 1, 0, route="direct", saving="full", limits=settings.limits())
    for took, sizes in ((10.0, (1, 1, 1, 1)), (0.1, (4,))):
        clock.side_by_side = took
        choice = autotuning.tune(layer, input, None, None, clock, again=True)
        assert choice.measured and tuple(plans[0].layers for plans in choice.groups) == sizes
        assert all(p.measured for plans in choice.groups for p in plans)
        assert wavefront.groups(call, 256, input, Rows(3, 16), 4, 0.0) == sizes
        clock.side_by_side = 1 / took
        with torch.no_grad():
            inference = autotuning.tune(layer, input, None, None, clock, again=False)
        assert tuple(plans[0].layers for plans in inference.groups) == sizes
        for backward in (False, True):
            p = operators.plan_of(call, 256, input, 16, backward, False, sizes[0])
            assert p.measured and p in choice.plans


def test_packed_input_is_not_cut(clock):
    """Catches packed input that is cut, or taken for a dense one."""
    packed = pack_sequence([torch.randn(n, 8) for n in (5, 3)])
    choice = autotuning.tune(rnn_gpu.LSTM(8, 512), packed, None, None, clock)
    assert choice.measured and choice != tuned(clock, batch=2)


# ---- Where it holds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        "batch", "hidden size", "cell", "layers", "directions", "type", "memory", "lengths", "programs", "exchange",
        "precision", "projection", "inference", "dropout",
    ],
)  # fmt: skip
def test_another_shape_or_setting_is_another_measurement(other, clock, tf32):
    """Catches a choice that is taken for what it was not measured for."""
    tuned(clock)
    seen, more, layer, batch, context = clock.timed, {}, rnn_gpu.LSTM(8, 512), 16, None
    if other == "batch":
        batch = 15
    elif other == "lengths":
        more["lengths"] = [3] * 16
    elif other == "programs":
        context = rnn_gpu.max_programs(100)
    elif other == "exchange":
        context = settings.always_exchange()
    elif other == "inference":
        context = torch.no_grad()
    elif other == "precision":
        tf32("ieee")
    else:
        layer = {
            "hidden size": lambda: rnn_gpu.LSTM(8, 256),
            "cell": lambda: rnn_gpu.GRU(8, 512),
            "layers": lambda: rnn_gpu.LSTM(8, 512, 2),
            "directions": lambda: rnn_gpu.LSTM(8, 512, bidirectional=True),
            "type": lambda: rnn_gpu.LSTM(8, 512).bfloat16(),
            "memory": lambda: rnn_gpu.LSTM(8, 512, memory="lean"),
            "projection": lambda: rnn_gpu.LSTM(8, 512, proj_size=100),
            "dropout": lambda: rnn_gpu.LSTM(8, 512, weight_dropout=0.5),
        }[other]()
    if context is not None:
        with context:
            tuned(clock, layer, batch, **more)
    elif other == "type":
        autotuning.tune(layer, torch.randn(3, 16, 8).bfloat16(), None, None, clock)
    else:
        tuned(clock, layer, batch, **more)
    assert clock.timed > seen


@pytest.mark.parametrize("what", ["torch", "triton", "rnn_gpu", "kernels", "cuda", "cudnn", "driver"])
def test_another_version_is_another_measurement(what, clock, monkeypatch):
    """Catches what was measured of other kernels, or by another compiler."""
    tuned(clock)
    others = measured.versions() | {what: "another"}
    monkeypatch.setattr(measured, "versions", lambda: others)
    seen = clock.timed
    tuned(clock)
    assert clock.timed > seen


def test_the_same_is_not_measured_twice_unless_asked_for(clock):
    """Catches a choice that changes from call to call, whatever T, and one that can never be changed."""
    first = tuned(clock)
    clock.theirs = 1e-6
    seen = clock.timed
    assert tuned(clock) == first and clock.timed == seen
    assert autotuning.tune(rnn_gpu.LSTM(5, 512), torch.randn(9, 16, 5), None, None, clock) == first
    assert tuned(clock, again=True).name == "torch" and clock.timed > seen


# ---- Files -----------------------------------------------------------------------------------------------------------


def files():
    return sorted(pathlib.Path(measured.folder()).glob("*.json"))


def test_another_process_finds_what_was_measured(clock, monkeypatch):
    """Catches a file that is not read; and one that is read though nobody asked for it."""
    clock.favourites = {False: cut(candidates(False)[1])}
    first, seen = tuned(clock), clock.timed
    measured.forget()
    backends.choose_anew()
    layer = rnn_gpu.LSTM(8, 512)
    plain = backends.kernels_for(layer, 16, torch.float32, DEVICE, True)
    assert not plain.measured and cut(plain.plans[0]) == cut(candidates(False)[0])
    assert tuned(clock) == first and clock.timed == seen
    measured.forget()
    monkeypatch.setattr(measured, "automatic", True)  # RNN_GPU_AUTOTUNE=1
    assert backends.kernels_for(layer, 16, torch.float32, DEVICE, True) == first


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"key": {}, "found": {}}', "another key", "no time", "a cut of text",
        "no such plan", "a folder",
    ],
)  # fmt: skip
def test_a_spoilt_file_costs_a_measurement_and_no_more(content, clock, monkeypatch):
    """Catches an error, or a plan that does not exist, out of a file that somebody else wrote, or half of one."""
    first = tuned(clock)
    for path in files():
        known = json.loads(path.read_text())
        if isinstance(content, bytes):
            path.write_bytes(content)
            continue
        if content == "another key":
            known["key"]["device"] = "another"
        elif content == "no time":
            del known["found"]["when"]
        elif content == "a cut of text" and "cut" in known["found"]:
            known["found"]["cut"]["units"] = "16"
        elif content == "no such plan" and "cut" in known["found"]:
            known["found"]["cut"]["units"] = 17
        path.write_text(json.dumps(known))
        if content == "a folder":
            path.unlink()
            path.mkdir()
    measured.forget()
    backends.choose_anew()
    monkeypatch.setattr(measured, "automatic", True)
    choice = backends.kernels_for(rnn_gpu.LSTM(8, 512), 16, torch.float32, DEVICE, True)
    assert [cut(p) for p in choice.plans] == [cut(candidates(backward)[0]) for backward in (False, True)]
    assert not any(p.measured for p in choice.plans)
    assert tuned(clock, again=True).name == first.name and tuned(clock).measured


def write(folder: str, number: int) -> str:
    """What a process finds in force after it has written a choice of its own."""
    os.environ["TRITON_CACHE_DIR"] = folder
    return measured.keep('{"key": 1}', {"when": str(number)})["when"]


def test_of_many_writers_all_obey_the_first(folder):
    """Catches half a file, and processes of one training that go on with different choices."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda number: write(str(folder.parent), number), range(64)))
    assert len(found) == 1
    (path,) = files()
    assert json.loads(path.read_text())["found"]["when"] in found
    assert not list(folder.glob("*.tmp"))


def test_readers_never_see_half_a_file(folder):
    """Catches a file that is written where it is read."""
    key, text = '{"key": 2}', "x" * 200_000
    measured.keep(key, {"when": text})
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        writing = pool.submit(lambda: [measured.keep(key, {"when": text}, again=True) for _ in range(20)])
        while not writing.done():
            assert measured._read(measured._path(key), key) == {"when": text}
    writing.result()


def test_a_folder_that_cannot_be_written_is_told_and_harms_nothing(tmp_path, monkeypatch, clock, caplog):
    """Catches an error from a read-only home, and silence about it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    assert tuned(clock).measured
    assert "holds for this process alone" in caplog.text
    seen = clock.timed
    assert tuned(clock).measured and clock.timed == seen


def test_choices_come_with_the_library_for_these_kernels_alone(clock, tmp_path, monkeypatch):
    """Catches: a file of choices that nobody takes, or that is taken for kernels which have changed since, or goes
    before what was measured here.
    """
    layer, path, said = rnn_gpu.LSTM(512, 512), tmp_path / "measured.json", []
    asked = layer, 16, torch.float32, DEVICE, True
    clock.favourites, clock.theirs = {False: cut(candidates(False)[1])}, 1e-5
    case = tune.Case("lstm", "float32", 512, 16, 3)
    written = tune.ship(str(path), [case], torch.device("cpu"), clock, benchmark.Clock(1e6), said.append)
    assert written == 5 and len(said) == 2  # two forwards, a backward, two comparisons
    measured.forget()
    backends.choose_anew()
    assert not backends.kernels_for(*asked).measured
    versions, here = measured.versions(), measured.shipped(str(path))
    monkeypatch.setattr(measured, "shipped", lambda: here)
    for other, holds in (({"torch": "another"}, True), ({"kernels": "others"}, False), ({}, True)):
        monkeypatch.setattr(measured, "versions", lambda other=other: versions | other)
        choice = backends.kernels_for(*asked)
        assert (choice.name, bool(choice.measured), bool(choice.plans[0].measured)) == (
            ("torch", True, True) if holds else ("triton", False, False)
        )
    clock.theirs = 1.0
    assert tuned(clock, again=True).name == "triton"


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_what_cannot_be_timed_is_an_error():
    """Catches a measurement on a CPU, and errors that do not say what is wrong."""
    layer = rnn_gpu.GRU(3, 5)
    with pytest.raises(RuntimeError, match="autotune times kernels on a GPU: the input is on cpu"):
        rnn_gpu.autotune(layer, torch.randn(2, 3, 3))
    with pytest.raises(TypeError, match=r"an LSTM, GRU or RNN of rnn_gpu, got: torch\.nn\.modules\.rnn\.GRU"):
        rnn_gpu.autotune(torch.nn.GRU(3, 5), torch.randn(2, 3, 3))
    with pytest.raises(TypeError, match="should be a tensor or a PackedSequence, got: list"):
        rnn_gpu.autotune(layer, [1.0])


def test_errors_for_input_are_those_of_the_layer(clock, monkeypatch):
    """Catches: another message than a call would give."""
    monkeypatch.undo()
    with pytest.raises(ValueError, match="LSTM: Expected input to be 2D or 3D, got 4D"):
        autotuning._like(rnn_gpu.LSTM(8, 512), torch.randn(1, 2, 3, 8), None, None).run("kernels")


def test_nothing_is_timed_while_something_traces_transforms_or_captures(monkeypatch):
    """Catches a measurement inside of a graph, where its launches are recorded, or of tensors that hold nothing."""
    found = {}

    def ask(name):
        def asked(x):
            found[name] = autotuning.why_not(x)
            return x.sum()

        return asked

    x = torch.randn(3)
    torch.func.grad(ask("a transform"))(x)
    torch.func.vmap(ask("a transform of many"))(x.view(3, 1))
    torch.func.jvp(ask("forward mode"), (x,), (x,))
    torch.jit.trace(ask("traced"), (x,), check_trace=False)
    with torch._subclasses.FakeTensorMode() as mode:
        ask("a mode")(mode.from_tensor(x))
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        ask("compiled")(x)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

        class OnGPU(torch.Tensor):
            is_cuda = True

        patch.setattr(autotuning, "PLAIN", {OnGPU})
        ask("captured")(torch.randn(3).as_subclass(OnGPU))
    ask("a subclass")(torch.randn(3).as_subclass(type("Mine", (torch.Tensor,), {})))
    assert len(found) == 8 and all(found.values()), found
    assert autotuning.why_not(x) is None


in_a_test, real, run = autotuning._in_a_test, autotuning.tune, autotuning._Trial.run


# ---- RNN_GPU_AUTOTUNE=1 ----------------------------------------------------------------------------------------------


@pytest.fixture
def automatic(monkeypatch):
    """The variable set, in no test, with the CPU taken for a GPU -> what was tuned."""
    calls = []
    monkeypatch.setattr(measured, "automatic", True)
    monkeypatch.setattr(autotuning, "_in_a_test", lambda: False)
    monkeypatch.setattr(autotuning, "_on_gpu", lambda data: True)
    monkeypatch.setattr(autotuning, "tune", lambda *given: calls.append(given))
    return calls


def test_the_first_call_of_a_shape_is_measured_and_no_other(automatic):
    """Catches a measurement at each call, at each length, or at none."""
    layer = rnn_gpu.LSTM(3, 5)
    for time, batch, count in ((4, 2, 1), (4, 2, 1), (6, 2, 1), (4, 3, 2)):
        layer(torch.randn(time, batch, 3), lengths=[time] * batch)
        assert len(automatic) == count
    with torch.no_grad():
        layer(torch.randn(4, 2, 3), lengths=[4, 4])
    assert len(automatic) == 3
    layer.requires_grad_(False)(torch.randn(4, 2, 3), lengths=[4, 4])  # of which nothing is differentiated either
    assert len(automatic) == 3


def test_a_checkpoint_does_not_see_what_is_timed(automatic, clock, monkeypatch):
    """Catches: tensors of a trial saved by the user's hooks, and counted again in the recomputation."""
    tune = lambda layer, input, lengths, resets, _: automatic.append(real(layer, input, lengths, resets, clock))
    monkeypatch.setattr(autotuning, "tune", tune)
    monkeypatch.setattr(autotuning._Trial, "run", lambda trial, way: (run(trial, "aten"), clock.run(trial, way)))
    layer, input = rnn_gpu.LSTM(3, 5), torch.randn(4, 2, 3, requires_grad=True)
    call = lambda input: layer(input, lengths=[4, 2])[0]
    found = torch.autograd.grad(checkpoint(call, input, use_reentrant=False).sum(), input)
    assert len(automatic) == 1 and automatic[0].measured
    torch.testing.assert_close(found, torch.autograd.grad(call(input).sum(), input))


def test_what_is_timed_does_not_time_itself(automatic, monkeypatch):
    """Catches a measurement inside of the measurement, which would not end."""
    layer = rnn_gpu.LSTM(3, 5)
    again = lambda *given: (automatic.append(given), layer(torch.randn(4, 7, 3), lengths=[4] * 7))
    monkeypatch.setattr(autotuning, "tune", again)
    layer(torch.randn(4, 2, 3), lengths=[4, 4])
    assert len(automatic) == 1


def test_a_measurement_that_fails_leaves_the_call_alone(automatic, monkeypatch, caplog):
    """Catches a training that ends because something could not be timed, and one that tries at every step."""

    def fails(*given):
        automatic.append(given)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(autotuning, "tune", fails)
    layer = rnn_gpu.LSTM(3, 5)
    for _ in range(2):
        assert layer(torch.randn(4, 2, 3), lengths=[4, 4])[0].shape == (4, 2, 5)
    assert len(automatic) == 1 and "out of memory" in caplog.text


@pytest.mark.parametrize("where", ["CPU", "backend torch", "a test", "vmap"])
def test_nothing_is_measured_where_it_must_not_be(where, automatic, monkeypatch):
    """Catches a measurement on a CPU, of a backend that was not asked for, in tests, under transforms."""
    layer, input = rnn_gpu.LSTM(3, 5), torch.randn(4, 2, 3)
    lengths = torch.tensor([4, 4])
    if where == "CPU":
        monkeypatch.setattr(autotuning, "_on_gpu", lambda data: data.is_cuda)
    elif where == "a test":
        monkeypatch.setattr(autotuning, "_in_a_test", in_a_test)
    with rnn_gpu.backend("torch" if where == "backend torch" else "auto"):
        if where == "vmap":
            torch.func.vmap(lambda one: layer(one, lengths=lengths)[0])(input[None])
        else:
            layer(input, lengths=lengths)
    assert not automatic


def test_the_function_gives_what_was_chosen(clock, monkeypatch):
    """Catches: arguments that the door does not hand on; another GPU's clock, which would see nothing."""
    given, current = [], []
    tune = lambda *arguments: (given.append(arguments), "choice on cuda:1" if current == ["cuda:1"] else "elsewhere")[1]
    monkeypatch.setattr(autotuning, "tune", tune)

    @contextlib.contextmanager
    def made_current(device):
        current.append(str(device))
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", made_current)

    class OnGPU(torch.Tensor):
        device = torch.device("cuda", 1)

    monkeypatch.setattr(autotuning, "PLAIN", {OnGPU, torch.Tensor})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    layer, input = rnn_gpu.LSTM(8, 512), torch.randn(3, 2, 8).as_subclass(OnGPU)
    monkeypatch.setattr(OnGPU, "data", property(lambda self: self))
    assert rnn_gpu.autotune(layer, input, lengths=[1, 2], again=True) == "choice on cuda:1"
    assert given == [(layer, input, [1, 2], None, autotuning.device_seconds, True)]
