"""The forward loop over time, for every cell: one persistent launch for all T steps.

    x_part  [R, N, G*H]      input part of the gates, biases included
    weight  [N, G*H, HS]     recurrent weight, rows padded with zeros to HS
    bias    [N, APART*H]     hidden biases of the last gates, those apart (spec.Cell; GRU: of n), or None
    parameters [N, P, H]     weights that a unit has beside the matrices, or None
    y       [B+R+B, N, HS]   as 32-bit words: the first B rows hold h0 of forward sets, the last B that of reversed
                             ones; the R rows between are unwritten and become the outputs
    carry_0 [N, B, K*H]      carry before the first step (LSTM: c0; GRU: h0), or None for zeros
    gates   [R, N, G*H]      becomes the gates, x_part itself (each place is read before it is written) or another
                             tensor; or None where nothing is saved
    aux     [R, N, P*HS]     what else the backward needs: states (LSTM: c; all in float32) and what the cell saves
                             beyond G values (GRU: q); or None
    carry_n [N, B, K*H]      becomes the states after each row's last step; or None
    h_n     [N, B, H]        becomes the state at each row's end
    weight_below [L, G*H, HS] for the layers of a stack the input's weight of each, but of the first; else None
    biases  [L, G*H]         what their gate sums begin with in place of an input part; or None
    fed     [L-1, B+R+B, HS] becomes, with dropout between those layers, what is sent to the layer above each, as 32-bit
                             words; as y, with zeros in the first B rows; or None
    passed  [L-1, R, H]      then: int8, not zero where the layer above sees a unit, `scale` times as large
    status  [1]              int32: becomes `launch` when a wait came to its limit
    pause                    cycles from a wait's begin to its first look at what the neighbours send, or None
    shown   [R, N, HS]       becomes the outputs, where they are not what is sent to the neighbours (`dropped`); or None
    h_0     [N, B, H]        then: the initial state, or None for zeros; y has what the product sees of it
    carries [R, N, K*HS]     becomes the states of every step where aux has not them (zoneout), or the h that the cell
                             alone would have where y is not it (RNN, rate_h); or None
    dropped [N, B, H]        float32, what h is multiplied with before the product; or None
    kept_h, kept_c [R, N, H] int8, not zero where a unit keeps its h, or its states, of the step before; or None
    rate_h, rate_c           what stays of those in every step, where there is no mask; or None
    lengths [B]              int32, steps of each row, or None where all have T
    offsets [T+1]            int64, first row of each step where sequences are packed, longest first; else None
    resets  [T, B]           int8, not zero where the row's state is zero before the step; or None

T steps, B rows of the batch, R rows of all steps (step t has the rows from t*B on, packed from offsets[t] on), N weight
sets (directions of a layer), G gates, K values carried, H hidden units, HS their padded number. Grid: unit slices of UB
units x batch slices of SLICES*NB rows x N sets. The programs of one batch slice and set are a group: only they exchange
y. ALONE: one program holds all units; nothing is exchanged, and y is only written.

The N = L sets of a launch may be the layers of a stack, as a wavefront: layer n > 0 then awaits the state of layer n-1
at its own step beside its own of the step before, and multiplies both. Only the first layer has an input part, x_part
[R, G*H]. Other buffers lie layer after layer: y [L, B+R+B, HS], aux [L, R+2B, P*HS], gates [L, R, G*H].

Rows outside their sequence keep their carry and publish zeros (packed: they have no place to publish). A row whose
neighbour in time lies outside the sequence reads its h0 instead.
"""

import triton
import triton.language as tl

from .exchange import Bound, prefetch, publish
from .product import await_held, hold_weights, multiply_alone, multiply_held, multiply_streamed, tile_count
from .program import (
    PREFETCHED,
    Place,
    as_float,
    cleared,
    either,
    entry,
    has_room,
    load_gates,
    load_or_zero,
    load_parameters,
    load_passed,
    load_states,
    mixed,
    moved,
    of_layer,
    other_source,
    part_kept,
    place_of,
    rows_before,
    save,
    save_states,
    sizes,
    source,
    starts_anew,
    this_program,
    walk,
    within,
    zero_where,
)
from .tiles import copies, lone_result, over_warps, power_of_two, side_by_side


