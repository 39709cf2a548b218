"""`autotune`: the plans of a call and PyTorch's own kernels timed against each other, on the GPU that will run it.

The model of kernels/plan.py is fitted to one GPU. Here the few plans that it puts first are timed in turns, and then
the best of them and PyTorch's own kernels: whole calls of a layer, with all products and gradients, since that is what
a user waits for. What was found is kept by measured.py, and from then on taken wherever a plan or a backend is chosen.

Timed is a layer of the same kind with weights of its own, on the data of the call: neither weights, gradients, hooks
nor random numbers of the user's are touched.
"""

import contextlib
import datetime
import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from . import backends, measured, operators, settings
from .backends import Choice
from .base import _computed_in, _Layer, _sequences
from .call import PLAIN
from .kernels import plan as planning
from .kernels.devices import Device
from .modules import GRU, LSTM, RNN

Timer = Callable[[Callable[[], object]], float]  # seconds of a call that has been made before

STEPS = 256  # at most, of a timed call: more take longer and tell nothing new
FEW = 4  # plans of a pass that are timed
NEAR = 1.5  # but none that the model believes to take so many times as long as the best
ROUNDS = 5  # in each of which everything is timed once
SAMPLE_SECONDS = 0.004  # of a timer's sample

logger = logging.getLogger("rnn_gpu")
_at_work = threading.Lock()  # two at the same time would time each other
_seen: set[tuple[Any, ...]] = set()  # calls that `first_call` has looked at


def autotune(
    layer: _Layer[Any],
    input: Tensor | PackedSequence,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    resets: Tensor | None = None,
    again: bool = False,
) -> Choice:
    """Time the best plans and PyTorch's own kernels for calls such as `layer(input, lengths=..., resets=...)`, and let
    all later ones of this shape take what was fastest.

    layer: an LSTM, GRU or RNN of this library, on a GPU; or of a cell of one's own, whose plans alone are timed, for
    PyTorch has none to compare with. input: as the layer takes it, on that GPU; of a dense one at
    most 256 steps are timed. With gradients enabled forward and backward are timed, under torch.no_grad() the forward,
    and so where neither input nor parameters require gradients: the backend found then holds under torch.no_grad().
    autocast, precision, memory and the other settings are those of now. It takes a second or two, and what it takes to
    compile up to eight kernels, once: they stay in Triton's cache. Of a stack of layers up to three times as many: side
    by side, one after another, and as the model has it; the way that is found holds in training and in inference.

    What was measured is kept in memory and in files in Triton's cache (triton.knobs.cache.dir), by device, versions and
    shape, whatever T is: a later call for the same, in another process too, returns it and measures nothing, unless
    `again`. It waits for the device, and leaves weights, gradients and random numbers as they are.

    -> the choice of backend "auto": `name` ("triton" or "torch"), `reason`, with the times, and `plans`.

    TypeError for another layer or input; RuntimeError where nothing can be timed: on a CPU, while a CUDA graph is
    captured, under torch.compile and torch.func, while something traces or looks on. The errors of the layer for input
    that it does not take.
    """
    if not isinstance(layer, _Layer):
        got = f"{type(layer).__module__}.{type(layer).__qualname__}"  # torch.nn's has the same name
        raise TypeError(f"autotune expects an LSTM, GRU or RNN of rnn_gpu, got: {got}")
    if not isinstance(input, (Tensor, PackedSequence)):
        raise TypeError(f"input should be a tensor or a PackedSequence, got: {type(input).__name__}")
    data = _data_of(input)
    device = data.device
    if device.type != "cuda":
        raise RuntimeError(f"autotune times kernels on a GPU: the input is on {device}")
    if (reason := why_not(data)) is not None:
        raise RuntimeError(f"autotune can time nothing: {reason}")
    with _at_work, _there(device):
        return tune(layer, input, lengths, resets, device_seconds, again)


def _there(device: torch.device) -> Any:
    """A context in which a GPU is the current one, whose work events and `device_seconds` wait for."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def why_not(data: Tensor) -> str | None:
    """Why a call with this input must not be timed now, or None."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return "the call is traced"
    if backends.transforming() or forward_ad._current_level >= 0:
        return "a transform (torch.func, forward-mode differentiation) is at work"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a dispatch mode looks on"
    if type(data) not in PLAIN:
        return f"the input is a {type(data).__name__}"
    if data.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return None


