"""What a forward saves for its backward, made again from the gate sums, the outputs and the states: lean memory.

A step's equations for all rows at once, no loop over time. R rows of all steps, N weight sets, B rows of the batch, G
gates, A of them apart, K values carried, P parameters, H hidden units, HS their padded number.
"""

import triton
import triton.language as tl


@triton.jit
def carry_before(
    history, state_0, place, n, unit, exists, B, K: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr,
    HS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The K values that a unit carried before a step. place: the row of R where they lie in `history` [R, N, WIDTH]; or
    -1 - b where the row b of the batch has its first step, and they stand in state_0 [N, B, K*H], None for zeros; or
    less than -B where the row starts anew.
    """
    x = ()
    for k in tl.static_range(K):
        there = history + (place * N + n) * WIDTH + k * HS + unit
        value = tl.load(there, mask=exists & (place >= 0), other=0.0).to(tl.float32)
        if state_0 is not None:
            first = state_0 + (n.to(tl.int64) * B - 1 - place) * (K * H) + k * H + unit
            begins = exists & (place < 0) & (place >= -B)
            value += tl.load(first, mask=begins, other=0.0).to(tl.float32)
        x = x + (value,)
    return x


@triton.jit(do_not_specialize=["R", "B"], do_not_specialize_on_alignment=["state_0"])
def again(
    sums, gates, apart, parameters, history, state_0, places, aux, R, B, CELL: tl.constexpr, G: tl.constexpr,
    A: tl.constexpr, K: tl.constexpr, P: tl.constexpr, SAVES: tl.constexpr, PLANES: tl.constexpr, WIDTH: tl.constexpr,
    H: tl.constexpr, HS: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From sums [R, N, G*H], x + r of each gate, but x alone of those apart, the values saved: the first into gates [R,
    N, G*H], which may be sums itself, further ones into the last planes of aux [R, N, PLANES*HS], unless that is None.

    apart [R, N, A*H]: r of the gates apart. parameters [N, P, H]. history: what the carry is read from (K > 0), state_0
    and places int64 [R, N]: see `carry_before`. Each may be None where there is no such thing.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, unit, exists = i // H, i % H, i < R.to(tl.int64) * (N * H)  # row: of R * N
    n = (row % N).to(tl.int32)
    x, r, carry, p = (), (), (), ()
    for g in tl.static_range(G):
        x = x + (tl.load(sums + (row * G + g) * H + unit, mask=exists, other=0.0).to(tl.float32),)
        if g < G - A:
            r = r + (tl.zeros((BLOCK,), tl.float32),)
        else:
            there = apart + (row * A + g - (G - A)) * H + unit
            r = r + (tl.load(there, mask=exists, other=0.0).to(tl.float32),)
    for k in tl.static_range(P):
        p = p + (tl.load(parameters + (n * P + k) * H + unit, mask=exists, other=0.0).to(tl.float32),)
    if K > 0:
        place = tl.load(places + row, mask=exists, other=-1)
        carry = carry_before(history, state_0, place, n, unit, exists, B, K, WIDTH, H, HS, N)
    if P == 0:
        _, _, saved = CELL(x, r, carry)
    else:
        _, _, saved = CELL(x, r, carry, p)
    for s in tl.static_range(SAVES):
        if s < G:
            tl.store(gates + (row * G + s) * H + unit, saved[s].to(DTYPE), mask=exists)
        elif aux is not None:
            plane = PLANES - SAVES + s
            tl.store(aux + (row * PLANES + plane) * HS + unit, saved[s].to(aux.dtype.element_ty), mask=exists)
