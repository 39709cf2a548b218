"""The versions of PyTorch and Triton that are tested: said in one place each, and the same everywhere."""

import re
import warnings
from pathlib import Path

import pytest

from rnn_gpu import versions
from rnn_gpu.kernels.spec import TRITON_VERSIONS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "version, tested",
    [("2.11.0+cu130", True), ("2.13.0+cpu", True), ("2.14.1", True), ("2.10.1", False), ("2.15.0a0+git12", False)],
)
def test_an_untested_pytorch_is_named(version, tested):
    """Catches: a version that nobody has looked at, and nobody is told; a tested one that users are warned of."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        versions.warn_of_untested(version)
    said = [str(one.message) for one in seen]
    assert said == [] if tested else len(said) == 1 and f"2.11 to 2.14, this is {version}" in said[0]


@pytest.mark.parametrize("end, place", [("oldest", 0), ("newest", -1)])
def test_what_is_said_is_what_is_installed(end, place):
    """Catches: a range that claims more, or less, than the sets of constraints/ that are tested."""
    text = (ROOT / "constraints" / f"{end}.txt").read_text()
    pinned = {name: re.search(rf"^{name}==(\d+\.\d+)", text, re.MULTILINE)[1] for name in ("torch", "triton")}
    assert versions.minor(pinned["torch"]) == versions.TORCH[place]
    assert pinned["triton"] == TRITON_VERSIONS[place]
    if end == "oldest":
        needed = (ROOT / "pyproject.toml").read_text()
        assert all(f'"{name}>={version}' in needed for name, version in pinned.items())
