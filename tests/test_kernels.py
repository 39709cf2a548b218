"""The kernels against the oracle, in Triton's interpreter or on the machine for PTX: programs run concurrently, in
orders drawn from seeds.

    TRITON_INTERPRET=1 pytest tests/test_kernels.py
    RNN_GPU_TEST_MACHINE=1 pytest tests/test_kernels.py

What the interpreter cannot show (layouts, registers, real memory) is in test_resources.py and test_gpu.py.
"""

import collections
import dataclasses
import itertools
import random
import re

import pytest
import torch

from tests.interpreter import INTERPRETED, ON_MACHINE, concurrent_programs

if not INTERPRETED and not ON_MACHINE:
    pytest.skip("needs TRITON_INTERPRET=1 or RNN_GPU_TEST_MACHINE=1, set before Python starts", allow_module_level=True)

import triton
import triton.language as tl

from rnn_gpu.equations import BUILT_IN
from rnn_gpu.kernels import cells, exchange, interpreter, launch, layer, tiles
from rnn_gpu.kernels.spec import CELLS
from tests.problems import (
    Poison,
    Problem,
    assert_right,
    assert_same_bits,
    assert_same_exceptions,
    bits,
    data,
    loop,
    oracle,
    plans,
    run,
    run_forward,
)
from tests.tolerances import assert_close_to_oracle

pytestmark = [pytest.mark.interpreted]

KINDS = ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.float16, None), (torch.bfloat16, None))
SETS = ((1, 0), (1, 1), (2, 2))  # weight sets, which of them run backwards in time
ALL_ONES = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}

every_cell = pytest.mark.parametrize("cell", BUILT_IN)
every_kind = pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=["fp32-ieee", "fp32-tf32", "fp16", "bf16"])


@pytest.fixture(autouse=True)
def waits_end_soon(monkeypatch):
    """A wait that cannot end fails within seconds. A program polls some hundred times at the most in these tests."""
    monkeypatch.setattr(launch, "WAIT_LIMIT", 20_000)
    launch.status_word(torch.device("cpu")).zero_()


# ---- Right results ---------------------------------------------------------------------------------------------------


class Deck:
    """Deals values in random order, all of them before any comes again: a covering sample that repeats."""

    def __init__(self, random_: random.Random, *values):
        self.random, self.values, self.left = random_, values, []

    def deal(self):
        if not self.left:
            self.left = self.random.sample(self.values, len(self.values))
        return self.left.pop()


def covering_sample() -> list:
    """Every cell x type x direction; sizes, ways to cut and schedules dealt evenly over them."""
    draw = random.Random("a covering sample")
    hidden_sizes, batches, times = Deck(draw, 1, 7, 33, 40), Deck(draw, 1, 5, 17), Deck(draw, 1, 2, 2, 9)
    alone, torn, waits = Deck(draw, False, False, True), Deck(draw, False, True), Deck(draw, 1, 2, 4)
    units, slices = Deck(draw, 8, 16, 32), Deck(draw, 1, 2, 2)
    cases = []
    for cell, (dtype, precision), (sets, reversed_sets) in itertools.product(BUILT_IN, KINDS, SETS):
        size, batch, time = hidden_sizes.deal(), batches.deal(), times.deal()
        problem = Problem(cell, size, batch, time, dtype, precision, sets, reversed_sets, seed=len(cases))
        if alone.deal():
            cut = dict(alone=True)
        else:
            cut = dict(waits=waits.deal(), units=units.deal(), slices=slices.deal())
        name = f"{problem}-" + "-".join(f"{key}{value}" for key, value in cut.items())
        cases.append(pytest.param(problem, cut, torn.deal(), id=name))
    return cases


@pytest.mark.parametrize(("problem", "cut", "torn"), covering_sample())
def test_forward_and_backward_are_right(problem, cut, torn):
    """Catches any wrong equation, index, mask, direction of time or rounding, for odd sizes of everything."""
    both = plans(problem, **cut)
    if not cut.get("alone"):
        assert not both[0].alone and not both[1].alone
    with concurrent_programs(problem.seed, torn):
        assert_right(problem, run(problem, both))


