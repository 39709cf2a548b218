"""The interpreter the kernels are tested in: its own schedules, stores and arithmetic, on small kernels.

A mistake here would let every other interpreted test pass for the wrong reason, so each property has a
control: a kernel with a known mistake that must be found.
"""

import os
import subprocess
import sys
import threading

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.errors import InterpreterError

from rnn_gpu.kernels import interpreter as implementation
from tests.interpreter import concurrent_programs

pytestmark = [pytest.mark.interpreted, pytest.mark.interpreter_only]

N = 8  # numbers a program publishes in the kernels of this file
SEEDS = range(12)


def random_bits(shape, dtype, seed=0):
    """Numbers of every exponent, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.empty(0, dtype=dtype).element_size() * 8
    words = {16: torch.int16, 32: torch.int32}[width]
    low = -(2 ** (width - 1))
    return torch.randint(low, -low, shape, generator=generator, dtype=torch.int64).to(words).view(dtype)


def same_bits(a, b):
    """Whether two tensors agree bit by bit, but one NaN is as good as another."""
    words = {2: torch.int16, 4: torch.int32}[a.element_size()]
    both_nan = a.isnan() & b.isnan() if a.is_floating_point() else torch.zeros_like(a, dtype=torch.bool)
    return bool(((a.view(words) == b.view(words)) | both_nan).all())


# Programs ---------------------------------------------------------------------------------------------------


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b)


@triton.jit
def exchange(board, out, late, limit, T: tl.constexpr, N: tl.constexpr, P: tl.constexpr, TESTED: tl.constexpr):
    """At each step each program publishes N numbers, then waits for those of all P and sums them.

    board [T, P, N] starts as -1, which means unwritten; only the first TESTED numbers of each are awaited.
    """
    p = tl.program_id(0)
    n = tl.arange(0, N)
    all_of_them = tl.arange(0, P)[:, None] * N + n[None, :]
    carry = p + n
    for t in range(T):
        tl.store(board + (t * P + p) * N + n, carry)
        seen = tl.load(board + t * P * N + all_of_them, volatile=True)
        tries = 0
        while (tl.reduce(tl.where(n[None, :] < TESTED, seen, 0), None, minimum) < 0) & (tries < limit):
            seen = tl.load(board + t * P * N + all_of_them, volatile=True)
            tries += 1
        if tries >= limit:
            limit = 0
            tl.store(late + p, 1)
        carry = (tl.sum(seen, 0) * (p + 1)) % 1000 + p
    tl.store(out + p * N + n, carry)


def run_exchange(programs=4, steps=3, limit=10**9, tested=N):
    board = torch.full((steps, programs, N), -1, dtype=torch.int32)
    out = torch.full((programs, N), -1, dtype=torch.int32)
    late = torch.zeros(programs, dtype=torch.int32)
    exchange[(programs,)](board, out, late, limit, steps, N, programs, tested)
    return out, late.tolist()


def expected_exchange(programs=4, steps=3):
    p = torch.arange(programs, dtype=torch.int32)[:, None]
    carry = p + torch.arange(N, dtype=torch.int32)
    for _ in range(steps):
        carry = (carry.sum(0, dtype=torch.int32) * (p + 1)) % 1000 + p
    return carry


@pytest.mark.parametrize("torn", [False, True])
def test_programs_that_wait_for_each_other_finish(torn):
    """Catches a hang, a program that never gets its turn, and a store that is lost or never lands."""
    for seed in SEEDS:
        with concurrent_programs(seed, torn=torn):
            out, late = run_exchange()
        assert torch.equal(out, expected_exchange()), f"seed {seed}"
        assert late == [0, 0, 0, 0]


def test_control_without_concurrency_nobody_can_wait():
    """Catches the exchange being trivial: one program after another, as Triton runs them, must not pass."""
    out, late = run_exchange(limit=3)
    assert late[0] == 1
    assert not torch.equal(out, expected_exchange())


def test_control_a_wait_that_does_not_wait_is_found():
    """Catches a schedule so tame that programs find their data even where they do not wait for it."""
    for seed in SEEDS:
        with concurrent_programs(seed):
            out, _ = run_exchange(limit=0)
        assert not torch.equal(out, expected_exchange()), f"seed {seed}"


@triton.jit
def log_turns(order, counter, T):
    """Each program notes its number T times, in the order in which the programs come to it."""
    for _ in range(T):
        tl.load(counter, volatile=True)
        tl.store(order + tl.load(counter), tl.program_id(0) * 100 + tl.program_id(1) * 10 + tl.program_id(2))
        tl.store(counter, tl.load(counter) + 1)


def schedule(grid=(4,), steps=4):
    order = torch.full((steps * grid[0] * (grid[1] if len(grid) > 1 else 1),), -1, dtype=torch.int32)
    log_turns[grid](order, torch.zeros(1, dtype=torch.int32), steps)
    return tuple(order.tolist())


def test_one_seed_is_one_schedule_and_many_seeds_are_many():
    """Catches a schedule that cannot be replayed, seeds without effect, and launches that are all alike."""
    by_seed = []
    for seed in SEEDS:
        runs = []
        for _ in range(2):
            with concurrent_programs(seed):
                runs.append([schedule(), schedule()])
        assert runs[0] == runs[1], f"seed {seed}"
        by_seed.extend(runs[0])
    assert len(set(by_seed)) > 0.9 * len(by_seed)
    for order in by_seed:  # nobody is left out, and nobody runs twice
        assert sorted(order) == sorted([0, 100, 200, 300] * 4)


def test_grids_of_two_dimensions_and_of_one_program():
    """Catches program numbers that are mixed up between threads."""
    with concurrent_programs(3):
        assert sorted(schedule((2, 3), 2)) == sorted([0, 10, 20, 100, 110, 120] * 2)
        assert schedule((1,), 2) == (0, 0)


def test_torn_stores_reach_a_reader_in_parts():
    """Catches torn=True doing nothing: by it, and it alone, a reader that tests half its words is found."""
    wrong = 0
    for seed in range(30):
        with concurrent_programs(seed):
            assert torch.equal(run_exchange(tested=N // 2)[0], expected_exchange()), f"seed {seed}"
        with concurrent_programs(seed, torn=True):
            wrong += not torch.equal(run_exchange(tested=N // 2)[0], expected_exchange())
    assert wrong >= 5


@triton.jit
def data_and_flag(data, flag, out, N: tl.constexpr, MASKED: tl.constexpr):
    """Program 0 stores data, then a flag; program 1 waits for the flag: hardware promises it nothing."""
    n = tl.arange(0, N)
    if tl.program_id(0) == 0:
        if MASKED:
            tl.store(data + n, n, mask=n < N)
        else:
            tl.store(data + n, n)
        tl.store(flag, 1)
    else:
        while tl.load(flag, volatile=True) == 0:
            pass
        tl.store(out + n, tl.load(data + n))


@pytest.mark.parametrize("masked", [False, True])
def test_torn_stores_may_overtake_each_other(masked):
    """Catches torn=True keeping stores in order: by it, and it alone, a reader that trusts a flag is found.

    With and without a mask, because the interpreter lowers the two differently.
    """

    def right(seed, torn):
        data, flag, out = torch.full((N,), -1), torch.zeros(1, dtype=torch.int32), torch.full((N,), -1)
        with concurrent_programs(seed, torn=torn):
            data_and_flag[(2,)](data, flag, out, N, masked)
        assert data.tolist() == list(range(N))
        return out.tolist() == list(range(N))

    assert all(right(seed, False) for seed in SEEDS)
    assert sum(right(seed, True) for seed in range(40)) <= 36


@triton.jit
def meet(counter, data, out, N: tl.constexpr, P: tl.constexpr):
    """Each program stores its data, then waits at a barrier of atomic operations, which order the stores."""
    p, n = tl.program_id(0), tl.arange(0, N)
    tl.store(data + p * N + n, p + n)
    tl.atomic_add(counter, 1)
    while tl.atomic_add(counter, 0) < P:
        pass
    tl.store(out + p * N + n, tl.load(data + (p + 1) % P * N + n))


@pytest.mark.parametrize("torn", [False, True])
def test_programs_meet_by_atomic_operations(torn):
    """Catches a hang where the wait is an atomic operation, and one that does not order the stores before it."""
    for seed in SEEDS:
        out = torch.empty(4, N, dtype=torch.int32)
        with concurrent_programs(seed, torn=torn):
            meet[(4,)](torch.zeros(1, dtype=torch.int32), torch.full((4, N), -1, dtype=torch.int32), out, N, 4)
        assert torch.equal(out, (torch.arange(1, 5)[:, None] % 4 + torch.arange(N)).int()), f"seed {seed}"


@triton.jit
def overwrite(x, N: tl.constexpr):
    n = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(x + n, 1)
    tl.store(x + n, 2, mask=n % 2 == 0)
    tl.store(x + n, 3 + tl.load(x + n), mask=n % 4 == 0)


def test_torn_stores_keep_the_order_of_one_place():
    """Catches a part of an older store on top of a newer one, and a program blind to its own store."""
    for seed in range(30):
        x = torch.zeros(2 * N, dtype=torch.int32)
        with concurrent_programs(seed, torn=True):
            overwrite[(2,)](x, N)
        assert x.tolist() == [5, 1, 2, 1] * 4, f"seed {seed}"


@pytest.mark.parametrize(
    "leave_out",
    [[(2,)], [(2, 0, 0), (9, 0, 0)], lambda name, index: name == "exchange" and index == (2, 0, 0)],
)
def test_a_program_that_never_comes(leave_out):
    """Catches leave_out doing nothing: the others must run out of tries, all of them, and end."""
    with concurrent_programs(1, leave_out=leave_out):
        out, late = run_exchange(limit=20)
        assert late == [1, 1, 0, 1]
        assert out[2].tolist() == [-1] * N
    with concurrent_programs(1, leave_out=[(p,) for p in range(4)]):
        assert run_exchange()[1] == [0, 0, 0, 0]  # nobody there at all


@triton.jit
def fail(flag, BAD: tl.constexpr):
    tl.static_assert(tl.program_id(1) != BAD, "the bad program")
    while tl.load(flag, volatile=True) == 0:  # for ever
        pass


@triton.jit
def fail_inside(flag, BAD: tl.constexpr):
    fail(flag, BAD)


@pytest.mark.parametrize("kernel", [fail, fail_inside])
def test_an_error_in_one_program_stops_all(kernel):
    """Catches a launch that hangs or keeps its threads when one program fails, and an error without cause."""
    before = threading.active_count()
    for seed in SEEDS:
        with concurrent_programs(seed), pytest.raises(InterpreterError, match="the bad program") as caught:
            kernel[(1, 5)](torch.zeros(1, dtype=torch.int32), 3)
    cause = caught.value
    while cause.__cause__ is not None and not isinstance(cause, AssertionError):
        notes = getattr(cause, "__notes__", [])
        cause = cause.__cause__
    notes = notes + getattr(cause, "__notes__", [])
    assert isinstance(cause, AssertionError)
    assert sys.version_info < (3, 11) or f"in program (0, 3, 0) of {kernel.__name__}" in notes[0]
    assert threading.active_count() == before
    with concurrent_programs():  # and the next launch is as good as new
        assert torch.equal(run_exchange()[0], expected_exchange())


def test_contexts_nest_and_the_outermost_rules():
    """Catches a launcher's own context that resets a test's seed, tears its stores, ends its concurrency."""

    def attributes():
        owners = (triton_interpreter, triton_interpreter.GridExecutor, triton_interpreter.ReduceOps)
        builder = triton_interpreter.interpreter_builder
        return [dict(vars(owner)) for owner in (*owners, type(builder))] + [builder.options]

    before = attributes()
    with concurrent_programs(5):
        expected = [schedule(), schedule()]
    with concurrent_programs(5):
        got = []
        for _ in range(2):
            with concurrent_programs(6, torn=True, leave_out=[(1,)]):
                got.append(schedule())
        assert got == expected
        assert torch.equal(run_exchange(tested=1)[0], expected_exchange())  # nothing is torn
    with pytest.raises(ZeroDivisionError), concurrent_programs(), concurrent_programs():
        raise ZeroDivisionError
    assert attributes() == before, "Triton's interpreter is not as it was"


def test_launches_of_several_threads_do_not_mix():
    """Catches two launches at once sharing the interpreter's one state, or one context ending another's."""
    results = []

    def work():
        for _ in range(5):
            with concurrent_programs():
                results.append(torch.equal(run_exchange(2, 2)[0], expected_exchange(2, 2)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 15


def test_where_nothing_is_interpreted(monkeypatch):
    """Catches an import that loads the interpreter, and torn stores that a test asks for and does not get."""
    monkeypatch.setattr(implementation, "interpreting", lambda: False)
    with concurrent_programs():
        assert implementation._depth == 0
    for wish in ({"torn": True}, {"leave_out": [(0,)]}):
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), concurrent_programs(**wish):
            pass
    program = (
        "import sys; from rnn_gpu.kernels import interpreter\n"
        "with interpreter.concurrent_programs(): assert 'triton.runtime.interpreter' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "TRITON_INTERPRET": "0"}, check=True)


def test_two_copies_of_the_module_are_refused():
    """Catches rnn_gpu.kernels and kernels, the same folder, both imported: two states, wrapped twice."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("another_copy", implementation.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    with concurrent_programs(), pytest.raises(RuntimeError, match="two names"), copy.concurrent_programs():
        pass
    with copy.concurrent_programs():
        assert torch.equal(run_exchange()[0], expected_exchange())


