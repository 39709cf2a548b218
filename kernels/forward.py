"""The forward loop over time, for every cell: one persistent launch for all T steps.

    x_part  [R, N, G*H]      input part of the gates, biases included; in place, the gates are saved over it
    weight  [N, G*H, HS]     recurrent weight, rows padded with zeros to HS
    bias    [N, H]           hidden bias of the last gate (GRU), or None
    y       [B+R+B, N, HS]   as 32-bit words: the first B rows hold h0 of forward sets, the last B that of reversed
                             ones; the R rows between are unwritten and become the outputs
    carry_0 [B, N, HS]       carry before the first step (LSTM: c0, float32; GRU: h0), or None
    gates   [R, N, G*H]      x_part itself, or None where nothing is saved
    aux     [R, N, HS]       what else the backward needs (LSTM: c, float32; GRU: q), or None
    carry_n [B, N, HS]       carry after the last step, float32, or None
    status  [1]              int32: becomes `launch` when a wait came to its limit
    lengths [B]              int32, steps of each row, or None where all have T
    offsets [T+1]            int64, first row of each step where sequences are packed, longest first; else None
    resets  [T, B]           int8, not zero where the row's state is zero before the step; or None
    h_n     [B, N, HS]       with `lengths`: holds h0, becomes the state at each row's end

T steps, B rows of the batch, R rows of all steps (step t has the rows from t*B on, packed from offsets[t] on), N weight
sets (directions of a layer), G gates, H hidden units, HS their padded number. Grid: unit slices of UB units x batch
slices of SLICES*NB rows x N sets. The programs of one batch slice and set are a group: only they exchange y. ALONE: one
program holds all units; nothing is exchanged, and y is only written.

Rows outside their sequence keep their carry and publish zeros (packed: they have no place to publish). A row whose
neighbour in time lies outside the sequence reads its h0 instead.
"""

import triton
import triton.language as tl

from .exchange import poll, poll_again, publishable, until_written
from .tiles import (
    chunk_columns,
    chunk_rows,
    chunk_values,
    chunk_words,
    operand,
    over_warps,
    resident_weights,
    side_by_side,
    state_operand,
    streamed_chunk,
    to_tf32,
    two_ways,
)


@triton.jit
def load_gates(p, exists, G: tl.constexpr, STRIDE: tl.constexpr):
    """G tiles, STRIDE apart; `exists` masks units past H, None where there are none."""
    x = ()
    for g in tl.static_range(G):
        x = x + (tl.load(p + g * STRIDE, mask=exists, other=None if exists is None else 0.0),)
    return x


@triton.jit
def as_float(tiles):
    """The tiles in float32."""
    x = ()
    for i in tl.static_range(len(tiles)):
        x = x + (tiles[i].to(tl.float32),)
    return x