# More rows than a program takes at once, weights that do not stay in registers, and everything else that the planner
# chooses for sizes too large for an interpreter. H 150 and 200 are more than one chunk of K, with a rest.
CUTS = {
    "batch slices": (33, 17, dict(slices=1)),
    "two launches": (33, 17, dict(slices=1, batch_slices=2)),
    "three launches": (7, 17, dict(slices=1, batch_slices=1)),
    "two tiles in turn": (33, 13, dict(slices=2)),
    "four tiles in turn": (40, 29, dict(slices=4)),
    "tiles in turn, spare tile": (33, 5, dict(slices=2)),
    "tiles in turn, several launches": (7, 37, dict(slices=2, batch_slices=1)),
    "tiles in turn, weights streamed": (150, 11, dict(slices=2, warps=4, registers=0, units=32)),
    "wide tiles": (33, 21, dict(slices=1, rows=16)),
    "wide tiles, weights streamed": (150, 21, dict(rows=16, slices=1, warps=4, registers=0, shared=1, units=32)),
    "8 units": (40, 5, dict(units=8, waits=4)),
    "32 units": (150, 5, dict(units=32, waits=1)),
    "64 units": (150, 3, dict(units=64)),
    "more units than there are": (7, 5, dict(units=32)),
    "gates one by one": (40, 5, dict(units=16, gates_per_tile=1)),
    "gates two by two": (40, 5, dict(units=16, gates_per_tile=2)),
    "weights in shared memory": (150, 5, dict(warps=4, registers=0, shared=9, units=32)),
    "weights in both": (200, 5, dict(warps=4, registers=1, shared=9, units=32)),
    "weights in both and streamed": (200, 5, dict(warps=4, registers=1, shared=1, units=32)),
    "weights streamed": (150, 5, dict(warps=4, registers=0, shared=0, units=32, waits=4)),
    "one chunk for 8 warps": (33, 5, dict(warps=8)),
    "several chunks for 8 warps": (300, 3, dict(warps=8, units=64, waits=2)),
    "one warp": (40, 5, dict(warps=1)),
}


def ways_to_cut() -> list:
    """Every cut with two kinds of cells, types and directions dealt to them."""
    draw = random.Random("ways to cut")
    kinds, sets = Deck(draw, *KINDS), Deck(draw, (1, 0), (1, 1), (1, 1), (2, 2), (1, 0), (1, 1), (2, 0))
    cases = []
    for name, (hidden_size, batch, cut) in CUTS.items():
        cells = ["lstm", "gru"] + (["rnn_tanh", "rnn_relu"][len(cases) % 2 :][:1] if len(cases) % 3 == 0 else [])
        if "gates_per_tile" in cut:
            cells = ["lstm", "gru"]
        for cell in cells:
            dtype, precision = kinds.deal()
            number, reversed_sets = sets.deal() if hidden_size <= 40 else (1, 0)
            problem = Problem(cell, hidden_size, batch, 3, dtype, precision, number, reversed_sets, seed=len(cases))
            name = name.replace(" ", "-").replace(",", "")
            cases.append(pytest.param(problem, dict(units=16) | cut, id=f"{name}-{problem}"))
    return cases


@pytest.mark.covering("cut")
@pytest.mark.parametrize(("problem", "cut"), ways_to_cut())
def test_every_way_to_cut_a_problem_is_right(problem, cut):
    """Catches a row, a unit or a chunk of weights that is left out, done twice, or taken from the wrong program."""
    with concurrent_programs(problem.seed, torn=problem.seed % 3 == 0):
        assert_right(problem, run(problem, plans(problem, **cut)))


@every_cell
def test_a_lone_program_in_several_launches_is_right(cell):
    """Catches rows of a later launch that are left out, or done as those of the first one."""
    problem = Problem(cell, 33, 29, 2, torch.bfloat16, sets=2, reversed_sets=2)
    forward, backward = plans(problem, alone=True, batch_slices=2)
    assert forward.alone and backward.alone and forward.launches == backward.launches == 2
    with concurrent_programs(5):
        assert_right(problem, run(problem, (forward, backward)))


@every_cell
@pytest.mark.parametrize("alone", [False, True])
def test_no_bias_is_right(cell, alone):
    """Catches a hidden bias that is read where there is none."""
    problem = Problem(cell, 33, 5, 2, torch.float32, "ieee", bias=False)
    with concurrent_programs(3):
        assert_right(problem, run(problem, plans(problem, alone=alone)))


@every_cell
@pytest.mark.parametrize(
    "absent", [("d_y",), ("d_h_n",), ("d_c_n",), ("d_h_n", "d_c_n"), ("d_y", "d_c_n")], ids="-".join
)
def test_gradients_that_are_absent_are_zero(cell, absent):
    """Catches a gradient that nobody asked for being read, or another one being left out with it."""
    if cell != "lstm":
        absent = tuple(name for name in absent if name != "d_c_n")
    if not absent:
        pytest.skip("only the LSTM has a c")
    for alone in (False, True):
        problem = Problem(cell, 7, 3, 2, torch.float32, "ieee", 1, 1)
        given = dataclasses.replace(data(problem), **{name: None for name in absent})
        with concurrent_programs(4):
            assert_right(problem, run(problem, plans(problem, alone=alone), given), given)


@pytest.mark.covering("cell", ("dtype", "precision"))
@every_cell
@every_kind
def test_inference_equals_training(cell, dtype, precision):
    """Catches an output that depends on what is saved for the backward, and a save over x_part that none asked for."""
    for alone in (False, True):
        problem = Problem(cell, 20, 3, 3, dtype, precision)
        forward_plan, _ = plans(problem, alone=alone)
        with concurrent_programs(5):
            y, c_n, aux, gates = run_forward(problem, forward_plan, data(problem))
            y_only, c_n_only, no_aux, untouched = run_forward(problem, forward_plan, data(problem), saving="nothing")
        assert torch.equal(bits(y), bits(y_only))
        assert (c_n is None) == (c_n_only is None) and (c_n is None or torch.equal(bits(c_n), bits(c_n_only)))
        assert no_aux is None and (aux is None) == CELLS[cell].reads_h
        assert torch.equal(untouched, data(problem).x_part)
        assert (CELLS[cell].saves > 0) != torch.equal(gates, data(problem).x_part)