# Arithmetic -------------------------------------------------------------------------------------------------


@triton.jit
def multiply(a, b, out, S: tl.constexpr, M: tl.constexpr, K: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr):
    s, m, k, n = tl.arange(0, S), tl.arange(0, M), tl.arange(0, K), tl.arange(0, L)
    x = tl.load(a + s[:, None, None] * (M * K) + m[None, :, None] * K + k[None, None, :])
    y = tl.load(b + s[:, None, None] * (L * K) + n[None, :, None] * K + k[None, None, :]).permute(0, 2, 1)
    z = tl.dot(x, y, input_precision=PRECISION)
    z = tl.dot(x, y, z, input_precision=PRECISION)
    tl.store(out + s[:, None, None] * (M * L) + m[None, :, None] * L + n[None, None, :], z)


def products(dtype, precision=None):
    """Twice x @ y.T as the kernel computes it, and the operands."""
    S, M, K, L = 2, 32, 64, 32
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(S, n, K, generator=generator).add(0.5).to(dtype) for n in (M, L))
    out = torch.empty(S, M, L)
    with concurrent_programs():
        multiply[(1,)](x, y, out, S, M, K, L, precision)
    return out.double(), x, y


def twice(x, y):
    return 2 * x.double() @ y.double().mT


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", [None, "ieee", "tf32"])
def test_products_of_16_bit_numbers_are_summed_in_float32(dtype, precision):
    """Catches bits multiplied as integers, and sums rounded to 16 bits (2e-4 and more)."""
    out, x, y = products(dtype, precision)
    assert relative(out, twice(x, y)) < 3e-7


