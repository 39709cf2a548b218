"""The product of a step: recurrent weights that stay on the chip, times the state that the neighbours published.

A weight tile has the M = PER*UB rows of a program (PER gates of its UB units) and all of K. It is cut into chunks of K
(tiles.py): the first C.REGISTERS of them stay in registers, the following ones, up to C.HELD, in shared memory, and the
rest is read again in every step. A lone program multiplies its own state, and keeps all weights as one operand for each
C.STACK gates. `C` is program.Sizes.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .exchange import await_vectors
from .tiles import (
    chunk_columns,
    chunk_rows,
    copies,
    in_order,
    lone_operand,
    lone_state,
    lone_weights,
    operand,
    permuted,
    state_operand,
    to_tf32,
    vector_words,
)


class Weights(NamedTuple):
    """The recurrent weights of a program."""

    held: Any  # operands that stay on the chip: HELD chunks of each weight tile, tile by tile; alone: one a STACK
    streamed: Any  # of each tile, pointers to chunk 0, for reading the chunks that do not stay


@triton.constexpr_function
def tile_count(G, PER):
    """Weight tiles of a program."""
    return -(-G // PER)


@triton.jit
def weight_row(gate, unit, C: tl.constexpr):
    """Row of a gate's unit in the weight of a set: [G*H, HS] forward, [HS, G, HS] backward."""
    return unit * C.G + gate if C.BACKWARD else gate * C.H + unit


@triton.jit
def rows_of_tile(r, tile, unit, C: tl.constexpr):
    """The weight's rows for the rows r of a tile of units from `unit` on. What does not exist, stands at the last row
    that does: nobody uses the result.
    """
    UNITS: tl.constexpr = C.HS if C.BACKWARD else C.H  # the backward has zeros up to HS
    gate, unit = tile * C.PER + r // C.UB, unit + r % C.UB
    # Where all exist, a thread's rows are so many constants from one pointer, and else a pointer each.
    gate = gate if C.G % C.PER == 0 else tl.minimum(gate, C.G - 1)
    return weight_row(gate, unit if UNITS % C.UB == 0 else tl.minimum(unit, UNITS - 1), C)


@triton.jit
def rounded(w, C: tl.constexpr):
    """Weights as the product wants them. (The backward's are rounded when they are transposed: prepare.py.)"""
    return to_tf32(w) if C.PRECISION == "tf32" and not C.BACKWARD else w


@triton.jit
def held_chunk(p, columns, i: tl.constexpr, C: tl.constexpr):
    """Chunk i of a weight tile as loaded; p, columns: pointers and columns of chunk 0. Zeros from HS on."""
    if (i + 1) * C.S * C.K > C.HS:
        return rounded(tl.load(p + i * (C.S * C.K), mask=columns < C.HS - i * (C.S * C.K), other=0.0), C)
    else:
        return rounded(tl.load(p + i * (C.S * C.K)), C)


@triton.jit
def streamed_chunk(p, i, C: tl.constexpr):
    """The same for a chunk number that is known at run time only, as operand."""
    if C.HS % (C.S * C.K) == 0:
        w = tl.load(p + i * (C.S * C.K))
    else:
        w = tl.load(p + i * (C.S * C.K), mask=chunk_columns(C.S, C.K) < C.HS - i * (C.S * C.K), other=0.0)
    return operand(in_order(rounded(w, C), 4), C.S, C.PER * C.UB, C.K, C.WIDE)


@triton.jit
def hold_tile(weight, tile: tl.constexpr, unit, C: tl.constexpr):
    """The operands of a weight tile that stay on the chip, and pointers to its chunk 0. A chunk for shared memory is
    loaded in a plain layout: the compiler keeps an operand there that was loaded in any other way than a chunk tile.
    """
    ROWS: tl.constexpr = C.PER * C.UB
    columns = chunk_columns(C.S, C.K)
    p = weight + rows_of_tile(chunk_rows(ROWS), tile, unit, C) * C.HS + columns
    plain_columns = tl.arange(0, C.S)[:, None, None] * C.K + tl.arange(0, C.K)[None, None, :]
    plain_p = weight + rows_of_tile(tl.arange(0, ROWS)[None, :, None], tile, unit, C) * C.HS + plain_columns
    held = ()
    for i in tl.static_range(C.HELD):
        if i < C.REGISTERS:
            held = held + (operand(in_order(held_chunk(p, columns, i, C), 4), C.S, ROWS, C.K, C.WIDE),)
        else:
            held = held + (permuted(held_chunk(plain_p, plain_columns, i, C), C.S, ROWS, C.K, C.WIDE),)
    return held, p


@triton.jit
def hold_alone(weight, first: tl.constexpr, C: tl.constexpr):
    """The operand [STACK*S, UB/S, UB] of STACK gates of a lone program, from gate `first` on; zeros for what does not
    exist.
    """
    g, u, k = lone_weights(C.S, C.UB, C.K, C.STACK)
    exists = (first + g < C.G) & (u < (C.HS if C.BACKWARD else C.H)) & (k < C.HS)
    w = tl.load(weight + weight_row(first + g, u, C) * C.HS + k, mask=exists, other=0.0)
    return lone_operand(rounded(w, C), C.STACK, C.S, C.UB, C.K)


