"""`python -m perf.tune`: how good the plan's choice is, measured, and the constants of its model fitted to a device.

    python -m perf.tune --cell lstm --dtype bfloat16 --hidden-size 1024 --batch-size 16     the ranking of one shape
    python -m perf.tune --layers 4 --hidden-size 512     the same of layers side by side, and against one by one
    python -m perf.tune --check                          a sample of shapes: what the plan's own choice loses
    python -m perf.tune --check --fit constants.json     the model's constants, fitted to all that was measured
    python -m perf.tune --check --recorded perf/results  the model against recordings (recorded.py); needs no GPU
    python -m perf.tune --ship                           `autotune` for the benchmark's cases, to come with the library

Every plan is checked against the readable loop in float64 before it is timed. All this needs a GPU. Without one it says
so, and prints the ranking of the model, which is an estimate.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import statistics
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

import rnn_gpu
from rnn_gpu import autotuning, backends, measured, reference
from rnn_gpu.command import duration, exit_with, known_gpu, positive
from rnn_gpu.dtypes import dtype_name
from rnn_gpu.equations import BUILT_IN
from rnn_gpu.kernels import plan as planning
from rnn_gpu.kernels.plan import CHUNK_ROW_BYTES, DEVICES, Device, Plan
from rnn_gpu.kernels.rows import Rows
from rnn_gpu.kernels.spec import CELLS, DTYPES
from tests.tolerances import EPS, FLOOR_EPS, PEER_FACTOR

from . import compiling, ledger, recorded
from .benchmark import Clock, OutOfTime, device_seconds, one_line, progress
from .cases import Case, core
from .providers import float32_precision, interpreted, torch_layer
from .recorded import constants

STEPS = 256  # of a timed call
CHECKED_STEPS = 24
ROUNDS = 9
FITTED = (  # the constants of the model that a fit changes
    "FORWARD_TILE", "BACKWARD_TILE", "FORWARD_MATRIX", "BACKWARD_MATRIX", "FORWARD_TRAVEL", "BACKWARD_TRAVEL",
)  # fmt: skip
SAMPLE = [  # cell, type, hidden units, batch: what --check looks at, forward and backward
    ("lstm", "bfloat16", 128, 64),
    ("lstm", "bfloat16", 256, 16),
    ("lstm", "bfloat16", 512, 16),
    ("lstm", "bfloat16", 512, 128),
    ("lstm", "bfloat16", 1024, 16),
    ("lstm", "bfloat16", 1024, 64),
    ("lstm", "bfloat16", 2048, 16),
    ("lstm", "float32", 512, 32),
    ("gru", "bfloat16", 512, 16),
    ("gru", "float16", 1024, 64),
    ("gru", "float32", 256, 16),
    ("rnn_tanh", "bfloat16", 1024, 32),
]
STACKS = [("lstm", "bfloat16", 256, 16, 8), ("lstm", "bfloat16", 512, 16, 4), ("gru", "bfloat16", 512, 16, 4)]  # layers


# ---- Plans and the model ------------------------------------------------------------------------------------------


def candidates(
    cell: str, hidden_size: int, batch_size: int, sets: int, dtype: str, device: Device, backward: bool, precision=None,
    layers: int = 1,
) -> list[Plan]:  # fmt: skip
    """All plans of a problem: what the plan chooses from, and what it never compares: slots awaited in more
    or fewer parts, and weights in shared memory that would fit in registers. layers: side by side.
    """
    precision = (precision or "tf32") if dtype == "float32" else None
    problem = planning.Problem(
        cell, hidden_size, batch_size, sets, dtype, device, backward, precision, layers=layers
    )  # fmt: skip
    alone = planning.alone_plan(problem) if layers == 1 else None
    found = [] if alone is None else [alone]
    for p in planning.exchanging_plans(problem, device.multiprocessors):
        parts = dict.fromkeys((p.waits, 1, 2, CELLS[cell].gates)) if backward and CELLS[cell].gates > 1 else (p.waits,)
        same = planning.with_batch(p, device, device.multiprocessors)
        found += [dataclasses.replace(same, waits=waits) for waits in parts]
        chunk_bytes = p.warps * -(-CELLS[cell].gates // p.gates_per_tile) * p.gates_per_tile * p.units * CHUNK_ROW_BYTES
        shared_bytes = p.shared_bytes + p.registers * chunk_bytes
        if p.registers and shared_bytes <= device.shared_memory:
            moved = dataclasses.replace(p, registers=0, shared=p.registers + p.shared, shared_bytes=shared_bytes)
            found.append(planning.with_batch(moved, device, device.multiprocessors))
    return found


def predicted(p: Plan, device: Device) -> float:
    """The model's microseconds a step for a plan, with its constants as they are now."""
    if not p.alone:
        return planning.with_batch(p, device, device.multiprocessors).microseconds
    problem = planning.Problem(
        p.cell, p.hidden_size, p.batch_size, p.sets, p.dtype, device, p.backward, p.precision
    )  # fmt: skip
    return planning.alone_plan(problem).microseconds


