"""Whether the kernels are right on this machine, in seconds: small layers against torch.nn in float64.

    python -m rnn_gpu.selfcheck [lstm|gru|rnn ...]

Without a GPU the kernels run in Triton's interpreter, in a process of its own, because interpreted and compiled kernels
cannot share one.
"""

import argparse
import contextlib
import os
import subprocess
import sys

import torch
from torch import Tensor

from . import backends, modules, settings
from .command import BROKEN_PIPE, exit_with

LAYERS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
ALLOWED = 1e-5  # float32 with full products: 2e-7 is usual, and a wrong equation or a stale state gives 1e-2 or more


def _results(layer: torch.nn.Module, input: Tensor, d_output: Tensor) -> dict[str, Tensor]:
    """Output and the gradient of every parameter and of the input."""
    input = input.clone().requires_grad_()
    output, _ = layer(input)
    named = {"input": input, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad(output, list(named.values()), d_output)
    return {"output": output.detach()} | {f"gradient of {name}": g for name, g in zip(named, gradients, strict=True)}


def differences(
    cell: str, device: torch.device | str = "cpu", hidden_size: int = 24, exchange: bool = True
) -> dict[str, float]:
    """Relative difference, by norm, between the Triton kernels in float32 and torch.nn in float64, for outputs and
    gradients.

    cell: "lstm", "gru" or "rnn". T 5, B 3, both directions. exchange: several programs exchange their state, even
    where one would do.
    """
    switch = torch.backends.cudnn.rnn
    before, switch.fp32_precision = switch.fp32_precision, "ieee"  # torch rounds to tf32 by default: not compared here
    generator = torch.Generator("cpu").manual_seed(0)
    here = dict(device="cpu", dtype=torch.float32)  # whatever the user's defaults are
    layer = getattr(modules, LAYERS[cell])(16, hidden_size, bidirectional=True, **here)
    plain = getattr(torch.nn, LAYERS[cell])(16, hidden_size, bidirectional=True, **here).double()
    with torch.no_grad():
        for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
            theirs.uniform_(-(hidden_size**-0.5), hidden_size**-0.5, generator=generator)
            ours.copy_(theirs)
            theirs.copy_(ours)
    input = torch.randn(5, 3, 16, generator=generator, **here)
    d_output = torch.randn(5, 3, 2 * hidden_size, generator=generator, **here)
    try:
        with settings.backend("triton"), settings.always_exchange() if exchange else contextlib.nullcontext():
            actual = _results(layer.to(device), input.to(device), d_output.to(device))
    finally:
        switch.fp32_precision = before
    expected = _results(plain, input.double(), d_output.double())
    return {name: ((actual[name].cpu().double() - e).norm() / e.norm()).item() for name, e in expected.items()}


def all_right(cells: list[str]) -> bool:
    """Print the largest difference of each cell; whether all are as small as they should be."""
    device = "cpu" if backends.interpreting() or not torch.cuda.is_available() else "cuda"
    where = (
        "Triton kernels in Triton's interpreter"
        if device == "cpu"
        else f"Triton kernels on {torch.cuda.get_device_name()}"
    )
    good = True
    for cell in cells:
        found = {
            f"{name}, {how}": difference
            for how, exchange in (("several programs", True), ("one program", False))
            for name, difference in differences(cell, device, exchange=exchange).items()
        }
        name, largest = max(found.items(), key=lambda item: item[1])
        fine = largest <= ALLOWED  # False for NaN
        good &= fine
        print(
            f"{LAYERS[cell]:4s} {where}, against torch.nn in float64: largest relative difference of outputs and "
            f"gradients {largest:.1e} ({name}), allowed {ALLOWED:.0e}: {'ok' if fine else 'WRONG'}"
        )
    return good


def in_interpreter(cells: list[str]) -> bool:
    """`all_right` in a process of its own with TRITON_INTERPRET=1; True too, with a line that says so, where Triton is
    missing.
    """
    if backends.triton_missing():
        print(f"{backends.triton_missing()}: its kernels were not run")
        return True
    sys.stdout.flush()
    command = [sys.executable, "-m", "rnn_gpu.selfcheck", *cells]
    status = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False).returncode
    if status == BROKEN_PIPE:
        raise BrokenPipeError("nobody reads what the self-check prints")
    return status == 0


def main(cells: list[str]) -> int:
    """0 if the check of these cells, wherever it can run, passed."""
    here = not backends.triton_missing() and (torch.cuda.is_available() or backends.interpreting())
    return 0 if (all_right if here else in_interpreter)(cells) else 1


def command() -> int:
    """The check alone, of the cells that are asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m rnn_gpu.selfcheck",
        description="Are the kernels right on this machine? Small layers against torch.nn in float64.",
    )
    parser.add_argument(
        "cells", nargs="*", type=str.lower, metavar="cell", help=f"of {', '.join(LAYERS)} (default: all)"
    )
    cells = parser.parse_args().cells or list(LAYERS)
    if unknown := [cell for cell in cells if cell not in LAYERS]:
        parser.error(f"unknown cell {unknown[0]!r}. Select from {', '.join(map(repr, LAYERS))}.")
    return main(cells)


if __name__ == "__main__":
    exit_with(command)
