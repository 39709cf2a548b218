"""`python -m perf.benchmark`: this library and its peers side by side, in one process and in turns.

    python -m perf.benchmark --quick                      a look, less than three minutes
    python -m perf.benchmark                              the core grid, which ratios are quoted on
    python -m perf.benchmark --grid full --resume --budget 3600 --only cell=lstm --only dtype=bfloat16,float16

For each case and mode every provider computes the same layer from the same weights and input. First each result is
compared with torch.nn's in float64 by the rule of the tests (tests/tolerances.py): a wrong one is not timed. Then all
are called in turns, so that a change of clock or temperature meets all alike. Rows are appended to a CSV file (see
ledger.py) as they are measured; docs/performance.md says how to read them.

On a GPU times are those between CUDA events, queued behind a short sleep of the device so that Python's own time is
hidden wherever it can be. With no GPU it times PyTorch's own kernels twice, once through this library, and says so.
"""

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import rnn_gpu
from rnn_gpu import backends
from rnn_gpu.command import duration, exit_with, positive, present

# The rule and its numbers are those of the tests; only the norms are taken on the device, where the tensors are large.
from tests.tolerances import EPS, FLOOR_EPS, PEER_FACTOR

from . import cases as grids
from . import compiling, ledger
from .cases import MODES, Case
from .providers import DEFAULT_PROVIDERS, PROVIDERS, Candidate, Unavailable, float32_precision, interpreted, torch_layer

WARM_UP_SECONDS = 0.2  # after the first call: clocks rise, caches and allocator settle
WARM_UP_CALLS = 3
SAMPLE_SECONDS = 8e-3  # a sample has as many calls as take this long: all but the first queue while others run
LEAST_SAMPLES = 5  # fewer give no row
SLEEP_CYCLES = 1_000_000  # half a millisecond, in which Python queues the first calls of a sample
CHECK_SHARE = 0.25  # of the free memory, for the check; longer sequences are checked on their first steps


class Wrong(Exception):
    """A result that the rule does not allow."""


class OutOfTime(Exception):
    """The budget ended."""


@dataclass
class Clock:
    """A budget in seconds, from now on."""

    seconds: float

    def __post_init__(self):
        self.start = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.start)

    def check(self) -> None:
        """OutOfTime where nothing is left."""
        if self.left <= 0:
            raise OutOfTime


@dataclass
class Problem:
    """The data of a case, the same for every provider: weights, input, and the gradient of the output."""

    case: Case
    weights: torch.nn.RNNBase
    input: Tensor
    d_output: Tensor

    @classmethod
    def draw(cls, case: Case, device: torch.device, seed: int = 0) -> "Problem":
        """Weights as torch.nn draws them, input and gradient from a normal distribution."""
        dtype = getattr(torch, case.dtype)
        torch.manual_seed(seed)
        weights = torch_layer(case, device, dtype)
        shape = case.time, case.batch_size
        input = torch.randn(*shape, case.hidden_size, device=device, dtype=dtype)
        d_output = torch.randn(*shape, case.hidden_size * case.directions, device=device, dtype=dtype)
        return cls(case, weights, input, d_output)

    def first(self, steps: int) -> "Problem":
        """The problem with only the first steps."""
        return Problem(self.case, self.weights, self.input[:steps], self.d_output[:steps])