def model_error(measured: list[tuple[Plan, float]], device: Device) -> float:
    """Root mean square of the logarithm of predicted over measured: 0.1 is about 10 %."""
    return math.sqrt(statistics.fmean(math.log(predicted(p, device) / us) ** 2 for p, us in measured))


def fit(measured: list[tuple[Plan, float]], device: Device) -> dict[str, float]:
    """The constants of the model that predict (plan, microseconds a step) best: one after another, in smaller steps."""
    best = {name: getattr(planning, name) for name in FITTED}

    def error(values) -> float:
        with constants(values):
            return model_error(measured, device)

    least, factor = error(best), 1.5
    while factor > 1.002:
        improved = False
        for name in FITTED:
            for by in (factor, 1 / factor):
                changed = best | {name: best[name] * by}
                if (now := error(changed)) < least - 1e-12:
                    best, least, improved = changed, now, True
        if not improved:
            factor = math.sqrt(factor)
    return best


def written_fit(measured: list[tuple[Plan, float]], device: Device) -> dict:
    """What --fit writes: the constants, where they come from, and how much better they are."""
    found = fit(measured, device)
    before = model_error(measured, device)
    with constants(found):
        after = model_error(measured, device)
    return dict(
        device=dataclasses.asdict(device), torch=torch.__version__, triton=ledger.version_of("triton"),
        commit=ledger.commit(), measured=ledger.now(), plans=len(measured),
        constants=found, constants_before={name: getattr(planning, name) for name in FITTED},
        error_before=before, error_after=after,
        times=[{"plan": dataclasses.asdict(p), "microseconds": us} for p, us in measured],
    )  # fmt: skip


