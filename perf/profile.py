"""`python -m perf.profile`: where the time of one layer goes.

    python -m perf.profile --cell lstm --dtype bfloat16 --hidden-size 1024 --batch-size 16 --time 512
    python -m perf.profile --trace trace.json            on a GPU: also a trace for https://ui.perfetto.dev
    python -m perf.profile --only-run 5                  on a GPU: nothing but calls, for ncu and nsys

On a GPU: the split of a training step into input product, fill, recurrence, gradients; then the split of a time step
of the recurrence, by variants of the kernel that leave a stage out (variants.py). With no GPU: the same split of a time
step counted in the machine code, compiled for the GPU named by --device: instructions, not time.
"""

import argparse
import statistics
import sys

import torch

import rnn_gpu
from rnn_gpu import backends
from rnn_gpu.command import exit_with, known_gpu, positive
from rnn_gpu.dtypes import dtype_name
from rnn_gpu.equations import BUILT_IN
from rnn_gpu.kernels.cudnn import cudnn_microseconds
from rnn_gpu.kernels.plan import DEVICES, Plan
from rnn_gpu.kernels.spec import DTYPES

from . import compiling
from .benchmark import Problem, device_seconds, prepared
from .cases import Case
from .providers import PROVIDERS, float32_precision, interpreted

# Machine instructions by what they are for; the rest is addresses, masks and control.
KINDS = {
    "matrix instructions": None,  # those of resources.TENSOR_CORE
    "polls": ("LDG",),
    "shared memory": ("LDS", "LDSM", "STS"),
    "barriers": ("BAR",),
    "shuffles": ("SHFL",),
    "exponentials, reciprocals": ("MUFU",),
    "float32 arithmetic": ("FFMA", "FADD", "FMUL", "FSEL", "FMNMX", "FSETP"),
    "conversions": ("F2F", "F2FP", "PRMT", "HADD2", "I2F", "F2I"),
    "stores": ("STG",),
}
ITERATIONS = 20


def plans_of(case: Case, device, precision: str | None) -> list[Plan]:
    """The plans of both passes; ValueError where there is none."""
    found = []
    for backward in (False, True):
        p = backends.planning.cached_plan(
            case.cell, case.hidden_size, case.batch_size, case.directions, case.dtype, device, backward, precision
        )
        if isinstance(p, str):
            raise ValueError(f"no plan: {p}")
        found.append(p)
    return found


# ---- With no GPU: machine code ------------------------------------------------------------------------------------


def static_split(p: Plan, arch: int) -> str:
    """What a warp issues in a time step of a plan's kernel, by kind, and what leaving out a stage saves."""
    from rnn_gpu.kernels import machine_code

    from . import resources, variants

    whole = resources.compile_plan(p, arch)
    lines = [
        f"{'backward' if p.backward else 'forward'}: {p}",
        f"  {whole.count()} instructions of a warp in a time step, {whole.registers} registers, {whole.shared} bytes "
        f"of shared memory{'; ' + whole.problem if whole.problem else ''}",
    ]
    left = whole.count()
    for kind, names in KINDS.items():
        count = whole.count(*(names or resources.TENSOR_CORE))
        if kind == "polls":  # the other loads bring the input part, or what the forward has saved
            polls = sum(map(machine_code.is_poll, whole.step))
            lines += [f"    {'polls':28}{polls:6}", f"    {'other loads':28}{count - polls:6}"]
        else:
            lines.append(f"    {kind:28}{count:6}")
        left -= count
    lines.append(f"    {'the rest':28}{left:6}")
    lines.append("  left out, instructions fewer:")
    for stage in variants.of(p):
        if stage == "wait":
            continue  # takes time and no instruction
        with variants.variant(stage, p):
            after = resources.compile_plan(p, arch).count()
        lines.append(f"    {stage:12}{whole.count() - after:6}   ({variants.VARIANTS[stage]})")
    return "\n".join(lines)


