"""Many devices: training and layers in two processes, on PyTorch's own kernels over gloo; and on two GPUs, where
there are.
"""

import copy
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rnn_gpu
from rnn_gpu.distributed import GUESSES_STRIDES
from tests import distributed
from tests.contract import NAMES
from tests.distributed import Case, Training, checkpoints, mixed_up, on_dtensors, replaced_late, together, train
from tests.tolerances import assert_close_to_oracle, assert_same_mathematics

if not torch.distributed.is_available():
    pytest.skip("PyTorch was built without torch.distributed", allow_module_level=True)

ROOT = Path(__file__).parent.parent

every_layer = pytest.mark.parametrize("name", NAMES)


def needs_two_gpus(test):
    """Marks of a test that cannot run on one GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")(test))


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Two processes on the CPU."""
    with distributed.Processes("gloo", tmp_path_factory.mktemp("group")) as found:
        yield found


@pytest.fixture(scope="module")
def gpu_processes(tmp_path_factory):
    """Two processes with a GPU each."""
    with distributed.Processes("nccl", tmp_path_factory.mktemp("group")) as found:
        yield found


# ---- Training --------------------------------------------------------------------------------------------------------


def assert_trains_as_one_process(training: Training, processes) -> None:
    expected = train(training.alone())
    assert any(key.startswith("gradient") for key in expected)
    for found in processes.run(train, training):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_mathematics(found[key], value, key)


@pytest.mark.parametrize("how", ["ddp", "ddp, no_sync", "ddp, static graph", "ddp, unused parameters"])
@every_layer
def test_distributed_data_parallel_equals_one_process(name, how, processes):
    """Catches: gradients that are not summed over processes, or are summed when they should not be; parameters that
    DistributedDataParallel does not find.
    """
    assert_trains_as_one_process(Training(name, how), processes)


@pytest.mark.parametrize("how", ["fsdp", "fsdp, weights moved"])
@every_layer
def test_fully_shard_equals_one_process(name, how, processes):
    """Catches: weights kept from one forward to the next, or moved out of the memory that `fully_shard` gathers into
    (as flatten_parameters does on a GPU): the model would train no more.
    """
    assert_trains_as_one_process(Training(name, how), processes)


@pytest.mark.parametrize("how", ["compiled, then ddp", "ddp, then compiled", "compiled, then fsdp"])
def test_compiled_equals_one_process(how, processes):
    """Catches: a layer whose graph, with weights that another process changes, is wrong or cannot be made."""
    assert_trains_as_one_process(Training("LSTM", how), processes)


@every_layer
def test_fully_shard_in_mixed_precision(name, processes):
    """Catches: weights gathered in bfloat16 that the layer does not take, or a loss of accuracy beyond torch.nn's."""
    training = Training(name, "fsdp bfloat16", dtype=torch.float32)
    expected = train(dataclasses.replace(training.alone(), library="torch.nn", dtype=torch.float64))
    peers = processes.run(train, training.of("torch.nn"))
    for found, peer in zip(processes.run(train, training), peers, strict=True):
        for key, value in expected.items():
            assert found[key].dtype == torch.float32
            assert_close_to_oracle(found[key], value, peer[key], key)


@every_layer
def test_classes_under_fully_shard(name, processes):
    """Catches: another fate of the sub-classes that `fully_shard` makes than docs/limits.md tells."""
    for texts, classes in processes.run(replaced_late, Training(name, "fsdp")):
        assert len(texts) == 2 and all("left sub-classes alone" in text and f"FSDP{name}" in text for text in texts)
        assert classes == [f"FSDP{name} of torch.nn.modules.rnn", f"FSDP{name} of rnn_gpu.modules"]


# ---- State dicts and checkpoints -------------------------------------------------------------------------------------


def assert_checkpoints(results: list[dict]) -> None:
    """What `checkpoints` found in each process is right."""
    complete = results[0]["whole"]
    for key, value in complete.items():
        assert {found["placements"][key] for found in results} == {"(Shard(dim=0),)"}
        assert sum(found["rows"][key] for found in results) == value.shape[0]
        for found in results:
            assert torch.equal(found["whole"][key], value)
            assert torch.equal(found["late"][key], value)
            assert torch.equal(found["loaded"][key], found["continued"][key])
            assert not torch.equal(found["continued"][key], value)
            if not key.startswith("head"):
                assert found["reset"][key].abs().max() > 0 and not torch.equal(found["reset"][key], value)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process loads what two have saved
