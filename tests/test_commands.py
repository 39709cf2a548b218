"""The commands of `python -m rnn_gpu` and `python -m perf.*`: how they end."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from rnn_gpu.command import BROKEN_PIPE

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
