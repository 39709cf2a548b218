"""How float32 products are made: every way in which a user can turn tf32 off or on, and exporting after each."""

import json
import subprocess
import sys

import pytest
import torch

from rnn_gpu import versions

# Each way in a process of its own, forked after torch is imported: the switches are the process's, and cannot be put
# back as they were.
SCRIPT = """
import json, os, sys, torch, rnn_gpu
from rnn_gpu import backends

def exports(layer, *arguments):
    try:
        return bool(torch.export.export(layer, arguments))
    except RuntimeError as error:
        return False

for way in json.loads(sys.argv[1]):
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        exec(way)
        found = dict(
            rnn_gpu=backends.precision_of("float32"),
            torch=torch.backends.cudnn.rnn.fp32_precision,
            exports=exports(rnn_gpu.GRU(2, 3), torch.zeros(2, 1, 2)),
            torch_exports=exports(torch.nn.Linear(2, 3), torch.zeros(1, 2)),
        )
        print(json.dumps([way, found]), flush=True)
        os._exit(0)
    os.waitpid(process, 0)
"""
FULL = (
    "torch.backends.cudnn.allow_tf32 = False",
    "torch.backends.cudnn.set_flags(_allow_tf32=False)",
    "torch.backends.cudnn.rnn.fp32_precision = 'ieee'",
    "torch.backends.cudnn.fp32_precision = 'ieee'",
    "torch.backends.fp32_precision = 'ieee'",
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cudnn.rnn.fp32_precision = 'ieee'",
)
TF32 = (
    "",
    "torch.backends.cudnn.allow_tf32 = False; torch.backends.cudnn.allow_tf32 = True",
    "torch.backends.cuda.matmul.allow_tf32 = False",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cudnn.rnn.fp32_precision = 'tf32'",
    "torch.set_float32_matmul_precision('highest')",
    "torch.set_float32_matmul_precision('medium')",
)
BY_ALL = FULL[3:5]  # which PyTorch 2.11 does not pass on to its own RNNs, either
VERSION = versions.minor(torch.__version__)
RECOMMENDED = FULL[0]  # by README.md: it leaves exporting as it was


@pytest.fixture(scope="module")
def found():
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(FULL + TF32)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(line) for line in run.stdout.splitlines())


@pytest.mark.parametrize("way", FULL + TF32, ids=lambda way: way.replace("torch.", "") or "default")
def test_switches_of_pytorch(found, way):
    """Catches: a switch of PyTorch's that turns tf32 off for its own layers, and not for ours, or the reverse; an
    export that fails where PyTorch alone would not.
    """
    assert found[way]["rnn_gpu"] == ("tf32" if found[way]["torch"] == "tf32" else "ieee")
    if way in TF32 or not (way in BY_ALL and VERSION < (2, 13)):
        assert found[way]["rnn_gpu"] == ("ieee" if way in FULL else "tf32")
    assert found[way]["exports"] == found[way]["torch_exports"]


def test_the_recommended_switch_leaves_exporting_as_it_was(found):
    """Catches: advice after which torch.export raises PyTorch's error for mixed switches."""
    assert found[RECOMMENDED]["exports"]


def test_sixteen_bits_have_no_choice():
    """Catches: a precision for types that have one product only."""
    from rnn_gpu import backends

    assert backends.precision_of("bfloat16") is None and backends.name_of(torch.float32) == "float32"