def test_ieee_products_are_float32():
    """Catches a truncation of operands that were meant to stay whole."""
    out, x, y = products(torch.float32, "ieee")
    assert relative(out, twice(x, y)) < 3e-7


@pytest.mark.parametrize("precision", ["tf32", None])
def test_tf32_products_truncate_their_operands(precision):
    """Catches tf32, the default, taken as full float32, or rounded: tensor cores ignore the low 13 bits."""
    out, x, y = products(torch.float32, precision)
    truncated = [(v.view(torch.int32) & ~0x1FFF).view(torch.float32) for v in (x, y)]
    assert relative(out, twice(*truncated)) < 3e-7
    # All operands are positive: truncation shows as a bias of half a unit a factor.
    bias = ((out - twice(x, y)) / twice(x, y)).mean().item()
    assert -2 * 2**-10 < bias < -0.3 * 2**-10


def test_tf32_products_of_rounded_operands_have_no_bias():
    """Catches a kernel's rounding (add half a unit to the bits) that does not reach the products."""
    S, M, K, L = 2, 32, 64, 32
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.rand(S, n, K, generator=generator).add(0.5) for n in (M, L))
    rounded = [((v.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for v in (x, y)]
    out = torch.empty(S, M, L)
    with concurrent_programs():
        multiply[(1,)](*rounded, out, S, M, K, L, "tf32")
    error = (out.double() - twice(x, y)) / twice(x, y)
    assert abs(error.mean().item()) < 0.02 * 2**-10
    assert error.abs().max().item() < 2**-10


@triton.jit
def convert(x, y, N: tl.constexpr, DTYPE: tl.constexpr):
    n = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + n, tl.load(x + n).to(DTYPE))


def converted(x, dtype):
    x = x.contiguous()
    n = min(x.numel(), 4096)
    out = torch.empty(x.shape, dtype=dtype)
    with concurrent_programs():
        convert[(x.numel() // n,)](x, out, n, getattr(tl, str(dtype).removeprefix("torch.")))
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversion_to_16_bits_rounds_to_nearest_even(dtype):
    """Catches truncation, ties rounded up, and infinities, NaN, overflow and tiny numbers gone wrong."""
    x = random_bits((4096,), torch.float32)
    assert same_bits(converted(x, dtype), x.to(dtype))
    # Ties: halfway between two neighbours, for all bits that are kept.
    half = random_bits((4096,), dtype, 1).float().view(torch.int32)
    ties = (half | (0x8000 if dtype == torch.bfloat16 else 0x1000)).view(torch.float32)
    ties[:8] = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.4e38, -3.4e38, 0.0, -0.0, 1e-45])
    assert same_bits(converted(ties, dtype), ties.to(dtype))
    mean = torch.rand(4096, generator=torch.Generator().manual_seed(2)) + 1
    assert abs((converted(mean, dtype).double() - mean).mean().item()) < 0.02 * torch.finfo(dtype).eps


def test_no_nan_becomes_the_sentinel_or_a_number():
    """Catches a NaN with few bits that rounds to infinity, and all ones, which hardware never makes."""
    x = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert converted(x, torch.bfloat16).view(torch.int16).tolist() == [0x7FFF] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversion_from_16_bits_is_exact(dtype):
    """Catches any of the 65,536 numbers converted wrongly; Triton's own fails for subnormal bfloat16."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    assert same_bits(converted(x, torch.float32), x.float())


def test_other_conversions_of_bfloat16():
    """Catches integers, float64 and float16 that reach bfloat16 as bits, not as values, and the way back."""
    integers = torch.arange(-1024, 1024, dtype=torch.int32) * 37
    assert same_bits(converted(integers, torch.bfloat16), integers.to(torch.bfloat16))
    halves = random_bits((4096,), torch.float16)
    assert same_bits(converted(halves, torch.bfloat16), halves.to(torch.bfloat16))
    doubles = torch.randn(1024, dtype=torch.float64)
    assert same_bits(converted(doubles, torch.bfloat16), doubles.to(torch.bfloat16))
    small = torch.arange(-128, 128).to(torch.bfloat16)
    assert torch.equal(converted(small, torch.int32), small.int())
    assert torch.equal(converted(small, torch.float64), small.double())
    assert same_bits(converted(small, torch.float16), small.half())


@triton.jit
def operate(x, y, out, N: tl.constexpr):
    """Rows of out: what can be done to numbers of 16 bits without leaving them."""
    n = tl.arange(0, N)
    a, b = tl.load(x + n), tl.load(y + n)
    tl.store(out + 0 * N + n, a + b)
    tl.store(out + 1 * N + n, a - b)
    tl.store(out + 2 * N + n, a * b)
    tl.store(out + 3 * N + n, tl.maximum(a, b))
    tl.store(out + 4 * N + n, tl.where(a < b, a, b))
    tl.store(out + 5 * N + n, tl.where((a == a) & (a >= b), a, 1.5))
    tl.store(out + 6 * N + n, -a)
    tl.store(out + 7 * N + n, tl.abs(a))
    tl.store(out + 8 * N + n, a * 1.5)
    tl.store(out + 9 * N + n, tl.load(x + n, mask=n % 2 == 0, other=0.0))
    tl.store(out + 10 * N + n, tl.load(x + n, mask=n % 2 == 0, other=-2.5))
    tl.store(out + 11 * N + n, tl.full((N,), 0.75, a.dtype) + tl.zeros((N,), a.dtype))
    tl.store(out + 12 * N + n, tl.clamp(a, b - b, b - b + 1.0))
    tl.store(out + 13 * N + n, (a.to(tl.float32) / b.to(tl.float32)).to(a.dtype))
    tl.store(out + 14 * N + n, tl.fma(a, b, a))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_in_16_bits(dtype):
    """Catches bfloat16 added, compared or selected as integers, constants of it, and a load's `other`."""
    x, y = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty(15, 256, dtype=dtype)
    with concurrent_programs():
        operate[(1,)](x, y, out, 256)
    even = torch.arange(256) % 2 == 0
    expected = [
        x + y,
        x - y,
        x * y,
        torch.maximum(x, y),
        torch.minimum(x, y),
        torch.where(x >= y, x, 1.5),
        -x,
        x.abs(),
        x * 1.5,
        torch.where(even, x, 0.0),
        torch.where(even, x, -2.5),
        torch.full_like(x, 0.75),
        x.clamp(0, 1),
        x / y,
        (x.double() * y.double() + x.double()).float(),
    ]
    for row, (got, wanted) in enumerate(zip(out, expected, strict=True)):
        assert torch.equal(got, wanted.to(dtype)), f"row {row}"


@triton.jit
def move(words, shuffled, back, tiles, R: tl.constexpr, W: tl.constexpr, DTYPE: tl.constexpr):
    """Words of 32 bits polled, split into two numbers of 16, and sent through every change of shape."""
    r, w = tl.arange(0, R)[:, None], tl.arange(0, W)[None, :]
    word = tl.load(words + r * W + w, volatile=True)
    low = word.to(tl.int16).to(DTYPE, bitcast=True)
    high = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    both = tl.join(low, high)  # [R, W, 2]
    x = both.reshape(R, 2 * W).permute(1, 0)  # [2W, R]
    tl.store(shuffled + tl.arange(0, 2 * W)[:, None] * R + tl.arange(0, R)[None, :], x)
    first, second = tl.split(x.reshape(2, W, R).permute(1, 2, 0))  # [W, R] each
    pair = ()
    for i in tl.static_range(2):
        pair = pair + (first if i == 0 else second,)  # noqa: RUF005, as the kernels do it
    for i in tl.static_range(2):
        tl.store(tiles + i * W * R + tl.arange(0, W)[:, None] * R + tl.arange(0, R)[None, :], pair[i])
    bits = x.to(tl.int16, bitcast=True)
    even, odd = tl.split(tl.where(bits == -1, 0x7FFF, bits).to(tl.int16).permute(1, 0).reshape(R, W, 2))
    tl.store(back + r * W + w, (odd.to(tl.int32) << 16) | (even.to(tl.int32) & 0xFFFF))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moves_of_16_bit_numbers_keep_every_bit(dtype):
    """Catches bits changed or moved elsewhere by bitcast, join, split, reshape, permute, a tuple of tiles."""
    R, W = 8, 16
    x = random_bits((R, 2 * W), dtype, 5)
    x.view(torch.int16)[x.view(torch.int16) == -1] = 0
    x.view(torch.int16)[3, 5] = -1  # the sentinel: it must come back as another NaN
    shuffled, tiles = torch.empty(2 * W, R, dtype=dtype), torch.empty(2, W, R, dtype=dtype)
    back = torch.empty(R, W, dtype=torch.int32)
    with concurrent_programs():
        move[(1,)](x.view(torch.int32), shuffled, back, tiles, R, W, getattr(tl, str(dtype).removeprefix("torch.")))
    bits = x.view(torch.int16)
    assert torch.equal(shuffled.view(torch.int16), bits.T)
    assert torch.equal(tiles.view(torch.int16).flatten(0, 1), bits.T)
    assert torch.equal(back.view(torch.int16), bits.masked_fill(bits == -1, 0x7FFF))


@triton.jit
def transcendental(x, out, N: tl.constexpr):
    n = tl.arange(0, N)
    a = tl.load(x + n)
    tl.store(out + n, tl.exp2(a))
    tl.store(out + N + n, 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * a)))