@triton.jit
def prefetch_step(x_part, passed, out, above, then, exists, me, place, lengths, C: tl.constexpr):
    """Bring the lines that step `then`, if it `exists`, reads and publishes into the second-level cache: nobody is to
    wait for memory.
    """
    there = exists & place.exists & within(then.t, place.length, lengths)
    given = there & (me.n == 0) if C.LAYERED else there
    prefetch(entry(x_part, then.row, place, C.G * C.H, C), C.G, C.H, given, C)
    if not C.ALONE:
        prefetch(entry(out, then.row, place, C.HS, C), 1, 0, there, C)
    if passed is not None:
        prefetch(entry(passed, then.row, place, C.H, C), 1, 0, there & (me.n < me.top), C)
        prefetch(entry(above, then.row, place, C.HS, C), 1, 0, there & (me.n < me.top), C)


@triton.jit
def load_input(x_part, biases, now, me, place, mask, C: tl.constexpr):
    """The input's part of the gates; of a layer that is fed by another one its biases, or zeros, in the same way."""
    p = entry(x_part, now.row, place, C.G * C.H, C)
    if C.LAYERED and biases is not None:
        p = tl.where(me.n == 0, p, of_layer(biases, me, 1, C.G * C.H, C) + place.units)
    given = mask & (me.n == 0) if C.LAYERED and biases is None else mask
    return load_gates(p, given, C.G, C)


@triton.jit
def add_source(sums, W, p, pause, bound, one, C: tl.constexpr):
    """The sums [S, PER*UB, NB] of the weight tiles, with the products of a state added: awaits it at p, after a pause,
    and multiplies it with its weights.
    """
    words, held = await_held(p, 1, pause, bound, C), ()
    for tile in tl.static_range(tile_count(C.G, C.PER)):
        held = held + multiply_held((sums[tile],), W, tile, 1, copies(words, tile), C)
    return multiply_streamed(held, W, 1, p, bound, one, C)


@triton.jit
def gate_tiles(sums, C: tl.constexpr):
    """The sums of the weight tiles -> as many tiles [NB, UB] as they have gates, or 4 for 3."""
    sums = side_by_side(sums, len(sums), C.S, C.PER, C.UB, C.NB)
    return over_warps(sums, C.S, power_of_two(C.G + C.APART), C.UB, C.NB)


@triton.jit
def hidden_part(W, p, below, p_below, resets, reset, me, pause, bound, C: tl.constexpr, D: tl.constexpr):
    """What states add to the gate sums: its own, at p, none where `reset`, and in a stack that of the layer below -> G
    tiles [NB, UB], then what the layer below adds to the C.APART last gates.

    The layer below is awaited first: it is a step ahead, and its product hides the way of its own state. Both are added
    up in the same sums, where nothing is reset.
    """
    zeros, nothing = tl.zeros((C.S, C.PER * C.UB, C.NB), tl.float32), ()
    for _ in tl.static_range(tile_count(C.G, C.PER)):
        nothing = nothing + (zeros,)
    if not C.LAYERED:
        return zero_where(reset, gate_tiles(add_source(nothing, W, p, pause, bound, me.one, C), C))
    else:
        SPLIT: tl.constexpr = len(nothing) - C.APART
        fed = nothing
        if me.n != 0:
            fed = add_source(fed, below, p_below, None, bound, me.one, D)
        begin, apart = fed[:SPLIT] + nothing[SPLIT:], fed[SPLIT:]
        if resets is None:
            return gate_tiles(add_source(begin, W, p, pause, bound, me.one, C) + apart, C)
        own = gate_tiles(add_source(nothing, W, p, pause, bound, me.one, C) + apart, C)
        fed = gate_tiles(begin + apart, C)
        sums = ()
        for g in tl.static_range(C.G):
            sums = sums + (tl.where(reset, 0.0, own[g]) + fed[g],)
        return sums + fed[C.G :]


@triton.jit
def hidden_part_alone(W, h, C: tl.constexpr):
    """The same where one program holds all units, and h is its own: G lone tiles."""
    return [lone_result(multiply_alone(w, (h,), None, C), C.STACK, C.S, C.UB, C.NB) for w in W.held]


@triton.jit
def load_bias(bias, n, place, APART: tl.constexpr, C: tl.constexpr):
    """The hidden biases of a place's units, those of the gates apart, in float32; none where there are none."""
    x = ()
    if bias is not None:
        for i in tl.static_range(APART):
            there = bias + (n * APART + i) * C.H + place.units
            x = x + (tl.load(there, mask=place.exists, other=0.0).to(tl.float32),)
    return x


