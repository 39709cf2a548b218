"""`python -m perf.resources`: what the kernels of a grid of plans need and issue, with no GPU.

Every plan is compiled exactly as launch.py would, its machine code is taken apart, and one row says: registers of a
thread, spills, shared memory of a program, and what a warp issues in one time step (polls once, as if each state were
there at the first look). Exit status 1 when a plan spills or does not fit the shared memory of the device.

    python -m perf.resources --arch 90 --quick
    python -m perf.resources --arch 86 --cell gru --dtype float32 --json -
    python -m perf.resources --documented      the tables of docs/performance.md
"""

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
from dataclasses import asdict

from rnn_gpu import zoo
from rnn_gpu.command import exit_with, positive
from rnn_gpu.dtypes import dtype_name
from rnn_gpu.equations import BUILT_IN
from rnn_gpu.kernels.compiled import ROWS, TENSOR_CORE, Resources, compile_plan
from rnn_gpu.kernels.plan import DEVICES, Plan, Problem, exchanging_plans, plan
from rnn_gpu.kernels.spec import CELLS, DTYPES

ARCHITECTURES = {  # compute capability * 10 -> the device that plans are made for
    80: "a100",
    86: "rtx3090",
    89: "rtx4090",
    90: "h200",
    100: "b200",
    120: "rtx5090",
}
# What makes one compiled kernel different from another; the batch size itself does not.
KEY = (
    "cell", "hidden_size", "sets", "dtype", "backward", "precision", "alone", "units", "rows", "slices", "warps",
    "registers", "shared", "waits", "gates_per_tile", "layered", "paused",
)  # fmt: skip
NAMED = {name: name for name in BUILT_IN} | {layer.__name__: layer.mode for layer in zoo.ZOO}  # cells, as asked for
COLUMNS = ("MMA", "FFMA", "LDSM", "LDS", "STS", "BAR", "LDG", "STG", "SHFL", "MUFU")


def key(p: Plan) -> tuple:
    """Equal for plans that share a compiled kernel."""
    return tuple(getattr(p, name) for name in KEY)


# Hidden sizes, batch sizes, weight sets, cells and types of each grid. Quick: each cell and pass, one or several
# programs, seconds each. Usual: the sizes people use. Full: odd sizes, where a mask or a wider tile may cost registers,
# and both directions of a layer.
KINDS = {"bfloat16": (None,), "float16": (None,), "float32": ("tf32", "ieee")}
GRIDS = {
    "quick": ((100, 1024), (16,), (1,), ("lstm", "gru", "rnn_tanh"), ("bfloat16", "float32")),
    "usual": (
        (64, 256, 512, 1000, 1024, 1536, 2048),
        (8, 16, 64, 256),
        (1,),
        ("lstm", "gru", "rnn_tanh"),
        ("bfloat16", "float32"),
    ),
    "full": (
        (1, 7, 33, 64, 128, 129, 256, 300, 384, 512, 768, 1000, 1024, 1536, 2001, 2048, 3001, 4095, 4096),
        (1, 8, 17, 64, 256, 1024),
        (1, 2),
        BUILT_IN,
        DTYPES,
    ),
}


def plans(
    grid: str, arch: int, cells=None, dtypes=None, hidden_sizes=None, rows: str = "dense", precisions=None
) -> tuple[list[Plan], list[str]]:
    """The plans of a grid, one for each kernel that is compiled, and a sentence for each problem without a plan."""
    sizes, batches, sets, default_cells, default_dtypes = GRIDS[grid]
    found, refused = {}, {}
    for cell, dtype in itertools.product(cells or default_cells, dtypes or default_dtypes):
        if precisions:
            kinds = [kind for kind in KINDS[dtype] if kind in precisions]
        else:
            kinds = KINDS[dtype][:1] if grid == "quick" else KINDS[dtype]
        problems = itertools.product(kinds, hidden_sizes or sizes, (False, True), sets, batches)
        for precision, hidden_size, backward, count, batch in problems:
            device = DEVICES[ARCHITECTURES[arch]]
            p = plan(cell, hidden_size, batch, count, dtype, device, backward, precision, ragged=rows != "dense")
            if isinstance(p, Plan):
                found.setdefault(key(p), p)
            else:
                refused[f"{cell} {dtype}: {p}"] = None
    return list(found.values()), list(refused)


DOCUMENTED = ("HMMA", "LDSM", "BAR", "SHFL", "MUFU")  # what the tables of docs/performance.md count


