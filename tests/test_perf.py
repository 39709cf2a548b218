"""The scripts of perf/, each from its command line on, with no GPU and tiny grids.

What is promised: a wrong result is never timed, a budget ends a run with a valid file, rows are compared only with
those of the same run, and nothing measured on a CPU is told as a speed.
"""

import dataclasses
import importlib
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import rnn_gpu
from perf import benchmark, cases, compiling, ledger, measure, overhead, providers, recorded, report, tune
from perf.cases import Case
from perf.providers import Candidate, Unavailable
from rnn_gpu.kernels.plan import DEVICES, plan

ROOT = Path(__file__).resolve().parent.parent
FAST = ["--rounds", "5", "--seconds-per-case", "0.001"]
ONE = ["--only", "cell=lstm", "--only", "dtype=float32", "--only", "L=1"]
SMALL = Case("lstm", "float32", 8, 3, 5)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """What these tests are about, whatever machine they run on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def options(*arguments):
    return benchmark.read_options(["--device", "cpu", *FAST, *map(str, arguments)])


def written(path) -> list[ledger.Row]:
    rows = ledger.read(path)
    assert len({row.run for row in rows}) <= 1
    return rows


# ---- Cases ----------------------------------------------------------------------------------------------------------


def test_grids_hold_what_they_promise():
    """Catches a core grid too large to quote, a full grid with a hole, a case twice."""
    core, full = cases.core(), cases.full()
    assert len(core) == len(set(core)) == 111 and set(core) <= set(full) and len(full) == len(set(full))
    for name, wanted in dict(
        cell={"lstm", "gru", "rnn_tanh"},
        dtype={"float32", "float16", "bfloat16"},
        hidden_size={64, 128, 256, 512, 650, 768, 1024, 1536, 2048},
        batch_size={1, 8, 16, 32, 64, 128, 256},
        time={128, 1024},
        layers={1, 2, 4, 8},
        directions={1, 2},
    ).items():
        assert {getattr(case, name) for case in full} >= wanted
    assert {(c.cell, c.hidden_size, c.batch_size, c.time) for c in core} >= set(
        itertools.product(["lstm", "gru"], [128, 256, 512], [16, 64], [32, 64, 128])
    ), "what most people run"
    assert {(c.hidden_size, c.batch_size, c.layers) for c in core if c.cell == "lstm"} >= set(
        itertools.product([256, 512, 1024], [16, 64], [2, 4, 8])
    ), "layers that may run side by side"
    assert full[: len(core)] == core, "a budget should end in what nobody quotes"


def test_conditions_choose_cases():
    """Catches a condition that chooses nothing in silence."""
    some = cases.selected(cases.full(), ["cell=gru", "H=512,1024", "layers=2"])
    short, whole = ("bf16", "half"), ("bfloat16", "float16")
    assert (
        cases.selected(some, [f"dtype={','.join(short)}"]) == cases.selected(some, [f"dtype={','.join(whole)}"]) != []
    )
    assert some and all(c.cell == "gru" and c.hidden_size in (512, 1024) and c.layers == 2 for c in some)
    for wrong in ("size=3", "lstm", "dtype=bf17", "H=1,3"):
        with pytest.raises(ValueError, match=f"unknown condition|no case has {wrong}: there is "):
            cases.selected(cases.full(), [wrong])


def test_operations_are_those_of_the_products():
    """Catches a layer counted with the wrong input size, and a backward counted once."""
    plain = Case("lstm", "float32", 8, 3, 5)
    assert cases.flops(plain, "inference") == 2 * 4 * 8 * (8 + 8) * 3 * 5
    stacked = dataclasses.replace(plain, cell="gru", layers=2, directions=2)
    assert cases.flops(stacked, "forward+backward") == 3 * 2 * 3 * 8 * (2 * (8 + 8) + 2 * (16 + 8)) * 3 * 5


@pytest.mark.parametrize("name", ["h200", "h100pcie", "a100", "b200", "a10", "rtx3080", "l4", "rtx4090", "rtx5090"])
def test_the_floor_lies_below_what_the_plan_predicts(name):
    """Catches a floor that grows with a smaller case, or one that the model of the plan goes below."""
    device = DEVICES[name]
    for case in cases.core():
        one, both = (cases.floor(case, mode, device).microseconds for mode in ("inference", "forward+backward"))
        assert 0 < one < both < 1000
        larger = cases.floor(dataclasses.replace(case, batch_size=2 * case.batch_size), "inference", device)
        assert larger.microseconds >= one
        p = plan(case.cell, case.hidden_size, case.batch_size, case.directions, case.dtype, device)
        # The model has one time for a product on all devices; the tensor cores of consumer GPUs are slower than that.
        if not isinstance(p, str) and device.arch in (80, 90, 100):
            chain = cases.floor(dataclasses.replace(case, layers=1), "inference", device).chain
            assert chain < p.microseconds, f"{case}: {p}"
    unknown = dataclasses.replace(device, arch=75)
    assert cases.floor(SMALL, "inference", unknown) is None


# ---- The benchmark --------------------------------------------------------------------------------------------------


def test_the_benchmark_runs_and_its_rows_are_read(tmp_path, capsys):
    """Catches a command that does not run end to end, a row with a hole, a CPU's time told as the kernels'."""
    out = tmp_path / "cpu.csv"
    assert benchmark.main(["--device", "cpu", *FAST, *ONE, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "No CUDA device" in printed and "times as fast" not in printed and " x\n" not in printed
    rows = written(out)
    assert {(row.provider, row.mode) for row in rows} == {(p, m) for p in ("rnn_gpu", "torch.nn") for m in cases.MODES}
    for row in rows:
        assert row.kind == "cpu" and row.clock == "wall clock" and "ATen" in row.detail
        assert 0 < row.least_us <= row.low_us <= row.median_us <= row.high_us and row.samples == 5
        assert row.step_us == pytest.approx(row.median_us / row.time, rel=1e-4)
        assert row.error <= 1 and row.checked_time == row.time and row.floor_us is None and row.peak_bytes is None
        assert row.torch == torch.__version__ and row.sources and row.precision == "ieee"
    assert report.table(rows) == report.NOT_MEASURED


class Spoiled(providers.TorchNN):
    """torch.nn, with something done to its results."""

    def __init__(self, name="rnn_gpu", output=lambda y: y, input=lambda x: x):
        self.name, self.output, self.input = name, output, input

    def candidate(self, weights, case):
        whole = super().candidate(weights, case)
        return dataclasses.replace(whole, call=lambda x: self.output(whole.call(self.input(x))))


class Gradient(torch.autograd.Function):
    """The identity, with a gradient a little too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d):
        return 1.0001 * d


