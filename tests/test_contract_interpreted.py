"""The contract of torch.nn's recurrent layers on the real Triton kernels, in Triton's interpreter."""

import pytest
import torch

from tests import contract
from tests.contract import NAMES, assert_error_sample, assert_sample_on_kernels, error_samples, samples

pytestmark = pytest.mark.interpreted


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    """Compare with full products; tf32 has its own tests (tests/test_kernels.py)."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")


class TestMachinery(contract.Machinery):
    backend = "triton"


class TestErrors(contract.Errors):
    backend = "triton"


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_samples_of_pytorch(name, training, every):
    """Catches: results or gradients that differ from torch.nn's, or from PyTorch's reference, on PyTorch's own
    samples. (All of them run on PyTorch's kernels, in test_contract.py.)
    """
    for sample in samples(name, torch.float32, training, packed=True)[::every]:
        assert_sample_on_kernels(name, sample, training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_error_samples_of_pytorch(name, training):
    """Catches: another exception than PyTorch's own samples ask for."""
    for error in error_samples(name, torch.float32, training):
        assert_error_sample(name, error, torch.float32, training, "triton")
