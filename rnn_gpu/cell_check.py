"""Whether a cell of one's own is right: `check_cell`, and the command `python -m rnn_gpu.check_cell`.

Three parts. The step in plain torch, by finite differences. Its Triton functions against it, in Triton's interpreter:
element by element, where a wrong equation can be named, then in the loop over time. And compiled for GPUs that need not
be there. The last two run in processes of their own, because interpreted and compiled kernels cannot share one; so it
works from a notebook.
"""

import argparse
import contextlib
import functools
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from . import backends, reference, settings
from .kernels.spec import FUNCTIONS, Cell, imported
from .own import CellLayer
from .own import layer as layer_of

# Largest relative error, by norm, of an equation in float32: 1e-6 is usual, a wrong one gives 1e-2 or more.
ALLOWED = 1e-4
# In the loop: times the error of the same loop by the step in the same type, or of the type's own rounding.
PEER_FACTOR, FLOOR_EPS = 2.0, 16
TF32_EPS = 2.0**-10
ARCHITECTURES = {80: "a100", 90: "h200", 100: "b200"}
COMPILED = ((512, "bfloat16"), (64, "bfloat16"))  # hidden size and type: several programs, and one


class CellError(ValueError):
    """A cell that is wrong; its text is the report."""


@dataclass
class Report:
    """What `check_cell` found, line by line, and how many of the lines are errors. show: sees each line at once."""

    cell: str
    lines: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    show: Callable[[str], None] | None = None

    def right(self, line: str) -> None:
        """Note what is right."""
        self._add(f"  ok     {line}")

    def note(self, line: str) -> None:
        """Note what is neither right nor wrong."""
        self._add(f"         {line}")

    def wrong(self, line: str) -> None:
        """Note an error."""
        self._add(f"  WRONG  {line}")
        self.errors.append(line)

    def _add(self, line: str) -> None:
        self.lines.append(line)
        if self.show is not None:
            self.show(line)

    @property
    def verdict(self) -> str:
        """The last line: the first error is the one to look at."""
        return f"{self.cell} is " + ("all right" if not self.errors else f"wrong; the first error: {self.errors[0]}")

    def __str__(self) -> str:
        """All lines."""
        return "\n".join([f"cell {self.cell}:", *self.lines, self.verdict])

    __repr__ = __str__


def check_cell(cell: Cell | type[CellLayer]) -> Report:
    """Is a cell of your own right? Checked in a minute or two, with no GPU: its step's gradient by finite differences
    in float64; the Triton functions against the step, element by element and then in the loop, in the interpreter (all
    types, several programs and one, odd sizes, both directions, rows that end early and start anew, lean memory);
    registers, spills and instructions of a time step for sm_80, 90 and 100.

    cell: a description, or the class that `layer` made of it. -> a report in words, for print. CellError, with that
    report, where something is wrong: its first error names the first equation that is. TypeError for what is neither.

    The cell's functions stand at the top of a file, or of a notebook; they may use what they import, and functions and
    numbers beside them (Triton functions: `triton.jit` ones, and `GAIN = tl.constexpr(1.5)`).
    """
    report = _report(_cell_of(cell))
    if report.errors:
        raise CellError(str(report))
    return report


def _report(cell: Cell, show: Callable[[str], None] | None = None) -> Report:
    """The same, right or wrong, told line by line."""
    report = Report(cell.name, show=show)
    _check_step(cell, report)
    if cell.forward is None:
        report.note("no Triton functions: it runs as a loop over time in PyTorch, by its step")
    elif backends.triton_missing():
        report.note(f"{backends.triton_missing()}: the Triton functions were not looked at")
    elif not report.errors:
        with tempfile.TemporaryDirectory() as folder:
            path, name = _written(cell, folder)
            for part in ("interpreted", "compiled"):
                if not report.errors:
                    _in_a_process(part, path, name, report)
    return report


def _cell_of(given: Any) -> Cell:
    found = getattr(given, "cell", given) if isinstance(given, type) else given
    if not isinstance(found, Cell):
        what = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        raise TypeError(
            f"check_cell expects a Cell, or the class that rnn_gpu.layer has made of one, got: {what} "
            "(`python -m rnn_gpu` says whether the built-in layers are right on a machine)"
        )
    return found


# ---- The step --------------------------------------------------------------------------------------------------------