WRONG = {
    "a little too large": Spoiled(output=lambda y: y * 1.0001),
    "one step late": Spoiled(output=lambda y: y.roll(1, 0)),
    "one element NaN": Spoiled(output=lambda y: y.masked_fill(torch.arange(y.numel()).view_as(y) == 7, math.nan)),
    "another shape": Spoiled(output=lambda y: y[:-1]),
    "a gradient too large": Spoiled(input=Gradient.apply),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_result_is_not_timed(name, tmp_path, capsys):
    """Catches a speed printed, or a row written, for a result that is not right, and an exit status that hides it."""
    out = tmp_path / "cpu.csv"
    both = {"rnn_gpu": WRONG[name], "torch.nn": providers.TorchNN()}
    status = benchmark.run(options("--grid", "tiny", *ONE, "--modes", "forward+backward", "--out", out), both)
    printed = capsys.readouterr()
    assert status == 1 and "WRONG, not timed" in printed.out and "WRONG: rnn_gpu" in printed.err
    assert [row.provider for row in written(out)] == ["torch.nn"]


def test_a_result_that_spoils_while_it_is_timed_has_no_row(tmp_path, capsys):
    """Catches a wait that gives up under load: its NaN must not become a time."""
    calls = []

    def late(y):
        calls.append(1)
        return y if len(calls) < 3 else y * math.nan

    both = {"rnn_gpu": Spoiled(output=late), "torch.nn": providers.TorchNN()}
    out = tmp_path / "cpu.csv"
    assert benchmark.run(options("--grid", "tiny", *ONE, "--modes", "inference", "--out", out), both) == 1
    assert [row.provider for row in written(out)] == ["torch.nn"]
    assert "not finite after timing" in capsys.readouterr().out


class Failing:
    """A provider that is not there, or fails."""

    def __init__(self, error):
        self.error = error

    def version(self):
        return "1"

    def candidate(self, weights, case):
        raise self.error


def test_who_is_not_available_is_named_with_the_reason(tmp_path, capsys):
    """Catches a peer left out in silence, and one that takes the whole run with it."""
    out = tmp_path / "cpu.csv"
    some = {
        "a": Failing(Unavailable("not today")),
        "b": Failing(OSError("no compiler")),
        "torch.nn": providers.TorchNN(),
    }
    assert benchmark.run(options("--grid", "tiny", *ONE, "--modes", "inference", "--out", out), some) == 0
    printed = capsys.readouterr().out
    assert "a: not available: not today" in printed and "b: not available: OSError: no compiler" in printed
    assert [row.provider for row in written(out)] == ["torch.nn"]


def test_a_failure_of_our_own_is_no_success(tmp_path, capsys):
    """Catches a wait that did not end, or a kernel that does not compile, passed over as "not available"."""
    both = {"rnn_gpu": Failing(RuntimeError("a wait did not end")), "torch.nn": providers.TorchNN()}
    out = tmp_path / "cpu.csv"
    assert benchmark.run(options("--grid", "tiny", *ONE, "--modes", "inference", "--out", out), both) == 1
    assert "a wait did not end" in capsys.readouterr().err
    assert [row.provider for row in written(out)] == ["torch.nn"]


def test_a_budget_ends_a_run_with_a_valid_file(tmp_path, capsys):
    """Catches a budget that is not kept, or that leaves a file nobody can read or go on with."""

    def slow(y):
        time.sleep(0.02)
        return y

    some = {"rnn_gpu": Spoiled(output=slow), "torch.nn": providers.TorchNN()}
    out, start = tmp_path / "cpu.csv", time.monotonic()
    assert benchmark.run(options("--grid", "full", "--only", "H=64", "--out", out, "--budget", 2), some) == 0
    assert time.monotonic() - start < 20
    assert "The budget of 2 s has ended" in capsys.readouterr().out
    rows = written(out)
    assert len({row.case_key for row in rows}) < 100 and all(row.samples >= benchmark.LEAST_SAMPLES for row in rows)


def test_an_interrupt_ends_a_run_with_a_valid_file(tmp_path, capsys):
    """Catches a traceback, and a half line, after Ctrl-C."""
    out = tmp_path / "cpu.csv"
    some = {"torch.nn": providers.TorchNN(), "rnn_gpu": Failing(KeyboardInterrupt())}
    assert benchmark.run(options("--grid", "tiny", "--out", out), some) == 0
    assert "Interrupted: 0 of" in capsys.readouterr().out and written(out) == []


def test_resume_measures_what_is_missing_and_nothing_else(tmp_path, capsys, monkeypatch):
    """Catches rows measured again, and rows of other code taken for this one's."""
    out = tmp_path / "cpu.csv"
    again = ["--grid", "tiny", *ONE, "--resume", "--out", out]
    assert benchmark.run(options(*again, "--modes", "inference")) == 0
    assert len(ledger.read(out)) == 2
    assert benchmark.run(options(*again, "--modes", "inference,forward")) == 0
    assert [row.mode for row in ledger.read(out)] == ["inference"] * 2 + ["forward"] * 2
    assert benchmark.run(options(*again, "--modes", "inference,forward")) == 0
    assert "0 cases and modes" in capsys.readouterr().out and len(ledger.read(out)) == 4
    monkeypatch.setattr(ledger, "sources_digest", lambda: "other")
    assert benchmark.run(options(*again, "--modes", "inference")) == 0
    assert len(ledger.read(out)) == 6


def test_samples_are_taken_in_turns():
    """Catches providers timed one after another, which a falling clock favours, and one that always comes first."""
    session = benchmark.Session(torch.device("cpu"), options("--seconds-per-case", 60), benchmark.Clock(60), {})
    order = []
    timed = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = session.in_turns(timed, dict.fromkeys("abc", 1))
    assert [len(samples[name]) for name in "abc"] == [5] * 3
    rounds = [order[i : i + 3] for i in range(0, 15, 3)]
    assert all(sorted(names) == list("abc") for names in rounds)
    assert [names[0] for names in rounds] == list("abcab")


def test_the_memory_decides_how_many_steps_are_checked():
    """Catches a check that a large case has no room for, and one that leaves nothing to check."""
    cpu = torch.device("cpu")
    assert benchmark.checked_steps(Case("lstm", "float32", 64, 4, 16), cpu, "forward+backward") == 16
    large = Case("lstm", "float32", 2048, 256, 1024, 4, 2)
    assert 1 <= benchmark.checked_steps(large, cpu, "forward+backward") < 64


def test_bad_arguments_are_refused(tmp_path, capsys, monkeypatch):
    """Catches a typing error that measures something else, a foreign file appended to, and the interpreter timed."""
    for wrong in (["--modes", "training"], ["--providers", "cudnn"], ["--rounds", "1"]):
        with pytest.raises(SystemExit):
            benchmark.read_options(wrong)
    assert benchmark.main(["--device", "cpu", *FAST, "--only", "H:3"]) == 2
    foreign = tmp_path / "other.csv"
    foreign.write_text("a,b\n1,2\n")
    assert benchmark.main(["--device", "cpu", *FAST, *ONE, "--out", str(foreign)]) == 2
    assert foreign.read_text() == "a,b\n1,2\n"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert benchmark.main([]) == 2
    assert "interpreter" in capsys.readouterr().err


# ---- Providers ------------------------------------------------------------------------------------------------------


def close_to_float64(candidate: Candidate, weights, case: Case) -> None:
    """The rule of the benchmark, for the output and every gradient."""
    problem = benchmark.Problem.draw(case, torch.device("cpu"))
    problem = dataclasses.replace(problem, weights=weights)
    session = benchmark.Session(torch.device("cpu"), options(), benchmark.Clock(60), {})
    judge, _ = session.judge(problem, "forward+backward")
    error, where = judge(benchmark.results(candidate, problem, "forward+backward"))
    assert error <= 1, where


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_compiled_cells_are_the_layer(cell, monkeypatch):
    """Catches layers or directions joined in the wrong order. (Not compiled here: the loop is what is ours.)"""
    monkeypatch.setattr(torch, "compile", lambda module: module)
    case = dataclasses.replace(SMALL, cell=cell, layers=2, directions=2)
    weights = providers.torch_layer(case, "cpu", torch.float32)
    close_to_float64(providers.CompiledCells().candidate(weights, case), weights, case)


def documented_flashrnn(Wx, R, b, states=None, function="lstm", backend="", dtype=""):
    """flashrnn's interface as documented, one head, in plain torch: [B, T, G, 1, H] -> states [S, B, T, 1, H]."""
    Wx, R, b = Wx[:, :, :, 0], R[:, 0], b[:, 0]
    h = c = Wx.new_zeros(Wx.shape[0], Wx.shape[-1])
    steps = []
    for t in range(Wx.shape[1]):
        r = torch.einsum("gdp,bp->gbd", R, h)
        x = Wx[:, t].transpose(0, 1)
        if function == "lstm":
            i, f, z, o = x + r + b[:, None]
            c = f.sigmoid() * c + i.sigmoid() * z.tanh()
            h = o.sigmoid() * c.tanh()
        elif function == "gru":
            reset, z = (x[0] + r[1] + b[1]).sigmoid(), (x[1] + r[2] + b[2]).sigmoid()
            h = z * h + (1 - z) * (x[2] + b[3] + reset * (r[0] + b[0])).tanh()
        else:
            h = (x + r + b[:, None])[0].tanh()
        steps.append(h)
    states = torch.stack(steps, 1)[None, :, :, None]
    return states, states[:, :, -1:]


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_the_adapter_of_flashrnn_gives_it_the_gates_in_its_order(cell, monkeypatch):
    """Catches gates, biases or axes in another order than flashrnn documents."""
    monkeypatch.setitem(sys.modules, "flashrnn", types.SimpleNamespace(flashrnn=documented_flashrnn))
    case = dataclasses.replace(SMALL, cell=cell)
    weights = providers.torch_layer(case, "cpu", torch.float32)
    close_to_float64(providers.FlashRNN("vanilla").candidate(weights, case), weights, case)


@pytest.mark.parametrize(("package", "provider"), [
    ("flashrnn", providers.FlashRNN("vanilla")), ("torchrl", providers.TorchRL("pad")),
])  # fmt: skip
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_adapters_suit_the_packages_themselves(package, provider, cell):
    """Catches a package whose interface has changed, where it is installed; on its slow backend, which needs no GPU."""
    pytest.importorskip(package)
    case = dataclasses.replace(SMALL, cell=cell)
    weights = providers.torch_layer(case, "cpu", torch.float32)
    close_to_float64(provider.candidate(weights, case), weights, case)


def test_peers_say_why_they_cannot_serve_a_case(monkeypatch):
    """Catches a peer that runs something else than what it is named after."""
    weights = providers.torch_layer(SMALL, "cpu", torch.float32)
    for provider in (providers.FlashRNN(), providers.TorchRL()):
        with pytest.raises(Unavailable, match="CUDA device"):
            provider.candidate(weights, SMALL)
    with pytest.raises(Unavailable, match="one layer"):
        providers.FlashRNN().candidate(weights, dataclasses.replace(SMALL, layers=2))
    with pytest.raises(Unavailable, match="float32"):
        providers.TorchRL().candidate(weights, dataclasses.replace(SMALL, dtype="bfloat16"))
    for name in ("flashrnn", "torchrl", "torchrl.modules"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    for package, provider in (("flashrnn", providers.FlashRNN("vanilla")), ("torchrl", providers.TorchRL("pad"))):
        with pytest.raises(Unavailable, match=f"{package} cannot be imported"):
            provider.candidate(weights, SMALL)


def test_precision_is_the_same_for_everybody_and_put_back():
    """Catches a switch left on for whatever runs next."""
    switches = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    for precision in ("tf32", "ieee"):
        with pytest.raises(ZeroDivisionError), providers.float32_precision(precision):
            assert [switch.fp32_precision for switch in switches] == [precision] * 2
            raise ZeroDivisionError
    assert [switch.fp32_precision for switch in switches] == before


# ---- The ledger and the report --------------------------------------------------------------------------------------


def invented(provider="rnn_gpu", median=100.0, run="a", measured="2026-01-01T00:00:00Z", **changes) -> ledger.Row:
    """A row that nobody measured, as a GPU would leave it."""
    case = dict(cell="lstm", dtype="bfloat16", hidden_size=512, batch_size=16, time=1024, layers=1, directions=1)
    values = dict(
        run=run, measured=measured, commit="c0ffee", sources="5eed", device="INVENTED GPU", kind="cuda", torch="2.13",
        cuda="13", cudnn="9", triton="3.7", provider=provider, version="1",
        detail="triton" if provider == "rnn_gpu" else "cuDNN", **case, precision="", mode="inference",
        clock="CUDA events", cache="warm", samples=9, calls=3, median_us=median, low_us=median, high_us=median,
        least_us=median, step_us=median / 1024, tflops=1.0, peak_bytes=1 << 20, error=0.5, checked_time=1024,
        floor_us=0.5,
    )  # fmt: skip
    return ledger.Row(**values | changes)


def in_file(path, rows) -> None:
    writer = ledger.Writer(path)
    for row in rows:
        writer.write(row)


def test_rows_come_back_as_they_were_written(tmp_path):
    """Catches a column lost or read as another type, an empty value read as zero."""
    rows = [invented(), invented("torch.nn, the usual one", peak_bytes=None, floor_us=None)]
    in_file(tmp_path / "a.csv", rows[:1])
    in_file(tmp_path / "a.csv", rows[1:])  # appended by another run
    found = ledger.read(tmp_path / "a.csv")
    assert [dataclasses.replace(row, step_us=0) for row in found] == [dataclasses.replace(r, step_us=0) for r in rows]
    assert ledger.read_all(tmp_path) == found and ledger.read(tmp_path / "none.csv") == []


def test_half_a_line_is_dropped_and_a_wrong_one_named(tmp_path):
    """Catches a file that a killed run has made useless, and a damaged one read in part."""
    path = tmp_path / "a.csv"
    in_file(path, [invented()])
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[1][:40])
    in_file(path, [invented("torch.nn")])
    assert [row.provider for row in ledger.read(path)] == ["rnn_gpu", "torch.nn"]
    path.write_text(whole + "1,2,3\n")
    with pytest.raises(ValueError, match="line 3"):
        ledger.read(path)


def test_only_rows_of_one_run_are_compared():
    """Catches a ratio between times of two days, and an old time preferred to a new one."""
    rows = [
        invented("rnn_gpu", 100, "a"),
        invented("torch.nn", 300, "a"),
        invented("torch.nn", 150, "b", "2026-01-02T00:00:00Z"),
        invented("rnn_gpu", 100, "c", "2026-01-03T00:00:00Z"),
        invented("torch.nn", 200, "c", "2026-01-03T00:00:00Z"),
        invented("rnn_gpu", 1, "d", "2026-01-04T00:00:00Z", kind="cpu"),
        invented("rnn_gpu", 1, "e", "2026-01-05T00:00:00Z", detail="ATen through rnn_gpu"),
    ]
    (group,) = report.latest(report.counted(rows)).values()
    assert report.speed_up(group) == 2.0
    assert report.speed_up(group, "flashrnn") is None


def test_the_tables_say_what_was_measured_and_how_much_is_missing():
    """Catches a mean over other cases than the core grid's, one that hides how few there are, and cases in which
    torch.nn was faster that are not told.
    """
    rows = []
    for hidden_size, theirs in ((256, 200.0), (512, 800.0), (100, 1e9), (768, 50.0)):  # 100 is not in the core grid
        rows += [
            invented("rnn_gpu", 100.0, hidden_size=hidden_size),
            invented("torch.nn", theirs, hidden_size=hidden_size),
        ]
    (mode,) = {row.mode for row in rows}
    row = " | ".join("2.00 (0.50 to 8.00)" if shown == mode else "not measured yet" for shown in report.SHOWN)
    counts = " and ".join("3" if shown == mode else "0" for shown in report.SHOWN)
    wanted = sum(map(report.REGIONS["LSTM, bfloat16, up to 1024 units"], cases.core()))
    table = report.table(rows)
    assert f"| LSTM, bfloat16, up to 1024 units | {row} | {counts} of {wanted} | ? |" in table
    assert "INVENTED GPU" in table and "**: 3 cases of commit c0ffee, torch" in table
    assert "| LSTM and GRU, bfloat16, T 32, 64 and 128 | not measured yet | not measured yet | 0 of 36 |  |" in table
    assert report.table([]) == report.NOT_MEASURED and "not measured yet" in report.NOT_MEASURED
    wanted = sum((case.cell, case.dtype) == ("lstm", "bfloat16") for case in cases.core())
    every = report.case_table(rows)
    ratio = " / ".join("0.50" if shown == mode else "?" for shown in report.SHOWN)
    assert f"| lstm | bfloat16 | {row} | {counts} of {wanted} | H 768 B 16 ({ratio}) |" in every
    assert "| lstm | bfloat16 | 512 | 16 |" in every and "| lstm | bfloat16 | 100 |" not in every


def test_a_case_counts_once():
    """Catches: commits whose cases are more than all cases, because a case was measured with two of them."""
    old, new = "2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z"
    rows = [invented(measured=old, commit="old", hidden_size=size) for size in (256, 512, 768)]
    rows.append(invented(measured=new, commit="new", hidden_size=512, mode="forward+backward"))
    told = report.described(rows)
    assert told.startswith(
        "1 cases of commit new (1 with a mode timed by an earlier one), 2 cases of commit old, torch"
    )


def test_every_case_of_the_core_grid_is_in_one_row_of_the_table():
    """Catches a case that README's table leaves out, or counts twice."""
    for case in cases.core():
        assert sum(within(case) for within in report.REGIONS.values()) == 1, case


def test_the_readme_says_what_the_ledger_says(monkeypatch):
    """Catches a table that somebody has edited, or a ledger that has grown without the table; but for the column that
    tells what `auto` takes today, which the plan decides.
    """
    monkeypatch.setattr(report, "auto_takes", lambda *case: "?")
    text = (ledger.ROOT / "README.md").read_text(encoding="utf-8")
    assert cases_without_auto(text) == cases_without_auto(
        report.with_table(text, report.table(ledger.read_all(ledger.RESULTS)))
    )


def cases_without_auto(text: str) -> list[str]:
    table = text.partition(report.BEGIN)[2].partition(report.END)[0]
    return [re.sub(r"([0-9]+ of [0-9]+|\?) \|$", "|", line) for line in table.splitlines()]


def test_versions_of_cudnn_are_written_as_people_write_them():
    """Catches 91900 for 9.19.0."""
    assert report.cudnn_version("91900") == "9.19.0" and report.cudnn_version("91002") == "9.10.2"
    assert report.cudnn_version("") == "" and report.cudnn_version("8907") == "8907"


def test_the_report_writes_table_and_plots(tmp_path, capsys):
    """Catches a report that changes other text, is not the same twice, or draws from no rows."""
    readme, results, docs = tmp_path / "README.md", tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    readme.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    command = ["--results", str(results), "--readme", str(readme), "--docs", str(docs)]
    assert report.main(command) == 0
    assert readme.read_text() == f"before\n{report.BEGIN}\n{report.NOT_MEASURED}\n{report.END}\nafter\n"
    assert not docs.exists() and report.main([*command, "--check"]) == 0

    rows = [
        invented(p, t, mode=mode, hidden_size=h)
        for mode in cases.MODES for h in (256, 512) for p, t in (("rnn_gpu", 100.0), ("torch.nn", 200.0 * h))
    ]  # fmt: skip
    in_file(results / "a.csv", rows)
    assert report.main([*command, "--check"]) == 1 and report.main(command) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "| LSTM, bfloat16, up to 1024 units |" in text
    if report.plotting() is None:
        assert "matplotlib is not installed" in capsys.readouterr().out
        return
    drawn = {path.name: path.read_bytes() for path in docs.glob("*.svg")}
    names = "speed-up", "step-inference", "step-training", "memory"
    assert set(drawn) == {f"{name}-invented-gpu.svg" for name in names}
    assert b"floor (an estimate)" in drawn["step-inference-invented-gpu.svg"]
    assert report.main(command) == 0
    assert drawn == {path.name: path.read_bytes() for path in docs.glob("*.svg")}


def test_the_report_needs_its_place(tmp_path, capsys):
    """Catches a table appended somewhere, or a file overwritten."""
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.END} {report.BEGIN}")
    assert report.main(["--results", str(tmp_path), "--readme", str(readme)]) == 2
    assert readme.read_text() == f"{report.END} {report.BEGIN}" and "no place" in capsys.readouterr().err


