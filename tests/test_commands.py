"""The commands of `python -m rnn_gpu` and `python -m perf.*`: how they end."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from rnn_gpu.command import BROKEN_PIPE, known_gpu
from rnn_gpu.kernels.devices import DEVICES

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [path for name in ("rnn_gpu", "perf") for path in sorted((ROOT / name).glob("*.py"))]
PIPED = [
    "rnn_gpu",
    "rnn_gpu explain lstm 512",
    "perf.latency --fit",
    "perf.measure --list",
    "perf.resources --help",
]


def test_every_command_ends_in_the_same_way():
    """Catches: a command that is new, and ends in a traceback where others end quietly."""
    ends = [path for path in COMMANDS if re.search(r"__main__|sys\.exit\(main", path.read_text("utf-8"))]
    commands = {path.name for path in ends if re.search(r"^(if __name__|exit_with)", path.read_text("utf-8"), re.M)}
    assert {"__main__.py", "selfcheck.py", "check_cell.py", "latency.py", "report.py"} <= commands
    for path in ends:
        if path.name in commands:
            assert re.search(r"^ *exit_with\(\w+\)$", path.read_text("utf-8"), re.M), path


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("command", "errors"), [*((one, subprocess.PIPE) for one in PIPED), (PIPED[1], subprocess.STDOUT)]
)
def test_a_command_ends_quietly_where_its_reader_has_gone(command, errors):
    """Catches: a traceback, or words of Python at its end, after `| head -3` or `2>&1 | head -3`; another exit status
    than that of what SIGPIPE has ended.
    """
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    running = subprocess.Popen(
        [sys.executable, "-m", *command.split()],
        cwd=ROOT,
        env=buffered,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    running.stdout.close()
    said = running.stderr.read() if running.stderr else ""
    assert (running.wait(timeout=300), said) == (BROKEN_PIPE, "")


@pytest.mark.parametrize(
    ("command", "words"),
    {
        "rnn_gpu.__main__ explain lstm -4": "argument hidden_size: should be a positive number, got: -4",
        "perf.latency lstm -5 bf16": "argument hidden_size: should be a positive number, got: -5",
        "perf.latency lstm 512 bf16 --batch 0": "argument --batch: should be a positive number, got: 0",
        "perf.profile --hidden-size 0": "argument --hidden-size: should be a positive number, got: 0",
        "perf.profile --batch-size many": "argument --batch-size: invalid int value: 'many'",
        "perf.tune --hidden-size 0": "argument --hidden-size: should be a positive number, got: 0",
        "perf.tune --check --recorded nowhere": "argument --recorded: no such folder: nowhere",
        "perf.report --results nowhere": "argument --results: no such folder: nowhere",
        "perf.resources --hidden-size -3": "argument --hidden-size: should be a positive number, got: -3",
        "perf.resources --jobs 0": "argument --jobs: should be a positive number, got: 0",
        "perf.resources --documented --beside nowhere": "argument --beside: [Errno 2] No such file",
        "perf.profile --device H20O": "argument --device: unknown GPU 'H20O'; the nearest are 'H20', 'H200'",
        "perf.tune --device T4": "argument --device: NVIDIA T4: too old for the kernels",
        "perf.benchmark --budget -1": "argument --budget: should be a positive number, got: -1",
        "perf.tune --budget nan": "argument --budget: should be a positive number, got: nan",
        "perf.overhead --rounds 0": "argument --rounds: should be a positive number, got: 0",
        "perf.overhead --device H200": "argument --device: Invalid device string: 'H200'",
        "perf.benchmark --device H200": "argument --device: Invalid device string: 'H200'",
        "perf.benchmark --device cuda:99": "argument --device: ",
    }.items(),
)
def test_a_wrong_argument_is_a_line_of_help(command, words, capsys):
    """Catches: a traceback from the depths of a command, minutes of work before it, or a README that is written anew
    from no results, for an argument that could have been refused at once.
    """
    module, *arguments = command.split()
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main(arguments)
    assert ended.value.code == 2 and f"error: {words}" in capsys.readouterr().err


def test_gpus_have_one_set_of_names():
    """Catches: a command that takes a GPU by the library's own key alone, and another GPU for it."""
    for key, gpu in DEVICES.items():
        assert known_gpu(key) == known_gpu(gpu.name) == known_gpu(gpu.name.lower()) == key


def test_another_broken_pipe_is_a_mistake_and_says_so():
    """Catches: a broken pipe of a command's own, to a process it has started say, that is taken for its reader's."""
    program = """
import os
from rnn_gpu.command import exit_with
def main():
    read, write = os.pipe()
    os.close(read)
    os.write(write, b"words")
exit_with(main)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr.splitlines()[-1]