@pytest.mark.covering("cell", ("dtype", "precision"))
@every_cell
@every_kind
def test_uninitialised_memory_never_reaches_a_result(cell, dtype, precision, monkeypatch):
    """Catches reading what nobody wrote: padding of a row, spare rows, a buffer filled in part."""
    for cut in (dict(slices=2), dict(alone=True)):
        problem = Problem(cell, 7, 9, 2, dtype, precision, 2, 2)
        with monkeypatch.context() as patch:
            poison = Poison(patch)
            with concurrent_programs(6):
                found = run(problem, plans(problem, **cut))
        assert poison.given, "torch.empty is not what the launchers call any more: poison that instead"
        assert_right(problem, found)


def halves(problem: Problem, given, k: int):
    """The problem cut in time before step k: the part that is computed first, then the other; data without states."""
    early, late = slice(0, k), slice(k, problem.time)
    parts = []
    for times in (late, early) if problem.reversed_sets == 1 else (early, late):
        size = times.stop - times.start
        part = dataclasses.replace(problem, time=size)
        parts.append(
            (part, times, dataclasses.replace(given, x_part=given.x_part[times].contiguous(), d_y=given.d_y[times]))
        )
    return parts


@pytest.mark.covering(("cell", "dtype", "precision"))
@every_cell
@every_kind
@pytest.mark.parametrize("reversed_sets", [0, 1])
def test_two_halves_with_passed_state_are_the_whole(cell, dtype, precision, reversed_sets):
    """Catches a state or its gradient that is dropped, rounded once too often, or handed on from the wrong end."""
    problem = Problem(cell, 20, 3, 5, dtype, precision, 1, reversed_sets)
    given = data(problem)
    (one, times_1, data_1), (two, times_2, data_2) = halves(problem, given, 2)
    last = 0 if reversed_sets == 1 else -1
    with concurrent_programs(7):
        whole, _, _, _ = run_forward(problem, plans(problem, units=16)[0], given)
        # The state between them, and the gradient that the second gives to the first.
        y, c_n, _, _ = run_forward(one, plans(one, units=16)[0], data_1)
        second = dataclasses.replace(data_2, h0=y[last].transpose(0, 1).contiguous(), c0=c_n)
        results_2 = run(two, plans(two, units=16), second)
        first = dataclasses.replace(data_1, d_h_n=results_2["d_h0"], d_c_n=results_2.get("d_c0"))
        results_1 = run(one, plans(one, units=16), first)
    halved = {name: torch.empty_like(tensor, dtype=dtype) for name, tensor in oracle(problem).items()}
    for part, times in ((results_1, times_1), (results_2, times_2)):
        for name in ("y", "d_input", "d_hidden"):
            halved[name][times] = part[name]
    for name in ("d_h0", "d_c0"):
        if name in halved:
            halved[name] = results_1[name]
    if "c_n" in halved:
        halved["c_n"] = results_2["c_n"]
    assert_right(problem, halved)
    if cell != "gru" or dtype == torch.float32:  # within a launch the GRU carries h in float32
        assert torch.equal(bits(halved["y"]), bits(whole))


# ---- Schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "dtype", "precision", "waits"), [
    ("lstm", torch.bfloat16, None, 1), ("lstm", torch.float32, "tf32", 2), ("gru", torch.float16, None, 3),
    ("gru", torch.float32, "ieee", 2), ("rnn_tanh", torch.float16, None, 1),
])  # fmt: skip
def test_every_schedule_gives_the_same_bits(cell, dtype, precision, waits):
    """Catches a result that depends on who comes first: a tile used before it is whole, in some order of events."""
    problem = Problem(cell, 33, 3, 3, dtype, precision)
    both = plans(problem, waits=waits, units=16)
    expected = None
    for seed in range(8):
        with concurrent_programs(seed, torn=seed % 2 == 1):
            found = run(problem, both)
        if expected is None:
            assert_right(problem, found)
            expected = found
        assert_same_bits(found, expected, f"under seed {seed}")


def test_repeated_runs_give_the_same_bits():
    """Catches memory of an earlier launch in a later one, in the same context and in another."""
    problem = Problem("lstm", 40, 5, 2, torch.float16)
    both = plans(problem)
    with concurrent_programs(8):
        first, second = run(problem, both), run(problem, both)
    assert_same_bits(second, first)
    assert_same_bits(run(problem, both), first, "in a context of the launcher's own")


# ---- NaN and infinities ----------------------------------------------------------------------------------------------


def all_ones(dtype: torch.dtype) -> torch.Tensor:
    """The NaN whose bits mean "unwritten"."""
    return torch.tensor(-1, dtype=ALL_ONES[dtype]).view(dtype)