def test_exp2_and_its_overflow():
    """Catches constants taken in another precision, and numpy's warnings where hardware gives infinity."""
    x = torch.linspace(-160, 160, 512)
    out = torch.empty(2, 512)
    with concurrent_programs():
        transcendental[(1,)](x, out, 512)
    torch.testing.assert_close(out[0].double(), torch.exp2(x.double()).float().double(), rtol=3e-7, atol=1e-44)
    torch.testing.assert_close(out[1].double(), torch.sigmoid(x.double()), rtol=1e-5, atol=1e-38)


@triton.jit
def assembled(x, out, ASSEMBLY: tl.constexpr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out + n, tl.inline_asm_elementwise(ASSEMBLY, "=f,f", [tl.load(x + n)], tl.float32, is_pure=True, pack=1))


def test_inline_assembly():
    """Catches: a reciprocal that warns or fails where hardware gives 0, NaN or infinity, other assembly."""
    x = torch.tensor([1.0, 3.0, 1e30, torch.inf, 0.0, -0.0, torch.nan, -7.0])
    out = torch.empty(8)
    with concurrent_programs():
        assembled[(1,)](x, out, "rcp.approx.ftz.f32 $0, $1;", 8)
        assert same_bits(out, 1 / x)
        with pytest.raises(InterpreterError, match="does not know: lg2"):
            assembled[(1,)](x, out, "lg2.approx.ftz.f32 $0, $1;", 8)


