"""The backward loop over time, for every cell: the steps of forward.py in the opposite order, in one persistent launch.

    d_y       [R, N, H]      gradient of the outputs, or None
    d_h_n     [N, B, H]      gradient of the final state, or None
    d_carry_n [N, B, K*H]    gradient of the final states (LSTM: of c), or None
    d_carry   [R, N, K*H]    gradient of the states of every step, or None
    weight    [N, HS, G, HS] recurrent weight by unit: weight[n, u, slot, k] = d (sum of slot of unit k) / d h_u; zeros
                             past H
    parameters [N, P, H]     as forward.py has them, or None
    gates     [R, N, G*H]    saved by the forward, or None (RNN)
    aux       [R, N, P*HS]   as forward.py wrote it (LSTM: c; GRU: q); y where the backward reads h (RNN); or None
    history   [R, N, P*HS]   aux for cells with states, y for those that carry h: its values one step before the present
                             one are what the step began with; or None (RNN)
    history_0 [B, N, P*HS]   the same before the first step (LSTM: c0; GRU: h0), in the type of `history`, or None
    d_gates   [B+R+B, N, E, HS]  as 32-bit words: the first B rows hold zeros, the R rows after them are unwritten and
                             become the gradients of the gate sums, E slots a unit (cells.py)
    d_carry_0 [B, N, K*H]    gradient of the first carry: LSTM d c0; GRU, in float32, the direct part of d h0; or None.
                             (With sets first, as the other states, the largest plans would spill.)
    d_parameters [B, N, P*H] float32: each row's part of the parameters' gradient, or None
    weight_above [L, HS, G, HS]  for the layers of a stack the input's weight of the layer above each, but of the last;
                             gates in the order of the input side; else None
    status    [1]            int32: becomes `launch` when a wait came to its limit
    d_kept_0  [B, N, H]      float32, where a part of h is kept: gradient of the initial h by that way; or None, and
                             where the cell carries h it is in d_carry_0
    dropped, kept_h, kept_c, rate_h, rate_c as in forward.py; where a part of the states is kept, aux has those that the
                             cell alone would have, and history, [R, N, K*HS], those that it had
    passed, scale, pause     as in forward.py
    clip                     what the gradient of h is brought within at every step, -clip..clip, or None
    lengths, offsets, resets as in forward.py

In a stack (forward.py) a layer awaits the slots of the layer above at its own step beside its own of the later one. d_y
[R, H] is the gradient of the last layer's output alone. The other buffers lie layer after layer: d_gates [L, B+R+B, E,
HS], gates [L, R, G*H], aux and history [L, R+2B, ...], history_0 and d_carry_0 [L, B, ...].

T, B, R, N, G, K, H, HS, UB, NB, S and the grid are those of forward.py. The slots are awaited in WAITS parts, one after
another: all at once saves the latency of all but one, and takes registers for as many words. What does not depend on
the neighbours is computed before the wait; between await and publish stand the product, one exchange through shared
memory and a few multiplications. What the next step needs is loaded behind the wait, or its lateness would be waited
for, too.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .exchange import Bound, prefetch, publish
from .product import await_held, hold_weights, multiply_alone, multiply_held, multiply_streamed
from .program import (
    PREFETCHED,
    Place,
    as_float,
    cleared,
    either,
    entry,
    has_room,
    is_end,
    load_gates,
    load_or_zero,
    load_parameters,
    load_passed,
    load_planes,
    load_states,
    moment_after,
    moved,
    of_layer,
    other_source,
    part_kept,
    parted,
    place_of,
    rows_before,
    save,
    sizes,
    source,
    starts_anew,
    this_program,
    walk,
    within,
    zero_where,
)
from .tiles import lone_result, over_warps, side_by_side


class Left(NamedTuple):
    """The buffers that the forward, and the gradient of the outputs, have left for each step."""

    d_y: Any
    d_carry: Any
    gates: Any
    aux: Any
    history: Any
    history_0: Any
    passed: Any


@triton.jit
def load_step(left, dh_n, present, now, earlier, more, me, place, lengths, KEEPS_C: tl.constexpr, C: tl.constexpr):
    """What is there for the step `now`, before any neighbour is awaited -> gradient of the output, and, as tuples, that
    of the states (empty where there is none), the values that stand where x did, the values of aux (states first), the
    carry before the step, and what the layer above sees (`load_passed`).

    dh_n: gradient of the final state, added at a row's last step; None where this cannot be it. present: the states
    after the step, if they are known, else None. The carry before comes from the step `earlier`, or from the initial
    state where there are no `more` steps, or the row has no such step.
    """
    WIDTH: tl.constexpr = (C.STATES if KEEPS_C else C.PLANES if C.STATES > 0 else 1) * C.HS  # of `history`
    there = place.exists & within(now.t, place.length, lengths)
    given = there & (me.n == me.top) if C.LAYERED else there
    dy = load_or_zero(left.d_y, now.row, place, given, C.H, C)
    if dh_n is not None:
        dy = tl.where(True if lengths is None else is_end(now.t, place, me), dy + dh_n, dy)
    dc = ()
    if left.d_carry is not None:
        for i in tl.static_range(C.STATES):
            dc = dc + (load_or_zero(left.d_carry + i * C.H, now.row, place, there, C.STATES * C.H, C),)
    gates = ()
    if left.gates is not None:
        gates = load_gates(entry(left.gates, now.row, place, C.G * C.H, C), there, C.SAVED, C)
    FIRST: tl.constexpr = 0 if present is None else C.STATES
    aux = () if present is None else present
    aux = aux + load_planes(left.aux, now.row, place, there, FIRST, C.PLANES, C.PLANES * C.HS, C)
    before = ()
    if left.history is not None:  # a choice between two addresses, not between two tiles
        p = tl.where(
            more & within(earlier.t, place.length, lengths),
            left.history + earlier.row * (C.N * WIDTH),
            left.history_0 + me.first * (C.N * WIDTH),
        )
        before = load_planes(p, 0, place, place.exists, 0, C.CARRIED, WIDTH, C)
    return dy, dc, gates, aux, before, load_passed(left.passed, now, me, place, there, C)


@triton.jit
def states_of(beside, C: tl.constexpr):
    """Of the values of aux those that the step made: its states, or h."""
    x = ()
    for i in tl.static_range(C.PLANES - C.FURTHER):
        x = x + (beside[i],)
    return x


@triton.jit
def further(beside, C: tl.constexpr):
    """The others: what the cell saved beyond G values."""
    x = ()
    for i in tl.static_range(C.PLANES - C.FURTHER, C.PLANES):
        x = x + (beside[i],)
    return x


@triton.jit
def added(active, sums, tiles):
    """sums + tiles in the active rows."""
    x = ()
    for i in tl.static_range(len(sums)):
        x = x + (tl.where(active, sums[i] + tiles[i], sums[i]),)
    return x


@triton.jit
def save_all(p, row, place, tiles, COUNT: tl.constexpr, C: tl.constexpr):
    """Store COUNT tiles in a buffer [rows, N, COUNT*H], if there is one."""
    if p is not None:
        for i in tl.static_range(COUNT):
            save(p + i * C.H, row, place, tiles[i], place.own & place.exists, COUNT * C.H, C)


@triton.jit
def prefetch_step(left, out, then, exists, me, place, lengths, KEEPS_C: tl.constexpr, C: tl.constexpr):
    """Bring the lines that step `then`, if it `exists`, reads and publishes into the second-level cache: nobody is to
    wait for memory.
    """
    there = exists & place.exists & within(then.t, place.length, lengths)
    if not C.ALONE:
        prefetch(entry(out, then.row, place, C.E * C.HS, C), C.E, C.HS, there, C)
    if left.d_y is not None:
        given = there & (me.n == me.top) if C.LAYERED else there
        prefetch(entry(left.d_y, then.row, place, C.H, C), 1, 0, given, C)
    if left.passed is not None:
        prefetch(entry(left.passed, then.row, place, C.H, C), 1, 0, there & (me.n < me.top), C)
    if left.d_carry is not None:
        prefetch(entry(left.d_carry, then.row, place, C.STATES * C.H, C), C.STATES, C.H, there, C)
    if left.gates is not None:
        prefetch(entry(left.gates, then.row, place, C.G * C.H, C), C.SAVED, C.H, there, C)
    if C.STATES == 0 and left.history is not None:
        prefetch(entry(left.history, then.row, place, C.HS, C), 1, 0, there, C)
    if KEEPS_C:
        prefetch(entry(left.history, then.row, place, C.STATES * C.HS, C), C.STATES, C.HS, there, C)
    if left.aux is not None:  # states too: their history is the same buffer, unless a part of them is kept
        prefetch(entry(left.aux, then.row, place, C.PLANES * C.HS, C), C.PLANES, C.HS, there, C)


@triton.jit
def add_source(sums, W, p, pause, bound, one, C: tl.constexpr):
    """The sums [S, UB, NB], with the products of gradients of gate sums added: awaits these at p, after a pause and in
    C.WAITS parts, and multiplies them with the weights.
    """
    SLOTS: tl.constexpr = (C.G + C.WAITS - 1) // C.WAITS  # of a part
    for first in tl.static_range(0, C.G, SLOTS):
        here = p + first * C.WORDS
        words = await_held(here, min(SLOTS, C.G - first), pause if first == 0 else None, bound, C)
        sums = multiply_held(sums, W, first, min(SLOTS, C.G - first), words, C)
    return multiply_streamed(sums, W, C.G, p, bound, one, C)


@triton.jit
def one_tile(sums, C: tl.constexpr):
    """The sums of all warps, and of both chains of products -> a tile [NB, UB]."""
    return over_warps((sums[0] + sums[1]).reshape(C.S, 1, C.UB, C.NB), C.S, 1, C.UB, C.NB)[0]


@triton.jit
def two_tiles(sums, others, C: tl.constexpr):
    """The same of two sources, in one exchange between the warps."""
    both = side_by_side((sums[0] + sums[1], others[0] + others[1]), 2, C.S, 1, C.UB, C.NB)
    return over_warps(both, C.S, 2, C.UB, C.NB)


@triton.jit
def through_gates(
    W, p, above, p_above, resets, reset, passed, scale, me, pause, bound, C: tl.constexpr, D: tl.constexpr
):
    """The gradient [NB, UB] of h through the later step's gate sums, whose gradients are at p, none where that step's
    row is `reset`; and in a stack through those of the layer above, which is a step ahead and awaited first, as far as
    that layer sees h: `scale` times `passed`, a tuple as of `load_passed`.

    Two sums: one chain of products alone would be bound by the latency of a matrix instruction.
    """
    nothing = tl.zeros((C.S, C.UB, C.NB), tl.float32), tl.zeros((C.S, C.UB, C.NB), tl.float32)
    if not C.LAYERED:
        return tl.where(reset, 0.0, one_tile(add_source(nothing, W, p, pause, bound, me.one, C), C))
    else:
        fed = nothing
        if me.n != me.top:
            fed = add_source(fed, above, p_above, None, bound, me.one, D)
        if resets is None and len(passed) == 0:
            return one_tile(add_source(fed, W, p, pause, bound, me.one, C), C)
        own, fed = two_tiles(add_source(nothing, W, p, pause, bound, me.one, C), fed, C)
        return tl.where(reset, 0.0, own) + (fed if len(passed) == 0 else fed * (passed[0] * scale))


@triton.jit
def through_gates_alone(W, slots, place, C: tl.constexpr):
    """The same where one program holds all units, and the slots are its own: a lone tile, zeros where there is no unit,
    whatever the slots are; all else that such a unit has is zero.
    """
    sums = None
    for i in tl.static_range(len(W.held)):
        sums = multiply_alone(W.held[i], slots[i * C.STACK : (i + 1) * C.STACK], sums, C)
    return tl.where(place.exists, lone_result(sums, C.STACK, C.S, C.UB, C.NB), 0.0)


@triton.jit
def gathered(dh, dcarry, WANTED: tl.constexpr):
    """dh and dcarry, of a cell that carries its h: all of h's gradient in dh, if that is wanted."""
    if WANTED:
        dh, dcarry = dh + dcarry[0], (tl.zeros_like(dcarry[0]),)
    return dh, dcarry