@triton.jit
def with_last(tiles, more, COUNT: tl.constexpr, C: tl.constexpr):
    """The tiles of the gates with the first COUNT of `more` added to the last ones."""
    FIRST: tl.constexpr = C.G - COUNT
    out = ()
    for g in tl.static_range(C.G):
        out = out + (tiles[g] if g < FIRST else tiles[g] + more[g - FIRST],)
    return out


@triton.jit
def own_last(out, h0, place, me, B, offsets, C: tl.constexpr):
    """What this program published at each row's last step, or its h0 where the row has none; past the first-level
    cache, as it was published.
    """
    t = tl.where(me.reverse, 0, tl.maximum(place.length - 1, 0))
    row = tl.where(place.length > 0, me.first + rows_before(t, B, offsets), h0)
    return tl.load(entry(out, row, place, C.HS, C), mask=place.own, other=0.0, cache_modifier=".cg")


@triton.jit(
    do_not_specialize=["T", "B", "begin", "limit", "launch", "pause"],
    do_not_specialize_on_alignment=["bias", "carry_0", "carry_n", "h_n", "h_0"],
)
def forward(
    x_part, weight, weight_below, bias, biases, parameters, y, fed, passed, carry_0, gates, aux, carry_n, h_n, shown,
    h_0, carries, dropped, kept_h, kept_c, lengths, offsets, resets, T, B, status, begin, limit, launch, pause, scale,
    rate_h, rate_c, CELL: tl.constexpr, G: tl.constexpr, APART: tl.constexpr, STATES: tl.constexpr,
    CARRIED: tl.constexpr, SAVES: tl.constexpr, PARAMETERS: tl.constexpr, PER: tl.constexpr, H: tl.constexpr,
    HS: tl.constexpr, N: tl.constexpr, REVERSED: tl.constexpr, UB: tl.constexpr, NB: tl.constexpr,
    SLICES: tl.constexpr, S: tl.constexpr, REGISTERS: tl.constexpr, SHARED: tl.constexpr, DTYPE: tl.constexpr,
    BITS: tl.constexpr, PRECISION: tl.constexpr, ALONE: tl.constexpr, LAYERED: tl.constexpr,
):  # fmt: skip
    """All steps of one batch slice and set, for one unit slice: see the top of this file."""
    C: tl.constexpr = sizes(
        G, STATES, CARRIED, SAVES, PARAMETERS, H, HS, N, REVERSED, UB, NB, SLICES, S, REGISTERS, SHARED, DTYPE, BITS,
        PRECISION, ALONE, PER=PER, LAYERED=LAYERED, APART=APART,
    )  # fmt: skip
    D: tl.constexpr = other_source(C)
    CARRIES_H: tl.constexpr = C.CARRIED > C.STATES
    me = this_program(begin, B, C)
    W, below = hold_weights(weight, me, C), hold_weights(weight_below, me, D) if C.LAYERED else None
    steps, ahead, now = walk(me, T, B, lengths, offsets, C)
    bound = Bound(limit=limit, status=status, launch=launch)
    R = rows_before(T, B, offsets)
    span = R + 2 * B.to(tl.int64)  # rows from layer to layer
    y = of_layer(y, me, span, C.WORDS, C)
    gates = None if gates is None else of_layer(gates, me, R, C.G * C.H, C)
    aux = None if aux is None else of_layer(aux, me, span, C.PLANES * C.HS, C)
    y += B.to(tl.int64) * (C.N * C.WORDS)  # to the first output; seen from there, h0 begins at row -B or R
    passed = None if passed is None else of_layer(passed, me, R, C.H, C)
    sent = y if fed is None else of_layer(fed, me, span, C.WORDS, C) + B.to(tl.int64) * C.WORDS  # to the layer above
    fed_by = sent - span * C.WORDS  # by the layer below
    out, above = y.to(tl.pointer_type(C.DTYPE)), sent.to(tl.pointer_type(C.DTYPE))
    h0 = me.first + tl.where(me.reverse, R, -B)
    before = h0  # where the step before begins
    KEEPS_H: tl.constexpr = kept_h is not None or rate_h is not None
    KEEPS_C: tl.constexpr = kept_c is not None or rate_c is not None
    places, carry, state, own = (), (), (), ()  # own: h, where the state is not it
    for j in tl.static_range(C.SLICES):
        tile = place_of(me, j, T, lengths, C)
        places = places + (tile,)
        carry = carry + (load_states(carry_0, me, tile, B, C.CARRIED, C),)
        state = state + (load_or_zero(out, h0, tile, tile.own, C.HS, C).to(C.DTYPE),)
        if dropped is not None:
            own = own + (load_states(h_0, me, tile, B, 1, C)[0].to(C.DTYPE),)
        for i in tl.static_range(1, PREFETCHED):
            far = moved(now, i * ahead, steps > i, B, offsets)
            prefetch_step(x_part, passed, out, above, far, steps > i, me, tile, lengths, C)
    hidden_bias = load_bias(bias, me.n, Place(*places[0]), APART, C)
    of_unit = load_parameters(parameters, me, Place(*places[0]), C)

    for s in range(steps):
        more = steps - s > PREFETCHED
        far = moved(now, ahead * PREFETCHED, more, B, offsets)
        carry_next, state_next, own_next = (), (), ()
        for j in tl.static_range(C.SLICES):
            place = Place(*places[j])  # by name again: Triton 3.6 forgets the names inside a tuple of tuples
            active = within(now.t, place.length, lengths)
            x = load_input(x_part, biases, now, me, place, place.exists & active, C)
            seen = load_passed(passed, now, me, place, place.exists & active, C)
            reset = starts_anew(resets, now.t, True, place, B)
            if C.ALONE:
                sums = zero_where(reset, hidden_part_alone(W, state[j], C))
            else:
                p = source(y, before, h0, place, s > 0, now.t - ahead, lengths, C)
                p_below = source(fed_by, now.row, h0, place, True, now.t, lengths, C) if C.LAYERED else None
                sums = hidden_part(W, p, below, p_below, resets, reset, me, pause, bound, C, D)
            r = with_last(sums, hidden_bias, len(hidden_bias), C)
            x = with_last(as_float(x), sums[C.G :], C.APART, C)
            if C.PARAMETERS == 0:
                h, kept, saved = CELL(x, r, zero_where(reset, carry[j]))
            else:
                h, kept, saved = CELL(x, r, zero_where(reset, carry[j]), of_unit)
            there, alone, alone_h = place.exists & active, kept, h
            if KEEPS_C:
                part = part_kept(kept_c, rate_c, now.row, place, there, C)
                kept = mixed(part, kept, zero_where(reset, carry[j]))
            if KEEPS_H:
                part = part_kept(kept_h, rate_h, now.row, place, there, C)
                old = carry[j][0] if CARRIES_H else (state[j] if dropped is None else own[j]).to(tl.float32)
                h = mixed(part, (h,), zero_where(reset, (old,)))[0]
                kept = (h,) if CARRIES_H else kept
            room = has_room(place, active, offsets)
            h = cleared(h, active, place, C)
            if dropped is not None:
                save(shown, now.row, place, h, room, C.HS, C)
                own_next = own_next + (tl.where(active, h.to(C.DTYPE), own[j]),)
                h = h * load_states(dropped, me, place, B, 1, C)[0]
            publish(out, now.row, place, 0, h, room, C)
            if passed is not None:
                h = h.to(C.DTYPE).to(tl.float32)  # as the layer above would read it
                publish(above, now.row, place, 0, h * (seen[0] * scale), room & (me.n < me.top), C)
            if gates is not None:
                for g in tl.static_range(C.SAVED):
                    save(gates + g * C.H, now.row, place, saved[g], place.own & place.exists & active, C.G * C.H, C)
            if aux is not None:
                for i in tl.static_range(C.PLANES):
                    extra = alone[i] if i < C.STATES else saved[C.G + i - C.STATES]
                    save(aux + i * C.HS, now.row, place, extra, room, C.PLANES * C.HS, C)
            if carries is not None:
                beside = kept if C.STATES > 0 else (alone_h,)
                for i in tl.static_range(len(beside)):
                    save(carries + i * C.HS, now.row, place, beside[i], room, len(beside) * C.HS, C)
            prefetch_step(x_part, passed, out, above, far, more, me, place, lengths, C)
            carry_next = carry_next + (either(active, kept, carry[j]),)
            state_next = state_next + (tl.where(active, h.to(C.DTYPE), state[j]),)
        carry, state, own = carry_next, state_next, own_next
        before = now.row
        now = moved(now, ahead, s + 1 < steps, B, offsets)
    if not C.ALONE:
        tl.debug_barrier()  # what a thread reads below, another one may have published
    for j in tl.static_range(C.SLICES):
        place = Place(*places[j])
        save_states(carry_n, me, place, carry[j], B, C.STATES, C)
        if dropped is not None:
            last = own[j]
        else:
            last = state[j] if C.ALONE else own_last(out, h0, place, me, B, offsets, C)
        save_states(h_n, me, place, (last,), B, 1, C)
