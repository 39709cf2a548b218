"""The backward loop over time, for every cell: the steps of forward.py in the opposite order, in one persistent launch.

    d_y       [R, N, H]      gradient of the outputs, or None
    d_h_n     [B, N, H]      gradient of the final state, or None
    d_carry_n [B, N, HS]     gradient of the final carry (LSTM), float32, or None
    weight    [N, HS, G, HS] recurrent weight by unit: weight[n, u, slot, k] = d (sum of slot of unit k) / d h_u; zeros
                             past H
    gates     [R, N, G*H]    saved by the forward, or None (RNN)
    aux       [R, N, HS]     LSTM: c; GRU: q; RNN: y
    history   [R, N, HS]     LSTM: c; GRU: y: its values one step before the present one are `previous`; or None (RNN)
    history_0 [B, N, HS]     LSTM: c0; GRU: h0; in the type of `history`, or None
    d_gates   [B+R+B, N, E, HS]  as 32-bit words: the first B rows hold zeros, the R rows after them are unwritten and
                             become the gradients of the gate sums, E slots a unit (cells.py)
    d_carry_0 [B, N, HS]     gradient of the first carry, float32: LSTM d c0; GRU the direct part of d h0; or None
    status    [1]            int32: becomes `launch` when a wait came to its limit
    lengths, offsets, resets as in forward.py

T, B, R, N, G, H, HS, UB, NB, S and the grid are those of forward.py. ORDER says in which order the slots are awaited
(`await_and_multiply`): a failed poll of one is cheaper than one of all, and fewer tiles are held at a time. What does
not depend on the neighbours is computed before the wait; between await and publish stand the product, one exchange
through shared memory and a few multiplications.
"""

import triton
import triton.language as tl

from .exchange import poll, poll_again, publishable, until_written
from .forward import as_float, load_gates, zero_where
from .tiles import (
    chunk_columns,
    chunk_rows,
    chunk_values,
    chunk_words,
    operand,
    over_warps,
    resident_weights,
    state_operand,
    streamed_chunk,
    to_tf32,
    two_ways,
)