def test_the_ledger_of_the_project_is_sound():
    """Catches a committed file that the report cannot read, and a row of the interpreter's or a CPU's time in it."""
    for row in ledger.read_all(ledger.RESULTS):
        assert row.kind == "cuda" and row.error <= 1 and row.samples >= benchmark.LEAST_SAMPLES


# ---- Profile and tune -----------------------------------------------------------------------------------------------


@pytest.mark.compiled
def test_the_profile_counts_stages_with_no_gpu(capsys):
    """Catches a profile that does not run, and a variant that leaves its stage in."""
    pytest.importorskip("triton")
    from perf import profile

    assert profile.main(["--hidden-size", "16", "--batch-size", "8", "--dtype", "float16"]) == 0
    printed = capsys.readouterr().out
    assert "No CUDA device: no time is measured here" in printed and "an estimate" in printed
    assert printed.count("instructions of a warp in a time step") == 2
    for stage, count in (("product", 2), ("equations", 2), ("stores", 1)):
        fewer = [int(line.split()[1]) for line in printed.splitlines() if line.split()[:1] == [stage] and "(" in line]
        assert len(fewer) == count and all(number > 0 for number in fewer)


@pytest.mark.compiled
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_variants_leave_their_stage_out_and_everything_is_put_back(backward):
    """Catches a variant that is the kernel itself (from a cache, say), and one that stays after its context."""
    pytest.importorskip("triton")
    from perf import resources, variants
    from rnn_gpu.kernels import launch, machine_code

    cell = "rnn_tanh" if backward else "lstm"  # the backward of the others takes long to compile
    p = plan(cell, 512 if backward else 256, 8, 1, "bfloat16", DEVICES["h200"], backward)
    assert not p.alone
    before = launch.CELLS, launch.forward_kernel, launch.backward_kernel

    def compiled(stage):
        with variants.variant(stage, p):
            return resources.compile_plan(p, 90)

    whole = compiled(None)
    assert whole.count(*resources.TENSOR_CORE) > 0
    no_product = compiled("product")
    assert no_product.count(*resources.TENSOR_CORE) == 0 and no_product.count("MUFU") == whole.count("MUFU")
    polls = sum(map(machine_code.is_poll, whole.step))
    assert sum(map(machine_code.is_poll, no_product.step)) == polls > 0, "it must wait still"
    no_wait = compiled("wait")
    assert sum(map(machine_code.is_poll, no_wait.step)) == polls and no_wait.count() < whole.count()
    no_equations = compiled("equations")
    # not fewer in all: the RNN's equation is two multiplications, as many as other scheduling moves
    assert no_equations.count("MUFU") == 0 and no_equations.step != whole.step
    assert no_equations.count(*resources.TENSOR_CORE) == whole.count(*resources.TENSOR_CORE)
    again, hasty = compiled("again"), compiled("hasty")
    assert sum(map(machine_code.is_poll, again.step)) == 2 * polls and again.count("BAR") == whole.count("BAR")
    assert hasty.count("BAR") == whole.count("BAR") and hasty.count() < whole.count()
    with pytest.raises(ValueError, match="no loop that publishes"):  # that is, by `.cg` stores
        compiled("write-through")
    now = launch.CELLS, launch.forward_kernel, launch.backward_kernel
    assert all(a is b for a, b in zip(before, now, strict=True))


