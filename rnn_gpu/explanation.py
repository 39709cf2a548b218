"""What would run for a layer, and why, in words and numbers."""

from typing import Any, Literal

import torch
from torch.nn.modules.rnn import RNNCellBase

from . import backends, settings
from .dtypes import dtype_of
from .kernels.cudnn import cudnn_microseconds
from .kernels.devices import Device, named
from .kernels.plan import Plan
from .kernels.spec import CELLS


def _pass_lines(plan: Plan, device: Device, layers: int, heads: int, known: bool) -> list[str]:
    """A pass of a layer, or of the layers that run side by side: who computes what, where the weights are, how long;
    cuDNN's time where it knows such a layer.
    """
    name = "backward" if plan.backward else "forward"
    theirs = f"; cuDNN {plan.layers * cudnn_microseconds(plan, device, layers, heads):.2f}" if known else ""
    of_layers = f" of {plan.layers} layers" if plan.layered else ""
    programs = f"{plan.programs} program{'s' if plan.programs > 1 else ''} of {plan.warps} warps"
    rows = f"{plan.rows * plan.slices} rows" + (f" ({plan.slices} x {plan.rows} in turn)" if plan.slices > 1 else "")
    of_sets = "directions" if heads == 1 else "heads" if plan.sets == heads else "heads in both directions"
    one_of = " of a layer" if plan.layered else f" of one of {plan.sets} {of_sets}" if plan.sets > 1 else ""
    pause = f"; programs wait {plan.pause} cycles before they look for their neighbours' states" if plan.pause else ""
    return [
        f"  {name}: {programs}, each with {plan.units} hidden units of {rows}{one_of}, for all steps",
        f"    {plan.reason}; {plan.shared_bytes / 1024:.0f} KiB of shared memory a program{pause}",
        f"    estimated {plan.microseconds:.2f} us a step{of_layers}{theirs}",
    ] + ([f"    chosen because it was the fastest when it was measured, {plan.measured}"] if plan.measured else [])


def _layers_line(layer: Any, groups: tuple[tuple[Plan, ...], ...], training: bool) -> str:
    """Which layers of a stack run side by side, and why not more."""
    sizes = [plans[0].layers for plans in groups]
    if layer.bidirectional:
        return "layers: one after another: a layer waits for all steps of both directions below"
    if layer.proj_size > 0:
        return "layers: one after another: a projected state is made outside of the kernels"
    if layer.training and layer.dropout >= 1:
        return "layers: one after another: with dropout 1 none sees the one below"
    if backends.heads_of(layer) > 1:
        return "layers: one after another: the input of a layer with heads is that of all heads"
    if backends.beyond_aten(layer):
        return f"layers: one after another: with {layer.option_text()} each is computed by itself"
    if training and backends.saving_of(layer, training) == "lean":
        return "layers: one after another: lean memory makes the gates of one layer again at a time"
    if max(sizes) == 1:
        return "layers: one after another: side by side their weights do not stay on the chip, or a step takes longer"
    launches = ", ".join(f"{size} side by side" if size > 1 else "1 by itself" for size in sizes)
    return f"layers: {launches}, each a step behind the one below"


def _projection_line(layer: torch.nn.RNNBase, plans: tuple[Plan, ...]) -> str:
    """What the combined recurrent weight of a projected layer costs beside its two factors."""
    combined, factors = 4 * layer.hidden_size**2, 5 * layer.hidden_size * layer.proj_size
    text = (
        f"projection: the recurrence runs on the product of weight_hh and weight_hr, {combined:,} weights a direction "
        f"({factors:,} in the two factors)"
    )
    if factors < combined and any(plan.streamed for plan in plans):
        return text + "; the factors would be better here: the product does not stay on the chip"
    return text + ": no extra exchange"


def _layer_lines(
    layer: torch.nn.RNNBase,
    batch_size: int,
    gpu: Device,
    dtype: torch.dtype,
    ragged: bool,
    training: bool,
    precision: str | None,
) -> list[str]:
    """Everything about one layer."""
    choice = backends.kernels_for(layer, batch_size, dtype, gpu, training, ragged, precision)
    directions, heads = "both directions" if layer.bidirectional else "one direction", backends.heads_of(layer)
    lines = [
        f"{type(layer).__name__} of {layer.hidden_size} hidden units{f' in {heads} heads' if heads > 1 else ''}, "
        f"{layer.num_layers} layer(s), {directions}, batch {batch_size}, "
        f"{backends.name_of(dtype)}{f' ({precision} products)' if precision else ''}, "
        f"{'training' if training else 'inference'}",
        f"backend 'auto' takes {choice.name}: {choice.reason}",
    ]
    if choice.least_time > 1:
        lines.append(f"for T below {choice.least_time} it takes torch, whose calls take the host less time")
    if layer.num_layers > 1 and choice.plans:
        lines.append(_layers_line(layer, choice.groups, training))
    known = CELLS[backends.cell_of(layer)].mode is not None and not backends.beyond_aten(layer)
    for plans in dict.fromkeys(choice.groups or (choice.plans,)):
        for plan in plans:
            lines += _pass_lines(plan, gpu, layer.num_layers, heads, known)
    if choice.plans and layer.proj_size > 0:
        lines.append(_projection_line(layer, choice.plans))
    if not choice.plans:
        lines.append("backend 'triton' would raise a RuntimeError with that reason")
    return lines


