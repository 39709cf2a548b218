"""What would run for a layer, and why, in words and numbers."""

import torch

from . import backends
from .kernels.plan import DEVICES, Plan, cudnn_microseconds


def _dtype_of(module: torch.nn.RNNBase, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or next(module.parameters()).dtype


def _pass_lines(plan: Plan, device) -> list[str]:
    name = "backward" if plan.backward else "forward"
    return [
        f"  {name}: {plan}",
        f"    {plan.reason}; about {plan.shared_bytes / 1024:.0f} KiB of shared memory a program",
        f"    estimated {plan.microseconds:.2f} us a step; cuDNN {cudnn_microseconds(plan, device):.2f}",
    ]


def _projection_line(module: torch.nn.RNNBase, plans: tuple[Plan, ...]) -> str:
    """What the combined recurrent weight of a projected layer costs beside its two factors."""
    combined, factors = 4 * module.hidden_size**2, 5 * module.hidden_size * module.proj_size
    text = (
        f"projection: the recurrence runs on the product of weight_hh and weight_hr, {combined:,} weights a direction "
        f"({factors:,} in the two factors)"
    )
    if factors < combined and any(plan.streamed for plan in plans):
        return text + "; the factors would be better here: the product does not stay on the chip"
    return text + ": no extra exchange"


def explain(
    module: torch.nn.RNNBase,
    batch_size: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    ragged: bool = False,
) -> str:
    """Say which backend and which plan would run `module` in training, and why.

    module: an LSTM, GRU or RNN of this library or of torch.nn. batch_size: rows of the batch. device: a CUDA device,
    or a name such as "h200", "a100", "rtx4090", "b200" to plan for a GPU that is not here; default: the current GPU,
    or an H200 where there is none. dtype: default that of the module's parameters; give autocast's where it is used.
    ragged: plan for sequences that are packed, end early (lengths) or start anew (resets).

    The times are estimates of a model, not measurements: see docs/design.md.
    """
    if not isinstance(module, torch.nn.RNNBase):
        raise TypeError(f"explain expects an LSTM, GRU or RNN layer, got: {type(module).__name__}")
    if batch_size < 1:
        raise ValueError(f"batch_size should be a positive number, got: {batch_size}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "h200"
    gpu, dtype = backends.device_of(device), _dtype_of(module, dtype)
    if device not in DEVICES and torch.device(device).type != "cuda":
        raise ValueError(f"explain plans for a CUDA device or a GPU it knows by name, got: {device}")
    choice = backends.kernels_for(module, batch_size, dtype, gpu, training=True, ragged=ragged)
    wanted = backends.current_backend()
    directions = "both directions" if module.bidirectional else "one direction"
    lines = [
        f"{type(module).__name__} of {module.hidden_size} hidden units, {module.num_layers} layer(s), "
        f"{directions}, batch {batch_size}, {backends.name_of(dtype)}"
        f" on {gpu.name} ({gpu.multiprocessors} multiprocessors, {gpu.shared_memory // 1024} KiB of shared memory each)"
    ]
    if choice.plans:
        lines.append(f"backend 'auto' takes {choice.name}: {choice.reason}")
        for plan in choice.plans:
            lines += _pass_lines(plan, gpu)
        if module.proj_size > 0:
            lines.append(_projection_line(module, choice.plans))
        lines.append("Times are estimates of a model, not measured; docs/design.md explains it and the words above.")
    else:
        lines.append(f"backend 'auto' takes torch: {choice.reason}")
        lines.append("backend 'triton' would raise a RuntimeError with that reason")
    if backends.triton_missing():
        lines.append(f"Here nothing of this runs: {backends.triton_missing()}.")
    elif choice.plans and not torch.cuda.is_available() and not backends.interpreting():
        lines.append("Here nothing of this runs: there is no CUDA device.")
    if wanted != "auto":
        lines.append(f"The backend in force now is {wanted!r}.")
    return "\n".join(lines)
