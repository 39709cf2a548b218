"""The plan's model against what was recorded, with no GPU: `python -m perf.tune --check --recorded perf/results`.

Three questions. Of the plans of a shape that were timed, does the model take one of the fastest? Would `auto` have
taken the faster of our kernels and cuDNN in every case of the benchmark? And what do the cases take, of the kernels as
they are now? The times are those of the kernels of their commit, and so is the model that is asked.
"""

import contextlib
import csv
import json
import os
import statistics
from typing import Any, NamedTuple

from rnn_gpu.kernels import cudnn
from rnn_gpu.kernels import plan as planning
from rnn_gpu.kernels.cudnn import cudnn_microseconds
from rnn_gpu.kernels.plan import DEVICES, Device, Plan
from rnn_gpu.kernels.spec import CELLS, padded


class Kernels(NamedTuple):
    """The kernels of some sources: the constants of the model by which plans were chosen then, those by which it says
    what such a plan takes, where they are not today's, and the microseconds of a call that the benchmark saw beside
    them and the large products, mostly Python's, by mode.
    """

    chosen: dict[str, Any]
    constants: dict[str, Any]
    call: dict[str, float]


# Commit 7d9048c: every poll was reduced over the program. One program alone wherever it could be, whose time was taken
# for Python's.
_REDUCED = dict(
    FORWARD_TILE=0.515, FORWARD_EIGHT_WARPS=0.538, FORWARD_MATRIX=0.01309, FORWARD_MEGABYTE=0.2, FORWARD_LATE=0.006,
    FORWARD_TRAVEL=0.4, FORWARD_ALONE_CYCLES=0.4, BACKWARD_TILE=0.245, BACKWARD_EIGHT_WARPS=0.65,
    BACKWARD_MATRIX=0.00959, BACKWARD_VECTOR=0.0852, BACKWARD_EXCHANGE=0.243, BACKWARD_MEGABYTE=0.112,
    BACKWARD_TRAVEL=0.909, BACKWARD_ALONE_CYCLES=1.6, ALONE_UNITS=256,
    L2_BYTES_PER_MICROSECOND=7.5e6, FORWARD_PAUSES=(), BACKWARD_PAUSES=(), FORWARD_WIDE=0.0, BACKWARD_IN_TURN=0.0,
    BACKWARD_WIDE_STREAMED=1.0,
)  # fmt: skip
REDUCED_POLLS = Kernels(_REDUCED, _REDUCED, {"inference": 700.0, "forward+backward": 1000.0})
# Commit dd67452: every thread waits for its own words. Plans were chosen by the clock of the machine code.
_CLOCKED = dict.fromkeys(("FORWARD_TILE", "FORWARD_EIGHT_WARPS", "FORWARD_MATRIX"), 0.55)
_CLOCKED |= dict.fromkeys(("BACKWARD_TILE", "BACKWARD_EIGHT_WARPS", "BACKWARD_MATRIX", "BACKWARD_VECTOR"), 0.6)
_CLOCKED |= dict(FORWARD_LATE=0.5)
_CALL = {"inference": 30.0, "forward+backward": 100.0}
_SLOW_CALL = {"inference": 60.0, "forward+backward": 310.0}  # of the host of 2026-11-28
_HASTY = dict(FORWARD_PAUSES=(), BACKWARD_PAUSES=())
_UNCORRECTED = dict(FORWARD_WIDE=0.0, BACKWARD_IN_TURN=0.0, BACKWARD_WIDE_STREAMED=1.0)
OWN_WORDS = Kernels(
    _REDUCED | {name: share * _REDUCED[name] for name, share in _CLOCKED.items()} | _UNCORRECTED | _HASTY,
    _HASTY,
    _CALL,
)
# Commit 2cc106c: the same, chosen by the model as fitted to them.
FITTED_ONCE = Kernels(_UNCORRECTED | _HASTY, _HASTY, _SLOW_CALL)
# Commit 3a3b8ba: waits begin with a pause, of which the model knew nothing. (But for float32 backward, which had none.)
_PAUSES = dict(
    FORWARD_PAUSES=((8, 100), (16, 200), (32, 300), (64, 450)), BACKWARD_PAUSES=((16, 100), (32, 200), (64, 450)),
    FORWARD_PAUSED=None, BACKWARD_PAUSED=None,
)  # fmt: skip
PAUSED = Kernels(_UNCORRECTED | _PAUSES, {}, _SLOW_CALL)
OF_SOURCES = {
    "2bf54a0d969e": REDUCED_POLLS, "5d2c2d36c166": OWN_WORDS, "55b615d50f81": FITTED_ONCE, "93b4176cbb82": PAUSED,
}  # fmt: skip
# Others are of today's kernels.
OF_PLANS = {"nvidia-h200-2026-11-26-plans.jsonl": REDUCED_POLLS, "nvidia-h200-2026-11-28-plans.jsonl": FITTED_ONCE}
# How far the model may be from what the kernels of PAUSED took where it claims to know: weights in registers, rows
# that begin at 16 bytes, one layer of many steps.
MOST_OFF = 0.2


@contextlib.contextmanager
def constants(values: dict[str, Any]):
    """Within this context the model has these constants."""
    where = {name: cudnn if name.startswith("CUDNN") else planning for name in values}
    before = {name: getattr(module, name) for name, module in where.items()}
    try:
        for name, module in where.items():
            setattr(module, name, values[name])
        yield
    finally:
        for name, module in where.items():
            setattr(module, name, before[name])