# ---- Measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Recurrence:
    """Data of one pass for the launchers: the same whatever the plan."""

    time: int
    x_part: Tensor
    weight: Tensor
    bias: Tensor | None
    h0: Tensor
    c0: Tensor | None
    d_y: Tensor | None = None
    saved: tuple | None = None  # y, gates, aux of a forward, for a backward

    @classmethod
    def draw(cls, p: Plan, time: int, device: torch.device) -> "Recurrence":
        """Random data of a plan's problem; for a backward plan also a forward, by the plan's own choice."""
        from rnn_gpu.kernels import layer

        spec, dtype = CELLS[p.cell], getattr(torch, p.dtype)
        sets, batch, size = p.sets, p.batch_size, p.hidden_size
        torch.manual_seed(0)

        def draw(*shape, scale=1.0):
            return (torch.randn(*shape) * scale).to(device, dtype)

        weight = draw(sets, spec.gates * size, size, scale=size**-0.5)
        bias = draw(sets, spec.apart * size) if spec.apart else None
        h0, c0 = draw(sets, batch, size), draw(sets, batch, len(spec.states) * size) if spec.states else None
        data = cls(time, draw(time * batch, sets, spec.gates * size), weight, bias, h0, c0)
        if p.backward:
            data.d_y = draw(time * batch, sets, size)
            own = planning.plan(p.cell, size, batch, sets, p.dtype, _device(device), False, p.precision)
            gates = data.x_part.clone()
            rows = Rows(time, batch)
            y, _, _, aux, _ = layer.forward(own, gates, weight, bias, h0, c0, rows, data.reversed_sets, "full")
            data.saved = y, gates if spec.saves else None, aux
        return data

    @property
    def reversed_sets(self) -> int:
        """2 where every second set runs backwards in time."""
        return 2 if self.weight.shape[0] > 1 else 0

    def run(self, p: Plan, save: bool = True, fresh: bool = False) -> Tensor:
        """Run a plan: y, or d_gates. fresh: leave the input part as it was (it becomes the gates otherwise)."""
        from rnn_gpu.kernels import layer

        rows = Rows(self.time, p.batch_size)
        if not p.backward:
            x_part = self.x_part.clone() if fresh else self.x_part
            saving = "full" if save else "nothing"
            start = self.weight, self.bias, self.h0, self.c0
            return layer.forward(p, x_part, *start, rows, self.reversed_sets, saving)[0]
        y, gates, aux = self.saved
        states = self.h0, self.c0
        return layer.backward(p, self.d_y, None, None, self.weight, gates, aux, y, *states, rows, self.reversed_sets)[0]

    def expected(self, p: Plan, dtype: torch.dtype) -> Tensor:
        """What `run` has to give, by the readable loop in a dtype: y, or the gradient of the input part."""
        found = []
        for n in range(p.sets):
            x = self.x_part[:, n].to(dtype).view(self.time, p.batch_size, -1).requires_grad_(p.backward)
            bias = None if self.bias is None else self.bias[n].to(dtype)
            states = self.h0[n].to(dtype), None if self.c0 is None else self.c0[n].to(dtype)
            reverse = self.reversed_sets == 2 and n % 2 == 1
            y, _, _ = reference.recurrence(p.cell, x, self.weight[n].to(dtype), bias, *states, reverse)
            if p.backward:
                d_y = self.d_y[:, n].to(dtype).view_as(y)
                y = torch.autograd.grad(y, x, d_y)[0]
            found.append(y.flatten(0, 1))
        return torch.stack(found, 1)


@dataclass
class Stack:
    """The same of layers side by side; timed from the first layer's input part on, and back to its gradient."""

    time: int
    x_part: Tensor
    weights: tuple[list[Tensor] | None, ...]  # weight_ih, weight_hh, bias_ih and bias_hh of each layer
    h0: Tensor
    c0: Tensor | None
    d_y: Tensor
    saved: tuple | None = None  # y, gates, aux of a forward, for a backward

    @classmethod
    def draw(cls, p: Plan, time: int, device: torch.device) -> "Stack":
        """Random data of a plan's problem; for a backward plan also a forward, by the plan's own choice."""
        spec, batch, size = CELLS[p.cell], p.batch_size, p.hidden_size
        torch.manual_seed(0)

        def draw(*shape, scale=1.0):
            return (torch.randn(*shape) * scale).to(device, getattr(torch, p.dtype))

        matrices, biases = (
            [[draw(spec.gates * size, *more, scale=size**-0.5) for _ in range(p.layers)] for _ in range(2)]
            for more in ((size,), ())
        )
        c0 = draw(p.layers, batch, len(spec.states) * size) if spec.states else None
        states = draw(p.layers, batch, size), c0
        data = cls(time, draw(time * batch, spec.gates * size), (*matrices, *biases), *states, draw(time * batch, size))
        if p.backward:
            kind = p.dtype, _device(device), False, p.precision
            own = planning.plan(p.cell, size, batch, 1, *kind, layers=p.layers)
            y, _, _, gates, aux = data._forward(own, "full")
            data.saved = gates, aux, y
        return data

    def _forward(self, p: Plan, saving: str) -> tuple:
        from rnn_gpu.kernels import stack

        rows = Rows(self.time, p.batch_size)
        begun = stack.begin(p, rows, self.x_part.shape[0], self.h0, *self.weights)
        return stack.forward(p, begun, self.x_part, self.h0, self.c0, rows, saving)

    def run(self, p: Plan, save: bool = True, fresh: bool = False) -> Tensor:
        """Run a plan: y of the last layer, or d_gates of the first. fresh: the input part is never written over."""
        from rnn_gpu.kernels import stack

        if not p.backward:
            return self._forward(p, "full" if save else "nothing")[0][-1].unsqueeze(1)
        rows, states = Rows(self.time, p.batch_size), (self.h0, self.c0)
        given = self.d_y, None, None, *self.weights[:2], *self.saved
        return stack.backward(p, *given, *states, rows)[0][0].unsqueeze(1)

    def expected(self, p: Plan, dtype: torch.dtype) -> Tensor:
        """What `run` has to give, by the readable loop in a dtype: y, or the gradient of the first input part."""
        first = part = x = self.x_part.to(dtype).requires_grad_(p.backward)
        for n, (weight_ih, weight_hh, *biases) in enumerate(zip(*self.weights, strict=True)):
            bias, bias_hn = reference.fold_biases(p.cell, *(one.to(dtype) for one in biases))
            if n > 0:
                part = torch.nn.functional.linear(x, weight_ih.to(dtype), bias)
            states = self.h0[n].to(dtype), None if self.c0 is None else self.c0[n].to(dtype)
            steps = part.view(self.time, p.batch_size, -1)
            x = reference.recurrence(p.cell, steps, weight_hh.to(dtype), bias_hn, *states, False)[0].flatten(0, 1)
        if p.backward:
            (x,) = torch.autograd.grad(x, first, self.d_y.to(dtype))
        return x.unsqueeze(1)


