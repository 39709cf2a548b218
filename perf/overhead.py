"""`python -m perf.overhead`: what a call costs beside its arithmetic, in microseconds, next to torch.nn's.

One step of a stream in eval mode, where Python and the dispatcher take most of the time: torch.nn, this library, and on
a CPU the opaque operators that stand for a layer and for a stack in a graph (their body is the same kernel, so the
difference is the operators' own cost). On a GPU calls are queued and not waited for, so that the host's time is what
counts; one more line is a step of training, forward and backward, and one the replay of a CUDA graph of a step.
Everybody is called in turns, another one first in every round.

On a CPU two more tables: the host's time of a call on the kernels, with every launch replaced by nothing, next to
torch.nn's on the CPU, in time of the processor. It has everything that Python and PyTorch do before and after a launch,
and the products, which are small here; not what CUDA takes to queue a kernel.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch

import rnn_gpu
from rnn_gpu import aten, backends
from rnn_gpu.call import Call, Inputs, for_operator
from rnn_gpu.command import exit_with, positive, present
from rnn_gpu.rows import Rows

CELLS = ("LSTM", "GRU", "RNN")
CALLS = 50  # of one sample


def samples(
    calls: dict[str, Callable], rounds: int, wait: Callable[[], None], clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds a call, `rounds` samples of each, in turns."""
    found = {name: [] for name in calls}
    names = list(calls)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            call = calls[name]
            wait()
            begin = clock()
            for _ in range(CALLS):
                call()
            found[name].append((clock() - begin) / CALLS)
    wait()
    return found


def stream(cell: str, hidden_size: int, batch_size: int, device: torch.device) -> dict[str, Callable]:
    """One step in eval mode, state to state."""
    theirs = getattr(torch.nn, cell)(hidden_size, hidden_size, device=device).eval()
    ours = getattr(rnn_gpu, cell)(hidden_size, hidden_size, device=device).eval()
    ours.load_state_dict(theirs.state_dict())
    input = torch.randn(1, batch_size, hidden_size, device=device)
    state = torch.zeros(1, batch_size, hidden_size, device=device)
    state = (state, state) if cell == "LSTM" else state
    calls = {"torch.nn": lambda: theirs(input, state), "rnn_gpu": lambda: ours(input, state)}
    if device.type == "cuda":
        with torch.no_grad():
            calls["rnn_gpu, CUDA graph"] = replayed(ours, input, state)
    if device.type == "cpu":
        states = state if cell == "LSTM" else (state, None)
        weights = [weight.detach().unsqueeze(0) for weight in ours._flat_weights]
        inputs, rows = Inputs(input[0], *weights, None, None, *states), Rows(1, batch_size)
        call = Call(backends.CELL_OF_MODE[ours.mode], 1, 0)
        calls["ATen, called directly"] = lambda: aten.layer(inputs, rows, call)
        tensors, of_set = for_operator(inputs, rows), [weight[0] for weight in weights]
        given = input[0], *states, of_set, call.cell, True, 1, 1, 1, False
        calls["as an operator of a layer"] = lambda: aten.aten_layer(*tensors, *call.how, False)
        calls["as that of a stack"] = lambda: torch.ops.rnn_gpu.aten_stack(*given)
    return calls


def training(cell: str, hidden_size: int, batch_size: int, device: torch.device) -> dict[str, Callable]:
    """One step, forward and backward."""
    calls = {}
    for name, module in (("torch.nn, training", torch.nn), ("rnn_gpu, training", rnn_gpu)):
        layer = getattr(module, cell)(hidden_size, hidden_size, device=device)
        input = torch.randn(1, batch_size, hidden_size, device=device)
        calls[name] = lambda layer=layer, input=input: layer(input)[0].sum().backward()
    return calls