@pytest.mark.compiled
def test_other_ways_to_wait_change_nothing():
    """Catches an alternative that is timed and wrong: a wait that ends early, or takes another vector's words."""
    pytest.importorskip("triton")
    from perf import variants
    from rnn_gpu.kernels.machine import on_machine

    layer, x = rnn_gpu.RNN(8, 150).to(torch.bfloat16), torch.randn(3, 11, 8, dtype=torch.bfloat16)
    p = plan("rnn_tanh", 150, 11, 1, "bfloat16", DEVICES["h200"])
    assert not p.alone
    outputs = []
    for way in (None, "again", "hasty"):
        with torch.no_grad(), variants.variant(way, p), on_machine(arch=90, seed=3), rnn_gpu.backend("triton"):
            outputs.append(layer(x)[0])
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_kernels_are_told_apart_by_name():
    """Catches the time of a product booked as that of the recurrence."""
    pytest.importorskip("triton")
    from perf.profile import part_of

    assert part_of("forward") == "recurrence forward" and part_of("backward") == "recurrence backward"
    assert part_of("nvjet_tst_128x256_64x4_TNT") == part_of("sm90_xmma_gemm_bf16bf16") == "products"
    assert part_of("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>") == "fill"
    assert part_of("void at::native::direct_copy_kernel") == "copies and others"


