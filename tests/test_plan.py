"""The plan: a fitting one for every problem on every device, or a sentence that says why there is none.

Pure Python, no GPU: what passes here can at worst be slow. That a plan compiles without spilling is tested in
test_resources.py, that it computes the right thing in test_kernels.py.
"""

import dataclasses
import itertools
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rnn_gpu.equations import BUILT_IN
from rnn_gpu.kernels import plan as planning
from rnn_gpu.kernels.cudnn import cudnn_microseconds
from rnn_gpu.kernels.plan import (
    AS_GOOD,
    DEVICES,
    Plan,
    Problem,
    cached_plan,
    every_plan,
    exchanging_plans,
    in_groups,
    plan,
    preferred,
    with_batch,
)
from rnn_gpu.kernels.spec import CELLS, DTYPES, chunk_width, padded

PROMISED = ("h200", "a100", "rtx3090", "rtx4090", "rtx5090", "b200")  # devices with a plan for every problem
KINDS = [("float32", "tf32"), ("float32", "ieee"), ("float16", None), ("bfloat16", None)]
HIDDEN_SIZES = (1, 2, 7, 16, 33, 64, 100, 128, 129, 255, 256, 384, 512, 768, 1000, 1024, 1536, 2048, 3001, 4095, 4096)
BATCHES = (1, 5, 8, 17, 64, 100, 256, 1023, 1024)


def assert_fits(p: Plan, name: str, cap: int | None = None, allow_alone: bool = True) -> None:
    """Everything that a launch relies on."""
    device = DEVICES[name]
    resident = min(cap or device.multiprocessors, device.multiprocessors)
    assert p.shared_bytes <= device.shared_memory, "more shared memory than a program may use"
    assert p.programs == p.unit_slices * p.batch_slices * p.sets
    assert p.units == 1 << (p.units - 1).bit_length(), "tl.arange needs powers of two"
    assert p.rows == 1 << (p.rows - 1).bit_length()
    assert p.warps in (1, 2, 4, 8, 16)
    assert min(p.units, p.rows, p.slices, p.unit_slices, p.batch_slices, p.launches) >= 1
    # All rows of the batch, and no launch too many: launch.py counts them in the same way.
    covered = p.rows * p.slices * p.batch_slices
    assert covered * p.launches >= p.batch_size > covered * (p.launches - 1)
    # All units, those that pad a row included, because the neighbours read them; and no slice without a unit.
    size = padded(p.hidden_size, p.dtype)
    if p.alone:
        assert allow_alone
        assert p.unit_slices == 1 and p.units >= size
    else:
        assert p.programs <= resident, "programs that wait for each other must all run at the same time"
        assert p.units * p.unit_slices >= size > p.units * (p.unit_slices - 1)
        chunks = -(-size // chunk_width(p.warps, p.dtype))
        assert min(p.registers, p.shared, p.streamed) >= 0
        assert p.registers + p.shared + p.streamed == chunks, "a chunk of weights is nowhere, or twice"
        # A tile of weights has 16 rows at least, the narrower side of a matrix instruction.
        assert (1 if p.backward else p.gates_per_tile) * p.units >= 16
        if CELLS[p.cell].gates == 1:
            assert p.waits == 1, "one slot cannot be awaited in two parts"
    assert 0 < p.microseconds < math.inf
    assert p.reason and not p.reason.endswith("."), "explain puts it into a sentence"
    assert str(p.programs) in str(p)


@pytest.mark.parametrize("device", PROMISED)
@pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=[f"{dtype}-{precision}" for dtype, precision in KINDS])
def test_every_layer_has_a_plan_that_fits(device, dtype, precision):
    """Catches a size between two rules that no plan serves, and a plan that a launch would refuse or hang on."""
    for number, hidden_size in enumerate(HIDDEN_SIZES):
        for cell in BUILT_IN:
            for backward in (False, True):
                for batch in BATCHES[number % 2 :: 2]:
                    p = plan(cell, hidden_size, batch, 1, dtype, DEVICES[device], backward, precision)
                    assert isinstance(p, Plan), f"{cell} H {hidden_size} B {batch}: {p}"
                    assert_fits(p, device)
                    assert (p.cell, p.hidden_size, p.batch_size, p.dtype) == (cell, hidden_size, batch, dtype)
                    assert (p.backward, p.precision, p.sets) == (backward, precision, 1)