def canonical(dtype: torch.dtype) -> torch.Tensor:
    """The NaN that CUDA's arithmetic makes: all bits but the sign."""
    whole = ALL_ONES[dtype]
    return torch.tensor(torch.iinfo(whole).max, dtype=whole).view(dtype)


def spoiled(problem: Problem, name: str, where: tuple, value: torch.Tensor | float):
    """The problem's data with one element of one tensor replaced, bit for bit."""
    given = data(problem)
    tensor = getattr(given, name).clone()
    value = torch.as_tensor(value, dtype=problem.dtype)
    whole = ALL_ONES[problem.dtype]
    tensor.view(whole)[where] = value.view(whole)
    return dataclasses.replace(given, **{name: tensor})


EXCEPTIONS = {
    "x_part": (1, 2, 0, 3),
    "h0": (0, 2, 3),
    "c0": (0, 2, 3),
    "d_y": (1, 2, 0, 3),
    "d_h_n": (0, 2, 3),
    "d_c_n": (0, 2, 3),
}  # row 2, everywhere


@pytest.mark.covering(("cell", "dtype", "name"), "alone")
@pytest.mark.parametrize("alone", [False, True], ids=["exchanged", "alone"])
@pytest.mark.parametrize("name", EXCEPTIONS)
@pytest.mark.parametrize(("cell", "dtype", "precision"), [
    ("lstm", torch.float32, "tf32"), ("gru", torch.float32, "ieee"), ("rnn_tanh", torch.bfloat16, None),
    ("rnn_relu", torch.float32, "tf32"), ("lstm", torch.float16, None), ("gru", torch.bfloat16, None),
])  # fmt: skip
def test_nan_goes_where_the_oracle_has_it_and_no_further(cell, dtype, precision, name, alone):
    """Catches a wait for data that is there (NaN looks unwritten), a NaN that is lost or spoils other rows."""
    if cell != "lstm" and name in ("c0", "d_c_n"):
        pytest.skip("only the LSTM has a c")
    problem = Problem(cell, 7, 4, 4, dtype, precision)
    both = plans(problem, alone=alone)
    others = torch.tensor([0, 1, 3])
    with concurrent_programs(9):
        clean = run(problem, both)
        for value in (all_ones(dtype), canonical(dtype)):
            given = spoiled(problem, name, EXCEPTIONS[name], value)
            found = run(problem, both, given)  # no hang: it would raise
            assert_same_exceptions(found, oracle(problem, given), f"with {value.view(ALL_ONES[dtype]):x} in {name}")
            for key, tensor in found.items():
                assert torch.equal(tensor.index_select(1, others), clean[key].index_select(1, others)), key


@pytest.mark.covering(("cell", "name"), "alone")
@pytest.mark.parametrize("alone", [False, True], ids=["exchanged", "alone"])
@pytest.mark.parametrize("name", EXCEPTIONS)
@every_cell
def test_infinities_give_what_the_oracle_gives(cell, name, alone):
    """Catches infinity times the zero of padding, an equation that subtracts infinities, and a rounding to NaN."""
    if cell != "lstm" and name in ("c0", "d_c_n"):
        pytest.skip("only the LSTM has a c")
    # 7 units are padded to 8; 12 are not, but a lone program has 16.
    for value, precision, hidden_size in ((torch.inf, "ieee", 7), (torch.inf, "ieee", 12), (-torch.inf, "tf32", 7)):
        problem = Problem(cell, hidden_size, 3, 3, torch.float32, precision)
        given = spoiled(problem, name, EXCEPTIONS[name], value)
        with concurrent_programs(10):
            found = run(problem, plans(problem, alone=alone), given)
        expected = oracle(problem, given)
        if cell == "gru":  # autograd of (1 - z) n + z h subtracts two infinities, where the kernels have (h - n) once
            expected = {key: torch.where(tensor.isnan(), found[key], tensor) for key, tensor in expected.items()}
        assert_same_exceptions(found, expected, f"with {value} in {name}")


@pytest.mark.parametrize("alone", [False, True], ids=["exchanged", "alone"])
def test_an_infinite_gradient_stays_infinite(alone):
    """Catches units past H whose gradient, infinity times the zero of padding, goes into the next product: with no
    negative number nothing else makes a NaN of an infinity.
    """
    problem = Problem("rnn_tanh", 12, 3, 4, torch.float32, "ieee")
    given = spoiled(problem, "d_y", (3, 2, 0, 3), torch.inf)  # some steps before the last one of the backward
    positive = {name: getattr(given, name).abs() for name in ("x_part", "weight_hh", "h0")}
    given = dataclasses.replace(given, **positive)
    expected = oracle(problem, given)
    assert expected["d_h0"].isinf().any() and not expected["d_h0"].isnan().any()
    with concurrent_programs(12):
        assert_same_exceptions(run(problem, plans(problem, alone=alone), given), expected, "with positive weights")


