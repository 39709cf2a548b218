"""`python -m perf.latency lstm 512 bf16 --backward`: how long a step takes by its machine code, and where it waits.

Every warp of one program walks the time loop in order, as the control bits that ptxas wrote into its instructions say:
stall cycles, and scoreboards that are set and waited for. Four schedulers issue one instruction a cycle each, pipes
take their time, a barrier waits for the last warp, and what other programs publish arrives TRAVEL after this program's
own store of the step before, because all programs are alike (the mean over such that are 0 to 130 ns late). What the
others add, all that is read from the second-level cache in a round of polls, is a line fitted to measured plans, one
for each pass, and for programs with one tile of rows and with several:

    microseconds a step = scale x own way + us_per_MB x (programs x bytes that one polls) + offset

The latencies were measured on an H200 or are published figures for Hopper; the control bits are those of Volta to
Hopper (sm_70 to sm_90). What it cannot know: how often a round of polls fails, what looks in vain cost the others,
whether a line has left the cache before its first poll, how clocks differ between devices; weights that are read again
in every step, and several tiles whose weights lie in shared memory, are not in the fit. The clock compares variants of
a kernel and shows a way that has grown; it replaces no measurement.

    python -m perf.latency lstm 1024 bf16 --waits 20    the longest waits of a step, with their lines of source
    python -m perf.latency --table                      the documented plans; --fit: how well it fits
"""

import argparse
import collections
import csv
import functools
import itertools
import os
import re
import statistics
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from perf.resources import documented
from rnn_gpu.command import exit_with, positive
from rnn_gpu.dtypes import dtype_name
from rnn_gpu.equations import BUILT_IN
from rnn_gpu.kernels.compiled import compile_kernel
from rnn_gpu.kernels.machine_code import is_poll, is_publish, name_of
from rnn_gpu.kernels.plan import DEVICES, Plan, plan
from rnn_gpu.kernels.spec import CELLS, DTYPES, padded

CLOCK = 1.9  # GHz
TRAVEL = 130  # ns from a publishing store's issue to its arrival in the second-level cache
SAMPLE, LOAD = 70, 138  # ns from a load's issue to the moment that it reads there, and to its result
LATE = range(0, 280, 80)  # cycles by which the other programs are behind
LATENCY = {  # cycles from issue to the result, of what a scoreboard guards
    "LDG": int(LOAD * CLOCK),
    "LDS": 30,
    "LDSM": 33,
    "LDL": 33,  # of spilled words, in the first-level cache
    "STS": 20,
    "STG": 20,
    "SHFL": 24,
    "REDUX": 24,
    "MUFU": 24,
    "S2R": 20,
    "LDC": 40,
    "ULDC": 12,
    "CS2R": 12,
    "R2UR": 12,
    "I2F": 14,
    "F2I": 14,
    "POPC": 14,
    "VOTE": 12,
    "CCTL": 20,
    "BAR": 30,
    "F2F": 14,
}
PIPE = {  # cycles apart
    "MUFU": 8, "LDS": 2, "STS": 2, "LDL": 4, "STL": 4, "LDG": 4, "STG": 4, "SHFL": 2, "LDSM": 4, "HMMA": 8, "CCTL": 4
}  # fmt: skip
READ = 14  # cycles until a memory instruction has read its registers
BARRIER = 30  # cycles from the last arrival to the first instruction behind it
STEPS, SETTLED = 8, 3  # steps that are walked, and those before they repeat
ITEM = {"float32": 4, "float16": 2, "bfloat16": 2}
# Measured plans, and what this clock says of their kernels: an H200, 2026-11-28 (perf/results), Triton 3.7.1. Those
# without a pause ran with commit 2cc106c too, whose kernels were the same but for that.
RESULTS, FITTED = Path(__file__).with_suffix(".csv"), "3a3b8ba"