@settings(deadline=None, max_examples=400, derandomize=True)
@given(
    cell=st.sampled_from(BUILT_IN),
    hidden_size=st.integers(1, 4096),
    batch=st.integers(1, 1024),
    sets=st.integers(1, 2),
    kind=st.sampled_from(KINDS),
    device=st.sampled_from(list(DEVICES)),
    backward=st.booleans(),
    cap=st.none() | st.integers(1, 200),
    allow_alone=st.booleans(),
)
def test_any_problem_has_a_plan_that_fits_or_a_reason(
    cell, hidden_size, batch, sets, kind, device, backward, cap, allow_alone
):
    """Catches the same over all sizes, with two directions and a cap; and an exception where a reason is due."""
    arguments = (cell, hidden_size, batch, sets, kind[0], DEVICES[device], backward, kind[1], cap, allow_alone)
    p = plan(*arguments)
    if isinstance(p, Plan):
        assert_fits(p, device, cap, allow_alone)
    else:
        assert str(hidden_size) in p and "programs" in p, p
        few = DEVICES[device].multiprocessors < 100  # a small GPU may have no room for the largest layers
        assert sets == 2 or cap is not None or few, f"no plan where one is promised: {p}"
    assert p == plan(*arguments) == cached_plan(*arguments), "the same problem, another plan"


@pytest.mark.parametrize("backward", [False, True])
def test_both_directions_of_a_layer_run_side_by_side_on_the_main_device(backward):
    """Catches the second weight set being left out of the count of programs, or making a common size impossible."""
    for hidden_size in (64, 256, 512, 1024, 2048):
        p = plan("lstm", hidden_size, 16, 2, "bfloat16", DEVICES["h200"], backward)
        assert isinstance(p, Plan), p
        assert_fits(p, "h200")
        assert p.programs % 2 == 0


def test_pauses_go_by_the_programs_that_exchange():
    """Catches a pause where other tiles or streamed weights are one, in a stack or alone, or by all programs of a
    launch, and plans that never have any.
    """
    for sets, backward in itertools.product((1, 2), (False, True)):
        table = dict(planning.BACKWARD_PAUSES if backward else planning.FORWARD_PAUSES)
        found = every_plan("lstm", 512, 16, sets, "bfloat16", DEVICES["h200"], backward)
        for p in found:
            none = p.alone or p.slices > 1 or p.streamed
            assert p.pause == (0 if none else max([table[n] for n in table if n <= p.unit_slices], default=0)), p
        assert any(p.pause for p in found)
    stack = every_plan("lstm", 512, 16, 1, "bfloat16", DEVICES["h200"], layers=4)
    assert not any(p.pause for p in stack)


def test_of_plans_that_are_as_good_the_one_with_fewest_slices_is_taken():
    """Catches a choice that rests on waits hiding behind the work on other slices where there is room to do without."""
    problem = Problem("lstm", 512, 16, 1, "bfloat16", DEVICES["h200"])
    every = [with_batch(p, problem.device, 132) for p in exchanging_plans(problem, 132)]
    one, two = (next(p for p in every if p.slices == slices) for slices in (1, 2))
    assert preferred([(two, 1.0), (one, AS_GOOD)]) == one
    assert preferred([(two, 1.0), (one, 1.001 * AS_GOOD)]) == two
    assert plan("lstm", 512, 16, 1, "bfloat16", DEVICES["h200"]) == preferred([(p, p.microseconds) for p in every])


@pytest.mark.parametrize("backward", [False, True])
def test_both_numbers_of_warps_are_weighed_between(backward):
    """Catches a number of warps that is fixed by the size, and 4 warps whose weights do not stay in registers."""
    for hidden_size, warps in ((256, {4}), (384, {4, 8}), (512, {4, 8}), (520, {8}), (1024, {8})):
        problem = Problem("lstm", hidden_size, 16, 1, "bfloat16", DEVICES["h200"], backward)
        every = list(exchanging_plans(problem, 132))
        assert {p.warps for p in every} == warps, hidden_size
        assert hidden_size <= 256 or all(p.shared == p.streamed == 0 for p in every if p.warps == 4)


def test_a_cap_on_programs_is_obeyed_down_to_where_nothing_fits():
    """Catches a cap that is ignored, as under DistributedDataParallel, where collectives hold multiprocessors."""
    served = 0
    for cap in (1, 2, 16, 33, 64, 100, 128, 131):
        p = plan("lstm", 1024, 64, 1, "bfloat16", DEVICES["h200"], False, max_programs=cap)
        if isinstance(p, Plan):
            assert_fits(p, "h200", cap)
            served += 1
        else:
            assert str(cap) in p and "programs" in p, p
    assert 0 < served < 8, "the smallest caps have no plan, the largest have one"


def test_a_small_cap_takes_more_launches_for_the_batch():
    """Catches a batch of which only the first rows are computed when the programs are few."""
    free = plan("gru", 512, 1024, 1, "float16", DEVICES["h200"])
    capped = plan("gru", 512, 1024, 1, "float16", DEVICES["h200"], max_programs=32)
    assert_fits(capped, "h200", 32)
    assert capped.launches > free.launches
    assert f"{capped.launches} launches" in capped.reason


