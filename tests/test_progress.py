"""What `make test` shows of its progress, and the samples that shorter runs take."""

import types

import pytest

from tests.conftest import beyond_the_sample
from tests.progress import Progress


def report(when="call", outcome="passed", reason=None):
    found = types.SimpleNamespace(when=when, longrepr=None if reason is None else ("file", 1, f"Skipped: {reason}"))
    for name in ("passed", "skipped", "failed"):
        setattr(found, name, outcome == name)
    return found


def test_the_progress_is_this_runs_part_of_the_whole(capsys):
    """Catches: a second run that begins at 0 again, a line for each test, a failure that is not shown."""
    progress = Progress(60, 100)
    progress.session = types.SimpleNamespace(testscollected=200)
    for _ in range(200):
        progress.pytest_runtest_logreport(report())
        progress.pytest_runtest_logreport(report("teardown"))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["60", "70", "80", "90", "100"]
    assert progress.pytest_report_teststatus(report()) == ("passed", "", "")
    assert progress.pytest_report_teststatus(report(outcome="failed")) is None


def test_what_is_skipped_is_told_in_one_line():
    """Catches: a line for each of hundreds of tests, or none."""
    progress, lines = Progress(0, 100), []
    progress.session = types.SimpleNamespace(testscollected=3)
    for reason in ("needs a CUDA device", "could not import 'x': No module named 'x'", "needs a CUDA device"):
        progress.pytest_runtest_logreport(report("setup", "skipped", reason))
    progress.pytest_terminal_summary(types.SimpleNamespace(write_line=lines.append))
    assert lines == ["skipped: 2 (needs a CUDA device); 1 (could not import 'x')"]


@pytest.mark.parametrize("one_in, left", [(1, 8), (3, 1 + 2 + 1), (100, 3)])
def test_a_sample_keeps_a_case_of_each_test(one_in, left):
    """Catches: a test that a sample leaves out whole, more or fewer cases than asked for."""
    names = "a::one", *(f"a::some[{n}]" for n in range(4)), *(f"b::some[{n}]" for n in range(3))
    items = [types.SimpleNamespace(nodeid=name) for name in names]
    rest = beyond_the_sample(items, one_in)
    kept = {item.nodeid.partition("[")[0] for item in items if item not in rest}
    assert len(items) - len(rest) == left and kept == {"a::one", "a::some", "b::some"}
