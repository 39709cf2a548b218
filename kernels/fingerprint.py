"""What a function computes, as a text that is the same in every process: for the names of cells (spec.py)."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

PLAIN = (bool, int, float, complex, str, bytes, type(None))


def spelled(value: Any, module: str | None = None, seen: frozenset[CodeType] = frozenset()) -> str:
    """Plain values as they are written. A function: its text without comments and docstring, and so that of the values
    and the functions of its own module that it uses; `seen` are those on the way to this one. Of anything else the type
    alone: it may differ from process to process.
    """
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(spelled(one, module, seen) for one in value)}]"
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(spelled(one, module, seen) for one in value))}}}"
    if isinstance(value, functools.partial):
        return spelled([value.func, value.args, sorted(value.keywords.items())], module, seen)
    if isinstance(value, CodeType):
        return f"{value.co_code.hex()} {value.co_names} {spelled(value.co_consts, module, seen)}"
    if not isinstance(value, FunctionType):
        return type(value).__qualname__
    if value.__code__ in seen or module not in (None, value.__module__):
        return value.__qualname__
    inner = value.__module__, seen | {value.__code__}
    used = [f"{name} = {spelled(one, *inner)}" for name, one in sorted(_used(value))]
    defaults = value.__defaults__, sorted((value.__kwdefaults__ or {}).items())
    return "\n".join([_text(value.__code__), spelled(defaults, *inner), *used])


def _used(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function takes from around it, by name."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not filled yet
            yield name, None
    for name in _names(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _names(code: CodeType) -> set[str]:
    """Names that are no local variables, of the functions inside, too."""
    return {*code.co_names}.union(*(_names(one) for one in code.co_consts if isinstance(one, CodeType)))


def _text(code: CodeType) -> str:
    """As Python's parser writes it, which no version and no comment changes; else the bytecode of this version."""
    try:
        (found,) = ast.parse(textwrap.dedent(inspect.getsource(code))).body
    except (OSError, SyntaxError, ValueError, TypeError):
        return spelled(code)
    if not isinstance(found, ast.FunctionDef):  # a lambda may be one of many in its line
        return spelled(code)
    if ast.get_docstring(found) is not None:
        found.body = found.body[1:] or [ast.Pass()]
    found.name, found.decorator_list = "", []
    return ast.unparse(found)