def test_what_the_kernels_cannot_compute_has_a_reason_that_names_it():
    """Catches an exception, or a plan, for a type or a device that no kernel serves."""
    refused = plan("lstm", 64, 8, 1, "float64", DEVICES["h200"])
    assert isinstance(refused, str) and "float64" in refused
    old = dataclasses.replace(DEVICES["a100"], name="Tesla T4", arch=75)
    refused = plan("lstm", 64, 8, 1, "float16", old)
    assert isinstance(refused, str) and "Tesla T4" in refused and "7.5" in refused and "8.0" in refused
    for old in (dataclasses.replace(DEVICES["a100"], arch=70), dataclasses.replace(DEVICES["a100"], arch=60)):
        assert isinstance(plan("gru", 64, 8, 1, "float16", old, True), str)
    refused = plan("lstm", 1024, 8, 1, "float16", DEVICES["h200"], max_programs=1)
    assert isinstance(refused, str) and "1024" in refused and "programs" in refused


def test_a_plan_says_where_weights_do_not_all_fit_on_the_chip():
    """Catches a silent loss of what the library promises: that the weights stay on the chip."""
    large = plan("lstm", 4096, 8, 1, "float32", DEVICES["rtx3090"], precision="tf32")
    assert large.streamed > 0 and "read again in every step" in large.reason
    small = plan("lstm", 512, 8, 1, "bfloat16", DEVICES["h200"])
    assert small.streamed == 0 and "read again" not in small.reason


def test_precision_matters_for_float32_alone():
    """Catches two plans, and two compiled kernels, for one and the same 16-bit problem."""
    for dtype in ("float16", "bfloat16"):
        problem = ("gru", 256, 16, 1, dtype, DEVICES["a100"], False)
        assert plan(*problem, "tf32") == plan(*problem, "ieee") == plan(*problem)
        assert plan(*problem).precision is None
    assert plan("gru", 256, 16, 1, "float32", DEVICES["a100"]).precision == "tf32", "PyTorch's default for RNNs"


@pytest.mark.parametrize("backward", [False, True])
def test_a_batch_of_more_programs_than_a_grid_has_takes_several_launches(backward):
    """Catches a lone program's batch slices beyond the 65,535 that the second axis of a CUDA grid can have."""
    for batch, launches in ((8 * 65535, 1), (8 * 65535 + 1, 2), (2_000_000, 4)):
        p = plan("gru", 32, batch, 1, "bfloat16", DEVICES["h200"], backward)
        assert p.alone and p.launches == launches
        assert p.batch_slices <= 65535 and p.batch_slices * launches * p.rows >= batch


def test_more_sets_than_a_grid_has_are_refused():
    """Catches an ensemble beyond the 65,535 programs that the third axis of a CUDA grid can have."""
    assert plan("gru", 32, 8, 65535, "bfloat16", DEVICES["h200"]).alone
    assert "65536 set(s)" in plan("gru", 32, 8, 65536, "bfloat16", DEVICES["h200"])


def test_an_empty_batch_has_a_plan():
    """Catches a division by no rows."""
    for allow_alone in (False, True):
        assert isinstance(plan("lstm", 64, 0, 1, "float16", DEVICES["h200"], allow_alone=allow_alone), Plan)