# Machine code ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One instruction and its control bits: from bit 105 of the 128, stall 4, yield 1, scoreboard set when written 3,
    when read 3, mask of those waited for 6.
    """

    text: str
    name: str
    stall: int
    write: int
    read: int
    wait: int
    at: int
    source: str


def disassemble(cubin: bytes) -> tuple[list[Line], dict[str, int]]:
    """The instructions of a kernel, and its labels as numbers of instructions."""
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-c", "-g", "-hex", file.name]
        return parsed(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parsed(text: str) -> tuple[list[Line], dict[str, int]]:
    """The same from what nvdisasm prints."""
    lines: list[Line] = []
    labels: dict[str, int] = {}
    source, waiting = "", None
    for row in text.splitlines():
        if label := re.match(r"\s*(\.L\w+):", row):
            labels[label[1]] = len(lines)
        elif found := re.match(r'\s*//## File "([^"]*)", line (\d+)', row):
            source = f"{os.path.basename(found[1])}:{found[2]}"
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]+ \*/", row):
            waiting = found[1]
        elif waiting and (found := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", row)):
            bits = int(found[1], 16) >> 41
            control = bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63
            lines.append(Line(waiting, name_of(waiting), *control, len(lines), source))
            waiting = None
    return lines, labels


def target(line: Line, labels: dict[str, int]) -> int | None:
    """The instruction that a branch goes to."""
    found = re.search(r"\bBRA\b.*`\((\.L\w+)\)", line.text)
    return labels[found[1]] if found else None


def time_loop(lines: list[Line], labels: dict[str, int]) -> tuple[int, int]:
    """First instruction of the time loop and one past its last: the shortest loop with the most publishing stores."""
    spans = []
    for line in lines:
        to = target(line, labels)
        if to is not None and to <= line.at:
            published = sum(is_publish(x.text) for x in lines[to : line.at + 1])
            if published:
                spans.append((-published, line.at + 1 - to, to, line.at + 1))
    if not spans:
        raise ValueError("no loop that publishes in the machine code")
    return min(spans)[2:]


# The walk -------------------------------------------------------------------------------------------------------------


@dataclass
class Warp:
    """Where a warp is, and since when."""

    number: int
    at: int
    time: int = 0
    step: int = 0
    scoreboards: list[int] = field(default_factory=lambda: [0] * 6)  # when each is clear
    blocked: int | None = None  # at a barrier, since then
    polls: list[int] = field(default_factory=list)  # when the polls of the wait in hand read the cache
    missed: bool = False
    rounds: collections.Counter = field(default_factory=collections.Counter)  # of loops over chunks, by their branch
    trace: list[tuple[int, int, Line]] = field(default_factory=list)  # issue, stalled before, instruction


class Walk:
    """All warps of one program on their way through the time loop."""

    def __init__(
        self, lines: list[Line], labels: dict[str, int], warps: int, *, late: int = 0, waiting: bool = True,
        chunks: int = 1, pause: int = 0,
    ):  # fmt: skip
        self.lines, self.labels, self.chunks, self.pause = lines, labels, chunks, pause
        self.begin, self.end = time_loop(lines, labels)
        self.team = [Warp(i, self.begin) for i in range(warps)]
        self.late, self.waiting = late, waiting
        self.ports, self.pipes = [0] * 4, collections.defaultdict(int)
        self.published: dict[int, int] = {}  # step -> the last store that publishes
        self.kinds = {line.at: self._kind(line) for line in lines[self.begin : self.end] if line.name == "BRA"}
        while any(warp.step < STEPS for warp in self.team):
            ready = [warp for warp in self.team if warp.blocked is None and warp.step < STEPS]
            if ready:
                self._issue(min(ready, key=lambda warp: warp.time))
            else:
                self._release()

    def _kind(self, line: Line) -> str:
        """What a branch in the loop is for: "retry" it goes back to poll again, "chunks" to the next chunk of streamed
        weights, "pause" to look at the clock, "skip" it jumps over code that polls again, "over" something else, "out"
        of the loop, "always".
        """
        to = target(line, self.labels)
        if to is None:
            return "over"
        if not line.text.startswith("@") and "UP" not in line.text:
            return "always"
        if to == self.begin and line.at == self.end - 1:
            return "over"
        if to <= line.at:
            inside = self.lines[to : line.at]
            if any("SR_CLOCK" in x.text for x in inside):
                return "pause"
            nested = any(to < (target(x, self.labels) or 0) <= x.at for x in inside if x.name == "BRA")
            return "chunks" if nested or not any(is_poll(x.text) for x in inside) else "retry"
        if any(is_poll(x.text) for x in self.lines[line.at + 1 : min(to, self.end)]):
            return "skip"
        between = self.lines[line.at + 1 : min(to, self.end)]
        again = any(
            (back := target(x, self.labels)) is not None and back <= line.at for x in between if x.name == "BRA"
        )
        return "skip" if again else "over" if to < self.end else "out"

    def _release(self) -> None:
        """The barrier that all warps stand at."""
        held = [warp for warp in self.team if warp.blocked is not None]
        at = max(warp.blocked for warp in held) + BARRIER
        for warp in held:
            warp.time, warp.blocked = at, None

    def _arrival(self, step: int) -> int:
        if step == 0 or not self.waiting:
            return 0
        return self.published.get(step - 1, 0) + int(TRAVEL * CLOCK) + self.late

    def _issue(self, warp: Warp) -> None:
        line, port = self.lines[warp.at], warp.number % 4
        ready = max([warp.time] + [warp.scoreboards[b] for b in range(6) if line.wait >> b & 1])
        stalled = ready - warp.time
        start = max(ready, self.ports[port], self.pipes[port, line.name])
        self.ports[port] = start + 1
        if line.name in PIPE:
            self.pipes[port, line.name] = start + PIPE[line.name]
        if is_poll(line.text):
            warp.polls.append(start + int(SAMPLE * CLOCK))
        if line.write < 6:
            done = start + LATENCY.get(line.name, 0)
            warp.scoreboards[line.write] = max(warp.scoreboards[line.write], done)
        if line.read < 6:
            warp.scoreboards[line.read] = max(warp.scoreboards[line.read], start + READ)
        warp.trace.append((start, stalled, line))
        warp.time = start + max(line.stall, 1)
        if is_publish(line.text):
            self.published[warp.step] = max(self.published.get(warp.step, 0), start)
        if line.name == "BAR":
            warp.blocked = start
        following = self._branch(warp, line) if line.name == "BRA" else warp.at + 1
        if line.at == self.end - 1 or not self.begin <= following < self.end:
            following, warp.step, warp.polls = self.begin, warp.step + 1, []
        warp.at = following

    def _branch(self, warp: Warp, line: Line) -> int:
        to, kind = target(line, self.labels), self.kinds[line.at]
        if kind == "always":
            return to
        if kind == "pause":  # as if the loop took no time but the pause
            warp.time += self.pause
            return warp.at + 1
        if kind == "chunks":
            warp.rounds[line.at] = (warp.rounds[line.at] + 1) % self.chunks
            return to if warp.rounds[line.at] else warp.at + 1
        if kind in ("retry", "skip") and warp.polls:
            warp.missed = any(sample < self._arrival(warp.step) for sample in warp.polls)
            warp.polls = []
        taken = (kind == "retry" and warp.missed) or (kind == "skip" and not warp.missed)
        return to if taken else warp.at + 1

    @property
    def microseconds(self) -> float:
        """Of a step, once they repeat."""
        times = [self.published[step] for step in sorted(self.published)]
        return (times[-1] - times[SETTLED]) / (len(times) - SETTLED - 1) / CLOCK / 1000


def waits(walk: Walk, count: int) -> list[tuple[float, str, str]]:
    """The longest waits of the slowest warp in one step: nanoseconds from the instruction before, instruction, line."""
    warp = max(walk.team, key=lambda w: w.time)
    begin, end = walk.published[STEPS - 3], walk.published[STEPS - 2]
    steps = [entry for entry in warp.trace if begin <= entry[0] <= end]
    found = [(after[0] - before[0], after[2]) for before, after in itertools.pairwise(steps)]
    found.sort(key=lambda x: -x[0])
    return [(cycles / CLOCK, line.text, line.source) for cycles, line in found[:count]]


# Estimates ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A line fitted to measured plans."""

    scale: float
    per_megabyte: float
    offset: float

    def of(self, way: float, megabytes: float) -> float:
        """Microseconds a step."""
        return self.scale * way + self.per_megabyte * megabytes + self.offset


