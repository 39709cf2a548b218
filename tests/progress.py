"""One progress from 0 to 100 over several runs of pytest, and what was skipped in one line: `pytest --span 0:60`."""

import collections
import sys
import time

import pytest

LINES = 10  # where the output is no terminal: a line for each tenth


class Progress:
    """Tells how far all runs are, in place of a dot for each test. first, last: this run's part of the whole, in per
    cent.
    """

    def __init__(self, first: float, last: float):
        self.first, self.last = first, last
        self.done, self.shown, self.begin = 0, None, time.monotonic()
        self.skipped: collections.Counter[str] = collections.Counter()
        self.session = None

    @pytest.hookimpl
    def pytest_sessionstart(self, session):
        self.session = session

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report):
        """No dot and no letter for what is as it should be."""
        if report.skipped and not hasattr(report, "wasxfail"):
            return "skipped", "", ""
        return ("passed", "", "") if report.passed and report.when == "call" else None

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skipped[reason.removeprefix("Skipped: ").partition(":")[0]] += 1
        if report.when == "teardown":
            self.done += 1
            self.show()

    def show(self) -> None:
        """Print the progress, where it has changed."""
        share = self.done / max(self.done, self.session.testscollected)
        percent = int(self.first + (self.last - self.first) * share)
        terminal = sys.stdout.isatty()
        if percent == self.shown or (not terminal and percent // LINES == (self.shown or 0) // LINES):
            return
        self.shown = percent
        seconds = int(time.monotonic() - self.begin)
        text = f"{percent:3} %  {self.done} of {self.session.testscollected} tests of this run, {seconds} s"
        print(f"\r{text}" if terminal else text, end="" if terminal else "\n", flush=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter):
        if sys.stdout.isatty():
            print()
        if self.skipped:
            reasons = "; ".join(f"{count} ({reason})" for reason, count in self.skipped.most_common())
            terminalreporter.write_line(f"skipped: {reasons}")


def add_option(parser) -> None:
    """`--span FIRST:LAST`."""
    parser.addoption("--span", metavar="FIRST:LAST", help="this run is that part, in per cent, of one progress")


def register(config) -> None:
    """The plugin, where the option asks for it; not in the workers of pytest-xdist."""
    span = config.getoption("--span")
    if span and not hasattr(config, "workerinput"):
        first, _, last = span.partition(":")
        config.pluginmanager.register(Progress(float(first), float(last)))
        config.option.reportchars = "fE"  # what was skipped has its own line