@triton.jit
def hold_weights(
    weight, unit, G: tl.constexpr, PER: tl.constexpr, H: tl.constexpr, HS: tl.constexpr, UB: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, REGISTERS: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
    ALONE: tl.constexpr,
):  # fmt: skip
    """The weights of UB units from `unit` on. -> operands held on the chip, and pointers to chunk 0 of each part for
    the rest.
    """
    W, rest = (), ()
    if ALONE:
        u, k = tl.arange(0, UB)[:, None], tl.arange(0, UB)[None, :]
        for g in tl.static_range(G):
            w = tl.load(weight + (g * H + u) * HS + k, mask=(u < H) & (k < H), other=0.0)
            W = W + (to_tf32(w) if PRECISION == "tf32" else w,)
    else:
        plain, shared = two_ways(PER * UB)
        for part in tl.static_range((G + PER - 1) // PER):
            rows = (
                tl.minimum(part * PER + plain // UB, G - 1) * H + tl.minimum(unit + plain % UB, H - 1),
                tl.minimum(part * PER + shared // UB, G - 1) * H + tl.minimum(unit + shared % UB, H - 1),
            )
            W = W + resident_weights(weight, rows, HS, REGISTERS + SHARED, REGISTERS, S, PER * UB, K, HS, PRECISION)
            rest = rest + (weight + rows[0] * HS + chunk_columns(S, K),)
    return W, rest


@triton.jit
def hidden_part(
    W, rest, words, p, inside, one, CHUNKS: tl.constexpr, HELD: tl.constexpr, G: tl.constexpr, PER: tl.constexpr,
    HS: tl.constexpr, UB: tl.constexpr, NB: tl.constexpr, S: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The product of the held weights (and of the rest, read again) with the polled state: G or 4 tiles [NB, UB]."""
    PARTS: tl.constexpr = (G + PER - 1) // PER
    K: tl.constexpr = chunk_values(DTYPE)
    parts = ()
    for part in tl.static_range(PARTS):
        acc = tl.zeros((S, PER * UB, NB), tl.float32)
        for i in tl.static_range(HELD):
            acc = tl.dot(
                W[part * HELD + i], state_operand(words[i], S, NB, DTYPE, PRECISION), acc, input_precision=PRECISION
            )
        parts = parts + (acc,)
    # loops at run time that read the state again: unrolled, all their loads rise to the top and the registers spill
    if HELD < CHUNKS:
        sums = ()
        for part in tl.static_range(PARTS):
            acc = parts[part]
            for i in range(HELD, CHUNKS, one):
                h = state_operand(poll_again(p, inside, i, CHUNKS, S * chunk_words()), S, NB, DTYPE, PRECISION)
                w = operand(streamed_chunk(rest[part], i, S, K, HS, PRECISION), S, PER * UB, K)
                acc = tl.dot(w, h, acc, input_precision=PRECISION)
            sums = sums + (acc,)
        parts = sums
    return over_warps(side_by_side(parts, PARTS, S, PER, UB, NB), S, 4 if G > 1 else 1, UB, NB)


@triton.jit
def hidden_part_alone(W, h, G: tl.constexpr, PRECISION: tl.constexpr):
    """The product where one program holds all units and so the whole state h [UB, NB]: G tiles [UB, NB]."""
    h = to_tf32(h) if PRECISION == "tf32" else h
    r = ()
    for g in tl.static_range(G):
        r = r + (tl.dot(W[g], h, input_precision=PRECISION),)
    return r


@triton.jit
def with_bias(r, bias, G: tl.constexpr):
    """r with `bias`, where there is one, added to the last gate."""
    out = ()
    for g in tl.static_range(G):
        out = out + (r[g] + bias if g == G - 1 and bias is not None else r[g],)
    return out


@triton.jit
def with_lost(r, lost):
    """r with `lost`, 0 or NaN, added to the first gate, from where a NaN reaches every result of a step."""
    out = (r[0] + lost,)
    for g in tl.static_range(1, len(r)):
        out = out + (r[g],)
    return out


@triton.jit
def zero_where(mask, tiles):
    """The tiles with zeros where the mask is set."""
    out = ()
    for i in tl.static_range(len(tiles)):
        out = out + (tl.where(mask, 0.0, tiles[i]),)
    return out


@triton.jit(do_not_specialize=["T", "B", "begin", "limit", "launch"])
def forward(
    x_part, weight, bias, y, carry_0, gates, aux, carry_n, status, lengths, offsets, resets, h_n, T, B, begin, limit,
    launch, CELL: tl.constexpr, G: tl.constexpr, PER: tl.constexpr, H: tl.constexpr, HS: tl.constexpr,
    N: tl.constexpr, REVERSED: tl.constexpr, UB: tl.constexpr, NB: tl.constexpr, SLICES: tl.constexpr,
    S: tl.constexpr, REGISTERS: tl.constexpr, SHARED: tl.constexpr, DTYPE: tl.constexpr, BITS: tl.constexpr,
    PRECISION: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """All steps of one batch slice and set, for one unit slice: see the top of this file."""
    K: tl.constexpr = chunk_values(DTYPE)
    STEP: tl.constexpr = S * chunk_words()  # words from chunk to chunk
    CHUNKS: tl.constexpr = (HS + S * K - 1) // (S * K)
    ROW: tl.constexpr = N * HS  # elements of a row of y; WORD_ROW in words
    WORD_ROW: tl.constexpr = ROW * DTYPE.primitive_bitwidth // 32
    n = tl.program_id(2)
    reverse = (n & 1) == 1 if REVERSED == 2 else REVERSED == 1  # 2: odd sets run backwards in time
    first = begin.to(tl.int64) + tl.program_id(1) * (SLICES * NB)
    last = (B - 1 - first).to(tl.int32)
    W, rest = hold_weights(
        weight + n * (G * H * HS), tl.program_id(0) * UB, G, PER, H, HS, UB, S, K, REGISTERS, SHARED, PRECISION, ALONE
    )
    units = tl.program_id(0) * UB + (tl.arange(0, UB)[:, None] if ALONE else tl.arange(0, UB)[None, :])
    exists = None if H % UB == 0 and lengths is None else units < H
    hidden_bias = (
        None
        if bias is None
        else tl.load(bias + n * H + units, mask=exists, other=None if exists is None else 0.0).to(tl.float32)
    )
    words = chunk_columns(S, chunk_words())
    inside = None if HS % (S * K) == 0 else words < WORD_ROW // N - (CHUNKS - 1) * STEP

    steps = T if offsets is None else tl.load(lengths + first)  # packed: rows are sorted, the first is the longest
    ahead = tl.where(reverse, -1, 1)
    t = tl.where(reverse, steps - 1, 0)
    start = (t.to(tl.int64) * B if offsets is None else tl.load(offsets + t)) + first
    step = ahead * B.to(tl.int64)
    ends = T.to(tl.int64) * B if offsets is None else tl.load(offsets + T)
    h0 = y + (first + tl.where(reverse, ends + B, 0)) * WORD_ROW
    read = h0
    write = y.to(tl.pointer_type(BITS)) + (start + B) * ROW
    x_part += start * (N * G * H)
    if gates is not None:
        gates += start * (N * G * H)
    if aux is not None:
        aux += start * ROW
    own, own_gates, tile, mine, carry, x, state, row, length, tile_length = (), (), (), (), (), (), (), (), (), ()
    for j in tl.static_range(SLICES):
        b = j * NB + (tl.arange(0, NB)[None, :] if ALONE else tl.arange(0, NB)[:, None])
        mine = mine + ((b <= last) & (units < HS),)
        b = tl.minimum(b, last)  # a spare row reads the last one: no mask in the loop
        own, own_gates = own + ((b * N + n) * HS + units,), own_gates + ((b * N + n) * (G * H) + units,)
        tile_row = tl.minimum(j * NB + chunk_rows(NB), last)
        tile = tile + ((tile_row * N + n) * (WORD_ROW // N) + words,)
        row = row + (first + b,)
        if lengths is not None:
            length = length + (tl.load(lengths + row[j]),)
            tile_length = tile_length + (tl.load(lengths + first + tile_row),)
        zero = tl.zeros((UB, NB) if ALONE else (NB, UB), tl.float32)
        carry = carry + (
            zero
            if carry_0 is None
            else tl.load(carry_0 + first * ROW + own[j], mask=mine[j], other=0.0).to(tl.float32),
        )
        x = x + (load_gates(x_part + own_gates[j], exists if lengths is None else exists & (t < length[j]), G, H),)
        if ALONE:
            state = state + (tl.load(read.to(tl.pointer_type(DTYPE)) + own[j], mask=mine[j], other=0.0),)

    late, lost = 0, 0.0
    one = tl.where(B > 0, 1, 2)  # 1, but the compiler cannot know it: it unrolls no loop with such a stride
    for s in range(steps):
        t_next = t + tl.where(s + 1 < steps, ahead, 0)
        if offsets is not None:
            step = tl.load(offsets + t_next) - tl.load(offsets + t)
        x_part += tl.where(s + 1 < steps, step, 0) * (N * G * H)
        carry_next, x_next, state_next = (), (), ()
        for j in tl.static_range(SLICES):
            active = None if lengths is None else t < length[j]
            x_next = x_next + (
                load_gates(x_part + own_gates[j], exists if lengths is None else exists & (t_next < length[j]), G, H),
            )
            reset = None if resets is None else tl.load(resets + t.to(tl.int64) * B + row[j]) != 0
            if ALONE:
                r = hidden_part_alone(W, state[j], G, PRECISION)
            else:
                source = read + tile[j]
                if lengths is not None:  # a state of before the sequence is h0
                    source = tl.where((s > 0) & (t - ahead < tile_length[j]), source, h0 + tile[j])
                h_words = poll(source, inside, 1, 0, CHUNKS, STEP)
                h_words, gave_up = until_written(
                    h_words, source, inside, 1, 0, CHUNKS, STEP, REGISTERS + SHARED == CHUNKS, BITS, limit
                )  # fmt: skip
                if gave_up != 0:  # wait no more for the rest of the launch
                    limit = 0
                    late = 1
                    lost = float("nan")
                r = hidden_part(
                    W, rest, h_words, source, inside, one, CHUNKS, REGISTERS + SHARED, G, PER, HS, UB, NB, S,
                    DTYPE, PRECISION,
                )  # fmt: skip
                if PRECISION == "tf32":  # where an unwritten word, a NaN in all other types, rounds to zero
                    r = with_lost(r, lost)
            before = carry[j]
            if resets is not None:
                r, before = zero_where(reset, r), tl.where(reset, 0.0, before)
            h, kept, saved, extra = CELL(as_float(x[j]), with_bias(r, hidden_bias, G), before)
            h = h if H == HS else tl.where(exists, h, 0.0)  # the neighbours read padded units too
            h_kept = h.to(DTYPE)
            if lengths is not None:
                if ALONE:
                    h_kept = tl.where(active, h_kept, state[j])
                h, kept = tl.where(active, h, 0.0), tl.where(active, kept, carry[j])
                at_end = t == tl.where(reverse, 0, length[j] - 1)
                tl.store(h_n + first * ROW + own[j], h.to(DTYPE), mask=mine[j] & active & at_end)
            here = mine[j] if lengths is None else mine[j] & active
            place = mine[j] if offsets is None else here  # packed rows past their end have no place
            tl.store(write + own[j], publishable(h, DTYPE, BITS), mask=place, cache_modifier=".cg")
            if gates is not None:
                for g in tl.static_range(len(saved)):
                    tl.store(
                        gates + own_gates[j] + g * H, saved[g].to(DTYPE), mask=here if exists is None else here & exists
                    )
            if aux is not None:
                tl.store(aux + own[j], extra, mask=place)
            carry_next, state_next = carry_next + (kept,), state_next + (h_kept,)
        carry, x = carry_next, x_next
        if ALONE:
            state = state_next
        read = write.to(tl.pointer_type(tl.int32))
        write += step * ROW
        t = t_next
        if gates is not None:
            gates += step * (N * G * H)
        if aux is not None:
            aux += step * ROW
    if carry_n is not None:
        for j in tl.static_range(SLICES):
            tl.store(carry_n + first * ROW + own[j], carry[j], mask=mine[j])
    if late != 0:
        tl.store(status, launch)