@dataclass(frozen=True)
class Estimate:
    """What machine code says of a plan: us a step of one program's own way, with and without waiting for others, and
    the megabytes that all programs read in a round of polls.
    """

    way: float
    alone: float
    megabytes: float
    plan: Plan
    walk: Walk

    @property
    def microseconds(self) -> float:
        """A step, other programs' traffic included, as measured plans have it."""
        return calibrated(self.plan.backward, self.plan.slices > 1).of(self.way, self.megabytes)


def programs(p: Plan) -> int:
    """Of a plan's launch; a plan that only fixes tiles has one batch slice."""
    return p.unit_slices * max(1, p.batch_slices) * p.sets


def megabytes(p: Plan) -> float:
    """What all programs of a plan's launch read in a round of polls."""
    slots = CELLS[p.cell].slots if p.backward else 1
    each = p.rows * p.slices * slots * padded(p.hidden_size, p.dtype) * ITEM[p.dtype]
    return programs(p) * each / 2**20


@functools.lru_cache(maxsize=4)
def estimate(p: Plan, arch: int = 90) -> Estimate:
    """Compile a plan's kernel and walk its time loop."""
    lines, labels = disassemble(compile_kernel(p, arch).asm["cubin"])
    how = dict(chunks=max(1, p.streamed), pause=p.pause)
    walks = [Walk(lines, labels, p.warps, late=late, **how) for late in LATE]
    alone = Walk(lines, labels, p.warps, waiting=False, **how)
    way = statistics.mean(w.microseconds for w in walks)
    return Estimate(way, alone.microseconds, megabytes(p), p, walks[0])