def drawn(p: Plan, time: int, device: torch.device) -> Recurrence | Stack:
    """Data of a plan's problem."""
    return (Stack if p.layered else Recurrence).draw(p, time, device)


def _device(device: torch.device) -> Device:
    return backends.device_of(device)


class Judge:
    """Tells whether a plan's result is right: the rule of the tests, on a few steps, the readable loop as the peer."""

    def __init__(self, p: Plan, device: torch.device):
        self.data = drawn(p, CHECKED_STEPS, device)
        self.oracle = self.data.expected(p, torch.float64)
        own = getattr(torch, p.dtype)
        error = torch.linalg.vector_norm(self.data.expected(p, own).double() - self.oracle)
        floor = FLOOR_EPS * EPS[own] * torch.linalg.vector_norm(self.oracle)
        self.allowed = max(PEER_FACTOR * error.item(), floor.item())

    def ratio(self, p: Plan) -> float:
        """The error over the allowed one; a wrong plan has more than 1."""
        result = self.data.run(p, fresh=True)
        if p.backward:
            gates = CELLS[p.cell].gates
            result = result[:, :, result.shape[2] - gates :].flatten(2)  # the input side of the slots
        error = torch.linalg.vector_norm(result.double() - self.oracle).item()
        return error / self.allowed if math.isfinite(error) else math.inf


def time_all(plans: list[Plan], device: torch.device, clock: Clock, say) -> list[tuple[Plan, float]]:
    """Median microseconds a step of every plan that is right, in turns; what is not timed is said."""
    from rnn_gpu.kernels import launch

    judge, good = Judge(plans[0], device), []
    for p in plans:
        clock.check()
        try:
            ratio = judge.ratio(p)
            launch.check(device)
        except RuntimeError as error:
            say(f"  not run: {one_line(error)}: {p}")
            continue
        if ratio > 1:
            say(f"  WRONG, not timed: {ratio:.3g} times the allowed error: {p}, {p.waits} wait(s)")
        else:
            good.append(p)
    if not good:
        return []
    data = drawn(good[0], STEPS, device)
    times = [[] for _ in good]
    for number in range(ROUNDS + 1):  # the first warms up
        clock.check()
        for p, mine in zip(good, times, strict=True):
            took = device_seconds(lambda p=p: data.run(p), 3)
            if number:
                mine.append(took * 1e6 / STEPS)
    launch.check(device)
    return [(p, statistics.median(mine)) for p, mine in zip(good, times, strict=True)]


def same_plan(a: Plan, b: Plan) -> bool:
    """Whether two plans run the same, whatever is predicted of them."""
    return all(getattr(a, f.name) == getattr(b, f.name) for f in dataclasses.fields(Plan) if f.name not in _SAID)


_SAID = ("microseconds", "reason", "shared_bytes", "measured", "pause")


def loss(measured: list[tuple[Plan, float]], own: Plan) -> float | None:
    """How much longer the plan's own choice takes than the best: 0.05 is 5 %. None where it was not timed."""
    mine = next((us for p, us in measured if same_plan(p, own)), None)
    return None if mine is None else mine / min(us for _, us in measured) - 1


