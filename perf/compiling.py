"""Kernels compiled in parallel, before anything is timed.

A kernel takes one core seconds to compile. A machine that is paid by the minute must not wait for one after another,
and nothing else may run while something is timed. So a script hands over all that it will launch: processes of their
own launch each on a few steps, which leaves the compiled kernel in Triton's cache on the disk, and have ended before
the first measurement.
"""

import dataclasses
import multiprocessing
import os
import sys
import time

import torch

from rnn_gpu.kernels.plan import Plan

from .cases import Case

STEPS = 2  # of time: no kernel is compiled for a length
JOBS = max(1, min(14, (os.cpu_count() or 1) - 2))  # each holds a PyTorch and a context on the GPU
SECONDS = 120.0  # then what is not compiled yet will be when it is launched


def case(one: Case, mode: str, precision: str, provider: str, device: str) -> None:
    """Call a case as the benchmark does, on a few steps."""
    from .benchmark import Problem, prepared
    from .providers import PROVIDERS, float32_precision

    one = dataclasses.replace(one, time=STEPS)
    with float32_precision(precision):
        problem = Problem.draw(one, torch.device(device))
        prepared(PROVIDERS[provider].candidate(problem.weights, one), problem, mode)()


def plan(p: Plan, stage: str | None, precision: str, device: str) -> None:
    """Launch a plan's kernel on a few steps: as it is, or a variant of it (variants.py)."""
    from . import variants
    from .providers import float32_precision
    from .tune import drawn

    with float32_precision(precision):
        data = drawn(p, STEPS, torch.device(device))
        with variants.variant(stage, p):
            data.run(p, save=stage != "stores")


def _one_thread() -> None:
    torch.set_num_threads(1)


def _can_start_processes() -> bool:
    """Whether a process can be started: each runs the file of the main script again, and one that is read from standard
    input has none. (A pool would start them anew for ever.)
    """
    main = sys.modules["__main__"]
    path = None if main.__spec__ else getattr(main, "__file__", None)  # `python -m` and `python -c` need no file
    return path is None or os.path.exists(path)


def in_parallel(tasks: list[tuple], jobs: int = JOBS, seconds: float = SECONDS) -> float:
    """Run tasks, each a function of this module and its arguments, in processes of their own, for so many seconds at
    the most -> the seconds it took. What fails, fails again where it is launched in earnest, and is told there.
    """
    begin = time.monotonic()
    if tasks and jobs > 1 and not _can_start_processes():
        print("Kernels are compiled one after another: a script on standard input has no file for the processes that "
            "would compile them. Put it into a file.", file=sys.stderr)  # fmt: skip
    elif tasks and jobs > 1:
        context = multiprocessing.get_context("spawn")  # CUDA does not live through a fork
        with context.Pool(min(jobs, len(tasks)), _one_thread) as pool:  # which is terminated at the end
            for result in [pool.apply_async(function, arguments) for function, *arguments in tasks]:
                result.wait(max(0.0, begin + seconds - time.monotonic()))
        pool.join()
    return time.monotonic() - begin
