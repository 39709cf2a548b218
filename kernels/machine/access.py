"""Loads, stores, atomics and asynchronous copies. (PTX ISA 9.7.9.8 to 9.7.9.27, 9.7.13.6, 9.7.13.7)

What memory makes of them stands in memory.py, shared.py and local.py. An address is of one of these by its instruction;
generic addresses are not known.
"""

import operator

import numpy as np

from . import copies
from .decode import Decoder, Instruction, instruction
from .operands import extended
from .parse import WIDTH, Statement, split
from .values import UNSIGNED, flush, is_float, stored, typed

STRONG = ("volatile", "relaxed", "acquire", "release", "mmio")
HINTS = (
    "weak gpu sys cta cg ca cs cv lu wb wt nc v2 v4 v8 L1::evict_last L1::evict_first L1::no_allocate L1::evict_normal "
    "L1::evict_unchanged L2::cache_hint L2::64B L2::128B L2::256B"
)


def space_of(s: Statement) -> str:
    """The memory that an instruction names."""
    space = s.one_of("global", "shared", "local")
    if space is None:
        raise ValueError("generic addresses")
    return space


def order_of(s: Statement) -> str:
    """What an access orders among programs: "" for a weak one, "relaxed", "acquire", "release", "acq_rel"; "cta",
    nothing, because it is strong within its own program alone; or "constant", a weak one of what is never written.
    """
    if s.has("nc"):
        return "constant"
    weak = s.op[0] in ("ld", "st") and not s.has(*STRONG)
    return "" if weak else "cta" if s.has("cta") else s.one_of("acquire", "release", "acq_rel") or "relaxed"


def vector(text: str) -> list[str]:
    """`{a, b}` -> a, b."""
    return split(text[1:-1]) if text.startswith("{") else [text]


@instruction("ld", "param global shared local volatile relaxed acquire mmio " + HINTS)
def ld(d: Decoder, s: Statement) -> Instruction:
    """9.7.9.8."""
    kind, width = s.op[-1], WIDTH[s.op[-1]]
    if s.has("param"):
        return _parameter(d, s)
    space, order = space_of(s), order_of(s)
    base, offset = d.address(s.operands[1])
    targets = [d.target(name) for name in vector(s.operands[0])]
    holders = [width if target < 0 else d.widths[target] for target in targets]

    asks = order not in ("", "constant") and space == "global"

    def load(run, mask):
        address = run.address(base, offset)
        if asks:
            run.ask(address, mask)
        values = run.load(space, address, width, len(targets), mask, order)
        if s.has("acquire") and order == "cta":
            run.fence_own(mask, True, False)
        for i, (target, holder) in enumerate(zip(targets, holders)):
            run.put(target, extended(values[..., i], kind, holder), mask)

    return d.act(load, asks=asks)


def _parameter(d: Decoder, s: Statement) -> Instruction:
    """9.7.9.8: a parameter of the kernel, in its lower bits if it is read narrower."""
    kind, width = s.op[-1], WIDTH[s.op[-1]]
    name, _, offset = s.operands[1].strip("[] ").partition("+")
    number = list(d.kernel.parameters).index(name.strip())
    target, shift = d.target(s.operands[0]), 8 * int(offset or "0", 0)
    holder = d.widths[target]

    def load(run, mask):
        value = (run.launch.arguments[number] >> shift) & ((1 << 8 * width) - 1)
        run.put(target, extended(np.full((1, 1), value, UNSIGNED[width]), kind, holder), mask)

    return d.act(load)


@instruction("st", "global shared local volatile relaxed release mmio " + HINTS)
def st(d: Decoder, s: Statement) -> Instruction:
    """9.7.9.11."""
    width, space = WIDTH[s.op[-1]], space_of(s)
    base, offset = d.address(s.operands[0])
    sources = [d.source(name, width) for name in vector(s.operands[1])]
    order = order_of(s)

    def store(run, mask):
        if s.has("release"):
            run.release(mask, order)
        run.store(space, run.address(base, offset), run.vector(sources, width), mask, order)

    return d.act(store, tells=space == "global")


@instruction("prefetch prefetchu", "global L1 L2 L2::evict_last L2::evict_normal")
def prefetch(d: Decoder, s: Statement) -> Instruction:
    """9.7.9.16: an address outside of all allocations is counted; hardware ignores it."""
    base, offset = d.address(s.operands[0])

    def look(run, mask):
        counts = run.launch.counts
        counts.prefetched += 32 * run.warps if mask is None else int(mask.sum())
        counts.prefetched_outside += run.outside(run.address(base, offset), mask)

    return d.act(look)


@instruction("discard applypriority", "global L2 L2::evict_normal")
def hint(d: Decoder, s: Statement) -> Instruction:
    """9.7.9.17, 9.7.9.18."""
    return d.act(lambda run, mask: None)


