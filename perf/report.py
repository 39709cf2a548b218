"""`python -m perf.report`: the table of README.md and the plots of docs/, made from the ledger and from nothing else.

    python -m perf.report                  all of perf/results/*.csv into README.md and docs/
    python -m perf.report --check          exit status 1 if README.md is not what the ledger says
    python -m perf.report --results DIR --readme FILE --docs DIR

Only rows measured on a GPU on this library's kernels count; with none the table says "not measured yet". Two providers
are compared only where one run timed them in turns. Ratios and means are quoted on the core grid (cases.py) alone, and
the table says how much of it has been measured.
"""

import argparse
import itertools
import statistics
import sys
from pathlib import Path

from . import cases as grids
from . import ledger
from .ledger import Row, slug

BEGIN, END = "<!-- performance table -->", "<!-- end -->"
NOT_MEASURED = (
    "Speed on a GPU: **not measured yet** (`python -m perf.benchmark` on a GPU, then `python -m perf.report`)."
)
OURS, REFERENCE = "rnn_gpu", "torch.nn"
SHOWN = ("inference", "forward+backward")  # of the modes, in the table
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
    """With what rows were measured: each version once."""

    def every(name: str) -> str:
        return ", ".join(sorted({str(getattr(row, name)) for row in rows}))

    days = sorted({row.measured[:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return (
        f"commit {every('commit') or 'unknown'}, torch {every('torch')}, CUDA {every('cuda')}, cuDNN {every('cudnn')}, "
        f"Triton {every('triton')}; {when}"
    )


def table(rows: list[Row]) -> str:
    """The table in Markdown."""
    groups = latest(counted(rows))
    if not groups:
        return NOT_MEASURED
    core = grids.core()
    parts = []
    for device, every in devices(groups).items():
        mine = [g for g in every if g[OURS].cache == "warm" and case_of(g[OURS]) in core and REFERENCE in g]
        parts.append(f"**{device}**: {described([g[OURS] for g in every])}.")
        if not mine:
            parts.append("No case of the core grid has been measured.")
            continue
        lines = ["| cell | type | " + " | ".join(f"{mode}, times as fast as torch.nn" for mode in SHOWN) + " | cases |"]
        lines.append("|---|---|" + "---|" * (len(SHOWN) + 1))
        for cell, dtype in dict.fromkeys((case.cell, case.dtype) for case in core):
            alike = [g for g in mine if (g[OURS].cell, g[OURS].dtype) == (cell, dtype)]
            wanted = sum((case.cell, case.dtype) == (cell, dtype) for case in core)
            for precision in sorted({g[OURS].precision for g in alike}):
                of_this = [g for g in alike if g[OURS].precision == precision]
                values, counts = [], []
                for mode in SHOWN:
                    ratios = [speed_up(g) for g in of_this if g[OURS].mode == mode]
                    values.append(mean_and_range(ratios))
                    counts.append(len(ratios))
                count = str(counts[0]) if len(set(counts)) == 1 else " and ".join(map(str, counts))
                name = f"{dtype} ({precision})" if precision else dtype
                lines.append(f"| {cell} | {name} | {' | '.join(values)} | {count} of {wanted} |")
        parts.append("\n".join(lines))
    note = (
        "Geometric mean over the core grid (smallest to largest), median times of calls in turns in one process, the "
        "product with the input included. `docs/performance.md` says how to read and repeat it."
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
    size = (1.2 + 0.55 * len(widths), 1.0 + 0.4 * len(heights))
    figure, axes = plt.subplots(1, len(panels), squeeze=False, figsize=(size[0] * len(panels), size[1]))
    for axis, (cell, dtype) in zip(axes[0], panels, strict=True):
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
    axes[0][0].set_ylabel("batch")
    figure.suptitle(f"{device}: times as fast as torch.nn, forward and backward; empty: not measured", y=1.04)
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
    figure, axes = plt.subplots(1, len(panels), squeeze=False, figsize=(3.4 * len(panels), 3), sharey=True)
    for axis, (cell, dtype) in zip(axes[0], panels, strict=True):
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
    axes[0][0].set_ylabel(label)
    figure.suptitle(f"{device}: {mode}, batch {batch}", y=1.02)
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
    try:
        rows = ledger.read_all(chosen.results)
        content = table(rows)
        text = chosen.readme.read_text(encoding="utf-8")
        changed = with_table(text, content)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.check:
        print("up to date" if changed == text else f"{chosen.readme} is not what the ledger says: run perf.report")
        return int(changed != text)
    chosen.readme.write_text(changed, encoding="utf-8")
    count = len(counted(rows))
    print(f"{len(rows)} rows, {count} of them measured on a GPU.\n\n{content}\n")
    drawn = plots(rows, chosen.docs)
    if drawn is None:
        print("No plots: matplotlib is not installed (it comes with the extra `perf`).")
    for path in drawn or []:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
