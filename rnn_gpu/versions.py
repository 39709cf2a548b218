"""Which versions of PyTorch and Triton this library was tested with: others may be right, but nobody has looked."""

import warnings

import torch

# Minor versions, from the oldest to the newest: constraints/oldest.txt, constraints/newest.txt.
TORCH = (2, 11), (2, 14)
TRITON = (3, 6), (3, 8)


def minor(version: str) -> tuple[int, int]:
    """("2", "11") of "2.11.0+cu130", as numbers."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def untested(name: str, version: str) -> str | None:
    """What to say of a version of "torch" or "triton" outside of the range that was tested; None inside of it."""
    oldest, newest = {"torch": TORCH, "triton": TRITON}[name]
    if oldest <= minor(version) <= newest:
        return None
    span = f"{'.'.join(map(str, oldest))} to {'.'.join(map(str, newest))}"
    return f"rnn_gpu was tested with {name} {span}, this is {version}: compare with backend 'torch'"


def warn_of_untested(name: str, version: str) -> None:
    """UserWarning, once, for such a version."""
    if (what := untested(name, version)) is not None:
        warnings.warn(what, stacklevel=3)


warn_of_untested("torch", torch.__version__)