@pytest.mark.covering(("dtype", "precision"), "alone")
@pytest.mark.parametrize("alone", [False, True], ids=["exchanged", "alone"])
@every_kind
def test_nan_in_a_weight_is_not_lost(dtype, precision, alone):
    """Catches a rounding of weights that makes a number of a NaN, as adding to the bits of CUDA's own NaN does."""
    problem = Problem("rnn_tanh", 7, 3, 3, dtype, precision)
    for value in (torch.nan, all_ones(dtype), canonical(dtype)):
        for cut in (dict(alone=True),) if alone else (dict(), dict(registers=0)):
            given = spoiled(problem, "weight_hh", (0, 3, 4), value)
            with concurrent_programs(11):
                found = run(problem, plans(problem, **cut), given)
            # More NaN than in the oracle are right: the kernels multiply by the zeros before the first step, too.
            for key, tensor in oracle(problem, given).items():
                assert not (tensor.isnan() & ~found[key].isnan()).any(), f"{key}: NaN lost"
                assert tensor.isnan().any()


def test_overflow_of_16_bits_ends_in_infinity_or_nan_and_not_in_a_wait():
    """Catches a diverging training that hangs, or raises, instead of showing what it has become."""
    problem = Problem("rnn_relu", 7, 5, 8, torch.float16)
    given = dataclasses.replace(data(problem), weight_hh=data(problem).weight_hh * 200)
    for alone in (False, True):
        with concurrent_programs(12):
            found = run(problem, plans(problem, alone=alone), given)
        assert not found["y"].isfinite().all()


# ---- Waits that do not end, and controls that must fail --------------------------------------------------------------


def forward_that_fails(problem: Problem, monkeypatch, plan, schedule: dict):
    """Run a forward that must raise -> its message, and y as the kernel left it."""
    with monkeypatch.context() as patch:
        poison = Poison(patch)
        with concurrent_programs(**schedule), pytest.raises(RuntimeError) as error:
            run_forward(problem, plan, data(problem))
    steps = (problem.time + 2, problem.batch)  # a block of h0 before the first step and after the last
    (y,) = (t for t in poison.given if t.dim() == 3 and t.shape[0] == steps[0] * steps[1])
    return str(error.value), y.view(problem.dtype).unflatten(0, steps)[1:-1, ..., : problem.hidden_size]


@pytest.mark.covering("cell", ("dtype", "precision"))
@every_cell
@every_kind
def test_control_a_wait_that_ends_too_early_is_an_error_and_its_results_nan(cell, dtype, precision, monkeypatch):
    """Catches waits that are not needed in these tests, and unwritten data that comes out as numbers."""
    problem = Problem(cell, 33, 5, 4, dtype, precision)
    forward_plan, _ = plans(
        problem, units=16, registers=9
    )  # streamed weights meet their state later, and find it written
    expected = loop(problem)["y"]
    with monkeypatch.context() as patch:
        patch.setattr(launch, "WAIT_LIMIT", 0)
        message, y = forward_that_fails(problem, patch, forward_plan, dict(seed=18))
    assert f"{cell} forward, T 4, B 5" in message
    assert y.isnan().any()
    number = ~y.isnan()
    assert_close_to_oracle(y[number], oracle(problem)["y"][number], expected[number], "what is not NaN")
    # The error was told once; the next launch is as good as any.
    with concurrent_programs(13):
        assert_right(problem, run(problem, plans(problem)))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@every_cell
def test_a_program_that_never_runs_becomes_an_error_that_names_the_launch(cell, backward, monkeypatch):
    """Catches a hang where programs cannot all run at the same time, and an error that gives the user no clue."""
    problem = Problem(cell, 40, 5, 3, torch.bfloat16)
    both = plans(problem, units=16)
    monkeypatch.setattr(launch, "WAIT_LIMIT", 100)
    kernel = "backward" if backward else "forward"
    missing = dict(seed=14, leave_out=lambda name, index: name == kernel and index == (1, 0, 0))
    with concurrent_programs(**missing), pytest.raises(RuntimeError, match=f"{cell} {kernel}, T 3, B 5") as error:
        run(problem, both)
    for clue in ("did not end within 100 polls", "RNN_GPU_MAX_PROGRAMS", "RNN_GPU_WAIT_LIMIT", "results are NaN"):
        assert clue in str(error.value).replace("Its ", "its ").replace("\n", " "), clue
    launch.check("cpu")  # told once


def test_a_left_out_program_spoils_only_its_own_group(monkeypatch):
    """Catches a stop of all rows and directions where one group lost a program."""
    problem = Problem("lstm", 40, 9, 3, torch.float16, None, 2, 2)
    forward_plan, _ = plans(problem, units=16, slices=1, rows=8)
    monkeypatch.setattr(launch, "WAIT_LIMIT", 100)
    _, y = forward_that_fails(problem, monkeypatch, forward_plan, dict(seed=15, leave_out=[(0, 1, 1)]))
    spoiled_rows = y.isnan().any(3).any(0)  # [B, N]
    assert spoiled_rows.tolist() == [[False, False]] * 8 + [[False, True]]


