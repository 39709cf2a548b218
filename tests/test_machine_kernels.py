"""Whole kernels on the machine for PTX, against torch: real tilings of this library's, and kernels not from here."""

import contextlib
import re

import pytest
import torch
import triton
import triton.language as tl

from rnn_gpu.kernels.machine import Fault, on_machine
from rnn_gpu.kernels.machine.warpgroup import Outstanding
from rnn_gpu.kernels.plan import DEVICES
from tests.problems import Problem, assert_right, plans, run

ARCHITECTURES = (80, 90, 100, 120)  # of each generation one

pytestmark = [pytest.mark.compiled]


# ---- Our kernels as they are planned ---------------------------------------------------------------------------------


def assert_right_as_planned(cell, hidden_size, batch, device, dtype=torch.bfloat16, precision=None):
    problem = Problem(cell, hidden_size, batch, 3, dtype, precision)
    both = plans(problem, device=DEVICES[device], alone=True)
    with on_machine(DEVICES[device].arch, seed=hidden_size + batch):
        assert_right(problem, run(problem, both))


@pytest.mark.parametrize("device", ["h200", "a100"])
def test_a_real_tiling_is_right(device):
    """Catches what small tilings do not have: whole chunks of weights for all warps, many programs."""
    assert_right_as_planned("lstm", 256, 16, device)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["h200", "a100"])
@pytest.mark.parametrize("batch", [16, 64])
@pytest.mark.parametrize("hidden_size", [256, 512, 1024, 1536])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_every_real_tiling_is_right(cell, hidden_size, batch, device):
    """The same, of all sizes that people use."""
    assert_right_as_planned(cell, hidden_size, batch, device)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("hidden_size", [256, 1024])
def test_real_tilings_in_float32_are_right(hidden_size, precision):
    """The same in float32, whose weights do not all stay in registers."""
    assert_right_as_planned("lstm", hidden_size, 16, "h200", torch.float32, precision)


# ---- Kernels that are not from here ----------------------------------------------------------------------------------


@triton.jit
def softmax_kernel(x, y, columns, BLOCK: tl.constexpr):
    """Each program a row."""
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(x + row * columns + at, mask=at < columns, other=-float("inf"))
    powers = tl.exp(values - tl.max(values, 0))
    tl.store(y + row * columns + at, powers / tl.sum(powers, 0), mask=at < columns)


