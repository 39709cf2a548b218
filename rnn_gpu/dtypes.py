"""The names of types, as people write them: the same ones for `explain` and every command."""

import torch

from .backends import name_of

SHORT = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
NAMES = "'float32', 'float16', 'bfloat16', or short 'float', 'fp32', 'half', 'fp16', 'bf16'"


def dtype_of(given: torch.dtype | str) -> torch.dtype:
    """A type by any name: torch.bfloat16, "torch.bfloat16", "bfloat16", "bf16", "half". ValueError for no type's."""
    if isinstance(given, torch.dtype):
        return given
    name = given.strip().lower().removeprefix("torch.")
    found = getattr(torch, SHORT.get(name, name), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"Unknown dtype {given!r}. Select a torch.dtype or one of {NAMES}.")
    return found


def dtype_name(text: str) -> str:
    """For argparse: "bf16" -> "bfloat16", as in plans and cases; what names no type stays, for `choices` to refuse."""
    try:
        return name_of(dtype_of(text))
    except ValueError:
        return text