@triton.jit
def hold_weights(weight, me, C: tl.constexpr):
    """The `Weights` of a program, from those of all sets."""
    weight += me.n.to(tl.int64) * (C.G * C.HS * (C.HS if C.BACKWARD else C.H))
    unit, held, streamed = me.unit, (), ()
    if C.ALONE:
        for first in tl.static_range(0, C.G, C.STACK):
            held = held + (hold_alone(weight, first, C),)
    else:
        for tile in tl.static_range(tile_count(C.G, C.PER)):
            chunks, p = hold_tile(weight, tile, unit, C)
            held, streamed = held + chunks, streamed + (p,)
    return Weights(held=held, streamed=streamed)


@triton.jit
def add_product(sums, j: tl.constexpr, w, x, C: tl.constexpr):
    """The sums, with w times x added to the j-th, counted round."""
    out = ()
    for i in tl.static_range(len(sums)):
        out = out + (tl.dot(w, x, sums[i], input_precision=C.PRECISION) if i == j % len(sums) else sums[i],)
    return out


@triton.jit
def await_held(p, SLOTS: tl.constexpr, pause, bound, C: tl.constexpr):
    """Wait for as much of SLOTS slots of a state, from p on, as `multiply_held` needs -> the words of the chunks.
    pause: as of `await_vectors`.
    """
    if C.HELD == 0:
        return ()
    else:
        room = C.WORDS - vector_words(C.S)
        return await_vectors(p, room, SLOTS, C.HELD, C.HELD * C.STEP > C.WORDS, pause, bound, True, C)


@triton.jit
def multiply_held(sums, W, first: tl.constexpr, SLOTS: tl.constexpr, words, C: tl.constexpr):
    """Adds to the sums [S, PER*UB, NB] of the warps the products of SLOTS weight tiles from `first` on with the words
    awaited for each of them, as far as the weights are held.
    """
    if C.SLICES > 1 and C.HELD > C.REGISTERS and first == 0:
        # Or Triton 3.8 reads weights from shared memory once for all tiles in turn, and registers spill. It
        # takes the place of the barrier before the sums' way through shared memory, which Triton then leaves out.
        tl.debug_barrier()
    for tile in tl.static_range(SLOTS):
        for i in tl.static_range(C.HELD):
            x = state_operand(words[tile * C.HELD + i], C)
            sums = add_product(sums, tile * C.HELD + i, W.held[(first + tile) * C.HELD + i], x, C)
    return sums


@triton.constexpr_function
def tiles_at_once(PRECISION, UB, TILES):
    """How many of so many weight tiles a turn of `multiply_streamed` multiplies: all. But the operands of full float32
    products go through shared memory, and those of 64 units have no room beside each other.
    """
    return 1 if PRECISION == "ieee" and UB == 64 else TILES


@triton.jit
def multiply_streamed(sums, W, SLOTS: tl.constexpr, p, bound, one, C: tl.constexpr):
    """Adds to the sums the products of the weights that are not held, of all tiles: each chunk of SLOTS slots of the
    state, from p on, is awaited while its weights come. One slot is multiplied with every tile, into a sum for each.

    A loop at run time: unrolled, all its loads rise to the top and the registers spill. All tiles in one turn of it: a
    turn takes the latency of the second-level cache, whatever it reads.
    """
    COUNT: tl.constexpr = tiles_at_once(C.PRECISION, C.UB, len(W.streamed))
    if C.HELD < C.CHUNKS:
        for i in range(C.HELD, C.CHUNKS, one):
            room = C.WORDS - vector_words(C.S) - i * C.STEP
            for first in tl.static_range(0, len(W.streamed), COUNT):
                w = ()
                for tile in tl.static_range(first, first + COUNT):
                    w = w + (streamed_chunk(W.streamed[tile], i, C),)
                here = p + i * C.STEP + (first if SLOTS > 1 else 0) * C.WORDS
                words = await_vectors(here, room, min(SLOTS, COUNT), 1, C.WORDS % C.STEP != 0, None, bound, True, C)
                for tile in tl.static_range(COUNT):
                    x = words[tile] if SLOTS > 1 else copies(words, tile)[0]
                    sums = add_product(sums, first + tile, w[tile], state_operand(x, C), C)
    return sums


@triton.jit
def multiply_alone(w, tiles, sum, C: tl.constexpr):
    """sum + the weights w of STACK gates times as many tiles of a lone program's state; None for no sum."""
    x = lone_state(tiles, C.STACK, C.S, C.UB, C.NB, C.K)
    return tl.dot(w, to_tf32(x) if C.PRECISION == "tf32" else x, sum, input_precision=C.PRECISION)