def _drawn(cell: Cell, count: int, seed: int, fewest: int = 1) -> list[tuple[Tensor, ...]]:
    """x, r, carry, p of `count` elements [count], float64. The carry is what `fewest` to five steps from zero make."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n, scale=1.5: tuple(scale * torch.randn(n, count, generator=generator, dtype=torch.float64))
    parameters, carry = draw(len(cell.parameters), 0.5), tuple(torch.zeros(cell.carried, count, dtype=torch.float64))
    last = torch.randint(fewest, 6, (count,), generator=generator)
    for step in range(5):
        _, new = reference.step(cell, draw(cell.gates), draw(cell.gates), carry, parameters)
        carry = tuple(torch.where(step < last, a, b) for a, b in zip(new, carry, strict=True))
    return [draw(cell.gates), draw(cell.gates), carry, parameters]


def _check_step(cell: Cell, report: Report) -> None:
    """What it returns, and its gradient."""
    try:
        reference.check_step(cell)
    except ValueError as error:
        report.wrong(str(error))
        return
    parts = _drawn(cell, 6, 1)
    whole, alone = _results(cell, parts), _results(cell, [[one[2:4] for one in part] for part in parts])
    if not all(torch.allclose(one[2:4], other) for one, other in zip(whole, alone, strict=True)):
        report.wrong("step: a row or unit depends on others; only W_hh may mix units, and nothing mixes rows")
        return
    if cell.carries_h and not torch.allclose(whole[0], whole[1]):
        report.wrong("step: with carries_h the carry it returns should be (h,); what else is kept belongs in states")
        return
    leaves = [one.clone().requires_grad_() for part in parts for one in part]
    counts = [len(part) for part in parts]

    def flat(*values: Tensor) -> tuple[Tensor, ...]:
        given = iter(values)
        h, carry = reference.step(cell, *(tuple(itertools.islice(given, count)) for count in counts))
        return h, *carry

    try:
        torch.autograd.gradcheck(flat, leaves)
    except Exception as error:  # of whatever kind: the step is a user's
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        report.wrong(f"step: its gradient differs from finite differences: {first}")
        return
    if any(leaf._version for leaf in leaves):
        report.wrong("step: it changes what it is given in place")
        return
    report.right("step: gradient against finite differences, float64")


def _results(cell: Cell, parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    h, carry = reference.step(cell, *(tuple(part) for part in parts))
    return h, *carry


def _carry_names(cell: Cell) -> list[str]:
    return ["h"] if cell.carries_h else [*cell.states]


# ---- A process of its own --------------------------------------------------------------------------------------------


def _written(cell: Cell, folder: str) -> tuple[str, str]:
    """A file that describes the cell, and its name there: its own file, or one made of the functions' text."""
    module = sys.modules.get(getattr(cell.step, "__module__", None) or "")
    file = getattr(module, "__file__", None)
    if module is not None and file and file.endswith(".py") and os.path.exists(file):
        for name, value in vars(module).items():
            if value is cell or (isinstance(value, type) and getattr(value, "cell", None) is cell):
                qualified = module.__name__ if module.__name__ != "__main__" else os.path.abspath(file)
                return qualified, name
    path = os.path.join(folder, "own_cell.py")
    with open(path, "w", encoding="utf-8") as out:
        out.write(_source(cell))
    return path, "CELL"


def _source(cell: Cell) -> str:
    """A module's text with the functions of a cell, all that they use, and its description as CELL."""
    imports: dict[str, None] = {}
    texts: dict[str, str] = {}

    def add(name: str, value: Any) -> None:
        if name in texts:
            return
        function = getattr(value, "fn", value)  # of a Triton function
        if isinstance(value, types.ModuleType):
            imports[f"import {value.__name__} as {name}"] = None
            return
        module = sys.modules.get(getattr(function, "__module__", None) or "")
        if inspect.isfunction(function) and (module is None or _is_own(module, cell)):
            if function.__closure__:
                raise ValueError(f"check_cell: {name} uses variables of a function around it; define it at the top")
            text = textwrap.dedent(inspect.getsource(function))
            texts[name] = ""  # one that uses itself
            for word in dict.fromkeys(re.findall(r"\b[A-Za-z_]\w*\b", text)):
                if word in function.__globals__ and word != name:
                    add(word, function.__globals__[word])
            del texts[name]
            texts[name] = text
        elif module is not None and hasattr(function, "__qualname__"):
            imports[f"from {module.__name__} import {function.__qualname__} as {name}"] = None
        elif type(value).__name__ == "constexpr":
            imports["import triton.language"] = None
            texts[name] = f"{name} = triton.language.constexpr({value.value!r})\n"
        elif isinstance(value, (int, float, str, bool, tuple, type(None))):
            texts[name] = f"{name} = {value!r}\n"

    given = []
    for one in fields(cell):
        value = getattr(cell, one.name)
        if callable(value) or hasattr(value, "fn"):
            name = getattr(value, "fn", value).__name__
            add(name, value)
            given.append(f"{one.name}={name}")
        else:
            given.append(f"{one.name}={value!r}")
    head = ["from __future__ import annotations", *imports, "from rnn_gpu import Cell"]
    return "\n".join([*head, "", *texts.values(), f"CELL = Cell({', '.join(given)})", ""])