@triton.jit
def hold_weights(
    weight, unit, G: tl.constexpr, HS: tl.constexpr, UB: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    REGISTERS: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """The weights of UB units from `unit` on, slot by slot -> operands held on the chip, and pointers to chunk 0 for
    the rest.
    """
    W, rest = (), ()
    plain, shared = two_ways(UB)
    for g in tl.static_range(G):
        if ALONE:
            u, k = tl.arange(0, UB)[:, None], tl.arange(0, UB)[None, :]
            w = tl.load(weight + (u * G + g) * HS + k, mask=(u < HS) & (k < HS), other=0.0)
            W = W + (to_tf32(w) if PRECISION == "tf32" else w,)
        else:
            rows = tl.minimum(unit + plain, HS - 1), tl.minimum(unit + shared, HS - 1)
            W = W + resident_weights(
                weight + g * HS, rows, G * HS, REGISTERS + SHARED, REGISTERS, S, UB, K, HS, PRECISION
            )
            rest = rest + (weight + g * HS + rows[0] * (G * HS) + chunk_columns(S, K),)
    return W, rest


@triton.jit
def product(
    acc, W, rest, words, p, inside, one, FIRST: tl.constexpr, SLOT: tl.constexpr, CHUNKS: tl.constexpr,
    HELD: tl.constexpr, HS: tl.constexpr, UB: tl.constexpr, NB: tl.constexpr, S: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to acc, two partial sums [S, UB, NB], the weights of the slots from FIRST on times their polled gradients.

    Two sums: one chain of products alone would be bound by the latency of a matrix instruction.
    """
    K: tl.constexpr = chunk_values(DTYPE)
    even, odd = acc
    for j in tl.static_range(len(words)):
        if j % CHUNKS < HELD:
            w = W[(FIRST + j // CHUNKS) * HELD + j % CHUNKS]
            d = state_operand(words[j], S, NB, DTYPE, PRECISION)
            if j % 2 == 0:
                even = tl.dot(w, d, even, input_precision=PRECISION)
            else:
                odd = tl.dot(w, d, odd, input_precision=PRECISION)
    if HELD < CHUNKS:  # as in forward.hidden_part
        for i in range(HELD, CHUNKS, one):
            for slot in tl.static_range(len(words) // CHUNKS):
                d = state_operand(
                    poll_again(p + slot * SLOT, inside, i, CHUNKS, S * chunk_words()), S, NB, DTYPE, PRECISION
                )
                w = operand(streamed_chunk(rest[FIRST + slot], i, S, K, HS, PRECISION), S, UB, K)
                if slot % 2 == 0:
                    even = tl.dot(w, d, even, input_precision=PRECISION)
                else:
                    odd = tl.dot(w, d, odd, input_precision=PRECISION)
    return even, odd


@triton.jit
def await_and_multiply(
    W, rest, p, inside, one, limit, G: tl.constexpr, ORDER: tl.constexpr, SLOT: tl.constexpr, CHUNKS: tl.constexpr,
    HELD: tl.constexpr, HS: tl.constexpr, UB: tl.constexpr, NB: tl.constexpr, S: tl.constexpr, DTYPE: tl.constexpr,
    BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient [NB, UB] of h through the later step's gate sums, awaited in the ORDER given -> it, 1 if a wait gave
    up.
    """
    STEP: tl.constexpr = S * chunk_words()
    # 0: together; 1: one by one, the next on its way meanwhile; 2: the first, then the others; 3: one by one, none on
    # its way
    GROUPS: tl.constexpr = 1 if ORDER == 0 else 2 if ORDER == 2 else G
    zero, late = tl.zeros((S, UB, NB), tl.float32), 0
    acc = zero, zero
    HEAD: tl.constexpr = G if ORDER == 0 else 1  # slots of the first group, and of each later one
    TAIL: tl.constexpr = G - 1 if ORDER == 2 else 1
    words = poll(p, inside, HEAD, SLOT, CHUNKS, STEP)
    for k in tl.static_range(GROUPS):
        if ORDER == 1 and k + 1 < GROUPS:  # the next slot is on its way while this one is tested
            following = poll(p + (k + 1) * SLOT, inside, TAIL, SLOT, CHUNKS, STEP)
        words, gave_up = until_written(
            words, p + k * SLOT, inside, HEAD if k == 0 else TAIL, SLOT, CHUNKS, STEP, HELD == CHUNKS, BITS, limit
        )  # fmt: skip
        late |= gave_up
        if ORDER == 2 and k + 1 < GROUPS:
            following = poll(p + (k + 1) * SLOT, inside, TAIL, SLOT, CHUNKS, STEP)
        acc = product(
            acc, W, rest, words, p + k * SLOT, inside, one, k, SLOT, CHUNKS, HELD, HS, UB, NB, S, DTYPE, PRECISION
        )
        if ORDER == 3 and k + 1 < GROUPS:
            following = poll(p + (k + 1) * SLOT, inside, TAIL, SLOT, CHUNKS, STEP)
        if k + 1 < GROUPS:
            words = following
    return over_warps((acc[0] + acc[1]).reshape(S, 1, UB, NB), S, 1, UB, NB)[0], late


@triton.jit
def multiply_alone(W, slots, G: tl.constexpr, PRECISION: tl.constexpr):
    """The same where one program holds all units: slots are G tiles [UB, NB] in registers."""
    for g in tl.static_range(G):
        d = to_tf32(slots[g]) if PRECISION == "tf32" else slots[g]
        if g == 0:
            acc = tl.dot(W[0], d, input_precision=PRECISION)
        else:
            acc = tl.dot(W[g], d, acc, input_precision=PRECISION)
    return acc


@triton.jit
def load_or_zero(p, offsets, exists, SHAPE: tl.constexpr):
    """A float32 tile of what p points to; zeros where p is None."""
    if p is None:
        return tl.zeros(SHAPE, tl.float32)
    else:
        return tl.load(p + offsets, mask=exists, other=None if exists is None else 0.0).to(tl.float32)


@triton.jit
def load_step(
    d_y, gates, aux, before, initial, own_y, own_gates, own, present, exists, t, length, more, t_before,
    G: tl.constexpr, H: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """What the forward left of step t: gradient of the output, gates, aux (`present` where it is None), previous.

    previous comes from `before`, the step t_before, or from `initial` where there is no such step (`more` is false)
    or where it lies outside the row's sequence. exists: units, None for all; length: of each row, None where all have
    all steps.
    """
    there = exists if length is None else exists & (t < length)
    saved = () if gates is None else load_gates(gates + own_gates, there, G, H)
    aux_tile = present if aux is None else load_or_zero(aux, own, there, SHAPE)
    if before is None:
        previous = tl.zeros(SHAPE, tl.float32)
    else:
        source = tl.where(more if length is None else more & (t_before < length), before, initial)
        previous = load_or_zero(source, own, exists, SHAPE)
    return load_or_zero(d_y, own_y, there, SHAPE), saved, aux_tile, previous


@triton.jit(do_not_specialize=["T", "B", "begin", "limit", "launch"])
def backward(
    d_y, d_h_n, d_carry_n, weight, gates, aux, history, history_0, d_gates, d_carry_0, status, lengths, offsets,
    resets, T, B, begin, limit, launch, FACTORS: tl.constexpr, CELL: tl.constexpr, G: tl.constexpr, E: tl.constexpr,
    AUX_IS_HISTORY: tl.constexpr, H: tl.constexpr, HS: tl.constexpr, N: tl.constexpr, REVERSED: tl.constexpr,
    UB: tl.constexpr, NB: tl.constexpr, SLICES: tl.constexpr, S: tl.constexpr, REGISTERS: tl.constexpr,
    SHARED: tl.constexpr, ORDER: tl.constexpr, DTYPE: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
    ALONE: tl.constexpr,
):  # fmt: skip
    """All steps of one batch slice and set, for one unit slice: see the top of this file."""
    K: tl.constexpr = chunk_values(DTYPE)
    STEP: tl.constexpr = S * chunk_words()  # words from chunk to chunk
    CHUNKS: tl.constexpr = (HS + S * K - 1) // (S * K)
    ROW: tl.constexpr = N * HS
    SLOT: tl.constexpr = HS * DTYPE.primitive_bitwidth // 32  # words of a slot
    SHAPE: tl.constexpr = (UB, NB) if ALONE else (NB, UB)
    n = tl.program_id(2)
    reverse = (n & 1) == 1 if REVERSED == 2 else REVERSED == 1
    first = begin.to(tl.int64) + tl.program_id(1) * (SLICES * NB)
    last = (B - 1 - first).to(tl.int32)
    W, rest = hold_weights(
        weight + n * (HS * G * HS), tl.program_id(0) * UB, G, HS, UB, S, K, REGISTERS, SHARED, PRECISION, ALONE
    )
    units = tl.program_id(0) * UB + (tl.arange(0, UB)[:, None] if ALONE else tl.arange(0, UB)[None, :])
    exists = None if H % UB == 0 and lengths is None else units < H
    words = chunk_columns(S, chunk_words())
    inside = None if HS % (S * K) == 0 else words < SLOT - (CHUNKS - 1) * STEP

    steps = T if offsets is None else tl.load(lengths + first)
    ahead = tl.where(reverse, 1, -1)  # of the backward, against the direction of the set
    t = tl.where(reverse, 0, steps - 1)
    start = (t.to(tl.int64) * B if offsets is None else tl.load(offsets + t)) + first
    step = ahead * B.to(tl.int64)
    zero = d_gates + first * (N * E * SLOT)
    read = zero
    write = d_gates.to(tl.pointer_type(BITS)) + (start + B) * (ROW * E)
    own, own_y, own_gates, own_slots, tile, mine, dh, dcarry, state = (), (), (), (), (), (), (), (), ()
    row, length, tile_length = (), (), ()
    for j in tl.static_range(SLICES):
        b = j * NB + (tl.arange(0, NB)[None, :] if ALONE else tl.arange(0, NB)[:, None])
        mine = mine + ((b <= last) & (units < HS),)
        b = tl.minimum(b, last)
        own, own_y = own + ((b * N + n) * HS + units,), own_y + ((b * N + n) * H + units,)
        own_gates, own_slots = (
            own_gates + ((b * N + n) * (G * H) + units,),
            own_slots + ((b * N + n) * (E * HS) + units,),
        )
        tile_row = tl.minimum(j * NB + chunk_rows(NB), last)
        tile = tile + ((tile_row * N + n) * (E * SLOT) + words,)
        row = row + (first + b,)
        if lengths is not None:
            length = length + (tl.load(lengths + row[j]),)
            tile_length = tile_length + (tl.load(lengths + first + tile_row),)
        dh = dh + (load_or_zero(d_h_n, first * (N * H) + own_y[j], exists, SHAPE),)
        dcarry = dcarry + (load_or_zero(d_carry_n, first * ROW + own[j], exists, SHAPE),)
        zeros = ()
        for _ in tl.static_range(E):
            zeros = zeros + (tl.zeros(SHAPE, DTYPE),)
        state = state + (zeros,)
    first_history = None if history_0 is None else history_0 + first * ROW
    d_y = None if d_y is None else d_y + start * (N * H)
    gates = None if gates is None else gates + start * (N * G * H)
    aux += start * ROW
    before = history
    if history is not None:
        if offsets is None:
            before += (start + step) * ROW
        elif steps > 1:
            before += (tl.load(offsets + t + ahead) + first) * ROW
    saved = ()
    for j in tl.static_range(SLICES):
        saved_now = load_step(
            d_y, gates, aux, before, first_history, own_y[j], own_gates[j], own[j], None, exists, t,
            None if lengths is None else length[j], steps > 1, t + ahead, G, H, SHAPE,
        )  # fmt: skip
        saved = saved + (saved_now,)

    late, lost = 0, 0.0
    one = tl.where(B > 0, 1, 2)  # as in forward.py
    for s in range(steps):
        t_next = t + tl.where(s + 1 < steps, ahead, 0)
        if offsets is not None:
            step = tl.load(offsets + t_next) - tl.load(offsets + t)
        more = tl.where(s + 1 < steps, step, 0)
        if d_y is not None:
            d_y += more * (N * H)
        if gates is not None:
            gates += more * (N * G * H)
        aux += more * ROW
        if history is not None:
            if offsets is None:
                before += step * ROW
            else:
                before = history + (tl.load(offsets + tl.where(s + 2 < steps, t_next + ahead, t)) + first) * ROW
        saved_next, dh_next, dcarry_next, state_next = (), (), (), ()
        for j in tl.static_range(SLICES):
            dy, saved_gates, present, previous = saved[j]
            following = load_step(
                d_y, gates, None if AUX_IS_HISTORY else aux, before, first_history, own_y[j], own_gates[j], own[j],
                previous, exists, t_next, None if lengths is None else length[j], s + 2 < steps, t_next + ahead,
                G, H, SHAPE,
            )  # fmt: skip
            saved_next = saved_next + (following,)
            if resets is not None:
                moment = resets + t.to(tl.int64) * B + row[j]
                reset = tl.load(moment) != 0
                reset_later = tl.load(moment - ahead * B.to(tl.int64), mask=(row[j] >= 0) & (s > 0), other=0) != 0
                previous = tl.where(reset, 0.0, previous)
            factors = FACTORS(as_float(saved_gates), present, previous)
            known = dh[j] + dy
            if ALONE:
                later = multiply_alone(W, state[j], G, PRECISION)
            else:
                source = read + tile[j]
                if lengths is not None:  # nothing comes back from after the sequence
                    source = tl.where((s > 0) & (t - ahead < tile_length[j]), source, zero + tile[j])
                later, gave_up = await_and_multiply(
                    W, rest, source, inside, one, limit, G, ORDER, SLOT, CHUNKS, REGISTERS + SHARED, HS, UB, NB, S,
                    DTYPE, BITS, PRECISION,
                )  # fmt: skip
                if gave_up != 0:  # wait no more for the rest of the launch
                    limit = 0
                    late = 1
                    lost = float("nan")
                if PRECISION == "tf32":  # where an unwritten word, a NaN in all other types, rounds to zero
                    later += lost
            if resets is not None:
                later = tl.where(reset_later, 0.0, later)
            slots, kept = CELL(factors, known + later, dcarry[j])
            held = tl.zeros(SHAPE, tl.float32)
            if resets is not None:
                kept = tl.where(reset, 0.0, kept)
            here = mine[j]
            if lengths is not None:
                active = t < length[j]
                here = mine[j] & active
                slots, kept, held = (
                    zero_where(t >= length[j], slots),
                    tl.where(active, kept, dcarry[j]),
                    tl.where(active, 0.0, dh[j]),
                )
            published = ()
            for e in tl.static_range(E):
                slot = slots[e] if H == HS else tl.where(exists, slots[e], 0.0)  # the neighbours read padded units too
                place = write + own_slots[j] + e * HS
                tl.store(
                    place,
                    publishable(slot, DTYPE, BITS),
                    mask=mine[j] if offsets is None else here,
                    cache_modifier=".cg",
                )
                published = published + (slot.to(DTYPE),)
            dcarry_next, dh_next, state_next = dcarry_next + (kept,), dh_next + (held,), state_next + (published,)
        saved, dh, dcarry = saved_next, dh_next, dcarry_next
        if ALONE:
            state = state_next
        read = write.to(tl.pointer_type(tl.int32))
        write += step * (ROW * E)
        t = t_next
    if d_carry_0 is not None:
        for j in tl.static_range(SLICES):
            tl.store(d_carry_0 + first * ROW + own[j], dcarry[j], mask=mine[j])
    if late != 0:
        tl.store(status, launch)
