"""Triton's launches with the machine in place of a GPU: what stands in for `kernel[grid](...)` within `on_machine`."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from .launch import Machine
from .schedule import Counts, Schedule

TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint64: "*u64",
    torch.uint32: "*u32",
    torch.uint16: "*u16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
DEFAULTS = {"num_warps": 4, "num_stages": 3}  # as Triton has them


@dataclass(frozen=True)
class Meant:
    """Races on an argument of our kernels that do no harm, on which of its elements ([elements]; None: there are none),
    and why.
    """

    argument: str
    where: Callable[[dict], np.ndarray | None]
    why: str


def spare_rows_stand_at(a: dict) -> np.ndarray | None:
    """The last row of the batch in every step, where a whole sub-slice of rows is spare. (Spare rows beside others load
    in front of a barrier of the step, behind which the gates are saved.)
    """
    rest = (a["B"] - a["begin"]) % (a["SLICES"] * a["NB"])
    if not 0 < rest <= (a["SLICES"] - 1) * a["NB"]:
        return None
    ends = torch.arange(a["T"] + 1) * a["B"] if a["offsets"] is None else a["offsets"]
    last = torch.zeros(int(ends[-1]), dtype=torch.bool)
    last[ends[1:][ends.diff() == a["B"]] - 1] = True
    return last.repeat_interleave(a["x_part"].numel() // len(last)).numpy()


# The one place where a race is excused.
MEANT = (
    Meant(
        "status",
        lambda a: np.ones(1, bool),
        "programs that give up waiting write the number of the same launch: whose store is last does not matter",
    ),
    Meant(
        "x_part",
        spare_rows_stand_at,
        "a spare row, past the last one of the batch, loads the last one's input part, which its owner may be saving "
        "gates over; nothing that comes of a spare row is kept, and a mask of that load takes up to 27 instructions a "
        "step more",
    ),
    Meant(
        "x_part",
        lambda a: np.ones(a["x_part"].numel(), bool) if a["S"] == 1 else None,
        "where a program has one warp, the lane that saves a gate may be another one than loaded its input part: it "
        "gets the gate, which is made of that input, by a shuffle, and so saves it after the load",
    ),
)
OURS = {"forward", "backward"}


class Launches:
    """What `on_machine` was asked for, and the launches in it."""

    def __init__(self, arch: int, seed: int, edit: Callable[[str], str] | None, tensors, schedule: dict[str, Any]):
        self.arch, self.edit, self.tensors, self.log = arch, edit, tuple(tensors), []
        self.schedule, self.seed = schedule, seed
        known = [f.name for f in fields(Schedule) if f.name not in ("seed", "launch")]
        for name in schedule.keys() - set(known):
            raise TypeError(f"on_machine() got an unexpected keyword argument {name!r}: it takes {', '.join(known)}")

    @contextlib.contextmanager
    def instead_of_a_gpu(self):
        """JITFunction.run is this object's `launch` meanwhile."""
        if triton.knobs.runtime.interpret:
            raise RuntimeError("the machine runs compiled kernels: TRITON_INTERPRET must not be set")
        before = JITFunction.run
        JITFunction.run = lambda kernel, *args, **options: self.launch(kernel, *args, **options)
        try:
            yield
        finally:
            JITFunction.run = before

    def launch(self, kernel: JITFunction, *args, grid, warmup: bool = False, **kwargs) -> Counts | None:
        """One launch; its results are in the tensors."""
        names = kernel.arg_names
        arguments = dict(zip(names, args)) | {name: kwargs[name] for name in names if name in kwargs}
        for parameter in kernel.params:
            if parameter.name not in arguments:
                if not parameter.has_default:
                    raise TypeError(f"{kernel.__name__}: no argument {parameter.name!r}")
                arguments[parameter.name] = parameter.default
        options = DEFAULTS | {name: value for name, value in kwargs.items() if name not in names}
        types, fixed, attributes = specialized(kernel, arguments)
        machine = compiled(kernel, self.arch, _Key((types, fixed, attributes, options)), self.edit)
        if warmup:
            return None
        grid = grid(arguments) if callable(grid) else grid
        passed = [name for name in names if name not in fixed]
        ours = kernel.__name__ in OURS and (kernel.__module__ or "").endswith(("kernels.forward", "kernels.backward"))
        meant = [(m.argument, m.where(arguments)) for m in MEANT if ours and m.argument in arguments]
        schedule = Schedule(self.seed, len(self.log) + 1, **self.schedule)
        counts = machine.run(grid, [arguments[name] for name in passed], passed, meant, schedule, self.tensors)
        self.log.append((kernel.__name__, counts))
        return counts


def specialized(kernel: JITFunction, arguments: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Types, compile-time constants and attributes of a kernel's arguments, as Triton derives them: 1 and None become
    constants, what 16 divides is known to be so.
    """
    types, fixed, attributes = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None or isinstance(value, (JITFunction, str, torch.dtype)):
            types[name], fixed[name] = "constexpr", value
            continue
        free = not parameter.do_not_specialize
        if isinstance(value, torch.Tensor):
            if value.dtype not in TYPES:
                raise TypeError(f"{kernel.__name__}: the machine knows no tensors of {value.dtype}, as {name} is")
            types[name] = TYPES[value.dtype]
            whole = free and not parameter.do_not_specialize_on_alignment and value.data_ptr() % 16 == 0
        elif isinstance(value, bool):
            types[name], whole = "u1", False
        elif isinstance(value, float):
            types[name], whole = "fp32", False
        elif not isinstance(value, int):
            raise TypeError(
                f"{kernel.__name__}: the machine knows no arguments of {type(value).__name__}, as {name} is"
            )
        elif free and value == 1:
            types[name], fixed[name] = "constexpr", 1
            continue
        else:
            types[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64" if value < 1 << 63 else "u64"
            whole = free and not parameter.do_not_specialize_on_alignment and value % 16 == 0
        if whole:
            attributes[(number,)] = [["tt.divisibility", 16]]
    return types, fixed, attributes


class _Key:
    """Compile-time arguments, equal where all of them print alike."""

    def __init__(self, parts: tuple):
        self.parts, self.text = parts, repr(parts)

    def __eq__(self, other) -> bool:
        return self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@functools.lru_cache(maxsize=256)
def compiled(kernel: JITFunction, arch: int, key: _Key, edit: Callable[[str], str] | None) -> Machine:
    """The machine for a kernel compiled for `arch`."""
    types, fixed, attributes, options = key.parts
    source = ASTSource(kernel, types, fixed, attributes)
    target = GPUTarget("cuda", arch, 32)
    for name in options.keys() - vars(make_backend(target).parse_options({})).keys():
        raise KeyError(f"{kernel.__name__}: no argument and no option {name!r}")
    made = triton.compile(source, target=target, options=options)
    ptx = made.asm["ptx"]
    return Machine(edit(ptx) if edit else ptx, made.metadata.num_warps, made.metadata.shared)
