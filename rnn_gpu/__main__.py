"""`python -m rnn_gpu`: versions, device, the backend that would be used and why, and a self-check of seconds;
`python -m rnn_gpu explain lstm 512`: the plan of a layer, for a GPU that need not be here.
"""

import argparse
import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__, backends, explain, modules, selfcheck, settings
from .command import exit_with, positive
from .dtypes import dtype_name, dtype_of
from .kernels.devices import DEVICES, TOO_OLD
from .kernels.spec import DTYPES

QUESTIONS = """\
other questions (docs/api.md):
  python -m rnn_gpu explain lstm 512         which backend and plan would run a layer, and why? runs nothing
  rnn_gpu.explain(model, batch_size)         the same for a model
  python -m rnn_gpu.selfcheck                are the kernels right on this machine? (that part alone)
  python -m rnn_gpu.check_cell my_cell.py    is a cell of your own right?
  rnn_gpu.check()                            did every launch come to its end?
  rnn_gpu.autotune(layer, input)             what is fastest on this GPU?
"""


def version_of(package: str) -> str:
    """The installed version, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def about() -> int:
    """Versions, device, backend, an example, and the self-check: 0 if that passed."""
    print(f"rnn_gpu {__version__}, Python {platform.python_version()}, torch {torch.__version__}", end=", ")
    print(", ".join(f"{package} {version_of(package)}" for package in ("triton", "numpy")))
    gpu = torch.cuda.is_available()
    print(f"device: {torch.cuda.get_device_name() if gpu else 'no CUDA device'}")
    print(f"backend setting: {settings.current_backend()}")
    asked = settings.current_backend() == "triton"
    if not gpu and not asked:
        print("backend used: torch (PyTorch's own kernels), because there is no CUDA device")
    elif asked and backends.interpreting():
        print("backend used: triton, in Triton's interpreter")
    elif asked and not gpu:
        print(
            "backend used: none: 'triton' needs CUDA tensors, and there is no CUDA device; a call on a CPU is an error"
        )
    print("for example:")
    print(explain(modules.LSTM(512, 512, dtype=torch.bfloat16), batch_size=16))
    return selfcheck.main(list(selfcheck.LAYERS))


class Devices(argparse.Action):
    """Print the GPUs that are known by name, and end: no layer need be named."""

    def __init__(self, **given: Any):
        super().__init__(nargs=0, **given)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """The list, and the end."""
        for gpu in (*DEVICES.values(), *TOO_OLD.values()):
            name, old = gpu.name.removeprefix("NVIDIA "), "" if gpu.arch >= 80 else ": too old for the kernels"
            print(f"{name:20} compute capability {gpu.arch / 10}, {gpu.multiprocessors} multiprocessors{old}")
        parser.exit()


def explained(chosen: argparse.Namespace) -> str:
    """`explain` of the layer that the arguments describe. Its errors, and those of the layer."""
    kind = getattr(modules, selfcheck.LAYERS[chosen.layer])
    layer = kind(
        chosen.hidden_size if chosen.input_size is None else chosen.input_size,
        chosen.hidden_size,
        chosen.layers,
        bidirectional=chosen.bidirectional,
        device="meta",
        dtype=dtype_of(chosen.dtype),
    )
    options = dict(ragged=chosen.ragged, training=not chosen.inference, precision=chosen.precision)
    return explain(layer, chosen.batch_size, chosen.device, **options)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if the self-check passed, or a layer was explained."""
    parser = argparse.ArgumentParser(
        prog="python -m rnn_gpu",
        description="Versions, device, which backend would run and why, and whether the kernels are right here.",
        epilog=QUESTIONS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="explain", help="see: explain --help")
    one = commands.add_parser("explain", description="Which backend and plan would run a layer, and why? Runs nothing.")
    one.add_argument("layer", type=str.lower, choices=selfcheck.LAYERS)
    one.add_argument("hidden_size", type=positive)
    one.add_argument("--input-size", type=positive, help="default: hidden_size")
    one.add_argument("--layers", type=positive, default=1)
    one.add_argument("--bidirectional", action="store_true")
    one.add_argument("--batch-size", type=positive, default=16)
    one.add_argument("--dtype", type=dtype_name, choices=DTYPES, default="float32", help="or short: bf16, fp16, ...")
    one.add_argument("--precision", choices=("tf32", "ieee"), help="of float32 products (default: PyTorch's)")
    one.add_argument("--device", help='"H200", "RTX 4070 Ti", "sm_89, 24 multiprocessors" (default: the GPU here)')
    one.add_argument("--devices", action=Devices, help="list the GPUs that are known by name, and do nothing else")
    one.add_argument("--ragged", action="store_true", help="with lengths, resets or packed input")
    one.add_argument("--inference", action="store_true", help="the forward alone")
    chosen = parser.parse_args(arguments)
    if chosen.command is None:
        return about()
    try:
        print(explained(chosen))
    except (RuntimeError, TypeError, ValueError) as error:
        one.error(str(error))
    return 0


if __name__ == "__main__":
    exit_with(main)