def _cells_lines(model: torch.nn.Module) -> list[str]:
    """What runs the cells of a model: a line, or none where it has none."""
    cells = [f"{name} ({type(one).__name__})" for name, one in model.named_modules() if isinstance(one, RNNCellBase)]
    if not cells:
        return []
    more = f" and {len(cells) - 4} more" if len(cells) > 4 else ""
    return [f"{', '.join(cells[:4])}{more}: cells, a step a call, on PyTorch's own kernels whatever the backend"]


def explain(
    module: torch.nn.Module,
    batch_size: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    ragged: bool = False,
    *,
    training: bool = True,
    precision: Literal["tf32", "ieee"] | None = None,
) -> str:
    """Say which backend and which plan would run every LSTM, GRU and RNN in `module`, and why.

    module: a layer of this library or of torch.nn, or a model with such layers inside. batch_size: rows of the batch.
    device: a CUDA device, or the name of a GPU that need not be here, as people write it: "H200", "rtx 4090", "L4",
    "NVIDIA A100-SXM4-40GB", or of one that has no name here its compute capability and size, "sm_89, 24
    multiprocessors"; default: the current GPU, or an H200 where there is none. dtype: torch.bfloat16, or its name,
    "bfloat16" or "bf16"; default that of the layer's parameters; give autocast's where it is used. ragged: plan for
    sequences that are packed, end early (lengths) or start anew (resets). training: forward and backward; False:
    inference. precision: of float32 products, "tf32" or "ieee" (full); default: as PyTorch's switches for RNNs say.

    The times are estimates of a model, not measurements (docs/design.md), but for what `autotune` has measured, which
    says when. Cells of a model are named, in one line. TypeError and ValueError for wrong arguments.

    >>> print(explain(torch.nn.GRU(64, 128), batch_size=16, device="T4"))  # doctest: +ELLIPSIS
    on NVIDIA T4 ...
    GRU of 128 hidden units, ...
    backend 'auto' takes torch: the kernels need compute capability 8.0 or later, NVIDIA T4 has 7.5
    ...
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"explain expects a layer or a model, got: {type(module).__name__}")
    layers = [(name, one) for name, one in module.named_modules() if isinstance(one, torch.nn.RNNBase)]
    if not layers:
        cells = any(isinstance(one, RNNCellBase) for one in module.modules())
        raise TypeError(
            f"explain expects an LSTM, GRU or RNN layer, or a model with one, got: {type(module).__name__}"
            + (" (cells run on PyTorch's own kernels, whatever the backend)" if cells else "")
        )
    batch_size = settings.positive_integer("batch_size", batch_size)
    for name, value in (("ragged", ragged), ("training", training)):
        if not isinstance(value, bool):
            raise TypeError(f"explain(): argument {name!r} must be bool, not {type(value).__name__}")
    if precision not in (None, "tf32", "ieee"):
        raise ValueError(f"Unknown precision {precision!r}. Select from 'tf32', 'ieee'.")
    if dtype is not None and not isinstance(dtype, torch.dtype | str):
        raise TypeError(f"explain(): argument 'dtype' must be torch.dtype, not {type(dtype).__name__}")
    dtype = None if dtype is None else dtype_of(dtype)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype should be a floating point type, got: {dtype}")
    stands_in = device is None and not torch.cuda.is_available()
    if device is None:
        device = "h200" if stands_in else "cuda"
    gpu = backends.device_of(device)
    if not (isinstance(device, str) and named(device)) and torch.device(device).type != "cuda":
        raise ValueError(f"explain plans for a CUDA device or a GPU it knows by name, got: {device}")
    lines = [
        f"on {gpu.name} ({gpu.multiprocessors} multiprocessors, {gpu.shared_memory // 1024} KiB of shared memory each)"
        f"{', which stands in for a GPU, since there is none here' if stands_in else ''}"
    ]
    planned = False
    for name, layer in layers:
        of_layer = dtype or next(layer.parameters()).dtype
        multiplied = (precision or backends.precision_of("float32")) if of_layer == torch.float32 else None
        found = _layer_lines(layer, batch_size, gpu, of_layer, ragged, training, multiplied)
        planned = planned or any(line.startswith("  ") for line in found)
        lines += [f"{name}: {found[0]}" if name else found[0], *found[1:]]
    lines += _cells_lines(module)
    if planned:
        estimates = (
            "Times are estimates of a model that was fitted on an H200, cuDNN's too: rnn_gpu.autotune measures both"
        )
        if any(" measured " in line for line in lines):
            estimates = "Times are estimates of a model but where they are said to be measured"
        lines.append(f"{estimates} (docs/design.md). A program is a block of threads.")
    if backends.triton_missing():
        lines.append(f"Here nothing of this runs: {backends.triton_missing()}.")
    elif untested := backends.triton_untested():
        lines.append(f"Here nothing of this runs unless backend 'triton' is asked for: {untested}.")
    elif planned and not torch.cuda.is_available() and not backends.interpreting():
        lines.append("Here nothing of this runs: there is no CUDA device.")
    if (wanted := settings.current_backend()) != "auto":
        lines.append(f"The backend in force now is {wanted!r}.")
    return "\n".join(lines)