def test_tune_says_that_it_needs_a_gpu(capsys):
    """Catches a traceback, or an estimate told as a measurement."""
    assert tune.main(["--hidden-size", "256"]) == 0
    printed = capsys.readouterr().out
    assert "No CUDA device" in printed and "needs a GPU" in printed and "estimates, nothing is" in printed
    assert tune.main(["--hidden-size", "256", "--layers", "4"]) == 0
    assert "plans of 4 layers side by side" in (printed := capsys.readouterr().out) and "x 4 layers =" in printed


def test_layers_side_by_side_are_told_against_one_by_one():
    """Catches: one layer's time for that of all, or the products between them left out."""
    problem = "lstm", 512, 16, 1, "bfloat16", DEVICES["h200"], False
    together, one = plan(*problem, layers=4), plan(*problem)
    told = tune.against_one_by_one([(together, 2.5), (together, 2.0)], [(one, 1.0)], DEVICES["h200"])
    assert "4 layers side by side 2.000 us a step; one by one 4 x 1.000" in told
    assert float(told.split(": ")[-1].split()[0]) == pytest.approx(2.01, abs=0.2) and "products" in told


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", [("lstm", 512, 64, 1, "bfloat16"), ("gru", 64, 16, 2, "float32")])
def test_candidates_hold_the_choice_and_what_it_loses_is_told(shape, backward):
    """Catches a ranking without the plan that would run, and a loss counted from the wrong side."""
    device = DEVICES["h200"]
    found, own = tune.candidates(*shape, device, backward), plan(*shape, device, backward)
    assert len(found) > 3 and any(tune.same_plan(p, own) for p in found)
    key = "alone", "units", "rows", "slices", "warps", "waits", "registers"
    assert len({tuple(getattr(p, name) for name in key) for p in found}) == len(found)
    assert any(p.registers == 0 < p.shared for p in found), "weights in shared memory, where they could be in registers"
    times = [(p, 3.0 if tune.same_plan(p, own) else 2.0 + i) for i, p in enumerate(found)]
    assert tune.loss(times, own) == pytest.approx(3.0 / min(us for _, us in times) - 1)
    assert tune.loss([(p, us) for p, us in times if not tune.same_plan(p, own)], own) is None
    assert "->   3.000" in tune.ranking(times, own)


