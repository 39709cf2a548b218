"""`python -m perf.measure`: all that a GPU is needed for, one thing after another, in one command.

    python -m perf.measure --out perf/results/2026-12-01 --budget 1700

First whether results are right (the tests marked gpu), then speed: a quick look, the plan's choices and its constants,
where a step's time goes, what a call costs, and with the time that is left the core grid of the benchmark. Each step is
a command of its own, with its output in a file of its own; one that fails does not keep the others from running. The
last lines say what each ended with. Wrong results are never timed, so what was measured before a failure stands.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Step:
    """A command, and the share of the whole budget after which it is stopped."""

    name: str
    command: tuple[str, ...]
    share: float


def steps(out: Path, budget: float) -> list[Step]:
    """All of them, in the order in which they are worth the most."""
    script = lambda name, *more: (sys.executable, "-m", f"perf.{name}", *map(str, more))
    rows = out / "benchmark.csv"
    profiles = [
        Step(f"profile-{cell}-{size}", script("profile", "--cell", cell, "--hidden-size", size), 0.04)
        for cell, size in (("lstm", 1024), ("lstm", 128), ("gru", 512))
    ]
    return [
        Step("tests", (sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow"), 0.30),
        Step("quick", script("benchmark", "--quick", "--out", rows, "--budget", int(0.10 * budget)), 0.12),
        Step("overhead", script("overhead"), 0.03),
        *profiles,
        Step("tune", script("tune", "--check", "--fit", out / "fit.json", "--budget", int(0.18 * budget)), 0.20),
        Step("core", script("benchmark", "--out", rows, "--resume", "--budget", int(0.18 * budget)), 0.20),
    ]


def run(step: Step, out: Path, seconds: float) -> int:
    """Run a step, its output in `<name>.txt` -> its exit status, or 124 where it was stopped after so many seconds."""
    with open(out / f"{step.name}.txt", "w", encoding="utf-8") as file:
        print(*step.command, file=file, flush=True)
        try:
            return subprocess.run(step.command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            return 124


def main(arguments: list[str] | None = None) -> int:
    """0 if every step ended with 0; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m perf.measure", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("perf/results/new"), help="folder for all files (default: %(default)s)")
    add("--budget", type=float, default=1700, metavar="SECONDS", help="of all steps (default: %(default)s)")
    add("--only", help="some of the steps, by name, with commas between")
    add("--list", action="store_true", help="print the commands and do nothing")
    options = parser.parse_args(arguments)
    everything = steps(options.out, options.budget)
    chosen = options.only.split(",") if options.only else [step.name for step in everything]
    if unknown := set(chosen) - {step.name for step in everything}:
        names = ", ".join(step.name for step in everything)
        parser.error(f"argument --only: unknown {', '.join(sorted(unknown))}; there are {names}")
    chosen = [step for step in everything if step.name in chosen]
    if options.list:
        for step in chosen:
            print(f"{step.name:18} at most {step.share * options.budget:5.0f} s   {' '.join(step.command)}")
        return 0
    if not torch.cuda.is_available():
        print("No CUDA device: there is nothing to measure. --list prints the commands.", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    end, good = time.monotonic() + options.budget, True
    for step in chosen:
        seconds = min(step.share * options.budget, end - time.monotonic())
        begin = time.monotonic()
        status = run(step, options.out, seconds) if seconds > 0 else None
        took = time.monotonic() - begin
        what = {0: "ended well", 124: "was stopped", None: "had no time left"}.get(status, f"FAILED with {status}")
        good = good and status == 0
        print(f"{step.name:18} {what} after {took:.0f} s: {options.out / (step.name + '.txt')}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
