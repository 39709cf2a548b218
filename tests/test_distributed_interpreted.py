"""Many devices: training and layers in two processes, on the real Triton kernels in Triton's interpreter."""

import dataclasses

import pytest
import torch

from tests import distributed
from tests.contract import NAMES
from tests.distributed import Case, Training, checkpoints, on_dtensors, together, train
from tests.tolerances import assert_close_to_oracle

if not torch.distributed.is_available():
    pytest.skip("PyTorch was built without torch.distributed", allow_module_level=True)

pytestmark = pytest.mark.interpreted

every_layer = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Two processes on the CPU."""
    with distributed.Processes("gloo", tmp_path_factory.mktemp("group")) as found:
        yield found


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    """Full products, as in the processes."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")


@pytest.mark.covering("how", "name")
@pytest.mark.parametrize("how", ["ddp", "ddp, unused parameters", "fsdp"])
@every_layer
def test_training_equals_one_process(name, how, processes):
    """Catches: a launch with weights of another step, and gradients that DistributedDataParallel or `fully_shard` do
    not see, or take twice: sums of two parts must be equal to the bit.
    """
    training = Training(name, how, backend="triton", dtype=torch.float32)
    expected = train(training.alone(in_parts=True))
    for found in processes.run(train, training):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), key


def test_compiled_and_capped_equals_one_process(processes):
    """Catches: a compiled backward that forgets the cap on programs, or runs with another process's weights."""
    training = Training("GRU", "compiled, then ddp", backend="triton", dtype=torch.float32, max_programs=2)
    expected = train(training.alone(in_parts=True))
    for found in processes.run(train, training):
        for key, value in expected.items():
            assert torch.equal(found[key], value), key


@every_layer
def test_fully_shard_in_mixed_precision(name, processes):
    """Catches: weights gathered in bfloat16 that the kernels do not take, or a loss of accuracy beyond torch.nn's."""
    training = Training(name, "fsdp bfloat16", backend="triton", dtype=torch.float32)
    expected = together(train(dataclasses.replace(training.of("torch.nn").alone(), dtype=torch.float64)))
    peers = processes.run(train, training.of("torch.nn"))
    for found, peer in zip(processes.run(train, training), peers, strict=True):
        assert_close_to_oracle(together(found), expected, together(peer))


def test_checkpoints(processes, tmp_path):
    """Catches: a sharded model that does not go on from a checkpoint as if nothing had been."""
    training = Training("GRU", "fsdp", backend="triton", dtype=torch.float32)
    for found in processes.run(checkpoints, training, str(tmp_path)):
        for key, value in found["whole"].items():
            assert torch.equal(found["late"][key], value)
            assert torch.equal(found["loaded"][key], found["continued"][key])
            assert not torch.equal(found["continued"][key], value)


@pytest.mark.covering("case", "name")
@pytest.mark.parametrize(
    "case",
    [Case("1", "1", batch=3), Case("r", "r"), Case("0", "r", masked=True, batch_first=True)],
    ids=["batch", "replicated", "masked"],
)
@every_layer
def test_dtensors(name, case, processes):
    """Catches: results or gradients on a part of the batch that differ from those of the whole."""
    given = distributed.given(case, name, torch.float32)
    with distributed.on_backend("triton"):
        expected = distributed.outcome(*given) if case.input == "r" else distributed.in_parts(case, *given)
    for found, _ in processes.run(on_dtensors, case, name, "triton", torch.float32):
        for key, value in expected.items():
            assert torch.equal(found[key], value), key