@functools.cache
def measured() -> tuple[dict, ...]:
    """Rows of RESULTS: plans measured on an H200, and the way that this clock gives their kernels of that commit."""
    with open(RESULTS, newline="") as file:
        return tuple(csv.DictReader(file))


def fitted(rows: Iterable[dict]) -> Fit:
    """Least squares of the relative error."""
    import numpy as np

    rows = list(rows)
    us = np.array([float(row["measured_us"]) for row in rows])
    x = np.array([[float(row["way_us"]), float(row["megabytes"]), 1.0] for row in rows])
    found, *_ = np.linalg.lstsq(x / us[:, None], np.ones_like(us), rcond=None)
    return Fit(*(round(float(value), 3) for value in found))


def chosen(backward: bool, several: bool) -> list[dict]:
    """The measured plans of one fit: of a pass, with one tile of rows a program or with several."""
    name = "backward" if backward else "forward"
    return [r for r in measured() if r["pass"] == name and (r["slices"] != "1") == several and r["streamed"] == "0"]


@functools.cache
def calibrated(backward: bool, several: bool) -> Fit:
    """The line of such plans."""
    return fitted(chosen(backward, several))


def errors(backward: bool, several: bool) -> list[float]:
    """Relative errors of the calibration's own plans."""
    fit, rows = calibrated(backward, several), chosen(backward, several)
    return [fit.of(float(r["way_us"]), float(r["megabytes"])) / float(r["measured_us"]) - 1 for r in rows]


