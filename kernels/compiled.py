"""Kernels compiled for GPUs that need not be here: what a plan's kernel needs and issues."""

import collections
import functools
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace

from .devices import DEVICES
from .machine_code import machine_code, name_of, time_loop
from .plan import Plan
from .spec import CELLS

# How the rows of a batch lie (rows.Rows), and the tensors that say so.
ROWS = {
    "dense": (),
    "lengths": ("lengths",),
    "packed": ("lengths", "offsets"),
    "resets": ("resets",),
}
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "QGMMA", "UTCMMA")  # matrix instructions, Ampere to Blackwell


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs, and its machine code: `before` the time loop, and `step`, one pass through it."""

    arch: int
    triton: str
    registers: int
    stack: int
    spills: int  # instructions that store to or load from local memory
    shared: int
    before: tuple[str, ...]
    step: tuple[str, ...]
    scoreboards: tuple[tuple[int, int], ...] = ()  # of each of `step`: the one that its result sets (7: none), and a
    # mask of those that it waits for

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
        code = ("before", "step", "scoreboards")
        small = {k: v for k, v in asdict(replace(self, **dict.fromkeys(code, ()))).items() if k not in code}
        return small | {
            "problem": self.problem,
            "step": {"all": len(self.step)} | dict(_counts(self.step).most_common()),
        }


@functools.cache
def _counts(instructions: tuple[str, ...]) -> collections.Counter:
    return collections.Counter(name_of(instruction) for instruction in instructions)


def signature(p: Plan, rows: str = "dense", options: Collection[str] = ()) -> dict:
    """Types of the arguments, but whole numbers, as layer.py passes them in training; None where it passes None.
    options: of the layer, "clip", "cells", "recurrent_dropout", "zoneout"; of a stack "dropout" between its layers.
    """
    cell, exact = CELLS[p.cell], "*fp32"
    element = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}[p.dtype]
    lie = {"lengths": "*i32", "offsets": "*i64", "resets": "*i8"}
    lie = {name: kind if name in ROWS[rows] else None for name, kind in lie.items()}
    carry = exact if cell.states else element if cell.carries_h else None
    gates = element if cell.saves else None
    aux = (exact if cell.states else element) if cell.planes else None
    parameters = element if cell.parameters else None
    drops, keeps = "recurrent_dropout" in options, "zoneout" in options
    masks = {
        "dropped": exact if drops else None,
        "kept_h": "*i8" if keeps else None,
        "kept_c": "*i8" if keeps and cell.states else None,
        "passed": "*i8" if "dropout" in options else None,
        "scale": "fp32" if "dropout" in options else None,
        "rate_h": None,
        "rate_c": None,
        "pause": "i32" if p.pause else None,
    }
    if not p.backward:
        return {
            "x_part": element,
            "weight": element,
            "weight_below": element if p.layered else None,
            "bias": element if cell.apart else None,
            "biases": element if p.layered else None,
            "parameters": parameters,
            "y": "*i32",
            "fed": "*i32" if "dropout" in options else None,
            "carry_0": element if cell.carried else None,
            "gates": gates,
            "aux": aux,
            "carry_n": element if cell.states else None,
            "h_n": element,
            "shown": element if drops else None,
            "h_0": element if drops else None,
            "carries": exact if keeps and cell.states else None,
            "status": "*i32",
            **masks,
            **lie,
        }
    return {
        "d_y": element,
        "d_h_n": element,
        "d_carry_n": element if cell.states else None,
        "d_carry": element if "cells" in options else None,
        "weight": element,
        "weight_above": element if p.layered else None,
        "parameters": parameters,
        "gates": gates,
        "aux": element if cell.reads_h else aux,
        "history": carry,
        "history_0": carry,
        "d_gates": "*i32",
        "d_carry_0": element if cell.states else exact if cell.carries_h else None,
        "d_parameters": exact if cell.parameters else None,
        "d_kept_0": exact if keeps and not cell.carries_h else None,
        "clip": "fp32" if "clip" in options else None,
        "status": "*i32",
        **masks,
        **lie,
    }


def compile_kernel(p: Plan, arch: int, rows: str = "dense", options: Collection[str] = ()):
    """The Triton kernel of a plan for an architecture. Tensors are aligned to 16 bytes, as layer.py sees to."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import launch

    kernel = launch.backward_kernel.backward if p.backward else launch.forward_kernel.forward
    if not hasattr(kernel, "arg_names"):
        raise RuntimeError("nothing can be compiled with TRITON_INTERPRET=1")
    tensors = signature(p, rows, options)
    fixed = launch.constants(p, 2 if p.sets > 1 else 0) | {name: None for name, kind in tensors.items() if kind is None}
    types = {}
    for name in kernel.arg_names:
        types[name] = "constexpr" if name in fixed else tensors.get(name, "i32")  # do_not_specialize: plain numbers
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True))
        if types[name].startswith("*") and not parameter.do_not_specialize_on_alignment
    }
    source = ASTSource(kernel, types, fixed, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options(p))


def compile_plan(p: Plan, arch: int, rows: str = "dense", options: Collection[str] = ()) -> Resources:
    """Compile the kernel of a plan for an architecture and count."""
    import triton

    kernel = compile_kernel(p, arch, rows, options)
    usage, disassembly = machine_code(kernel.asm["cubin"])
    registers, stack = (int(number) for number in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    code, scoreboards, begin, end = time_loop(disassembly)
    spills = sum(name_of(instruction) in ("LDL", "STL") for instruction in code)
    shared = kernel.metadata.shared
    return Resources(
        arch,
        triton.__version__,
        registers,
        stack,
        spills,
        shared,
        tuple(code[:begin]),
        tuple(code[begin:end]),
        tuple(scoreboards[begin:end]),
    )
