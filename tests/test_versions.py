"""The versions of PyTorch and Triton that were tested, in one place and nowhere else."""

import re
import warnings
from pathlib import Path

import pytest
import torch

from rnn_gpu import versions

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "name, version, tested",
    [
        ("torch", "2.11.0+cu130", True),
        ("torch", "2.14.1", True),
        ("torch", "2.10.1", False),
        ("torch", "2.15.0a0+git1234", False),
        ("torch", "3.0.0", False),
        ("triton", "3.6.0", True),
        ("triton", "3.8.0", True),
        ("triton", "3.5.1", False),
        ("triton", "3.10.0", False),
    ],
)
def test_an_untested_version_is_named(name, version, tested):
    """Catches: a version that nobody has looked at, and nobody is told; a tested one that users are warned of."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        versions.warn_of_untested(name, version)
    assert len(seen) == (0 if tested else 1)
    assert all(f"{name} 2.11 to 2.14, this is {version}" in str(one.message) for one in seen if name == "torch")


@pytest.mark.parametrize("end, place", [("oldest", 0), ("newest", 1)])
def test_what_is_said_is_what_is_installed(end, place):
    """Catches: a range that claims more, or less, than the sets of constraints/ that are tested."""
    text = (ROOT / "constraints" / f"{end}.txt").read_text()
    for name, span in (("torch", versions.TORCH), ("triton", versions.TRITON)):
        assert versions.minor(re.search(rf"^{name}==(\S+?)(;|$)", text, re.MULTILINE)[1]) == span[place]
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'"torch>={".".join(map(str, versions.TORCH[0]))}"' in pyproject


def test_this_environment_is_tested():
    """Catches: a suite that passes with versions outside of the range it vouches for."""
    assert versions.untested("torch", torch.__version__) is None