def print_fit() -> None:
    """How well the lines fit."""
    for backward, several in itertools.product((False, True), (False, True)):
        found, fit = [abs(e) for e in errors(backward, several)], calibrated(backward, several)
        what = f"{'backward' if backward else 'forward'}, {'several tiles' if several else 'one tile'} of rows"
        print(
            f"{what}: {fit.scale:.2f} x way + {fit.per_megabyte:.2f} us a MB {fit.offset:+.2f} us; {len(found)} plans "
            f"and pauses measured with commit {FITTED}: median error {100 * statistics.median(found):.0f} %, worst "
            f"{100 * max(found):.0f} %"
        )


def measured_of(p: Plan) -> str:
    """Microseconds that an H200 took for this cut of the problem, or nothing."""
    key = dict(cell=p.cell, hidden_size=p.hidden_size, batch=p.batch_size, dtype=p.dtype, units=p.units, rows=p.rows)
    key |= dict(slices=p.slices, batch_slices=p.batch_slices, warps=p.warps, waits=p.waits, pause=p.pause)
    key["pass"] = "backward" if p.backward else "forward"
    found = [r["measured_us"] for r in measured() if all(r[name] == str(value) for name, value in key.items())]
    return f"{float(found[0]):.2f}" if found else ""


def print_table(arch: int) -> None:
    """The documented plans that exchange, as Markdown."""
    columns = "plan", "programs", "MB a round", "way", "no waiting", "estimate", "measured"
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for title, plans in documented(arch).items():
        for p in plans:
            if isinstance(p, Plan) and not p.alone:
                e, way = estimate(p, arch), "backward" if p.backward else "forward"
                name = f"{p.cell} {way} H {p.hidden_size} {p.dtype} {p.precision or ''}, {title}"
                figures = f"{e.megabytes:.2f} | {e.way:.2f} | {e.alone:.2f} | {e.microseconds:.2f} | {measured_of(p)}"
                print(f"| {name} | {programs(p)} | {figures} |", flush=True)
    print_fit()


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m perf.latency", description=__doc__.splitlines()[0])
    parser.add_argument("cell", nargs="?", choices=BUILT_IN)
    parser.add_argument("hidden_size", nargs="?", type=positive)
    parser.add_argument("dtype", nargs="?", type=dtype_name, choices=DTYPES, help="or short: bf16, fp16, ...")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--batch", type=positive, default=16, help="rows (default 16)")
    parser.add_argument("--precision", choices=["tf32", "ieee"], help="of float32 products (default tf32)")
    parser.add_argument("--waits", type=positive, default=10, help="how many of the longest are shown (default 10)")
    parser.add_argument("--table", action="store_true", help="all documented plans, as Markdown")
    parser.add_argument("--fit", action="store_true", help="how well the estimate fits what was measured")
    given = parser.parse_args(arguments)
    if given.fit or given.table:
        print_table(90) if given.table else print_fit()
        return 0
    if given.dtype is None:
        parser.error("cell, hidden_size and dtype, or --table, or --fit")
    precision = (given.precision or "tf32") if given.dtype == "float32" else None
    p = plan(given.cell, given.hidden_size, given.batch, 1, given.dtype, DEVICES["h200"], given.backward, precision)
    if not isinstance(p, Plan) or p.alone:
        print(p if not isinstance(p, Plan) else f"one program alone, which waits for nobody: {p}")
        return 1
    e = estimate(p)
    print(p)
    print(
        f"a step: {e.microseconds:.2f} us by a line that was fitted to measured plans (see below); one program's own "
        f"way {e.way:.2f} us, {e.alone:.2f} with no waiting; {e.megabytes:.2f} MB in a round of polls of all programs"
        f"{f'; an H200 took {measured_of(p)} us' if measured_of(p) else ''}"
    )
    print(f"the {given.waits} longest waits of a step of {e.way:.2f} us, in nanoseconds from the instruction before:")
    for nanoseconds, text, source in waits(e.walk, given.waits):
        print(f"  {nanoseconds:6.0f}  {source:18}  {text}")
    print_fit()
    return 0


if __name__ == "__main__":
    exit_with(main)