def ranking(measured: list[tuple[Plan, float]], own: Plan) -> str:
    """Fastest first, the plan's own choice marked."""
    lines = ["  measured  predicted  (us a step, fill included; predicted: the recurrence alone)"]
    for p, us in sorted(measured, key=lambda pair: pair[1]):
        mark = "->" if same_plan(p, own) else "  "
        lines.append(f"{mark}{us:8.3f}  {p.microseconds:9.3f}  {p}, {p.waits} wait(s)")
    found = loss(measured, own)
    lines.append(
        "  the plan's own choice was not timed" if found is None else f"  the plan's own choice (->) loses {found:.1%}"
    )
    return "\n".join(lines)


def against_one_by_one(together: list[tuple[Plan, float]], alone: list[tuple[Plan, float]], device: Device) -> str:
    """Layers side by side against one after another, which make an input part, and its gradient, for each of them."""
    if not together or not alone:
        return "  side by side and one by one were not both timed"
    p, layers, us = alone[0][0], together[0][0].layers, min(us for _, us in alone)
    products = (layers - 1) * planning.product_microseconds(p, device)
    first, other = min(us for _, us in together), layers * us + products
    return (
        f"  {layers} layers side by side {first:.3f} us a step; one by one {layers} x {us:.3f} and about "
        f"{products:.3f} for products between them: {other / first:.2f} times as long"
    )


def without_gpu(shape: tuple, layers: int, device: Device, precision: str | None) -> int:
    """What is needed, and the ranking of the model."""
    print(
        "No CUDA device. perf.tune times every plan of a shape, and needs a GPU of compute capability 8.0 or later that"
    )
    print("nothing else uses. What it would choose from, ranked by the plan's model; times are estimates, nothing is")
    print(f"measured. Plans for {device.name}:")
    for backward in (False, True):
        found = sorted(candidates(*shape, device, backward, precision, layers), key=lambda p: p.microseconds)
        of = f" of {layers} layers side by side" if layers > 1 else ""
        print(f"\n{'backward' if backward else 'forward'}: {len(found)} plans{of}")
        for p in found[:5]:
            print(f"  about {p.microseconds:7.3f} us a step: {p}, {p.waits} wait(s)")
    return 0