def test_a_fit_finds_the_constants_that_times_were_made_with(tmp_path):
    """Catches a fit that gets stuck, changes the model it fits, or writes what is no JSON."""
    from rnn_gpu.kernels import plan as planning

    device, usual = DEVICES["h200"], {name: getattr(tune.planning, name) for name in tune.FITTED}
    factors = (1.5, 1.8, 1.4, 1.6, 1.5, 1.3)
    made_with = {name: by * usual[name] for name, by in zip(tune.FITTED, factors, strict=True)}
    plans = [
        p for h in (128, 256, 1024) for backward in (False, True)
        for p in tune.candidates("lstm", h, 32, 1, "bfloat16", device, backward)
    ]  # fmt: skip
    with tune.constants(made_with):
        times = [(p, tune.predicted(p, device)) for p in plans]
    found = tune.written_fit(times, device)
    assert found["error_after"] < 0.02 < found["error_before"]
    assert found["constants"] == pytest.approx(made_with, rel=0.1)
    assert {name: getattr(planning, name) for name in tune.FITTED} == usual
    assert json.loads(json.dumps(found))["device"]["name"] == device.name


def test_the_model_agrees_with_what_was_recorded():
    """Catches a model that puts slow plans first, or lets `auto` take the slower of ours and cuDNN's."""
    lines, good = recorded.check(str(ledger.RESULTS), lambda p: tune.predicted(p, DEVICES["h200"]), 0.08)
    assert len(lines) >= 3 and good, "\n".join(lines)