@every_layer
def test_state_dicts_and_checkpoints(name, processes, tmp_path):
    """Catches: a state that is not sharded, or not whole; one that does not go on from a checkpoint as if nothing had
    been; one that torch.nn cannot load, or that cannot be loaded into a model built on the device "meta".
    """
    import torch.distributed.checkpoint as dcp

    training = Training(name, "fsdp")
    results = processes.run(checkpoints, training, str(tmp_path))
    assert_checkpoints(results)
    complete = results[0]["whole"]
    plain = distributed.network(Training(name, "one", library="torch.nn"), seed=1)
    state = {"model": plain.state_dict()}
    dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True)
    assert all(torch.equal(state["model"][key], value) for key, value in complete.items())
    plain.load_state_dict(complete)
    ours = distributed.network(training, seed=1)
    ours.load_state_dict(plain.state_dict())
    input = distributed.data(training)
    with rnn_gpu.backend("torch"):
        assert torch.equal(ours(input), plain(input))


# ---- DTensors --------------------------------------------------------------------------------------------------------

CASES = {
    "batch": Case("1", "1"),
    "batch of unequal parts": Case("1", "r", batch=3),
    "batch of one row": Case("1", batch=1),
    "batch first": Case("0", "1", batch_first=True),
    "replicated": Case("r", "r"),
    "time": Case("0", "0"),
    "features": Case("2", "2"),
    "sharded weights": Case("1", "r", weights="0"),
    "masked": Case("1", "r", masked=True, batch=3),
    "masked, batch first": Case("0", "r", masked=True, batch_first=True),
    "unbatched": Case("r", "r", batch=None),
    "unbatched, time": Case("0", batch=None),
    "mesh of two dimensions": Case("1r", "r1", weights="rr"),
    "twice the batch": Case("11", "rr", weights="0r"),
}


def assert_placed(case: Case, placed: dict[str, str]) -> None:
    """Results are where the input is, or replicated; gradients where their tensors are."""
    batch_dim = "0" if case.batch_first else "1"
    split = [case.batch is not None and letter == batch_dim for letter in case.input]
    expected = {
        "result 0": "".join(batch_dim if one else "r" for one in split),
        "result": "".join("1" if one else "r" for one in split),
        "gradient of input 0": case.input,
        "gradient of input": case.states,
    }
    for key, found in placed.items():
        assert found == expected.get(key, expected.get(key.rpartition(" ")[0], case.weights)), key


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@every_layer
def test_dtensors(name, case, processes):
    """Catches: results or gradients that differ from those on plain tensors, or that are placed elsewhere than DTensor
    would place them.
    """
    layer, *given = distributed.given(case, name, torch.float64)
    expected = distributed.outcome(layer, *given)
    for found, placed in processes.run(on_dtensors, case, name, "torch", torch.float64):
        assert_placed(case, placed)
        for key, value in expected.items():
            assert_same_mathematics(found[key], value, key)


@pytest.mark.skipif(GUESSES_STRIDES, reason="before PyTorch 2.13 torch.compile takes no layer on DTensors: it raises")
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_dtensors_compiled(name, processes):
    """Catches: a layer on DTensors that torch.compile cannot take in one graph."""
    case = CASES["batch"]
    expected = distributed.outcome(*distributed.given(case, name, torch.float64))
    for found, placed in processes.run(on_dtensors, case, name, "torch", torch.float64, "cpu", True):
        assert_placed(case, placed)
        for key, value in expected.items():
            assert_same_mathematics(found[key], value, key)


@every_layer
def test_dtensors_mixed_with_others_are_refused(name, processes):
    """Catches: a plain tensor silently taken for a part, or an error that does not name it."""
    for found in processes.run(mixed_up, name):
        assert "weight_ih_l0 is not: distribute it too" in found["weights"]
        assert all(f"{what} is not" in found[what] for what in ("hx", "lengths", "resets"))
        assert "weight_ih_l0 on" in found["mesh"]


# ---- The example, and the cap on programs ----------------------------------------------------------------------------


def run_python(*arguments: str, **environment: str) -> str:
    """What a Python process prints."""
    ended = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_example_with_torchrun(tmp_path):
    """Catches: an example that does not run as docs/distributed.md says, or does not train."""
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    printed = run_python(*launcher, str(ROOT / "examples" / "distributed_training.py"), str(tmp_path / "model.pt"))
    losses = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step")]
    assert len(losses) > 1 and losses[-1] < losses[0] / 2
    saved = torch.load(tmp_path / "model.pt")
    assert "layer.weight_hh_l0" in saved and all(type(value) is torch.Tensor for value in saved.values())


def test_cap_on_programs_from_the_environment():
    """Catches: RNN_GPU_MAX_PROGRAMS, which torchrun hands to every process, without an effect on the plan."""
    plan = "import rnn_gpu; print(rnn_gpu.explain(rnn_gpu.LSTM(8, 1024), 64, 'h100'))"
    assert ": 128 programs" in run_python("-c", plan)
    assert ": 128 programs" not in run_python("-c", plan, RNN_GPU_MAX_PROGRAMS="120")


# ---- Two GPUs: ready, not run yet ------------------------------------------------------------------------------------