# Each thread adds up the numbers from its own on, downwards, while they are above 3; odd ones alone.
SUM_DOWN = """{
.reg .b32 n, odd;
.reg .pred q;
mov.b32 $0, 0;
mov.b32 n, $PACK;
AGAIN:
and.b32 odd, n, 0x1;
setp.ne.b32 q, odd, 0;
@q sub.s32 $0, $0, n;
@!q bra NEXT;
@q or.b32 $0, $0, 0;
NEXT: sub.s32 n, n, 1;
setp.gt.s32 q, n, 3;
@q bra AGAIN;
}"""


@triton.jit
def branch(x, out, ASSEMBLY: tl.constexpr, N: tl.constexpr, PACK: tl.constexpr):
    n = tl.arange(0, N)
    y = tl.inline_asm_elementwise(ASSEMBLY, "=r," * PACK + ",".join("r" * PACK), [tl.load(x + n)], tl.int32, True, PACK)
    tl.store(out + n, y)


def test_inline_assembly_that_branches():
    """Catches threads that all take one branch, predicates that are ignored, and elements of a pack mixed up."""
    x = torch.tensor([2, 9, 5, 4, -3, 8, 7, 12], dtype=torch.int32)
    expected = [-sum(n for n in range(max(4, value + 1)) if n > 3 and n <= value and n % 2) for value in x.tolist()]
    expected[0], expected[4] = 0, 3  # looked at once, whatever they are
    out = torch.empty_like(x)
    with concurrent_programs():
        branch[(1,)](x, out, SUM_DOWN.replace("$PACK", "$1"), 8, 1)
        assert out.tolist() == expected
        second = SUM_DOWN.replace("$PACK", "$3").replace("$0", "$1").replace("AGAIN", "MORE").replace("NEXT", "ON")
        branch[(1,)](x, out, SUM_DOWN.replace("$PACK", "$2")[:-1] + second.split("q;", 1)[1], 8, 2)
        assert out.tolist() == expected