def _is_own(module: types.ModuleType, cell: Cell) -> bool:
    """Whether a module cannot be imported in another process: a notebook's, or the script's."""
    return (
        module.__name__ == "__main__"
        or not getattr(module, "__file__", None)
        or module.__name__ == cell.step.__module__
    )


def _loaded(path: str, name: str | None) -> list[Cell]:
    """The cells of a file, or of a module by its name: the one called `name`, or all of them."""
    if path.endswith(".py"):
        sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
        spec = importlib.util.spec_from_file_location(os.path.splitext(os.path.basename(path))[0], path)
        if spec is None or spec.loader is None or not os.path.exists(path):
            raise FileNotFoundError(f"no such file: {path}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where functions and pickle look for it
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(path)
    found: dict[str, Cell] = {}
    for key, value in vars(module).items():
        one = getattr(value, "cell", None) if isinstance(value, type) else value
        if isinstance(one, Cell) and one not in found.values():
            found[key] = one
        elif isinstance(one, Cell) and key == name:
            return [one]
    if name is not None:
        wanted = found.get(name) or next((one for one in found.values() if one.name == name), None)
        if wanted is None:
            raise ValueError(f"{path} has no cell {name!r}; it has {', '.join(found) or 'none'}")
        return [wanted]
    if not found:
        raise ValueError(f"{path} has no cell at its top level")
    return [*found.values()]


def _in_a_process(part: str, path: str, name: str, report: Report) -> None:
    """Run a part of the check in a process of its own, and take its lines."""
    hidden = ("TRITON_INTERPRET", "RNN_GPU_BACKEND", "RNN_GPU_MEMORY", "RNN_GPU_ALONE", "RNN_GPU_MAX_PROGRAMS")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment["PYTHONPATH"] = os.pathsep.join(one or os.getcwd() for one in sys.path)
    if part == "interpreted":
        environment["TRITON_INTERPRET"] = "1"
    run = "import sys; from rnn_gpu.cell_check import run_part; sys.exit(run_part(*sys.argv[1:]))"
    command = [sys.executable, "-c", run, part, path, name]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as running:
            assert running.stdout is not None
            for line in running.stdout:
                with contextlib.suppress(json.JSONDecodeError):
                    kind, text = json.loads(line)
                    getattr(report, kind)(text)
        if running.returncode != 0 and not report.errors:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no output"])[-1]
            report.wrong(f"the {part} part ended with: {last}")


# ---- In the interpreter ----------------------------------------------------------------------------------------------


def _relative(actual: Tensor, expected: Tensor) -> float:
    """Error by norm; infinite for NaN."""
    error, scale = (actual.double() - expected).norm().item(), expected.norm().item()
    if not math.isfinite(error):
        return math.inf
    return error / scale if scale > 0 else error


def _elementwise(cell: Cell, report: Report) -> None:
    """Every equation on its own: each result of the Triton functions against the step and its gradient."""
    from .kernels.element import elements

    parts = _drawn(cell, 1024, 2, fewest=0)
    generator = torch.Generator().manual_seed(3)
    d_h = torch.randn(1024, generator=generator, dtype=torch.float64)
    d_carry = torch.randn(cell.carried, 1024, generator=generator, dtype=torch.float64)
    parts = [tuple(one.float().double() for one in part) for part in parts]
    step = reference.StepBackward(cell, *parts)
    d_x, d_r, d_before, *d_p = step.backward(d_h.float().double(), tuple(d_carry.float().double()))
    split, names = cell.gates - cell.apart, cell.gate_names
    for gate in range(split):
        error = _relative(d_r[gate], d_x[gate])
        if error > ALLOWED:
            report.wrong(
                f"step: gate {names[gate]} does more with r than to add it to x (their gradients differ by "
                f"{error:.1g}): it is a gate apart; those stand last, and `apart` counts them"
            )
            return
    try:
        forward, slots, kept, of_p = elements(cell, *parts, d_h, d_carry)
    except Exception as error:
        report.wrong(f"the Triton functions: {_reason(error)}")
        return
    rows = [  # h last, which is made of the others
        (f"forward: carry {name}", a, e) for name, a, e in zip(_carry_names(cell), forward[1:], step.carry, strict=True)
    ]
    rows += [("forward: h", forward[0], step.h)]
    order = [("r", gate) for gate in range(split, cell.gates)] + [("x and r", gate) for gate in range(split)]
    order += [("x", gate) for gate in range(split, cell.gates)]
    for slot, ((side, gate), actual) in enumerate(zip(order, slots, strict=True)):
        expected = d_r[gate] if side == "r" else d_x[gate]
        rows.append((f"slot {slot} of backward: at gate {names[gate]}, by {side}", actual, expected))
    rows += [
        (f"backward: gradient of the carry {name} of before", a, e)
        for name, a, e in zip(_carry_names(cell), kept, d_before, strict=True)
    ]
    if cell.parameters:
        rows += [
            (f"backward: gradient of the parameter {name}", a, e)
            for name, a, e in zip(cell.parameters, of_p, d_p[0], strict=True)
        ]
    errors = [(what, _relative(actual, expected.detach())) for what, actual, expected in rows]
    for what, error in errors:
        if not error <= ALLOWED:
            report.wrong(f"{what}: error {error:.1g}, allowed {ALLOWED:.0g}")
    if all(error <= ALLOWED for _, error in errors):
        worst = max(error for _, error in errors)
        report.right(f"forward, factors, backward: {len(errors)} results against the step, largest error {worst:.0e}")
    if cell.quiet:
        zeros = [tuple(torch.zeros(len(part), 1024, dtype=torch.float64)) for part in parts]
        _, slots, kept, _ = elements(cell, *zeros, torch.zeros_like(d_h), torch.zeros_like(d_carry), saved=0.0)
        if not all((one == 0).all() for one in (*slots, *kept)):
            report.wrong("quiet: with zeros for all that was saved, backward does not make zeros: leave `quiet` out")


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


# hidden size, rows, steps, type, precision, options, masks, exchange
LOOPS = (
    (20, 3, 4, "float32", "ieee", {}, False, True),
    (33, 5, 3, "float32", "tf32", {"bidirectional": True}, True, True),
    (9, 2, 3, "float32", "ieee", {"bidirectional": True, "memory": "lean", "bias": False}, True, False),
    (40, 9, 2, "bfloat16", None, {"num_layers": 2, "memory": "lean"}, False, True),
    (7, 3, 3, "float16", None, {"batch_first": True}, True, False),
    (150, 3, 2, "bfloat16", None, {}, False, True),
)


def _outcome(layer: Any, input: Tensor, states: Sequence[Tensor], backend: Any, **masks: Any) -> dict[str, Tensor]:
    """Output, final states and all gradients of a layer."""
    leaves = [one.clone().requires_grad_() for one in (input, *states)]
    with settings.backend(backend):
        output, final = layer(leaves[0], tuple(leaves[1:]) if len(states) > 1 else leaves[1], **masks)
    results = [output, *(final if isinstance(final, tuple) else (final,))]
    weights = [torch.linspace(-1, 1, one.numel(), dtype=torch.float64).view_as(one) for one in results]
    loss = sum((one.double() * weight).sum() for one, weight in zip(results, weights, strict=True))
    names = ["h", *layer.cell.states]
    named = dict(layer.named_parameters())
    gradients = torch.autograd.grad(loss, [*leaves, *named.values()])
    keys = ["the output", *(f"the final state {name}" for name in names)]
    keys += ["the gradient of the input", *(f"the gradient of the initial state {name}" for name in names)]
    keys += [f"the gradient of {name}" for name in named]
    return dict(zip(keys, (one.detach() for one in (*results, *gradients)), strict=True))


def _loop(cell: Cell, report: Report) -> None:
    """The whole layer on the kernels, in the interpreter, against its own step in float64."""
    from .kernels.interpreter import concurrent_programs

    made, switch = layer_of(cell), torch.backends.cudnn.rnn
    for seed, (size, batch, time, kind, precision, options, masked, exchange) in enumerate(LOOPS):
        dtype = getattr(torch, kind)
        torch.manual_seed(seed)
        ours = made(5, size, **options).to(dtype)
        oracle = made(5, size, **{key: value for key, value in options.items() if key != "memory"}).double()
        oracle.load_state_dict({key: value.double() for key, value in ours.state_dict().items()})
        shape = (batch, time) if ours.batch_first else (time, batch)
        before, input = torch.randn(*shape, 5, dtype=dtype), torch.randn(*shape, 5, dtype=dtype)
        masks = dict(lengths=torch.arange(batch) % (time + 1), resets=torch.rand(*shape) < 0.3) if masked else {}
        with torch.no_grad(), settings.backend("torch"):
            states = oracle(before.double())[1]
        states = [one.to(dtype) for one in (states if isinstance(states, tuple) else (states,))]
        expected = _outcome(oracle, input.double(), [one.double() for one in states], "torch", **masks)
        peer = _outcome(ours, input, states, "torch", **masks)
        where = f"H {size}, B {batch}, T {time}, {precision or kind}"
        where += "".join(f", {key}={value}" for key, value in options.items())
        where += (", lengths and resets" if masked else "") + (", several programs" if exchange else ", one program")
        switch.fp32_precision = precision or "ieee"
        try:
            alone = settings.always_exchange() if exchange else contextlib.nullcontext()
            with concurrent_programs(seed, torn=seed % 2 == 1), alone:
                actual = _outcome(ours, input, states, "triton", **masks)
        except Exception as error:
            report.wrong(f"in the loop ({where}): {_reason(error)}")
            return
        eps = TF32_EPS if precision == "tf32" else torch.finfo(dtype).eps
        for what, value in expected.items():
            error = _relative(actual[what], value)
            allowed = max(PEER_FACTOR * _relative(peer[what], value), FLOOR_EPS * eps)
            if not error <= allowed:
                report.wrong(f"in the loop ({where}): {what}: error {error:.1g}, allowed {allowed:.1g}")
                return
        report.right(f"in the loop: {where}")


# ---- Compiled --------------------------------------------------------------------------------------------------------


def _compiled(cell: Cell, report: Report) -> None:
    """Registers, spills and instructions of a time step, for GPUs that need not be there."""
    from .kernels.compiled import compile_plan
    from .kernels.devices import DEVICES
    from .kernels.plan import plan
    from .kernels.spec import register

    name = register(cell)
    for arch, (size, dtype), backward in itertools.product(ARCHITECTURES, COMPILED, (False, True)):
        p = plan(name, size, 16, 1, dtype, DEVICES[ARCHITECTURES[arch]], backward)
        where = f"sm_{arch}, H {size}, {dtype}, {'backward' if backward else 'forward'}"
        if isinstance(p, str):
            report.note(f"{where}: no plan: {p}")
            continue
        try:
            found = compile_plan(p, arch)
        except Exception as error:
            report.wrong(f"{where}: does not compile: {_reason(error)}")
            return
        text = f"{where}: {found.registers} registers, {found.count()} instructions a step"
        if found.problem:
            report.note(f"{text}; {found.problem}: right, but slow")
        else:
            report.right(f"{text}, no spills")


class _Printed(Report):
    """A report whose lines a process prints for the one that waits for it."""

    def right(self, line: str) -> None:
        print(json.dumps(("right", line)), flush=True)

    def note(self, line: str) -> None:
        print(json.dumps(("note", line)), flush=True)

    def wrong(self, line: str) -> None:
        self.errors.append(line)
        print(json.dumps(("wrong", line)), flush=True)


def run_part(part: str, path: str, name: str) -> int:
    """One part, for `_in_a_process`."""
    (cell,) = _loaded(path, name)
    for which in FUNCTIONS:
        imported(getattr(cell, which))
    report = _Printed(cell.name)
    if part == "compiled":
        _compiled(cell, report)
    else:
        _elementwise(cell, report)
        if not report.errors:
            _loop(cell, report)
    return 1 if report.errors else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 where all cells of a file are right."""
    parser = argparse.ArgumentParser(
        prog="python -m rnn_gpu.check_cell", description="Are cells of your own right? As rnn_gpu.check_cell."
    )
    parser.add_argument("file", help="my_cell.py, my_cell.py:NAME, or a module: all cells at its top level, or one")
    path, _, name = parser.parse_args(arguments).file.rpartition(":")
    path, name = (path, name) if path and not os.path.exists(f"{path}:{name}") else (name, "")
    good = True
    try:
        for cell in _loaded(path, name or None):
            print(f"cell {cell.name}:", flush=True)
            report = _report(cell, functools.partial(print, flush=True))
            print(report.verdict, flush=True)
            good &= not report.errors
    except (ValueError, ImportError, FileNotFoundError) as error:
        parser.error(str(error))
    return 0 if good else 1