def documented(arch: int) -> dict[str, list[Plan]]:
    """The plans of each table of docs/performance.md, by its title. The first and the last table fix the tiles, whether
    or not such a plan would be chosen; the others have plans that would run.
    """
    device = DEVICES[ARCHITECTURES[arch]]

    def tiled(slices: int, *problem) -> list[Plan]:
        """The plan with 16 units and tiles of 8 rows, if there is one."""
        every = exchanging_plans(Problem(*problem), device.multiprocessors)
        return [p for p in every if (p.units, p.rows, p.slices) == (16, 8, slices)]

    passes, cells, sizes = (False, True), ("lstm", "gru", "rnn_tanh"), (64, 128, 256, 512, 650, 768, 1536, 2048)
    of_cells, of_slices = (
        [
            p
            for backward, cell, hidden_size, dtype in itertools.product(passes, some, hidden_sizes, dtypes)
            for precision in KINDS[dtype]
            for p in tiled(slices, cell, hidden_size, 8 * slices, 1, dtype, device, backward, precision)
        ]
        for slices, some, hidden_sizes, dtypes in (
            (1, cells, (1024,), ("float16", "bfloat16", "float32")),
            (4, ("lstm",), (256, 512, 1024), ("bfloat16",)),
        )
    )
    planned = [
        plan(cell, hidden_size, 16, 1, "bfloat16", device, backward)
        for cell, backward, hidden_size in itertools.product(cells, passes, sizes)
    ]
    stacks = [
        plan(cell, hidden_size, 16, 1, "bfloat16", device, backward, layers=4)
        for cell, backward, hidden_size in itertools.product(cells, passes, (256, 512))
    ]
    small = [
        plan(cell, hidden_size, 16, 1, "float32", device, backward, precision)
        for (precision, hidden_size), backward, cell in itertools.product((("tf32", 64), ("ieee", 32)), passes, cells)
    ]
    return {
        "16 units and 8 rows a program": of_cells,
        f"16 rows, as planned for an {device.name}": planned,
        "One program for all units, float32": small,
        "16 units and 4 x 8 rows a program": of_slices,
        f"Four layers side by side, 16 rows, as planned for an {device.name}": stacks,
    }


