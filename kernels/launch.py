"""From a plan and tensors to a launch that runs, and what happens when a wait does not end."""

import ctypes
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import backward as backward_kernel
from . import forward as forward_kernel
from . import interpreter, machine, prepare
from .direct import Prepared
from .machine_code import complain, untested
from .plan import Plan
from .rows import Rows
from .spec import CELLS, WAIT_LIMIT, padded

_numbers = itertools.count(1)
# The latest launches by number, for the message of a wait that did not end: plan, rows, the first row of the batch.
_launches: dict[int, tuple] = {}
# A word that kernels write to and the host reads without waiting for the device, and the same word as ctypes reads it.
_status: dict[torch.device, tuple[Tensor, ctypes.c_int32]] = {}


def status_word(device: torch.device) -> Tensor:
    """int32 [1], zero, or the number of a launch that gave up waiting. Pinned host memory: reading it costs no
    synchronisation.
    """
    if device not in _status:
        with torch.inference_mode(False):  # or nobody could reset it outside of that mode
            word = torch.zeros(1, dtype=torch.int32, device="cpu")
        word = word.pin_memory() if device.type == "cuda" else word
        # Of two threads that come first the first one's: a launch writes to the word that it was given.
        _status.setdefault(device, (word, ctypes.c_int32.from_address(word.data_ptr())))
    return _status[device][0]


def raise_if_late(device: torch.device) -> None:
    """RuntimeError that names the launch, if one on `device` is known to have given up waiting."""
    _, word = _status.get(device, (None, None))
    if word is None or word.value == 0:
        return
    number, word.value = word.value, 0
    what = "a launch no longer on record"
    if number in _launches:
        plan, rows, begin = _launches[number]
        direction = "backward" if plan.backward else "forward"
        what = f"{plan.cell} {direction}, T {rows[0]}, B {rows[1]} from row {begin}, {plan}"
    raise RuntimeError(
        f"rnn_gpu: a wait inside a persistent kernel did not end within {WAIT_LIMIT} polls (launch {number}: {what}). "
        "Its results are NaN. Its programs did not all run at the same time: is the GPU shared with kernels that hold "
        "multiprocessors (collectives, other processes)? Lower the number of programs with RNN_GPU_MAX_PROGRAMS, or "
        "raise RNN_GPU_WAIT_LIMIT."
    )


def check(device: torch.device | str | None = None) -> None:
    """Wait for the device (default: every one used so far) and raise a RuntimeError if a wait of a launch on it did
    not end.
    """
    devices = list(_status) if device is None else [torch.device(device)]
    for one in devices:
        if one.type == "cuda" and one.index is None:
            one = torch.device("cuda", torch.cuda.current_device())
        if one.type == "cuda":
            torch.cuda.synchronize(one)
        raise_if_late(one)


def constants(plan: Plan, reversed_sets: int) -> dict:
    """The compile-time arguments of a plan's kernel."""
    cell, dtype = CELLS[plan.cell], getattr(tl, plan.dtype)
    common = dict(
        G=cell.gates,
        STATES=len(cell.states),
        CARRIED=cell.carried,
        SAVES=cell.saves,
        PARAMETERS=len(cell.parameters),
        H=plan.hidden_size,
        HS=padded(plan.hidden_size, plan.dtype),
        N=plan.sets,
        REVERSED=reversed_sets,
        UB=plan.units,
        NB=plan.rows,
        SLICES=plan.slices,
        S=plan.warps,
        REGISTERS=plan.registers,
        SHARED=plan.shared,
        DTYPE=dtype,
        BITS=tl.int32 if plan.dtype == "float32" else tl.int16,
        PRECISION=plan.precision,
        ALONE=plan.alone,
        LAYERED=plan.layered,
    )
    if plan.backward:
        functions = dict(FACTORS=cell.function("factors"), CELL=cell.function("backward"))
        return common | functions | dict(E=cell.slots, READS_H=cell.reads_h, QUIET=cell.quiet, WAITS=plan.waits)
    return common | dict(CELL=cell.function("forward"), APART=cell.apart, PER=plan.gates_per_tile)


def options(plan: Plan) -> dict:
    """How a plan's kernel is compiled and launched.

    num_stages=1: a pipeline would load the state across the wait. maxnreg: as many registers as a thread can have;
    fewer programs may fit on a multiprocessor then, but the assembler would spill a few values to make room for another
    one.
    """
    return dict(num_warps=plan.warps, num_stages=1, maxnreg=255, launch_cooperative_grid=not plan.alone)


def _arguments(kernel: Any) -> dict[str, Any]:
    """The arguments of a kernel that are known when it runs, in order, with nothing in them."""
    return {name: None for name in kernel.arg_names if not name.isupper() or name in ("T", "B")}


# To begin with, for whoever launches one.
FORWARD, BACKWARD = _arguments(forward_kernel.forward), _arguments(backward_kernel.backward)


