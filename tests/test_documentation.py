"""README, docs/ and the scripts do what they say: examples run, commands exist, links lead somewhere."""

import ast
import dataclasses
import importlib
import linecache
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import rnn_gpu
from rnn_gpu import settings, zoo

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)

# Run as printed, in a fresh copy of the checkout whose .venv is the environment of the tests. They take seconds.
QUICK = [
    "make help",
    "python -m rnn_gpu",
    'python -m rnn_gpu explain gru 32 --batch-size 64 --device "RTX 4090"',
    "python -m perf.report",
    'TRITON_INTERPRET=1 RNN_GPU_BACKEND=triton python -c "import torch, rnn_gpu; '
    'print(rnn_gpu.LSTM(3, 24)(torch.randn(4, 2, 3))[0].shape)"',
]
MOVING = [
    'grep -rnwE "(LSTM|GRU|RNN)(Cell)?" --include="*.py" --include="*.ipynb" .',
    r'grep -rnE "getattr\((torch\.)?nn(\.modules(\.rnn)?)?," --include="*.py" --include="*.ipynb" .',
]
# Beside targets of make, scripts of perf/ and examples/, and tests, whose existence is checked below.
SHELL = [
    "source .venv/bin/activate",
    "pip install .",
    "export OMP_WAIT_POLICY=passive",
    *MOVING,
]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return [textwrap.dedent(text) for _, found, text in FENCE.findall(page.read_text("utf-8")) if found == language]


def commands() -> list[str]:
    """Every command line of every page, once."""
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    lines = [re.sub(r"\s+#.*$", "", line).strip() for line in lines]
    return list(dict.fromkeys(filter(None, lines)))


@pytest.mark.compiled  # with TRITON_INTERPRET=1 the kernels take CPU tensors
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_examples_run(page, monkeypatch):
    """Catches: an example that fails, or leaves a setting behind."""
    for name in ("_backend", "_memory", "_max_programs"):
        monkeypatch.setattr(settings, name, getattr(settings, name))
    # PyTorch's own samples, which other tests take, forbid to set switches for the rest of the process.
    monkeypatch.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", True)
    before = rnn_gpu.current_backend(), rnn_gpu.current_memory(), torch.backends.cudnn.allow_tf32
    names = {"__name__": "example"}
    for number, block in enumerate(blocks(page, "python"), 1):
        file = f"{page.name}, example {number}"
        linecache.cache[file] = len(block), None, block.splitlines(True), file  # as a notebook: Triton reads functions
        exec(compile(block, file, "exec"), names)
    assert before == (rnn_gpu.current_backend(), rnn_gpu.current_memory(), torch.backends.cudnn.allow_tf32)