WAIT = """AGAIN:
ld.relaxed.gpu.global.b32 $0, [$1+4];
setp.eq.s32 q, $0, 0;
@q bra AGAIN;"""


@triton.jit
def pass_on(board, out, ASSEMBLY: tl.constexpr, N: tl.constexpr):
    """Each program waits for the N numbers of the next one (the last: for some that are there), and stores its own."""
    place = board + tl.program_id(0) * N + tl.arange(0, N)
    seen = tl.inline_asm_elementwise(ASSEMBLY, "=r,l", [place + N - 1], tl.int32, is_pure=False, pack=1)
    tl.store(place, seen + 1)
    tl.store(out + tl.program_id(0) * N + tl.arange(0, N), seen)


@pytest.mark.parametrize("torn", [False, True])
def test_inline_assembly_that_waits(torn):
    """Catches a load of assembly that never lets others run, or that sees a torn store whole. Control: without the loop
    somebody comes too early.
    """
    n = torch.arange(N, dtype=torch.int32)
    expected = torch.stack([n + 4, n + 3, n + 2, n + 1])
    early = 0
    for seed in SEEDS:
        for assembly in (WAIT, WAIT.split("setp")[0]):
            board, out = torch.zeros(5, N, dtype=torch.int32), torch.zeros(4, N, dtype=torch.int32)
            board[4] = n + 1
            with concurrent_programs(seed, torn=torn):
                pass_on[(4,)](board, out, assembly, N)
            if assembly is WAIT:
                assert torch.equal(out, expected), f"seed {seed}"
            else:
                early += not torch.equal(out, expected)
    assert early > 6


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def larger_with_index(a, i, b, j):
    take = (a > b) | ((a == b) & (i < j))
    return tl.where(take, a, b), tl.where(take, i, j)