def first_call(
    layer: _Layer[Any],
    input: Tensor | PackedSequence,
    lengths: Tensor | Sequence[int] | None,
    resets: Tensor | None,
    batch: int,
    dtype: torch.dtype,
) -> None:
    """With RNN_GPU_AUTOTUNE=1, before each call of a layer: time its shape, if nothing is known of it yet.

    Whatever goes wrong is logged, and the call goes on with the choice of the model. Never on a CPU, where `autotune`
    would refuse, or in a test of pytest's.
    """
    data = _data_of(input)
    if not _on_gpu(data) or settings.current_backend() == "torch" or _in_a_test():
        return
    if why_not(data) is not None or not _at_work.acquire(blocking=False):  # while another call is timed: by the model
        return
    try:
        ragged = lengths is not None or resets is not None or isinstance(input, PackedSequence)
        sizes = layer.mode, layer.hidden_size, layer.heads, layer.num_layers, layer.bidirectional, layer.proj_size
        now = _differentiated(layer, data), backends.other_weights(layer), layer.memory, settings.current_memory()
        key = batch, ragged, dtype, data.device, *sizes, *now, settings.limits(), backends.precision_of("float32")
        if key not in _seen:
            _seen.add(key)
            with _there(data.device):
                tune(layer, input, lengths, resets, device_seconds)
    except Exception as error:
        logger.warning("rnn_gpu: a call could not be timed, and the model of the plan decides: %s", error)
    finally:
        _at_work.release()


def _in_a_test() -> bool:
    return "PYTEST_CURRENT_TEST" in os.environ


def _data_of(input: Tensor | PackedSequence) -> Tensor:
    return input.data if isinstance(input, PackedSequence) else input


def _on_gpu(data: Tensor) -> bool:
    return data.is_cuda


def _differentiated(layer: _Layer[Any], data: Tensor) -> bool:
    """Whether a call has gradients, but for those of initial states."""
    return torch.is_grad_enabled() and (data.requires_grad or any(p.requires_grad for p in layer.parameters()))


# ---- What is timed ---------------------------------------------------------------------------------------------------


@dataclass
class _Trial:
    """A call like the user's, of a layer of its own."""

    layer: _Layer[Any]
    input: Tensor | PackedSequence
    lengths: Tensor | Sequence[int] | None
    resets: Tensor | None
    steps: int
    batch: int
    dtype: torch.dtype
    wanted: list[Tensor]  # what has a gradient; empty in inference
    gradient: Tensor | None = None  # of the output

    @property
    def ragged(self) -> bool:
        """Whether rows end early or start anew."""
        return isinstance(self.input, PackedSequence) or self.lengths is not None or self.resets is not None

    def run(self, route: str) -> None:
        """Call the layer on a route, and differentiate."""
        output, _ = self.layer._by_route(
            route, self.input, None, self.batch, self.dtype, self.lengths, self.resets
        )  # fmt: skip
        if self.wanted:
            result = _data_of(output)
            if self.gradient is None:
                self.gradient = torch.randn_like(result)
            torch.autograd.grad(result, self.wanted, self.gradient)


def _like(
    layer: _Layer[Any], input: Tensor | PackedSequence, lengths: Any, resets: Tensor | None
) -> _Trial:  # fmt: skip
    """The call of a layer with weights of its own, cut to STEPS steps."""
    first = next(layer.parameters())
    given: dict[str, Any] = dict(
        num_layers=layer.num_layers, bias=layer.bias, batch_first=layer.batch_first, dropout=layer.dropout,
        bidirectional=layer.bidirectional, device=first.device, dtype=first.dtype, memory=layer.memory,
        weight_dropout=layer.weight_dropout, heads=layer.heads,
    )  # fmt: skip
    sizes = layer.input_size, layer.hidden_size
    if layer._torch_class is None:
        made = next(cls for cls in type(layer).__mro__ if "cell" in vars(cls))  # by `layer`
        mine: _Layer[Any] = made(*sizes, **given)
    elif layer.mode == "LSTM":
        mine = LSTM(*sizes, **given, proj_size=layer.proj_size)
    elif layer.mode == "GRU":
        mine = GRU(*sizes, **given)
    else:
        mine = RNN(*sizes, **given, nonlinearity="tanh" if layer.mode == "RNN_TANH" else "relu")
    mine.train(layer.training)
    for own, theirs in zip(mine.parameters(), layer.parameters(), strict=False):
        own.requires_grad_(theirs.requires_grad)
    data = _data_of(input)
    data = data.detach().requires_grad_(data.requires_grad and torch.is_grad_enabled())
    if isinstance(input, PackedSequence):
        trial: Tensor | PackedSequence = PackedSequence(data, *input[1:])
        steps, batch = len(input.batch_sizes), _sequences(input, None)
    else:
        axis = 1 if layer.batch_first and input.dim() == 3 else 0
        steps = min(input.shape[axis], STEPS)
        trial = data.narrow(axis, 0, steps)
        batch = input.shape[1 - axis] if input.dim() == 3 else 1
        if isinstance(lengths, Tensor):
            lengths = lengths.clamp(max=steps)
        elif lengths is not None:
            lengths = [min(length, steps) for length in lengths]
        resets = None if resets is None else resets.narrow(axis, 0, steps)
    differentiated = [t for t in (data, *mine.parameters()) if t.requires_grad] if torch.is_grad_enabled() else []
    return _Trial(mine, trial, lengths, resets, steps, batch, _computed_in(data), differentiated)