@pytest.fixture
def full_float32(monkeypatch):
    """Full products, as in the processes."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("how", ["ddp", "ddp, no_sync", "fsdp"])
@every_layer
@needs_two_gpus
def test_training_over_nccl(name, how, backend, gpu_processes, full_float32):
    """Catches: launches and collectives that wait for each other, a launch on another device or stream than its input,
    weights that flatten_parameters moved away from `fully_shard`.
    """
    room = torch.cuda.get_device_properties(0).multi_processor_count // 2
    training = Training(name, how, backend=backend, dtype=torch.float32, device="cuda", max_programs=room)
    one = training.of("torch.nn").alone()
    expected = together(train(dataclasses.replace(one, device="cpu", dtype=torch.float64)))
    peer = together(train(one))
    for found in gpu_processes.run(train, training):
        assert_close_to_oracle(together(found), expected, peer)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@needs_two_gpus
def test_checkpoints_over_nccl(backend, gpu_processes, tmp_path):
    """Catches: a sharded model on GPUs that does not go on from a checkpoint as if nothing had been."""
    training = Training("GRU", "fsdp", backend=backend, dtype=torch.float32, device="cuda")
    assert_checkpoints(gpu_processes.run(checkpoints, training, str(tmp_path)))


def outcome_on(device: str, name: str, dtype: torch.dtype, backend: str, case: Case) -> torch.Tensor:
    """The outcome of a case in this process."""
    layer, input, states, masks, gradients = distributed.given(case, name, torch.float32)
    moved = lambda tensors: [tensor.to(device, dtype) for tensor in tensors]
    with distributed.on_backend(backend):
        found = distributed.outcome(
            layer.to(device, dtype), *moved([input]), moved(states), {k: m.to(device) for k, m in masks.items()},
            moved(gradients),
        )  # fmt: skip
    rnn_gpu.check()
    return together(found)


@pytest.mark.parametrize("case", [Case("1", "1"), Case("1", "r", batch=3), Case("r", "r")], ids=str)
@every_layer
@needs_two_gpus
def test_dtensors_over_nccl(name, case, gpu_processes, full_float32):
    """Catches: results or gradients on a part of the batch that differ from those of the whole."""
    expected = outcome_on("cpu", name, torch.float64, "torch", case)
    peer = outcome_on("cuda", name, torch.float32, "torch", case).cpu()
    for found, _ in gpu_processes.run(on_dtensors, case, name, "triton", torch.float32, "cuda"):
        assert_close_to_oracle(together(found), expected, peer)


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@every_layer
@needs_two_gpus
def test_layer_on_a_device_that_is_not_the_current_one(name, masked, full_float32):
    """Catches: a launch, a buffer or a stream of the current device in place of the input's."""
    case = Case("r", "r", masked=masked)
    expected = outcome_on("cpu", name, torch.float64, "torch", case)
    peer = outcome_on("cuda:1", name, torch.float32, "torch", case)
    with torch.cuda.device(0):
        found = outcome_on("cuda:1", name, torch.float32, "triton", case)
        assert torch.cuda.current_device() == 0
    assert found.device == torch.device("cuda:1")
    assert_close_to_oracle(found, expected, peer)


class Outputs(torch.nn.Module):
    """A layer's outputs alone, which DataParallel can put together."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, input):
        return self.layer(input)[0]


@every_layer
@needs_two_gpus
def test_data_parallel(name, full_float32):
    """Catches: replicas, which have no parameters of their own, that compute with the weights of the first device, or
    whose threads compile or launch in each other's place.
    """
    model = Outputs(getattr(rnn_gpu, name)(8, 48, num_layers=2, batch_first=True).cuda(0))
    parallel, leaves = torch.nn.DataParallel(model, [0, 1]), list(model.parameters())
    input = torch.randn(6, 5, 8, device="cuda:0")
    exact = copy.deepcopy(model).cpu().double()
    outcome = lambda module, x, leaves: [found := module(x), *torch.autograd.grad(found.pow(2).sum(), leaves)]
    with rnn_gpu.backend("torch"):
        expected = outcome(exact, input.cpu().double(), list(exact.parameters()))
        peer = outcome(model, input, leaves)
    with rnn_gpu.backend("triton"):
        for _ in range(2):  # the second time calls are remembered
            found = outcome(parallel, input, leaves)
            for a, e, p in zip(found, expected, peer, strict=True):
                assert_close_to_oracle(a.detach().cpu(), e.detach(), p.detach().cpu())
    rnn_gpu.check()


@needs_two_gpus
def test_autotune_on_a_device_that_is_not_the_current_one():
    """Catches: times of a GPU that does nothing meanwhile: less than the host needs to queue a call."""
    layer = rnn_gpu.LSTM(512, 512, device="cuda:1", dtype=torch.bfloat16)
    input = torch.randn(256, 16, 512, device="cuda:1", dtype=torch.bfloat16)
    took = []
    for index in (0, 1):
        with torch.cuda.device(index):
            words = rnn_gpu.autotune(layer, input, again=True).reason
        took.append(float(re.search(r"([\d.]+) us a step", words)[1]))
    assert max(took) < 1.5 * min(took), took
