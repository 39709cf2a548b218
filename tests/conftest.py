"""What all tests share: a seed for each, which a failure names, and the rules by which markers skip.

RNN_GPU_TEST_SEED=5 pytest ...    other random data everywhere; 0 unless set
"""

import collections
import itertools
import os
import random
import sys
import zlib

import pytest
import torch

from tests import progress
from tests.interpreter import ARCH, ON_MACHINE, on_machine

BASE_SEED = int(os.environ.get("RNN_GPU_TEST_SEED", "0"))
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
SEED = pytest.StashKey[int]()
SAMPLE = 8  # of so many cases of a test, `make test` runs one on the machine; the others are slow


def pytest_addoption(parser):
    progress.add_option(parser)
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="of N cases of a test run one, of each test")


def pytest_configure(config):
    progress.register(config)
    # One thread a worker, or the workers fight for the cores.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_report_header(config):
    triton_mode = "interpreted" if INTERPRETING else f"on the machine, sm_{ARCH}" if ON_MACHINE else "compiled"
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return (
        f"rnn_gpu: RNN_GPU_TEST_SEED={BASE_SEED}, torch {torch.__version__}, CUDA device: {cuda}, kernels {triton_mode}"
    )


def why_not(item) -> str | None:
    """Why a test cannot run here, by its markers."""
    if ON_MACHINE and INTERPRETING:
        return "RNN_GPU_TEST_MACHINE=1 runs compiled kernels: must not be set with TRITON_INTERPRET=1"
    if ON_MACHINE:
        return None if on_the_machine(item) else "not a test of what the compiled kernels do on CPU tensors"
    if item.get_closest_marker("interpreted") and not INTERPRETING:
        return "runs the kernels in Triton's interpreter: needs TRITON_INTERPRET=1, set before Python starts"
    if item.get_closest_marker("compiled") and INTERPRETING:
        return "compiles the kernels: must not run with TRITON_INTERPRET=1"
    if item.get_closest_marker("gpu"):
        if INTERPRETING:
            return "runs compiled kernels on a GPU: must not run with TRITON_INTERPRET=1"
        if not torch.cuda.is_available():
            return "needs a CUDA device"
    return None


def on_the_machine(item) -> bool:
    """Whether a test runs on the machine for PTX, too (RNN_GPU_TEST_MACHINE=1)."""
    return bool(item.get_closest_marker("interpreted")) and not item.get_closest_marker("interpreter_only")


def beyond_the_sample(items, one_in: int) -> list:
    """All but one of so many cases of each test, and but one at least."""
    by_test = collections.defaultdict(list)
    for item in items:
        by_test[item.nodeid.partition("[")[0]].append(item)
    rest = []
    for cases in by_test.values():
        cases.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        rest += cases[-(-len(cases) // one_in) :]
    return rest


def beyond_the_cover(items) -> list:
    """Of the tests that are marked with the parameters that a sample has to cover: the cases that only `-m slow` runs.
    A case stays where a value of one of the parameters, or a pair of two, is in no other that stays.
    """
    seen, rest = collections.defaultdict(set), []
    for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode())):
        marker = item.get_closest_marker("covering")
        if marker is not None and not item.get_closest_marker("slow") and why_not(item) is None:
            names = [(name,) if isinstance(name, str) else name for name in marker.args] or [()]
            values = {repr([(name, item.callspec.params[name]) for name in group]) for group in names}
            known = seen[item.nodeid.partition("[")[0]]
            rest += [item] if values <= known else []
            known |= values
    return rest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        reason = why_not(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
    for item in beyond_the_cover([item for item in items if INTERPRETING or item.get_closest_marker("gpu")]):
        item.add_marker(pytest.mark.slow)
    if ON_MACHINE:
        for item in beyond_the_sample([item for item in items if why_not(item) is None], SAMPLE):
            item.add_marker(pytest.mark.slow)
    is_slow = lambda item: item.get_closest_marker("slow") is not None
    left_out = {
        item
        for some in (filter(is_slow, items), itertools.filterfalse(is_slow, items))
        for item in beyond_the_sample(some, config.getoption("--one-in"))
    }
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=[*left_out])
    items.sort(key=lambda item: item.get_closest_marker("unmet") is None)  # time on a GPU may end before the tests do


@pytest.fixture(autouse=True)
def _on_the_machine(request):
    """Launches outside of any other schedule get one of the test's own."""
    if not ON_MACHINE or why_not(request.node) is not None:
        yield
        return
    with on_machine(request.node.stash[SEED]):
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """The same seed for the same test, and nothing compiled, whatever runs before it and in whichever process: layers
    share their code, of which torch.compile makes only so many graphs.
    """
    seed = item.stash[SEED] = zlib.crc32(f"{BASE_SEED} {item.nodeid}".encode())
    torch.manual_seed(seed)
    random.seed(seed)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    if report.failed and SEED in item.stash:
        text = f"torch.manual_seed({item.stash[SEED]}), from RNN_GPU_TEST_SEED={BASE_SEED} and the name of the test"
        report.sections.append(("seed", text))


@pytest.fixture
def seed(request) -> int:
    """The seed of this test, for data drawn in other ways than from torch's and Python's global generators."""
    return request.node.stash[SEED]


@pytest.fixture
def tf32():
    """A function that sets PyTorch's own switches, for products and for RNNs, to a problem's precision."""
    switches = (torch.backends.cudnn.rnn, torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]

    def choose(precision: str | None) -> None:
        for switch in switches:
            switch.fp32_precision = precision or "tf32"

    yield choose
    for switch, setting in zip(switches, before, strict=True):
        switch.fp32_precision = setting
