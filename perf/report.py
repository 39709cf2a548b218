"""`python -m perf.report`: the tables of README.md and docs/performance.md and the plots of docs/, from the ledger.

    python -m perf.report                  all of perf/results/*.csv into README.md and docs/
    python -m perf.report --check          exit status 1 if one of the two is not what the ledger says
    python -m perf.report --results DIR --readme FILE --docs DIR

They hold what was measured and nothing else, but for what `auto` would take, which the plan of the code as it is says.
Only rows measured on a GPU on this library's kernels count; with none the table says "not measured yet". Two providers
are compared only where one run timed them in turns. Ratios and means are quoted on the core grid (cases.py) alone, and
the table says how much of it has been measured.
"""

import argparse
import itertools
import statistics
import sys
from pathlib import Path

import torch

import rnn_gpu
from rnn_gpu import backends
from rnn_gpu.command import exit_with
from rnn_gpu.kernels.devices import named

from . import cases as grids
from . import ledger
from .ledger import Row, slug
from .providers import float32_precision, torch_layer

BEGIN, END = "<!-- performance table -->", "<!-- end -->"
# Commits that had the sources which ran, where the rows name another one (perf/results/README.md).
COMMIT_OF_SOURCES = {"5d2c2d36c166": "dd6745231596", "93b4176cbb82": "3a3b8baa5078"}
NOT_MEASURED = (
    "Speed on a GPU: **not measured yet** (`python -m perf.benchmark` on a GPU, then `python -m perf.report`)."
)
OURS, REFERENCE = "rnn_gpu", "torch.nn"
SHOWN = {"forward+backward": "training", "inference": "inference"}  # of the modes, in the tables
SHORT = frozenset(grids.short())
STACKS = frozenset(grids.stacks()) - frozenset(grids.long())
# The rows of README.md's table: each case of the core grid is in one of them.
REGIONS = {
    "LSTM, bfloat16, up to 1024 units": (
        lambda c: c.cell == "lstm" and c.dtype == "bfloat16" and c.hidden_size <= 1024 and c not in SHORT | STACKS
    ),
    "GRU and RNN, bfloat16": lambda c: c.cell != "lstm" and c.dtype == "bfloat16" and c not in SHORT,
    "LSTM and GRU, float32 (tf32), 256 units and more": lambda c: c.dtype == "float32" and c.hidden_size >= 256,
    "LSTM, float16, several layers": lambda c: c.dtype == "float16" and c.layers > 1,
    "LSTM, float16, batch 64, 256 units and more": (
        lambda c: c.dtype == "float16" and c.layers == 1 and c.batch_size >= 64 and c.hidden_size >= 256
    ),
    "LSTM, bfloat16, 1536 and 2048 units, batch 16": (
        lambda c: c.dtype == "bfloat16" and c.hidden_size > 1024 and c.batch_size < 64
    ),
    "LSTM, bfloat16, 1536 and 2048 units, batch 64": (
        lambda c: c.dtype == "bfloat16" and c.hidden_size > 1024 and c.batch_size >= 64
    ),
    "LSTM, float32 (tf32), 128 units": lambda c: c.dtype == "float32" and c.hidden_size < 256,
    "LSTM, float16, one layer, batch 16 or 128 units": (
        lambda c: c.dtype == "float16" and c.layers == 1 and (c.batch_size < 64 or c.hidden_size < 256)
    ),
    "LSTM and GRU, bfloat16, T 32, 64 and 128": SHORT.__contains__,
    "LSTM, bfloat16, 2 to 8 layers": STACKS.__contains__,
}
COLORS = {
    "rnn_gpu": "C0",
    "auto": "C4",
    "lean": "C5",
    "torch.nn": "C1",
    "compiled cells": "C7",
    "flashrnn": "C2",
    "torchrl": "C3",
}


def counted(rows: list[Row]) -> list[Row]:
    """The rows that say something about the kernels: measured on a GPU, ours on backend "triton"."""
    return [row for row in rows if row.kind == "cuda" and (row.provider != OURS or row.detail == "triton")]


def latest(rows: list[Row]) -> dict[tuple, dict[str, Row]]:
    """For each case and mode the rows of the last run that timed ours, by provider: all timed in turns."""
    runs = {}
    for row in rows:
        runs.setdefault(row.case_key, {}).setdefault(row.run, {})[row.provider] = row
    found = {}
    for key, by_run in runs.items():
        ours = [run for run in by_run.values() if OURS in run]
        if ours:
            found[key] = max(ours, key=lambda run: run[OURS].measured)
    return found