def documented_tables(tables: dict[str, list[Plan]], report: dict, other: dict | None = None) -> str:
    """Markdown: the tables with the numbers of a report, as --json writes it; with another one, "this / that" where
    they differ.
    """
    reports = [
        {key(Plan(**kernel["plan"])): kernel for kernel in one["kernels"]} for one in (report, other) if one is not None
    ]
    header = ("cell", "type", "pass", "H", "units, rows, warps", "weights", "all", *DOCUMENTED, "registers", "shared")
    lines = []
    for title, wanted in tables.items():
        lines += ["", f"**{title}**", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        for p in wanted:
            numbers = []
            for kernel in (kernels[key(p)] for kernels in reports):
                counts = (kernel["step"].get(name, 0) for name in ("all", *DOCUMENTED))
                numbers.append((*counts, kernel["registers"], kernel["shared"]))
            cells = [p.cell, p.precision or p.dtype, "backward" if p.backward else "forward", p.hidden_size]
            cells += [f"{p.units}, {p.slices} x {p.rows}, {p.warps}", where(p)]
            cells += [" / ".join(dict.fromkeys(map(str, of_both))) for of_both in zip(*numbers, strict=True)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines[1:])


def _attempt(p: Plan, arch: int, rows: str) -> Resources | str:
    """What compile_plan gives, or the reason why it failed: for a process of the pool."""
    try:
        return compile_plan(p, arch, rows)
    except Exception as error:  # whatever a compiler raises is a row of the report
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return (
            f"does not compile: {str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__}"
        )


def compile_all(all_plans: list[Plan], arch: int, jobs: int, rows: str = "dense"):
    """Pairs of a plan and its resources, or why it failed, as they are ready, compiled by `jobs` processes."""
    # spawn: a fork would copy the threads' locks of a process that has imported torch
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            running = {pool.submit(_attempt, p, arch, rows): p for p in all_plans}
            for done in concurrent.futures.as_completed(running):
                yield running[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)  # where nobody wants the rest


def where(p: Plan) -> str:
    """Where a plan's weights are."""
    return "alone" if p.alone else f"{p.registers}+{p.shared}+{p.streamed}"


def describe(p: Plan) -> str:
    """A plan in a few columns."""
    kind = p.dtype if p.precision is None else p.precision
    return (
        f"{CELLS[p.cell].name:12} {kind:8} {'backward' if p.backward else 'forward':8} {p.hidden_size:5} {p.sets:4} "
        f"{p.units:5} {f'{p.slices}x{p.rows}':>5} {p.warps:5} {where(p):>8} {p.waits:5}"
    )


HEADER = (
    f"{'cell':12} {'type':8} {'pass':8} {'H':>5} {'sets':>4} {'units':>5} {'rows':>5} {'warps':>5} {'weights':>8} "
    f"{'waits':>5} | {'regs':>4} {'spills':>6} {'stack':>5} {'shared':>7} | {'all':>5} "
) + " ".join(f"{name:>5}" for name in COLUMNS)
FOOTER = """\
weights: chunks in registers + in shared memory + read again in every step; the loop over the latter counts once.
rows: slices x rows. waits: parts in which the backward awaits the slots of a tile."""


def row(p: Plan, r: Resources | str) -> str:
    """A line of the table."""
    if isinstance(r, str):
        return f"{describe(p)} | {r}"
    counts = " ".join(f"{r.count(*TENSOR_CORE) if name == 'MMA' else r.count(name):5}" for name in COLUMNS)
    end = f"  <- {r.problem}" if r.problem else ""
    return f"{describe(p)} | {r.registers:4} {r.spills:6} {r.stack:5} {r.shared:7} | {r.count():5} {counts}{end}"


def progress(iterable, total: int):
    """`iterable` with a progress bar on a terminal, by tqdm where it is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, total=total, unit="kernel", disable=None)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    purpose = "What the kernels of a grid of plans need and issue, compiled with no GPU."
    parser = argparse.ArgumentParser(prog="python -m perf.resources", description=purpose)
    add = parser.add_argument
    add("--arch", type=int, choices=ARCHITECTURES, default=90, help="compute capability * 10 (default: 90)")
    add("--grid", choices=("usual", "full"), default="usual", help="full: odd sizes too, and two directions; hours")
    add("--quick", action="store_true", help="a grid that takes less than a minute")
    add("--cell", action="append", choices=NAMED, help="only this cell, also of rnn_gpu.zoo (may be repeated)")
    add("--dtype", action="append", type=dtype_name, choices=DTYPES, help="only this type (may be repeated; bf16, ...)")
    add("--precision", action="append", choices=KINDS["float32"], help="only float32, with these products (repeatable)")
    add("--hidden-size", action="append", type=positive, metavar="H", help="only this size (may be repeated)")
    add("--rows", choices=ROWS, default="dense", help="how the rows of the batch lie (default: dense)")
    add("--jobs", type=positive, default=os.cpu_count() or 1, help="processes (default: one a core)")
    add("--json", metavar="PATH", help="write all numbers there too; - for standard output, without the table")
    add("--documented", action="store_true", help="the tables of docs/performance.md instead, as Markdown")
    add("--beside", metavar="JSON", help="with --documented: a file of --json to compare with, of another Triton")
    chosen = parser.parse_args(arguments)
    other = None
    if chosen.beside:
        try:
            with open(chosen.beside, encoding="utf-8") as file:
                other = json.load(file)
        except (OSError, ValueError) as error:
            parser.error(f"argument --beside: {error}")
    grid = "quick" if chosen.quick else chosen.grid
    if chosen.documented:
        tables = documented(chosen.arch)
        wanted, refused = list({key(p): p for p in itertools.chain(*tables.values())}.values()), []
    else:
        cells = [NAMED[name] for name in chosen.cell or ()]
        wanted, refused = plans(
            grid, chosen.arch, cells, chosen.dtype, chosen.hidden_size, chosen.rows, chosen.precision
        )  # fmt: skip
    results = dict(progress(compile_all(wanted, chosen.arch, chosen.jobs, chosen.rows), len(wanted)))
    failed = [r for r in results.values() if isinstance(r, str) or r.problem]
    report = {"arch": chosen.arch, "rows": chosen.rows, "without_plan": refused}
    report["kernels"] = [
        {"plan": asdict(p)} | ({"problem": r} if isinstance(r, str) else r.as_dict())
        for p, r in ((p, results[p]) for p in wanted)
    ]
    compiled = not any(isinstance(r, str) for r in results.values())
    if chosen.documented and compiled and chosen.json != "-":
        print(documented_tables(tables, report, other))
    elif chosen.json != "-":
        print(HEADER)
        print("\n".join(row(p, results[p]) for p in wanted))
        print("\n".join(refused), end="\n" if refused else "")
        print(FOOTER)
        print(f"{len(wanted)} kernels for sm_{chosen.arch}, {len(failed)} that spill, do not fit or do not compile.")
    if chosen.json:
        text = json.dumps(report, indent=1)
        if chosen.json == "-":
            print(text)
        else:
            with open(chosen.json, "w", encoding="utf-8") as file:
                file.write(text + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    exit_with(main)
