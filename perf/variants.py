"""The kernels with a stage left out, so that a profile can say what the stage takes, or done in another way.

Each variant is the kernel itself, from the same source, with one of the functions it calls replaced. The results of one
without a stage are wrong, of course: variants are timed and counted, never used. Stages overlap, so what they take need
not add up to the whole step.
"""

import contextlib
import functools
import types
from dataclasses import replace

import triton
import triton.language as tl

from rnn_gpu.kernels import backward as backward_kernel
from rnn_gpu.kernels import compiled, exchange, launch, product, program, tiles
from rnn_gpu.kernels import forward as forward_kernel
from rnn_gpu.kernels.plan import Plan
from rnn_gpu.kernels.spec import CELLS

VARIANTS = {
    "wait": "a state is read once, and not tested: no waiting for the neighbours",
    "product": "no product with the recurrent weights, and no sum over the warps",
    "equations": "sums in place of the equations of the cell",
    "stores": "nothing is saved for the backward",
}

# Other ways to do the same, with the same results.
ALTERNATIVES = {
    "write-through": "states are published by `.wt` stores, and not by `.cg`",
    "again": "what a wait misses is read again at once and not when all is known, or the other way round",
    "hasty": "waits begin with no pause",
}

# Loaded by name, because the kernels read names of their own module: these become globals of a kernel's copy.
entry, publishable, await_vectors, await_assembly, vector_words = (
    program.entry, exchange.publishable, exchange.await_vectors, exchange.await_assembly, tiles.vector_words,
)  # fmt: skip


@triton.constexpr_function
def read_assembly(SLOTS, CHUNKS, STEP, WORDS, PARTIAL, HALVES, PACK, PAUSES, AT_ONCE):
    """`exchange.await_assembly` without the wait and its pause."""
    text = await_assembly(SLOTS, CHUNKS, STEP, WORDS, PARTIAL, HALVES, PACK, PAUSES, False)
    return text.replace("@!some bra DONE;", "bra DONE;").replace("@q bra PAUSE;", "")


@triton.constexpr_function
def other_assembly(SLOTS, CHUNKS, STEP, WORDS, PARTIAL, HALVES, PACK, PAUSES, AT_ONCE):
    """`exchange.await_assembly` that reads again at once what a plan's own does not, and the other way round."""
    return await_assembly(SLOTS, CHUNKS, STEP, WORDS, PARTIAL, HALVES, PACK, PAUSES, not AT_ONCE)


@triton.constexpr_function
def hasty_assembly(SLOTS, CHUNKS, STEP, WORDS, PARTIAL, HALVES, PACK, PAUSES, AT_ONCE):
    """`exchange.await_assembly` without a pause."""
    text = await_assembly(SLOTS, CHUNKS, STEP, WORDS, PARTIAL, HALVES, PACK, PAUSES, AT_ONCE)
    return text.replace("@q bra PAUSE;", "")


@triton.jit
def await_unused(p, SLOTS: tl.constexpr, pause, bound, C: tl.constexpr):
    """`product.await_held` for a state that nothing multiplies: it waits for all of it."""
    room = C.WORDS - vector_words(C.S)
    return await_vectors(p, room, SLOTS, C.CHUNKS, C.CHUNKS * C.STEP > C.WORDS, pause, bound, False, C)


@triton.jit
def publish_through(p, row, place, slot: tl.constexpr, x, mask, C: tl.constexpr):
    """`exchange.publish` by stores that write through all caches."""
    x = publishable(x, C.DTYPE, C.BITS).to(C.DTYPE, bitcast=True)
    tl.store(entry(p, row, place, C.E * C.HS, C) + slot * C.HS, x, mask=mask, cache_modifier=".wt")
    return x


@triton.jit
def no_hidden_part_alone(W, h, C: tl.constexpr):
    """`forward.hidden_part_alone` without the product: the state itself."""
    r = ()
    for _ in tl.static_range(C.G):
        r = r + (h.to(tl.float32),)  # noqa: RUF005
    return r


@triton.jit
def nothing_held(sums, W, first: tl.constexpr, SLOTS: tl.constexpr, words, C: tl.constexpr):
    """`product.multiply_held` without the product: what it was given."""
    return sums


@triton.jit
def nothing_streamed(sums, W, SLOTS: tl.constexpr, p, bound, one, C: tl.constexpr):
    """`product.multiply_streamed` without the product: what it was given."""
    return sums


@triton.jit
def no_gates_alone(W, slots, place, C: tl.constexpr):
    """`backward.through_gates_alone` without the product: the sum of the slots."""
    dh = slots[0].to(tl.float32)
    for g in tl.static_range(1, C.G):
        dh += slots[g].to(tl.float32)
    return dh


@triton.jit
def plain_gated(x, r, carry):
    """The shape of a gated cell, with sums alone."""
    h = carry[0]
    for g in tl.static_range(len(x)):
        h += x[g] + r[g]
    return h, (h,), x + (r[0],)  # noqa: RUF005


@triton.jit
def plain_rnn(x, r, carry):
    """The shape of an RNN, with a sum alone."""
    return x[0] + r[0], (), ()