def edited(monkeypatch, pattern: str, replacement: str) -> None:
    """From now on every wait has another text."""
    whole = exchange.await_assembly

    @triton.constexpr_function
    def other(*arguments):
        text, count = re.subn(pattern, replacement, whole(*arguments))
        assert count, f"not in the text of a wait: {pattern}"
        return text

    monkeypatch.setattr(exchange, "await_assembly", other)


def is_found(problem: Problem, plan, torn: bool, seeds) -> bool:
    """Whether some schedule makes the forward, as it stands, wrong."""
    for seed in seeds:
        with concurrent_programs(seed, torn):
            try:
                y, _, _, _ = run_forward(problem, plan, data(problem))
                assert_close_to_oracle(y, oracle(problem)["y"], loop(problem)["y"])
            except (AssertionError, RuntimeError):
                return True
    return False


@pytest.mark.covering()
@pytest.mark.interpreter_only
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
def test_control_a_reader_that_tests_its_first_vector_only_is_found(cell, monkeypatch):
    """Catches schedules so tame that a reader finds all of its data wherever it finds some."""
    problem = Problem(cell, 200, 3, 4, torch.float16)
    forward_plan, _ = plans(problem, warps=4, units=32)
    assert not is_found(problem, forward_plan, False, range(1))
    edited(monkeypatch, r"or\.pred some, some, p[1-9]\d*;", "")
    assert is_found(problem, forward_plan, False, range(8))


@pytest.mark.interpreter_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_control_a_reader_that_tests_half_of_each_word_is_found_by_torn_stores(dtype, monkeypatch):
    """Catches stores that are torn in too few ways: as a whole they hide this mistake, so tearing is what finds it."""
    problem = Problem("rnn_tanh", 40, 3, 8, dtype)
    forward_plan, _ = plans(problem, units=16)
    assert not is_found(problem, forward_plan, True, range(1))
    edited(monkeypatch, "0x80008000", "0x8000")
    assert not is_found(problem, forward_plan, False, range(2)), "found without tearing: the control shows nothing"
    assert is_found(problem, forward_plan, True, range(40))


@pytest.mark.interpreter_only
@every_kind
def test_control_a_reader_that_does_not_look_again_is_found(dtype, precision, monkeypatch):
    """Catches programs that run one after another, so that whoever reads finds what it needs."""
    problem = Problem("gru", 33, 3, 4, dtype, precision)
    forward_plan, _ = plans(problem, units=16)
    edited(monkeypatch, "@!some bra DONE;", "bra DONE;")
    assert is_found(problem, forward_plan, False, range(8))


@pytest.mark.interpreter_only
@pytest.mark.parametrize("looks", [True, False], ids=["", "control"])
def test_after_one_wait_gave_up_all_others_end_soon(looks, monkeypatch):
    """Catches a launch that takes the bound again at every step. Control: it does where no wait looks at the word."""
    problem = Problem("lstm", 33, 5, 8, torch.float16)
    forward_plan, _ = plans(problem, units=16)
    limit, polls = 500, 0
    monkeypatch.setattr(launch, "WAIT_LIMIT", limit)
    if not looks:
        edited(monkeypatch, r"ld\.volatile\.global\.b32 t, \[\S+\];", "mov.b32 t, 0;")
    execute = interpreter._Assembly.execute

    def counted(self, name, operands, active):
        nonlocal polls
        polls += name.startswith("ld.relaxed")
        execute(self, name, operands, active)

    monkeypatch.setattr(interpreter._Assembly, "execute", counted)
    missing = dict(seed=3, leave_out=lambda name, index: name == "forward" and index == (0, 0, 0))
    forward_that_fails(problem, monkeypatch, forward_plan, missing)
    # Two programs of three run: each step that the third one misses takes the whole bound, or one look at the word.
    waits = 2 * (problem.time - 1)
    assert (polls < 2 * (limit + 2) + waits * (exchange.LOOK_EVERY + 2)) == looks
    assert looks or polls >= (waits - 2) * limit


@pytest.mark.interpreter_only
@pytest.mark.parametrize("waits", [1, 2])
def test_waits_begin_with_the_pause_of_the_plan(waits, monkeypatch):
    """Catches a pause that does not reach the kernel or ends at once, one for each part of a wait, and one of a plan
    without any.
    """
    problem = Problem("lstm", 40, 5, 4, torch.float16)
    begun, looks = collections.Counter(), collections.Counter()
    execute = interpreter._Assembly.execute

    def counted(self, name, operands, active):
        if "%clock" in operands:
            (begun if operands[0] == "begun" else looks)[now] += 1
        execute(self, name, operands, active)

    monkeypatch.setattr(interpreter._Assembly, "execute", counted)
    found = {}
    for now in (0, 1000):
        both = [dataclasses.replace(p, pause=now) for p in plans(problem, units=16, rows=8, slices=1, waits=waits)]
        with concurrent_programs():
            found[now] = run(problem, both)
    each = both[0].unit_slices * problem.time  # waits of a pass
    assert begun == {1000: 2 * each} and looks[0] == 0
    assert looks[1000] >= 10 * 2 * each  # the interpreter's clock goes on by 100
    assert_same_bits(found[1000], found[0], "with a pause")