def device_seconds(call: Callable[[], object]) -> float:
    """Seconds of a call on the current stream, the mean of as many as take SAMPLE_SECONDS."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    count = max(1, min(50, int(SAMPLE_SECONDS / (time.perf_counter() - begin))))
    events: Any = torch.cuda.Event
    start, end = events(enable_timing=True), events(enable_timing=True)
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / count


def _in_turns(calls: Sequence[Callable[[], object]], timer: Timer, device: torch.device) -> list[float]:
    """Seconds of each call, the median of ROUNDS rounds. One that fails takes for ever; where all do, their error."""
    from .kernels import launch

    times: list[list[float]] = [[] for _ in calls]
    failed: dict[int, Exception] = {}
    for number in range(-1, ROUNDS):  # the first compiles
        for i, call in enumerate(calls):
            if i in failed:
                continue
            try:
                if number < 0:
                    call()
                else:
                    times[i].append(timer(call))
                launch.check(device)  # that no wait has given up
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler or a launch raises
                failed[i] = error
                logger.info("rnn_gpu: what was to be timed failed: %s", error)
    if len(failed) == len(calls):
        raise failed[0]
    return [float("inf") if i in failed else statistics.median(times[i]) for i in range(len(calls))]


# ---- The choice ------------------------------------------------------------------------------------------------------


def tune(
    layer: _Layer[Any],
    input: Tensor | PackedSequence,
    lengths: Tensor | Sequence[int] | None,
    resets: Tensor | None,
    timer: Timer,
    again: bool = False,
) -> Choice:
    """`autotune` by any timer."""
    where = _data_of(input).device
    training = _differentiated(layer, _data_of(input))  # what is timed, and so what the choice is of
    # The user's hooks (torch.utils.checkpoint's, for one) must not see what a trial saves.
    with (
        torch.random.fork_rng([where] if where.type == "cuda" else []),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        torch.set_grad_enabled(training),
    ):
        trial = _like(layer, input, lengths, resets)
        problem = backends._problem(layer, trial.batch, trial.dtype)
        device, precision = backends.device_of(where), backends.precision_of(problem[-1])
        asked = layer, trial.batch, trial.dtype, device, training, trial.ragged

        def chosen() -> Choice:
            backends.choose_anew()
            operators.plan_anew()
            return backends.kernels_for(*asked)

        if missing := backends.triton_missing() or backends.triton_untested():
            return Choice("torch", missing)
        choice = chosen()
        if not choice.plans:
            return choice
        saving = backends.saving_of(layer, training)
        together, drops = backends.together_of(layer, training), backends.drops_between(layer, training)
        of_groups = backends.key_of_groups(problem, device, trial.ragged or drops, together)

        def groups() -> tuple[tuple[planning.Plan, ...], ...]:
            found = backends.groups_for(
                problem, device, training, trial.ragged, together, saving=saving, drops=drops
            )  # fmt: skip
            assert not isinstance(found, str), found
            return found

        ways, done = _ways(of_groups, groups, together, again), set()
        for way in ways:
            with measured.trying({of_groups: _launches(way)}):
                for p in (p for plans in groups() for p in plans):
                    ragged = trial.ragged or (drops and p.layered)
                    key = measured.key_of_plan(
                        *problem, device, p.backward, precision, ragged, settings.limits(), saving, p.layers
                    )  # fmt: skip
                    if key not in done and (again or measured.known(key, True) is None):
                        measured.keep(key, _fastest_plan(p, device, ragged, key, trial, timer), again)
                    done.add(key)
        if len(ways) > 1:
            measured.keep(of_groups, _fastest_way(ways, of_groups, trial, timer), again)
        if layer._torch_class is None:  # nothing to compare with
            return chosen()
        key = backends.key_of(layer, problem, device, training, trial.ragged, precision)
        if again or measured.known(key, True) is None:
            chosen()
            measured.keep(key, _faster_backend(trial, timer), again)
        return chosen()


def _fastest_plan(
    own: planning.Plan, device: Device, ragged: bool, key: measured.Key, trial: _Trial, timer: Timer
) -> dict[str, Any]:
    """What is to be kept of the fastest of the few best plans of a pass. own: the one that holds now."""
    cap, alone = settings.limits()
    found = planning.every_plan(
        own.cell, own.hidden_size, own.batch_size, own.sets, own.dtype, device, own.backward, own.precision,
        cap or None, alone, ragged, own.layers,
    )  # fmt: skip
    assert not isinstance(found, str), found
    ranked = sorted(found, key=lambda p: (planning.cut(p) != planning.cut(own), p.microseconds))
    least = min(p.microseconds for p in found)
    ranked = [p for p in ranked[:FEW] if p is ranked[0] or p.microseconds <= NEAR * least]
    entries = [{"cut": dict(zip(planning.CUT, planning.cut(p), strict=True)), "when": ""} for p in ranked]
    return _fastest(entries, "plan", [str(p) for p in ranked], key, trial, timer)


def _fastest(
    entries: list[dict[str, Any]], what: str, names: Sequence[Any], key: measured.Key, trial: _Trial, timer: Timer
) -> dict[str, Any]:
    """That of the entries for a key with which the trial is the fastest, with the times of all."""

    def under(entry: dict[str, Any]) -> Callable[[], None]:
        def call() -> None:
            with measured.trying({key: entry}):
                operators.plan_anew()
                trial.run("kernels")

        return call

    times = _in_turns([under(entry) for entry in entries], timer, _data_of(trial.input).device)
    operators.plan_anew()
    us = [round(seconds * 1e6 / trial.steps, 3) for seconds in times]
    timed = [{what: name, "microseconds": took} for name, took in zip(names, us, strict=True)]
    return entries[min(range(len(times)), key=lambda i: times[i])] | {"when": _now(), "timed": timed}


# How the layers of a stack are put into launches: how many each takes, from the first layer on.


def _launches(way: Sequence[int]) -> dict[str, Any]:
    """What is kept of a way; () for the model's."""
    return {"groups": list(way), "when": ""}