def speed_up(group: dict[str, Row], other: str = REFERENCE) -> float | None:
    """How many times as fast as another provider ours was, or None where that was not timed beside it."""
    return group[other].median_us / group[OURS].median_us if other in group else None


def devices(groups: dict[tuple, dict[str, Row]]) -> dict[str, list[dict[str, Row]]]:
    """The groups of each device, by its name."""
    found = {}
    for group in groups.values():
        found.setdefault(group[OURS].device, []).append(group)
    return dict(sorted(found.items()))


def case_of(row: Row) -> grids.Case:
    """The case of a row."""
    return grids.Case(**{name: getattr(row, name) for name in grids.Case.__dataclass_fields__})


def described(rows: list[Row]) -> str:
    """How many cases were measured, of which commits, and with what. A case counts once, for the commit that it was
    last measured with.
    """

    def every(name: str) -> str:
        return ", ".join(sorted({str(getattr(row, name)) for row in rows}))

    days = sorted({row.measured[:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    cudnn = ", ".join(sorted({cudnn_version(row.cudnn) for row in rows}))
    commits = {}
    for row in sorted(rows, key=lambda row: row.measured):
        commit = COMMIT_OF_SOURCES.get(row.sources, row.commit) or "unknown"
        commits.setdefault(case_of(row), {})[commit] = None
    cases = []
    for name in sorted({name for of_case in commits.values() for name in of_case}):
        last = [of_case for of_case in commits.values() if [*of_case][-1] == name]
        partly = sum(len(of_case) > 1 for of_case in last)
        cases.append(
            f"{len(last)} cases of commit {name}"
            + (f" ({partly} with a mode timed by an earlier one)" if partly else "")
        )
    versions = f"torch {every('torch')}, CUDA {every('cuda')}, cuDNN {cudnn}, Triton {every('triton')}"
    return f"{', '.join(cases)}, {versions}; {when}"


def cudnn_version(number: str) -> str:
    """As people write it: 91900 is 9.19.0."""
    if not number.isdigit() or int(number) < 90000:
        return number
    return f"{int(number) // 10000}.{int(number) // 100 % 100}.{int(number) % 100}"


def on_the_core_grid(groups: list[dict[str, Row]]) -> list[dict[str, Row]]:
    """Those that means are quoted on: core cases with a warm cache and torch.nn beside."""
    core = grids.core()
    return [g for g in groups if g[OURS].cache == "warm" and case_of(g[OURS]) in core and REFERENCE in g]


def ratios(groups: list[dict[str, Row]], mode: str) -> list[float]:
    """How many times as fast as torch.nn ours was, in a mode."""
    return [speed_up(g) for g in groups if g[OURS].mode == mode]


def by_case(groups: list[dict[str, Row]]) -> dict[tuple, dict[str, dict[str, Row]]]:
    """The groups of each case and precision, by mode, in the order of the grid."""
    found = {}
    for g in groups:
        found.setdefault((case_of(g[OURS]), g[OURS].precision), {})[g[OURS].mode] = g
    return found


def short(case: grids.Case) -> str:
    """A case within its cell and type."""
    more = f" T {case.time}" if case in SHORT else ""
    more += f" L {case.layers}" if case.layers > 1 else ""
    more += " both ways" if case.directions == 2 else ""
    return f"H {case.hidden_size} B {case.batch_size}{more}"


def slower(groups: list[dict[str, Row]]) -> str:
    """The cases in which torch.nn was faster in one of the modes, with the ratio in each."""
    found = []
    for (case, _), modes in by_case(groups).items():
        values = [speed_up(modes[mode]) if mode in modes else None for mode in SHOWN]
        if any(value is not None and value < 1 for value in values):
            told = " / ".join("?" if value is None else f"{value:.2f}" for value in values)
            found.append(f"{short(case)} ({told})")
    return "; ".join(found)


def table(rows: list[Row]) -> str:
    """The table of README.md: where it helps, and where `auto` leaves a call to torch."""
    groups = latest(counted(rows))
    if not groups:
        return NOT_MEASURED
    core, parts = grids.core(), []
    for device, every in devices(groups).items():
        mine = on_the_core_grid(every)
        parts.append(f"**{device}**: {described([g[OURS] for g in mine or every])}.")
        if not mine:
            parts.append("No case of the core grid has been measured.")
            continue
        lines = [f"| where | {' | '.join(SHOWN.values())} | cases | `auto` trains on the kernels in |"]
        lines.append("|---|" + "---|" * (len(SHOWN) + 2))
        for name, within in REGIONS.items():
            of_this = [g for g in mine if within(case_of(g[OURS]))]
            chosen = [auto_takes(case, precision, device, True) for case, precision in by_case(of_this)]
            auto = "?" if "?" in chosen else f"{chosen.count('triton')} of {len(chosen)}" if chosen else ""
            lines.append(f"| {name} | {in_numbers(of_this, sum(map(within, core)))} | {auto} |")
        lines.append(f"| **all** | {in_numbers(mine, len(core))} | |")
        parts.append("\n".join(lines))
    note = (
        "Times as fast as torch.nn (cuDNN): geometric mean over those cases of the core grid that were measured "
        "(smallest to largest); T is 1024 or 128 where nothing is said of it. Training is forward and backward with "
        "all gradients; the product with the input is included. Median times of calls in turns in one process. "
        "`docs/performance.md` has every case, and says how to read and repeat it."
    )
    return "\n\n".join([*parts, note])


def in_numbers(groups: list[dict[str, Row]], wanted: int) -> str:
    """The columns of a row: the means in each mode, and of how many cases."""
    values = [mean_and_range(ratios(groups, mode)) for mode in SHOWN]
    counts = [len(ratios(groups, mode)) for mode in SHOWN]
    count = str(counts[0]) if len(set(counts)) == 1 else " and ".join(map(str, counts))
    return f"{' | '.join(values)} | {count} of {wanted}"


def cell_table(mine: list[dict[str, Row]]) -> str:
    """The means by cell and type, and where torch.nn was faster."""
    core = grids.core()
    lines = [f"| cell | type | {' | '.join(SHOWN.values())} | cases | torch.nn was faster at (training / inference) |"]
    lines.append("|---|---|" + "---|" * (len(SHOWN) + 2))
    for cell, dtype in dict.fromkeys((case.cell, case.dtype) for case in core):
        alike = [g for g in mine if (g[OURS].cell, g[OURS].dtype) == (cell, dtype)]
        wanted = sum((case.cell, case.dtype) == (cell, dtype) for case in core)
        for precision in sorted({g[OURS].precision for g in alike}):
            of_this = [g for g in alike if g[OURS].precision == precision]
            name = f"{dtype} ({precision})" if precision else dtype
            lines.append(f"| {cell} | {name} | {in_numbers(of_this, wanted)} | {slower(of_this)} |")
    return "\n".join(lines)


def auto_takes(case: grids.Case, precision: str, device: str, training: bool) -> str:
    """The backend that "auto" takes, by the model of the plan as it stands in the code; "?" for an unknown device."""
    known = named(device)
    if known is None:
        return "?"
    dtype = getattr(torch, case.dtype)
    with float32_precision(precision or "tf32"):
        layer = torch_layer(case, "meta", dtype, rnn_gpu)
        return backends.kernels_for(layer, case.batch_size, dtype, known, training).name


def case_table(rows: list[Row]) -> str:
    """The tables of docs/performance.md: by cell and type, and every case of the core grid."""
    groups = latest(counted(rows))
    if not groups:
        return NOT_MEASURED
    parts = []
    for device, every in devices(groups).items():
        mine = on_the_core_grid(every)
        parts.append(f"**{device}**: {described([g[OURS] for g in mine or every])}.")
        parts.append(cell_table(mine))
        head = " | ".join(f"{name}: rnn_gpu | torch.nn | times as fast | auto" for name in SHOWN.values())
        lines = [f"| cell | type | H | B | T | L | D | {head} | MiB | torch.nn |", "|---|---|" + "---|" * 15]
        for (case, precision), modes in by_case(mine).items():
            sizes = case.hidden_size, case.batch_size, case.time, case.layers, case.directions
            name = f"{case.dtype} ({precision})" if precision else case.dtype
            row = [case.cell, name, *map(str, sizes)]
            for mode in SHOWN:
                if mode not in modes:
                    row += [""] * 4
                    continue
                ours, theirs = modes[mode][OURS], modes[mode][REFERENCE]
                row += [f"{ours.step_us:.2f}", f"{theirs.step_us:.2f}", f"{speed_up(modes[mode]):.2f}"]
                row.append(auto_takes(case, precision, device, mode != "inference"))
            trained = modes.get("forward+backward", {})
            peaks = [trained[who].peak_bytes if who in trained else None for who in (OURS, REFERENCE)]
            row += ["" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks]
            lines.append(f"| {' | '.join(row)} |")
        parts.append("\n".join(lines))
    note = (
        "The means are geometric, as times as fast as torch.nn (smallest to largest). In the second table microseconds "
        "a step, all layers and directions together. *auto*: what the backend `auto` takes today, by the model of the "
        "plan in the code as it is, which may be newer than the times. MiB: the most memory that a training step takes "
        "beyond weights and input."
    )
    return "\n\n".join([*parts, note])


def mean_and_range(ratios: list[float]) -> str:
    """`1.90 (1.10 to 3.20)`, or that there is nothing."""
    if not ratios:
        return "not measured yet"
    return f"{statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def with_table(text: str, content: str) -> str:
    """A text with `content` between the two markers. ValueError where they are not both there, in this order."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no place for the table: it goes between the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


# ---- The plots --------------------------------------------------------------------------------------------------


def plotting():
    """matplotlib, set to write the same file for the same data; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "rnn_gpu", "svg.fonttype": "none", "font.size": 9})
    return plt


def save(plt, figure, path: Path) -> Path:
    """Write a figure as SVG, without the date."""
    figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(figure)
    return path


def plain(groups: list[dict[str, Row]], **conditions) -> list[dict[str, Row]]:
    """Groups of one layer and direction with a warm cache that meet the conditions on our row."""
    conditions = dict(layers=1, directions=1, cache="warm") | conditions
    return [g for g in groups if all(getattr(g[OURS], name) == value for name, value in conditions.items())]


def panels_of(plt, count: int, width: float, height: float, **options):
    """A figure of so many panels, three in a row -> the figure and its axes; those left over are not drawn."""
    columns = min(3, count)
    rows = -(-count // columns)
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=size, layout="constrained", **options)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, axes


def heat_map(plt, device: str, groups: list[dict[str, Row]], docs: Path) -> Path | None:
    """Times as fast as torch.nn, over H and B, forward and backward, a panel for each cell and type."""
    groups = [g for g in plain(groups, mode="forward+backward") if REFERENCE in g]
    if not groups:
        return None
    panels = sorted({(g[OURS].cell, g[OURS].dtype) for g in groups})
    heights = sorted({g[OURS].batch_size for g in groups}, reverse=True)
    widths = sorted({g[OURS].hidden_size for g in groups})
    from matplotlib.colors import TwoSlopeNorm

    ratios = [speed_up(g) for g in groups]
    norm = TwoSlopeNorm(1.0, min(0.5, *ratios), max(2.0, *ratios))
    figure, axes = panels_of(plt, len(panels), 1.2 + 0.45 * len(widths), 0.8 + 0.3 * len(heights))
    for axis, (cell, dtype) in zip(axes.flat, panels, strict=False):
        values = [[float("nan")] * len(widths) for _ in heights]
        longest = {}
        for g in groups:
            row = g[OURS]
            place = heights.index(row.batch_size), widths.index(row.hidden_size)
            if (row.cell, row.dtype) == (cell, dtype) and row.time >= longest.get(place, 0):
                longest[place] = row.time
                values[place[0]][place[1]] = speed_up(g)
        axis.imshow(values, norm=norm, cmap="RdYlGn", aspect="auto")
        for (i, line), j in itertools.product(enumerate(values), range(len(widths))):
            if line[j] == line[j]:
                axis.text(j, i, f"{line[j]:.1f}", ha="center", va="center")
        axis.set_xticks(range(len(widths)), widths)
        axis.set_yticks(range(len(heights)), heights)
        axis.set(title=f"{cell} {dtype}", xlabel="hidden units")
    for row in axes:
        row[0].set_ylabel("batch")
    figure.suptitle(f"{device}: times as fast as torch.nn, forward and backward; empty: not measured")
    return save(plt, figure, docs / f"speed-up-{slug(device)}.svg")


def lines_over_sizes(
    plt, device, groups, docs: Path, mode: str, name: str, value, label: str, floor=False
) -> Path | None:
    """A value of every provider over H, at the batch size with most points, a panel for each cell and type."""
    groups = plain(groups, mode=mode)
    if not groups:
        return None
    batches = [g[OURS].batch_size for g in groups]
    batch = max(sorted(set(batches)), key=batches.count)
    groups = [g for g in groups if g[OURS].batch_size == batch]
    panels = sorted({(g[OURS].cell, g[OURS].dtype) for g in groups})
    figure, axes = panels_of(plt, len(panels), 3.4, 2.8, sharey=True)
    for axis, (cell, dtype) in zip(axes.flat, panels, strict=False):
        of_this = sorted(
            (g for g in groups if (g[OURS].cell, g[OURS].dtype) == (cell, dtype)),
            key=lambda g: (g[OURS].hidden_size, g[OURS].time),
        )
        by_size = {g[OURS].hidden_size: g for g in of_this}  # of several lengths the longest
        for provider in dict.fromkeys(p for g in by_size.values() for p in g):
            points = [(h, value(g[provider])) for h, g in by_size.items() if provider in g]
            points = [(h, v) for h, v in points if v is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", ms=3, label=provider, color=COLORS.get(provider))
        if floor:
            points = [(h, g[OURS].floor_us) for h, g in by_size.items() if g[OURS].floor_us is not None]
            if points:
                axis.plot(*zip(*points, strict=True), "k--", lw=1, label="floor (an estimate)")
        axis.set(title=f"{cell} {dtype}", xlabel="hidden units", yscale="log")
        axis.legend(fontsize=7)
    for row in axes:
        row[0].set_ylabel(label)
    figure.suptitle(f"{device}: {mode}, batch {batch}")
    return save(plt, figure, docs / f"{name}-{slug(device)}.svg")


def plots(rows: list[Row], docs: Path) -> list[Path] | None:
    """Draw all that there are rows for; None where matplotlib is missing."""
    groups = latest(counted(rows))
    if not groups:
        return []
    plt = plotting()
    if plt is None:
        return None
    docs.mkdir(parents=True, exist_ok=True)
    drawn = []
    for device, mine in devices(groups).items():
        both = "forward+backward"
        drawn += [
            heat_map(plt, device, mine, docs),
            lines_over_sizes(
                plt, device, mine, docs, "inference", "step-inference", lambda r: r.step_us, "microseconds a step", True
            ),
            lines_over_sizes(
                plt, device, mine, docs, both, "step-training", lambda r: r.step_us, "microseconds a step", True
            ),
            lines_over_sizes(
                plt, device, mine, docs, both, "memory",
                lambda r: None if r.peak_bytes is None else r.peak_bytes / 2**20, "MiB beyond weights and input",
            ),
        ]  # fmt: skip
    return [path for path in drawn if path is not None]


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m perf.report", description="Table and plots from the ledger.")
    add = parser.add_argument
    add("--results", type=Path, default=ledger.RESULTS, help="folder of CSV files (default: perf/results)")
    add("--readme", type=Path, default=ledger.ROOT / "README.md", help="file with the markers (default: README.md)")
    add("--docs", type=Path, default=ledger.ROOT / "docs", help="folder for the plots (default: docs)")
    add("--check", action="store_true", help="write nothing; exit status 1 if the file would change")
    chosen = parser.parse_args(arguments)
    if not chosen.results.is_dir():  # no files are no results, and would empty the tables
        parser.error(f"argument --results: no such folder: {chosen.results}")
    try:
        rows = ledger.read_all(chosen.results)
        tables = {chosen.readme: table(rows)}
        if (page := chosen.docs / "performance.md").exists():
            tables[page] = case_table(rows)
        texts = {path: path.read_text(encoding="utf-8") for path in tables}
        changed = {path: with_table(text, tables[path]) for path, text in texts.items()}
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.check:
        stale = [path for path in texts if changed[path] != texts[path]]
        for path in stale:
            print(f"{path} is not what the ledger says: run perf.report")
        if not stale:
            print("up to date")
        return int(bool(stale))
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    count = len(counted(rows))
    print(f"{len(rows)} rows, {count} of them measured on a GPU.\n\n{tables[chosen.readme]}\n")
    drawn = plots(rows, chosen.docs)
    if drawn is None:
        print("No plots: matplotlib is not installed (it comes with the extra `perf`).")
    for path in drawn or []:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    exit_with(main)