# ---- The exchange's words --------------------------------------------------------------------------------------------


@triton.jit
def await_kernel(words, out, status, limit, pause, HALVES: tl.constexpr, AT_ONCE: tl.constexpr):
    """Each program waits for a vector of its own, and stores what it took it for."""
    n = tl.program_id(0)
    p = words + 4 * n + tl.arange(0, 1)
    seen = tl.inline_asm_elementwise(
        exchange.await_assembly(1, 1, 4, 4, False, HALVES, 1, True, AT_ONCE), exchange.await_constraints(1, 1, True),
        [p, 4, status + n, limit, n + 1, pause], exchange.words_of(1), True, 1,
    )  # fmt: skip
    for i in tl.static_range(4):
        tl.store(out + 4 * n + i + tl.arange(0, 1), seen[i])


@pytest.mark.covering("limit", "width", "at_once")
@pytest.mark.parametrize("limit", [0, 1, 200])
@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("at_once", [False, True], ids=["in rounds", "at once"])
def test_a_wait_is_exact(width, limit, at_once):
    """Catches a test for "unwritten" that misses a value next to others, or takes another value for it, an error of
    another launch's number or none, and a lost word that rounding to tf32 would make a zero.
    """
    patterns = [0, 1, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF, 0x7F80, 0xFF80]
    words, lost = [], []
    for low, high in itertools.product(patterns, patterns):
        for place in range(4):
            row = [0x3C003C00] * 4
            row[place] = low | high << 16
            words.append([word - (1 << 32) if word >> 31 else word for word in row])
            lost.append(0xFFFF in (low, high) if width == 16 else low == high == 0xFFFF)
    words = torch.tensor(words, dtype=torch.int32)
    out, status = torch.zeros_like(words), torch.zeros(len(words), dtype=torch.int32)
    with concurrent_programs():
        await_kernel[(len(words),)](words, out, status, limit, 300, width == 16, at_once)
    assert status.tolist() == [n + 1 if is_lost else 0 for n, is_lost in enumerate(lost)]
    assert torch.equal(out, words if width == 16 else words.masked_fill(words == -1, 0x7FC00000))


@triton.jit
def reciprocal_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, cells.reciprocal(tl.load(x + at)))


def test_a_reciprocal_is_within_a_unit_and_never_less_than_normal():
    """Catches another instruction for it, in the compiler or in the interpreter: what the equations' error and a
    saturated gate rest on.
    """
    special = torch.tensor([1.0, 2.0**125, 2.0**126, 2.0**126 * 1.5, 3e38, torch.inf, torch.nan, 2.0])
    x = torch.cat([special, 1 + torch.rand(56), 2 ** (126 * torch.rand(64))])
    out = torch.empty_like(x)
    with concurrent_programs():
        reciprocal_kernel[(1,)](x, out, len(x))
    exact = 1 / x.double()
    tiny = exact < torch.finfo(torch.float32).tiny
    assert (out[tiny] == 0).all() and out[x.isnan()].isnan().all()
    known = ~tiny & x.isfinite()
    unit = 2.0 ** (exact[known].log2().floor() - 23)
    assert ((out[known].double() - exact[known]).abs() <= unit).all()


@triton.jit
def copies_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    words = (tl.load(x + at), tl.load(x + N + at))
    same = tiles.copies(words, 0) + tiles.copies(words, 1)
    for i in tl.static_range(4):
        tl.store(out + i * N + at, same[i])


def test_copies_of_words_are_the_words():
    """Catches a move that changes, loses or exchanges what the second product of a step multiplies."""
    x = torch.randint(-(1 << 31), 1 << 31, (2, 64)).int()
    out = torch.zeros(4, 64, dtype=torch.int32)
    with concurrent_programs():
        copies_kernel[(1,)](x, out, 64)
    assert torch.equal(out, torch.cat([x, x]))


@triton.jit
def prefetch_kernel(x, there, COUNT: tl.constexpr, STRIDE: tl.constexpr, PACK: tl.constexpr, N: tl.constexpr):
    """A prefetch as exchange.py has it, of PACK neighbours by one thread."""
    at = tl.arange(0, N)
    tl.inline_asm_elementwise(
        exchange.prefetch_assembly(COUNT, 4 * STRIDE, PACK), exchange.prefetch_constraints(PACK),
        [x + at, tl.load(there + at)], tl.int32, is_pure=False, pack=PACK,
    )  # fmt: skip