def results(candidate: Candidate, problem: Problem, mode: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """What a call gives, by name and in torch.nn's layout: the output and, with the backward, every gradient."""
    call = prepared(candidate, problem, mode, dtype)
    found = call()
    names = ["output", "gradient of input", *(f"gradient of {name}" for name in candidate.parameters)]
    found = dict(zip(names, found, strict=False))
    for name in names[:2]:
        if candidate.batch_first and name in found:
            found[name] = found[name].transpose(0, 1)
    return {name: tensor.detach() for name, tensor in found.items()}


def prepared(
    candidate: Candidate, problem: Problem, mode: str, dtype: torch.dtype | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """The call that is timed, a function of no arguments. What it needs is laid out before, as the candidate wants
    it.
    """
    dtype = dtype or problem.input.dtype
    input, d_output = problem.input.to(dtype), problem.d_output.to(dtype)
    if candidate.batch_first:
        input, d_output = input.transpose(0, 1).contiguous(), d_output.transpose(0, 1).contiguous()
    if mode == "inference":

        def call():
            with torch.no_grad():
                return (candidate.call(input),)

        return call
    input = input.detach().requires_grad_()
    if mode == "forward":
        return lambda: (candidate.call(input),)
    leaves = [input, *candidate.parameters.values()]

    def call():
        output = candidate.call(input)
        if output.shape != d_output.shape:
            raise Wrong(f"the output is {tuple(output.shape)}, expected {tuple(d_output.shape)}")
        return output, *torch.autograd.grad(output, leaves, d_output)

    return call


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor.double()).item()


def errors(problem: Problem, oracle: dict[str, Tensor], peer: dict[str, Tensor]) -> Callable:
    """A function from results to the largest error over the allowed one, and the name of the tensor that has it."""
    eps = EPS[problem.input.dtype]
    allowed = {}
    for name, expected in oracle.items():
        distance = _norm(peer[name].double() - expected)
        allowed[name] = max(PEER_FACTOR * distance, FLOOR_EPS * eps * _norm(expected))

    def largest(found: dict[str, Tensor]) -> tuple[float, str]:
        ratios = []
        for name, expected in oracle.items():
            if name not in found or found[name].shape != expected.shape:
                return math.inf, f"{name}, which is missing or has another shape"
            error = _norm(found[name].double() - expected)
            # Not finite on either side is never right: a peer that overflowed must not allow everything.
            fine = math.isfinite(error) and math.isfinite(allowed[name]) and allowed[name] > 0
            ratios.append((error / allowed[name] if fine else math.inf, name))
        return max(ratios)

    return largest


def checked_steps(case: Case, device: torch.device, mode: str) -> int:
    """T of the check: all of it, or as many steps as a float64 layer and three results have room for."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = 1 << 30
    values = case.batch_size * case.hidden_size * case.directions * (6 * case.layers + 12)
    if mode == "inference":
        values = case.batch_size * case.hidden_size * case.directions * (case.layers + 8)
    return max(1, min(case.time, int(CHECK_SHARE * free / (8 * values))))


def device_seconds(call: Callable, calls: int, flush: Tensor | None = None) -> float:
    """Seconds of one call on the GPU, the mean of `calls` in a row. flush: larger than the cache, written before."""
    if flush is not None:
        flush.zero_()
    if hasattr(torch.cuda, "_sleep"):
        torch.cuda._sleep(SLEEP_CYCLES)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


class Session:
    """One run of the benchmark: the device, how long things may take, and where rows go."""

    def __init__(self, device: torch.device, options: argparse.Namespace, clock: Clock, providers: dict):
        self.device, self.options, self.clock, self.providers = device, options, clock, providers
        self.gpu = device.type == "cuda"
        self.wrong: list[str] = []  # who was, where and how
        self.precision = options.float32_precision if self.gpu else "ieee"
        self.environment = ledger.environment(device)
        self.plan_device = backends.device_of(device) if self.gpu else None
        self.flush = None
        if options.flush_l2 and self.gpu:
            self.flush = torch.empty(2 * self.plan_device.l2_bytes, dtype=torch.int8, device=device)

    def precision_of(self, case: Case) -> str:
        """How float32 products are made, "" for other types."""
        return self.precision if case.dtype == "float32" else ""

    # ---- Is it right? ----

    def judge(self, problem: Problem, mode: str) -> tuple[Callable, int]:
        """The rule for a problem, as `errors` gives it, and T of the check."""
        steps = checked_steps(problem.case, self.device, mode)
        part = problem.first(steps)
        exact = torch_layer(problem.case, self.device, torch.float64)
        exact.load_state_dict({name: value.double() for name, value in problem.weights.state_dict().items()})
        oracle = results(
            Candidate(lambda x: exact(x)[0], dict(exact.named_parameters()), "float64"), part, mode, torch.float64
        )
        peer = results(PROVIDERS["torch.nn"].candidate(problem.weights, problem.case), part, mode)
        return errors(part, oracle, peer), steps

    # ---- How fast is it? ----

    def seconds(self, call: Callable, calls: int) -> float:
        """Seconds of one call, the mean of `calls` in a row."""
        if self.gpu:
            return device_seconds(call, calls, self.flush)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    def peak_bytes(self, call: Callable) -> int | None:
        """Most memory that a call takes beyond what is there before it."""
        if not self.gpu:
            return None
        gc.collect()
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def warmed_up(self, call: Callable) -> int:
        """Call until warm; how many calls make a sample."""
        start, took = time.monotonic(), []
        least = min(WARM_UP_SECONDS, self.options.seconds_per_case)
        while len(took) < WARM_UP_CALLS or time.monotonic() - start < least:
            self.clock.check()
            took.append(self.seconds(call, 1))
        if self.flush is not None:  # only the first of several calls would meet a cold cache
            return 1
        return max(1, min(100, math.ceil(SAMPLE_SECONDS / max(min(took), 1e-7))))

    def in_turns(self, timed: dict[str, Callable], calls: dict[str, int]) -> dict[str, list[float]]:
        """Seconds of each provider, a sample of each in every round, another one first in each."""
        samples = {name: [] for name in timed}
        names = list(timed)
        start = time.monotonic()
        for number in range(self.options.rounds):
            if number >= LEAST_SAMPLES and (
                self.clock.left <= 0 or time.monotonic() - start > self.options.seconds_per_case
            ):
                break
            if number < LEAST_SAMPLES:
                self.clock.check()
            for name in names[number % len(names) :] + names[: number % len(names)]:
                samples[name].append(self.seconds(timed[name], calls[name]))
        return samples

    # ---- One case ----

    def measure(self, case: Case, mode: str, say: Callable[[str], None]) -> list[ledger.Row]:
        """The rows of a case in one mode. Who is wrong or unavailable is said, and has none."""
        with float32_precision(self.precision):
            problem = Problem.draw(case, self.device)
            try:
                judge, steps = self.judge(problem, mode)
            except RuntimeError as error:  # also out of memory, which is one
                say(f"left out, torch.nn cannot compute it here: {one_line(error)}")
                return []
            part, found = problem.first(steps), {}
            for name, provider in self.providers.items():
                self.clock.check()
                try:
                    candidate = provider.candidate(problem.weights, case)
                    error, where = judge(results(candidate, part, mode))
                    rnn_gpu.check()
                    if not error <= 1:
                        raise Wrong(f"{where} has {error:.3g} times the allowed error")
                    call = prepared(candidate, problem, mode)
                    calls = self.warmed_up(call)
                    found[name] = call, calls, candidate.detail, error
                except (OutOfTime, KeyboardInterrupt):
                    raise
                except Unavailable as reason:
                    say(f"{name}: not available: {reason}")
                except Wrong as reason:
                    self.wrong.append(f"{name}, {case}, {mode}: {reason}")
                    say(f"{name}: WRONG, not timed: {reason}")
                except Exception as error:  # whatever a provider raises is its own affair, and is said
                    say(f"{name}: not available: {type(error).__name__}: {one_line(error)}")
                    if name in ledger.OURS:  # what our kernels cannot serve they say in advance: this is a failure
                        self.wrong.append(f"{name}, {case}, {mode}: {type(error).__name__}: {one_line(error)}")
            samples = self.in_turns(
                {name: f[0] for name, f in found.items()}, {name: f[1] for name, f in found.items()}
            )
            rows = []
            for name, (call, calls, detail, error) in found.items():
                output = call()[0]
                if not output.isfinite().all():
                    self.wrong.append(f"{name}, {case}, {mode}: not finite after timing")
                    say(f"{name}: WRONG, no row: its output is not finite after timing")
                    continue
                del output
                times = [s * 1e6 for s in samples[name]]
                rows.append(self.row(case, mode, name, detail, calls, times, self.peak_bytes(call), error, steps))
            rnn_gpu.check()
            return rows

    def row(self, case, mode, name, detail, calls, times, peak, error, steps) -> ledger.Row:
        """A line of the ledger from the times of a call in microseconds."""
        low, high = quantile(times, ledger.LOW), quantile(times, ledger.HIGH)
        median = statistics.median(times)
        floor = None
        if self.plan_device is not None:
            floor = grids.floor(case, mode, self.plan_device, self.precision_of(case))
        shape = {field: getattr(case, field) for field in Case.__dataclass_fields__}
        return ledger.Row(
            **self.environment, **shape,
            measured=ledger.now(), provider=name, version=self.providers[name].version(), detail=detail,
            precision=self.precision_of(case), mode=mode, clock="CUDA events" if self.gpu else "wall clock",
            cache="flushed" if self.flush is not None else "warm",
            samples=len(times), calls=calls, median_us=median, low_us=low, high_us=high, least_us=min(times),
            step_us=median / case.time, tflops=grids.flops(case, mode) / median / 1e6, peak_bytes=peak,
            error=error, checked_time=steps, floor_us=None if floor is None else floor.microseconds,
        )  # fmt: skip


def one_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def quantile(values: list[float], share: float) -> float:
    """The value below which a share of the values lies, interpolated."""
    values, place = sorted(values), share * (len(values) - 1)
    lower = int(place)
    upper = min(lower + 1, len(values) - 1)
    return values[lower] + (place - lower) * (values[upper] - values[lower])


HEADER = (
    f"{'provider':15} {'by':28} {'us/step':>8} {'10 %':>8} {'90 %':>8} {'TFLOP/s':>8} {'of floor':>8} {'MiB':>8} "
    f"{'error':>6} {'against torch.nn':>16}"
)


def line(row: ledger.Row, reference: ledger.Row | None) -> str:
    """A row as it is printed. reference: torch.nn's, timed in the same turns."""
    of_floor = "" if row.floor_us is None else f"{row.floor_us / row.step_us:7.0%}"
    memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
    ratio = "" if reference is None else f"{reference.median_us / row.median_us:.2f} x"
    return (
        f"{row.provider:15} {row.detail:28} {row.step_us:8.3f} {row.low_us / row.time:8.3f} "
        f"{row.high_us / row.time:8.3f} {row.tflops:8.2f} {of_floor:>8} {memory:>8} {row.error:6.2f} {ratio:>16}"
    )


def progress(iterable, total: int, unit: str):
    """`iterable` with a progress bar on a terminal, by tqdm where it is installed; and how to print beside it."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iterable, print
    return tqdm(iterable, total=total, unit=unit, disable=None), tqdm.write


def expected_rows(path: Path) -> dict[tuple, set[str]]:
    """What a file has: for each case, mode and way of timing, the identities of its rows."""
    found = {}
    for row in ledger.read(path):
        found.setdefault(row.case_key, set()).add(row.same_key)
    return found


def is_there(have: dict, session: Session, case: Case, mode: str) -> bool:
    """Whether a case has been measured by this very code, with the same versions of everything.

    Asked of the providers that are ours and of torch.nn: another one may have nothing to give for this case.
    """
    environment = session.environment
    cache = "flushed" if session.flush is not None else "warm"
    case_key = (environment["device"], *case.key, session.precision_of(case), mode, cache)
    versions = tuple(environment[name] for name in ("torch", "cuda", "cudnn", "triton"))
    wanted = set()
    for name in [n for n in session.providers if n in (*ledger.OURS, "torch.nn")]:
        sources = environment["sources"] if name in ledger.OURS else ""
        wanted.add((*case_key, name, *versions, session.providers[name].version(), sources))
    return bool(wanted) and wanted <= have.get(case_key, set())


def introduce(session: Session, work: int, out: Path | None) -> str:
    """What will be measured and how."""
    e = session.environment
    versions = f"rnn_gpu {rnn_gpu.__version__}, commit {e['commit'] or 'unknown'}, torch {e['torch']}"
    versions += f", Triton {e['triton'] or 'none'}"
    text = [f"{e['device']}; {versions}" + (f", CUDA {e['cuda']}, cuDNN {e['cudnn']}" if session.gpu else "")]
    if session.gpu:
        cache = "warm" if session.flush is None else "flushed"
        text.append(f"float32 products: {session.precision}; second-level cache: {cache}")
        text.append("The floor is an estimate from published figures of the device: see docs/performance.md.")
    else:
        text.append(
            "No CUDA device: this times PyTorch's own CPU kernels (ATen), called directly and through rnn_gpu.\n"
            "It shows that the benchmark works, and says nothing about rnn_gpu's kernels."
        )
    where = f"rows go to {out}" if out is not None else "nothing is written (no --out)"
    text.append(f"{work} cases and modes, at most {session.options.budget:.0f} s; {where}.")
    return "\n".join(text)


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.benchmark",
        description="Time rnn_gpu and its peers side by side, after checking that their results are right.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a few cases, less than three minutes")
    add("--grid", choices=grids.GRIDS, help="default: core on a GPU, tiny on a CPU")
    add(
        "--only",
        action="append",
        default=[],
        metavar="NAME=V[,V...]",
        help="cases with these values: cell, dtype, H, B, T, layers, directions",
    )
    add("--modes", default="inference,forward,forward+backward", help="some of: %(default)s")
    add("--providers", help=f"some of: {', '.join(PROVIDERS)}")
    add("--out", type=Path, help="CSV file to append to (default on a GPU: perf/results/<device>.csv; on a CPU: none)")
    add("--resume", action="store_true", help="leave out what the file has from this very code and these versions")
    add("--budget", type=duration, metavar="SECONDS", help="stop cleanly after so long (default: 3600; --quick 170)")
    add("--rounds", type=positive, default=30, help="samples of each provider, at most (default: %(default)s)")
    add(
        "--seconds-per-case",
        type=duration,
        default=5.0,
        help="for the samples of a case and mode (default: %(default)s)",
    )
    add(
        "--jobs",
        type=positive,
        default=compiling.JOBS,
        help="on a GPU: processes that compile kernels before anything is timed (default here: %(default)s)",
    )
    add("--flush-l2", action="store_true", help="empty the second-level cache before every call")
    add(
        "--float32-precision",
        choices=("tf32", "ieee"),
        default="tf32",
        help="of all float32 products (default: %(default)s)",
    )
    add(
        "--device",
        type=present,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where",
    )
    options = parser.parse_args(arguments)
    small = "quick" if options.quick else "core"
    options.grid = options.grid or (small if options.device.type == "cuda" else "tiny")
    options.budget = options.budget or (170 if options.quick else 3600)
    options.modes = options.modes.split(",")
    if unknown := [mode for mode in options.modes if mode not in MODES]:
        parser.error(f"argument --modes: unknown {', '.join(unknown)}; there are {', '.join(MODES)}")
    names = options.providers.split(",") if options.providers else DEFAULT_PROVIDERS
    if unknown := [name for name in names if name not in PROVIDERS]:
        parser.error(f"argument --providers: unknown {', '.join(unknown)}; there are {', '.join(PROVIDERS)}")
    options.providers = list(names)
    if options.rounds < LEAST_SAMPLES:
        parser.error(f"argument --rounds: at least {LEAST_SAMPLES}")
    return options


def default_file(device: torch.device) -> Path | None:
    """Where rows go: the ledger of the device; for a CPU, whose rows tell nothing about the kernels, nowhere."""
    if device.type != "cuda":
        return None
    return ledger.RESULTS / f"{ledger.slug(torch.cuda.get_device_name(device))}.csv"


def summary(rows: list[ledger.Row]) -> str:
    """Geometric means of how many times as fast as torch.nn the first provider of ours was, for each mode."""
    lines = []
    by_case = {}
    for row in rows:
        by_case.setdefault(row.case_key, {})[row.provider] = row
    for mode in MODES:
        for name in ledger.OURS:
            pairs = [p for p in by_case.values() if name in p and "torch.nn" in p and p[name].mode == mode]
            if pairs:
                ratios = [p["torch.nn"].median_us / p[name].median_us for p in pairs]
                mean = statistics.geometric_mean(ratios)
                what = f"{name} ({pairs[0][name].detail}) against torch.nn ({pairs[0]['torch.nn'].detail})"
                spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
                lines.append(
                    f"{what}, {mode}: {mean:.2f} times as fast, geometric mean of {len(ratios)} cases, {spread}"
                )
    return "\n".join(lines)


def run(options: argparse.Namespace, providers: dict | None = None) -> int:
    """Measure what the options ask for; 1 if a result was wrong. providers: others than the usual ones, for tests."""
    providers = providers or {name: PROVIDERS[name] for name in options.providers}
    chosen = grids.selected(grids.GRIDS[options.grid](), options.only)
    out = options.out or default_file(options.device)
    session = Session(options.device, options, Clock(options.budget), providers)
    have = expected_rows(out) if options.resume and out is not None else {}
    work = [(case, mode) for case in chosen for mode in options.modes if not is_there(have, session, case, mode)]
    print(introduce(session, len(work), out))
    writer = ledger.Writer(out) if out is not None else None
    if session.gpu:
        ours = [name for name in session.providers if name in (*ledger.OURS, "lean")]
        tasks = [
            (compiling.case, case, mode, session.precision, name, str(options.device))
            for case, mode in work for name in ours
        ]  # fmt: skip
        took = compiling.in_parallel(tasks, options.jobs, min(compiling.SECONDS, session.clock.left / 2))
        print(f"Compiled in {took:.0f} s, in {options.jobs} process(es).", flush=True)
    measured, done, before = [], 0, None
    steps, say = progress(work, len(work), "case")
    try:
        for case, mode in steps:
            session.clock.check()
            if before is None:
                say(f"\n{HEADER}")
            say(f"{case}, {mode}")
            before = case
            rows = session.measure(case, mode, lambda text: say(f"  {text}"))
            reference = next((row for row in rows if session.gpu and row.provider == "torch.nn"), None)
            for row in rows:
                say(f"  {line(row, reference)}")
                if writer is not None:
                    writer.write(row)
            measured += rows
            done += 1
            if session.gpu:
                torch.cuda.empty_cache()  # a case must not find the memory of the one before
    except OutOfTime:
        say(
            f"\nThe budget of {options.budget:.0f} s has ended: {done} of {len(work)} done. --resume goes on from here."
        )
    except KeyboardInterrupt:
        say(f"\nInterrupted: {done} of {len(work)} done. --resume goes on from here.")
    print(f"\n{len(measured)} rows measured.")
    if session.gpu:  # on a CPU both sides run the same kernels: a ratio would be noise
        print(summary(measured))
    for what in session.wrong:
        print(f"WRONG: {what}", file=sys.stderr)
    return 1 if session.wrong else 0


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    if interpreted():
        print("TRITON_INTERPRET=1 is set: the interpreter's times mean nothing. Unset it.", file=sys.stderr)
        return 2
    options = read_options(arguments)
    try:
        return run(options)
    except ValueError as error:  # a condition of --only, or a file that is no ledger
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    exit_with(main)