def without_gpu(case: Case, name: str, arch: int, precision: str | None) -> int:
    """The whole report where there is no GPU."""
    device = DEVICES[name]
    print(
        f"No CUDA device: no time is measured here. What follows is counted in the machine code for sm_{arch}, compiled"
    )
    print(f"offline with the plan for {device.name}. A wait has no length in it, and an instruction no duration.\n")
    for p in plans_of(case, device, precision):
        print(static_split(p, arch))
        print(
            f"  the plan's model, an estimate that nothing has confirmed: {p.microseconds:.2f} us a step; "
            f"cuDNN {cudnn_microseconds(p, device):.2f}\n"
        )
    return 0


# ---- With a GPU ---------------------------------------------------------------------------------------------------


def part_of(kernel: str) -> str:
    """What a GPU kernel is for, by its name."""
    lower = kernel.lower()
    if kernel in ("forward", "backward"):  # Triton gives a kernel the name of its function
        return f"recurrence {kernel}"
    if kernel in ("prepare_forward", "prepare_backward"):
        return "fill of the buffers, and what else is prepared"
    if any(word in lower for word in ("gemm", "cutlass", "xmma", "nvjet", "cublas", "splitk")):
        return "products"
    if "fill" in lower or "memset" in lower:
        return "fill"
    if "reduce" in lower:
        return "sums (gradients of biases)"
    return "copies and others"


def kernel_microseconds(profile, calls: int) -> dict[str, float]:
    """Microseconds of a call by part, from a profiler's events."""
    parts = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            part = part_of(event.name)
            parts[part] = parts.get(part, 0.0) + event.device_time / calls
    return parts


def profiled(call, calls: int = 5, trace: str | None = None) -> dict[str, float]:
    """Microseconds of a call by part; the trace is written there too."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    # acc_events: without it the profiler warns that it would forget the events of cycles, which nobody asks for here
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as found:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    if trace:
        found.export_chrome_trace(trace)
    return kernel_microseconds(found, calls)


def split_of_a_call(case: Case, problem: Problem, trace: str | None) -> str:
    """Where the time of a training step goes: forward alone tells the input product from those of the gradients."""
    candidate = PROVIDERS["rnn_gpu"].candidate(problem.weights, case)
    forward = profiled(prepared(candidate, problem, "forward"))
    both = profiled(prepared(candidate, problem, "forward+backward"), trace=trace)
    rows = {"input product": forward.pop("products", 0.0)}
    rows["products of the gradients (weights, input, states)"] = both.pop("products", 0.0) - rows["input product"]
    rows |= both
    total = sum(rows.values())
    lines = [f"Forward and backward, {total / case.time:.3f} us a step in kernels ({total:.0f} us a call):"]
    for part, microseconds in sorted(rows.items(), key=lambda item: -item[1]):
        lines.append(f"  {part:52}{microseconds / case.time:9.3f} us a step {microseconds / total:6.1%}")
    return "\n".join(lines)


def stages_of(p: Plan) -> list[str | None]:
    """The kernels that tell what the stages of a plan's step take: as it is, with one left out, in another way."""
    from . import variants

    return [None, *variants.of(p), *variants.alternatives(p)]


def split_of_a_step(case: Case, p: Plan, device: torch.device) -> str:
    """What each stage of a time step takes: the kernel as it is, and with one stage left out, in turns."""
    from . import variants
    from .tune import Recurrence

    data, stages = Recurrence.draw(p, case.time, device), stages_of(p)
    times = {stage: [] for stage in stages}
    for number in range(ITERATIONS + 2):  # the first two compile and warm up
        for stage in stages:
            with variants.variant(stage, p):
                took = device_seconds(lambda stage=stage: data.run(p, save=stage != "stores"), 3)
            if number >= 2:
                times[stage].append(took * 1e6 / case.time)
    medians = {stage: statistics.median(values) for stage, values in times.items()}
    lines = [
        f"Recurrence {'backward' if p.backward else 'forward'}, with fill and launch: {medians[None]:.3f} us a step",
        f"  {p}",
        "  A stage left out, microseconds a step fewer (stages overlap: they need not add up):",
    ]
    for stage in variants.of(p):
        fewer = medians[None] - medians[stage]
        lines.append(f"    {stage:12}{fewer:8.3f}  {fewer / medians[None]:6.1%}   ({variants.VARIANTS[stage]})")
    for way in variants.alternatives(p):
        fewer = medians[None] - medians[way]
        lines.append(f"  In another way: {fewer:8.3f}  {fewer / medians[None]:6.1%}   ({variants.ALTERNATIVES[way]})")
    return "\n".join(lines)