@pytest.mark.parametrize(("count", "pack"), [(1, 1), (4, 1), (3, 2), (4, 4)])
def test_a_prefetch_is_of_what_is_there_and_of_nothing_else(count, pack, monkeypatch):
    """Catches a flag or a place of another thread, places left out, and addresses that do not exist: beyond what is
    there nothing may be asked for, though hardware would not say so.
    """
    N, stride = 128 * pack, 600  # so that each of four warps' threads has `pack` neighbours
    x, there = torch.zeros(N + (count - 1) * stride), torch.ones(N, dtype=torch.int32)
    there[40:80] = 0
    first = torch.arange(0, N, pack)[there[::pack] == 1]
    expected = sorted((first[:, None] + stride * torch.arange(count)).flatten().tolist())
    found, execute = [], interpreter._Assembly.execute

    def kept(self, name, operands, active):
        if name.startswith("prefetch"):
            found.extend(((self.address(operands[0])[active] - x.data_ptr()) // 4).tolist())
        execute(self, name, operands, active)

    monkeypatch.setattr(interpreter._Assembly, "execute", kept)
    with concurrent_programs() as log:
        prefetch_kernel[(1,)](x, there, count, stride, pack, N)
    if ON_MACHINE:
        assert log[0][1].prefetched == len(expected)
        with pytest.raises(AssertionError, match="that does not exist"), concurrent_programs():
            prefetch_kernel[(1,)](x[4:].clone(), there, count, stride, pack, N)
    else:
        assert sorted(found) == expected


@triton.jit
def publishable_kernel(x, out, N: tl.constexpr, DTYPE: tl.constexpr, BITS: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, exchange.publishable(tl.load(x + at), DTYPE, BITS))


@every_kind
def test_nothing_that_is_published_looks_unwritten(dtype, precision):
    """Catches a NaN that comes out as all ones: its readers would wait for ever."""
    signs = [0, 1 << 31]
    payloads = [1, 0x1FFF, 0x400000, 0x7FFFFF, 0x7FE000, 0x3FFFFF]
    values = [sign | 0x7F800000 | payload for sign in signs for payload in payloads] + [
        0,
        1 << 31,
        0x7F800000,
        0xFF800000,
    ]
    values = torch.tensor([value - (1 << 32) if value >> 31 else value for value in values], dtype=torch.int32)
    whole = ALL_ONES[dtype]
    out = torch.zeros(16, dtype=whole)
    kinds = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    with concurrent_programs():
        publishable_kernel[(1,)](
            values.view(torch.float32), out, 16, kinds[dtype], tl.int32 if dtype == torch.float32 else tl.int16
        )
    assert (out != -1).all()
    assert out.view(dtype)[:12].isnan().all()
    assert torch.equal(out.view(dtype)[12:].float(), values.view(torch.float32)[12:])
    if dtype == torch.float32:  # tf32 adds to these bits without looking
        assert ((out[:12] & 0x7FFFFFFF) == 0x7FC00000).all()


# ---- Launchers -------------------------------------------------------------------------------------------------------


@every_cell
def test_an_empty_batch_launches_nothing(cell):
    """Catches a grid of zero programs, and shapes that lose the batch when it is empty."""
    problem = Problem(cell, 7, 0, 3, torch.float32, "ieee")
    found = run(problem, plans(problem, alone=True))
    assert found["y"].shape == (3, 0, 1, 7)
    assert found["d_input"].shape == (3, 0, 1, 7 * CELLS[cell].gates)


@every_cell
def test_wider_layouts_of_the_arguments_do_not_matter(cell):
    """Catches strides that are taken for granted in what a caller may slice: states, gradients, weights and y."""
    problem = Problem(cell, 7, 5, 3, torch.float32, "ieee")
    given = data(problem)

    def spread(tensor):
        """The same values, not contiguous."""
        return None if tensor is None else tensor.repeat_interleave(2, -1)[..., ::2]

    names = ("bias_hn", "h0", "c0", "d_y", "d_h_n", "d_c_n")
    sparse = dataclasses.replace(given, **{name: spread(getattr(given, name)) for name in names})
    with concurrent_programs(16):
        assert_same_bits(run(problem, plans(problem), sparse), run(problem, plans(problem)))


def test_a_status_word_made_in_inference_mode(monkeypatch):
    """Catches: a word that nobody can reset afterwards: the error of a wait was hidden by another about that."""
    monkeypatch.setattr(launch, "_status", {})
    with torch.inference_mode():
        word = launch.status_word(torch.device("cpu"))
    word.fill_(7)
    with pytest.raises(RuntimeError, match="launch 7"):
        launch.raise_if_late(torch.device("cpu"))
    assert word.item() == 0


def test_a_batch_whose_gradients_no_32_bits_can_count_is_refused():
    """Catches: an offset that wraps round, where one step's gradients take more than 8 GB."""
    problem = Problem("lstm", 128, 8, 1, torch.bfloat16)
    _, backward_plan = plans(problem, alone=True)
    rows = 1 << 23
    y, h0 = (
        torch.empty(1, 1, 128, dtype=torch.bfloat16).expand(rows, 1, 128),
        torch.empty(1, 1, 128).expand(1, rows, 128),
    )
    with pytest.raises(RuntimeError, match="split the batch"):
        layer.backward(
            backward_plan, None, None, None, torch.empty(1, 512, 128), None, None, y, h0, h0, layer.Rows(1, rows), 0
        )