@pytest.mark.parametrize("wrong", [
    dict(FORWARD_LATE=0.1), dict(CUDNN_SMALL=(9.0, 9.0)), dict(BACKWARD_VECTOR=0.0), dict(BACKWARD_TRAVEL=0.909),
])  # fmt: skip
def test_a_model_that_disagrees_with_what_was_recorded_is_found(wrong, capsys):
    """Control: catches a comparison that no model can fail, and a command that exits with 0 in spite of it."""
    with tune.constants(wrong):
        assert tune.main(["--check", "--recorded", str(ledger.RESULTS), "--most", "0.08"]) == 1
    assert tune.main(["--check", "--recorded", str(ledger.RESULTS), "--most", "0.08"]) == 0
    assert "`auto` chooses wrongly in" in capsys.readouterr().out


def test_a_model_that_puts_slow_plans_first_is_found(monkeypatch):
    """Control: the same of the plans that were recorded."""
    monkeypatch.setitem(recorded.REDUCED_POLLS.constants, "FORWARD_LATE", 0.1)
    lines, good = recorded.check(str(ledger.RESULTS), lambda p: tune.predicted(p, DEVICES["h200"]), 0.08)
    assert not good, "\n".join(lines)


def test_quantiles_are_those_of_the_samples():
    """Catches an index one off, and a sample of one."""
    values = [float(v) for v in range(1, 22)]
    assert benchmark.quantile(values, 0.1) == 3.0 and benchmark.quantile(values, 0.9) == 19.0
    assert benchmark.quantile(values[::-1], 0.5) == statistics.median(values)
    assert benchmark.quantile([5.0], 0.1) == 5.0