def with_gpu(case: Case, options: argparse.Namespace, precision: str | None) -> int:
    """The whole report on a GPU."""
    device = torch.device("cuda")
    with float32_precision(options.float32_precision):
        problem = Problem.draw(case, device)
        if options.only_run:
            call = prepared(PROVIDERS["rnn_gpu"].candidate(problem.weights, case), problem, "forward+backward")
            for _ in range(options.only_run):
                call()
            rnn_gpu.check()
            return 0
        plans = plans_of(case, backends.device_of(device), precision)
        tasks = [(compiling.case, case, "forward+backward", options.float32_precision, "rnn_gpu", str(device))]
        tasks += [
            (compiling.plan, p, stage, options.float32_precision, str(device)) for p in plans for stage in stages_of(p)
        ]
        compiling.in_parallel(tasks, options.jobs)
        print(f"{case} on {torch.cuda.get_device_name()}\n")
        print(split_of_a_call(case, problem, options.trace))
        if options.trace:
            print(f"  trace: {options.trace}")
        for p in plans:
            print("\n" + split_of_a_step(case, p, device))
        rnn_gpu.check()
    print("\nMore, with NVIDIA's Nsight Compute:\n  " + ncu(case, options))
    return 0


def ncu(case: Case, options: argparse.Namespace) -> str:
    """A command line for Nsight Compute, ready to copy: the two kernels of the third call, warm."""
    shape = f"--cell {case.cell} --dtype {case.dtype} --hidden-size {case.hidden_size} --batch-size {case.batch_size}"
    more = f"--time {case.time} --directions {case.directions} --float32-precision {options.float32_precision}"
    return (
        'ncu --set full --import-source yes --kernel-name "regex:^(forward|backward)$" --launch-skip 4 '
        f"--launch-count 2 -o rnn_gpu python -m perf.profile {shape} {more} --only-run 3"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m perf.profile", description="Where the time of a layer goes.")
    add = parser.add_argument
    add("--cell", choices=BUILT_IN, default="lstm", help="(default: %(default)s)")
    add("--dtype", type=dtype_name, choices=DTYPES, default="bfloat16", help="or fp16, ... (default: %(default)s)")
    add("--hidden-size", type=positive, default=1024, metavar="H", help="(default: %(default)s)")
    add("--batch-size", type=positive, default=16, metavar="B", help="(default: %(default)s)")
    add("--time", type=positive, default=512, metavar="T", help="steps, on a GPU (default: %(default)s)")
    add("--directions", type=int, choices=(1, 2), default=1, help="(default: %(default)s)")
    add("--float32-precision", choices=("tf32", "ieee"), default="tf32", help="(default: %(default)s)")
    add(
        "--device",
        type=known_gpu,
        metavar="GPU",
        default="h200",
        help="whose plan to count where there is no GPU (default: %(default)s)",
    )
    add("--static", action="store_true", help="count the machine code, though there is a GPU")
    add("--trace", metavar="PATH", help="on a GPU: write the profiler's trace there")
    add(
        "--jobs",
        type=positive,
        default=compiling.JOBS,
        help="on a GPU: processes that compile kernels before anything is timed (default here: %(default)s)",
    )
    add(
        "--only-run",
        type=positive,
        metavar="N",
        help="on a GPU: call the layer N times and no more, for ncu and nsys",
    )
    options = parser.parse_args(arguments)
    if interpreted():
        print("TRITON_INTERPRET=1 is set: the interpreter's times mean nothing. Unset it.", file=sys.stderr)
        return 2
    if backends.triton_missing():
        print(f"{backends.triton_missing()}: there are no kernels to profile.", file=sys.stderr)
        return 2
    case = Case(
        options.cell, options.dtype, options.hidden_size, options.batch_size, options.time, 1, options.directions
    )
    precision = options.float32_precision if options.dtype == "float32" else None
    try:
        if torch.cuda.is_available() and not options.static:
            return with_gpu(case, options, precision)
        return without_gpu(case, options.device, DEVICES[options.device].arch, precision)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    exit_with(main)
