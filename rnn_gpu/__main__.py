"""`python -m rnn_gpu`: versions, device, the backend that would be used and why, and a self-check of seconds."""

import argparse
import importlib.metadata
import platform
import sys

import torch

from . import __version__, explain, modules, selfcheck, settings

QUESTIONS = """\
other questions (docs/api.md):
  python -m rnn_gpu.selfcheck                are the kernels right on this machine? (that part alone)
  python -m rnn_gpu.check_cell my_cell.py    is a cell of your own right?
  rnn_gpu.explain(model, batch_size)         which backend and plan would run a model, and why? runs nothing
  rnn_gpu.check()                            did every launch come to its end?
  rnn_gpu.autotune(layer, input)             what is fastest on this GPU?
"""


def version_of(package: str) -> str:
    """The installed version, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> int:
    """0 if the self-check passed."""
    argparse.ArgumentParser(
        prog="python -m rnn_gpu",
        description="Versions, device, which backend would run and why, and whether the kernels are right here.",
        epilog=QUESTIONS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    print(f"rnn_gpu {__version__}, Python {platform.python_version()}, torch {torch.__version__}", end=", ")
    print(", ".join(f"{package} {version_of(package)}" for package in ("triton", "numpy")))
    gpu = torch.cuda.is_available()
    print(f"device: {torch.cuda.get_device_name() if gpu else 'no CUDA device'}")
    print(f"backend setting: {settings.current_backend()}")
    if not gpu:
        print("backend used: torch (PyTorch's own kernels), because there is no CUDA device")
    print("for example:")
    print(explain(modules.LSTM(512, 512, dtype=torch.bfloat16), batch_size=16))
    return selfcheck.main(list(selfcheck.LAYERS))


if __name__ == "__main__":
    sys.exit(main())