def ship(path: str, cases: list[Case], device: torch.device, timer, clock: Clock, say) -> int:
    """Measure each case in training and in inference as `rnn_gpu.autotune` does, and write all choices to a file -> how
    many. A choice is for any T: cases that differ in it alone are measured once.
    """
    measured.forget()
    written, problems = 0, {}
    for case in cases:
        problems.setdefault(dataclasses.replace(case, time=0), case)
    for case in problems.values():
        if clock.left <= 0:
            say("The budget has ended: what was not measured, the model decides.")
            break
        dtype = getattr(torch, case.dtype)
        layer = torch_layer(case, device, dtype, library=rnn_gpu)
        input = torch.randn(case.time, case.batch_size, case.hidden_size, device=device, dtype=dtype)
        for training in (True, False):
            with torch.set_grad_enabled(training):
                choice = autotuning.tune(layer, input, None, None, timer, again=True)
            say(f"{case}, {'training' if training else 'inference'}: {choice.name}, {choice.reason}")
        written = measured.write_shipped(path)  # each time: a machine that is paid by the minute may be gone any moment
    return written


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m perf.tune", description="Time all plans of a shape on a GPU.")
    add = parser.add_argument
    add("--cell", choices=BUILT_IN, default="lstm", help="(default: %(default)s)")
    add("--dtype", type=dtype_name, choices=DTYPES, default="bfloat16", help="or fp16, ... (default: %(default)s)")
    add("--hidden-size", type=positive, default=1024, metavar="H", help="(default: %(default)s)")
    add("--batch-size", type=positive, default=16, metavar="B", help="(default: %(default)s)")
    add("--directions", type=int, choices=(1, 2), default=1, help="(default: %(default)s)")
    add(
        "--layers",
        type=positive,
        default=1,
        metavar="L",
        help="side by side, or one by one (default: %(default)s)",
    )
    add("--float32-precision", choices=("tf32", "ieee"), default="tf32", help="(default: %(default)s)")
    add("--check", action="store_true", help="a sample of shapes instead of one")
    add("--most", type=float, default=0.05, help="--check fails where the choice loses more (default: %(default)s)")
    add("--recorded", metavar="FOLDER", help="with --check: compare with recordings, and measure nothing")
    add("--ship", nargs="?", const=measured.SHIPPED, metavar="PATH", help="measure the core grid as autotune does, and "
        "write the choices as JSON, where the library looks for them unless a path is given")  # fmt: skip
    add("--fit", metavar="PATH", help="write the model's constants, fitted to what was measured, as JSON")
    add(
        "--budget",
        type=duration,
        default=1800,
        metavar="SECONDS",
        help="stop cleanly after so long (default: %(default)s)",
    )
    add(
        "--jobs",
        type=positive,
        default=compiling.JOBS,
        help="processes that compile kernels before anything is timed (default here: %(default)s)",
    )
    add("--device", type=known_gpu, metavar="GPU", default="h200", help="whose plans to print where there is no GPU")
    options = parser.parse_args(arguments)
    if interpreted():
        print("TRITON_INTERPRET=1 is set: the interpreter's times mean nothing. Unset it.", file=sys.stderr)
        return 2
    if options.recorded and not options.check:
        parser.error("--recorded goes with --check")
    if options.recorded and not os.path.isdir(options.recorded):
        parser.error(f"argument --recorded: no such folder: {options.recorded}")
    if options.layers < 1 or (options.layers > 1 and options.directions > 1):
        parser.error("--layers: 1 or more, of one direction")
    if options.recorded:
        lines, good = recorded.check(options.recorded, lambda p: predicted(p, DEVICES["h200"]), options.most)
        print("\n".join(lines))
        return 0 if good else 1
    shape = options.cell, options.hidden_size, options.batch_size, options.directions, options.dtype
    precision = options.float32_precision
    if not torch.cuda.is_available():
        return without_gpu(shape, options.layers, DEVICES[options.device], precision)
    device, clock = torch.device("cuda"), Clock(options.budget)
    mine = backends.device_of(device)
    if options.ship:
        say = functools.partial(print, flush=True)
        print(f"{ship(options.ship, core(), device, autotuning.device_seconds, clock, say)} choices in {options.ship}")
        return 0
    shapes = [(shape, options.layers)]
    if options.check:
        shapes = [
            ((cell, h, b, 1, dtype), layers) for cell, dtype, h, b, layers in [*[(*s, 1) for s in SAMPLE], *STACKS]
        ]
    work = [(*one, backward) for one in shapes for backward in (False, True)]
    everything, losses, done = [], [], 0
    steps, say = progress(work, len(work), "shape")
    with float32_precision(precision):
        try:
            for one, layers, backward in steps:
                own = planning.plan(*one, mine, backward, precision, layers=layers)
                if isinstance(own, str):
                    say(f"{one}: {own}")
                    continue
                of = f" of {layers} layers" if layers > 1 else ""
                say(f"{one}{of} {'backward' if backward else 'forward'} on {mine.name}")
                found = candidates(*one, mine, backward, precision, layers)
                tasks = [(compiling.plan, p, None, options.float32_precision, str(device)) for p in found]
                compiling.in_parallel(tasks, options.jobs, min(compiling.SECONDS, clock.left / 2))
                timed = time_all(found, device, clock, say)
                everything += timed
                done += 1
                if timed:
                    say(ranking(timed, own))
                    found = loss(timed, own)
                    losses.append(math.inf if found is None else found)
                if layers > 1:
                    single = planning.plan(*one, mine, backward, precision)
                    say(against_one_by_one(timed, time_all([single], device, clock, say), mine))
        except OutOfTime:
            say(f"The budget of {options.budget:.0f} s has ended: {done} of {len(work)} done.")
    if losses:
        print(f"The plan's choice loses {statistics.median(losses):.1%} in the median, {max(losses):.1%} at worst.")
    if options.fit and everything:
        found = written_fit(everything, mine)
        with open(options.fit, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
        print(f"{options.fit}: {found['constants']}, error {found['error_before']:.2f} -> {found['error_after']:.2f}")
    return 1 if options.check and (not losses or max(losses) > options.most) else 0


if __name__ == "__main__":
    exit_with(main)
