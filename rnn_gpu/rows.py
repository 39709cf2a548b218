"""Where the rows of the steps lie: dense, packed, with lengths and resets.

T steps, B rows of the batch, R rows of all steps one after another: step t has the rows from t * B on (dense) or from
offsets[t] on (packed, longest first), R = T * B or fewer.
"""

import ctypes

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from . import inductor
from .kernels.rows import Rows
from .library import fake, operator

# Rows of packed input by its batch sizes, which a stack of layers and every epoch over the same data bring again: with
# the values that they were made from, and for each device and stream.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
# What a CUDA graph reads at every replay, whatever has become of the batch sizes: nobody tells when it is gone.
_in_graphs: dict[int, tuple] = {}


def packed_rows(batch_sizes: Tensor, batch: int, count: int, device: torch.device) -> Rows:
    """The rows of a PackedSequence of `batch` sequences with data of `count` rows, from its batch_sizes [T] on the CPU.

    The one thing that a call copies to the device, without waiting for it; and not again for the same batch sizes, so
    that a CUDA graph can hold every call but the first. RuntimeError where they are not those of so many sequences and
    rows, which a graph finds when it runs: who has these rows reads and writes no others.
    """
    if not _may_remember(batch_sizes):
        return _packed_rows(batch_sizes, batch, count, device)
    # By `.data` or numpy they change without a new version. Read past PyTorch: a mode may have no values.
    values = ctypes.string_at(batch_sizes.data_ptr(), batch_sizes.nbytes)
    before, known = _known.get(batch_sizes, (None, {}))
    if before != values:
        known = {}
    # Of each stream: another one would read them before they are there.
    place = batch, count, device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing:  # on a stream of its own, after the one that warmed up
        place = next((other for other in known if other[:3] == place[:3]), place)
    if place not in known:
        rows = _packed_rows(batch_sizes, batch, count, device)
        if capturing or type(rows.lengths) is not Tensor:
            return rows  # which hold nothing before the graph runs; or a mode's own tensors
        known[place] = rows
        _known[batch_sizes] = values, known
    rows = known[place]
    if capturing:
        _in_graphs[id(rows)] = rows
    return rows


def _may_remember(batch_sizes: Tensor) -> bool:
    """Whether rows made now are plain tensors, that may serve any later call."""
    if torch.compiler.is_compiling() or type(batch_sizes) is not Tensor or batch_sizes.is_inference():
        return False
    if batch_sizes.device.type != "cpu" or not batch_sizes.is_contiguous():
        return False
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace would take remembered rows for constants
        return False
    return not (torch._C._are_functorch_transforms_active() or torch.is_inference_mode_enabled())


def _packed_rows(batch_sizes: Tensor, batch: int, count: int, device: torch.device) -> Rows:
    """`packed_rows`, made."""
    compiling = torch.compiler.is_compiling()
    traced = compiling or torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None
    lengths, offsets = (places_of if traced else _places)(batch_sizes, batch, count)
    if device.type == "cuda" and not compiling:
        if torch.cuda.is_current_stream_capturing():
            _in_graphs[id(lengths)] = lengths, offsets  # a replay copies them again
        else:
            offsets, lengths = offsets.pin_memory(), lengths.pin_memory()  # from other memory a copy waits
    how = dict(non_blocking=device.type == "cuda")  # others (MPS) would read memory of the host that is free again
    return Rows(len(batch_sizes), batch, lengths.to(device, **how), offsets.to(device, **how))


def _places(batch_sizes: Tensor, batch: int, count: int) -> tuple[Tensor, Tensor]:
    """lengths [B] and offsets [T+1] of `Rows`, of packed input. RuntimeError for batch sizes that make no sense."""
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64:
        got = f"{list(batch_sizes.shape)} of {batch_sizes.dtype}"
        raise RuntimeError(f"Expected batch_sizes to be 1D of torch.int64, got {got}")
    offsets = functional.pad(batch_sizes.cumsum(0), (1, 0))
    if int(batch_sizes[-1]) < 0 or bool((batch_sizes[1:] > batch_sizes[:-1]).any()):
        raise RuntimeError(f"Expected batch_sizes that never increase and are never negative, got {batch_sizes}")
    if (most := int(batch_sizes[0])) != batch:
        raise RuntimeError(f"Expected indices or hidden states of the {most} sequences that were packed, got {batch}")
    if (total := int(offsets[-1])) != count:
        raise RuntimeError(f"Expected data of as many rows as batch_sizes sum up to, {total}, got {count}")
    lengths = (batch_sizes.unsqueeze(1) > torch.arange(batch, device=batch_sizes.device)).sum(0, dtype=torch.int32)
    return lengths, offsets


# One operator, because a graph holds no values to check. Kernels are given what it gives, so it runs before them.
places_of = operator("packed_rows", "(Tensor batch_sizes, SymInt batch, SymInt count) -> (Tensor, Tensor)")(_places)


@fake("packed_rows")
def _(batch_sizes, batch, count):
    inductor.fall_back()
    return batch_sizes.new_empty(batch, dtype=torch.int32), batch_sizes.new_empty(batch_sizes.shape[0] + 1)


def first_rows(rows: Rows, count: int, backwards: bool):
    """Where the B rows of each sequence's first step in the direction of flow lie among all R: a slice or an index.
    count: R.
    """
    batch, lengths, offsets = rows.batch, rows.lengths, rows.offsets
    if not backwards:
        return slice(0, batch)
    if lengths is None:
        return slice(count - batch, count)
    last = (lengths - 1).clamp(min=0).long()
    row = torch.arange(batch, device=lengths.device)
    return row + (last * batch if offsets is None else offsets[last])


def rows_before(rows: Rows, count: int):
    """For the rows from B on, where the rows of the same sequences one step before lie: a slice, or an index of R -
    B.
    """
    batch, offsets = rows.batch, rows.offsets
    if offsets is None:
        return slice(0, count - batch)
    sizes = offsets[1:] - offsets[:-1]  # a row of step t stands as many rows later as step t - 1 has
    sizes_before = torch.repeat_interleave(sizes[:-1], sizes[1:], output_size=count - batch)
    return torch.arange(batch, count, device=offsets.device) - sizes_before


def rows_of_batch(rows: Rows, count: int) -> Tensor:
    """int64 [R], the row of the batch that each row of all steps belongs to. count: R."""
    device = rows.dropped.device
    if rows.offsets is None:
        return torch.arange(rows.batch, device=device).repeat(rows.time)
    sizes = rows.offsets[1:] - rows.offsets[:-1]
    begins = torch.repeat_interleave(rows.offsets[:-1], sizes, output_size=count)
    return torch.arange(count, device=device) - begins


def past_the_end(rows: Rows) -> Tensor:
    """bool [T, B], which rows of dense input with lengths are padding."""
    return torch.arange(rows.time, device=rows.lengths.device).unsqueeze(1) >= rows.lengths


def starts_anew(resets: Tensor, rows) -> Tensor:
    """bool [len(rows), 1], whether the given rows of dense input start anew."""
    return resets.bool().flatten()[rows].unsqueeze(1)