LAYERS = st.integers(2, 12)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    cell=st.sampled_from(list(CELLS)),
    hidden_size=st.integers(1, 1500),
    batch=st.integers(1, 200),
    layers=LAYERS,
    kind=st.sampled_from(KINDS),
    device=st.sampled_from(list(DEVICES)),
    backward=st.booleans(),
    cap=st.none() | st.integers(1, 200),
    ragged=st.booleans(),
)
def test_layers_side_by_side_fit_or_there_is_a_reason(
    cell, hidden_size, batch, layers, kind, device, backward, cap, ragged
):
    """Catches layers that do not all run at the same time, weights of one of the sources that are nowhere or are read
    in every step, a GRU whose last gate has no sum for its input.
    """
    p = plan(
        cell, hidden_size, batch, 1, kind[0], DEVICES[device], backward, kind[1], cap, ragged=ragged, layers=layers
    )  # fmt: skip
    if isinstance(p, str):
        assert str(hidden_size) in p and f"{layers} layers" in p
        return
    size, limit = padded(hidden_size, kind[0]), DEVICES[device].multiprocessors
    assert p.layers == layers and not p.alone and p.shared_bytes <= DEVICES[device].shared_memory
    assert p.programs == p.unit_slices * p.batch_slices * layers <= min(cap or limit, limit)
    assert p.units * p.unit_slices >= size > p.units * (p.unit_slices - 1)
    covered = p.rows * p.slices * p.batch_slices
    assert covered * p.launches >= batch > covered * (p.launches - 1)
    assert p.registers + p.shared + p.streamed == 2 * -(-size // chunk_width(p.warps, kind[0]))
    assert p.streamed == 0 or kind[1] == "ieee"
    assert backward or not CELLS[cell].apart or p.gates_per_tile == 1
    assert (1 if backward else p.gates_per_tile) * p.units >= 16


def grouped(cell, hidden_size, batch, layers, cap=None):
    def plan_of(size, backward):
        how = dict(max_programs=cap, layers=size)
        return plan(cell, hidden_size, batch, 1, "float16", DEVICES["h200"], backward, **how)

    return in_groups(layers, (False, True), plan_of, DEVICES["h200"]), plan_of


def test_a_stack_is_put_into_the_launches_that_take_the_least():
    """Catches layers that are left out or done twice, groups that fit and are not taken."""
    for hidden_size, layers, cap, expected in (
        (256, 8, None, [8]), (512, 4, None, [4]), (512, 2, None, [2]), (1024, 2, None, [1, 1]), (512, 6, None, [4, 2]),
        (384, 6, None, [5, 1]), (512, 4, 100, [3, 1]), (512, 3, 64, [1, 1, 1]), (256, 3, 16, [1, 1, 1]),
    ):  # fmt: skip
        found, plan_of = grouped("lstm", hidden_size, 16, layers, cap=cap)
        sizes = [plans[0].layers for plans in found]
        assert sum(sizes) == layers and all(a.layers == b.layers for a, b in found)
        assert sorted(sizes, reverse=True) == expected, (hidden_size, layers, cap, sizes)
        for plans in found:
            for p in plans:
                assert p.microseconds <= plan_of(1, p.backward).microseconds * p.layers * 1.3


def test_no_pass_of_a_group_is_slower_than_its_layers_one_by_one():
    """Catches inference that pays for what training gains, since both take the same groups."""
    for hidden_size in (16, 64, 128, 200, 512, 1024):
        for layers in (2, 3, 8):
            found, plan_of = grouped("gru", hidden_size, 64, layers)
            for backward in (False, True):
                one = plan_of(1, backward).microseconds
                product = 2 * 3 * hidden_size**2 * 64 / 400e6  # no group makes more than its first layer's
                assert sum(p[backward].microseconds for p in found) <= layers * (one + product)


def test_no_plan_of_one_layer_is_none_of_a_stack():
    """Catches an exception, or no launches, where not even one layer fits."""
    found, _ = grouped("lstm", 1024, 16, 3, cap=2)
    assert isinstance(found, str) and "1024" in found


def test_one_program_alone_is_weighed_against_several():
    """Catches a program alone that holds all units where several that exchange them take a third of its time, and one
    that is no plan any more where nobody has timed another way.
    """
    for dtype, precision in KINDS:
        for hidden_size in (16, 64, 128):
            for backward in (False, True):
                problem = "lstm", hidden_size, 16, 1, dtype, DEVICES["h200"], backward, precision
                found, p = every_plan(*problem), plan(*problem)
                assert p.alone == (found[0].alone and hidden_size <= 64)
                if found[0].alone and not p.alone:
                    assert p.microseconds < found[0].microseconds


def test_plans_are_values():
    """Catches a plan that could not be a key of a cache, or could be changed after it was handed out."""
    p = plan("lstm", 256, 16, 1, "bfloat16", DEVICES["h200"])
    assert hash(p) == hash(plan("lstm", 256, 16, 1, "bfloat16", DEVICES["h200"]))
    assert len({p, dataclasses.replace(p)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.units = 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_estimate_for_cudnn_is_a_time(dtype):
    """Catches a unit that is wrong by a thousand, on either side: `auto` compares the two."""
    for cell in BUILT_IN:
        for hidden_size in (16, 128, 1024, 4096):
            for backward in (False, True):
                p = plan(cell, hidden_size, 16, 1, dtype, DEVICES["h200"], backward)
                assert 0.5 < cudnn_microseconds(p, DEVICES["h200"]) < 500
                assert 0.05 < p.microseconds < 500


def test_planning_needs_no_triton():
    """Catches an import that would take plan and explain away where Triton is not installed."""
    program = (
        "import sys\n"
        "sys.modules['triton'] = None  # an import of it would fail\n"
        "from rnn_gpu.kernels import plan, spec\n"
        "p = plan.plan('lstm', 256, 16, 1, 'float16', plan.DEVICES['h200'])\n"
        "assert isinstance(p, plan.Plan), p\n"
        "assert not any(name.startswith('triton.') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