@triton.jit
def clipped(dh, clip):
    """dh brought within -clip..clip, NaN for NaN."""
    return dh if clip is None else tl.where(dh > clip, clip, tl.where(dh < -clip, -clip, dh))


@triton.jit(
    do_not_specialize=["T", "B", "begin", "limit", "launch", "pause"],
    do_not_specialize_on_alignment=["d_h_n", "d_carry_n", "d_carry_0"],
)
def backward(
    d_y, d_h_n, d_carry_n, d_carry, weight, weight_above, parameters, gates, aux, history, history_0, d_gates,
    d_carry_0, d_parameters, d_kept_0, passed, dropped, kept_h, kept_c, lengths, offsets, resets, T, B, status, begin,
    limit, launch, pause, scale, clip, rate_h, rate_c, FACTORS: tl.constexpr, CELL: tl.constexpr, G: tl.constexpr,
    E: tl.constexpr, STATES: tl.constexpr, CARRIED: tl.constexpr, SAVES: tl.constexpr, READS_H: tl.constexpr,
    PARAMETERS: tl.constexpr, QUIET: tl.constexpr, H: tl.constexpr, HS: tl.constexpr, N: tl.constexpr,
    REVERSED: tl.constexpr, UB: tl.constexpr, NB: tl.constexpr, SLICES: tl.constexpr, S: tl.constexpr,
    REGISTERS: tl.constexpr, SHARED: tl.constexpr, WAITS: tl.constexpr, DTYPE: tl.constexpr, BITS: tl.constexpr,
    PRECISION: tl.constexpr, ALONE: tl.constexpr, LAYERED: tl.constexpr,
):  # fmt: skip
    """All steps of one batch slice and set, for one unit slice: see the top of this file."""
    C: tl.constexpr = sizes(
        G, STATES, CARRIED, SAVES, PARAMETERS, H, HS, N, REVERSED, UB, NB, SLICES, S, REGISTERS, SHARED, DTYPE, BITS,
        PRECISION, ALONE, E=E, READS_H=READS_H, QUIET=QUIET, BACKWARD=True, WAITS=WAITS, LAYERED=LAYERED,
    )  # fmt: skip
    D: tl.constexpr = other_source(C)
    me = this_program(begin, B, C)
    W, above = hold_weights(weight, me, C), hold_weights(weight_above, me, D) if C.LAYERED else None
    R = rows_before(T, B, offsets)
    span = R + 2 * B.to(tl.int64)  # rows from layer to layer
    WIDTH: tl.constexpr = (C.PLANES if C.STATES > 0 else 1) * C.HS  # of `history`
    left = Left(
        d_y=d_y,
        d_carry=d_carry,
        gates=None if gates is None else of_layer(gates, me, R, C.G * C.H, C),
        aux=None if aux is None else of_layer(aux, me, span, C.PLANES * C.HS, C),
        history=None if history is None else of_layer(history, me, span, WIDTH, C),
        history_0=None if history_0 is None else of_layer(history_0, me, B, WIDTH, C),
        passed=None if passed is None else of_layer(passed, me, R, C.H, C),
    )
    d_gates = of_layer(d_gates, me, span, C.E * C.WORDS, C)
    d_carry_0 = None if d_carry_0 is None else of_layer(d_carry_0, me, B, C.CARRIED * C.H, C)
    steps, ahead, now = walk(me, T, B, lengths, offsets, C)
    then = moment_after(now, ahead, steps > 1, B, offsets)
    bound = Bound(limit=limit, status=status, launch=launch)
    # In 32 bits: layer.py refuses what they do not hold, and with 64 a step has 40 instructions more (sm_90).
    d_gates += B * (C.N * C.E * C.WORDS)  # to the first of the R rows; seen from there, the zeros begin at row -B
    d_above = d_gates + (span * C.E + C.E - C.G) * C.WORDS
    out = d_gates.to(tl.pointer_type(C.DTYPE))
    zeros = me.first - B
    before = zeros  # where the step before, which is the later one in time, begins
    KEEPS_H: tl.constexpr = kept_h is not None or rate_h is not None
    KEEPS_C: tl.constexpr = kept_c is not None or rate_c is not None
    CARRIES_H: tl.constexpr = C.CARRIED > C.STATES
    places, dh_n, dcarry, state, saved, of_rows = (), (), (), (), (), ()
    dkept = ()  # gradient of the h that is kept, where h is not carried
    for j in tl.static_range(C.SLICES):
        tile = place_of(me, j, T, lengths, C)
        places = places + (tile,)
        dh_n = dh_n + load_states(d_h_n, me, tile, B, 1, C)
        dcarry = dcarry + (load_states(d_carry_n, me, tile, B, C.CARRIED, C),)
        of_rows = of_rows + (load_states(None, me, tile, B, C.PARAMETERS, C),)  # zeros
        if KEEPS_H and not CARRIES_H:
            dkept = dkept + (tl.zeros(C.SHAPE, tl.float32),)
        nothing = ()
        for _ in tl.static_range(C.G):
            nothing = nothing + (tl.zeros(C.SHAPE, C.DTYPE),)
        state = state + (nothing,)
        saved = saved + (load_step(left, dh_n[j], None, now, then, steps > 1, me, tile, lengths, KEEPS_C, C),)
        for i in tl.static_range(1, PREFETCHED):
            far = moved(now, i * ahead, steps > i, B, offsets)
            prefetch_step(left, out, far, steps > i, me, tile, lengths, KEEPS_C, C)
    of_unit = load_parameters(parameters, me, Place(*places[0]), C)

    for s in range(steps):
        earlier = moment_after(then, ahead, s + 2 < steps, B, offsets)
        more = steps - s > PREFETCHED
        far = moved(now, ahead * PREFETCHED, more, B, offsets)
        dcarry_next, state_next, saved_next, of_rows_next, dkept_next = (), (), (), (), ()
        for j in tl.static_range(C.SLICES):
            place = Place(*places[j])  # by name again: Triton 3.6 forgets the names inside a tuple of tuples
            dy, dc, saved_gates, beside, carried, seen = saved[j]
            reset = starts_anew(resets, now.t, True, place, B)
            reset_before = starts_anew(resets, now.t - ahead, s > 0, place, B)
            values, after = as_float(saved_gates) + further(beside, C), states_of(beside, C)
            if C.PARAMETERS == 0:
                factors = FACTORS(values, zero_where(reset, carried), after)
            else:
                factors = FACTORS(values, zero_where(reset, carried), after, of_unit)
            dh_end, aux_then = None if lengths is None else dh_n[j], carried if C.STATES > 0 and not KEEPS_C else None
            two = s + 2 < steps
            if C.ALONE:  # no wait that a load could hold up
                saved_then = load_step(left, dh_end, aux_then, then, earlier, two, me, place, lengths, KEEPS_C, C)
                dh = tl.where(reset_before, 0.0, through_gates_alone(W, state[j], place, C))
            else:
                p = source(d_gates, before, zeros, place, s > 0, now.t - ahead, lengths, C)
                p_above = source(d_above, now.row, zeros, place, True, now.t, lengths, C) if C.LAYERED else None
                dh = through_gates(W, p, above, p_above, resets, reset_before, seen, scale, me, pause, bound, C, D)
                saved_then = load_step(left, dh_end, aux_then, then, earlier, two, me, place, lengths, KEEPS_C, C)
            saved_next = saved_next + (saved_then,)
            active = within(now.t, place.length, lengths)
            there = place.exists & active
            if dropped is not None:
                dh = dh * load_states(dropped, me, place, B, 1, C)[0]
            dh = dy + dh
            if KEEPS_H and not CARRIES_H:
                dh += dkept[j]
            dc = dcarry[j] if len(dc) == 0 else added(True, dcarry[j], dc)
            dh, dc = gathered(dh, dc, CARRIES_H and (KEEPS_H or clip is not None))
            dh = clipped(dh, clip)
            if KEEPS_H:
                part = part_kept(kept_h, rate_h, now.row, place, there, C)
                straight, rest = parted(part, (dh,))
                straight_h, dh = straight[0], rest[0]
            if KEEPS_C:
                part = part_kept(kept_c, rate_c, now.row, place, there, C)
                straight_c, dc = parted(part, dc)
            if C.PARAMETERS == 0:
                slots, kept = CELL(factors, dh, dc)
            else:
                slots, kept, of_step = CELL(factors, dh, dc)
                of_rows_next = of_rows_next + (added(active, of_rows[j], of_step),)
            if KEEPS_C:
                kept = added(True, kept, straight_c)
            if KEEPS_H and CARRIES_H:
                kept = (kept[0] + straight_h,)
            if KEEPS_H and not CARRIES_H:
                dkept_next = dkept_next + (tl.where(active, tl.where(reset, 0.0, straight_h), dkept[j]),)
            room = has_room(place, active, offsets)
            published = ()
            for e in tl.static_range(C.E):
                slot = cleared(slots[e], active, place, C)
                publish(out, now.row, place, e, slot, room, C)
                if e < C.G:
                    published = published + (slot.to(C.DTYPE),)
            prefetch_step(left, out, far, more, me, place, lengths, KEEPS_C, C)
            dcarry_next = dcarry_next + (either(active, zero_where(reset, kept), dcarry[j]),)
            state_next = state_next + (published,)
        dcarry, state, saved, dkept = dcarry_next, state_next, saved_next, dkept_next
        if C.PARAMETERS > 0:
            of_rows = of_rows_next
        before = now.row
        now, then = moved(now, ahead, s + 1 < steps, B, offsets), earlier
    for j in tl.static_range(C.SLICES):
        place = Place(*places[j])
        save_all(d_carry_0, me.first, place, dcarry[j], C.CARRIED, C)
        if KEEPS_H and not CARRIES_H:
            save(d_kept_0, me.first, place, dkept[j], place.own & place.exists, C.H, C)
        save_all(d_parameters, me.first, place, of_rows[j], C.PARAMETERS, C)
