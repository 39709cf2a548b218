"""`python -m perf.resources`: what the kernels of a grid of plans need and issue, compiled for a GPU that need not be there.

Every plan is compiled exactly as launch.py would, its machine code is taken apart, and one row says: registers of a thread, spills,
shared memory of a program, and what a warp issues in one time step (polls once, as if each state were there at the first look). Exit
status 1 when a plan spills or does not fit the shared memory of the device.

    python -m perf.resources --arch 90 --quick
    python -m perf.resources --arch 86 --cell gru --dtype float32 --json -
"""

import argparse
import collections
import concurrent.futures
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace

from rnn_gpu.kernels.plan import DEVICES, Plan, plan
from rnn_gpu.kernels.spec import CELLS, DTYPES

ARCHITECTURES = {  # compute capability * 10 -> the device that plans are made for
    80: "a100",
    86: "rtx3090",
    89: "rtx4090",
    90: "h200",
    100: "b200",
    120: "rtx5090",
}
# What makes one compiled kernel different from another; the batch size itself does not.
KEY = (
    "cell", "hidden_size", "sets", "dtype", "backward", "precision", "alone", "units", "rows", "slices", "warps", "registers", "shared",
    "order", "gates_per_tile",
)  # fmt: skip
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "QGMMA", "UTCMMA")  # matrix instructions, Ampere to Blackwell
COLUMNS = ("MMA", "FFMA", "LDSM", "LDS", "STS", "BAR", "LDG", "STG", "SHFL", "MUFU")


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs, and its machine code: `before` the time loop, and `step`, one pass through the time loop."""

    arch: int
    triton: str
    registers: int
    stack: int
    spills: int  # instructions that store to or load from local memory
    shared: int
    before: tuple[str, ...]
    step: tuple[str, ...]

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that a program may use on the devices of this architecture."""
        return min(device.shared_memory for device in DEVICES.values() if device.arch == self.arch)

    @property
    def problem(self) -> str | None:
        """Why this kernel must not run, or None."""
        if self.spills or self.stack:
            return f"spills: {self.spills} instructions, {self.stack} bytes of stack"
        if self.shared > self.shared_limit:
            return f"does not fit: {self.shared} of {self.shared_limit} bytes of shared memory"
        return None

    def count(self, *names: str) -> int:
        """Instructions of these names ("LDG", "BAR") in one step; all of them where no name is given."""
        counts = _counts(self.step)
        return sum(counts[name] for name in names) if names else len(self.step)

    def as_dict(self) -> dict:
        """All numbers, for JSON."""
        small = {k: v for k, v in asdict(replace(self, before=(), step=())).items() if k not in ("before", "step")}
        return small | {"problem": self.problem, "step": {"all": len(self.step)} | dict(_counts(self.step).most_common())}


def is_poll(instruction: str) -> bool:
    """A volatile load: one that asks whether a state has been published."""
    return re.search(r"\bLDG\S*\.STRONG", instruction) is not None


def is_publish(instruction: str) -> bool:
    """The store (`.cg`) that publishes."""
    return re.search(r"\bSTG\S*\.STRONG\.GPU", instruction) is not None


@functools.cache
def _counts(instructions: tuple[str, ...]) -> collections.Counter:
    return collections.Counter(name_of(instruction) for instruction in instructions)


def name_of(instruction: str) -> str:
    """`@P0 LDG.E.128 R4, ...` -> `LDG`."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def machine_code(cubin: bytes) -> tuple[str, str]:
    """The resource usage and the disassembly of a kernel, from the tools inside the Triton wheel."""
    import triton

    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(cubin)
        commands = ["cuobjdump", "--dump-resource-usage", path], ["nvdisasm", "-c", path]
        usage, code = (
            subprocess.run([os.path.join(tools, c[0]), *c[1:]], capture_output=True, text=True, check=True).stdout
            for c in commands
        )
    return usage, code


def time_loop(disassembly: str) -> tuple[list[str], int, int]:
    """All instructions, and the first and one past the last of the time loop.

    A loop is what stands between a label and a branch back to it; the time loop is the innermost one that publishes. The loops inside
    it, which poll again, hold copies of the polls, and count once.
    """
    code, labels = [], {}
    for line in disassembly.splitlines():
        if line.startswith("."):
            labels[line.strip().rstrip(":")] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(found[1])
    publishing = [i for i, instruction in enumerate(code) if is_publish(instruction)]
    spans = []
    for end, instruction in enumerate(code):
        target = re.search(r"\bBRA\b.*`\((\.L\w+)\)", instruction)
        begin = labels.get(target[1], end + 1) if target else end + 1
        if begin <= end and publishing and begin <= publishing[0] and publishing[-1] <= end:
            spans.append((end + 1 - begin, begin, end + 1))
    if not spans:
        raise ValueError("no loop that publishes in the machine code")
    _, begin, end = min(spans)
    return code, begin, end


def signature(p: Plan) -> dict:
    """Types of the tensor arguments as launch.py passes them in training; None where it passes None."""
    cell, element, exact = CELLS[p.cell], {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}[p.dtype], "*fp32"
    carry = {"c": exact, "h": element, None: None}[cell.carry]
    gates = element if cell.saves_gates else None
    aux = exact if cell.aux == "c" else element
    if not p.backward:
        return {
            "x_part": element,
            "weight": element,
            "bias": element if p.cell == "gru" else None,
            "y": "*i32",
            "carry_0": carry,
            "gates": gates,
            "aux": None if cell.aux == "y" else aux,
            "carry_n": exact if cell.carry == "c" else None,
            "status": "*i32",
        }
    return {
        "d_y": element,
        "d_h_n": element,
        "d_carry_n": exact if cell.carry == "c" else None,
        "weight": element,
        "gates": gates,
        "aux": aux,
        "history": carry,
        "history_0": carry,
        "d_gates": "*i32",
        "d_carry_0": None if cell.carry is None else exact,
        "status": "*i32",
    }


def compile_kernel(p: Plan, arch: int):
    """The Triton kernel of a plan, compiled for an architecture. Tensors are aligned to 16 bytes, as torch allocates them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rnn_gpu.kernels import launch

    kernel = (launch.backward_kernel.backward if p.backward else launch.forward_kernel.forward)
    if not hasattr(kernel, "arg_names"):
        raise RuntimeError("nothing can be compiled with TRITON_INTERPRET=1")
    tensors = signature(p)
    fixed = launch.constants(p, 2 if p.sets > 1 else 0) | {name: None for name, kind in tensors.items() if kind is None}
    types = {}
    for name in kernel.arg_names:
        types[name] = "constexpr" if name in fixed else tensors.get(name, "i32")  # do_not_specialize: plain numbers
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if types[name].startswith("*")}
    source = ASTSource(kernel, types, fixed, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options(p))


def compile_plan(p: Plan, arch: int) -> Resources:
    """Compile the kernel of a plan for an architecture and count."""
    import triton

    kernel = compile_kernel(p, arch)
    usage, disassembly = machine_code(kernel.asm["cubin"])
    registers, stack = (int(number) for number in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    code, begin, end = time_loop(disassembly)
    spills = sum(name_of(instruction) in ("LDL", "STL") for instruction in code)
    shared = kernel.metadata.shared
    return Resources(arch, triton.__version__, registers, stack, spills, shared, tuple(code[:begin]), tuple(code[begin:end]))


def key(p: Plan) -> tuple:
    """Equal for plans that share a compiled kernel."""
    return tuple(getattr(p, name) for name in KEY)
