"""The launchers: from tensors to one persistent launch, and what happens when a wait does not end.

Buffers are allocated here in the layouts that forward.py and backward.py describe, and given back as views in the
layouts of torch. T steps, B rows of the batch, R rows of all steps, N weight sets, G gates, H hidden units, HS =
padded H, E slots.
"""

import itertools
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from . import backward as backward_kernel
from . import cells, interpreter
from . import forward as forward_kernel
from .plan import Plan
from .spec import CELLS, WAIT_LIMIT, padded, runs_backwards

FORWARD = {
    "lstm": cells.lstm_forward,
    "gru": cells.gru_forward,
    "rnn_tanh": cells.rnn_tanh_forward,
    "rnn_relu": cells.rnn_relu_forward,
}
BACKWARD = {
    "lstm": (cells.lstm_factors, cells.lstm_backward),
    "gru": (cells.gru_factors, cells.gru_backward),
    "rnn_tanh": (cells.rnn_tanh_factors, cells.rnn_tanh_backward),
    "rnn_relu": (cells.rnn_relu_factors, cells.rnn_relu_backward),
}
HOLDER = {
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}  # same width, holds all ones
UNWRITTEN = -1  # all ones

_numbers = itertools.count(1)
# The latest launches by number, for the message of a wait that did not end: plan, rows, the first row of the batch.
_launches: dict[int, tuple] = {}
_status: dict[
    torch.device, Tensor
] = {}  # a word that kernels write to and the host reads without waiting for the device


def status_word(device: torch.device) -> Tensor:
    """int32 [1], zero, or the number of a launch that gave up waiting. Pinned host memory: reading it costs no
    synchronisation.
    """
    if device not in _status:
        with torch.inference_mode(False):  # or nobody could reset it outside of that mode
            word = torch.zeros(1, dtype=torch.int32, device="cpu")
        _status[device] = word.pin_memory() if device.type == "cuda" else word
    return _status[device]


def raise_if_late(device: torch.device) -> None:
    """RuntimeError that names the launch, if one on `device` is known to have given up waiting."""
    word = _status.get(device)
    if word is None or word.item() == 0:
        return
    number = word.item()
    word.zero_()
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
    not end, or if there is no such device.
    """
    devices = list(_status) if device is None else [torch.device(device)]
    for one in devices:
        if one.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"device {str(one)!r} is not available: PyTorch finds no GPU here")
        if one.type == "cuda" and one.index is None:
            one = torch.device("cuda", torch.cuda.current_device())
        if one.type == "cuda":
            torch.cuda.synchronize(one)
        raise_if_late(one)


def forget() -> None:
    """Wait for every device used so far, and forget a wait that did not end: after launches that were meant not to."""
    for device, word in _status.items():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        word.zero_()


def constants(plan: Plan, reversed_sets: int) -> dict:
    """The compile-time arguments of a plan's kernel."""
    cell, dtype = CELLS[plan.cell], getattr(tl, plan.dtype)
    common = dict(
        G=cell.gates,
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
    )
    if plan.backward:
        factors, step = BACKWARD[plan.cell]
        shared_tile = cell.aux == "c"  # LSTM: this step's `previous` is the next one's `aux`
        return common | dict(FACTORS=factors, CELL=step, E=cell.slots, AUX_IS_HISTORY=shared_tile, ORDER=plan.order)
    return common | dict(CELL=FORWARD[plan.cell], PER=plan.gates_per_tile)


def options(plan: Plan) -> dict:
    """How a plan's kernel is compiled and launched.

    num_stages=1: a pipeline would load the state across the wait. maxnreg: as many registers as a thread can have;
    fewer programs may fit on a multiprocessor then, but the assembler would spill a few values to make room for another
    one.
    """
    return dict(num_warps=plan.warps, num_stages=1, maxnreg=255, launch_cooperative_grid=not plan.alone)


@dataclass(frozen=True)
class Rows:
    """Where the rows of the steps lie. R rows in all: R = T * B, or fewer where sequences are packed.

    lengths: int32 [B], steps of each row, or None where all have T. offsets: int64 [T+1], the first row of each step,
    where sequences are packed (longest first, as PackedSequence has them), else None. resets: int8 [T, B], not zero
    where a row's state starts anew, or None.
    """

    time: int
    batch: int
    lengths: Tensor | None = None
    offsets: Tensor | None = None
    resets: Tensor | None = None

    @property
    def ragged(self) -> bool:
        """Whether rows end early or start anew: the plan leaves registers for the masks."""
        return self.lengths is not None or self.resets is not None

    def pointers(self) -> dict:
        """The arguments of both kernels that say where rows lie."""
        return dict(lengths=self.lengths, offsets=self.offsets, resets=self.resets, T=self.time, B=self.batch)


