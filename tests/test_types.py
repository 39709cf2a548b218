"""The package as type checkers see it: a user's script, right lines and wrong ones."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RIGHT, WRONG = ROOT / "tests" / "typing" / "right.py", ROOT / "tests" / "typing" / "wrong.py"


def mypy() -> set[tuple[str, int]]:
    """File and line of each error of `mypy --strict`."""
    pytest.importorskip("mypy", reason="mypy is not installed: it comes with the extra `dev`")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent", "--config-file", os.devnull]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), str(RIGHT), str(WRONG)]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = re.findall(r"^(.+?):([0-9]+): error: ", done.stdout, re.MULTILINE)
    return {(Path(file).name, int(line)) for file, line in found}


def pyright() -> set[tuple[str, int]]:
    """File and line, from 1 on, of each error of pyright."""
    pytest.importorskip("pyright", reason="pyright is not installed: it comes with the extra `dev`")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(RIGHT), str(WRONG)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == 2, done.stdout
    errors = [one for one in found["generalDiagnostics"] if one["severity"] == "error"]
    return {(Path(one["file"]).name, one["range"]["start"]["line"] + 1) for one in errors}


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_object_to_what_is_wrong_and_to_nothing_else(checker):
    """Catches: a signature that accepts anything, a result that is Any, and one that a right call does not fit."""
    found = mypy() if checker == "mypy" else pyright()
    lines = WRONG.read_text().splitlines()
    assert found == {("wrong.py", number) for number, line in enumerate(lines, 1) if line.endswith("# wrong")}


@pytest.mark.compiled  # with TRITON_INTERPRET=1 the kernels take CPU tensors
def test_the_script_runs():
    """Catches: types that are right of a program that is not."""
    runpy.run_path(str(RIGHT))
