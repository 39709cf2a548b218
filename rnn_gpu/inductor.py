"""The operators of this library in torch.compile's inductor, where a user has switched its implicit fall-backs off."""

import sys

import torch

OPERATORS = (
    "aten_layer", "aten_layer_backward", "aten_stack", "aten_stack_backward",
    "recurrence", "recurrence_backward", "saved_again",
    "kernel_stack", "kernel_stack_backward", "packed_rows",
)  # fmt: skip


def fall_back() -> None:
    """Tell inductor, if it is at work and asks to be told, that it calls the operators as they are, with inputs laid
    out as they were traced. Called by the operators' fakes: importing inductor takes longer than importing this.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None or torch._inductor.config.implicit_fallbacks:
        return
    for name in OPERATORS:
        operator = getattr(torch.ops.rnn_gpu, name).default
        if operator not in lowering.lowerings:
            lowering.make_fallback(operator, lowering.constrain_to_fx_strides, warn=False)