def replayed(layer: torch.nn.Module, input: torch.Tensor, state) -> Callable:
    """A step as a CUDA graph, which replays it."""
    for _ in range(2):
        layer(input, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(input, state)
    return graph.replay


@contextlib.contextmanager
def launches_left_out() -> Iterator[None]:
    """Within this context layers on the CPU go the way of the kernels, and every launch is nothing."""
    from rnn_gpu.kernels import launch

    before = launch._start, backends.interpreting
    launch._start, backends.interpreting = lambda *_: None, lambda: True
    try:
        with rnn_gpu.backend("triton"):
            yield
    finally:
        launch._start, backends.interpreting = before


def host(cell: str, hidden_size: int, batch_size: int, trained: bool, **options) -> dict[str, Callable]:
    """Two steps of a layer or a stack, by torch.nn and with the launches left out."""
    calls = {}
    for name, module in (("torch.nn on the CPU", torch.nn), ("rnn_gpu, no launches", rnn_gpu)):
        layer = getattr(module, cell)(hidden_size, hidden_size, **options)
        input = torch.randn(2, batch_size, hidden_size)
        gradient = torch.ones(2, batch_size, hidden_size * (2 if layer.bidirectional else 1))
        if trained:
            calls[name] = lambda layer=layer, input=input, d=gradient: trained_once(layer, input, d)
        else:
            calls[name] = lambda layer=layer, input=input: layer(input)
    return calls


def trained_once(layer: torch.nn.Module, input: torch.Tensor, gradient: torch.Tensor) -> None:
    """Forward and backward, with gradients that are new."""
    layer(input)[0].backward(gradient)
    for parameter in layer.parameters():
        parameter.grad = None


def functions_of_ours(call: Callable) -> int:
    """How many functions of this library Python runs in a call: what it costs the host, by a count that does not
    depend on how busy the machine is.
    """
    count, package = 0, os.path.dirname(rnn_gpu.__file__)

    def see(frame, event, _):
        nonlocal count
        name = frame.f_code
        count += event == "call" and name.co_filename.startswith(package) and not name.co_name.startswith("<")

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def told(cell: str, found: dict[str, list[float]]) -> None:
    """Lines of a table."""
    first = next(iter(found.values()))
    for name, seconds in found.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, first, strict=True))
        middle, least = statistics.median(seconds) * 1e6, min(seconds) * 1e6
        print(f"{cell:6}{name:26}{middle:10.2f}{least:10.2f}{ratio:13.3f}")


def main(arguments: list[str] | None = None) -> int:
    """0; prints a table."""
    parser = argparse.ArgumentParser(prog="python -m perf.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=positive, default=64)
    parser.add_argument("--batch-size", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=60, help="samples of each (default: %(default)s)")
    parser.add_argument("--device", type=present, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device = options.device
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    print(f"one step, H {options.hidden_size}, B {options.batch_size}, float32, torch {torch.__version__}, {where}")
    print(f"{'cell':6}{'call':26}{'median us':>10}{'least us':>10}{'to torch.nn':>13}")
    for cell in CELLS:
        for make in (stream, training):
            calls = make(cell, options.hidden_size, options.batch_size, device)
            with torch.set_grad_enabled(make is training):
                samples(calls, 2, wait)
                found = samples(calls, options.rounds, wait)
            told(cell, found)
    if device.type == "cuda":
        return 0
    for what, kind in (("one layer", {}), ("two layers, both directions", dict(num_layers=2, bidirectional=True))):
        print(f"the host alone, two steps, {what}; forward, and forward and backward")
        for cell in CELLS:
            for trained in (False, True):
                calls = host(cell, options.hidden_size, options.batch_size, trained, **kind)
                with torch.set_grad_enabled(trained), launches_left_out():
                    samples(calls, 2, wait, time.thread_time)
                    told(cell, samples(calls, options.rounds, wait, time.thread_time))
                    count = functions_of_ours(calls["rnn_gpu, no launches"])
                    print(f"{'':6}in {count} functions of this library")
    return 0


if __name__ == "__main__":
    exit_with(main)
