"""What only a GPU runs names nothing that is gone, and calls nothing with arguments that it does not take: on a machine
without one nobody else would tell. Read, not run.
"""

import ast
import importlib
import inspect
import types
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
OWN = ("rnn_gpu", "tests", "perf")
FILES = [path for path in (*ROOT.glob("tests/*.py"), *ROOT.glob("perf/*.py")) if "cuda" in path.read_text()]


def own(thing) -> bool:
    """Whether a module, or what a module defines, is of this project."""
    name = thing.__name__ if isinstance(thing, types.ModuleType) else getattr(thing, "__module__", None) or ""
    return name.partition(".")[0] in OWN


def bound(function: ast.AST) -> set[str]:
    """The names that a function binds, inner functions included."""
    names = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    names |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    return names | {n.name for n in ast.walk(function) if isinstance(n, ast.FunctionDef) and n is not function}


def imported(node: ast.ImportFrom, package: str) -> dict[str, object]:
    """What an import in a function binds."""
    module = importlib.import_module("." * node.level + (node.module or ""), package)
    names = {}
    for alias in node.names:
        if not hasattr(module, alias.name) and hasattr(module, "__path__"):
            importlib.import_module(f"{module.__name__}.{alias.name}")
        names[alias.asname or alias.name] = getattr(module, alias.name)
    return names


class Reader(ast.NodeVisitor):
    """Collects what is wrong in a file."""

    def __init__(self, names: dict[str, object], package: str):
        self.names, self.package, self.wrong = names, package, []

    def resolved(self, node: ast.AST):
        """The module, function or class that an expression names; None for anything else."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        base = self.resolved(node.value) if isinstance(node, ast.Attribute) else None
        return getattr(base, node.attr, None) if isinstance(base, types.ModuleType) else None

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before, self.names = self.names, {name: self.names[name] for name in self.names.keys() - bound(node)}
        for inner in ast.walk(node):
            if isinstance(inner, ast.ImportFrom) and (inner.level or inner.module.partition(".")[0] in OWN):
                self.names |= imported(inner, self.package)
        self.generic_visit(node)
        self.names = before

    def visit_Attribute(self, node: ast.Attribute) -> None:
        base = self.resolved(node.value)
        if isinstance(base, types.ModuleType) and own(base) and not hasattr(base, node.attr):
            self.wrong.append(f"line {node.lineno}: {base.__name__} has no {node.attr}")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = self.resolved(node.func)
        plain = not any(isinstance(a, ast.Starred) for a in node.args) and all(k.arg for k in node.keywords)
        if plain and (inspect.isfunction(called) or inspect.isclass(called)) and own(called):
            try:
                inspect.signature(called).bind(*node.args, **{k.arg: k.value for k in node.keywords})
            except ValueError:  # an exception's constructor: no signature
                pass
            except TypeError as error:
                self.wrong.append(f"line {node.lineno}: {called.__name__}: {error}")
        self.generic_visit(node)


def wrong(text: str, names: dict[str, object], package: str) -> list[str]:
    """What is wrong in a file's text, read with the names of its module."""
    reader = Reader(names, package)
    reader.visit(ast.parse(text))
    return reader.wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_name_what_there_is(path):
    """Catches: a name that was taken away, or a signature that was changed, and a test for a GPU that still has it."""
    module = importlib.import_module(f"{path.parent.name}.{path.stem}")
    assert not (found := wrong(path.read_text(), dict(vars(module)), path.parent.name)), "\n".join(found)


def test_control_what_is_gone_is_found():
    """Catches: a reader that sees nothing, or that takes a name of a function's own for a module."""
    text = """
def test(measured):
    from rnn_gpu.kernels import launch
    from rnn_gpu.kernels.plan import plan
    measured.anything(plan.anything)
    launch.HOLDER
    launch.check()
    launch.Rows(1, 2, steps=3)
    plan("lstm")
"""
    found = wrong(text, {"measured": importlib.import_module("rnn_gpu.measured")}, "tests")
    assert [line.partition(":")[0] for line in found] == ["line 6", "line 8", "line 9"], found