class _Ready(NamedTuple):
    """A kernel that only waits for its arguments, and the launches that a batch takes: first row and grid of each."""

    plan: Plan
    prepared: Prepared
    launches: tuple[tuple[int, tuple[int, int, int]], ...]


# Found by the identity of the plan, which is kept with it, and by what else the compiled kernel depends on.
_ready: dict[tuple, _Ready] = {}


def dtypes(arguments: Iterable[Any]) -> Iterator[torch.dtype | None]:
    """Of each its dtype, None of what is no tensor. Looped over in C: this is asked in every launch."""
    return map(getattr, arguments, itertools.repeat("dtype"), itertools.repeat(None))


def _get_ready(plan: Plan, rows: Rows, reversed_sets: int) -> _Ready:
    """The kernel of a plan, and its launches for a batch."""
    kernel = backward_kernel.backward if plan.backward else forward_kernel.forward
    each = plan.rows * plan.slices  # rows of a program
    launches = tuple(
        (begin, (plan.unit_slices, min(plan.batch_slices, -(-(rows.batch - begin) // each)), plan.sets * plan.layers))
        for begin in range(0, rows.batch, each * plan.batch_slices)
    )
    check = None
    if untested() and not interpreter.interpreting() and not machine.running():
        check = functools.partial(complain, alone=plan.alone)
    prepared = Prepared(kernel, constants(plan, reversed_sets), options(plan), check)
    return _Ready(plan, prepared, launches)


def run(plan: Plan, device: torch.device, rows: Rows, reversed_sets: int, given: dict[str, Any]) -> None:
    """Launch a plan's kernel for all rows of the batch, in as many launches as it takes, on the current stream of
    `device`. given: FORWARD or BACKWARD with the tensors and fractions that there are, but for those of `rows`; None
    leaves their code out. The rest is filled in here.
    """
    raise_if_late(device)
    time, batch, given["lengths"], given["offsets"], given["resets"], *_ = rows
    whether = given["rate_h"] is None, given["rate_c"] is None, given["scale"] is None, given.get("clip") is None
    key = id(plan), batch, reversed_sets, device, *whether, *dtypes(given.values())
    ready = _ready.get(key)
    if ready is None:
        ready = _get_ready(plan, rows, reversed_sets)
        if (*given,) != ready.prepared.names:
            raise TypeError(f"not the arguments of the kernel, in its order: {', '.join(given)}")
        if not interpreter.interpreting():  # where a test may have changed a cell
            _ready[key] = ready
    given["T"], given["B"], given["status"], given["limit"] = time, batch, status_word(device), WAIT_LIMIT
    given["pause"] = plan.pause or None
    for begin, grid in ready.launches:
        number = next(_numbers) % 0x7FFFFFFF + 1  # never 0, which says that nothing is late
        _launches[number] = plan, (time, batch), begin
        _launches.pop(number - 256, None)
        given["begin"], given["launch"] = begin, number
        _start(ready.prepared, device, grid, tuple(given.values()))
    if device.type == "cpu":
        raise_if_late(device)


def _start(prepared: Prepared, device: torch.device, grid: tuple[int, int, int], arguments: tuple) -> None:
    """Launch on the current stream of `device`, in the interpreter, or on the machine for PTX."""
    if device.type == "cuda":
        index = torch._C._cuda_getDevice()  # torch.cuda.current_device asks first whether CUDA has begun
        if device.index is None or device.index == index:
            prepared.launch(grid, torch._C._cuda_getCurrentRawStream(index), arguments)
        else:
            with torch.cuda.device(device):
                prepared.launch(grid, torch._C._cuda_getCurrentRawStream(device.index), arguments)
    elif interpreter.interpreting():
        with interpreter.concurrent_programs():
            prepared.launch(grid, None, arguments)
    elif machine.running():
        prepared.launch(grid, None, arguments)
    else:
        raise RuntimeError(
            "rnn_gpu: Triton kernels need CUDA tensors (or TRITON_INTERPRET=1, set before Python starts)"
        )


# The kernels of prepare.py with their compile-time arguments, by those and by the types of the other arguments.
_prepared: dict[tuple, Prepared] = {}


def prepare_buffers(kernel, fixed: tuple, device: torch.device, programs: int, arguments: tuple) -> None:
    """Launch one of the kernels of prepare.py; fixed: its compile-time arguments, the type by name."""
    if programs == 0:
        return
    # By identity: Triton hashes a kernel by its source.
    key = id(kernel), fixed, device, *dtypes(arguments)
    prepared = _prepared.get(key)
    if prepared is None:
        constants = dict(zip(kernel.arg_names[len(arguments) :], fixed, strict=True))
        constants["DTYPE"] = getattr(tl, constants["DTYPE"])
        prepared = _prepared[key] = Prepared(kernel, constants, dict(num_warps=4))
    _start(prepared, device, (programs, 1, 1), arguments)


def programs_for(*jobs: int) -> tuple[int, ...]:
    """How many programs of a kernel of prepare.py each job takes, of so many elements."""
    return tuple([-(-job // prepare.BLOCK) for job in jobs])