def test_commands_exist():
    """Catches: a command of a page that is not there, or has an option that its script does not know."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands():
        words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
        if words[0] == "make":
            assert set(words[1:]) <= targets, command
        elif words[:2] == ["python", "-m"] and words[2].startswith("perf."):
            main = importlib.import_module(words[2]).main
            for more, status in (("--help", 0), ("--no-such-option", 2)):
                with pytest.raises(SystemExit) as ended:
                    main([*words[3:], more])
                assert ended.value.code == status, command
        elif words[:3] == ["python", "-m", "pytest"] or words[0] == "torchrun" or "examples/" in command:
            assert all((ROOT / word).exists() for word in words if word.endswith(".py")), command
        else:
            assert command in SHELL or command in QUICK, f"neither known nor run: {command}"
    assert set(SHELL + QUICK) <= set(commands()), "what no page says (any more)"


def checkout(where: Path) -> Path:
    """A copy of what git has, and would take, as a fresh clone has it; its .venv is the environment of the tests."""
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listed, capture_output=True, text=True)
    if found.returncode != 0 or not (Path(sys.prefix) / "bin" / "activate").exists():
        pytest.skip("not a git checkout, or not a virtual environment")
    for name in filter(lambda name: (ROOT / name).exists(), found.stdout.splitlines()):
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, where / name, follow_symlinks=False)
    (where / ".venv").symlink_to(sys.prefix)
    return where


@pytest.mark.compiled
def test_quick_commands_run_in_a_fresh_checkout(tmp_path):
    """Catches: a command that fails from where its page has led to."""
    where = checkout(tmp_path / "fresh")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RNN_GPU_", "PYTHONPATH", "TRITON_"))}
    for command in QUICK:
        script = f"set -e; source .venv/bin/activate; {command}"
        done = subprocess.run(["bash", "-c", script], cwd=where, env=clean, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_the_commands_for_moving_find_every_spelling(tmp_path):
    """Catches: a way to write a layer's name that is passed by, and stays torch.nn's; words that are no such name."""
    found, other = (
        "layer = torch.nn.LSTM(3, 4)", "rnn = nn.GRU(3, 4)", "cell = nn.LSTMCell(3, 4)", "from torch.nn import LSTM",
        "from torch.nn import Linear, GRUCell as Cell", "    RNN,", "layer = LSTM(3, 4)", "kinds = {'lstm': LSTM}",
        "make = functools.partial(nn.RNN, batch_first=True)", "if isinstance(module, nn.LSTM):", "x: nn.modules.GRU",
        "layer = getattr(nn, kind)(3, 4)", "layer = getattr(torch.nn, name.upper())(3, 4)",
        "layer = getattr(torch.nn.modules.rnn, kind)", 'layer = getattr(torch.nn, "LSTM")',
    ), ("class MyLSTM(nn.Module):", "lstm = 3", "from torch import nn", "BiLSTM = 3", "getattr(net, kind)")  # fmt: skip
    (tmp_path / "model.py").write_text("\n".join([*found, *other]) + "\n")
    (tmp_path / "notebook.ipynb").write_text('"source": ["rnn = nn.LSTM(3, 4)\\n"]\n')
    seen = set()
    for command in MOVING:
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
        seen |= {tuple(line.split(":", 2)) for line in done.stdout.splitlines()}
    assert ("./notebook.ipynb", "1") in {one[:2] for one in seen}
    assert {text for file, _, text in seen if file == "./model.py"} == set(found)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "perf" / "README.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    """Catches: a page that was moved, or never written."""
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for name in re.findall(r"`((?:docs|tests|perf|examples|kernels|rnn_gpu)/[\w./-]+)`", page.read_text("utf-8")):
        assert (ROOT / name).exists() or name.startswith("perf/results/new"), name


def test_the_page_on_cells_has_every_field_and_cell():
    """Catches: an instruction that was true once, a field that nobody is told of."""
    text = (ROOT / "docs" / "cells.md").read_text("utf-8")
    for field in dataclasses.fields(rnn_gpu.Cell):
        assert f"`{field.name}`" in text or field.name in ("name", "step", "mode"), field.name
    for layer in zoo.ZOO:
        assert f"`{layer.__name__}`" in text, layer.__name__


def test_the_list_of_names_is_whole():
    """Catches: a public name that the list at the top of the reference lacks, one that is gone, one that is there twice
    or has no line; a name that the directives below leave out.
    """
    listing, _, directives = (ROOT / "docs" / "api.md").read_text("utf-8").partition("\n## ")
    rows = re.findall(r"^\| (`.*`) \| (.+) \|$", listing, re.MULTILINE)
    listed = [name for names, _ in rows for name in re.findall(r"`(\w+)`", names)]
    assert sorted(listed) == sorted(dir(rnn_gpu))
    for module in (rnn_gpu.init, zoo):
        (words,) = (words for names, words in rows if names == f"`{module.__name__.removeprefix('rnn_gpu.')}`")
        assert sorted(re.findall(r"`\w+\.(\w+)`", words)) == sorted(dir(module))
    for name in set(rnn_gpu.__all__) - {"init"}:
        assert re.search(rf":: (rnn_gpu\.)?{name}$", directives, re.MULTILINE), name


def test_every_page_is_in_the_index():
    """Catches: a page that nobody finds."""
    listed = re.findall(r"^[a-z_]+$", (ROOT / "docs" / "index.md").read_text("utf-8"), re.MULTILINE)
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} == {*listed, "index"}


def test_the_site_builds(tmp_path):
    """Catches: a page or a docstring that Sphinx warns of."""
    pytest.importorskip("sphinx", reason="Sphinx is not installed: it comes with the extra `docs`")
    pytest.importorskip("furo", reason="furo is not installed: it comes with the extra `docs`")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "num_layers" in (tmp_path / "api.html").read_text("utf-8")


def test_scripts_let_idle_threads_sleep():
    """Catches: a script of ours whose threads spin on busy cores, because torch was imported before it could say so."""
    for path in sorted((ROOT / "examples").glob("*.py")):
        order = []  # `common` says it where it is imported
        for statement in ast.parse(path.read_text("utf-8")).body:
            if isinstance(statement, ast.Import) and statement.names[0].name in ("common", "torch"):
                order.append("torch" if statement.names[0].name == "torch" else "policy")
            elif "OMP_WAIT_POLICY" in ast.unparse(statement) and isinstance(statement, ast.Expr):
                order.append("policy") if "setdefault" in ast.unparse(statement) else None
        assert order[:2] == ["policy", "torch"], path.name
    program = "import os, sys, perf; assert os.environ['OMP_WAIT_POLICY'] == 'passive' and 'torch' not in sys.modules"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, timeout=60)