# ---- Overhead -------------------------------------------------------------------------------------------------------


def test_overhead_compares_in_turns(capsys):
    """Catches a cell or a way of calling that is left out, or samples that are not taken in turns."""
    assert overhead.main(["--device", "cpu", "--hidden-size", "8", "--rounds", "3"]) == 0
    text = capsys.readouterr().out
    for cell in overhead.CELLS:
        for name in ("torch.nn", "rnn_gpu", "as an operator of a layer", "as that of a stack", "rnn_gpu, training"):
            assert f"{cell:6}{name} " in text
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    found = overhead.samples(calls, 2, lambda: None)
    assert [len(samples) for samples in found.values()] == [2, 2]
    assert order[:: overhead.CALLS] == ["a", "b", "b", "a"]


# ---- Everything in one command --------------------------------------------------------------------------------------


def test_measure_needs_a_gpu(capsys):
    """Catches a folder made, or a test session started, where there is nothing to measure."""
    assert measure.main([]) == 2 and "No CUDA device" in capsys.readouterr().err
    assert measure.main(["--list"]) == 0
    assert "pytest" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        measure.main(["--only", "nothing"])


def test_steps_of_measure_are_commands_that_exist(tmp_path):
    """Catches an option that a script does not have (any more), and results in more files than one can carry."""
    every = measure.steps(tmp_path)
    assert [step.name for step in every[:2]] == ["tests", "benchmark"] and sum(step.share for step in every[:-1]) <= 1.2
    assert len({step.file for step in every} | {"benchmark.csv", "fit.json", "measure.txt"}) <= 8
    for step in every:
        if step.name != "tests":
            arguments = [part.replace("{seconds}", "7") for part in step.command[3:]]
            main = importlib.import_module(step.command[2]).main
            with pytest.raises(SystemExit) as ended:
                main([*arguments, "--help"])
            assert ended.value.code == 0
            with pytest.raises(SystemExit) as ended:
                main([*arguments, "--no-such-option"])
            assert ended.value.code == 2


def test_measure_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    """Catches a step that keeps the others from running, an exit status that hides it, and a process of a step that was
    stopped which runs on while the next one is timed.
    """
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(2); open({str(alive)!r}, 'w')"
    endless = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    say = lambda text, status: (sys.executable, "-c", f"print({text!r}); raise SystemExit({status})")
    made = [
        measure.Step("first", "a.txt", say("one", 3), 0.5),
        measure.Step("endless", "a.txt", (sys.executable, "-c", endless), 0.02),
        measure.Step("last", "b.txt", say("{seconds}", 0), 0.5),
    ]
    monkeypatch.setattr(measure, "steps", lambda out: made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ledger, "environment", lambda device: dict.fromkeys(ledger.COLUMNS, "invented"))
    out = tmp_path / "new"
    assert measure.main(["--out", str(out), "--budget", "60"]) == 1
    printed = capsys.readouterr().out
    assert "first              FAILED with 3" in printed and "endless            was stopped" in printed
    assert "last               ended well" in printed and (out / "measure.txt").read_text() == printed
    assert (out / "b.txt").read_text().endswith("\n22\n")  # of 30 seconds
    assert "one\n$" in (out / "a.txt").read_text() and len(list(out.iterdir())) == 3
    assert measure.main(["--out", str(out), "--budget", "60", "--only", "last"]) == 0
    time.sleep(1.5)
    assert not alive.exists()


def test_tasks_run_in_processes_of_their_own_and_end():
    """Catches tasks that are not called as the benchmark calls, one that keeps the others from running, and a wait
    beyond the time there is.
    """
    case = Case("gru", "float32", 8, 2, 512)
    good = compiling.case, case, "forward+backward", "ieee", "rnn_gpu", "cpu"
    assert good[0](*good[1:]) is None
    begin = time.monotonic()
    took = compiling.in_parallel([(time.sleep, 60), (compiling.case, None, "", "", "", "")], jobs=2, seconds=0.5)
    assert 0.5 <= took <= time.monotonic() - begin < 30
    assert compiling.in_parallel([good], jobs=1) < 1 and compiling.in_parallel([]) < 1


def test_a_script_on_standard_input_starts_no_processes_for_ever():
    """Catches processes that fail as they start, one after another, until the time for them has ended."""
    script = "import time; from perf import compiling; print(compiling.in_parallel([(time.sleep, 60)], 2, 60.0) < 30)"
    command = [sys.executable, "-"]
    done = subprocess.run(command, input=script, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert "Put it into a file" in done.stderr and "Traceback" not in done.stderr