def _launch(plan: Plan, device: torch.device, rows: Rows, reversed_sets: int, tensors: dict) -> None:
    """Launch a plan's kernel for all rows of the batch, in as many launches as it takes, on the current stream of
    `device`.
    """
    raise_if_late(device)
    if interpreter.interpreting():
        context = interpreter.concurrent_programs()
    elif device.type == "cuda":
        context = torch.cuda.device(device)
    else:
        raise RuntimeError(
            "rnn_gpu: Triton kernels need CUDA tensors (or TRITON_INTERPRET=1, set before Python starts)"
        )
    kernel = backward_kernel.backward if plan.backward else forward_kernel.forward
    each = plan.rows * plan.slices  # rows of a program
    arguments = tensors | rows.pointers() | constants(plan, reversed_sets) | options(plan)
    with context:
        for begin in range(0, rows.batch, each * plan.batch_slices):
            number = next(_numbers) % 0x7FFFFFFF + 1  # never 0, which says that nothing is late
            _launches[number] = plan, (rows.time, rows.batch), begin
            _launches.pop(number - 256, None)
            grid = plan.unit_slices, min(plan.batch_slices, -(-(rows.batch - begin) // each)), plan.sets
            kernel[grid](**arguments, status=status_word(device), begin=begin, limit=WAIT_LIMIT, launch=number)
    if device.type == "cpu":
        raise_if_late(device)


def _fill_ends(buffer: Tensor, state: Tensor, hidden_size: int) -> None:
    """Fill the first and the last B rows of `buffer` [B + R + B, N, HS] with `state` [N, B, H]."""
    batch = state.shape[1]
    for block in (buffer[:batch], buffer[-batch:] if batch else buffer[:0]):
        if hidden_size != buffer.shape[-1]:
            block.zero_()
        block[..., :hidden_size].copy_(state.transpose(0, 1))


def _apart(view: Tensor) -> Tensor:
    """The same memory as a tensor of its own: autograd then treats it as a result, which users may change in place,
    not as a view.
    """
    return view.new_empty(0).set_(view.untyped_storage(), view.storage_offset(), view.shape, view.stride())


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, on a 16-byte boundary: for another address Triton compiles narrower loads in another layout."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _rows_of_sets(state: Tensor | None, padded_size: int, dtype: torch.dtype) -> Tensor | None:
    """A state [N, B, H] as the kernels read it: [B, N, HS], contiguous, in `dtype`."""
    if state is None:
        return None
    state = state.transpose(0, 1).to(dtype)
    if state.shape[-1] != padded_size:
        state = torch.nn.functional.pad(state, (0, padded_size - state.shape[-1]))
    return _aligned(state)


def _padded_rows(rows: Tensor, padded_size: int) -> Tensor:
    """[R, N, H] with HS units from row to row: as it lies where it came from this module, a copy where it did not."""
    _, sets, hidden_size = rows.shape
    if rows.stride() == (sets * padded_size, padded_size, 1) and rows.data_ptr() % 16 == 0:
        return rows
    return _aligned(torch.nn.functional.pad(rows, (0, padded_size - hidden_size)))


def in_pieces(order: tuple) -> list[tuple[slice, slice]]:
    """An order of gates as slices (of the slots, of the gates), as few as will do. An index made of a Python list would
    be copied to the device in every call.
    """
    begins = [i for i in range(len(order)) if i == 0 or order[i] != order[i - 1] + 1] + [len(order)]
    return [
        (slice(begin, end), slice(order[begin], order[begin] + end - begin))
        for begin, end in itertools.pairwise(begins)
    ]


def forward(
    plan: Plan,
    x_part: Tensor,
    weight_hh: Tensor,
    bias_hn: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    rows: Rows,
    reversed_sets: int,
    saving: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """All steps forward.

    x_part [R, N, G*H]: contiguous; the gates are saved over it if `saving` is "full" (and the cell needs them). saving:
    "nothing", "lean" (aux alone, where it is c) or "full".
    weight_hh [N, G*H, H], bias_hn [N, H] or None, h0 [N, B, H], c0 [N, B, H] or None; reversed_sets: 0 none of the sets
    runs backwards in time, 1 all, 2 every second one.
    -> y [R, N, H], h_n [N, B, H], c_n [N, B, H] float32 or None, aux [R, N, HS] or None.
    """
    assert rows.time > 0 and x_part.is_contiguous()
    cell = CELLS[plan.cell]
    count, sets, _ = x_part.shape
    hidden_size, dtype, device, batch = plan.hidden_size, x_part.dtype, x_part.device, rows.batch
    size = padded(hidden_size, plan.dtype)
    y = torch.empty((batch + count + batch, sets, size), dtype=dtype, device=device)
    if not plan.alone:
        y.view(HOLDER[dtype]).fill_(UNWRITTEN)
        h0 = torch.where(h0 == h0, h0, torch.nan)  # a NaN of the user's could be all ones
    _fill_ends(y, h0, hidden_size)
    carry_0 = _rows_of_sets(c0, size, torch.float32) if cell.carry == "c" else y[:batch] if cell.carry == "h" else None
    carry_n = torch.empty((batch, sets, size), dtype=torch.float32, device=device) if cell.carry == "c" else None
    aux = None
    if cell.keeps_aux(saving):
        aux = torch.empty((count, sets, size), dtype=torch.float32 if cell.aux == "c" else dtype, device=device)
    if size != hidden_size:
        weight_hh = torch.nn.functional.pad(weight_hh, (0, size - hidden_size))
    h_n = None if rows.lengths is None else _rows_of_sets(h0, size, dtype).clone()
    tensors = dict(
        x_part=x_part,
        weight=_aligned(weight_hh),
        bias=None if bias_hn is None else _aligned(bias_hn),
        y=y.view(torch.int32),
        carry_0=carry_0,
        gates=x_part if saving == "full" and cell.saves_gates else None,
        aux=aux,
        carry_n=carry_n,
        h_n=h_n,
    )
    _launch(plan, device, rows, reversed_sets, tensors)
    y = y[batch : batch + count, :, :hidden_size]
    if h_n is not None:
        h_n = h_n[..., :hidden_size].transpose(0, 1)
    else:
        last, first = y[count - batch :], y[:batch]  # the ends of the sets that run forward, and backwards
        h_n = torch.stack([first[:, n] if runs_backwards(reversed_sets, n) else last[:, n] for n in range(sets)])
    return _apart(y), h_n, None if carry_n is None else carry_n[..., :hidden_size].transpose(0, 1), aux


def backward(
    plan: Plan,
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    weight_hh: Tensor,
    gates: Tensor | None,
    aux: Tensor | None,
    y: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    rows: Rows,
    reversed_sets: int,
) -> tuple[Tensor, Tensor | None]:
    """All steps backward.

    d_y [R, N, H], d_h_n and d_c_n [N, B, H], each None for zero; weight_hh [N, G*H, H]; gates [R, N, G*H], aux
    and y as `forward` left them; h0, c0 [N, B, H].
    -> d_gates [R, N, E, H], the gradients of the gate sums in the order of the cell's slots, and d_carry_0 [N, B, H]
    float32: LSTM the gradient of c0, GRU what of h0's does not pass through the gates, else None.
    """
    cell = CELLS[plan.cell]
    count, sets, hidden_size = y.shape
    dtype, device, batch = y.dtype, y.device, rows.batch
    size = padded(hidden_size, plan.dtype)
    d_gates = torch.empty((batch + count + batch, sets, cell.slots, size), dtype=dtype, device=device)
    if not plan.alone:
        d_gates.view(HOLDER[dtype]).fill_(UNWRITTEN)
        d_gates[:batch].zero_()  # what the first step of the backward reads
    weight = weight_hh.new_zeros((sets, size, cell.gates, size))
    by_gate = weight_hh.view(sets, cell.gates, hidden_size, hidden_size)
    for slots, gates_of in in_pieces(cell.slot_order):
        weight[:, :hidden_size, slots, :hidden_size].copy_(by_gate[:, gates_of].permute(0, 3, 1, 2))
    if cell.aux == "y":
        aux, history, history_0 = _padded_rows(y, size), None, None
    elif cell.carry == "c":
        aux = _aligned(aux)
        history, history_0 = aux, _rows_of_sets(c0, size, torch.float32)
    else:
        aux = _aligned(aux)
        history, history_0 = _padded_rows(y, size), _rows_of_sets(h0, size, dtype)
    d_carry_0 = None
    if cell.carry is not None:
        d_carry_0 = torch.empty((batch, sets, size), dtype=torch.float32, device=device)
    tensors = dict(
        d_y=None if d_y is None else _aligned(d_y),
        d_h_n=_rows_of_sets(d_h_n, hidden_size, dtype),
        d_carry_n=_rows_of_sets(d_c_n, size, torch.float32) if cell.carry == "c" else None,
        weight=weight,
        gates=None if gates is None else _aligned(gates),
        aux=aux,
        history=history,
        history_0=history_0,
        d_gates=d_gates.view(torch.int32),
        d_carry_0=d_carry_0,
    )
    _launch(plan, device, rows, reversed_sets, tensors)
    d_carry_0 = None if d_carry_0 is None else d_carry_0[..., :hidden_size].transpose(0, 1)
    return _apart(d_gates[batch : batch + count, ..., :hidden_size]), d_carry_0
