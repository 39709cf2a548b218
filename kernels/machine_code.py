"""What a compiled kernel is made of: its machine code, taken apart by the tools inside the Triton wheel.

Tests and perf/resources.py read it, and the launcher where Triton is of a version that nobody has tried: what the
exchange rests on, and what makes a step short, is then looked for in every kernel before its first launch.
"""

import os
import re
import subprocess
import tempfile
import warnings

import triton

from .spec import TRITON_VERSIONS


def is_poll(instruction: str) -> bool:
    """A load at the scope of the GPU: one that asks whether a state has been published."""
    return re.search(r"\bLDG\S*\.STRONG\.GPU", instruction) is not None


def is_publish(instruction: str) -> bool:
    """The store (`.cg`) that publishes."""
    return re.search(r"\bSTG\S*\.STRONG\.GPU", instruction) is not None


def name_of(instruction: str) -> str:
    """`@P0 LDG.E.128 R4, ...` -> `LDG`."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def machine_code(cubin: bytes) -> tuple[str, str]:
    """The resource usage and the disassembly of a kernel, from the tools inside the Triton wheel."""
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(cubin)
        commands = ["cuobjdump", "--dump-resource-usage", path], ["nvdisasm", "-c", "-hex", path]
        usage, code = (
            subprocess.run([os.path.join(tools, c[0]), *c[1:]], capture_output=True, text=True, check=True).stdout
            for c in commands
        )
    return usage, code


def time_loop(disassembly: str) -> tuple[list[str], list[tuple[int, int]], int, int]:
    """All instructions, their scoreboards (Resources), and the first and one past the last of the time loop.

    A loop is what stands between a label and a branch back to it; the time loop is the shortest one with the most
    publishing stores (the compiler may have taken the first step out of it). The loops inside it, which poll again,
    hold copies of the polls, and those of streamed weights; all count once.
    """
    code, scoreboards, labels = [], [], {}
    for line in disassembly.splitlines():
        if line.startswith("."):
            labels[line.strip().rstrip(":")] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(found[1])
        elif found := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", line):
            # The upper half of an instruction; from bit 41 on: stall 4, yield 1, scoreboards set when the result is
            # written 3 and when operands are read 3, mask of those waited for 6.
            control = int(found[1], 16) >> 41
            scoreboards.append((control >> 5 & 7, control >> 11 & 63))
    spans = []
    for last, instruction in enumerate(code):
        target = re.search(r"\bBRA\b.*`\((\.L\w+)\)", instruction)
        first = labels.get(target[1], last + 1) if target else last + 1
        published = sum(map(is_publish, code[first : last + 1]))
        if published:
            spans.append((-published, last + 1 - first, first, last + 1))
    if not spans:
        raise ValueError("no loop that publishes in the machine code")
    _, _, begin, end = min(spans)
    return code, scoreboards, begin, end


def published_before_the_next_poll(before, step) -> bool:
    """Whether no poll of a later step stands before a publishing store of an earlier one.

    The time loop begins with a poll and ends with a publish. A poll brought forward, from the next step to before this
    one's publish, needs a copy for the first step in front of the loop, after which nothing is published (unless whole
    steps stand there).
    """
    events = [[is_publish(i) for i in part if is_poll(i) or is_publish(i)] for part in (before, step)]
    in_front, loop = events
    whole_steps = not in_front or (not in_front[0] and in_front[-1])
    return whole_steps and len(loop) > 1 and not loop[0] and loop[-1]


def complain(kernel, alone: bool) -> None:
    """RuntimeError if a compiled kernel may wait for what it has not published yet; a warning if its layouts are not
    those that tiles.py means, so that it is slow.
    """
    _, disassembly = machine_code(kernel.asm["cubin"])
    code, _, begin, end = time_loop(disassembly)
    step, version = code[begin:end], triton.__version__
    if not alone and not published_before_the_next_poll(tuple(code[:begin]), tuple(step)):
        raise RuntimeError(
            f"rnn_gpu: Triton {version} moves a wait before what it waits for. The kernels have been tried with Triton "
            f"{TRITON_VERSIONS[0]} to {TRITON_VERSIONS[-1]}: install one of those, or select the backend 'torch'."
        )
    shuffles = sum(name_of(instruction) == "SHFL" for instruction in step)
    if shuffles or any(name_of(instruction) in ("LDL", "STL") for instruction in code):
        warnings.warn(
            f"rnn_gpu: a kernel compiled by Triton {version} is slow: its tensors are laid out anew in every step, or "
            f"its registers spill. The kernels are short with Triton {TRITON_VERSIONS[0]} to {TRITON_VERSIONS[-1]}.",
            stacklevel=2,
        )


def installed() -> str:
    """The version of Triton."""
    return triton.__version__


def untested() -> bool:
    """Whether Triton is of a version that the kernels have not been tried with."""
    return ".".join(installed().split(".")[:2]) not in TRITON_VERSIONS