@triton.jit
def product_kernel(
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Each program a tile of c, and one of SPLIT parts of K, which atomics add up."""
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(tl.program_id(2) * BK, K, BK * SPLIT):
        inner = k + tl.arange(0, BK)
        x = tl.load(a + rows[:, None] * K + inner[None, :], mask=(rows[:, None] < M) & (inner[None, :] < K), other=0.0)
        y = tl.load(
            b + inner[:, None] * N + columns[None, :], mask=(inner[:, None] < K) & (columns[None, :] < N), other=0.0
        )
        total = tl.dot(x, y, total)
    place, inside = c + rows[:, None] * N + columns[None, :], (rows[:, None] < M) & (columns[None, :] < N)
    if SPLIT == 1:
        tl.store(place, total, mask=inside)
    else:
        tl.atomic_add(place, total, mask=inside)


@triton.jit
def column_sums_kernel(x, y, BLOCK: tl.constexpr):
    """Each program adds its row of x."""
    at = tl.arange(0, BLOCK)
    tl.atomic_add(y + at, tl.load(x + tl.program_id(0) * BLOCK + at))


@triton.jit
def histogram_kernel(x, y, COUNT: tl.constexpr, BINS: tl.constexpr):
    """How often each number stands in x."""
    tl.store(y + tl.arange(0, BINS), tl.histogram(tl.load(x + tl.arange(0, COUNT)), BINS))


@triton.jit
def layer_norm_kernel(x, y, weight, bias, columns, eps, BLOCK: tl.constexpr):
    """Each program a row, in pieces of BLOCK."""
    row = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, columns, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        values = tl.load(x + row * columns + at, mask=at < columns, other=0.0).to(tl.float32)
        total += values
        squares += values * values
    mean = tl.sum(total, 0) / columns
    scale = 1 / tl.sqrt(tl.sum(squares, 0) / columns - mean * mean + eps)
    for begin in range(0, columns, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < columns
        values = tl.load(x + row * columns + at, mask=inside).to(tl.float32)
        w, b = tl.load(weight + at, mask=inside), tl.load(bias + at, mask=inside)
        tl.store(y + row * columns + at, (values - mean) * scale * w + b, mask=inside)


@triton.jit
def locked_sum_kernel(x, total, count, lock, BLOCK: tl.constexpr):
    """Programs add their row to `total`, one at a time behind a lock, with plain loads and stores."""
    at = tl.arange(0, BLOCK)
    mine = tl.load(x + tl.program_id(0) * BLOCK + at)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    seen = tl.load(count)
    if seen == 0:
        tl.store(total + at, mine)
    else:
        tl.store(total + at, mine + tl.load(total + at))
    tl.debug_barrier()  # what others of this program still load
    tl.store(count, seen + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_softmax(arch):
    """Catches a reduction over warps, or a mask, that comes out wrong."""
    x = torch.randn(5, 700)
    y = torch.empty_like(x)
    with on_machine(arch, seed=1):
        softmax_kernel[(5,)](x, y, 700, 1024)
    torch.testing.assert_close(y, x.softmax(1))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "stages", "warps"),
    [(torch.float16, 1, 4), (torch.bfloat16, 1, 2), (torch.float32, 1, 4), (torch.float16, 3, 2)],
)
def test_a_matrix_product(arch, split, dtype, stages, warps):
    """Catches fragments, swizzled shared memory, asynchronous copies and atomics that come out wrong."""
    M, N, K = 45, 40 if split == 1 else 48, 100  # atomics are vectors where 16 divides a row
    a, b, c, texts = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), torch.zeros(M, N), []
    with on_machine(arch, seed=2, edit=lambda ptx: texts.append(ptx) or ptx):
        product_kernel[(2, 2, split)](a, b, c, M, N, K, 32, 32, 32, split, num_warps=warps, num_stages=stages)
    assert (re.search(r"atom\S*\.v[24]\.f32", texts[0]) is not None) == (split > 1 and arch >= 90)
    tolerance = 2e-2 if dtype == torch.float32 else 1e-4  # tf32, which cuts operands
    torch.testing.assert_close(c, a.float() @ b.float(), atol=tolerance * 10, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tile", "warps", "stages"), [
    (torch.float16, (64, 64, 64), 4, 1), (torch.bfloat16, (128, 64, 64), 8, 1), (torch.float16, (64, 128, 32), 4, 3),
    (torch.float32, (64, 64, 32), 4, 1), (torch.float16, (64, 32, 16), 4, 1),
])  # fmt: skip
def test_a_matrix_product_by_four_warps(dtype, tile, warps, stages):
    """Catches descriptors, swizzles and transposed operands of wgmma that are read in another way."""
    M, N, K = 100, 130, 150
    a, b, c, texts = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), torch.zeros(M, N), []
    grid = -(-M // tile[0]), -(-N // tile[1]), 1
    with on_machine(90, seed=2, edit=lambda ptx: texts.append(ptx) or ptx):
        product_kernel[grid](a, b, c, M, N, K, *tile, 1, num_warps=warps, num_stages=stages)
    assert "wgmma.mma_async" in texts[0]
    tolerance = 2e-2 if dtype == torch.float32 else 1e-4
    torch.testing.assert_close(c, a.float() @ b.float(), atol=tolerance * 10, rtol=tolerance)


@triton.jit
def first_product_kernel(a, b, c, SIZE: tl.constexpr):
    """c = a b by one program, with no sum to add to."""
    at = tl.arange(0, SIZE)
    place = at[:, None] * SIZE + at[None, :]
    tl.store(c + place, tl.dot(tl.load(a + place), tl.load(b + place)))


@pytest.mark.parametrize("adds", ["0", "false", "true"])
def test_a_product_that_adds_to_nothing_reads_no_sum(adds):
    """Catches a false alarm at registers that nothing wrote yet, and one that a true predicate reads in silence."""
    a, b, c, edited = torch.randn(64, 64).half(), torch.randn(64, 64).half(), torch.zeros(64, 64), []

    def edit(ptx):
        if adds != "0":
            setp = f"{{ .reg .pred adds; setp.{'eq' if adds == 'true' else 'ne'}.b32 adds, 0, 0;"
            ptx = re.sub(r"(wgmma\.mma_async[^;]*), 0, 1, 1", rf"{setp} \1, adds, 1, 1", ptx, count=1)
            ptx = re.sub(r"(adds, 1, 1[^;]*;)", r"\1 }", ptx)
        edited.append(ptx)
        return ptx

    fault = pytest.raises(Fault, match="is read, and nothing has written it")
    with fault if adds == "true" else contextlib.nullcontext(), on_machine(90, edit=edit):
        first_product_kernel[(1,)](a, b, c, 64)
    assert re.search(r"wgmma\.mma_async[^;]*, %s, 1, 1" % ("0" if adds == "0" else "adds"), edited[0])
    if adds != "true":
        torch.testing.assert_close(c, a.float() @ b.float(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("warps", [4, 8])
def test_a_product_smaller_than_its_program(warps, arch):
    """Catches a false alarm at warps that have the same part of a tile, and store the same of it to shared memory."""
    a, b, c = torch.randn(16, 16).half(), torch.randn(16, 16).half(), torch.zeros(16, 16)
    with on_machine(arch, seed=warps):
        first_product_kernel[(1,)](a, b, c, 16, num_warps=warps)
    torch.testing.assert_close(c, a.float() @ b.float(), atol=1e-3, rtol=1e-4)


@triton.jit
def narrowed_kernel(x, y, SIZE: tl.constexpr):
    """x by way of 8 bits."""
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at).to(tl.float8e4nv).to(tl.float32))


def test_one_number_a_thread_becomes_half_of_a_pair():
    """Catches a false alarm at the other half of the pair, which nothing writes."""
    x, y = torch.randn(128) * 100, torch.zeros(128)
    with on_machine(90):
        narrowed_kernel[(1,)](x, y, 128)
    assert torch.equal(y, x.to(torch.float8_e4m3fn).float())


def test_products_of_one_shape_need_no_fence_between_them():
    """Catches registers that a product of another shape has summed in, or that become a fragment of A, unfenced."""
    known = Outstanding(used={1: "64 x 16", 2: ""})
    needs = lambda accumulators, a=(): known.unfenced(accumulators, a, "64 x 16")
    assert not needs([1, 3], [4])
    assert needs([2]) and needs([3], [1]) and known.unfenced([1], [], "128 x 16")


def _wait_left_out(ptx):
    return re.sub(r"wgmma\.wait_group\.sync\.aligned \d+;", "", ptx)


def _one_group_too_many(ptx):
    return re.sub(r"(wgmma\.wait_group\.sync\.aligned) 0;", r"\1 1;", ptx)


def _stored_too_early(ptx):
    """The wait stands behind the barrier after which shared memory is written again."""
    wait = re.search(r"wgmma\.wait_group\.sync\.aligned \d+;", ptx)
    again = ptx.index("wgmma.fence.sync.aligned;")
    return ptx[:again] + wait[0] + ptx[again : wait.start()] + ptx[wait.end() :]


def _fence_left_out(ptx):
    return ptx.replace("wgmma.fence.sync.aligned;", "")


def _fence_too_early(ptx):
    """It stands before the sums begin with zeros."""
    fenced = _fence_left_out(ptx)
    begin = fenced.index("ld.param")
    return fenced[:begin] + "wgmma.fence.sync.aligned;\n" + fenced[begin:]


def _memory_not_fenced(ptx):
    return ptx.replace("fence.proxy.async.shared::cta;", "")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_fence_left_out, "with no wgmma.fence since"),
        (_fence_too_early, "with no wgmma.fence since"),
        (_memory_not_fenced, "written with no fence.proxy.async since"),
        (_wait_left_out, "product.*not waited for"),
        (_one_group_too_many, "product.*not waited for"),
        (_stored_too_early, "a store to shared memory that a product reads"),
    ],
)
def test_control_a_product_without_its_waits_and_fences_is_found(edit, said):
    """Catches results that are read, or operands that are written, while a product of four warps is on its way, and
    operands that no fence orders before it.
    """
    a, b, c = torch.randn(64, 96).half(), torch.randn(96, 64).half(), torch.zeros(64, 64)
    with pytest.raises(Fault, match=said), on_machine(90, seed=2, edit=edit):
        product_kernel[(1, 1, 1)](a, b, c, 64, 64, 96, 64, 64, 32, 1, num_warps=4, num_stages=1)


@triton.jit
def sum_of_products_kernel(a, b, c, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, TYPE: tl.constexpr):
    """c [M, N] = a [M, K] b [N, K]^T by one program."""
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK)
    total = tl.zeros((M, N), TYPE)
    for k in range(0, K, BK):
        x, y = tl.load(a + rows[:, None] * K + k + inner), tl.load(b + columns * K + k + inner[:, None])
        total = tl.dot(x, y, total, out_dtype=TYPE)
    tl.store(c + rows[:, None] * N + columns, total)


@pytest.mark.parametrize(
    ("arch", "kind", "tile", "form"),
    [
        (80, torch.int8, (32, 32, 32), r"mma.*m16n8k32.*s32\.s8"),
        (90, torch.int8, (64, 32, 64), r"wgmma.*m64n32k32\.s32\.s8"),
        (120, torch.int8, (64, 32, 64), r"mma.*m16n8k32.*s32\.s8"),
        (80, torch.float64, (16, 16, 16), r"mma.*m8n8k4.*f64"),
        (90, torch.float64, (32, 16, 16), r"mma.*f64"),
        (120, torch.float64, (16, 16, 16), r"fma\.rn\.f64"),
    ],
)
def test_products_of_integers_and_of_float64(arch, kind, tile, form):
    """Catches numbers of 8 bits read in another order, sums that are rounded, and products in another type."""
    M, N, BK = tile
    out, name = (torch.int32, tl.int32) if kind == torch.int8 else (torch.float64, tl.float64)
    a, b = (torch.randn(rows, 2 * BK, dtype=torch.float64) for rows in (M, N))
    a, b = ((100 * x).clamp(-128, 127).to(kind) if kind == torch.int8 else x for x in (a, b))
    c, texts = torch.zeros(M, N, dtype=out), []
    with on_machine(arch, seed=7, edit=lambda ptx: texts.append(ptx) or ptx):
        sum_of_products_kernel[(1,)](a, b, c, 2 * BK, M, N, BK, name, num_stages=1)
    assert re.search(form, texts[0])
    torch.testing.assert_close(c, a.to(out) @ b.to(out).T, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("tile", [(64, 32, 32), (128, 16, 64)])
def test_products_with_sums_of_16_bits(tile):
    """Catches two numbers of a register of wgmma's sums exchanged, or sums of another width. Triton takes the registers
    apart before it waits for them, which PTX leaves open (and ptxas then waits): a fault, unless the wait comes first.
    """
    M, N, BK = tile
    a, b = torch.randint(-4, 5, (M, 2 * BK)).half(), torch.randint(-4, 5, (N, 2 * BK)).half()
    c = torch.zeros(M, N).half()
    waits = lambda ptx: re.sub(r"wgmma\.commit_group\.sync\.aligned;", r"\g<0> wgmma.wait_group.sync.aligned 0;", ptx)
    for edit in (None, waits):
        fault = pytest.raises(Fault, match="not waited for") if edit is None else contextlib.nullcontext()
        with fault, on_machine(90, seed=3, edit=edit):
            sum_of_products_kernel[(1,)](a, b, c, 2 * BK, M, N, BK, tl.float16, num_stages=1)
    assert torch.equal(c, (a.float() @ b.float().T).half())


def _past_a_product(ptx, number, behind=""):
    """The last warp goes past a product."""
    m = list(re.finditer(r"wgmma\.mma_async[^;]*;", ptx))[number]
    head = "{ .reg .pred fourth; .reg .b32 thread; mov.u32 thread, %tid.x; setp.ge.u32 fourth, thread, 96;"
    return f"{ptx[: m.start()]} {head} @fourth bra PAST; {m[0]} PAST: {behind.format(m[0])} }} {ptx[m.end() :]}"


@pytest.mark.parametrize(
    ("number", "behind", "said"),
    [
        (-1, "", "a product of four warps that warp 3 did not come to"),
        (1, "", r"a product of four warps, while warp \d came to another one"),
        (-1, "bar.sync 0; @!fourth bra END; {} END:", r"a product of four warps, while .*, or behind a barrier"),
    ],
)
def test_control_a_product_that_three_of_four_warps_come_to_is_found(number, behind, said):
    """Catches a warp that never comes to a product, to another one in its place, or behind a barrier."""
    a, b, c = torch.randn(64, 64).half(), torch.randn(64, 64).half(), torch.zeros(64, 64)
    with pytest.raises(Fault, match=said), on_machine(90, edit=lambda ptx: _past_a_product(ptx, number, behind)):
        first_product_kernel[(1,)](a, b, c, 64)


@pytest.mark.parametrize(
    ("arch", "dtype", "form"),
    [
        (80, torch.float32, "add.f32"),
        (80, torch.float16, "add.noftz.f16x2"),
        (90, torch.float32, "add.v4.f32"),
        (90, torch.bfloat16, "add.noftz.v8.bf16"),
        (100, torch.float16, "add.noftz.v8.f16"),
    ],
)
def test_sums_by_atomics(arch, dtype, form):
    """Catches sums that vectors and pairs of atomics lose or add to a neighbour."""
    x, y, texts = torch.randint(-9, 9, (3, 512)).to(dtype), torch.ones(512, dtype=dtype), []
    with on_machine(arch, seed=4, edit=lambda ptx: texts.append(ptx) or ptx):
        column_sums_kernel[(3,)](x, y, 512, num_warps=2)
    assert f".{form} " in texts[0]
    assert torch.equal(y, x.sum(0) + 1)  # all of them whole numbers


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_histogram(arch):
    """Catches atomics on shared memory that lose a number."""
    x, y = torch.randint(0, 128, (512,), dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    with on_machine(arch, seed=5):
        histogram_kernel[(1,)](x, y, 512, 128)
    assert torch.equal(y, x.bincount(minlength=128).int())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_layer_norm(arch):
    """Catches loops, roots and quotients that come out wrong."""
    x, weight, bias = torch.randn(4, 300).half(), torch.randn(300), torch.randn(300)
    y = torch.empty(4, 300)
    with on_machine(arch, seed=3):
        layer_norm_kernel[(4,)](x, y, weight, bias, 300, 1e-5, 128)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x.float(), (300,), weight, bias), atol=1e-4, rtol=1e-4)


@triton.jit
def gathered_kernel(table, y, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    """Each program adds 1 to what its entry of a table points to (TWICE: two programs to one), and copies it."""
    at = tl.arange(0, BLOCK)
    x = tl.load(table + tl.program_id(0) // (2 if TWICE else 1)).to(tl.pointer_type(tl.float32)) + at
    values = tl.load(x) + 1
    tl.debug_barrier()
    tl.store(x, values)
    tl.store(y + tl.program_id(0) * BLOCK + at, values)


@pytest.mark.parametrize(
    ("named", "size", "twice", "said"),
    [
        (3, 128, False, None),
        (2, 128, False, r"a load outside of all allocations, .* \(`tensors` of on_machine: what memory points to\)"),
        (3, 120, False, "a load outside of all allocations"),
        (3, 128, True, r"tensors\[.\](, which program .* writes| that another program has loaded plainly)"),
    ],
)
def test_pointers_in_memory(named, size, twice, said):
    """Catches pointers of the host taken for addresses, bounds and races of tensors that are reached by them alone."""
    for seed in range(5):
        x, y = [torch.randn(128) for _ in range(3)], torch.zeros(3, 128)
        expected = torch.stack(x) + 1
        cut = [tensor[:size].clone() for tensor in x]
        table = torch.tensor([tensor.data_ptr() for tensor in cut])
        fault = contextlib.nullcontext() if said is None else pytest.raises(Fault, match=said)
        with fault, on_machine(90, seed=seed, tensors=cut[:named]):
            gathered_kernel[(3,)](table, y, 128, twice)
            assert torch.equal(y, expected) and torch.equal(torch.stack(cut), expected)


@triton.jit
def over_itself_kernel(a, b, M, K: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """The first M rows of a @ b over those of a."""
    rows, columns, k = tl.arange(0, 64), tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.zeros((64, N), tl.float32)
    for at in range(0, K, BLOCK):
        x = tl.load(a + rows[:, None] * K + at + k[None, :], mask=rows[:, None] < M, other=0.0)
        total = tl.dot(x, tl.load(b + (at + k)[:, None] * N + columns[None, :]), total)
    tl.debug_barrier()
    tl.store(a + rows[:, None] * K + columns[None, :], total.to(a.dtype.element_ty), mask=rows[:, None] < M)


@pytest.mark.parametrize("rows", [64, 8])
def test_copies_of_masked_rows(rows):
    """Catches an error at warps whose asynchronous copies all read nothing."""
    a, b = torch.randn(64, 128, dtype=torch.float16), torch.randn(128, 32, dtype=torch.float16)
    expected = (a.float() @ b.float())[:rows]
    with on_machine(80):
        over_itself_kernel[(1,)](a, b, rows, 128, 32, 32, num_warps=4, num_stages=3)
    torch.testing.assert_close(a[:rows, :32].float(), expected, atol=0.05, rtol=2e-3)


@triton.jit
def merged(mean1, squares1, count1, mean2, squares2, count2):
    """Welford's step for two parts."""
    count, apart = count1 + count2, mean2 - mean1
    return mean1 + apart * (count2 / count), squares1 + squares2 + apart * apart * count1 * (count2 / count), count


@triton.jit
def variances_kernel(x, y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Means and variances of rows by a reduction of three tensors, whose result depends on the order."""
    rows = tl.arange(0, ROWS)
    values = tl.load(x + rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    parts = values, tl.zeros_like(values), tl.full((ROWS, COLUMNS), 1.0, tl.float32)
    mean, squares, count = tl.reduce(parts, 1, merged)
    tl.store(y + rows, mean)
    tl.store(y + ROWS + rows, squares / count)


@pytest.mark.parametrize("warps", [1, 4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 512), (2, 256), (16, 128), (64, 4)])
def test_a_reduction_whose_lanes_differ_in_rounding(rows, columns, warps):
    """Catches a false alarm at lanes, and warps, that store one number to one place, each rounded in its own order."""
    x, y = torch.randn(rows, columns) + 0.5, torch.zeros(2, rows)
    with on_machine(90, seed=warps):
        variances_kernel[(1,)](x, y, rows, columns, num_warps=warps)
    torch.testing.assert_close(y, torch.stack([x.mean(1), x.var(1, correction=0)]), atol=1e-5, rtol=1e-4)


@triton.jit
def as_type_kernel(x, y, SIZE: tl.constexpr):
    """x in the type of y."""
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@triton.jit
def turned_kernel(x, y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y = x^T."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tl.store(y + columns[:, None] * ROWS + rows[None, :], tl.trans(tl.load(x + rows[:, None] * COLUMNS + columns)))


@triton.jit
def ordinary_kernel(x, y, SIZE: tl.constexpr):
    """Sorted, clamped, summed up, and the rest of what Triton has instructions of its own for."""
    at = tl.arange(0, SIZE)
    values = tl.load(x + at)
    tl.store(y + at, tl.sort(values))
    tl.store(y + SIZE + at, tl.maximum(tl.minimum(values + values, 3), -3))
    tl.store(y + 2 * SIZE + at, tl.cumsum(values, 0).to(values.dtype))
    tl.store(y + 3 * SIZE + at, tl.full((SIZE,), 0, values.dtype) + tl.max(values, 0))


@triton.jit
def clamped_kernel(x, y, SIZE: tl.constexpr):
    """Between -1 and 1."""
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.clamp(tl.load(x + at), -1.0, 1.0))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bytes_that_nothing_wrote_and_that_are_dropped(arch):
    """Catches false alarms at what Triton leaves of words that it does not fill."""
    x, y = torch.randint(-128, 128, (32, 64), dtype=torch.int8), torch.zeros(64, 32, dtype=torch.int8)
    expected, fp8 = torch.randn(256).to(torch.float8_e5m2), torch.zeros(256, dtype=torch.float8_e5m2)
    with on_machine(arch, seed=1):
        turned_kernel[(1,)](x, y, 32, 64)
        as_type_kernel[(1,)](expected.half() * 1.03, fp8, 256)
    assert torch.equal(y, x.T)
    assert torch.equal(fp8.float(), expected.float())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.float32, torch.float16])
def test_ordinary_operations(dtype, arch):
    """Catches narrow integers that lose their sign, pairs of them, and scans and sorts over warps."""
    x, y = torch.randint(-9, 9, (256,)).to(dtype), torch.zeros(4, 256, dtype=dtype)
    with on_machine(arch, seed=2):
        ordinary_kernel[(1,)](x, y, 256)
        if dtype.is_floating_point:
            clamped = torch.zeros_like(x)
            clamped_kernel[(1,)](x / 8, clamped, 256)
            assert torch.equal(clamped, (x / 8).clamp(-1, 1))
    expected = x.sort()[0], (x + x).clamp(-3, 3), x.long().cumsum(0).to(dtype), x.max().expand(256)
    assert torch.equal(y, torch.stack(expected))


@triton.jit
def waves_kernel(x, sines, cosines, COUNT: tl.constexpr):
    """sin and cos of x."""
    at = tl.arange(0, COUNT)
    values = tl.load(x + at)
    tl.store(sines + at, tl.sin(values))
    tl.store(cosines + at, tl.cos(values))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sines_and_cosines(arch):
    """Catches local memory, carries and constants of the module, by which large numbers are reduced: of some lanes."""
    x = torch.randn(256) * 2.0 ** torch.randint(-20, 120, (256,))
    x[:4] = torch.tensor([0.0, 105615.0, float("inf"), float("nan")])
    sines, cosines = torch.zeros(256), torch.zeros(256)
    with on_machine(arch, seed=6):
        waves_kernel[(1,)](x, sines, cosines, 256)
    for found, function in ((sines, torch.sin), (cosines, torch.cos)):
        torch.testing.assert_close(found, function(x.double()).float(), atol=3e-7, rtol=3e-7, equal_nan=True)


@triton.jit
def phases_kernel(x, count, P, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """All programs sum all rows of x, then each writes its own, with a barrier of all programs behind either."""
    program, at = tl.program_id(0), tl.arange(0, BLOCK)
    for step in range(STEPS):
        total = tl.zeros((BLOCK,), tl.float32)
        for p in range(P):
            total += tl.load(x + p * BLOCK + at)
        for phase in range(2):
            tl.debug_barrier()
            tl.atomic_add(count, 1)
            while tl.atomic_add(count, 0, sem="acquire") < P * (2 * step + phase + 1):
                pass
            tl.debug_barrier()
            if phase == 0:
                tl.store(x + program * BLOCK + at, total / P)


@pytest.mark.parametrize("arch", [80, 90])
def test_phases_of_all_programs(arch):
    """Catches false alarms where all programs load plainly what each of them wrote before a barrier of all of them."""
    x, count = torch.randn(5, 128), torch.zeros(1, dtype=torch.int32)
    expected = x.mean(0).expand(5, 128)
    with on_machine(arch, seed=8):
        phases_kernel[(5,)](x, count, 5, 2, 128)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sums_behind_a_lock(arch):
    """Catches false alarms, and lost sums, where programs hand plain data on by a lock that acquires and releases."""
    x, total, count, lock = (
        torch.randn(6, 128),
        torch.zeros(128),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
    )
    for seed in range(3):
        for tensor in (total, count, lock):
            tensor.zero_()
        with on_machine(arch, seed=seed):
            locked_sum_kernel[(6,)](x, total, count, lock, 128)
        assert count.item() == 6
        torch.testing.assert_close(total, x.sum(0))