@triton.jit
def plain_factors(saved, before, after):
    """What was saved, unchanged."""
    return saved + before + after


@triton.jit
def plain_gated_backward(factors, dh, dcarry):
    """The shape of a gated cell's backward, with sums alone."""
    s, kept = dh + dcarry[0], dcarry[0]
    for i in tl.static_range(4, len(factors)):
        kept += factors[i]
    return (s + factors[0], s + factors[1], s + factors[2], s + factors[3]), (kept,)


@triton.jit
def plain_rnn_backward(factors, dh, dcarry):
    """The shape of an RNN's backward, with a sum alone."""
    return (dh + factors[0],), ()


def with_globals(kernel, **replaced):
    """A copy of a kernel, from the same source, in which some of the names it uses mean something else."""
    function = kernel.fn
    copy = types.FunctionType(function.__code__, function.__globals__ | replaced, function.__name__)
    copy.__module__, copy.__qualname__, copy.__doc__ = function.__module__, function.__qualname__, function.__doc__
    copy.__annotations__ = function.__annotations__
    return triton.jit(copy, do_not_specialize=getattr(kernel, "do_not_specialize", None))  # interpreted: none


def with_source(backward: bool, replaced: dict, **others):
    """A kernel in which what a source of a step uses means something else, and others of the kernel's own names."""
    module, name = (backward_kernel, "through_gates") if backward else (forward_kernel, "hidden_part")
    source = with_globals(module.add_source, **replaced)
    inner = with_globals(getattr(module, name), add_source=source)
    return with_globals(module.backward if backward else module.forward, **{name: inner}, **others)


@functools.cache
def without_product(backward: bool):
    """The kernel that waits for a state, and multiplies nothing with it."""
    left_out = dict(multiply_held=nothing_held, multiply_streamed=nothing_streamed, await_held=await_unused)
    if backward:
        return with_source(backward, left_out, through_gates_alone=no_gates_alone)
    return with_source(backward, left_out, hidden_part_alone=no_hidden_part_alone)


def waiting_by(assembly, backward: bool):
    """The kernel with another piece of PTX to wait by."""
    other = with_globals(await_vectors, await_assembly=assembly)
    changed = {
        name: with_globals(getattr(product, name), await_vectors=other) for name in ("await_held", "multiply_streamed")
    }
    return with_source(backward, changed)


@functools.cache
def without_wait(backward: bool):
    """The kernel that takes a state as it finds it."""
    return waiting_by(read_assembly, backward)


@functools.cache
def reading_again(backward: bool):
    """The kernel that reads again in the other way."""
    return waiting_by(other_assembly, backward)


@functools.cache
def without_pause(backward: bool):
    """The kernel that looks as soon as it waits."""
    return waiting_by(hasty_assembly, backward)


@functools.cache
def publishing_through(backward: bool):
    """The kernel that publishes by `.wt` stores."""
    return with_globals(backward_kernel.backward if backward else forward_kernel.forward, publish=publish_through)


KERNELS = {
    "wait": without_wait,
    "product": without_product,
    "write-through": publishing_through,
    "again": reading_again,
    "hasty": without_pause,
}


def of(p: Plan) -> tuple[str, ...]:
    """The stages that can be left out of a plan's kernel."""
    left_out = ("wait",) if not p.alone else ()
    left_out += ("product", "equations")
    saves = CELLS[p.cell].saves > 0
    return left_out + (("stores",) if saves and not p.backward else ())


def alternatives(p: Plan) -> tuple[str, ...]:
    """The other ways that there are for a plan's kernel."""
    return () if p.alone else tuple(way for way in ALTERNATIVES if way != "hasty" or p.paused)


@contextlib.contextmanager
def variant(stage: str | None, p: Plan):
    """Within this context the launcher, and resources.py, take the kernel of a plan without a stage, or in another way;
    None: as it is.

    "stores": the caller passes saving="nothing" besides.
    """
    changes = []

    def change(module, **values) -> None:
        for name, value in values.items():
            changes.append((module, name, getattr(module, name)))
            setattr(module, name, value)

    gated = CELLS[p.cell].gates > 1
    try:
        change(launch, _ready={})  # kernels that are ready to be launched again
        if stage in KERNELS:
            kernel = KERNELS[stage](p.backward)
            if p.backward:
                change(launch, backward_kernel=types.SimpleNamespace(backward=kernel))
            else:
                change(launch, forward_kernel=types.SimpleNamespace(forward=kernel))
        elif stage == "equations" and p.backward:
            step = plain_gated_backward if gated else plain_rnn_backward
            change(launch, CELLS=CELLS | {p.cell: replace(CELLS[p.cell], factors=plain_factors, backward=step)})
        elif stage == "equations":
            step = plain_gated if gated else plain_rnn
            change(launch, CELLS=CELLS | {p.cell: replace(CELLS[p.cell], forward=step)})
        elif stage == "stores":
            whole = compiled.signature
            change(compiled, signature=lambda *arguments: whole(*arguments) | {"gates": None, "aux": None})
        yield
    finally:
        for module, name, value in reversed(changes):
            setattr(module, name, value)
