"""Instructions that make one register of others: how their operands become numbers, and the result bits."""

from collections.abc import Callable

import numpy as np

from .decode import Decoder, Instruction
from .parse import WIDTH, Statement
from .values import SIGNED, UNSIGNED, stored, typed


def of(d: Decoder, s: Statement, function: Callable, *kinds: str, result: str) -> Instruction:
    """result <- function of the operands as numbers of these types."""
    slots = d.sources(s.operands[1:], *kinds)
    raw = [kind == "pred" or (kind[0] in "bu" and kind != "bf16") for kind in kinds]
    raw_result = result == "pred" or (result[0] in "bu" and result != "bf16")
    if all(raw) and raw_result:
        if len(slots) == 1:
            (a,) = slots
            return d.value(s.operands[0], lambda f: function(f[a]))
        if len(slots) == 2:
            a, b = slots
            return d.value(s.operands[0], lambda f: function(f[a], f[b]))
        return d.value(s.operands[0], lambda f: function(*(f[i] for i in slots)))
    pairs = list(zip(slots, kinds))
    if raw_result:
        return d.value(s.operands[0], lambda f: function(*(typed(f[i], kind) for i, kind in pairs)))
    return d.value(s.operands[0], lambda f: stored(function(*(typed(f[i], kind) for i, kind in pairs)), result))


def bits(kind: str) -> str:
    """The type of bare bits as wide: for what does not depend on signs."""
    return "pred" if kind == "pred" else f"b{8 * WIDTH[kind]}"


def extended(values: np.ndarray, kind: str, width: int) -> np.ndarray:
    """Bits of a type in a register of `width` bytes, which may be wider: with the sign, or zeros in front."""
    if values.itemsize == width:
        return values
    if kind[0] == "s":
        return values.view(SIGNED[values.itemsize]).astype(SIGNED[width]).view(UNSIGNED[width])
    return values.astype(UNSIGNED[width])