@instruction("createpolicy", "fractional L2::evict_last L2::evict_first L2::evict_unchanged L2::evict_normal")
def createpolicy(d: Decoder, s: Statement) -> Instruction:
    """9.7.9.19: policies are hints."""
    return d.value(s.operands[0], lambda f: np.zeros((1, 1), np.uint64))


_ATOMIC = {
    "add": operator.add,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "min": min,
    "max": max,
    "exch": lambda old, new: new,
    "inc": lambda old, most: old.dtype.type(0) if old >= most else old + old.dtype.type(1),
    "dec": lambda old, most: most if old == 0 or old > most else old - old.dtype.type(1),
}


@instruction(
    "atom red",
    "global shared add and or xor min max exch cas inc dec relaxed acquire release acq_rel gpu sys cta noftz v2 v4 v8 "
    "L2::cache_hint",
)
def atom(d: Decoder, s: Statement) -> Instruction:
    """9.7.13.6, 9.7.13.7: lane by lane and element by element, in random order; of vectors and pairs each element is
    atomic, the whole is not. Sums of float32 in global memory flush what is below the normal numbers, those in shared
    memory and those of 16 bits (`.noftz`) do not. With no order named they are relaxed.
    """
    operands = ["_", *s.operands] if s.op[0] == "red" else list(s.operands)
    what, space, width = s.one_of(*_ATOMIC, "cas"), space_of(s), WIDTH[s.op[-1]]
    kind = s.op[-1].removesuffix("x2")  # of an element; a register holds one, or two
    floating = is_float(kind)
    if floating and (what != "add" or s.has("noftz") != (WIDTH[kind] == 2)):
        raise ValueError(f"{what} of {kind}, {'with' if s.has('noftz') else 'without'} noftz")
    registers = [vector(text) for text in operands[2 : 4 if what == "cas" else 3]]
    count = int((s.one_of("v2", "v4", "v8") or "v1")[1:])
    if any(len(names) != count for names in registers) or (count > 1 and (space == "shared" or not floating)):
        raise ValueError("a vector")
    base, offset = d.address(operands[1])
    sources = [[d.source(name, width) for name in names] for names in registers]
    targets = [d.target(name) for name in vector(operands[0])]
    order = order_of(s)
    flushed = flush if kind == "f32" and space == "global" else lambda x: x

    def step(given):
        def change(i, old):
            if what == "cas":
                return given[1][i] if old == given[0][i] else old
            before, mine = (flushed(typed(np.array([x], UNSIGNED[WIDTH[kind]]), kind)) for x in (old, given[0][i]))
            return stored(flushed(np.asarray(_ATOMIC[what](before, mine))), kind)[0]

        return change

    def act(run, mask):
        if s.has("release", "acq_rel"):
            run.release(mask, order)
        values = [run.vector(slots, width).view(UNSIGNED[WIDTH[kind]]) for slots in sources]
        address = run.address(base, offset)
        if space == "global":
            run.ask(address, mask)
        old = run.atomic(space, address, values, step, mask, order)
        if s.has("acquire", "acq_rel") and order == "cta":
            run.fence_own(mask, True, False)
        for i, target in enumerate(targets):
            run.put(target, np.ascontiguousarray(old).view(UNSIGNED[width])[..., i], mask)

    return d.act(act, asks=True, tells=True)


@instruction(
    "cp", "async ca cg shared global commit_group wait_group wait_all L2::cache_hint L2::64B L2::128B L2::256B"
)
def copy(d: Decoder, s: Statement) -> Instruction:
    """9.7.9.25.3: asynchronous copies from global to shared memory, which count as this thread's once it has waited for
    their group. The bytes past `source size` are zeros.
    """
    if s.has("commit_group"):
        return d.act(lambda run, mask: copies.commit(run), together=True)
    if s.has("wait_group"):
        return d.act(lambda run, mask, left=int(s.operands[0], 0): copies.wait(run, left), together=True)
    if s.has("wait_all"):  # those of no group yet, too
        return d.act(lambda run, mask: (copies.commit(run), copies.wait(run, 0)), together=True)
    to, to_offset = d.address(s.operands[0])
    source, source_offset = d.address(s.operands[1])
    size = int(s.operands[2], 0)
    some = d.source(s.operands[3], 4) if len(s.operands) > 3 else d.constant(size, 4)

    def begin(run, mask):
        there = run.address(source, source_offset)
        length = np.broadcast_to(run.frame[some], (run.warps, 32)).astype(np.int64)
        if not np.isin(length, (0, size)).all():
            run.fail("a copy of a part of its bytes", mask)
        wanted = length > 0 if mask is None else (length > 0) & mask
        values = run.load("global", there, 4, size // 4, wanted)
        values = np.where((length > 0)[..., None], values, np.uint32(0))
        copies.begin(run, run.address(to, to_offset), values, mask, there, wanted)

    return d.act(begin)
