"""`python -m perf.measure`: all that a GPU is needed for, one thing after another, in one command of 500 seconds.

    python -m perf.measure --out perf/results/2026-12-01
    python -m perf.measure --list                          the commands, and do nothing

For a machine that is paid by the minute: the most valuable comes first, tests run in parallel, kernels are compiled in
parallel before anything is timed, and while something is timed nothing else runs. First whether results are right (the
tests marked gpu, those first that no GPU has run yet), then the core grid of the benchmark, what a call costs the host,
where a step's time goes, and with the time that is left the plan's choices and the constants of its model. One that
fails does not keep the others from running. Wrong results are never timed, so what was measured before a failure
stands.

All results lie in one folder of eight files at the most; measure.txt says what each step ended with.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from rnn_gpu.command import duration, exit_with

from . import ledger
from .compiling import JOBS


@dataclass(frozen=True)
class Step:
    """A command, the file its output goes to, and the share of the whole budget after which it is stopped. In the
    command "{seconds}" stands for the seconds that it has, less what it takes to end.
    """

    name: str
    file: str
    command: tuple[str, ...]
    share: float


def steps(out: Path) -> list[Step]:
    """All of them, in the order in which they are worth the most."""
    script = lambda name, *more: (sys.executable, "-m", f"perf.{name}", *map(str, more))
    # 582, most of which compile kernels: 161 s with 14 processes, a third of the kernels compiled before.
    tests = (sys.executable, "-m", "pytest", "-q", "-n", str(JOBS), "-m", "gpu and not slow")
    # 111 cases in two modes: 75 took 80 s on an H200 with 0.12 s for the samples, the check in float64 included.
    core = ("--modes", "inference,forward+backward", "--seconds-per-case", 0.3, "--budget", "{seconds}", "--resume")
    rows = out / "benchmark.csv"
    profiles = [
        Step(f"profile-{cell}-{size}", "profile.txt", script("profile", "--cell", cell, "--hidden-size", size), 0.08)
        for cell, size in (("lstm", 1024), ("lstm", 256), ("gru", 512))
    ]
    return [
        Step("tests", "tests.txt", tests, 0.38),
        Step("benchmark", "benchmark.txt", script("benchmark", *core, "--out", rows), 0.50),
        Step("overhead", "overhead.txt", script("overhead", "--rounds", 30), 0.06),
        *profiles,
        Step("tune", "tune.txt", script("tune", "--check", "--fit", out / "fit.json", "--budget", "{seconds}"), 1.0),
    ]


def run(step: Step, out: Path, seconds: float) -> int:
    """Run a step, its output at the end of its file -> its exit status, or 124 where it was stopped after so many
    seconds, with all processes it had started.
    """
    command = [part.replace("{seconds}", str(max(1, int(0.9 * seconds) - 5))) for part in step.command]
    with open(out / step.file, "a", encoding="utf-8") as file:
        print("$", *command, file=file, flush=True)
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return 124
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # nothing of it may run while the next one is timed
            process.wait()


def main(arguments: list[str] | None = None) -> int:
    """0 if every step ended with 0; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m perf.measure", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("perf/results/new"), help="folder for all files (default: %(default)s)")
    add("--budget", type=duration, default=500, metavar="SECONDS", help="of all steps (default: %(default)s)")
    add("--only", help="some of the steps, by name, with commas between")
    add("--list", action="store_true", help="print the commands and do nothing")
    options = parser.parse_args(arguments)
    everything = steps(options.out)
    chosen = options.only.split(",") if options.only else [step.name for step in everything]
    if unknown := set(chosen) - {step.name for step in everything}:
        names = ", ".join(step.name for step in everything)
        parser.error(f"argument --only: unknown {', '.join(sorted(unknown))}; there are {names}")
    chosen = [step for step in everything if step.name in chosen]
    if options.list:
        for step in chosen:
            most = step.share * options.budget
            print(f"{step.name:18} at most {most:5.0f} s, of what is left   {' '.join(step.command)}")
        return 0
    if not torch.cuda.is_available():
        print("No CUDA device: there is nothing to measure. --list prints the commands.", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    end, good = time.monotonic() + options.budget, True
    with open(options.out / "measure.txt", "a", encoding="utf-8") as file:

        def say(text: str) -> None:
            print(text, flush=True)
            print(text, file=file, flush=True)

        e = ledger.environment(torch.device("cuda"))
        versions = ", ".join(f"{name} {e[name] or 'none'}" for name in ("torch", "cudnn", "triton"))
        say(f"{ledger.now()} {e['device']}, {os.cpu_count()} CPUs, commit {e['commit'] or 'unknown'}, {versions}")
        for step in chosen:
            seconds = min(step.share * options.budget, end - time.monotonic())
            begin = time.monotonic()
            status = run(step, options.out, seconds) if seconds > 0 else None
            took = time.monotonic() - begin
            what = {0: "ended well", 124: "was stopped", None: "had no time left"}.get(status, f"FAILED with {status}")
            good = good and status == 0
            say(f"{step.name:18} {what} after {took:.0f} s: {options.out / step.file}")
    return 0 if good else 1


if __name__ == "__main__":
    exit_with(main)
