"""The ledger: rows of measurements in CSV files, one file a device, each row with all it takes to repeat it.

A row is written when it has been measured and at no other time. Files only grow; readers take the latest row.
"""

import csv
import datetime
import hashlib
import importlib.metadata
import os
import re
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "perf" / "results"
SOURCES = ("rnn_gpu", "kernels")  # what a time depends on


@dataclass(frozen=True)
class Row:
    """A line of the ledger: one case, mode and provider, measured once.

    run: the same for all rows that were timed in turns in one process; only these are compared with each other.
    commit: of the project, with "+" where its code had changes; sources: a digest of the code itself.
    detail: which kernels served the provider. clock: how it was timed. cache: "warm", or "flushed" before every call.
    The times are microseconds of a call; step_us is the median over T. peak_bytes: most memory that a call took beyond
    what was there before it (weights and input); empty on a CPU. error: the largest error over the allowed one, at most
    1; checked_time: T of that check. floor_us: see cases.floor, an estimate; empty where it is not known.
    """

    run: str
    measured: str
    commit: str
    sources: str
    device: str
    kind: str
    torch: str
    cuda: str
    cudnn: str
    triton: str
    provider: str
    version: str
    detail: str
    cell: str
    dtype: str
    hidden_size: int
    batch_size: int
    time: int
    layers: int
    directions: int
    precision: str
    mode: str
    clock: str
    cache: str
    samples: int
    calls: int
    median_us: float
    low_us: float
    high_us: float
    least_us: float
    step_us: float
    tflops: float
    peak_bytes: int | None
    error: float
    checked_time: int
    floor_us: float | None

    @property
    def case_key(self) -> tuple:
        """Equal for rows of the same case and mode, timed in the same way, by whatever provider and version."""
        case = self.cell, self.dtype, self.hidden_size, self.batch_size, self.time, self.layers, self.directions
        return self.device, *case, self.precision, self.mode, self.cache

    @property
    def same_key(self) -> tuple:
        """Equal for rows that a new measurement would only repeat: also provider, versions and sources are the same."""
        versions = self.torch, self.cuda, self.cudnn, self.triton, self.version
        return *self.case_key, self.provider, *versions, self.sources if self.provider in OURS else ""


OURS = ("rnn_gpu", "auto")  # providers whose times depend on this project's code
COLUMNS = tuple(field.name for field in fields(Row))
# low_us and high_us are these quantiles.
LOW, HIGH = 0.1, 0.9


def _parse(field, text: str):
    if field.type == int | None or field.type == float | None:
        if text == "":
            return None
        return (int if field.type == int | None else float)(text)
    return field.type(text)


def read(path: Path | str) -> list[Row]:
    """The rows of a file; none if there is no such file. ValueError, with the line, for what is no row of a ledger."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        header = next(lines, None)
        if header is None:
            return []
        if tuple(header) != COLUMNS:
            raise ValueError(f"{path}: not a ledger of this version: its columns are {', '.join(header)}")
        for line in lines:
            if len(line) != len(COLUMNS):
                raise ValueError(f"{path}, line {lines.line_num}: {len(line)} values, expected {len(COLUMNS)}")
            try:
                values = {field.name: _parse(field, text) for field, text in zip(fields(Row), line, strict=True)}
            except ValueError as error:
                raise ValueError(f"{path}, line {lines.line_num}: {error}") from None
            rows.append(Row(**values))
    return rows


def read_all(folder: Path | str) -> list[Row]:
    """The rows of every CSV file in a folder."""
    return [row for path in sorted(Path(folder).glob("*.csv")) for row in read(path)]


class Writer:
    """Appends rows to a file, each on the disk before the next is measured: a run that is cut off leaves a valid
    file.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_half_a_line()
        read(self.path)  # refuse to append to what is something else
        if not self.path.exists() or self.path.stat().st_size == 0:
            self._append(COLUMNS)

    def _drop_half_a_line(self) -> None:
        """Cut off a last line without its end: what a run left that was killed while writing."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            self.path.write_bytes(content[: content.rfind(b"\n") + 1])

    def _append(self, values) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(values)
            file.flush()
            os.fsync(file.fileno())

    def write(self, row: Row) -> None:
        """Append a row."""
        self._append(_text(getattr(row, name)) for name in COLUMNS)


def _text(value) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def version_of(package: str) -> str:
    """The installed version of a package, "" if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit of the project, with "+" where its code differs from it; "" outside a repository."""
    try:
        command = ["git", "-C", str(ROOT)]
        run = dict(capture_output=True, text=True, check=True, timeout=30)
        head = subprocess.run([*command, "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        changes = subprocess.run([*command, "status", "--porcelain", "--", *SOURCES], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + ("+" if changes else "")


def sources_digest() -> str:
    """A short digest of the code that is measured, whatever git knows of it."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def environment(device: torch.device) -> dict[str, str]:
    """The columns that all rows of a run share."""
    import platform

    now = datetime.datetime.now(datetime.timezone.utc)
    gpu = device.type == "cuda"
    return dict(
        run=f"{now:%Y%m%dT%H%M%S}-{os.getpid()}",
        commit=commit(),
        sources=sources_digest(),
        device=torch.cuda.get_device_name(device) if gpu else f"CPU {platform.machine()}",
        kind=device.type,
        torch=torch.__version__,
        cuda=torch.version.cuda or "" if gpu else "",
        cudnn=str(torch.backends.cudnn.version() or "") if gpu else "",
        triton=version_of("triton"),
    )


def now() -> str:
    """The time of day for a row, in UTC."""
    return f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%M:%SZ}"


def slug(name: str) -> str:
    """A device's name as part of a file's: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
