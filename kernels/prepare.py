"""What stands in the buffers before a launch of the recurrence: one kernel for all of it, forward and backward each.

The work is a row of small jobs, each of so many programs; a program takes its job from its number. T steps, B rows of
the batch, R rows of all steps, N weight sets, G gates, H hidden units, HS their padded number, E slots.
"""

import triton
import triton.language as tl

from .tiles import to_tf32

BLOCK = 4096  # elements, or words, of a program
TILE = 64  # rows and columns of a tile of weights that is transposed


@triton.jit
def elements(block, BLOCK: tl.constexpr):
    """The elements of a block, int64."""
    return block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def of_set(p_0, p_1, n):
    """Of the tensors of two sets, or of one (p_1 None), that of set n."""
    return p_0 if p_1 is None else tl.where(n == 0, p_0, p_1)


@triton.jit
def fill(p, block, count, VALUE: tl.constexpr, BLOCK: tl.constexpr):
    """Words of 32 bits."""
    i = elements(block, BLOCK)
    tl.store(p + i, tl.full((BLOCK,), VALUE, tl.int32), mask=i < count)


@triton.jit
def state_by_rows(
    state, i, B, COUNT: tl.constexpr, PLANES: tl.constexpr, H: tl.constexpr, HS: tl.constexpr, N: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Elements i of COUNT states side by side [N, B, COUNT*H], None for zeros, laid out as [B, N, PLANES, HS]; zeros
    past them.
    """
    row, plane, unit = i // (PLANES * HS), i // HS % PLANES, i % HS
    if state is None:
        x = tl.zeros(i.shape, DTYPE)
    else:
        place = ((row % N) * B + row // N) * (COUNT * H) + plane * H + unit
        exists = (row < B.to(tl.int64) * N) & (plane < COUNT) & (unit < H)
        x = tl.load(state + place, mask=exists, other=0.0).to(DTYPE)
    return x


@triton.jit
def put_initial_state(
    y, h0, block, R, B, H: tl.constexpr, HS: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """h0 into the first and the last B rows of y [B+R+B, N, HS]; a NaN of the user's could be all ones."""
    i, y = elements(block, BLOCK), y.to(tl.pointer_type(DTYPE))
    x = state_by_rows(h0, i, B, 1, 1, H, HS, N, DTYPE)
    x = tl.where(x == x, x, float("nan"))
    tl.store(y + i, x, mask=i < B.to(tl.int64) * (N * HS))
    tl.store(y + (B.to(tl.int64) + R) * (N * HS) + i, x, mask=i < B.to(tl.int64) * (N * HS))


@triton.jit
def fold_biases(
    ih_0, ih_1, hh_0, hh_1, bias, bias_hn, block, G: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    APART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """bias [N, G*H]: both biases of a gate in one; but of the last APART gates the input's, and the hidden ones in
    bias_hn [N, APART*H].
    """
    LAST: tl.constexpr = (G - APART) * H
    i = elements(block, BLOCK)
    n, row = i // (G * H), i % (G * H)
    ih = tl.load(of_set(ih_0, ih_1, n) + row, mask=i < N * G * H, other=0.0)
    hh = tl.load(of_set(hh_0, hh_1, n) + row, mask=i < N * G * H, other=0.0)
    both = (ih.to(tl.float32) + hh.to(tl.float32)).to(ih.dtype)
    tl.store(bias + i, tl.where(row < LAST, both, ih), mask=i < N * G * H)
    if APART > 0:
        tl.store(bias_hn + n * (APART * H) + row - LAST, hh, mask=(i < N * G * H) & (row >= LAST))


@triton.jit
def side_by_side(p_0, p_1, out, block, rows, width, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """The matrices [rows, width] of all sets one after another; their rows padded with zeros to PADDED, unless None."""
    i = elements(block, BLOCK)
    if PADDED is None:
        count = rows * width.to(tl.int64)
        n = (i >= count).to(tl.int32)
        inside = i < count * (1 if p_1 is None else 2)
        tl.store(out + i, tl.load(of_set(p_0, p_1, n) + i - n * count, mask=inside), mask=inside)
    else:
        row, column = i // PADDED, i % PADDED
        n = row // rows
        source = of_set(p_0, p_1, n) + (row - n * rows) * width + column
        inside = row < rows * (1 if p_1 is None else 2)
        tl.store(out + i, tl.load(source, mask=inside & (column < width), other=0.0), mask=inside)


@triton.jit
def transpose(
    p_0, p_1, out, tile, far, G: tl.constexpr, H: tl.constexpr, HS: tl.constexpr, ROTATION: tl.constexpr,
    FURTHER: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of weights [G*H, H] of some set, to where it stands in `out` [N, HS, G, HS] (backward.py), `far` rows of
    it from set to set; zeros past H, and rounded, where products are in tf32: once, and not at each step that reads
    them again. The slot of a gate: rotated by ROTATION, in the second set by FURTHER.
    """
    SIDE: tl.constexpr = (HS + TILE - 1) // TILE
    k = (tile % SIDE) * TILE + tl.arange(0, TILE)[:, None]
    unit = (tile // SIDE % SIDE) * TILE + tl.arange(0, TILE)[None, :]
    slot, n = tile // (SIDE * SIDE) % G, tile // (SIDE * SIDE * G)
    rotation = ROTATION if p_1 is None else tl.where(n == 0, ROTATION, FURTHER)
    row = ((slot + rotation) % G).to(tl.int64) * H + k
    w = tl.load(of_set(p_0, p_1, n) + row * H + unit, mask=(k < H) & (unit < H), other=0.0)
    if PRECISION == "tf32":
        w = to_tf32(w)
    k, unit = k.reshape(1, TILE), unit.reshape(TILE, 1)
    place = ((n.to(tl.int64) * far + unit) * G + slot) * HS + k
    tl.store(out + place, tl.trans(w), mask=(k < HS) & (unit < HS))


@triton.jit(
    do_not_specialize=["R", "B", "I", "fills", "states", "sums", "weights"],
    do_not_specialize_on_alignment=["h0", "bias_ih_0", "bias_ih_1", "bias_hh_0", "bias_hh_1", "bias", "bias_hn"],
)
def prepare_forward(
    y, h0, bias_ih_0, bias_ih_1, bias_hh_0, bias_hh_1, bias, bias_hn, weight_hh_0, weight_hh_1, weight_hh, weight_ih_0,
    weight_ih_1, weight_ih, R, B, I, fills, states, sums, weights, G: tl.constexpr, H: tl.constexpr, HS: tl.constexpr,
    N: tl.constexpr, APART: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """y [B+R+B, N, HS], words: h0 at both ends, unwritten between; biases folded; weights of two sets side by side,
    padded.

    fills, states, sums, weights: programs of the jobs, one after another; the rest copies weight_ih, rows padded to
    PADDED. A tensor of each set, `_0` and `_1`; None where there is no such job, or no such set.
    """
    job = tl.program_id(0)
    if job < fills:
        WORDS: tl.constexpr = HS * DTYPE.primitive_bitwidth // 32
        fill(y + B.to(tl.int64) * (N * WORDS), job, R.to(tl.int64) * (N * WORDS), -1, BLOCK)
    elif job < fills + states:
        put_initial_state(y, h0, job - fills, R, B, H, HS, N, DTYPE, BLOCK)
    elif job < fills + states + sums:
        if bias is not None:
            block = job - fills - states
            fold_biases(bias_ih_0, bias_ih_1, bias_hh_0, bias_hh_1, bias, bias_hn, block, G, H, N, APART, BLOCK)
    elif job < fills + states + sums + weights:
        if weight_hh is not None:
            side_by_side(weight_hh_0, weight_hh_1, weight_hh, job - fills - states - sums, G * H, H, HS, BLOCK)
    else:
        if weight_ih is not None:
            block = job - fills - states - sums - weights
            side_by_side(weight_ih_0, weight_ih_1, weight_ih, block, G * H, I, PADDED, BLOCK)


@triton.jit(do_not_specialize=["R", "B", "fills", "zeros", "states", "far"], do_not_specialize_on_alignment=["state_0"])
def prepare_backward(
    d_gates, state_0, history_0, weight_hh_0, weight_hh_1, weight, R, B, fills, zeros, states, far, G: tl.constexpr,
    E: tl.constexpr, COUNT: tl.constexpr, PLANES: tl.constexpr, H: tl.constexpr, HS: tl.constexpr, N: tl.constexpr,
    ROTATION: tl.constexpr, FURTHER: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d_gates [B+R+B, N, E, HS], words: zeros in the first B rows, the R after them unwritten; history_0 [B, N,
    PLANES*HS] from the states state_0 [N, B, COUNT*H], None for zeros; the weights transposed, as `transpose` says. (Of
    a layer of a stack both weights are two sets of them, and all else is one.)

    fills, zeros, states: programs of the jobs, one after another; the rest transposes.
    """
    job = tl.program_id(0)
    WORDS: tl.constexpr = N * E * HS * DTYPE.primitive_bitwidth // 32  # of a row
    if job < fills:
        fill(d_gates + B.to(tl.int64) * WORDS, job, R.to(tl.int64) * WORDS, -1, BLOCK)
    elif job < fills + zeros:
        fill(d_gates, job - fills, B.to(tl.int64) * WORDS, 0, BLOCK)
    elif job < fills + zeros + states:
        if history_0 is not None:
            i = elements(job - fills - zeros, BLOCK)
            x = state_by_rows(state_0, i, B, COUNT, PLANES, H, HS, N, history_0.dtype.element_ty)
            tl.store(history_0 + i, x, mask=i < B.to(tl.int64) * (N * PLANES * HS))
    else:
        tile = job - fills - zeros - states
        transpose(weight_hh_0, weight_hh_1, weight, tile, far, G, H, HS, ROTATION, FURTHER, TILE, PRECISION)