def _ways(
    key: measured.Key, groups: Callable[[], tuple[tuple[planning.Plan, ...], ...]], together: int, again: bool
) -> list[tuple[int, ...]]:
    """The ways that are worth timing: as the model has it, all layers in one launch, one after another; but the one
    that is known, unless it is to be measured again. groups: `backends.groups_for` this call.
    """
    known, found = None if again else measured.known(key, True), []
    for way in [measured.groups(key)] if known else [(), (together,), (1,) * together]:
        with measured.trying({key: _launches(way)}):
            found.append(tuple(plans[0].layers for plans in groups()))
    return list(dict.fromkeys(found))


def _fastest_way(ways: list[tuple[int, ...]], key: measured.Key, trial: _Trial, timer: Timer) -> dict[str, Any]:
    """What is to be kept of the fastest way."""
    return _fastest([_launches(way) for way in ways], "groups", ways, key, trial, timer)


def _faster_backend(trial: _Trial, timer: Timer) -> dict[str, Any]:
    """What is to be kept of our kernels, as they are planned now, against PyTorch's own."""
    masked = trial.lengths is not None or trial.resets is not None
    theirs = backends.route_of_torch(trial.layer, _data_of(trial.input), masked, backends.other_weights(trial.layer))
    calls = [lambda: trial.run("kernels"), lambda: trial.run(theirs)]
    times = _in_turns(calls, timer, _data_of(trial.input).device)
    ours, others = (seconds * 1e6 / trial.steps for seconds in times)
    return {"name": "triton" if ours <= others else "torch", "ours": ours, "theirs": others, "when": _now()}


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