@triton.jit
def smaller(a, b):
    return tl.where(a < b, a, b)


@triton.jit
def branching(a, b):
    if a > b:
        result = a
    else:
        result = b
    return result


@triton.jit
def reduce_all(x, y, scalars, rows, halves, N: tl.constexpr, M: tl.constexpr):
    n, m = tl.arange(0, N), tl.arange(0, M)
    a = tl.load(x + n[:, None] * M + m[None, :])
    tl.store(scalars, tl.reduce(a, None, either))
    tl.store(scalars + 1, tl.sum(tl.reduce(a, None, either, keep_dims=True)))
    tl.store(rows + n, tl.reduce(a, 1, either))
    tl.store(rows + N + n, tl.sum(tl.reduce(a, 1, either, keep_dims=True), 1))
    value, index = tl.reduce((a, a * 0 + m[None, :]), 1, larger_with_index)
    tl.store(rows + 2 * N + n, value)
    tl.store(rows + 3 * N + n, index)
    tl.store(rows + 4 * N + n, tl.reduce(a, 1, branching))
    b = tl.load(y + n[:, None] * M + m[None, :])
    tl.store(halves + n, tl.reduce(b, 1, smaller))
    tl.store(halves + N + n, tl.max(b, 1))
    tl.store(halves + 2 * N + n, tl.sum(b, 1).to(b.dtype))


