"""Which versions of PyTorch this library was tested with; of Triton, `kernels.spec.TRITON_VERSIONS`."""

import warnings

import torch

# Minor versions, the oldest and the newest: constraints/oldest.txt, constraints/newest.txt.
TORCH = (2, 11), (2, 14)


def minor(version: str) -> tuple[int, int]:
    """(2, 11) of "2.11.0+cu130"."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def warn_of_untested(version: str) -> None:
    """UserWarning that names a version of PyTorch outside of the range that was tested."""
    if not TORCH[0] <= minor(version) <= TORCH[1]:
        span = " to ".join(".".join(map(str, end)) for end in TORCH)
        warnings.warn(f"rnn_gpu was tested with PyTorch {span}, this is {version}: look at its tests", stacklevel=3)


warn_of_untested(torch.__version__)