class Case(NamedTuple):
    """A case of the benchmark: what was measured of our kernels and of cuDNN, and the estimates, in microseconds."""

    name: str
    kernels: Kernels
    known: bool  # whether MOST_OFF is about it
    ours: float
    theirs: float
    our_estimate: float
    their_estimate: float

    @property
    def loss(self) -> float:
        """How much longer the choice by the estimates takes than the faster of the two: 0.05 is 5 %."""
        chosen = self.ours if self.our_estimate <= self.their_estimate else self.theirs
        return chosen / min(self.ours, self.theirs) - 1

    @property
    def off(self) -> float:
        """How much longer than measured the estimate for our kernels is."""
        return self.our_estimate / self.ours - 1


def timed_plans(path: str) -> list[tuple[Plan, float]]:
    """The plans of a recording and the microseconds a step that they took. (Some were recorded with the order of their
    waits, and not their number.)
    """
    found = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            given = row["plan"]
            if "order" in given:
                order, slots = given.pop("order"), CELLS[given["cell"]].gates
                given["waits"] = {0: 1, 1: slots, 2: 2, 3: slots}[order] if given["backward"] else 1
            found.append((Plan(**given), row["us"]))
    return found


def choices(timed: list[tuple[Plan, float]], predicted) -> dict[tuple, tuple[float, float]]:
    """By problem: what the plan took that `predicted` puts first of those that were timed, and what the best took."""
    problems: dict[tuple, list[tuple[Plan, float]]] = {}
    for p, us in timed:
        if not p.alone:
            key = p.cell, p.hidden_size, p.batch_size, p.sets, p.dtype, p.precision, p.backward
            problems.setdefault(key, []).append((p, us))
    return {
        key: (dict(plans)[planning.preferred([(p, predicted(p)) for p, _ in plans])], min(us for _, us in plans))
        for key, plans in problems.items()
    }


def cases(path: str, device: Device, predicted) -> list[Case]:
    """The cases of a ledger in which our kernels and cuDNN have been timed, once for each sources of ours, with the
    model's estimates for them.
    """
    rows: dict[tuple, dict[str, dict[str, str]]] = {}
    with open(path, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            names = "cell", "dtype", "hidden_size", "batch_size", "time", "layers", "directions", "precision", "mode"
            rows.setdefault((row["sources"], *(row[name] for name in names)), {})[row["provider"]] = row
    found = []
    for (sources, *key), by in rows.items():
        if "rnn_gpu" in by and "torch.nn" in by:
            cell, dtype, hidden_size, batch_size, time, layers, directions, precision, mode = key
            problem = cell, int(hidden_size), int(batch_size), int(directions), dtype
            passes = (False, True) if mode == "forward+backward" else (False,)
            kernels = OF_SOURCES.get(sources, PAUSED)
            with constants(kernels.chosen):
                plans = [planning.plan(*problem, device, backward, precision or None) for backward in passes]
            assert all(isinstance(p, Plan) for p in plans), plans
            with constants(kernels.constants):
                ours, theirs = kernels.call[mode] / int(time), 0.0
                for p in plans:
                    products = (3 if p.backward else 1) * planning.product_microseconds(p, device)
                    ours += predicted(p) + products
                    theirs += cudnn_microseconds(p, device, int(layers)) + products
            aligned = padded(int(hidden_size), dtype) == int(hidden_size)
            known = aligned and layers == "1" and int(time) > 500 and all(p.shared + p.streamed == 0 for p in plans)
            times = float(by["rnn_gpu"]["step_us"]), float(by["torch.nn"]["step_us"])
            found.append(Case(" ".join(key), kernels, known, *times, int(layers) * ours, int(layers) * theirs))
    return found


def check(folder: str, predicted, most: float) -> tuple[list[str], bool]:
    """What the recordings of a folder say of the model, in lines, and whether it is good enough: no choice of a plan
    loses more than `most`, of each kernels at most 2 choices of `auto` are wrong, and none by more than a tenth, and of
    today's no case is further from its estimate than MOST_OFF.
    """
    lines, good, device = [], True, DEVICES["h200"]
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if name.endswith("-plans.jsonl"):
            kernels, timed = OF_PLANS.get(name, PAUSED), timed_plans(path)
            if kernels is FITTED_ONCE:  # others are compiled in another way now (AT_ONCE in program.py)
                timed = [(p, us) for p, us in timed if p.shared + p.streamed == 0]
            with constants(kernels.constants):
                took = choices(timed, predicted)
            losses = {key: took / best - 1 for key, (took, best) in took.items()}
            worst = max(losses, key=lambda key: losses[key])
            lines.append(
                f"{name}: of {len(losses)} problems the plan put first loses {losses[worst]:.1%} at most: {worst}"
            )
            good &= losses[worst] <= most
        elif name == "nvidia-h200.csv":
            every = cases(path, device, predicted)
            wrong = sorted((case for case in every if case.loss > 0), key=lambda case: -case.loss)
            lines.append(f"{name}: `auto` chooses wrongly in {len(wrong)} of {len(every)} cases")
            lines += [f"  {case.loss:.1%}: {case.name}, {case.ours:.2f} against {case.theirs:.2f} us" for case in wrong]
            for kernels in OF_SOURCES.values():
                good &= sum(case.kernels is kernels for case in wrong) <= 2
            good &= all(case.loss <= 0.1 for case in wrong)
            new = [case for case in every if case.kernels is PAUSED and case.known]
            if not new:
                continue
            worst = max(new, key=lambda case: abs(case.off))
            middle = statistics.median(abs(case.off) for case in new)
            lines.append(
                f"{name}: of {len(new)} cases of today's kernels that the model knows it is within {middle:.0%} of "
                f"half, within {abs(worst.off):.0%} of all: {worst.name}, {worst.ours:.2f} us, by the model "
                f"{worst.our_estimate:.2f}"
            )
            good &= abs(worst.off) <= MOST_OFF
    return lines, good
