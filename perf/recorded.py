"""The plan's model against what was recorded, with no GPU: `python -m perf.tune --check --recorded perf/results`.

Two questions. Of the plans of a shape that were timed, does the model take one of the fastest? And would `auto` have
taken the faster of our kernels and cuDNN in every case of the benchmark? The times are those of the kernels of their
commit: the model is asked without what later kernels save by the clock.
"""

import csv
import json
import os
from typing import NamedTuple

from rnn_gpu.kernels import plan as planning
from rnn_gpu.kernels.plan import DEVICES, Device, Plan
from rnn_gpu.kernels.spec import CELLS

AS_RECORDED = dict.fromkeys(("FORWARD_CLOCKED", "BACKWARD_CLOCKED", "LATE_CLOCKED"), 1.0)
# Microseconds of a call that the benchmark saw beside the kernels and the large products, with commit 7d9048c: mostly
# Python's. Inference, and forward with backward.
CALL_MICROSECONDS = {"inference": 700.0, "forward+backward": 1000.0}


class Case(NamedTuple):
    """A case of the benchmark: what was measured of our kernels and of cuDNN, and the estimates, in microseconds."""

    name: str
    ours: float
    theirs: float
    our_estimate: float
    their_estimate: float

    @property
    def loss(self) -> float:
        """How much longer the choice by the estimates takes than the faster of the two: 0.05 is 5 %."""
        chosen = self.ours if self.our_estimate <= self.their_estimate else self.theirs
        return chosen / min(self.ours, self.theirs) - 1


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


def cases(path: str, device: Device) -> list[Case]:
    """The cases of a ledger in which our kernels and cuDNN have been timed, with the model's estimates for them."""
    rows: dict[tuple, dict[str, float]] = {}
    with open(path, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            names = "cell", "dtype", "hidden_size", "batch_size", "time", "layers", "directions", "precision", "mode"
            rows.setdefault(tuple(row[name] for name in names), {})[row["provider"]] = float(row["step_us"])
    found = []
    for key, times in rows.items():
        if "rnn_gpu" in times and "torch.nn" in times:
            cell, dtype, hidden_size, batch_size, time, layers, directions, precision, mode = key
            problem = cell, int(hidden_size), int(batch_size), int(directions), dtype
            ours = theirs = 0.0
            for backward in (False, True) if mode == "forward+backward" else (False,):
                p = planning.plan(*problem, device, backward, precision or None)
                assert isinstance(p, Plan), p
                ours, theirs = ours + p.microseconds, theirs + planning.cudnn_microseconds(p, device, int(layers))
            ours += CALL_MICROSECONDS[mode] / int(time)
            estimates = int(layers) * ours, int(layers) * theirs
            found.append(Case(" ".join(key), times["rnn_gpu"], times["torch.nn"], *estimates))
    return found


def check(folder: str, predicted, most: float) -> tuple[list[str], bool]:
    """What the recordings of a folder say of the model, in lines, and whether it is good enough: no choice of a plan
    loses more than `most`, at most 2 choices of `auto` are wrong, and none by more than a tenth.
    """
    lines, good, device = [], True, DEVICES["h200"]
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if name.endswith("-plans.jsonl"):
            losses = {key: took / best - 1 for key, (took, best) in choices(timed_plans(path), predicted).items()}
            worst = max(losses, key=lambda key: losses[key])
            lines.append(
                f"{name}: of {len(losses)} problems the plan put first loses {losses[worst]:.1%} at most: {worst}"
            )
            good &= losses[worst] <= most
        elif name == "nvidia-h200.csv":
            every = cases(path, device)
            wrong = sorted((case for case in every if case.loss > 0), key=lambda case: -case.loss)
            lines.append(f"{name}: `auto` chooses wrongly in {len(wrong)} of {len(every)} cases")
            lines += [f"  {case.loss:.1%}: {case.name}, {case.ours:.2f} against {case.theirs:.2f} us" for case in wrong]
            good &= len(wrong) <= 2 and all(case.loss <= 0.1 for case in wrong)
    return lines, good