@triton.jit
def sum_in_float32(a, b):
    return a.to(tl.float32) + b.to(tl.float32)


@triton.jit
def reduce_and_promote(y, out, M: tl.constexpr):
    tl.store(out, tl.reduce(tl.load(y + tl.arange(0, M)), 0, sum_in_float32))


def test_reductions():
    """Catches the reduction by halves, ours, that mixes axes or operands, or takes one branch for all.

    And a combining function that changes the type, as `tl.minimum` may for bfloat16: nonsense is stored.
    """
    n, m = 8, 4
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-100, 100, (n, m), generator=generator, dtype=torch.int32)
    y = torch.randint(-16, 16, (n, m), generator=generator).to(torch.bfloat16)
    scalars, rows = torch.empty(2, dtype=torch.int32), torch.empty(5, n, dtype=torch.int32)
    halves = torch.empty(3, n, dtype=torch.bfloat16)
    with concurrent_programs():
        reduce_all[(1,)](x, y, scalars, rows, halves, n, m)
    ors = x[:, 0] | x[:, 1] | x[:, 2] | x[:, 3]
    everything = 0
    for value in ors.tolist():
        everything |= value
    assert scalars.tolist() == [everything] * 2
    largest = x.max(1)
    for got, wanted in zip(rows, [ors, ors, largest.values, x.argmax(1), largest.values], strict=True):
        assert torch.equal(got, wanted.int())
    for got, wanted in zip(halves, [y.min(1).values, y.max(1).values, y.float().sum(1)], strict=True):
        assert torch.equal(got, wanted.to(torch.bfloat16))
    with concurrent_programs(), pytest.raises(InterpreterError, match="makes another type"):
        reduce_and_promote[(1,)](y, halves, m)
